//! What all certificates of the process share: the trust in force, and the live tunnels that were
//! let in under it, so that a change of trust ends exactly those that it no longer covers.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};

use ahash::RandomState;
use arc_swap::{ArcSwap, Guard};
use parking_lot::Mutex;
use prometheus_client::metrics::counter::Counter;
use tokio::sync::Notify;

use super::judge::{Judge, Proven, Role};
use super::trust::{Compliance, Distrust, Trust};
use super::verify::Rule;
use crate::identity::Identity;

/// Bytes of a chain's names, numbers and keys that are kept for later checks: ten times what long
/// chains of RSA 4096 take.
const MAX_KEPT: usize = 64 << 10;

/// For both reporters, by the peer's role: `Client` means inbound.
#[derive(Clone, Debug, Default)]
pub struct CrlCounters {
    pub rejections: RoleCounters,
    pub untracked: RoleCounters,
}

#[derive(Clone, Debug, Default)]
pub struct RoleCounters {
    pub inbound: Counter,
    pub outbound: Counter,
}

#[derive(Debug, Default)]
pub struct TrustBase {
    current: ArcSwap<Trust>,
    tunnels: Mutex<HashMap<u64, Arc<Proof>, RandomState>>,
    next: AtomicU64,
    /// A tunnel that was cut is gone.
    gone: Notify,
    counters: OnceLock<CrlCounters>,
}

/// What a live tunnel's peer proved, shared by the tunnel and its streams.
#[derive(Debug)]
pub struct Proof {
    pub addr: SocketAddr,
    /// Names the owner of the certificate at our end.
    rule: Rule,
    /// None where it was too large to be kept.
    peer: Option<Arc<Proven>>,
    hybrid: bool,
    distrust: OnceLock<Distrust>,
    /// The root of one of its ends will go: no new streams.
    retiring: AtomicBool,
    told: Notify,
}

/// What a tunnel's task must do since trust changed.
#[derive(Debug, PartialEq, Eq)]
pub enum Change {
    /// Take no new streams; open ones may end by themselves until the root is gone.
    Drain,
    /// End, with all streams.
    Cut(Distrust),
}

/// A live tunnel in the list, until it is dropped.
#[derive(Debug)]
pub struct Tracked {
    id: u64,
    base: Arc<TrustBase>,
    proof: Arc<Proof>,
    /// Its task was told to drain.
    drained: AtomicBool,
}

impl TrustBase {
    pub fn trust(&self) -> Guard<Arc<Trust>> {
        self.current.load()
    }

    pub(super) fn replace(&self, trust: Trust) -> Arc<Trust> {
        self.current.swap(Arc::new(trust))
    }

    /// Once, by whoever has the metrics.
    pub fn count_with(&self, counters: CrlCounters) {
        // A second set would be of a second registry, which no process has.
        let _ = self.counters.set(counters);
    }

    pub(super) fn count_rejection(&self, role: Role) {
        if let Some(counters) = self.counters.get() {
            counters.rejections.of(role).inc();
        }
    }

    /// `judge` is that of the certificate at our end. Err where trust changed during the handshake.
    pub(super) fn track(
        self: &Arc<Self>,
        proof: Proof,
        judge: &Judge,
    ) -> Result<Tracked, Distrust> {
        let role = proof.rule.role();
        if proof.peer.is_none()
            && let Some(counters) = self.counters.get()
        {
            counters.untracked.of(role).inc();
        }
        let id = self.next.fetch_add(1, Relaxed);
        let tracked = Tracked {
            id,
            base: self.clone(),
            proof: Arc::new(proof),
            drained: AtomicBool::new(false),
        };
        self.tunnels.lock().insert(id, tracked.proof.clone());
        // Listed first: what changes from here on finds it.
        let known = tracked.proof.peer.is_some();
        match tracked.proof.judge(&self.trust(), Some(judge)) {
            Some(distrust) if known => {
                if matches!(distrust, Distrust::Revoked(_)) {
                    self.count_rejection(role);
                }
                Err(distrust)
            }
            _ => Ok(tracked),
        }
    }

