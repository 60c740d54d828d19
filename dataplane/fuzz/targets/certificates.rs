//! Certificates of a CA's answer and of peers, roots and CRLs, as PEM and as DER: refused with a
//! reason or taken, never a crash, and no identity that doesn't print as it was read.
#![no_main]

use libfuzzer_sys::fuzz_target;
use rustls_pki_types::CertificateDer;
use underpass_core::identity::Identity;
use underpass_core::tls::{CertStore, Trust, peer_identity};
use underpass_core::wire::control::SetTrust;

fuzz_target!(|data: &[u8]| {
    let identity = Identity::new("cluster.local", "ns", "sa");
    let (store, _events) = CertStore::new();
    store.new_csr(&identity).expect("a key can always be made");
    let chain = vec![pem(data), String::from_utf8_lossy(data).into_owned()];
    for chain in [&chain[..1], &chain[1..], &chain[..]] {
        // Nobody knows the key that was just made, so nothing may be taken.
        assert!(store.install(&identity, chain, chain).is_err());
    }
    for crl in [
        data.to_vec(),
        pem(data).replace("CERTIFICATE", "X509 CRL").into(),
    ] {
        let additional_roots = chain.clone();
        let trust = SetTrust {
            crl: crl.into(),
            additional_roots,
            ..Default::default()
        };
        // Either part may be unreadable; nobody is to crash.
        let _ = Trust::parse(&trust);
        let _ = Trust::parse(&SetTrust {
            additional_roots: vec![],
            ..trust
        });
    }
    let leaf = [CertificateDer::from(data)];
    if let Some(peer) = peer_identity(Some(&leaf)) {
        assert_eq!(peer.to_string().parse().ok(), Some(peer));
    }
});

fn pem(der: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::from("-----BEGIN CERTIFICATE-----\n");
    for group in der.chunks(3) {
        let bits = group
            .iter()
            .fold(0u32, |bits, byte| bits << 8 | u32::from(*byte));
        let bits = bits << (8 * (3 - group.len()));
        for at in 0..4 {
            match at <= group.len() {
                true => text.push(ALPHABET[(bits >> (18 - 6 * at) & 63) as usize].into()),
                false => text.push('='),
            }
        }
    }
    text + "\n-----END CERTIFICATE-----\n"
}
