//! The decision tree of facts ztunnel 2.2, row by row.

use super::testing::*;
use super::{Authority, Refusal, Route, Target, outbound};
use crate::state::Snapshot;
use crate::state::fixture::*;
use crate::wire::workload as wds;
use crate::wire::workload::load_balancing::Mode;

#[test]
fn an_unknown_address_is_left_alone() {
    let snapshot = snapshot_of(mesh());
    assert_eq!(
        passthrough(route(&snapshot, "1.2.3.4:443")),
        addr("1.2.3.4:443")
    );
}

#[test]
fn the_proxys_own_listeners_are_never_a_destination() {
    let snapshot = snapshot_of(mesh());
    for dst in ["127.0.0.1:15001", "[::1]:15006", "10.0.0.100:15001"] {
        let refusal = route(&snapshot, dst).unwrap_err();
        assert_eq!(refusal, Refusal::SelfCall(addr(dst)));
    }
    passthrough(route(&snapshot, "1.2.3.4:15001"));
}

#[test]
fn an_hbone_workload_is_reached_through_its_tunnel_port() {
    let snapshot = snapshot_of(mesh().workload(pod("shop", "web", "10.0.0.1")));
    let route = hbone(route(&snapshot, "[::ffff:10.0.0.1]:8080"));
    assert_eq!(route.tunnel, Target::Addr(addr("10.0.0.1:15008")));
    assert_eq!(route.authority, Authority::Ip(addr("10.0.0.1:8080")));
    assert_eq!(route.expected.len(), 1);
    assert_eq!(
        route.expected[0].principal(),
        "cluster.local/ns/shop/sa/web-sa"
    );
    assert!(!route.via_waypoint && route.service.is_none());
}

