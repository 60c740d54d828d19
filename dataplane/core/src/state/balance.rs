//! Choosing an endpoint (facts ztunnel 2.6).
//!
//! Which endpoints qualify, and with what weight, depends on the service, the port, and where the
//! source is. All of that changes seldom, so it is worked out once for each combination that is
//! really asked for and kept beside the service's endpoints: a list of candidates with prefix sums
//! of their weights. A choice is then one lookup and a binary search. Any change to the service or
//! to one of its endpoints makes a new service value, with no tables yet. Sources of one node
//! almost always share one combination, so there are few tables, and no more than `KEPT`.

use std::sync::Arc;

use arc_swap::ArcSwapOption;
use rand::Rng;

use super::service::{Balancing, PortMap, Service, ServiceRecord};
use super::workload::{Locality, Workload};
use crate::wire::workload::load_balancing::{Mode, Scope};

const KEPT: usize = 32;

/// Which endpoints have the port (facts ztunnel 2.4, 2.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PortRule {
    /// The service declares it.
    Standard,
    /// Or the endpoint has an application tunnel.
    Waypoint,
}

/// The chosen endpoint and the port to reach it on.
#[derive(Clone, Debug)]
pub struct Endpoint {
    pub workload: Arc<Workload>,
    pub port: u16,
}

/// An endpoint, and whether the service has others that qualify.
#[derive(Clone, Debug)]
pub struct Choice {
    pub endpoint: Endpoint,
    pub others: bool,
}

#[derive(Default)]
pub struct Balance {
    tables: ArcSwapOption<Vec<Arc<Choices>>>,
}

struct Choices {
    port: u16,
    rule: PortRule,
    place: Place,
    candidates: Box<[Endpoint]>,
    /// Prefix sums of the weights; empty where all weigh the same.
    sums: Box<[u64]>,
    /// More than one endpoint qualifies, be it at a lower rank.
    several: bool,
}

/// What the scopes, and whether another network's endpoint can be reached, depend on.
struct Place {
    locality: Arc<Locality>,
    node: Arc<str>,
    cluster: Arc<str>,
    network: Arc<str>,
}

impl Service {
    /// None when no endpoint qualifies, or none has weight. Those in `exclude` (uids) count as
    /// absent: the others keep their odds among each other, and the next rank is used when a rank
    /// has nobody else.
    pub fn choose(
        &self,
        record: &ServiceRecord,
        source: &Workload,
        port: u16,
        rule: PortRule,
        exclude: &[Arc<str>],
    ) -> Option<Choice> {
        if !exclude.is_empty() {
            // After a failed attempt only: not worth keeping.
            return Choices::new(self, record, source, port, rule, exclude).choose();
        }
        let tables = self.balance.tables.load();
        let known = tables
            .iter()
            .flat_map(|tables| tables.iter())
            .find(|table| table.fits(source, port, rule));
        match known {
            Some(table) => table.choose(),
            None => {
                let table = Arc::new(Choices::new(self, record, source, port, rule, &[]));
                self.balance.keep(table.clone());
                table.choose()
            }
        }
    }
}

impl Balance {
    fn keep(&self, table: Arc<Choices>) {
        self.tables.rcu(|tables| {
            let kept = tables.iter().flat_map(|tables| tables.iter());
            let mut next = vec![table.clone()];
            next.extend(kept.take(KEPT - 1).cloned());
            Some(Arc::new(next))
        });
    }
}

impl Choices {
    fn new(
        service: &Service,
        record: &ServiceRecord,
        source: &Workload,
        port: u16,
        rule: PortRule,
        exclude: &[Arc<str>],
    ) -> Self {
        let balancing = record.balancing.as_ref();
        let unhealthy_too = balancing.is_some_and(|b| b.unhealthy_too);
        let mut candidates = Vec::with_capacity(service.endpoints.len());
        let mut highest = 0;
        let mut qualified = 0;
        for workload in service.endpoints.iter() {
            let ready = unhealthy_too || workload.healthy;
            let ready = ready && !exclude.contains(&workload.uid);
            let target = target_port(record, workload, port, rule);
            let (true, true, Some(port)) = (ready, is_reachable(source, workload), target) else {
                continue;
            };
            let rank = match balancing.map(|b| (b.mode, b)) {
                Some((Mode::Strict, b)) if !all_match(b, source, workload) => continue,
                Some((Mode::Failover, b)) => rank(&b.preference, source, workload),
                _ => 0,
            };
            qualified += usize::from(workload.capacity > 0);
            if rank > highest {
                candidates.clear();
                highest = rank;
            }
            if rank == highest {
                let workload = workload.clone();
                candidates.push(Endpoint { workload, port });
            }
        }
        candidates.retain(|candidate| candidate.workload.capacity > 0);
        let weight = |candidate: &Endpoint| u64::from(candidate.workload.capacity);
        let equal = candidates
            .windows(2)
            .all(|w| weight(&w[0]) == weight(&w[1]));
        let mut sum = 0;
        let add = |candidate| {
            sum += weight(candidate);
            sum
        };
        Self {
            port,
            rule,
            place: Place::of(source),
            sums: if equal {
                Box::default()
            } else {
                candidates.iter().map(add).collect()
            },
            candidates: candidates.into(),
            several: qualified > 1,
        }
    }

