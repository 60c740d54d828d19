//! Tests of peers that stall, talk nonsense, or go away without a word.

use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::settings::Http2;
use super::testing::{LONG, Mesh, connect, dial, key, new_pool, pool_with};
use super::{Dial, Error, Tunnel};
use crate::config::Limits;

const LIMIT: Duration = Duration::from_millis(200);

fn impatient() -> Limits {
    Limits {
        connect_timeout: LIMIT,
        tls_handshake_timeout: LIMIT,
        preface_timeout: LIMIT,
        connect_answer_timeout: LIMIT,
        ..Limits::default()
    }
}

fn ours_patient() -> Limits {
    Limits {
        connect_answer_timeout: LIMIT,
        ..Limits::default()
    }
}

/// Passes bytes on between the two ends until `stop`, then keeps both open in silence.
async fn relay_to(dst: std::net::SocketAddr, stop: std::sync::Arc<tokio::sync::Notify>) -> Dial {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    tokio::spawn(async move {
        let (mut near, _) = listener.accept().await.unwrap();
        let mut far = TcpStream::connect(dst).await.unwrap();
        tokio::select! {
            _ = tokio::io::copy_bidirectional(&mut near, &mut far) => {}
            () = stop.notified() => std::future::pending().await,
        }
    });
    std::sync::Arc::new(move |_| Box::pin(TcpStream::connect(addr)))
}

#[tokio::test]
async fn connect_that_gets_no_answer_times_out() {
    let mesh = Mesh::new().await;
    let pool = new_pool(
        impatient(),
        std::sync::Arc::new(|_| Box::pin(std::future::pending())),
    );
    let refused = mesh.connect(&pool, ([127, 0, 0, 1], 9).into()).await.err();
    assert!(
        matches!(refused, Some(Error::ConnectTimeout(..))),
        "{refused:?}"
    );
}

#[tokio::test]
async fn server_that_says_nothing_times_out_in_the_handshake() {
    let mesh = Mesh::new().await;
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let pool = new_pool(impatient(), dial());
    let refused = mesh
        .connect(&pool, silent.local_addr().unwrap())
        .await
        .err();
    assert!(
        matches!(refused, Some(Error::Timeout(_, "TLS handshake", _))),
        "{refused:?}"
    );
}

#[tokio::test]
async fn server_that_stalls_after_tls_times_out_and_wakes_all() {
    let mesh = Mesh::new().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let config = mesh.db.server.clone();
    tokio::spawn(async move {
        let (tcp, _) = listener.accept().await.unwrap();
        let _tls = tokio_rustls::TlsAcceptor::from(config).accept(tcp).await;
        std::future::pending::<()>().await;
    });
    let limits = Limits {
        connect_answer_timeout: LONG,
        ..impatient()
    };
    let pool = new_pool(limits, dial());
    let all = futures_util::future::join_all((0..4).map(|_| mesh.connect(&pool, addr)));
    for refused in tokio::time::timeout(LONG, all).await.expect("in time") {
        assert!(matches!(refused.err(), Some(Error::Timeout(_, "PING", _))));
    }
}

#[tokio::test]
async fn connect_that_is_not_answered_times_out_and_is_reset() {
    let mesh = Mesh::new().await;
    let mut server = mesh.server(Http2::default()).await;
    let pool = new_pool(ours_patient(), dial());
    let addr = server.addr;
    let (refused, (_, responder)) = tokio::join!(mesh.connect(&pool, addr), server.request());
    let refused = refused.err();
    assert!(
        matches!(refused, Some(Error::Timeout(_, "CONNECT", _))),
        "{refused:?}"
    );
    // The late answer is of no use, and the tunnel is as good as before.
    drop(responder.accept(http::HeaderMap::new()));
    mesh.pair(&pool, &mut server).await;
    assert_eq!(server.tunnels(), 1);
}

#[tokio::test]
async fn client_that_stalls_times_out_in_both_handshakes() {
    let mesh = Mesh::new().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();

    let _silent = TcpStream::connect(addr).await.unwrap();
    let (tcp, _) = listener.accept().await.unwrap();
    let refused = Tunnel::accept(tcp, &mesh.db, &impatient(), &Http2::default())
        .await
        .err();
    let in_tls = matches!(refused, Some(Error::Timeout(_, "TLS handshake", _)));
    assert!(in_tls, "{refused:?}");

    // TLS, and then no HTTP/2 preface.
    let config = mesh.web.client(&key(addr).expected).unwrap();
    let near = async {
        let tcp = TcpStream::connect(addr).await.unwrap();
        let name = rustls::pki_types::ServerName::from(addr.ip());
        let tls = tokio_rustls::TlsConnector::from(config).connect(name, tcp);
        tls.await.unwrap()
    };
    let far = async {
        let (tcp, _) = listener.accept().await.unwrap();
        Tunnel::accept(tcp, &mesh.db, &impatient(), &Http2::default())
            .await
            .err()
    };
    let (_near, refused) = tokio::join!(near, far);
    let in_preface = matches!(refused, Some(Error::Timeout(_, "HTTP/2 preface", _)));
    assert!(in_preface, "{refused:?}");
}

