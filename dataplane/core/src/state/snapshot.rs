//! A consistent view of workloads, services and policies, and the indexes that find them.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use super::balance::{PortRule, target_port};
use super::gateway::{Destination, Gateway};
use super::ranges::Ranges;
use super::service::{Service, ServiceName, ServiceRecord};
use super::table::{Table, tag};
use super::workload::Workload;
use crate::policy::PolicySet;

/// Immutable for its readers; cheap to clone, and a clone shares all that isn't changed.
#[derive(Clone, Default)]
pub struct Snapshot {
    pub(super) workloads: Table<Arc<Workload>>,
    /// One entry for each address of a workload; several workloads may claim one address.
    by_address: Table<Arc<Workload>>,
    /// Workloads that have a hostname, for waypoints named by one.
    by_hostname: Table<Arc<Workload>>,
    /// Workloads of this node, by namespace and name.
    local: Table<Arc<Workload>>,
    pub(super) services: Table<Arc<Service>>,
    by_vip: Table<Arc<ServiceRecord>>,
    /// By hostname in lower case: several namespaces may have one of a name.
    by_service_hostname: Table<Arc<ServiceRecord>>,
    by_range: Ranges,
    pub(super) policies: Arc<PolicySet>,
}

impl Snapshot {
    /// Where several workloads claim an address, the one that facts ztunnel 2.7 prefers.
    pub fn workload_by_address(&self, network: &str, ip: IpAddr) -> Option<Arc<Workload>> {
        self.workloads_at(network, ip)
            .max_by_key(|w| w.claim())
            .cloned()
    }

    /// All that claim an address.
    pub fn workloads_at(&self, network: &str, ip: IpAddr) -> impl Iterator<Item = &Arc<Workload>> {
        self.by_address
            .matching(tag(&(network, ip)))
            .filter(move |w| &*w.network == network && w.addresses.contains(&ip))
    }

    pub fn workload_by_uid(&self, uid: &str) -> Option<Arc<Workload>> {
        self.workloads.get(tag(uid), |w| &*w.uid == uid).cloned()
    }

    /// The record of a pod of this node (facts ztunnel 2.1 step 3).
    pub fn local_workload(
        &self,
        namespace: &str,
        name: &str,
        service_account: &str,
    ) -> Option<Arc<Workload>> {
        self.local
            .matching(tag(&(namespace, name)))
            .filter(|w| &*w.namespace == namespace && &*w.name == name)
            .filter(|w| &*w.service_account == service_account)
            .max_by_key(|w| w.claim())
            .cloned()
    }

    pub fn workloads(&self) -> impl Iterator<Item = &Arc<Workload>> {
        self.workloads.iter()
    }

    /// All workloads of this node, pods of ours or not.
    pub fn local_workloads(&self) -> impl Iterator<Item = &Arc<Workload>> {
        self.local.iter()
    }

    pub fn policies(&self) -> &PolicySet {
        &self.policies
    }

    /// (workloads, services)
    pub fn counts(&self) -> (usize, usize) {
        let services = self.services.iter().filter(|s| s.record.is_some());
        (self.workloads.len(), services.count())
    }

    /// By `namespace/hostname`; also one without a record yet.
    pub fn service(&self, key: &str) -> Option<&Arc<Service>> {
        self.services.get(tag(key), |s| &*s.key == key)
    }

