//! What leaves on one connection of the control socket: answers, whole or in chunks, and events.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use pb::reply::Body;
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;

use super::failure::Failure;
use super::frame;
use crate::wire::control as pb;

/// Where the answer of one request goes.
#[derive(Clone)]
pub(super) struct Answer {
    pub id: u64,
    pub replies: mpsc::Sender<Outgoing>,
}

pub(super) struct Outgoing {
    reply: pb::Reply,
    fds: Vec<OwnedFd>,
    /// Told when the last byte was handed to the kernel.
    written: Option<oneshot::Sender<()>>,
}

/// A peer that takes no byte for so long is given up.
const WRITE_WAIT: Duration = Duration::from_secs(30);
/// Frames of at most about 64 kB wait for a slow reader.
pub(super) const REPLIES: usize = 16;
pub(super) const EVENTS: usize = 4096;

impl Answer {
    /// One chunk before the last. False when nobody reads any more.
    pub async fn more(&self, body: Body) -> bool {
        self.more_with(body, Vec::new()).await
    }

    pub async fn more_with(&self, body: Body, fds: Vec<OwnedFd>) -> bool {
        self.put(body, fds, true, None).await
    }

    pub async fn last(&self, result: Result<Body, Failure>) {
        let body = result.unwrap_or_else(Failure::into_body);
        self.put(body, Vec::new(), false, None).await;
    }

    /// Returns when the kernel has all of it, or the reader is gone or slow.
    pub async fn last_and_flush(&self, result: Result<Body, Failure>) {
        let (written, done) = oneshot::channel();
        let body = result.unwrap_or_else(Failure::into_body);
        self.put(body, Vec::new(), false, Some(written)).await;
        let _ = timeout(Duration::from_secs(1), done).await;
    }

    async fn put(
        &self,
        body: Body,
        fds: Vec<OwnedFd>,
        more: bool,
        written: Option<oneshot::Sender<()>>,
    ) -> bool {
        let reply = pb::Reply {
            id: self.id,
            // At most three listeners a frame.
            fds: fds.len() as u32,
            more,
            body: Some(body),
        };
        let outgoing = Outgoing {
            reply,
            fds,
            written,
        };
        self.replies.send(outgoing).await.is_ok()
    }
}

/// Ends when the peer is gone or takes nothing.
pub(super) async fn write_all(
    stream: Arc<UnixStream>,
    mut replies: mpsc::Receiver<Outgoing>,
    mut events: mpsc::Receiver<pb::Event>,
) {
    // The answer to Hello comes before any event.
    let mut next = replies.recv().await;
    let mut eventful = true;
    while let Some(outgoing) = next {
        let write = frame::write(&stream, &outgoing.reply, &outgoing.fds);
        match timeout(WRITE_WAIT, write).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                tracing::debug!(%error, "control connection: can't write");
                return;
            }
            Err(_) => {
                tracing::warn!("control connection closed: the peer doesn't read");
                return;
            }
        }
        if let Some(written) = outgoing.written {
            let _ = written.send(());
        }
        // Not a moment longer: a descriptor that waits for the next answer keeps its port.
        drop(outgoing.fds);
        next = loop {
            tokio::select! {
                reply = replies.recv() => break reply,
                event = events.recv(), if eventful => match event {
                    Some(event) => break Some(event.into()),
                    // Not an agent.
                    None => eventful = false,
                },
            }
        };
    }
}

impl From<pb::Event> for Outgoing {
    fn from(event: pb::Event) -> Self {
        let body = Some(Body::Event(event));
        Self {
            reply: pb::Reply {
                body,
                ..Default::default()
            },
            fds: Vec::new(),
            written: None,
        }
    }
}
