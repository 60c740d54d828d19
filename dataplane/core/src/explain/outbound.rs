//! The caller's side: which service, endpoint, waypoint or gateway, and whether there is a
//! certificate for the tunnel.

use std::net::{IpAddr, SocketAddr};

use super::Known;
use super::inbound::{Arrival, arrive};
use super::source::{Caller, certificate};
use super::steps::Steps;
use crate::proxy::{Demands, Enforcement};
use crate::state::resolve::{self, HboneRoute, Refusal, Route, Target};
use crate::state::{Destination, ServiceRecord, Workload};

/// Ports or endpoints that are named.
const NAMED: usize = 8;

/// Endpoints that are looked at.
const TRIED: usize = 16;

/// A connection that a proxy takes.
pub fn captured(known: &Known<'_>, caller: &Caller, dst: SocketAddr, steps: &mut Steps) {
    let own = &caller.workload;
    let ours = dst.ip().is_loopback() || own.addresses.contains(&dst.ip());
    if ours && !known.config.ports.is_own(dst.port()) {
        let text = "the pod's own address: it stays inside the pod, without the proxy";
        steps.ok("destination", &dst.to_string(), text);
        return steps.goes("inside the pod");
    }
    tell_addressed(known, own, dst, steps);
    let client = caller.address(dst.ip());
    let route = resolve::outbound(known.snapshot, known.config, own, client, dst, &[]);
    match route {
        Err(refusal) => refuse(known, own, dst, &refusal, steps),
        Ok(route) if is_balanced(&route) => each_choice(known, caller, client, dst, route, steps),
        Ok(route) => follow(known, caller, client, route, false, steps),
    }
}

/// One of several endpoints is chosen anew for each connection.
fn is_balanced(route: &Route) -> bool {
    let onward = matches!(route, Route::Hbone(r) if r.via_waypoint || r.inner.is_some());
    !onward && route.retry_without().is_some()
}

/// What may be chosen is explained alike however the dice fall: one that lets the connection in is
/// told, and if there are others that wouldn't, that isn't known before the choice.
fn each_choice(
    known: &Known<'_>,
    caller: &Caller,
    client: IpAddr,
    dst: SocketAddr,
    first: Route,
    steps: &mut Steps,
) {
    let (mut told, mut tried, mut next) = (Vec::new(), Vec::new(), Some(first));
    while let Some(route) = next.take() {
        let others = route.retry_without().cloned();
        let (Route::Tcp { workload, .. } | Route::Hbone(HboneRoute { workload, .. })) = &route
        else {
            break;
        };
        let endpoint = workload.clone();
        let mut own = Steps::default();
        follow(known, caller, client, route, true, &mut own);
        told.push((endpoint, own));
        if let Some(uid) = others.filter(|_| told.len() < TRIED) {
            tried.push(uid);
            let own = &caller.workload;
            next = resolve::outbound(known.snapshot, known.config, own, client, dst, &tried).ok();
        }
    }
    let count = told.len();
    told.sort_by(|(a, x), (b, y)| {
        (x.refusal().is_some(), &a.uid).cmp(&(y.refusal().is_some(), &b.uid))
    });
    let mut told = told.into_iter();
    let Some((_, shown)) = told.next() else {
        return;
    };
    let refused = shown.refusal().is_some();
    steps.absorb(shown);
    let refusing = told.find_map(|(other, own)| Some((other, own.refusal()?.to_owned())));
    if let Some((other, why)) = refusing.filter(|_| !refused) {
        let text = format!("one of {count} endpoints is chosen, and this one would refuse: {why}");
        steps.unknown("endpoint", &name(&other), text);
    }
}

/// `several`: another endpoint may be chosen the next time.
fn follow(
    known: &Known<'_>,
    caller: &Caller,
    client: IpAddr,
    route: Route,
    several: bool,
    steps: &mut Steps,
) {
    match route {
        Route::Passthrough { dst, .. } => unknown_to_the_mesh(known, caller, dst, &route, steps),
        Route::Tcp { dst, workload, .. } => {
            tell_endpoint(&workload, several, steps);
            let name = name(&workload);
            steps.ok(
                "tunnel",
                &name,
                "it doesn't speak HBONE: plain TCP, without identity",
            );
            let Target::Addr(dst) = dst else {
                let text = format!("{dst} is resolved when the connection is made");
                return steps.unknown("address", &name, text);
            };
            let arrival = Arrival {
                workload,
                client,
                identity: None,
            };
            arrive(known, arrival, dst, None, steps);
        }
        Route::Hbone(route) => hbone(known, caller, client, route, several, steps),
    }
}

