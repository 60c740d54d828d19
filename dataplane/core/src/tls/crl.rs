//! Revocation lists (facts ztunnel 8.5). A list counts for what its issuer's key has signed; whether
//! it expired and how its issuer scoped it isn't looked at: a serial that an issuer revoked once
//! stays revoked. Certificates that no list speaks of are good.

use std::collections::{HashMap, HashSet};

use ahash::RandomState;
use rustls::pki_types::CertificateRevocationListDer;
use rustls::pki_types::pem::PemObject;
use webpki::BorrowedCertRevocationList;

use super::path::{Link, Path};
use super::provider::provider;

/// Serial numbers of one issuer as their DER contents.
type Serials = HashSet<Box<[u8]>, RandomState>;

/// Lists by the name of their issuer: several where a CA got a new key.
#[derive(Debug, Default)]
pub struct Crls {
    by_issuer: HashMap<Box<[u8]>, Vec<Crl>, RandomState>,
}

#[derive(Debug)]
struct Crl {
    revoked: Serials,
    /// Whole: what the signature covers is in it.
    der: CertificateRevocationListDer<'static>,
}

impl Crls {
    /// PEM of any number of blocks, or one list in DER; nothing but space is no list. The error says
    /// which block can't be read and why.
    pub fn parse(text: &[u8]) -> Result<Self, String> {
        let mut crls = Self::default();
        if text.trim_ascii().is_empty() {
            return Ok(crls);
        }
        if !text.windows(11).any(|window| window == b"-----BEGIN ") {
            crls.add(CertificateRevocationListDer::from(text.to_vec()))
                .map_err(|err| format!("neither PEM nor a list in DER: {err}"))?;
            return Ok(crls);
        }
        for (block, list) in CertificateRevocationListDer::pem_slice_iter(text).enumerate() {
            list.map_err(|err| err.to_string())
                .and_then(|list| crls.add(list))
                .map_err(|err| format!("block {}: {err}", block + 1))?;
        }
        match crls.by_issuer.is_empty() {
            true => Err("no X509 CRL block in it".to_owned()),
            false => Ok(crls),
        }
    }

    /// How many certificates are revoked.
    pub fn len(&self) -> usize {
        let lists = self.by_issuer.values().flatten();
        lists.map(|crl| crl.revoked.len()).sum()
    }

    /// The first certificate of the path that its issuer revoked.
    pub fn revoked<'a>(&self, path: &'a Path) -> Option<&'a Link> {
        path.links().iter().find(|link| {
            let lists = self.by_issuer.get(&link.issuer).into_iter().flatten();
            lists
                .filter(|crl| crl.revoked.contains(&link.serial))
                .any(|crl| crl.signed_by(&link.issuer_key))
        })
    }

    fn add(&mut self, der: CertificateRevocationListDer<'static>) -> Result<(), String> {
        let (issuer, revoked) = {
            let list = BorrowedCertRevocationList::from_der(&der).map_err(|e| e.to_string())?;
            let serials: Result<Serials, _> = list
                .into_iter()
                .map(|entry| entry.map(|entry| Box::from(entry.serial_number)))
                .collect();
            let serials = serials.map_err(|e| e.to_string())?;
            let issuer = webpki::CertRevocationList::from(list).issuer().into();
            (issuer, serials)
        };
        let crl = Crl { revoked, der };
        let (_, algorithm, _) = crl.signed().ok_or("BadDer")?;
        let algorithms = provider().signature_verification_algorithms.all;
        let mut known = algorithms.iter();
        if !known.any(|known| known.signature_alg_id().as_ref() == algorithm) {
            return Err("its signature algorithm isn't known here".to_owned());
        }
        self.by_issuer.entry(issuer).or_default().push(crl);
        Ok(())
    }
}

impl Crl {
    /// A list of another key of the same name says nothing about this issuer's certificates.
    fn signed_by(&self, key: &[u8]) -> bool {
        let (Some((message, algorithm, signature)), Some((kind, bits))) =
            (self.signed(), public_key(key))
        else {
            return false;
        };
        let algorithms = provider().signature_verification_algorithms.all;
        algorithms
            .iter()
            .filter(|known| known.signature_alg_id().as_ref() == algorithm)
            .filter(|known| known.public_key_alg_id().as_ref() == kind)
            .any(|known| known.verify_signature(bits, message, signature).is_ok())
    }

    /// What is signed, by which algorithm, and the signature.
    fn signed(&self) -> Option<(&[u8], &[u8], &[u8])> {
        let (list, _) = contents(SEQUENCE, &self.der)?;
        let (_, rest) = contents(SEQUENCE, list)?;
        let message = &list[..list.len() - rest.len()];
        let (algorithm, rest) = contents(SEQUENCE, rest)?;
        Some((message, algorithm, bit_string(rest)?))
    }
}

const SEQUENCE: u8 = 0x30;
const BIT_STRING: u8 = 0x03;

/// Algorithm and bits, from the contents of a SubjectPublicKeyInfo.
fn public_key(key: &[u8]) -> Option<(&[u8], &[u8])> {
    let (algorithm, rest) = contents(SEQUENCE, key)?;
    Some((algorithm, bit_string(rest)?))
}

/// Of whole bytes, as keys and signatures are.
fn bit_string(der: &[u8]) -> Option<&[u8]> {
    let (bits, _) = contents(BIT_STRING, der)?;
    bits.strip_prefix(&[0])
}

/// The contents of the first DER element, if it has this tag, and what follows it.
pub fn contents(tag: u8, der: &[u8]) -> Option<(&[u8], &[u8])> {
    let (found, rest) = der.split_first()?;
    let (first, rest) = rest.split_first()?;
    let (length, rest) = match *first {
        short @ ..=0x7f => (usize::from(short), rest),
        long @ 0x81..=0x84 => {
            let (bytes, rest) = rest.split_at_checked(usize::from(long - 0x80))?;
            let length = bytes.iter().fold(0, |sum, b| sum << 8 | usize::from(*b));
            (length, rest)
        }
        _ => return None,
    };
    let parts = rest.split_at_checked(length);
    parts.filter(|_| *found == tag)
}
