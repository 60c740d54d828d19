//! The pods of this node: added, changed, drained and removed at the agent's word, one change at a
//! time; and their identities, learnt from the control plane's records.

use std::collections::{BTreeMap, HashMap};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use pb::event::Event;
use pb::pod_settings::Capture as Kind;
use serde_json::json;
use tokio::sync::watch;

use super::agent::AgentSlot;
use super::capture::{self, Capture};
use super::failure::{Code, Failure};
use crate::inpod::{DnsSockets, Listeners, ListeningFds, Netns, PodInfo};
use crate::proxy::{Loss, Shared};
use crate::wire::control as pb;

mod entry;

use entry::Bound;
pub(super) use entry::Entry;

pub(super) struct Pods {
    shared: Arc<Shared>,
    agent: Arc<AgentSlot>,
    pub capture: Arc<Capture>,
    known: Mutex<Known>,
    /// Held by every change, so that none sees another one half done.
    changes: tokio::sync::Mutex<()>,
    draining: AtomicBool,
    /// How many are leaving.
    leaving: watch::Sender<usize>,
}

#[derive(Default)]
struct Known {
    active: BTreeMap<String, Arc<Entry>>,
    /// Removed, with connections that may end by themselves.
    leaving: Vec<Arc<Entry>>,
}

impl Pods {
    pub fn new(shared: Arc<Shared>, agent: Arc<AgentSlot>, capture: Arc<Capture>) -> Arc<Self> {
        Arc::new(Self {
            shared,
            agent,
            capture,
            known: Mutex::default(),
            changes: tokio::sync::Mutex::default(),
            draining: AtomicBool::new(false),
            leaving: watch::Sender::new(0),
        })
    }

