//! Capture by eBPF (design section 4): programs on the pods' cgroup and in each pod's network
//! namespace, whose maps and links are pinned, so that they outlive this process.
//!
//! All calls are blocking and short; one at a time.

pub(crate) mod cgroup2;
mod datagrams;
mod foreign;
mod kernel;
mod layout;
mod objects;
mod places;
mod pods;
pub mod probe;
mod probes;
mod reasons;
mod renewal;
mod sys;

#[cfg(test)]
mod tests;

use std::io;
use std::path::PathBuf;

pub use datagrams::Datagrams;
pub use kernel::Kernel;
pub use pods::{Enrolment, OwnAddresses};
pub use reasons::Reason;
pub(crate) use sys::addresses;

/// SO_MARK of the data plane's connections to applications, and so of the applications' answers
/// (net.ipv4.tcp_fwmark_accept), which a rule leads back over lo (facts istio-ambient 3.1).
pub const REPLY_MARK: u32 = 0x111;

/// What holds for the whole node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CaptureConfig {
    /// Every process of every pod lives below it.
    pub pods_cgroup: PathBuf,
    /// None: probes take the mesh's way.
    pub kubelet_cgroup: Option<PathBuf>,
    /// Of all data planes of this node, the parent of their leaves.
    pub dataplanes_cgroup: PathBuf,
    /// This process's own.
    pub leaf: PathBuf,
    /// On a BPF file system; made where it is missing.
    pub folder: PathBuf,
    pub ports: crate::config::Ports,
    pub ipv6: bool,
    /// Connections of one pod that are captured and not accepted yet.
    pub pod_budget: u32,
}

#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    #[error("{0}: {1}")]
    Path(PathBuf, io::Error),
    #[error("the kernel refuses the program {0}: {1}")]
    Program(&'static str, String),
    #[error("the program {program} can't be attached to {to}: {source}")]
    Attach {
        program: &'static str,
        to: String,
        source: io::Error,
    },
    #[error("map {0}: {1}")]
    Map(&'static str, String),
    #[error("{0}")]
    Namespace(io::Error),
    #[error("all {0} places for pods are taken")]
    Full(u32),
    #[error("the pod has no inbound listener yet")]
    NoListener,
}
