//! HBONE that enters the pod (facts ztunnel 3.4): a tunnel, and in it CONNECT requests, each checked
//! and led to the application.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use http::{HeaderMap, Method};
use prometheus_client::metrics::gauge::Gauge;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::sync::watch;

use super::authority;
use super::baggage::{BAGGAGE, Baggage};
use super::connection::{Checked, Direction, Facts, Open, Protocol};
use super::error::{Early, Failed};
use super::forwarded::Forwarded;
use super::labels::Peer;
use super::pod::{Place, Pod, reset, run};
use super::proxy_protocol;
use super::registry::Permit;
use super::tasks::{Tasks, sized};
use super::traceparent::Trace;
use crate::config::{Limits, canonical_addr};
use crate::hbone::{Request, Responder, Stream, Tunnel};
use crate::identity::Identity;
use crate::inpod::Held;
use crate::policy::Subject;
use crate::state::Snapshot;
use crate::state::resolve::{self, Authority};
use crate::telemetry::{Labels, Reporter};

/// Both ends of the tunnel's socket, and whom its certificate names.
#[derive(Clone)]
struct Ends {
    peer: SocketAddr,
    local: SocketAddr,
    identity: Identity,
    /// Until when the certificates say so.
    expires: SystemTime,
}

/// Where the application is, and how it wants to be told who calls.
struct Target {
    connect: SocketAddr,
    /// The client's, unless that makes no sense (facts ztunnel 1.3).
    source: Option<IpAddr>,
    proxy_header: Option<Vec<u8>>,
}

/// A tunnel's place among the pod's.
struct Room {
    _tunnel: Permit,
    _socket: Held,
}

/// A tunnel in the gauge.
struct Live(Gauge);

/// Runs a tunnel until it ends. `drain` sends GOAWAY; open streams go on.
pub async fn handle(
    pod: Arc<Pod>,
    tasks: Arc<Tasks>,
    mut drain: watch::Receiver<bool>,
    tcp: TcpStream,
    peer: SocketAddr,
) {
    let (mut tunnel, ends, _room) = match Box::pin(accept(&pod, tcp, peer)).await {
        Ok(accepted) => accepted,
        Err((local, error)) => return pod.refuse(Direction::Inbound, peer, local, &error),
    };
    let _live = Live::new(&pod.shared.telemetry.metrics.tunnels);
    let mut draining = false;
    loop {
        let next = tokio::select! {
            biased;
            _ = drain.wait_for(|drain| *drain), if !draining => {
                draining = true;
                tunnel.drain();
                continue;
            }
            next = tunnel.next() => next,
        };
        match next {
            Some(Ok((request, responder))) => {
                let (pod, ends) = (pod.clone(), ends.clone());
                tasks.spawn(sized::<1600, _>(stream(pod, ends, request, responder)));
            }
            // Its streams end with it and say why; the tunnel itself has no line in the log.
            Some(Err(error)) => return tracing::debug!(%error, %peer, "tunnel ended"),
            None => return,
        }
    }
}

/// Step 0: certificate and handshakes.
async fn accept(
    pod: &Pod,
    tcp: TcpStream,
    peer: SocketAddr,
) -> Result<(Tunnel, Ends, Room), (Option<SocketAddr>, Early)> {
    let local = tcp.local_addr().map_err(|error| (None, error.into()))?;
    let local = canonical_addr(local);
    let with_local = |error: Early| (Some(local), error);
    let limits = pod.limits();
    let (_handshake, room) = match Room::take(pod, &limits) {
        Ok(room) => room,
        Err(error) => {
            reset(tcp);
            return Err(with_local(error));
        }
    };
    let own = pod.own_workload().await.map_err(with_local)?;
    let identity = own.identity();
    let certificate = pod.shared.certs.get(&identity, limits.workload_wait).await;
    let credentials = certificate.map_err(|e| with_local(e.into()))?;
    let tunnel = Tunnel::accept(tcp, &credentials, &limits, &pod.http2).await;
    let tunnel = tunnel.map_err(|e| with_local(e.into()))?;
    let ends = Ends {
        peer,
        local,
        identity: tunnel.peer().clone(),
        expires: tunnel.expires(),
    };
    Ok((tunnel, ends, room))
}

