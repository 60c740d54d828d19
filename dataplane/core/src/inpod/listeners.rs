//! The TCP listeners of a pod: bound inside its namespace, or received from another data
//! plane.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};

use rustix::io::Errno;
use socket2::{Domain, Socket, Type};
use tokio::net::TcpListener;

use super::{Netns, sockopt};
use crate::config::{Config, OriginalSource};

/// The TCP listeners of a pod, bound and not yet accepting. Wildcard (SOCKS5: loopback alone), dual-stack, transparent,
/// never SO_REUSEPORT (a root process in the pod could join the group), backlog 4096.
#[derive(Debug)]
pub struct Listeners {
    pub inbound_hbone: TcpListener,
    /// Where traffic is redirected.
    pub redirected: Option<Redirected>,
}

#[derive(Debug)]
pub struct Redirected {
    pub outbound: TcpListener,
    pub inbound_plaintext: TcpListener,
    /// Where the configuration wants it (facts ztunnel 4.2).
    pub socks5: Option<TcpListener>,
}

/// Second descriptors of the same sockets, for a successor: (port, descriptor). The sockets go on
/// listening until these are closed, too.
#[derive(Debug)]
pub struct ListeningFds(pub Vec<(u16, OwnedFd)>);

#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    #[error(
        "port {port} is taken in the pod's network namespace: another proxy (ztunnel, a sidecar or \
         another data plane) holds it; it must leave first"
    )]
    InUse { port: u16 },
    #[error("the pod's network namespace can't be entered: {0}")]
    NetnsGone(io::Error),
    #[error("port {port}: {source} (CAP_NET_ADMIN is needed)")]
    NotPermitted { port: u16, source: io::Error },
    #[error("port {port}: {source}")]
    Io { port: u16, source: io::Error },
    #[error("the descriptor received for port {port} {text}")]
    Foreign { port: u16, text: String },
}

pub(crate) const BACKLOG: i32 = 4096;

impl Listeners {
    /// All or none. Needs a tokio context.
    pub fn bind(netns: &Netns, config: &Config) -> Result<Self, ListenError> {
        let listen = |port| listen(netns, config, port);
        let ports = &config.ports;
        let redirected = Redirected {
            outbound: listen(ports.outbound)?,
            inbound_plaintext: listen(ports.inbound_plaintext)?,
            socks5: match ports.socks5 {
                Some(port) => Some(listen_on_loopback(netns, config, port)?),
                None => None,
            },
        };
        Ok(Self {
            redirected: Some(redirected),
            ..Self::bind_hbone(netns, config)?
        })
    }

    /// HBONE alone, where nothing is redirected. Needs a tokio context.
    pub fn bind_hbone(netns: &Netns, config: &Config) -> Result<Self, ListenError> {
        Ok(Self {
            inbound_hbone: listen(netns, config, config.ports.inbound_hbone)?,
            redirected: None,
        })
    }

    /// Takes listeners over from another process, whose descriptors these are duplicates of: all of
    /// them, or where nothing is redirected HBONE's. Needs a tokio context.
    pub fn adopt(
        fds: Vec<(u16, OwnedFd)>,
        config: &Config,
        redirected: bool,
    ) -> Result<Self, ListenError> {
        let ports = &config.ports;
        let mut sockets = Vec::with_capacity(fds.len());
        for (port, fd) in fds {
            let socket = listening(port, fd)?;
            let set = sockopt::keepalive(&socket, config.keepalive.as_ref());
            set.map_err(|source| ListenError::Io { port, source })?;
            sockets.push((port, socket));
        }
        let mut take = |port| {
            let at = sockets.iter().position(|(p, _)| *p == port);
            let text = || "is missing".to_owned();
            let at = at.ok_or_else(|| ListenError::Foreign { port, text: text() })?;
            register(port, sockets.swap_remove(at).1)
        };
        Ok(Self {
            inbound_hbone: take(ports.inbound_hbone)?,
            redirected: match redirected {
                true => Some(Redirected {
                    outbound: take(ports.outbound)?,
                    inbound_plaintext: take(ports.inbound_plaintext)?,
                    socks5: ports.socks5.map(take).transpose()?,
                }),
                false => None,
            },
        })
    }

    /// For a later hand-over.
    pub fn duplicate(&self) -> io::Result<ListeningFds> {
        let duplicate = |listener: &TcpListener| {
            let port = listener.local_addr()?.port();
            Ok((port, listener.as_fd().try_clone_to_owned()?))
        };
        let redirected = self.redirected.iter().flat_map(Redirected::all);
        let all = std::iter::once(&self.inbound_hbone).chain(redirected);
        let fds: io::Result<_> = all.map(duplicate).collect();
        Ok(ListeningFds(fds?))
    }
}

