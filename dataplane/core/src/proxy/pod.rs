//! What the handlers of one pod's connections have in common.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use arc_swap::ArcSwap;
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio::time::timeout;

use super::Shared;
use super::connection::{Connection, Facts, Open};
use super::copy::{self, Leg};
use super::enforcement::{Demands, Enforcement};
use super::error::{Early, Failed};
use super::proof::Proofs;
use super::registry::{Permit, Registry};
use super::route::Budgets;
use super::verdict;
use crate::config::{Limits, OriginalSource};
use crate::hbone::{Http2, Pool};
use crate::inpod::{Held, Netns, PodInfo, Share, is_source_lost};
use crate::policy::{self, Subject, Verdict};
use crate::state::{Snapshot, Workload};
use crate::telemetry::otlp::Record;
use crate::telemetry::{Labels, access};

/// One pod, as its connections see it.
pub struct Pod {
    pub shared: Arc<Shared>,
    pub info: PodInfo,
    pub netns: Arc<Netns>,
    pub pool: Arc<Pool>,
    pub http2: Http2,
    pub sockets: Arc<Share>,
    pub registry: Arc<Registry>,
    pub demands: ArcSwap<Demands>,
    /// They changed.
    pub demanded: Notify,
    pub probe_ports: ArcSwap<Vec<u16>>,
    pub budgets: Budgets,
    pub proofs: Proofs,
}

/// A connection's place among the pod's, with its sockets.
pub struct Place {
    _connection: Permit,
    _sockets: Held,
}

impl Pod {
    pub fn limits(&self) -> Arc<Limits> {
        self.shared.limits.load_full()
    }

    /// The pod's own record, waited for while the control plane may still deliver it (facts
    /// ztunnel 2.1 step 3).
    pub async fn own_workload(&self) -> Result<Arc<Workload>, Early> {
        let find = || self.find_own(&self.shared.store.snapshot());
        if let Some(own) = find() {
            return Ok(own);
        }
        let patience = self.limits().workload_wait;
        let arrived = async {
            let mut changes = self.shared.store.subscribe();
            loop {
                // Looked up after subscribing, or a record that came between would be missed.
                changes.borrow_and_update();
                if let Some(own) = find() {
                    return own;
                }
                if changes.changed().await.is_err() {
                    return std::future::pending().await;
                }
            }
        };
        timeout(patience, arrived)
            .await
            .map_err(|_| Early::UnknownOwnWorkload(patience))
    }

    pub fn find_own(&self, snapshot: &Snapshot) -> Option<Arc<Workload>> {
        let PodInfo {
            namespace,
            name,
            service_account,
            ..
        } = &self.info;
        snapshot.local_workload(namespace, name, service_account)
    }

    /// `sockets` that the connection has or will have.
    pub fn admit(&self, sockets: usize) -> Result<Place, Early> {
        let limit = self.limits().pod_max_connections;
        Ok(Place {
            _connection: self.registry.admit(limit).map_err(Early::TooMany)?,
            _sockets: self.sockets.take(sockets)?,
        })
    }

    /// The connection counts as opened from here on.
    pub fn open(&self, facts: Facts, labels: Labels) -> Open {
        let telemetry = &self.shared.telemetry;
        let series = telemetry.metrics.traffic.series(labels);
        self.registry.open(facts, series, telemetry)
    }

    /// Logs and counts a connection of which nothing is known yet.
    pub fn refuse(
        &self,
        direction: super::connection::Direction,
        src: SocketAddr,
        dst: Option<SocketAddr>,
        error: &Early,
    ) {
        let telemetry = &self.shared.telemetry;
        let happened = verdict::refused(self, direction, src, dst, error);
        telemetry
            .verdicts
            .put(&self.registry.pod_uid, src, happened);
        let direction = direction.as_str();
        telemetry.metrics.refusal(direction, error.reason());
        let text = error.to_string();
        access::failed(direction, src, dst, &text);
        if let Some(exporter) = telemetry.exporter() {
            let omitted = telemetry.settings.omitted();
            exporter.export(Record::failed(direction, src, dst, &text, &omitted));
        }
    }

