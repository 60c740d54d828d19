//! What the tests of routes have in common.

use std::net::SocketAddr;

use super::{HboneRoute, Refusal, Route, outbound};
use crate::state::Snapshot;
use crate::state::fixture::*;
use crate::wire::workload as wds;

/// The pod `shop/client` at 10.0.0.100 dials.
pub fn route(snapshot: &Snapshot, dst: &str) -> Result<Route, Refusal> {
    let client = uid_of(snapshot, "shop", "client");
    let from = client.addresses[0];
    outbound(snapshot, &config(), &client, from, addr(dst), &[])
}

pub fn mesh() -> Push {
    Push::addresses().workload(pod("shop", "client", "10.0.0.100"))
}

pub fn hbone(route: Result<Route, Refusal>) -> HboneRoute {
    match route {
        Ok(Route::Hbone(route)) => route,
        other => panic!("expected HBONE, got {other:?}"),
    }
}

pub fn passthrough(route: Result<Route, Refusal>) -> SocketAddr {
    match route {
        Ok(Route::Passthrough { dst, .. }) => dst,
        other => panic!("expected passthrough, got {other:?}"),
    }
}

/// A waypoint service `infra/<name>` with one pod.
pub fn waypoint(push: Push, name: &str, vip: &str, address: &str) -> Push {
    let mut gateway = service("infra", name, vip);
    gateway.ports = vec![port(15008, 15008)];
    let pod = member(pod("infra", name, address), &gateway, &[]);
    push.service(gateway).workload(pod)
}

pub fn waypoint_named(name: &str) -> Option<wds::GatewayAddress> {
    let hostname = format!("{name}.infra.svc.cluster.local");
    Some(gateway_named("infra", &hostname))
}
