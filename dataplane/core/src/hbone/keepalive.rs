//! PINGs that find dead peers (facts ztunnel 3.2).

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use h2::{Ping, PingPong};
use tokio::time::{Instant, Sleep};

/// Set whenever the peer sent anything.
pub type Heard = Arc<AtomicBool>;

/// Quiet while the peer is heard of by itself.
pub struct Keepalive {
    pings: PingPong,
    heard: Heard,
    timer: Pin<Box<Sleep>>,
    /// A PING is under way, and `timer` says until when.
    waiting: bool,
    interval: Duration,
    timeout: Duration,
    /// For the first PING, where that has a limit of its own.
    first: Option<Duration>,
}

#[derive(Debug, PartialEq, Eq)]
pub enum Beat {
    Answered,
    /// Not answered for this long.
    Dead(Duration),
}

impl Keepalive {
    pub fn new(pings: PingPong, heard: Heard, interval: Duration, timeout: Duration) -> Self {
        Self {
            pings,
            heard,
            timer: Box::pin(tokio::time::sleep(interval)),
            waiting: false,
            interval,
            timeout,
            first: None,
        }
    }

    /// The first PING goes out at once, to be answered within `limit`. Its answer shows that the
    /// peer took us in and that its settings arrived, which come before it on the wire.
    pub fn at_once(mut self, limit: Duration) -> Self {
        self.timer.as_mut().reset(Instant::now());
        self.first = Some(limit);
        self
    }

    /// Pending while all is well; also when the connection ends, which itself tells.
    pub fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Beat> {
        if !self.waiting {
            ready!(self.timer.as_mut().poll(cx));
            while self.first.is_none() && self.heard.swap(false, Relaxed) {
                self.timer.as_mut().reset(Instant::now() + self.interval);
                ready!(self.timer.as_mut().poll(cx));
            }
            if self.pings.send_ping(Ping::opaque()).is_err() {
                return Poll::Pending;
            }
            self.waiting = true;
            let limit = self.first.unwrap_or(self.timeout);
            self.timer.as_mut().reset(Instant::now() + limit);
        }
        match self.pings.poll_pong(cx) {
            Poll::Ready(Ok(_)) => {
                self.waiting = false;
                self.first = None;
                // That was the answer, not news.
                self.heard.store(false, Relaxed);
                self.timer.as_mut().reset(Instant::now() + self.interval);
                return Poll::Ready(Beat::Answered);
            }
            Poll::Ready(Err(_)) => return Poll::Pending,
            Poll::Pending => {}
        }
        ready!(self.timer.as_mut().poll(cx));
        // An answer may wait behind much data.
        while self.first.is_none() && self.heard.swap(false, Relaxed) {
            self.timer.as_mut().reset(Instant::now() + self.timeout);
            ready!(self.timer.as_mut().poll(cx));
        }
        Poll::Ready(Beat::Dead(self.first.unwrap_or(self.timeout)))
    }
}
