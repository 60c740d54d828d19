//! HBONE: CONNECT streams over mutually authenticated HTTP/2 (facts ztunnel 3 and 15.3). The HTTP/2
//! library is hidden behind `Stream`, `Pool` and `Tunnel`, so that it can be replaced.

use std::future::Future;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::net::TcpStream;

use crate::identity::Identity;
use crate::inpod::NoneFree;
use crate::tls::{Distrust, describe, is_revoked};

mod client;
mod gather;
mod keepalive;
mod nested;
mod pool;
mod server;
mod settings;
mod socket;
mod stream;

#[cfg(test)]
mod expiry_tests;
#[cfg(test)]
mod fault_tests;
#[cfg(test)]
mod pool_tests;
#[cfg(test)]
mod raw;
#[cfg(test)]
mod stall_tests;
#[cfg(test)]
mod stream_tests;
#[cfg(test)]
mod testing;

pub use pool::Pool;
pub use server::{Request, Responder, Tunnel};
pub use settings::Http2;
pub use stream::{ReadHalf, Stream, WriteHalf};

#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    #[error("{0}: {1}")]
    Connect(SocketAddr, String),
    #[error("{0}: no TCP connection after {1:?}: a NetworkPolicy or firewall may block the port")]
    ConnectTimeout(SocketAddr, Duration),
    #[error("{0}: TLS: {1}")]
    Tls(SocketAddr, String),
    #[error("{0}: TLS: {1}")]
    Revoked(SocketAddr, String),
    #[error("{0}: TLS: {1}")]
    Untrusted(SocketAddr, Distrust),
    #[error("{0}: HTTP/2: {1}")]
    Http2(SocketAddr, String),
    #[error("{0}: {1} not answered after {2:?}")]
    Timeout(SocketAddr, &'static str, Duration),
    #[error("http status: {0}")]
    Status(u16),
    #[error("{0}: the address belongs to another workload now")]
    Moved(SocketAddr),
    #[error("{0}: {1}")]
    NoSocket(SocketAddr, NoneFree),
    #[error("the pool is draining")]
    Draining,
}

impl Error {
    /// Of a handshake with this peer.
    fn tls(addr: SocketAddr, err: &std::io::Error) -> Self {
        match is_revoked(err) {
            true => Self::Revoked(addr, describe(err)),
            false => Self::Tls(addr, describe(err)),
        }
    }

    /// The CRL decided.
    pub fn is_revocation(&self) -> bool {
        matches!(
            self,
            Self::Revoked(..) | Self::Untrusted(_, Distrust::Revoked(_))
        )
    }
}

/// Which tunnel may be shared (facts ztunnel 15.3).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    pub source: Identity,
    pub expected: Arc<[Identity]>,
    pub dst: SocketAddr,
    /// Uid of the workload that has the address: another one never gets its tunnels.
    pub owner: Arc<str>,
    /// Local address of the tunnel's socket.
    pub from: Option<IpAddr>,
}

#[derive(Clone)]
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

/// How long to wait before looking again whether this moment has come. The wall clock may be set
/// meanwhile, so never longer than a minute.
fn until(moment: SystemTime) -> Duration {
    let left = moment.duration_since(SystemTime::now());
    left.unwrap_or_default().min(Duration::from_secs(60))
}

/// Opens the TCP connection in the right namespace.
pub type Dial = Arc<
    dyn Fn(SocketAddr) -> Pin<Box<dyn Future<Output = std::io::Result<TcpStream>> + Send>>
        + Send
        + Sync,
>;
