//! The chain of a peer: does it lead to roots that count, and is nothing in it revoked? One judge for
//! each of our certificates, since roots come with these.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use ahash::RandomState;
use parking_lot::Mutex;
use rustls::pki_types::{CertificateDer, TrustAnchor, UnixTime};
use rustls::{CertificateError, Error, OtherError};
use webpki::{EndEntityCert, KeyUsage};
use x509_parser::prelude::{FromDer, X509Certificate};

use super::base::TrustBase;
use super::check::system_time;
use super::path::Path;
use super::provider::{digest, provider};
use super::verify::spiffe_ids;
use crate::identity::Identity;

/// Chains kept; over it all are forgotten. Peers that a pod talks to at a time are fewer.
const MAX_PROVEN: usize = 1024;

type Digest = [u8; 48];

#[derive(Debug)]
pub struct Judge {
    pub base: Arc<TrustBase>,
    pub roots: Vec<TrustAnchor<'static>>,
    /// What was proved before, by role and digest of the chain: its signatures needn't be checked
    /// at each of a peer's handshakes. Whether it still counts is asked anew each time.
    proven: Mutex<HashMap<(Role, Digest), Arc<Proven>, RandomState>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    Client,
    Server,
}

/// What a chain says of its holder.
#[derive(Debug)]
pub struct Proven {
    /// SPIFFE ids among its URI names, in order. The first is what it is known by.
    pub ids: Box<[Identity]>,
    pub path: Path,
    /// While all of its certificates are valid.
    from: SystemTime,
    pub until: SystemTime,
}

impl Judge {
    pub fn new(base: Arc<TrustBase>, roots: Vec<TrustAnchor<'static>>) -> Self {
        Self {
            base,
            roots,
            proven: Mutex::default(),
        }
    }

    /// The whole chain, as a client or a server shows it.
    pub fn prove(
        &self,
        role: Role,
        leaf: &CertificateDer<'_>,
        rest: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<Arc<Proven>, Error> {
        let key = (role, digest(leaf, rest));
        let moment = SystemTime::UNIX_EPOCH + Duration::from_secs(now.as_secs());
        let known = self.proven.lock().get(&key).cloned();
        let known = known.filter(|k| k.from <= moment && moment < k.until && self.accepts(&k.path));
        let proven = match known {
            Some(known) => known,
            None => {
                let proven = Arc::new(self.verify(role, leaf, rest, now)?);
                let mut all = self.proven.lock();
                if all.len() >= MAX_PROVEN {
                    all.clear();
                }
                all.insert(key, proven.clone());
                proven
            }
        };
        match self.base.trust().crls.revoked(&proven.path) {
            Some(_) => Err(CertificateError::Revoked.into()),
            None => Ok(proven),
        }
    }

    /// Whether the path ends at a root that counts now.
    pub fn accepts(&self, path: &Path) -> bool {
        path.leads_to(&self.roots) || path.leads_to(&self.base.trust().additional_roots)
    }

    fn verify(
        &self,
        role: Role,
        leaf: &CertificateDer<'_>,
        rest: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<Proven, Error> {
        let parsed = EndEntityCert::try_from(leaf).map_err(refusal)?;
        let trust = self.base.trust();
        let path = match verify(&parsed, &self.roots, rest, now, role) {
            Err(first) if !trust.additional_roots.is_empty() => {
                verify(&parsed, &trust.additional_roots, rest, now, role).map_err(|_| first)
            }
            result => result,
        };
        let path = path.map_err(refusal)?;
        let bad = |_| Error::from(CertificateError::BadEncoding);
        let (_, certificate) = X509Certificate::from_der(leaf).map_err(bad)?;
        let mut from = system_time(certificate.validity().not_before);
        let mut until = system_time(certificate.validity().not_after);
        for der in rest {
            let (_, certificate) = X509Certificate::from_der(der).map_err(bad)?;
            from = from.max(system_time(certificate.validity().not_before));
            until = until.min(system_time(certificate.validity().not_after));
        }
        Ok(Proven {
            ids: spiffe_ids(&certificate).into(),
            path,
            from,
            until,
        })
    }
}

/// A chain by itself, against these roots alone.
pub fn path(
    leaf: &CertificateDer<'_>,
    rest: &[CertificateDer<'_>],
    roots: &[TrustAnchor<'_>],
    now: UnixTime,
    role: Role,
) -> Result<Path, Error> {
    let leaf = EndEntityCert::try_from(leaf).map_err(refusal)?;
    verify(&leaf, roots, rest, now, role).map_err(refusal)
}

fn verify(
    leaf: &EndEntityCert<'_>,
    roots: &[TrustAnchor<'_>],
    rest: &[CertificateDer<'_>],
    now: UnixTime,
    role: Role,
) -> Result<Path, webpki::Error> {
    let usage = match role {
        Role::Client => KeyUsage::client_auth(),
        Role::Server => KeyUsage::server_auth(),
    };
    let algorithms = provider().signature_verification_algorithms.all;
    leaf.verify_for_usage(algorithms, roots, rest, now, usage, None, None)
        .map(|verified| Path::new(&verified))
}

/// In the words that decide which alert the peer gets.
fn refusal(error: webpki::Error) -> Error {
    use webpki::Error::{
        BadDer, BadDerTime, CertExpired, CertNotValidYet, InvalidSignatureForPublicKey,
        RequiredEkuNotFoundContext, TrailingData, UnknownIssuer,
    };
    let error = match error {
        BadDer | BadDerTime | TrailingData(_) => CertificateError::BadEncoding,
        CertNotValidYet { time, not_before } => {
            CertificateError::NotValidYetContext { time, not_before }
        }
        CertExpired { time, not_after } => CertificateError::ExpiredContext { time, not_after },
        UnknownIssuer => CertificateError::UnknownIssuer,
        InvalidSignatureForPublicKey => CertificateError::BadSignature,
        RequiredEkuNotFoundContext(_) => CertificateError::InvalidPurpose,
        other => CertificateError::Other(OtherError(Arc::new(other))),
    };
    error.into()
}
