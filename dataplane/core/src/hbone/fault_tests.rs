//! Peers whose TLS is in order and whose HTTP/2 is not: cut frames, frames too long, silence at the
//! wrong moment, and readers that never read.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use http::HeaderMap;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::client::TlsStream;
use tokio_rustls::{TlsAcceptor, TlsConnector, server};

use super::nested::Nested;
use super::raw::{self, ACK, END_HEADERS, Frame, PREFACE, kind};
use super::settings::Http2;
use super::testing::{LONG, Mesh, connect, dial, eventually, key, new_pool, pool_with};
use super::{Error, Tunnel};
use crate::config::Limits;

const LIMIT: Duration = Duration::from_millis(200);

/// CONNECT to 192.0.2.7:80 in HPACK without its tables (RFC 7541 6.2.2): method and authority.
const CONNECT: &[u8] = b"\x02\x07CONNECT\x01\x0c192.0.2.7:80";
/// `:status: 200`, a row of the static table.
const OK: &[u8] = &[0x88];

fn impatient() -> Limits {
    Limits {
        tls_handshake_timeout: LIMIT,
        preface_timeout: LIMIT,
        ..Limits::default()
    }
}

/// Our server's side of a tunnel to a peer that does as `peer` says once TLS stands.
async fn serve<T>(
    mesh: &Mesh,
    peer: impl AsyncFnOnce(TlsStream<TcpStream>) -> T,
    ours: impl AsyncFnOnce(Result<Tunnel, Error>),
) -> T {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let config = mesh.web.client(&key(addr).expected).unwrap();
    let near = async {
        let tcp = TcpStream::connect(addr).await.unwrap();
        let name = ServerName::from(addr.ip());
        peer(TlsConnector::from(config).connect(name, tcp).await.unwrap()).await
    };
    let far = async {
        let (tcp, _) = listener.accept().await.unwrap();
        let limits = Limits::default();
        ours(Tunnel::accept(tcp, &mesh.db, &limits, &Http2::default()).await).await;
    };
    let both = async { tokio::join!(near, far) };
    tokio::time::timeout(LONG, both).await.expect("in time").0
}

async fn greet(tls: &mut TlsStream<TcpStream>) {
    tls.write_all(PREFACE).await.unwrap();
    raw::send(tls, kind::SETTINGS, 0, 0, &[]).await.unwrap();
}

/// Runs the tunnel until it is over; the error that ended it.
async fn end_of(tunnel: Result<Tunnel, Error>) -> Option<Error> {
    let mut tunnel = tunnel.expect("TLS and preface are in order");
    loop {
        match tunnel.next().await {
            Some(Ok(_)) => {}
            Some(Err(error)) => return Some(error),
            None => return None,
        }
    }
}

#[tokio::test]
async fn a_frame_longer_than_agreed_ends_the_tunnel_with_its_reason() {
    let mesh = Mesh::new().await;
    let peer = async |mut tls: TlsStream<TcpStream>| {
        greet(&mut tls).await;
        let length = (1 << 20) + 1;
        tls.write_all(&raw::header(length, kind::DATA, 0, 1))
            .await
            .unwrap();
        tls.flush().await.unwrap();
        while let Some(frame) = raw::receive(&mut tls).await {
            if frame.kind == kind::GOAWAY {
                return frame.payload[7];
            }
        }
        panic!("no GOAWAY");
    };
    let code = serve(&mesh, peer, async |tunnel| {
        let error = end_of(tunnel).await;
        assert!(matches!(error, Some(Error::Http2(..))), "{error:?}");
    })
    .await;
    // FRAME_SIZE_ERROR, RFC 9113 7.
    assert_eq!(code, 6);
}

#[tokio::test]
async fn a_frame_that_breaks_off_ends_the_tunnel() {
    let mesh = Mesh::new().await;
    for cut in [4, 9, 12] {
        let peer = async |mut tls: TlsStream<TcpStream>| {
            greet(&mut tls).await;
            let mut frame = raw::header(CONNECT.len(), kind::HEADERS, END_HEADERS, 1).to_vec();
            frame.extend(CONNECT);
            tls.write_all(&frame[..cut]).await.unwrap();
            tls.flush().await.unwrap();
        };
        serve(&mesh, peer, async |tunnel| {
            let mut tunnel = tunnel.expect("TLS and preface are in order");
            let next = tunnel.next().await;
            assert!(
                !matches!(next, Some(Ok(_))),
                "{cut}: half a request is none"
            );
            assert!(tunnel.next().await.is_none());
        })
        .await;
    }
}

