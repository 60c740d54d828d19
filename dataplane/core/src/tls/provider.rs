//! The cryptography that HBONE allows (facts ztunnel 3.1), the hybrid key exchange first.

use std::sync::{Arc, LazyLock};

use rustls::SupportedCipherSuite;
use rustls::crypto::aws_lc_rs::{self, cipher_suite, kx_group};
use rustls::crypto::{CryptoProvider, SupportedKxGroup};
use rustls::pki_types::CertificateDer;

use super::trust::Compliance;

/// TLS 1.3 only, on both sides.
pub static VERSIONS: &[&rustls::SupportedProtocolVersion] = &[&rustls::version::TLS13];

static PROVIDER: LazyLock<Arc<CryptoProvider>> = LazyLock::new(|| {
    with_groups(vec![
        kx_group::X25519MLKEM768,
        kx_group::X25519,
        kx_group::SECP256R1,
        kx_group::SECP384R1,
    ])
});

static PQC: LazyLock<Arc<CryptoProvider>> =
    LazyLock::new(|| with_groups(vec![kx_group::X25519MLKEM768]));

pub fn provider() -> Arc<CryptoProvider> {
    PROVIDER.clone()
}

pub fn complying(policy: Compliance) -> Arc<CryptoProvider> {
    match policy {
        Compliance::None => PROVIDER.clone(),
        Compliance::Pqc => PQC.clone(),
    }
}

/// SHA-384 over the certificates with their lengths, so that no two chains read the same.
pub fn digest(leaf: &CertificateDer<'_>, rest: &[CertificateDer<'_>]) -> [u8; 48] {
    let SupportedCipherSuite::Tls13(suite) = cipher_suite::TLS13_AES_256_GCM_SHA384;
    let mut hash = suite.common.hash_provider.start();
    for certificate in std::iter::once(leaf).chain(rest) {
        hash.update(&certificate.len().to_be_bytes());
        hash.update(certificate);
    }
    let mut digest = [0; 48];
    digest.copy_from_slice(hash.finish().as_ref());
    digest
}

pub fn with_groups(kx_groups: Vec<&'static dyn SupportedKxGroup>) -> Arc<CryptoProvider> {
    Arc::new(CryptoProvider {
        cipher_suites: vec![
            cipher_suite::TLS13_AES_256_GCM_SHA384,
            cipher_suite::TLS13_AES_128_GCM_SHA256,
        ],
        kx_groups,
        ..aws_lc_rs::default_provider()
    })
}
