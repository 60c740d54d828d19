//! On the real kernel: programs on cgroups of this test's own, clients as processes of their own
//! inside them, since a socket belongs to the cgroup of the process that makes it.

mod btf;
mod layout;
mod lookup;
mod programs;
mod renewal;

use std::io::{Read, Write};
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

use tokio::net::TcpStream;

use super::{CaptureConfig, Enrolment, Kernel};
use crate::inpod::testing::{TestNetns, config};
use crate::inpod::{Listeners, Netns, original_dst};

static NEXT: AtomicU32 = AtomicU32::new(0);

/// A node with one enrolled pod. The pod's own server would answer at 10.99.0.1 and fd99::1.
struct Node {
    kernel: Option<Kernel>,
    capture: CaptureConfig,
    pod: TestNetns,
    netns: Netns,
    listeners: Listeners,
}

/// Where cgroup2 is mounted.
fn cgroup2() -> PathBuf {
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
    let mut lines = mounts
        .lines()
        .map(|line| line.split(' ').collect::<Vec<_>>());
    let found = lines.find(|fields| fields[2] == "cgroup2");
    PathBuf::from(found.expect("cgroup2 is mounted")[1])
}

/// Removes what ended test processes left, which couldn't: they were in it.
fn sweep() {
    for entry in std::fs::read_dir(cgroup2()).unwrap().flatten() {
        let name = entry.file_name();
        let pid = name
            .to_str()
            .and_then(|name| name.strip_prefix("up-capture-"));
        if pid.is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists()) {
            let top = entry.path();
            for folder in ["dataplanes/one", "dataplanes", ""] {
                let _ = std::fs::remove_dir(top.join(folder));
            }
        }
    }
}

/// This process as a data plane: alone in a leaf, which all tests share.
fn leaf() -> &'static Path {
    static LEAF: OnceLock<PathBuf> = OnceLock::new();
    LEAF.get_or_init(|| {
        sweep();
        let leaf = cgroup2().join(format!("up-capture-{}/dataplanes/one", std::process::id()));
        std::fs::create_dir_all(&leaf).unwrap();
        std::fs::write(leaf.join("cgroup.procs"), "0").unwrap();
        leaf
    })
}

impl Node {
    fn new() -> Self {
        let leaf = leaf();
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("up-capture-{}-{number}", std::process::id());
        let pods = leaf
            .ancestors()
            .nth(2)
            .unwrap()
            .join(format!("pods-{number}"));
        std::fs::create_dir_all(&pods).unwrap();
        let pod = TestNetns::new();
        pod.ip("addr add 10.99.0.77/32 dev lo");
        let netns = pod.open();
        let config = config();
        let listeners = Listeners::bind(&netns, &config).unwrap();
        let capture = CaptureConfig {
            pods_cgroup: pods,
            kubelet_cgroup: None,
            dataplanes_cgroup: leaf.parent().unwrap().to_owned(),
            leaf: leaf.to_owned(),
            folder: Path::new("/sys/fs/bpf").join(name),
            ports: config.ports,
            ipv6: true,
            pod_budget: 100,
        };
        Self {
            kernel: Some(Kernel::open(capture.clone()).unwrap_or_else(|error| panic!("{error}"))),
            capture,
            pod,
            netns,
            listeners,
        }
    }

    fn redirected(&self) -> &crate::inpod::Redirected {
        self.listeners.redirected.as_ref().unwrap()
    }

    fn enrol(&mut self) {
        let pod = pod();
        let redirected = self.listeners.redirected.as_ref().unwrap();
        let listener = redirected.inbound_plaintext.as_fd();
        let kernel = self.kernel.as_mut().unwrap();
        kernel
            .enrol(&self.netns, &pod, listener)
            .unwrap_or_else(|error| panic!("{error}"));
    }

    /// A Python program inside the pod, its sockets in the pods' cgroup.
    fn run(&self, program: &str) -> Child {
        let script = format!(
            "echo $$ > {}/cgroup.procs && exec nsenter --net=/run/netns/{} python3 -c \"$1\"",
            self.capture.pods_cgroup.display(),
            self.pod.name
        );
        Command::new("sh")
            .args(["-c", &script, "sh", program])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap()
    }

    fn count(&self, reason: &str) -> u64 {
        let reasons = self.kernel.as_ref().unwrap().reasons().unwrap();
        reasons.iter().find(|r| r.name == reason).unwrap().count
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Some(kernel) = self.kernel.take() {
            let _ = kernel.remove_all();
        }
        let _ = std::fs::remove_dir_all(&self.capture.folder);
        let _ = std::fs::remove_dir(&self.capture.pods_cgroup);
    }
}

