//! `:authority` of a CONNECT (facts ztunnel 3.4 step 2): an address or a name, always with a port.

use crate::config::canonical;
use crate::state::resolve::Authority;

/// None for everything else.
pub fn parse(text: &str) -> Option<Authority> {
    if let Ok(addr) = text.parse::<std::net::SocketAddr>() {
        let addr = std::net::SocketAddr::new(canonical(addr.ip()), addr.port());
        return Some(Authority::Ip(addr));
    }
    let (host, port) = text.rsplit_once(':')?;
    let port = Some(port).filter(|port| port.bytes().all(|b| b.is_ascii_digit()))?;
    let name = |b: u8| b.is_ascii_alphanumeric() || b"-._".contains(&b);
    let known = !host.is_empty() && host.bytes().all(name);
    known.then_some(Authority::Host(host.to_owned(), port.parse().ok()?))
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

    proptest! {
        #[test]
        fn nothing_breaks_the_parser(text in "\\PC{0,40}") {
            parse(&text);
        }
    }
}
