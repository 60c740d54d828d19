//! Lets streams that are ready go before the connection that carries them.

use std::task::{Context, Poll};

/// The runtime runs whom a task wakes right after it: a connection would write after each stream
/// that has something to send. When its task waits for one round of the others, what they send
/// leaves together.
#[derive(Default)]
pub struct Gather {
    /// Had nothing to do, so something woke it since.
    idle: bool,
}

impl Gather {
    /// Polls `connection`, but only after the others when it was woken anew.
    pub fn poll<T>(
        &mut self,
        cx: &mut Context<'_>,
        connection: impl FnOnce(&mut Context<'_>) -> Poll<T>,
    ) -> Poll<T> {
        if std::mem::take(&mut self.idle) {
            // A task that wakes itself goes behind those that wait.
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let result = connection(cx);
        self.idle = result.is_pending();
        result
    }
}

#[cfg(test)]
mod tests {
    use std::future::{Future, poll_fn};
    use std::pin::pin;
    use std::sync::Arc;

    use parking_lot::Mutex;
    use tokio::sync::Notify;

    use super::*;

    /// One worker, whose tasks run whom they wake right after themselves.
    #[tokio::test(flavor = "multi_thread", worker_threads = 1)]
    async fn a_connection_writes_once_for_all_streams_that_are_ready() {
        let log = Arc::new(Mutex::new(Vec::new()));
        let sent = Arc::new(Notify::new());
        let (writes, wake) = (log.clone(), sent.clone());
        let connection = tokio::spawn(async move {
            let mut gather = Gather::default();
            for _ in 0..2 {
                let mut notified = pin!(wake.notified());
                poll_fn(|cx| gather.poll(cx, |cx| notified.as_mut().poll(cx))).await;
                writes.lock().push("write");
            }
        });
        sent.notify_one();
        while log.lock().is_empty() {
            tokio::task::yield_now().await;
        }
        let (streams, done) = (log.clone(), sent.clone());
        // From a task, so that both are ready before either runs.
        tokio::spawn(async move {
            for _ in 0..2 {
                let (log, sent) = (streams.clone(), done.clone());
                tokio::spawn(async move {
                    log.lock().push("send");
                    sent.notify_one();
                });
            }
        });
        connection.await.unwrap();
        assert_eq!(*log.lock(), ["write", "send", "send", "write"]);
    }
}
