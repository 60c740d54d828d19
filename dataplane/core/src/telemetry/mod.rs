//! Metrics and the access log (facts ztunnel 12).

use std::sync::Arc;

use crate::wire::control as pb;

/// Counters of the process, and its log settings.
pub struct Telemetry {}

impl Telemetry {
    /// Installs the process's tracing subscriber when `install` is set (once a process).
    pub fn new(_log: &pb::LogConfig, _install: bool) -> Arc<Self> {
        unimplemented!()
    }

    /// Changes format-independent settings live: filter, access log on or off. Err names a bad
    /// filter directive and changes nothing.
    pub fn configure(&self, _log: &pb::LogConfig) -> Result<(), String> {
        unimplemented!()
    }

    /// OpenMetrics text, ending with `# EOF\n`.
    pub fn encode(&self) -> String {
        unimplemented!()
    }
}
