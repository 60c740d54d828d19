//! How connections are bounded in number, and how all of them end.

use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::testing::{PATIENCE, Settings, World, eventually, exchange, soon};

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
    let drain = tokio::spawn(async move {
        proxy
            .drain(tokio::time::sleep(Duration::from_millis(700)))
            .await
    });
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
    let drain = tokio::spawn(async move { proxy.drain(tokio::time::sleep(PATIENCE * 10)).await });
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

#[tokio::test]
async fn a_pod_that_holds_most_sockets_is_refused_more_and_keeps_what_it_has() {
    let world = World::with(&Settings {
        descriptors: Some(16),
        ..Default::default()
    });
    let _peers = world.db.echo("0.0.0.0:8080");
    // The tunnel and eleven streams at the destination are three quarters.
    let mut live = Vec::new();
    for _ in 0..11 {
        let mut stream = world.web.dial("10.77.0.2:8080").await.unwrap();
        stream.write_all(b"ping").await.unwrap();
        soon(stream.read_exact(&mut [0; 4])).await.unwrap();
        live.push(stream);
    }
    let more = world.web.dial("10.77.0.2:8080").await.unwrap();
    exchange(more, b"x").await.unwrap_err();
    let refused = |side: &super::testing::Side| {
        side.metric("underpass_refusals_total", &["\"too_many_sockets\""])
    };
    assert_eq!(refused(&world.web) + refused(&world.db), 1);
    for stream in &mut live {
        stream.write_all(b"pong").await.unwrap();
        soon(stream.read_exact(&mut [0; 4])).await.unwrap();
    }
    live.pop();
    eventually("places are free", || {
        let counts = |side: &super::testing::Side| side.proxy.connection_counts();
        counts(&world.web).1 == 10 && counts(&world.db).0 == 10
    })
    .await;
    let again = world.web.dial("10.77.0.2:8080").await.unwrap();
    assert_eq!(exchange(again, b"again").await.unwrap(), b"again");
}

#[tokio::test]
async fn handshakes_over_the_limit_are_closed_at_once_and_counted() {
    let mut world = World::new();
    let _peers = world.db.echo("0.0.0.0:8080");
    let limits = crate::config::Limits {
        pod_max_handshakes: 4,
        tls_handshake_timeout: Duration::from_secs(3),
        ..Default::default()
    };
    world.db.shared.limits.store(limits.into());
    let dst = "10.77.0.2:15008".parse().unwrap();
    let mut silent = Vec::new();
    for _ in 0..12 {
        let config = &world.web.shared.config;
        // Some are reset before they know that they were connected.
        if let Ok(stream) = world.web.netns.connect(config, dst, None).await {
            silent.push(stream);
        }
    }
    let closed = || {
        world
            .db
            .metric("underpass_refusals_total", &["\"too_many_handshakes\""])
    };
    eventually("eight of twelve are refused", || closed() == 8).await;
    for stream in &mut silent[4..] {
        assert!(soon(stream.read(&mut [0; 1])).await.is_err(), "reset");
    }
    world.logged(&["limit pod_max_handshakes"]).await;
    // Those in flight run into their own time limit; then everybody is served again.
    for stream in &mut silent[..4] {
        assert_eq!(soon(stream.read(&mut [0; 1])).await.unwrap_or(0), 0);
    }
    world.logged(&["TLS handshake not answered after 3s"]).await;
    let stream = world.web.dial("10.77.0.2:8080").await.unwrap();
    assert_eq!(exchange(stream, b"hello").await.unwrap(), b"hello");
}
