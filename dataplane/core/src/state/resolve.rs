//! Where a captured connection goes (facts ztunnel 2.2–2.7), and where an inbound CONNECT ends
//! (facts ztunnel 3.5, 3.6): pure functions over a snapshot.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use super::{ServiceName, Snapshot, Workload};
use crate::config::Config;
use crate::identity::Identity;

/// The decision for one outbound connection.
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

/// Why no route exists. Texts carry the hint that an operator needs.
#[derive(Debug, thiserror::Error, Clone, PartialEq, Eq)]
pub enum Refusal {
    #[error("placeholder")]
    Placeholder,
}

pub fn outbound(
    _snapshot: &Snapshot,
    _config: &Config,
    _source: &Workload,
    _client: IpAddr,
    _dst: SocketAddr,
) -> Result<Route, Refusal> {
    unimplemented!()
}

/// `:authority` of an inbound CONNECT.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Authority {
    Ip(SocketAddr),
    Host(String, u16),
}

/// What an inbound CONNECT leads to.
pub struct Inbound {
    /// The application's address: the tunnel's local IP and the resolved port.
    pub dst: SocketAddr,
    pub service: Option<ServiceName>,
}

/// Each variant maps to a status of facts ztunnel 3.4.
#[derive(Debug, thiserror::Error, Clone, PartialEq, Eq)]
pub enum InboundRefusal {
    #[error("placeholder")]
    Placeholder,
}

impl InboundRefusal {
    /// HTTP status of the answer (facts ztunnel 3.4).
    pub fn status(&self) -> u16 {
        unimplemented!()
    }
}

/// Steps 4 and 5 of facts ztunnel 3.4. `local` is the local address of the tunnel's socket.
pub fn inbound(
    _snapshot: &Snapshot,
    _config: &Config,
    _own: &Workload,
    _local: SocketAddr,
    _authority: &Authority,
    _forwarded_host: Option<&str>,
) -> Result<Inbound, InboundRefusal> {
    unimplemented!()
}
