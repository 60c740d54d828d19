//! The parsers of what peers send, for the fuzz targets.

use http::HeaderMap;

use super::authority;
use super::baggage::{BAGGAGE, Baggage};
use super::forwarded::{FORWARDED, Forwarded};
use super::traceparent::{TRACEPARENT, Trace};
use crate::state::resolve::Authority;

/// Printed as it is understood.
pub fn authority(text: &str) -> Option<String> {
    authority::parse(text).map(|authority| match authority {
        Authority::Ip(addr) => addr.to_string(),
        Authority::Host(host, port) => format!("{host}:{port}"),
    })
}

/// What is kept of a peer's headers.
pub struct Said {
    pub names: Vec<String>,
    pub trace: String,
    /// The same, as we send it.
    pub passed_on: HeaderMap,
}

pub fn headers(headers: &HeaderMap) -> Said {
    let baggage = Baggage::parse(headers);
    let forwarded = Forwarded::parse(headers);
    let trace = Trace::of(headers);
    let mut passed_on = HeaderMap::new();
    passed_on.insert(BAGGAGE, baggage.to_header());
    if let Some(forwarded) = forwarded.to_header() {
        passed_on.insert(FORWARDED, forwarded);
    }
    passed_on.insert(TRACEPARENT, trace.to_header());
    let kept = [
        baggage.cluster,
        baggage.namespace,
        baggage.workload,
        baggage.service,
        baggage.revision,
        baggage.region,
        baggage.zone,
    ];
    Said {
        names: kept.into_iter().chain(forwarded.host).collect(),
        trace: trace.to_string(),
        passed_on,
    }
}
