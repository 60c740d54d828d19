//! Names of workloads that were resolved when a connection needed them (facts ztunnel 12.1).

use std::fmt;
use std::sync::Arc;

use prometheus_client::encoding::{EncodeLabelSet, LabelSetEncoder};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;

use super::labels::{Side, principal, text};
use crate::state::Workload;

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Asked {
    source: Side,
    hostname: Arc<str>,
}

/// One row a pod and name; names come from the control plane alone.
#[derive(Clone, Debug, Default)]
pub struct OnDemandDns(Family<Asked, Counter>);

impl OnDemandDns {
    pub(super) fn register(&self, registry: &mut Registry) {
        registry.register(
            "istio_on_demand_dns",
            "The number of DNS requests for workloads without an address (unstable)",
            self.0.clone(),
        );
    }

    /// Also what the cache answered.
    pub fn count(&self, source: &Workload, hostname: &Arc<str>) {
        let source = Side::of(source, None);
        let hostname = hostname.clone();
        self.0.get_or_create(&Asked { source, hostname }).inc();
    }
}

impl EncodeLabelSet for Asked {
    fn encode(&self, encoder: &mut LabelSetEncoder) -> Result<(), fmt::Error> {
        let source = &self.source;
        for (key, value) in [
            ("source_workload", &source.workload),
            ("source_canonical_service", &source.canonical_service),
            ("source_canonical_revision", &source.canonical_revision),
            ("source_workload_namespace", &source.namespace),
        ] {
            text(encoder, key, value)?;
        }
        principal(encoder, "source_principal", source.principal.as_ref())?;
        for (key, value) in [
            ("source_app", &source.app),
            ("source_version", &source.version),
            ("source_cluster", &source.cluster),
            ("hostname", &self.hostname),
        ] {
            text(encoder, key, value)?;
        }
        Ok(())
    }
}
