//! Which endpoints are chosen, and how often (facts ztunnel 2.6).

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::balance::{Endpoint, PortRule};
use super::fixture::*;
use super::{Snapshot, Store};
use crate::wire::workload as wds;
use crate::wire::workload::load_balancing::{HealthPolicy, Mode, Scope};

/// A choice for `shop/client` on port 80 of `shop/web`.
fn choose(snapshot: &Snapshot) -> Option<Endpoint> {
    choose_port(snapshot, 80, PortRule::Standard)
}

fn choose_port(snapshot: &Snapshot, port: u16, rule: PortRule) -> Option<Endpoint> {
    let client = uid_of(snapshot, "shop", "client");
    let web = snapshot.service("shop/web.shop.svc.cluster.local").unwrap();
    let chosen = web.choose(web.record.as_ref().unwrap(), &client, port, rule, &[])?;
    Some(chosen.endpoint)
}

/// How often each of them is chosen of 4000 times.
fn shares(snapshot: &Snapshot) -> BTreeMap<String, u32> {
    let mut shares = BTreeMap::new();
    for endpoint in (0..4000).filter_map(|_| choose(snapshot)) {
        *shares
            .entry(endpoint.workload.name.to_string())
            .or_default() += 1;
    }
    shares
}

fn names(snapshot: &Snapshot) -> Vec<String> {
    shares(snapshot).into_keys().collect()
}

fn balanced(mode: Mode, scopes: &[Scope]) -> wds::Service {
    let mut web = service("shop", "web", "10.1.0.1");
    web.load_balancing = Some(wds::LoadBalancing {
        routing_preference: scopes.iter().map(|scope| *scope as i32).collect(),
        mode: mode as i32,
        health_policy: HealthPolicy::OnlyHealthy as i32,
    });
    web
}

/// Every scope of the client is "here".
fn client() -> wds::Workload {
    let mut client = place(pod("shop", "client", "10.0.0.100"), &["here"; 5]);
    client.network = "net".into();
    client
}

/// region, zone, subzone, node, cluster
fn place(
    mut w: wds::Workload,
    [region, zone, subzone, node, cluster]: &[&str; 5],
) -> wds::Workload {
    w.locality = Some(wds::Locality {
        region: (*region).into(),
        zone: (*zone).into(),
        subzone: (*subzone).into(),
    });
    w.node = (*node).into();
    w.cluster_id = (*cluster).into();
    w
}

fn endpoint(service: &wds::Service, n: usize, at: &[&str; 5]) -> wds::Workload {
    let w = pod("shop", &format!("e{n}"), &format!("10.0.0.{n}"));
    member(place(w, at), service, &[])
}

fn snapshot(service: wds::Service, endpoints: &[wds::Workload]) -> std::sync::Arc<Snapshot> {
    let push = Push::addresses().workload(client()).service(service);
    snapshot_of(endpoints.iter().cloned().fold(push, Push::workload))
}

#[test]
fn without_a_mode_all_endpoints_get_their_share() {
    let web = service("shop", "web", "10.1.0.1");
    let endpoints: Vec<_> = (1..=4).map(|n| endpoint(&web, n, &["x"; 5])).collect();
    let shares = shares(&snapshot(web, &endpoints));
    assert_eq!(shares.len(), 4);
    assert!(
        shares.values().all(|n| (800..1200).contains(n)),
        "{shares:?}"
    );
}

#[test]
fn capacity_is_a_weight_and_zero_is_never_chosen() {
    let web = service("shop", "web", "10.1.0.1");
    let weigh = |n, capacity| {
        let mut w = endpoint(&web, n, &["x"; 5]);
        w.capacity = Some(capacity);
        w
    };
    let shares = shares(&snapshot(
        web.clone(),
        &[weigh(1, 3), weigh(2, 1), weigh(3, 0)],
    ));
    assert_eq!(shares.len(), 2);
    assert!((2800..3200).contains(&shares["e1"]), "{shares:?}");
}

