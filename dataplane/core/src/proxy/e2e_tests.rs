//! The proxies of two nodes against each other, with real namespaces, redirection and certificates.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::connection::{Checked, Direction, Facts, Open, Protocol};
use super::pod::Pod;
use super::testing::{World, deny, eventually, exchange, record, soon};
use super::traceparent::Trace;
use crate::identity::Identity;
use crate::policy::Subject;
use crate::state::Workload;
use crate::state::fixture::Push;
use crate::telemetry::{Labels, Reporter, Side};
use crate::tls::testing::Ca;
use crate::wire::security::Scope;

const WEB: &str = "cluster.local/ns/shop/sa/web-sa";

#[tokio::test]
async fn bytes_cross_the_tunnel_and_the_app_sees_the_clients_address() {
    for (bind, dst, client) in [
        ("0.0.0.0:8080", "10.77.0.2:8080", "10.77.0.1"),
        ("[::]:8080", "[fd77::2]:8080", "fd77::1"),
    ] {
        let mut world = World::new();
        let peers = world.db.echo(bind);
        let answer = exchange(world.web.dial(dst).await.unwrap(), b"hello")
            .await
            .unwrap();
        assert_eq!(answer, b"hello");
        assert_eq!(peers.lock().unwrap()[0].ip().to_string(), client);

        let hbone = dst.replace("8080", "15008");
        let out = world
            .logged(&["connection complete", "direction=\"outbound\""])
            .await;
        for part in [
            "info\taccess:outbound{id=",
            "src.workload=\"web\" src.namespace=\"shop\"",
            "src.identity=\"spiffe://cluster.local/ns/shop/sa/web-sa\" src.cluster=\"c1\"",
            &format!("dst.addr={hbone} dst.hbone_addr={dst} dst.workload=\"db\""),
            "dst.identity=\"spiffe://cluster.local/ns/shop/sa/db-sa\"",
            "bytes_sent=5 bytes_recv=5",
        ] {
            assert!(out.contains(part), "{part}\nnot in\n{out}");
        }
        let inbound = world
            .logged(&["connection complete", "direction=\"inbound\""])
            .await;
        for part in [
            &format!("dst.addr={hbone} dst.hbone_addr={dst}"),
            "src.workload=\"web\"",
            "bytes_sent=5 bytes_recv=5",
        ] {
            assert!(inbound.contains(part), "{part}\nnot in\n{inbound}");
        }
        let id = |line: &str| line.split("{id=").nth(1).unwrap()[..32].to_owned();
        assert_eq!(id(&out), id(&inbound), "both ends log the same trace");

        for (side, reporter) in [(&world.web, "source"), (&world.db, "destination")] {
            let labels = [
                &*format!("reporter=\"{reporter}\""),
                "source_workload=\"web-deploy\"",
                "source_principal=\"spiffe://cluster.local/ns/shop/sa/web-sa\"",
                "destination_workload=\"db-deploy\"",
                "connection_security_policy=\"mutual_tls\"",
                "response_flags=\"-\"",
            ];
            let count = |name: &str| side.metric(name, &labels);
            assert_eq!(count("istio_tcp_connections_opened_total"), 1);
            assert_eq!(count("istio_tcp_connections_closed_total"), 1);
            assert_eq!(count("istio_tcp_received_bytes_total"), 5);
            assert_eq!(count("istio_tcp_sent_bytes_total"), 5);
            assert_eq!(count("istio_tcp_connections_failed_total"), 0);
        }
    }
}

#[tokio::test]
async fn a_live_connection_is_listed_with_its_bytes() {
    let world = World::new();
    let _peers = world.db.echo("0.0.0.0:8080");
    let mut stream = world.web.dial("10.77.0.2:8080").await.unwrap();
    stream.write_all(b"ping").await.unwrap();
    soon(stream.read_exact(&mut [0; 4])).await.unwrap();
    assert_eq!(world.web.proxy.connection_counts(), (0, 1));
    assert_eq!(world.db.proxy.connection_counts(), (1, 0));
    let listed = &world.db.proxy.connections()[0];
    assert_eq!(listed.pod_uid, "uid-db");
    assert_eq!(listed.actual_dst, "10.77.0.2:8080");
    assert_eq!(
        listed.src_identity,
        "spiffe://cluster.local/ns/shop/sa/web-sa"
    );
    assert_eq!((listed.bytes_received, listed.bytes_sent), (4, 4));
    assert_eq!(listed.protocol, "HBONE");
    let sent = world
        .web
        .metric("istio_tcp_sent_bytes_total", &["reporter=\"source\""]);
    assert_eq!(sent, 4, "bytes count while the connection lives");
    drop(stream);
    eventually("both forget it", || {
        world.web.proxy.connections().is_empty() && world.db.proxy.connections().is_empty()
    })
    .await;
}

