//! What a push does to the state, as readers and the agent see it.

use prost::Message;

use super::fixture::*;
use super::{ADDRESS_TYPE, AUTHORIZATION_TYPE};
use crate::wire::security as pb;
use crate::wire::workload as wds;

#[test]
fn a_pushed_workload_is_found_by_uid_address_and_pod() {
    let snapshot = snapshot_of(Push::addresses().workload(pod("shop", "web", "10.0.0.1")));
    let web = uid_of(&snapshot, "shop", "web");
    assert_eq!(
        web.identity().to_string(),
        "spiffe://cluster.local/ns/shop/sa/web-sa"
    );
    let by_address = snapshot.workload_by_address("net", "10.0.0.1".parse().unwrap());
    assert_eq!(by_address.unwrap().uid, web.uid);
    assert!(
        snapshot
            .workload_by_address("other", "10.0.0.1".parse().unwrap())
            .is_none()
    );
    let local = |account| snapshot.local_workload("shop", "web", account);
    assert_eq!(local("web-sa").unwrap().uid, web.uid);
    assert!(local("other").is_none());
}

#[test]
fn only_this_nodes_workloads_are_local_also_after_a_move() {
    let store = store();
    Push::addresses()
        .workload(pod("shop", "web", "10.0.0.1"))
        .accepted_by(&store);
    let mut moved = pod("shop", "web", "10.0.0.1");
    moved.node = "node-2".into();
    Push::addresses().workload(moved).accepted_by(&store);
    let snapshot = store.snapshot();
    assert!(snapshot.local_workload("shop", "web", "web-sa").is_none());
    assert_eq!(snapshot.local_workloads().count(), 0);
}

#[test]
fn a_changed_address_leaves_no_trace_of_the_old_one() {
    let store = store();
    Push::addresses()
        .workload(pod("shop", "web", "10.0.0.1"))
        .accepted_by(&store);
    Push::addresses()
        .workload(pod("shop", "web", "10.0.0.2"))
        .accepted_by(&store);
    let find = |ip: &str| {
        store
            .snapshot()
            .workload_by_address("net", ip.parse().unwrap())
    };
    assert!(find("10.0.0.1").is_none());
    assert!(find("10.0.0.2").is_some());
}

#[test]
fn host_network_workloads_are_not_found_by_address() {
    let mut host = pod("kube-system", "proxy", "192.168.0.1");
    host.network_mode = wds::NetworkMode::HostNetwork as i32;
    let snapshot = snapshot_of(Push::addresses().workload(host));
    assert!(
        snapshot
            .workload_by_address("net", "192.168.0.1".parse().unwrap())
            .is_none()
    );
    uid_of(&snapshot, "kube-system", "proxy");
}

/// facts ztunnel 2.7
#[test]
fn a_claimed_address_belongs_to_the_hbone_pod_then_pod_then_hbone_then_the_last() {
    let claim = |uid: &str, hbone: bool| {
        let mut w = pod("shop", uid, "10.0.0.1");
        w.uid = uid.into();
        w.tunnel_protocol = i32::from(hbone);
        w
    };
    let ranked = [
        claim("c//Pod/shop/hbone", true),
        claim("c//Pod/shop/plain", false),
        claim("c/WorkloadEntry/hbone", true),
        claim("c/WorkloadEntry/plain", false),
    ];
    let owner = |claims: &[wds::Workload]| {
        let push = claims
            .iter()
            .cloned()
            .fold(Push::addresses(), Push::workload);
        let snapshot = snapshot_of(push);
        let owner = snapshot.workload_by_address("net", "10.0.0.1".parse().unwrap());
        owner.unwrap().uid.to_string()
    };
    for winner in 0..ranked.len() {
        let mut rest = ranked[winner..].to_vec();
        assert_eq!(owner(&rest), ranked[winner].uid);
        rest.reverse();
        assert_eq!(owner(&rest), ranked[winner].uid);
    }
    let twins = [claim("c//Pod/shop/a", true), claim("c//Pod/shop/b", true)];
    assert_eq!(owner(&twins), "c//Pod/shop/b");
}

