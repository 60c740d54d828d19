//! Why a connection has nowhere to go. Texts carry the hint that an operator needs; variants are
//! named as in facts ztunnel 12.4 where upstream has them.

use std::net::SocketAddr;
use std::sync::Arc;

/// Why no route exists.
#[derive(Debug, thiserror::Error, Clone, PartialEq, Eq)]
pub enum Refusal {
    #[error("{0} is a listener of the proxy itself: connect to the application's port instead")]
    SelfCall(SocketAddr),
    #[error(
        "waypoint {waypoint} for {dst} is unknown or has no healthy endpoint: check that the \
         Gateway exists, is programmed and has ready pods"
    )]
    UnknownWaypoint { dst: SocketAddr, waypoint: String },
    #[error(
        "no healthy endpoint of service {service} for port {}: check that it declares the port and \
         has ready pods that match its traffic distribution",
        dst.port()
    )]
    NoHealthyUpstream { dst: SocketAddr, service: Arc<str> },
    #[error(
        "workload {workload} is in network {network}, and {dst} is not a service: another network \
         is reached through services only"
    )]
    NoService {
        dst: SocketAddr,
        workload: Arc<str>,
        network: Arc<str>,
    },
    #[error(
        "workload {workload} is in network {network} and names no gateway to it: deploy an \
         east-west gateway there, and check that the control plane knows its address"
    )]
    NoNetworkGateway {
        workload: Arc<str>,
        network: Arc<str>,
    },
    #[error(
        "gateway {gateway} of network {network} is unknown or has no healthy endpoint: check that \
         it is programmed and has ready pods"
    )]
    UnknownNetworkGateway {
        gateway: String,
        network: Arc<str>,
        /// Whom it would lead to.
        workload: Arc<str>,
    },
    #[error(
        "service {service} leads to network {network}, but names no SPIFFE identity that its \
         workloads there could prove: give it subjectAltNames"
    )]
    NoServiceIdentity {
        service: Arc<str>,
        network: Arc<str>,
    },
    #[error("workload {workload} has no address of an IP family that its service allows")]
    NoValidDestination { workload: Arc<str> },
}

/// Each variant maps to a status of facts ztunnel 3.4.
#[derive(Debug, thiserror::Error, Clone, PartialEq, Eq)]
pub enum InboundRefusal {
    #[error(
        "CONNECT to {authority} arrived at {local}: the address is neither this workload's nor one \
         of a service or workload that this workload is the waypoint of"
    )]
    IpMismatch {
        authority: SocketAddr,
        local: SocketAddr,
    },
    #[error("no service with hostname {0} is known or visible here")]
    NoHostname(Arc<str>),
    #[error("service {service} has no port {port} that this workload serves")]
    NoPortForServices { service: Arc<str>, port: u16 },
    #[error("service {service} has no address to name in the PROXY protocol header")]
    NoIpForService { service: Arc<str> },
    #[error("{0} is a listener of the proxy itself")]
    SelfCall(SocketAddr),
}

impl InboundRefusal {
    /// HTTP status of the answer (facts ztunnel 3.4).
    pub fn status(&self) -> u16 {
        match self {
            Self::IpMismatch { .. } => 400,
            Self::NoHostname(_)
            | Self::NoPortForServices { .. }
            | Self::NoIpForService { .. }
            | Self::SelfCall(_) => 503,
        }
    }
}