#[test]
fn strict_takes_only_what_matches_every_scope() {
    use Scope::{Cluster, Network, Node, Region, Subzone, Zone};
    let web = balanced(
        Mode::Strict,
        &[Region, Zone, Subzone, Node, Cluster, Network],
    );
    let near = ["here"; 5];
    let mut endpoints = vec![endpoint(&web, 1, &near)];
    for far in 0..5 {
        let mut at = near;
        at[far] = "there";
        endpoints.push(endpoint(&web, far + 2, &at));
    }
    let mut other_network = endpoint(&web, 9, &near);
    other_network.network = "far".into();
    endpoints.push(other_network);
    assert_eq!(names(&snapshot(web.clone(), &endpoints)), ["e1"]);
    assert!(choose(&snapshot(web, &endpoints[1..])).is_none());
}

#[test]
fn failover_takes_the_longest_match_and_falls_back() {
    let web = balanced(Mode::Failover, &[Scope::Region, Scope::Zone, Scope::Node]);
    let all = [
        endpoint(&web, 1, &["here", "here", "", "here", ""]),
        endpoint(&web, 2, &["here", "here", "", "there", ""]),
        // The zone differs: what follows doesn't count.
        endpoint(&web, 3, &["here", "there", "", "here", ""]),
        endpoint(&web, 4, &["there", "here", "", "here", ""]),
    ];
    for best in 0..all.len() {
        let expected = format!("e{}", best + 1);
        assert_eq!(names(&snapshot(web.clone(), &all[best..])), [expected]);
    }
}

#[test]
fn network_in_front_outranks_all_but_does_not_end_the_count() {
    let web = balanced(
        Mode::Failover,
        &[Scope::Network, Scope::Region, Scope::Zone],
    );
    let far = |n, at: [&str; 5]| {
        let mut w = endpoint(&web, n, &at);
        w.network = "far".into();
        w
    };
    let all = [
        endpoint(&web, 1, &["there"; 5]),
        far(2, ["here"; 5]),
        far(3, ["here", "there", "", "", ""]),
        far(4, ["there", "here", "", "", ""]),
    ];
    for best in 0..all.len() {
        let expected = format!("e{}", best + 1);
        assert_eq!(names(&snapshot(web.clone(), &all[best..])), [expected]);
    }
}

#[test]
fn unhealthy_endpoints_come_back_when_the_policy_allows_them() {
    let store = Store::new(config());
    let mut web = balanced(Mode::UnspecifiedMode, &[]);
    let mut sick = endpoint(&web, 1, &["x"; 5]);
    sick.status = wds::WorkloadStatus::Unhealthy as i32;
    Push::addresses()
        .workload(client())
        .workload(sick)
        .workload(endpoint(&web, 2, &["x"; 5]))
        .service(web.clone())
        .accepted_by(&store);
    assert_eq!(names(&store.snapshot()), ["e2"]);
    if let Some(balancing) = &mut web.load_balancing {
        balancing.health_policy = HealthPolicy::AllowAll as i32;
    }
    Push::addresses().service(web).accepted_by(&store);
    assert_eq!(names(&store.snapshot()), ["e1", "e2"]);
}

#[test]
fn a_change_of_one_endpoint_is_seen_by_the_next_choice() {
    let store = Store::new(config());
    let web = service("shop", "web", "10.1.0.1");
    Push::addresses()
        .workload(client())
        .workload(endpoint(&web, 1, &["x"; 5]))
        .service(web.clone())
        .accepted_by(&store);
    let old = store.snapshot();
    assert_eq!(names(&old), ["e1"]);
    Push::addresses()
        .removed("c//Pod/shop/e1")
        .workload(endpoint(&web, 2, &["x"; 5]))
        .accepted_by(&store);
    assert_eq!(names(&store.snapshot()), ["e2"]);
    assert_eq!(names(&old), ["e1"], "a view taken before stays as it was");
}

