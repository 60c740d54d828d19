//! The `forwarded` header of HBONE (facts ztunnel 3.3): the client's address, and the service it
//! called.

use std::net::SocketAddr;

use http::{HeaderMap, HeaderValue};

use super::authority::LONGEST_NAME;

pub const FORWARDED: &str = "forwarded";

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Forwarded {
    pub client: Option<SocketAddr>,
    pub host: Option<String>,
}

impl Forwarded {
    /// None where there is nothing to say, or a host that no header can hold.
    pub fn to_header(&self) -> Option<HeaderValue> {
        let client = self.client.map(|client| format!("for=\"{client}\""));
        let host = self.host.as_ref().map(|host| format!("host={host}"));
        let text: Vec<String> = client.into_iter().chain(host).collect();
        if text.is_empty() {
            return None;
        }
        HeaderValue::from_str(&text.join(";")).ok()
    }

    /// Tolerant: what can't be read is absent. Only the first element counts, the one nearest to
    /// the client.
    pub fn parse(headers: &HeaderMap) -> Self {
        let mut forwarded = Self::default();
        let Some(text) = headers.get(FORWARDED).and_then(|text| text.to_str().ok()) else {
            return forwarded;
        };
        let first = text.split(',').next().unwrap_or_default();
        for pair in first.split(';') {
            let Some((key, value)) = pair.split_once('=') else {
                continue;
            };
            let value = unquoted(value.trim());
            match key.trim().to_ascii_lowercase().as_str() {
                "for" => forwarded.client = value.parse().ok(),
                "host" if is_hostname(value) => forwarded.host = Some(value.to_owned()),
                _ => {}
            }
        }
        forwarded
    }
}

/// Wildcards included: a service may be declared under one.
fn is_hostname(value: &str) -> bool {
    let name = |b: u8| b.is_ascii_alphanumeric() || b"-._*".contains(&b);
    (1..=LONGEST_NAME).contains(&value.len()) && value.bytes().all(name)
}

fn unquoted(value: &str) -> &str {
    value
        .strip_prefix('"')
        .and_then(|value| value.strip_suffix('"'))
        .unwrap_or(value)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(text: &str) -> Forwarded {
        let mut headers = HeaderMap::new();
        headers.insert(FORWARDED, text.parse().unwrap());
        Forwarded::parse(&headers)
    }

    #[test]
    fn v6_clients_stand_in_brackets() {
        let forwarded = Forwarded {
            client: Some("[2001:db8::1]:80".parse().unwrap()),
            host: Some("db.shop.svc.cluster.local".into()),
        };
        assert_eq!(
            forwarded.to_header().unwrap(),
            "for=\"[2001:db8::1]:80\";host=db.shop.svc.cluster.local"
        );
    }

    #[test]
    fn the_host_may_be_quoted() {
        assert_eq!(parse("host=\"a.b\"").host.as_deref(), Some("a.b"));
        assert_eq!(parse("FOR=x; Host=a.b").host.as_deref(), Some("a.b"));
        assert_eq!(parse("host=").host, None);
        assert_eq!(parse(&format!("host={}", "a".repeat(254))).host, None);
        assert_eq!(parse("\"").host, None);
        assert_eq!(
            parse("host=a\tb").host,
            None,
            "a tab shifts the columns of the log"
        );
    }

    proptest! {
        #[test]
        fn parses_what_it_prints(
            ip in any::<std::net::IpAddr>(),
            port in any::<u16>(),
            host in proptest::option::of("[a-z0-9.-]{1,40}"),
        ) {
            let forwarded = Forwarded { client: Some(SocketAddr::new(ip, port)), host };
            let mut headers = HeaderMap::new();
            headers.insert(FORWARDED, forwarded.to_header().unwrap());
            prop_assert_eq!(Forwarded::parse(&headers), forwarded);
        }

        #[test]
        fn no_header_breaks_the_parser(bytes in proptest::collection::vec(any::<u8>(), 0..80)) {
            if let Ok(value) = HeaderValue::from_bytes(&bytes) {
                let mut headers = HeaderMap::new();
                headers.insert(FORWARDED, value);
                Forwarded::parse(&headers);
            }
        }
    }
}