    /// All that have this address, visible to anybody or not; ranges only where none has it whole.
    pub fn services_at<'a>(
        &'a self,
        network: &'a str,
        ip: IpAddr,
    ) -> impl Iterator<Item = &'a Arc<ServiceRecord>> {
        let mut exact = self.exact(network, ip).peekable();
        let ranged = match exact.peek() {
            Some(_) => None,
            None => self.by_range.find(network, ip, None),
        };
        exact.chain(ranged)
    }

    fn exact<'a>(
        &'a self,
        network: &'a str,
        ip: IpAddr,
    ) -> impl Iterator<Item = &'a Arc<ServiceRecord>> {
        self.by_vip.matching(tag(&(network, ip))).filter(move |s| {
            let mut vips = s.vips.iter();
            vips.any(|(n, vip)| *vip == ip && &**n == network)
        })
    }

    /// By VIP, exact before ranges, as the namespace sees it (facts ztunnel 2.3).
    pub fn service_by_vip(
        &self,
        network: &str,
        ip: IpAddr,
        client: Option<&str>,
    ) -> Option<Arc<ServiceRecord>> {
        let ranged = || self.by_range.find(network, ip, client);
        best(self.exact(network, ip), client)
            .or_else(ranged)
            .cloned()
    }

    /// Case-insensitive, as the namespace sees it (facts ztunnel 2.3).
    pub fn service_by_hostname(
        &self,
        hostname: &str,
        client: Option<&str>,
    ) -> Option<Arc<ServiceRecord>> {
        let named = self
            .by_service_hostname
            .matching(hostname_tag(hostname))
            .filter(|s| s.name.hostname.eq_ignore_ascii_case(hostname));
        best(named, client).cloned()
    }

    /// All of a name, oldest first, whoever may see them.
    pub fn services_by_hostname(
        &self,
        hostname: &str,
    ) -> impl Iterator<Item = &Arc<ServiceRecord>> {
        self.by_service_hostname
            .matching(hostname_tag(hostname))
            .filter(move |s| s.name.hostname.eq_ignore_ascii_case(hostname))
    }

    pub fn workloads_by_hostname(&self, hostname: &str) -> impl Iterator<Item = &Arc<Workload>> {
        self.by_hostname
            .matching(hostname_tag(hostname))
            .filter(move |w| w.hostname.eq_ignore_ascii_case(hostname))
    }

    pub fn workload_by_hostname(&self, namespace: &str, hostname: &str) -> Option<Arc<Workload>> {
        self.by_hostname
            .matching(hostname_tag(hostname))
            .filter(|w| &*w.namespace == namespace && w.hostname.eq_ignore_ascii_case(hostname))
            .max_by_key(|w| w.claim())
            .cloned()
    }

    /// Does this gateway reference lead to this workload?
    pub fn leads_to(&self, gateway: &Gateway, workload: &Workload) -> bool {
        match &gateway.destination {
            Destination::Hostname {
                namespace,
                hostname,
                key,
            } => {
                workload.membership(key).is_some()
                    || (workload.namespace == *namespace
                        && workload.hostname.eq_ignore_ascii_case(hostname))
            }
            Destination::Address { network, ip } => {
                let own = workload.network == *network && workload.addresses.contains(ip);
                let client = Some(&*workload.namespace);
                let service = || self.service_by_vip(network, *ip, client);
                own || service().is_some_and(|s| workload.membership(&s.key).is_some())
            }
        }
    }

    /// The workloads that this gateway reference leads to.
    pub fn behind<'a>(&'a self, gateway: &'a Gateway) -> impl Iterator<Item = &'a Arc<Workload>> {
        let (service, named, addressed) = match &gateway.destination {
            Destination::Hostname {
                namespace,
                hostname,
                key,
            } => {
                let named = self.workloads_by_hostname(hostname);
                let named = named.filter(move |w| w.namespace == *namespace);
                (self.service(key), Some(named), None)
            }
            Destination::Address { network, ip } => {
                let service = self.service_by_vip(network, *ip, None);
                let service = service.and_then(|service| self.service(&service.key));
                (service, None, Some(self.workloads_at(network, *ip)))
            }
        };
        let endpoints = service.into_iter().flat_map(|s| s.endpoints.iter());
        let own = named.into_iter().flatten();
        endpoints.chain(own).chain(addressed.into_iter().flatten())
    }

    /// For metric attribution of inbound connections (facts ztunnel 3.8).
    pub fn attribute_service(
        &self,
        workload: &Workload,
        forwarded_host: Option<&str>,
        dst: SocketAddr,
    ) -> Option<ServiceName> {
        let services = || {
            let listed = workload.services.iter();
            listed.filter_map(|m| self.service(&m.service)?.record.as_ref())
        };
        let named = forwarded_host.and_then(|host| {
            let mut services = services();
            services.find(|s| s.name.hostname.eq_ignore_ascii_case(host))
        });
        let leads_here = |s: &&Arc<ServiceRecord>| {
            let mut ports = s.ports.iter();
            ports.any(|p| {
                target_port(s, workload, p.service, PortRule::Standard) == Some(dst.port())
            })
        };
        named
            .or_else(|| services().find(leads_here))
            .map(|s| s.name.clone())
    }

    // ---- changes, by the writer only -------------------------------------------------------

    /// A record that is held already changes nothing: a control plane that sends everything again
    /// costs no memory.
    pub(super) fn put_workload(&mut self, workload: Arc<Workload>, node: &str) {
        let held = self.workloads.get(tag(&*workload.uid), |w| *w == workload);
        if held.is_some() {
            return;
        }
        let old = self
            .workloads
            .upsert(tag(&*workload.uid), workload.clone(), |w| {
                w.uid == workload.uid
            });
        if let Some(old) = old {
            self.unlink(&old, Some(&workload));
        }
        if !workload.host_network {
            for ip in &workload.addresses {
                let tag = tag(&(&*workload.network, ip));
                self.by_address.insert(tag, workload.clone());
            }
        }
        if !workload.hostname.is_empty() {
            self.by_hostname
                .insert(hostname_tag(&workload.hostname), workload.clone());
        }
        if &*workload.node == node {
            let tag = tag(&(&*workload.namespace, &*workload.name));
            self.local.insert(tag, workload.clone());
        }
        for membership in workload.services.iter() {
            self.service_mut(&membership.service)
                .set_endpoint(workload.clone());
        }
    }

    pub(super) fn remove_workload(&mut self, uid: &str) -> bool {
        let removed = self.workloads.remove(tag(uid), |w| &*w.uid == uid);
        if let Some(old) = &removed {
            self.unlink(old, None);
        }
        removed.is_some()
    }

    pub(super) fn put_service(&mut self, record: Arc<ServiceRecord>) {
        let held = self.service(&record.key);
        if held.is_some_and(|held| held.record.as_ref() == Some(&record)) {
            return;
        }
        let service = self.service_mut(&record.key);
        let old = service.record.clone();
        service.set_record(Some(record.clone()));
        if let Some(old) = old {
            self.unlink_service(&old, Some(&record));
        }
        let same = |known: &Arc<ServiceRecord>| known.key == record.key;
        for (network, ip) in &record.vips {
            self.by_vip
                .upsert(tag(&(&**network, ip)), record.clone(), same);
        }
        self.by_service_hostname
            .upsert(hostname_tag(&record.name.hostname), record.clone(), same);
        self.by_range.put(&record);
    }

    /// Its endpoints stay, for the case that it comes back.
    pub(super) fn remove_service(&mut self, key: &str) -> bool {
        let Some(old) = self.service(key).and_then(|s| s.record.clone()) else {
            return false;
        };
        self.service_mut(&old.key).set_record(None);
        self.unlink_service(&old, None);
        self.forget_unused_service(key);
        true
    }

    fn service_mut(&mut self, key: &Arc<str>) -> &mut Service {
        let tag = tag(&**key);
        let is = |s: &Arc<Service>| s.key == *key;
        if self.services.get(tag, is).is_none() {
            let new = Arc::new(Service::new(key.clone()));
            self.services.insert(tag, new);
        }
        let found = self.services.get_mut(tag, is);
        Arc::make_mut(found.expect("it was inserted above if it was missing"))
    }

    /// Takes a replaced or removed record out of every index but `workloads`; endpoints that `new`
    /// still has are left to be replaced.
    fn unlink(&mut self, old: &Arc<Workload>, new: Option<&Workload>) {
        let same = |w: &Arc<Workload>| Arc::ptr_eq(w, old);
        for ip in &old.addresses {
            self.by_address.remove(tag(&(&*old.network, ip)), same);
        }
        self.by_hostname.remove(hostname_tag(&old.hostname), same);
        let local = tag(&(&*old.namespace, &*old.name));
        self.local.remove(local, same);
        for membership in old.services.iter() {
            let key = &membership.service;
            if new.is_none_or(|new| new.membership(key).is_none()) {
                self.service_mut(key).remove_endpoint(&old.uid);
                self.forget_unused_service(key);
            }
        }
    }

    fn unlink_service(&mut self, old: &ServiceRecord, new: Option<&ServiceRecord>) {
        let same = |known: &Arc<ServiceRecord>| known.key == old.key;
        for vip in &old.vips {
            if new.is_none_or(|new| !new.vips.contains(vip)) {
                self.by_vip.remove(tag(&(&*vip.0, vip.1)), same);
            }
        }
        // The hostname is part of the key: a record that stays keeps its entry.
        if new.is_none() {
            let tag = hostname_tag(&old.name.hostname);
            self.by_service_hostname.remove(tag, same);
        }
        for range in &old.cidrs {
            if new.is_none_or(|new| !new.cidrs.contains(range)) {
                self.by_range.remove(&range.0, &range.1, &old.key);
            }
        }
    }

    fn forget_unused_service(&mut self, key: &str) {
        let unused = |s: &Arc<Service>| &*s.key == key && s.is_unused();
        self.services.remove(tag(key), unused);
    }
}

/// Client's namespace, then the last canonical one, then the first (facts ztunnel 2.3).
fn best<'a>(
    services: impl Iterator<Item = &'a Arc<ServiceRecord>>,
    client: Option<&str>,
) -> Option<&'a Arc<ServiceRecord>> {
    let mut best: Option<&Arc<ServiceRecord>> = None;
    for service in services.filter(|s| s.visible_to(client)) {
        if is_at_home(service, client) {
            return Some(service);
        }
        if best.is_none() || service.canonical {
            best = Some(service);
        }
    }
    best
}

fn is_at_home(service: &ServiceRecord, client: Option<&str>) -> bool {
    client == Some(&*service.name.namespace)
}

fn hostname_tag(hostname: &str) -> u32 {
    if hostname.bytes().any(|b| b.is_ascii_uppercase()) {
        tag(&*hostname.to_ascii_lowercase())
    } else {
        tag(hostname)
    }
}
