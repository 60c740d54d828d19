//! Where a captured connection goes (facts ztunnel 2.2–2.7), and where an inbound CONNECT ends
//! (facts ztunnel 3.5, 3.6): pure functions over a snapshot.

mod inbound;
mod outbound;
mod refusal;
mod upstream;

#[cfg(test)]
mod inbound_test;
#[cfg(test)]
mod outbound_test;

use std::net::SocketAddr;
use std::sync::Arc;

use super::{ServiceName, Workload};
use crate::identity::Identity;

pub use inbound::inbound;
pub use outbound::outbound;
pub use refusal::{InboundRefusal, Refusal};

/// The decision for one outbound connection.
#[derive(Debug)]
pub enum Route {
    /// Raw TCP to where the client wanted to go; nothing is known about it.
    Passthrough { dst: SocketAddr },
    /// Raw TCP to a known workload that doesn't speak HBONE.
    Tcp {
        dst: SocketAddr,
        workload: Arc<Workload>,
        service: Option<ServiceName>,
    },
    /// CONNECT over mTLS.
    Hbone(HboneRoute),
}

#[derive(Debug)]
pub struct HboneRoute {
    /// TCP destination: workload or waypoint, port 15008 or the waypoint's.
    pub tunnel: SocketAddr,
    /// `:authority`.
    pub authority: SocketAddr,
    /// Any one of these must be a URI SAN of the peer.
    pub expected: Arc<[Identity]>,
    /// The workload that terminates the tunnel (destination_* labels).
    pub workload: Arc<Workload>,
    pub service: Option<ServiceName>,
    pub via_waypoint: bool,
}

/// `:authority` of an inbound CONNECT.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Authority {
    Ip(SocketAddr),
    Host(String, u16),
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
