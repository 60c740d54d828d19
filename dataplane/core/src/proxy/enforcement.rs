//! What a pod's namespace demands beyond policies: known destinations only, and traffic through the
//! waypoint only. Either may be tried out first: then it is logged and counted, and all passes.

use std::net::SocketAddr;

use super::error::Early;
use super::pod::Pod;
use crate::policy::{DenyReason, Subject};
use crate::state::resolve::{self, Route};
use crate::state::{Snapshot, Workload};
use crate::telemetry::access;
use crate::wire::control as pb;

/// Live settings of one pod.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Demands {
    pub registry_only: Enforcement,
    pub waypoint_required: Enforcement,
    /// Others send through the pod: what comes in by its virtual interfaces is outbound.
    pub passes_on: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Enforcement {
    #[default]
    Off,
    DryRun,
    On,
}

impl Demands {
    pub fn of(settings: &pb::PodSettings) -> Self {
        Self {
            registry_only: Enforcement::of(settings.registry_only),
            waypoint_required: Enforcement::of(settings.waypoint_required),
            passes_on: !settings.virtual_interfaces.is_empty(),
        }
    }

    /// What is to be done about a destination that nothing is known of.
    pub fn registry(&self, route: &Route) -> Enforcement {
        match route {
            Route::Passthrough { known: false, .. } => self.registry_only,
            _ => Enforcement::Off,
        }
    }

    /// What is to be done about what didn't come through a waypoint of this workload. A waypoint
    /// itself (one that takes all traffic on its application tunnel) has nothing before it.
    pub fn waypoint(
        &self,
        snapshot: &Snapshot,
        network: &str,
        own: &Workload,
        subject: &Subject,
    ) -> Option<(Enforcement, DenyReason)> {
        let demand = self.waypoint_required;
        if demand == Enforcement::Off || own.application_tunnel.is_some() {
            return None;
        }
        let identity = subject.identity.as_ref();
        if resolve::through_waypoint(snapshot, network, own, identity, subject.source) {
            return None;
        }
        let waypoint = resolve::waypoints(snapshot, own).next();
        Some((
            demand,
            match waypoint {
                Some(waypoint) => {
                    DenyReason::NotThroughWaypoint(waypoint.destination.to_string().into())
                }
                None => DenyReason::NoWaypoint,
            },
        ))
    }

    /// Why a destination is refused that nothing is known of.
    pub fn registry_refusal(dst: SocketAddr, namespace: &str) -> String {
        let namespace = namespace.to_owned();
        Early::RegistryOnly { dst, namespace }.to_string()
    }
}

impl Enforcement {
    fn of(raw: i32) -> Self {
        match pb::Enforcement::try_from(raw) {
            Ok(pb::Enforcement::Off) => Self::Off,
            Ok(pb::Enforcement::DryRun) => Self::DryRun,
            // What only a newer agent knows is no reason to let through.
            Ok(pb::Enforcement::On) | Err(_) => Self::On,
        }
    }
}

impl Pod {
    /// Refuses a destination that nothing is known of.
    pub fn check_registry(
        &self,
        route: &Route,
        src: SocketAddr,
        dst: SocketAddr,
    ) -> Result<(), Early> {
        let demand = self.demands.load().registry(route);
        if demand == Enforcement::Off {
            return Ok(());
        }
        let refused = demand == Enforcement::On;
        let telemetry = &self.shared.telemetry;
        telemetry.metrics.registry_only(refused);
        if !refused {
            access::dry_run("registryOnly", "would refuse", src, dst, None);
            return Ok(());
        }
        let namespace = self.info.namespace.clone();
        Err(Early::RegistryOnly { dst, namespace })
    }

    pub fn check_waypoint(
        &self,
        snapshot: &Snapshot,
        own: &Workload,
        subject: &Subject,
    ) -> Option<(Enforcement, DenyReason)> {
        let network = &self.shared.config.network;
        let demands = self.demands.load();
        demands.waypoint(snapshot, network, own, subject)
    }
}
