//! Tests of trust that changes: who is refused at a handshake, and which live tunnels are cut.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use rustls::crypto::aws_lc_rs::kx_group;
use rustls::{ClientConfig, NamedGroup};

use super::handshake_tests::{Ends, expect, id, meet, refused_by_client, refused_by_server};
use super::provider::{VERSIONS, with_groups};
use super::testing::{Bend, Ca};
use super::trust::{Distrust, Trust};
use super::{CertStore, Change, Credentials, CrlCounters, Peer};
use crate::identity::Identity;
use crate::wire::control as pb;

const SOON: Duration = Duration::from_secs(10);

/// One end: its store and its certificate.
struct End {
    store: Arc<CertStore>,
    counters: CrlCounters,
    id: Identity,
}

impl End {
    fn new(ca: &Ca, id: Identity) -> Self {
        let (store, _events) = CertStore::new();
        let counters = CrlCounters::default();
        store.trust.count_with(counters.clone());
        ca.install(&store, &id);
        Self {
            store,
            counters,
            id,
        }
    }

    async fn now(&self) -> Arc<Credentials> {
        self.store.get(&self.id, SOON).await.expect("installed")
    }

    async fn trust(&self, raw: pb::SetTrust) -> usize {
        let trust = Trust::parse(&raw).expect("readable");
        self.store.set_trust(trust).await
    }

    /// (inbound, outbound)
    fn rejections(&self) -> (u64, u64) {
        let rejections = &self.counters.rejections;
        (rejections.inbound.get(), rejections.outbound.get())
    }
}

fn crl(ca: &Ca, serial: u64) -> pb::SetTrust {
    pb::SetTrust {
        crl: ca.crl(&[serial]).into(),
        ..Default::default()
    }
}

fn aliases(names: &[&str]) -> pb::SetTrust {
    pb::SetTrust {
        trust_domain_aliases: names.iter().map(ToString::to_string).collect(),
        ..Default::default()
    }
}

fn pqc() -> pb::SetTrust {
    pb::SetTrust {
        compliance_policy: "pqc".into(),
        ..Default::default()
    }
}

/// A finished handshake as both ends keep it: (the server as the client sees it, the client).
async fn tunnel(client: &End, server: &End) -> (Peer, Peer) {
    let (web, db) = (client.now().await, server.now().await);
    let expected = expect(std::slice::from_ref(&server.id));
    let (near, far): Ends = meet(web.client(&expected).unwrap(), &db).await;
    let addr: SocketAddr = "192.0.2.1:15008".parse().unwrap();
    let near = near.expect("let in");
    let far = far.expect("let in");
    let at_client = web.admit_servers(&expected).admit(near.get_ref().1, addr);
    let at_server = db.admit_clients().admit(far.get_ref().1, addr);
    (at_client.expect("admitted"), at_server.expect("admitted"))
}

async fn change(peer: &Peer) -> Change {
    let change = tokio::time::timeout(SOON, peer.tracked.changed()).await;
    change.expect("told in time")
}

/// A task that ends its tunnel as soon as it is told to.
fn obedient(peer: Peer) -> tokio::task::JoinHandle<Distrust> {
    tokio::spawn(async move {
        loop {
            if let Change::Cut(distrust) = peer.tracked.changed().await {
                return distrust;
            }
        }
    })
}

#[tokio::test]
async fn a_revoked_certificate_is_refused_in_both_directions_and_counted() {
    let ca = Ca::new("root");
    let web = End::new(&ca, id("web"));
    let of_web = ca.last_serial();
    let db = End::new(&ca, id("db"));
    let of_db = ca.last_serial();
    // A handshake before: what was proved then is no excuse.
    drop(tunnel(&web, &db).await);

    db.trust(crl(&ca, of_web)).await;
    let text = refused_by_server(&*web.now().await, &*db.now().await).await;
    assert!(text.contains("the CRL revokes"), "{text}");
    assert_eq!(db.rejections(), (1, 0));

    db.trust(pb::SetTrust::default()).await;
    web.trust(crl(&ca, of_db)).await;
    let text = refused_by_client(&*web.now().await, &[id("db")], &*db.now().await).await;
    assert!(text.contains("the CRL revokes"), "{text}");
    assert_eq!(web.rejections(), (0, 1));
    assert_eq!(db.rejections(), (1, 0));
}

