//! HBONE: CONNECT streams over mutually authenticated HTTP/2 (facts ztunnel 3 and 15.3). The HTTP/2
//! library is hidden behind `Stream`, `Pool` and `accept`, so that it can be replaced.

use std::future::Future;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

use crate::config::Limits;
use crate::identity::Identity;
use crate::tls::Credentials;

/// One CONNECT stream as a byte stream. Half-close maps to END_STREAM; NO_ERROR and CANCEL resets
/// read as end of file (facts ztunnel 3.9). Dropping it before both sides ended resets it.
pub struct Stream {}

impl AsyncRead for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        _cx: &mut std::task::Context<'_>,
        _buf: &mut ReadBuf<'_>,
    ) -> std::task::Poll<std::io::Result<()>> {
        unimplemented!()
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        self: Pin<&mut Self>,
        _cx: &mut std::task::Context<'_>,
        _buf: &[u8],
    ) -> std::task::Poll<std::io::Result<usize>> {
        unimplemented!()
    }
    fn poll_flush(
        self: Pin<&mut Self>,
        _cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<std::io::Result<()>> {
        unimplemented!()
    }
    fn poll_shutdown(
        self: Pin<&mut Self>,
        _cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<std::io::Result<()>> {
        unimplemented!()
    }
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{0}: {1}")]
    Connect(SocketAddr, String),
    #[error("{0}: no TCP connection after {1:?}: a NetworkPolicy or firewall may block the port")]
    ConnectTimeout(SocketAddr, Duration),
    #[error("{0}: TLS: {1}")]
    Tls(SocketAddr, String),
    #[error("{0}: HTTP/2: {1}")]
    Http2(SocketAddr, String),
    #[error("{0}: {1} not answered after {2:?}")]
    Timeout(SocketAddr, &'static str, Duration),
    #[error("http status: {0}")]
    Status(u16),
    #[error("the pool is draining")]
    Draining,
}

/// Which tunnel may be shared (facts ztunnel 15.3).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    pub source: Identity,
    pub expected: Arc<[Identity]>,
    pub dst: SocketAddr,
    /// Local address of the tunnel's socket.
    pub from: Option<IpAddr>,
}

pub struct Connect {
    pub authority: String,
    /// Further request headers: baggage, forwarded, traceparent.
    pub headers: http::HeaderMap,
}

/// What the far end told about itself.
pub struct Connected {
    pub stream: Stream,
    pub peer: Identity,
    pub headers: http::HeaderMap,
}

/// Opens the TCP connection in the right namespace.
pub type Dial = Arc<
    dyn Fn(SocketAddr) -> Pin<Box<dyn Future<Output = std::io::Result<TcpStream>> + Send>>
        + Send
        + Sync,
>;

/// Tunnels of one pod.
pub struct Pool {}

impl Pool {
    pub fn new(_limits: Limits, _dial: Dial) -> Arc<Self> {
        unimplemented!()
    }

    /// A stream on a shared or new tunnel. A failed dial fails everybody who waited for it.
    pub async fn connect(
        &self,
        _key: Key,
        _credentials: &Credentials,
        _connect: Connect,
    ) -> Result<Connected, Error> {
        unimplemented!()
    }

    /// Refuses new streams; open ones go on until they end or the pool is dropped/cut.
    pub fn drain(&self) {}

    /// Ends every tunnel now.
    pub fn cut(&self) {}

    /// (tunnels, streams)
    pub fn size(&self) -> (usize, usize) {
        unimplemented!()
    }
}

/// An inbound CONNECT (or something else that must be refused with a status).
pub struct Request {
    pub method: http::Method,
    /// As received, unparsed.
    pub authority: Option<String>,
    pub headers: http::HeaderMap,
}

/// The answer is owed exactly once; dropping it resets the stream.
pub struct Responder {}

impl Responder {
    /// 200 with these headers; the stream is open from now on.
    pub fn accept(self, _headers: http::HeaderMap) -> Result<Stream, Error> {
        unimplemented!()
    }

    /// Status only, end of stream (facts ztunnel 3.3).
    pub fn refuse(self, _status: u16) {}
}

/// One inbound tunnel after its TLS handshake.
pub struct Tunnel {}

impl Tunnel {
    /// TLS and HTTP/2 handshakes within the time limits.
    pub async fn accept(
        _tcp: TcpStream,
        _credentials: &Credentials,
        _limits: &Limits,
    ) -> Result<Self, Error> {
        unimplemented!()
    }

    /// First URI SAN that is a SPIFFE id (facts ztunnel 3.1).
    pub fn peer(&self) -> &Identity {
        unimplemented!()
    }

    /// Drives the connection until the next request; None when the tunnel is over. Cancel safe.
    pub async fn next(&mut self) -> Option<Result<(Request, Responder), Error>> {
        unimplemented!()
    }

    /// GOAWAY; streams that are open may end. Keep calling `next` until None.
    pub fn drain(&mut self) {}
}
