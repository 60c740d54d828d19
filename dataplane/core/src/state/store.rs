//! The store: one writer, many readers that never wait.

use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use parking_lot::Mutex;
use tokio::sync::watch;

use super::apply::Writer;
use super::demand::Demand;
use super::snapshot::Snapshot;
use super::{ADDRESS_TYPE, AUTHORIZATION_TYPE, dump};
use crate::config::Config;

/// One writer (`apply`, serialised inside), many readers.
pub struct Store {
    config: Arc<Config>,
    current: ArcSwap<Snapshot>,
    writer: Mutex<Writer>,
    changed: watch::Sender<u64>,
    demand: Demand,
}

/// What `apply` did with one delta response.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Applied {
    pub type_url: String,
    pub nonce: String,
    pub accepted: u32,
    pub removed: u32,
    /// (resource name, reason). With a type that isn't known the one entry names the type.
    pub rejected: Vec<(String, String)>,
    /// This was the first response of its type.
    pub first: bool,
    /// On demand: the names that the response says something about.
    pub told: Vec<String>,
}

/// Version and rejection bookkeeping of one xDS type, for Hello.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct TypeState {
    pub type_url: String,
    pub processed: bool,
    /// The last good version of each resource held.
    pub versions: Vec<(String, String)>,
    /// Why the newest version of a resource was rejected.
    pub rejected: Vec<(String, String)>,
}

impl Store {
    pub fn new(config: Arc<Config>) -> Arc<Self> {
        Arc::new(Self {
            config,
            current: ArcSwap::default(),
            writer: Mutex::default(),
            changed: watch::Sender::new(0),
            demand: Demand::default(),
        })
    }

    /// Wait-free.
    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.current.load_full()
    }

    /// Decodes and applies the raw bytes of a DeltaDiscoveryResponse. CPU-bound: run it off the
    /// workers (spawn_blocking); readers are never blocked.
    pub fn apply(&self, response: bytes::Bytes) -> Result<Applied, prost::DecodeError> {
        let mut writer = self.writer.lock();
        let mut next = Snapshot::clone(&self.current.load());
        let applied = writer.apply(&mut next, &self.config, response)?;
        // A rejected policy may deny from now on, so it counts as a change too.
        let denies = applied.type_url == AUTHORIZATION_TYPE && !applied.rejected.is_empty();
        if applied.accepted > 0 || applied.removed > 0 || denies {
            let old = self.current.swap(Arc::new(next));
            self.changed.send_modify(|generation| *generation += 1);
            free_here(old, applied.accepted + applied.removed);
        }
        if self.config.on_demand && applied.type_url == ADDRESS_TYPE {
            self.demand
                .answered(applied.told.iter().map(String::as_str));
        }
        Ok(applied)
    }

    /// What is asked for by name, where not everything is sent.
    pub fn demand(&self) -> &Demand {
        &self.demand
    }

    /// Trust domains that policies take for this mesh's own. What is the same already is no change.
    pub fn set_aliases(&self, aliases: &[Arc<str>]) {
        let _writer = self.writer.lock();
        let current = self.current.load();
        let own = std::iter::once(&*self.config.trust_domain);
        let domains: Vec<Arc<str>> = match aliases.is_empty() {
            true => Vec::new(),
            false => own
                .chain(aliases.iter().map(|a| &**a))
                .map(Into::into)
                .collect(),
        };
        if current.policies.domains() == domains {
            return;
        }
        let mut next = Snapshot::clone(&current);
        next.policies = Arc::new(next.policies.for_domains(domains.into()));
        self.current.store(Arc::new(next));
        self.changed.send_modify(|generation| *generation += 1);
    }

    /// Changes after every applied response that altered a workload, service or policy.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    pub fn types(&self) -> Vec<TypeState> {
        let writer = self.writer.lock();
        let snapshot = self.snapshot();
        let workloads = snapshot.workloads.iter();
        let services = snapshot.services.iter().filter_map(|s| s.record.as_ref());
        let addresses = workloads
            .map(|w| (w.uid.to_string(), w.version.to_string()))
            .chain(services.map(|s| (s.key.to_string(), s.version.to_string())));
        let policies = snapshot.policies.versions();
        vec![
            writer.addresses.state(ADDRESS_TYPE, addresses),
            writer.policies.state(AUTHORIZATION_TYPE, policies),
        ]
    }

    /// One section of the dump (facts ztunnel 13.1) as JSON text, in chunks of about 64 kB:
    /// workloads, services, policies. None for an unknown section.
    pub fn dump(&self, section: &str) -> Option<Box<dyn Iterator<Item = Vec<u8>> + Send>> {
        dump::section(&self.snapshot(), section)
    }
}

/// After a large push the old records are freed by whoever lets go of the old snapshot last. Readers
/// hold it for microseconds: waiting for them keeps that work off the connections.
fn free_here(old: Arc<Snapshot>, changes: u32) {
    const LARGE: u32 = 1000;
    for _ in 0..100 {
        if changes < LARGE || Arc::strong_count(&old) == 1 {
            break;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}
