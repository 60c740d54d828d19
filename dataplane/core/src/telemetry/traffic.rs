//! Counters of traffic: one row for each label set, looked up once a connection.

use std::fmt;
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use ahash::AHashSet;
use parking_lot::RwLock;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::Counter;

use super::labels::{Flags, Labels, WithFlags};

/// So that a scrape or a new label set holds up few connections, and these for microseconds only.
const SHARDS: usize = 16;

/// Above it, label sets without connections go at once: peers may name themselves as they like.
const MANY: usize = 10_000;

/// The counters of one label set. Opened and bytes carry the flags `-`; what closes counts under
/// the flags it ended with, and any but `-` is a failed connection.
#[derive(Debug)]
pub struct Series {
    pub labels: Labels,
    opened: AtomicU64,
    received: AtomicU64,
    sent: AtomicU64,
    closed: [AtomicU64; Flags::ALL.len()],
    /// Seconds of the process when a connection last began or ended.
    used: AtomicU32,
}

/// All rows. A read lock and a hash a connection; nothing is locked per byte, nor while a scrape is
/// written.
#[derive(Debug)]
pub struct Traffic {
    shards: [Shard; SHARDS],
    hasher: ahash::RandomState,
    /// Seconds that a label set without connections is still shown: some scrapes. Pods come and go,
    /// and what they were called must not stay for the life of the process (facts ztunnel 16.2).
    keep: u32,
    /// Label sets forgotten.
    evicted: Counter,
}

#[derive(Debug, Default)]
struct Shard {
    rows: RwLock<AHashSet<Key>>,
    /// So many rows before the next look for unused ones: at least its part of `MANY`.
    sweep_at: AtomicUsize,
}

/// Lets a row be found by its labels without a second copy of them.
#[derive(Debug)]
struct Key(Arc<Series>);

impl Series {
    fn new(labels: Labels) -> Self {
        Self {
            labels,
            opened: AtomicU64::new(0),
            received: AtomicU64::new(0),
            sent: AtomicU64::new(0),
            closed: Default::default(),
            used: AtomicU32::new(now()),
        }
    }

    pub fn opened(&self) {
        self.opened.fetch_add(1, Relaxed);
    }

    pub fn closed(&self, flags: Flags) {
        self.closed[flags as usize].fetch_add(1, Relaxed);
        self.used.store(now(), Relaxed);
    }

    /// `received` went from client to server, `sent` back (facts ztunnel 12.3).
    pub fn add_bytes(&self, received: u64, sent: u64) {
        self.received.fetch_add(received, Relaxed);
        self.sent.fetch_add(sent, Relaxed);
    }
}

impl Key {
    /// A connection counts with it. Asked under the lock: none can begin meanwhile.
    fn is_live(&self) -> bool {
        Arc::strong_count(&self.0) > 1
    }
}

/// Seconds of the process, roughly.
fn now() -> u32 {
    static START: LazyLock<Instant> = LazyLock::new(Instant::now);
    u32::try_from(START.elapsed().as_secs()).unwrap_or(u32::MAX)
}

impl PartialEq for Key {
    fn eq(&self, other: &Self) -> bool {
        self.0.labels == other.0.labels
    }
}

impl Eq for Key {}

impl std::hash::Hash for Key {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        self.0.labels.hash(state);
    }
}

impl std::borrow::Borrow<Labels> for Key {
    fn borrow(&self) -> &Labels {
        &self.0.labels
    }
}

impl Traffic {
    pub fn new(keep: Duration, evicted: Counter) -> Self {
        Self {
            shards: Default::default(),
            hasher: ahash::RandomState::new(),
            keep: u32::try_from(keep.as_secs()).unwrap_or(u32::MAX),
            evicted,
        }
    }

    pub fn series(&self, labels: Labels) -> Arc<Series> {
        // Of two labels, since the whole is hashed once more. The remainder is below SHARDS.
        let ends = (&labels.source.workload, &labels.destination.workload);
        let shard = &self.shards[(self.hasher.hash_one(ends) % SHARDS as u64) as usize];
        if let Some(key) = shard.rows.read().get(&labels) {
            key.0.used.store(now(), Relaxed);
            return key.0.clone();
        }
        let mut rows = shard.rows.write();
        if let Some(key) = rows.get(&labels) {
            return key.0.clone();
        }
        let many = MANY / SHARDS;
        if rows.len() >= shard.sweep_at.load(Relaxed).max(many) {
            let before = rows.len();
            rows.retain(Key::is_live);
            self.evicted.inc_by((before - rows.len()) as u64);
            rows.shrink_to(many);
            shard.sweep_at.store(2 * rows.len(), Relaxed);
        }
        let series = Arc::new(Series::new(labels));
        rows.insert(Key(series.clone()));
        series
    }

