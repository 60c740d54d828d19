//! Pods' network namespaces: sockets made inside them, listeners, and one proxy a pod.

mod connect;
mod descriptors;
mod dns_sockets;
mod listeners;
mod netns;
mod original_dst;
mod sockopt;

#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;

pub use connect::is_source_lost;
pub use descriptors::{Descriptors, Held, NoneFree, Share};
pub use dns_sockets::DnsSockets;
pub(crate) use listeners::BACKLOG;
pub use listeners::{ListenError, Listeners, ListeningFds, Redirected};
pub use netns::{Netns, NotANetns};
pub use original_dst::original_dst;
pub use sockopt::MissingAbility;
pub(crate) use sockopt::check_abilities;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodInfo {
    pub uid: String,
    pub name: String,
    pub namespace: String,
    pub service_account: String,
    /// Of the agent's own workload: what alone may be reached, over HBONE alone (facts ztunnel
    /// 11.6). Empty for all others.
    pub only_ports: Vec<u16>,
}

impl PodInfo {
    /// The agent's own workload: nothing is redirected there, and no client's address is shown.
    pub fn is_own(&self) -> bool {
        !self.only_ports.is_empty()
    }
}

impl std::fmt::Display for PodInfo {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "pod {}/{} ({})", self.namespace, self.name, self.uid)
    }
}
