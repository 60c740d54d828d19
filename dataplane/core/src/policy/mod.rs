//! L4 authorization (facts ztunnel 5): who may talk to whom, decided at the destination.

mod alias;
mod decision;
mod examine;
mod hits;
mod matcher;
mod record;
mod set;

#[cfg(test)]
mod decision_test;
#[cfg(test)]
pub(crate) mod examine_test;
#[cfg(test)]
mod matcher_test;

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use crate::identity::Identity;

pub use decision::decide;
pub use examine::{Examined, Finding, examine};
pub use hits::{Hits, now_ms};
pub use matcher::{Field, Mismatch};
pub use record::{Account, Action, Clause, Match, Policy, Published, Rule, Scope, Text};
pub use set::{Entry, Malformed, PolicyEdit, PolicySet};

/// What policies can test of a connection.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Subject {
    /// From the certificate; None for plaintext.
    pub identity: Option<Identity>,
    /// Peer of the TCP connection (the tunnel's peer for HBONE), canonical.
    pub source: IpAddr,
    /// After resolution.
    pub dst: SocketAddr,
}

/// Names policy resources as `namespace/name`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// `by` is the deciding ALLOW policy; None where no ALLOW policy applies.
    Allow {
        by: Option<Arc<str>>,
    },
    Deny(DenyReason),
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DenyReason {
    #[error("policy rejection: explicitly denied by: {policy}")]
    Explicit {
        policy: Arc<str>,
        /// Index of its first rule that matches.
        rule: usize,
    },
    #[error("policy rejection: allow policies exist, but none allowed")]
    NotAllowed,
    #[error("policy rejection: policy {0} is listed by the workload but hasn't arrived yet")]
    NotArrived(Arc<str>),
    #[error("policy rejection: policy {0} was rejected as malformed and has no good version")]
    Malformed(Arc<str>),
    #[error(
        "waypoint required: the connection didn't come through {0}, the waypoint of this workload: \
         send it to the address that the waypoint serves, from a pod in the mesh, or turn \
         waypointRequired off for the namespace"
    )]
    NotThroughWaypoint(Arc<str>),
    #[error(
        "waypoint required: this workload has no waypoint that traffic could come through: give it \
         one (label istio.io/use-waypoint), or turn waypointRequired off for the namespace"
    )]
    NoWaypoint,
}

/// Outcome together with what dry-run policies would have done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    pub verdict: Verdict,
    /// (policy, "would deny" | "would allow"), by name.
    pub dry_run: Vec<(Arc<str>, &'static str)>,
}

impl DenyReason {
    /// A demand of the namespace, not a policy, denies.
    pub fn is_waypoint(&self) -> bool {
        matches!(self, Self::NotThroughWaypoint(_) | Self::NoWaypoint)
    }
}
