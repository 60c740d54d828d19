//! The `traceparent` header of HBONE (facts ztunnel 3.3): the id by which the log lines of both
//! ends are found.

use std::fmt;

use http::{HeaderMap, HeaderValue};

pub const TRACEPARENT: &str = "traceparent";

/// Displays as the trace id alone, as logs show it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trace {
    id: u128,
    span: u64,
}

impl Trace {
    pub fn random() -> Self {
        Self {
            id: rand::random(),
            span: rand::random(),
        }
    }

    /// The peer's, or a fresh one where it sent none that can be read.
    pub fn of(headers: &HeaderMap) -> Self {
        headers
            .get(TRACEPARENT)
            .and_then(|value| Self::parse(value.as_bytes()))
            .unwrap_or_else(Self::random)
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
        Some(Self {
            id,
            span: u64::try_from(span).ok()?,
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
        let trace = Trace { id: 1, span: 2 };
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

    proptest! {
        #[test]
        fn parses_what_it_prints(id in any::<u128>(), span in any::<u64>()) {
            let trace = Trace { id, span };
            prop_assert_eq!(Trace::parse(trace.to_header().as_bytes()), Some(trace));
        }

        #[test]
        fn nothing_breaks_the_parser(text in "[0-9a-fé-]{50,60}", bytes in any::<[u8; 55]>()) {
            Trace::parse(text.as_bytes());
            Trace::parse(&bytes);
        }
    }
}
