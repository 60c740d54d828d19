//! The decision tree of an outbound connection, in the order of facts ztunnel 2.2.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use super::upstream::{Found, Upstream, View, waypoint_of};
use super::{Authority, HboneRoute, IpFamily, Refusal, Route, Target};
use crate::config::{Config, canonical};
use crate::state::balance::PortRule;
use crate::state::{Gateway, ServiceRecord, Snapshot, Workload};

/// Endpoints passed over because all gateways to them were tried.
const MOST_PASSED_OVER: usize = 16;

/// `source` is the pod that the listener belongs to, `client` the connection's source address.
/// Workloads whose uid is in `exclude` were tried before: they are left out of every choice, and so
/// is what only they lead to.
pub fn outbound(
    snapshot: &Snapshot,
    config: &Config,
    source: &Workload,
    client: IpAddr,
    dst: SocketAddr,
    exclude: &[Arc<str>],
) -> Result<Route, Refusal> {
    let decide = |exclude: &[Arc<str>]| {
        let view = View {
            snapshot,
            source,
            exclude,
        };
        decide(view, config, client, dst)
    };
    let mut excluded = exclude.to_vec();
    loop {
        match decide(&excluded) {
            Err(Refusal::UnknownNetworkGateway { workload, .. })
                if !exclude.is_empty() && excluded.len() < exclude.len() + MOST_PASSED_OVER =>
            {
                excluded.push(workload);
            }
            decision => return decision,
        }
    }
}

fn decide(
    view: View<'_>,
    config: &Config,
    client: IpAddr,
    dst: SocketAddr,
) -> Result<Route, Refusal> {
    let View {
        snapshot, source, ..
    } = view;
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
        return to_waypoint(view, waypoint, dst, Some(service), Some(service));
    }

    // 3: one endpoint, or the workload.
    let found = view.find(&source.network, dst, namespace, PortRule::Standard);
    let nobody = |service: &ServiceRecord| {
        let service = service.key.clone();
        Err(Refusal::NoHealthyUpstream { dst, service })
    };
    let upstream = match (found, &addressed) {
        (Found::LeftAlone, _) => return Ok(Route::Passthrough { dst, known: true }),
        (Found::Nothing, None) => return Ok(Route::Passthrough { dst, known: false }),
        (Found::Nothing, Some(service)) => return nobody(service),
        (Found::NoEndpoint(service), _) => return nobody(&service),
        (Found::Upstream(upstream), _) => upstream,
    };

    // 4: other networks are reached through gateways, and through services only.
    if upstream.workload.network != source.network {
        return across(view, upstream, dst, addressed.as_deref(), false);
    }

    // 5, 6: the workload's waypoint, for traffic to the workload that doesn't come from there.
    if addressed.is_none()
        && let Some(waypoint) = &upstream.workload.waypoint
        && !comes_from(snapshot, source, canonical(client), waypoint)
    {
        let service = upstream.service.as_deref();
        return to_waypoint(view, waypoint, dst, service, None);
    }

    let target = upstream.target(dst.ip())?;
    let service = upstream.service_name();
    let retryable = upstream.others;
    // 7
    if upstream.workload.hbone {
        return Ok(Route::Hbone(HboneRoute {
            authority: Authority::Ip(match &target {
                Target::Addr(addr) => *addr,
                Target::Host { port, prefer, .. } => unresolved(*prefer, *port),
            }),
            tunnel: target.with_port(config.ports.inbound_hbone),
            expected: upstream.expected(),
            workload: upstream.workload,
            service,
            via_waypoint: false,
            inner: None,
            retryable,
        }));
    }
    // 8
    Ok(Route::Tcp {
        dst: target,
        workload: upstream.workload,
        service,
        retryable,
    })
}

/// The authority is what the client dialled; fails closed (facts ztunnel 2.2 steps 2 and 6).
/// `addressed` is the service that the client dialled, `service` the one for labels.
fn to_waypoint(
    view: View<'_>,
    waypoint: &Gateway,
    dst: SocketAddr,
    service: Option<&ServiceRecord>,
    addressed: Option<&ServiceRecord>,
) -> Result<Route, Refusal> {
    let Some(upstream) = view.find_gateway(waypoint) else {
        let waypoint = waypoint.destination.to_string();
        return Err(Refusal::UnknownWaypoint { dst, waypoint });
    };
    if upstream.workload.network != view.source.network {
        return across(view, upstream, dst, addressed, true);
    }
    // A reference by address says the family itself.
    let tunnel = upstream.target(waypoint.ip().unwrap_or(dst.ip()))?;
    Ok(Route::Hbone(HboneRoute {
        tunnel,
        authority: Authority::Ip(dst),
        expected: upstream.expected(),
        service: service.map(|s| s.name.clone()),
        via_waypoint: true,
        inner: None,
        retryable: upstream.others,
        workload: upstream.workload,
    }))
}

/// Through the gateway of the chosen workload's network: its far side balances anew, among all
/// endpoints that it has for the hostname (facts ztunnel 2.5).
fn across(
    view: View<'_>,
    chosen: Upstream,
    dst: SocketAddr,
    addressed: Option<&ServiceRecord>,
    via_waypoint: bool,
) -> Result<Route, Refusal> {
    let workload = chosen.workload.uid.clone();
    let network = chosen.workload.network.clone();
    let Some(addressed) = addressed else {
        return Err(Refusal::NoService {
            dst,
            workload,
            network,
        });
    };
    let Some(gateway) = &chosen.workload.network_gateway else {
        return Err(Refusal::NoNetworkGateway { workload, network });
    };
    // Nobody's certificate would do: said here, it has a reason.
    let inner = chosen.service_identities();
    if inner.is_empty() {
        let service = chosen.service.as_deref().unwrap_or(addressed).key.clone();
        return Err(Refusal::NoServiceIdentity { service, network });
    }
    let Some(upstream) = view.find_gateway(gateway) else {
        let gateway = gateway.destination.to_string();
        return Err(Refusal::UnknownNetworkGateway {
            gateway,
            network,
            workload,
        });
    };
    Ok(Route::Hbone(HboneRoute {
        tunnel: upstream.target(gateway.ip().unwrap_or(dst.ip()))?,
        authority: Authority::Host(addressed.name.hostname.clone(), dst.port()),
        expected: upstream.expected(),
        service: Some(addressed.name.clone()),
        via_waypoint,
        inner: Some(inner),
        retryable: upstream.others || chosen.others,
        workload: upstream.workload,
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

fn unresolved(family: IpFamily, port: u16) -> SocketAddr {
    match family {
        IpFamily::V4 => (Ipv4Addr::UNSPECIFIED, port).into(),
        IpFamily::V6 => (Ipv6Addr::UNSPECIFIED, port).into(),
    }
}
