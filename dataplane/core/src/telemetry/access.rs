//! The access log (facts ztunnel 12.4): one line a connection, the fields in upstream's order, with
//! the deciding `policy` after them.

use std::fmt;
use std::net::SocketAddr;
use std::time::Duration;

use tracing::field::display;

use super::labels::Labels;

pub const TARGET: &str = "access";

/// All fields of its lines, by the names under which they may be left out (LogConfig.omit_fields).
pub const FIELDS: &[&str] = &[
    "src.addr",
    "src.workload",
    "src.namespace",
    "src.identity",
    "src.cluster",
    "dst.addr",
    "dst.hbone_addr",
    "dst.service",
    "dst.workload",
    "dst.namespace",
    "dst.identity",
    "dst.cluster",
    "direction",
    "bytes_sent",
    "bytes_recv",
    "duration",
    "error",
    "policy",
    "outcome",
];

/// What a line says. Absent values are omitted.
pub struct Access<'a> {
    pub direction: &'static str,
    pub trace: &'a dyn fmt::Display,
    pub src_addr: SocketAddr,
    pub src_workload: &'a str,
    /// The next hop.
    pub dst_addr: SocketAddr,
    pub hbone_addr: Option<&'a str>,
    pub dst_workload: &'a str,
    pub labels: &'a Labels,
    pub policy: Option<&'a str>,
}

/// Who sent how much; the log names it from its own side (facts ztunnel 12.3).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bytes {
    pub from_client: u64,
    pub from_server: u64,
}

macro_rules! line {
    ($level:ident, $access:ident, $message:literal, $($more:tt)*) => {{
        let access = $access;
        let (source, destination) = (&access.labels.source, &access.labels.destination);
        let identity = |identity: &'_ Option<crate::identity::Identity>| {
            identity.as_ref().filter(|_| access.labels.mtls).map(ToString::to_string)
        };
        tracing::$level!(
            target: TARGET,
            {
            src.addr = display(access.src_addr),
            src.workload = some(access.src_workload),
            src.namespace = some(&source.namespace),
            src.identity = identity(&source.principal).as_deref(),
            src.cluster = some(&source.cluster),
            dst.addr = display(access.dst_addr),
            dst.hbone_addr = access.hbone_addr.map(display),
            dst.service = access.labels.service.as_ref().map(|s| s.hostname.as_ref()),
            dst.workload = some(access.dst_workload),
            dst.namespace = some(&destination.namespace),
            dst.identity = identity(&destination.principal).as_deref(),
            dst.cluster = some(&destination.cluster),
            direction = access.direction,
            $($more)*
            policy = access.policy,
            },
            $message
        )
    }};
}

/// At the end of a connection. `quiet`: good ends leave no line.
pub fn complete(
    access: &Access<'_>,
    bytes: Bytes,
    duration: Duration,
    error: Option<&str>,
    quiet: bool,
) {
    let (sent, received) = access.sent_and_received(bytes);
    let duration = format!("{}ms", duration.as_millis());
    match error {
        Some(error) => in_span(access, || {
            line!(
                error,
                access,
                "connection complete",
                bytes_sent = sent,
                bytes_recv = received,
                duration = duration.as_str(),
                error = error,
            );
        }),
        None if quiet => {}
        None => in_span(access, || {
            line!(
                info,
                access,
                "connection complete",
                bytes_sent = sent,
                bytes_recv = received,
                duration = duration.as_str(),
            );
        }),
    }
}

/// When it begins; only to debug.
pub fn opened(access: &Access<'_>) {
    if tracing::enabled!(target: TARGET, tracing::Level::DEBUG) {
        in_span(access, || line!(debug, access, "connection opened",));
    }
}

/// A connection that was refused before anything was known of it.
pub fn failed(direction: &'static str, src: SocketAddr, dst: Option<SocketAddr>, error: &str) {
    tracing::warn!(
        target: TARGET,
        {
        src.addr = display(src),
        dst.addr = dst.map(display),
        direction,
        error
        },
        "connection failed"
    );
}

/// What a policy in dry-run would have done to this connection.
pub fn dry_run(
    policy: &str,
    outcome: &str,
    src: SocketAddr,
    dst: SocketAddr,
    identity: Option<&str>,
) {
    tracing::info!(
        target: TARGET,
        {
        src.addr = display(src),
        src.identity = identity,
        dst.addr = display(dst),
        policy,
        outcome
        },
        "dry run"
    );
}

/// The span carries the trace id, which the lines of both ends share.
fn in_span(access: &Access<'_>, line: impl FnOnce()) {
    let id = display(access.trace);
    let span = match access.direction {
        "inbound" => tracing::info_span!(target: TARGET, "inbound", id),
        _ => tracing::info_span!(target: TARGET, "outbound", id),
    };
    span.in_scope(line);
}

fn some(text: &str) -> Option<&str> {
    Some(text).filter(|text| !text.is_empty())
}

impl Access<'_> {
    /// From the side of the log line (facts ztunnel 12.3).
    pub fn sent_and_received(&self, bytes: Bytes) -> (u64, u64) {
        match self.direction {
            "inbound" => (bytes.from_server, bytes.from_client),
            _ => (bytes.from_client, bytes.from_server),
        }
    }
}

impl fmt::Debug for Access<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Access")
            .field("src", &self.src_addr)
            .field("dst", &self.dst_addr)
            .finish_non_exhaustive()
    }
}
