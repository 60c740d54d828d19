//! The process's file descriptors, shared among its pods: one that takes all it can get leaves
//! enough for the others.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use rustix::process::{Resource, getrlimit};

/// A pod may hold this many times what is left for everybody: alone three quarters, and several
/// that want all get equal parts, with one part left over.
const GREED: usize = 3;

/// Sockets of connections and tunnels. An eighth of what the process may open is kept for
/// listeners, namespaces and the process itself.
#[derive(Debug)]
pub struct Descriptors {
    budget: usize,
    used: AtomicUsize,
}

/// One pod's part.
#[derive(Debug)]
pub struct Share {
    node: Arc<Descriptors>,
    used: AtomicUsize,
}

/// So many sockets, given back when dropped.
#[derive(Debug)]
pub struct Held {
    share: Arc<Share>,
    sockets: usize,
}

#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "the pod holds {held} sockets and only {free} of the data plane's {budget} are free: raise its \
     limit of open files (RLIMIT_NOFILE)"
)]
pub struct NoneFree {
    held: usize,
    free: usize,
    budget: usize,
}

impl Descriptors {
    /// Of this process, as its limit is now.
    pub fn of_process() -> Arc<Self> {
        let limit = getrlimit(Resource::Nofile).current;
        let limit = limit.map_or(usize::MAX, |limit| {
            usize::try_from(limit).unwrap_or(usize::MAX)
        });
        Self::new(limit - limit / 8)
    }

    pub fn new(budget: usize) -> Arc<Self> {
        Arc::new(Self {
            budget,
            used: AtomicUsize::new(0),
        })
    }

    pub fn share(self: &Arc<Self>) -> Arc<Share> {
        Arc::new(Share {
            node: self.clone(),
            used: AtomicUsize::new(0),
        })
    }

    pub fn used(&self) -> usize {
        self.used.load(Relaxed)
    }
}

impl Share {
    /// Before the sockets are opened, or right after they were accepted.
    pub fn take(self: &Arc<Self>, sockets: usize) -> Result<Held, NoneFree> {
        let budget = self.node.budget;
        let used = self.node.used.fetch_add(sockets, Relaxed) + sockets;
        let held = self.used.fetch_add(sockets, Relaxed) + sockets;
        // Given back by its drop where it is too much.
        let taken = Held {
            share: self.clone(),
            sockets,
        };
        let free = budget.saturating_sub(used);
        match held <= free.saturating_mul(GREED) {
            true => Ok(taken),
            false => Err(NoneFree {
                held: held - sockets,
                free: free.saturating_add(sockets).min(budget),
                budget,
            }),
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.share.used.fetch_sub(self.sockets, Relaxed);
        self.share.node.used.fetch_sub(self.sockets, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all_it_gets(share: &Arc<Share>) -> Vec<Held> {
        std::iter::from_fn(|| share.take(1).ok()).collect()
    }

    #[test]
    fn a_pod_that_takes_all_it_can_leaves_a_quarter_and_gives_everything_back() {
        let node = Descriptors::new(1000);
        let (greedy, other) = (node.share(), node.share());
        let held = all_it_gets(&greedy);
        assert_eq!(held.len(), 750);
        assert!(greedy.take(1).is_err());
        let few: Vec<_> = (0..100).map(|_| other.take(1).expect("free")).collect();
        assert!(greedy.take(1).is_err());
        drop(few);
        drop(held);
        assert_eq!(node.used(), 0);
        assert_eq!(all_it_gets(&other).len(), 750);
    }

    #[test]
    fn several_greedy_pods_get_equal_parts_and_leave_one_to_the_next() {
        let node = Descriptors::new(1000);
        let shares: Vec<_> = (0..5).map(|_| node.share()).collect();
        let mut held = Vec::new();
        let mut round = || {
            let taken: Vec<_> = shares.iter().flat_map(|share| share.take(1)).collect();
            let any = !taken.is_empty();
            held.extend(taken);
            any
        };
        while round() {}
        for share in &shares {
            // Three of sixteen parts each, give or take the last round.
            assert!((187..=188).contains(&share.used.load(Relaxed)));
        }
        assert!(all_it_gets(&node.share()).len() >= 45);
    }

    #[test]
    fn a_refusal_says_who_holds_how_many() {
        let share = Descriptors::new(8).share();
        let _held = share.take(6).expect("three quarters");
        let refused = share.take(1).unwrap_err().to_string();
        assert!(refused.contains("holds 6 sockets and only 2"), "{refused}");
    }
}
