//! This data plane as a whole: unconfigured until its first agent, then with pods.

use std::path::Path;
use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::{Notify, mpsc, oneshot};

use super::agent::AgentSlot;
use super::build::Build;
use super::capture::Capture;
use super::failure::{Code, Failure};
use super::pods::Pods;
use super::status;
use crate::config::{Config, Limits};
use crate::inpod::Descriptors;
use crate::proxy::{Names, NodeAddresses, Shared};
use crate::state::{ADDRESS_TYPE, Applied, Store, TypeState};
use crate::telemetry::Telemetry;
use crate::tls::{CertEvent, CertStore};
use crate::wire::control as pb;
use pb::event::Event;

pub(super) struct Instance {
    pub id: String,
    /// "" when it was given none.
    pub cgroup: String,
    pub build: Build,
    pub agent: Arc<AgentSlot>,
    pub certs: Arc<CertStore>,
    /// Told once the process should end.
    pub exit: Notify,
    node: OnceLock<Node>,
    sessions: AtomicU64,
    install_log: bool,
}

/// Exists from the first agent's Hello on.
pub(super) struct Node {
    /// As configured, with the changes since.
    raw: parking_lot::Mutex<pb::InstanceConfig>,
    pub shared: Arc<Shared>,
    pub pods: Arc<Pods>,
    applies: mpsc::Sender<Apply>,
}

struct Apply {
    response: bytes::Bytes,
    answer: oneshot::Sender<Result<Applied, Failure>>,
}

impl Instance {
    /// Needs a tokio context.
    pub fn new(cgroup: Option<&Path>, build: Build, install_log: bool) -> Arc<Self> {
        let (certs, wanted) = CertStore::new();
        let agent = Arc::new(AgentSlot::default());
        tokio::spawn(forward(wanted, agent.clone()));
        Arc::new(Self {
            id: format!("{:016x}", rand::random::<u64>()),
            cgroup: cgroup.map_or(String::new(), |path| path.display().to_string()),
            build,
            agent,
            certs,
            exit: Notify::new(),
            node: OnceLock::new(),
            sessions: AtomicU64::new(0),
            install_log,
        })
    }

    pub fn next_session(&self) -> u64 {
        self.sessions.fetch_add(1, Ordering::Relaxed)
    }

    pub fn node(&self) -> Option<&Node> {
        self.node.get()
    }

    pub fn configured(&self) -> Result<&Node, Failure> {
        let text = "no agent has configured this data plane yet";
        self.node()
            .ok_or_else(|| Failure::new(Code::Invalid, "", text))
    }

    /// The first configuration makes the node; a later one must agree with it. Only the session that
    /// holds the agent's role calls this, so one at a time.
    pub fn configure(&self, raw: Option<pb::InstanceConfig>) -> Result<(), Failure> {
        let bad = |error: crate::config::BadConfig| {
            Failure::invalid(error.field, format!("config.{error}"))
        };
        match (self.node(), raw) {
            (Some(_), None) => Ok(()),
            (Some(node), Some(raw)) => {
                let wanted = Config::parse(&raw).map_err(bad)?;
                node.shared.config.same_instance(&wanted).map_err(bad)?;
                node.pods.capture.configure(&wanted, &self.cgroup);
                Ok(())
            }
            (None, raw) => {
                let raw = raw.unwrap_or_default();
                let config = Config::parse(&raw).map_err(bad)?;
                let node = self.make_node(raw, config);
                let pods = node.pods.clone();
                if self.node.set(node).is_ok() {
                    tokio::spawn(pods.follow_store());
                }
                Ok(())
            }
        }
    }

    fn make_node(&self, raw: pb::InstanceConfig, config: Config) -> Node {
        let config = Arc::new(config);
        let log = raw.log.clone().unwrap_or_default();
        let telemetry = Telemetry::new(&log, &config.telemetry, self.install_log);
        self.certs.trust.count_with(telemetry.metrics.crl.clone());
        tracing::info!(node = config.node, instance = self.id, "configured");
        if let Some(collector) = &config.telemetry.otlp_endpoint {
            telemetry.export_to(collector, &config.node);
        }
        let shared = Arc::new(Shared {
            limits: Arc::new(arc_swap::ArcSwap::from_pointee(config.limits.clone())),
            descriptors: Descriptors::of_process(),
            names: Names::new(&config),
            store: Store::new(config.clone()),
            certs: self.certs.clone(),
            telemetry,
            node: NodeAddresses::new(crate::capture::addresses),
            dns_cache: crate::dns::Cache::new(config.dns.cache_entries),
            config,
        });
        if let Some(wanted) = shared.store.demand().take_wanted() {
            tokio::spawn(forward_names(wanted, self.agent.clone()));
        }
        let (applies, queue) = mpsc::channel(1);
        tokio::spawn(apply_in_order(
            queue,
            shared.store.clone(),
            self.agent.clone(),
        ));
        Node {
            raw: raw.into(),
            pods: Pods::new(
                shared.clone(),
                self.agent.clone(),
                Capture::new(&shared.config, &self.cgroup),
            ),
            shared,
            applies,
        }
    }

