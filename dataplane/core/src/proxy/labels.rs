//! Label sets of connections, from what is known of both ends (facts ztunnel 3.8, 12.2).

use std::net::IpAddr;
use std::sync::Arc;

use http::HeaderMap;

use super::baggage::Baggage;
use crate::config::Config;
use crate::identity::Identity;
use crate::state::resolve::Route;
use crate::state::{Snapshot, Workload};
use crate::telemetry::{Labels, Reporter, Side};

/// Present when a request comes from another network's gateway (facts ztunnel 3.8).
pub const X_FORWARDED_NETWORK: &str = "x-forwarded-network";

/// A peer for labels and log.
#[derive(Default)]
pub struct Peer {
    pub side: Side,
    /// Pod name, else canonical service (facts ztunnel 12.4).
    pub pod: Arc<str>,
}

impl Peer {
    pub fn of(workload: &Workload, principal: Option<Identity>) -> Self {
        let pod = if workload.name.is_empty() {
            &workload.canonical_name
        } else {
            &workload.name
        };
        Self {
            pod: pod.clone(),
            side: Side::of(workload, principal),
        }
    }

    /// The source of an inbound connection: the record of its address, else what it says itself.
    /// Its identity comes from the certificate alone.
    pub fn source(
        snapshot: &Snapshot,
        config: &Config,
        ip: IpAddr,
        identity: Option<Identity>,
        headers: Option<&HeaderMap>,
    ) -> Self {
        let network = &config.network;
        let elsewhere = headers.is_some_and(|headers| from_gateway(headers, network));
        if !elsewhere && let Some(workload) = snapshot.workload_by_address(network, ip) {
            return Self::of(&workload, identity);
        }
        // One option says whether baggage counts, ours and the peer's (facts ztunnel 14).
        let headers = headers.filter(|_| config.response_baggage);
        let mut side = headers.map(Baggage::parse).unwrap_or_default().to_side();
        side.principal = identity;
        Self {
            pod: side.canonical_service.clone(),
            side,
        }
    }
}

/// Labels, and the pod names of both ends for the log.
pub fn outbound(own: &Workload, route: &Route) -> (Labels, Arc<str>, Arc<str>) {
    let (destination, service, mtls) = match route {
        Route::Passthrough { .. } => (None, None, false),
        Route::Tcp {
            workload, service, ..
        } => (Some(workload), service.clone(), false),
        Route::Hbone(route) => (Some(&route.workload), route.service.clone(), true),
    };
    let source = Peer::of(own, mtls.then(|| own.identity()));
    let destination = destination.map_or_else(Peer::default, |workload| {
        Peer::of(workload, Some(workload.identity()))
    });
    let labels = Labels {
        reporter: Reporter::Source,
        source: source.side,
        destination: destination.side,
        service,
        mtls,
    };
    (labels, source.pod, destination.pod)
}

fn from_gateway(headers: &HeaderMap, network: &str) -> bool {
    let origin = headers.get(X_FORWARDED_NETWORK);
    origin.is_some_and(|origin| !origin.as_bytes().eq_ignore_ascii_case(network.as_bytes()))
}