#[tokio::test]
async fn a_denied_identity_gets_401_and_the_policy_is_named() {
    let mut world = World::new();
    let _peers = world.db.echo("0.0.0.0:8080");
    Push::policies()
        .policy(deny("no-web", WEB))
        .accepted_by(&world.db.shared.store);
    let stream = world.web.dial("10.77.0.2:8080").await.unwrap();
    let error = exchange(stream, b"hello").await.unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    let line = world.logged(&["direction=\"inbound\"", "error="]).await;
    assert!(line.contains("error\taccess:inbound"), "{line}");
    assert!(line.contains("policy=\"shop/no-web\""), "{line}");
    world
        .logged(&["direction=\"outbound\"", "http status: 401"])
        .await;
    let denied = ["reporter=\"destination\"", "response_flags=\"DENY\""];
    assert_eq!(
        world
            .db
            .metric("istio_tcp_connections_failed_total", &denied),
        1
    );
    let verdict = ["policy=\"shop/no-web\"", "verdict=\"deny\""];
    assert_eq!(
        world.db.metric("underpass_policy_verdicts_total", &verdict),
        1
    );
}

#[tokio::test]
async fn a_later_policy_closes_a_live_connection_and_a_dry_run_does_not() {
    let mut world = World::new();
    let _peers = world.db.echo("0.0.0.0:8080");
    let mut dry = deny("dry", WEB);
    dry.dry_run = true;
    Push::policies()
        .policy(dry)
        .accepted_by(&world.db.shared.store);
    let mut stream = world.web.dial("10.77.0.2:8080").await.unwrap();
    stream.write_all(b"ping").await.unwrap();
    soon(stream.read_exact(&mut [0; 4])).await.unwrap();
    world.logged(&["dry run", "policy=\"shop/dry\""]).await;
    assert_eq!(
        world
            .db
            .metric("underpass_policy_dry_run_total", &["shop/dry"]),
        1
    );

    Push::policies()
        .policy(deny("late", WEB))
        .accepted_by(&world.db.shared.store);
    let end = soon(stream.read(&mut [0; 4])).await.unwrap_err();
    assert_eq!(end.kind(), std::io::ErrorKind::ConnectionReset);
    let line = world
        .logged(&["direction=\"inbound\"", "error=\"closed: policy"])
        .await;
    assert!(line.contains("policy=\"shop/late\""), "{line}");
    assert!(line.contains("bytes_sent=4 bytes_recv=4"), "{line}");
    assert_eq!(world.db.proxy.connection_counts(), (0, 0));
    let denied = ["response_flags=\"DENY\""];
    assert_eq!(
        world
            .db
            .metric("istio_tcp_connections_closed_total", &denied),
        1
    );
}

#[tokio::test]
async fn a_policy_taken_back_before_its_workload_unlists_it_closes_nothing() {
    let mut world = World::new();
    let _peers = world.db.echo("0.0.0.0:8080");
    let store = world.db.shared.store.clone();
    let mut old = deny("old", "spiffe://cluster.local/ns/shop/sa/nobody");
    old.scope = Scope::WorkloadSelector.into();
    Push::policies().policy(old).accepted_by(&store);
    let mut db = record("db");
    db.authorization_policies = vec!["shop/old".into()];
    Push::addresses().workload(db).accepted_by(&store);
    let mut stream = world.web.dial("10.77.0.2:8080").await.unwrap();
    let mut echo = async || {
        stream.write_all(b"ping").await.unwrap();
        soon(stream.read_exact(&mut [0; 4])).await.unwrap();
    };
    echo().await;

    // Two responses, as control planes send them; in between nobody new is let in.
    Push::policies().removed("shop/old").to(&store);
    let mut refused = world.web.dial("10.77.0.2:8080").await.unwrap();
    soon(refused.read(&mut [0; 4])).await.unwrap_err();
    world
        .logged(&["direction=\"inbound\"", "hasn't arrived"])
        .await;
    echo().await;
    Push::addresses().workload(record("db")).accepted_by(&store);
    let mut another = world.web.dial("10.77.0.2:8080").await.unwrap();
    another.write_all(b"ping").await.unwrap();
    soon(another.read_exact(&mut [0; 4])).await.unwrap();
    echo().await;
}