#[tokio::test]
async fn headers_that_are_no_headers_end_the_tunnel() {
    let mesh = Mesh::new().await;
    let peer = async |mut tls: TlsStream<TcpStream>| {
        greet(&mut tls).await;
        // An index beyond both tables.
        let bad = [0xff, 0xff, 0xff, 0x7f];
        let sent = raw::send(&mut tls, kind::HEADERS, END_HEADERS, 1, &bad).await;
        sent.unwrap();
        while raw::receive(&mut tls).await.is_some() {}
    };
    serve(&mesh, peer, async |tunnel| {
        let error = end_of(tunnel).await;
        assert!(matches!(error, Some(Error::Http2(..))), "{error:?}");
    })
    .await;
}

#[tokio::test]
async fn a_reader_that_never_reads_stops_its_own_sender_alone() {
    let mesh = Mesh::new().await;
    let stop = Arc::new(tokio::sync::Notify::new());
    let done = stop.clone();
    let peer = async |mut tls: TlsStream<TcpStream>| {
        greet(&mut tls).await;
        let sent = raw::send(&mut tls, kind::HEADERS, END_HEADERS, 1, CONNECT).await;
        sent.unwrap();
        // Keeps everything open and reads nothing.
        done.notified().await;
        drop(tls);
    };
    serve(&mesh, peer, async |tunnel| {
        let mut tunnel = tunnel.unwrap();
        let (_, responder) = tunnel.next().await.unwrap().unwrap();
        let mut stream = responder.accept(HeaderMap::new()).unwrap();
        let sent = AtomicUsize::new(0);
        let send = async {
            let chunk = vec![7; 64 << 10];
            while let Ok(count) = stream.write(&chunk).await {
                sent.fetch_add(count, Ordering::SeqCst);
            }
        };
        let over = async { while tunnel.next().await.is_some_and(|next| next.is_ok()) {} };
        let watch = async {
            // Until nothing more is taken.
            let mut before = usize::MAX;
            while before != sent.load(Ordering::SeqCst) {
                before = sent.load(Ordering::SeqCst);
                tokio::time::sleep(LIMIT).await;
            }
            stop.notify_one();
        };
        tokio::join!(send, over, watch);
        let taken = sent.load(Ordering::SeqCst);
        // The default window that this peer left as it was, not what we could have sent.
        assert!(taken <= 65_535, "{taken} bytes");
    })
    .await;
}

#[tokio::test]
async fn half_a_handshake_times_out_on_either_side() {
    let mesh = Mesh::new().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    // A record of 512 bytes is announced, and a few come.
    let half = [0x16, 0x03, 0x01, 0x02, 0x00, 0x01, 0x00, 0x01];

    let mut near = TcpStream::connect(addr).await.unwrap();
    near.write_all(&half).await.unwrap();
    let (tcp, _) = listener.accept().await.unwrap();
    let refused = Tunnel::accept(tcp, &mesh.db, &impatient(), &Http2::default()).await;
    let refused = refused.err();
    assert!(
        matches!(refused, Some(Error::Timeout(_, "TLS handshake", _))),
        "{refused:?}"
    );

    let pool = new_pool(impatient(), dial());
    let far = async {
        let (mut tcp, _) = listener.accept().await.unwrap();
        tcp.write_all(&half).await.unwrap();
        // Until the other side gives up.
        let _ = tcp.read_to_end(&mut Vec::new()).await;
    };
    let (refused, ()) = tokio::join!(mesh.connect(&pool, addr), far);
    let refused = refused.err();
    assert!(
        matches!(refused, Some(Error::Timeout(_, "TLS handshake", _))),
        "{refused:?}"
    );
    assert_eq!(pool.size(), (0, 0));
}

#[tokio::test]
async fn a_reset_in_any_phase_fails_the_connection_and_leaves_nothing() {
    let mesh = Mesh::new().await;
    for after_tls in [false, true] {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let config = mesh.db.server.clone();
        let far = async {
            let (mut tcp, _) = listener.accept().await.unwrap();
            if after_tls {
                let tls = TlsAcceptor::from(config).accept(tcp).await.unwrap();
                tls.get_ref().0.set_zero_linger().unwrap();
            } else {
                tcp.read_exact(&mut [0; 5]).await.unwrap();
                tcp.set_zero_linger().unwrap();
            }
        };
        let pool = new_pool(Limits::default(), dial());
        let (refused, ()) = tokio::join!(mesh.connect(&pool, addr), far);
        assert!(matches!(refused.err(), Some(Error::Tls(..))));
        eventually("nothing is left", || pool.size() == (0, 0)).await;
    }
}