#[tokio::test]
async fn a_refused_client_is_told_that_it_is_revoked() {
    let ca = Ca::new("root");
    let web = End::new(&ca, id("web"));
    let revoked = crl(&ca, ca.last_serial());
    let db = End::new(&ca, id("db"));
    db.trust(revoked).await;
    let config = web.now().await.client(&expect(&[id("db")])).unwrap();
    let (near, _far) = meet(config, &*db.now().await).await;
    let text = near.expect_err("refused");
    assert_eq!(text, "the peer refused: our certificate is revoked");
}

#[tokio::test]
async fn a_new_crl_cuts_exactly_the_tunnels_that_it_names_before_it_is_answered() {
    let ca = Ca::new("root");
    let db = End::new(&ca, id("db"));
    let web = End::new(&ca, id("web"));
    let of_web = ca.last_serial();
    let cart = End::new(&ca, id("cart"));
    let (_near, revoked) = tunnel(&web, &db).await;
    let (_near, good) = tunnel(&cart, &db).await;
    let ended = obedient(revoked);
    assert_eq!(db.trust(crl(&ca, of_web)).await, 1);
    assert_eq!(db.store.trust.live(), 1, "gone before the answer");
    let reason = ended.await.unwrap();
    assert_eq!(reason, Distrust::Revoked(format!("{of_web:x}")));
    assert!(good.tracked.proof().distrust().is_none());
    assert_eq!(db.rejections(), (1, 0));
    // Said again, it finds nothing more.
    assert_eq!(db.trust(crl(&ca, of_web)).await, 0);
}

#[tokio::test]
async fn a_client_cuts_its_tunnel_to_a_revoked_server() {
    let ca = Ca::new("root");
    let web = End::new(&ca, id("web"));
    let db = End::new(&ca, id("db"));
    let of_db = ca.last_serial();
    let (server, _client) = tunnel(&web, &db).await;
    let ended = obedient(server);
    assert_eq!(web.trust(crl(&ca, of_db)).await, 1);
    assert_eq!(
        ended.await.unwrap(),
        Distrust::Revoked(format!("{of_db:x}"))
    );
    assert_eq!(web.rejections(), (0, 1));
}

#[tokio::test]
async fn a_crl_that_comes_during_the_handshake_is_not_missed() {
    let ca = Ca::new("root");
    let web = End::new(&ca, id("web"));
    let of_web = ca.last_serial();
    let db = End::new(&ca, id("db"));
    let (web, at_db) = (web.now().await, db.now().await);
    let config = web.client(&expect(&[id("db")])).unwrap();
    let (_near, far) = meet(config, &at_db).await;
    // Done, but not yet admitted.
    db.trust(crl(&ca, of_web)).await;
    let addr = "192.0.2.1:15008".parse().unwrap();
    let refused = at_db.admit_clients().admit(far.unwrap().get_ref().1, addr);
    assert!(refused.is_err());
    assert_eq!(db.store.trust.live(), 0);
}

#[tokio::test]
async fn a_revoked_certificate_of_our_own_is_not_taken_into_use() {
    let ca = Ca::new("root");
    let db = End::new(&ca, id("db"));
    let csr = db.store.new_csr(&id("db")).unwrap();
    let leaf = ca.sign(&csr, &Bend::plain(&id("db")));
    db.trust(crl(&ca, ca.last_serial())).await;
    let refused = db.store.install(&id("db"), &[leaf], &[ca.root_pem()]);
    let text = refused.expect_err("revoked").to_string();
    assert!(text.contains("the CRL revokes serial"), "{text}");
}

