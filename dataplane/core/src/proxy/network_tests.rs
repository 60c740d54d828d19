//! Double HBONE: web's pod reaches db's through the gateway of another network.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use super::copy::{Counters, bidirectional};
use super::testing::{Settings, TestNetns, World, deny, eventually, exchange, record, soon};
use crate::config::Limits;
use crate::hbone::{Http2, Tunnel};
use crate::identity::Identity;
use crate::inpod::Netns;
use crate::state::fixture::{Push, gateway_at, gateway_named, member, pod, port, service};
use crate::tls::Credentials;
use crate::wire::workload as wds;
use crate::wire::workload::gateway_address::Destination;

const VIP: &str = "10.77.0.60:80";
const GATEWAY: &str = "10.79.0.2";
const DB: &str = "spiffe://cluster.local/ns/shop/sa/db-sa";

/// Terminates the outer tunnel, and passes what is inside on to the pod's own port, as east-west
/// gateways do. It lives in a namespace of its own.
struct Gateway {
    tunnels: Arc<AtomicUsize>,
    /// (authority, x-forwarded-network was there)
    requests: Arc<Mutex<Vec<(String, bool)>>>,
    _netns: TestNetns,
}

impl Gateway {
    async fn start(world: &World) -> Self {
        let test = TestNetns::new("gw");
        for (side, near, ours, far) in [
            (&world.web, "gw0", "10.79.0.2", "10.79.0.1"),
            (&world.db, "gw1", "10.80.0.1", "10.80.0.2"),
        ] {
            side.ip(&format!(
                "link add {near} type veth peer name {near} netns {}",
                test.name
            ));
            side.ip(&format!("addr add {far}/24 dev {near}"));
            side.ip(&format!("link set {near} up"));
            test.ip(&format!("addr add {ours}/24 dev {near}"));
            test.ip(&format!("link set {near} up"));
        }
        let netns = test.open();
        let identity = Identity::new("cluster.local", "infra", "eastwest-sa");
        let credentials = world.ca.credentials(&identity).await;
        let listener = netns.enter(|| std::net::TcpListener::bind((GATEWAY, 15008)));
        let listener = listener.unwrap().unwrap();
        listener.set_nonblocking(true).unwrap();
        let listener = TcpListener::from_std(listener).unwrap();
        let it = Self {
            tunnels: Arc::default(),
            requests: Arc::default(),
            _netns: test,
        };
        let config = world.db.shared.config.clone();
        let (tunnels, requests) = (it.tunnels.clone(), it.requests.clone());
        tokio::spawn(async move {
            while let Ok((tcp, _)) = listener.accept().await {
                tunnels.fetch_add(1, Ordering::SeqCst);
                let (netns, credentials) = (netns.clone(), credentials.clone());
                let (config, requests) = (config.clone(), requests.clone());
                tokio::spawn(async move {
                    Self::serve(tcp, &credentials, &netns, &config, &requests).await;
                });
            }
        });
        it
    }

    async fn serve(
        tcp: tokio::net::TcpStream,
        credentials: &Arc<Credentials>,
        netns: &Arc<Netns>,
        config: &crate::config::Config,
        requests: &Mutex<Vec<(String, bool)>>,
    ) {
        let limits = Limits::default();
        let tunnel = Tunnel::accept(tcp, credentials, &limits, &Http2::default()).await;
        let Ok(mut tunnel) = tunnel else { return };
        let dst: SocketAddr = "10.80.0.2:15008".parse().unwrap();
        while let Some(Ok((request, responder))) = tunnel.next().await {
            let forwarded = request.headers.contains_key("x-forwarded-network");
            let authority = request.authority.unwrap_or_default();
            requests.lock().unwrap().push((authority, forwarded));
            let server = netns.connect(config, dst, None).await.unwrap();
            let client = responder.accept(http::HeaderMap::new()).unwrap();
            tokio::spawn(async move {
                let _ = bidirectional(client, server, &Counters::default()).await;
            });
        }
    }
}

/// Web knows the service `store`, whose one endpoint is db in the network `far`.
async fn world(service_identity: &str) -> (World, Gateway) {
    let mut reference = gateway_at(GATEWAY, 15008);
    if let Some(Destination::Address(address)) = &mut reference.destination {
        address.network = "far".into();
    }
    world_behind(reference, service_identity).await
}

async fn world_behind(reference: wds::GatewayAddress, service_identity: &str) -> (World, Gateway) {
    let world = World::with(&Settings {
        db_network: Some("far"),
        ..Default::default()
    });
    let gateway = Gateway::start(&world).await;
    let mut store = service("shop", "store", "10.77.0.60");
    store.subject_alt_names = vec![service_identity.into()];
    let far = wds::Workload {
        network: "far".into(),
        ..record("db")
    };
    let seen_by_web = wds::Workload {
        addresses: Vec::new(),
        network_gateway: Some(reference),
        ..far.clone()
    };
    let eastwest = wds::Workload {
        network: "far".into(),
        ..pod("infra", "eastwest", GATEWAY)
    };
    let mut gateways = service("infra", "ew", "10.77.0.61");
    gateways.ports = vec![port(15008, 15008)];
    Push::addresses()
        .service(store.clone())
        .service(gateways.clone())
        .workload(member(seen_by_web, &store, &[]))
        .workload(member(eastwest, &gateways, &[]))
        .accepted_by(&world.web.shared.store);
    // Its node doesn't know web, which is in another network than it.
    Push::addresses()
        .removed(&record("web").uid)
        .service(store.clone())
        .workload(member(far, &store, &[]))
        .accepted_by(&world.db.shared.store);
    (world, gateway)
}

