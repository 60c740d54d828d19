//! One CONNECT stream as bytes.

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes};
use h2::{Reason, RecvStream, SendStream};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::Error;
use super::client::Slot;
use crate::tls::Proof;

/// Most that one `poll_write` copies.
const COPY: usize = 256 << 10;

/// One CONNECT stream. Half-close maps to END_STREAM; NO_ERROR and CANCEL resets read as end of
/// file (facts ztunnel 3.9). Dropping it before both sides ended resets it, and data that waited to
/// be sent is lost, as with a TCP socket that is reset; after that it goes out by itself.
///
/// Flow control credit goes back when the consumer has dealt with the data, which it shows by
/// asking for more: a consumer that stops reading stops the sender.
pub struct Stream {
    read: ReadHalf,
    write: WriteHalf,
}

/// Dropping one half alone tells the peer nothing: the stream is reset when both are gone.
pub struct ReadHalf {
    recv: RecvStream,
    /// Received and not yet handed over.
    chunk: Bytes,
    /// Credit to return before the next chunk.
    owed: usize,
    ended: bool,
    hold: Arc<Hold>,
}

/// Data that was accepted for sending is bounded by the peer's window and our send buffer.
pub struct WriteHalf {
    send: SendStream<Bytes>,
    ended: bool,
    hold: Arc<Hold>,
}

/// Why we ended a tunnel, for its streams; set before it ends.
pub(super) type Why = Arc<OnceLock<Error>>;

/// What both halves keep as long as one of them lives.
struct Hold {
    slot: Option<Slot>,
    /// Of a tunnel that isn't shared.
    why: Option<Why>,
    /// Of the tunnel's peer.
    proof: Arc<Proof>,
}

impl Stream {
    /// `proof` is that of the tunnel's peer.
    pub(super) fn new(
        send: SendStream<Bytes>,
        recv: RecvStream,
        slot: Option<Slot>,
        why: Option<Why>,
        proof: Arc<Proof>,
    ) -> Self {
        let hold = Arc::new(Hold { slot, why, proof });
        Self {
            read: ReadHalf {
                recv,
                chunk: Bytes::new(),
                owed: 0,
                ended: false,
                hold: hold.clone(),
            },
            write: WriteHalf {
                send,
                ended: false,
                hold,
            },
        }
    }

    pub fn into_split(self) -> (ReadHalf, WriteHalf) {
        (self.read, self.write)
    }

    /// Ends both ways as TCP's RST would (RFC 9113 8.5): the peer must not take what came so far
    /// for the whole, which it does after a mere drop (CANCEL).
    pub fn reset(&mut self) {
        self.write.send.send_reset(Reason::CONNECT_ERROR);
    }

    /// See `ReadHalf::poll_data`.
    pub fn poll_data(&mut self, cx: &mut Context<'_>) -> Poll<Option<io::Result<Bytes>>> {
        self.read.poll_data(cx)
    }

    /// See `ReadHalf::data`.
    pub async fn data(&mut self) -> Option<io::Result<Bytes>> {
        self.read.data().await
    }

    /// See `WriteHalf::poll_send`.
    pub fn poll_send(&mut self, cx: &mut Context<'_>, data: &mut Bytes) -> Poll<io::Result<()>> {
        self.write.poll_send(cx, data)
    }

    /// See `WriteHalf::send_bytes`.
    pub async fn send_bytes(&mut self, data: Bytes) -> io::Result<()> {
        self.write.send_bytes(data).await
    }
}

impl ReadHalf {
    /// The next piece as it came in, without a copy; None at the end. Asking again says that the
    /// piece before was dealt with.
    pub fn poll_data(&mut self, cx: &mut Context<'_>) -> Poll<Option<io::Result<Bytes>>> {
        if !self.chunk.is_empty() {
            return Poll::Ready(Some(Ok(std::mem::take(&mut self.chunk))));
        }
        self.settle();
        if self.ended {
            return Poll::Ready(None);
        }
        loop {
            let result = match ready!(self.recv.poll_data(cx)) {
                Some(Ok(empty)) if empty.is_empty() => continue,
                Some(Ok(data)) => {
                    self.owed = data.len();
                    return Poll::Ready(Some(Ok(data)));
                }
                Some(Err(err)) if is_quiet_reset(&err) && !self.hold.is_ended() => None,
                Some(Err(err)) => Some(Err(self.hold.to_io(err))),
                None => None,
            };
            self.ended = true;
            return Poll::Ready(result);
        }
    }

    pub async fn data(&mut self) -> Option<io::Result<Bytes>> {
        poll_fn(|cx| self.poll_data(cx)).await
    }