    /// The state that a peer starts from.
    pub async fn hello(&self) -> pb::HelloReply {
        let mut reply = pb::HelloReply {
            version: super::VERSION,
            instance_id: self.id.clone(),
            pid: std::process::id(),
            cgroup: self.cgroup.clone(),
            certificates: self
                .certs
                .status()
                .iter()
                .map(status::certificate)
                .collect(),
            build: env!("CARGO_PKG_VERSION").into(),
            ..Default::default()
        };
        if let Some(node) = self.node() {
            let store = node.shared.store.clone();
            // Every resource by name: too much for a worker.
            let types = tokio::task::spawn_blocking(move || store.types()).await;
            let types = types.unwrap_or_default();
            reply.config = Some(node.raw.lock().clone());
            reply.pods = node.pods.list();
            reply.draining = node.pods.draining();
            // What is asked for by name is complete before anything came (facts ztunnel 7.4).
            let on_demand = node.shared.config.on_demand;
            let whole = |t: &TypeState| t.processed || (on_demand && t.type_url == ADDRESS_TYPE);
            reply.synced = !types.is_empty() && types.iter().all(whole);
            reply.types = types.into_iter().map(status::type_state).collect();
        }
        reply
    }

    /// A new agent has to subscribe to all that was ever asked for.
    pub async fn ask_again_for_names(self: Arc<Self>) {
        let Some(node) = self.node() else { return };
        for name in node.shared.store.demand().names() {
            self.agent.emit_in_turn(name_event(&name)).await;
        }
    }

    /// A new agent hears again of what its predecessor may have taken to the grave.
    pub fn ask_again_for_certificates(&self) {
        for missing in self.certs.status() {
            if missing.not_after.is_none() {
                let (identity, connection) = (missing.identity, false);
                self.agent.emit(certificate_event(CertEvent::Wanted {
                    identity,
                    connection,
                }));
            }
        }
    }
}

impl Node {
    /// Changes what may change live. A bad log filter is refused and changes nothing.
    pub fn reconfigure(&self, ask: pb::Configure) -> Result<(), Failure> {
        if let Some(log) = ask.log {
            let bad = |(field, text)| Failure::invalid(field, text);
            self.shared.telemetry.configure(&log).map_err(bad)?;
            self.raw.lock().log = Some(log);
        }
        if let Some(limits) = ask.limits {
            self.shared.limits.store(Limits::parse(&limits).into());
            self.raw.lock().limits = Some(limits);
        }
        Ok(())
    }

    /// In the order of the calls' first await, off the workers.
    pub async fn apply(&self, response: bytes::Bytes) -> Result<Applied, Failure> {
        let (answer, answered) = oneshot::channel();
        let gone = |_| Failure::new(Code::Internal, "", "applying a response failed");
        let sent = self.applies.send(Apply { response, answer }).await;
        sent.map_err(|_| gone(()))?;
        answered.await.map_err(|_| gone(()))?
    }
}

/// One at a time. A panic of one response is answered as an error and doesn't end the queue.
async fn apply_in_order(
    mut queue: mpsc::Receiver<Apply>,
    store: Arc<Store>,
    agent: Arc<AgentSlot>,
) {
    while let Some(Apply { response, answer }) = queue.recv().await {
        let store = store.clone();
        let result = match tokio::task::spawn_blocking(move || store.apply(response)).await {
            Ok(Ok(applied)) => Ok(applied),
            Ok(Err(error)) => {
                let text = format!("not a DeltaDiscoveryResponse: {error}");
                Err(Failure::invalid("", text))
            }
            Err(error) => {
                tracing::error!(%error, "applying a response failed");
                Err(Failure::new(Code::Internal, "", error.to_string()))
            }
        };
        let first = result.as_ref().ok().filter(|applied| applied.first);
        let first = first.map(|applied| applied.type_url.clone());
        let _ = answer.send(result);
        if let Some(type_url) = first {
            agent.emit(Event::FirstResponse(pb::FirstResponse { type_url }));
        }
    }
}

async fn forward_names(mut wanted: mpsc::UnboundedReceiver<Arc<str>>, agent: Arc<AgentSlot>) {
    while let Some(name) = wanted.recv().await {
        agent.emit_in_turn(name_event(&name)).await;
    }
}

fn name_event(name: &str) -> Event {
    Event::ResourceWanted(pb::ResourceWanted {
        type_url: ADDRESS_TYPE.to_owned(),
        name: name.to_owned(),
    })
}

async fn forward(mut wanted: mpsc::UnboundedReceiver<CertEvent>, agent: Arc<AgentSlot>) {
    while let Some(event) = wanted.recv().await {
        agent.emit(certificate_event(event));
    }
}

fn certificate_event(event: CertEvent) -> Event {
    use pb::certificate_wanted::Priority;
    match event {
        CertEvent::Wanted {
            identity,
            connection,
        } => {
            let priority = if connection {
                Priority::Connection
            } else {
                Priority::Prefetch
            };
            Event::CertificateWanted(pb::CertificateWanted {
                identity: identity.to_string(),
                priority: priority.into(),
            })
        }
        CertEvent::Forgotten { identity } => {
            Event::CertificateForgotten(pb::CertificateForgotten {
                identity: identity.to_string(),
            })
        }
    }
}
