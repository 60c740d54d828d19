//! Counters of the DNS proxy (facts ztunnel 12.1): one row for each type of question, transport and
//! source.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use ahash::AHashMap;
use parking_lot::RwLock;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

/// facts ztunnel 12.1
const BUCKETS: [f64; 6] = [0.0005, 0.001, 0.01, 0.1, 1.0, 5.0];

/// Seconds that a row is shown after its last question: pods come and go.
const KEEP: u32 = 900;

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct DnsLabels {
    /// Lower case, of a short list: pods choose what they ask for.
    pub query_type: &'static str,
    pub protocol: &'static str,
    /// Empty texts are shown as `unknown`.
    pub canonical_service: Arc<str>,
    pub canonical_revision: Arc<str>,
}

#[derive(Debug)]
pub struct DnsSeries {
    requests: AtomicU64,
    upstream_requests: AtomicU64,
    upstream_failures: AtomicU64,
    upstream_duration: Histogram,
    /// Seconds since the start.
    used: AtomicU32,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonLabels {
    reason: &'static str,
}

#[derive(Debug)]
struct Rows {
    start: Instant,
    rows: RwLock<AHashMap<DnsLabels, Arc<DnsSeries>>>,
}

/// Handles that the DNS proxies count with.
#[derive(Debug)]
pub struct DnsMetrics {
    rows: Arc<Rows>,
    refused: Family<ReasonLabels, Counter>,
    pub cache_hits: Counter,
    pub cache_entries: Gauge,
    /// Datagrams that weren't the answer that was waited for.
    pub foreign_answers: Counter,
}

impl DnsMetrics {
    pub fn register(registry: &mut Registry) -> Self {
        let it = Self {
            rows: Arc::new(Rows {
                start: Instant::now(),
                rows: RwLock::default(),
            }),
            refused: Family::default(),
            cache_hits: Counter::default(),
            cache_entries: Gauge::default(),
            foreign_answers: Counter::default(),
        };
        registry.register_collector(Box::new(it.rows.clone()));
        registry.register(
            "underpass_dns_refused",
            "DNS questions answered by SERVFAIL or cut, by reason (unstable)",
            it.refused.clone(),
        );
        registry.register(
            "underpass_dns_cache_hits",
            "DNS questions answered by a kept answer of a nameserver (unstable)",
            it.cache_hits.clone(),
        );
        registry.register(
            "underpass_dns_cache_entries",
            "Answers of nameservers kept for the node (unstable)",
            it.cache_entries.clone(),
        );
        registry.register(
            "underpass_dns_foreign_answers",
            "Datagrams to our DNS questions that answer something else (unstable)",
            it.foreign_answers.clone(),
        );
        it
    }

    /// Counts the question.
    pub fn request(&self, labels: DnsLabels) -> Arc<DnsSeries> {
        let series = self.rows.series(labels);
        series.requests.fetch_add(1, Relaxed);
        series
    }

    pub fn refused(&self, reason: &'static str) {
        self.refused.get_or_create(&ReasonLabels { reason }).inc();
    }
}

impl DnsSeries {
    fn new() -> Self {
        Self {
            requests: AtomicU64::new(0),
            upstream_requests: AtomicU64::new(0),
            upstream_failures: AtomicU64::new(0),
            upstream_duration: Histogram::new(BUCKETS),
            used: AtomicU32::new(0),
        }
    }

    /// A question that went to the nameservers, answered or not.
    pub fn relayed(&self, took: Duration, answered: bool) {
        self.upstream_requests.fetch_add(1, Relaxed);
        self.upstream_failures
            .fetch_add(u64::from(!answered), Relaxed);
        self.upstream_duration.observe(took.as_secs_f64());
    }
}

impl Rows {
    fn series(&self, labels: DnsLabels) -> Arc<DnsSeries> {
        let now = self.now();
        if let Some(row) = self.rows.read().get(&labels) {
            row.used.store(now, Relaxed);
            return row.clone();
        }
        let mut rows = self.rows.write();
        let row = rows
            .entry(labels)
            .or_insert_with(|| Arc::new(DnsSeries::new()));
        row.used.store(now, Relaxed);
        row.clone()
    }

    fn now(&self) -> u32 {
        u32::try_from(self.start.elapsed().as_secs()).unwrap_or(u32::MAX)
    }

