//! The one connection that may change things, and the events that go to it.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{Notify, mpsc};
use tokio::time::{Instant, timeout_at};

use super::failure::{Code, Failure};
use crate::wire::control as pb;

/// Empty most of its life without anything being wrong: events for nobody are dropped, because a new
/// agent learns the state from its Hello.
#[derive(Default)]
pub(super) struct AgentSlot {
    current: Mutex<Option<Current>>,
    freed: Notify,
}

struct Current {
    session: u64,
    pid: i32,
    events: mpsc::Sender<pb::Event>,
    /// Ends the session that doesn't read.
    too_slow: Arc<Notify>,
}

/// How long a new agent waits for the end of one that just died to be noticed.
const GRACE: Duration = Duration::from_secs(1);

impl AgentSlot {
    /// Becomes the agent. While another one lives, IN_USE.
    pub async fn claim(
        &self,
        session: u64,
        pid: i32,
        events: mpsc::Sender<pb::Event>,
        too_slow: Arc<Notify>,
    ) -> Result<(), Failure> {
        let deadline = Instant::now() + GRACE;
        loop {
            let freed = self.freed.notified();
            let holder = {
                let mut current = self.current.lock();
                match &*current {
                    Some(holder) => holder.pid,
                    None => {
                        *current = Some(Current {
                            session,
                            pid,
                            events,
                            too_slow,
                        });
                        return Ok(());
                    }
                }
            };
            if timeout_at(deadline, freed).await.is_err() {
                let text = format!("another agent (pid {holder}) is connected; stop it first");
                return Err(Failure::new(Code::InUse, "agent", text));
            }
        }
    }

    pub fn release(&self, session: u64) {
        let mut current = self.current.lock();
        if current.as_ref().is_some_and(|c| c.session == session) {
            *current = None;
            drop(current);
            self.freed.notify_waiters();
        }
    }

    /// Waits while the agent is behind, where `emit` cuts it off: for events that others make it
    /// send.
    pub async fn emit_in_turn(&self, event: pb::event::Event) {
        let events = self
            .current
            .lock()
            .as_ref()
            .map(|agent| agent.events.clone());
        let event = pb::Event { event: Some(event) };
        if let Some(events) = events {
            // Closed: nobody is there, and a new agent hears of it anyway.
            let _ = events.send(event).await;
        }
    }

    pub fn emit(&self, event: pb::event::Event) {
        let current = self.current.lock();
        let Some(agent) = &*current else { return };
        let event = pb::Event { event: Some(event) };
        if let Err(mpsc::error::TrySendError::Full(_)) = agent.events.try_send(event) {
            tracing::warn!(
                pid = agent.pid,
                "the agent doesn't read its events: cut off"
            );
            agent.too_slow.notify_one();
        }
    }
}