fn pod() -> Enrolment {
    Enrolment {
        addresses: vec!["10.99.0.1".parse().unwrap(), "fd99::1".parse().unwrap()],
        ..Enrolment::default()
    }
}

/// Dials, prints what it sees of both ends, then the first bytes that come.
fn client(to: &str) -> String {
    let (host, port) = to.rsplit_once(':').unwrap();
    let host = host.trim_matches(['[', ']']);
    format!(
        "import socket\n\
         s = socket.create_connection(({host:?}, {port}))\n\
         print(s.getpeername()[:2], s.getsockname()[0], flush=True)\n\
         print(s.recv(100).decode())\n"
    )
}

fn output(child: Child) -> String {
    let output = child.wait_with_output().unwrap();
    String::from_utf8(output.stdout).unwrap()
}

async fn accepted(listener: &tokio::net::TcpListener) -> (TcpStream, SocketAddr) {
    let waited = tokio::time::timeout(std::time::Duration::from_secs(10), listener.accept());
    waited.await.expect("a connection within 10 s").unwrap()
}

#[tokio::test]
async fn what_a_pod_dials_arrives_with_its_destination_and_the_pod_sees_that_peer() {
    let mut node = Node::new();
    node.enrol();
    for (to, seen, own) in [
        ("192.0.2.7:80", "('192.0.2.7', 80)", "10.99.0.1"),
        ("[2001:db8::7]:81", "('2001:db8::7', 81)", "fd99::1"),
        (
            "[::ffff:192.0.2.8]:82",
            "('::ffff:192.0.2.8', 82)",
            "::ffff:10.99.0.1",
        ),
    ] {
        let child = node.run(&client(to));
        let (mut stream, _) = accepted(&node.redirected().outbound).await;
        let dialled: SocketAddr = to.parse().unwrap();
        let dialled = crate::config::canonical_addr(dialled);
        assert_eq!(original_dst(&stream).unwrap(), dialled);
        tokio::io::AsyncWriteExt::write_all(&mut stream, b"hello")
            .await
            .unwrap();
        drop(stream);
        let printed = output(child);
        assert_eq!(printed, format!("{seen} {own}\nhello\n"));
    }
    assert_eq!(node.count("captured"), 3);
    assert_eq!(node.count("not_recorded") + node.count("stale"), 0);
}

#[tokio::test]
async fn what_comes_from_elsewhere_arrives_at_the_inbound_listener() {
    let mut node = Node::new();
    // Not an address of the pod: as if it came over a wire, with a source of its own.
    let outside = TestNetns::new();
    let (here, there) = ("veth-in", "veth-out");
    node.pod.ip(&format!(
        "link add {here} type veth peer name {there} netns {}",
        outside.name
    ));
    node.pod.ip(&format!("addr add 10.98.0.1/24 dev {here}"));
    node.pod
        .ip(&format!("addr add fd98::1/64 dev {here} nodad"));
    node.pod.ip(&format!("link set {here} up"));
    outside.ip(&format!("addr add 10.98.0.2/24 dev {there}"));
    outside.ip(&format!("addr add fd98::2/64 dev {there} nodad"));
    outside.ip(&format!("link set {there} up"));
    node.enrol();
    let far = outside.open();
    for (to, from) in [("10.98.0.1:80", "10.98.0.2"), ("[fd98::1]:80", "fd98::2")] {
        let dialled: SocketAddr = to.parse().unwrap();
        let dial = tokio::task::spawn_blocking({
            let far = Netns::new(outside.fd()).unwrap();
            move || crate::inpod::testing::dial(&far, to)
        });
        let (stream, peer) = accepted(&node.redirected().inbound_plaintext).await;
        let _client = dial.await.unwrap().unwrap();
        assert_eq!(
            crate::config::canonical_addr(stream.local_addr().unwrap()),
            dialled
        );
        assert_eq!(crate::config::canonical_addr(peer).ip().to_string(), from);
    }
    assert_eq!(node.count("inbound"), 2);
    drop(far);
}

