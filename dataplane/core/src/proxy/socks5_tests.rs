//! SOCKS5 from an application of web's pod.

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::testing::{Settings, World, exchange, record, soon};
use crate::state::fixture::{Push, member, service};
use crate::wire::control as pb;

const PORT: u16 = 15080;
const HELLO: &[u8] = &[5, 1, 0];

fn world() -> World {
    World::with(&Settings {
        config: pb::InstanceConfig {
            socks5_port: PORT.into(),
            ..Default::default()
        },
        ..Default::default()
    })
}

async fn dial(world: &World) -> TcpStream {
    world.web.dial(&format!("127.0.0.1:{PORT}")).await.unwrap()
}

/// Sends a request, and reads the reply code.
async fn ask(stream: &mut TcpStream, request: &[u8]) -> u8 {
    stream.write_all(HELLO).await.unwrap();
    let mut method = [0; 2];
    soon(stream.read_exact(&mut method)).await.unwrap();
    assert_eq!(method, [5, 0]);
    stream.write_all(request).await.unwrap();
    let mut reply = [0; 10];
    soon(stream.read_exact(&mut reply)).await.unwrap();
    assert_eq!(reply[..1], [5]);
    assert_eq!(reply[2..], [0, 1, 0, 0, 0, 0, 0, 0]);
    reply[1]
}

fn by_ip(ip: &str, port: u16) -> Vec<u8> {
    let octets = crate::state::fixture::ip(ip);
    let kind = if octets.len() == 4 { 1 } else { 4 };
    [&[5, 1, 0, kind], &octets[..], &port.to_be_bytes()].concat()
}

fn by_name(name: &str, port: u16) -> Vec<u8> {
    let length = [name.len() as u8];
    [
        &[5, 1, 0, 3],
        &length[..],
        name.as_bytes(),
        &port.to_be_bytes(),
    ]
    .concat()
}

#[tokio::test]
async fn what_is_asked_for_is_reached_through_the_mesh() {
    let mut world = world();
    let peers = world.db.echo("[::]:8080");
    let store = service("shop", "store", "10.77.0.50");
    Push::addresses()
        .service(store.clone())
        .workload(member(record("db"), &store, &[]))
        .accepted_by(&world.web.shared.store);
    for request in [
        by_ip("10.77.0.2", 8080),
        by_ip("fd77::2", 8080),
        by_ip("10.77.0.50", 80),
        by_name("Store.shop.svc.cluster.local", 80),
        by_name("10.77.0.2", 8080),
    ] {
        let mut stream = dial(&world).await;
        assert_eq!(ask(&mut stream, &request).await, 0, "{request:?}");
        assert_eq!(exchange(stream, b"hello").await.unwrap(), b"hello");
    }
    assert_eq!(peers.lock().unwrap().len(), 5);
    let mtls = [
        "reporter=\"source\"",
        "connection_security_policy=\"mutual_tls\"",
    ];
    assert_eq!(
        world
            .web
            .metric("istio_tcp_connections_opened_total", &mtls),
        5
    );
    world
        .logged(&["direction=\"outbound\"", "dst.service=\"store.shop"])
        .await;
}

#[tokio::test]
async fn success_is_told_only_once_the_connection_stands() {
    let world = world();
    // Nobody listens there.
    let mut stream = dial(&world).await;
    assert_eq!(ask(&mut stream, &by_ip("10.77.0.2", 8080)).await, 4);
    let mut stream = dial(&world).await;
    let own = ask(&mut stream, &by_ip("127.0.0.1", 15001)).await;
    assert_eq!(own, 1, "the proxy's own port");
    let mut stream = dial(&world).await;
    assert_eq!(ask(&mut stream, &by_ip("127.0.0.1", PORT)).await, 1);
}

#[tokio::test]
async fn what_is_not_served_is_refused_with_its_code() {
    let world = world();
    let mut bind = by_ip("10.77.0.2", 8080);
    bind[1] = 2;
    let mut unknown = by_ip("10.77.0.2", 8080);
    unknown[3] = 9;
    for request in [bind, unknown, by_name("", 80), by_name("a b", 80)] {
        let mut stream = dial(&world).await;
        assert_eq!(ask(&mut stream, &request).await, 7, "{request:?}");
    }
    let mut stream = dial(&world).await;
    // With a password only.
    stream.write_all(&[5, 1, 2]).await.unwrap();
    let mut method = [0; 2];
    soon(stream.read_exact(&mut method)).await.unwrap();
    assert_eq!(method, [5, 0xff]);
    let refused = world
        .web
        .metric("underpass_refusals_total", &["\"bad_socks_request\""]);
    assert_eq!(refused, 5);
}

#[tokio::test]
async fn only_the_pod_itself_reaches_the_listener() {
    let world = world();
    let _peers = world.db.echo("0.0.0.0:8080");
    let dst = format!("10.77.0.1:{PORT}").parse().unwrap();
    let config = &world.db.shared.config;
    let from_outside = world.db.netns.connect(config, dst, None).await;
    if let Ok(mut stream) = from_outside {
        let _ = stream.write_all(HELLO).await;
        assert_ne!(soon(stream.read(&mut [0; 2])).await.ok(), Some(2));
    }
}
