//! The whole process between two nodes: applications in captured namespaces, certificates from a
//! CA, records as a control plane pushes them.

mod node;

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread::JoinHandle;

use node::ca::Ca;
use node::client::{Client, done};
use node::netns::Netns;
use node::process::Dataplane;
use node::records::{deny, identity, pod, policies, workloads};
use node::{PATIENCE, eventually};
use pb::request::Body as Ask;
use rustix::process::{Resource, Rlimit, Signal, getrlimit, setrlimit};
use underpass_core::wire::control as pb;

/// A client pod on one node and a server pod on another.
struct Mesh {
    ca: Ca,
    client: Side,
    server: Side,
    _app: App,
}

struct Side {
    netns: Netns,
    dataplane: Dataplane,
    agent: Client,
}

const APP4: &str = "10.98.0.2:8080";
const APP6: &str = "[fd98::2]:8080";

impl Mesh {
    fn start() -> Self {
        let (a, b) = Netns::pair();
        let app = App::start(&b);
        let ca = Ca::new();
        let client = Side::start(a, "client", &ca);
        let server = Side::start(b, "server", &ca);
        Self {
            ca,
            client,
            server,
            _app: app,
        }
    }

    fn dial(&self, addr: &str) -> TcpStream {
        let addr: SocketAddr = addr.parse().expect("an address");
        self.client.netns.run(move || {
            let stream = TcpStream::connect(addr).expect("captured");
            stream.set_read_timeout(Some(PATIENCE)).expect("a socket");
            stream
        })
    }
}

impl Side {
    /// One pod, named as its account and its node.
    fn start(netns: Netns, name: &str, ca: &Ca) -> Self {
        let dataplane = Dataplane::start();
        let mut agent = dataplane.agent(name);
        teach(&mut agent);
        agent.add(name, name, &netns, false);
        agent.certify(ca, &identity(name));
        netns.capture();
        Self {
            netns,
            dataplane,
            agent,
        }
    }
}

fn teach(agent: &mut Client) {
    agent.apply(workloads(&[
        pod("client", "client", "client", &["10.98.0.1", "fd98::1"]),
        pod("server", "server", "server", &["10.98.0.2", "fd98::2"]),
    ]));
    agent.apply(policies(&[]));
}

/// Tells each client its address, then echoes.
struct App {
    stop: Arc<AtomicBool>,
}

impl App {
    fn start(netns: &Netns) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let listener = netns.run(|| TcpListener::bind("[::]:8080").expect("a free port"));
        listener.set_nonblocking(true).expect("a socket");
        let stopped = stop.clone();
        std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                match listener.accept() {
                    Ok((stream, peer)) => {
                        std::thread::spawn(move || echo(stream, peer));
                    }
                    Err(_) => std::thread::sleep(std::time::Duration::from_millis(2)),
                }
            }
        });
        Self { stop }
    }
}

