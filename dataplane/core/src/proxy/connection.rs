//! One live connection: who talks to whom, how much so far, and how it ended.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use prometheus_client::metrics::gauge::Gauge;
use tokio::sync::Notify;

use super::copy::Counters;
use super::error::{Failed, deciding_policy};
use super::registry::Registry;
use super::traceparent::Trace;
use super::verdict;
use crate::policy::{DenyReason, Subject};
use crate::state::Workload;
use crate::telemetry::access::{self, Access, Bytes};
use crate::telemetry::otlp::{End, Record};
use crate::telemetry::{Flags, Series, Telemetry};
use crate::wire::control as pb;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    Inbound,
    Outbound,
}

impl Direction {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Inbound => "inbound",
            Self::Outbound => "outbound",
        }
    }
}

/// facts ztunnel 13.1
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    Tcp,
    Hbone,
    DoubleHbone,
}

impl Protocol {
    fn as_str(self) -> &'static str {
        match self {
            Self::Tcp => "TCP",
            Self::Hbone => "HBONE",
            Self::DoubleHbone => "DOUBLEHBONE",
        }
    }
}

/// What is known when a connection is opened.
pub struct Facts {
    pub direction: Direction,
    pub trace: Trace,
    /// When the client's connection was accepted, or its stream.
    pub began: Instant,
    pub src: SocketAddr,
    pub src_pod: Arc<str>,
    /// What the client dialled: an address, or the forwarded host where the far end told it.
    pub original_dst: Option<Box<str>>,
    /// Where the bytes go next.
    pub dst: SocketAddr,
    /// The next hop as the access log names it; differs from `dst` for inbound HBONE.
    pub log_dst: SocketAddr,
    pub authority: Option<Box<str>>,
    pub dst_pod: Arc<str>,
    pub protocol: Protocol,
    /// What policies are asked again when something changes; inbound only, but for the kubelet's
    /// probes.
    pub checked: Option<Checked>,
}

pub struct Checked {
    pub subject: Subject,
    /// As of connect time; a newer record is preferred while there is one.
    pub own: Arc<Workload>,
}

/// Shared by its task, the registry and those who list connections.
pub struct Connection {
    pub id: u64,
    pub facts: Facts,
    pub series: Arc<Series>,
    pub counters: Counters,
    flushed: (AtomicU64, AtomicU64),
    denied: OnceLock<DenyReason>,
    close: Notify,
    gauge: Gauge,
}

impl Connection {
    pub(super) fn new(id: u64, facts: Facts, series: Arc<Series>, gauge: Gauge) -> Self {
        gauge.inc();
        series.opened();
        Self {
            id,
            facts,
            series,
            counters: Counters::default(),
            flushed: Default::default(),
            denied: OnceLock::new(),
            close: Notify::new(),
            gauge,
        }
    }

    /// A policy doesn't allow it any longer: its task ends it. False where that was said before.
    pub fn deny(&self, reason: DenyReason) -> bool {
        let first = self.denied.set(reason).is_ok();
        if first {
            self.close.notify_one();
        }
        first
    }

    /// Resolves when a policy closed it.
    pub async fn denied(&self) -> DenyReason {
        loop {
            self.close.notified().await;
            if let Some(reason) = self.denied.get() {
                return reason.clone();
            }
        }
    }

    /// Hands what was counted since the last time to the metrics.
    pub fn flush(&self) {
        let since =
            |now: u64, before: &AtomicU64| now.saturating_sub(before.fetch_max(now, Relaxed));
        self.series.add_bytes(
            since(self.counters.by_client(), &self.flushed.0),
            since(self.counters.by_server(), &self.flushed.1),
        );
    }

