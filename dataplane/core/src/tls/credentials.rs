//! A certificate that can be used, with the TLS configurations built once from it.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::SystemTime;

use parking_lot::Mutex;
use rustls::client::Resumption;
use rustls::pki_types::CertificateDer;
use rustls::server::NoServerSessionStorage;
use rustls::sign::{CertifiedKey, SigningKey, SingleCertAndKey};
use rustls::{ClientConfig, RootCertStore, ServerConfig};

use super::check::Chain;
use super::provider::{VERSIONS, provider};
use super::verify::{ClientsOfTrustDomain, ExpectedServer};
use crate::identity::Identity;

/// Client configurations kept for one certificate; over it the cache starts anew.
const MAX_CLIENTS: usize = 1024;

/// Never printed: it leads to the private key.
pub struct Credentials {
    pub identity: Identity,
    pub not_before: SystemTime,
    pub not_after: SystemTime,
    /// Decimal.
    pub serial: String,
    /// Server side of 15008; peers are checked as facts ztunnel 3.1 says.
    pub server: Arc<ServerConfig>,
    pub(super) chain: Vec<CertificateDer<'static>>,
    pub(super) roots: Vec<CertificateDer<'static>>,
    anchors: Arc<RootCertStore>,
    certificate: Arc<SingleCertAndKey>,
    clients: Mutex<HashMap<Arc<[Identity]>, Arc<ClientConfig>>>,
}

impl Credentials {
    /// Builds only: `Chain::check` comes before.
    pub(super) fn new(
        identity: Identity,
        chain: Chain,
        key: Arc<dyn SigningKey>,
    ) -> Result<Self, String> {
        let certified = CertifiedKey::new(chain.certificates.clone(), key);
        let certificate = Arc::new(SingleCertAndKey::from(certified));
        let trust_domain = identity.trust_domain();
        let clients = ClientsOfTrustDomain::new(chain.anchors.clone(), trust_domain, provider())?;
        let mut server = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(VERSIONS)
            .map_err(|err| err.to_string())?
            .with_client_cert_verifier(Arc::new(clients))
            .with_cert_resolver(certificate.clone());
        server.alpn_protocols = vec![b"h2".to_vec()];
        // A resumed session would skip the check of the stored chain (design section 6): off.
        server.session_storage = Arc::new(NoServerSessionStorage {});
        server.send_tls13_tickets = 0;
        Ok(Self {
            not_before: chain.leaf.not_before,
            not_after: chain.leaf.not_after,
            serial: chain.leaf.serial,
            server: Arc::new(server),
            chain: chain.certificates,
            roots: chain.roots,
            anchors: chain.anchors,
            certificate,
            clients: Mutex::default(),
            identity,
        })
    }

    /// Client side towards a server that must be one of `expected`; nobody when that is empty.
    pub fn client(&self, expected: &Arc<[Identity]>) -> Result<Arc<ClientConfig>, rustls::Error> {
        if let Some(known) = self.clients.lock().get(expected) {
            return Ok(known.clone());
        }
        let built = Arc::new(self.build_client(expected.clone())?);
        let mut clients = self.clients.lock();
        if clients.len() >= MAX_CLIENTS {
            clients.clear();
        }
        Ok(clients.entry(expected.clone()).or_insert(built).clone())
    }

    pub fn valid_at(&self, now: SystemTime) -> bool {
        self.not_before <= now && now < self.not_after
    }

    fn build_client(&self, expected: Arc<[Identity]>) -> Result<ClientConfig, rustls::Error> {
        let servers = ExpectedServer::new(self.anchors.clone(), expected, provider());
        let mut client = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(VERSIONS)?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(servers))
            .with_client_cert_resolver(self.certificate.clone());
        client.alpn_protocols = vec![b"h2".to_vec()];
        client.enable_sni = false;
        client.resumption = Resumption::disabled();
        Ok(client)
    }
}
