//! A connection as a span and a log record.

use std::net::SocketAddr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;

use crate::telemetry::access::{Access, Bytes as Relayed};
use crate::telemetry::labels::Flags;
use crate::telemetry::settings::Omitted;
use crate::wire::otlp as pb;
use pb::any_value::Value;

/// Where a connection belongs; `parent` 0: it begins a trace.
#[derive(Clone, Copy, Debug)]
pub struct SpanIds {
    pub trace: u128,
    pub span: u64,
    pub parent: u64,
}

/// How a connection ended.
pub struct End<'a> {
    pub bytes: Relayed,
    pub duration: Duration,
    pub flags: Flags,
    pub error: Option<&'a str>,
}

/// What is exported of one connection.
#[derive(Clone, Debug)]
pub struct Record {
    pub span: Option<pb::Span>,
    pub log: pb::LogRecord,
}

/// Attributes under the names of the access log's fields.
struct Attributes<'a> {
    omitted: &'a Omitted,
    found: Vec<pb::KeyValue>,
}

impl Record {
    pub fn complete(ids: SpanIds, access: &Access<'_>, end: &End<'_>, omitted: &Omitted) -> Self {
        let now = SystemTime::now();
        let (start, finish) = (nanos(now - end.duration), nanos(now));
        let attributes = complete(access, end, omitted);
        let inbound = access.direction == "inbound";
        let trace_id = Bytes::copy_from_slice(&ids.trace.to_be_bytes());
        let span_id = Bytes::copy_from_slice(&ids.span.to_be_bytes());
        let kind = match inbound {
            true => pb::span::Kind::Server,
            false => pb::span::Kind::Client,
        };
        let (severity, name) = match end.error {
            Some(_) => (17, "ERROR"),
            None => (9, "INFO"),
        };
        let log = pb::LogRecord {
            time_unix_nano: finish,
            observed_time_unix_nano: finish,
            severity_number: severity,
            severity_text: name.into(),
            body: Some(text("connection complete")),
            attributes: attributes.clone(),
            trace_id: trace_id.clone(),
            span_id: span_id.clone(),
        };
        let span = pb::Span {
            trace_id,
            span_id,
            parent_span_id: match ids.parent {
                0 => Bytes::new(),
                parent => Bytes::copy_from_slice(&parent.to_be_bytes()),
            },
            name: access.direction.into(),
            kind: kind.into(),
            start_time_unix_nano: start,
            end_time_unix_nano: finish,
            attributes,
            status: end.error.map(|error| pb::Status {
                message: error.into(),
                code: pb::status::Code::Error.into(),
            }),
        };
        Self {
            span: Some(span),
            log,
        }
    }

    /// A connection that was refused before anything was known of it has no span.
    pub fn failed(
        direction: &'static str,
        src: SocketAddr,
        dst: Option<SocketAddr>,
        error: &str,
        omitted: &Omitted,
    ) -> Self {
        let now = nanos(SystemTime::now());
        let mut attributes = Attributes::new(omitted);
        attributes.text("src.addr", &src.to_string());
        if let Some(dst) = dst {
            attributes.text("dst.addr", &dst.to_string());
        }
        attributes.text("direction", direction);
        attributes.text("error", error);
        let log = pb::LogRecord {
            time_unix_nano: now,
            observed_time_unix_nano: now,
            severity_number: 13,
            severity_text: "WARN".into(),
            body: Some(text("connection failed")),
            attributes: attributes.found,
            ..Default::default()
        };
        Self { span: None, log }
    }
}

fn complete(access: &Access<'_>, end: &End<'_>, omitted: &Omitted) -> Vec<pb::KeyValue> {
    let mut it = Attributes::new(omitted);
    let (source, destination) = (&access.labels.source, &access.labels.destination);
    let identity = |identity: &Option<crate::identity::Identity>| {
        let proven = identity.as_ref().filter(|_| access.labels.mtls);
        proven.map(ToString::to_string).unwrap_or_default()
    };
    let service = access.labels.service.as_ref();
    it.text("src.addr", &access.src_addr.to_string());
    it.text("src.workload", access.src_workload);
    it.text("src.namespace", &source.namespace);
    it.text("src.identity", &identity(&source.principal));
    it.text("src.cluster", &source.cluster);
    it.text("dst.addr", &access.dst_addr.to_string());
    it.text("dst.hbone_addr", access.hbone_addr.unwrap_or_default());
    it.text("dst.service", service.map_or("", |s| s.hostname.as_ref()));
    it.text("dst.workload", access.dst_workload);
    it.text("dst.namespace", &destination.namespace);
    it.text("dst.identity", &identity(&destination.principal));
    it.text("dst.cluster", &destination.cluster);
    it.text("direction", access.direction);
    let (sent, received) = access.sent_and_received(end.bytes);
    it.number("bytes_sent", sent);
    it.number("bytes_recv", received);
    it.text("error", end.error.unwrap_or_default());
    it.text("policy", access.policy.unwrap_or_default());
    it.text("response_flags", end.flags.as_str());
    it.found
}

impl<'a> Attributes<'a> {
    fn new(omitted: &'a Omitted) -> Self {
        Self {
            omitted,
            found: Vec::with_capacity(18),
        }
    }

    /// Absent values are left out, as in the log.
    fn text(&mut self, key: &str, value: &str) {
        if !value.is_empty() {
            self.push(key, text(value));
        }
    }

    fn number(&mut self, key: &str, value: u64) {
        let value = i64::try_from(value).unwrap_or(i64::MAX);
        let value = Some(Value::IntValue(value));
        self.push(key, pb::AnyValue { value });
    }

    fn push(&mut self, key: &str, value: pb::AnyValue) {
        if !self.omitted.has(key) {
            self.found.push(pb::KeyValue {
                key: key.into(),
                value: Some(value),
            });
        }
    }
}

pub fn text(value: &str) -> pb::AnyValue {
    pb::AnyValue {
        value: Some(Value::StringValue(value.to_owned())),
    }
}

fn nanos(time: SystemTime) -> u64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}