#[tokio::test]
async fn an_alias_is_let_in_both_ways_and_a_foreign_trust_domain_is_not() {
    let ca = Ca::new("root");
    let old = Identity::new("old.domain", "shop", "web");
    let web = End::new(&ca, old.clone());
    let db = End::new(&ca, id("db"));
    let text = refused_by_server(&*web.now().await, &*db.now().await).await;
    assert!(text.contains("only trust domain cluster.local"), "{text}");

    db.trust(aliases(&["older.domain", "old.domain"])).await;
    let (_, client) = tunnel(&web, &db).await;
    assert_eq!(client.identity, old, "known by its own name");

    // A client that expects the account in our trust domain meets it in the alias.
    let expected = expect(&[id("web")]);
    let config = db.now().await.client(&expected).unwrap();
    web.trust(aliases(&["cluster.local"])).await;
    let (near, _far) = meet(config, &*web.now().await).await;
    near.expect("let in");

    let stranger = End::new(&ca, Identity::new("foreign.domain", "shop", "web"));
    stranger.trust(aliases(&["cluster.local"])).await;
    let text = refused_by_server(&*stranger.now().await, &*db.now().await).await;
    assert!(text.contains("only trust domain cluster.local"), "{text}");
    let text = refused_by_client(&*db.now().await, &[id("web")], &*stranger.now().await).await;
    assert!(text.contains("foreign.domain"), "{text}");
    // An alias changes no account.
    let text = refused_by_client(&*db.now().await, &[id("cart")], &*web.now().await).await;
    assert!(text.contains("old.domain/ns/shop/sa/web"), "{text}");
}

#[tokio::test]
async fn an_alias_that_goes_takes_its_tunnels_along() {
    let ca = Ca::new("root");
    let web = End::new(&ca, Identity::new("old.domain", "shop", "web"));
    let db = End::new(&ca, id("db"));
    db.trust(aliases(&["old.domain"])).await;
    let (_, client) = tunnel(&web, &db).await;
    assert_eq!(db.trust(aliases(&["old.domain", "another"])).await, 0);
    let ended = obedient(client);
    assert_eq!(db.trust(aliases(&["another"])).await, 1);
    let reason = ended.await.unwrap();
    assert_eq!(reason, Distrust::TrustDomain("old.domain".into()));
}

#[tokio::test]
async fn pqc_refuses_every_other_key_exchange_and_cuts_what_used_one() {
    let ca = Ca::new("root");
    let web = End::new(&ca, id("web"));
    let db = End::new(&ca, id("db"));
    let expected = expect(&[id("db")]);
    let hybrid = web.now().await.client(&expected).unwrap();
    // As a client without the hybrid says hello.
    let classic = ClientConfig::builder_with_provider(with_groups(vec![kx_group::X25519]))
        .with_protocol_versions(VERSIONS)
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(web.now().await.admit_servers(&expected).verifier())
        .with_client_cert_resolver(hybrid.client_auth_cert_resolver.clone());
    let classic = Arc::new(classic);
    let addr = "192.0.2.1:15008".parse().unwrap();
    let mut peers = Vec::new();
    for config in [&classic, &hybrid] {
        let (_, far) = meet(config.clone(), &*db.now().await).await;
        let admitted = db.now().await.admit_clients();
        peers.push(admitted.admit(far.unwrap().get_ref().1, addr).unwrap());
    }
    let by_hybrid = peers.pop().unwrap();
    let ended = obedient(peers.pop().unwrap());
    assert_eq!(db.trust(pqc()).await, 1);
    assert_eq!(ended.await.unwrap(), Distrust::KeyExchange);
    assert!(by_hybrid.tracked.proof().distrust().is_none());

    let (near, far) = meet(classic, &*db.now().await).await;
    assert!(near.is_err() && far.is_err(), "no common group");
    let (near, _far) = meet(hybrid, &*db.now().await).await;
    let near = near.expect("the hybrid goes on");
    let group = near.get_ref().1.negotiated_key_exchange_group().unwrap();
    assert_eq!(group.name(), NamedGroup::X25519MLKEM768);
    // Our own clients offer nothing else then.
    let ours = db.now().await.client(&expect(&[id("web")])).unwrap();
    assert_eq!(ours.crypto_provider().kx_groups.len(), 1);
}