/// One request: gather context; do all that may fail before saying OK; say OK and copy.
async fn stream(pod: Arc<Pod>, ends: Ends, request: Request, responder: Responder) {
    let (open, target, permit) = match Box::pin(check(&pod, &ends, request)).await {
        Ok(checked) => checked,
        Err(error) => {
            pod.refuse(Direction::Inbound, ends.peer, Some(ends.local), &error);
            return responder.refuse(error.status());
        }
    };
    match Box::pin(establish(&pod, &ends, open, target, responder)).await {
        Ok((open, client, server)) => {
            let result = run(&open.connection, client, server).await;
            open.end(result);
        }
        Err((open, error)) => open.end(Err(error)),
    }
    drop(permit);
}

/// Steps 1 to 5.
async fn check(pod: &Pod, ends: &Ends, request: Request) -> Result<(Open, Target, Place), Early> {
    let Request {
        method,
        authority,
        headers,
    } = request;
    if method != Method::CONNECT {
        return Err(Early::NotConnect(authority::excerpt(method.as_str())));
    }
    if ends.expires <= SystemTime::now() {
        return Err(Early::TunnelExpired);
    }
    let text = authority.unwrap_or_default();
    let Some(authority) = authority::parse(&text) else {
        return Err(Early::BadAuthority(authority::excerpt(&text)));
    };
    let permit = pod.admit(1)?;
    let own = pod.own_workload().await?;
    let config = &pod.shared.config;
    let forwarded = Forwarded::parse(&headers);
    let host = forwarded.host.as_deref();
    let inbound = pod.arrival(&own, ends.local, &authority, host).await?;
    let own_pod = pod.info.is_own();
    if own_pod && !pod.info.only_ports.contains(&inbound.connect.port()) {
        return Err(Early::NotServed(inbound.connect.port()));
    }
    let snapshot = pod.shared.store.snapshot();
    let called = called(&snapshot, &config.network, &authority, &inbound);
    let mut target = Target::new(ends, &inbound, called.as_deref());
    if own_pod {
        target.source = None;
    }
    let identity = Some(ends.identity.clone());
    let source = Peer::source(
        &snapshot,
        config,
        ends.peer.ip(),
        identity.clone(),
        Some(&headers),
    );
    let destination = Peer::of(&own, Some(own.identity()));
    let labels = Labels {
        reporter: Reporter::Destination,
        source: source.side,
        destination: destination.side,
        service: inbound.service,
        mtls: true,
    };
    let facts = Facts {
        direction: Direction::Inbound,
        trace: Trace::of(&headers),
        began: Instant::now(),
        src: ends.peer,
        src_pod: source.pod,
        original_dst: forwarded.host.map(Into::into),
        dst: inbound.dst,
        log_dst: ends.local,
        authority: Some(text.into()),
        dst_pod: destination.pod,
        protocol: Protocol::Hbone,
        checked: Some(Checked {
            subject: Subject {
                identity,
                source: ends.peer.ip(),
                dst: inbound.dst,
            },
            own,
        }),
    };
    Ok((pod.open(facts, labels), target, permit))
}

/// The service that the client called, for the PROXY header: the one that was named, or the one
/// whose address was dialled. A waypoint gets traffic of services that it isn't an endpoint of.
fn called(
    snapshot: &Snapshot,
    network: &str,
    authority: &Authority,
    inbound: &resolve::Inbound,
) -> Option<Arc<str>> {
    let dst = inbound.proxy_header?;
    let named = inbound.service.as_ref().map(|s| s.hostname.clone());
    match authority {
        Authority::Host(..) => named,
        Authority::Ip(_) => {
            let service = snapshot.service_by_vip(network, dst.ip(), None);
            service.map(|s| s.name.hostname.clone()).or(named)
        }
    }
}

