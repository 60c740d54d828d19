//! The `traceparent` header of HBONE (facts ztunnel 3.3): the id by which the log lines of both
//! ends are found.

use std::fmt;

use http::{HeaderMap, HeaderValue};

use crate::telemetry::otlp::SpanIds;

pub const TRACEPARENT: &str = "traceparent";

/// A connection's place in a trace. Displays as the trace id alone, as logs show it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trace {
    id: u128,
    /// Of this connection.
    span: u64,
    /// The peer's, 0 where it told none.
    parent: u64,
}

impl Trace {
    pub fn random() -> Self {
        Self {
            // Zero means none, in both.
            id: rand::random::<u128>().max(1),
            span: rand::random::<u64>().max(1),
            parent: 0,
        }
    }

    /// Goes on with the peer's, or is a fresh one where it sent none that can be read.
    pub fn of(headers: &HeaderMap) -> Self {
        headers
            .get(TRACEPARENT)
            .and_then(|value| Self::parse(value.as_bytes()))
            .map_or_else(Self::random, |peer| Self {
                id: peer.id,
                parent: peer.span,
                ..Self::random()
            })
    }

    pub fn ids(self) -> SpanIds {
        SpanIds {
            trace: self.id,
            span: self.span,
            parent: self.parent,
        }
    }

    pub fn to_header(self) -> HeaderValue {
        let text = format!("00-{:032x}-{:016x}-00", self.id, self.span);
        // Digits and dashes only.
        HeaderValue::from_str(&text).unwrap_or(HeaderValue::from_static(""))
    }

    fn parse(text: &[u8]) -> Option<Self> {
        let text = std::str::from_utf8(text).ok().filter(|t| t.len() == 55)?;
        let mut parts = text.split('-');
        let mut hex = |digits: usize| {
            let part = parts.next()?;
            let whole = part.len() == digits && part.bytes().all(|b| b.is_ascii_hexdigit());
            u128::from_str_radix(part, 16).ok().filter(|_| whole)
        };
        let (_version, id, span, _flags) = (hex(2)?, hex(32)?, hex(16)?, hex(2)?);
        let span = u64::try_from(span).ok()?;
        (id != 0 && span != 0).then_some(Self {
            id,
            span,
            parent: 0,
        })
    }
}

impl fmt::Display for Trace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn has_upstreams_form() {
        let trace = Trace {
            id: 1,
            span: 2,
            parent: 0,
        };
        assert_eq!(
            trace.to_header(),
            "00-00000000000000000000000000000001-0000000000000002-00"
        );
    }

    #[test]
    fn fewer_dashes_in_55_bytes_are_refused() {
        for text in [
            "0".repeat(55),
            format!("00-{}", "1".repeat(52)),
            format!("00-{}-{}", "1".repeat(32), "2".repeat(19)),
            "-".repeat(55),
            format!("é0{}", "-".repeat(52)),
        ] {
            assert_eq!(text.len(), 55);
            assert_eq!(Trace::parse(text.as_bytes()), None, "{text}");
        }
    }

    #[test]
    fn the_far_end_goes_on_with_the_trace_under_a_span_of_its_own() {
        let near = Trace::random();
        let mut headers = HeaderMap::new();
        headers.insert(TRACEPARENT, near.to_header());
        let far = Trace::of(&headers);
        assert_eq!((far.id, far.parent), (near.id, near.span));
        assert_ne!(far.span, near.span);
        assert_eq!(far.to_string(), near.to_string());
    }

    #[test]
    fn what_cant_be_read_is_replaced_by_a_fresh_trace() {
        let none = "00-00000000000000000000000000000000-00f067aa0ba902b7-00";
        let no_span = "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-00";
        for bad in ["", "00", none, no_span, &"-".repeat(55), &"0".repeat(55)] {
            let mut headers = HeaderMap::new();
            headers.insert(TRACEPARENT, bad.parse().unwrap());
            let fresh = Trace::of(&headers);
            assert!(fresh.id != 0 && fresh.span != 0, "{bad}");
            assert_eq!(fresh.parent, 0, "{bad}");
            assert_ne!(fresh, Trace::of(&headers), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn parses_what_it_prints(id in 1..u128::MAX, span in 1..u64::MAX) {
            let trace = Trace { id, span, parent: 0 };
            prop_assert_eq!(Trace::parse(trace.to_header().as_bytes()), Some(trace));
        }

        #[test]
        fn nothing_breaks_the_parser(text in "[0-9a-fé-]{50,60}", bytes in any::<[u8; 55]>()) {
            Trace::parse(text.as_bytes());
            Trace::parse(&bytes);
        }
    }
}
