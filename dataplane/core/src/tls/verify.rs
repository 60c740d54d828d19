//! Who may be at the other end (facts ztunnel 3.1): the chain is the judge's business, the SPIFFE
//! identity is ours. There is no way to build a verifier that skips either.

use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::verify_tls13_signature;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    AlertDescription, CertificateError, DigitallySignedStruct, DistinguishedName, Error,
    OtherError, PeerIncompatible, SignatureScheme,
};
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::X509Certificate;

use super::judge::{Judge, Role};
use super::provider::provider;
use super::trust::{Distrust, Trust};
use crate::identity::Identity;

/// Why a chain that is good isn't let in all the same.
#[derive(Debug, thiserror::Error)]
enum NotThem {
    #[error("the peer's certificate names no SPIFFE identity")]
    Nobody,
    #[error("the peer is {peer}, but only trust domain {ours} is let in")]
    TrustDomain { peer: Identity, ours: String },
    #[error("the peer is {peer}, but {expected} was expected")]
    Unexpected { peer: Identity, expected: String },
}

/// Whom a certificate's holder lets in, by SPIFFE identity.
#[derive(Clone, Debug)]
pub enum Rule {
    /// Clients of our 15008: anybody of our trust domain or an alias of it.
    Clients { own: Identity },
    /// Servers: one of the identities that were asked for; with aliases also that identity in another
    /// trust domain of ours. The server's name isn't looked at.
    Servers {
        own: Identity,
        expected: Arc<[Identity]>,
    },
}

/// Chain and identity together, in either role.
#[derive(Debug)]
pub struct Verifier {
    pub judge: Arc<Judge>,
    pub rule: Rule,
}

impl Rule {
    /// Of the peer.
    pub fn role(&self) -> Role {
        match self {
            Self::Clients { .. } => Role::Client,
            Self::Servers { .. } => Role::Server,
        }
    }

    /// Whose certificate is at our end.
    pub fn own(&self) -> &Identity {
        match self {
            Self::Clients { own } | Self::Servers { own, .. } => own,
        }
    }

    fn admits(&self, ids: &[Identity], trust: &Trust) -> bool {
        match self {
            Self::Clients { own } => {
                let home = |id: &Identity| trust.is_home(own.trust_domain(), id.trust_domain());
                ids.iter().any(home)
            }
            Self::Servers { own, expected } => ids.iter().any(|id| {
                let mut expected = expected.iter();
                expected.any(|wanted| trust.is_same(own.trust_domain(), wanted, id))
            }),
        }
    }

    /// Why a peer that was let in isn't any more.
    pub fn left(&self, ids: &[Identity], trust: &Trust) -> Option<Distrust> {
        if self.admits(ids, trust) {
            return None;
        }
        let first = ids.first()?;
        Some(match self {
            Self::Clients { .. } => Distrust::TrustDomain(first.trust_domain().to_owned()),
            Self::Servers { .. } => Distrust::Identity(first.clone()),
        })
    }

    fn refusal(&self, ids: &[Identity]) -> NotThem {
        match (ids.first().cloned(), self) {
            (None, _) => NotThem::Nobody,
            (Some(peer), Self::Clients { own }) => NotThem::TrustDomain {
                peer,
                ours: own.trust_domain().to_owned(),
            },
            (Some(peer), Self::Servers { expected, .. }) => NotThem::Unexpected {
                peer,
                expected: names(expected),
            },
        }
    }
}

impl Verifier {
    pub fn verify(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), Error> {
        let role = self.rule.role();
        let proven = self.judge.prove(role, leaf, intermediates, now)?;
        match self.rule.admits(&proven.ids, &self.judge.base.trust()) {
            true => Ok(()),
            false => {
                let reason = OtherError(Arc::new(self.rule.refusal(&proven.ids)));
                Err(CertificateError::Other(reason).into())
            }
        }
    }

    fn verify_counted(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), Error> {
        let verified = self.verify(leaf, intermediates, now);
        if let Err(Error::InvalidCertificate(CertificateError::Revoked)) = verified {
            self.judge.base.count_rejection(self.rule.role());
        }
        verified
    }
}

/// The handshake's own signature, the same for both roles.
macro_rules! handshake_signature {
    () => {
        fn verify_tls12_signature(
            &self,
            _message: &[u8],
            _cert: &CertificateDer<'_>,
            _dss: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            Err(PeerIncompatible::Tls12NotOffered.into())
        }

        fn verify_tls13_signature(
            &self,
            message: &[u8],
            cert: &CertificateDer<'_>,
            dss: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            let algorithms = &provider().signature_verification_algorithms;
            verify_tls13_signature(message, cert, dss, algorithms)
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            let algorithms = &provider().signature_verification_algorithms;
            algorithms.supported_schemes()
        }
    };
}

impl ClientCertVerifier for Verifier {
    /// None are named: roots change while this lives, and a mesh's peers have one certificate.
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.verify_counted(leaf, intermediates, now)
            .map(|()| ClientCertVerified::assertion())
    }

    handshake_signature!();
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.verify_counted(leaf, intermediates, now)
            .map(|()| ServerCertVerified::assertion())
    }

    handshake_signature!();
}

/// SPIFFE identities among the URI names of a certificate, in order. Others are passed over.
pub fn spiffe_ids(certificate: &X509Certificate<'_>) -> Vec<Identity> {
    let Ok(Some(names)) = certificate.subject_alternative_name() else {
        return Vec::new();
    };
    let uris = names.value.general_names.iter().filter_map(|n| match n {
        GeneralName::URI(uri) => uri.parse().ok(),
        _ => None,
    });
    uris.collect()
}

/// The identity a peer is known by: its first (facts ztunnel 3.1). Nothing of the chain is checked.
#[cfg(any(test, feature = "fuzzing"))]
pub fn peer_identity(chain: Option<&[CertificateDer<'_>]>) -> Option<Identity> {
    use x509_parser::prelude::FromDer;
    let (_, leaf) = X509Certificate::from_der(chain?.first()?).ok()?;
    spiffe_ids(&leaf).into_iter().next()
}

/// A TLS error as an operator should read it, also when it comes wrapped in an I/O error.
pub fn describe(err: &std::io::Error) -> String {
    match tls_error(err) {
        Some(Error::InvalidCertificate(CertificateError::Other(OtherError(inner)))) => {
            inner.to_string()
        }
        Some(Error::InvalidCertificate(CertificateError::Revoked)) => {
            "the CRL revokes a certificate of the peer's chain".to_owned()
        }
        Some(Error::AlertReceived(AlertDescription::CertificateRevoked)) => {
            "the peer refused: our certificate is revoked".to_owned()
        }
        Some(Error::AlertReceived(alert)) => format!("the peer refused with alert {alert:?}"),
        Some(tls) => tls.to_string(),
        None => err.to_string(),
    }
}

/// Whether a handshake failed since we found the peer's chain revoked.
pub fn is_revoked(err: &std::io::Error) -> bool {
    matches!(
        tls_error(err),
        Some(Error::InvalidCertificate(CertificateError::Revoked))
    )
}

fn tls_error(err: &std::io::Error) -> Option<&Error> {
    err.get_ref()?.downcast_ref::<Error>()
}

fn names(ids: &[Identity]) -> String {
    let names: Vec<_> = ids.iter().map(Identity::to_string).collect();
    match names.is_empty() {
        true => "nobody".to_owned(),
        false => names.join(" or "),
    }
}
