//! Probes of the kubelet that aren't known by their socket (design section 4): what comes in plain
//! text from the node's own address to a declared port. An address is weaker than a socket: any
//! process of the node has it, and whoever is masqueraded behind it. So it must be asked for.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::pod::{Pod, log_decision};
use crate::policy::Verdict;

/// What stands in the place of a policy's name, which has a slash.
const NAME: &str = "kubelet_probe";

/// An address that moves to another node is this one's for no longer; a look costs a netlink dump.
const FRESH: Duration = Duration::from_secs(1);

type Look = fn() -> io::Result<Vec<IpAddr>>;

/// Of the interfaces of the node.
pub struct NodeAddresses {
    look: Look,
    found: Mutex<Option<(Instant, Vec<IpAddr>)>>,
}

impl NodeAddresses {
    /// `look` finds those of the namespace that its thread is in.
    pub fn new(look: Look) -> Self {
        Self {
            look,
            found: Mutex::default(),
        }
    }

    fn has(&self, ip: IpAddr) -> bool {
        let mut found = self.found.lock();
        if found.as_ref().is_none_or(|(at, _)| at.elapsed() >= FRESH) {
            *found = match (self.look)() {
                Ok(all) => Some((Instant::now(), all)),
                Err(error) => {
                    tracing::warn!(%error, "the node's addresses can't be read: no probe is known");
                    None
                }
            };
        }
        let all = found.iter().flat_map(|(_, all)| all);
        // A link-local address is one of many links.
        let lasting =
            |known: &&IpAddr| !matches!(known, IpAddr::V6(ip) if ip.is_unicast_link_local());
        all.filter(lasting).any(|known| *known == ip)
    }
}

impl Pod {
    /// Whether nothing but addresses has to say so, and they do.
    pub fn is_probe(&self, src: SocketAddr, dst: SocketAddr) -> bool {
        self.shared.config.kubelet_probe_fallback
            && self.probe_ports.load().contains(&dst.port())
            && self.shared.node.has(src.ip())
    }

    /// In the place of `decide`: no policy is asked, as none is where the kernel lets a probe past.
    pub fn let_probe(&self, src: SocketAddr, dst: SocketAddr) -> Option<Arc<str>> {
        let by = Some(Arc::from(NAME));
        self.shared.telemetry.metrics.verdict(Some(NAME), true);
        let at_info = self.shared.telemetry.settings.policy_decisions();
        log_decision(at_info, src, dst, &Verdict::Allow { by: by.clone() });
        by
    }
}
