//! How often a policy decided. Lives with the policy and outlives its versions, so that counting
//! needs no lookup and a policy that is gone takes its counts along.

use std::sync::atomic::{AtomicI64, AtomicU64, Ordering::Relaxed};
use std::time::{SystemTime, UNIX_EPOCH};

#[derive(Debug, Default)]
pub struct Hits {
    decided: AtomicU64,
    dry_run: AtomicU64,
    last_ms: AtomicI64,
}

impl Hits {
    /// An ALLOW that let a connection in, or a DENY that refused one.
    pub fn decided(&self) {
        self.decided.fetch_add(1, Relaxed);
        self.last_ms.store(now_ms(), Relaxed);
    }

    /// It would have decided.
    pub fn would_decide(&self) {
        self.dry_run.fetch_add(1, Relaxed);
        self.last_ms.store(now_ms(), Relaxed);
    }

    /// (decided, in dry-run, Unix milliseconds of the last or 0)
    pub fn counts(&self) -> (u64, u64, i64) {
        let last = self.last_ms.load(Relaxed);
        (self.decided.load(Relaxed), self.dry_run.load(Relaxed), last)
    }
}

pub fn now_ms() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    // A clock before 1970 counts as never.
    since.map_or(0, |since| {
        i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
    })
}
