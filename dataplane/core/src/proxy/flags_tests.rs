//! Each way to fail, with real peers: the flag in the metrics and the text in the log.

use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use super::testing::{World, deny, eventually, exchange, soon};
use crate::config::Limits;
use crate::identity::Identity;
use crate::state::fixture::Push;
use crate::tls::testing::Ca;

const FAILED: &str = "istio_tcp_connections_failed_total";

/// What web's outbound connection to db ended with, `text` being in its log line.
async fn source_flag(world: &mut World, flag: &str, text: &str) {
    let stream = world.web.dial("10.77.0.2:8080").await.unwrap();
    exchange(stream, b"x").await.unwrap_err();
    world
        .logged(&["connection complete", "direction=\"outbound\"", text])
        .await;
    let labels = [
        "reporter=\"source\"",
        &format!("response_flags=\"{flag}\""),
        "destination_workload=\"db-deploy\"",
    ];
    assert_eq!(world.web.metric(FAILED, &labels), 1, "{flag}");
    let all = world.web.metric(FAILED, &["reporter=\"source\""]);
    assert_eq!(all, 1, "and under no other flag");
}

/// No wait is long.
fn hurried() -> World {
    let world = World::new();
    let limits = Limits {
        connect_timeout: Duration::from_millis(300),
        workload_wait: Duration::from_millis(100),
        ..Limits::default()
    };
    world.web.shared.limits.store(limits.into());
    world
}

/// In the place of db's proxy: TLS with a good certificate, then `after`.
async fn in_place_of_db<F: Future<Output = ()> + Send>(
    world: &World,
    after: impl FnOnce(TlsStream<TcpStream>) -> F + Send + 'static,
) {
    world.db.proxy.cut().await;
    let identity = Identity::new("cluster.local", "shop", "db-sa");
    let credentials = world.ca.credentials(&identity).await;
    let listener = world
        .db
        .netns
        .enter(|| std::net::TcpListener::bind("0.0.0.0:15008"));
    let listener = listener.unwrap().unwrap();
    listener.set_nonblocking(true).unwrap();
    let listener = TcpListener::from_std(listener).unwrap();
    tokio::spawn(async move {
        let (tcp, _) = listener.accept().await.unwrap();
        let acceptor = TlsAcceptor::from(credentials.server.clone());
        after(acceptor.accept(tcp).await.unwrap()).await;
    });
}

#[tokio::test]
async fn a_closed_port_is_connect() {
    source_flag(&mut World::new(), "CONNECT", "http status: 503").await;
}

#[tokio::test]
async fn a_policy_of_the_peer_is_deny_on_both_sides() {
    let mut world = World::new();
    let _peers = world.db.echo("0.0.0.0:8080");
    Push::policies()
        .policy(deny("no-web", "cluster.local/ns/shop/sa/web-sa"))
        .accepted_by(&world.db.shared.store);
    source_flag(&mut world, "DENY", "http status: 401").await;
    let labels = ["reporter=\"destination\"", "response_flags=\"DENY\""];
    assert_eq!(world.db.metric(FAILED, &labels), 1);
}

#[tokio::test]
async fn another_root_is_tls_failure() {
    let mut world = World::new();
    let identity = Identity::new("cluster.local", "shop", "db-sa");
    Ca::new("other").install(&world.db.shared.certs, &identity);
    source_flag(&mut world, "TLS_FAILURE", "10.77.0.2:15008: TLS").await;
}

#[tokio::test]
async fn no_certificate_is_identity_error() {
    let mut world = hurried();
    let identity = Identity::new("cluster.local", "shop", "web-sa");
    world.web.shared.certs.retain(&identity);
    world.web.shared.certs.release(&identity);
    source_flag(&mut world, "IDENTITY_ERROR", "web-sa").await;
}

#[tokio::test]
async fn a_silent_port_15008_is_network_policy_with_the_hint() {
    let mut world = hurried();
    world.db.nft(
        "table inet np { chain in { type filter hook input priority 0; tcp dport 15008 drop; }; }",
    );
    let hint = "no TCP connection after 300ms: a NetworkPolicy or firewall may block the port";
    source_flag(&mut world, "NETWORK_POLICY", hint).await;
}

#[tokio::test]
async fn a_peer_that_speaks_no_http2_is_h2_handshake_failure() {
    let mut world = World::new();
    in_place_of_db(&world, async |mut tls| {
        let _ = tls.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await;
        let _ = tls.read(&mut [0; 1 << 10]).await;
    })
    .await;
    source_flag(
        &mut world,
        "H2_HANDSHAKE_FAILURE",
        "10.77.0.2:15008: HTTP/2",
    )
    .await;
}

#[tokio::test]
async fn a_stream_that_breaks_after_its_first_byte_is_mid_stream() {
    let mut world = World::new();
    in_place_of_db(&world, async |tls| {
        let mut connection = h2::server::handshake(tls).await.unwrap();
        let (_request, mut respond) = connection.accept().await.unwrap().unwrap();
        tokio::spawn(async move { while connection.accept().await.is_some() {} });
        let mut stream = respond
            .send_response(http::Response::new(()), false)
            .unwrap();
        stream.send_data("half".into(), false).unwrap();
        tokio::time::sleep(Duration::from_millis(50)).await;
        stream.send_reset(h2::Reason::INTERNAL_ERROR);
        std::future::pending().await
    })
    .await;
    let mut stream = world.web.dial("10.77.0.2:8080").await.unwrap();
    soon(stream.read_exact(&mut [0; 4])).await.unwrap();
    soon(stream.read(&mut [0; 8])).await.unwrap_err();
    world
        .logged(&[
            "connection complete",
            "direction=\"outbound\"",
            "error=\"io: ",
        ])
        .await;
    let labels = ["reporter=\"source\"", "response_flags=\"MID_STREAM\""];
    assert_eq!(world.web.metric(FAILED, &labels), 1);
    assert_eq!(world.web.metric(FAILED, &[]), 1);
}

#[tokio::test]
async fn sockets_are_counted_while_they_are_open() {
    let world = World::new();
    let _peers = world.db.echo("0.0.0.0:8080");
    let mut stream = world.web.dial("10.77.0.2:8080").await.unwrap();
    stream.write_all(b"ping").await.unwrap();
    soon(stream.read_exact(&mut [0; 4])).await.unwrap();
    const OPEN: &str = "istio_tcp_sockets_open";
    let source = || world.web.metric(OPEN, &["reporter=\"source\""]);
    assert_eq!(source(), 1);
    // The tunnel's.
    assert_eq!(world.db.metric(OPEN, &["reporter=\"destination\""]), 1);
    drop(stream);
    eventually("the socket is no longer counted", || source() == 0).await;
}

#[tokio::test]
async fn policy_decisions_are_told_when_asked_for() {
    let mut world = World::new();
    let _peers = world.db.echo("0.0.0.0:8080");
    let log = crate::wire::control::LogConfig {
        policy_decisions: true,
        ..Default::default()
    };
    world.db.shared.telemetry.configure(&log).unwrap();
    Push::policies()
        .policy(deny("no-web", "cluster.local/ns/shop/sa/web-sa"))
        .accepted_by(&world.db.shared.store);
    let stream = world.web.dial("10.77.0.2:8080").await.unwrap();
    exchange(stream, b"x").await.unwrap_err();
    let line = world.logged(&["\tinfo\tpolicy", "decision"]).await;
    assert!(
        line.contains("verdict=\"deny\" policy=\"shop/no-web\""),
        "{line}"
    );
}
