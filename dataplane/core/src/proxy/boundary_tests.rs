//! What must hold where the proxies meet an application or a peer that is not what it was.

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::testing::{Settings, World, eventually, exchange, record, soon};
use crate::state::fixture::{Push, gateway_at, service};
use crate::wire::workload as wds;

#[tokio::test]
async fn connections_end_when_the_address_gets_another_owner() {
    let mut world = World::new();
    let _peers = world.db.echo("0.0.0.0:8080");
    let mut stream = world.web.dial("10.77.0.2:8080").await.unwrap();
    stream.write_all(b"ping").await.unwrap();
    soon(stream.read_exact(&mut [0; 4])).await.unwrap();

    // Leaving alone ends nothing: it may finish what it has begun.
    let db = record("db");
    let leaves = Push::addresses().removed(&db.uid);
    leaves.accepted_by(&world.web.shared.store);
    stream.write_all(b"ping").await.unwrap();
    soon(stream.read_exact(&mut [0; 4])).await.unwrap();

    let next = wds::Workload {
        uid: "c//Pod/shop/db-next".into(),
        name: "db-next".into(),
        ..db
    };
    Push::addresses()
        .workload(next)
        .accepted_by(&world.web.shared.store);
    let end = soon(stream.read(&mut [0; 4])).await.unwrap_err();
    assert_eq!(end.kind(), std::io::ErrorKind::ConnectionReset);
    let why = "10.77.0.2:15008: the address belongs to another workload now";
    world
        .logged(&["direction=\"outbound\"", "src.workload=\"web\"", why])
        .await;
    let failed = world
        .web
        .metric("istio_tcp_connections_failed_total", &["MID_STREAM"]);
    assert_eq!(failed, 1, "neither a good end nor a failure to connect");
    eventually("no tunnel is left", || {
        world.db.proxy.connections().is_empty()
    })
    .await;
}

#[tokio::test]
async fn an_application_that_asks_for_it_gets_a_proxy_header_on_loopback() {
    for (bind, dst, client) in [
        ("127.0.0.1:9000", "10.77.0.2:8080", "10.77.0.1"),
        ("[::1]:9000", "[fd77::2]:8080", "fd77::1"),
    ] {
        let world = World::new();
        let peers = world.db.echo(bind);
        let tunnel = wds::ApplicationTunnel {
            protocol: wds::application_tunnel::Protocol::Proxy.into(),
            port: 9000,
        };
        let db = wds::Workload {
            application_tunnel: Some(tunnel),
            ..record("db")
        };
        Push::addresses()
            .workload(db)
            .accepted_by(&world.db.shared.store);
        let stream = world.web.dial(dst).await.unwrap();
        let got = exchange(stream, b"hello").await.unwrap();
        assert!(peers.lock().unwrap()[0].ip().is_loopback());
        assert!(got.starts_with(b"\r\n\r\n\0\r\nQUIT\n\x21"), "{got:?}");
        let contains = |part: &[u8]| got.windows(part.len()).any(|window| window == part);
        let octets = |ip: &str| crate::state::fixture::ip(ip);
        let host = dst.rsplit_once(':').unwrap().0.trim_matches(['[', ']']);
        assert!(
            contains(&[octets(client), octets(host)].concat()),
            "{got:?}"
        );
        assert!(contains(b"spiffe://cluster.local/ns/shop/sa/web-sa"));
        assert!(got.ends_with(b"hello"));
    }
}

#[tokio::test]
async fn addresses_of_refused_peers_are_logged_as_they_are_known() {
    let mut world = World::new();
    let dst = "10.77.0.2:15008".parse().unwrap();
    let netns = &world.web.netns;
    let stream = netns.connect(&world.web.shared.config, dst, None).await;
    let _ = exchange(stream.unwrap(), b"no TLS at all").await;
    let line = world.logged(&["connection failed", "inbound", "TLS"]).await;
    assert!(!line.contains("ffff"), "{line}");
    assert!(line.contains("error=\"10.77.0.1:"), "{line}");
}

#[tokio::test]
async fn a_waypoint_is_told_which_service_was_called() {
    let world = World::new();
    let _peers = world.db.echo("127.0.0.1:9000");
    let proxy = wds::application_tunnel::Protocol::Proxy.into();
    let waypoint = wds::Workload {
        application_tunnel: Some(wds::ApplicationTunnel {
            protocol: proxy,
            port: 9000,
        }),
        ..record("db")
    };
    let mut store = service("shop", "store", "10.77.0.50");
    store.waypoint = Some(gateway_at("10.77.0.2", 15008));
    for side in [&world.web, &world.db] {
        Push::addresses()
            .service(store.clone())
            .workload(waypoint.clone())
            .accepted_by(&side.shared.store);
    }
    let stream = world.web.dial("10.77.0.50:80").await.unwrap();
    let got = exchange(stream, b"hello").await.unwrap();
    let name = b"store.shop.svc.cluster.local";
    let tlv = [&[0xd1, 0, name.len() as u8], &name[..]].concat();
    assert!(got.windows(tlv.len()).any(|w| w == tlv), "{got:?}");
    let identity = b"spiffe://cluster.local/ns/shop/sa/web-sa";
    let tlv = [&[0xd0, 0, identity.len() as u8], &identity[..]].concat();
    assert!(got.windows(tlv.len()).any(|w| w == tlv), "{got:?}");
    assert!(got.ends_with(b"hello"));
}

#[tokio::test]
async fn the_agents_own_workload_serves_its_port_alone_and_from_its_own_address() {
    let mut world = World::with(&Settings {
        db_only_ports: vec![15020],
        ..Default::default()
    });
    let peers = world.db.echo("[::]:15020");
    let _others = world.db.echo("[::]:8080");
    for (dst, own) in [
        ("10.77.0.2:15020", "10.77.0.2"),
        ("[fd77::2]:15020", "fd77::2"),
    ] {
        let stream = world.web.dial(dst).await.unwrap();
        assert_eq!(exchange(stream, b"metrics").await.unwrap(), b"metrics");
        let seen = peers.lock().unwrap().pop().expect("it was asked");
        assert_eq!(
            seen.ip().to_canonical(),
            own.parse::<std::net::IpAddr>().unwrap()
        );
    }
    let other = world.web.dial("10.77.0.2:8080").await.unwrap();
    exchange(other, b"other").await.expect_err("reset");
    world
        .logged(&["port 8080 of the agent's own workload isn't served"])
        .await;
}