impl Drop for App {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn echo(mut stream: TcpStream, peer: SocketAddr) {
    let hello = format!("{}\n", peer.ip().to_canonical());
    let _ = stream.set_nonblocking(false);
    let _ = stream.write_all(hello.as_bytes());
    let mut buffer = [0; 4096];
    while let Ok(count @ 1..) = stream.read(&mut buffer) {
        if stream.write_all(&buffer[..count]).is_err() {
            return;
        }
    }
}

/// What the application calls this client.
fn greeting(stream: &mut TcpStream) -> std::io::Result<IpAddr> {
    let mut line = Vec::new();
    let mut byte = [0];
    loop {
        stream.read_exact(&mut byte)?;
        if byte == *b"\n" {
            let text = String::from_utf8(line).expect("text");
            return Ok(text.parse().expect("an address"));
        }
        line.push(byte[0]);
    }
}

fn ping(stream: &mut TcpStream) -> std::io::Result<()> {
    stream.write_all(b"ping")?;
    let mut answer = [0; 4];
    stream.read_exact(&mut answer)?;
    assert_eq!(&answer, b"ping");
    Ok(())
}

#[test]
fn bytes_cross_encrypted_and_the_application_sees_the_client() {
    let mut mesh = Mesh::start();
    for (app, client) in [(APP4, "10.98.0.1"), (APP6, "fd98::1")] {
        let mut stream = mesh.dial(app);
        let seen = greeting(&mut stream).expect("the application answers");
        assert_eq!(seen, client.parse::<IpAddr>().unwrap());
        ping(&mut stream).expect("echoed");
        let out = mesh.client.agent.connections();
        let out = out.iter().find(|c| c.original_dst == app);
        let out = out.expect("the connection is listed");
        assert_eq!(out.protocol, "HBONE");
        assert_eq!(out.src_identity, identity("client"));
        assert_eq!(out.dst_identity, identity("server"));
        let inbound = mesh.server.agent.connections();
        assert!(
            inbound.iter().any(|c| c.actual_dst == app
                && c.src_identity == identity("client")
                && c.direction() == pb::connection::Direction::Inbound),
            "{inbound:?}"
        );
        // Half-close: what was sent before it comes back, and then the end.
        stream.write_all(b"last").unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut rest = Vec::new();
        stream.read_to_end(&mut rest).expect("a clean end");
        assert_eq!(rest, b"last");
    }
    assert_eq!(mesh.server.netns.packets("plaintext"), 0);
    assert!(mesh.server.netns.packets("tunnelled") > 0);
    eventually("both ends forget the connections", || {
        mesh.client.agent.connections().is_empty() && mesh.server.agent.connections().is_empty()
    });
    let metrics = mesh.server.agent.metrics();
    let opened = metrics.lines().find(|line| {
        line.starts_with("istio_tcp_connections_opened_total")
            && line.contains("connection_security_policy=\"mutual_tls\"")
            && line.contains(&identity("client"))
    });
    assert!(opened.is_some(), "{metrics}");
}

#[test]
fn a_denied_identity_gets_nothing_and_its_live_connection_ends() {
    let mut mesh = Mesh::start();
    let mut live = mesh.dial(APP4);
    greeting(&mut live).expect("allowed so far");
    ping(&mut live).expect("echoed");
    let no_clients = policies(&[deny("no-clients", "client")]);
    mesh.server.agent.apply(no_clients);
    let mut rest = [0; 16];
    let cut = live.read(&mut rest);
    assert!(matches!(cut, Ok(0) | Err(_)), "{cut:?}");
    let mut refused = mesh.dial(APP4);
    assert!(greeting(&mut refused).is_err());
}

#[test]
fn without_a_certificate_the_connection_fails_and_recovers_when_it_comes() {
    let (a, b) = Netns::pair();
    let _app = App::start(&b);
    let ca = Ca::new();
    let _server = Side::start(b, "server", &ca);
    let dataplane = Dataplane::start();
    let mut agent = dataplane.agent("client");
    teach(&mut agent);
    agent.add("client", "client", &a, false);
    a.capture();
    let fail = pb::FailCertificate {
        identity: identity("client"),
        text: "the CA said no".into(),
    };
    done(agent.ask(Ask::FailCertificate(fail)));
    let dial = || {
        a.run(|| {
            let mut stream = TcpStream::connect(APP4)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            greeting(&mut stream)
        })
    };
    assert!(dial().is_err());
    agent.certify(&ca, &identity("client"));
    assert_eq!(dial().unwrap(), "10.98.0.1".parse::<IpAddr>().unwrap());
}

#[test]
fn connections_outlive_the_agent() {
    let mut mesh = Mesh::start();
    let mut live = mesh.dial(APP4);
    greeting(&mut live).expect("the application answers");
    let again = mesh.client.dataplane.socket.clone();
    drop(mesh.client.agent);
    ping(&mut live).expect("echoed while no agent is there");
    let addr: SocketAddr = APP4.parse().unwrap();
    let fresh = mesh.client.netns.run(move || {
        let mut stream = TcpStream::connect(addr)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        greeting(&mut stream)
    });
    fresh.expect("new connections, too");
    mesh.client.agent = Client::agent(&again, "client");
    assert_eq!(mesh.client.agent.hello.pods.len(), 1);
    assert!(mesh.client.agent.hello.synced);
    ping(&mut live).expect("echoed under the next agent");
}

#[test]
fn a_successor_takes_over_without_a_failed_request() {
    let mut mesh = Mesh::start();
    let load = Load::start(&mesh.client.netns);
    eventually("requests succeed", || load.done() > 20);
    for _ in 0..2 {
        let old = &mut mesh.server;
        let new = Dataplane::start();
        let mut agent = new.agent("server");
        teach(&mut agent);
        agent.add("server", "server", &old.netns, true);
        agent.certify(&mesh.ca, &identity("server"));
        let take = pb::TakeListeners {
            socket: old.dataplane.socket.display().to_string(),
        };
        done(agent.ask(Ask::TakeListeners(take)));
        let drain = pb::Drain {
            deadline_ms: 2000,
            exit: true,
        };
        done(old.agent.ask(Ask::Drain(drain)));
        assert!(old.dataplane.wait().success());
        old.agent = agent;
        old.dataplane = new;
        let so_far = load.done();
        eventually("requests go on", || load.done() > so_far + 20);
    }
    load.finish();
}

#[test]
fn sigterm_lets_a_connection_end_within_the_deadline() {
    let mut mesh = Mesh::start();
    let mut live = mesh.dial(APP4);
    greeting(&mut live).expect("the application answers");
    mesh.server.dataplane.signal(Signal::TERM);
    ping(&mut live).expect("echoed while draining");
    drop(live);
    let begun = std::time::Instant::now();
    assert!(mesh.server.dataplane.wait().success());
    // The deadline is 5 s; the last connection ended long before.
    assert!(begun.elapsed().as_secs() < 4, "{:?}", begun.elapsed());
}

/// Short connections one after another; one that fails ends it.
struct Load {
    stop: Arc<AtomicBool>,
    count: Arc<AtomicU32>,
    thread: JoinHandle<std::io::Result<()>>,
}

impl Load {
    fn start(netns: &Netns) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let count = Arc::new(AtomicU32::new(0));
        let (stopped, counted) = (stop.clone(), count.clone());
        let fd = netns.fd();
        let thread = std::thread::spawn(move || {
            use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
            use std::os::fd::AsFd;
            move_into_link_name_space(fd.as_fd(), Some(LinkNameSpaceType::Network))?;
            while !stopped.load(Ordering::Relaxed) {
                let mut stream = TcpStream::connect(APP4)?;
                stream.set_read_timeout(Some(PATIENCE))?;
                greeting(&mut stream)?;
                ping(&mut stream)?;
                counted.fetch_add(1, Ordering::Relaxed);
            }
            Ok(())
        });
        Self {
            stop,
            count,
            thread,
        }
    }

