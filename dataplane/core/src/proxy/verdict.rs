//! What `why` tells of a refused or failed connection: who, where, which rule or cause, what to do.

use std::net::SocketAddr;
use std::sync::Arc;

use super::connection::{Connection, Direction};
use super::error::{Early, Failed, deciding_policy};
use super::pod::Pod;
use crate::hbone;
use crate::policy::DenyReason;
use crate::state::resolve::Refusal;
use crate::state::{Snapshot, Workload};
use crate::telemetry::{Happened, Side};

/// Refused before it was opened: the names come from the addresses.
pub fn refused(
    pod: &Pod,
    direction: Direction,
    src: SocketAddr,
    dst: Option<SocketAddr>,
    error: &Early,
) -> Happened {
    let snapshot = pod.shared.store.snapshot();
    let own = pod.find_own(&snapshot);
    let network = &pod.shared.config.network;
    let at = |addr: SocketAddr| snapshot.workload_by_address(network, addr.ip());
    let inbound = direction == Direction::Inbound;
    let (source, destination) = match inbound {
        true => (at(src), own),
        false => (own, dst.and_then(at)),
    };
    let client = source.as_ref().filter(|_| !inbound);
    let service = dst.filter(|_| !inbound && destination.is_none());
    Happened {
        inbound,
        src: Some(src.ip()),
        dst: dst.map(|dst| dst.to_string()).unwrap_or_default(),
        src_identity: client.map(|w| w.identity().to_string()).unwrap_or_default(),
        dst_service: service
            .and_then(|dst| service_at(&snapshot, network, client, dst))
            .unwrap_or_default(),
        src_workload: source.as_deref().map(name).unwrap_or_default(),
        dst_workload: destination.as_deref().map(name).unwrap_or_default(),
        flag: error.reason().to_uppercase(),
        cause: error.to_string(),
        remedy: error.remedy(),
        ..Default::default()
    }
}

/// None for an end that isn't the connection's fault.
pub fn failed(connection: &Connection, error: &Failed) -> Option<Happened> {
    if matches!(error, Failed::Drained) {
        return None;
    }
    let (facts, labels) = (&connection.facts, &connection.series.labels);
    let inbound = facts.direction == Direction::Inbound;
    let reason = match error {
        Failed::Denied(reason) | Failed::LateDenied(reason) => Some(reason),
        _ => None,
    };
    let proven = labels.source.principal.as_ref().filter(|_| labels.mtls);
    let dialled = facts.original_dst.as_deref().filter(|_| !inbound);
    Some(Happened {
        inbound,
        src: Some(facts.src.ip()),
        dst: dialled.map_or_else(|| facts.dst.to_string(), ToOwned::to_owned),
        src_identity: proven.map(ToString::to_string).unwrap_or_default(),
        src_workload: qualified(&labels.source, &facts.src_pod),
        dst_workload: qualified(&labels.destination, &facts.dst_pod),
        dst_service: labels
            .service
            .as_ref()
            .map(|service| service.hostname.to_string())
            .unwrap_or_default(),
        flag: error.flags().as_str().to_owned(),
        cause: error.to_string(),
        policy: reason
            .and_then(deciding_policy)
            .map(ToString::to_string)
            .unwrap_or_default(),
        rule: reason.and_then(DenyReason::rule),
        remedy: error.remedy(),
    })
}

impl Early {
    /// What to do; "" where the text itself says it.
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::NotLoopback(_) => {
                "somebody connects to the proxy's own port: connect to the application's instead"
            }
            Self::NoOriginalDst(_) | Self::SelfCall(_) => {
                "connect to the application's own port; if that was done, look at the pod's rules: \
                 underpass pods"
            }
            Self::TooMany(_) => {
                "find who opens so many (underpass connections), or raise limits.pod-max-connections"
            }
            Self::TooManyHandshakes(_) => {
                "find who connects and says nothing (underpass why), or raise \
                 limits.pod-max-handshakes"
            }
            Self::NoSocket(_) => SOCKETS,
            Self::UnknownOwnWorkload(_) => {
                "check that the control plane is connected (underpass status), and that the pod's \
                 name, namespace and service account are the same there and in the pod list"
            }
            Self::Route(refusal) => refusal.remedy(),
            Self::Certificate(_) => CERTIFICATE,
            Self::Tunnel(error) => tunnel_remedy(error),
            Self::TunnelExpired => "none: the peer makes a new tunnel by itself",
            Self::NotConnect(_) | Self::BadAuthority(_) => {
                "the peer doesn't speak HBONE as the mesh does: look at what runs there"
            }
            Self::Destination(_) => {
                "the peer sent it to the wrong pod: if it doesn't pass, its node has an old list of \
                 endpoints; compare underpass workloads on both"
            }
            _ => "",
        }
    }
}

