//! Endpoints that can't be reached, and those that are known by name only.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::net::UdpSocket;

use super::testing::{Settings, World, deny, exchange, record};
use crate::state::fixture::{Push, ip, member, pod, port, service};
use crate::wire::{control as pb, workload as wds};

const RETRIES: &str = "underpass_endpoint_retries_total";
const VIP: &str = "10.77.0.50:80";

/// `db` serves the service; so do `others`, each a workload that nobody is behind.
fn push(world: &World, db: Option<wds::Workload>, others: &[wds::Workload]) {
    let store = service("shop", "store", "10.77.0.50");
    let mut push = Push::addresses().service(store.clone());
    for workload in db.iter().chain(others) {
        push = push.workload(member(workload.clone(), &store, &[]));
    }
    push.accepted_by(&world.web.shared.store);
}

/// No route leads there from web's pod.
fn unreachable(number: u8) -> wds::Workload {
    pod(
        "shop",
        &format!("gone{number}"),
        &format!("203.0.113.{number}"),
    )
}

/// Plain TCP; the address is web's own, where nobody listens.
fn refusing(world: &World) -> wds::Workload {
    world.web.ip("addr add 10.77.0.4/32 dev lo");
    wds::Workload {
        tunnel_protocol: wds::TunnelProtocol::None.into(),
        ..pod("shop", "refusing", "10.77.0.4")
    }
}

async fn ask(world: &World) -> std::io::Result<Vec<u8>> {
    exchange(world.web.dial(VIP).await?, b"hello").await
}

#[tokio::test]
async fn an_endpoint_that_refuses_or_is_unreachable_is_replaced_by_another() {
    let mut world = World::new();
    let _peers = world.db.echo("0.0.0.0:8080");
    push(
        &world,
        Some(record("db")),
        &[unreachable(1), refusing(&world)],
    );
    for _ in 0..40 {
        assert_eq!(ask(&world).await.unwrap(), b"hello");
    }
    let retries = world.web.plain_metric(RETRIES);
    assert!((10..=80).contains(&retries), "{retries} retries");
    world
        .logged(&["trying another endpoint", "Connection refused"])
        .await;
    world
        .logged(&["trying another endpoint", "gone1", "unreachable"])
        .await;
    // One connection each, at the endpoint that served it.
    let opened = |labels: &[&str]| {
        world
            .web
            .metric("istio_tcp_connections_opened_total", labels)
    };
    assert_eq!(
        opened(&["reporter=\"source\"", "destination_workload=\"db-deploy\""]),
        40
    );
    assert_eq!(opened(&["reporter=\"source\""]), 40);
    let failed = world
        .web
        .metric("istio_tcp_connections_failed_total", &["\"CONNECT\""]);
    assert_eq!(failed, 0);
}

#[tokio::test]
async fn an_application_that_is_down_behind_its_tunnel_is_replaced_too() {
    let world = World::new();
    // On IPv4 only: at the other address the proxy answers, but no application.
    let _peers = world.db.echo("10.77.0.2:8080");
    let four = wds::Workload {
        addresses: vec![ip("10.77.0.2")],
        ..record("db")
    };
    let down = wds::Workload {
        uid: "c//Pod/shop/down".into(),
        addresses: vec![ip("fd77::2")],
        ..record("db")
    };
    push(&world, Some(four), &[down]);
    for _ in 0..20 {
        assert_eq!(ask(&world).await.unwrap(), b"hello");
    }
    assert!(world.web.plain_metric(RETRIES) > 0);
}

#[tokio::test]
async fn at_most_two_others_are_tried_and_the_last_failure_is_told() {
    let mut world = World::new();
    let gone: Vec<_> = (1..=5).map(unreachable).collect();
    push(&world, None, &gone);
    ask(&world).await.unwrap_err();
    assert_eq!(world.web.plain_metric(RETRIES), 2);
    world
        .logged(&["connection complete", "203.0.113.", "error="])
        .await;
    let opened = world
        .web
        .metric("istio_tcp_connections_opened_total", &["\"source\""]);
    assert_eq!(opened, 1);
    let failed = world
        .web
        .metric("istio_tcp_connections_failed_total", &["\"CONNECT\""]);
    assert_eq!(failed, 1);

    let one = World::new();
    push(&one, None, &gone[..1]);
    ask(&one).await.unwrap_err();
    assert_eq!(one.web.plain_metric(RETRIES), 0, "there is no other");
}

