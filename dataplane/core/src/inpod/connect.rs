//! Connections that leave from inside a pod's namespace.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use socket2::{Domain, Socket};
use tokio::net::{TcpSocket, TcpStream};

use super::{Netns, sockopt};
use crate::config::{Config, canonical};

/// The client's address can't be shown to the application.
#[derive(Debug, thiserror::Error)]
#[error("can't connect to {dst} as {source_ip}: {cause}")]
struct SourceLost {
    dst: SocketAddr,
    source_ip: IpAddr,
    cause: io::Error,
}

/// Whether it was the wanted source address that `Netns::connect` failed for.
pub fn is_source_lost(error: &io::Error) -> bool {
    let inner = error.get_ref();
    inner.is_some_and(|inner| inner.is::<SourceLost>())
}

impl Netns {
    /// Connects from inside the namespace: TCP_NODELAY, keepalive, the data plane's mark. With
    /// `source` the socket is transparent and bound to that address (facts ztunnel 1.2, 1.3), towards
    /// an address of the namespace itself; where that can't be had, the connection fails instead of showing another address to the
    /// application. Has no time limit of its own.
    pub async fn connect(
        self: &Arc<Self>,
        config: &Config,
        dst: SocketAddr,
        source: Option<IpAddr>,
    ) -> io::Result<TcpStream> {
        let dst = SocketAddr::new(canonical(dst.ip()), dst.port());
        let socket = self.enter(|| sockopt::tcp(Domain::for_address(dst)))??;
        socket.set_mark(match source {
            Some(_) => self.reply_mark(config),
            None => config.mark,
        })?;
        socket.set_tcp_nodelay(true)?;
        sockopt::keepalive(&socket, config.keepalive.as_ref())?;
        if let Some(source_ip) = source.map(canonical) {
            spoof(&socket, source_ip, dst).map_err(|cause| {
                let kind = cause.kind();
                let lost = SourceLost {
                    dst,
                    source_ip,
                    cause,
                };
                io::Error::new(kind, lost)
            })?;
        }
        TcpSocket::from_std_stream(socket.into()).connect(dst).await
    }
}

fn spoof(socket: &Socket, source: IpAddr, dst: SocketAddr) -> io::Result<()> {
    if source.is_ipv4() != dst.is_ipv4() {
        let text = "the client's address is of the other IP family";
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    if source.is_ipv4() {
        socket.set_ip_transparent_v4(true)?;
        socket.set_freebind_v4(true)?;
        // Routes to an IPv6 address of the namespace itself are bound to that address's device.
        sockopt::bind_to_loopback(socket)?;
    } else {
        socket.set_ip_transparent_v6(true)?;
        socket.set_freebind_v6(true)?;
    }
    sockopt::bind_address_no_port(socket)?;
    socket.bind(&SocketAddr::new(source, 0).into())
}
