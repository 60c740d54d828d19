//! Why a connection failed, and how that shows: flag in metrics, reason of refusals, HTTP status.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use super::names::NoAddress;
use super::socks5::BadRequest;
use crate::hbone;
use crate::inpod::NoneFree;
use crate::policy::DenyReason;
use crate::state::resolve::{InboundRefusal, Refusal};
use crate::telemetry::Flags;
use crate::tls::CertError;

/// Before anything is known of a connection: an early deny (facts ztunnel 12.4).
#[derive(Debug, thiserror::Error)]
pub enum Early {
    #[error(
        "the client {ip} isn't on this pod's loopback: only redirected connections may come here",
        ip = .0.ip()
    )]
    NotLoopback(SocketAddr),
    #[error("no original destination: {0}")]
    NoOriginalDst(io::Error),
    #[error("{0} is a port of the proxy itself")]
    SelfCall(SocketAddr),
    #[error("the pod has {0} connections already (limit pod_max_connections)")]
    TooMany(u32),
    #[error(
        "the pod has {0} handshakes in flight at its HBONE port already (limit pod_max_handshakes)"
    )]
    TooManyHandshakes(u32),
    #[error(transparent)]
    NoSocket(#[from] NoneFree),
    #[error("the pod's own workload hasn't arrived from the control plane after {0:?}")]
    UnknownOwnWorkload(Duration),
    #[error(transparent)]
    Route(#[from] Refusal),
    #[error(
        "nothing is known of {dst}, and pods of namespace {namespace} reach known destinations \
         only (registryOnly): describe it by a ServiceEntry, or turn registryOnly off"
    )]
    RegistryOnly { dst: SocketAddr, namespace: String },
    #[error(
        "the control plane hasn't said within {patience:?} what {name} is (on-demand discovery): \
         check that the agent is connected to it"
    )]
    NotTold { name: Arc<str>, patience: Duration },
    #[error(
        "{name} isn't asked of the control plane: too many names were asked for this pod \
         (on-demand discovery)"
    )]
    TooManyNames { name: Arc<str> },
    #[error(transparent)]
    NoAddress(#[from] NoAddress),
    #[error(transparent)]
    Socks(BadRequest),
    #[error(transparent)]
    Certificate(#[from] CertError),
    #[error(transparent)]
    Tunnel(#[from] hbone::Error),
    #[error("a certificate of the tunnel has expired: the peer must make a new one")]
    TunnelExpired,
    #[error("method {0} instead of CONNECT")]
    NotConnect(String),
    #[error("authority {0:?} isn't HOST:PORT")]
    BadAuthority(String),
    #[error(transparent)]
    Destination(#[from] InboundRefusal),
    #[error("port {0} of the agent's own workload isn't served: it serves its metrics alone")]
    NotServed(u16),
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl Early {
    /// Label of `underpass_refusals`.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::NotLoopback(_) => "not_loopback",
            Self::NoOriginalDst(_) => "no_original_destination",
            Self::SelfCall(_) => "self_call",
            Self::TooMany(_) => "too_many_connections",
            Self::TooManyHandshakes(_) => "too_many_handshakes",
            Self::NoSocket(_) => "too_many_sockets",
            Self::UnknownOwnWorkload(_) => "unknown_own_workload",
            Self::NotTold { .. } => "not_told",
            Self::TooManyNames { .. } => "too_many_names",
            Self::Route(_) | Self::NoAddress(_) => "no_route",
            Self::Socks(_) => "bad_socks_request",
            Self::RegistryOnly { .. } => "registry_only",
            Self::Certificate(_) => "no_certificate",
            Self::Tunnel(_) => "handshake",
            Self::TunnelExpired => "tunnel_expired",
            Self::NotConnect(_) => "not_connect",
            Self::BadAuthority(_) => "bad_authority",
            Self::Destination(_) | Self::NotServed(_) => "bad_destination",
            Self::Io(_) => "io",
        }
    }

    /// facts ztunnel 3.4
    pub fn status(&self) -> u16 {
        match self {
            Self::NotConnect(_) | Self::BadAuthority(_) => 400,
            Self::TunnelExpired => 401,
            Self::Destination(refusal) => refusal.status(),
            _ => 503,
        }
    }
}

/// After the connection was opened: ends its access log line.
#[derive(Debug, thiserror::Error)]
pub enum Failed {
    #[error(transparent)]
    Denied(DenyReason),
    #[error("closed: {0}")]
    LateDenied(DenyReason),
    #[error("connection failed: {0}: {1}")]
    Connect(SocketAddr, io::Error),
    #[error("connection failed: {0}: no TCP connection after {1:?}")]
    ConnectTimeout(SocketAddr, Duration),
    #[error(transparent)]
    Certificate(#[from] CertError),
    #[error(transparent)]
    Tunnel(#[from] hbone::Error),
    #[error(transparent)]
    NoSocket(#[from] NoneFree),
    #[error("io: {0}")]
    Copy(io::Error),
    #[error("closed due to connection drain")]
    Drained,
    #[error("a defect of the proxy ended the connection")]
    Panicked,
}

impl Failed {
    /// facts ztunnel 12.2. Beyond upstream, which shows these three as CONNECT: a failed handshake
    /// is TLS_FAILURE, a refusal by the peer's policies (401) is DENY here too, and what broke after
    /// bytes could be relayed is MID_STREAM.
    pub fn flags(&self) -> Flags {
        match self {
            Self::Denied(_) | Self::LateDenied(_) => Flags::Deny,
            Self::Certificate(_) => Flags::IdentityError,
            Self::Tunnel(error) if error.is_revocation() => Flags::CertRevoked,
            Self::Copy(error) if cut(error).is_some_and(hbone::Error::is_revocation) => {
                Flags::CertRevoked
            }
            Self::Copy(error) if matches!(cut(error), Some(hbone::Error::Untrusted(..))) => {
                Flags::TlsFailure
            }
            Self::Tunnel(error) => match error {
                hbone::Error::ConnectTimeout(..) => Flags::NetworkPolicy,
                hbone::Error::Tls(..) | hbone::Error::Untrusted(..) => Flags::TlsFailure,
                hbone::Error::Timeout(_, what, _) if what.contains("TLS") => Flags::TlsFailure,
                hbone::Error::Timeout(_, what, _) if *what == "CONNECT" => Flags::Connect,
                hbone::Error::Http2(..) | hbone::Error::Timeout(..) => Flags::H2HandshakeFailure,
                hbone::Error::Status(401) => Flags::Deny,
                _ => Flags::Connect,
            },
            Self::Connect(..) | Self::ConnectTimeout(..) | Self::NoSocket(_) | Self::Panicked => {
                Flags::Connect
            }
            Self::Copy(_) => Flags::MidStream,
            Self::Drained => Flags::None,
        }
    }
}

/// Why a stream ended with its tunnel, where we cut that.
fn cut(error: &io::Error) -> Option<&hbone::Error> {
    error.get_ref()?.downcast_ref()
}

/// The policy that an operator must look at, where one decided.
pub fn deciding_policy(reason: &DenyReason) -> Option<&std::sync::Arc<str>> {
    match reason {
        DenyReason::Explicit { policy, .. }
        | DenyReason::NotArrived(policy)
        | DenyReason::Malformed(policy) => Some(policy),
        DenyReason::NotAllowed | DenyReason::NotThroughWaypoint(_) | DenyReason::NoWaypoint => None,
    }
}