#[tokio::test]
async fn a_policys_refusal_is_not_asked_of_another_endpoint() {
    let world = World::new();
    let _peers = world.db.echo("0.0.0.0:8080");
    let other = wds::Workload {
        uid: "c//Pod/shop/other".into(),
        addresses: vec![ip("fd77::2")],
        ..record("db")
    };
    let four = wds::Workload {
        addresses: vec![ip("10.77.0.2")],
        ..record("db")
    };
    push(&world, Some(four), &[other]);
    Push::policies()
        .policy(deny("no-web", "cluster.local/ns/shop/sa/web-sa"))
        .accepted_by(&world.db.shared.store);
    ask(&world).await.unwrap_err();
    let verdict = ["policy=\"shop/no-web\"", "verdict=\"deny\""];
    assert_eq!(
        world.db.metric("underpass_policy_verdicts_total", &verdict),
        1
    );
    assert_eq!(world.web.plain_metric(RETRIES), 0);
}

/// Answers A questions for `db.example` with one address, other names with NXDOMAIN; counts the A
/// questions.
async fn nameserver(answer: Ipv4Addr) -> (SocketAddr, Arc<AtomicUsize>) {
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let addr = socket.local_addr().unwrap();
    let asked = Arc::new(AtomicUsize::new(0));
    let count = asked.clone();
    tokio::spawn(async move {
        let mut query = [0; 512];
        while let Ok((length, from)) = socket.recv_from(&mut query).await {
            // Header, the labels of the name, their end, type and class.
            let labels = query[12..length].iter().position(|b| *b == 0).unwrap();
            let question = &query[12..12 + labels + 5];
            let known = question.starts_with(b"\x02db\x07example\0");
            let is_a = question[labels + 1..labels + 3] == [0, 1];
            count.fetch_add(usize::from(is_a), Ordering::SeqCst);
            let mut reply = query[..2].to_vec();
            let rcode = if known { 0x80 } else { 0x83 };
            reply.extend([0x81, rcode, 0, 1, 0, u8::from(known && is_a), 0, 0, 0, 0]);
            reply.extend(question);
            if known && is_a {
                reply.extend([0xc0, 0x0c, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4]);
                reply.extend(answer.octets());
            }
            socket.send_to(&reply, from).await.unwrap();
        }
    });
    (addr, asked)
}

#[tokio::test]
async fn a_workload_known_by_name_is_resolved_when_it_is_needed() {
    let (server, asked) = nameserver([10, 77, 0, 2].into()).await;
    let mut world = World::with(&Settings {
        config: pb::InstanceConfig {
            dns: Some(pb::Dns {
                nameservers: vec![server.to_string()],
                ..Default::default()
            }),
            ..Default::default()
        },
        ..Default::default()
    });
    let peers = world.db.echo("0.0.0.0:8080");
    let named = |hostname: &str| wds::Workload {
        addresses: Vec::new(),
        hostname: hostname.into(),
        ..record("db")
    };
    push(&world, Some(named("db.example")), &[]);
    assert_eq!(ask(&world).await.unwrap(), b"hello");
    let questions = asked.load(Ordering::SeqCst);
    assert_eq!(ask(&world).await.unwrap(), b"hello");
    assert_eq!(asked.load(Ordering::SeqCst), questions, "cached");
    assert_eq!(peers.lock().unwrap()[0].ip().to_string(), "10.77.0.1");
    let labels = ["source_workload=\"web-deploy\"", "hostname=\"db.example\""];
    assert_eq!(world.web.metric("istio_on_demand_dns_total", &labels), 2);
    world
        .logged(&["dst.addr=10.77.0.2:15008 dst.hbone_addr=10.77.0.2:8080"])
        .await;

    push(&world, Some(named("nobody.example")), &[]);
    ask(&world).await.unwrap_err();
    world
        .logged(&["connection failed", "no resolved addresses: nobody.example"])
        .await;
    let refused = world
        .web
        .metric("underpass_refusals_total", &["\"no_route\""]);
    assert_eq!(refused, 1);

    // Another endpoint serves meanwhile.
    let other = wds::Workload {
        uid: "c//Pod/shop/other".into(),
        ..record("db")
    };
    let unresolved = wds::Workload {
        addresses: Vec::new(),
        hostname: "nobody.example".into(),
        ..pod("shop", "ext", "203.0.113.9")
    };
    let mut store = service("shop", "store", "10.77.0.50");
    store.ports = vec![port(80, 8080)];
    push(&world, Some(other), &[unresolved]);
    for _ in 0..10 {
        assert_eq!(ask(&world).await.unwrap(), b"hello");
    }
}