    fn access(&self, policy: Option<&str>, log: impl FnOnce(&Access<'_>)) {
        let facts = &self.facts;
        log(&Access {
            direction: facts.direction.as_str(),
            trace: &facts.trace,
            src_addr: facts.src,
            src_workload: &facts.src_pod,
            dst_addr: facts.log_dst,
            hbone_addr: facts.authority.as_deref(),
            dst_workload: &facts.dst_pod,
            labels: &self.series.labels,
            policy,
        });
    }

    pub fn describe(&self, pod_uid: &str) -> pb::Connection {
        let facts = &self.facts;
        let labels = &self.series.labels;
        let (inbound, bytes) = (facts.direction == Direction::Inbound, self.bytes());
        let identity = |identity: &Option<crate::identity::Identity>| {
            let proven = identity.as_ref().filter(|_| labels.mtls);
            proven.map(ToString::to_string).unwrap_or_default()
        };
        pb::Connection {
            id: self.id,
            pod_uid: pod_uid.to_owned(),
            direction: if inbound {
                pb::connection::Direction::Inbound.into()
            } else {
                pb::connection::Direction::Outbound.into()
            },
            src: facts.src.to_string(),
            original_dst: facts.original_dst.as_deref().unwrap_or_default().to_owned(),
            actual_dst: facts.dst.to_string(),
            protocol: facts.protocol.as_str().to_owned(),
            src_identity: identity(&labels.source.principal),
            dst_identity: identity(&labels.destination.principal),
            dst_service: labels
                .service
                .as_ref()
                .map(|service| service.hostname.to_string())
                .unwrap_or_default(),
            age_ms: u64::try_from(self.facts.began.elapsed().as_millis()).unwrap_or(u64::MAX),
            bytes_sent: if inbound {
                bytes.from_server
            } else {
                bytes.from_client
            },
            bytes_received: if inbound {
                bytes.from_client
            } else {
                bytes.from_server
            },
            src_workload: facts.src_pod.to_string(),
            dst_workload: facts.dst_pod.to_string(),
        }
    }

    fn bytes(&self) -> Bytes {
        Bytes {
            from_client: self.counters.by_client(),
            from_server: self.counters.by_server(),
        }
    }
}

/// Held by the connection's task: however that ends, the end is counted and logged once.
pub struct Open {
    pub connection: Arc<Connection>,
    registry: Arc<Registry>,
    telemetry: Arc<Telemetry>,
    /// The policy that allowed it, until one denies.
    policy: Option<Arc<str>>,
    ended: bool,
}

impl Open {
    pub(super) fn new(
        connection: Arc<Connection>,
        registry: Arc<Registry>,
        telemetry: Arc<Telemetry>,
    ) -> Self {
        connection.access(None, access::opened);
        Self {
            connection,
            registry,
            telemetry,
            policy: None,
            ended: false,
        }
    }

    pub fn allowed_by(&mut self, policy: Option<Arc<str>>) {
        self.policy = policy;
    }

    pub fn end(mut self, result: Result<(), Failed>) {
        self.finish(result);
    }

    fn finish(&mut self, result: Result<(), Failed>) {
        self.ended = true;
        let connection = &self.connection;
        connection.flush();
        self.registry.remove(connection);
        connection.gauge.dec();
        let flags = result.as_ref().err().map_or(Flags::None, Failed::flags);
        connection.series.closed(flags);
        let policy = match &result {
            Err(Failed::Denied(reason) | Failed::LateDenied(reason)) => deciding_policy(reason),
            _ => self.policy.as_ref(),
        };
        if let Err(error) = &result
            && let Some(happened) = verdict::failed(connection, error)
        {
            let (pod, src) = (&self.registry.pod_uid, connection.facts.src);
            self.telemetry.verdicts.put(pod, src, happened);
        }
        let error = result.as_ref().err().map(ToString::to_string);
        let duration = connection.facts.began.elapsed();
        connection.access(policy.map(AsRef::as_ref), |access| {
            access::complete(
                access,
                connection.bytes(),
                duration,
                error.as_deref(),
                result.is_ok() && !self.telemetry.settings.tells_good_end(),
            );
            if let Some(exporter) = self.telemetry.exporter() {
                let end = End {
                    bytes: connection.bytes(),
                    duration,
                    flags,
                    error: error.as_deref(),
                };
                let omitted = self.telemetry.settings.omitted();
                let ids = connection.facts.trace.ids();
                exporter.export(Record::complete(ids, access, &end, &omitted));
            }
        });
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        if !self.ended {
            let panicked = std::thread::panicking();
            self.finish(Err(if panicked {
                Failed::Panicked
            } else {
                Failed::Drained
            }));
        }
    }
}
