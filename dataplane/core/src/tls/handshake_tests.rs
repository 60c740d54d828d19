//! Tests of the two TLS configurations against each other and against peers that misbehave.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rustls::crypto::aws_lc_rs::kx_group;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, HandshakeKind, NamedGroup, ProtocolVersion, RootCertStore};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::{TlsAcceptor, TlsConnector, client, server};

use super::judge::Judge;
use super::provider::{VERSIONS, with_groups};
use super::testing::{Bend, Ca};
use super::verify::{Rule, Verifier, peer_identity};
use super::{Credentials, describe};
use crate::identity::Identity;

const LONG: Duration = Duration::from_secs(20);

pub(super) type Ends = (
    Result<client::TlsStream<TcpStream>, String>,
    Result<server::TlsStream<TcpStream>, String>,
);

pub(super) fn id(account: &str) -> Identity {
    Identity::new("cluster.local", "shop", account)
}

pub(super) fn expect(ids: &[Identity]) -> Arc<[Identity]> {
    ids.into()
}

/// Handshakes, and a byte from the server to the client: with TLS 1.3 a client learns only from
/// what it reads whether it was let in.
pub(super) async fn meet(config: Arc<ClientConfig>, server: &Credentials) -> Ends {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let near = async {
        let tcp = TcpStream::connect(addr).await.unwrap();
        let name = ServerName::from(addr.ip());
        let mut tls = TlsConnector::from(config)
            .connect(name, tcp)
            .await
            .map_err(|err| describe(&err))?;
        tls.read_u8().await.map_err(|err| describe(&err))?;
        Ok(tls)
    };
    let far = async {
        let (tcp, _) = listener.accept().await.unwrap();
        let mut tls = TlsAcceptor::from(server.server.clone())
            .accept(tcp)
            .await
            .map_err(|err| describe(&err))?;
        tls.write_u8(1).await.map_err(|err| describe(&err))?;
        Ok(tls)
    };
    let both = async { tokio::join!(near, far) };
    tokio::time::timeout(LONG, both).await.expect("in time")
}

pub(super) async fn refused_by_server(client: &Credentials, server: &Credentials) -> String {
    let config = client
        .client(&expect(std::slice::from_ref(&server.identity)))
        .unwrap();
    let (near, far) = meet(config, server).await;
    assert!(near.is_err(), "the client got in");
    far.expect_err("refused")
}

pub(super) async fn refused_by_client(
    client: &Credentials,
    expected: &[Identity],
    server: &Credentials,
) -> String {
    let (near, far) = meet(client.client(&expect(expected)).unwrap(), server).await;
    assert!(far.is_err(), "the server took part");
    near.expect_err("refused")
}

#[tokio::test]
async fn both_ends_know_each_other_and_use_the_hybrid_key_exchange() {
    let ca = Ca::new("root");
    let (web, db) = (
        ca.credentials(&id("web")).await,
        ca.credentials(&id("db")).await,
    );
    let config = web.client(&expect(&[id("other"), id("db")])).unwrap();
    let (near, far) = meet(config, &db).await;
    let (near, far) = (near.unwrap(), far.unwrap());
    let (near, far) = (near.get_ref().1, far.get_ref().1);
    assert_eq!(peer_identity(near.peer_certificates()), Some(id("db")));
    assert_eq!(peer_identity(far.peer_certificates()), Some(id("web")));
    let group = near.negotiated_key_exchange_group().unwrap().name();
    assert_eq!(group, NamedGroup::X25519MLKEM768);
    assert_eq!(near.protocol_version(), Some(ProtocolVersion::TLSv1_3));
    let suite = near.negotiated_cipher_suite().unwrap().suite();
    assert_eq!(suite, rustls::CipherSuite::TLS13_AES_256_GCM_SHA384);
    assert_eq!(near.alpn_protocol(), Some(&b"h2"[..]));
    assert_eq!(far.server_name(), None, "no name is sent");
}

#[tokio::test]
async fn peers_without_the_hybrid_get_a_classic_key_exchange() {
    let ca = Ca::new("root");
    let (web, db) = (
        ca.credentials(&id("web")).await,
        ca.credentials(&id("db")).await,
    );
    let ours = web.client(&expect(&[id("db")])).unwrap();
    for (group, name) in [
        (kx_group::X25519, NamedGroup::X25519),
        (kx_group::SECP256R1, NamedGroup::secp256r1),
        (kx_group::SECP384R1, NamedGroup::secp384r1),
    ] {
        let mut classic = ClientConfig::builder_with_provider(with_groups(vec![group]))
            .with_protocol_versions(VERSIONS)
            .unwrap()
            .with_root_certificates(RootCertStore::empty())
            .with_no_client_auth();
        classic.client_auth_cert_resolver = ours.client_auth_cert_resolver.clone();
        classic.dangerous().set_certificate_verifier(knows_db(&ca));
        let (near, far) = meet(Arc::new(classic), &db).await;
        let far = far.unwrap();
        near.unwrap();
        let seen = far.get_ref().1.negotiated_key_exchange_group().unwrap();
        assert_eq!(seen.name(), name);
    }
}

