//! Moves the bytes of a connection both ways until both ends have finished, keeping half-close
//! (facts ztunnel 15.1).

mod direction;
mod leg;

#[cfg(test)]
mod tests;

use std::future::poll_fn;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::task::Poll;

use direction::Direction;
pub use leg::Leg;

/// Payload bytes so far. Visible to others while the copy runs.
#[derive(Debug, Default)]
pub struct Counters {
    from_client: AtomicU64,
    from_server: AtomicU64,
}

impl Counters {
    pub fn by_client(&self) -> u64 {
        self.from_client.load(Relaxed)
    }

    pub fn by_server(&self) -> u64 {
        self.from_server.load(Relaxed)
    }
}

/// Runs until both sides have finished sending, or one of them fails: then both are reset, so that
/// neither takes a cut stream for a whole one. The same holds when the future is dropped early.
pub async fn bidirectional<C: Leg, S: Leg>(
    client: C,
    server: S,
    counters: &Counters,
) -> io::Result<()> {
    let mut legs = Legs {
        client,
        server,
        finished: false,
    };
    let (mut up, mut down) = (Direction::default(), Direction::default());
    let result = poll_fn(|cx| {
        let Legs { client, server, .. } = &mut legs;
        let up = up.poll(cx, client, server, &counters.from_client)?;
        let down = down.poll(cx, server, client, &counters.from_server)?;
        match (up, down) {
            (Poll::Ready(()), Poll::Ready(())) => Poll::Ready(io::Result::Ok(())),
            _ => Poll::Pending,
        }
    })
    .await;
    legs.finished = result.is_ok();
    result
}

/// Whether an error only says that a peer closed: nothing an operator should be told
/// (facts ztunnel 12.4).
pub fn is_peer_close(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionAborted
            | io::ErrorKind::BrokenPipe
            | io::ErrorKind::UnexpectedEof
            | io::ErrorKind::NotConnected
    )
}

struct Legs<C: Leg, S: Leg> {
    client: C,
    server: S,
    finished: bool,
}

impl<C: Leg, S: Leg> Drop for Legs<C, S> {
    fn drop(&mut self) {
        if !self.finished {
            self.client.reset();
            self.server.reset();
        }
    }
}
