//! One pod: its proxy, its listeners' second descriptors, and the identity it was given.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use rustix::net::SocketType;
use rustix::net::sockopt::{socket_acceptconn, socket_type};
use serde_json::json;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};

use crate::capture::Enrolment;
use crate::config::Config;
use crate::control::capture;
use crate::control::failure::{Code, Failure};
use crate::control::status;
use crate::dns::Resolv;
use crate::identity::Identity;
use crate::inpod::{DnsSockets, ListenError, Listeners, ListeningFds, Netns, PodInfo};
use crate::proxy::{Demands, PodProxy, Shared};
use crate::wire::control as pb;
use pb::pod_status::State;

pub(in crate::control) struct Entry {
    pub info: PodInfo,
    pub netns: Arc<Netns>,
    pub proxy: Arc<PodProxy>,
    live: Mutex<Live>,
    /// It wasn't told of the present settings, or failed at it.
    kernel_lags: AtomicBool,
    /// While it drains: when what is left is cut; None never.
    drain_by: watch::Sender<Option<Instant>>,
}

struct Live {
    state: State,
    settings: pb::PodSettings,
    /// While it accepts: for a successor.
    listeners: Option<ListeningFds>,
    /// While it answers DNS: for a successor.
    dns: Option<ListeningFds>,
    workload_uid: String,
    /// Retained in the certificate store.
    identity: Option<Identity>,
    /// Retains nothing any more.
    released: bool,
}

/// Sockets of a pod that don't accept yet, each with a second descriptor, so that a pod that accepts
/// can also be handed over.
pub(super) struct Bound {
    listeners: Listeners,
    duplicates: ListeningFds,
    dns: Option<BoundDns>,
}

struct BoundDns {
    sockets: DnsSockets,
    duplicates: ListeningFds,
}

impl Bound {
    /// Without DNS for a pod that wants none.
    pub fn new(
        info: &PodInfo,
        listeners: Result<Listeners, ListenError>,
        dns: Option<Result<DnsSockets, ListenError>>,
    ) -> Result<Self, Failure> {
        let listeners = listeners.map_err(|error| Failure::listen(info, &error))?;
        let duplicates = listeners.duplicate();
        Ok(Self {
            duplicates: duplicates.map_err(|error| duplicating(info, &error))?,
            listeners,
            dns: dns.map(|dns| BoundDns::new(info, dns)).transpose()?,
        })
    }
}

impl BoundDns {
    fn new(info: &PodInfo, sockets: Result<DnsSockets, ListenError>) -> Result<Self, Failure> {
        let sockets = sockets.map_err(|error| Failure::listen(info, &error))?;
        let duplicates = sockets.duplicate();
        Ok(Self {
            duplicates: duplicates.map_err(|error| duplicating(info, &error))?,
            sockets,
        })
    }
}