#[test]
fn removal_tries_the_uid_first_and_then_the_service() {
    let store = store();
    let web = service("shop", "web", "10.1.0.1");
    let name = key(&web);
    let mut odd = pod("shop", "odd", "10.0.0.9");
    odd.uid = name.clone();
    Push::addresses()
        .service(web)
        .workload(odd)
        .accepted_by(&store);

    assert_eq!(Push::addresses().removed(&name).to(&store).removed, 1);
    assert!(store.snapshot().workload_by_uid(&name).is_none());
    assert!(store.snapshot().service(&name).unwrap().record.is_some());
    assert_eq!(Push::addresses().removed(&name).to(&store).removed, 1);
    assert!(store.snapshot().service(&name).is_none());
    let nothing = Push::addresses()
        .removed(&name)
        .removed("x")
        .removed("a/b/c");
    assert_eq!(nothing.to(&store).removed, 0);
}

#[test]
fn a_service_is_removed_by_whatever_name_it_was_taken_under() {
    let store = store();
    let mut web = service("shop", "web", "10.1.0.1");
    web.hostname = "web/example".into();
    let name = key(&web);
    Push::addresses().service(web).accepted_by(&store);
    assert_eq!(Push::addresses().removed(&name).to(&store).removed, 1);
    assert!(store.snapshot().service(&name).is_none());
}

#[test]
fn removals_come_before_additions_of_one_push() {
    let store = store();
    let web = pod("shop", "web", "10.0.0.1");
    Push::addresses().workload(web.clone()).accepted_by(&store);
    let applied = Push::addresses().removed(&web.uid).workload(web).to(&store);
    assert_eq!((applied.accepted, applied.removed), (1, 1));
    uid_of(&store.snapshot(), "shop", "web");
}

#[test]
fn endpoints_wait_for_their_service_and_survive_its_removal() {
    let store = store();
    let web = service("shop", "web", "10.1.0.1");
    let name = key(&web);
    let endpoints = || {
        let snapshot = store.snapshot();
        snapshot.service(&name).map_or(0, |s| s.endpoints.len())
    };
    let pod = member(pod("shop", "web", "10.0.0.1"), &web, &[]);
    Push::addresses().workload(pod.clone()).accepted_by(&store);
    Push::addresses().service(web.clone()).accepted_by(&store);
    assert_eq!(endpoints(), 1);
    Push::addresses().removed(&name).accepted_by(&store);
    let vip = "10.1.0.1".parse().unwrap();
    assert!(store.snapshot().service_by_vip("net", vip, None).is_none());
    Push::addresses().service(web).accepted_by(&store);
    assert_eq!(endpoints(), 1);
    assert!(store.snapshot().service_by_vip("net", vip, None).is_some());
    Push::addresses().removed(&pod.uid).accepted_by(&store);
    assert_eq!(endpoints(), 0);
}

#[test]
fn a_workload_that_leaves_a_service_is_no_endpoint_any_more() {
    let store = store();
    let web = service("shop", "web", "10.1.0.1");
    let name = key(&web);
    let plain = pod("shop", "web", "10.0.0.1");
    Push::addresses()
        .service(web.clone())
        .workload(member(plain.clone(), &web, &[]))
        .accepted_by(&store);
    Push::addresses().workload(plain).accepted_by(&store);
    assert!(
        store
            .snapshot()
            .service(&name)
            .unwrap()
            .endpoints
            .is_empty()
    );
}

#[test]
fn what_is_sent_again_unchanged_is_not_held_twice() {
    let store = store();
    let web = service("shop", "web", "10.1.0.1");
    let push = || {
        let pod = member(pod("shop", "web", "10.0.0.1"), &web, &[]);
        Push::addresses().service(web.clone()).workload(pod)
    };
    push().accepted_by(&store);
    let before = uid_of(&store.snapshot(), "shop", "web");
    assert_eq!(push().to(&store).accepted, 2);
    let after = uid_of(&store.snapshot(), "shop", "web");
    assert!(std::sync::Arc::ptr_eq(&before, &after));
}

#[test]
fn a_reader_keeps_the_view_it_took() {
    let store = store();
    Push::addresses()
        .workload(pod("shop", "web", "10.0.0.1"))
        .accepted_by(&store);
    let before = store.snapshot();
    Push::addresses()
        .removed("c//Pod/shop/web")
        .workload(pod("shop", "api", "10.0.0.1"))
        .accepted_by(&store);
    uid_of(&before, "shop", "web");
    let owner = before.workload_by_address("net", "10.0.0.1".parse().unwrap());
    assert_eq!(&*owner.unwrap().name, "web");
}