impl Failed {
    /// What to do; "" where the text itself says it.
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::Denied(reason) | Self::LateDenied(reason) => reason.remedy(),
            Self::Connect(..) => "check that the application runs and listens on that port",
            Self::ConnectTimeout(..) => {
                "check routes, and whether a NetworkPolicy or firewall blocks the port"
            }
            Self::Certificate(_) => CERTIFICATE,
            Self::Tunnel(error) => tunnel_remedy(error),
            Self::NoSocket(_) => SOCKETS,
            Self::Copy(_) => {
                "one of the ends broke off: look at the applications' logs around that time"
            }
            Self::Panicked => "report this, with the log around that time",
            _ => "",
        }
    }
}

const SOCKETS: &str = "find who holds so many (underpass connections), or raise the data plane's \
                       limit of open files";

const CERTIFICATE: &str = "see the identity's last error: underpass certificates";

fn tunnel_remedy(error: &hbone::Error) -> &'static str {
    match error {
        hbone::Error::Connect(..) => {
            "check that the peer's node proxy runs, and that the pod there is in the mesh"
        }
        hbone::Error::ConnectTimeout(..) => {
            "allow TCP port 15008 between the pods in NetworkPolicies and firewalls"
        }
        hbone::Error::NoSocket(..) => SOCKETS,
        hbone::Error::Revoked(..) => {
            "the list of revoked certificates (trust.crl) names one of the two: renew that one"
        }
        hbone::Error::Untrusted(..) => {
            "its certificate was accepted until the mesh's trust changed: see underpass \
             certificates on both nodes"
        }
        hbone::Error::Tls(..) => {
            "the two ends don't accept each other's certificate: compare underpass certificates on \
             both nodes (roots, trust domain, expiry)"
        }
        hbone::Error::Status(401) => {
            "the destination's policies refuse it: underpass why on the destination's node names \
             the rule"
        }
        hbone::Error::Status(_) => {
            "the destination's node refused it: underpass why there says the reason"
        }
        hbone::Error::Timeout(..) => {
            "the peer accepted and then stalled: look at its node's load and log"
        }
        _ => "",
    }
}

impl Refusal {
    /// What to do; "" where the text itself says it.
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::NoHealthyUpstream { .. } => {
                "see its ports and endpoints: underpass services -o wide"
            }
            Self::UnknownWaypoint { .. } => {
                "deploy the waypoint, or take the label istio.io/use-waypoint away"
            }
            Self::NoService { .. } => "dial the service's address instead of the workload's",
            Self::NoValidDestination { .. } => {
                "let the service's ipFamilies name a family that the workload has an address of"
            }
            _ => "",
        }
    }
}

impl DenyReason {
    /// Of the policy that decided.
    pub fn rule(&self) -> Option<usize> {
        match self {
            Self::Explicit { rule, .. } => Some(*rule),
            _ => None,
        }
    }

    /// What to do; "" where the text itself says it.
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::Explicit { .. } => {
                "change that rule of the DENY policy, or use another service account or address"
            }
            Self::NotAllowed => {
                "add a rule for this source to one of the ALLOW policies: underpass explain tells \
                 why each of them doesn't match"
            }
            Self::NotArrived(_) => {
                "check that the control plane is connected and sends the policy: underpass status"
            }
            Self::Malformed(_) => {
                "correct the policy: underpass status names the field that can't be read"
            }
            Self::NotThroughWaypoint(_) | Self::NoWaypoint => "",
        }
    }
}

fn name(workload: &Workload) -> String {
    format!("{}/{}", workload.namespace, workload.name)
}

fn qualified(side: &Side, pod: &str) -> String {
    match (&*side.namespace, pod) {
        (_, "") => String::new(),
        ("", pod) => pod.to_owned(),
        (namespace, pod) => format!("{namespace}/{pod}"),
    }
}

fn service_at(
    snapshot: &Snapshot,
    network: &str,
    client: Option<&Arc<Workload>>,
    dst: SocketAddr,
) -> Option<String> {
    let client = client.map(|w| &*w.namespace);
    let service = snapshot.service_by_vip(network, dst.ip(), client)?;
    Some(service.name.hostname.to_string())
}
