//! Counters of traffic: one row for each label set, looked up once a connection.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use ahash::AHashSet;
use parking_lot::RwLock;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;

use super::labels::{Flags, Labels, WithFlags};

/// The counters of one label set. Opened and bytes carry the flags `-`; what closes counts under
/// the flags it ended with, and any but `-` is a failed connection.
#[derive(Debug)]
pub struct Series {
    pub labels: Labels,
    opened: AtomicU64,
    received: AtomicU64,
    sent: AtomicU64,
    closed: [AtomicU64; Flags::ALL.len()],
}

/// All rows. A read lock and one hash a connection; nothing is locked per byte.
#[derive(Debug, Default)]
pub struct Traffic {
    rows: RwLock<AHashSet<Key>>,
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
        }
    }

    pub fn opened(&self) {
        self.opened.fetch_add(1, Relaxed);
    }

    pub fn closed(&self, flags: Flags) {
        self.closed[flags as usize].fetch_add(1, Relaxed);
    }

    /// `received` went from client to server, `sent` back (facts ztunnel 12.3).
    pub fn add_bytes(&self, received: u64, sent: u64) {
        self.received.fetch_add(received, Relaxed);
        self.sent.fetch_add(sent, Relaxed);
    }
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
    pub fn series(&self, labels: Labels) -> Arc<Series> {
        if let Some(key) = self.rows.read().get(&labels) {
            return key.0.clone();
        }
        let mut rows = self.rows.write();
        if let Some(key) = rows.get(&labels) {
            return key.0.clone();
        }
        let series = Arc::new(Series::new(labels));
        rows.insert(Key(series.clone()));
        series
    }

    fn all(&self) -> Vec<Arc<Series>> {
        self.rows.read().iter().map(|key| key.0.clone()).collect()
    }
}

impl Collector for Traffic {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), fmt::Error> {
        let rows = self.all();
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
