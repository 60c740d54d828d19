//! Metrics and the access log (facts ztunnel 12).

use std::io::Write;
use std::str::FromStr;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use parking_lot::Mutex;
use tracing::Subscriber;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::{Registry, reload};

use crate::config::TelemetryConfig;
use crate::wire::control as pb;

pub mod access;
mod bounds;
mod counts;
mod dns;
mod format;
mod labels;
mod metrics;
mod on_demand;
pub mod otlp;
mod process;
mod settings;
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
use settings::Settings;
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
    pub settings: Arc<Settings>,
    writer: Option<LineWriter>,
    exporter: OnceLock<otlp::Exporter>,
}

impl Telemetry {
    /// Installs the process's tracing subscriber when `install` is set (once a process). A bad
    /// filter is reported in the log and replaced by `info`.
    pub fn new(log: &pb::LogConfig, config: &TelemetryConfig, install: bool) -> Arc<Self> {
        if !install {
            return Self::build(log, config, None).0;
        }
        let (telemetry, subscriber) = Self::build(log, config, Some(Box::new(std::io::stdout())));
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
        if let Err(error) = settings::check_omitted(log) {
            tracing::error!(error, "bad log setting");
        }
        telemetry
    }

    /// Apart from the process's own output, for tests.
    fn build(
        log: &pb::LogConfig,
        config: &TelemetryConfig,
        output: Option<Box<dyn Write + Send>>,
    ) -> (Arc<Self>, Box<dyn Subscriber + Send + Sync>) {
        let metrics = Metrics::new(config);
        let settings = Arc::new(Settings::new(log));
        let format = match log.format() {
            pb::log_config::Format::Text => Format::Text,
            pb::log_config::Format::Json => Format::Json,
        };
        let filter = parse_filter(&log.filter).unwrap_or_else(|_| default_filter());
        let (filter, handle) = reload::Layer::new(filter);
        // Without a thread there is no log, but the proxy must go on.
        let dropped = &metrics.log_lines_dropped;
        let writer = output
            .and_then(|output| LineWriter::new(output, dropped.clone(), format.lost_lines()).ok());
        let lines = writer.clone().map(|writer| {
            writer.set_limit(log.queue_lines);
            Lines {
                format,
                writer,
                settings: settings.clone(),
            }
        });
        let subscriber = Registry::default().with(filter).with(lines);
        let telemetry = Arc::new(Self {
            verdicts: Verdicts::counting(&metrics.bounds.verdicts_forgotten),
            metrics,
            live: Mutex::default(),
            filter: handle,
            settings,
            writer,
            exporter: OnceLock::new(),
        });
        (telemetry, Box::new(subscriber))
    }

    /// Connections are told to the collector at `authority` (host:port) from now on. Needs a tokio
    /// context.
    pub fn export_to(&self, authority: &str, node: &str) {
        let counters = self.metrics.otlp.clone();
        let exporter = || otlp::Exporter::start(authority, node, counters);
        self.exporter.get_or_init(exporter);
    }

    pub fn exporter(&self) -> Option<&otlp::Exporter> {
        self.exporter.get()
    }

    /// Changes everything but the format live. Err names the bad field, and nothing changes.
    pub fn configure(&self, log: &pb::LogConfig) -> Result<(), (&'static str, String)> {
        let filter = parse_filter(&log.filter).map_err(|text| ("log.filter", text))?;
        settings::check_omitted(log).map_err(|text| ("log.omit_fields", text))?;
        // Fails only where no subscriber was installed, and then there is nothing to filter.
        let _ = self.filter.reload(filter);
        self.settings.store(log);
        if let Some(writer) = &self.writer {
            writer.set_limit(log.queue_lines);
        }
        Ok(())
    }

    /// OpenMetrics text, ending with `# EOF\n`. No lock is held while `out` takes it.
    pub fn encode_to(&self, out: &mut impl std::fmt::Write) -> std::fmt::Result {
        let live: Vec<_> = {
            let mut live = self.live.lock();
            live.retain(|source| source.strong_count() > 0);
            live.iter().filter_map(std::sync::Weak::upgrade).collect()
        };
        for source in live {
            source.flush();
        }
        self.metrics.encode(out)
    }

    #[cfg(test)]
    pub fn encode(&self) -> String {
        let mut text = String::new();
        self.encode_to(&mut text).expect("a String takes all");
        text
    }

    /// `source` is asked for its counts before each scrape, as long as it lives.
    pub fn before_scrape(&self, source: std::sync::Weak<dyn Flush>) {
        let mut live = self.live.lock();
        live.retain(|source| source.strong_count() > 0);
        live.push(source);
    }

    /// Sends what still waits for the collector, for the end of the process.
    pub async fn flush_export(&self, patience: Duration) {
        if let Some(exporter) = self.exporter() {
            exporter.flush(patience).await;
        }
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
        Self::build(log, &TelemetryConfig::default(), Some(output))
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
