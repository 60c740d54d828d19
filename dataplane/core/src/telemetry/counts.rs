//! A family of counters whose label sets come from outside, and so is bounded.

use std::fmt;
use std::hash::Hash;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use ahash::AHashMap;
use parking_lot::RwLock;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::registry::Registry;

/// More than a mesh has policies; who makes names up can't make us keep more.
const MANY: usize = 4096;

/// Cheap to clone. Nothing is locked while a scrape is written.
#[derive(Debug)]
pub struct Counts<L> {
    rows: Arc<RwLock<AHashMap<L, Arc<AtomicU64>>>>,
    /// Rows forgotten for others.
    forgotten: Counter,
}

#[derive(Debug)]
struct Named<L> {
    name: &'static str,
    help: &'static str,
    counts: Counts<L>,
}

impl<L> Clone for Counts<L> {
    fn clone(&self) -> Self {
        Self {
            rows: self.rows.clone(),
            forgotten: self.forgotten.clone(),
        }
    }
}

impl<L> Counts<L>
where
    L: EncodeLabelSet + Clone + Eq + Hash + fmt::Debug + Send + Sync + 'static,
{
    pub fn register(
        registry: &mut Registry,
        name: &'static str,
        help: &'static str,
        forgotten: &Counter,
    ) -> Self {
        let counts = Self {
            rows: Arc::default(),
            forgotten: forgotten.clone(),
        };
        registry.register_collector(Box::new(Named {
            name,
            help,
            counts: counts.clone(),
        }));
        counts
    }

    pub fn inc(&self, labels: L) {
        if let Some(row) = self.rows.read().get(&labels) {
            row.fetch_add(1, Relaxed);
            return;
        }
        let mut rows = self.rows.write();
        if rows.len() >= MANY && !rows.contains_key(&labels) {
            // The rarest say least. A thousand at once, so that it happens seldom.
            let mut counts: Vec<u64> = rows.values().map(|row| row.load(Relaxed)).collect();
            let (_, limit, _) = counts.select_nth_unstable(MANY / 4);
            let limit = *limit;
            let mut left = MANY / 4;
            rows.retain(|_, row| {
                let keep = left == 0 || row.load(Relaxed) > limit;
                left -= usize::from(!keep);
                keep
            });
            self.forgotten.inc_by((MANY / 4) as u64);
        }
        rows.entry(labels).or_default().fetch_add(1, Relaxed);
    }
}

impl<L> Collector for Named<L>
where
    L: EncodeLabelSet + Clone + Eq + Hash + fmt::Debug + Send + Sync + 'static,
{
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), fmt::Error> {
        let rows = self.counts.rows.read();
        let rows: Vec<_> = rows
            .iter()
            .map(|(labels, row)| (labels.clone(), row.load(Relaxed)))
            .collect();
        if rows.is_empty() {
            return Ok(());
        }
        let mut family =
            encoder.encode_descriptor(self.name, self.help, None, MetricType::Counter)?;
        for (labels, count) in rows {
            family
                .encode_family(&labels)?
                .encode_counter::<NoLabelSet, _, u64>(&count, None)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_from_outside_are_bounded_and_the_frequent_stay() {
        let (mut registry, forgotten) = (Registry::default(), Counter::default());
        let counts = Counts::register(&mut registry, "c", "help", &forgotten);
        let label = |n: usize| [("policy", n.to_string())];
        counts.inc(label(0));
        counts.inc(label(0));
        for n in 0..2 * MANY {
            counts.inc(label(n));
        }
        assert!(counts.rows.read().len() <= MANY);
        assert!(forgotten.get() > 0);
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        assert!(text.contains("c_total{policy=\"0\"} 3\n"));
    }
}
