//! Who counts as the waypoint of a workload.

use super::through_waypoint;
use crate::identity::Identity;
use crate::state::Snapshot;
use crate::state::fixture::*;
use crate::wire::workload as wds;

fn gateway_of(network: &str, address: &str) -> wds::GatewayAddress {
    let mut gateway = gateway_at(address, 15008);
    if let Some(wds::gateway_address::Destination::Address(address)) = &mut gateway.destination {
        address.network = network.into();
    }
    gateway
}

/// Would `shop/web` take this for traffic of its waypoint?
fn through(snapshot: &Snapshot, account: Option<&str>, source: &str) -> bool {
    let own = uid_of(snapshot, "shop", "web");
    let identity = account.map(|account| Identity::new("cluster.local", "infra", account));
    let source = source.parse().unwrap();
    through_waypoint(snapshot, "net", &own, identity.as_ref(), source)
}

/// The waypoint service `infra/wp` with a pod, and somebody else.
fn infra() -> Push {
    let mut gateway = service("infra", "wp", "10.1.0.9");
    gateway.ports = vec![port(15008, 15008)];
    let wp = member(pod("infra", "wp", "10.0.0.9"), &gateway, &[]);
    let other = pod("infra", "other", "10.0.0.8");
    let push = Push::addresses().service(gateway).workload(wp);
    push.workload(other)
}

#[test]
fn identity_and_address_must_be_those_of_one_workload_behind_it() {
    let mut web = pod("shop", "web", "10.0.0.1");
    web.waypoint = Some(gateway_named("infra", "wp.infra.svc.cluster.local"));
    let snapshot = snapshot_of(infra().workload(web));
    assert!(through(&snapshot, Some("wp-sa"), "10.0.0.9"));
    assert!(!through(&snapshot, None, "10.0.0.9"), "plaintext");
    assert!(!through(&snapshot, Some("other-sa"), "10.0.0.9"));
    assert!(!through(&snapshot, Some("wp-sa"), "10.0.0.8"));
    assert!(!through(&snapshot, Some("other-sa"), "10.0.0.8"));
    assert!(!through(&snapshot, Some("wp-sa"), "10.0.0.77"));
}

#[test]
fn a_waypoint_of_another_network_comes_by_a_gateway_and_is_known_by_its_certificate() {
    let reference = gateway_named("infra", "wp.infra.svc.cluster.local");
    for reference in [reference, gateway_of("far", "10.0.0.9")] {
        let mut web = pod("shop", "web", "10.0.0.1");
        web.waypoint = Some(reference);
        let mut gateway = service("infra", "wp", "10.1.0.9");
        gateway.ports = vec![port(15008, 15008)];
        let mut far = member(pod("infra", "wp", "10.0.0.9"), &gateway, &[]);
        far.network = "far".into();
        // Of the same account, but no waypoint.
        let mut near = pod("infra", "near", "10.0.0.8");
        near.service_account = "wp-sa".into();
        let push = Push::addresses().service(gateway).workload(far);
        let snapshot = snapshot_of(push.workload(near).workload(web));
        for gateway_between in ["10.0.0.50", "fd00::50"] {
            assert!(through(&snapshot, Some("wp-sa"), gateway_between));
            assert!(!through(&snapshot, Some("other-sa"), gateway_between));
            assert!(!through(&snapshot, None, gateway_between));
        }
        assert!(!through(&snapshot, Some("wp-sa"), "10.0.0.8"), "itself");
    }
}

#[test]
fn a_services_waypoints_count_for_its_endpoints_unless_they_have_no_weight() {
    let reference = || Some(gateway_named("infra", "wp.infra.svc.cluster.local"));
    let weighted = |weight| wds::WeightedWaypoint {
        destination: reference(),
        weight,
    };
    let through = |edit: &dyn Fn(&mut wds::Service)| {
        let mut service = service("shop", "web", "10.1.0.1");
        edit(&mut service);
        let web = member(pod("shop", "web", "10.0.0.1"), &service, &[]);
        let snapshot = snapshot_of(infra().service(service).workload(web));
        through(&snapshot, Some("wp-sa"), "10.0.0.9")
    };
    assert!(through(&|s| s.waypoint = reference()));
    assert!(through(&|s| s.weighted_waypoints = vec![weighted(1)]));
    assert!(!through(&|s| s.weighted_waypoints = vec![weighted(0)]));
    assert!(!through(&|_| {}));
}
