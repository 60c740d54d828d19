//! Plain TCP that enters the pod (facts ztunnel 4.1): checked without an identity, and led to where
//! it was going with the client's address.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use tokio::net::TcpStream;

use super::connection::{Checked, Direction, Facts, Open, Protocol};
use super::error::{Early, Failed};
use super::labels::Peer;
use super::pod::{Place, Pod, reset, run};
use super::proof;
use super::traceparent::Trace;
use crate::config::canonical_addr;
use crate::inpod::original_dst;
use crate::policy::Subject;
use crate::telemetry::{Labels, Reporter};

pub async fn handle(pod: Arc<Pod>, client: TcpStream, peer: SocketAddr) {
    let refuse = |client, dst, error: &Early| {
        pod.refuse(Direction::Inbound, peer, dst, error);
        reset(client);
    };
    let dst = match captured(&client, pod.shared.config.ports.inbound_plaintext) {
        Ok(dst) => dst,
        Err(error) => return refuse(client, None, &error),
    };
    if dst.port() == proof::PORT {
        return Box::pin(proof::meet(&pod, Direction::Inbound, client)).await;
    }
    let (mut open, permit) = match Box::pin(check(&pod, dst, peer)).await {
        Ok(checked) => checked,
        Err(error) => return refuse(client, Some(dst), &error),
    };
    let connection = open.connection.clone();
    let result = match Box::pin(establish(&pod, &mut open, peer)).await {
        Ok(server) => run(&connection, client, server).await,
        Err(error) => {
            reset(client);
            Err(error)
        }
    };
    open.end(result);
    drop(permit);
}

async fn check(pod: &Pod, dst: SocketAddr, peer: SocketAddr) -> Result<(Open, Place), Early> {
    let config = &pod.shared.config;
    if config.ports.is_own(dst.port()) {
        return Err(Early::SelfCall(dst));
    }
    let permit = pod.admit(2)?;
    let own = pod.own_workload().await?;
    let snapshot = pod.shared.store.snapshot();
    let source = Peer::source(&snapshot, config, peer.ip(), None, None);
    let destination = Peer::of(&own, Some(own.identity()));
    let labels = Labels {
        reporter: Reporter::Destination,
        source: source.side,
        destination: destination.side,
        service: snapshot.attribute_service(&own, None, dst),
        mtls: false,
    };
    let facts = Facts {
        direction: Direction::Inbound,
        trace: Trace::random(),
        began: Instant::now(),
        src: peer,
        src_pod: source.pod,
        original_dst: Some(dst.to_string().into()),
        dst,
        log_dst: dst,
        authority: None,
        dst_pod: destination.pod,
        protocol: Protocol::Tcp,
        checked: (!pod.is_probe(peer, dst)).then(|| Checked {
            subject: Subject {
                identity: None,
                source: peer.ip(),
                dst,
            },
            own,
        }),
    };
    Ok((pod.open(facts, labels), permit))
}

/// A connection made straight to the listener wasn't redirected: it would lead back here. Where the
/// kernel looked the listener up for a packet of another port (eBPF), that is what was dialled.
fn captured(client: &TcpStream, listener: u16) -> Result<SocketAddr, Early> {
    let local = canonical_addr(client.local_addr()?);
    if local.port() != listener {
        return Ok(local);
    }
    match original_dst(client) {
        Ok(dst) if dst == local => Err(Early::SelfCall(dst)),
        result => result.map_err(Early::NoOriginalDst),
    }
}

async fn establish(pod: &Pod, open: &mut Open, peer: SocketAddr) -> Result<TcpStream, Failed> {
    let connection = open.connection.clone();
    let dst = connection.facts.dst;
    open.allowed_by(match &connection.facts.checked {
        Some(checked) => {
            let snapshot = pod.shared.store.snapshot();
            let own = pod
                .find_own(&snapshot)
                .unwrap_or_else(|| checked.own.clone());
            pod.decide(&snapshot, &own, &checked.subject, peer)?
        }
        None => pod.let_probe(peer, dst),
    });
    pod.connect(dst, Some(peer.ip()).filter(|ip| *ip != dst.ip()))
        .await
}
