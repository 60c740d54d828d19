//! What shows when a bound is reached, or a way around a failure was taken (docs/limits.md).

use std::sync::atomic::Ordering;

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

#[derive(Clone, Debug, Default)]
pub struct Bounds {
    pub outbound_tunnels: Gauge,
    pub tunnels_evicted: Counter,
    pub original_source_lost: Counter,
    pub endpoint_retries: Counter,
    pub verdicts_forgotten: Counter,
    pub proofs: Family<[(&'static str, &'static str); 1], Counter>,
    pub capture_exits: Family<[(&'static str, &'static str); 1], Counter>,
}

impl Bounds {
    /// As the kernel counted since the programs were first loaded.
    pub fn capture_exit(&self, reason: &'static str, count: u64) {
        let exits = self.capture_exits.get_or_create(&[("reason", reason)]);
        exits.inner().store(count, Ordering::Relaxed);
    }

    /// `outcome` of a connection that came to prove a pod's capture, or pretended to.
    pub fn proof(&self, outcome: &'static str) {
        self.proofs.get_or_create(&[("outcome", outcome)]).inc();
    }

    pub(super) fn register(&self, registry: &mut Registry) {
        registry.register(
            "underpass_outbound_tunnels",
            "Live outbound HBONE tunnels (unstable)",
            self.outbound_tunnels.clone(),
        );
        registry.register(
            "underpass_outbound_tunnels_evicted",
            "Idle tunnels closed because a pod's pool was full (unstable)",
            self.tunnels_evicted.clone(),
        );
        registry.register(
            "underpass_original_source_lost",
            "Connections whose client address the application couldn't be shown (unstable)",
            self.original_source_lost.clone(),
        );
        registry.register(
            "underpass_capture_exits",
            "Verdicts of the eBPF programs of the node, by their reasons (unstable)",
            self.capture_exits.clone(),
        );
        registry.register(
            "underpass_proof_connections",
            "Connections to the port of capture's proofs, by what they said (unstable)",
            self.proofs.clone(),
        );
        registry.register(
            "underpass_endpoint_retries",
            "Connections tried again on another endpoint (unstable)",
            self.endpoint_retries.clone(),
        );
        registry.register(
            "underpass_verdicts_forgotten",
            "Refusals and failures that newer ones pushed out of `underpass why` (unstable)",
            self.verdicts_forgotten.clone(),
        );
    }
}