    /// Asks the policies, counts the answer, and logs what dry-run policies would have done.
    pub fn decide(
        &self,
        snapshot: &Snapshot,
        own: &Workload,
        subject: &Subject,
        src: SocketAddr,
    ) -> Result<Option<Arc<str>>, Failed> {
        let decision = policy::decide(snapshot, own, subject);
        let metrics = &self.shared.telemetry.metrics;
        for (policy, outcome) in &decision.dry_run {
            metrics.dry_run(policy, outcome);
            if let Some(policy) = snapshot.policies().get(policy) {
                policy.hits().would_decide();
            }
            let identity = subject.identity.as_ref().map(ToString::to_string);
            access::dry_run(policy, outcome, src, subject.dst, identity.as_deref());
        }
        let verdict = match (
            decision.verdict,
            self.check_waypoint(snapshot, own, subject),
        ) {
            (Verdict::Allow { .. }, Some((Enforcement::On, reason))) => Verdict::Deny(reason),
            (verdict, Some((Enforcement::DryRun, _))) => {
                metrics.waypoint_required(false);
                let identity = subject.identity.as_ref().map(ToString::to_string);
                let identity = identity.as_deref();
                access::dry_run(
                    "waypointRequired",
                    "would refuse",
                    src,
                    subject.dst,
                    identity,
                );
                verdict
            }
            (verdict, _) => verdict,
        };
        let at_info = self.shared.telemetry.settings.policy_decisions();
        log_decision(at_info, src, subject.dst, &verdict);
        match verdict {
            Verdict::Allow { by } => {
                metrics.verdict(by.as_deref(), true);
                snapshot.policies().count(by.as_deref());
                Ok(by)
            }
            Verdict::Deny(reason) => {
                let policy = super::error::deciding_policy(&reason);
                metrics.verdict(policy.map(AsRef::as_ref), false);
                snapshot.policies().count(policy.map(AsRef::as_ref));
                if reason.is_waypoint() {
                    metrics.waypoint_required(true);
                }
                Err(Failed::Denied(reason))
            }
        }
    }

    /// With the client's address where the configuration wants it (facts ztunnel 1.3, 14).
    pub async fn connect(
        &self,
        dst: SocketAddr,
        source: Option<IpAddr>,
    ) -> Result<TcpStream, Failed> {
        let wanted = self.shared.config.original_source;
        let source = source.filter(|_| wanted != OriginalSource::Never);
        match self.try_connect(dst, source).await {
            Err(Failed::Connect(_, error))
                if wanted == OriginalSource::Auto && is_source_lost(&error) =>
            {
                let metrics = &self.shared.telemetry.metrics;
                metrics.bounds.original_source_lost.inc();
                tracing::warn!(
                    uid = self.info.uid,
                    %dst,
                    %error,
                    "the application sees the pod's own address instead of the client's"
                );
                self.try_connect(dst, None).await
            }
            result => result,
        }
    }

    async fn try_connect(
        &self,
        dst: SocketAddr,
        source: Option<IpAddr>,
    ) -> Result<TcpStream, Failed> {
        let patience = self.limits().connect_timeout;
        let connect = self.netns.connect(&self.shared.config, dst, source);
        match timeout(patience, connect).await {
            Ok(Ok(stream)) => Ok(stream),
            Ok(Err(error)) => Err(Failed::Connect(dst, error)),
            Err(_) => Err(Failed::ConnectTimeout(dst, patience)),
        }
    }
}

/// facts ztunnel 5.2
pub(super) fn log_decision(at_info: bool, src: SocketAddr, dst: SocketAddr, verdict: &Verdict) {
    let (verdict, policy) = match verdict {
        Verdict::Allow { by } => ("allow", by.as_deref()),
        Verdict::Deny(reason) => {
            let policy = super::error::deciding_policy(reason);
            ("deny", policy.map(AsRef::as_ref))
        }
    };
    match at_info {
        true => tracing::info!(target: "policy", %src, %dst, verdict, policy, "decision"),
        false => tracing::debug!(target: "policy", %src, %dst, verdict, policy, "decision"),
    }
}

/// Copies until the end, or until a policy closes the connection.
pub async fn run(
    connection: &Connection,
    client: impl Leg,
    server: impl Leg,
) -> Result<(), Failed> {
    tokio::select! {
        biased;
        reason = connection.denied() => Err(Failed::LateDenied(reason)),
        result = copy::bidirectional(client, server, &connection.counters) => match result {
            Err(error) if copy::is_peer_close(&error) => Ok(()),
            result => result.map_err(Failed::Copy),
        },
    }
}

/// So that the client sees a refusal as such, not as an empty answer.
pub fn reset(mut stream: TcpStream) {
    Leg::reset(&mut stream);
}
