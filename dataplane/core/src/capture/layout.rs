//! Keys and values of the maps, as bpf/include/underpass.h lays them out: addresses are 16 bytes in
//! network order, IPv4 mapped; everything else is in the machine's order.

use std::net::{IpAddr, Ipv6Addr};

pub(super) type AddressBytes = [u8; 16];
pub(super) type PodBytes = [u8; 48];
pub(super) type OwnAddressBytes = [u8; 20];
/// `struct datagrams`: refused, unprotected.
pub(super) type DatagramsWords = [u64; 2];
/// `struct question_key`: slot, bucket.
pub(super) type QuestionKeyWords = [u32; 2];
pub(super) type QuestionBytes = [u8; 32];

/// Places of a pod among `questions`.
pub(super) const QUESTIONS: u32 = 64;
pub(super) type ProbePortBytes = [u8; 20];
/// The slot comes first.
pub(super) type TupleBytes = [u8; 40];

/// Places for pods.
pub(super) const MAX_PODS: u32 = 4096;

pub(super) const FLAG_DNS: u32 = 0x1;
pub(super) const FLAG_BYPASS_INBOUND: u32 = 0x2;
pub(super) const FLAG_UDP_DENY: u32 = 0x4;
pub(super) const FLAG_IPV6_OFF: u32 = 0x8;
pub(super) const FLAG_LEAVING: u32 = 0x100;

/// `struct pod`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PodValue {
    pub slot: u32,
    pub flags: u32,
    pub budget: u32,
    pub own4: Option<IpAddr>,
    pub own6: Option<IpAddr>,
}

impl PodValue {
    pub fn encode(&self) -> PodBytes {
        let mut bytes = [0; 48];
        bytes[..4].copy_from_slice(&self.slot.to_ne_bytes());
        bytes[4..8].copy_from_slice(&self.flags.to_ne_bytes());
        bytes[8..12].copy_from_slice(&self.budget.to_ne_bytes());
        bytes[16..32].copy_from_slice(&self.own4.map_or([0; 16], address));
        bytes[32..].copy_from_slice(&self.own6.map_or([0; 16], address));
        bytes
    }
}

/// Slot and flags alone, which a newer layout keeps in their places.
pub(super) fn slot_of(pod: &PodBytes) -> u32 {
    u32::from_ne_bytes([pod[0], pod[1], pod[2], pod[3]])
}

pub(super) fn mark_leaving(pod: &mut PodBytes) {
    let flags = u32::from_ne_bytes([pod[4], pod[5], pod[6], pod[7]]) | FLAG_LEAVING;
    pod[4..8].copy_from_slice(&flags.to_ne_bytes());
}

/// Those that a program can be loaded with: a newer version may have others.
pub(super) fn flags_of(pod: &PodBytes) -> u32 {
    u32::from_ne_bytes([pod[4], pod[5], pod[6], pod[7]]) & (MAX_PODS - 1)
}

pub(super) fn own_address(slot: u32, ip: IpAddr) -> OwnAddressBytes {
    let mut bytes = [0; 20];
    bytes[..4].copy_from_slice(&slot.to_ne_bytes());
    bytes[4..].copy_from_slice(&address(ip));
    bytes
}

pub(super) fn own_address_of(key: &OwnAddressBytes) -> Option<(u32, AddressBytes)> {
    let slot = key[..4].try_into().ok()?;
    Some((u32::from_ne_bytes(slot), key[4..].try_into().ok()?))
}

pub(super) fn probe_port(ip: IpAddr, port: u16) -> ProbePortBytes {
    let mut bytes = [0; 20];
    bytes[..16].copy_from_slice(&address(ip));
    bytes[16..18].copy_from_slice(&port.to_ne_bytes());
    bytes
}

pub(super) fn of_probe_port(key: &ProbePortBytes) -> (IpAddr, u16) {
    let mut ip = [0; 16];
    ip.copy_from_slice(&key[..16]);
    let port = u16::from_ne_bytes([key[16], key[17]]);
    (IpAddr::from(ip).to_canonical(), port)
}

pub(super) fn address(ip: IpAddr) -> AddressBytes {
    match ip {
        IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
        IpAddr::V6(ip) => Ipv6Addr::octets(&ip),
    }
}