#[tokio::test]
async fn nonsense_in_place_of_tls_or_http2_is_an_error() {
    let mesh = Mesh::new().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();

    let mut plain = TcpStream::connect(addr).await.unwrap();
    plain.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    let (tcp, _) = listener.accept().await.unwrap();
    let refused = Tunnel::accept(tcp, &mesh.db, &Limits::default(), &Http2::default())
        .await
        .err();
    assert!(matches!(refused, Some(Error::Tls(..))), "{refused:?}");

    let config = mesh.web.client(&key(addr).expected).unwrap();
    let near = async {
        let tcp = TcpStream::connect(addr).await.unwrap();
        let name = rustls::pki_types::ServerName::from(addr.ip());
        let connector = tokio_rustls::TlsConnector::from(config);
        let mut tls = connector.connect(name, tcp).await.unwrap();
        tls.write_all(b"GET / HTTP/1.1\r\nhost: example.com\r\n\r\n")
            .await
            .unwrap();
        let _ = tls.read_to_end(&mut Vec::new()).await;
    };
    let far = async {
        let (tcp, _) = listener.accept().await.unwrap();
        Tunnel::accept(tcp, &mesh.db, &Limits::default(), &Http2::default())
            .await
            .err()
    };
    let ((), refused) = tokio::join!(near, far);
    assert!(matches!(refused, Some(Error::Http2(..))), "{refused:?}");
}

#[tokio::test]
async fn peer_that_falls_silent_is_found_by_pings() {
    let mesh = Mesh::new().await;
    let fast = Http2 {
        ping_interval: LIMIT,
        ping_timeout: LIMIT,
        ..Http2::default()
    };
    let mut server = mesh.server(fast.clone()).await;
    let stop = std::sync::Arc::new(tokio::sync::Notify::new());
    let relay = relay_to(server.addr, stop.clone()).await;
    let pool = pool_with(Limits::default(), relay, fast);
    let (mut near, mut far) = mesh.pair(&pool, &mut server).await;
    tokio::time::sleep(LIMIT * 3).await;
    near.write_all(b"alive").await.unwrap();
    far.read_exact(&mut [0; 5]).await.unwrap();
    stop.notify_one();
    let ends = async {
        // At both ends it is no end that the peer made.
        for end in [&mut near, &mut far] {
            let error = end.read(&mut [0; 1]).await.expect_err("no good end");
            assert!(error.to_string().contains("PING not answered"), "{error}");
            assert_eq!(error.kind(), std::io::ErrorKind::Other);
        }
    };
    tokio::time::timeout(LONG, ends).await.expect("found");
    super::testing::eventually("released", || pool.size().0 == 0).await;
}

#[tokio::test]
async fn drained_tunnel_ends_after_its_last_stream() {
    let mesh = Mesh::new().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let pool = new_pool(Limits::default(), dial());
    let far = async {
        let (tcp, _) = listener.accept().await.unwrap();
        let mut tunnel = Tunnel::accept(tcp, &mesh.db, &Limits::default(), &Http2::default())
            .await
            .unwrap();
        assert_eq!(tunnel.peer(), &super::testing::id("web"));
        let (_, responder) = tunnel.next().await.unwrap().unwrap();
        let stream = responder.accept(http::HeaderMap::new()).unwrap();
        tunnel.drain();
        // A second GOAWAY is no error.
        tunnel.drain();
        let mut copy = tokio::io::split(stream);
        let echo = async {
            tokio::io::copy(&mut copy.0, &mut copy.1).await.unwrap();
            copy.1.shutdown().await.unwrap();
        };
        let over = async {
            assert!(tunnel.next().await.is_none());
            assert!(tunnel.next().await.is_none());
        };
        tokio::join!(echo, over);
    };
    let near = async {
        let connected = pool.connect(key(addr), &mesh.web, connect()).await.unwrap();
        let mut stream = connected.stream;
        stream.write_all(b"hello").await.unwrap();
        stream.shutdown().await.unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).await.unwrap();
        assert_eq!(text, "hello");
    };
    let both = async { tokio::join!(near, far) };
    tokio::time::timeout(LONG, both).await.expect("in time");
}

#[tokio::test]
async fn reset_before_the_peers_settings_shows_as_a_refused_certificate() {
    let mesh = Mesh::new().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let config = mesh.db.server.clone();
    tokio::spawn(async move {
        let (tcp, _) = listener.accept().await.unwrap();
        let acceptor = tokio_rustls::TlsAcceptor::from(config);
        let tls = acceptor.accept(tcp).await.unwrap();
        // As a peer that closes with our data unread: its alert is lost.
        tls.get_ref().0.set_zero_linger().unwrap();
    });
    let pool = new_pool(Limits::default(), dial());
    let refused = mesh.connect(&pool, addr).await.err();
    assert!(
        matches!(&refused, Some(Error::Tls(_, text)) if text.contains("refused")),
        "{refused:?}"
    );
}
