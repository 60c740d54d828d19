//! What is asked of the control plane by name, because not everything is sent (facts ztunnel 7.6).
//!
//! A name is asked once and stays subscribed; whoever needs it waits until a response names it, as a
//! resource, an alias of one, or a removal. Names are never forgotten, so each asker has a budget of
//! them: istiod answers a request that takes one back by removing all (facts istio-ambient 6).

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;

/// Of all askers, gone ones included: with the agent's copy some 40 MB.
const MOST_NAMES: usize = 131_072;

/// A control plane that knows nothing of one name may leave it unanswered.
const SILENT_AFTER: u32 = 3;

/// Names that one asker may add for the life of the process.
#[derive(Debug)]
pub struct Budget {
    limit: u32,
    spent: AtomicU32,
}

/// How a wait for a name ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Told {
    /// What there is to know of it is in the snapshot.
    Answered,
    /// Not within the time; nobody waits for it again before the next response.
    TimedOut,
    /// The asker, or all of them together, have used up their names.
    Full,
}

pub struct Demand {
    names: Mutex<HashMap<Arc<str>, Asked>>,
    most: usize,
    /// How many responses were processed.
    responses: watch::Sender<u64>,
    /// Waits that timed out since the last of them.
    unanswered: AtomicU32,
    wanted: mpsc::UnboundedSender<Arc<str>>,
    /// Taken by the one that tells the agent. It holds no more names than the budgets allow.
    queue: Mutex<Option<mpsc::UnboundedReceiver<Arc<str>>>>,
}

#[derive(Clone, Copy)]
enum Asked {
    Waiting,
    /// No answer by this many responses.
    GivenUp(u64),
    Answered,
}

impl Budget {
    pub const fn new(limit: u32) -> Self {
        Self {
            limit,
            spent: AtomicU32::new(0),
        }
    }

    fn spend(&self) -> bool {
        let more = |spent| (spent < self.limit).then_some(spent + 1);
        self.spent.fetch_update(Relaxed, Relaxed, more).is_ok()
    }
}

impl Demand {
    /// Resolves once the name was answered for, or it makes no sense to wait any longer.
    pub async fn wait(&self, name: &str, patience: Duration, budget: &Budget) -> Told {
        // Subscribed before the look: a response between the two isn't missed.
        let mut responses = self.responses.subscribe();
        let now = *responses.borrow_and_update();
        match self.ask(name, now, budget) {
            Ok(Asked::Waiting) => {}
            Ok(Asked::Answered) => return Told::Answered,
            Ok(Asked::GivenUp(_)) => return Told::TimedOut,
            Err(full) => return full,
        }
        let answered = async {
            while !matches!(self.names.lock().get(name), Some(Asked::Answered)) {
                if responses.changed().await.is_err() {
                    std::future::pending().await
                }
            }
        };
        if timeout(patience, answered).await.is_ok() {
            return Told::Answered;
        }
        let mut names = self.names.lock();
        match names.get_mut(name) {
            Some(Asked::Answered) => Told::Answered,
            Some(asked) => {
                self.unanswered.fetch_add(1, Relaxed);
                *asked = Asked::GivenUp(*self.responses.borrow());
                Told::TimedOut
            }
            None => Told::TimedOut,
        }
    }

    /// Nothing was answered for a while: the control plane may be away.
    pub fn is_silent(&self) -> bool {
        self.unanswered.load(Relaxed) >= SILENT_AFTER
    }

    /// For somebody who waits elsewhere for what comes.
    pub fn want(&self, name: &str, budget: &Budget) {
        let now = *self.responses.borrow();
        // Without budget, what comes unasked has to do.
        let _ = self.ask(name, now, budget);
    }

    fn ask(&self, name: &str, now: u64, budget: &Budget) -> Result<Asked, Told> {
        let mut names = self.names.lock();
        if let Some(asked) = names.get_mut(name) {
            if matches!(asked, Asked::GivenUp(then) if *then != now) {
                *asked = Asked::Waiting;
            }
            return Ok(*asked);
        }
        if names.len() >= self.most || !budget.spend() {
            return Err(Told::Full);
        }
        let name: Arc<str> = name.into();
        names.insert(name.clone(), Asked::Waiting);
        // Nobody listens in tests only.
        let _ = self.wanted.send(name);
        Ok(Asked::Waiting)
    }

