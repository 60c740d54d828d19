//! Services whose address is a range, found by longest prefix.
//!
//! One hash lookup for each prefix length in use, of which a mesh has a handful, however many
//! ranges there are.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use super::service::ServiceRecord;
use super::table::{Table, tag};

/// Cheap to clone; a clone shares what isn't changed.
#[derive(Clone, Default)]
pub struct Ranges {
    entries: Table<Entry>,
    /// How many entries there are of each (IPv6, prefix length), longest first.
    lengths: Arc<BTreeMap<(bool, Reverse<u8>), usize>>,
}

/// In the client's namespace, prefix length, canonical.
type Rank = (bool, u8, bool);

#[derive(Clone)]
struct Entry {
    network: Arc<str>,
    range: IpNet,
    service: Arc<ServiceRecord>,
}

impl Ranges {
    /// The client's namespace counts more than the length, the length more than `canonical`, and
    /// among equals the oldest wins (facts ztunnel 2.3).
    pub fn find(
        &self,
        network: &str,
        ip: IpAddr,
        client: Option<&str>,
    ) -> Option<&Arc<ServiceRecord>> {
        let family = ip.is_ipv6();
        let longest_first = (family, Reverse(u8::MAX))..=(family, Reverse(0));
        let mut best: Option<(Rank, &Arc<ServiceRecord>)> = None;
        for (_, Reverse(length)) in self.lengths.range(longest_first).map(|(key, _)| *key) {
            if best.is_some_and(|((at_home, ..), _)| at_home) {
                break;
            }
            let Ok(range) = IpNet::new(ip, length).map(|range| range.trunc()) else {
                continue;
            };
            let found = self.entries.matching(tag(&(network, range)));
            let found = found.filter(|e| e.range == range && &*e.network == network);
            for service in found.map(|entry| &entry.service) {
                let at_home = client == Some(&*service.name.namespace);
                let rank = (at_home, length, service.canonical);
                if service.visible_to(client) && best.is_none_or(|(other, _)| rank > other) {
                    best = Some((rank, service));
                }
            }
        }
        best.map(|(_, service)| service)
    }

    /// In the place of an older record of the same service.
    pub fn put(&mut self, service: &Arc<ServiceRecord>) {
        for (network, range) in &service.cidrs {
            let entry = Entry {
                network: network.clone(),
                range: *range,
                service: service.clone(),
            };
            let same = |known: &Entry| known.is(network, range, &service.key);
            let old = self.entries.upsert(tag(&(&**network, *range)), entry, same);
            if old.is_none() {
                let lengths = Arc::make_mut(&mut self.lengths);
                *lengths.entry(length(range)).or_default() += 1;
            }
        }
    }

    pub fn remove(&mut self, network: &str, range: &IpNet, service: &str) {
        let same = |known: &Entry| known.is(network, range, service);
        if self.entries.remove(tag(&(network, *range)), same).is_none() {
            return;
        }
        let lengths = Arc::make_mut(&mut self.lengths);
        if let Some(count) = lengths.get_mut(&length(range)) {
            *count -= 1;
            if *count == 0 {
                lengths.remove(&length(range));
            }
        }
    }
}

impl Entry {
    fn is(&self, network: &str, range: &IpNet, service: &str) -> bool {
        self.range == *range && &*self.network == network && &*self.service.key == service
    }
}

fn length(range: &IpNet) -> (bool, Reverse<u8>) {
    (range.addr().is_ipv6(), Reverse(range.prefix_len()))
}
