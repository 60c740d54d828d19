//! Tests of tunnels whose ground is gone: a certificate that expired, an address that moved.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use http::{HeaderMap, Method, Request, Response};
use rustls::pki_types::ServerName;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::settings::Http2;
use super::testing::{LONG, Mesh, connect, dial, eventually, id, key, new_pool};
use super::{Error, Key, Tunnel};
use crate::config::Limits;
use crate::tls::Credentials;
use crate::tls::testing::Bend;

/// Of `web`, for two to three seconds.
fn short_lived(mesh: &Mesh) -> Credentials {
    let bend = Bend {
        until: SystemTime::now() + Duration::from_secs(3),
        ..Bend::plain(&id("web"))
    };
    mesh.ca.unchecked(&id("web"), &bend, &[&mesh.ca])
}

async fn wait_for_expiry(credentials: &Credentials) {
    let left = credentials.not_after.duration_since(SystemTime::now());
    tokio::time::sleep(left.unwrap() + Duration::from_millis(50)).await;
}

/// A server that knows nothing of expiry: answers and gives back what it gets.
async fn careless(mesh: &Mesh) -> std::net::SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let config = mesh.db.server.clone();
    tokio::spawn(async move {
        while let Ok((tcp, _)) = listener.accept().await {
            let Ok(tls) = TlsAcceptor::from(config.clone()).accept(tcp).await else {
                continue;
            };
            tokio::spawn(async move {
                let mut connection = h2::server::handshake(tls).await.unwrap();
                while let Some(Ok((request, mut respond))) = connection.accept().await {
                    let mut send = respond.send_response(Response::new(()), false).unwrap();
                    tokio::spawn(async move {
                        let mut recv = request.into_body();
                        while let Some(Ok(data)) = recv.data().await {
                            let _ = send.send_data(data, false);
                        }
                    });
                }
            });
        }
    });
    addr
}

#[tokio::test]
async fn a_pooled_tunnel_takes_no_stream_after_its_certificate_expired() {
    let mesh = Mesh::new().await;
    let addr = careless(&mesh).await;
    let pool = new_pool(Limits::default(), dial());
    let old = short_lived(&mesh);
    let first = pool.connect(key(addr), &old, connect()).await.unwrap();
    let mut first = first.stream;
    wait_for_expiry(&old).await;

    let refused = pool.connect(key(addr), &old, connect()).await.err();
    assert!(matches!(refused, Some(Error::Tls(..))), "{refused:?}");
    let renewed = pool.connect(key(addr), &mesh.web, connect()).await;
    assert!(renewed.is_ok(), "{:?}", renewed.err());
    // What was let in while the certificate was good may end by itself.
    first.write_all(b"still").await.unwrap();
    let mut echo = [0; 5];
    tokio::time::timeout(LONG, first.read_exact(&mut echo))
        .await
        .unwrap()
        .unwrap();
    drop(first);
    eventually("the old tunnel is gone", || pool.size().0 == 1).await;
}

#[tokio::test]
async fn a_server_sends_goaway_when_the_clients_certificate_expired() {
    let mesh = Mesh::new().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let old = short_lived(&mesh);
    let client = old.client(&key(addr).expected).unwrap();
    let (near, far) = tokio::join!(
        async {
            let tcp = TcpStream::connect(addr).await.unwrap();
            let name = ServerName::from(addr.ip());
            let tls = TlsConnector::from(client).connect(name, tcp).await.unwrap();
            h2::client::handshake(tls).await.unwrap()
        },
        async {
            let (tcp, _) = listener.accept().await.unwrap();
            Tunnel::accept(tcp, &mesh.db, &Limits::default(), &Http2::default()).await
        }
    );
    let (send, connection) = near;
    let mut tunnel = far.unwrap();
    assert_eq!(tunnel.expires(), old.not_after);
    let closed = tokio::spawn(connection);
    let server = tokio::spawn(async move {
        let mut streams = Vec::new();
        while let Some(Ok((_, responder))) = tunnel.next().await {
            streams.push(responder.accept(HeaderMap::new()).unwrap());
        }
        streams.len()
    });
    let request = || {
        let uri = "192.0.2.7:80".parse::<http::Uri>().unwrap();
        let request = Request::builder().method(Method::CONNECT).uri(uri);
        request.body(()).unwrap()
    };
    let mut ready = send.clone().ready().await.unwrap();
    let (answer, open) = ready.send_request(request(), false).unwrap();
    assert_eq!(answer.await.unwrap().status(), 200);
    drop(ready);

    wait_for_expiry(&old).await;
    let told = async {
        while send.clone().ready().await.is_ok() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(LONG, told).await.expect("GOAWAY");
    assert!(!closed.is_finished(), "the open stream may end by itself");
    drop((open, send));
    let served = tokio::time::timeout(LONG, server).await.expect("it ends");
    assert_eq!(served.unwrap(), 1);
}

#[tokio::test]
async fn tunnels_to_an_address_that_moved_end_with_their_streams() {
    let mesh = Mesh::new().await;
    let mut server = mesh.server(Http2::default()).await;
    let pool = new_pool(Limits::default(), dial());
    let (mut near, _far) = mesh.pair(&pool, &mut server).await;
    pool.end_where(|key| &*key.owner != "db-1");
    assert_eq!(pool.size(), (1, 1), "nobody else's tunnels end");
    pool.end_where(|key| &*key.owner == "db-1");
    let end = tokio::time::timeout(LONG, near.read(&mut [0])).await;
    assert!(end.expect("in time").is_err(), "no orderly end");
    drop(near);
    eventually("it is gone", || pool.size() == (0, 0)).await;
    mesh.pair(&pool, &mut server).await;
    assert_eq!(server.tunnels(), 2);
}

#[tokio::test]
async fn the_next_owner_of_an_address_gets_a_tunnel_of_its_own() {
    let mesh = Mesh::new().await;
    let mut server = mesh.server(Http2::default()).await;
    let pool = new_pool(Limits::default(), dial());
    let _first = mesh.pair(&pool, &mut server).await;
    let next = Key {
        owner: Arc::from("db-2"),
        ..key(server.addr)
    };
    let (near, _far) = tokio::join!(pool.connect(next, &mesh.web, connect()), server.accept());
    near.unwrap();
    assert_eq!(server.tunnels(), 2);
}
