//! Metrics and the access log (facts ztunnel 12).

use std::io::Write;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use parking_lot::Mutex;
use tracing::Subscriber;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::{Registry, reload};

use crate::wire::control as pb;

pub mod access;
mod bounds;
mod dns;
mod format;
mod labels;
mod metrics;
mod traffic;
mod verdicts;
mod writer;

#[cfg(test)]
mod tests;

pub use bounds::Bounds;
pub use dns::{DnsLabels, DnsMetrics, DnsSeries};
pub use labels::{Flags, Labels, Reporter, Side};
pub use metrics::Metrics;
pub use traffic::Series;
pub use verdicts::{Happened, KEPT, Verdicts};

use format::{Format, Lines};
use writer::LineWriter;

/// Gives its unflushed counts to the metrics; called before each scrape.
pub trait Flush: Send + Sync {
    fn flush(&self);
}

/// Counters of the process, and its log settings.
pub struct Telemetry {
    pub metrics: Metrics,
    pub verdicts: Verdicts,
    live: Mutex<Vec<std::sync::Weak<dyn Flush>>>,
    filter: reload::Handle<Targets, Registry>,
    access_off: AtomicBool,
    writer: Option<LineWriter>,
}

impl Telemetry {
    /// Installs the process's tracing subscriber when `install` is set (once a process). A bad
    /// filter is reported in the log and replaced by `info`.
    pub fn new(log: &pb::LogConfig, install: bool) -> Arc<Self> {
        if !install {
            return Self::build(log, None).0;
        }
        let (telemetry, subscriber) = Self::build(log, Some(Box::new(std::io::stdout())));
        if tracing::subscriber::set_global_default(subscriber).is_err() {
            tracing::warn!("a log subscriber was installed before; log settings have no effect");
        }
        if let Err(text) = parse_filter(&log.filter) {
            tracing::error!(
                filter = log.filter,
                error = text,
                "bad log filter, using info"
            );
        }
        telemetry
    }

    /// Apart from the process's own output, for tests.
    fn build(
        log: &pb::LogConfig,
        output: Option<Box<dyn Write + Send>>,
    ) -> (Arc<Self>, Box<dyn Subscriber + Send + Sync>) {
        let metrics = Metrics::new();
        let filter = parse_filter(&log.filter).unwrap_or_else(|_| default_filter());
        let (filter, handle) = reload::Layer::new(filter);
        // Without a thread there is no log, but the proxy must go on.
        let writer = output
            .and_then(|output| LineWriter::new(output, metrics.log_lines_dropped.clone()).ok());
        let lines = writer.clone().map(|writer| Lines {
            format: match log.format() {
                pb::log_config::Format::Text => Format::Text,
                pb::log_config::Format::Json => Format::Json,
            },
            writer,
        });
        let subscriber = Registry::default().with(filter).with(lines);
        let telemetry = Arc::new(Self {
            metrics,
            verdicts: Verdicts::default(),
            live: Mutex::default(),
            filter: handle,
            access_off: AtomicBool::new(log.access_log_off),
            writer,
        });
        (telemetry, Box::new(subscriber))
    }

    /// Changes format-independent settings live: filter, access log on or off. Err names a bad
    /// filter directive and changes nothing.
    pub fn configure(&self, log: &pb::LogConfig) -> Result<(), String> {
        let filter = parse_filter(&log.filter)?;
        // Fails only where no subscriber was installed, and then there is nothing to filter.
        let _ = self.filter.reload(filter);
        self.access_off.store(log.access_log_off, Relaxed);
        Ok(())
    }

    /// OpenMetrics text, ending with `# EOF\n`.
    pub fn encode(&self) -> String {
        let live: Vec<_> = {
            let mut live = self.live.lock();
            live.retain(|source| source.strong_count() > 0);
            live.iter().filter_map(std::sync::Weak::upgrade).collect()
        };
        for source in live {
            source.flush();
        }
        // Writing to a String doesn't fail; a collector's own error would leave the text cut.
        self.metrics.encode().unwrap_or_else(|_| "# EOF\n".into())
    }

    /// `source` is asked for its counts before each scrape, as long as it lives.
    pub fn before_scrape(&self, source: std::sync::Weak<dyn Flush>) {
        let mut live = self.live.lock();
        live.retain(|source| source.strong_count() > 0);
        live.push(source);
    }

    /// Connections that end well leave no line.
    pub fn access_log_off(&self) -> bool {
        self.access_off.load(Relaxed)
    }

    /// Writes out what the log still holds, for the end of the process. Blocks at most `patience`.
    pub fn flush_log(&self, patience: Duration) {
        if let Some(writer) = &self.writer {
            writer.flush(patience);
        }
    }

    /// A subscriber that writes to `output` instead of the process's, and the telemetry behind it.
    #[cfg(test)]
    pub fn for_test(
        log: &pb::LogConfig,
        output: Box<dyn Write + Send>,
    ) -> (Arc<Self>, Box<dyn Subscriber + Send + Sync>) {
        Self::build(log, Some(output))
    }
}

fn default_filter() -> Targets {
    Targets::new().with_default(tracing::Level::INFO)
}

/// facts ztunnel 12.5: `level` or `target=level`, comma separated.
fn parse_filter(text: &str) -> Result<Targets, String> {
    if text.trim().is_empty() {
        return Ok(default_filter());
    }
    for directive in text.split(',').map(str::trim) {
        let level = directive
            .rsplit_once('=')
            .map_or(directive, |(_, level)| level);
        let known = ["off", "error", "warn", "info", "debug", "trace"];
        if !known.contains(&level.to_ascii_lowercase().as_str()) {
            return Err(format!(
                "`{directive}` isn't a log filter: say LEVEL or TARGET=LEVEL, with one of {}",
                known.join(", ")
            ));
        }
    }
    Targets::from_str(text).map_err(|error| format!("`{text}` isn't a log filter: {error}"))
}
