//! Certificates of the node's identities, and the TLS configurations made from them. Keys are made
//! here and never leave.

use std::time::{Duration, SystemTime};

use crate::identity::Identity;

mod base;
mod check;
mod credentials;
mod crl;
mod dump;
mod judge;
mod path;
mod provider;
mod store;
#[cfg(test)]
pub mod testing;
mod trust;
mod verify;

#[cfg(test)]
mod crl_tests;
#[cfg(test)]
mod handshake_tests;
#[cfg(test)]
mod store_tests;
#[cfg(test)]
mod trust_tests;

pub use base::{Change, CrlCounters, Proof, RoleCounters, Tracked, TrustBase};
pub use credentials::{Admission, Credentials, Peer};
pub use store::CertStore;
pub use trust::{BadTrust, Distrust, Trust};
#[cfg(feature = "fuzzing")]
pub use verify::peer_identity;
pub use verify::{describe, is_revoked};

/// For `CertificateStatus` and the dump.
#[derive(Clone, Debug)]
pub struct CertStatus {
    pub identity: Identity,
    pub not_before: Option<SystemTime>,
    pub not_after: Option<SystemTime>,
    /// Decimal, as in the dump; empty while none was installed.
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