/// One that no proxy takes: the application's own connection.
pub fn plain(known: &Known<'_>, caller: &Caller, dst: SocketAddr, steps: &mut Steps) {
    let own = &caller.workload;
    let Some(workload) = known
        .snapshot
        .workload_by_address(&known.config.network, dst.ip())
    else {
        let namespace = Some(&*own.namespace);
        let service = known
            .snapshot
            .service_by_vip(&known.config.network, dst.ip(), namespace);
        return match service {
            Some(service) => {
                let text = "the node's own service proxy chooses the endpoint: ask with an \
                            endpoint's address";
                steps.unknown("service", &service.key, text);
            }
            None => passthrough(dst, steps),
        };
    };
    tell_endpoint(&workload, false, steps);
    let arrival = Arrival {
        workload,
        client: caller.address(dst.ip()),
        identity: None,
    };
    arrive(known, arrival, dst, None, steps);
}

fn hbone(
    known: &Known<'_>,
    caller: &Caller,
    client: IpAddr,
    route: HboneRoute,
    several: bool,
    steps: &mut Steps,
) {
    let own = &caller.workload;
    let peer = name(&route.workload);
    if route.via_waypoint {
        let text = format!("goes to it first, through {peer}");
        steps.ok("waypoint", &waypoint_of(known, &route), text);
    }
    if route.inner.is_some() {
        let network = &route.workload.network;
        let text = format!("another network is reached through it (it is in {network})");
        steps.ok("gateway", &peer, text);
    }
    if !route.via_waypoint && route.inner.is_none() {
        tell_endpoint(&route.workload, several, steps);
    }
    match caller.here {
        true => certificate(known, &own.identity(), steps),
        false => {
            let text = format!("held by the proxy of node {}", own.node);
            steps.unknown("certificate", &own.identity().to_string(), text);
        }
    }
    let expected: Vec<_> = route.expected.iter().map(ToString::to_string).collect();
    let text = format!(
        "mutual TLS to {}, CONNECT {}; it must prove to be {}",
        route.tunnel,
        route.authority,
        expected.join(" or ")
    );
    steps.ok("tunnel", &peer, text);
    if let Some(inner) = &route.inner {
        let inner: Vec<_> = inner.iter().map(ToString::to_string).collect();
        let text = format!("behind the gateway, a second TLS to {}", inner.join(" or "));
        steps.ok("tunnel", &peer, text);
        steps.goes(format!("through the gateway {peer}"));
        let text = "the other network's gateway and nodes choose the endpoint and check policies";
        return steps.unknown("network", &route.workload.network, text);
    }
    if route.via_waypoint {
        steps.goes(format!("through the waypoint {peer}"));
        let text = "it decides by itself where the connection goes and whether it may";
        return steps.unknown("waypoint", &peer, text);
    }
    let Target::Addr(tunnel) = route.tunnel else {
        let text = format!("{} is resolved when the connection is made", route.tunnel);
        return steps.unknown("address", &peer, text);
    };
    let arrival = Arrival {
        workload: route.workload,
        client,
        identity: Some(own.identity()),
    };
    arrive(known, arrival, tunnel, Some(&route.authority), steps);
}

/// Or a service that wants to be left alone.
fn unknown_to_the_mesh(
    known: &Known<'_>,
    caller: &Caller,
    dst: SocketAddr,
    route: &Route,
    steps: &mut Steps,
) {
    let subject = dst.to_string();
    if let Route::Passthrough { known: true, .. } = route {
        let text = "its traffic is left alone: passed through in clear, without identity";
        steps.ok("destination", &subject, text);
        return steps.goes(format!("passed through to {dst} in clear"));
    }
    if known.config.on_demand {
        let text = "not here yet: the control plane is asked when it is dialled";
        return steps.unknown("destination", &subject, text);
    }
    let refusal = || Demands::registry_refusal(dst, &caller.workload.namespace);
    match Demands::of(&caller.settings).registry(route) {
        Enforcement::Off => passthrough(dst, steps),
        Enforcement::DryRun => {
            steps.dry_run("registry_only", &subject, refusal());
            passthrough(dst, steps);
        }
        Enforcement::On => steps.refused("registry_only", &subject, refusal(), ""),
    }
}

