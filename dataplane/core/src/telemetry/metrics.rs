//! The registry of the process: traffic, our own counters, and gauges read when scraped.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::{encode_eof, encode_registry};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use super::bounds::Bounds;
use super::counts::Counts;
use super::dns::DnsMetrics;
use super::labels::Reporter;
use super::on_demand::OnDemandDns;
use super::otlp;
use super::process::{self, Process};
use super::traffic::Traffic;
use crate::config::TelemetryConfig;
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

/// Handles that the proxies count with.
pub struct Metrics {
    registry: Registry,
    /// Apart: much text, written without a lock.
    traffic_registry: Registry,
    pub traffic: Arc<Traffic>,
    pub dns: DnsMetrics,
    verdicts: Counts<VerdictLabels>,
    dry_run: Counts<DryRunLabels>,
    refusals: Family<RefusalLabels, Counter>,
    registry_only: Family<OutcomeLabels, Counter>,
    waypoint_required: Family<OutcomeLabels, Counter>,
    on_demand: Family<OutcomeLabels, Counter>,
    pub inbound_connections: Gauge,
    pub outbound_connections: Gauge,
    pub source_sockets: Gauge,
    pub destination_sockets: Gauge,
    pub tunnels: Gauge,
    pub panics: Counter,
    pub accept_errors: Counter,
    pub listeners_lost: Counter,
    pub bounds: Bounds,
    pub crl: CrlCounters,
    pub on_demand_dns: OnDemandDns,
    pub proxies_active: Gauge,
    pub proxies_started: Counter,
    pub proxies_stopped: Counter,
    pub(super) otlp: otlp::Counters,
    /// Shared with the log's writer.
    pub log_lines_dropped: Arc<AtomicU64>,
}

impl Metrics {
    pub fn new(config: &TelemetryConfig) -> Self {
        let (mut registry, mut traffic_registry) = (Registry::default(), Registry::default());
        let evicted = Counter::default();
        let traffic = Arc::new(Traffic::new(config.series_ttl, evicted.clone()));
        traffic_registry.register_collector(Box::new(traffic.clone()));
        process::register_build(&mut registry, &config.istio_version);
        let log_lines_dropped = Arc::new(AtomicU64::new(0));
        registry.register_collector(Box::new(Process::new(log_lines_dropped.clone())));
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
        let sockets: Family<ReporterLabels, Gauge> = Family::default();
        let open = |reporter: Reporter| {
            let reporter = reporter.as_str();
            sockets.get_or_create_owned(&ReporterLabels { reporter })
        };
        let mut metrics = Self {
            verdicts: Counts::register(
                &mut registry,
                "underpass_policy_verdicts",
                "Inbound connections by verdict and deciding policy (unstable)",
                &evicted,
            ),
            dry_run: Counts::register(
                &mut registry,
                "underpass_policy_dry_run",
                "What dry-run policies would have done (unstable)",
                &evicted,
            ),
            registry: Registry::default(),
            traffic_registry,
            traffic,
            dns: DnsMetrics::register(&mut registry),
            refusals: Family::default(),
            registry_only: Family::default(),
            waypoint_required: Family::default(),
            on_demand: Family::default(),
            inbound_connections: live("inbound"),
            outbound_connections: live("outbound"),
            source_sockets: open(Reporter::Source),
            destination_sockets: open(Reporter::Destination),
            tunnels: Gauge::default(),
            panics: Counter::default(),
            accept_errors: Counter::default(),
            listeners_lost: Counter::default(),
            bounds: Bounds::default(),
            crl,
            on_demand_dns: OnDemandDns::default(),
            proxies_active: Gauge::default(),
            proxies_started: Counter::default(),
            proxies_stopped: Counter::default(),
            otlp: otlp::Counters::default(),
            log_lines_dropped,
        };
        registry.register(
            "underpass_connections",
            "Live connections (unstable)",
            connections,
        );
        registry.register(
            "istio_tcp_sockets_open",
            "Sockets accepted from clients and peers that are open (unstable)",
            sockets,
        );
        registry.register(
            "underpass_series_evicted",
            "Label sets forgotten because nobody used them (unstable)",
            evicted,
        );
        metrics.register_ours(&mut registry);
        metrics.registry = registry;
        metrics
    }

    fn register_ours(&self, registry: &mut Registry) {
        self.bounds.register(registry);
        self.otlp.register(registry);
        self.on_demand_dns.register(registry);
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
            "underpass_listeners_lost",
            "Listeners that somebody in the pod ended; they listen again (unstable)",
            self.listeners_lost.clone(),
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

    /// The families of the registry hold locks while they are written, so these are written to
    /// memory first: whoever reads `out` may be slow.
    pub fn encode(&self, out: &mut impl fmt::Write) -> fmt::Result {
        let mut text = String::new();
        encode_registry(&mut text, &self.registry)?;
        out.write_str(&text)?;
        encode_registry(out, &self.traffic_registry)?;
        encode_eof(out)
    }

    /// `policy` is the deciding one, `-` where none was.
    pub fn verdict(&self, policy: Option<&str>, allowed: bool) {
        self.verdicts.inc(VerdictLabels {
            policy: policy.unwrap_or("-").to_owned(),
            verdict: if allowed { "allow" } else { "deny" },
        });
    }

    pub fn dry_run(&self, policy: &str, outcome: &'static str) {
        self.dry_run.inc(DryRunLabels {
            policy: policy.to_owned(),
            outcome,
        });
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
