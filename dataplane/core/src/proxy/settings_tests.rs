//! Options of the configuration that change what applications and peers see.

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::baggage::BAGGAGE;
use super::error::Failed;
use super::testing::{Settings, World, exchange, record, soon};
use crate::hbone::{Connect, Connected, Key};
use crate::identity::Identity;
use crate::state::fixture::Push;
use crate::wire::{control as pb, workload as wds};

fn config(config: pb::InstanceConfig) -> Settings {
    Settings {
        config,
        ..Default::default()
    }
}

fn original_source(wanted: pb::OriginalSource) -> Settings {
    config(pb::InstanceConfig {
        original_source: wanted.into(),
        ..Default::default()
    })
}

/// A CONNECT from web's pod to db's, past web's own outbound side.
async fn connect(world: &World) -> Connected {
    let pod = &world.web.proxy.pod;
    let identity = |account| Identity::new("cluster.local", "shop", account);
    let source = identity("web-sa");
    let patience = std::time::Duration::from_secs(5);
    let credentials = world.web.shared.certs.get(&source, patience).await.unwrap();
    let key = Key {
        source,
        expected: [identity("db-sa")].into(),
        dst: "10.77.0.2:15008".parse().unwrap(),
        owner: record("db").uid.into(),
        from: None,
    };
    let connect = Connect {
        authority: "10.77.0.2:8080".to_owned(),
        headers: http::HeaderMap::new(),
    };
    soon(pod.pool.connect(key, &credentials, connect))
        .await
        .expect("accepted")
}

#[tokio::test]
async fn a_client_address_that_cannot_be_shown_is_counted_or_refused() {
    let lost = "underpass_original_source_lost_total";
    let dst = "10.77.0.2:8080".parse().unwrap();
    // Of the other family: no socket can have both.
    let source = Some("fd77::1".parse().unwrap());

    let mut world = World::with(&original_source(pb::OriginalSource::Auto));
    let peers = world.db.echo("0.0.0.0:8080");
    let pod = world.db.proxy.pod.clone();
    let stream = pod.connect(dst, source).await.expect("without it");
    exchange(stream, b"hello").await.unwrap();
    assert_eq!(peers.lock().unwrap()[0].ip().to_string(), "10.77.0.2");
    assert_eq!(world.db.plain_metric(lost), 1);
    world
        .logged(&["instead of the client's", "as fd77::1"])
        .await;

    let world = World::with(&original_source(pb::OriginalSource::Must));
    let _peers = world.db.echo("0.0.0.0:8080");
    let refused = world.db.proxy.pod.connect(dst, source).await;
    let error = refused.expect_err("it must be kept");
    assert!(matches!(error, Failed::Connect(..)), "{error}");
    assert!(error.to_string().contains("as fd77::1"), "{error}");
    assert_eq!(world.db.plain_metric(lost), 0);
}

#[tokio::test]
async fn without_original_source_the_app_sees_its_own_pod() {
    let world = World::with(&original_source(pb::OriginalSource::Never));
    let peers = world.db.echo("0.0.0.0:8080");
    let stream = world.web.dial("10.77.0.2:8080").await.unwrap();
    assert_eq!(exchange(stream, b"hello").await.unwrap(), b"hello");
    assert_eq!(peers.lock().unwrap()[0].ip().to_string(), "10.77.0.2");
    let lost = world
        .db
        .plain_metric("underpass_original_source_lost_total");
    assert_eq!(lost, 0, "it wasn't wanted");
}

#[tokio::test]
async fn without_the_local_app_tunnel_the_proxy_header_goes_to_the_pods_address() {
    let world = World::with(&config(pb::InstanceConfig {
        localhost_app_tunnel_off: true,
        ..Default::default()
    }));
    let peers = world.db.echo("10.77.0.2:9000");
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
    let stream = world.web.dial("10.77.0.2:8080").await.unwrap();
    let got = exchange(stream, b"hello").await.unwrap();
    assert!(got.starts_with(b"\r\n\r\n\0\r\nQUIT\n\x21"), "{got:?}");
    assert!(got.ends_with(b"hello"));
    assert_eq!(peers.lock().unwrap()[0].ip().to_string(), "10.77.0.1");
}

#[tokio::test]
async fn the_answer_carries_baggage_unless_it_is_off() {
    for off in [false, true] {
        let world = World::with(&config(pb::InstanceConfig {
            response_baggage_off: off,
            ..Default::default()
        }));
        let _peers = world.db.echo("0.0.0.0:8080");
        let mut connected = connect(&world).await;
        let baggage = connected.headers.get(BAGGAGE);
        let told = baggage.is_some_and(|b| b.to_str().unwrap().contains("service.name=db"));
        assert_eq!(told, !off);
        connected.stream.write_all(b"ping").await.unwrap();
        soon(connected.stream.read_exact(&mut [0; 4]))
            .await
            .unwrap();
    }
}
