//! What Rust writes into the maps lies where the programs read it, by the objects' own types.

use std::collections::BTreeMap;
use std::net::IpAddr;

use super::super::layout::{
    self, AddressBytes, DatagramsWords, FLAG_BYPASS_INBOUND, FLAG_DNS, FLAG_IPV6_OFF,
    FLAG_UDP_DENY, MAX_PODS, OwnAddressBytes, PodBytes, PodValue, ProbePortBytes, QUESTIONS,
    QuestionBytes, QuestionKeyWords, TupleBytes,
};
use super::super::objects::OBJECTS;
use super::super::reasons::REASONS;
use super::btf::{Btf, Map};

const HEADER: &str = include_str!("../../../../../bpf/include/underpass.h");
const FLOWS: &str = include_str!("../../../../../bpf/include/flows.h");

/// Of those that this process reads or writes: sizes of key and value.
const SHARED: [(&str, usize, usize); 9] = [
    ("datagrams", 4, size_of::<DatagramsWords>()),
    ("exempt", 8, 4),
    ("listeners", 4, 4),
    ("own_addresses", size_of::<OwnAddressBytes>(), 4),
    ("pods", 8, size_of::<PodBytes>()),
    ("probe_ports", size_of::<ProbePortBytes>(), 4),
    ("probes", size_of::<TupleBytes>(), 4),
    (
        "questions",
        size_of::<QuestionKeyWords>(),
        size_of::<QuestionBytes>(),
    ),
    ("reasons", 4, 8),
];
/// The programs' own.
const PRIVATE: [&str; 8] = [
    "accepted",
    "dialled",
    "flows",
    "originals",
    "probing",
    "raw_sockets",
    "records",
    "relays",
];
/// The agent's, whose tracer reads them (tests/contract/test_refusals.py).
const TRACED: [&str; 2] = ["refusals", "tracing"];

/// By name, of all objects: the same in each that has it.
fn maps() -> BTreeMap<String, Map> {
    let mut found: BTreeMap<String, Map> = BTreeMap::new();
    for (object, bytes) in OBJECTS {
        for (name, map) in Btf::of(bytes).maps() {
            if let Some(other) = found.get(name) {
                assert_eq!(other, &map, "{name} in {object}");
            }
            found.insert(name.into(), map);
        }
    }
    found
}

#[test]
fn each_map_is_known_here_by_its_keys_and_values() {
    let found = maps();
    let mut known: Vec<_> = SHARED.iter().map(|(name, ..)| *name).collect();
    known.extend(PRIVATE);
    known.extend(TRACED);
    known.sort_unstable();
    assert_eq!(found.keys().collect::<Vec<_>>(), known);
    for (name, key, value) in SHARED {
        assert_eq!((found[name].key, found[name].value), (key, value), "{name}");
    }
}

#[test]
fn places_and_reasons_are_as_many_here_as_there() {
    let found = maps();
    for name in ["pods", "listeners", "records", "datagrams"] {
        assert_eq!(found[name].entries, MAX_PODS, "{name}");
    }
    let last = REASONS.iter().map(|(number, ..)| *number).max();
    assert!(last.unwrap() < found["reasons"].entries);
    let line = format!("#define QUESTIONS {QUESTIONS}");
    assert!(FLOWS.lines().any(|other| other == line), "{line}");
}

#[test]
fn a_described_pod_is_read_as_it_was_written() {
    let lookup = Btf::of(object("lookup"));
    let (fields, size) = lookup.layout("pod");
    assert_eq!(size, size_of::<PodBytes>());
    let (own4, own6): (IpAddr, IpAddr) = ("192.0.2.1".parse().unwrap(), "fd00::1".parse().unwrap());
    let written = PodValue {
        slot: 0x0102_0304,
        flags: 0x0506_0708,
        budget: 0x090a_0b0c,
        own4: Some(own4),
        own6: Some(own6),
    }
    .encode();
    let read = |name: &str| {
        let (at, size) = fields[name];
        &written[at..at + size]
    };
    assert_eq!(read("slot"), 0x0102_0304_u32.to_ne_bytes());
    assert_eq!(read("flags"), 0x0506_0708_u32.to_ne_bytes());
    assert_eq!(read("budget"), 0x090a_0b0c_u32.to_ne_bytes());
    assert_eq!(read("own4"), layout::address(own4));
    assert_eq!(read("own6"), layout::address(own6));
    assert_eq!(layout::slot_of(&written), 0x0102_0304);
}

#[test]
fn an_own_address_is_read_as_it_was_written() {
    let lookup = Btf::of(object("lookup"));
    let (fields, size) = lookup.layout("own_address");
    assert_eq!(size, size_of::<OwnAddressBytes>());
    let ip: IpAddr = "192.0.2.1".parse().unwrap();
    let written = layout::own_address(0x0102_0304, ip);
    let (at, length) = fields["slot"];
    assert_eq!(written[at..at + length], 0x0102_0304_u32.to_ne_bytes());
    let (at, length) = fields["address"];
    assert_eq!(length, size_of::<AddressBytes>());
    assert_eq!(written[at..at + length], layout::address(ip));
}

#[test]
fn a_probe_port_is_read_as_it_was_written() {
    let kubelet = Btf::of(object("sockops_kubelet"));
    let (fields, size) = kubelet.layout("probe_port");
    assert_eq!(size, size_of::<ProbePortBytes>());
    let ip: IpAddr = "192.0.2.1".parse().unwrap();
    let written = layout::probe_port(ip, 0x0102);
    let (at, length) = fields["address"];
    assert_eq!(written[at..at + length], layout::address(ip));
    let (at, length) = fields["port"];
    assert_eq!(written[at..at + length], 0x0102_u16.to_ne_bytes());
    assert_eq!(layout::of_probe_port(&written), (ip, 0x0102));
    // Of a connection on record the pod is read alone.
    let (fields, size) = kubelet.layout("tuple");
    assert_eq!((fields["slot"], size), ((0, 4), size_of::<TupleBytes>()));
}

#[test]
fn flags_have_the_headers_values() {
    for (name, value) in [
        ("POD_DNS", FLAG_DNS),
        ("POD_BYPASS_INBOUND", FLAG_BYPASS_INBOUND),
        ("POD_UDP_DENY", FLAG_UDP_DENY),
        ("POD_IPV6_OFF", FLAG_IPV6_OFF),
    ] {
        let line = format!("#define {name} {value:#x}");
        assert!(HEADER.lines().any(|other| other == line), "{line}");
    }
}

#[test]
fn keys_have_no_bytes_that_nobody_sets() {
    for (_, bytes) in OBJECTS {
        let btf = Btf::of(bytes);
        for name in btf.maps().keys() {
            let holes = btf.key(name).map_or(0, |key| btf.holes(key));
            assert_eq!(holes, 0, "keys of {name}");
        }
    }
}

fn object(name: &str) -> &'static [u8] {
    OBJECTS.iter().find(|(other, _)| *other == name).unwrap().1
}
