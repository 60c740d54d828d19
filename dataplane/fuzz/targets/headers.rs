//! What a peer says in a CONNECT: authority, baggage, forwarded, traceparent; and the PROXY header
//! made of it, read back by a reader of its own.
#![no_main]

use http::{HeaderMap, HeaderName, HeaderValue};
use libfuzzer_sys::fuzz_target;
use underpass_core::proxy::fuzzing as proxy;

/// No name of a peer may be kept that is longer than a DNS name.
const LONGEST_NAME: usize = 253;

fuzz_target!(|data: &[u8]| {
    let mut lines = data.split(|byte| *byte == b'\n');
    let authority = lines.next().unwrap_or_default();
    if let Ok(text) = std::str::from_utf8(authority) {
        check_authority(text);
    }
    let mut headers = HeaderMap::new();
    for (line, name) in lines.zip(
        ["baggage", "forwarded", "traceparent", "baggage"]
            .iter()
            .cycle(),
    ) {
        if let Ok(value) = HeaderValue::from_bytes(line) {
            headers.append(HeaderName::from_static(name), value);
        }
    }
    check_headers(&headers);
});

/// What is accepted says the same when it is printed and read again.
fn check_authority(text: &str) {
    if let Some(printed) = proxy::authority(text) {
        assert!(
            printed.len() <= LONGEST_NAME + 6,
            "{} bytes are kept",
            printed.len()
        );
        assert_eq!(proxy::authority(&printed).as_ref(), Some(&printed));
    }
}

fn check_headers(headers: &HeaderMap) {
    let said = proxy::headers(headers);
    for name in &said.names {
        assert!(name.len() <= LONGEST_NAME, "{} bytes are kept", name.len());
    }
    // Ours are always readable, whatever the peer's were.
    let again = proxy::headers(&said.passed_on);
    assert_eq!(again.trace, said.trace);
    assert_eq!(again.names, said.names);
}