#[test]
fn a_plain_workload_is_reached_by_tcp() {
    let mut web = pod("shop", "web", "10.0.0.1");
    web.tunnel_protocol = 0;
    let snapshot = snapshot_of(mesh().workload(web));
    match route(&snapshot, "10.0.0.1:8080") {
        Ok(Route::Tcp { dst, workload, .. }) => {
            assert_eq!(dst, Target::Addr(addr("10.0.0.1:8080")));
            assert_eq!(&*workload.name, "web");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_service_address_becomes_an_endpoint_and_its_target_port() {
    let mut web = service("shop", "web", "10.1.0.1");
    web.subject_alt_names = vec!["spiffe://td/ns/a/sa/b".into(), "web.example".into()];
    let own = member(pod("shop", "web", "10.0.0.1"), &web, &[port(80, 9000)]);
    let snapshot = snapshot_of(mesh().service(web.clone()).workload(own));
    let found = hbone(route(&snapshot, "10.1.0.1:80"));
    assert_eq!(
        found.authority,
        Authority::Ip(addr("10.0.0.1:9000")),
        "the endpoint's own mapping"
    );
    assert_eq!(&*found.service.unwrap().hostname, web.hostname);
    let expected: Vec<_> = found.expected.iter().map(ToString::to_string).collect();
    assert_eq!(
        expected,
        [
            "spiffe://td/ns/a/sa/b",
            "spiffe://cluster.local/ns/shop/sa/web-sa"
        ]
    );

    let plain = member(pod("shop", "web", "10.0.0.1"), &web, &[]);
    let snapshot = snapshot_of(mesh().service(web).workload(plain));
    let found = hbone(route(&snapshot, "10.1.0.1:80"));
    assert_eq!(
        found.authority,
        Authority::Ip(addr("10.0.0.1:8080")),
        "the service's target port"
    );
}

#[test]
fn a_service_without_endpoint_port_or_weight_is_refused() {
    let web = service("shop", "web", "10.1.0.1");
    let none = snapshot_of(mesh().service(web.clone()));
    let pod = member(pod("shop", "web", "10.0.0.1"), &web, &[]);
    let one = snapshot_of(mesh().service(web.clone()).workload(pod.clone()));
    let mut light = pod;
    light.capacity = Some(0);
    let weightless = snapshot_of(mesh().service(web.clone()).workload(light));
    for (snapshot, dst) in [
        (&none, "10.1.0.1:80"),
        (&one, "10.1.0.1:81"),
        (&weightless, "10.1.0.1:80"),
    ] {
        let refusal = route(snapshot, dst).unwrap_err();
        let expected = Refusal::NoHealthyUpstream {
            dst: addr(dst),
            service: key(&web).as_str().into(),
        };
        assert_eq!(refusal, expected);
    }
}

#[test]
fn a_passthrough_service_is_left_alone_unless_it_has_a_waypoint() {
    let mut web = service("shop", "web", "10.1.0.1");
    web.load_balancing = Some(wds::LoadBalancing {
        mode: Mode::Passthrough as i32,
        ..Default::default()
    });
    let pod = member(pod("shop", "web", "10.0.0.1"), &web, &[]);
    let snapshot = snapshot_of(mesh().service(web.clone()).workload(pod));
    passthrough(route(&snapshot, "10.1.0.1:80"));
    web.waypoint = waypoint_named("wp");
    let push = waypoint(mesh(), "wp", "10.1.0.9", "10.0.0.9").service(web);
    assert!(hbone(route(&snapshot_of(push), "10.1.0.1:80")).via_waypoint);
}

#[test]
fn a_services_waypoint_gets_the_address_that_the_client_dialled() {
    let mut web = service("shop", "web", "10.1.0.1");
    for reference in [
        waypoint_named("wp"),
        Some(gateway_at("10.1.0.9", 15008)),
        Some(gateway_at("10.0.0.9", 15008)),
    ] {
        web.waypoint = reference;
        let push = waypoint(mesh(), "wp", "10.1.0.9", "10.0.0.9").service(web.clone());
        let found = hbone(route(&snapshot_of(push), "10.1.0.1:80"));
        assert_eq!(found.tunnel, Target::Addr(addr("10.0.0.9:15008")));
        assert_eq!(found.authority, Authority::Ip(addr("10.1.0.1:80")));
        assert_eq!(&*found.workload.name, "wp");
        assert_eq!(&*found.service.unwrap().name, "web");
        assert_eq!(found.expected.last().unwrap().service_account(), "wp-sa");
        assert!(found.via_waypoint);
    }
}

#[test]
fn a_waypoint_may_be_a_workload_with_a_hostname() {
    let mut web = service("shop", "web", "10.1.0.1");
    web.waypoint = Some(gateway_named("infra", "gw.example"));
    let mut gateway = pod("infra", "gw", "10.0.0.9");
    gateway.hostname = "gw.example".into();
    let snapshot = snapshot_of(mesh().service(web).workload(gateway));
    let found = hbone(route(&snapshot, "10.1.0.1:80"));
    assert_eq!(found.tunnel, Target::Addr(addr("10.0.0.9:15008")));
}

#[test]
fn a_missing_waypoint_refuses_even_where_endpoints_are_healthy() {
    let mut web = service("shop", "web", "10.1.0.1");
    web.waypoint = waypoint_named("absent");
    let endpoint = member(pod("shop", "web", "10.0.0.1"), &web, &[]);
    let mut direct = pod("shop", "direct", "10.0.0.2");
    direct.waypoint = Some(gateway_at("10.9.9.9", 15008));
    let snapshot = snapshot_of(mesh().service(web).workload(endpoint).workload(direct));
    for dst in ["10.1.0.1:80", "10.0.0.2:80"] {
        let refusal = route(&snapshot, dst).unwrap_err();
        assert!(
            matches!(refusal, Refusal::UnknownWaypoint { .. }),
            "{refusal}"
        );
    }
}

#[test]
fn weighted_waypoints_come_before_the_plain_one_and_zero_weights_are_never_chosen() {
    let weighted = |name, weight| wds::WeightedWaypoint {
        destination: waypoint_named(name),
        weight,
    };
    let mut web = service("shop", "web", "10.1.0.1");
    web.waypoint = waypoint_named("plain");
    let push = |web: wds::Service| {
        let push = waypoint(mesh(), "plain", "10.1.0.7", "10.0.0.7");
        let push = waypoint(push, "a", "10.1.0.8", "10.0.0.8");
        waypoint(push, "b", "10.1.0.9", "10.0.0.9").service(web)
    };
    let names = |snapshot: &Snapshot| {
        let names = (0..200).map(|_| hbone(route(snapshot, "10.1.0.1:80")).workload.name.clone());
        names.collect::<std::collections::BTreeSet<_>>()
    };
    web.weighted_waypoints = vec![weighted("a", 0), weighted("b", 5)];
    assert!(
        names(&snapshot_of(push(web.clone())))
            .iter()
            .eq(&["b".into()])
    );
    web.weighted_waypoints = vec![weighted("a", 50), weighted("b", 50)];
    assert!(
        names(&snapshot_of(push(web.clone())))
            .iter()
            .eq(&["a".into(), "b".into()])
    );
    web.weighted_waypoints = vec![weighted("a", 0)];
    assert!(names(&snapshot_of(push(web))).iter().eq(&["plain".into()]));
}

#[test]
fn a_workloads_waypoint_is_for_traffic_to_the_workload_only() {
    let web = service("shop", "web", "10.1.0.1");
    let mut endpoint = member(pod("shop", "web", "10.0.0.1"), &web, &[]);
    endpoint.waypoint = waypoint_named("wp");
    let push = mesh().service(web).workload(endpoint);
    let snapshot = snapshot_of(waypoint(push, "wp", "10.1.0.9", "10.0.0.9"));
    assert!(hbone(route(&snapshot, "10.0.0.1:80")).via_waypoint);
    assert!(!hbone(route(&snapshot, "10.1.0.1:80")).via_waypoint);
}

#[test]
fn what_comes_from_the_waypoint_goes_on_to_the_workload() {
    let mut web = pod("shop", "web", "10.0.0.1");
    web.waypoint = waypoint_named("wp");
    let snapshot = snapshot_of(waypoint(mesh().workload(web), "wp", "10.1.0.9", "10.0.0.9"));
    let wp = uid_of(&snapshot, "infra", "wp");
    let from = |client: &str| {
        let client = client.parse().unwrap();
        hbone(outbound(
            &snapshot,
            &config(),
            &wp,
            client,
            addr("10.0.0.1:80"),
            &[],
        ))
    };
    assert!(!from("10.0.0.9").via_waypoint);
    assert!(
        from("10.0.0.77").via_waypoint,
        "another address is somebody else"
    );
}

#[test]
fn the_family_dialled_is_kept_where_the_service_allows_it() {
    let mut web = service("shop", "web", "10.1.0.1");
    web.addresses.push(vip_of("2001:db8::1"));
    let mut dual = member(pod("shop", "web", "10.0.0.1"), &web, &[]);
    dual.addresses.push(ip("2001:db8::99"));
    let target = |families: wds::IpFamilies, dst: &str| {
        let mut web = web.clone();
        web.ip_families = families as i32;
        let snapshot = snapshot_of(mesh().service(web).workload(dual.clone()));
        hbone(route(&snapshot, dst)).authority.to_string()
    };
    use wds::IpFamilies::{Automatic, Dual, Ipv4Only, Ipv6Only};
    assert_eq!(target(Automatic, "10.1.0.1:80"), "10.0.0.1:8080");
    assert_eq!(target(Dual, "[2001:db8::1]:80"), "[2001:db8::99]:8080");
    assert_eq!(target(Ipv4Only, "[2001:db8::1]:80"), "10.0.0.1:8080");
    assert_eq!(target(Ipv6Only, "10.1.0.1:80"), "[2001:db8::99]:8080");
}

/// facts ztunnel 2.3
#[test]
fn of_services_that_share_a_vip_the_clients_namespace_wins_then_the_last_canonical() {
    let named = |namespace: &str, canonical| {
        let mut s = service(namespace, "web", "10.1.0.1");
        s.canonical = canonical;
        s
    };
    let owner = |services: &[wds::Service]| {
        let push = services.iter().cloned().fold(mesh(), Push::service);
        let vip = "10.1.0.1".parse().unwrap();
        let found = snapshot_of(push).service_by_vip("net", vip, Some("shop"));
        found.map(|s| s.name.namespace.to_string())
    };
    let (a, b) = (named("a", false), named("b", false));
    assert_eq!(owner(&[a.clone(), b.clone()]).unwrap(), "a");
    let (x, y) = (named("x", true), named("y", true));
    assert_eq!(owner(&[a.clone(), x.clone(), y.clone(), b]).unwrap(), "y");
    assert_eq!(owner(&[x, named("shop", false), y]).unwrap(), "shop");
    let mut hidden = a;
    hidden.visibility = wds::service::Visibility::Namespace as i32;
    assert_eq!(owner(&[hidden]), None);
    let mut own = named("shop", false);
    own.visibility = wds::service::Visibility::Namespace as i32;
    assert_eq!(owner(&[own]).unwrap(), "shop");
}

#[test]
fn exact_vips_come_before_ranges_and_longer_ranges_before_shorter() {
    let range = |name: &str, address: &str, length| {
        let mut s = service("x", name, address);
        s.addresses[0].length = Some(length);
        s
    };
    let snapshot = snapshot_of(
        mesh()
            .service(range("wide", "10.1.0.0", 16))
            .service(range("narrow", "10.1.2.0", 24))
            .service(service("x", "exact", "10.1.2.3")),
    );
    let name = |ip: &str| {
        let found = snapshot.service_by_vip("net", ip.parse().unwrap(), Some("shop"));
        found.map(|s| s.name.name.to_string())
    };
    assert_eq!(name("10.1.2.3").as_deref(), Some("exact"));
    assert_eq!(name("10.1.2.4").as_deref(), Some("narrow"));
    assert_eq!(name("10.1.9.9").as_deref(), Some("wide"));
    assert_eq!(name("10.2.0.1"), None);
}

#[test]
fn an_address_of_a_workload_and_a_service_is_balanced_but_has_no_service_waypoint() {
    let mut web = service("shop", "web", "10.0.0.1");
    web.waypoint = waypoint_named("wp");
    let endpoint = member(pod("shop", "other", "10.0.0.2"), &web, &[]);
    let push = mesh().service(web).workload(endpoint);
    let snapshot = snapshot_of(push.workload(pod("shop", "web", "10.0.0.1")));
    let found = hbone(route(&snapshot, "10.0.0.1:80"));
    assert!(!found.via_waypoint);
    assert_eq!(&*found.workload.name, "other");
}

/// facts ztunnel 2.6: target port 0 means that each endpoint says where the name leads.
#[test]
fn a_named_port_leads_where_the_endpoint_says() {
    let mut web = service("shop", "web", "10.1.0.1");
    web.ports = vec![port(80, 0)];
    let named = member(pod("shop", "named", "10.0.0.1"), &web, &[port(80, 9090)]);
    let without = member(pod("shop", "without", "10.0.0.2"), &web, &[]);
    let snapshot = snapshot_of(
        mesh()
            .service(web.clone())
            .workload(named)
            .workload(without.clone()),
    );
    for _ in 0..20 {
        let found = hbone(route(&snapshot, "10.1.0.1:80"));
        assert_eq!(found.authority, Authority::Ip(addr("10.0.0.1:9090")));
    }
    let snapshot = snapshot_of(mesh().service(web).workload(without));
    let refusal = route(&snapshot, "10.1.0.1:80").unwrap_err();
    assert!(matches!(refusal, Refusal::NoHealthyUpstream { .. }));
}

#[test]
fn a_host_network_pod_is_reached_as_an_endpoint_and_its_nodes_address_is_left_alone() {
    let web = service("shop", "web", "10.1.0.1");
    let mut node = member(pod("shop", "web", "10.9.0.1"), &web, &[]);
    node.network_mode = wds::NetworkMode::HostNetwork as i32;
    node.tunnel_protocol = 0;
    let snapshot = snapshot_of(mesh().service(web).workload(node));
    passthrough(route(&snapshot, "10.9.0.1:80"));
    match route(&snapshot, "10.1.0.1:80") {
        Ok(Route::Tcp { dst, service, .. }) => {
            assert_eq!(dst, Target::Addr(addr("10.9.0.1:8080")));
            assert_eq!(&*service.unwrap().name, "web");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_dual_stack_workload_is_reached_at_the_address_that_was_dialled() {
    let mut web = pod("shop", "web", "10.0.0.1");
    web.addresses.push(ip("2001:db8::1"));
    let snapshot = snapshot_of(mesh().workload(web));
    for dst in ["10.0.0.1:80", "[2001:db8::1]:80"] {
        let found = hbone(route(&snapshot, dst));
        assert_eq!(found.authority.to_string(), dst);
        assert_eq!(found.tunnel.to_string(), dst.replace(":80", ":15008"));
    }
}

#[test]
fn a_service_hidden_from_the_client_is_an_unknown_address() {
    let mut web = service("other", "web", "10.1.0.1");
    web.visibility = wds::service::Visibility::Namespace as i32;
    let endpoint = member(pod("other", "web", "10.0.0.1"), &web, &[]);
    let snapshot = snapshot_of(mesh().service(web).workload(endpoint));
    match route(&snapshot, "10.1.0.1:80") {
        Ok(Route::Passthrough { known, .. }) => assert!(!known),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_passthrough_service_is_known_whatever_else_is_left_alone_is_not() {
    let mut web = service("shop", "web", "10.1.0.1");
    web.load_balancing = Some(wds::LoadBalancing {
        mode: Mode::Passthrough as i32,
        ..Default::default()
    });
    let snapshot = snapshot_of(mesh().service(web));
    let known = |dst: &str| match route(&snapshot, dst) {
        Ok(Route::Passthrough { known, .. }) => known,
        other => panic!("{other:?}"),
    };
    assert!(known("10.1.0.1:80"));
    assert!(!known("10.1.0.2:80"));
}

/// facts ztunnel 2.4
#[test]
fn weighted_waypoints_get_their_shares() {
    let weighted = |name, weight| wds::WeightedWaypoint {
        destination: waypoint_named(name),
        weight,
    };
    let mut web = service("shop", "web", "10.1.0.1");
    web.weighted_waypoints = vec![weighted("a", 3), weighted("b", 1)];
    let push = waypoint(mesh(), "a", "10.1.0.8", "10.0.0.8");
    let snapshot = snapshot_of(waypoint(push, "b", "10.1.0.9", "10.0.0.9").service(web));
    let of_a = (0..4000)
        .filter(|_| &*hbone(route(&snapshot, "10.1.0.1:80")).workload.name == "a")
        .count();
    assert!((2850..3150).contains(&of_a), "{of_a} of 4000 for 3 of 4");
}

/// One service name in several namespaces, found by hostname: inbound and DNS ask so.
#[test]
fn a_hostname_of_several_namespaces_is_found_as_the_client_sees_it() {
    let at = |namespace: &str, vip: &str| {
        let mut it = service(namespace, "web", vip);
        it.hostname = "web.example".into();
        it
    };
    let (mut a, mut b) = (at("a", "10.1.0.1"), at("b", "10.1.0.2"));
    let find = |services: [&wds::Service; 2], client: Option<&str>| {
        let push = services.into_iter().cloned().fold(mesh(), Push::service);
        let found = snapshot_of(push).service_by_hostname("Web.Example", client);
        found.map(|s| s.name.namespace.to_string())
    };
    assert_eq!(find([&a, &b], Some("b")).unwrap(), "b");
    assert_eq!(find([&a, &b], Some("shop")).unwrap(), "a", "the first");
    b.canonical = true;
    assert_eq!(find([&a, &b], Some("shop")).unwrap(), "b");
    assert_eq!(find([&a, &b], None).unwrap(), "b");
    b.visibility = wds::service::Visibility::Namespace as i32;
    assert_eq!(find([&a, &b], Some("shop")).unwrap(), "a");
    a.visibility = b.visibility;
    assert_eq!(find([&a, &b], Some("shop")), None);
}
