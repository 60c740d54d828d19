//! Routing where the control plane sends only what is asked for.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc::UnboundedReceiver;

use super::testing::{Settings, World, exchange, record, soon};
use crate::config::Limits;
use crate::state::fixture::{Push, ip};
use crate::wire::control as pb;

fn on_demand() -> World {
    let config = pb::InstanceConfig {
        on_demand: true,
        ..Default::default()
    };
    World::with(&Settings {
        config,
        ..Settings::default()
    })
}

fn wanted(world: &World) -> UnboundedReceiver<Arc<str>> {
    let demand = world.web.shared.store.demand();
    demand.take_wanted().expect("nobody else takes it")
}

#[tokio::test]
async fn an_unknown_address_is_asked_for_and_then_goes_where_the_answer_says() {
    let mut world = on_demand();
    let mut wanted = wanted(&world);
    world.db.ip("addr add 10.77.0.4/24 dev eth0");
    let _peers = world.db.echo("0.0.0.0:8080");
    let stream = world.web.dial("10.77.0.4:8080").await.unwrap();
    assert_eq!(&*soon(wanted.recv()).await.unwrap(), "net/10.77.0.4");
    let mut db = record("db");
    db.addresses.push(ip("10.77.0.4"));
    for side in [&world.web, &world.db] {
        let push = Push::addresses().workload(db.clone());
        push.alias("net/10.77.0.4").accepted_by(&side.shared.store);
    }
    assert_eq!(exchange(stream, b"x").await.unwrap(), b"x");
    let line = ["direction=\"outbound\"", "dst.hbone_addr=10.77.0.4:8080"];
    world.logged(&line).await;
    let label = ["outcome=\"answered\""];
    assert_eq!(world.web.metric("underpass_on_demand_total", &label), 1);
}

#[tokio::test]
async fn what_the_control_plane_does_not_know_either_is_plain_tcp_from_then_on() {
    let world = on_demand();
    let mut wanted = wanted(&world);
    world.db.ip("addr add 10.77.0.3/24 dev eth0");
    let _peers = world.db.echo("10.77.0.3:8080");
    let stream = world.web.dial("10.77.0.3:8080").await.unwrap();
    let name = soon(wanted.recv()).await.unwrap();
    Push::addresses()
        .removed(&name)
        .accepted_by(&world.web.shared.store);
    assert_eq!(exchange(stream, b"x").await.unwrap(), b"x");
    let stream = world.web.dial("10.77.0.3:8080").await.unwrap();
    assert_eq!(exchange(stream, b"x").await.unwrap(), b"x");
    assert!(wanted.try_recv().is_err(), "asked once");
}

#[tokio::test]
async fn without_an_answer_in_time_the_connection_is_refused_not_sent_in_clear() {
    let mut world = on_demand();
    world.db.ip("addr add 10.77.0.3/24 dev eth0");
    let peers = world.db.echo("10.77.0.3:8080");
    let limits = Limits {
        workload_wait: Duration::from_millis(50),
        ..Limits::default()
    };
    world.web.shared.limits.store(Arc::new(limits));
    let stream = world.web.dial("10.77.0.3:8080").await.unwrap();
    exchange(stream, b"x").await.unwrap_err();
    assert!(peers.lock().unwrap().is_empty());
    let line = [
        "connection failed",
        "hasn't said within 50ms",
        "net/10.77.0.3",
    ];
    world.logged(&line).await;
    let label = ["reason=\"not_told\""];
    assert_eq!(world.web.metric("underpass_refusals_total", &label), 1);
}

#[tokio::test]
async fn a_connection_waits_for_its_own_pods_record() {
    let world = World::new();
    let _peers = world.db.echo("0.0.0.0:8080");
    let store = &world.web.shared.store;
    Push::addresses()
        .removed("c//Pod/shop/web")
        .accepted_by(store);
    let stream = world.web.dial("10.77.0.2:8080").await.unwrap();
    let exchanged = tokio::spawn(exchange(stream, b"x"));
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(!exchanged.is_finished());
    Push::addresses().workload(record("web")).accepted_by(store);
    assert_eq!(soon(exchanged).await.unwrap().unwrap(), b"x");
}
