//! Connections that leave the pod (facts ztunnel 2): accept, original destination, route, then a
//! tunnel or plain TCP, and copy. An endpoint that can't be reached is replaced by another one, as
//! long as nothing was relayed.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use tokio::net::TcpStream;

use super::attempt::{Attempt, Client, Upstream, may_try_elsewhere};
use super::connection::{Direction, Open};
use super::error::Early;
use super::names::NoAddress;
use super::pod::{Place, Pod, reset, run};
use super::proof;
use super::traceparent::Trace;
use crate::config::canonical_addr;
use crate::inpod::original_dst;
use crate::state::Workload;
use crate::state::resolve::{HboneRoute, Route, Target};

/// Endpoints tried after the first one.
const OTHERS: usize = 2;

/// Who wants to go where.
pub struct Wanted {
    pub peer: SocketAddr,
    /// Of the client's socket at our end.
    pub local: SocketAddr,
    pub dst: SocketAddr,
    pub began: Instant,
}

pub struct Established {
    pub open: Open,
    pub upstream: Upstream,
    pub place: Place,
}

/// Why there is no connection; the log and the metrics have it already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unserved {
    Refused,
    Unreachable,
}

/// Everything that may fail happens in boxes of its own, so that a connection that only copies
/// keeps little memory.
pub async fn handle(pod: Arc<Pod>, client: TcpStream, peer: SocketAddr) {
    let wanted = match captured(&pod, &client, peer) {
        Ok(wanted) => wanted,
        Err(error) => {
            let peer = pod.netns.as_seen(peer);
            pod.refuse(Direction::Outbound, peer, None, &error);
            return reset(client);
        }
    };
    if proof::is_outbound(wanted.dst) {
        return Box::pin(proof::meet(&pod, Direction::Outbound, client)).await;
    }
    let Ok(established) = Box::pin(establish(&pod, wanted)).await else {
        return reset(client);
    };
    let (open, _place) = (established.open, established.place);
    let result = match established.upstream {
        Upstream::Tcp(server, _socket) => run(&open.connection, client, server).await,
        Upstream::Tunnel(server) => run(&open.connection, client, server).await,
    };
    open.end(result);
}

/// Only connections that the pod itself made and that were redirected may use it. A remote client
/// that connects to the listener would borrow the pod's identity, and one that wasn't redirected
/// would loop. Of a pod that others send through, only the rules for its virtual interfaces redirect
/// here what it didn't make.
fn captured(pod: &Pod, client: &TcpStream, peer: SocketAddr) -> Result<Wanted, Early> {
    let local = canonical_addr(client.local_addr()?);
    let loopback = local.ip().is_loopback() || peer.ip().is_loopback();
    if !loopback && peer.ip() != local.ip() && !pod.demands.load().passes_on {
        return Err(Early::NotLoopback(peer));
    }
    let dst = original_dst(client).map_err(Early::NoOriginalDst)?;
    if dst == local {
        return Err(Early::SelfCall(dst));
    }
    Ok(Wanted {
        peer: pod.netns.as_seen(peer),
        local,
        dst,
        began: Instant::now(),
    })
}

/// The way to the destination, through at most three endpoints of a service.
pub async fn establish(pod: &Pod, wanted: Wanted) -> Result<Established, Unserved> {
    let refuse = |error: Early| {
        pod.refuse(Direction::Outbound, wanted.peer, Some(wanted.dst), &error);
        Unserved::Refused
    };
    let (place, own) = admit(pod, &wanted).await.map_err(refuse)?;
    let client = Client {
        own: &own,
        wanted: &wanted,
        trace: Trace::random(),
    };
    let mut tried = Vec::new();
    let mut failed: Option<(Attempt<'_>, super::error::Failed)> = None;
    loop {
        let route = match (route(pod, &client, &mut tried).await, failed.take()) {
            (Ok(route), None) => route,
            (Ok(route), Some((attempt, error))) => {
                attempt.replaced(&error);
                route
            }
            (Err(_), Some((attempt, error))) => {
                attempt.fail(error);
                return Err(Unserved::Unreachable);
            }
            (Err(error), None) => return Err(refuse(error)),
        };
        let mut attempt = Attempt::new(pod, &client, &route);
        let error = match attempt.connect(&client, &route).await {
            Ok(upstream) => {
                // Taken only by what ends the attempt.
                let open = attempt.open().ok_or(Unserved::Refused)?;
                return Ok(Established {
                    open,
                    upstream,
                    place,
                });
            }
            Err(error) => error,
        };
        match route.retry_without() {
            Some(uid) if tried.len() < OTHERS && may_try_elsewhere(&error) => {
                tried.push(uid.clone());
                failed = Some((attempt, error));
            }
            _ => {
                attempt.fail(error);
                return Err(Unserved::Unreachable);
            }
        }
    }
}

async fn admit(pod: &Pod, wanted: &Wanted) -> Result<(Place, Arc<Workload>), Early> {
    let place = pod.admit(1)?;
    let own = pod.own_workload().await?;
    let (dst, local) = (wanted.dst, wanted.local);
    let ours =
        dst.ip().is_loopback() || dst.ip() == local.ip() || own.addresses.contains(&dst.ip());
    if ours && pod.shared.config.ports.is_own(dst.port()) {
        return Err(Early::SelfCall(dst));
    }
    Ok((place, own))
}

/// With an address. An endpoint whose name can't be resolved counts as tried.
async fn route(pod: &Pod, client: &Client<'_>, tried: &mut Vec<Arc<str>>) -> Result<Route, Early> {
    let (peer, dst) = (client.wanted.peer, client.wanted.dst);
    loop {
        let route = pod.route(client.own, peer.ip(), dst, tried).await?;
        pod.check_registry(&route, peer, dst)?;
        match resolved(pod, client, route).await {
            Ok(route) => return Ok(route),
            Err((route, error)) => match route.retry_without() {
                Some(uid) if tried.len() < OTHERS => {
                    pod.shared.telemetry.metrics.bounds.endpoint_retries.inc();
                    tried.push(uid.clone());
                }
                _ => return Err(error.into()),
            },
        }
    }
}

/// facts ztunnel 2.6, on-demand DNS
async fn resolved(
    pod: &Pod,
    client: &Client<'_>,
    route: Route,
) -> Result<Route, (Route, NoAddress)> {
    let (Route::Tcp { dst: target, .. } | Route::Hbone(HboneRoute { tunnel: target, .. })) = &route
    else {
        return Ok(route);
    };
    let Target::Host {
        hostname, prefer, ..
    } = target
    else {
        return Ok(route);
    };
    let metrics = &pod.shared.telemetry.metrics;
    metrics.on_demand_dns.count(client.own, hostname);
    let patience = pod.limits().connect_timeout;
    let found = pod.shared.names.lookup(hostname, *prefer, patience);
    match found.await {
        Ok(ip) => Ok(route.at(ip)),
        Err(error) => Err((route, error)),
    }
}
