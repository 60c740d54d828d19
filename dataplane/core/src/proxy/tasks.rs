//! The tasks of one pod: counted, cut together, and unable to take others down with them.

use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use futures_util::FutureExt;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use tokio::sync::{Notify, watch};

/// Dropping it doesn't end the tasks; `cut` does.
pub struct Tasks {
    alive: Arc<Alive>,
    cut: watch::Sender<bool>,
    panics: Counter,
}

#[derive(Default)]
struct Alive {
    count: AtomicUsize,
    none: Notify,
}

/// Counts as a live task until dropped.
struct Guard(Arc<Alive>);

/// One in a gauge until dropped.
struct Counted(Gauge);

impl Tasks {
    pub fn new(panics: Counter) -> Self {
        Self {
            alive: Arc::default(),
            cut: watch::Sender::new(false),
            panics,
        }
    }

    /// Counted in `open` as long as the work lives.
    pub fn spawn_counted(&self, open: &Gauge, work: impl Future<Output = ()> + Send + 'static) {
        self.run(Some(Counted::new(open)), work);
    }

    /// A panic ends this task only; it is counted and logged. After `cut` nothing runs any more.
    pub fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) {
        self.run(None, work);
    }

    fn run(&self, open: Option<Counted>, work: impl Future<Output = ()> + Send + 'static) {
        let guard = Guard::new(&self.alive);
        let mut cut = self.cut.subscribe();
        let panics = self.panics.clone();
        // Boxed, or its size would count twice: captured, and moved into the select.
        let mut work = Box::pin(AssertUnwindSafe(work).catch_unwind());
        tokio::spawn(async move {
            // Outlives the work, so that "none is left" means that all work was dropped.
            let _guards = (guard, open);
            tokio::select! {
                biased;
                // Only fails when the set is gone, and then nobody can cut.
                Ok(_) = cut.wait_for(|cut| *cut) => {}
                result = &mut work => if let Err(panic) = result {
                    panics.inc();
                    let text = panic
                        .downcast_ref::<&str>()
                        .map(|text| (*text).to_owned())
                        .or_else(|| panic.downcast_ref::<String>().cloned())
                        .unwrap_or_default();
                    tracing::error!(panic = text, "a defect ended a connection");
                },
            }
            drop(work);
        });
    }

    /// Drops the work of all tasks, those to come included.
    pub fn cut(&self) {
        self.cut.send_replace(true);
    }

    pub async fn none_left(&self) {
        loop {
            let notified = self.alive.none.notified();
            tokio::pin!(notified);
            // Registered before looking, or the last end could be missed.
            notified.as_mut().enable();
            if self.alive.count.load(Ordering::Acquire) == 0 {
                return;
            }
            notified.await;
        }
    }
}

impl Counted {
    fn new(gauge: &Gauge) -> Self {
        gauge.inc();
        Self(gauge.clone())
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.dec();
    }
}

impl Guard {
    fn new(alive: &Arc<Alive>) -> Self {
        alive.count.fetch_add(1, Ordering::Relaxed);
        Self(alive.clone())
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        if self.0.count.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.0.none.notify_waiters();
        }
    }
}

/// Refuses to compile where a connection's future outgrows what we want to pay for each.
pub fn sized<const BYTES: usize, F: Future<Output = ()>>(future: F) -> F {
    const {
        assert!(size_of::<F>() <= BYTES, "the future of a connection grew");
    }
    future
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_panic_ends_one_task_and_is_counted() {
        let panics = Counter::default();
        let tasks = Tasks::new(panics.clone());
        let (done, wait) = tokio::sync::oneshot::channel();
        tasks.spawn(async { panic!("on purpose") });
        tasks.spawn(async move {
            let _ = done.send(());
        });
        wait.await.unwrap();
        tasks.none_left().await;
        assert_eq!(panics.get(), 1);
    }

    #[tokio::test]
    async fn cut_drops_the_work_before_none_is_left() {
        let tasks = Tasks::new(Counter::default());
        let work = Arc::new(());
        for _ in 0..100 {
            let held = work.clone();
            tasks.spawn(async move {
                let _held = held;
                std::future::pending().await
            });
        }
        tokio::task::yield_now().await;
        tasks.cut();
        tasks.none_left().await;
        assert_eq!(Arc::strong_count(&work), 1);
        let late = work.clone();
        tasks.spawn(async move {
            let _late = late;
            std::future::pending().await
        });
        tasks.none_left().await;
        assert_eq!(Arc::strong_count(&work), 1);
    }
}