#[tokio::test]
async fn roots_overlap_and_old_tunnels_are_cut_when_the_old_root_goes() {
    let (old, new) = (Ca::new("root"), Ca::new("root"));
    let web = End::new(&old, id("web"));
    let db = End::new(&old, id("db"));
    let (at_web, by_old) = tunnel(&web, &db).await;

    // Both roots count everywhere first; then certificates of the new one come, end by end.
    let both = pb::SetTrust {
        additional_roots: vec![old.root_pem(), new.root_pem()],
        ..Default::default()
    };
    db.trust(both.clone()).await;
    web.trust(both).await;
    new.install(&db.store, &id("db"));
    let (web_half_way, half_way) = tunnel(&web, &db).await;
    new.install(&web.store, &id("web"));
    let (_near, by_new) = tunnel(&web, &db).await;
    for peer in [&by_old, &half_way, &by_new] {
        assert!(peer.tracked.proof().distrust().is_none(), "nothing is cut");
    }

    // What an old root proved takes no new streams, so that few are left when it goes.
    assert_eq!(change(&by_old).await, Change::Drain);
    assert_eq!(change(&at_web).await, Change::Drain);
    assert_eq!(change(&web_half_way).await, Change::Drain);

    let (first, second) = (obedient(by_old), obedient(half_way));
    assert_eq!(db.trust(pb::SetTrust::default()).await, 2);
    assert_eq!(first.await.unwrap(), Distrust::Root);
    assert_eq!(second.await.unwrap(), Distrust::Root);
    assert!(by_new.tracked.proof().distrust().is_none());
    let late = old.unchecked(&id("web"), &Bend::plain(&id("web")), &[&new]);
    refused_by_server(&late, &*db.now().await).await;
}

#[tokio::test]
async fn a_certificate_with_other_roots_ends_tunnels_of_the_old_ones_at_once() {
    let (old, new) = (Ca::new("old"), Ca::new("new"));
    let web = End::new(&old, id("web"));
    let db = End::new(&old, id("db"));
    let (_near, by_old) = tunnel(&web, &db).await;
    new.install(&db.store, &id("db"));
    assert_eq!(change(&by_old).await, Change::Cut(Distrust::Root));
}

#[tokio::test]
async fn a_renewal_by_the_same_root_drains_and_cuts_nothing() {
    let ca = Ca::new("root");
    let web = End::new(&ca, id("web"));
    let db = End::new(&ca, id("db"));
    let (_near, peer) = tunnel(&web, &db).await;
    ca.install(&db.store, &id("db"));
    assert_eq!(change(&peer).await, Change::Drain);
    assert!(peer.tracked.proof().distrust().is_none());
    assert_eq!(db.trust(pb::SetTrust::default()).await, 0);
}

#[test]
fn what_cannot_be_read_names_its_field() {
    let refusal = |raw: pb::SetTrust| Trust::parse(&raw).expect_err("unreadable").to_string();
    let text = refusal(pb::SetTrust {
        crl: "garbage".into(),
        ..Default::default()
    });
    assert!(text.starts_with("crl: neither PEM"), "{text}");
    let text = refusal(aliases(&["good.domain", "Bad/Domain"]));
    assert!(
        text.starts_with("trust_domain_aliases: \"Bad/Domain\""),
        "{text}"
    );
    let text = refusal(pb::SetTrust {
        compliance_policy: "fips".into(),
        ..Default::default()
    });
    assert!(text.contains("\"fips\" isn't known"), "{text}");
    let text = refusal(pb::SetTrust {
        additional_roots: vec![Ca::new("root").root_pem(), "x".into()],
        ..Default::default()
    });
    assert!(text.starts_with("additional_roots: entry 2: "), "{text}");
}
