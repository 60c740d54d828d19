//! What the records' parsers share: a reason that names the field, and the small types.

use std::net::IpAddr;

use ipnet::IpNet;

use crate::config::canonical;

/// Why a resource is rejected. Goes into the NACK.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {text}")]
pub struct Bad {
    field: String,
    text: String,
}

impl Bad {
    pub fn new(field: &str, text: impl Into<String>) -> Self {
        Self {
            field: field.to_owned(),
            text: text.into(),
        }
    }

    pub fn unknown(field: &str, value: i32) -> Self {
        Self::new(field, format!("{value} is not a value this version knows"))
    }
}

/// 4 or 16 bytes (facts ztunnel 6.1).
pub fn ip(field: &str, bytes: &[u8]) -> Result<IpAddr, Bad> {
    raw_ip(field, bytes).map(canonical)
}

/// Longer prefixes than the address has bits are an error, never cut.
pub fn cidr(field: &str, bytes: &[u8], length: u32) -> Result<IpNet, Bad> {
    let ip = raw_ip(field, bytes)?;
    let too_long = || {
        Bad::new(
            field,
            format!("prefix length {length} is too long for {ip}"),
        )
    };
    let length = u8::try_from(length).map_err(|_| too_long())?;
    // Peers are compared in their canonical form, so an IPv4 range written in IPv6 must be one too.
    let (ip, length) = match canonical(ip) {
        v4 @ IpAddr::V4(_) if ip.is_ipv6() && (96..=128).contains(&length) => (v4, length - 96),
        _ => (ip, length),
    };
    IpNet::new(ip, length)
        .map(|net| net.trunc())
        .map_err(|_| too_long())
}

pub fn port(field: &str, value: u32) -> Result<u16, Bad> {
    u16::try_from(value).map_err(|_| Bad::new(field, format!("{value} is not a TCP port")))
}

fn raw_ip(field: &str, bytes: &[u8]) -> Result<IpAddr, Bad> {
    if let Ok(v4) = <[u8; 4]>::try_from(bytes) {
        return Ok(v4.into());
    }
    <[u8; 16]>::try_from(bytes).map(IpAddr::from).map_err(|_| {
        Bad::new(
            field,
            format!("an address has 4 or 16 bytes, not {}", bytes.len()),
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes_longer_than_the_address_are_refused() {
        assert!(cidr("f", &[10, 0, 0, 0], 33).is_err());
        assert!(cidr("f", &[0; 16], 129).is_err());
        assert!(cidr("f", &[10, 0, 0, 0], 264).is_err());
        assert!(cidr("f", &[10, 0, 0], 8).is_err());
    }

    #[test]
    fn mapped_ranges_become_ipv4() {
        let mapped = "::ffff:10.1.2.3".parse::<std::net::Ipv6Addr>().unwrap();
        let net = cidr("f", &mapped.octets(), 112).unwrap();
        assert_eq!(net, "10.1.0.0/16".parse::<IpNet>().unwrap());
    }
}