#[tokio::test]
async fn a_workload_that_begins_to_list_a_missing_policy_closes_live_connections() {
    let mut world = World::new();
    let _peers = world.db.echo("0.0.0.0:8080");
    let mut stream = world.web.dial("10.77.0.2:8080").await.unwrap();
    stream.write_all(b"ping").await.unwrap();
    soon(stream.read_exact(&mut [0; 4])).await.unwrap();
    let mut db = record("db");
    db.authorization_policies = vec!["shop/to-come".into()];
    Push::addresses()
        .workload(db)
        .accepted_by(&world.db.shared.store);
    world
        .logged(&[
            "direction=\"inbound\"",
            "closed: ",
            "policy=\"shop/to-come\"",
        ])
        .await;
}

#[tokio::test]
async fn plaintext_is_led_to_the_app_or_reset_by_policy() {
    let mut world = World::new();
    let peers = world.db.echo("0.0.0.0:8080");
    let dst = "10.77.0.2:8080".parse().unwrap();
    // The proxy's own mark: not captured on its side.
    let plain = || world.web.netns.connect(&world.web.shared.config, dst, None);
    let answer = exchange(plain().await.unwrap(), b"hello").await.unwrap();
    assert_eq!(answer, b"hello");
    assert_eq!(peers.lock().unwrap()[0].ip().to_string(), "10.77.0.1");
    let mut strict = deny("strict", WEB);
    let matches = &mut strict.rules[0].clauses[0].matches[0];
    matches.not_principals = std::mem::take(&mut matches.principals);
    Push::policies()
        .policy(strict)
        .accepted_by(&world.db.shared.store);
    let error = exchange(plain().await.unwrap(), b"hello")
        .await
        .unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    let line = world.logged(&["direction=\"inbound\"", "error="]).await;
    assert!(line.contains("dst.addr=10.77.0.2:8080"), "{line}");
    assert!(!line.contains("src.identity"), "{line}");
    let plain = [
        "connection_security_policy=\"unknown\"",
        "response_flags=\"DENY\"",
    ];
    assert_eq!(
        world
            .db
            .metric("istio_tcp_connections_closed_total", &plain),
        1
    );
}

#[tokio::test]
async fn direct_calls_to_the_listeners_are_refused() {
    let mut world = World::new();
    // The app itself calls its own proxy, and a remote client does.
    for (from, dst) in [
        (&world.web, "127.0.0.1:15001"),
        (&world.web, "10.77.0.1:15001"),
        (&world.web, "10.77.0.1:15006"),
        (&world.web, "10.77.0.2:15001"),
        (&world.web, "10.77.0.2:15006"),
    ] {
        let result = match from.dial(dst).await {
            Ok(stream) => exchange(stream, b"x").await,
            Err(error) => Err(error),
        };
        let error = result.expect_err(dst);
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "{dst}");
    }
    // Past the redirection, as with a mark of its own.
    let dst = "10.77.0.2:15001".parse().unwrap();
    let stream = world
        .web
        .netns
        .connect(&world.web.shared.config, dst, None)
        .await;
    assert!(exchange(stream.unwrap(), b"x").await.is_err());
    world
        .logged(&["warn\taccess\tconnection failed", "15001"])
        .await;
    assert!(
        world.web.metric(
            "underpass_refusals_total",
            &["reason=\"no_original_destination\""]
        ) >= 3
    );
    assert_eq!(world.web.proxy.connection_counts().0, 0);
}

