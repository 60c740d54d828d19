//! Each exit of `lookup`, by its reason: run in the kernel with contexts made up (the hooks of
//! cgroups can't be: 6.18 answers ENOTSUPP for their types).

use std::net::{IpAddr, SocketAddr, TcpListener};
use std::os::fd::AsRawFd;

use aya::maps::{HashMap, MapData};

use super::super::layout::{self, FLAG_BYPASS_INBOUND, FLAG_IPV6_OFF, FLAG_UDP_DENY};
use super::super::objects::{Loaded, Objects};
use super::super::sys;
use super::Node;

const SLOT: u32 = 7;
const TCP: u32 = 6;
const UDP: u32 = 17;
const DROP: u32 = 0;
const PASS: u32 = 1;
const HERE: &str = "10.99.0.1:80";
const THERE: &str = "192.0.2.9:40000";
const HERE6: &str = "[fd99::1]:80";
const THERE6: &str = "[2001:db8::9]:40000";

type TupleBytes = [u8; 40];

/// A pod in a place of its own, without a program attached anywhere for it.
struct Pod {
    node: Node,
    objects: Objects,
}

/// What an instance said to one packet.
#[derive(Debug, PartialEq, Eq)]
struct Said {
    verdict: u32,
    /// Exits counted, by name.
    reasons: Vec<(&'static str, u64)>,
    /// Of the socket that it chose; 0: none.
    socket: u64,
}

impl Pod {
    fn new() -> Self {
        let mut node = Node::new();
        let own = layout::own_address(SLOT, "10.99.0.1".parse().unwrap());
        let kernel = node.kernel.as_mut().unwrap();
        kernel.own_addresses.insert(own, 1, 0).unwrap();
        let objects = Objects::new(&node.capture.folder.join("maps"), &node.capture.ports);
        Self { node, objects }
    }

    fn listen(&mut self, listener: &TcpListener) -> u64 {
        let listeners = &mut self.node.kernel.as_mut().unwrap().listeners;
        listeners.set(SLOT, &listener.as_raw_fd(), 0).unwrap();
        rustix::net::sockopt::socket_cookie(listener).unwrap()
    }

    fn relays(&mut self) -> HashMap<MapData, TupleBytes, u32> {
        let mut opened = self.objects.open_maps().unwrap();
        HashMap::try_from(opened.take_map("relays").unwrap()).unwrap()
    }

    fn instance(&mut self, flags: u32) -> Loaded {
        let loaded = self.objects.lookup(SLOT, flags);
        loaded.unwrap_or_else(|error| panic!("{error}"))
    }

    fn ask(&mut self, flags: u32, protocol: u32, local: &str, remote: &str) -> Said {
        let program = self.instance(flags);
        let before = self.counts();
        let mut context = context(protocol, local.parse().unwrap(), remote.parse().unwrap());
        let verdict = sys::test_run(program.fd().unwrap(), &mut context).unwrap();
        let after = self.counts();
        let grown = before.iter().zip(&after).filter(|(was, is)| was != is);
        Said {
            verdict,
            reasons: grown
                .map(|((name, was), (_, is))| (*name, is - was))
                .collect(),
            socket: u64::from_ne_bytes(context[..8].try_into().unwrap()),
        }
    }