#[tokio::test]
async fn the_data_planes_own_connection_reaches_the_application() {
    let mut node = Node::new();
    node.enrol();
    let _server = node.run(
        "import socket\n\
             s = socket.create_server(('10.99.0.1', 80))\n\
             print('ready', flush=True)\n\
             c, peer = s.accept()\n\
             c.sendall(repr(peer[0]).encode())\n\
             c.recv(1)\n",
    );
    let mut server = _server;
    let mut ready = [0; 6];
    server
        .stdout
        .as_mut()
        .unwrap()
        .read_exact(&mut ready)
        .unwrap();
    // A client's address that isn't the pod's own.
    node.pod.ip("rule add fwmark 0x111/0xfff lookup 100");
    node.pod.ip("route add local default dev lo table 100");
    let sysctl = || std::fs::write("/proc/sys/net/ipv4/tcp_fwmark_accept", "1");
    node.netns.enter(sysctl).unwrap().unwrap();
    let netns = std::sync::Arc::new(node.pod.open());
    netns.captured_as(super::OwnAddresses::default());
    let config = config();
    let dst = "10.99.0.1:80".parse().unwrap();
    let connect = netns.connect(&config, dst, Some("192.0.2.9".parse().unwrap()));
    let connect = tokio::time::timeout(std::time::Duration::from_secs(5), connect);
    let mut stream = connect.await.expect("connects").unwrap();
    let mut got = [0; 11];
    tokio::io::AsyncReadExt::read_exact(&mut stream, &mut got)
        .await
        .unwrap();
    assert_eq!(&got, b"'192.0.2.9'");
    assert_eq!(node.count("relay"), 1);
    drop(stream);
    server.wait().unwrap();
    let _ = std::io::stdout().flush();
}

#[tokio::test]
async fn a_place_is_given_again_but_never_that_of_another_data_planes_pod() {
    let mut node = Node::new();
    let pins = node.capture.folder.join("pods");
    let held = || {
        let mut names: Vec<_> = std::fs::read_dir(&pins)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    };
    node.enrol();
    assert_eq!(held(), ["0"]);
    node.kernel.as_mut().unwrap().release(&node.netns).unwrap();
    assert!(held().is_empty());
    node.enrol();
    assert_eq!(held(), ["0"]);
    // As a predecessor that still serves: it pinned what this one hasn't read.
    let other = std::fs::rename(pins.join("0"), pins.join("1"));
    other.unwrap();
    node.kernel.as_mut().unwrap().release(&node.netns).unwrap();
    std::fs::rename(pins.join("1"), pins.join("0")).unwrap();
    node.enrol();
    assert_eq!(held(), ["0", "1"]);
}

#[tokio::test]
async fn own_addresses_that_somebody_changed_in_the_map_are_found_and_put_right() {
    let mut node = Node::new();
    node.enrol();
    let pod = pod();
    let kernel = node.kernel.as_mut().unwrap();
    assert!(kernel.verify(&node.netns, &pod, true).unwrap().is_empty());
    let own = |ip: &str| super::layout::own_address(0, ip.parse().unwrap());
    let wrong = ["its own addresses aren't those in the map"];
    kernel.own_addresses.remove(&own("10.99.0.1")).unwrap();
    assert_eq!(kernel.verify(&node.netns, &pod, true).unwrap(), wrong);
    node.enrol();
    let kernel = node.kernel.as_mut().unwrap();
    kernel.own_addresses.insert(own("192.0.2.1"), 1, 0).unwrap();
    // What this process remembers of the map is too old from here on.
    kernel.places.forget_when_read();
    assert_eq!(kernel.verify(&node.netns, &pod, true).unwrap(), wrong);
    node.enrol();
    let kernel = node.kernel.as_mut().unwrap();
    assert!(kernel.verify(&node.netns, &pod, true).unwrap().is_empty());
    assert!(kernel.own_addresses.get(&own("192.0.2.1"), 0).is_err());
}

#[tokio::test]
async fn a_pod_whose_own_cgroup_the_programs_dont_cover_is_told() {
    let mut node = Node::new();
    node.enrol();
    let (kernel, netns) = (node.kernel.as_mut().unwrap(), &node.netns);
    let mut found = |cgroup: PathBuf| {
        let cgroup = Some(cgroup);
        let pod = Enrolment { cgroup, ..pod() };
        kernel.verify(netns, &pod, true).unwrap()
    };
    let (below, outside) = (
        node.capture.pods_cgroup.join("its-own"),
        node.capture.pods_cgroup.with_extension("elsewhere"),
    );
    std::fs::create_dir(&below).unwrap();
    std::fs::create_dir(&outside).unwrap();
    let (covered, uncovered) = (found(below.clone()), found(outside.clone()));
    std::fs::remove_dir(&below).unwrap();
    std::fs::remove_dir(&outside).unwrap();
    assert_eq!(covered, Vec::<String>::new());
    let wanted = format!("connect4 doesn't run for {}", outside.display());
    assert!(uncovered.contains(&wanted), "{uncovered:?}");
    // One that went with its last process says nothing.
    assert_eq!(found(outside), Vec::<String>::new());
}