#[test]
fn subscribers_hear_of_changes_and_of_nothing_else() {
    let store = store();
    let mut changes = store.subscribe();
    Push::addresses().to(&store);
    Push::addresses().removed("nobody").to(&store);
    assert!(!changes.has_changed().unwrap());
    Push::addresses()
        .workload(pod("shop", "web", "10.0.0.1"))
        .to(&store);
    assert!(changes.has_changed().unwrap());
    changes.mark_unchanged();
    Push::policies()
        .bytes("shop/bad", "", vec![0xff])
        .to(&store);
    assert!(changes.has_changed().unwrap(), "a rejected policy denies");
}

#[test]
fn the_first_response_of_each_type_is_marked_also_when_it_is_empty() {
    let store = store();
    let applied = Push::addresses().to(&store);
    assert!(applied.first);
    assert_eq!(applied.nonce, "nonce");
    assert_eq!(applied.type_url, ADDRESS_TYPE);
    assert!(!Push::addresses().to(&store).first);
    assert!(Push::policies().to(&store).first);
    assert!(store.types().iter().all(|t| t.processed));
}

#[test]
fn an_unknown_type_is_rejected_as_a_whole_and_is_no_first_response() {
    let store = store();
    let applied = Push::of("type.googleapis.com/envoy.Cluster")
        .bytes("x", "1", vec![])
        .to(&store);
    assert_eq!(applied.accepted, 0);
    assert!(!applied.first);
    assert!(applied.rejected[0].1.contains("envoy.Cluster"));
    assert!(store.types().iter().all(|t| !t.processed));
}

#[test]
fn garbage_is_an_error_and_changes_nothing() {
    let store = store();
    assert!(store.apply(vec![0xff, 0xff, 0xff].into()).is_err());
    assert!(store.types().iter().all(|t| !t.processed));
}

#[test]
fn a_rejected_resource_keeps_its_last_good_version_and_says_why() {
    let store = store();
    let good = pod("shop", "web", "10.0.0.1");
    let address = |w| wds::Address {
        r#type: Some(wds::address::Type::Workload(w)),
    };
    Push::addresses()
        .raw(&good.uid, "a1", &address(good.clone()))
        .accepted_by(&store);
    let mut bad = good.clone();
    bad.addresses = vec![vec![1, 2, 3].into()];
    let applied = Push::addresses()
        .raw(&good.uid, "a2", &address(bad))
        .workload(pod("shop", "api", "10.0.0.2"))
        .to(&store);
    assert_eq!(applied.accepted, 1);
    assert_eq!(applied.rejected[0].0, good.uid);
    assert!(applied.rejected[0].1.contains("4 or 16 bytes"));

    let types = store.types();
    let state = types.iter().find(|t| t.type_url == ADDRESS_TYPE).unwrap();
    let version = |name: &str| {
        let found = state.versions.iter().find(|(n, _)| n == name);
        found.map(|(_, version)| version.clone())
    };
    assert_eq!(version(&good.uid).as_deref(), Some("a1"));
    assert_eq!(state.rejected.len(), 1);
    assert_eq!(
        uid_of(&store.snapshot(), "shop", "web").addresses[0].to_string(),
        "10.0.0.1"
    );

    Push::addresses().workload(good).accepted_by(&store);
    assert!(store.types().iter().all(|t| t.rejected.is_empty()));
}

/// facts ztunnel 6.1, "Rejected"
#[test]
fn every_field_with_an_unknown_or_impossible_value_rejects_its_workload() {
    type Change = fn(&mut wds::Workload);
    let cases: &[(&str, Change)] = &[
        ("addresses", |w| w.addresses = vec![vec![0; 5].into()]),
        ("services", |w| {
            w.services.insert("no-slash".into(), Default::default());
        }),
        ("services", |w| {
            let ports = vec![port(80, 70_000)];
            w.services.insert("a/b".into(), wds::PortList { ports });
        }),
        ("waypoint", |w| w.waypoint = Some(Default::default())),
        ("network_gateway", |w| {
            w.network_gateway = Some(Default::default())
        }),
        ("LEGACY_ISTIO_MTLS", |w| w.tunnel_protocol = 2),
        ("tunnel_protocol", |w| w.tunnel_protocol = 9),
        ("network_mode", |w| w.network_mode = 9),
        ("status", |w| w.status = 9),
        ("application_tunnel", |w| {
            w.application_tunnel = Some(wds::ApplicationTunnel {
                protocol: 9,
                port: 1,
            });
        }),
        ("uid", |w| w.uid.clear()),
    ];
    for (field, change) in cases {
        let mut w = pod("shop", "web", "10.0.0.1");
        change(&mut w);
        let applied = Push::addresses().workload(w).to(&store());
        assert_eq!(applied.accepted, 0, "{field}");
        let reason = &applied.rejected[0].1;
        assert!(reason.contains(field), "{field}: {reason}");
    }
    let mut unknown_type = pod("shop", "web", "10.0.0.1");
    unknown_type.workload_type = 9;
    let snapshot = snapshot_of(Push::addresses().workload(unknown_type));
    assert_eq!(uid_of(&snapshot, "shop", "web").workload_type, "deployment");
}