    fn done(&self) -> u32 {
        assert!(!self.thread.is_finished(), "a request failed");
        self.count.load(Ordering::Relaxed)
    }

    fn finish(self) {
        self.stop.store(true, Ordering::Relaxed);
        let result = self.thread.join().expect("no panic");
        result.expect("no request failed");
    }
}

/// Resident memory in KiB.
fn memory(dataplane: &Dataplane) -> usize {
    let status = std::fs::read_to_string(format!("/proc/{}/status", dataplane.pid()));
    let status = status.expect("it runs");
    let line = status.lines().find(|line| line.starts_with("VmRSS:"));
    let words = line.expect("every process has it").split_whitespace();
    words
        .rev()
        .nth(1)
        .expect("a number")
        .parse()
        .expect("a number")
}

#[test]
fn ten_thousand_half_open_handshakes_are_bounded_and_leave_others_alone() {
    let mut mesh = Mesh::start();
    let mut live = mesh.dial(APP4);
    greeting(&mut live).expect("served");
    let files = getrlimit(Resource::Nofile);
    let all = Rlimit {
        current: files.maximum,
        maximum: files.maximum,
    };
    setrlimit(Resource::Nofile, all).expect("its own hard limit");

    let server = &mesh.server;
    let (before, descriptors) = (memory(&server.dataplane), server.dataplane.open_files());
    let silent = server.netns.run(|| {
        // Some are reset before they know that they were connected.
        let dial = |_| TcpStream::connect("127.0.0.1:15008").ok();
        (0..10_000).map(dial).collect::<Vec<_>>()
    });
    let refused = |agent: &mut Client| {
        let text = agent.metrics();
        let line = text
            .lines()
            .find(|line| line.contains("\"too_many_handshakes\""));
        let count = line.and_then(|line| line.rsplit(' ').next()?.parse::<u64>().ok());
        count.unwrap_or(0)
    };
    eventually("most are refused", || {
        refused(&mut mesh.server.agent) >= 7_000
    });
    let server = &mesh.server;
    let grown = memory(&server.dataplane).saturating_sub(before);
    assert!(
        grown < 100 << 10,
        "{grown} KiB for at most 1024 handshakes at a time"
    );
    // A connection is accepted before it can be refused.
    eventually("what is refused is closed", || {
        server.dataplane.open_files() < descriptors + 1_100
    });
    live.write_all(b"ping").expect("it lives");
    let mut echoed = [0; 4];
    live.read_exact(&mut echoed).expect("it lives");
    // Over the tunnel that stands.
    greeting(&mut mesh.dial(APP4)).expect("served meanwhile");

    drop(silent);
    let server = &mesh.server;
    eventually("nothing is left of them", || {
        server.dataplane.open_files() <= descriptors + 2
    });
}
