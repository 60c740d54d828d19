//! One way of a connection: read, write, flush when there is nothing more to read, half-close at
//! the end.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::task::{Context, Poll, ready};

use bytes::{Bytes, BytesMut};

use super::leg::Leg;

/// Sizes of reads, and after how many bytes the next one is taken. Like upstream's (facts ztunnel
/// 15.1), but sooner and up to a whole frame: an idle direction holds no buffer, so a larger one
/// costs nothing, and fewer, longer writes save a tenth of the CPU. Room for the frame header is
/// left, so that a chunk and its header fill whole TLS records.
const SIZES: [(u64, usize); 4] = [
    (0, 4 * 1024),
    (16 * 1024, 16 * 1024 - 64),
    (1024 * 1024, 256 * 1024 - 64),
    (16 * 1024 * 1024, 1024 * 1024 - 64),
];

/// After so many chunks other connections get their turn.
const TURN: u32 = 8;

/// Holds no buffer while it waits for data.
#[derive(Debug, Default)]
pub struct Direction {
    buffer: BytesMut,
    pending: Bytes,
    moved: u64,
    unflushed: bool,
    state: State,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum State {
    #[default]
    Copying,
    Finishing,
    Done,
}

impl Direction {
    pub fn poll(
        &mut self,
        cx: &mut Context<'_>,
        from: &mut impl Leg,
        to: &mut impl Leg,
        count: &AtomicU64,
    ) -> Poll<io::Result<()>> {
        for _ in 0..TURN {
            match self.state {
                State::Done => return Poll::Ready(Ok(())),
                State::Finishing => {
                    ready!(to.poll_finish(cx))?;
                    self.buffer = BytesMut::new();
                    self.state = State::Done;
                    return Poll::Ready(Ok(()));
                }
                State::Copying => ready!(self.poll_chunk(cx, from, to, count))?,
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    fn poll_chunk(
        &mut self,
        cx: &mut Context<'_>,
        from: &mut impl Leg,
        to: &mut impl Leg,
        count: &AtomicU64,
    ) -> Poll<io::Result<()>> {
        while !self.pending.is_empty() {
            let before = self.pending.len();
            let result = to.poll_send(cx, &mut self.pending);
            // Also where only a part of it could go.
            let sent = (before - self.pending.len()) as u64;
            self.moved += sent;
            count.fetch_add(sent, Relaxed);
            self.unflushed |= sent > 0;
            ready!(result)?;
            if sent == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
        }
        // Releases our share of the chunk, so that the buffer can be used again.
        self.pending = Bytes::new();
        match from.poll_receive(cx, &mut self.buffer, read_size(self.moved)) {
            Poll::Ready(chunk) => {
                self.pending = chunk?;
                if self.pending.is_empty() {
                    self.state = State::Finishing;
                }
                Poll::Ready(Ok(()))
            }
            Poll::Pending => {
                // What is small must not wait for what may never follow.
                if self.unflushed {
                    ready!(to.poll_flush(cx))?;
                    self.unflushed = false;
                }
                self.buffer = BytesMut::new();
                Poll::Pending
            }
        }
    }
}

fn read_size(moved: u64) -> usize {
    let fits = SIZES.iter().rev().find(|(after, _)| moved >= *after);
    fits.map_or(SIZES[0].1, |(_, size)| *size)
}