    /// Rows that were used within `keep` of `now`, or are in use; the others are forgotten.
    fn recent(&self, now: u32) -> Vec<Arc<Series>> {
        let is_recent = |row: &Series| now.saturating_sub(row.used.load(Relaxed)) < self.keep;
        let mut recent = Vec::new();
        for shard in &self.shards {
            let mut old = false;
            for key in shard.rows.read().iter() {
                match key.is_live() || is_recent(&key.0) {
                    true => recent.push(key.0.clone()),
                    false => old = true,
                }
            }
            if old {
                let mut rows = shard.rows.write();
                let before = rows.len();
                rows.retain(|key| key.is_live() || is_recent(&key.0));
                self.evicted.inc_by((before - rows.len()) as u64);
            }
        }
        recent
    }
}

impl Collector for Traffic {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), fmt::Error> {
        let rows = self.recent(now());
        let plain = |count: fn(&Series) -> &AtomicU64| {
            rows.iter()
                .map(move |row| {
                    (
                        WithFlags(&row.labels, Flags::None),
                        count(row).load(Relaxed),
                    )
                })
                .collect::<Vec<_>>()
        };
        let closed = |wanted: fn(Flags) -> bool| {
            let mut samples = Vec::new();
            for row in &rows {
                for flags in Flags::ALL.into_iter().filter(|flags| wanted(*flags)) {
                    let count = row.closed[flags as usize].load(Relaxed);
                    if count > 0 {
                        samples.push((WithFlags(&row.labels, flags), count));
                    }
                }
            }
            samples
        };
        let families = [
            (
                "istio_tcp_connections_opened",
                "The total number of TCP connections opened",
                plain(|row| &row.opened),
            ),
            (
                "istio_tcp_connections_closed",
                "The total number of TCP connections closed",
                closed(|_| true),
            ),
            (
                "istio_tcp_received_bytes",
                "The size of total bytes received during request in case of a TCP connection",
                plain(|row| &row.received),
            ),
            (
                "istio_tcp_sent_bytes",
                "The size of total bytes sent during response in case of a TCP connection",
                plain(|row| &row.sent),
            ),
            (
                "istio_tcp_connections_failed",
                "The total number of TCP connections that failed (unstable)",
                closed(|flags| flags != Flags::None),
            ),
        ];
        for (name, help, samples) in families {
            if samples.is_empty() {
                continue;
            }
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            for (labels, value) in samples {
                family
                    .encode_family(&labels)?
                    .encode_counter::<NoLabelSet, _, u64>(&value, None)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::{Reporter, Side};

    fn labels(workload: usize) -> Labels {
        Labels {
            reporter: Reporter::Destination,
            source: Side {
                workload: workload.to_string().into(),
                ..Side::default()
            },
            destination: Side::default(),
            service: None,
            mtls: true,
        }
    }

    const KEEP: u32 = 900;

    impl Traffic {
        fn len(&self) -> usize {
            self.shards.iter().map(|s| s.rows.read().len()).sum()
        }
    }

    fn traffic() -> (Traffic, Counter) {
        let evicted = Counter::default();
        let keep = Duration::from_secs(KEEP.into());
        (Traffic::new(keep, evicted.clone()), evicted)
    }

    #[test]
    fn what_nobody_used_for_long_is_forgotten_unless_a_connection_lives() {
        let (traffic, evicted) = traffic();
        let live = traffic.series(labels(1));
        traffic.series(labels(2)).closed(Flags::None);
        let shown = |seconds| traffic.recent(now() + seconds).len();
        assert_eq!(shown(KEEP - 5), 2);
        assert_eq!(shown(KEEP), 1);
        assert_eq!((traffic.len(), evicted.get()), (1, 1));
        live.add_bytes(1, 2);
        assert!(Arc::ptr_eq(&live, &traffic.series(labels(1))));
        drop(live);
        assert_eq!(shown(KEEP), 0);
        assert_eq!(evicted.get(), 2);
    }

    #[test]
    fn names_that_peers_make_up_are_bounded() {
        let (traffic, evicted) = traffic();
        let live = traffic.series(labels(0));
        for name in 1..3 * MANY {
            traffic.series(labels(name)).opened();
        }
        assert!(traffic.len() <= MANY);
        assert!(evicted.get() >= MANY as u64);
        assert!(Arc::ptr_eq(&live, &traffic.series(labels(0))));
    }
}
