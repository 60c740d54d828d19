//! On demand: a name that may be in the mesh is asked of the control plane before the nameservers.

use std::sync::Arc;
use std::time::Instant;

use hickory_proto::rr::RecordType::A;
use parking_lot::Mutex;

use super::testing::*;
use crate::state::fixture::{Push, pod, service};
use crate::wire::control as pb;

const DB: &str = "db.ns2.svc.cluster.local";
const DB_KEY: &str = "ns2/db.ns2.svc.cluster.local";

/// Whose nameserver says 203.0.113.9 to everything.
fn world() -> (World, Nameserver) {
    let raw = pb::InstanceConfig {
        on_demand: true,
        ..raw(&["10.99.0.1"])
    };
    let world = World::new(
        &raw,
        Push::addresses().workload(pod("ns1", "web", "10.99.0.1")),
    );
    let nameserver = world.nameserver("10.99.0.1:53", |query, _| {
        Some(reply(query, 0, [1, 0, 0], &a_record([203, 0, 113, 9], 0)))
    });
    (world, nameserver)
}

fn packet(name: &str) -> Vec<u8> {
    question(name, A).to_vec().unwrap()
}

/// What the control plane is asked for, answered as `push` says.
fn control_plane(
    world: &World,
    push: impl Fn(&str) -> Option<Push> + Send + 'static,
) -> Arc<Mutex<Vec<String>>> {
    let mut wanted = world.shared.store.demand().take_wanted().expect("once");
    let store = world.shared.store.clone();
    let seen: Arc<Mutex<Vec<String>>> = Arc::default();
    let record = seen.clone();
    tokio::spawn(async move {
        while let Some(name) = wanted.recv().await {
            record.lock().push(name.to_string());
            if let Some(push) = push(&name) {
                push.to(&store);
            }
        }
    });
    seen
}

#[tokio::test]
async fn a_service_is_asked_for_by_its_name_and_its_answer_is_the_pods() {
    let (world, nameserver) = world();
    let asked = control_plane(&world, |name| {
        let push = Push::addresses();
        Some(match name {
            DB_KEY => push.service(service("ns2", "db", "10.0.0.2")),
            _ => push.removed(name),
        })
    });
    for name in [DB, "db.ns2"] {
        let answer = shown(&world.udp(&packet(name)).await);
        assert!(answer.ends_with("10.0.0.2"), "{answer}");
        assert!(shown(&world.tcp(&packet(name)).await).ends_with("10.0.0.2"));
    }
    assert_eq!(nameserver.count(), 0, "nobody else was asked");
    let asked = asked.lock();
    assert_eq!(asked.iter().filter(|name| *name == DB_KEY).count(), 1);
}

#[tokio::test]
async fn what_the_mesh_does_not_have_is_relayed_and_asked_for_once() {
    let (world, nameserver) = world();
    let asked = control_plane(&world, |name| Some(Push::addresses().removed(name)));
    let began = Instant::now();
    for turn in 1..=3 {
        let answer = shown(&world.udp(&packet("www.example.com")).await);
        assert_eq!(answer, "www.example.com. 203.0.113.9");
        assert_eq!(nameserver.count(), turn);
    }
    assert!(began.elapsed().as_secs() < 2, "nobody waited");
    let asked = asked.lock();
    let declared = "ns1/www.example.com";
    assert_eq!(asked.iter().filter(|name| *name == declared).count(), 1);
}

#[tokio::test]
async fn a_silent_control_plane_costs_a_moment_and_then_nothing() {
    let (world, nameserver) = world();
    let asked = control_plane(&world, |_| None);
    let ask = async |name: &str| {
        let began = Instant::now();
        assert!(shown(&world.udp(&packet(name)).await).ends_with("203.0.113.9"));
        began.elapsed()
    };
    // One name a question: it is of a service of the cluster.
    for name in ["a", "b", "c"] {
        let waited = ask(&format!("{name}.ns2.svc.cluster.local")).await;
        assert!((2..4).contains(&waited.as_secs()), "{waited:?}");
    }
    assert!(ask("d.ns2.svc.cluster.local").await.as_millis() < 1500);
    assert_eq!(nameserver.count(), 4);
    // It was asked for all the same, and what comes late counts.
    assert!(
        asked
            .lock()
            .iter()
            .any(|name| name == "ns2/d.ns2.svc.cluster.local")
    );
    let late = Push::addresses().service(service("ns2", "d", "10.0.0.4"));
    late.accepted_by(&world.shared.store);
    let answer = shown(&world.udp(&packet("d.ns2.svc.cluster.local")).await);
    assert_eq!(answer, "d.ns2.svc.cluster.local. 10.0.0.4");
}

#[tokio::test]
async fn names_of_dns_use_up_no_other_budget_and_then_are_relayed_at_once() {
    let (world, nameserver) = world();
    let _asked = control_plane(&world, |name| Some(Push::addresses().removed(name)));
    // Each is one name.
    for number in 0..2048 {
        world.udp(&packet(&format!("{number}.x.example.com"))).await;
    }
    let answer = shown(&world.udp(&packet("one.more.example.com")).await);
    assert_eq!(answer, "one.more.example.com. 203.0.113.9");
    assert_eq!(nameserver.count(), 2049);
    let full = "underpass_on_demand_total{outcome=\"too_many\"}";
    assert!(world.metrics().contains(full), "it is counted");
}