    fn settle(&mut self) {
        let owed = std::mem::take(&mut self.owed);
        if owed > 0 {
            // Refused only where the stream is closed, and then nobody counts any more.
            let _ = self.recv.flow_control().release_capacity(owed);
        }
    }
}

impl WriteHalf {
    /// Sends all of `data` without a copy, as far as the peer's window lets it; what is left stays
    /// in `data`.
    pub fn poll_send(&mut self, cx: &mut Context<'_>, data: &mut Bytes) -> Poll<io::Result<()>> {
        while !data.is_empty() {
            let room = ready!(self.poll_room(cx, data.len()))?;
            self.push(data.split_to(room), false)?;
        }
        Poll::Ready(Ok(()))
    }

    pub async fn send_bytes(&mut self, mut data: Bytes) -> io::Result<()> {
        poll_fn(|cx| self.poll_send(cx, &mut data)).await
    }

    /// How many of `want` bytes can go now: at least one.
    fn poll_room(&mut self, cx: &mut Context<'_>, want: usize) -> Poll<io::Result<usize>> {
        if self.ended {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        self.send.reserve_capacity(want);
        loop {
            let room = self.send.capacity();
            if room > 0 {
                return Poll::Ready(Ok(room.min(want)));
            }
            match ready!(self.send.poll_capacity(cx)) {
                Some(Ok(_)) => {}
                Some(Err(err)) => return Poll::Ready(Err(self.hold.to_io(err))),
                None => return Poll::Ready(Err(self.closed())),
            }
        }
    }

    fn push(&mut self, data: Bytes, end: bool) -> io::Result<()> {
        self.send.send_data(data, end).map_err(|_| self.closed())
    }

    /// Why the library takes nothing any more.
    fn closed(&mut self) -> io::Error {
        let mut cx = Context::from_waker(std::task::Waker::noop());
        match self.send.poll_reset(&mut cx) {
            Poll::Ready(Ok(reason)) => broken_pipe(format!("the peer reset the stream: {reason}")),
            Poll::Ready(Err(err)) => self.hold.to_io(err),
            Poll::Pending => broken_pipe("the stream is closed".to_owned()),
        }
    }
}

impl AsyncRead for ReadHalf {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.chunk.is_empty() {
            match ready!(self.poll_data(cx)) {
                Some(data) => self.chunk = data?,
                None => return Poll::Ready(Ok(())),
            }
        }
        let take = self.chunk.len().min(buf.remaining());
        buf.put_slice(&self.chunk[..take]);
        self.chunk.advance(take);
        if self.chunk.is_empty() {
            // Copied to the caller: it needs no further call to prove that.
            self.settle();
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for WriteHalf {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        if buf.is_empty() {
            return Poll::Ready(Ok(0));
        }
        let room = ready!(self.poll_room(cx, buf.len().min(COPY)))?;
        self.push(Bytes::copy_from_slice(&buf[..room]), false)?;
        Poll::Ready(Ok(room))
    }

    /// Nothing to wait for: the connection's own task writes.
    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !self.ended {
            self.ended = true;
            self.push(Bytes::new(), true)?;
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.read).poll_read(cx, buf)
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.write).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.write).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.write).poll_shutdown(cx)
    }
}

fn is_quiet_reset(err: &h2::Error) -> bool {
    err.is_reset() && matches!(err.reason(), Some(Reason::NO_ERROR | Reason::CANCEL))
}

impl Hold {
    fn is_ended(&self) -> bool {
        self.why.as_ref().is_some_and(|why| why.get().is_some())
    }

    /// facts ztunnel 3.9; a tunnel that was cut says why.
    fn to_io(&self, err: h2::Error) -> io::Error {
        if let Some(distrust) = self.proof.distrust() {
            return io::Error::other(Error::Untrusted(self.proof.addr, distrust.clone()));
        }
        if let Some(why) = self.why.as_ref().and_then(|why| why.get()) {
            return io::Error::other(why.clone());
        }
        match err.reason() {
            Some(Reason::STREAM_CLOSED) => broken_pipe(err.to_string()),
            Some(Reason::CONNECT_ERROR) => io::Error::new(io::ErrorKind::ConnectionReset, err),
            Some(_) => io::Error::other(err),
            None if err.is_io() => self.broken(err),
            None => io::Error::other(err),
        }
    }

    /// Without the tunnel's own reason an end that we made would look like one that the peer made.
    fn broken(&self, err: h2::Error) -> io::Error {
        let reason = self.slot.as_ref().and_then(|slot| slot.tunnel.cut_for());
        match reason {
            Some(reason) => io::Error::other(reason),
            None => err
                .into_io()
                .unwrap_or_else(|| io::ErrorKind::BrokenPipe.into()),
        }
    }
}

fn broken_pipe(text: String) -> io::Error {
    io::Error::new(io::ErrorKind::BrokenPipe, text)
}
