//! Names of workloads that have no address (facts ztunnel 2.6), asked of the node's own nameservers.

use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use hickory_resolver::TokioResolver;
use hickory_resolver::config::{LookupIpStrategy, NameServerConfig, ResolverConfig, ResolverOpts};
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use hickory_resolver::system_conf::parse_resolv_conf;
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
    inner: Mutex<Option<Made>>,
    /// Empty: those of the node's resolv.conf.
    nameservers: Vec<SocketAddr>,
    resolv_conf: PathBuf,
    ipv6: bool,
}

/// The one whose cache all share, and the file that it was made of.
struct Made {
    resolver: TokioResolver,
    servers: Vec<IpAddr>,
    stamp: Option<Stamp>,
}

/// Tells one content of a file from the next: a file that is swapped has another number.
type Stamp = (u64, u64, SystemTime);

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
            resolv_conf: "/etc/resolv.conf".into(),
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

    /// Made anew where the node's file has changed; while that one can't be used, as before.
    fn inner(&self) -> Result<TokioResolver, String> {
        let mut inner = self.inner.lock();
        let stamp = self.stamp();
        if let Some(made) = &*inner
            && made.stamp == stamp
        {
            return Ok(made.resolver.clone());
        }
        match (self.make(stamp), &*inner) {
            (Ok(made), _) => {
                tracing::info!(servers = ?made.servers, "the node's nameservers");
                Ok(inner.insert(made).resolver.clone())
            }
            (Err(_), Some(made)) => Ok(made.resolver.clone()),
            (Err(error), None) => Err(error),
        }
    }

    fn stamp(&self) -> Option<Stamp> {
        let relevant = self.nameservers.is_empty();
        let file = relevant
            .then(|| std::fs::metadata(&self.resolv_conf))?
            .ok()?;
        Some((file.ino(), file.len(), file.modified().ok()?))
    }

    fn make(&self, stamp: Option<Stamp>) -> Result<Made, String> {
        let (config, mut options) = self.read()?;
        options.cache_size = CACHE;
        options.ip_strategy = match self.ipv6 {
            true => LookupIpStrategy::Ipv4AndIpv6,
            false => LookupIpStrategy::Ipv4Only,
        };
        let servers = config.name_servers().iter().map(|s| s.ip).collect();
        let builder = TokioResolver::builder_with_config(config, TokioRuntimeProvider::default());
        let resolver = builder.with_options(options).build();
        Ok(Made {
            resolver: resolver.map_err(|error| error.to_string())?,
            servers,
            stamp,
        })
    }

    fn read(&self) -> Result<(ResolverConfig, ResolverOpts), String> {
        if !self.nameservers.is_empty() {
            let servers = self.nameservers.iter().map(server).collect();
            let config = ResolverConfig::from_parts(None, Vec::new(), servers);
            return Ok((config, ResolverOpts::default()));
        }
        let failed = |error: &dyn std::fmt::Display| format!("the node's resolv.conf: {error}");
        let content = std::fs::read(&self.resolv_conf).map_err(|error| failed(&error))?;
        parse_resolv_conf(content).map_err(|error| failed(&error))
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

    fn asked(names: &Names) -> Result<String, String> {
        names.inner()?;
        let inner = names.inner.lock();
        Ok(format!("{:?}", inner.as_ref().unwrap().servers))
    }

    #[tokio::test]
    async fn a_resolv_conf_that_changes_is_read_again_and_one_that_breaks_is_not_missed() {
        let file = std::env::temp_dir().join(format!("up-names-{}", std::process::id()));
        let write = |text: &str| {
            let new = file.with_extension("new");
            std::fs::write(&new, text).unwrap();
            std::fs::rename(&new, &file).unwrap();
        };
        let names = Names {
            resolv_conf: file.clone(),
            ..Names::new(&crate::inpod::testing::config())
        };
        assert!(
            asked(&names).unwrap_err().contains("resolv.conf"),
            "none yet"
        );
        write("nameserver 192.0.2.1\n");
        assert_eq!(asked(&names).unwrap(), "[192.0.2.1]");
        write("nameserver 192.0.2.2\nnameserver 192.0.2.3\n");
        assert_eq!(asked(&names).unwrap(), "[192.0.2.2, 192.0.2.3]");
        std::fs::remove_file(&file).unwrap();
        assert_eq!(asked(&names).unwrap(), "[192.0.2.2, 192.0.2.3]");
        write("nameserver 192.0.2.4\n");
        assert_eq!(asked(&names).unwrap(), "[192.0.2.4]");
        std::fs::remove_file(&file).unwrap();
    }

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
