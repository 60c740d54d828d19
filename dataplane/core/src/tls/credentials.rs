//! A certificate that can be used, with the TLS configurations built once from it.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::SystemTime;

use parking_lot::Mutex;
use rustls::client::Resumption;
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::NoServerSessionStorage;
use rustls::sign::{CertifiedKey, SigningKey, SingleCertAndKey};
use rustls::{ClientConfig, CommonState, NamedGroup, ServerConfig};

use super::base::{Proof, Tracked, TrustBase};
use super::check::Chain;
use super::judge::Judge;
use super::provider::{VERSIONS, complying};
use super::trust::{Compliance, Distrust};
use super::verify::{Rule, Verifier};
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
    pub(super) judge: Arc<Judge>,
    compliance: Compliance,
    certificate: Arc<SingleCertAndKey>,
    clients: Mutex<HashMap<Arc<[Identity]>, Arc<ClientConfig>>>,
}

/// Takes peers in that finished a handshake.
#[derive(Clone, Debug)]
pub struct Admission(Arc<Verifier>);

/// The other end of a tunnel.
#[derive(Debug)]
pub struct Peer {
    /// First URI SAN that is a SPIFFE id (facts ztunnel 3.1).
    pub identity: Identity,
    /// When the first certificate of its chain expires: what was proved with it holds no longer.
    pub expires: SystemTime,
    /// The tunnel must end when this says so.
    pub tracked: Tracked,
}

impl Credentials {
    /// Builds only: `Chain::check` comes before.
    pub(super) fn new(
        identity: Identity,
        chain: Chain,
        key: Arc<dyn SigningKey>,
        base: Arc<TrustBase>,
    ) -> Result<Self, String> {
        let certified = CertifiedKey::new(chain.certificates.clone(), key);
        let certificate = Arc::new(SingleCertAndKey::from(certified));
        let judge = Arc::new(Judge::new(base, chain.anchors));
        let compliance = judge.base.trust().compliance;
        Ok(Self {
            not_before: chain.leaf.not_before,
            not_after: chain.leaf.not_after,
            serial: chain.leaf.serial,
            server: build_server(&identity, &judge, &certificate, compliance)?,
            chain: chain.certificates,
            roots: chain.roots,
            judge,
            compliance,
            certificate,
            clients: Mutex::default(),
            identity,
        })
    }

    /// The same certificate under another compliance policy.
    pub(super) fn complying(&self, compliance: Compliance) -> Result<Self, String> {
        Ok(Self {
            identity: self.identity.clone(),
            not_before: self.not_before,
            not_after: self.not_after,
            serial: self.serial.clone(),
            server: build_server(&self.identity, &self.judge, &self.certificate, compliance)?,
            chain: self.chain.clone(),
            roots: self.roots.clone(),
            judge: self.judge.clone(),
            compliance,
            certificate: self.certificate.clone(),
            clients: Mutex::default(),
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

    /// For who came in by `server`.
    pub fn admit_clients(&self) -> Admission {
        let own = self.identity.clone();
        self.admission(Rule::Clients { own })
    }

    /// For who was reached by `client`.
    pub fn admit_servers(&self, expected: &Arc<[Identity]>) -> Admission {
        self.admission(Rule::Servers {
            own: self.identity.clone(),
            expected: expected.clone(),
        })
    }

    pub fn valid_at(&self, now: SystemTime) -> bool {
        self.not_before <= now && now < self.not_after
    }

    fn admission(&self, rule: Rule) -> Admission {
        Admission(Arc::new(Verifier {
            judge: self.judge.clone(),
            rule,
        }))
    }

    fn build_client(&self, expected: Arc<[Identity]>) -> Result<ClientConfig, rustls::Error> {
        let servers = self.admit_servers(&expected).0;
        let mut client = ClientConfig::builder_with_provider(complying(self.compliance))
            .with_protocol_versions(VERSIONS)?
            .dangerous()
            .with_custom_certificate_verifier(servers)
            .with_client_cert_resolver(self.certificate.clone());
        client.alpn_protocols = vec![b"h2".to_vec()];
        client.enable_sni = false;
        client.resumption = Resumption::disabled();
        Ok(client)
    }
}

impl Admission {
    #[cfg(test)]
    pub(super) fn verifier(&self) -> Arc<Verifier> {
        self.0.clone()
    }

    /// `tls` has just finished its handshake with `addr`. Err where trust changed meanwhile.
    pub fn admit(&self, tls: &CommonState, addr: SocketAddr) -> Result<Peer, Distrust> {
        let Verifier { judge, rule } = &*self.0;
        let unproven = |text: String| Distrust::Unproven(text);
        let Some([leaf, rest @ ..]) = tls.peer_certificates() else {
            return Err(unproven("the peer showed no certificate".to_owned()));
        };
        // Known from the handshake: a look into the judge's list.
        let proven = judge.prove(rule.role(), leaf, rest, UnixTime::now());
        let proven = proven.map_err(|err| unproven(err.to_string()))?;
        let Some(identity) = proven.ids.first().cloned() else {
            return Err(unproven("the peer has no SPIFFE identity".to_owned()));
        };
        let group = tls.negotiated_key_exchange_group();
        let hybrid = group.is_some_and(|group| group.name() == NamedGroup::X25519MLKEM768);
        let expires = proven.until;
        let proof = Proof::new(addr, rule.clone(), proven, hybrid);
        let tracked = judge.base.track(proof, judge)?;
        Ok(Peer {
            identity,
            expires,
            tracked,
        })
    }
}

fn build_server(
    identity: &Identity,
    judge: &Arc<Judge>,
    certificate: &Arc<SingleCertAndKey>,
    compliance: Compliance,
) -> Result<Arc<ServerConfig>, String> {
    let clients = Verifier {
        judge: judge.clone(),
        rule: Rule::Clients {
            own: identity.clone(),
        },
    };
    let mut server = ServerConfig::builder_with_provider(complying(compliance))
        .with_protocol_versions(VERSIONS)
        .map_err(|err| err.to_string())?
        .with_client_cert_verifier(Arc::new(clients))
        .with_cert_resolver(certificate.clone());
    server.alpn_protocols = vec![b"h2".to_vec()];
    // A resumed session would skip the check of the stored chain (design section 6): off.
    server.session_storage = Arc::new(NoServerSessionStorage {});
    server.send_tls13_tickets = 0;
    Ok(Arc::new(server))
}