    fn counts(&self) -> Vec<(&'static str, u64)> {
        let reasons = self.node.kernel.as_ref().unwrap().reasons().unwrap();
        reasons.iter().map(|one| (one.name, one.count)).collect()
    }
}

/// `struct bpf_sk_lookup` of linux/bpf.h.
fn context(protocol: u32, local: SocketAddr, remote: SocketAddr) -> [u8; 72] {
    let mut bytes = [0; 72];
    let family = if local.is_ipv4() { 2_u32 } else { 10 };
    bytes[8..12].copy_from_slice(&family.to_ne_bytes());
    bytes[12..16].copy_from_slice(&protocol.to_ne_bytes());
    for (at, ip) in [(16, remote.ip()), (40, local.ip())] {
        match ip {
            IpAddr::V4(ip) => bytes[at..at + 4].copy_from_slice(&ip.octets()),
            IpAddr::V6(ip) => bytes[at + 4..at + 20].copy_from_slice(&ip.octets()),
        }
    }
    bytes[36..38].copy_from_slice(&remote.port().to_be_bytes());
    bytes[60..64].copy_from_slice(&u32::from(local.port()).to_ne_bytes());
    bytes
}

fn passed(reason: &'static str) -> Said {
    Said {
        verdict: PASS,
        reasons: vec![(reason, 1)],
        socket: 0,
    }
}

fn dropped(reason: &'static str) -> Said {
    Said {
        verdict: DROP,
        ..passed(reason)
    }
}

fn tuple(local: &str, remote: &str) -> TupleBytes {
    let (local, remote): (SocketAddr, SocketAddr) =
        (local.parse().unwrap(), remote.parse().unwrap());
    let mut bytes = [0; 40];
    bytes[..4].copy_from_slice(&SLOT.to_ne_bytes());
    bytes[4..6].copy_from_slice(&local.port().to_ne_bytes());
    bytes[6..8].copy_from_slice(&remote.port().to_ne_bytes());
    bytes[8..24].copy_from_slice(&layout::address(local.ip()));
    bytes[24..].copy_from_slice(&layout::address(remote.ip()));
    bytes
}

#[tokio::test]
async fn what_comes_from_elsewhere_gets_the_listener_by_either_family() {
    let mut pod = Pod::new();
    let listener = TcpListener::bind("[::]:0").unwrap();
    let socket = pod.listen(&listener);
    for (local, remote) in [(HERE, THERE), (HERE6, THERE6)] {
        let inbound = Said {
            socket,
            ..passed("inbound")
        };
        assert_eq!(pod.ask(0, TCP, local, remote), inbound);
    }
}

#[tokio::test]
async fn without_a_listener_or_with_one_of_the_other_family_it_is_dropped() {
    let mut pod = Pod::new();
    assert_eq!(pod.ask(0, TCP, HERE, THERE), dropped("no_listener"));
    let listener = TcpListener::bind("0.0.0.0:0").unwrap();
    pod.listen(&listener);
    assert_eq!(pod.ask(0, TCP, HERE6, THERE6), dropped("assign"));
    // A listener that closes leaves its place by itself.
    drop(listener);
    assert_eq!(pod.ask(0, TCP, HERE, THERE), dropped("no_listener"));
}

#[tokio::test]
async fn what_is_the_pods_own_affair_passes_also_without_a_listener() {
    let mut pod = Pod::new();
    for (local, remote) in [
        ("127.0.0.1:80", "127.0.0.1:40000"),
        ("127.9.9.9:80", "10.99.0.1:40000"),
        ("[::1]:80", "[::1]:40000"),
    ] {
        assert_eq!(pod.ask(0, TCP, local, remote), passed("loopback"));
    }
    let own = "10.99.0.1:40000";
    assert_eq!(pod.ask(0, TCP, HERE, own), passed("self"));
    // Another pod's own address is nothing special here.
    let other = "10.99.0.2:40000";
    assert_eq!(pod.ask(0, TCP, HERE, other), dropped("no_listener"));
}

#[tokio::test]
async fn the_mesh_itself_passes_by_its_port_or_its_record() {
    let mut pod = Pod::new();
    let hbone = format!("10.99.0.1:{}", pod.node.capture.ports.inbound_hbone);
    assert_eq!(pod.ask(0, TCP, &hbone, THERE), passed("hbone"));
    pod.relays().insert(tuple(HERE, THERE), 0, 0).unwrap();
    assert_eq!(pod.ask(0, TCP, HERE, THERE), passed("relay"));
    for (local, remote) in [
        (HERE, "192.0.2.9:40001"),
        (HERE, "192.0.2.8:40000"),
        ("10.99.0.1:81", THERE),
        ("10.99.0.77:80", THERE),
    ] {
        let said = pod.ask(0, TCP, local, remote);
        assert_eq!(said, dropped("no_listener"), "{local} {remote}");
    }
}

#[tokio::test]
async fn a_record_that_nobody_took_back_opens_no_way_for_long() {
    let mut pod = Pod::new();
    let uptime = std::fs::read_to_string("/proc/uptime").unwrap();
    let (seconds, _) = uptime.split_once('.').unwrap();
    let milliseconds = seconds.parse::<u64>().unwrap() * 1000;
    let now = u32::try_from(milliseconds % (1 << 32)).unwrap();
    let mut relays = pod.relays();
    relays.insert(tuple(HERE, THERE), now + 1, 0).unwrap();
    assert_eq!(pod.ask(0, TCP, HERE, THERE), passed("relay"));
    relays
        .insert(tuple(HERE, THERE), now.wrapping_sub(5000), 0)
        .unwrap();
    assert_eq!(pod.ask(0, TCP, HERE, THERE), dropped("no_listener"));
}

#[tokio::test]
async fn settings_of_the_pod_decide_about_the_rest() {
    let mut pod = Pod::new();
    let bypassed = pod.ask(FLAG_BYPASS_INBOUND, TCP, HERE, THERE);
    assert_eq!(bypassed, passed("bypass_inbound"));
    let off = pod.ask(FLAG_IPV6_OFF, TCP, HERE6, THERE6);
    assert_eq!(off, dropped("ipv6_off"));
    let v4 = pod.ask(FLAG_IPV6_OFF, TCP, HERE, THERE);
    assert_eq!(v4, dropped("no_listener"));
    assert_eq!(pod.ask(0, UDP, HERE, THERE), passed("unprotected"));
    let denied = pod.ask(FLAG_UDP_DENY, UDP, HERE, THERE);
    assert_eq!(denied, dropped("udp_denied"));
    let own = pod.ask(FLAG_UDP_DENY, UDP, HERE, "10.99.0.1:40000");
    assert_eq!(own, passed("self"));
}

#[tokio::test]
async fn the_kernel_offers_no_other_family() {
    let mut pod = Pod::new();
    let program = pod.instance(0);
    let mut made = context(TCP, HERE.parse().unwrap(), THERE.parse().unwrap());
    made[8..12].copy_from_slice(&1_u32.to_ne_bytes());
    let refused = sys::test_run(program.fd().unwrap(), &mut made).unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(libc::EAFNOSUPPORT));
}