#[test]
fn sources_of_different_places_get_their_own_choices() {
    let web = balanced(Mode::Failover, &[Scope::Zone]);
    let endpoints = [
        endpoint(&web, 1, &["", "here", "", "", ""]),
        endpoint(&web, 2, &["", "there", "", "", ""]),
    ];
    let snapshot = snapshot(web, &endpoints);
    let service = snapshot.service("shop/web.shop.svc.cluster.local").unwrap();
    let record = service.record.as_ref().unwrap();
    for _ in 0..3 {
        for own in ["e1", "e2"] {
            let source = uid_of(&snapshot, "shop", own);
            let chosen = service.choose(record, &source, 80, PortRule::Standard, &[]);
            let chosen = chosen.map(|choice| choice.endpoint);
            assert_eq!(&*chosen.unwrap().workload.name, own);
        }
    }
}

#[test]
fn ports_resolve_by_endpoint_then_service_then_application_tunnel() {
    let mut web = service("shop", "web", "10.1.0.1");
    web.ports = vec![port(80, 8080), port(81, 0)];
    let w = pod("shop", "e1", "10.0.0.1");
    let plain = snapshot(web.clone(), &[member(w.clone(), &web, &[])]);
    let mapped = snapshot(web.clone(), &[member(w.clone(), &web, &[port(81, 9090)])]);
    let mut tunnelled = member(w, &web, &[]);
    tunnelled.application_tunnel = Some(wds::ApplicationTunnel {
        protocol: 0,
        port: 15088,
    });
    let tunnelled = snapshot(web, &[tunnelled]);
    let chosen =
        |snapshot: &Snapshot, port, rule| choose_port(snapshot, port, rule).map(|e| e.port);
    use PortRule::{Standard, Waypoint};
    assert_eq!(chosen(&plain, 80, Standard), Some(8080));
    assert_eq!(
        chosen(&plain, 81, Standard),
        None,
        "a named port that it lacks"
    );
    assert_eq!(chosen(&plain, 15008, Waypoint), None);
    assert_eq!(chosen(&mapped, 81, Standard), Some(9090));
    assert_eq!(chosen(&tunnelled, 15008, Standard), None);
    assert_eq!(chosen(&tunnelled, 15008, Waypoint), Some(15008));
}

/// facts ztunnel 2.6
#[test]
fn an_endpoint_without_address_needs_a_name_or_a_gateway_from_another_network() {
    let web = service("shop", "web", "10.1.0.1");
    let bare = |edit: &dyn Fn(&mut wds::Workload)| {
        let mut w = endpoint(&web, 1, &["x"; 5]);
        w.addresses.clear();
        edit(&mut w);
        choose(&snapshot(web.clone(), &[w])).is_some()
    };
    let gateway = || Some(gateway_at("192.0.2.1", 15008));
    assert!(!bare(&|_| {}));
    assert!(bare(&|w| w.hostname = "web.example".into()));
    assert!(!bare(&|w| w.network_gateway = gateway()));
    assert!(bare(&|w| {
        w.network = "far".into();
        w.network_gateway = gateway();
    }));
    assert!(!bare(&|w| w.network = "far".into()));
}

#[test]
fn an_endpoint_that_falls_ill_or_recovers_leaves_and_comes_back() {
    let store = Store::new(config());
    let web = service("shop", "web", "10.1.0.1");
    let mut second = endpoint(&web, 2, &["x"; 5]);
    let push = Push::addresses().workload(client()).service(web.clone());
    push.workload(endpoint(&web, 1, &["x"; 5]))
        .workload(second.clone())
        .accepted_by(&store);
    assert_eq!(names(&store.snapshot()), ["e1", "e2"]);
    second.status = wds::WorkloadStatus::Unhealthy as i32;
    Push::addresses()
        .workload(second.clone())
        .accepted_by(&store);
    assert_eq!(names(&store.snapshot()), ["e1"]);
    second.status = wds::WorkloadStatus::Healthy as i32;
    Push::addresses().workload(second).accepted_by(&store);
    assert_eq!(names(&store.snapshot()), ["e1", "e2"]);
}

