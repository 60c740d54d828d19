//! Certificates in the shape that `istioctl` reads (facts ztunnel 13.1).

use rustls::pki_types::CertificateDer;
use serde_json::{Value, json};
use x509_parser::prelude::{FromDer, X509Certificate};
use x509_parser::time::ASN1Time;

use super::Credentials;
use crate::identity::Identity;

/// One entry of the `certificates` array.
pub fn entry(identity: &Identity, current: Option<&Credentials>, error: &str) -> Value {
    let state = match (current, error) {
        (Some(_), _) => "Available".to_owned(),
        (None, "") => "Initializing".to_owned(),
        (None, error) => format!("Unavailable: {error}"),
    };
    let list = |certificates: &[CertificateDer<'_>]| -> Vec<Value> {
        certificates.iter().filter_map(certificate).collect()
    };
    json!({
        "identity": identity.to_string(),
        "state": state,
        "certChain": current.map(|c| list(&c.chain)).unwrap_or_default(),
        "rootCerts": current.map(|c| list(&c.roots)).unwrap_or_default(),
    })
}

fn certificate(der: &CertificateDer<'_>) -> Option<Value> {
    let (_, parsed) = X509Certificate::from_der(der).ok()?;
    Some(json!({
        "pem": base64(pem(der).as_bytes()),
        "serialNumber": parsed.tbs_certificate.serial.to_string(),
        "validFrom": rfc3339(parsed.validity().not_before),
        "expirationTime": rfc3339(parsed.validity().not_after),
    }))
}

fn rfc3339(time: ASN1Time) -> String {
    let t = time.to_datetime();
    format!(
        "{:04}-{:02}-{:02}T{:02}:{:02}:{:02}Z",
        t.year(),
        u8::from(t.month()),
        t.day(),
        t.hour(),
        t.minute(),
        t.second()
    )
}

fn pem(der: &[u8]) -> String {
    let mut text = "-----BEGIN CERTIFICATE-----\n".to_owned();
    // 48 bytes fill a line of 64 characters.
    for line in der.chunks(48) {
        text.push_str(&base64(line));
        text.push('\n');
    }
    text.push_str("-----END CERTIFICATE-----\n");
    text
}

fn base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for group in bytes.chunks(3) {
        let byte = |i: usize| u32::from(group.get(i).copied().unwrap_or_default());
        let bits = byte(0) << 16 | byte(1) << 8 | byte(2);
        for i in 0..4 {
            let index = (bits >> (18 - 6 * i)) & 0x3f;
            match i <= group.len() {
                true => text.push(char::from(ALPHABET[index as usize])),
                false => text.push('='),
            }
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_matches_the_vectors_of_rfc_4648() {
        for (plain, coded) in [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foob", "Zm9vYg=="),
            ("fooba", "Zm9vYmE="),
            ("foobar", "Zm9vYmFy"),
        ] {
            assert_eq!(base64(plain.as_bytes()), coded);
        }
    }
}