#[tokio::test]
async fn a_service_of_another_network_is_reached_through_its_gateway() {
    let (mut world, gateway) = world(DB).await;
    let peers = world.db.echo("0.0.0.0:8080");
    let mut live = Vec::new();
    for _ in 0..3 {
        let mut stream = world.web.dial(VIP).await.unwrap();
        stream.write_all(b"ping").await.unwrap();
        soon(stream.read_exact(&mut [0; 4])).await.unwrap();
        live.push(stream);
    }
    assert_eq!(peers.lock().unwrap()[0].ip().to_string(), "10.80.0.1");
    let listed = &world.web.proxy.connections()[0];
    assert_eq!(listed.protocol, "DOUBLEHBONE");
    assert_eq!(listed.dst_identity, DB);
    assert_eq!(listed.actual_dst, "10.79.0.2:15008");

    // The outer tunnel is shared, the inner ones are not.
    assert_eq!(gateway.tunnels.load(Ordering::SeqCst), 1);
    assert_eq!(world.db.shared.telemetry.metrics.tunnels.get(), 3);
    let requests = gateway.requests.lock().unwrap().clone();
    let authority = "store.shop.svc.cluster.local:80".to_owned();
    assert_eq!(requests, vec![(authority, false); 3]);

    for stream in live {
        assert_eq!(exchange(stream, b"bye").await.unwrap(), b"bye");
    }
    let out = world
        .logged(&["connection complete", "direction=\"outbound\""])
        .await;
    for part in [
        "dst.addr=10.79.0.2:15008 dst.hbone_addr=store.shop.svc.cluster.local:80",
        "dst.service=\"store.shop.svc.cluster.local\" dst.workload=\"db\"",
        "dst.identity=\"spiffe://cluster.local/ns/shop/sa/db-sa\"",
        "bytes_sent=7 bytes_recv=7",
    ] {
        assert!(out.contains(part), "{part}\nnot in\n{out}");
    }
    let inbound = world
        .logged(&["connection complete", "direction=\"inbound\""])
        .await;
    for part in [
        "src.addr=10.80.0.1:",
        "src.workload=\"web\" src.namespace=\"shop\"",
        "src.identity=\"spiffe://cluster.local/ns/shop/sa/web-sa\" src.cluster=\"c1\"",
        "dst.service=\"store.shop.svc.cluster.local\"",
    ] {
        assert!(inbound.contains(part), "{part}\nnot in\n{inbound}");
    }
    let labels = [
        "source_workload=\"web-deploy\"",
        "destination_workload=\"db-deploy\"",
    ];
    for side in [&world.web, &world.db] {
        assert_eq!(
            side.metric("istio_tcp_connections_closed_total", &labels),
            3
        );
    }
    eventually("inner tunnels end with their streams", || {
        world.db.shared.telemetry.metrics.tunnels.get() == 0
    })
    .await;
    assert_eq!(world.web.proxy.pod.pool.size(), (1, 0));
    soon(world.web.proxy.cut()).await;
}

#[tokio::test]
async fn the_gateway_may_be_named_by_its_service() {
    let reference = gateway_named("infra", "ew.infra.svc.cluster.local");
    let (world, gateway) = world_behind(reference, DB).await;
    let _peers = world.db.echo("0.0.0.0:8080");
    let stream = world.web.dial(VIP).await.unwrap();
    assert_eq!(exchange(stream, b"hello").await.unwrap(), b"hello");
    assert_eq!(gateway.tunnels.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn whoever_is_behind_the_gateway_must_be_one_of_the_service() {
    let (mut world, _gateway) = world("spiffe://cluster.local/ns/shop/sa/other").await;
    let peers = world.db.echo("0.0.0.0:8080");
    let stream = world.web.dial(VIP).await.unwrap();
    exchange(stream, b"secret").await.unwrap_err();
    world.logged(&["direction=\"outbound\"", "TLS: "]).await;
    let failed = world
        .web
        .metric("istio_tcp_connections_failed_total", &["TLS_FAILURE"]);
    assert_eq!(failed, 1);
    assert!(peers.lock().unwrap().is_empty());
    assert_eq!(
        world.web.proxy.pod.pool.size(),
        (1, 0),
        "the gateway itself is fine"
    );
}

#[tokio::test]
async fn the_far_ends_policy_refuses_through_the_gateway() {
    let (mut world, _gateway) = world(DB).await;
    let _peers = world.db.echo("0.0.0.0:8080");
    Push::policies()
        .policy(deny("no-web", "cluster.local/ns/shop/sa/web-sa"))
        .accepted_by(&world.db.shared.store);
    let stream = world.web.dial(VIP).await.unwrap();
    exchange(stream, b"hello").await.unwrap_err();
    world
        .logged(&["direction=\"outbound\"", "http status: 401"])
        .await;
    assert_eq!(
        world.web.plain_metric("underpass_endpoint_retries_total"),
        0
    );
}

#[tokio::test]
async fn cutting_the_pod_cuts_what_runs_through_the_gateway() {
    let (world, _gateway) = world(DB).await;
    let _peers = world.db.echo("0.0.0.0:8080");
    let mut stream = world.web.dial(VIP).await.unwrap();
    stream.write_all(b"ping").await.unwrap();
    soon(stream.read_exact(&mut [0; 4])).await.unwrap();
    soon(world.web.proxy.cut()).await;
    assert!(soon(stream.read(&mut [0; 1])).await.is_err());
    eventually("the far end forgets it", || {
        world.db.proxy.connections().is_empty()
    })
    .await;
}
