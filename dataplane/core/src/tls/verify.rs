//! Who may be at the other end (facts ztunnel 3.1): the chain is webpki's business, the SPIFFE
//! identity is ours. There is no way to build a verifier that skips either.

use std::sync::Arc;
use std::time::SystemTime;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, OtherError, RootCertStore,
    SignatureScheme,
};
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::check::system_time;
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

/// Clients of our 15008: chain to the roots that came with our own certificate, and a SPIFFE
/// identity of our trust domain.
#[derive(Debug)]
pub struct ClientsOfTrustDomain {
    chain: Arc<dyn ClientCertVerifier>,
    trust_domain: String,
}

/// Servers: chain to our roots, and one of the identities that were asked for. The server's name
/// isn't looked at.
#[derive(Debug)]
pub struct ExpectedServer {
    roots: Arc<RootCertStore>,
    expected: Arc<[Identity]>,
    provider: Arc<CryptoProvider>,
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

/// The identity a peer is known by: its first (facts ztunnel 3.1).
pub fn peer_identity(chain: Option<&[CertificateDer<'_>]>) -> Option<Identity> {
    let leaf = chain?.first()?;
    ids_of(leaf).into_iter().next()
}

/// When the first certificate of a peer's chain expires: what was proved with it holds no longer.
/// At once for what can't be read.
pub fn peer_expiry(chain: Option<&[CertificateDer<'_>]>) -> SystemTime {
    let expiry = |der: &CertificateDer<'_>| match X509Certificate::from_der(der) {
        Ok((_, certificate)) => system_time(certificate.validity().not_after),
        Err(_) => SystemTime::UNIX_EPOCH,
    };
    let all = chain.unwrap_or_default().iter().map(expiry);
    all.min().unwrap_or(SystemTime::UNIX_EPOCH)
}

/// A TLS error as an operator should read it, also when it comes wrapped in an I/O error.
pub fn describe(err: &std::io::Error) -> String {
    match err
        .get_ref()
        .and_then(|inner| inner.downcast_ref::<Error>())
    {
        Some(Error::InvalidCertificate(CertificateError::Other(OtherError(inner)))) => {
            inner.to_string()
        }
        Some(Error::AlertReceived(alert)) => format!("the peer refused with alert {alert:?}"),
        Some(tls) => tls.to_string(),
        None => err.to_string(),
    }
}

impl ClientsOfTrustDomain {
    pub fn new(
        roots: Arc<RootCertStore>,
        trust_domain: &str,
        provider: Arc<CryptoProvider>,
    ) -> Result<Self, String> {
        let chain = WebPkiClientVerifier::builder_with_provider(roots, provider)
            .build()
            .map_err(|err| err.to_string())?;
        Ok(Self {
            chain,
            trust_domain: trust_domain.to_owned(),
        })
    }
}

impl ClientCertVerifier for ClientsOfTrustDomain {
    fn offer_client_auth(&self) -> bool {
        true
    }

    fn client_auth_mandatory(&self) -> bool {
        true
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.chain.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let verified = self.chain.verify_client_cert(leaf, intermediates, now)?;
        let ids = ids_of(leaf);
        if ids.iter().any(|id| id.trust_domain() == self.trust_domain) {
            return Ok(verified);
        }
        Err(refuse(match ids.into_iter().next() {
            None => NotThem::Nobody,
            Some(peer) => NotThem::TrustDomain {
                peer,
                ours: self.trust_domain.clone(),
            },
        }))
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chain.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chain.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chain.supported_verify_schemes()
    }
}

impl ExpectedServer {
    pub fn new(
        roots: Arc<RootCertStore>,
        expected: Arc<[Identity]>,
        provider: Arc<CryptoProvider>,
    ) -> Self {
        Self {
            roots,
            expected,
            provider,
        }
    }
}

impl ServerCertVerifier for ExpectedServer {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        verify_server_cert_signed_by_trust_anchor(
            &ParsedCertificate::try_from(leaf)?,
            &self.roots,
            intermediates,
            now,
            self.provider.signature_verification_algorithms.all,
        )?;
        let ids = ids_of(leaf);
        if ids.iter().any(|id| self.expected.contains(id)) {
            return Ok(ServerCertVerified::assertion());
        }
        Err(refuse(match ids.into_iter().next() {
            None => NotThem::Nobody,
            Some(peer) => NotThem::Unexpected {
                peer,
                expected: names(&self.expected),
            },
        }))
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls12_signature(message, cert, dss, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, cert, dss, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        let algorithms = &self.provider.signature_verification_algorithms;
        algorithms.supported_schemes()
    }
}

fn ids_of(leaf: &CertificateDer<'_>) -> Vec<Identity> {
    X509Certificate::from_der(leaf)
        .map(|(_, certificate)| spiffe_ids(&certificate))
        .unwrap_or_default()
}

fn names(ids: &[Identity]) -> String {
    let names: Vec<_> = ids.iter().map(Identity::to_string).collect();
    match names.is_empty() {
        true => "nobody".to_owned(),
        false => names.join(" or "),
    }
}

fn refuse(reason: NotThem) -> Error {
    Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(reason))))
}
