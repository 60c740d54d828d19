//! Tests of the pool: what is shared, what waits, what ends.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use super::settings::Http2;
use super::testing::{LONG, Mesh, Server, connect, dial, eventually, id, key, new_pool};
use super::{Dial, Error, Key, Pool, Stream};
use crate::config::Limits;

fn limits(streams: u32) -> Limits {
    Limits {
        pool_max_streams: streams,
        ..Limits::default()
    }
}

/// Counts dials, and waits before each until `gate` gives a permit.
fn gated(gate: Arc<tokio::sync::Semaphore>, count: Arc<AtomicUsize>, fail: bool) -> Dial {
    Arc::new(move |dst| {
        let gate = gate.clone();
        count.fetch_add(1, Ordering::SeqCst);
        Box::pin(async move {
            gate.acquire()
                .await
                .map_err(std::io::Error::other)?
                .forget();
            match fail {
                true => Err(std::io::ErrorKind::ConnectionRefused.into()),
                false => tokio::net::TcpStream::connect(dst).await,
            }
        })
    })
}

async fn many(
    mesh: &Mesh,
    pool: &Pool,
    server: &mut Server,
    count: usize,
) -> Vec<(Stream, Stream)> {
    let near = async {
        let all = (0..count).map(|_| mesh.connect(pool, server.addr));
        futures_util::future::join_all(all).await
    };
    let requests = &mut server.requests;
    let far = async {
        let mut streams = Vec::new();
        while streams.len() < count {
            let (_, responder) = requests.recv().await.unwrap();
            streams.push(responder.accept(http::HeaderMap::new()).unwrap());
        }
        streams
    };
    let both = async { tokio::join!(near, far) };
    let (near, far) = tokio::time::timeout(LONG, both).await.expect("in time");
    // Which is whose doesn't matter here.
    near.into_iter()
        .map(|n| n.unwrap().stream)
        .zip(far)
        .collect()
}

#[tokio::test]
async fn streams_share_a_tunnel_up_to_one_below_the_maximum() {
    let mesh = Mesh::new().await;
    let mut server = mesh.server(Http2::default()).await;
    let pool = new_pool(limits(10), dial());
    let first = many(&mesh, &pool, &mut server, 9).await;
    assert_eq!((server.tunnels(), pool.size()), (1, (1, 9)));
    let _tenth = mesh.pair(&pool, &mut server).await;
    assert_eq!((server.tunnels(), pool.size()), (2, (2, 10)));
    drop(first);
    eventually("places are free again", || pool.size().1 == 1).await;
    let _again = many(&mesh, &pool, &mut server, 8).await;
    assert_eq!(server.tunnels(), 2, "a full tunnel returns");
}

#[tokio::test]
async fn different_keys_do_not_share() {
    let mesh = Mesh::new().await;
    let mut server = mesh.server(Http2::default()).await;
    let pool = new_pool(Limits::default(), dial());
    let _one = mesh.pair(&pool, &mut server).await;
    let other = Key {
        expected: Arc::new([id("db"), id("db2")]),
        ..key(server.addr)
    };
    let far = pool.connect(other, &mesh.web, connect());
    let (near, _far) = tokio::join!(far, server.accept());
    near.unwrap();
    assert_eq!(server.tunnels(), 2);
}

#[tokio::test]
async fn concurrent_first_streams_dial_once() {
    let mesh = Mesh::new().await;
    let mut server = mesh.server(Http2::default()).await;
    let gate = Arc::new(tokio::sync::Semaphore::new(100));
    let dials = Arc::new(AtomicUsize::new(0));
    let pool = new_pool(limits(100), gated(gate, dials.clone(), false));
    let _streams = many(&mesh, &pool, &mut server, 90).await;
    assert_eq!(dials.load(Ordering::SeqCst), 1);
    assert_eq!(pool.size(), (1, 90));
}