    /// Cuts every live tunnel of these owners that isn't trusted now; how many. `judge_of` gives the
    /// judge of an owner's present certificate.
    pub(super) fn recheck(
        &self,
        concerned: impl Fn(&Identity) -> bool,
        judge_of: impl Fn(&Identity) -> Option<Arc<Judge>>,
    ) -> usize {
        let live: Vec<_> = self.tunnels.lock().values().cloned().collect();
        let trust = self.current.load_full();
        let mut cut = 0;
        for proof in live.iter().filter(|proof| concerned(proof.rule.own())) {
            if let Some(distrust) = proof.judge(&trust, judge_of(proof.rule.own()).as_deref()) {
                if proof.distrust.get().is_none() && matches!(distrust, Distrust::Revoked(_)) {
                    self.count_rejection(proof.rule.role());
                }
                cut += usize::from(proof.end(distrust));
            }
        }
        cut
    }

    /// Drains every live tunnel of this owner: one end's root will go.
    pub(super) fn retire(&self, owner: &Identity) {
        let tunnels = self.tunnels.lock();
        let its = tunnels.values().filter(|proof| proof.rule.own() == owner);
        its.for_each(|proof| proof.retire());
    }

    /// Returns when no tunnel that was cut is left.
    pub(super) async fn none_cut(&self) {
        loop {
            let gone = self.gone.notified();
            tokio::pin!(gone);
            gone.as_mut().enable();
            let left = |proof: &Arc<Proof>| proof.distrust.get().is_some();
            if !self.tunnels.lock().values().any(left) {
                return;
            }
            gone.await;
        }
    }

    #[cfg(test)]
    pub fn live(&self) -> usize {
        self.tunnels.lock().len()
    }
}

impl Proof {
    pub(super) fn new(addr: SocketAddr, rule: Rule, peer: Arc<Proven>, hybrid: bool) -> Self {
        Self {
            addr,
            rule,
            peer: Some(peer).filter(|peer| peer.path.size() <= MAX_KEPT),
            hybrid,
            distrust: OnceLock::new(),
            retiring: AtomicBool::new(false),
            told: Notify::new(),
        }
    }

    /// Why it was cut, if it was.
    pub fn distrust(&self) -> Option<&Distrust> {
        self.distrust.get()
    }

    /// The time is left out: what was valid at the handshake ends with its certificate anyway.
    fn judge(&self, trust: &Trust, judge: Option<&Judge>) -> Option<Distrust> {
        let Some(peer) = &self.peer else {
            return Some(Distrust::Untracked);
        };
        if let Some(link) = trust.crls.revoked(&peer.path) {
            return Some(Distrust::Revoked(link.serial()));
        }
        // Without a certificate of ours the pod is going, and its tunnels with it.
        if judge.is_some_and(|judge| !judge.accepts(&peer.path)) {
            return Some(Distrust::Root);
        }
        if trust.compliance == Compliance::Pqc && !self.hybrid {
            return Some(Distrust::KeyExchange);
        }
        self.rule.left(&peer.ids, trust)
    }

    /// False where that was said before.
    fn end(&self, distrust: Distrust) -> bool {
        let first = self.distrust.set(distrust).is_ok();
        if first {
            self.told.notify_one();
        }
        first
    }

    fn retire(&self) {
        if !self.retiring.swap(true, Relaxed) {
            self.told.notify_one();
        }
    }
}

impl Tracked {
    pub fn proof(&self) -> &Arc<Proof> {
        &self.proof
    }

    /// Resolves when trust has changed for this tunnel: `Drain` at most once, `Cut` for good. For
    /// one task. Cancel safe.
    pub async fn changed(&self) -> Change {
        loop {
            if let Some(distrust) = self.proof.distrust() {
                return Change::Cut(distrust.clone());
            }
            if self.proof.retiring.load(Relaxed) && !self.drained.swap(true, Relaxed) {
                return Change::Drain;
            }
            self.proof.told.notified().await;
        }
    }
}

impl Drop for Tracked {
    fn drop(&mut self) {
        self.base.tunnels.lock().remove(&self.id);
        if self.proof.distrust().is_some() {
            self.base.gone.notify_waiters();
        }
    }
}

impl RoleCounters {
    fn of(&self, peer: Role) -> &Counter {
        match peer {
            Role::Client => &self.inbound,
            Role::Server => &self.outbound,
        }
    }
}
