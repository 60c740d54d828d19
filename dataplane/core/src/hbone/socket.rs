//! The TCP socket below TLS. The TLS library reads 4 KiB at a time; this reads ahead, the more the
//! more comes, and keeps the buffer only while there is something in it, so that idle tunnels stay
//! small.

use std::future::Future;
use std::io::{self, IoSlice};
use std::pin::{Pin, pin};
use std::sync::atomic::Ordering::Relaxed;
use std::task::{Context, Poll, ready};

use bytes::{Buf, BufMut, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

use super::keepalive::Heard;

/// Requests need little, and a small buffer is cheap to allocate.
const FIRST_READ: usize = 4 << 10;
const LONGEST_READ: usize = 64 << 10;

pub struct Socket {
    tcp: TcpStream,
    ahead: BytesMut,
    /// Of the next read.
    size: usize,
    heard: Heard,
}

impl Socket {
    pub fn new(tcp: TcpStream, heard: Heard) -> Self {
        // Fails only on a socket that is gone, which the handshake will tell.
        let _ = tcp.set_nodelay(true);
        Self {
            tcp,
            ahead: BytesMut::new(),
            size: FIRST_READ,
            heard,
        }
    }

    fn poll_ahead(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.ahead.reserve(self.size);
        let mut room = (&mut self.ahead).limit(self.size);
        let read = pin!(self.tcp.read_buf(&mut room)).poll(cx);
        let got = self.ahead.len();
        if got == 0 {
            self.ahead = BytesMut::new();
        }
        ready!(read)?;
        if got > 0 {
            self.heard.store(true, Relaxed);
        }
        if got >= self.size {
            self.size = (self.size * 4).min(LONGEST_READ);
        } else if got < self.size / 4 {
            self.size = (self.size / 2).max(FIRST_READ);
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncRead for Socket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.ahead.is_empty() {
            ready!(this.poll_ahead(cx))?;
        }
        let take = this.ahead.len().min(buf.remaining());
        buf.put_slice(&this.ahead[..take]);
        this.ahead.advance(take);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Socket {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.tcp).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.tcp).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.tcp.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_shutdown(cx)
    }
}
