//! What was proved of a peer's chain: kept to be compared with a later CRL or other roots, since
//! neither needs the certificates again.

use rustls::pki_types::TrustAnchor;
use webpki::VerifiedPath;

use super::crl::contents;

/// From the leaf to what the trust anchor signed.
#[derive(Debug, PartialEq, Eq)]
pub struct Path {
    links: Box<[Link]>,
}

/// One certificate, by what a CRL knows of it.
#[derive(Debug, PartialEq, Eq)]
pub struct Link {
    /// Contents of the issuer's DER name.
    pub issuer: Box<[u8]>,
    /// Contents of the DER number.
    pub serial: Box<[u8]>,
    /// Contents of the issuer's SubjectPublicKeyInfo.
    pub issuer_key: Box<[u8]>,
}

impl Path {
    pub fn new(verified: &VerifiedPath<'_>) -> Self {
        const SEQUENCE: u8 = 0x30;
        let mut links = vec![Link {
            issuer: verified.end_entity().issuer().into(),
            serial: verified.end_entity().serial().into(),
            issuer_key: Box::default(),
        }];
        for certificate in verified.intermediate_certificates() {
            let key = certificate.subject_public_key_info();
            // The library made this element itself; what isn't one would match no key.
            let key = contents(SEQUENCE, &key).map_or(&[][..], |(key, _)| key);
            set_key(&mut links, key);
            links.push(Link {
                issuer: certificate.issuer().into(),
                serial: certificate.serial().into(),
                issuer_key: Box::default(),
            });
        }
        set_key(&mut links, &verified.anchor().subject_public_key_info);
        Self {
            links: links.into(),
        }
    }

    pub fn links(&self) -> &[Link] {
        &self.links
    }

    /// Bytes that it keeps.
    pub fn size(&self) -> usize {
        let links = self.links.iter();
        links
            .map(|link| link.issuer.len() + link.serial.len() + link.issuer_key.len())
            .sum()
    }

    /// Whether it ends at one of these.
    pub fn leads_to(&self, anchors: &[TrustAnchor<'_>]) -> bool {
        self.links.last().is_some_and(|last| {
            anchors.iter().any(|anchor| {
                *anchor.subject == *last.issuer
                    && *anchor.subject_public_key_info == *last.issuer_key
            })
        })
    }
}

impl Link {
    /// The serial number as tools print it: hexadecimal, without leading zeros.
    pub fn serial(&self) -> String {
        let hex: String = self.serial.iter().map(|b| format!("{b:02x}")).collect();
        match hex.trim_start_matches('0') {
            "" => "0".to_owned(),
            digits => digits.to_owned(),
        }
    }
}

fn set_key(links: &mut [Link], key: &[u8]) {
    if let Some(last) = links.last_mut() {
        last.issuer_key = key.into();
    }
}
