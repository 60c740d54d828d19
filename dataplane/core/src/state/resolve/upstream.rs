//! From an address or a gateway reference to one workload and port (facts ztunnel 2.4, 2.6).

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use rand::Rng;

use super::Refusal;
use crate::identity::Identity;
use crate::state::balance::PortRule;
use crate::state::{
    Destination, Families, Gateway, ServiceName, ServiceRecord, Snapshot, Workload,
};
use crate::wire::workload::load_balancing::Mode;

/// What is known of an address.
pub enum Found {
    Nothing,
    /// A service that wants its traffic left alone.
    LeftAlone,
    NoEndpoint(Arc<ServiceRecord>),
    Upstream(Upstream),
}

/// The chosen workload and the port to reach it on.
pub struct Upstream {
    pub workload: Arc<Workload>,
    pub port: u16,
    /// Through which it was found.
    pub service: Option<Arc<ServiceRecord>>,
}

/// A service first, balanced; then a workload, with the port as it is. `client` is the namespace
/// whose view of services counts; None sees all.
pub fn find(
    snapshot: &Snapshot,
    source: &Workload,
    network: &str,
    dst: SocketAddr,
    client: Option<&str>,
    rule: PortRule,
) -> Found {
    if let Some(service) = snapshot.service_by_vip(network, dst.ip(), client) {
        if service.mode() == Mode::Passthrough {
            return Found::LeftAlone;
        }
        return match choose(snapshot, source, &service, dst.port(), rule) {
            Some(upstream) => Found::Upstream(upstream),
            None => Found::NoEndpoint(service),
        };
    }
    match snapshot.workload_by_address(network, dst.ip()) {
        Some(workload) => Found::Upstream(Upstream {
            workload,
            port: dst.port(),
            service: None,
        }),
        None => Found::Nothing,
    }
}

/// The workload behind a waypoint reference. None: unknown, or no endpoint (facts ztunnel 2.4).
pub fn find_gateway(snapshot: &Snapshot, source: &Workload, gateway: &Gateway) -> Option<Upstream> {
    let port = gateway.hbone_port;
    match &gateway.destination {
        Destination::Address { network, ip } => {
            let dst = SocketAddr::new(*ip, port);
            match find(snapshot, source, network, dst, None, PortRule::Waypoint) {
                Found::Upstream(upstream) => Some(upstream),
                _ => None,
            }
        }
        Destination::Hostname {
            namespace,
            hostname,
            key,
        } => match snapshot.service(key).and_then(|s| s.record.clone()) {
            Some(service) => choose(snapshot, source, &service, port, PortRule::Waypoint),
            None => Some(Upstream {
                workload: snapshot.workload_by_hostname(namespace, hostname)?,
                port,
                service: None,
            }),
        },
    }
}

fn choose(
    snapshot: &Snapshot,
    source: &Workload,
    record: &Arc<ServiceRecord>,
    port: u16,
    rule: PortRule,
) -> Option<Upstream> {
    let service = snapshot.service(&record.key)?;
    let endpoint = service.choose(record, source, port, rule)?;
    Some(Upstream {
        workload: endpoint.workload,
        port: endpoint.port,
        service: Some(record.clone()),
    })
}

impl Upstream {
    /// The original address if it is the workload's, else one of the original's family, else the
    /// first that the service allows (facts ztunnel 2.6).
    pub fn address(&self, original: IpAddr) -> Result<IpAddr, Refusal> {
        let workload = &self.workload;
        if workload.addresses.contains(&original) {
            return Ok(original);
        }
        let families = self
            .service
            .as_ref()
            .map_or(Families::Automatic, |s| s.families);
        let allowed = || {
            let addresses = workload.addresses.iter().copied();
            addresses.filter(move |ip| match families {
                Families::Automatic | Families::Dual => true,
                Families::V4 => ip.is_ipv4(),
                Families::V6 => ip.is_ipv6(),
            })
        };
        let same_family = allowed().find(|ip| ip.is_ipv4() == original.is_ipv4());
        same_family.or_else(|| allowed().next()).ok_or_else(|| {
            let uid = workload.uid.clone();
            if workload.addresses.is_empty() && !workload.hostname.is_empty() {
                let hostname = workload.hostname.clone();
                Refusal::HostnameOnly {
                    workload: uid,
                    hostname,
                }
            } else {
                Refusal::NoValidDestination { workload: uid }
            }
        })
    }

    /// Whose certificate the peer may show (facts ztunnel 3.1).
    pub fn expected(&self) -> Arc<[Identity]> {
        let names = self
            .service
            .iter()
            .flat_map(|s| s.identities.iter().cloned());
        names.chain([self.workload.identity()]).collect()
    }

    pub fn service_name(&self) -> Option<ServiceName> {
        self.service.as_ref().map(|s| s.name.clone())
    }
}

/// One of the weighted set by its weight, else the plain reference (facts ztunnel 2.4).
pub fn waypoint_of(service: &ServiceRecord) -> Option<&Gateway> {
    let entries = &service.weighted_waypoints;
    let total: u64 = entries.iter().map(|(_, weight)| u64::from(*weight)).sum();
    if total == 0 {
        return service.waypoint.as_ref();
    }
    let mut point = rand::rng().random_range(0..total);
    let chosen = entries.iter().find(|(_, weight)| {
        let weight = u64::from(*weight);
        let here = point < weight;
        point = point.saturating_sub(weight);
        here
    });
    chosen.map(|(gateway, _)| gateway)
}