impl Entry {
    pub fn new(
        shared: Arc<Shared>,
        info: PodInfo,
        netns: Netns,
        settings: pb::PodSettings,
    ) -> Result<Self, Failure> {
        let netns = Arc::new(netns);
        let resolv = resolv(&info, &settings)?;
        let proxy = PodProxy::new(shared, info.clone(), netns.clone());
        proxy.demand(Demands::of(&settings));
        proxy.probed_at(capture::probe_ports(&settings).collect());
        proxy.configure_dns(resolv);
        Ok(Self {
            proxy,
            info,
            netns,
            live: Mutex::new(Live {
                state: State::Prepared,
                settings,
                listeners: None,
                dns: None,
                workload_uid: String::new(),
                identity: None,
                released: false,
            }),
            kernel_lags: AtomicBool::new(false),
            drain_by: watch::Sender::new(None),
        })
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

    /// Takes effect at once; where DNS can't be had, nothing changes.
    pub fn update(&self, settings: pb::PodSettings, config: &Config) -> Result<(), Failure> {
        let resolv = resolv(&self.info, &settings)?;
        let mut live = self.live.lock();
        let up = live.listeners.is_some();
        if up && settings.dns && live.dns.is_none() {
            let bound = BoundDns::new(&self.info, DnsSockets::bind(&self.netns, config))?;
            live.dns = Some(bound.duplicates);
            self.proxy.serve_dns(bound.sockets);
        } else if !settings.dns && live.dns.take().is_some() {
            self.proxy.stop_dns();
        }
        self.proxy.configure_dns(resolv);
        self.proxy.demand(Demands::of(&settings));
        self.proxy
            .probed_at(capture::probe_ports(&settings).collect());
        live.settings = settings;
        Ok(())
    }

    /// Whether those that it has really listen: somebody in the pod may have ended one, and taken its
    /// port before it could listen again.
    pub fn check_listeners(&self) -> Result<(), Failure> {
        let live = self.live.lock();
        let all = live.listeners.iter().chain(&live.dns);
        let lost = all.flat_map(|fds| &fds.0).find(|(_, fd)| {
            let stream = socket_type(fd) == Ok(SocketType::STREAM);
            stream && !socket_acceptconn(fd).unwrap_or(false)
        });
        match lost {
            None => Ok(()),
            Some((port, _)) => {
                let text = format!(
                    "{}: nobody listens on port {port} any more: a process in the pod ended the \
                     listener and holds the port; it must leave",
                    self.info
                );
                Err(Failure::new(Code::InUse, self.info.uid.clone(), text))
            }
        }
    }

    pub fn captured_by_ebpf(&self) -> bool {
        self.live.lock().settings.capture() == pb::pod_settings::Capture::Ebpf
    }

    /// What the kernel side has to know of it.
    pub fn enrolment(&self) -> Enrolment {
        capture::enrolment(&self.live.lock().settings)
    }

    /// A descriptor of its own; None while the pod doesn't listen for redirected traffic.
    pub fn inbound_listener(&self) -> Result<Option<OwnedFd>, Failure> {
        let live = self.live.lock();
        let Some(listeners) = &live.listeners else {
            return Ok(None);
        };
        let port = self.proxy.inbound_port();
        let found = listeners.0.iter().find(|(p, _)| *p == port);
        let cloned = found.map(|(_, fd)| fd.try_clone()).transpose();
        cloned.map_err(|error| duplicating(&self.info, &error))
    }

    pub(super) fn kernel_lags(&self) -> bool {
        self.kernel_lags.load(Ordering::Relaxed)
    }

    pub(super) fn set_kernel_lags(&self, lags: bool) {
        self.kernel_lags.store(lags, Ordering::Relaxed);
    }

    pub fn wants_dns(&self) -> bool {
        self.live.lock().settings.dns
    }

    pub(super) fn serve(&self, bound: Bound) {
        let mut live = self.live.lock();
        live.listeners = Some(bound.duplicates);
        live.state = State::Up;
        self.proxy.serve(bound.listeners);
        if let Some(dns) = bound.dns {
            live.dns = Some(dns.duplicates);
            self.proxy.serve_dns(dns.sockets);
        }
    }

    pub fn duplicate_listeners(&self) -> Result<Option<ListeningFds>, Failure> {
        let live = self.live.lock();
        let Some(listeners) = &live.listeners else {
            return Ok(None);
        };
        let cloned = |fds: &ListeningFds| {
            let cloned = fds.try_clone();
            cloned.map_err(|error| duplicating(&self.info, &error))
        };
        let mut all = cloned(listeners)?;
        if let Some(dns) = &live.dns {
            all.0.extend(cloned(dns)?.0);
        }
        Ok(Some(all))
    }

    /// Closes all our descriptors of the listeners; connections stay.
    pub fn stop_accepting(&self) {
        self.proxy.stop_accepting();
        let mut live = self.live.lock();
        live.listeners = None;
        live.dns = None;
        live.state = State::Draining;
    }

    pub fn limit_drain(&self, deadline: Duration) {
        self.drain_by.send_replace(Some(Instant::now() + deadline));
    }

    pub fn drain_without_limit(&self) {
        self.drain_by.send_replace(None);
    }

    /// Returns when the time to drain is over, as it was last set.
    pub async fn out_of_time(&self) {
        let mut limit = self.drain_by.subscribe();
        loop {
            let until = *limit.borrow_and_update();
            let over = async {
                match until {
                    Some(until) => sleep_until(until).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = over => return,
                // The sender is this entry's: it doesn't go meanwhile.
                _ = limit.changed() => {}
            }
        }
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

fn resolv(info: &PodInfo, settings: &pb::PodSettings) -> Result<Option<Resolv>, Failure> {
    let parsed = settings.resolv_conf.as_ref().map(Resolv::parse);
    let named = |error| Failure::invalid(info.uid.clone(), format!("{info}: {error}"));
    parsed.transpose().map_err(named)
}

fn duplicating(info: &PodInfo, error: &std::io::Error) -> Failure {
    let text = format!("{info}: second descriptors of the listeners: {error}");
    Failure::new(Code::Internal, info.uid.clone(), text)
}
