//! How connections are bounded in number, and how all of them end.

use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::testing::{PATIENCE, World, eventually, exchange, soon};

#[tokio::test]
async fn over_its_limit_only_new_connections_are_refused() {
    let world = World::new();
    let _peers = world.db.echo("0.0.0.0:8080");
    let limits = crate::config::Limits {
        pod_max_connections: 1,
        ..Default::default()
    };
    world.web.shared.limits.store(limits.into());
    let mut first = world.web.dial("10.77.0.2:8080").await.unwrap();
    first.write_all(b"ping").await.unwrap();
    soon(first.read_exact(&mut [0; 4])).await.unwrap();
    let second = world.web.dial("10.77.0.2:8080").await.unwrap();
    exchange(second, b"x").await.unwrap_err();
    assert_eq!(
        world
            .web
            .metric("underpass_refusals_total", &["too_many_connections"]),
        1
    );
    first.write_all(b"pong").await.unwrap();
    soon(first.read_exact(&mut [0; 4])).await.unwrap();
    drop(first);
    eventually("the place is free", || {
        world.web.proxy.connection_counts().1 == 0
    })
    .await;
    let third = world.web.dial("10.77.0.2:8080").await.unwrap();
    assert_eq!(exchange(third, b"again").await.unwrap(), b"again");
}

#[tokio::test]
async fn a_drain_lets_connections_end_and_cuts_the_rest_at_the_deadline() {
    let mut world = World::new();
    let _peers = world.db.echo("0.0.0.0:8080");
    let mut stays = world.web.dial("10.77.0.2:8080").await.unwrap();
    let mut ends = world.web.dial("10.77.0.2:8080").await.unwrap();
    for stream in [&mut stays, &mut ends] {
        stream.write_all(b"ping").await.unwrap();
        soon(stream.read_exact(&mut [0; 4])).await.unwrap();
    }
    let proxy = world.web.proxy.clone();
    let drain = tokio::spawn(async move { proxy.drain(Duration::from_millis(700)).await });
    assert_eq!(exchange(ends, b"last words").await.unwrap(), b"last words");
    soon(drain).await.unwrap();
    let end = soon(stays.read(&mut [0; 4])).await;
    assert_eq!(end.unwrap_err().kind(), std::io::ErrorKind::ConnectionReset);
    world
        .logged(&[
            "direction=\"outbound\"",
            "error=\"closed due to connection drain\"",
        ])
        .await;
    assert_eq!(world.web.proxy.connection_counts(), (0, 0));
    assert!(
        world.web.dial("10.77.0.2:8080").await.is_err(),
        "nobody listens"
    );
    let cut = ["reporter=\"source\"", "response_flags=\"-\""];
    assert_eq!(
        world.web.metric("istio_tcp_connections_closed_total", &cut),
        2
    );
}

#[tokio::test]
async fn a_draining_server_lets_streams_end_and_stops_when_they_have() {
    let mut world = World::new();
    let _peers = world.db.echo("0.0.0.0:8080");
    let mut live = world.web.dial("10.77.0.2:8080").await.unwrap();
    live.write_all(b"ping").await.unwrap();
    soon(live.read_exact(&mut [0; 4])).await.unwrap();
    let proxy = world.db.proxy.clone();
    let drain = tokio::spawn(async move { proxy.drain(PATIENCE * 10).await });
    live.write_all(b"pong").await.unwrap();
    soon(live.read_exact(&mut [0; 4])).await.unwrap();
    assert!(!drain.is_finished());
    assert_eq!(exchange(live, b"bye").await.unwrap(), b"bye");
    soon(drain).await.unwrap();
    let line = world.logged(&["direction=\"inbound\"", "complete"]).await;
    assert!(!line.contains("error="), "{line}");
    assert_eq!(world.db.shared.telemetry.metrics.tunnels.get(), 0);
}

#[tokio::test]
async fn many_short_connections_share_a_tunnel_and_leave_nothing() {
    let world = World::new();
    let _peers = world.db.echo("0.0.0.0:8080");
    for n in 0..500_u32 {
        let stream = world.web.dial("10.77.0.2:8080").await.unwrap();
        let data = n.to_be_bytes();
        assert_eq!(exchange(stream, &data).await.unwrap(), data);
    }
    eventually("all are forgotten", || {
        let counts = |side: &super::testing::Side| side.proxy.connection_counts();
        counts(&world.web) == (0, 0) && counts(&world.db) == (0, 0)
    })
    .await;
    assert_eq!(world.db.shared.telemetry.metrics.tunnels.get(), 1);
    let opened = ["reporter=\"destination\""];
    assert_eq!(
        world
            .db
            .metric("istio_tcp_connections_opened_total", &opened),
        500
    );
    assert_eq!(world.db.metric("istio_tcp_sent_bytes_total", &opened), 2000);
    for side in [&world.web, &world.db] {
        side.proxy.cut().await;
    }
    eventually("the tunnel ends", || {
        world.web.proxy.pod.pool.size() == (0, 0)
    })
    .await;
    assert_eq!(world.web.shared.telemetry.metrics.panics.get(), 0);
}
