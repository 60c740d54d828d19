//! How peers are judged beyond their own chain, as `SetTrust` says: what is revoked, which trust
//! domains are ours, which roots count beside each certificate's own, and which key exchange.

use std::sync::Arc;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, TrustAnchor};

use super::crl::Crls;
use crate::identity::Identity;
use crate::wire::control as pb;

/// Far above what a rotation or a migration needs; each costs a look at each handshake.
const MAX_NAMES: usize = 64;

#[derive(Debug, Default)]
pub struct Trust {
    pub crls: Crls,
    pub aliases: Box<[Arc<str>]>,
    pub compliance: Compliance,
    pub additional_roots: Vec<TrustAnchor<'static>>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Compliance {
    #[default]
    None,
    /// X25519MLKEM768 only (facts ztunnel 3.1).
    Pqc,
}

/// What can't be read of a `SetTrust`.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{field}: {text}")]
pub struct BadTrust {
    pub field: &'static str,
    text: String,
}

/// Why a peer that was let in is trusted no longer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Distrust {
    #[error("the CRL revokes serial {0} in the peer's chain")]
    Revoked(String),
    #[error("the root of the peer's chain isn't trusted any more")]
    Root,
    #[error("the peer's trust domain {0} isn't an alias of this mesh any more")]
    TrustDomain(String),
    #[error("the peer is {0}, which isn't expected any more")]
    Identity(Identity),
    #[error("the key exchange wasn't post-quantum, as the compliance policy wants it now")]
    KeyExchange,
    #[error("its chain is too long to be checked again, and what counts has changed")]
    Untracked,
    #[error("{0}")]
    Unproven(String),
}

impl Trust {
    /// CPU-bound where the CRL is large.
    pub fn parse(raw: &pb::SetTrust) -> Result<Self, BadTrust> {
        let bad = |field| move |text| BadTrust { field, text };
        Ok(Self {
            crls: Crls::parse(&raw.crl).map_err(bad("crl"))?,
            aliases: aliases(&raw.trust_domain_aliases).map_err(bad("trust_domain_aliases"))?,
            compliance: match raw.compliance_policy.as_str() {
                "" => Compliance::None,
                "pqc" => Compliance::Pqc,
                other => {
                    let text = format!("{other:?} isn't known: leave it empty or say pqc");
                    return Err(bad("compliance_policy")(text));
                }
            },
            additional_roots: roots(&raw.additional_roots).map_err(bad("additional_roots"))?,
        })
    }

    /// Whether this trust domain counts as that of a certificate of `own`.
    pub fn is_home(&self, own: &str, domain: &str) -> bool {
        domain == own || self.aliases.iter().any(|alias| **alias == *domain)
    }

    /// Whether a peer that shows `found` is the one that was `expected` by somebody of `own`.
    pub fn is_same(&self, own: &str, expected: &Identity, found: &Identity) -> bool {
        expected == found
            || (expected.namespace() == found.namespace()
                && expected.service_account() == found.service_account()
                && self.is_home(own, expected.trust_domain())
                && self.is_home(own, found.trust_domain()))
    }
}

fn aliases(raw: &[String]) -> Result<Box<[Arc<str>]>, String> {
    if raw.len() > MAX_NAMES {
        return Err(format!("{} are too many, {MAX_NAMES} the most", raw.len()));
    }
    let known = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"._-".contains(&b);
    for alias in raw {
        if alias.is_empty() || alias.len() > 255 || !alias.bytes().all(known) {
            return Err(format!("{alias:?} isn't a trust domain"));
        }
    }
    Ok(raw.iter().map(|alias| alias.as_str().into()).collect())
}

fn roots(raw: &[String]) -> Result<Vec<TrustAnchor<'static>>, String> {
    let mut roots = Vec::new();
    for (index, text) in raw.iter().enumerate() {
        let here = |err: String| format!("entry {}: {err}", index + 1);
        let before = roots.len();
        for certificate in CertificateDer::pem_slice_iter(text.as_bytes()) {
            let certificate = certificate.map_err(|err| here(format!("not PEM: {err}")))?;
            roots.push(anchor(&certificate).map_err(here)?);
        }
        if roots.len() == before {
            return Err(here("no certificate in it".to_owned()));
        }
    }
    match roots.len() > MAX_NAMES {
        true => Err(format!(
            "{} are too many, {MAX_NAMES} the most",
            roots.len()
        )),
        false => Ok(roots),
    }
}

/// What webpki needs of a root certificate.
pub fn anchor(root: &CertificateDer<'_>) -> Result<TrustAnchor<'static>, String> {
    webpki::anchor_from_trusted_cert(root)
        .map(|anchor| anchor.to_owned())
        .map_err(|err| format!("not usable as a CA: {err}"))
}