/// Counts PINGs and answers them; sends what it is told to.
async fn far_end(
    mut tls: server::TlsStream<impl AsyncRead + AsyncWrite + Unpin + Send + 'static>,
    pings: Arc<AtomicUsize>,
    busy: Duration,
) {
    tls.read_exact(&mut vec![0; PREFACE.len()]).await.unwrap();
    raw::send(&mut tls, kind::SETTINGS, 0, 0, &[])
        .await
        .unwrap();
    let (mut read, mut write) = tokio::io::split(tls);
    let (frames, mut received) = tokio::sync::mpsc::unbounded_channel::<Frame>();
    tokio::spawn(async move {
        while let Some(frame) = raw::receive(&mut read).await {
            let _ = frames.send(frame);
        }
    });
    let mut stream = None;
    let begin = tokio::time::Instant::now();
    let mut tick = tokio::time::interval(LIMIT / 10);
    loop {
        tokio::select! {
            frame = received.recv() => {
                let Some(frame) = frame else { return };
                let sent = match frame.kind {
                    kind::PING if frame.flags & ACK == 0 => {
                        pings.fetch_add(1, Ordering::SeqCst);
                        raw::send(&mut write, kind::PING, ACK, 0, &frame.payload).await
                    }
                    kind::SETTINGS if frame.flags & ACK == 0 => {
                        raw::send(&mut write, kind::SETTINGS, ACK, 0, &[]).await
                    }
                    kind::HEADERS => {
                        stream = Some(frame.stream);
                        raw::send(&mut write, kind::HEADERS, END_HEADERS, frame.stream, OK).await
                    }
                    _ => Ok(()),
                };
                if sent.is_err() {
                    return;
                }
            }
            _ = tick.tick(), if begin.elapsed() < busy => if let Some(stream) = stream {
                raw::send(&mut write, kind::DATA, 0, stream, b"x").await.unwrap();
            }
        }
    }
}

#[tokio::test]
async fn pings_are_quiet_while_data_flows_and_come_when_it_stops() {
    let mesh = Mesh::new().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let pings = Arc::new(AtomicUsize::new(0));
    let busy = LIMIT * 8;
    let (config, counted) = (mesh.db.server.clone(), pings.clone());
    tokio::spawn(async move {
        let (tcp, _) = listener.accept().await.unwrap();
        let tls = TlsAcceptor::from(config).accept(tcp).await.unwrap();
        far_end(tls, counted, busy).await;
    });
    let fast = Http2 {
        ping_interval: LIMIT,
        ping_timeout: LONG,
        ..Http2::default()
    };
    let pool = pool_with(Limits::default(), dial(), fast);
    let mut stream = mesh.connect(&pool, addr).await.unwrap().stream;
    let begin = tokio::time::Instant::now();
    while begin.elapsed() < LIMIT * 6 {
        stream.read_exact(&mut [0]).await.unwrap();
    }
    // The one that begins every tunnel.
    assert_eq!(pings.load(Ordering::SeqCst), 1);
    let still = tokio::spawn(async move {
        let _ = stream.read_to_end(&mut Vec::new()).await;
    });
    eventually("the silence is asked about", || {
        pings.load(Ordering::SeqCst) >= 3
    })
    .await;
    still.abort();
}

#[tokio::test]
async fn pings_of_an_inner_tunnel_are_quiet_while_data_flows_and_come_when_it_stops() {
    let mesh = Mesh::new().await;
    let mut gateway = mesh.server(Http2::default()).await;
    let via = gateway.addr;
    let pool = new_pool(Limits::default(), dial());
    let (outer, far) = mesh.pair(&pool, &mut gateway).await;
    let pings = Arc::new(AtomicUsize::new(0));
    let (config, counted) = (mesh.db.server.clone(), pings.clone());
    tokio::spawn(async move {
        let tls = TlsAcceptor::from(config).accept(far).await.unwrap();
        far_end(tls, counted, LIMIT * 8).await;
    });
    let fast = Http2 {
        ping_interval: LIMIT,
        ping_timeout: LONG,
        ..Http2::default()
    };
    let (_cut, cut) = tokio::sync::watch::channel(false);
    let nested = Nested {
        expected: &key(via).expected,
        credentials: &mesh.web,
        via,
        limits: Arc::new(Limits::default()),
        http2: &fast,
        cut,
    };
    let inner = nested.connect(outer, &connect()).await.unwrap();
    let mut stream = inner.stream;
    let begin = tokio::time::Instant::now();
    while begin.elapsed() < LIMIT * 6 {
        stream.read_exact(&mut [0]).await.unwrap();
    }
    assert_eq!(pings.load(Ordering::SeqCst), 0);
    let still = tokio::spawn(async move {
        let _ = stream.read_to_end(&mut Vec::new()).await;
    });
    eventually("the silence is asked about", || {
        pings.load(Ordering::SeqCst) >= 2
    })
    .await;
    still.abort();
}
