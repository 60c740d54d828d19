//! One pod: its proxy, its listeners' second descriptors, and the identity it was given.

use std::sync::Arc;

use parking_lot::Mutex;
use serde_json::json;

use crate::control::failure::{Code, Failure};
use crate::control::status;
use crate::identity::Identity;
use crate::inpod::{Listeners, ListeningFds, Netns, PodInfo};
use crate::proxy::{Demands, PodProxy, Shared};
use crate::wire::control as pb;
use pb::pod_status::State;

pub(super) struct Entry {
    pub info: PodInfo,
    pub netns: Arc<Netns>,
    pub proxy: Arc<PodProxy>,
    live: Mutex<Live>,
}

struct Live {
    state: State,
    settings: pb::PodSettings,
    /// While it accepts: for a successor.
    listeners: Option<ListeningFds>,
    workload_uid: String,
    /// Retained in the certificate store.
    identity: Option<Identity>,
    /// Retains nothing any more.
    released: bool,
}

impl Entry {
    pub fn new(
        shared: Arc<Shared>,
        info: PodInfo,
        netns: Netns,
        settings: pb::PodSettings,
    ) -> Self {
        let netns = Arc::new(netns);
        let proxy = PodProxy::new(shared, info.clone(), netns.clone());
        proxy.demand(Demands::of(&settings));
        Self {
            proxy,
            info,
            netns,
            live: Mutex::new(Live {
                state: State::Prepared,
                settings,
                listeners: None,
                workload_uid: String::new(),
                identity: None,
                released: false,
            }),
        }
    }

    pub fn is(&self, info: &PodInfo, netns: &Netns) -> bool {
        self.info == *info && self.netns.id() == netns.id()
    }

    pub fn listening(&self) -> bool {
        self.live.lock().listeners.is_some()
    }

    /// It was up, and a successor accepts for it now.
    pub fn handed_over(&self) -> bool {
        self.live.lock().state == State::Draining
    }

    pub fn update(&self, settings: pb::PodSettings) {
        self.proxy.demand(Demands::of(&settings));
        self.live.lock().settings = settings;
    }

    /// `duplicates` are kept for a successor.
    pub fn serve(&self, listeners: Listeners, duplicates: ListeningFds) {
        let mut live = self.live.lock();
        live.listeners = Some(duplicates);
        live.state = State::Up;
        self.proxy.serve(listeners);
    }

    pub fn duplicate_listeners(&self) -> Result<Option<ListeningFds>, Failure> {
        let live = self.live.lock();
        let duplicates = live.listeners.as_ref().map(ListeningFds::try_clone);
        duplicates
            .transpose()
            .map_err(|error| duplicating(&self.info, &error))
    }

    /// Closes all our descriptors of the listeners; connections stay.
    pub fn stop_accepting(&self) {
        self.proxy.stop_accepting();
        let mut live = self.live.lock();
        live.listeners = None;
        live.state = State::Draining;
    }

    pub fn hand_over_done(&self) {
        if self.listening() {
            self.stop_accepting();
        }
    }

    /// Looks for the pod's own record, and holds the certificate of the identity in it. A record
    /// that goes away leaves the identity: it comes back at the next push, or the pod is removed.
    pub fn follow(&self, shared: &Shared) {
        let info = &self.info;
        let snapshot = shared.store.snapshot();
        let record = snapshot.local_workload(&info.namespace, &info.name, &info.service_account);
        let Some(record) = record else { return };
        let mut live = self.live.lock();
        if *live.workload_uid != *record.uid {
            live.workload_uid = record.uid.to_string();
        }
        let identity = Identity::new(
            record.trust_domain.clone(),
            info.namespace.clone(),
            info.service_account.clone(),
        );
        if live.released || live.identity.as_ref() == Some(&identity) {
            return;
        }
        tracing::info!(uid = info.uid, %identity, "pod has its identity");
        // The new one first: where both are the same certificate, it isn't forgotten in between.
        shared.certs.retain(&identity);
        if let Some(old) = live.identity.replace(identity) {
            shared.certs.release(&old);
        }
    }

    pub fn release(&self, shared: &Shared) {
        let mut live = self.live.lock();
        live.released = true;
        if let Some(identity) = live.identity.take() {
            shared.certs.release(&identity);
        }
    }

    pub fn status(&self) -> pb::PodStatus {
        let (inbound, outbound) = self.proxy.connection_counts();
        let (inode, dev) = self.netns.id();
        let live = self.live.lock();
        pb::PodStatus {
            pod: Some(status::pod(&self.info)),
            state: live.state.into(),
            settings: Some(live.settings.clone()),
            netns_inode: inode,
            netns_dev: dev,
            workload_uid: live.workload_uid.clone(),
            identity: live
                .identity
                .as_ref()
                .map_or(String::new(), Identity::to_string),
            inbound_connections: inbound,
            outbound_connections: outbound,
        }
    }

    /// facts ztunnel 13.1, `workloadState`
    pub fn dump(&self) -> serde_json::Value {
        let (inbound, outbound): (Vec<_>, Vec<_>) = self
            .proxy
            .connections()
            .into_iter()
            .partition(|c| c.direction() == pb::connection::Direction::Inbound);
        let shape = |c: &pb::Connection| {
            json!({
                "src": c.src,
                "originalDst": (!c.original_dst.is_empty()).then_some(&c.original_dst),
                "actualDst": c.actual_dst,
                "protocol": c.protocol,
            })
        };
        let list = |all: &[pb::Connection]| all.iter().map(shape).collect::<Vec<_>>();
        let up = self.live.lock().state == State::Up;
        json!({
            "state": if up { "Up" } else { "Pending" },
            "connections": {"inbound": list(&inbound), "outbound": list(&outbound)},
            "info": {
                "name": self.info.name,
                "namespace": self.info.namespace,
                "serviceAccount": self.info.service_account,
            },
        })
    }
}

pub(super) fn duplicating(info: &PodInfo, error: &std::io::Error) -> Failure {
    let text = format!("{info}: second descriptors of the listeners: {error}");
    Failure::new(Code::Internal, info.uid.clone(), text)
}
