//! PROXY protocol version 2, for applications that ask for it (facts ztunnel 3.7).

use std::net::SocketAddr;

use crate::identity::Identity;

const SIGNATURE: &[u8; 12] = b"\r\n\r\n\0\r\nQUIT\n";
/// Version 2, command PROXY.
const VERSION_COMMAND: u8 = 0x21;
/// The TLVs that carry the peer's SPIFFE id, and the full name of the service that was called.
const TLV_IDENTITY: u8 = 0xd0;
const TLV_SERVICE: u8 = 0xd1;

/// Mixed families can't be told and degrade to AF_UNSPEC.
pub fn header(
    source: SocketAddr,
    destination: SocketAddr,
    peer: Option<&Identity>,
    service: Option<&str>,
) -> Vec<u8> {
    let mut body = Vec::with_capacity(128);
    let family = match (source, destination) {
        (SocketAddr::V4(source), SocketAddr::V4(destination)) => {
            body.extend(source.ip().octets());
            body.extend(destination.ip().octets());
            0x11
        }
        (SocketAddr::V6(source), SocketAddr::V6(destination)) => {
            body.extend(source.ip().octets());
            body.extend(destination.ip().octets());
            0x21
        }
        _ => 0x00,
    };
    if family != 0 {
        body.extend(source.port().to_be_bytes());
        body.extend(destination.port().to_be_bytes());
    }
    if let Some(identity) = peer {
        put(&mut body, TLV_IDENTITY, &identity.to_string());
    }
    if let Some(service) = service {
        put(&mut body, TLV_SERVICE, service);
    }
    let mut header = Vec::with_capacity(16 + body.len());
    header.extend(SIGNATURE);
    header.extend([VERSION_COMMAND, family]);
    // Identities and names are far shorter than this can hold: certificates and DNS bound them.
    header.extend(u16::try_from(body.len()).unwrap_or(u16::MAX).to_be_bytes());
    header.extend(body);
    header
}

fn put(body: &mut Vec<u8>, tlv: u8, text: &str) {
    if let Ok(length) = u16::try_from(text.len()) {
        body.push(tlv);
        body.extend(length.to_be_bytes());
        body.extend(text.as_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addr(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    #[test]
    fn an_ipv4_connection_with_an_identity_and_a_service() {
        let peer = Identity::new("td", "a", "b");
        let header = header(
            addr("10.0.0.1:256"),
            addr("10.0.0.2:80"),
            Some(&peer),
            Some("a.b"),
        );
        let mut expected = SIGNATURE.to_vec();
        expected.extend([0x21, 0x11, 0, 12 + 3 + 21 + 3 + 3]);
        expected.extend([10, 0, 0, 1, 10, 0, 0, 2, 1, 0, 0, 80]);
        expected.extend([0xd0, 0, 21]);
        expected.extend(b"spiffe://td/ns/a/sa/b");
        expected.extend([0xd1, 0, 3]);
        expected.extend(b"a.b");
        assert_eq!(header, expected);
    }

    #[test]
    fn mixed_families_are_unspecified() {
        let header = header(addr("10.0.0.1:256"), addr("[::1]:80"), None, None);
        assert_eq!(header[12..], [0x21, 0x00, 0, 0]);
    }
}