#[tokio::test]
async fn failed_first_dial_wakes_everybody_with_its_error() {
    let mesh = Arc::new(Mesh::new().await);
    let gate = Arc::new(tokio::sync::Semaphore::new(0));
    let dials = Arc::new(AtomicUsize::new(0));
    let pool = new_pool(Limits::default(), gated(gate.clone(), dials.clone(), true));
    let waiters: Vec<_> = (0..20)
        .map(|_| {
            let (mesh, pool) = (mesh.clone(), pool.clone());
            tokio::spawn(async move { mesh.connect(&pool, ([127, 0, 0, 1], 9).into()).await.err() })
        })
        .collect();
    eventually("dialled", || dials.load(Ordering::SeqCst) == 1).await;
    for _ in 0..50 {
        tokio::task::yield_now().await;
    }
    gate.add_permits(1);
    for waiter in waiters {
        let error = tokio::time::timeout(LONG, waiter).await.unwrap().unwrap();
        assert!(matches!(error, Some(Error::Connect(..))), "{error:?}");
    }
    assert_eq!(dials.load(Ordering::SeqCst), 1);
    // And the key isn't spoilt: the next one dials again.
    gate.add_permits(1);
    assert!(
        mesh.connect(&pool, ([127, 0, 0, 1], 9).into())
            .await
            .is_err()
    );
    assert_eq!(dials.load(Ordering::SeqCst), 2);
    assert_eq!(pool.keys().0, 0, "nothing is kept of failed keys");
}

