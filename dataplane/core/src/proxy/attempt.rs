//! One attempt to reach one endpoint: the way there, and what log and metrics will say of it.

use std::net::SocketAddr;
use std::sync::Arc;

use http::{HeaderMap, HeaderValue};
use tokio::net::TcpStream;

use super::baggage::{BAGGAGE, Baggage};
use super::connection::{Direction, Facts, Open, Protocol};
use super::error::Failed;
use super::forwarded::{FORWARDED, Forwarded};
use super::labels::{self, X_FORWARDED_NETWORK};
use super::outbound::Wanted;
use super::pod::Pod;
use super::traceparent::{TRACEPARENT, Trace};
use crate::hbone::{self, Connect, Connected, Key, Stream};
use crate::inpod::Held;
use crate::state::Workload;
use crate::state::resolve::{HboneRoute, Route, Target};
use crate::telemetry::Labels;

/// The way on, once it stands.
pub enum Upstream {
    Tcp(TcpStream, Held),
    Tunnel(Stream),
}

/// Opened when it is known how it went, since only then it is known who answered. One that is
/// dropped before is opened and ended by that, so that it leaves its line.
pub struct Attempt<'a> {
    pod: &'a Pod,
    about: Option<(Facts, Labels)>,
}

/// What all attempts of one connection share.
pub struct Client<'a> {
    pub own: &'a Arc<Workload>,
    pub wanted: &'a Wanted,
    pub trace: Trace,
}

impl<'a> Attempt<'a> {
    /// `route` has an address.
    pub fn new(pod: &'a Pod, client: &Client<'_>, route: &Route) -> Self {
        let (labels, src_pod, dst_pod) = labels::outbound(client.own, route);
        let (protocol, authority) = match route {
            Route::Passthrough { .. } | Route::Tcp { .. } => (Protocol::Tcp, None),
            Route::Hbone(route) => {
                let protocol = match route.inner {
                    Some(_) => Protocol::DoubleHbone,
                    None => Protocol::Hbone,
                };
                (protocol, Some(route.authority.to_string().into()))
            }
        };
        let next = next_hop(route).unwrap_or(client.wanted.dst);
        let facts = Facts {
            direction: Direction::Outbound,
            trace: client.trace,
            began: client.wanted.began,
            src: client.wanted.peer,
            src_pod,
            original_dst: Some(client.wanted.dst.to_string().into()),
            dst: next,
            log_dst: next,
            protocol,
            authority,
            dst_pod,
            checked: None,
        };
        Self {
            pod,
            about: Some((facts, labels)),
        }
    }

    pub async fn connect(
        &mut self,
        client: &Client<'_>,
        route: &Route,
    ) -> Result<Upstream, Failed> {
        let pod = self.pod;
        let next = next_hop(route).unwrap_or(client.wanted.dst);
        match route {
            Route::Passthrough { .. } | Route::Tcp { .. } => {
                let socket = pod.sockets.take(1)?;
                let server = pod.connect(next, None).await?;
                Ok(Upstream::Tcp(server, socket))
            }
            Route::Hbone(route) => {
                let connected = tunnel(pod, client, route, next).await?;
                if route.inner.is_some() {
                    self.answered_by(&connected);
                }
                Ok(Upstream::Tunnel(connected.stream))
            }
        }
    }

    /// Who is behind another network's gateway shows only in the answer (facts ztunnel 2.5).
    fn answered_by(&mut self, connected: &Connected) {
        let Some((facts, labels)) = &mut self.about else {
            return;
        };
        labels.destination = Baggage::parse(&connected.headers).to_side();
        labels.destination.principal = Some(connected.peer.clone());
        facts.dst_pod = labels.destination.canonical_service.clone();
    }

    pub fn open(mut self) -> Option<Open> {
        let (facts, labels) = self.about.take()?;
        Some(self.pod.open(facts, labels))
    }

    pub fn fail(self, error: Failed) {
        if let Some(open) = self.open() {
            open.end(Err(error));
        }
    }

