//! From an address or a gateway reference to one workload and port (facts ztunnel 2.4, 2.6).

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use rand::Rng;

use super::{IpFamily, Refusal, Target};
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
    /// The service has other endpoints that were not tried.
    pub others: bool,
}

/// What a choice depends on, beside what is looked for.
#[derive(Clone, Copy)]
pub struct View<'a> {
    pub snapshot: &'a Snapshot,
    pub source: &'a Workload,
    /// Workloads that were tried before.
    pub exclude: &'a [Arc<str>],
}

impl View<'_> {
    /// A service first, balanced; then a workload, with the port as it is. `client` is the
    /// namespace whose view of services counts; None sees all.
    pub fn find(
        &self,
        network: &str,
        dst: SocketAddr,
        client: Option<&str>,
        rule: PortRule,
    ) -> Found {
        if let Some(service) = self.snapshot.service_by_vip(network, dst.ip(), client) {
            if service.mode() == Mode::Passthrough {
                return Found::LeftAlone;
            }
            return match self.choose(&service, dst.port(), rule) {
                Some(upstream) => Found::Upstream(upstream),
                None => Found::NoEndpoint(service),
            };
        }
        match self.snapshot.workload_by_address(network, dst.ip()) {
            Some(workload) => Found::Upstream(Upstream::only(workload, dst.port())),
            None => Found::Nothing,
        }
    }

    /// The workload behind a reference to a waypoint or network gateway. None: unknown, or no
    /// endpoint that wasn't tried (facts ztunnel 2.4, 2.5).
    pub fn find_gateway(&self, gateway: &Gateway) -> Option<Upstream> {
        let found = self.find_any_gateway(gateway);
        found.filter(|upstream| !self.exclude.contains(&upstream.workload.uid))
    }

    fn find_any_gateway(&self, gateway: &Gateway) -> Option<Upstream> {
        let port = gateway.hbone_port;
        match &gateway.destination {
            Destination::Address { network, ip } => {
                let dst = SocketAddr::new(*ip, port);
                match self.find(network, dst, None, PortRule::Waypoint) {
                    Found::Upstream(upstream) => Some(upstream),
                    _ => None,
                }
            }
            Destination::Hostname {
                namespace,
                hostname,
                key,
            } => match self.snapshot.service(key).and_then(|s| s.record.clone()) {
                Some(service) => self.choose(&service, port, PortRule::Waypoint),
                None => {
                    let workload = self.snapshot.workload_by_hostname(namespace, hostname)?;
                    Some(Upstream::only(workload, port))
                }
            },
        }
    }

    fn choose(&self, record: &Arc<ServiceRecord>, port: u16, rule: PortRule) -> Option<Upstream> {
        let service = self.snapshot.service(&record.key)?;
        let choice = service.choose(record, self.source, port, rule, self.exclude)?;
        Some(Upstream {
            workload: choice.endpoint.workload,
            port: choice.endpoint.port,
            service: Some(record.clone()),
            others: choice.others,
        })
    }
}

impl Upstream {
    fn only(workload: Arc<Workload>, port: u16) -> Self {
        Self {
            workload,
            port,
            service: None,
            others: false,
        }
    }

    /// The original address if it is the workload's, else one of the original's family, else the
    /// first that the service allows, else the workload's hostname (facts ztunnel 2.6).
    pub fn target(&self, original: IpAddr) -> Result<Target, Refusal> {
        let workload = &self.workload;
        let port = self.port;
        if workload.addresses.contains(&original) {
            return Ok(Target::Addr(SocketAddr::new(original, port)));
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
        if let Some(ip) = same_family.or_else(|| allowed().next()) {
            return Ok(Target::Addr(SocketAddr::new(ip, port)));
        }
        if workload.hostname.is_empty() {
            let workload = workload.uid.clone();
            return Err(Refusal::NoValidDestination { workload });
        }
        Ok(Target::Host {
            hostname: workload.hostname.clone(),
            port,
            prefer: match families {
                Families::Automatic | Families::Dual => IpFamily::of(original),
                Families::V4 => IpFamily::V4,
                Families::V6 => IpFamily::V6,
            },
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

    /// Only what the service names: which workload answers, another network decides (facts ztunnel
    /// 2.5).
    pub fn service_identities(&self) -> Arc<[Identity]> {
        let service = self.service.iter();
        service.flat_map(|s| s.identities.iter().cloned()).collect()
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
