//! What of the log may be changed while the process runs.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed};

use arc_swap::ArcSwap;

use super::access;
use crate::wire::control as pb;

/// Read by every connection, written by Configure.
#[derive(Debug)]
pub struct Settings {
    access_off: AtomicBool,
    /// One good end in so many leaves a line.
    sample: AtomicU32,
    good_ends: AtomicU32,
    policy_decisions: AtomicBool,
    /// Names of access log fields.
    omitted: ArcSwap<Vec<String>>,
}

impl Settings {
    pub fn new(log: &pb::LogConfig) -> Self {
        let settings = Self {
            access_off: AtomicBool::default(),
            sample: AtomicU32::new(1),
            good_ends: AtomicU32::default(),
            policy_decisions: AtomicBool::default(),
            omitted: ArcSwap::default(),
        };
        settings.store(log);
        settings
    }

    pub fn store(&self, log: &pb::LogConfig) {
        self.access_off.store(log.access_log_off, Relaxed);
        self.sample.store(log.sample_one_in.max(1), Relaxed);
        self.policy_decisions.store(log.policy_decisions, Relaxed);
        self.omitted.store(log.omit_fields.clone().into());
    }

    /// Whether a connection that ended well leaves a line. Counts it.
    pub fn tells_good_end(&self) -> bool {
        let one_in = self.sample.load(Relaxed);
        let turn = || self.good_ends.fetch_add(1, Relaxed).is_multiple_of(one_in);
        !self.access_off.load(Relaxed) && (one_in == 1 || turn())
    }

    /// Policy decisions are logged at info, else at debug (facts ztunnel 5.2).
    pub fn policy_decisions(&self) -> bool {
        self.policy_decisions.load(Relaxed)
    }

    pub fn omitted(&self) -> Omitted {
        Omitted(self.omitted.load())
    }
}

/// The fields to leave out, as of one moment.
pub struct Omitted(arc_swap::Guard<std::sync::Arc<Vec<String>>>);

impl Omitted {
    pub fn has(&self, name: &str) -> bool {
        self.0.iter().any(|omitted| omitted == name)
    }
}

/// Err names what isn't a field of the access log.
pub fn check_omitted(log: &pb::LogConfig) -> Result<(), String> {
    let unknown = |name: &&String| !access::FIELDS.contains(&name.as_str());
    match log.omit_fields.iter().find(unknown) {
        None => Ok(()),
        Some(name) => Err(format!(
            "`{name}` isn't a field of the access log; there are {}",
            access::FIELDS.join(", ")
        )),
    }
}
