//! Where a captured connection goes (facts ztunnel 2.2–2.7), and where an inbound CONNECT ends
//! (facts ztunnel 3.5, 3.6): pure functions over a snapshot.

mod inbound;
mod outbound;
mod refusal;
mod upstream;
mod waypoint;

#[cfg(test)]
mod inbound_test;
#[cfg(test)]
mod network_test;
#[cfg(test)]
mod outbound_test;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod waypoint_test;

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use super::{ServiceName, Workload};
use crate::identity::Identity;

pub use inbound::inbound;
pub use outbound::outbound;
pub use refusal::{InboundRefusal, Refusal};
pub use waypoint::{through_waypoint, waypoints};

/// The decision for one outbound connection.
#[derive(Debug)]
pub enum Route {
    /// Raw TCP to where the client wanted to go. Nothing is known about it, or it is `known` as a
    /// service that wants its traffic left alone.
    Passthrough { dst: SocketAddr, known: bool },
    /// Raw TCP to a known workload that doesn't speak HBONE.
    Tcp {
        dst: Target,
        workload: Arc<Workload>,
        service: Option<ServiceName>,
        /// Another choice is left when this workload can't be reached.
        retryable: bool,
    },
    /// CONNECT over mTLS.
    Hbone(HboneRoute),
}

#[derive(Debug)]
pub struct HboneRoute {
    /// TCP destination: workload, waypoint or network gateway; port 15008 or what the reference
    /// says.
    pub tunnel: Target,
    /// `:authority`, of both CONNECTs where there are two. While `tunnel` is a hostname, an
    /// unspecified address stands for the one it resolves to: see `at`.
    pub authority: Authority,
    /// Any one of these must be a URI SAN of the (outer) peer.
    pub expected: Arc<[Identity]>,
    /// The workload that terminates the (outer) tunnel (destination_* labels).
    pub workload: Arc<Workload>,
    pub service: Option<ServiceName>,
    pub via_waypoint: bool,
    /// Another network: a second TLS and CONNECT inside the tunnel, to a peer that shows one of
    /// these (facts ztunnel 2.5).
    pub inner: Option<Arc<[Identity]>>,
    /// Another choice is left when this workload can't be reached.
    pub retryable: bool,
}

/// Where to connect to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    Addr(SocketAddr),
    /// A workload without address, resolved at connect time: one of the preferred family, else
    /// any (facts ztunnel 2.6).
    Host {
        hostname: Arc<str>,
        port: u16,
        prefer: IpFamily,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IpFamily {
    V4,
    V6,
}

/// `:authority` of a CONNECT.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Authority {
    Ip(SocketAddr),
    Host(Arc<str>, u16),
}

/// What an inbound CONNECT leads to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inbound {
    /// The application's address as policies and logs know it: the tunnel's local IP and the
    /// resolved port.
    pub dst: SocketAddr,
    /// Where to connect: `dst`, or the loopback address for an application that wants PROXY
    /// protocol (facts ztunnel 3.6).
    pub connect: SocketAddr,
    /// Destination to write into a PROXY protocol header (facts ztunnel 3.7); None: no header.
    pub proxy_header: Option<SocketAddr>,
    pub service: Option<ServiceName>,
}

impl Route {
    /// The hostname of the target is this address.
    pub fn at(self, ip: IpAddr) -> Self {
        match self {
            Self::Passthrough { .. } => self,
            Self::Tcp {
                dst,
                workload,
                service,
                retryable,
            } => Self::Tcp {
                dst: dst.at(ip),
                workload,
                service,
                retryable,
            },
            Self::Hbone(route) => Self::Hbone(route.at(ip)),
        }
    }

    /// What is left out of the next choice when this one can't be reached; None where there is no
    /// other choice.
    pub fn retry_without(&self) -> Option<&Arc<str>> {
        match self {
            Self::Tcp {
                workload,
                retryable: true,
                ..
            }
            | Self::Hbone(HboneRoute {
                workload,
                retryable: true,
                ..
            }) => Some(&workload.uid),
            _ => None,
        }
    }
}

impl HboneRoute {
    /// The hostname of the tunnel's end is this address.
    pub fn at(mut self, ip: IpAddr) -> Self {
        self.tunnel = self.tunnel.at(ip);
        if let Authority::Ip(authority) = &mut self.authority
            && authority.ip().is_unspecified()
        {
            authority.set_ip(ip);
        }
        self
    }
}

impl Target {
    fn at(self, ip: IpAddr) -> Self {
        Self::Addr(SocketAddr::new(ip, self.port()))
    }

    pub fn port(&self) -> u16 {
        match self {
            Self::Addr(addr) => addr.port(),
            Self::Host { port, .. } => *port,
        }
    }

    fn with_port(self, port: u16) -> Self {
        match self {
            Self::Addr(addr) => Self::Addr(SocketAddr::new(addr.ip(), port)),
            Self::Host {
                hostname, prefer, ..
            } => Self::Host {
                hostname,
                port,
                prefer,
            },
        }
    }
}

impl IpFamily {
    pub fn of(ip: IpAddr) -> Self {
        if ip.is_ipv4() { Self::V4 } else { Self::V6 }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Addr(addr) => addr.fmt(f),
            Self::Host { hostname, port, .. } => write!(f, "{hostname}:{port}"),
        }
    }
}

impl fmt::Display for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ip(addr) => addr.fmt(f),
            Self::Host(host, port) => write!(f, "{host}:{port}"),
        }
    }
}
