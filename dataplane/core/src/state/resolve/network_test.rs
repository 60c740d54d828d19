//! Routes that end elsewhere: other networks, workloads that have only a name, second choices.

use std::sync::Arc;

use super::testing::*;
use super::{Authority, IpFamily, Refusal, Route, Target, outbound};
use crate::state::Snapshot;
use crate::state::fixture::*;
use crate::wire::workload as wds;
use crate::wire::workload::gateway_address::Destination;
use crate::wire::workload::load_balancing::{Mode, Scope};

/// `shop/web` in the network `far`, behind `gateway`; the service has one SPIFFE name.
fn far_web(gateway: Option<wds::GatewayAddress>) -> (wds::Service, wds::Workload) {
    let mut web = service("shop", "web", "10.1.0.1");
    web.subject_alt_names = vec!["spiffe://td/ns/shop/sa/web".into()];
    let mut far = member(pod("shop", "web", "10.0.0.1"), &web, &[]);
    far.network = "far".into();
    far.network_gateway = gateway;
    (web, far)
}

fn ids(expected: &[crate::identity::Identity]) -> Vec<String> {
    expected.iter().map(ToString::to_string).collect()
}

#[test]
fn other_networks_are_reached_through_the_gateway_that_the_endpoint_names() {
    let mut eastwest = pod("infra", "eastwest", "192.0.2.1");
    eastwest.network = "far".into();
    let mut by_address = gateway_at("192.0.2.1", 15009);
    if let Some(Destination::Address(address)) = &mut by_address.destination {
        address.network = "far".into();
    }
    let by_service = gateway_named("infra", "ew.infra.svc.cluster.local");
    let mut gateways = service("infra", "ew", "10.1.0.77");
    gateways.ports = vec![port(15008, 15008)];
    gateways.subject_alt_names = vec!["spiffe://td/ns/infra/sa/ew".into()];
    let eastwest = member(eastwest, &gateways, &[]);
    for (reference, tunnel, outer) in [
        (
            by_address,
            "192.0.2.1:15009",
            &["spiffe://cluster.local/ns/infra/sa/eastwest-sa"][..],
        ),
        (
            by_service,
            "192.0.2.1:15008",
            &[
                "spiffe://td/ns/infra/sa/ew",
                "spiffe://cluster.local/ns/infra/sa/eastwest-sa",
            ],
        ),
    ] {
        let (web, mut far) = far_web(Some(reference));
        // Its address would mean something else here.
        far.addresses.clear();
        let push = mesh().service(web).workload(far);
        let push = push.service(gateways.clone()).workload(eastwest.clone());
        let found = hbone(route(&snapshot_of(push), "10.1.0.1:80"));
        assert_eq!(found.tunnel, Target::Addr(addr(tunnel)));
        let authority = Authority::Host("web.shop.svc.cluster.local".into(), 80);
        assert_eq!(found.authority, authority, "the port that was dialled");
        assert_eq!(ids(&found.expected), outer);
        assert_eq!(
            ids(&found.inner.unwrap()),
            ["spiffe://td/ns/shop/sa/web"],
            "the service's names alone"
        );
        assert_eq!(&*found.workload.name, "eastwest");
        assert!(!found.via_waypoint);
    }
}

#[test]
fn a_waypoint_of_another_network_is_reached_through_its_gateway() {
    let mut web = service("shop", "web", "10.1.0.1");
    web.waypoint = waypoint_named("wp");
    let mut gateway = service("infra", "wp", "10.1.0.9");
    gateway.ports = vec![port(15008, 15008)];
    gateway.subject_alt_names = vec!["spiffe://td/ns/infra/sa/wp".into()];
    let mut far = member(pod("infra", "wp", "10.0.0.9"), &gateway, &[]);
    far.network = "far".into();
    far.network_gateway = Some(gateway_at("192.0.2.1", 15008));
    let eastwest = pod("infra", "eastwest", "192.0.2.1");
    let push = mesh().service(web).service(gateway).workload(far);
    let found = hbone(route(&snapshot_of(push.workload(eastwest)), "10.1.0.1:80"));
    assert!(found.via_waypoint);
    assert_eq!(found.authority.to_string(), "web.shop.svc.cluster.local:80");
    assert_eq!(ids(&found.inner.unwrap()), ["spiffe://td/ns/infra/sa/wp"]);
    assert_eq!(&*found.service.unwrap().name, "web");
}