#[tokio::test]
async fn refused_tls_fails_everybody_with_the_reason() {
    let mesh = Mesh::new().await;
    let server = mesh.server(Http2::default()).await;
    let pool = new_pool(Limits::default(), dial());
    let wrong = Key {
        expected: Arc::new([id("other")]),
        ..key(server.addr)
    };
    let all = (0..5).map(|_| pool.connect(wrong.clone(), &mesh.web, connect()));
    for refused in futures_util::future::join_all(all).await {
        match refused.err() {
            Some(Error::Tls(_, text)) => assert!(text.contains("/sa/other was expected"), "{text}"),
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn client_that_the_server_refuses_is_told_that_it_was_tls() {
    let mesh = Mesh::new().await;
    let server = mesh.server(Http2::default()).await;
    let ca = crate::tls::testing::Ca::new("foreign");
    let bend = crate::tls::testing::Bend::plain(&id("web"));
    // It trusts the server, but its own certificate is of a CA that the server doesn't know.
    let stranger = ca.unchecked(&id("web"), &bend, &[&mesh.ca]);
    let pool = new_pool(Limits::default(), dial());
    let all = (0..5).map(|_| pool.connect(key(server.addr), &stranger, connect()));
    for refused in futures_util::future::join_all(all).await {
        match refused.err() {
            // The alert may be lost to the reset that follows it.
            Some(Error::Tls(_, text)) => {
                assert!(text.contains("alert") || text.contains("refused"), "{text}");
            }
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn one_who_gives_up_does_not_take_the_dial_along() {
    let mesh = Arc::new(Mesh::new().await);
    let mut server = mesh.server(Http2::default()).await;
    let gate = Arc::new(tokio::sync::Semaphore::new(0));
    let dials = Arc::new(AtomicUsize::new(0));
    let pool = new_pool(Limits::default(), gated(gate.clone(), dials.clone(), false));
    let (addr, spawned) = (server.addr, (mesh.clone(), pool.clone()));
    let first = tokio::spawn(async move { spawned.0.connect(&spawned.1, addr).await.is_ok() });
    eventually("dialled", || dials.load(Ordering::SeqCst) == 1).await;
    first.abort();
    let second = async {
        gate.add_permits(1);
        mesh.pair(&pool, &mut server).await
    };
    tokio::time::timeout(LONG, second).await.expect("in time");
    assert_eq!(dials.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn limit_of_the_peer_is_respected() {
    let mesh = Mesh::new().await;
    let http2 = Http2 {
        max_streams: 4,
        ..Http2::default()
    };
    let mut server = mesh.server(http2).await;
    let pool = new_pool(limits(100), dial());
    let _streams = many(&mesh, &pool, &mut server, 12).await;
    assert_eq!(server.tunnels(), 4, "three on each");
}

#[tokio::test]
async fn goaway_moves_new_streams_to_a_new_tunnel_and_lets_open_ones_end() {
    let mesh = Mesh::new().await;
    let mut server = mesh.server(Http2::default()).await;
    let pool = new_pool(Limits::default(), dial());
    let (mut near, mut far) = mesh.pair(&pool, &mut server).await;
    server.drain.notify_waiters();
    // Until its GOAWAY has arrived here, the old one may be asked.
    while server.tunnels() < 2 {
        mesh.pair(&pool, &mut server).await;
    }
    near.write_all(b"still here").await.unwrap();
    far.read_exact(&mut [0; 10]).await.unwrap();
}

#[tokio::test]
async fn requests_in_flight_at_goaway_are_sent_again() {
    let mesh = Mesh::new().await;
    let mut server = mesh.server(Http2::default()).await;
    let pool = new_pool(Limits::default(), dial());
    for round in 0..30 {
        let (near, far) = mesh.pair(&pool, &mut server).await;
        server.drain.notify_waiters();
        // Some find the tunnel good, some in between, some ended: none fails.
        let _streams = many(&mesh, &pool, &mut server, 1 + round % 5).await;
        drop((near, far));
    }
}

#[tokio::test]
async fn tunnel_whose_server_died_is_replaced() {
    let mesh = Mesh::new().await;
    let mut server = mesh.server(Http2::default()).await;
    let pool = new_pool(Limits::default(), dial());
    let (mut near, far) = mesh.pair(&pool, &mut server).await;
    let addr = server.addr;
    drop(server);
    assert!(near.read(&mut [0; 1]).await.is_err());
    drop(far);
    let listener = TcpListener::bind(addr).await.unwrap();
    let mut server = mesh.server_on(listener, Http2::default());
    mesh.pair(&pool, &mut server).await;
}

#[tokio::test]
async fn idle_tunnel_is_released_and_a_used_one_is_not() {
    let mesh = Mesh::new().await;
    let mut server = mesh.server(Http2::default()).await;
    let idle = Duration::from_millis(150);
    let short = Limits {
        pool_idle: idle,
        ..Limits::default()
    };
    let pool = new_pool(short, dial());
    let (near, far) = mesh.pair(&pool, &mut server).await;
    tokio::time::sleep(idle * 3).await;
    assert_eq!(pool.size(), (1, 1));
    drop((near, far));
    eventually("released", || pool.size() == (0, 0)).await;
    assert_eq!(pool.keys().0, 0);
}

#[tokio::test]
async fn drained_pool_refuses_new_streams_and_lets_open_ones_end() {
    let mesh = Mesh::new().await;
    let mut server = mesh.server(Http2::default()).await;
    let pool = new_pool(Limits::default(), dial());
    let (mut near, mut far) = mesh.pair(&pool, &mut server).await;
    pool.drain();
    let refused = mesh.connect(&pool, server.addr).await.err();
    assert!(matches!(refused, Some(Error::Draining)));
    near.write_all(b"still here").await.unwrap();
    far.read_exact(&mut [0; 10]).await.unwrap();
    near.shutdown().await.unwrap();
    far.shutdown().await.unwrap();
    assert_eq!(near.read(&mut [0; 1]).await.unwrap(), 0);
    drop((near, far));
    eventually("closed", || pool.size() == (0, 0)).await;
}

#[tokio::test]
async fn cut_ends_tunnels_and_dials_at_once() {
    let mesh = Arc::new(Mesh::new().await);
    let mut server = mesh.server(Http2::default()).await;
    let gate = Arc::new(tokio::sync::Semaphore::new(1));
    let dials = Arc::new(AtomicUsize::new(0));
    let pool = new_pool(limits(2), gated(gate, dials.clone(), false));
    let (mut near, mut far) = mesh.pair(&pool, &mut server).await;
    let waiting = {
        let (mesh, pool, addr) = (mesh.clone(), pool.clone(), server.addr);
        tokio::spawn(async move { mesh.connect(&pool, addr).await.err() })
    };
    eventually("dialling", || dials.load(Ordering::SeqCst) == 2).await;
    pool.cut();
    tokio::time::timeout(LONG, pool.gone()).await.unwrap();
    assert_eq!(pool.size().0, 0);
    assert!(matches!(waiting.await.unwrap(), Some(Error::Draining)));
    assert!(near.read(&mut [0; 1]).await.is_err());
    assert!(far.read(&mut [0; 1]).await.is_err());
}

#[tokio::test]
async fn dropped_pool_is_cut() {
    let mesh = Mesh::new().await;
    let mut server = mesh.server(Http2::default()).await;
    let pool = new_pool(Limits::default(), dial());
    let (_near, mut far) = mesh.pair(&pool, &mut server).await;
    drop(pool);
    assert!(far.read(&mut [0; 1]).await.is_err());
}

#[tokio::test]
async fn full_pool_drops_the_tunnel_that_was_idle_longest() {
    let mesh = Mesh::new().await;
    let two = Limits {
        pool_max_tunnels: 2,
        ..Limits::default()
    };
    let pool = new_pool(two, dial());
    let mut servers = Vec::new();
    for _ in 0..3 {
        servers.push(mesh.server(Http2::default()).await);
    }
    for server in &mut servers {
        mesh.pair(&pool, server).await;
        // The order of ends is the order of use.
        eventually("idle", || pool.size().1 == 0).await;
    }
    eventually("two are kept", || pool.size().0 == 2).await;
    for (i, server) in servers.iter_mut().enumerate().rev() {
        mesh.pair(&pool, server).await;
        let dials = if i == 0 { 2 } else { 1 };
        assert_eq!(server.tunnels(), dials, "server {i}");
    }
}

#[tokio::test]
async fn over_the_bound_a_busy_pool_still_dials_but_keeps_nothing() {
    let mesh = Mesh::new().await;
    let one = Limits {
        pool_max_tunnels: 1,
        ..Limits::default()
    };
    let pool = new_pool(one, dial());
    let (mut a, mut b) = (
        mesh.server(Http2::default()).await,
        mesh.server(Http2::default()).await,
    );
    let _busy = mesh.pair(&pool, &mut a).await;
    let over = mesh.pair(&pool, &mut b).await;
    assert_eq!(pool.size(), (2, 2));
    drop(over);
    eventually("gone when idle", || pool.size() == (1, 1)).await;
    assert_eq!(pool.keys().0, 1);
}

#[tokio::test]
async fn map_of_keys_shrinks_again() {
    let mesh = Mesh::new().await;
    let refuse: Dial = Arc::new(|_| {
        Box::pin(async {
            tokio::task::yield_now().await;
            Err(std::io::ErrorKind::ConnectionRefused.into())
        })
    });
    let pool = new_pool(Limits::default(), refuse);
    let addr = |i: u16| ([127, 0, 0, 1], i).into();
    let all = (1..=2000).map(|i| mesh.connect(&pool, addr(i)));
    let failed = futures_util::future::join_all(all).await;
    assert!(failed.iter().all(Result::is_err));
    let (len, capacity) = pool.keys();
    assert_eq!(len, 0);
    assert!(capacity <= 256, "{capacity}");
}

#[tokio::test]
async fn a_limit_that_changes_reaches_a_pool_that_runs() {
    let mesh = Mesh::new().await;
    let mut server = mesh.server(Http2::default()).await;
    let live = Arc::new(arc_swap::ArcSwap::from_pointee(limits(10)));
    let sockets = crate::inpod::Descriptors::of_process().share();
    let bounds = crate::telemetry::Bounds::default();
    let pool = Pool::new(
        live.clone(),
        Http2::default(),
        dial(),
        sockets,
        bounds.clone(),
    );
    let _first = mesh.pair(&pool, &mut server).await;
    let _second = mesh.pair(&pool, &mut server).await;
    assert_eq!(server.tunnels(), 1);
    live.store(limits(1).into());
    let _third = mesh.pair(&pool, &mut server).await;
    assert_eq!(server.tunnels(), 2);
    assert_eq!(bounds.outbound_tunnels.get(), 2);
    live.store(limits(10).into());
    let _fourth = mesh.pair(&pool, &mut server).await;
    assert_eq!(server.tunnels(), 2);
    pool.cut();
    pool.gone().await;
    assert_eq!(bounds.outbound_tunnels.get(), 0);
}
