//! Ranges as service addresses (facts ztunnel 2.3), against a scan of all services.

use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use proptest::prelude::*;

use super::Snapshot;
use super::fixture::*;
use crate::wire::workload as wds;

/// A service `namespace/name` for one range of a network.
fn range(namespace: &str, name: &str, network: &str, range: &str) -> wds::Service {
    let net: IpNet = range.parse().unwrap();
    let mut it = service(namespace, name, &net.addr().to_string());
    it.addresses[0].network = network.into();
    it.addresses[0].length = Some(net.prefix_len().into());
    it
}

fn found(snapshot: &Snapshot, ip: &str, client: Option<&str>) -> Option<String> {
    let found = snapshot.service_by_vip("net", ip.parse().unwrap(), client);
    found.map(|s| s.name.name.to_string())
}

fn of(services: &[wds::Service]) -> Arc<Snapshot> {
    let push = services.iter().cloned();
    snapshot_of(push.fold(Push::addresses(), Push::service))
}

#[test]
fn families_and_networks_are_apart() {
    let snapshot = of(&[
        range("a", "four", "net", "0.0.0.0/0"),
        range("a", "six", "net", "2001:db8::/32"),
        range("a", "elsewhere", "far", "2001:db8:1::/48"),
    ]);
    assert_eq!(found(&snapshot, "10.0.0.1", None).unwrap(), "four");
    assert_eq!(found(&snapshot, "2001:db8:1::1", None).unwrap(), "six");
    assert_eq!(found(&snapshot, "2001:db9::1", None), None);
}

#[test]
fn the_clients_namespace_counts_more_than_a_longer_prefix() {
    let snapshot = of(&[
        range("shop", "own", "net", "10.0.0.0/8"),
        range("a", "narrow", "net", "10.1.0.0/16"),
    ]);
    assert_eq!(found(&snapshot, "10.1.0.1", Some("shop")).unwrap(), "own");
    assert_eq!(found(&snapshot, "10.1.0.1", Some("b")).unwrap(), "narrow");
    assert_eq!(found(&snapshot, "10.1.0.1", None).unwrap(), "narrow");
}

#[test]
fn of_equal_ranges_the_canonical_wins_then_the_oldest() {
    let (first, second) = (
        range("a", "first", "net", "10.0.0.0/8"),
        range("b", "second", "net", "10.0.0.0/8"),
    );
    let mut canonical = range("c", "canonical", "net", "10.0.0.0/8");
    canonical.canonical = true;
    let snapshot = of(&[first.clone(), second.clone()]);
    assert_eq!(found(&snapshot, "10.0.0.1", None).unwrap(), "first");
    let snapshot = of(&[first, canonical, second]);
    assert_eq!(found(&snapshot, "10.0.0.1", None).unwrap(), "canonical");
}

#[test]
fn a_hidden_exact_address_falls_through_to_a_visible_range() {
    let mut hidden = service("a", "hidden", "10.1.0.1");
    hidden.visibility = wds::service::Visibility::Namespace as i32;
    let mut narrow = range("a", "hidden-range", "net", "10.1.0.0/24");
    narrow.visibility = wds::service::Visibility::Namespace as i32;
    let wide = range("a", "wide", "net", "10.0.0.0/8");
    let snapshot = of(&[hidden, narrow, wide]);
    assert_eq!(found(&snapshot, "10.1.0.1", Some("shop")).unwrap(), "wide");
    assert_eq!(found(&snapshot, "10.1.0.1", Some("a")).unwrap(), "hidden");
    let seen = found(&snapshot, "10.1.0.2", Some("a")).unwrap();
    assert_eq!(seen, "hidden-range");
}

#[test]
fn a_removed_or_changed_range_leaves_nothing_behind() {
    let store = store();
    let push = Push::addresses().service(range("a", "s", "net", "10.1.0.0/16"));
    push.service(range("b", "t", "net", "10.1.0.0/16"))
        .accepted_by(&store);
    let moved = range("a", "s", "net", "10.2.0.0/15");
    Push::addresses().service(moved).accepted_by(&store);
    let snapshot = store.snapshot();
    assert_eq!(found(&snapshot, "10.1.0.1", None).unwrap(), "t");
    assert_eq!(found(&snapshot, "10.3.0.1", None).unwrap(), "s");
    let gone = ["a/s.a.svc.cluster.local", "b/t.b.svc.cluster.local"];
    let push = gone.iter().fold(Push::addresses(), |p, n| p.removed(n));
    push.accepted_by(&store);
    let snapshot = store.snapshot();
    assert_eq!(found(&snapshot, "10.1.0.1", None), None);
    assert_eq!(found(&snapshot, "10.3.0.1", None), None);
}