/// What `web` checks when it expects `db`.
fn knows_db(ca: &Ca) -> Arc<Verifier> {
    let root = CertificateDer::from_pem_slice(ca.root_pem().as_bytes()).unwrap();
    let judge = Judge::new(Arc::default(), vec![super::trust::anchor(&root).unwrap()]);
    Arc::new(Verifier {
        judge: Arc::new(judge),
        rule: Rule::Servers {
            own: id("web"),
            expected: expect(&[id("db")]),
        },
    })
}

#[tokio::test]
async fn client_of_another_trust_domain_is_refused() {
    let ca = Ca::new("root");
    let db = ca.credentials(&id("db")).await;
    let stranger = ca
        .credentials(&Identity::new("other.domain", "shop", "web"))
        .await;
    let text = refused_by_server(&stranger, &db).await;
    assert!(text.contains("only trust domain cluster.local"), "{text}");
}

#[tokio::test]
async fn any_name_of_the_trust_domain_lets_a_client_in() {
    let ca = Ca::new("root");
    let db = ca.credentials(&id("db")).await;
    let bend = Bend {
        ids: vec![
            "https://example.com/".to_owned(),
            "spiffe://other.domain/ns/shop/sa/web".to_owned(),
            id("web").to_string(),
        ],
        ..Bend::plain(&id("web"))
    };
    let web = ca.unchecked(&id("web"), &bend, &[&ca]);
    let (near, far) = meet(web.client(&expect(&[id("db")])).unwrap(), &db).await;
    near.unwrap();
    let first = peer_identity(far.unwrap().get_ref().1.peer_certificates()).unwrap();
    assert_eq!(first.trust_domain(), "other.domain", "known by the first");
}

#[tokio::test]
async fn client_without_a_spiffe_name_is_refused() {
    let ca = Ca::new("root");
    let db = ca.credentials(&id("db")).await;
    let bend = Bend {
        ids: vec!["https://example.com/".to_owned()],
        ..Bend::plain(&id("web"))
    };
    let text = refused_by_server(&ca.unchecked(&id("web"), &bend, &[&ca]), &db).await;
    assert!(text.contains("names no SPIFFE identity"), "{text}");
}

#[tokio::test]
async fn server_with_another_identity_is_refused() {
    let ca = Ca::new("root");
    let (web, db) = (
        ca.credentials(&id("web")).await,
        ca.credentials(&id("db")).await,
    );
    let text = refused_by_client(&web, &[id("a"), id("b")], &db).await;
    assert!(
        text.contains("/sa/db, but spiffe://cluster.local/ns/shop/sa/a or"),
        "{text}"
    );
    let text = refused_by_client(&web, &[], &db).await;
    assert!(text.contains("but nobody was expected"), "{text}");
    // The trust domain counts too.
    let same_name = Identity::new("other.domain", "shop", "db");
    refused_by_client(&web, &[same_name], &db).await;
}

#[tokio::test]
async fn certificates_of_a_foreign_ca_are_refused_by_both_ends() {
    let (ca, foreign) = (Ca::new("root"), Ca::new("foreign"));
    let (web, db) = (
        ca.credentials(&id("web")).await,
        ca.credentials(&id("db")).await,
    );
    // They trust our CA, but their own certificate is from elsewhere.
    let plain = |id: &Identity| foreign.unchecked(id, &Bend::plain(id), &[&ca]);
    let text = refused_by_server(&plain(&id("web")), &db).await;
    assert!(
        text.contains("UnknownIssuer") || text.contains("unknown issuer"),
        "{text}"
    );
    let text = refused_by_client(&web, &[id("db")], &plain(&id("db"))).await;
    assert!(
        text.contains("UnknownIssuer") || text.contains("unknown issuer"),
        "{text}"
    );
}