/// Steps 6 to 8. The connection is registered before it is first checked, so that no change of
/// policy falls between the two.
async fn establish(
    pod: &Pod,
    ends: &Ends,
    mut open: Open,
    target: Target,
    responder: Responder,
) -> Result<(Open, Stream, TcpStream), (Open, Failed)> {
    let connection = open.connection.clone();
    // Every inbound connection has it.
    let Some(checked) = &connection.facts.checked else {
        return Err((open, Failed::Panicked));
    };
    let snapshot = pod.shared.store.snapshot();
    let own = pod
        .find_own(&snapshot)
        .unwrap_or_else(|| checked.own.clone());
    match pod.decide(&snapshot, &own, &checked.subject, ends.peer) {
        Ok(by) => open.allowed_by(by),
        Err(error) => {
            responder.refuse(401);
            return Err((open, error));
        }
    }
    let server = match target.reach(pod).await {
        Ok(server) => server,
        Err(error) => {
            responder.refuse(503);
            return Err((open, error));
        }
    };
    let mut headers = HeaderMap::with_capacity(1);
    if pod.shared.config.response_baggage {
        headers.insert(BAGGAGE, Baggage::of(&own).to_header());
    }
    match responder.accept(headers) {
        Ok(client) => Ok((open, client, server)),
        Err(error) => Err((open, error.into())),
    }
}

impl Room {
    /// From before the handshake: peers that only connect are bounded, too.
    fn take(pod: &Pod, limits: &Limits) -> Result<(Permit, Self), Early> {
        let handshake = pod.registry.admit_handshake(limits.pod_max_handshakes);
        let handshake = handshake.map_err(Early::TooManyHandshakes)?;
        let tunnel = pod.registry.admit_tunnel(limits.pod_max_connections);
        let room = Self {
            _tunnel: tunnel.map_err(Early::TooMany)?,
            _socket: pod.sockets.take(1)?,
        };
        Ok((handshake, room))
    }
}

impl Target {
    fn new(ends: &Ends, inbound: &resolve::Inbound, called: Option<&str>) -> Self {
        let connect = inbound.connect;
        let (peer, identity) = (ends.peer, &ends.identity);
        let header = |dst| proxy_protocol::header(peer, dst, Some(identity), called);
        let itself = peer.ip() == connect.ip() || connect.ip().is_loopback();
        Self {
            connect,
            source: Some(peer.ip()).filter(|_| !itself),
            proxy_header: inbound.proxy_header.map(header),
        }
    }

    async fn reach(&self, pod: &Pod) -> Result<TcpStream, Failed> {
        let mut server = pod.connect(self.connect, self.source).await?;
        if let Some(header) = &self.proxy_header {
            let written = server.write_all(header).await;
            written.map_err(|error| Failed::Connect(self.connect, error))?;
        }
        Ok(server)
    }
}

impl Live {
    fn new(gauge: &Gauge) -> Self {
        gauge.inc();
        Self(gauge.clone())
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        self.0.dec();
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::testing::World;
    use super::*;

    #[tokio::test]
    async fn a_request_over_an_expired_tunnel_is_refused_before_anything_is_asked() {
        let world = World::new();
        let pod = &world.db.proxy.pod;
        let after = |expires| async move {
            let ends = Ends {
                peer: "10.77.0.1:40000".parse().unwrap(),
                local: "10.77.0.2:15008".parse().unwrap(),
                identity: Identity::new("cluster.local", "shop", "web-sa"),
                expires,
            };
            let request = Request {
                method: Method::CONNECT,
                authority: Some("10.77.0.2:8080".into()),
                headers: HeaderMap::new(),
            };
            check(pod, &ends, request).await.map(drop)
        };
        let now = SystemTime::now();
        let refused = after(now).await.expect_err("it expired");
        assert!(matches!(refused, Early::TunnelExpired), "{refused}");
        assert_eq!(refused.status(), 401);
        after(now + Duration::from_secs(60)).await.expect("not yet");
    }
}
