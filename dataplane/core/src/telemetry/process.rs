//! What the operating system and the runtime say at the moment of a scrape.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::{ConstGauge, Gauge};
use prometheus_client::registry::Registry;
use tokio::runtime::RuntimeMetrics;

#[derive(Debug)]
pub struct Process {
    log_lines_dropped: Arc<AtomicU64>,
}

/// `istio_build` under the name that dashboards and istioctl look for, and our own version.
pub fn register_build(registry: &mut Registry, istio_version: &str) {
    let one = |labels: [(&'static str, String); 2]| {
        let build: Family<_, Gauge> = Family::default();
        build.get_or_create(&labels).set(1);
        build
    };
    let tag = ("tag", istio_version.to_owned());
    let component = ("component", "ztunnel".to_owned());
    registry.register(
        "istio_build",
        "Istio component build info",
        one([component, tag]),
    );
    let version = ("version", env!("CARGO_PKG_VERSION").to_owned());
    let component = ("component", "dataplane".to_owned());
    registry.register(
        "underpass_build",
        "Version of the data plane (unstable)",
        one([component, version]),
    );
}

impl Process {
    pub fn new(log_lines_dropped: Arc<AtomicU64>) -> Self {
        Self { log_lines_dropped }
    }
}

impl Collector for Process {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), fmt::Error> {
        if let Some(open) = open_fds() {
            let help = "Number of open file descriptors";
            gauge(&mut encoder, "process_open_fds", help, open)?;
        }
        if let Some(limit) = rustix::process::getrlimit(rustix::process::Resource::Nofile).current {
            let help = "Limit of open file descriptors";
            gauge(&mut encoder, "process_max_fds", help, limit)?;
        }
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            tokio(&mut encoder, &runtime.metrics())?;
        }
        ConstCounter::new(self.log_lines_dropped.load(Relaxed)).encode(encoder.encode_descriptor(
            "underpass_log_lines_dropped",
            "Log lines lost because the reader of our output is too slow (unstable)",
            None,
            MetricType::Counter,
        )?)
    }
}

fn tokio(encoder: &mut DescriptorEncoder, runtime: &RuntimeMetrics) -> fmt::Result {
    let workers = runtime.num_workers();
    let gauges = [
        ("tokio_num_workers", "Worker threads (unstable)", workers),
        (
            "tokio_num_alive_tasks",
            "Tasks alive (unstable)",
            runtime.num_alive_tasks(),
        ),
        (
            "tokio_global_queue_depth",
            "Tasks that wait for a worker (unstable)",
            runtime.global_queue_depth(),
        ),
    ];
    for (name, help, value) in gauges {
        gauge(encoder, name, help, value as u64)?;
    }
    let busy = |worker| runtime.worker_total_busy_duration(worker).as_secs_f64();
    let name = "tokio_worker_total_busy_duration_seconds";
    let help = "Time in which a worker was busy (unstable)";
    let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
    for worker in 0..workers {
        family
            .encode_family(&[("worker", worker as u64)])?
            .encode_counter::<NoLabelSet, _, u64>(&busy(worker), None)?;
    }
    type Count = fn(&RuntimeMetrics, usize) -> u64;
    let counts: [(_, _, Count); 2] = [
        (
            "tokio_worker_park_count",
            "How often a worker went to sleep (unstable)",
            RuntimeMetrics::worker_park_count,
        ),
        (
            "tokio_worker_park_unpark_count",
            "How often a worker went to sleep or woke up (unstable)",
            RuntimeMetrics::worker_park_unpark_count,
        ),
    ];
    for (name, help, count) in counts {
        let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
        for worker in 0..workers {
            family
                .encode_family(&[("worker", worker as u64)])?
                .encode_counter::<NoLabelSet, _, u64>(&count(runtime, worker), None)?;
        }
    }
    Ok(())
}

fn gauge(encoder: &mut DescriptorEncoder, name: &str, help: &str, value: u64) -> fmt::Result {
    let value = i64::try_from(value).unwrap_or(i64::MAX);
    ConstGauge::new(value).encode(encoder.encode_descriptor(name, help, None, MetricType::Gauge)?)
}

/// None where /proc isn't mounted.
fn open_fds() -> Option<u64> {
    let count = std::fs::read_dir("/proc/self/fd").ok()?.count() as u64;
    // One of them is the directory that we are reading.
    Some(count.saturating_sub(1))
}
