//! The live connections of one pod.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};

use ahash::AHashMap;
use parking_lot::Mutex;

use super::connection::{Connection, Direction, Facts, Open};
use crate::telemetry::{Flush, Series, Telemetry};

/// Few collisions between workers, little memory for a pod without traffic.
const SHARDS: usize = 8;

/// Unique in the process, so that an id names one connection of the node.
static NEXT_ID: AtomicU64 = AtomicU64::new(1);

#[derive(Default)]
pub struct Registry {
    pub pod_uid: Arc<str>,
    shards: [Mutex<AHashMap<u64, Arc<Connection>>>; SHARDS],
    inbound: AtomicU32,
    outbound: AtomicU32,
    /// Accepted, open or not yet: what the limit is about.
    admitted: Arc<AtomicU32>,
    tunnels: Arc<AtomicU32>,
    handshakes: Arc<AtomicU32>,
}

/// A place below the pod's limit, given back when dropped.
#[derive(Debug)]
pub struct Permit(Arc<AtomicU32>);

impl Registry {
    pub fn of(pod_uid: &str) -> Self {
        Self {
            pod_uid: pod_uid.into(),
            ..Self::default()
        }
    }

    /// A connection or a stream. Err holds the limit.
    pub fn admit(&self, limit: u32) -> Result<Permit, u32> {
        Permit::take(&self.admitted, limit)
    }

    /// An inbound tunnel, from before its handshake: peers that only connect are bounded, too.
    pub fn admit_tunnel(&self, limit: u32) -> Result<Permit, u32> {
        Permit::take(&self.tunnels, limit)
    }

    /// A peer that hasn't proved who it is.
    pub fn admit_handshake(&self, limit: u32) -> Result<Permit, u32> {
        Permit::take(&self.handshakes, limit)
    }

    /// From here on the connection is listed, counted, and closed when policies say so.
    pub fn open(
        self: &Arc<Self>,
        facts: Facts,
        series: Arc<Series>,
        telemetry: &Arc<Telemetry>,
    ) -> Open {
        let direction = facts.direction;
        let gauge = match direction {
            Direction::Inbound => &telemetry.metrics.inbound_connections,
            Direction::Outbound => &telemetry.metrics.outbound_connections,
        };
        let id = NEXT_ID.fetch_add(1, Relaxed);
        let connection = Arc::new(Connection::new(id, facts, series, gauge.clone()));
        self.count(direction).fetch_add(1, Relaxed);
        self.shard(id).lock().insert(id, connection.clone());
        Open::new(connection, self.clone(), telemetry.clone())
    }

    pub(super) fn remove(&self, connection: &Connection) {
        if self
            .shard(connection.id)
            .lock()
            .remove(&connection.id)
            .is_some()
        {
            self.count(connection.facts.direction).fetch_sub(1, Relaxed);
        }
    }

    /// One shard after another: no lock is held while the caller works on them.
    pub fn each_shard(&self) -> impl Iterator<Item = Vec<Arc<Connection>>> + '_ {
        self.shards
            .iter()
            .map(|shard| shard.lock().values().cloned().collect())
    }

    /// (inbound, outbound)
    pub fn counts(&self) -> (u32, u32) {
        (self.inbound.load(Relaxed), self.outbound.load(Relaxed))
    }

    fn shard(&self, id: u64) -> &Mutex<AHashMap<u64, Arc<Connection>>> {
        // The remainder is below SHARDS.
        &self.shards[(id % SHARDS as u64) as usize]
    }

    fn count(&self, direction: Direction) -> &AtomicU32 {
        match direction {
            Direction::Inbound => &self.inbound,
            Direction::Outbound => &self.outbound,
        }
    }
}

impl Flush for Registry {
    fn flush(&self) {
        for connections in self.each_shard() {
            for connection in connections {
                connection.flush();
            }
        }
    }
}

impl Permit {
    fn take(used: &Arc<AtomicU32>, limit: u32) -> Result<Self, u32> {
        // Given back by its drop where the limit is reached.
        let permit = Self(used.clone());
        if used.fetch_add(1, Relaxed) < limit {
            Ok(permit)
        } else {
            Err(limit)
        }
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_given_back_and_refusals_take_none() {
        let registry = Registry::default();
        let first = registry.admit(1).unwrap();
        assert_eq!(registry.admit(1).unwrap_err(), 1);
        assert_eq!(registry.admit(1).unwrap_err(), 1);
        drop(first);
        assert!(registry.admit(1).is_ok());
    }
}