impl Redirected {
    fn all(&self) -> impl Iterator<Item = &TcpListener> {
        [&self.outbound, &self.inbound_plaintext]
            .into_iter()
            .chain(&self.socks5)
    }
}

impl ListeningFds {
    pub fn try_clone(&self) -> io::Result<Self> {
        let clone = |(port, fd): &(u16, OwnedFd)| Ok((*port, fd.try_clone()?));
        let fds: io::Result<_> = self.0.iter().map(clone).collect();
        Ok(Self(fds?))
    }
}

fn listen(netns: &Netns, config: &Config, port: u16) -> Result<TcpListener, ListenError> {
    let wildcard4 = SocketAddr::from((Ipv4Addr::UNSPECIFIED, port));
    let wildcard6 = SocketAddr::from((Ipv6Addr::UNSPECIFIED, port));
    let socket = if config.ipv6 {
        match bound(netns, config, wildcard6)? {
            // No IPv6 in this kernel or namespace: the pod has no IPv6 address to miss.
            Err(error) if has_no_ipv6(&error) => bound(netns, config, wildcard4)?,
            other => other,
        }
    } else {
        bound(netns, config, wildcard4)?
    };
    register(port, socket.map_err(|source| error(port, source))?)
}

/// Like upstream's, on IPv4 only.
fn listen_on_loopback(
    netns: &Netns,
    config: &Config,
    port: u16,
) -> Result<TcpListener, ListenError> {
    let loopback = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let socket = bound(netns, config, loopback)?;
    register(port, socket.map_err(|source| error(port, source))?)
}

pub(super) fn error(port: u16, source: io::Error) -> ListenError {
    match Errno::from_io_error(&source) {
        Some(Errno::ADDRINUSE) => ListenError::InUse { port },
        Some(Errno::PERM | Errno::ACCESS) => ListenError::NotPermitted { port, source },
        _ => ListenError::Io { port, source },
    }
}

/// The outer error: the namespace can't be entered.
fn bound(
    netns: &Netns,
    config: &Config,
    addr: SocketAddr,
) -> Result<io::Result<Socket>, ListenError> {
    let socket = netns
        .enter(|| sockopt::tcp(Domain::for_address(addr)))
        .map_err(ListenError::NetnsGone)?;
    Ok(socket.and_then(|socket| {
        if addr.is_ipv6() {
            socket.set_only_v6(false)?;
        }
        socket.set_mark(config.mark)?;
        // The IPv4 option also sets it for an IPv6 socket (facts ztunnel 1.2).
        if config.original_source != OriginalSource::Never {
            socket.set_ip_transparent_v4(true)?;
        }
        sockopt::keepalive(&socket, config.keepalive.as_ref())?;
        // For ports in TIME_WAIT; it doesn't let two sockets listen.
        socket.set_reuse_address(true)?;
        socket.bind(&addr.into())?;
        socket.listen(BACKLOG)?;
        Ok(socket)
    }))
}

pub(super) fn has_no_ipv6(error: &io::Error) -> bool {
    matches!(
        Errno::from_io_error(error),
        Some(Errno::AFNOSUPPORT | Errno::ADDRNOTAVAIL)
    )
}

/// Proves that a received descriptor is what its sender says it is.
fn listening(port: u16, fd: OwnedFd) -> Result<Socket, ListenError> {
    let socket = Socket::from(fd);
    let wrong = |text: &str| {
        let text = text.to_owned();
        Err(ListenError::Foreign { port, text })
    };
    let is_tcp = matches!(socket.domain(), Ok(Domain::IPV4 | Domain::IPV6))
        && matches!(socket.r#type(), Ok(Type::STREAM));
    if !is_tcp {
        return wrong("is no TCP socket");
    }
    if !rustix::net::sockopt::socket_acceptconn(&socket).unwrap_or(false) {
        return wrong("doesn't listen");
    }
    if socket.reuse_port().unwrap_or(true) {
        return wrong("shares its port (SO_REUSEPORT)");
    }
    match socket.local_addr().ok().and_then(|a| a.as_socket()) {
        Some(local) if local.port() == port => {}
        Some(local) => return wrong(&format!("listens on {local}")),
        None => return wrong("has no address"),
    }
    let ready = socket
        .set_nonblocking(true)
        .and_then(|()| socket.set_cloexec(true));
    match ready {
        Ok(()) => Ok(socket),
        Err(source) => Err(ListenError::Io { port, source }),
    }
}

fn register(port: u16, socket: Socket) -> Result<TcpListener, ListenError> {
    TcpListener::from_std(socket.into()).map_err(|source| ListenError::Io { port, source })
}