    fn fits(&self, source: &Workload, port: u16, rule: PortRule) -> bool {
        self.port == port && self.rule == rule && self.place.is_of(source)
    }

    fn choose(&self) -> Option<Choice> {
        let mut random = rand::rng();
        let index = match (self.candidates.len(), self.sums.last()) {
            (0, _) => return None,
            (1, _) => 0,
            (count, None) => random.random_range(0..count),
            (_, Some(total)) => {
                let point = random.random_range(0..*total);
                self.sums.partition_point(|sum| *sum <= point)
            }
        };
        Some(Choice {
            endpoint: self.candidates.get(index)?.clone(),
            others: self.several,
        })
    }
}

impl Place {
    fn of(source: &Workload) -> Self {
        Self {
            locality: source.locality.clone(),
            node: source.node.clone(),
            cluster: source.cluster_id.clone(),
            network: source.network.clone(),
        }
    }

    fn is_of(&self, source: &Workload) -> bool {
        self.locality == source.locality
            && self.node == source.node
            && self.cluster == source.cluster_id
            && self.network == source.network
    }
}

/// The endpoint's own mapping, then the service's target, then the application tunnel (facts
/// ztunnel 2.6). None means that this endpoint doesn't have the port.
pub fn target_port(
    record: &ServiceRecord,
    endpoint: &Workload,
    port: u16,
    rule: PortRule,
) -> Option<u16> {
    let declared = record.port(port);
    let tunnel = match rule {
        PortRule::Standard => None,
        PortRule::Waypoint => endpoint.application_tunnel,
    };
    if declared.is_none() && tunnel.is_none() {
        return None;
    }
    let own = endpoint.membership(&record.key);
    own.and_then(|own| PortMap::find(&own.ports, port))
        .into_iter()
        .chain(declared)
        .map(|map| map.target)
        .find(|target| *target != 0)
        .or_else(|| tunnel.and_then(|tunnel| tunnel.port).map(|_| port))
}

fn is_reachable(source: &Workload, endpoint: &Workload) -> bool {
    !endpoint.addresses.is_empty()
        || !endpoint.hostname.is_empty()
        || (endpoint.network != source.network && endpoint.network_gateway.is_some())
}

fn all_match(balancing: &Balancing, source: &Workload, endpoint: &Workload) -> bool {
    let mut scopes = balancing.preference.iter();
    scopes.all(|scope| matches(*scope, source, endpoint))
}

/// How many leading scopes match. NETWORK in front is special: a mismatch doesn't end the count,
/// and a match outranks every endpoint of another network (facts ztunnel 2.6).
fn rank(preference: &[Scope], source: &Workload, endpoint: &Workload) -> usize {
    let count = |scopes: &[Scope]| {
        let leading = scopes.iter();
        leading
            .take_while(|scope| matches(**scope, source, endpoint))
            .count()
    };
    match preference.split_first() {
        Some((Scope::Network, rest)) if matches(Scope::Network, source, endpoint) => {
            preference.len() + count(rest)
        }
        Some((Scope::Network, rest)) => count(rest),
        _ => count(preference),
    }
}

fn matches(scope: Scope, source: &Workload, endpoint: &Workload) -> bool {
    match scope {
        Scope::UnspecifiedScope => true,
        Scope::Region => source.locality.region == endpoint.locality.region,
        Scope::Zone => source.locality.zone == endpoint.locality.zone,
        Scope::Subzone => source.locality.subzone == endpoint.locality.subzone,
        Scope::Node => source.node == endpoint.node,
        Scope::Cluster => source.cluster_id == endpoint.cluster_id,
        Scope::Network => source.network == endpoint.network,
    }
}