/// Endpoints are the service's, not the range's: a push of an endpoint alone is seen at once
/// (upstream serves stale ones: facts ztunnel 2.3).
#[test]
fn a_new_endpoint_of_a_range_is_chosen_at_once() {
    let web = range("shop", "web", "net", "10.1.0.0/16");
    let store = store();
    let old = member(pod("shop", "old", "10.0.0.1"), &web, &[]);
    let push = Push::addresses().service(web.clone());
    push.workload(old).accepted_by(&store);
    let push = Push::addresses().removed("c//Pod/shop/old");
    let new = member(pod("shop", "new", "10.0.0.2"), &web, &[]);
    push.workload(new).accepted_by(&store);
    let snapshot = store.snapshot();
    let ip = "10.1.2.3".parse().unwrap();
    let record = snapshot.service_by_vip("net", ip, None).unwrap();
    let service = snapshot.service(&record.key).unwrap();
    let names: Vec<_> = service.endpoints.iter().map(|w| &*w.name).collect();
    assert_eq!(names, ["new"]);
}

/// What `Ranges` is for, in the words of facts ztunnel 2.3.
fn naive(services: &[wds::Service], ip: IpAddr, client: Option<&str>) -> Option<String> {
    let matched = |s: &wds::Service| {
        let nets = s.addresses.iter().filter(|a| a.network == "net");
        nets.filter_map(|a| {
            let bytes: &[u8] = &a.address;
            let addr = match <[u8; 4]>::try_from(bytes) {
                Ok(v4) => IpAddr::from(v4),
                Err(_) => IpAddr::from(<[u8; 16]>::try_from(bytes).ok()?),
            };
            let length = u8::try_from(a.length?).ok()?;
            let net = IpNet::new(addr, length).ok()?;
            net.contains(&ip).then_some(length)
        })
        .max()
    };
    let private = wds::service::Visibility::Namespace as i32;
    let mut best: Option<((bool, u8, bool), &wds::Service)> = None;
    for s in services {
        let home = client == Some(&*s.namespace);
        let hidden = s.visibility == private && client.is_some() && !home;
        let Some(length) = matched(s).filter(|_| !hidden) else {
            continue;
        };
        let rank = (home, length, s.canonical);
        if best.is_none_or(|(other, _)| rank > other) {
            best = Some((rank, s));
        }
    }
    best.map(|(_, s)| format!("{}/{}", s.namespace, s.name))
}

fn any_service() -> impl Strategy<Value = wds::Service> {
    // Few bits that vary, so that ranges nest and coincide; never a whole address, which would be
    // an exact VIP.
    let v4 =
        (0u32..4, 22u32..32).prop_map(|(n, length)| (ip(&format!("10.0.{n}.{}", n * 64)), length));
    let v6 = (0u32..4, 100u32..128)
        .prop_map(|(n, length)| (ip(&format!("2001:db8::{n}:{n}00")), length));
    let address = (prop_oneof![v4, v6], any::<bool>()).prop_map(|((address, length), ours)| {
        wds::NetworkAddress {
            network: if ours { "net" } else { "far" }.into(),
            address,
            length: Some(length),
        }
    });
    let addresses = proptest::collection::vec(address, 1..4);
    let names = (0..3u8, 0..6u8, any::<bool>(), any::<bool>());
    (names, addresses).prop_map(
        |((namespace, name, canonical, hidden), addresses)| wds::Service {
            addresses,
            canonical,
            visibility: i32::from(hidden),
            ..service(&format!("ns{namespace}"), &format!("s{name}"), "10.1.0.1")
        },
    )
}

proptest! {
    #[test]
    fn the_longest_prefix_is_what_a_scan_finds(
        pushes in proptest::collection::vec((any_service(), any::<bool>()), 1..40),
        asked in proptest::collection::vec((0u32..4, 0u32..=255), 1..20),
    ) {
        let store = store();
        let mut known: Vec<wds::Service> = Vec::new();
        for (service, put) in pushes {
            let at = known.iter().position(|s| key(s) == key(&service));
            match (put, at) {
                (true, _) => {
                    // A record that is replaced keeps its place among equals, which the model
                    // knows nothing of.
                    if let Some(at) = at {
                        known.remove(at);
                        Push::addresses().removed(&key(&service)).accepted_by(&store);
                    }
                    known.push(service.clone());
                    Push::addresses().service(service).accepted_by(&store);
                }
                (false, Some(at)) => {
                    let gone = known.remove(at);
                    Push::addresses().removed(&key(&gone)).accepted_by(&store);
                }
                (false, None) => {}
            }
        }
        let snapshot = store.snapshot();
        for (high, low) in asked {
            for text in [format!("10.0.{high}.{low}"), format!("2001:db8::{high}:{low:x}")] {
                let ip: IpAddr = text.parse().unwrap();
                for client in [None, Some("ns0"), Some("ns1"), Some("other")] {
                    let ours = snapshot.service_by_vip("net", ip, client);
                    let ours = ours.map(|s| format!("{}/{}", s.name.namespace, s.name.name));
                    prop_assert_eq!(ours, naive(&known, ip, client), "{} {:?}", ip, client);
                }
            }
        }
    }
}
