//! The last refusals and failures of the process, for whoever asks why. Equal ones are one entry
//! with a count; where there are too many, the pod that has most loses its oldest, so that no pod
//! pushes out what another one needs to know.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use parking_lot::Mutex;
use prometheus_client::metrics::counter::Counter;

use crate::policy::now_ms;
use crate::wire::control as pb;

/// Of the whole process: half a megabyte at most.
pub const KEPT: usize = 1024;

/// Bytes of a cause, which may quote what a peer or the control plane said.
const LONGEST: usize = 400;

/// What happened; all of it equal is the same happening again.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Happened {
    pub inbound: bool,
    /// Clients take a new port each time.
    pub src: Option<IpAddr>,
    pub dst: String,
    pub src_identity: String,
    /// `namespace/name`, as the next two where it is known.
    pub src_workload: String,
    pub dst_workload: String,
    pub dst_service: String,
    pub flag: String,
    pub cause: String,
    /// Resource name of the deciding policy, "" where none decided.
    pub policy: String,
    pub rule: Option<usize>,
    pub remedy: &'static str,
}

#[derive(Default)]
pub struct Verdicts {
    kept: Mutex<Kept>,
    forgotten: Counter,
}

#[derive(Default)]
struct Kept {
    pods: HashMap<Arc<str>, OfPod, ahash::RandomState>,
    /// In all pods.
    len: usize,
    /// Grows with each verdict: the order of their last times.
    turn: u64,
}

#[derive(Default)]
struct OfPod {
    seen: HashMap<Arc<Happened>, Seen, ahash::RandomState>,
    by_turn: BTreeMap<u64, Arc<Happened>>,
}

struct Seen {
    turn: u64,
    time_ms: i64,
    src: SocketAddr,
    count: u64,
}

impl Verdicts {
    /// In this counter: those that were pushed out.
    pub fn counting(forgotten: &Counter) -> Self {
        Self {
            kept: Mutex::default(),
            forgotten: forgotten.clone(),
        }
    }

    pub fn put(&self, pod: &Arc<str>, src: SocketAddr, mut happened: Happened) {
        if happened.cause.len() > LONGEST {
            let boundary = |at: &usize| happened.cause.is_char_boundary(*at);
            let end = (0..=LONGEST).rev().find(boundary).unwrap_or(0);
            happened.cause.truncate(end);
            happened.cause.push('…');
        }
        let mut kept = self.kept.lock();
        kept.turn += 1;
        let turn = kept.turn;
        let of_pod = kept.pods.entry(pod.clone()).or_default();
        if of_pod.put(turn, src, happened) {
            kept.len += 1;
        }
        if kept.len > KEPT {
            kept.drop_one();
            self.forgotten.inc();
        }
    }

    /// Newest first, "" for all pods, and how many were pushed out.
    pub fn list(&self, pod: &str, limit: usize) -> (Vec<pb::Verdict>, u64) {
        let kept = self.kept.lock();
        let pods = kept.pods.iter();
        let wanted = pods.filter(|(uid, _)| pod.is_empty() || ***uid == *pod);
        let entries = wanted.flat_map(|(uid, of)| of.seen.iter().map(move |(h, s)| (uid, h, s)));
        let mut entries: Vec<_> = entries.collect();
        entries.sort_by_key(|(_, _, seen)| std::cmp::Reverse(seen.turn));
        let told = entries.into_iter().take(limit);
        let told = told.map(|(uid, happened, seen)| happened.tell(uid, seen));
        (told.collect(), self.forgotten.get())
    }
}

impl Kept {
    fn drop_one(&mut self) {
        let of_pod = self.pods.values_mut().max_by_key(|of| of.seen.len());
        let oldest = of_pod.and_then(|of| {
            let (_, oldest) = of.by_turn.pop_first()?;
            of.seen.remove(&oldest)
        });
        if oldest.is_some() {
            self.len -= 1;
        }
        self.pods.retain(|_, of| !of.seen.is_empty());
    }
}

