//! What a copy can run between: TCP sockets and HBONE streams.

use std::future::Future;
use std::io;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite};
use tokio::net::TcpStream;

use crate::hbone::Stream;

/// One side of a connection. Each method keeps its own waker: receiving and sending are polled by
/// the same task.
pub trait Leg: Unpin {
    /// The next bytes, at most about `size` where we choose; empty at the end. May use `buffer`,
    /// which belongs to this direction and holds nothing between calls.
    fn poll_receive(
        &mut self,
        cx: &mut Context<'_>,
        buffer: &mut BytesMut,
        size: usize,
    ) -> Poll<io::Result<Bytes>>;

    /// Takes from the front of `data` what it can, at least one byte.
    fn poll_send(&mut self, cx: &mut Context<'_>, data: &mut Bytes) -> Poll<io::Result<()>>;

    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>>;

    /// Half-close, after everything sent.
    fn poll_finish(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>>;

    /// Makes the drop that follows a visible failure for the peer.
    fn reset(&mut self);
}

impl Leg for TcpStream {
    fn poll_receive(
        &mut self,
        cx: &mut Context<'_>,
        buffer: &mut BytesMut,
        size: usize,
    ) -> Poll<io::Result<Bytes>> {
        // No buffer before there is something to read.
        ready!(self.poll_read_ready(cx))?;
        poll_read_chunk(self, cx, buffer, size)
    }

    fn poll_send(&mut self, cx: &mut Context<'_>, data: &mut Bytes) -> Poll<io::Result<()>> {
        let sent = ready!(Pin::new(self).poll_write(cx, data))?;
        data.advance(sent);
        Poll::Ready(Ok(()))
    }

    fn poll_flush(&mut self, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_finish(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match ready!(Pin::new(self).poll_shutdown(cx)) {
            // The peer is gone already: there is nobody left to tell.
            Err(error) if error.kind() == io::ErrorKind::NotConnected => Poll::Ready(Ok(())),
            result => Poll::Ready(result),
        }
    }

    fn reset(&mut self) {
        // A socket that can't be told so is closed, which is all that's left.
        let _ = self.set_zero_linger();
    }
}

impl Leg for Stream {
    /// As it came in: what the size asks for was decided by the sender's frames.
    fn poll_receive(
        &mut self,
        cx: &mut Context<'_>,
        _buffer: &mut BytesMut,
        _size: usize,
    ) -> Poll<io::Result<Bytes>> {
        match ready!(self.poll_data(cx)) {
            Some(data) => Poll::Ready(data),
            None => Poll::Ready(Ok(Bytes::new())),
        }
    }

    fn poll_send(&mut self, cx: &mut Context<'_>, data: &mut Bytes) -> Poll<io::Result<()>> {
        Stream::poll_send(self, cx, data)
    }

    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(self).poll_flush(cx)
    }

    fn poll_finish(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(self).poll_shutdown(cx)
    }

    fn reset(&mut self) {
        Stream::reset(self);
    }
}

/// Reads into spare capacity; once the chunks made of the buffer are gone, `reserve` takes the same
/// memory again.
fn poll_read_chunk(
    from: &mut (impl AsyncRead + Unpin),
    cx: &mut Context<'_>,
    buffer: &mut BytesMut,
    size: usize,
) -> Poll<io::Result<Bytes>> {
    buffer.reserve(size);
    // The future holds no state between polls, so it may be made anew each time.
    ready!(pin!(from.read_buf(buffer)).poll(cx))?;
    Poll::Ready(Ok(buffer.split().freeze()))
}
