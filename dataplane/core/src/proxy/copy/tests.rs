use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::*;

const PATIENCE: Duration = Duration::from_secs(20);

/// The ends that a test holds, with a copy between them.
struct Relay {
    client: TcpStream,
    server: TcpStream,
    counters: Arc<Counters>,
    copy: JoinHandle<io::Result<()>>,
}

async fn pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (ours, theirs) = tokio::join!(TcpStream::connect(address), listener.accept());
    (ours.unwrap(), theirs.unwrap().0)
}

async fn relay() -> Relay {
    let (client, near) = pair().await;
    let (far, server) = pair().await;
    let counters = Arc::new(Counters::default());
    let seen = counters.clone();
    let copy = tokio::spawn(async move { bidirectional(near, far, &seen).await });
    Relay {
        client,
        server,
        counters,
        copy,
    }
}

async fn soon<T>(what: impl Future<Output = T>) -> T {
    timeout(PATIENCE, what).await.expect("took too long")
}

async fn read_exactly(stream: &mut TcpStream, length: usize) -> Vec<u8> {
    let mut data = vec![0; length];
    soon(stream.read_exact(&mut data)).await.unwrap();
    data
}

#[tokio::test]
async fn the_end_of_one_direction_leaves_the_other_open() {
    let mut relay = relay().await;
    relay.client.write_all(b"question").await.unwrap();
    relay.client.shutdown().await.unwrap();
    let mut question = Vec::new();
    soon(relay.server.read_to_end(&mut question)).await.unwrap();
    assert_eq!(question, b"question");
    relay.server.write_all(b"late answer").await.unwrap();
    assert_eq!(read_exactly(&mut relay.client, 11).await, b"late answer");
    assert!(!relay.copy.is_finished());
    drop(relay.server);
    soon(relay.copy).await.unwrap().unwrap();
    assert_eq!(relay.counters.by_client(), 8);
    assert_eq!(relay.counters.by_server(), 11);
}

#[tokio::test]
async fn a_server_may_speak_first_and_small_messages_are_not_kept() {
    let mut relay = relay().await;
    relay.server.write_all(b"220 hello\r\n").await.unwrap();
    assert_eq!(read_exactly(&mut relay.client, 11).await, b"220 hello\r\n");
    for n in 0..200_u8 {
        relay.client.write_all(&[n]).await.unwrap();
        assert_eq!(read_exactly(&mut relay.server, 1).await, [n]);
    }
    // Visible while the connection lives.
    assert_eq!(relay.counters.by_client(), 200);
    assert_eq!(relay.counters.by_server(), 11);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn much_data_arrives_whole_both_ways_at_once() {
    const LENGTH: usize = 24 << 20;
    let relay = relay().await;
    let pattern = |seed: usize| (0..LENGTH).map(move |n| ((n * 31 + seed) >> 3) as u8);
    let exchange = |stream: TcpStream, mine: Vec<u8>, theirs: Vec<u8>| async move {
        let (mut read, mut write) = stream.into_split();
        let send = tokio::spawn(async move {
            write.write_all(&mine).await.unwrap();
            write.shutdown().await.unwrap();
        });
        let mut got = Vec::with_capacity(LENGTH);
        read.read_to_end(&mut got).await.unwrap();
        assert!(got == theirs, "bytes changed on the way");
        send.await.unwrap();
    };
    let (a, b): (Vec<u8>, Vec<u8>) = (pattern(1).collect(), pattern(2).collect());
    let client = tokio::spawn(exchange(relay.client, a.clone(), b.clone()));
    let server = tokio::spawn(exchange(relay.server, b, a));
    soon(client).await.unwrap();
    soon(server).await.unwrap();
    soon(relay.copy).await.unwrap().unwrap();
    assert_eq!(relay.counters.by_client(), LENGTH as u64);
    assert_eq!(relay.counters.by_server(), LENGTH as u64);
}

#[tokio::test]
async fn a_reset_is_not_shown_as_an_orderly_end() {
    let mut relay = relay().await;
    relay.server.write_all(b"half an ans").await.unwrap();
    read_exactly(&mut relay.client, 11).await;
    relay.server.set_zero_linger().unwrap();
    drop(relay.server);
    let error = soon(relay.client.read(&mut [0; 8])).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    let error = soon(relay.copy).await.unwrap().unwrap_err();
    assert!(is_peer_close(&error), "{error}");
}

#[tokio::test]
async fn a_cut_copy_resets_both_ends() {
    let mut relay = relay().await;
    relay.client.write_all(b"x").await.unwrap();
    read_exactly(&mut relay.server, 1).await;
    relay.copy.abort();
    for stream in [&mut relay.client, &mut relay.server] {
        let error = soon(stream.read(&mut [0; 8])).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    }
}

#[tokio::test]
async fn a_reader_that_stops_stops_the_sender() {
    let mut relay = relay().await;
    let chunk = vec![7; 1 << 20];
    let mut sent = 0;
    // Ends when every buffer on the way is full.
    while let Ok(result) = timeout(Duration::from_secs(1), relay.client.write(&chunk)).await {
        sent += result.unwrap();
        assert!(sent < 256 << 20, "nothing held the sender back");
    }
    read_exactly(&mut relay.server, sent).await;
    assert_eq!(relay.counters.by_client(), sent as u64);
}
