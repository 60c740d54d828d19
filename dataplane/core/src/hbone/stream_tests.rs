//! Tests of streams: what CONNECT says and answers, half-close, resets, back-pressure.

use std::task::Poll;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::settings::Http2;
use super::testing::Server;
use super::testing::{LONG, Mesh, connect, dial, eventually, id, key, new_pool, pool_with};
use super::{Connect, Error, Pool, Stream};
use crate::config::Limits;

struct Pair {
    near: Stream,
    far: Stream,
    server: Server,
    pool: std::sync::Arc<Pool>,
    mesh: Mesh,
}

async fn pair(http2: Http2) -> Pair {
    let mesh = Mesh::new().await;
    let mut server = mesh.server(http2.clone()).await;
    let pool = pool_with(Limits::default(), dial(), http2);
    let (near, far) = mesh.pair(&pool, &mut server).await;
    Pair {
        near,
        far,
        server,
        pool,
        mesh,
    }
}

fn small() -> Http2 {
    Http2 {
        stream_window: 20_000,
        connection_window: 65_535,
        frame: 16_384,
        server_buffer: 32_768,
        client_buffer: 32_768,
        ..Http2::default()
    }
}

/// Bytes whose place can be told from their value.
fn pattern(len: usize) -> Bytes {
    (0..len).map(|i| (i / 251 + i) as u8).collect()
}

#[tokio::test]
async fn connect_carries_authority_and_headers_and_answer_carries_headers_back() {
    let mesh = Mesh::new().await;
    let mut server = mesh.server(Http2::default()).await;
    let pool = new_pool(Limits::default(), dial());
    let addr = server.addr;
    let far = async {
        let (request, responder) = server.request().await;
        assert_eq!(request.method, Method::CONNECT);
        assert_eq!(request.authority.as_deref(), Some("192.0.2.7:80"));
        assert_eq!(request.headers["baggage"], "k8s.namespace.name=shop");
        let mut headers = HeaderMap::new();
        headers.insert("baggage", HeaderValue::from_static("k8s.pod.name=db"));
        responder.accept(headers).unwrap()
    };
    let (connected, _far) = tokio::join!(mesh.connect(&pool, addr), far);
    let connected = connected.unwrap();
    assert_eq!(connected.headers["baggage"], "k8s.pod.name=db");
    assert_eq!(connected.peer, id("db"));
}