#[tokio::test]
async fn expired_certificates_are_refused_by_both_ends() {
    let ca = Ca::new("root");
    let (web, db) = (
        ca.credentials(&id("web")).await,
        ca.credentials(&id("db")).await,
    );
    let now = SystemTime::now();
    let old = |id: &Identity| {
        let bend = Bend {
            from: now - Duration::from_secs(7200),
            until: now - Duration::from_secs(3600),
            ..Bend::plain(id)
        };
        ca.unchecked(id, &bend, &[&ca])
    };
    let text = refused_by_server(&old(&id("web")), &db).await;
    assert!(text.to_lowercase().contains("expired"), "{text}");
    let text = refused_by_client(&web, &[id("db")], &old(&id("db"))).await;
    assert!(text.to_lowercase().contains("expired"), "{text}");
}

#[tokio::test]
async fn client_without_a_certificate_is_refused() {
    let ca = Ca::new("root");
    let db = ca.credentials(&id("db")).await;
    let mut anonymous = ClientConfig::builder_with_provider(super::provider::provider())
        .with_protocol_versions(VERSIONS)
        .unwrap()
        .with_root_certificates(RootCertStore::empty())
        .with_no_client_auth();
    anonymous
        .dangerous()
        .set_certificate_verifier(knows_db(&ca));
    let (near, far) = meet(Arc::new(anonymous), &db).await;
    let text = near.expect_err("told");
    assert!(text.contains("CertificateRequired"), "{text}");
    assert!(far.is_err());
}

#[tokio::test]
async fn tls_1_2_is_refused_with_an_alert() {
    // A ClientHello that lacks nothing but TLS 1.3: without these extensions it would be refused
    // for another reason.
    let extensions: [&[u8]; 5] = [
        // supported_groups: x25519, secp256r1
        &[0, 10, 0, 6, 0, 4, 0x00, 0x1d, 0x00, 0x17],
        // ec_point_formats: uncompressed
        &[0, 11, 0, 2, 1, 0],
        // signature_algorithms: ecdsa_secp256r1_sha256, rsa_pss_rsae_sha256
        &[0, 13, 0, 6, 0, 4, 4, 3, 8, 4],
        // ALPN: h2
        &[0, 16, 0, 5, 0, 3, 2, b'h', b'2'],
        // extended_master_secret
        &[0, 23, 0, 0],
    ];
    let extensions = extensions.concat();
    let mut hello = vec![0x03, 0x03];
    hello.extend([7; 32]);
    // No session, ECDHE-ECDSA with AES-256-GCM, null compression.
    hello.extend([0, 0, 2, 0xc0, 0x2c, 1, 0]);
    hello.extend([0, extensions.len() as u8]);
    hello.extend(&extensions);
    let mut message = vec![1, 0, 0, hello.len() as u8];
    message.extend(&hello);
    let mut record = vec![22, 3, 1, 0, message.len() as u8];
    record.extend(&message);

    let db = Ca::new("root").credentials(&id("db")).await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut tcp = TcpStream::connect(listener.local_addr().unwrap())
        .await
        .unwrap();
    tcp.write_all(&record).await.unwrap();
    let (far, _) = listener.accept().await.unwrap();
    let refused = TlsAcceptor::from(db.server.clone()).accept(far).await;
    assert!(refused.is_err());
    let mut answer = Vec::new();
    tcp.read_to_end(&mut answer).await.unwrap();
    // An alert (21), fatal (2): protocol_version (70).
    assert_eq!((answer[0], answer[5], answer[6]), (21, 2, 70), "{answer:?}");
}

#[tokio::test]
async fn no_session_is_resumed() {
    let ca = Ca::new("root");
    let (web, db) = (
        ca.credentials(&id("web")).await,
        ca.credentials(&id("db")).await,
    );
    let mut eager = (*web.client(&expect(&[id("db")])).unwrap()).clone();
    // A client that would resume if it were given anything to do it with.
    eager.resumption = rustls::client::Resumption::in_memory_sessions(16);
    let eager = Arc::new(eager);
    for _ in 0..3 {
        let (near, _far) = meet(eager.clone(), &db).await;
        let kind = near.unwrap().get_ref().1.handshake_kind();
        assert!(!matches!(kind, Some(HandshakeKind::Resumed)), "{kind:?}");
    }
}

#[tokio::test]
async fn client_configurations_are_made_once() {
    let web = Ca::new("root").credentials(&id("web")).await;
    let first = web.client(&expect(&[id("a"), id("b")])).unwrap();
    let again = web.client(&expect(&[id("a"), id("b")])).unwrap();
    let other = web.client(&expect(&[id("b"), id("a")])).unwrap();
    assert!(Arc::ptr_eq(&first, &again));
    assert!(!Arc::ptr_eq(&first, &other));
}