fn passthrough(dst: SocketAddr, steps: &mut Steps) {
    let text = "nothing is known of this address: passed through in clear, without identity";
    steps.ok("destination", &dst.to_string(), text);
    steps.goes(format!("passed through to {dst} in clear"));
}

/// Which service the address is of; decides nothing.
fn tell_addressed(known: &Known<'_>, own: &Workload, dst: SocketAddr, steps: &mut Steps) {
    let network = &known.config.network;
    let snapshot = known.snapshot;
    if snapshot.workload_by_address(network, dst.ip()).is_some() {
        return;
    }
    let Some(service) = snapshot.service_by_vip(network, dst.ip(), Some(&own.namespace)) else {
        return;
    };
    let text = match service.port(dst.port()) {
        Some(port) => match port.target {
            0 => format!("port {}, which each endpoint maps by itself", port.service),
            target => format!("port {} leads to {target}", port.service),
        },
        None => format!(
            "doesn't declare port {} (but {})",
            dst.port(),
            ports(&service)
        ),
    };
    steps.ok("service", &service.key, text);
}

fn tell_endpoint(workload: &Workload, several: bool, steps: &mut Steps) {
    let health = if workload.healthy { "" } else { ", UNHEALTHY" };
    let chance = match several {
        true => ", one of several: another connection may get another",
        false => "",
    };
    let node = match &*workload.node {
        "" => "outside the nodes".to_owned(),
        node => format!("on node {node}"),
    };
    steps.ok(
        "endpoint",
        &name(workload),
        format!("{node}{health}{chance}"),
    );
}

fn refuse(
    known: &Known<'_>,
    own: &Workload,
    dst: SocketAddr,
    refusal: &Refusal,
    steps: &mut Steps,
) {
    let (step, subject) = match refusal {
        Refusal::SelfCall(dst) => ("destination", dst.to_string()),
        Refusal::UnknownWaypoint { waypoint, .. } => ("waypoint", waypoint.clone()),
        Refusal::NoHealthyUpstream { service, .. } => ("endpoint", service.to_string()),
        Refusal::UnknownNetworkGateway { gateway, .. } => ("gateway", gateway.clone()),
        Refusal::NoServiceIdentity { service, .. } => ("service", service.to_string()),
        Refusal::NoService { workload, .. }
        | Refusal::NoNetworkGateway { workload, .. }
        | Refusal::NoValidDestination { workload } => ("endpoint", workload.to_string()),
    };
    let mut text = refusal.to_string();
    if let Refusal::NoHealthyUpstream { service, .. } = refusal {
        text = format!("{text} ({})", endpoints(known, own, service, dst.port()));
    }
    steps.refused(step, &subject, text, refusal.remedy());
}

/// What the service has, where nothing of it would do.
fn endpoints(known: &Known<'_>, own: &Workload, key: &str, port: u16) -> String {
    let Some(service) = known.snapshot.service(key) else {
        return "it is gone".to_owned();
    };
    let declared = match &service.record {
        Some(record) if record.port(port).is_none() => {
            format!("it declares {}; ", ports(record))
        }
        _ => String::new(),
    };
    let all = service.endpoints.iter();
    let (mut count, mut unhealthy, mut elsewhere) = (0, 0, 0);
    for endpoint in all {
        count += 1;
        unhealthy += usize::from(!endpoint.healthy);
        elsewhere += usize::from(endpoint.network != own.network);
    }
    format!(
        "{declared}it has {count} endpoints, {unhealthy} of them unhealthy, {elsewhere} in other \
         networks"
    )
}

fn ports(service: &ServiceRecord) -> String {
    let ports = service.ports.iter().take(NAMED);
    let ports: Vec<_> = ports.map(|port| port.service.to_string()).collect();
    match ports.len() {
        0 => "no port".to_owned(),
        _ => format!("ports {}", ports.join(", ")),
    }
}

/// The waypoint by its reference, where the service names it.
fn waypoint_of(known: &Known<'_>, route: &HboneRoute) -> String {
    let service = route.service.as_ref().and_then(|service| {
        let key = format!("{}/{}", service.namespace, service.hostname);
        known.snapshot.service(&key)?.record.clone()
    });
    let waypoint = service.and_then(|service| service.waypoint.clone());
    match waypoint.map(|waypoint| waypoint.destination) {
        Some(destination @ Destination::Hostname { .. }) => destination.to_string(),
        _ => name(&route.workload),
    }
}

pub fn name(workload: &Workload) -> String {
    format!("{}/{}", workload.namespace, workload.name)
}
