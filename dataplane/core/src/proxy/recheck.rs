//! Live inbound connections are asked again whenever policies or workloads change, against the
//! pod's newest record (upstream keeps the one of connect time: facts ztunnel 5.4).

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;

use super::connection::Connection;
use super::enforcement::Enforcement;
use super::pod::Pod;
use crate::policy::{self, DenyReason, Verdict};
use crate::state::{Snapshot, Workload};

/// Decisions between two yields: well under a millisecond.
const BATCH: usize = 128;

/// A stream of pushes may take this part of one core at most: 1/(1+REST).
const REST: u32 = 4;

/// However slow a check was, a denial waits no longer than this for the next one.
const LONGEST_REST: Duration = Duration::from_millis(500);

/// A control plane sends policies and the workloads that list them in responses of their own: in
/// between, one that it took back is listed and not there. New connections are refused meanwhile;
/// those that were allowed get this long before the same is taken for a policy that never came.
const GRACE: Duration = Duration::from_secs(2);

/// Runs as long as the pod. `changes` was subscribed before the first connection was accepted.
pub async fn watch(pod: Arc<Pod>, mut changes: watch::Receiver<u64>) {
    let mut missing: Option<Instant> = None;
    loop {
        tokio::select! {
            changed = changes.changed() => match changed {
                Ok(()) => drop(changes.borrow_and_update()),
                Err(_) => return,
            },
            () = pod.demanded.notified() => {}
            () = until(missing) => {}
        }
        let begin = Instant::now();
        let over = missing.is_some_and(|since| since.elapsed() >= GRACE);
        let waits = check_all(&pod, over).await;
        missing = waits.then(|| missing.unwrap_or(begin));
        end_tunnels_of_moved_addresses(&pod);
        tokio::time::sleep((begin.elapsed() * REST).min(LONGEST_REST)).await;
    }
}

/// The end of the grace that began then.
async fn until(begun: Option<Instant>) {
    match begun {
        Some(begun) => tokio::time::sleep_until((begun + GRACE).into()).await,
        None => std::future::pending().await,
    }
}

/// True while a connection lives in its grace, which may be `over`.
async fn check_all(pod: &Pod, over: bool) -> bool {
    let mut waits = false;
    let snapshot = pod.shared.store.snapshot();
    let own = pod.find_own(&snapshot);
    for connections in pod.registry.each_shard() {
        for batch in connections.chunks(BATCH) {
            for connection in batch {
                waits |= check(pod, &snapshot, own.as_deref(), connection, over);
            }
            tokio::task::yield_now().await;
        }
    }
    waits
}

/// A tunnel leads to the workload that it was made for, or nowhere: who left may have left its
/// address to another one, which knows nothing of the connection.
fn end_tunnels_of_moved_addresses(pod: &Pod) {
    let snapshot = pod.shared.store.snapshot();
    let network = &pod.shared.config.network;
    pod.pool.end_where(|key| {
        let ip = key.dst.ip();
        match snapshot.workload_by_uid(&key.owner) {
            // One without addresses is where its hostname was resolved to.
            Some(owner) => !owner.addresses.is_empty() && !owner.addresses.contains(&ip),
            // One that is leaving may still finish what it has begun.
            None => snapshot.workload_by_address(network, ip).is_some(),
        }
    });
}

/// While the pod's own record is away, the one of connect time stands in. True when the connection
/// lives in its grace.
fn check(
    pod: &Pod,
    snapshot: &Snapshot,
    own: Option<&Workload>,
    connection: &Connection,
    over: bool,
) -> bool {
    let Some(checked) = &connection.facts.checked else {
        return false;
    };
    let own = own.unwrap_or(&checked.own);
    let demanded = || match pod.check_waypoint(snapshot, own, &checked.subject) {
        Some((Enforcement::On, reason)) => Some(reason),
        _ => None,
    };
    let denied = match policy::decide(snapshot, own, &checked.subject).verdict {
        Verdict::Deny(DenyReason::NotArrived(_)) if !over => return true,
        Verdict::Deny(reason) => Some(reason),
        Verdict::Allow { .. } => demanded(),
    };
    if let Some(reason) = denied {
        let demanded = reason.is_waypoint();
        let policy = super::error::deciding_policy(&reason).cloned();
        if connection.deny(reason) {
            let metrics = &pod.shared.telemetry.metrics;
            metrics.verdict(policy.as_deref(), false);
            snapshot.policies().count(policy.as_deref());
            if demanded {
                metrics.waypoint_required(true);
            }
        }
    }
    false
}
