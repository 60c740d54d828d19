//! The registry of the process: traffic, our own counters, and gauges read when scraped.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::{ConstCounter, Counter};
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::{ConstGauge, Gauge};
use prometheus_client::registry::Registry;

use super::bounds::Bounds;
use super::dns::DnsMetrics;
use super::traffic::Traffic;
use crate::state::Told;
use crate::tls::{CrlCounters, RoleCounters};

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct VerdictLabels {
    policy: String,
    verdict: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DryRunLabels {
    policy: String,
    outcome: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OutcomeLabels {
    outcome: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RefusalLabels {
    direction: &'static str,
    reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DirectionLabels {
    direction: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReporterLabels {
    reporter: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct BuildLabels {
    component: &'static str,
    tag: &'static str,
}

/// Handles that the proxies count with.
pub struct Metrics {
    registry: Registry,
    pub traffic: Arc<Traffic>,
    pub dns: DnsMetrics,
    verdicts: Family<VerdictLabels, Counter>,
    dry_run: Family<DryRunLabels, Counter>,
    refusals: Family<RefusalLabels, Counter>,
    registry_only: Family<OutcomeLabels, Counter>,
    waypoint_required: Family<OutcomeLabels, Counter>,
    on_demand: Family<OutcomeLabels, Counter>,
    pub inbound_connections: Gauge,
    pub outbound_connections: Gauge,
    pub tunnels: Gauge,
    pub panics: Counter,
    pub accept_errors: Counter,
    pub bounds: Bounds,
    pub crl: CrlCounters,
    pub proxies_active: Gauge,
    pub proxies_started: Counter,
    pub proxies_stopped: Counter,
    /// Shared with the log's writer.
    pub log_lines_dropped: Arc<AtomicU64>,
}

/// What the operating system and the runtime say at the moment of a scrape.
#[derive(Debug)]
struct Process {
    log_lines_dropped: Arc<AtomicU64>,
}

impl Metrics {
    pub fn new() -> Self {
        let mut registry = Registry::default();
        let traffic = Arc::new(Traffic::default());
        registry.register_collector(Box::new(traffic.clone()));
        let build: Family<BuildLabels, Gauge> = Family::default();
        build
            .get_or_create(&BuildLabels {
                // Dashboards and istioctl look for this name.
                component: "ztunnel",
                tag: concat!("underpass-", env!("CARGO_PKG_VERSION")),
            })
            .set(1);
        registry.register("istio_build", "Component build info", build);
        let log_lines_dropped = Arc::new(AtomicU64::new(0));
        registry.register_collector(Box::new(Process {
            log_lines_dropped: log_lines_dropped.clone(),
        }));
        let connections: Family<DirectionLabels, Gauge> = Family::default();
        let live = |direction| connections.get_or_create_owned(&DirectionLabels { direction });
        let crl = CrlCounters {
            rejections: by_reporter(
                &mut registry,
                "istio_crl_policy_rejections",
                "Tunnels refused or cut because a certificate is revoked (unstable)",
            ),
            untracked: by_reporter(
                &mut registry,
                "istio_crl_untracked_connections",
                "Tunnels whose chain is too long to be checked against later CRLs (unstable)",
            ),
        };
        let mut metrics = Self {
            registry: Registry::default(),
            traffic,
            dns: DnsMetrics::register(&mut registry),
            verdicts: Family::default(),
            dry_run: Family::default(),
            refusals: Family::default(),
            registry_only: Family::default(),
            waypoint_required: Family::default(),
            on_demand: Family::default(),
            inbound_connections: live("inbound"),
            outbound_connections: live("outbound"),
            tunnels: Gauge::default(),
            panics: Counter::default(),
            accept_errors: Counter::default(),
            bounds: Bounds::default(),
            crl,
            proxies_active: Gauge::default(),
            proxies_started: Counter::default(),
            proxies_stopped: Counter::default(),
            log_lines_dropped,
        };
        registry.register(
            "underpass_connections",
            "Live connections (unstable)",
            connections,
        );
        metrics.register_ours(&mut registry);
        metrics.registry = registry;
        metrics
    }

    fn register_ours(&self, registry: &mut Registry) {
        self.bounds.register(registry);
        registry.register(
            "underpass_policy_verdicts",
            "Inbound connections by verdict and deciding policy (unstable)",
            self.verdicts.clone(),
        );
        registry.register(
            "underpass_policy_dry_run",
            "What dry-run policies would have done (unstable)",
            self.dry_run.clone(),
        );
        registry.register(
            "underpass_refusals",
            "Connections refused before they were routed (unstable)",
            self.refusals.clone(),
        );
        registry.register(
            "underpass_registry_only",
            "Outbound connections to unknown destinations that registryOnly met (unstable)",
            self.registry_only.clone(),
        );
        registry.register(
            "underpass_waypoint_required",
            "Inbound connections past the waypoint that waypointRequired met (unstable)",
            self.waypoint_required.clone(),
        );
        registry.register(
            "underpass_on_demand",
            "Waits for something asked of the control plane by name (unstable)",
            self.on_demand.clone(),
        );
        registry.register(
            "underpass_inbound_tunnels",
            "Live inbound HBONE tunnels (unstable)",
            self.tunnels.clone(),
        );
        registry.register(
            "underpass_panics",
            "Connections ended by a defect of the proxy (unstable)",
            self.panics.clone(),
        );
        registry.register(
            "underpass_accept_errors",
            "Failed accepts, for example for want of descriptors (unstable)",
            self.accept_errors.clone(),
        );
        registry.register(
            "workload_manager_active_proxy_count",
            "The number of pods served (unstable)",
            self.proxies_active.clone(),
        );
        registry.register(
            "workload_manager_proxies_started",
            "The number of pod proxies started (unstable)",
            self.proxies_started.clone(),
        );
        registry.register(
            "workload_manager_proxies_stopped",
            "The number of pod proxies stopped (unstable)",
            self.proxies_stopped.clone(),
        );
    }

    pub fn encode(&self) -> Result<String, fmt::Error> {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry)?;
        Ok(text)
    }

    /// `policy` is the deciding one, `-` where none was.
    pub fn verdict(&self, policy: Option<&str>, allowed: bool) {
        self.verdicts
            .get_or_create(&VerdictLabels {
                policy: policy.unwrap_or("-").to_owned(),
                verdict: if allowed { "allow" } else { "deny" },
            })
            .inc();
    }

    pub fn dry_run(&self, policy: &str, outcome: &'static str) {
        self.dry_run
            .get_or_create(&DryRunLabels {
                policy: policy.to_owned(),
                outcome,
            })
            .inc();
    }

    /// Otherwise it was let through in dry-run.
    pub fn registry_only(&self, refused: bool) {
        let outcome = if refused { "refused" } else { "would_refuse" };
        let labels = OutcomeLabels { outcome };
        self.registry_only.get_or_create(&labels).inc();
    }

    /// Otherwise it was let through in dry-run.
    pub fn waypoint_required(&self, refused: bool) {
        let outcome = if refused { "refused" } else { "would_refuse" };
        let labels = OutcomeLabels { outcome };
        self.waypoint_required.get_or_create(&labels).inc();
    }

    pub fn on_demand(&self, told: Told) {
        let outcome = match told {
            Told::Answered => "answered",
            Told::TimedOut => "timed_out",
            Told::Full => "too_many",
        };
        self.on_demand
            .get_or_create(&OutcomeLabels { outcome })
            .inc();
    }

    pub fn refusal(&self, direction: &'static str, reason: &'static str) {
        self.refusals
            .get_or_create(&RefusalLabels { direction, reason })
            .inc();
    }
}

/// Both reporters are there from the start, so that a rate can be taken of the first count.
fn by_reporter(registry: &mut Registry, name: &str, help: &str) -> RoleCounters {
    let family: Family<ReporterLabels, Counter> = Family::default();
    let of = |reporter| family.get_or_create_owned(&ReporterLabels { reporter });
    let counters = RoleCounters {
        inbound: of("destination"),
        outbound: of("source"),
    };
    registry.register(name, help, family);
    counters
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Collector for Process {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), fmt::Error> {
        let mut gauge = |name: &str, help: &str, value: i64| {
            ConstGauge::new(value).encode(encoder.encode_descriptor(
                name,
                help,
                None,
                MetricType::Gauge,
            )?)
        };
        if let Some(open) = open_fds() {
            gauge("process_open_fds", "Number of open file descriptors", open)?;
        }
        if let Some(limit) = rustix::process::getrlimit(rustix::process::Resource::Nofile).current {
            gauge(
                "process_max_fds",
                "Limit of open file descriptors",
                i64::try_from(limit).unwrap_or(i64::MAX),
            )?;
        }
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            let runtime = runtime.metrics();
            let mut count = |name: &str, help: &str, value: usize| {
                gauge(name, help, i64::try_from(value).unwrap_or(i64::MAX))
            };
            count(
                "tokio_num_workers",
                "Worker threads (unstable)",
                runtime.num_workers(),
            )?;
            count(
                "tokio_num_alive_tasks",
                "Tasks alive (unstable)",
                runtime.num_alive_tasks(),
            )?;
            count(
                "tokio_global_queue_depth",
                "Tasks that wait for a worker (unstable)",
                runtime.global_queue_depth(),
            )?;
        }
        ConstCounter::new(self.log_lines_dropped.load(Relaxed)).encode(encoder.encode_descriptor(
            "underpass_log_lines_dropped",
            "Log lines lost because the reader of our output is too slow (unstable)",
            None,
            MetricType::Counter,
        )?)
    }
}

/// None where /proc isn't mounted.
fn open_fds() -> Option<i64> {
    let count = std::fs::read_dir("/proc/self/fd").ok()?.count();
    // One of them is the directory that we are reading.
    i64::try_from(count).ok().map(|count| count - 1)
}
