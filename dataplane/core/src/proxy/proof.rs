//! Proof that a pod is captured: connections that carry a nonce to where nobody serves anything.
//! One whose nonce the agent announced for this pod is remembered; all others are closed like it,
//! without a word. None of them is traffic: no log line, no verdict, no place among the pod's.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout};

use super::connection::Direction;
use super::pod::{Pod, reset};

/// Of proofs in both directions; among those that the field keeps for meshes, and used by none.
pub const PORT: u16 = 15007;
/// For documentation alone (RFC 5737, RFC 3849): no pod can have a reason to go there.
pub const OUTBOUND_V4: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 107);
pub const OUTBOUND_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0x107);

pub type Nonce = [u8; 16];

/// Of one kind for one pod; one of each family is enough.
pub const EXPECTED: usize = 4;
/// From the announcement on.
const LIFETIME: Duration = Duration::from_secs(20);
/// A proof says its nonce with its first segment.
const PATIENCE: Duration = Duration::from_secs(2);
/// Connections of one pod that are read at once: its own two or four, and a few strangers.
const AT_ONCE: usize = 16;

/// What the agent expects of one pod, and what came.
#[derive(Default)]
pub struct Proofs {
    state: Mutex<State>,
    reading: AtomicUsize,
}

#[derive(Default)]
struct State {
    expected: Vec<(Direction, Nonce)>,
    until: Option<Instant>,
    arrived: Vec<Nonce>,
}

/// Whether the pod dialled the destination of proofs.
pub fn is_outbound(dst: SocketAddr) -> bool {
    dst.port() == PORT
        && match dst.ip() {
            IpAddr::V4(ip) => ip == OUTBOUND_V4,
            IpAddr::V6(ip) => ip == OUTBOUND_V6,
        }
}

/// Reads the nonce and closes.
pub async fn meet(pod: &Pod, direction: Direction, mut client: TcpStream) {
    let outcome = pod.proofs.read(direction, &mut client).await;
    pod.shared.telemetry.metrics.bounds.proof(outcome);
    reset(client);
}

impl Proofs {
    /// In the place of what was expected before.
    pub fn expect(&self, outbound: &[Nonce], inbound: &[Nonce]) {
        let of = |direction, nonces: &[Nonce]| {
            let nonces = nonces.iter().take(EXPECTED);
            nonces.map(|nonce| (direction, *nonce)).collect::<Vec<_>>()
        };
        let mut expected = of(Direction::Outbound, outbound);
        expected.extend(of(Direction::Inbound, inbound));
        *self.state.lock() = State {
            expected,
            until: Some(Instant::now() + LIFETIME),
            arrived: Vec::new(),
        };
    }

    pub fn arrived(&self) -> Vec<Nonce> {
        self.state.lock().arrived.clone()
    }

    async fn read(&self, direction: Direction, client: &mut TcpStream) -> &'static str {
        let Some(_place) = Place::take(&self.reading) else {
            return "too_many";
        };
        let mut nonce = Nonce::default();
        match timeout(PATIENCE, client.read_exact(&mut nonce)).await {
            Ok(Ok(_)) if self.take(direction, &nonce) => "arrived",
            Ok(Ok(_)) => "unexpected",
            Ok(Err(_)) | Err(_) => "incomplete",
        }
    }

    /// Each counts once.
    fn take(&self, direction: Direction, nonce: &Nonce) -> bool {
        let mut state = self.state.lock();
        let wanted = (direction, *nonce);
        let at = state.expected.iter().position(|one| *one == wanted);
        let in_time = state.until.is_some_and(|until| Instant::now() < until);
        match at.filter(|_| in_time) {
            Some(at) => {
                state.expected.swap_remove(at);
                state.arrived.push(*nonce);
                true
            }
            None => false,
        }
    }
}

/// One that is being read, until dropped.
struct Place<'a>(&'a AtomicUsize);

impl<'a> Place<'a> {
    fn take(count: &'a AtomicUsize) -> Option<Self> {
        let place = Self(count);
        // Given back by the drop also where it is one too many.
        (count.fetch_add(1, Relaxed) < AT_ONCE).then_some(place)
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt;
    use tokio::net::TcpListener;

    use super::*;

    const OUT: Nonce = [1; 16];
    const IN: Nonce = [2; 16];

    fn expecting() -> Proofs {
        let proofs = Proofs::default();
        proofs.expect(&[OUT], &[IN]);
        proofs
    }

    async fn read(proofs: &Proofs, direction: Direction, said: &[u8]) -> &'static str {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let at = listener.local_addr().unwrap();
        let mut client = TcpStream::connect(at).await.unwrap();
        client.write_all(said).await.unwrap();
        client.shutdown().await.unwrap();
        let (mut stream, _) = listener.accept().await.unwrap();
        proofs.read(direction, &mut stream).await
    }

    #[tokio::test]
    async fn an_announced_nonce_arrives_once() {
        let proofs = expecting();
        assert_eq!(read(&proofs, Direction::Outbound, &OUT).await, "arrived");
        assert_eq!(proofs.arrived(), [OUT]);
        assert_eq!(read(&proofs, Direction::Outbound, &OUT).await, "unexpected");
        assert_eq!(proofs.arrived(), [OUT]);
    }

    #[tokio::test]
    async fn a_nonce_of_the_other_direction_or_of_nobody_counts_for_nothing() {
        let proofs = expecting();
        assert_eq!(read(&proofs, Direction::Inbound, &OUT).await, "unexpected");
        assert_eq!(
            read(&proofs, Direction::Inbound, &[9; 16]).await,
            "unexpected"
        );
        assert_eq!(
            read(&proofs, Direction::Inbound, b"GET /").await,
            "incomplete"
        );
        assert!(proofs.arrived().is_empty());
    }

    #[test]
    fn a_new_announcement_takes_the_place_of_the_one_before() {
        let proofs = expecting();
        assert!(proofs.take(Direction::Inbound, &IN));
        proofs.expect(&[[3; 16]], &[]);
        assert!(proofs.arrived().is_empty());
        assert!(!proofs.take(Direction::Outbound, &OUT));
        assert!(proofs.take(Direction::Outbound, &[3; 16]));
    }

    #[tokio::test(start_paused = true)]
    async fn a_late_nonce_counts_for_nothing() {
        let proofs = expecting();
        tokio::time::advance(LIFETIME).await;
        assert!(!proofs.take(Direction::Outbound, &OUT));
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_says_nothing_is_let_go_and_many_of_them_are_not_read() {
        let proofs = expecting();
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let at = listener.local_addr().unwrap();
        let mut silent = Vec::new();
        for _ in 0..=AT_ONCE {
            let client = TcpStream::connect(at).await.unwrap();
            silent.push((client, listener.accept().await.unwrap().0));
        }
        let reads = silent
            .iter_mut()
            .map(|(_, stream)| proofs.read(Direction::Inbound, stream));
        let outcomes = futures_util::future::join_all(reads).await;
        let count = |word| outcomes.iter().filter(|outcome| **outcome == word).count();
        assert_eq!((count("incomplete"), count("too_many")), (AT_ONCE, 1));
        assert_eq!(proofs.reading.load(Relaxed), 0);
    }

    #[test]
    fn only_the_whole_destination_is_a_proofs() {
        assert!(is_outbound((OUTBOUND_V4, PORT).into()));
        assert!(is_outbound((OUTBOUND_V6, PORT).into()));
        assert!(!is_outbound((OUTBOUND_V4, 80).into()));
        assert!(!is_outbound((Ipv4Addr::new(10, 0, 0, 1), PORT).into()));
    }
}
