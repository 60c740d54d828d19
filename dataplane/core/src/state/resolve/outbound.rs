//! The decision tree of an outbound connection, in the order of facts ztunnel 2.2.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use super::upstream::{Found, Upstream, find, find_gateway, waypoint_of};
use super::{HboneRoute, Refusal, Route};
use crate::config::{Config, canonical};
use crate::state::balance::PortRule;
use crate::state::{Gateway, ServiceRecord, Snapshot, Workload};

/// `source` is the pod that the listener belongs to, `client` the connection's source address.
pub fn outbound(
    snapshot: &Snapshot,
    config: &Config,
    source: &Workload,
    client: IpAddr,
    dst: SocketAddr,
) -> Result<Route, Refusal> {
    let dst = SocketAddr::new(canonical(dst.ip()), dst.port());
    // Beyond upstream also for the pod's own address: a pod that the mesh knows as plain would call
    // its own listener again and again (facts ztunnel 2.1).
    let to_itself = dst.ip().is_loopback() || source.addresses.contains(&dst.ip());
    if to_itself && config.ports.is_own(dst.port()) {
        return Err(Refusal::SelfCall(dst));
    }

    // 1: a workload's own address is not service addressed, even where a service has it too.
    let namespace = Some(&*source.namespace);
    let addressed = match snapshot.workload_by_address(&config.network, dst.ip()) {
        Some(_) => None,
        None => snapshot.service_by_vip(&config.network, dst.ip(), namespace),
    };

    // 2: the service's waypoint decides where the rest goes; it must be there.
    if let Some(service) = &addressed
        && let Some(waypoint) = waypoint_of(service)
    {
        return to_waypoint(snapshot, source, waypoint, dst, Some(service));
    }

    // 3: one endpoint, or the workload.
    let found = find(
        snapshot,
        source,
        &source.network,
        dst,
        namespace,
        PortRule::Standard,
    );
    let nobody = |service: &ServiceRecord| {
        let service = service.key.clone();
        Err(Refusal::NoHealthyUpstream { dst, service })
    };
    let upstream = match (found, &addressed) {
        (Found::LeftAlone, _) | (Found::Nothing, None) => return Ok(Route::Passthrough { dst }),
        (Found::Nothing, Some(service)) => return nobody(service),
        (Found::NoEndpoint(service), _) => return nobody(&service),
        (Found::Upstream(upstream), _) => upstream,
    };

    // 4: other networks are reached through gateways, and through services only.
    if upstream.workload.network != source.network {
        let (workload, network) = place(&upstream);
        return Err(match addressed {
            Some(_) => Refusal::CrossNetwork { workload, network },
            None => Refusal::NoService {
                dst,
                workload,
                network,
            },
        });
    }

    // 5, 6: the workload's waypoint, for traffic to the workload that doesn't come from there.
    if addressed.is_none()
        && let Some(waypoint) = &upstream.workload.waypoint
        && !comes_from(snapshot, source, canonical(client), waypoint)
    {
        let service = upstream.service.as_deref();
        return to_waypoint(snapshot, source, waypoint, dst, service);
    }

    let target = SocketAddr::new(upstream.address(dst.ip())?, upstream.port);
    let service = upstream.service_name();
    // 7
    if upstream.workload.hbone {
        return Ok(Route::Hbone(HboneRoute {
            tunnel: SocketAddr::new(target.ip(), config.ports.inbound_hbone),
            authority: target,
            expected: upstream.expected(),
            workload: upstream.workload,
            service,
            via_waypoint: false,
        }));
    }
    // 8
    Ok(Route::Tcp {
        dst: target,
        workload: upstream.workload,
        service,
    })
}

/// The authority is what the client dialled; fails closed (facts ztunnel 2.2 steps 2 and 6).
fn to_waypoint(
    snapshot: &Snapshot,
    source: &Workload,
    waypoint: &Gateway,
    dst: SocketAddr,
    service: Option<&ServiceRecord>,
) -> Result<Route, Refusal> {
    let Some(upstream) = find_gateway(snapshot, source, waypoint) else {
        let waypoint = waypoint.destination.to_string();
        return Err(Refusal::UnknownWaypoint { dst, waypoint });
    };
    if upstream.workload.network != source.network {
        let (workload, network) = place(&upstream);
        return Err(Refusal::CrossNetwork { workload, network });
    }
    // A reference by address says the family itself.
    let ip = upstream.address(waypoint.ip().unwrap_or(dst.ip()))?;
    Ok(Route::Hbone(HboneRoute {
        tunnel: SocketAddr::new(ip, upstream.port),
        authority: dst,
        expected: upstream.expected(),
        workload: upstream.workload,
        service: service.map(|s| s.name.clone()),
        via_waypoint: true,
    }))
}

/// Is the connection one of the waypoint's own: made from an address of a workload behind it that
/// has the source's identity? (facts ztunnel 2.2 step 5)
fn comes_from(snapshot: &Snapshot, source: &Workload, client: IpAddr, waypoint: &Gateway) -> bool {
    let is = |workload: &Workload| {
        workload.addresses.contains(&client)
            && workload.has_identity(&source.identity())
            && snapshot.leads_to(waypoint, workload)
    };
    // Host-network pods aren't found by address.
    let owner = snapshot.workload_by_address(&source.network, client);
    is(source) || owner.is_some_and(|owner| is(&owner))
}

fn place(upstream: &Upstream) -> (Arc<str>, Arc<str>) {
    let workload = &upstream.workload;
    (workload.uid.clone(), workload.network.clone())
}