    /// No pod is taken any more.
    pub fn draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }

    /// Listeners first, then the proxy, then the pod is known. Safe to repeat.
    pub async fn add(
        self: &Arc<Self>,
        pod: pb::Pod,
        settings: pb::PodSettings,
        netns: OwnedFd,
        prepare_only: bool,
    ) -> Result<(), Failure> {
        let info = parse(pod, &settings.only_ports)?;
        let netns = Netns::new(netns)
            .map_err(|error| Failure::invalid(info.uid.clone(), format!("{info}: {error}")))?;
        let _change = self.changes.lock().await;
        if self.draining() {
            let text = format!("{info}: this data plane is draining and takes no pods");
            return Err(Failure::new(Code::Draining, info.uid, text));
        }
        let held = self.known.lock().active.get(&info.uid).cloned();
        if let Some(held) = held {
            if held.is(&info, &netns) && !held.handed_over() {
                self.change(held.clone(), settings).await?;
                if !prepare_only && !held.listening() {
                    held.serve(self.bind(&held.info, &held.netns, held.wants_dns())?);
                    self.adopt_capture(&held).await?;
                }
                return held.check_listeners();
            }
            if held.handed_over() {
                self.begin_drain(&held, self.shared.limits.load().drain_deadline);
            } else {
                self.cut(&held).await;
            }
        }
        if settings.capture() == Kind::Ebpf {
            self.capture.ready().await?;
        }
        let bound = match prepare_only {
            true => None,
            false => Some(self.bind(&info, &netns, settings.dns)?),
        };
        tracing::info!(
            uid = info.uid,
            pod = info.name,
            namespace = info.namespace,
            netns = netns.id().0,
            prepare_only,
            "pod added"
        );
        let entry = Entry::new(self.shared.clone(), info, netns, settings)?;
        let entry = Arc::new(entry);
        self.tell_losses(&entry);
        if let Some(bound) = bound {
            entry.serve(bound);
        }
        let uid = entry.info.uid.clone();
        self.known.lock().active.insert(uid.clone(), entry.clone());
        entry.follow(&self.shared);
        for leaving in self.leaving_now(&uid) {
            // It came back: what it had open has no reason to end.
            if leaving.netns.id() == entry.netns.id() {
                leaving.drain_without_limit();
            }
        }
        self.adopt_capture(&entry).await
    }

    /// What an earlier data plane captured is refused until this one's listener takes its place.
    async fn adopt_capture(&self, entry: &Arc<Entry>) -> Result<(), Failure> {
        match entry.captured_by_ebpf() {
            true => self.capture.adopt(entry).await,
            false => Ok(()),
        }
    }

    /// What was captured by eBPF and isn't wanted any more: nobody would listen for it.
    pub async fn release_others(&self) -> Result<(), Failure> {
        let active: Vec<_> = self.known.lock().active.values().cloned().collect();
        self.capture.release_others(active).await
    }

    pub fn known(&self, uid: &str) -> Result<Arc<Entry>, Failure> {
        let found = self.known.lock().active.get(uid).cloned();
        found.ok_or_else(|| Failure::new(Code::NotFound, uid, "no such pod"))
    }

    pub async fn update(&self, uid: &str, settings: pb::PodSettings) -> Result<(), Failure> {
        self.change(self.known(uid)?, settings).await
    }

    async fn change(&self, entry: Arc<Entry>, settings: pb::PodSettings) -> Result<(), Failure> {
        if !entry.captured_by_ebpf() || !entry.listening() {
            return entry.update(settings, &self.shared.config);
        }
        let wanted = capture::enrolment(&settings);
        if wanted == entry.enrolment() && !entry.kernel_lags() {
            // Nothing of it is the kernel's, whose place for a listener that was ended can't be
            // filled before it listens again.
            return entry.update(settings, &self.shared.config);
        }
        // Never led to somebody who listens no more, or not yet.
        if wanted.dns {
            entry.update(settings, &self.shared.config)?;
            // Whoever tries again finds the settings as they are wanted already.
            entry.set_kernel_lags(true);
            self.capture.change(entry.clone(), wanted).await?;
            entry.set_kernel_lags(false);
            Ok(())
        } else {
            self.capture.change(entry.clone(), wanted).await?;
            entry.update(settings, &self.shared.config)
        }
    }

    /// With a deadline: returns when nothing new is accepted, PodDrained follows. Without: returns
    /// when nothing of the pod is left. Unknown ones are fine.
    pub async fn remove(self: &Arc<Self>, uid: &str, drain: Option<Duration>) {
        let _change = self.changes.lock().await;
        let entry = self.known.lock().active.get(uid).cloned();
        match (entry, drain) {
            (Some(entry), Some(deadline)) => self.begin_drain(&entry, deadline),
            (Some(entry), None) => self.cut(&entry).await,
            (None, _) => {}
        }
        for leaving in self.leaving_now(uid) {
            match drain {
                // What was spared when the pod came back isn't any more.
                Some(deadline) => leaving.limit_drain(deadline),
                None => leaving.proxy.cut().await,
            }
        }
    }

    /// Cuts every pod that isn't named.
    pub async fn keep(self: &Arc<Self>, uids: &[String]) {
        let _change = self.changes.lock().await;
        let superfluous: Vec<_> = {
            let known = self.known.lock();
            let named = |entry: &&Arc<Entry>| uids.contains(&entry.info.uid);
            let rest = known.active.values().filter(|entry| !named(entry));
            rest.cloned().collect()
        };
        for entry in superfluous {
            if entry.captured_by_ebpf() {
                // Else a pod that lives on would be refused for ever.
                let released = self.capture.release(entry.clone()).await;
                if let Err(error) = released {
                    tracing::warn!(uid = entry.info.uid, error = error.text, "capture stays");
                }
            }
            self.cut(&entry).await;
        }
    }

    /// Takes no more pods, and returns when no connection of any is left.
    pub async fn drain_all(self: &Arc<Self>, deadline: Duration) {
        self.draining.store(true, Ordering::Relaxed);
        {
            let _change = self.changes.lock().await;
            let active: Vec<_> = self.known.lock().active.values().cloned().collect();
            for entry in active {
                self.begin_drain(&entry, deadline);
            }
        }
        let mut left = self.leaving.subscribe();
        // Pods that were leaving before may have later deadlines of their own.
        let all = tokio::time::timeout(deadline, left.wait_for(|left| *left == 0));
        if all.await.is_err() {
            let late = self.known.lock().leaving.clone();
            for entry in late {
                entry.proxy.cut().await;
            }
            let _ = left.wait_for(|left| *left == 0).await;
        }
    }

    /// Second descriptors of all listeners. Both sides accept from then on.
    pub async fn hand_over(&self) -> Result<Vec<(String, ListeningFds)>, Failure> {
        let _change = self.changes.lock().await;
        if self.draining() {
            let text = "this data plane is draining: it has nothing to hand over";
            return Err(Failure::new(Code::Draining, "", text));
        }
        let active: Vec<_> = self.known.lock().active.values().cloned().collect();
        let mut given = Vec::new();
        for entry in active {
            if let Some(fds) = entry.duplicate_listeners()? {
                given.push((entry.info.uid.clone(), fds));
            }
        }
        Ok(given)
    }

    /// The successor accepts: this side stops. Connections go on.
    pub async fn handed_over(&self, uids: &[String]) {
        let _change = self.changes.lock().await;
        let known = self.known.lock();
        for entry in uids.iter().filter_map(|uid| known.active.get(uid)) {
            entry.hand_over_done();
        }
    }

    /// All prepared pods accept, on these listeners or, where there is none, on their own. All or
    /// nothing.
    pub async fn serve_prepared(
        &self,
        mut adopted: HashMap<String, Vec<(u16, OwnedFd)>>,
    ) -> Result<(), Failure> {
        let _change = self.changes.lock().await;
        let active: Vec<_> = self.known.lock().active.values().cloned().collect();
        let mut ready = Vec::new();
        for entry in active.iter().filter(|entry| !entry.listening()) {
            let bound = match adopted.remove(&entry.info.uid) {
                Some(fds) => self.adopt(entry, fds)?,
                None => self.bind(&entry.info, &entry.netns, entry.wants_dns())?,
            };
            ready.push((entry, bound));
        }
        for (entry, bound) in ready {
            entry.serve(bound);
            self.adopt_capture(entry).await?;
        }
        for uid in adopted.keys() {
            tracing::warn!(uid, "the predecessor serves a pod that nobody told us of");
        }
        Ok(())
    }

    pub fn list(&self) -> Vec<pb::PodStatus> {
        let known = self.known.lock();
        let all = known.active.values().chain(&known.leaving);
        all.map(|entry| entry.status()).collect()
    }

    /// "" for all pods.
    pub fn connections(&self, uid: &str) -> Result<Vec<pb::Connection>, Failure> {
        let wanted: Vec<_> = {
            let known = self.known.lock();
            let all = known.active.values().chain(&known.leaving);
            let of = all.filter(|entry| uid.is_empty() || entry.info.uid == uid);
            of.cloned().collect()
        };
        if wanted.is_empty() && !uid.is_empty() {
            return Err(Failure::new(Code::NotFound, uid, "no such pod"));
        }
        let connections = wanted.iter().flat_map(|entry| entry.proxy.connections());
        Ok(connections.collect())
    }

    /// The `workloadState` section of the dump (facts ztunnel 13.1).
    pub fn dump(&self) -> serde_json::Value {
        let active: Vec<_> = self.known.lock().active.values().cloned().collect();
        let object = active
            .iter()
            .map(|entry| (entry.info.uid.clone(), entry.dump()));
        json!(object.collect::<BTreeMap<_, _>>())
    }

    /// Pods learn their identities as records arrive. Runs as long as the process.
    pub async fn follow_store(self: Arc<Self>) {
        let mut changes = self.shared.store.subscribe();
        while changes.changed().await.is_ok() {
            let active: Vec<_> = self.known.lock().active.values().cloned().collect();
            for entry in active {
                entry.follow(&self.shared);
            }
        }
    }

    /// To the agent, as long as the pod has a proxy.
    fn tell_losses(&self, entry: &Entry) {
        let Some(mut losses) = entry.proxy.losses() else {
            return;
        };
        let (agent, uid) = (self.agent.clone(), entry.info.uid.clone());
        tokio::spawn(async move {
            while let Some(Loss { port, text }) = losses.recv().await {
                let lost = pb::ListenerLost {
                    uid: uid.clone(),
                    port: port.into(),
                    text,
                };
                agent.emit_in_turn(Event::ListenerLost(lost)).await;
            }
        });
    }

    /// DNS sockets that the other side didn't have are made.
    fn adopt(&self, entry: &Entry, mut fds: Vec<(u16, OwnedFd)>) -> Result<Bound, Failure> {
        let config = &self.shared.config;
        let dns = match DnsSockets::adopt(&mut fds, config).transpose() {
            _ if !entry.wants_dns() => None,
            Some(adopted) => Some(adopted),
            None => Some(DnsSockets::bind(&entry.netns, config)),
        };
        let listeners = Listeners::adopt(fds, config, !entry.info.is_own());
        Bound::new(&entry.info, listeners, dns)
    }

    fn bind(&self, info: &PodInfo, netns: &Netns, dns: bool) -> Result<Bound, Failure> {
        let twin = {
            let known = self.known.lock();
            let mut active = known.active.values();
            active
                .find(|e| e.listening() && e.netns.id() == netns.id() && e.info.uid != info.uid)
                .map(|entry| entry.info.to_string())
        };
        if let Some(twin) = twin {
            let text = format!("{info}: {twin} has the same network namespace");
            return Err(Failure::new(Code::InUse, info.uid.clone(), text));
        }
        let config = &self.shared.config;
        let dns = dns.then(|| DnsSockets::bind(netns, config));
        let listeners = match info.is_own() {
            true => Listeners::bind_hbone(netns, config),
            false => Listeners::bind(netns, config),
        };
        Bound::new(info, listeners, dns)
    }

    /// The entry is unknown and without connections or tasks afterwards.
    async fn cut(&self, entry: &Arc<Entry>) {
        self.forget_active(entry);
        entry.stop_accepting();
        entry.proxy.cut().await;
        entry.release(&self.shared);
        tracing::info!(uid = entry.info.uid, "pod removed");
    }

    fn begin_drain(self: &Arc<Self>, entry: &Arc<Entry>, deadline: Duration) {
        self.forget_active(entry);
        entry.stop_accepting();
        entry.limit_drain(deadline);
        self.known.lock().leaving.push(entry.clone());
        self.leaving.send_modify(|left| *left += 1);
        let (pods, entry) = (self.clone(), entry.clone());
        tokio::spawn(async move {
            entry.proxy.drain(entry.out_of_time()).await;
            entry.release(&pods.shared);
            let uid = entry.info.uid.clone();
            let more = {
                let mut known = pods.known.lock();
                known.leaving.retain(|e| !Arc::ptr_eq(e, &entry));
                let same = |e: &Arc<Entry>| e.info.uid == uid;
                known.active.contains_key(&uid) || known.leaving.iter().any(same)
            };
            tracing::info!(uid, "pod drained");
            // Of a pod that came back, and perhaps left again, there is more to wait for.
            if !more {
                pods.agent.emit(Event::PodDrained(pb::PodDrained { uid }));
            }
            drop(entry);
            pods.leaving.send_modify(|left| *left -= 1);
        });
    }

    fn forget_active(&self, entry: &Arc<Entry>) {
        let mut known = self.known.lock();
        let uid = &entry.info.uid;
        if known.active.get(uid).is_some_and(|e| Arc::ptr_eq(e, entry)) {
            known.active.remove(uid);
        }
    }

    fn leaving_now(&self, uid: &str) -> Vec<Arc<Entry>> {
        let known = self.known.lock();
        let of = known.leaving.iter().filter(|entry| entry.info.uid == uid);
        of.cloned().collect()
    }
}

fn parse(pod: pb::Pod, only_ports: &[u32]) -> Result<PodInfo, Failure> {
    let fields = [
        ("uid", &pod.uid),
        ("name", &pod.name),
        ("namespace", &pod.namespace),
        ("service_account", &pod.service_account),
    ];
    if let Some((field, _)) = fields.iter().find(|(_, value)| value.is_empty()) {
        let text = format!("pod.{field} is empty");
        return Err(Failure::invalid(pod.uid, text));
    }
    let ports = only_ports.iter().map(|port| u16::try_from(*port));
    let only_ports: Result<_, _> = ports.collect();
    let bad = |_| Failure::invalid(pod.uid.clone(), "settings.only_ports: a port over 65535");
    Ok(PodInfo {
        only_ports: only_ports.map_err(bad)?,
        uid: pod.uid,
        name: pod.name,
        namespace: pod.namespace,
        service_account: pod.service_account,
    })
}