#[tokio::test]
async fn refusal_shows_its_status() {
    let mesh = Mesh::new().await;
    let mut server = mesh.server(Http2::default()).await;
    let pool = new_pool(Limits::default(), dial());
    for status in [400, 401, 503] {
        let addr = server.addr;
        let far = async { server.request().await.1.refuse(status) };
        let (refused, ()) = tokio::join!(mesh.connect(&pool, addr), far);
        match refused.err() {
            Some(Error::Status(seen)) => assert_eq!(seen, status),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(server.tunnels(), 1, "a refusal doesn't cost the tunnel");
    eventually("the refused gave their places back", || {
        pool.size() == (1, 0)
    })
    .await;
}

#[tokio::test]
async fn forgotten_answer_fails_the_client_instead_of_hanging_it() {
    let mesh = Mesh::new().await;
    let mut server = mesh.server(Http2::default()).await;
    let pool = new_pool(Limits::default(), dial());
    let addr = server.addr;
    let far = async { drop(server.request().await) };
    let (refused, ()) = tokio::join!(mesh.connect(&pool, addr), far);
    assert!(matches!(refused.err(), Some(Error::Http2(..))));
}

#[tokio::test]
async fn other_methods_reach_the_server_and_can_be_refused() {
    let mesh = Mesh::new().await;
    let mut server = mesh.server(Http2::default()).await;
    let tcp = tokio::net::TcpStream::connect(server.addr).await.unwrap();
    let config = mesh.web.client(&key(server.addr).expected).unwrap();
    let name = rustls::pki_types::ServerName::from(server.addr.ip());
    let tls = tokio_rustls::TlsConnector::from(config)
        .connect(name, tcp)
        .await
        .unwrap();
    let (mut send, connection) = h2::client::handshake(tls).await.unwrap();
    tokio::spawn(connection);
    let get = http::Request::get("https://192.0.2.7/x").body(()).unwrap();
    let (response, _) = send.send_request(get, true).unwrap();
    let (request, responder) = server.request().await;
    assert_eq!(request.method, Method::GET);
    responder.refuse(400);
    assert_eq!(response.await.unwrap().status(), 400);
}

#[tokio::test]
async fn oversize_headers_are_refused_and_the_tunnel_lives() {
    let Pair {
        mesh,
        pool,
        mut server,
        ..
    } = pair(Http2::default()).await;
    let mut headers = HeaderMap::new();
    let value = HeaderValue::from_bytes(&[b'x'; 8_000]).unwrap();
    for _ in 0..12 {
        headers.append("baggage", value.clone());
    }
    let oversize = Connect {
        headers,
        ..connect()
    };
    let refused = pool.connect(key(server.addr), &mesh.web, oversize).await;
    assert!(
        matches!(refused.err(), Some(Error::Status(431) | Error::Http2(..))),
        "oversize headers must not get through"
    );
    mesh.pair(&pool, &mut server).await;
    assert_eq!(server.tunnels(), 1);
}

#[tokio::test]
async fn bad_authority_is_an_error_and_no_panic() {
    let Pair {
        mesh, pool, server, ..
    } = pair(Http2::default()).await;
    for authority in ["", "a b", "192.0.2.7:80/x", "\u{0}", "[::1"] {
        let bad = Connect {
            authority: authority.to_owned(),
            headers: HeaderMap::new(),
        };
        let refused = pool.connect(key(server.addr), &mesh.web, bad).await;
        assert!(matches!(refused.err(), Some(Error::Http2(..))));
    }
}

#[tokio::test]
async fn half_close_keeps_the_other_direction_open() {
    for client_first in [true, false] {
        let mut pair = pair(Http2::default()).await;
        let (a, b) = match client_first {
            true => (&mut pair.near, &mut pair.far),
            false => (&mut pair.far, &mut pair.near),
        };
        a.write_all(b"question").await.unwrap();
        a.shutdown().await.unwrap();
        let mut text = String::new();
        b.read_to_string(&mut text).await.unwrap();
        assert_eq!(text, "question");
        assert!(a.write_all(b"more").await.is_err());
        for _ in 0..3 {
            b.write_all(b"answer").await.unwrap();
            let mut seen = [0; 6];
            a.read_exact(&mut seen).await.unwrap();
            assert_eq!(&seen, b"answer");
        }
        b.shutdown().await.unwrap();
        assert_eq!(a.read(&mut [0; 10]).await.unwrap(), 0);
        assert_eq!(a.read(&mut [0; 10]).await.unwrap(), 0, "the end stays");
    }
}

#[tokio::test]
async fn server_may_speak_first() {
    let mut pair = pair(Http2::default()).await;
    pair.far.write_all(b"220 ready\r\n").await.unwrap();
    let mut seen = [0; 11];
    pair.near.read_exact(&mut seen).await.unwrap();
    assert_eq!(&seen, b"220 ready\r\n");
}

#[tokio::test]
async fn ten_megabytes_each_way_survive_small_windows() {
    const SIZE: usize = 10_000_000;
    let pair = pair(small()).await;
    let data = pattern(SIZE);
    let (mut near_read, mut near_write) = pair.near.into_split();
    let (mut far_read, mut far_write) = pair.far.into_split();
    let up = async {
        near_write.write_all(&data).await.unwrap();
        near_write.shutdown().await.unwrap();
    };
    let down = async {
        far_write.send_bytes(data.clone()).await.unwrap();
        far_write.shutdown().await.unwrap();
    };
    let up_read = async {
        let mut seen = Vec::new();
        far_read.read_to_end(&mut seen).await.unwrap();
        assert!(seen == data);
    };
    let down_read = async {
        let mut seen = Vec::new();
        while let Some(piece) = near_read.data().await {
            seen.extend_from_slice(&piece.unwrap());
        }
        assert!(seen == data);
    };
    let all = async { tokio::join!(up, down, up_read, down_read) };
    tokio::time::timeout(LONG, all).await.expect("no deadlock");
}

/// Writes until the stream takes no more for a while; how much it took.
async fn fill(stream: &mut Stream, piece: usize) -> usize {
    let piece = pattern(piece);
    let mut taken = 0;
    loop {
        let pause = std::time::Duration::from_millis(300);
        match tokio::time::timeout(pause, stream.write(&piece)).await {
            Ok(written) => taken += written.unwrap(),
            Err(_) => return taken,
        }
    }
}

#[tokio::test]
async fn reader_that_does_not_read_stops_the_sender() {
    let mut pair = pair(small()).await;
    // The peer's window, and what the sender's library may keep.
    let bound = 20_000 + 32_768;
    let first = fill(&mut pair.near, 10_000).await;
    assert!((20_000..=bound).contains(&first), "{first}");
    // What was asked for but not dealt with gives no credit either.
    let piece = pair.far.data().await.unwrap().unwrap();
    assert_eq!(fill(&mut pair.near, 10_000).await, 0);
    // Reading on makes room for as much as was read.
    let mut rest = vec![0; first - piece.len()];
    pair.far.read_exact(&mut rest).await.unwrap();
    let second = fill(&mut pair.near, 10_000).await;
    assert!((20_000..=bound).contains(&second), "{second}");
}

#[tokio::test]
async fn stalled_stream_leaves_its_neighbours_alone() {
    let mut pair = pair(Http2::default()).await;
    let stalled = fill(&mut pair.near, 1 << 20).await;
    assert!(stalled >= 4 << 20);
    let (mut near, mut far) = pair.mesh.pair(&pair.pool, &mut pair.server).await;
    assert_eq!(pair.server.tunnels(), 1);
    near.write_all(b"alive").await.unwrap();
    let mut seen = [0; 5];
    far.read_exact(&mut seen).await.unwrap();
    assert_eq!(&seen, b"alive");
}

#[tokio::test]
async fn small_messages_to_a_stalled_reader_do_not_end_the_tunnel() {
    let mut pair = pair(Http2::default()).await;
    // A frame for each: the driver must see them one by one.
    for _ in 0..60_000 {
        pair.near.write_all(&[7; 20]).await.unwrap();
        if pair.near.poll_data(&mut noop()).is_ready() {
            panic!("the stream ended");
        }
        tokio::task::yield_now().await;
    }
    let (mut near, mut far) = pair.mesh.pair(&pair.pool, &mut pair.server).await;
    near.write_all(b"alive").await.unwrap();
    let mut seen = [0; 5];
    far.read_exact(&mut seen).await.unwrap();
    assert_eq!(pair.server.tunnels(), 1);
}

fn noop() -> std::task::Context<'static> {
    std::task::Context::from_waker(std::task::Waker::noop())
}

#[tokio::test]
async fn dropped_stream_reads_as_end_and_breaks_the_writer() {
    for client_drops in [true, false] {
        let pair = pair(Http2::default()).await;
        let (mut gone, mut left) = match client_drops {
            true => (pair.near, pair.far),
            false => (pair.far, pair.near),
        };
        gone.write_all(b"last words").await.unwrap();
        left.read_exact(&mut [0; 10]).await.unwrap();
        drop(gone);
        assert_eq!(left.read(&mut [0; 10]).await.unwrap(), 0);
        let broken = left.write_all(b"hello?").await.unwrap_err();
        assert_eq!(broken.kind(), std::io::ErrorKind::BrokenPipe);
    }
}

#[tokio::test]
async fn stream_that_both_sides_ended_may_be_dropped_before_its_data_is_sent() {
    let mut pair = pair(small()).await;
    let data = pattern(15_000);
    pair.far.shutdown().await.unwrap();
    assert_eq!(pair.near.read(&mut [0; 10]).await.unwrap(), 0);
    pair.near.write_all(&data).await.unwrap();
    pair.near.shutdown().await.unwrap();
    drop(pair.near);
    let mut seen = Vec::new();
    pair.far.read_to_end(&mut seen).await.unwrap();
    assert!(seen == data);
}

#[tokio::test]
async fn lost_connection_is_an_error_and_no_end_of_file() {
    let mut pair = pair(Http2::default()).await;
    pair.pool.cut();
    assert!(pair.near.read(&mut [0; 10]).await.is_err());
    assert!(pair.far.read(&mut [0; 10]).await.is_err());
}

#[tokio::test]
async fn data_is_pending_until_the_peer_writes() {
    let mut pair = pair(Http2::default()).await;
    assert!(matches!(pair.near.poll_data(&mut noop()), Poll::Pending));
    pair.far.send_bytes(Bytes::from_static(b"x")).await.unwrap();
    let piece = pair.near.data().await.unwrap().unwrap();
    assert_eq!(&piece[..], b"x");
}
