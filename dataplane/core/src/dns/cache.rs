//! Relayed answers of the whole node, kept as long as they live: one bound for all pods.
//!
//! An entry serves the pod that asked for it only. Whoever may send raw packets in a pod can forge
//! answers to that pod's questions; other pods must not get them.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// Larger answers aren't kept: with 8192 entries the memory stays a few megabytes.
const LARGEST: usize = 2048;

pub struct Cache {
    entries: usize,
    kept: Mutex<Kept>,
    next_owner: AtomicU64,
}

/// A pod with the nameservers that it has now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Owner(u64);

#[derive(Default)]
struct Kept {
    owners: HashMap<Owner, Own>,
    total: usize,
    sequence: u64,
}

#[derive(Default)]
struct Own {
    found: HashMap<Arc<[u8]>, Entry>,
    /// By age, the oldest first.
    order: BTreeMap<u64, Arc<[u8]>>,
}

struct Entry {
    answer: Arc<Answer>,
    sequence: u64,
}

pub struct Answer {
    pub bytes: Box<[u8]>,
    /// Where its TTLs stand.
    pub ttls: Box<[u16]>,
    pub since: Instant,
    pub life: Duration,
}

impl Cache {
    pub fn new(entries: usize) -> Self {
        Self {
            entries,
            kept: Mutex::default(),
            next_owner: AtomicU64::new(0),
        }
    }

    pub fn new_owner(&self) -> Owner {
        Owner(self.next_owner.fetch_add(1, Relaxed))
    }

    pub fn held(&self) -> usize {
        self.kept.lock().total
    }

    /// With its age in seconds.
    pub fn get(&self, owner: Owner, key: &[u8], now: Instant) -> Option<(Arc<Answer>, u32)> {
        let mut kept = self.kept.lock();
        let answer = kept.owners.get(&owner)?.found.get(key)?.answer.clone();
        let age = now.saturating_duration_since(answer.since);
        if age >= answer.life {
            kept.remove(owner, key);
            return None;
        }
        Some((answer, u32::try_from(age.as_secs()).unwrap_or(u32::MAX)))
    }

    /// At the bound, the pod with the most entries loses its oldest.
    pub fn put(&self, owner: Owner, key: &[u8], answer: Answer) {
        if answer.bytes.len() > LARGEST || self.entries == 0 {
            return;
        }
        let mut kept = self.kept.lock();
        kept.remove(owner, key);
        while kept.total >= self.entries {
            kept.make_room();
        }
        kept.sequence += 1;
        kept.total += 1;
        let sequence = kept.sequence;
        let key: Arc<[u8]> = key.into();
        let own = kept.owners.entry(owner).or_default();
        own.order.insert(sequence, key.clone());
        let answer = Arc::new(answer);
        own.found.insert(key, Entry { answer, sequence });
    }

    /// The pod is gone, or has other nameservers.
    pub fn forget(&self, owner: Owner) {
        let mut kept = self.kept.lock();
        if let Some(own) = kept.owners.remove(&owner) {
            kept.total -= own.found.len();
        }
    }
}

impl Kept {
    fn remove(&mut self, owner: Owner, key: &[u8]) {
        let Some(own) = self.owners.get_mut(&owner) else {
            return;
        };
        if let Some(entry) = own.found.remove(key) {
            own.order.remove(&entry.sequence);
            self.total -= 1;
        }
        if own.found.is_empty() {
            self.owners.remove(&owner);
        }
    }

    fn make_room(&mut self) {
        let largest = self.owners.iter().max_by_key(|(_, own)| own.found.len());
        let oldest = largest.and_then(|(owner, own)| {
            let (_, key) = own.order.first_key_value()?;
            Some((*owner, key.clone()))
        });
        match oldest {
            Some((owner, key)) => self.remove(owner, &key),
            // Can't be: something is held, so somebody holds it.
            None => self.total = 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(since: Instant, seconds: u64) -> Answer {
        Answer {
            bytes: [0; 32].into(),
            ttls: [].into(),
            since,
            life: Duration::from_secs(seconds),
        }
    }

    #[test]
    fn an_answer_grows_old_and_goes() {
        let cache = Cache::new(10);
        let (owner, start) = (cache.new_owner(), Instant::now());
        cache.put(owner, b"a", answer(start, 30));
        let after = |seconds| cache.get(owner, b"a", start + Duration::from_secs(seconds));
        assert_eq!(after(0).map(|(_, age)| age), Some(0));
        assert_eq!(after(29).map(|(_, age)| age), Some(29));
        assert!(after(30).is_none());
        assert_eq!(cache.held(), 0);
    }

    #[test]
    fn one_pod_never_gets_what_another_was_told() {
        let cache = Cache::new(10);
        let (one, other) = (cache.new_owner(), cache.new_owner());
        cache.put(one, b"a", answer(Instant::now(), 30));
        assert!(cache.get(other, b"a", Instant::now()).is_none());
        cache.forget(one);
        assert!(cache.get(one, b"a", Instant::now()).is_none());
        assert_eq!(cache.held(), 0);
    }

    #[test]
    fn a_busy_pod_pushes_out_its_own_oldest() {
        let cache = Cache::new(4);
        let (quiet, busy) = (cache.new_owner(), cache.new_owner());
        let now = Instant::now();
        cache.put(quiet, b"q", answer(now, 30));
        for name in 0..100u8 {
            cache.put(busy, &[name], answer(now, 30));
            cache.put(busy, &[name], answer(now, 30));
        }
        assert_eq!(cache.held(), 4);
        assert!(cache.get(quiet, b"q", now).is_some());
        assert!(cache.get(busy, &[96], now).is_none());
        assert!((97..100).all(|name| cache.get(busy, &[name], now).is_some()));
    }

    #[test]
    fn a_huge_answer_is_not_kept() {
        let cache = Cache::new(4);
        let owner = cache.new_owner();
        let mut huge = answer(Instant::now(), 30);
        huge.bytes = vec![0; LARGEST + 1].into();
        cache.put(owner, b"a", huge);
        assert_eq!(cache.held(), 0);
    }
}