    /// Another endpoint is tried instead: no connection to this one was ever there.
    pub fn replaced(mut self, error: &Failed) {
        let Some((facts, _)) = self.about.take() else {
            return;
        };
        self.pod
            .shared
            .telemetry
            .metrics
            .bounds
            .endpoint_retries
            .inc();
        tracing::warn!(
            uid = self.pod.info.uid,
            src = %facts.src,
            dst = %facts.dst,
            dst_workload = &*facts.dst_pod,
            %error,
            "trying another endpoint"
        );
    }
}

impl Drop for Attempt<'_> {
    fn drop(&mut self) {
        if let Some((facts, labels)) = self.about.take() {
            drop(self.pod.open(facts, labels));
        }
    }
}

/// Where the first socket leads to; None while that is only a name.
fn next_hop(route: &Route) -> Option<SocketAddr> {
    let target = match route {
        Route::Passthrough { dst, .. } => return Some(*dst),
        Route::Tcp { dst, .. } => dst,
        Route::Hbone(route) => &route.tunnel,
    };
    match target {
        Target::Addr(addr) => Some(*addr),
        Target::Host { .. } => None,
    }
}

/// Whether another endpoint may do better. Nothing was relayed yet, so all that matters is whether
/// somebody decided: a policy (401), a certificate, or we ourselves.
pub fn may_try_elsewhere(error: &Failed) -> bool {
    match error {
        Failed::Connect(..) | Failed::ConnectTimeout(..) => true,
        Failed::Tunnel(error) => match error {
            hbone::Error::Connect(..)
            | hbone::Error::ConnectTimeout(..)
            | hbone::Error::Timeout(..)
            | hbone::Error::Http2(..)
            | hbone::Error::Moved(_) => true,
            // The far end couldn't reach its application.
            hbone::Error::Status(status) => *status == 503,
            hbone::Error::Tls(..)
            | hbone::Error::Revoked(..)
            | hbone::Error::Untrusted(..)
            | hbone::Error::NoSocket(..)
            | hbone::Error::Draining => false,
        },
        _ => false,
    }
}

async fn tunnel(
    pod: &Pod,
    client: &Client<'_>,
    route: &HboneRoute,
    next: SocketAddr,
) -> Result<Connected, Failed> {
    let identity = client.own.identity();
    let patience = pod.limits().workload_wait;
    let credentials = pod.shared.certs.get(&identity, patience).await?;
    let key = Key {
        source: identity,
        expected: route.expected.clone(),
        dst: next,
        owner: route.workload.uid.clone(),
        // The kernel picks the pod's address, the same for all its tunnels.
        from: None,
    };
    let connect = Connect {
        authority: route.authority.to_string(),
        headers: headers(client, route),
    };
    let Some(expected) = &route.inner else {
        return Ok(pod.pool.connect(key, &credentials, connect).await?);
    };
    let mut inner = connect.clone();
    let outer = pod.pool.connect(key, &credentials, connect).await?;
    let network = HeaderValue::from_str(&pod.shared.config.network);
    if let Ok(network) = network {
        inner.headers.insert(X_FORWARDED_NETWORK, network);
    }
    let nested = pod.pool.nested(next, expected, &credentials);
    Ok(nested.connect(outer.stream, &inner).await?)
}

/// facts ztunnel 3.3
fn headers(client: &Client<'_>, route: &HboneRoute) -> HeaderMap {
    let mut headers = HeaderMap::with_capacity(4);
    headers.insert(BAGGAGE, Baggage::of(client.own).to_header());
    let forwarded = Forwarded {
        client: Some(client.wanted.peer),
        host: route.service.as_ref().map(|s| s.hostname.to_string()),
    };
    if let Some(forwarded) = forwarded.to_header() {
        headers.insert(FORWARDED, forwarded);
    }
    headers.insert(TRACEPARENT, client.trace.to_header());
    headers
}
