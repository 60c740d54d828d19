//! A WDS service record, parsed, and the service it describes with its endpoints.

use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use super::balance::Balance;
use super::gateway::Gateway;
use super::intern::Interner;
use super::parse::{Bad, cidr, ip, port};
use super::table::{Table, tag};
use super::version::Version;
use super::workload::Workload;
use crate::identity::Identity;
use crate::wire::workload as wds;
use crate::wire::workload::load_balancing::{HealthPolicy, Mode, Scope};

/// The names of a service that logs and metrics show.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ServiceName {
    pub name: Arc<str>,
    pub namespace: Arc<str>,
    pub hostname: Arc<str>,
}

/// A port of a service and where it leads; target 0 means that the endpoint names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PortMap {
    pub service: u16,
    pub target: u16,
}

/// A workload's place in one service.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Membership {
    /// `namespace/hostname`
    pub service: Arc<str>,
    pub ports: Arc<[PortMap]>,
}

#[derive(Debug, PartialEq, Eq)]
pub struct ServiceRecord {
    /// `namespace/hostname`, also the resource's name.
    pub key: Arc<str>,
    pub name: ServiceName,
    /// (network, address)
    pub vips: Box<[(Arc<str>, IpAddr)]>,
    pub cidrs: Box<[(Arc<str>, IpNet)]>,
    pub ports: Arc<[PortMap]>,
    pub subject_alt_names: Box<[Arc<str>]>,
    /// Those of the names above that are SPIFFE ids (facts ztunnel 3.1).
    pub identities: Box<[Identity]>,
    pub waypoint: Option<Gateway>,
    pub weighted_waypoints: Box<[(Gateway, u32)]>,
    pub balancing: Option<Balancing>,
    pub families: Families,
    pub canonical: bool,
    /// Hidden from clients of other namespaces.
    pub private: bool,
    pub(super) version: Version,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Balancing {
    pub mode: Mode,
    pub preference: Box<[Scope]>,
    pub unhealthy_too: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Families {
    Automatic,
    V4,
    V6,
    Dual,
}

/// A service and the workloads that list it. It exists without a record while only workloads have
/// arrived, and after its record was removed: so endpoints survive both orders of arrival.
#[derive(Clone, Default)]
pub struct Service {
    pub key: Arc<str>,
    pub record: Option<Arc<ServiceRecord>>,
    pub endpoints: Table<Arc<Workload>>,
    pub(super) balance: Arc<Balance>,
}

impl Service {
    pub fn new(key: Arc<str>) -> Self {
        Self {
            key,
            ..Self::default()
        }
    }

    pub fn set_record(&mut self, record: Option<Arc<ServiceRecord>>) {
        self.record = record;
        self.forget_choices();
    }

    pub fn set_endpoint(&mut self, workload: Arc<Workload>) {
        let uid = workload.uid.clone();
        self.endpoints
            .upsert(tag(&*uid), workload, |known| known.uid == uid);
        self.forget_choices();
    }

    pub fn remove_endpoint(&mut self, uid: &str) {
        self.endpoints.remove(tag(uid), |known| &*known.uid == uid);
        self.forget_choices();
    }

    pub fn is_unused(&self) -> bool {
        self.record.is_none() && self.endpoints.is_empty()
    }

    fn forget_choices(&mut self) {
        // While a push adds endpoint after endpoint, the empty one is still ours alone.
        match Arc::get_mut(&mut self.balance) {
            Some(own) => *own = Balance::default(),
            None => self.balance = Arc::default(),
        }
    }
}

impl ServiceRecord {
    pub fn port(&self, service_port: u16) -> Option<PortMap> {
        PortMap::find(&self.ports, service_port)
    }

    pub fn mode(&self) -> Mode {
        self.balancing
            .as_ref()
            .map_or(Mode::UnspecifiedMode, |b| b.mode)
    }

    /// `None` is a lookup for nobody in particular, which sees everything (facts ztunnel 2.3).
    pub fn visible_to(&self, namespace: Option<&str>) -> bool {
        !self.private || namespace.is_none_or(|namespace| namespace == &*self.name.namespace)
    }

    pub(super) fn parse(
        raw: &wds::Service,
        version: Version,
        interner: &mut Interner,
    ) -> Result<Self, Bad> {
        if raw.hostname.is_empty() {
            return Err(Bad::new("hostname", "it is empty"));
        }
        let (vips, cidrs) = addresses(&raw.addresses, interner)?;
        let names = &raw.subject_alt_names;
        let mut weighted_waypoints = Vec::new();
        for entry in &raw.weighted_waypoints {
            let field = "weighted_waypoints";
            let destination = entry.destination.as_ref();
            let destination =
                destination.ok_or_else(|| Bad::new(field, "one has no destination"))?;
            weighted_waypoints.push((Gateway::parse(field, destination, interner)?, entry.weight));
        }
        let waypoint = raw.waypoint.as_ref();
        let waypoint = waypoint.map(|raw| Gateway::parse("waypoint", raw, interner));
        let ports = PortMap::parse_all("ports", &raw.ports)?;
        Ok(Self {
            key: interner.text(&format!("{}/{}", raw.namespace, raw.hostname)),
            name: ServiceName {
                name: interner.text(&raw.name),
                namespace: interner.text(&raw.namespace),
                hostname: interner.text(&raw.hostname),
            },
            vips,
            cidrs,
            ports: interner.ports.borrowed(&ports),
            subject_alt_names: names.iter().map(|name| interner.text(name)).collect(),
            identities: names.iter().filter_map(|name| name.parse().ok()).collect(),
            waypoint: waypoint.transpose()?,
            weighted_waypoints: weighted_waypoints.into(),
            balancing: raw.load_balancing.as_ref().map(balancing).transpose()?,
            families: match raw.ip_families {
                0 => Families::Automatic,
                1 => Families::V4,
                2 => Families::V6,
                3 => Families::Dual,
                other => return Err(Bad::unknown("ip_families", other)),
            },
            canonical: raw.canonical,
            // Unknown values count as public (facts ztunnel 2.3).
            private: raw.visibility == wds::service::Visibility::Namespace as i32,
            version,
        })
    }
}

impl PortMap {
    pub fn find(ports: &[Self], service_port: u16) -> Option<Self> {
        ports.iter().find(|p| p.service == service_port).copied()
    }

    pub(super) fn parse_all(field: &str, raw: &[wds::Port]) -> Result<Vec<Self>, Bad> {
        raw.iter()
            .map(|raw| {
                Ok(Self {
                    service: port(field, raw.service_port)?,
                    target: port(field, raw.target_port)?,
                })
            })
            .collect()
    }
}

type Vips = Box<[(Arc<str>, IpAddr)]>;
type Cidrs = Box<[(Arc<str>, IpNet)]>;

fn addresses(raw: &[wds::NetworkAddress], interner: &mut Interner) -> Result<(Vips, Cidrs), Bad> {
    let (mut vips, mut cidrs) = (Vec::new(), Vec::new());
    for raw in raw {
        let network = interner.text(&raw.network);
        let address = ip("addresses", &raw.address)?;
        let range = raw
            .length
            .map(|length| cidr("addresses", &raw.address, length));
        match range.transpose()? {
            Some(net) if net.prefix_len() < net.max_prefix_len() => cidrs.push((network, net)),
            _ if vips.contains(&(network.clone(), address)) => {}
            _ => vips.push((network, address)),
        }
    }
    Ok((vips.into(), cidrs.into()))
}

fn balancing(raw: &wds::LoadBalancing) -> Result<Balancing, Bad> {
    let scope = |value: &i32| match Scope::try_from(*value) {
        Ok(scope) if scope != Scope::UnspecifiedScope => Ok(scope),
        _ => Err(Bad::unknown("load_balancing.routing_preference", *value)),
    };
    Ok(Balancing {
        mode: Mode::try_from(raw.mode)
            .map_err(|_| Bad::unknown("load_balancing.mode", raw.mode))?,
        preference: raw
            .routing_preference
            .iter()
            .map(scope)
            .collect::<Result<_, _>>()?,
        unhealthy_too: match HealthPolicy::try_from(raw.health_policy) {
            Ok(policy) => policy == HealthPolicy::AllowAll,
            Err(_) => {
                return Err(Bad::unknown(
                    "load_balancing.health_policy",
                    raw.health_policy,
                ));
            }
        },
    })
}