#[test]
fn other_networks_are_refused_with_the_reason() {
    let refusal = |(web, far): (wds::Service, wds::Workload), dst: &str| {
        route(&snapshot_of(mesh().service(web).workload(far)), dst).unwrap_err()
    };
    let none = refusal(far_web(None), "10.1.0.1:80");
    assert!(matches!(none, Refusal::NoNetworkGateway { .. }), "{none}");
    let unknown = far_web(Some(gateway_at("192.0.2.1", 15008)));
    let unknown = refusal(unknown, "10.1.0.1:80");
    assert!(unknown.to_string().contains("net/192.0.2.1"), "{unknown}");
    let (mut web, far) = far_web(Some(gateway_at("192.0.2.1", 15008)));
    web.subject_alt_names = vec!["web.example".into()];
    let nameless = refusal((web, far), "10.1.0.1:80");
    assert!(
        matches!(nameless, Refusal::NoServiceIdentity { .. }),
        "{nameless}"
    );

    // The address is another network's: here it means nothing.
    let (web, far) = far_web(None);
    let snapshot = snapshot_of(mesh().service(web).workload(far));
    passthrough(route(&snapshot, "10.0.0.1:80"));
}

#[test]
fn an_own_networks_gateway_is_never_used() {
    let (web, mut near) = far_web(Some(gateway_at("192.0.2.1", 15008)));
    near.network = "net".into();
    let found = hbone(route(
        &snapshot_of(mesh().service(web).workload(near)),
        "10.1.0.1:80",
    ));
    assert!(found.inner.is_none());
    assert_eq!(found.tunnel, Target::Addr(addr("10.0.0.1:15008")));
}

#[test]
fn a_workload_without_address_is_named_by_its_hostname_until_it_is_resolved() {
    let web = service("shop", "web", "10.1.0.1");
    let mut named = member(pod("shop", "web", "10.0.0.1"), &web, &[]);
    named.addresses.clear();
    named.hostname = "db.example".into();
    let target = |port| Target::Host {
        hostname: "db.example".into(),
        port,
        prefer: IpFamily::V4,
    };
    let snapshot = snapshot_of(mesh().service(web.clone()).workload(named.clone()));
    let found = hbone(route(&snapshot, "10.1.0.1:80"));
    assert_eq!(found.tunnel, target(15008));
    let found = found.at("192.0.2.9".parse().unwrap());
    assert_eq!(found.tunnel, Target::Addr(addr("192.0.2.9:15008")));
    assert_eq!(found.authority, Authority::Ip(addr("192.0.2.9:8080")));

    named.tunnel_protocol = 0;
    let snapshot = snapshot_of(mesh().service(web).workload(named));
    match route(&snapshot, "10.1.0.1:80") {
        Ok(Route::Tcp { dst, .. }) => assert_eq!(dst, target(8080)),
        other => panic!("{other:?}"),
    }
}

#[test]
fn another_choice_leaves_out_what_was_tried() {
    let web = service("shop", "web", "10.1.0.1");
    let endpoint = |name: &str, address: &str| member(pod("shop", name, address), &web, &[]);
    let push = mesh().service(web.clone());
    let push = push.workload(endpoint("a", "10.0.0.1"));
    let snapshot = snapshot_of(push.workload(endpoint("b", "10.0.0.2")));
    let client = uid_of(&snapshot, "shop", "client");
    let from = client.addresses[0];
    let again = |exclude: &[std::sync::Arc<str>]| {
        let dst = addr("10.1.0.1:80");
        outbound(&snapshot, &config(), &client, from, dst, exclude)
    };
    let first = again(&[]).unwrap();
    let tried = first.retry_without().expect("two endpoints").clone();
    let second = again(std::slice::from_ref(&tried)).unwrap();
    assert!(second.retry_without().is_none(), "nobody else is left");
    let second = hbone(Ok(second)).workload.uid.clone();
    assert_ne!(second, tried);
    let refusal = again(&[tried, second]).unwrap_err();
    assert!(matches!(refusal, Refusal::NoHealthyUpstream { .. }));
    let direct = route(&snapshot, "10.0.0.1:80").unwrap();
    assert!(direct.retry_without().is_none(), "an address has no choice");
}

