//! Names of workloads that have no address (facts ztunnel 2.6), asked of the node's own nameservers.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use hickory_resolver::TokioResolver;
use hickory_resolver::config::{LookupIpStrategy, NameServerConfig, ResolverConfig};
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use parking_lot::Mutex;
use rand::seq::IndexedRandom;
use tokio::time::timeout;

use crate::config::Config;
use crate::state::resolve::IpFamily;

/// facts ztunnel 2.6
const CACHE: u64 = 4096;

/// One for the node. Lives in the process's own namespace: what it asks is not a pod's traffic.
pub struct Names {
    /// Made when first needed: most nodes have no such workload. A failure is tried again.
    inner: Mutex<Option<TokioResolver>>,
    /// None: those of the node's resolv.conf.
    nameservers: Vec<SocketAddr>,
    ipv6: bool,
}

#[derive(Debug, thiserror::Error)]
#[error("no resolved addresses: {hostname}: {cause}")]
pub struct NoAddress {
    hostname: String,
    cause: String,
}

impl Names {
    pub fn new(config: &Config) -> Self {
        Self {
            inner: Mutex::default(),
            nameservers: config.dns.nameservers.clone(),
            ipv6: config.ipv6,
        }
    }

    /// One address, picked at random among those of the preferred family, else among all.
    pub async fn lookup(
        &self,
        hostname: &str,
        prefer: IpFamily,
        patience: Duration,
    ) -> Result<IpAddr, NoAddress> {
        let failed = |cause: String| NoAddress {
            hostname: hostname.to_owned(),
            cause,
        };
        let inner = self.inner().map_err(failed)?;
        // Names of workloads are whole: no search domain of this node completes them.
        let whole = format!("{}.", hostname.trim_end_matches('.'));
        let found = timeout(patience, inner.lookup_ip(whole)).await;
        let found = found.map_err(|_| failed(format!("not answered after {patience:?}")))?;
        let found = found.map_err(|error| failed(error.to_string()))?;
        let all: Vec<IpAddr> = found.iter().map(|ip| ip.to_canonical()).collect();
        pick(&all, prefer).ok_or_else(|| failed("no address in the answer".to_owned()))
    }

    /// The one whose cache all share.
    fn inner(&self) -> Result<TokioResolver, String> {
        let mut inner = self.inner.lock();
        match &*inner {
            Some(made) => Ok(made.clone()),
            None => Ok(inner.insert(self.build()?).clone()),
        }
    }

    fn build(&self) -> Result<TokioResolver, String> {
        let mut builder = if self.nameservers.is_empty() {
            let builder = TokioResolver::builder_tokio();
            builder.map_err(|error| format!("the node's resolv.conf: {error}"))?
        } else {
            let servers = self.nameservers.iter().map(server).collect();
            let config = ResolverConfig::from_parts(None, Vec::new(), servers);
            TokioResolver::builder_with_config(config, TokioRuntimeProvider::default())
        };
        let options = builder.options_mut();
        options.cache_size = CACHE;
        options.ip_strategy = match self.ipv6 {
            true => LookupIpStrategy::Ipv4AndIpv6,
            false => LookupIpStrategy::Ipv4Only,
        };
        builder.build().map_err(|error| error.to_string())
    }
}

fn server(addr: &SocketAddr) -> NameServerConfig {
    let mut server = NameServerConfig::udp_and_tcp(addr.ip());
    for connection in &mut server.connections {
        connection.port = addr.port();
    }
    server
}

fn pick(all: &[IpAddr], prefer: IpFamily) -> Option<IpAddr> {
    let preferred = |ip: &&IpAddr| ip.is_ipv4() == (prefer == IpFamily::V4);
    let liked: Vec<_> = all.iter().filter(preferred).collect();
    let liked = liked.choose(&mut rand::rng()).copied();
    liked.or_else(|| all.choose(&mut rand::rng())).copied()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn all_of_the_preferred_family_are_picked_and_the_others_only_without_them() {
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        let both = [ip("10.0.0.1"), ip("fd00::1"), ip("10.0.0.2"), ip("fd00::2")];
        let picked = |all: &[IpAddr], prefer| -> HashSet<_> {
            (0..200).filter_map(|_| pick(all, prefer)).collect()
        };
        assert_eq!(
            picked(&both, IpFamily::V4),
            HashSet::from([both[0], both[2]])
        );
        assert_eq!(
            picked(&both, IpFamily::V6),
            HashSet::from([both[1], both[3]])
        );
        assert_eq!(picked(&both[1..2], IpFamily::V4), HashSet::from([both[1]]));
        assert!(picked(&[], IpFamily::V4).is_empty());
    }
}