#[tokio::test]
async fn much_data_crosses_the_tunnel_whole_and_the_server_may_speak_first() {
    const LENGTH: usize = 12 << 20;
    let world = World::new();
    let _peers = world.db.echo("0.0.0.0:8080");
    let data: Vec<u8> = (0..LENGTH).map(|n| ((n * 31) >> 3) as u8).collect();
    let (mut read, mut write) = {
        let stream = world.web.dial("10.77.0.2:8080").await.unwrap();
        stream.into_split()
    };
    let expected = data.clone();
    let send = tokio::spawn(async move {
        write.write_all(&data).await.unwrap();
        write.shutdown().await.unwrap();
    });
    let mut got = Vec::new();
    soon(read.read_to_end(&mut got)).await.unwrap();
    assert!(got == expected, "bytes changed on the way");
    send.await.unwrap();
    let received = world
        .db
        .metric("istio_tcp_received_bytes_total", &["destination"]);
    assert_eq!(received, LENGTH as u64);

    let greeter = world
        .db
        .netns
        .enter(|| std::net::TcpListener::bind("0.0.0.0:25"));
    let greeter = greeter.unwrap().unwrap();
    greeter.set_nonblocking(true).unwrap();
    let greeter = tokio::net::TcpListener::from_std(greeter).unwrap();
    let mut client = world.web.dial("10.77.0.2:25").await.unwrap();
    let (mut server, _) = soon(greeter.accept()).await.unwrap();
    server.write_all(b"220 hello").await.unwrap();
    let mut greeting = [0; 9];
    soon(client.read_exact(&mut greeting)).await.unwrap();
    assert_eq!(&greeting, b"220 hello");
}

#[tokio::test]
async fn a_destination_nobody_knows_is_plain_tcp() {
    let mut world = World::new();
    world.db.ip("addr add 10.77.0.3/24 dev eth0");
    let peers = world.db.echo("10.77.0.3:8080");
    let stream = world.web.dial("10.77.0.3:8080").await.unwrap();
    assert_eq!(exchange(stream, b"hello").await.unwrap(), b"hello");
    assert_eq!(peers.lock().unwrap()[0].ip().to_string(), "10.77.0.1");
    let line = world
        .logged(&["direction=\"outbound\"", "connection complete"])
        .await;
    assert!(line.contains("dst.addr=10.77.0.3:8080 direction"), "{line}");
    let labels = ["reporter=\"source\"", "destination_workload=\"unknown\""];
    let sent = world.web.metric("istio_tcp_sent_bytes_total", &labels);
    assert_eq!(sent, 5);
}

#[tokio::test]
async fn a_server_that_refuses_shows_as_connect_failure_on_both_sides() {
    let mut world = World::new();
    let stream = world.web.dial("10.77.0.2:8080").await.unwrap();
    exchange(stream, b"x").await.unwrap_err();
    world
        .logged(&["direction=\"outbound\"", "http status: 503"])
        .await;
    let inbound = world.logged(&["direction=\"inbound\"", "error="]).await;
    assert!(
        inbound.contains("10.77.0.2:8080: Connection refused"),
        "{inbound}"
    );
    for side in [&world.web, &world.db] {
        let failed = side.metric("istio_tcp_connections_failed_total", &["\"CONNECT\""]);
        assert_eq!(failed, 1);
    }
}

#[tokio::test]
async fn a_peer_of_another_ca_shows_as_tls_failure() {
    let mut world = World::new();
    let identity = Identity::new("cluster.local", "shop", "db-sa");
    Ca::new("other").install(&world.db.shared.certs, &identity);
    let stream = world.web.dial("10.77.0.2:8080").await.unwrap();
    exchange(stream, b"x").await.unwrap_err();
    world
        .logged(&["direction=\"outbound\"", "10.77.0.2:15008: TLS"])
        .await;
    let failed = world
        .web
        .metric("istio_tcp_connections_failed_total", &["TLS_FAILURE"]);
    assert_eq!(failed, 1);
    world
        .logged(&["warn\taccess\tconnection failed", "direction=\"inbound\""])
        .await;
    let refused = world
        .db
        .metric("underpass_refusals_total", &["reason=\"handshake\""]);
    assert_eq!(refused, 1);
}