/// The next choice for 10.1.0.1:80 after these were tried.
fn without(snapshot: &Snapshot, tried: &[Arc<str>]) -> Result<Route, Refusal> {
    let client = uid_of(snapshot, "shop", "client");
    let from = client.addresses[0];
    outbound(
        snapshot,
        &config(),
        &client,
        from,
        addr("10.1.0.1:80"),
        tried,
    )
}

#[test]
fn a_gateway_may_be_a_workload_with_a_hostname() {
    let mut eastwest = pod("infra", "eastwest", "192.0.2.1");
    eastwest.hostname = "ew.example".into();
    let (web, far) = far_web(Some(gateway_named("infra", "EW.example")));
    let push = mesh().service(web).workload(far).workload(eastwest);
    let found = hbone(route(&snapshot_of(push), "10.1.0.1:80"));
    assert_eq!(found.tunnel, Target::Addr(addr("192.0.2.1:15008")));
    assert!(found.inner.is_some());
}

#[test]
fn other_networks_serve_when_the_own_has_no_healthy_endpoint() {
    let (mut web, far) = far_web(Some(gateway_at("192.0.2.1", 15008)));
    web.load_balancing = Some(wds::LoadBalancing {
        routing_preference: vec![Scope::Network as i32],
        mode: Mode::Failover as i32,
        ..Default::default()
    });
    let mut near = member(pod("shop", "near", "10.0.0.2"), &web, &[]);
    let push = |near: &wds::Workload| {
        let push = mesh().service(web.clone()).workload(far.clone());
        let push = push.workload(pod("infra", "eastwest", "192.0.2.1"));
        snapshot_of(push.workload(near.clone()))
    };
    let snapshot = push(&near);
    for _ in 0..20 {
        let found = hbone(route(&snapshot, "10.1.0.1:80"));
        assert_eq!(&*found.workload.name, "near");
    }
    let first = route(&snapshot, "10.1.0.1:80").unwrap();
    let tried = first.retry_without().expect("the far one is left").clone();
    let second = hbone(without(&snapshot, &[tried]));
    assert!(second.inner.is_some(), "a lower rank is tried, too");

    near.status = wds::WorkloadStatus::Unhealthy as i32;
    let found = hbone(route(&push(&near), "10.1.0.1:80"));
    assert!(found.inner.is_some());
}

#[test]
fn after_a_gateway_failed_what_it_leads_to_is_passed_over() {
    let (web, far) = far_web(Some(gateway_at("192.0.2.1", 15008)));
    let mut far_too = far.clone();
    (far_too.uid, far_too.name) = ("c//Pod/shop/web-2".into(), "web-2".into());
    let near = member(pod("shop", "near", "10.0.0.2"), &web, &[]);
    let eastwest = pod("infra", "eastwest", "192.0.2.1");
    let push = mesh().service(web).workload(far).workload(far_too);
    let snapshot = snapshot_of(push.workload(near).workload(eastwest));
    let gateway: Arc<str> = "c//Pod/infra/eastwest".into();
    for _ in 0..50 {
        let found = hbone(without(&snapshot, std::slice::from_ref(&gateway)));
        assert_eq!(&*found.workload.name, "near");
    }
}

/// facts ztunnel 2.2: nothing that the source is behind decides where it goes.
#[test]
fn the_sources_own_waypoint_is_not_asked() {
    let mut client = pod("shop", "client", "10.0.0.100");
    client.waypoint = waypoint_named("wp");
    let push = Push::addresses().workload(client);
    let push = push.workload(pod("shop", "web", "10.0.0.1"));
    let snapshot = snapshot_of(waypoint(push, "wp", "10.1.0.9", "10.0.0.9"));
    assert!(!hbone(route(&snapshot, "10.0.0.1:80")).via_waypoint);
}
