//! `:authority` of a CONNECT (facts ztunnel 3.4 step 2): an address or a name, always with a port.

use crate::config::canonical;
use crate::state::resolve::Authority;

/// No DNS name is longer (RFC 1035), nor any name that a peer tells us of. What peers say is kept,
/// logged and counted under, so it must not be as long as a header may be.
pub const LONGEST_NAME: usize = 253;
const LONGEST: usize = LONGEST_NAME + ":65535".len();

/// None for everything else.
pub fn parse(text: &str) -> Option<Authority> {
    if text.len() > LONGEST {
        return None;
    }
    if let Ok(addr) = text.parse::<std::net::SocketAddr>() {
        let addr = std::net::SocketAddr::new(canonical(addr.ip()), addr.port());
        return Some(Authority::Ip(addr));
    }
    let (host, port) = text.rsplit_once(':')?;
    let port = Some(port).filter(|port| port.bytes().all(|b| b.is_ascii_digit()))?;
    let name = |b: u8| b.is_ascii_alphanumeric() || b"-._".contains(&b);
    let known = !host.is_empty() && host.bytes().all(name);
    known.then_some(Authority::Host(host.into(), port.parse().ok()?))
}

/// Of a text that may be as long as a header.
pub fn excerpt(text: &str) -> String {
    match text.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn addresses_and_names_need_a_port() {
        let ip = |text: &str| Some(Authority::Ip(text.parse().unwrap()));
        assert_eq!(parse("10.0.0.1:80"), ip("10.0.0.1:80"));
        assert_eq!(parse("[2001:db8::1]:80"), ip("[2001:db8::1]:80"));
        assert_eq!(parse("[::ffff:10.0.0.1]:80"), ip("10.0.0.1:80"));
        assert_eq!(
            parse("db.shop.svc.cluster.local:5432"),
            Some(Authority::Host("db.shop.svc.cluster.local".into(), 5432))
        );
        for text in [
            "",
            ":",
            ":80",
            "10.0.0.1",
            "db",
            "db:",
            "db:x",
            "db:+1",
            "db:70000",
            "::1:80",
            "a b:1",
            "user@db:1",
            "[::1]",
            "db:80/path",
        ] {
            assert_eq!(parse(text), None, "{text}");
        }
    }

    #[test]
    fn no_text_of_a_peer_is_kept_in_full_length() {
        let long = format!("{}:80", "a".repeat(60_000));
        assert_eq!(parse(&long), None);
        assert_eq!(parse(&format!("10.0.0.1:{}80", "0".repeat(60_000))), None);
        assert!(excerpt(&long).len() < 300);
        assert_eq!(excerpt("short"), "short");
        assert!(parse(&format!("{}:65535", "a".repeat(253))).is_some());
    }

    proptest! {
        #[test]
        fn nothing_breaks_the_parser(text in "\\PC{0,40}") {
            parse(&text);
            excerpt(&text);
        }
    }
}
