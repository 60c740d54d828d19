//! Access log and one span a connection, sent to a collector by OTLP over gRPC. Connections never
//! wait for it: what doesn't fit into the queue, or can't be delivered in time, is dropped and
//! counted.

use std::time::Duration;

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;
use prost::Message;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep, timeout_at};

use crate::wire::otlp as pb;

mod grpc;
mod record;

#[cfg(test)]
mod tests;

use grpc::{Channel, Error};
pub use record::{End, Record, SpanIds};

const TRACES: &str = "/opentelemetry.proto.collector.trace.v1.TraceService/Export";
const LOGS: &str = "/opentelemetry.proto.collector.logs.v1.LogsService/Export";

/// What a busy node ends in about a second; some megabytes.
const QUEUE: usize = 4096;
const BATCH: usize = 512;
/// A batch leaves when it is full or its first record is this old.
const GATHER: Duration = Duration::from_secs(1);
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(15);
/// Then a batch is given up: newer ones tell more.
const GIVE_UP: Duration = Duration::from_secs(60);

/// By signal: `logs` or `traces`.
type BySignal = Family<[(&'static str, &'static str); 1], Counter>;

#[derive(Clone, Debug, Default)]
pub struct Counters {
    exported: BySignal,
    dropped: BySignal,
}

/// Cheap to clone.
#[derive(Clone, Debug)]
pub struct Exporter {
    queue: mpsc::Sender<Item>,
    counters: Counters,
}

#[derive(Debug)]
enum Item {
    Record(Box<Record>),
    /// Answered when everything before it was sent or given up.
    Flush(oneshot::Sender<()>),
}

struct Sender {
    authority: String,
    node: String,
    counters: Counters,
    channel: Option<Channel>,
    /// The last attempt failed: said once, not for each batch.
    failing: bool,
}

impl Counters {
    pub fn register(&self, registry: &mut Registry) {
        registry.register(
            "underpass_otlp_exported",
            "Spans and log records that the collector took (unstable)",
            self.exported.clone(),
        );
        registry.register(
            "underpass_otlp_dropped",
            "Spans and log records lost on the way to the collector (unstable)",
            self.dropped.clone(),
        );
    }
}

fn count(counters: &BySignal, signal: &'static str, many: usize) {
    let counter = counters.get_or_create(&[("signal", signal)]);
    counter.inc_by(many as u64);
}

impl Exporter {
    /// To the collector at `authority` (host:port). Needs a tokio context.
    pub fn start(authority: &str, node: &str, counters: Counters) -> Self {
        let (queue, items) = mpsc::channel(QUEUE);
        let sender = Sender {
            authority: authority.to_owned(),
            node: node.to_owned(),
            counters: counters.clone(),
            channel: None,
            failing: false,
        };
        tokio::spawn(sender.run(items));
        Self { queue, counters }
    }

    /// Never waits.
    pub fn export(&self, record: Record) {
        if let Err(error) = self.queue.try_send(Item::Record(Box::new(record))) {
            let (mpsc::error::TrySendError::Full(item) | mpsc::error::TrySendError::Closed(item)) =
                error;
            if let Item::Record(record) = item {
                count(&self.counters.dropped, "logs", 1);
                let spans = usize::from(record.span.is_some());
                count(&self.counters.dropped, "traces", spans);
            }
        }
    }

    /// For the end of the process.
    pub async fn flush(&self, patience: Duration) {
        let flushed = async {
            let (done, wait) = oneshot::channel();
            if self.queue.send(Item::Flush(done)).await.is_ok() {
                let _ = wait.await;
            }
        };
        let _ = tokio::time::timeout(patience, flushed).await;
    }
}

impl Sender {
    async fn run(mut self, mut items: mpsc::Receiver<Item>) {
        while let Some(first) = items.recv().await {
            let (mut spans, mut logs, mut flushes) = (Vec::new(), Vec::new(), Vec::new());
            let mut take = |item| match item {
                Item::Record(record) => {
                    spans.extend(record.span);
                    logs.push(record.log);
                    logs.len() >= BATCH
                }
                Item::Flush(done) => {
                    flushes.push(done);
                    true
                }
            };
            let deadline = Instant::now() + GATHER;
            let mut enough = take(first);
            while !enough && let Ok(Some(item)) = timeout_at(deadline, items.recv()).await {
                enough = take(item);
            }
            self.send("logs", LOGS, logs.len(), &self.logs(logs)).await;
            self.send("traces", TRACES, spans.len(), &self.traces(spans))
                .await;
            for done in flushes {
                let _ = done.send(());
            }
        }
    }

    async fn send(&mut self, signal: &'static str, path: &str, many: usize, batch: &impl Message) {
        if many == 0 {
            return;
        }
        let give_up = Instant::now() + GIVE_UP;
        let mut pause = FIRST_PAUSE;
        loop {
            let error = match self.attempt(path, batch).await {
                Ok(reply) => return self.taken(signal, many, reply),
                Err(error) => error,
            };
            let passing = error.is_passing();
            if passing {
                self.channel = None;
            }
            let collector = &self.authority;
            if !self.failing {
                self.failing = true;
                tracing::warn!(%error, collector, signal, "telemetry can't be exported");
            }
            if !passing || Instant::now() + pause > give_up {
                return count(&self.counters.dropped, signal, many);
            }
            // Half of it by chance, so that the nodes of a cluster don't come together.
            sleep(pause.mul_f64(rand::random_range(0.5..1.0))).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    async fn attempt(
        &mut self,
        path: &str,
        batch: &impl Message,
    ) -> Result<pb::ExportReply, Error> {
        let channel = match self.channel.take() {
            Some(channel) => channel,
            None => Channel::connect(&self.authority).await?,
        };
        self.channel.insert(channel).call(path, batch).await
    }

    fn taken(&mut self, signal: &'static str, many: usize, reply: pb::ExportReply) {
        let partial = reply.partial_success.unwrap_or_default();
        let rejected = usize::try_from(partial.rejected).unwrap_or(0).min(many);
        count(&self.counters.exported, signal, many - rejected);
        count(&self.counters.dropped, signal, rejected);
        if std::mem::take(&mut self.failing) {
            let collector = &self.authority;
            tracing::info!(collector, "telemetry is exported again");
        }
    }

    fn logs(&self, log_records: Vec<pb::LogRecord>) -> pb::ExportLogs {
        pb::ExportLogs {
            resource_logs: vec![pb::ResourceLogs {
                resource: Some(self.resource()),
                scope_logs: vec![pb::ScopeLogs {
                    scope: Some(scope()),
                    log_records,
                }],
            }],
        }
    }

    fn traces(&self, spans: Vec<pb::Span>) -> pb::ExportTraces {
        pb::ExportTraces {
            resource_spans: vec![pb::ResourceSpans {
                resource: Some(self.resource()),
                scope_spans: vec![pb::ScopeSpans {
                    scope: Some(scope()),
                    spans,
                }],
            }],
        }
    }

    fn resource(&self) -> pb::Resource {
        let attribute = |key: &str, value: &str| pb::KeyValue {
            key: key.into(),
            value: Some(record::text(value)),
        };
        pb::Resource {
            attributes: vec![
                attribute("service.name", "underpass"),
                attribute("service.version", env!("CARGO_PKG_VERSION")),
                attribute("k8s.node.name", &self.node),
            ],
        }
    }
}

fn scope() -> pb::Scope {
    pb::Scope {
        name: "underpass.access".into(),
        version: env!("CARGO_PKG_VERSION").into(),
    }
}