proptest! {
    /// Who was tried is never chosen; the others keep their odds among each other.
    #[test]
    fn what_was_tried_is_left_out_and_the_rest_is_fair(
        capacities in proptest::collection::vec(0u32..5, 1..6),
        tried in proptest::collection::vec(any::<bool>(), 6),
    ) {
        let web = service("shop", "web", "10.1.0.1");
        let endpoints: Vec<_> = capacities.iter().enumerate().map(|(n, capacity)| {
            let mut w = endpoint(&web, n + 1, &["x"; 5]);
            w.capacity = Some(*capacity);
            w
        }).collect();
        let left = |n: usize| !tried[n] && capacities[n] > 0;
        let exclude: Vec<std::sync::Arc<str>> = (0..capacities.len())
            .filter(|n| tried[*n])
            .map(|n| endpoints[n].uid.as_str().into())
            .collect();
        let snapshot = snapshot(web, &endpoints);
        let client = uid_of(&snapshot, "shop", "client");
        let web = snapshot.service("shop/web.shop.svc.cluster.local").unwrap();
        let record = web.record.as_ref().unwrap();
        let choose = || web.choose(record, &client, 80, PortRule::Standard, &exclude);
        let total: u32 = (0..capacities.len()).filter(|n| left(*n)).map(|n| capacities[n]).sum();
        let remaining = (0..capacities.len()).filter(|n| left(*n)).count();
        if total == 0 {
            prop_assert!(choose().is_none());
            return Ok(());
        }
        const DRAWS: u32 = 1000;
        let mut drawn = vec![0u32; capacities.len()];
        for _ in 0..DRAWS {
            let choice = choose().unwrap();
            prop_assert_eq!(choice.others, remaining > 1);
            let n: usize = choice.endpoint.workload.name[1..].parse().unwrap();
            drawn[n - 1] += 1;
        }
        for (n, drawn) in drawn.iter().enumerate() {
            let odds = if left(n) { f64::from(capacities[n]) / f64::from(total) } else { 0.0 };
            // Six standard deviations: once in a billion.
            let expected = odds * f64::from(DRAWS);
            let slack = 6.0 * (expected * (1.0 - odds)).sqrt();
            let off = (f64::from(*drawn) - expected).abs();
            prop_assert!(off <= slack, "{} of {} for odds {}", drawn, DRAWS, odds);
        }
    }
}

proptest! {
    /// Against the plain reading of the rule: count, compare, keep the best.
    #[test]
    fn failover_agrees_with_a_naive_ranking(
        scopes in proptest::sample::subsequence(
            vec![Scope::Network, Scope::Region, Scope::Zone, Scope::Subzone, Scope::Node], 1..=5),
        places in proptest::collection::vec(proptest::collection::vec(any::<bool>(), 5), 1..6),
    ) {
        let web = balanced(Mode::Failover, &scopes);
        let word = |here: bool| if here { "here" } else { "there" };
        let endpoints: Vec<_> = places.iter().enumerate().map(|(n, p)| {
            let at = [word(p[0]), word(p[1]), word(p[2]), word(p[3]), "here"];
            let mut w = endpoint(&web, n + 1, &at);
            w.network = if p[4] { "net" } else { "far" }.into();
            w
        }).collect();
        let rank = |p: &Vec<bool>| {
            let mut rank = 0;
            for (i, scope) in scopes.iter().enumerate() {
                let matches = match scope {
                    Scope::Region => p[0],
                    Scope::Zone => p[1],
                    Scope::Subzone => p[2],
                    Scope::Node => p[3],
                    _ => p[4],
                };
                let special = i == 0 && *scope == Scope::Network;
                match (matches, special) {
                    (true, true) => rank += scopes.len(),
                    (true, false) => rank += 1,
                    (false, true) => {}
                    (false, false) => break,
                }
            }
            rank
        };
        let best = places.iter().map(rank).max().unwrap_or(0);
        let snapshot = snapshot(web, &endpoints);
        for _ in 0..20 {
            let name = choose(&snapshot).unwrap().workload.name.to_string();
            let n: usize = name[1..].parse().unwrap();
            prop_assert_eq!(rank(&places[n - 1]), best);
        }
    }
}
