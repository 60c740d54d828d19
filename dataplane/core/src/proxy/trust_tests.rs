//! Revocation as both ends of a connection see it: who is refused, who is cut, and how it is told.

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::testing::{Side, World, deny, eventually, exchange, record, soon};
use crate::identity::Identity;
use crate::state::fixture::Push;
use crate::tls::Trust;
use crate::tls::testing::Ca;
use crate::wire::control as pb;

/// A world whose certificates come from `ca`; with their serial numbers (web's, db's).
fn world() -> (World, Ca, u64, u64) {
    let (world, ca) = (World::new(), Ca::new("mesh"));
    let install = |side: &Side, account: &str| {
        ca.install(
            &side.shared.certs,
            &Identity::new("cluster.local", "shop", account),
        );
        ca.last_serial()
    };
    let web = install(&world.web, "web-sa");
    let db = install(&world.db, "db-sa");
    (world, ca, web, db)
}

async fn revoke(side: &Side, ca: &Ca, serial: u64) -> usize {
    let raw = pb::SetTrust {
        crl: ca.crl(&[serial]).into(),
        ..Default::default()
    };
    let trust = Trust::parse(&raw).expect("readable");
    soon(side.shared.certs.set_trust(trust)).await
}

/// A connection on which bytes have gone both ways.
async fn talking(world: &World) -> TcpStream {
    world.db.echo("0.0.0.0:8080");
    let mut stream = world.web.dial("10.77.0.2:8080").await.expect("captured");
    stream.write_all(b"x").await.expect("open");
    soon(stream.read_u8()).await.expect("an echo");
    stream
}

async fn ends(mut stream: TcpStream) {
    let end = soon(stream.read(&mut [0])).await;
    assert!(!matches!(end, Ok(1..)), "still open: {end:?}");
}

fn rejections(side: &Side, reporter: &str) -> u64 {
    let label = format!("reporter=\"{reporter}\"");
    side.metric("istio_crl_policy_rejections_total", &[&label])
}

#[tokio::test]
async fn a_revoked_client_is_refused_by_the_server() {
    let (mut world, ca, web, _) = world();
    world.db.echo("0.0.0.0:8080");
    revoke(&world.db, &ca, web).await;
    let stream = world.web.dial("10.77.0.2:8080").await.unwrap();
    exchange(stream, b"x").await.unwrap_err();
    world
        .logged(&["connection failed", "inbound", "the CRL revokes"])
        .await;
    assert_eq!(rejections(&world.db, "destination"), 1);
    assert_eq!(rejections(&world.db, "source"), 0);
    // Whether the alert arrives before the end of the connection is a race.
    world
        .logged(&["connection complete", "outbound", "10.77.0.2:15008: TLS"])
        .await;
}

#[tokio::test]
async fn a_revoked_server_is_refused_by_the_client() {
    let (mut world, ca, _, db) = world();
    world.db.echo("0.0.0.0:8080");
    revoke(&world.web, &ca, db).await;
    let stream = world.web.dial("10.77.0.2:8080").await.unwrap();
    exchange(stream, b"x").await.unwrap_err();
    world
        .logged(&["connection complete", "outbound", "the CRL revokes"])
        .await;
    assert_eq!(rejections(&world.web, "source"), 1);
    let failed = "istio_tcp_connections_failed_total";
    assert_eq!(world.web.metric(failed, &["\"CERT_REVOKED\""]), 1);
}

#[tokio::test]
async fn a_server_cuts_the_live_connection_of_a_revoked_client() {
    let (mut world, ca, web, _) = world();
    let stream = talking(&world).await;
    assert_eq!(revoke(&world.db, &ca, web + 100).await, 0);
    assert_eq!(revoke(&world.db, &ca, web).await, 1);
    ends(stream).await;
    let line = world
        .logged(&["connection complete", "inbound", "the CRL revokes serial"])
        .await;
    assert!(line.contains(&format!("{web:x}")), "{line}");
    let failed = "istio_tcp_connections_failed_total";
    assert_eq!(world.db.metric(failed, &["\"CERT_REVOKED\""]), 1);
    assert_eq!(rejections(&world.db, "destination"), 1);
    let at_db = &world.db;
    eventually("the tunnel is gone", || {
        at_db.plain_metric("underpass_inbound_tunnels") == 0
    })
    .await;
}

#[tokio::test]
async fn a_client_cuts_its_live_connection_to_a_revoked_server() {
    let (mut world, ca, _, db) = world();
    let stream = talking(&world).await;
    assert_eq!(revoke(&world.web, &ca, db).await, 1);
    ends(stream).await;
    world
        .logged(&["connection complete", "outbound", "the CRL revokes serial"])
        .await;
    let failed = "istio_tcp_connections_failed_total";
    assert_eq!(world.web.metric(failed, &["\"CERT_REVOKED\""]), 1);
    assert_eq!(rejections(&world.web, "source"), 1);
}

#[tokio::test]
async fn a_policy_that_names_an_alias_closes_the_account_of_our_own_trust_domain() {
    let (world, ..) = world();
    let stream = talking(&world).await;
    let store = &world.db.shared.store;
    Push::policies()
        .policy(deny("no-web", "old.domain/ns/shop/sa/web-sa"))
        .accepted_by(store);
    let mut stream = stream;
    stream.write_all(b"y").await.unwrap();
    soon(stream.read_u8()).await.expect("another trust domain");
    store.set_aliases(&["old.domain".into()]);
    ends(stream).await;
}

#[tokio::test]
async fn a_foreign_trust_domain_is_refused_until_it_is_an_alias() {
    let (mut world, ca, ..) = world();
    world.db.echo("0.0.0.0:8080");
    // The client's node knows its pod by another trust domain, and has a certificate for that.
    let mut web = record("web");
    web.trust_domain = "old.domain".into();
    Push::addresses()
        .workload(web)
        .accepted_by(&world.web.shared.store);
    let old = Identity::new("old.domain", "shop", "web-sa");
    ca.install(&world.web.shared.certs, &old);
    let stream = world.web.dial("10.77.0.2:8080").await.unwrap();
    exchange(stream, b"x").await.unwrap_err();
    world
        .logged(&["inbound", "only trust domain cluster.local is let in"])
        .await;

    let trust = Trust::parse(&pb::SetTrust {
        trust_domain_aliases: vec!["old.domain".into()],
        ..Default::default()
    });
    soon(world.db.shared.certs.set_trust(trust.unwrap())).await;
    let stream = world.web.dial("10.77.0.2:8080").await.unwrap();
    let answer = exchange(stream, b"hello").await.unwrap();
    assert_eq!(answer, b"hello");
    world
        .logged(&["connection complete", "inbound", "spiffe://old.domain/"])
        .await;
}
