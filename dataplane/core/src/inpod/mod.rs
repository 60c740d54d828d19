//! Pods' network namespaces: sockets made inside them, listeners, and one proxy a pod.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use tokio::net::{TcpListener, TcpStream};

use crate::config::Config;

/// A pod's network namespace, kept open.
pub struct Netns {
    _fd: OwnedFd,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodInfo {
    pub uid: String,
    pub name: String,
    pub namespace: String,
    pub service_account: String,
}

/// The three TCP listeners of a pod, bound and not yet accepting. Wildcard, dual-stack, transparent,
/// never SO_REUSEPORT, backlog ≥ 1024.
pub struct Listeners {
    pub outbound: TcpListener,
    pub inbound_plaintext: TcpListener,
    pub inbound_hbone: TcpListener,
}

impl Netns {
    /// (inode, device)
    pub fn id(&self) -> (u64, u64) {
        unimplemented!()
    }

    /// Connects from inside the namespace: TCP_NODELAY, keepalive, the data plane's mark. With
    /// `source` the socket is transparent and bound to that address (facts ztunnel 1.2, 1.3).
    /// Has no time limit of its own.
    pub async fn connect(
        self: &Arc<Self>,
        _config: &Config,
        _dst: SocketAddr,
        _source: Option<IpAddr>,
    ) -> io::Result<TcpStream> {
        unimplemented!()
    }
}

/// SO_ORIGINAL_DST of either family, canonical (facts ztunnel 1.2). An error where nothing was
/// redirected: the connection was made to the listener itself.
pub fn original_dst(_stream: &TcpStream) -> io::Result<SocketAddr> {
    unimplemented!()
}
