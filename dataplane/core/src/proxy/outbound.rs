//! Connections that leave the pod (facts ztunnel 2): accept, original destination, route, then a
//! tunnel or plain TCP, and copy.

use std::net::SocketAddr;
use std::sync::Arc;

use http::HeaderMap;
use tokio::net::TcpStream;

use super::baggage::{BAGGAGE, Baggage};
use super::connection::{Direction, Facts, Open};
use super::error::{Early, Failed};
use super::forwarded::{FORWARDED, Forwarded};
use super::labels;
use super::pod::{Place, Pod, reset, run};
use super::traceparent::{TRACEPARENT, Trace};
use crate::config::canonical_addr;
use crate::hbone::{Connect, Key, Stream};
use crate::inpod::{Held, original_dst};
use crate::state::Workload;
use crate::state::resolve::{HboneRoute, Route, Target};

/// The way on, once it stands.
enum Upstream {
    Tcp(TcpStream, Held),
    Tunnel(Stream),
}

struct Routed {
    own: Arc<Workload>,
    client: SocketAddr,
    route: Route,
    next: SocketAddr,
    trace: Trace,
}

/// Everything that may fail happens in boxes of its own, so that a connection that only copies
/// keeps little memory.
pub async fn handle(pod: Arc<Pod>, client: TcpStream, peer: SocketAddr) {
    let (routed, open, permit) = match Box::pin(accept(&pod, &client, peer)).await {
        Ok(accepted) => accepted,
        Err((dst, error)) => {
            pod.refuse(Direction::Outbound, peer, dst, &error);
            return reset(client);
        }
    };
    let upstream = Box::pin(connect(&pod, routed)).await;
    let result = match upstream {
        Ok(Upstream::Tcp(server, _socket)) => run(&open.connection, client, server).await,
        Ok(Upstream::Tunnel(server)) => run(&open.connection, client, server).await,
        Err(error) => {
            reset(client);
            Err(error)
        }
    };
    open.end(result);
    drop(permit);
}

/// Gather what must be known, and open the connection; an error may name where it was going.
async fn accept(
    pod: &Pod,
    client: &TcpStream,
    peer: SocketAddr,
) -> Result<(Routed, Open, Place), (Option<SocketAddr>, Early)> {
    let (local, dst) = captured(client, peer).map_err(|error| (None, error))?;
    let with_dst = |error: Early| (Some(dst), error);
    let permit = pod.admit(1).map_err(with_dst)?;
    let own = pod.own_workload().await.map_err(with_dst)?;
    let ours =
        dst.ip().is_loopback() || dst.ip() == local.ip() || own.addresses.contains(&dst.ip());
    if ours && pod.shared.config.ports.is_own(dst.port()) {
        return Err(with_dst(Early::SelfCall(dst)));
    }
    let route = pod.route(&own, peer.ip(), dst).await.map_err(with_dst)?;
    pod.check_registry(&route, peer, dst).map_err(with_dst)?;
    let next = next_hop(&route).map_err(with_dst)?;
    let routed = Routed {
        own,
        client: peer,
        route,
        next,
        trace: Trace::random(),
    };
    let open = open(pod, &routed, dst);
    Ok((routed, open, permit))
}

/// Only connections that the pod itself made and that were redirected may use it. A remote client
/// that connects to the listener would borrow the pod's identity, and one that wasn't redirected
/// would loop.
fn captured(client: &TcpStream, peer: SocketAddr) -> Result<(SocketAddr, SocketAddr), Early> {
    let local = canonical_addr(client.local_addr()?);
    let loopback = local.ip().is_loopback() || peer.ip().is_loopback();
    if !loopback && peer.ip() != local.ip() {
        return Err(Early::NotLoopback(peer));
    }
    let dst = original_dst(client).map_err(Early::NoOriginalDst)?;
    if dst == local {
        return Err(Early::SelfCall(dst));
    }
    Ok((local, dst))
}

/// The first address that a connection is made to.
fn next_hop(route: &Route) -> Result<SocketAddr, Early> {
    let target = match route {
        Route::Passthrough { dst, .. } => return Ok(*dst),
        Route::Tcp { dst, .. } => dst,
        Route::Hbone(route) if route.inner.is_some() => {
            return Err(Early::Unsupported("connections to other networks"));
        }
        Route::Hbone(route) => &route.tunnel,
    };
    match target {
        Target::Addr(addr) => Ok(*addr),
        Target::Host { .. } => Err(Early::Unsupported("workloads without an address")),
    }
}

fn open(pod: &Pod, routed: &Routed, dst: SocketAddr) -> Open {
    let (labels, src_pod, dst_pod) = labels::outbound(&routed.own, &routed.route);
    let next = routed.next;
    let authority = match &routed.route {
        Route::Passthrough { .. } | Route::Tcp { .. } => None,
        Route::Hbone(route) => Some(route.authority.to_string().into()),
    };
    let facts = Facts {
        direction: Direction::Outbound,
        trace: routed.trace,
        src: routed.client,
        src_pod,
        original_dst: Some(dst.to_string().into()),
        dst: next,
        log_dst: next,
        hbone: authority.is_some(),
        authority,
        dst_pod,
        checked: None,
    };
    pod.open(facts, labels)
}

/// One endpoint, one attempt for now: a retry on another one belongs here, before the first byte.
async fn connect(pod: &Pod, routed: Routed) -> Result<Upstream, Failed> {
    match &routed.route {
        Route::Passthrough { .. } | Route::Tcp { .. } => {
            let socket = pod.sockets.take(1)?;
            let server = pod.connect(routed.next, None).await?;
            Ok(Upstream::Tcp(server, socket))
        }
        Route::Hbone(route) => tunnel(pod, &routed, route).await.map(Upstream::Tunnel),
    }
}

async fn tunnel(pod: &Pod, routed: &Routed, route: &HboneRoute) -> Result<Stream, Failed> {
    let identity = routed.own.identity();
    let patience = pod.limits().workload_wait;
    let credentials = pod.shared.certs.get(&identity, patience).await?;
    let key = Key {
        source: identity,
        expected: route.expected.clone(),
        dst: routed.next,
        owner: route.workload.uid.clone(),
        // The kernel picks the pod's address, the same for all its tunnels.
        from: None,
    };
    let connect = Connect {
        authority: route.authority.to_string(),
        headers: headers(routed, route),
    };
    let connected = pod.pool.connect(key, &credentials, connect).await?;
    Ok(connected.stream)
}

/// facts ztunnel 3.3
fn headers(routed: &Routed, route: &HboneRoute) -> HeaderMap {
    let mut headers = HeaderMap::with_capacity(3);
    headers.insert(BAGGAGE, Baggage::of(&routed.own).to_header());
    let forwarded = Forwarded {
        client: Some(routed.client),
        host: route.service.as_ref().map(|s| s.hostname.to_string()),
    };
    if let Some(forwarded) = forwarded.to_header() {
        headers.insert(FORWARDED, forwarded);
    }
    headers.insert(TRACEPARENT, routed.trace.to_header());
    headers
}
