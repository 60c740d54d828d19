//! What shows when a bound is reached, or a way around a failure was taken (docs/limits.md).

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

#[derive(Clone, Debug, Default)]
pub struct Bounds {
    pub outbound_tunnels: Gauge,
    pub tunnels_evicted: Counter,
    pub original_source_lost: Counter,
    pub endpoint_retries: Counter,
    pub verdicts_forgotten: Counter,
}

impl Bounds {
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
