//! The DNS sockets of a pod, bound inside its namespace or received from another data plane, and
//! those over which its questions leave.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};

use socket2::{Domain, Socket, Type};
use tokio::net::{TcpListener, UdpSocket};

use super::listeners::{self, ListenError, ListeningFds};
use super::{Netns, sockopt};
use crate::config::{Config, canonical_addr};

/// UDP and TCP on 127.0.0.1 and, where the pod has it, on ::1 (facts ztunnel 1.1). Never
/// SO_REUSEPORT. Only what came over `lo` arrives: the IPv4 sockets are bound to it, since a pod may
/// let 127/8 in from outside (route_localnet); for ::1 the kernel knows no such switch.
#[derive(Debug)]
pub struct DnsSockets {
    pub udp: Vec<UdpSocket>,
    pub tcp: Vec<TcpListener>,
}

const LOOPBACK: &[u8] = b"lo";

impl DnsSockets {
    /// All or none. Needs a tokio context.
    pub fn bind(netns: &Netns, config: &Config) -> Result<Self, ListenError> {
        let port = config.ports.dns;
        let mut addresses = vec![IpAddr::from(Ipv4Addr::LOCALHOST)];
        if config.ipv6 {
            addresses.push(Ipv6Addr::LOCALHOST.into());
        }
        let (mut udp, mut tcp) = (Vec::new(), Vec::new());
        for ip in addresses {
            let addr = SocketAddr::new(ip, port);
            for kind in [Type::DGRAM, Type::STREAM] {
                let socket = netns
                    .enter(|| sockopt::new(Domain::for_address(addr), kind))
                    .map_err(ListenError::NetnsGone)?;
                match socket.and_then(|socket| prepare(socket, config, addr)) {
                    // ::1 isn't there: nobody in the pod can ask over it.
                    Err(error) if addr.is_ipv6() && listeners::has_no_ipv6(&error) => {}
                    Err(error) => return Err(listeners::error(port, error)),
                    Ok(socket) => keep(socket, port, &mut udp, &mut tcp)?,
                }
            }
        }
        Ok(Self { udp, tcp })
    }

    /// Takes sockets over from another process; None when it sent none of this port. Needs a tokio
    /// context.
    pub fn adopt(
        fds: &mut Vec<(u16, OwnedFd)>,
        config: &Config,
    ) -> Result<Option<Self>, ListenError> {
        let port = config.ports.dns;
        let (mut udp, mut tcp) = (Vec::new(), Vec::new());
        for (_, fd) in fds.extract_if(.., |(p, _)| *p == port) {
            keep(received(port, fd)?, port, &mut udp, &mut tcp)?;
        }
        Ok((!udp.is_empty() && !tcp.is_empty()).then_some(Self { udp, tcp }))
    }

    /// For a later hand-over.
    pub fn duplicate(&self) -> io::Result<ListeningFds> {
        let udp = self.udp.iter().map(|s| (s.local_addr(), s.as_fd()));
        let tcp = self.tcp.iter().map(|s| (s.local_addr(), s.as_fd()));
        let duplicate = |(local, fd): (io::Result<SocketAddr>, std::os::fd::BorrowedFd<'_>)| {
            Ok((local?.port(), fd.try_clone_to_owned()?))
        };
        let fds: io::Result<_> = udp.chain(tcp).map(duplicate).collect();
        Ok(ListeningFds(fds?))
    }
}

impl Netns {
    /// For one question: a port of its own that the kernel chooses at random, and nothing but that
    /// server's datagrams arrives.
    pub async fn dns_upstream(&self, config: &Config, server: SocketAddr) -> io::Result<UdpSocket> {
        let server = canonical_addr(server);
        let socket = self.enter(|| sockopt::new(Domain::for_address(server), Type::DGRAM))??;
        socket.set_mark(config.mark)?;
        let socket = UdpSocket::from_std(socket.into())?;
        socket.connect(server).await?;
        Ok(socket)
    }
}

fn prepare(socket: Socket, config: &Config, addr: SocketAddr) -> io::Result<Socket> {
    socket.set_mark(config.mark)?;
    if addr.is_ipv6() {
        socket.set_only_v6(true)?;
    } else {
        socket.bind_device(Some(LOOPBACK))?;
    }
    let stream = socket.r#type()? == Type::STREAM;
    if stream {
        // For ports in TIME_WAIT; it doesn't let two sockets listen. With UDP it would.
        socket.set_reuse_address(true)?;
        sockopt::keepalive(&socket, config.keepalive.as_ref())?;
    }
    socket.bind(&addr.into())?;
    if stream {
        socket.listen(listeners::BACKLOG)?;
    }
    Ok(socket)
}

/// Proves that a received descriptor is what its sender says it is.
fn received(port: u16, fd: OwnedFd) -> Result<Socket, ListenError> {
    let socket = Socket::from(fd);
    let wrong = |text: String| Err(ListenError::Foreign { port, text });
    let kind = match socket.r#type() {
        Ok(kind) if kind == Type::STREAM || kind == Type::DGRAM => kind,
        _ => return wrong("is no UDP or TCP socket".into()),
    };
    let accepts = rustix::net::sockopt::socket_acceptconn(&socket).unwrap_or(false);
    if kind == Type::STREAM && !accepts {
        return wrong("doesn't listen".into());
    }
    if socket.reuse_port().unwrap_or(true) {
        return wrong("shares its port (SO_REUSEPORT)".into());
    }
    match socket.local_addr().ok().and_then(|addr| addr.as_socket()) {
        Some(local) if local.port() == port && local.ip().is_loopback() => {}
        Some(local) => return wrong(format!("is bound to {local}")),
        None => return wrong("has no address".into()),
    }
    let ready = socket
        .set_nonblocking(true)
        .and_then(|()| socket.set_cloexec(true));
    match ready {
        Ok(()) => Ok(socket),
        Err(source) => Err(ListenError::Io { port, source }),
    }
}

fn keep(
    socket: Socket,
    port: u16,
    udp: &mut Vec<UdpSocket>,
    tcp: &mut Vec<TcpListener>,
) -> Result<(), ListenError> {
    let stream = socket.r#type().is_ok_and(|kind| kind == Type::STREAM);
    let registered = if stream {
        TcpListener::from_std(socket.into()).map(|socket| tcp.push(socket))
    } else {
        UdpSocket::from_std(socket.into()).map(|socket| udp.push(socket))
    };
    registered.map_err(|source| ListenError::Io { port, source })
}