    /// A response was processed that names these.
    pub(super) fn answered<'a>(&self, told: impl Iterator<Item = &'a str>) {
        {
            let mut names = self.names.lock();
            for name in told {
                if let Some(asked) = names.get_mut(name) {
                    *asked = Asked::Answered;
                }
            }
        }
        self.unanswered.store(0, Relaxed);
        self.responses.send_modify(|count| *count += 1);
    }

    /// Names as they become wanted; for one reader.
    pub fn take_wanted(&self) -> Option<mpsc::UnboundedReceiver<Arc<str>>> {
        self.queue.lock().take()
    }

    /// All names that were ever asked: for an agent that has to subscribe anew.
    pub fn names(&self) -> Vec<Arc<str>> {
        self.names.lock().keys().cloned().collect()
    }
}

impl Default for Demand {
    fn default() -> Self {
        let (wanted, queue) = mpsc::unbounded_channel();
        Self {
            names: Mutex::default(),
            most: MOST_NAMES,
            responses: watch::Sender::new(0),
            unanswered: AtomicU32::new(0),
            wanted,
            queue: Mutex::new(Some(queue)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    fn drained(queue: &mut mpsc::UnboundedReceiver<Arc<str>>) -> Vec<String> {
        std::iter::from_fn(|| queue.try_recv().ok())
            .map(|name| name.to_string())
            .collect()
    }

    #[tokio::test(start_paused = true)]
    async fn many_who_want_one_name_ask_once_and_all_are_woken() {
        let demand = Arc::new(Demand::default());
        let mut queue = demand.take_wanted().unwrap();
        let budget = Arc::new(Budget::new(9));
        let waiting: Vec<_> = (0..5)
            .map(|_| {
                let (demand, budget) = (demand.clone(), budget.clone());
                tokio::spawn(async move { demand.wait("net/10.0.0.1", LONG, &budget).await })
            })
            .collect();
        tokio::task::yield_now().await;
        demand.answered(["another"].into_iter());
        tokio::task::yield_now().await;
        assert!(waiting.iter().all(|task| !task.is_finished()));
        demand.answered(["net/10.0.0.1"].into_iter());
        for task in waiting {
            assert_eq!(task.await.unwrap(), Told::Answered);
        }
        let again = demand.wait("net/10.0.0.1", LONG, &budget).await;
        assert_eq!(again, Told::Answered, "without asking or waiting");
        assert_eq!(drained(&mut queue), ["net/10.0.0.1"]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_wait_ends_and_nobody_waits_again_before_the_next_response() {
        let demand = Demand::default();
        let budget = Budget::new(9);
        let began = tokio::time::Instant::now();
        let wait = || demand.wait("a/b", Duration::from_secs(5), &budget);
        assert_eq!(wait().await, Told::TimedOut);
        assert_eq!(began.elapsed().as_secs(), 5);
        assert_eq!(wait().await, Told::TimedOut);
        assert_eq!(began.elapsed().as_secs(), 5, "at once");
        demand.answered(["other"].into_iter());
        assert_eq!(wait().await, Told::TimedOut);
        assert_eq!(began.elapsed().as_secs(), 10, "worth waiting again");
        demand.answered(["a/b"].into_iter());
        assert_eq!(wait().await, Told::Answered, "a late answer counts");
    }

    #[tokio::test(start_paused = true)]
    async fn all_askers_together_are_bounded_and_what_was_asked_stays() {
        let demand = Demand {
            most: 1,
            ..Demand::default()
        };
        let budget = Budget::new(9);
        demand.want("a", &budget);
        assert_eq!(demand.wait("b", LONG, &budget).await, Told::Full);
        demand.answered(["a"].into_iter());
        assert_eq!(demand.wait("a", LONG, &budget).await, Told::Answered);
    }

    #[tokio::test(start_paused = true)]
    async fn an_asker_has_so_many_names_and_others_have_their_own() {
        let demand = Demand::default();
        let mut queue = demand.take_wanted().unwrap();
        let (greedy, modest) = (Budget::new(2), Budget::new(1));
        let soon = Duration::from_millis(1);
        for name in ["a", "b", "a"] {
            assert_eq!(demand.wait(name, soon, &greedy).await, Told::TimedOut);
        }
        assert_eq!(demand.wait("c", LONG, &greedy).await, Told::Full);
        assert_eq!(demand.wait("c", soon, &modest).await, Told::TimedOut);
        assert_eq!(drained(&mut queue), ["a", "b", "c"]);
        let mut names = demand.names();
        names.sort();
        assert!(names.iter().map(|name| &**name).eq(["a", "b", "c"]));
    }
}
