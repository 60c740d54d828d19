//! What the tests of the real process share: pods in namespaces of their own, the process itself,
//! a client of its socket, and a CA.
#![allow(dead_code)] // each test binary uses its part

pub mod ca;
pub mod client;
pub mod netns;
pub mod process;
pub mod records;

use std::time::{Duration, Instant};

pub const PATIENCE: Duration = Duration::from_secs(10);

/// Waits for a condition instead of for a time.
pub fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < end, "never: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}