impl OfPod {
    /// True for a new one.
    fn put(&mut self, turn: u64, src: SocketAddr, happened: Happened) -> bool {
        let time_ms = now_ms();
        if let Some(seen) = self.seen.get_mut(&happened) {
            let same = self.by_turn.remove(&seen.turn);
            self.by_turn
                .insert(turn, same.unwrap_or_else(|| Arc::new(happened)));
            let count = seen.count + 1;
            *seen = Seen {
                turn,
                time_ms,
                src,
                count,
            };
            return false;
        }
        let happened = Arc::new(happened);
        self.by_turn.insert(turn, happened.clone());
        let count = 1;
        let seen = Seen {
            turn,
            time_ms,
            src,
            count,
        };
        self.seen.insert(happened, seen);
        true
    }
}

impl Happened {
    fn tell(&self, pod: &str, seen: &Seen) -> pb::Verdict {
        use pb::connection::Direction;
        let direction = match self.inbound {
            true => Direction::Inbound,
            false => Direction::Outbound,
        };
        pb::Verdict {
            time_ms: seen.time_ms,
            pod_uid: pod.to_owned(),
            direction: direction.into(),
            src: seen.src.to_string(),
            dst: self.dst.clone(),
            src_identity: self.src_identity.clone(),
            src_workload: self.src_workload.clone(),
            dst_workload: self.dst_workload.clone(),
            dst_service: self.dst_service.clone(),
            flag: self.flag.clone(),
            cause: self.cause.clone(),
            policy: self.policy.clone(),
            // A policy of so many rules isn't there.
            rule: self
                .rule
                .and_then(|rule| i32::try_from(rule).ok())
                .unwrap_or(-1),
            count: seen.count,
            remedy: self.remedy.to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn happened(cause: impl Into<String>) -> Happened {
        Happened {
            cause: cause.into(),
            ..Default::default()
        }
    }

    fn src(port: u16) -> SocketAddr {
        ([10, 0, 0, 1], port).into()
    }

    fn put(verdicts: &Verdicts, pod: &str, cause: impl Into<String>) {
        verdicts.put(&pod.into(), src(1), happened(cause));
    }

    #[test]
    fn the_same_again_is_counted_and_comes_first() {
        let verdicts = Verdicts::default();
        put(&verdicts, "a", "x");
        put(&verdicts, "b", "y");
        verdicts.put(&"a".into(), src(2), happened("x"));
        let (told, lost) = verdicts.list("", KEPT);
        let shown: Vec<_> = told
            .iter()
            .map(|v| (&*v.pod_uid, &*v.cause, v.count))
            .collect();
        assert_eq!(shown, [("a", "x", 2), ("b", "y", 1)]);
        assert_eq!(told[0].src, "10.0.0.1:2", "of the last time");
        assert_eq!(lost, 0);
        assert_eq!(verdicts.list("", 1).0.len(), 1);
        assert_eq!(verdicts.list("b", KEPT).0.len(), 1);
        assert_eq!(verdicts.list("c", KEPT).0, []);
    }

    #[test]
    fn a_busy_pod_pushes_out_its_own_only() {
        let verdicts = Verdicts::default();
        put(&verdicts, "quiet", "needed");
        for number in 0..2 * KEPT {
            put(&verdicts, "busy", number.to_string());
        }
        let (told, lost) = verdicts.list("", usize::MAX);
        assert_eq!((told.len(), lost), (KEPT, KEPT as u64 + 1));
        assert_eq!(told[0].cause, (2 * KEPT - 1).to_string());
        assert_eq!(told.last().map(|v| &*v.cause), Some("needed"));
        for pod in 0..2 * KEPT {
            put(&verdicts, &pod.to_string(), "one each");
        }
        assert_eq!(verdicts.list("", usize::MAX).0.len(), KEPT);
        assert!(verdicts.kept.lock().pods.len() <= KEPT);
    }

    #[test]
    fn a_long_cause_is_cut_between_characters() {
        let verdicts = Verdicts::default();
        put(&verdicts, "a", "ü".repeat(LONGEST));
        let cause = &verdicts.list("", 1).0[0].cause;
        assert!(cause.len() <= LONGEST + '…'.len_utf8());
        assert!(cause.starts_with("üü") && cause.ends_with("ü…"));
    }
}