#[tokio::test]
async fn a_pod_without_a_record_or_certificate_is_refused_with_the_reason() {
    let mut world = World::new();
    let limits = crate::config::Limits {
        workload_wait: Duration::from_millis(50),
        ..Default::default()
    };
    world.web.shared.limits.store(limits.into());
    let mut other = record("web");
    other.service_account = "new-sa".into();
    Push::addresses()
        .workload(other)
        .accepted_by(&world.web.shared.store);
    let stream = world.web.dial("10.77.0.2:8080").await.unwrap();
    exchange(stream, b"x").await.unwrap_err();
    world
        .logged(&["connection failed", "hasn't arrived from the control plane"])
        .await;
    let refused = world
        .web
        .metric("underpass_refusals_total", &["unknown_own_workload"]);
    assert_eq!(refused, 1);
}

#[tokio::test]
async fn a_reset_crosses_the_tunnel_as_a_reset_both_ways() {
    let mut world = World::new();
    let app = world
        .db
        .netns
        .enter(|| std::net::TcpListener::bind("0.0.0.0:25"));
    let app = app.unwrap().unwrap();
    app.set_nonblocking(true).unwrap();
    let app = tokio::net::TcpListener::from_std(app).unwrap();
    for server_resets in [true, false] {
        let mut client = world.web.dial("10.77.0.2:25").await.unwrap();
        let (mut server, _) = soon(app.accept()).await.unwrap();
        server.write_all(b"half an ans").await.unwrap();
        soon(client.read_exact(&mut [0; 11])).await.unwrap();
        let (gone, mut left) = if server_resets {
            (server, client)
        } else {
            (client, server)
        };
        gone.set_zero_linger().unwrap();
        drop(gone);
        let error = soon(left.read(&mut [0; 8])).await.unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    }
    // What peers do isn't our failure.
    let line = world.logged(&["direction=\"outbound\"", "complete"]).await;
    assert!(!line.contains("error="), "{line}");
}

#[tokio::test]
async fn ten_thousand_live_connections_are_asked_again_without_a_stall() {
    let world = World::new();
    let pod = world.db.proxy.pod.clone();
    let own = pod.find_own(&pod.shared.store.snapshot()).unwrap();
    let open: Vec<_> = (0..10_000_u32)
        .map(|n| fake_inbound(&pod, &own, if n % 2 == 0 { "web-sa" } else { "api-sa" }))
        .collect();
    assert_eq!(world.db.proxy.connection_counts().0, 10_000);
    let stalls = tokio::spawn(async {
        let mut longest = Duration::ZERO;
        for _ in 0..200 {
            let begin = tokio::time::Instant::now();
            tokio::task::yield_now().await;
            longest = longest.max(begin.elapsed());
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        longest
    });
    Push::policies()
        .policy(deny("late", WEB))
        .accepted_by(&world.db.shared.store);
    for (n, open) in open.iter().enumerate() {
        if n % 2 == 0 {
            soon(open.connection.denied()).await;
        }
    }
    let denied = ["policy=\"shop/late\"", "verdict=\"deny\""];
    assert_eq!(
        world.db.metric("underpass_policy_verdicts_total", &denied),
        5_000
    );
    let longest = stalls.await.unwrap();
    // An unoptimised build on a busy machine; a whole pass takes many times that.
    assert!(longest < Duration::from_millis(100), "{longest:?}");
}

fn fake_inbound(pod: &Pod, own: &Arc<Workload>, account: &str) -> Open {
    let identity = Some(Identity::new("cluster.local", "shop", account));
    let src = "10.77.0.1:1000".parse().unwrap();
    let dst = "10.77.0.2:8080".parse().unwrap();
    let labels = Labels {
        reporter: Reporter::Destination,
        source: Side::default(),
        destination: Side::default(),
        service: None,
        mtls: true,
    };
    let subject = Subject {
        identity,
        source: "10.77.0.1".parse().unwrap(),
        dst,
    };
    let facts = Facts {
        direction: Direction::Inbound,
        trace: Trace::random(),
        began: Instant::now(),
        src,
        src_pod: Arc::default(),
        original_dst: None,
        dst,
        log_dst: dst,
        authority: None,
        dst_pod: Arc::default(),
        protocol: Protocol::Hbone,
        checked: Some(Checked {
            subject,
            own: own.clone(),
        }),
    };
    pod.open(facts, labels)
}
