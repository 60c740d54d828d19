//! What a certificate must be before it is used: for our key, for the identity, valid now, and
//! chained to its roots (facts ztunnel 8.2). Each text says which check failed.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, TrustAnchor, UnixTime};
use rustls::sign::{CertifiedKey, SigningKey};
use x509_parser::prelude::{FromDer, X509Certificate};
use x509_parser::time::ASN1Time;

use super::base::TrustBase;
use super::judge::{Role, path};
use super::trust::anchor;
use super::verify::{describe, spiffe_ids};
use crate::identity::Identity;

/// Certificates as they came, and what is read from the leaf.
pub struct Chain {
    pub certificates: Vec<CertificateDer<'static>>,
    pub roots: Vec<CertificateDer<'static>>,
    pub anchors: Vec<TrustAnchor<'static>>,
    pub leaf: Leaf,
}

pub struct Leaf {
    pub ids: Vec<Identity>,
    pub not_before: SystemTime,
    pub not_after: SystemTime,
    /// Decimal.
    pub serial: String,
}

impl Chain {
    pub fn parse(chain_pem: &[String], roots_pem: &[String]) -> Result<Self, String> {
        let certificates = parse_pem("chain", chain_pem)?;
        let roots = parse_pem("roots", roots_pem)?;
        let anchors: Result<_, _> = roots.iter().map(anchor).collect();
        let anchors = anchors.map_err(|err| format!("roots: {err}"))?;
        let leaf = Leaf::parse(&certificates[0])?;
        Ok(Self {
            certificates,
            roots,
            anchors,
            leaf,
        })
    }

    /// All checks against our own key, identity, the clock and what is revoked.
    pub fn check(
        &self,
        identity: &Identity,
        key: &Arc<dyn SigningKey>,
        base: &Arc<TrustBase>,
        now: SystemTime,
    ) -> Result<(), String> {
        CertifiedKey::new(self.certificates.clone(), key.clone())
            .keys_match()
            .map_err(|_| "the leaf isn't for the key of the newest CSR".to_owned())?;
        self.leaf.check(identity, now)?;
        self.check_chain(base, now)
    }

    /// As peers will do it, in both roles.
    fn check_chain(&self, base: &Arc<TrustBase>, now: SystemTime) -> Result<(), String> {
        let (leaf, rest) = (&self.certificates[0], &self.certificates[1..]);
        let now = UnixTime::since_unix_epoch(now.duration_since(UNIX_EPOCH).unwrap_or_default());
        for (role, name) in [(Role::Server, "server"), (Role::Client, "client")] {
            let path = path(leaf, rest, &self.anchors, now, role).map_err(|err| {
                let text = describe(&std::io::Error::other(err));
                format!("the chain doesn't lead to the given roots (as {name}): {text}")
            })?;
            if let Some(link) = base.trust().crls.revoked(&path) {
                return Err(format!(
                    "the CRL revokes serial {} in the chain",
                    link.serial()
                ));
            }
        }
        Ok(())
    }
}

impl Leaf {
    fn parse(der: &CertificateDer<'_>) -> Result<Self, String> {
        let (_, certificate) = X509Certificate::from_der(der)
            .map_err(|err| format!("chain: the leaf isn't a certificate: {err}"))?;
        Ok(Self {
            ids: spiffe_ids(&certificate),
            not_before: system_time(certificate.validity().not_before),
            not_after: system_time(certificate.validity().not_after),
            serial: certificate.tbs_certificate.serial.to_string(),
        })
    }

    fn check(&self, identity: &Identity, now: SystemTime) -> Result<(), String> {
        match self.ids.as_slice() {
            [] => return Err("the leaf has no SPIFFE URI SAN".to_owned()),
            [only] if only == identity => {}
            [first, ..] if first != identity => {
                return Err(format!("the leaf is for {first}, not for this identity"));
            }
            _ => return Err("the leaf names further SPIFFE identities".to_owned()),
        }
        if now < self.not_before {
            let ahead = self.not_before.duration_since(now).unwrap_or_default();
            return Err(format!(
                "the leaf isn't valid for another {}s: is this node's clock right?",
                ahead.as_secs()
            ));
        }
        if now >= self.not_after {
            let ago = now.duration_since(self.not_after).unwrap_or_default();
            return Err(format!("the leaf expired {}s ago", ago.as_secs()));
        }
        Ok(())
    }
}

/// Times before 1970 are 1970.
pub fn system_time(time: ASN1Time) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(u64::try_from(time.timestamp()).unwrap_or_default())
}

/// At least one certificate; every block must be readable.
fn parse_pem(field: &str, texts: &[String]) -> Result<Vec<CertificateDer<'static>>, String> {
    let mut certificates = Vec::new();
    for text in texts {
        for certificate in CertificateDer::pem_slice_iter(text.as_bytes()) {
            let certificate = certificate.map_err(|err| format!("{field}: not PEM: {err}"))?;
            certificates.push(certificate);
        }
    }
    match certificates.is_empty() {
        true => Err(format!("{field}: no certificate in it")),
        false => Ok(certificates),
    }
}
