//! Certificates of the node's identities, and the TLS configurations made from them. Keys are made
//! here and never leave.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use crate::identity::Identity;

/// One entry an identity.
pub struct CertStore {}

/// A certificate that can be used, with TLS configurations that were built once from it.
pub struct Credentials {
    pub identity: Identity,
    pub not_before: SystemTime,
    pub not_after: SystemTime,
    pub serial: String,
    /// Server side of 15008; peers are checked as facts ztunnel 3.1 says.
    pub server: Arc<rustls::ServerConfig>,
}

/// For `CertificateStatus` and the dump.
#[derive(Clone, Debug)]
pub struct CertStatus {
    pub identity: Identity,
    pub not_before: Option<SystemTime>,
    pub not_after: Option<SystemTime>,
    pub serial: String,
    pub error: String,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CertEvent {
    /// A certificate isn't there and somebody waits for it (`connection`), or soon will.
    Wanted {
        identity: Identity,
        connection: bool,
    },
    Forgotten {
        identity: Identity,
    },
}

#[derive(Clone, Debug, thiserror::Error)]
pub enum CertError {
    #[error("no certificate for {0} after {1:?}: is the agent running and the CA reachable?")]
    Timeout(Identity, Duration),
    #[error("no certificate for {0}: {1}")]
    Failed(Identity, String),
    #[error("the certificate of {0} expired and was not renewed")]
    Expired(Identity),
    #[error("{0}: {1}")]
    Invalid(Identity, String),
}

impl CertStore {
    /// Events are never dropped; the receiver belongs to the control socket.
    pub fn new() -> (Arc<Self>, tokio::sync::mpsc::UnboundedReceiver<CertEvent>) {
        unimplemented!()
    }

    /// The usable certificate, waiting up to `wait` for it. Never an expired one. While a failed
    /// fetch has left its error and no certificate, the error is returned at once.
    pub async fn get(
        &self,
        _identity: &Identity,
        _wait: Duration,
    ) -> Result<Arc<Credentials>, CertError> {
        unimplemented!()
    }

    /// Announces that a local workload has this identity (prefetch). Counted: `release` undoes.
    pub fn retain(&self, _identity: &Identity) {}

    /// The last release forgets certificate and key and sends `Forgotten`.
    pub fn release(&self, _identity: &Identity) {}

    /// PEM of a CSR with a new P-256 key (facts ztunnel 8.1).
    pub fn new_csr(&self, _identity: &Identity) -> Result<String, CertError> {
        unimplemented!()
    }

    pub fn install(
        &self,
        _identity: &Identity,
        _chain_pem: &[String],
        _roots_pem: &[String],
    ) -> Result<CertStatus, CertError> {
        unimplemented!()
    }

    pub fn fail(&self, _identity: &Identity, _text: &str) {}

    pub fn status(&self) -> Vec<CertStatus> {
        unimplemented!()
    }

    /// The `certificates` section of the dump (facts ztunnel 13.1).
    pub fn dump(&self) -> serde_json::Value {
        unimplemented!()
    }
}