    fn forget_unused(&self, now: u32) {
        let is_recent = |row: &Arc<DnsSeries>| now.saturating_sub(row.used.load(Relaxed)) < KEEP;
        if !self.rows.read().values().all(is_recent) {
            self.rows.write().retain(|_, row| is_recent(row));
        }
    }
}

impl Collector for Rows {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), fmt::Error> {
        self.forget_unused(self.now());
        let rows: Vec<_> = self
            .rows
            .read()
            .iter()
            .map(|(k, v)| (k.clone(), v.clone()))
            .collect();
        type Count = fn(&DnsSeries) -> &AtomicU64;
        let counters: [(&str, &str, Count); 3] = [
            (
                "istio_dns_requests",
                "Total number of DNS requests (unstable)",
                |row| &row.requests,
            ),
            (
                "istio_dns_upstream_requests",
                "Total number of DNS requests forwarded to upstream (unstable)",
                |row| &row.upstream_requests,
            ),
            (
                "istio_dns_upstream_failures",
                "Total number of DNS requests forwarded to upstream that failed (unstable)",
                |row| &row.upstream_failures,
            ),
        ];
        for (name, help, count) in counters {
            let counted = rows
                .iter()
                .map(|(labels, row)| (labels, count(row).load(Relaxed)));
            let mut counted = counted.filter(|(_, value)| *value > 0).peekable();
            if counted.peek().is_none() {
                continue;
            }
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            for (labels, value) in counted {
                family
                    .encode_family(labels)?
                    .encode_counter::<NoLabelSet, _, u64>(&value, None)?;
            }
        }
        let relayed = |row: &DnsSeries| row.upstream_requests.load(Relaxed) > 0;
        let mut timed = rows.iter().filter(|(_, row)| relayed(row)).peekable();
        if timed.peek().is_none() {
            return Ok(());
        }
        let mut family = encoder.encode_descriptor(
            "istio_dns_upstream_request_duration_seconds",
            "Seconds until a forwarded DNS request was answered (unstable)",
            None,
            MetricType::Histogram,
        )?;
        for (labels, row) in timed {
            row.upstream_duration
                .encode(family.encode_family(labels)?)?;
        }
        Ok(())
    }
}

impl EncodeLabelSet for DnsLabels {
    fn encode(
        &self,
        encoder: &mut prometheus_client::encoding::LabelSetEncoder<'_>,
    ) -> Result<(), fmt::Error> {
        let known = |text: &str| if text.is_empty() { "unknown" } else { text }.to_owned();
        // facts ztunnel 12.2
        [
            ("request_query_type", known(self.query_type)),
            ("request_protocol", known(self.protocol)),
            ("source_canonical_service", known(&self.canonical_service)),
            ("source_canonical_revision", known(&self.canonical_revision)),
        ]
        .encode(encoder)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels() -> DnsLabels {
        DnsLabels {
            query_type: "a",
            protocol: "udp",
            canonical_service: "web".into(),
            canonical_revision: "".into(),
        }
    }

    #[test]
    fn families_carry_upstreams_names_and_labels_and_empty_ones_are_omitted() {
        let mut registry = Registry::default();
        let metrics = DnsMetrics::register(&mut registry);
        let series = metrics.request(labels());
        let text = || {
            let mut text = String::new();
            prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
            text
        };
        let set = "request_query_type=\"a\",request_protocol=\"udp\",\
            source_canonical_service=\"web\",source_canonical_revision=\"unknown\"";
        assert!(
            text().contains(&format!("istio_dns_requests_total{{{set}}} 1")),
            "{}",
            text()
        );
        assert!(!text().contains("upstream"), "{}", text());
        series.relayed(Duration::from_millis(5), false);
        for expected in [
            format!("istio_dns_upstream_requests_total{{{set}}} 1"),
            format!("istio_dns_upstream_failures_total{{{set}}} 1"),
            format!("istio_dns_upstream_request_duration_seconds_bucket{{le=\"0.01\",{set}}} 1"),
        ] {
            assert!(text().contains(&expected), "{expected}: {}", text());
        }
    }

    #[test]
    fn what_nobody_asked_for_fifteen_minutes_is_forgotten() {
        let metrics = DnsMetrics::register(&mut Registry::default());
        metrics.request(labels());
        metrics.rows.forget_unused(KEEP - 1);
        assert_eq!(metrics.rows.rows.read().len(), 1);
        metrics.rows.forget_unused(KEEP);
        assert_eq!(metrics.rows.rows.read().len(), 0);
    }
}
