//! What the mesh knows of a name (facts ztunnel 9.2, 9.3), over a snapshot.
//!
//! Beyond upstream: an exact match of any candidate goes before a wildcard, and single pods are
//! found, by their workload's hostname or as `pod.service` of a headless service.

use std::cmp::Ordering;
use std::net::IpAddr;
use std::sync::Arc;

use super::names::{Candidate, wildcards};
use crate::state::{Families, Service, ServiceRecord, Snapshot, Workload};

/// For whom a name is looked up.
#[derive(Clone, Copy, Debug)]
pub struct Client<'a> {
    pub namespace: &'a str,
    pub network: &'a str,
    /// For example cluster.local.
    pub cluster_domain: &'a str,
    /// Goes before services of other namespaces that aren't canonical.
    pub preferred_namespace: Option<&'a str>,
}

/// A name that is answered here, whatever the answer is.
#[derive(Debug)]
pub struct Hit {
    /// The name that matched; for wildcards the service's.
    pub domain: Arc<str>,
    pub target: Target,
    /// The records stand under this name, to which the asked one is an alias.
    pub alias: Option<String>,
}

#[derive(Debug)]
pub enum Target {
    Service(Arc<ServiceRecord>),
    Pods(Vec<Arc<Workload>>),
}

/// Over it a headless service answers with a part of its endpoints: what a TCP answer can hold.
const MOST_ADDRESSES: usize = 2048;

impl Client<'_> {
    pub fn lookup(&self, snapshot: &Snapshot, candidates: &[Candidate]) -> Option<Hit> {
        let exact = candidates.iter().find_map(|candidate| {
            let (domain, target) = self.exact(snapshot, &candidate.name)?;
            let wildcard = domain.starts_with("*.");
            Some(Hit {
                domain,
                target,
                alias: candidate.stripped.clone().filter(|_| !wildcard),
            })
        });
        exact.or_else(|| {
            let names = candidates.iter().flat_map(|c| wildcards(&c.name));
            names.into_iter().find_map(|name| {
                let service = self.service(snapshot, &name)?;
                Some(Hit {
                    domain: service.name.hostname.clone(),
                    target: Target::Service(service),
                    alias: None,
                })
            })
        })
    }

    /// The addresses of one family, in random order. Empty where the name has none of it.
    pub fn addresses(&self, snapshot: &Snapshot, target: &Target, v6: bool) -> Vec<IpAddr> {
        use rand::seq::SliceRandom;
        let of_family = |ip: &IpAddr| ip.is_ipv6() == v6;
        let mut found: Vec<IpAddr> = match target {
            Target::Pods(pods) => pods
                .iter()
                .flat_map(|pod| pod.addresses.iter())
                .copied()
                .collect(),
            Target::Service(service) if !allows(service, v6) => Vec::new(),
            Target::Service(service) if service.vips.is_empty() => {
                let endpoints = endpoints(snapshot, service);
                let first = |w: &Arc<Workload>| w.addresses.iter().copied().find(of_family);
                endpoints.iter().filter_map(first).collect()
            }
            Target::Service(service) => {
                let here = service
                    .vips
                    .iter()
                    .filter(|(net, _)| **net == *self.network);
                here.map(|(_, ip)| *ip).collect()
            }
        };
        found.retain(of_family);
        found.shuffle(&mut rand::rng());
        found.truncate(MOST_ADDRESSES);
        found
    }

    fn exact(&self, snapshot: &Snapshot, name: &str) -> Option<(Arc<str>, Target)> {
        if let Some(service) = self.service(snapshot, name) {
            return Some((service.name.hostname.clone(), Target::Service(service)));
        }
        let pods = self.named_pods(snapshot, name);
        let pods = if pods.is_empty() {
            self.pods_of_headless(snapshot, name)?
        } else {
            pods
        };
        Some((name.into(), Target::Pods(pods)))
    }

    /// With an address of its own, or known as headless by its name (facts ztunnel 9.2 step 5). The
    /// client's namespace goes first, then a canonical service, then the preferred namespace.
    pub fn service(&self, snapshot: &Snapshot, hostname: &str) -> Option<Arc<ServiceRecord>> {
        let named = snapshot.services_by_hostname(hostname);
        let known = named.filter(|s| s.visible_to(Some(self.namespace)));
        let known = known.filter(|s| !s.vips.is_empty() || self.is_of_cluster(&s.name.hostname));
        let rank = |service: &&Arc<ServiceRecord>| {
            let namespace = &*service.name.namespace;
            match namespace {
                _ if namespace == self.namespace => 3,
                _ if service.canonical => 2,
                _ if self.preferred_namespace == Some(namespace) => 1,
                _ => 0,
            }
        };
        // Of several canonical ones the last counts, of others the first (facts ztunnel 2.3).
        known
            .reduce(|best, next| match rank(&next).cmp(&rank(&best)) {
                Ordering::Greater => next,
                Ordering::Equal if rank(&next) == 2 => next,
                _ => best,
            })
            .cloned()
    }

    pub fn is_of_cluster(&self, hostname: &str) -> bool {
        let rest = hostname.strip_suffix(self.cluster_domain);
        rest.is_some_and(|rest| rest.ends_with(".svc."))
    }

    /// Workloads that have this hostname and addresses to it, of the client's namespace where it
    /// has one.
    fn named_pods(&self, snapshot: &Snapshot, name: &str) -> Vec<Arc<Workload>> {
        let named = snapshot.workloads_by_hostname(name);
        let mut found: Vec<_> = named
            .filter(|w| !w.addresses.is_empty() && !w.host_network && w.healthy)
            .filter(|w| *w.network == *self.network)
            .cloned()
            .collect();
        let at_home = |w: &Arc<Workload>| *w.namespace == *self.namespace;
        if found.iter().any(at_home) {
            found.retain(at_home);
        }
        found
    }

    /// `pod.service.namespace.svc.domain`, as a StatefulSet names its pods.
    fn pods_of_headless(&self, snapshot: &Snapshot, name: &str) -> Option<Vec<Arc<Workload>>> {
        let (pod, hostname) = name.split_once('.')?;
        let namespace = hostname.split('.').nth(1)?;
        if !self.is_of_cluster(hostname) || hostname.split('.').nth(2) != Some("svc") {
            return None;
        }
        let service = snapshot.service(&format!("{namespace}/{hostname}"))?;
        let record = service.record.as_ref()?;
        if !record.vips.is_empty() || !record.visible_to(Some(self.namespace)) {
            return None;
        }
        let mut pods = endpoints(snapshot, record);
        pods.retain(|w| *w.name == *pod);
        (!pods.is_empty()).then_some(pods)
    }
}

/// Those that may be told to clients.
pub fn endpoints(snapshot: &Snapshot, record: &ServiceRecord) -> Vec<Arc<Workload>> {
    let unhealthy_too = record.balancing.as_ref().is_some_and(|b| b.unhealthy_too);
    let all = snapshot.service(&record.key).map(|service: &Arc<Service>| {
        let ready = |w: &&Arc<Workload>| unhealthy_too || w.healthy;
        service.endpoints.iter().filter(ready).cloned().collect()
    });
    all.unwrap_or_default()
}

fn allows(service: &ServiceRecord, v6: bool) -> bool {
    match service.families {
        Families::Automatic | Families::Dual => true,
        Families::V4 => !v6,
        Families::V6 => v6,
    }
}