#[test]
fn every_field_with_an_unknown_or_impossible_value_rejects_its_service() {
    type Change = fn(&mut wds::Service);
    let cases: &[(&str, Change)] = &[
        ("ip_families", |s| s.ip_families = 9),
        ("prefix length", |s| s.addresses[0].length = Some(33)),
        ("ports", |s| s.ports = vec![port(65_536, 1)]),
        ("routing_preference", |s| {
            s.load_balancing = Some(wds::LoadBalancing {
                routing_preference: vec![0],
                ..Default::default()
            });
        }),
        ("mode", |s| {
            s.load_balancing = Some(wds::LoadBalancing {
                mode: 9,
                ..Default::default()
            });
        }),
        ("health_policy", |s| {
            s.load_balancing = Some(wds::LoadBalancing {
                health_policy: 9,
                ..Default::default()
            });
        }),
        ("weighted_waypoints", |s| {
            s.weighted_waypoints = vec![Default::default()]
        }),
    ];
    for (field, change) in cases {
        let mut s = service("shop", "web", "10.1.0.1");
        change(&mut s);
        let applied = Push::addresses().service(s).to(&store());
        assert_eq!(applied.accepted, 0, "{field}");
        let reason = &applied.rejected[0].1;
        assert!(reason.contains(field), "{field}: {reason}");
    }
}

#[test]
fn a_resource_whose_name_or_type_is_not_its_contents_is_rejected() {
    let address = wds::Address {
        r#type: Some(wds::address::Type::Workload(pod("a", "b", "10.0.0.1"))),
    };
    let applied = Push::addresses().raw("other", "1", &address).to(&store());
    assert!(applied.rejected[0].1.contains("c//Pod/a/b"));
    let empty = wds::Address { r#type: None };
    let applied = Push::addresses().raw("x", "1", &empty).to(&store());
    assert!(applied.rejected[0].1.contains("neither"));
}

#[test]
fn policies_are_listed_with_their_empty_versions_and_rejected_ones_with_reasons() {
    let store = store();
    let policy = |name: &str, scope| pb::Authorization {
        name: name.into(),
        namespace: "shop".into(),
        scope,
        ..Default::default()
    };
    let applied = Push::policies()
        .policy(policy("good", 0))
        .policy(policy("bad", 9))
        .to(&store);
    assert_eq!(applied.accepted, 1);
    assert_eq!(applied.rejected[0].0, "shop/bad");
    let types = store.types();
    let state = types.iter().find(|t| t.type_url == AUTHORIZATION_TYPE);
    let state = state.unwrap();
    assert_eq!(state.versions, [("shop/good".to_owned(), String::new())]);
    assert_eq!(state.rejected[0].0, "shop/bad");
    let gone = Push::policies().removed("shop/bad").removed("shop/good");
    assert_eq!(gone.to(&store).removed, 2);
    assert!(store.types().iter().all(|t| t.rejected.is_empty()));
    assert!(store.snapshot().policies().is_empty());
}

#[test]
fn unknown_fields_are_no_reason_to_reject() {
    let address = wds::Address {
        r#type: Some(wds::address::Type::Workload(pod("a", "b", "10.0.0.1"))),
    };
    let mut bytes = address.encode_to_vec();
    bytes.extend([0xa2, 0x06, 0x01, b'x']);
    Push::addresses()
        .bytes("c//Pod/a/b", "1", bytes)
        .accepted_by(&store());
}
