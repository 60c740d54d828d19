//! Which places of the maps are taken, and by which own addresses: kept beside the maps, which would
//! have to be read as a whole for each pod, and read again now and then.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use super::CaptureError;
use super::kernel::{Kernel, map};
use super::layout::{self, AddressBytes, MAX_PODS};
use super::sys::{AttachType, Link};

/// Pods whose namespace is gone without a word give their places back after so long. Looking for
/// them costs four calls of the kernel for each pod.
const SWEEP: Duration = Duration::from_secs(60);
/// An own address that somebody else wrote into the map opens a way past; pods are verified every
/// ten seconds, and what they are compared with is no older than this.
const FRESH: Duration = Duration::from_secs(5);

#[derive(Default)]
pub(super) struct Places {
    taken: HashSet<u32>,
    addresses: HashMap<u32, HashSet<AddressBytes>>,
    swept: Option<Instant>,
    read: Option<Instant>,
}

#[cfg(test)]
impl Places {
    pub fn forget_when_read(&mut self) {
        self.read = None;
    }
}

impl Kernel {
    /// Gives back the places of pods whose namespace is gone.
    pub(super) fn sweep_places(&mut self) {
        let known: Vec<_> = self.pods.iter().filter_map(Result::ok).collect();
        self.places.taken = known
            .iter()
            .map(|(_, value)| layout::slot_of(value))
            .collect();
        self.read_addresses();
        for (cookie, value) in known {
            let slot = layout::slot_of(&value);
            let info = Link::pinned(&self.pin(slot)).and_then(|link| link.info());
            if info.is_ok_and(|info| info.target(AttachType::SkLookup) == 0) {
                self.withdraw(cookie, slot);
            }
        }
        self.places.swept = Some(Instant::now());
    }

    pub(super) fn free_slot(&mut self) -> Result<u32, CaptureError> {
        if is_older(self.places.swept, SWEEP) {
            self.sweep_places();
        }
        if let Some(slot) = self.first_free() {
            return Ok(slot);
        }
        self.sweep_places();
        self.first_free().ok_or(CaptureError::Full(MAX_PODS))
    }

    /// A pin that nobody here knows of is another data plane's, which serves beside this one while
    /// it hands over.
    fn first_free(&self) -> Option<u32> {
        let free = |slot: &u32| !self.places.taken.contains(slot) && !self.pin(*slot).exists();
        (0..MAX_PODS).find(free)
    }

    pub(super) fn write_addresses(
        &mut self,
        slot: u32,
        wanted: &[IpAddr],
    ) -> Result<(), CaptureError> {
        let failed = |error: aya::maps::MapError| map("own_addresses", &error);
        let written = self.places.addresses.remove(&slot).unwrap_or_default();
        let wanted: HashSet<_> = wanted.iter().map(|ip| layout::address(*ip)).collect();
        for ip in written.difference(&wanted) {
            let key = layout::own_address(slot, IpAddr::from(*ip));
            // Somebody else may have removed it.
            if self.own_addresses.get(&key, 0).is_ok() {
                self.own_addresses.remove(&key).map_err(failed)?;
            }
        }
        for ip in &wanted {
            let key = layout::own_address(slot, IpAddr::from(*ip));
            self.own_addresses.insert(key, 1, 0).map_err(failed)?;
        }
        if !wanted.is_empty() {
            self.places.addresses.insert(slot, wanted);
        }
        Ok(())
    }

    /// Whether the map holds these for the place, and, as of some seconds ago, no others.
    pub(super) fn has_addresses(&mut self, slot: u32, wanted: &[IpAddr]) -> bool {
        if is_older(self.places.read, FRESH) {
            self.read_addresses();
        }
        let expected: HashSet<_> = wanted.iter().map(|ip| layout::address(*ip)).collect();
        let known = self.places.addresses.get(&slot);
        let there = |ip: &IpAddr| {
            let key = layout::own_address(slot, *ip);
            self.own_addresses.get(&key, 0).is_ok()
        };
        known.map_or(expected.is_empty(), |known| *known == expected) && wanted.iter().all(there)
    }

    pub(super) fn take_place(&mut self, slot: u32) {
        self.places.taken.insert(slot);
    }

    pub(super) fn is_taken(&self, slot: u32) -> bool {
        self.places.taken.contains(&slot)
    }

    pub(super) fn give_back(&mut self, slot: u32) {
        self.places.taken.remove(&slot);
    }

    fn read_addresses(&mut self) {
        self.places.addresses.clear();
        for key in self.own_addresses.keys().filter_map(Result::ok) {
            if let Some((slot, ip)) = layout::own_address_of(&key) {
                self.places.addresses.entry(slot).or_default().insert(ip);
            }
        }
        self.places.read = Some(Instant::now());
    }
}

fn is_older(then: Option<Instant>, than: Duration) -> bool {
    then.is_none_or(|then| then.elapsed() > than)
}
