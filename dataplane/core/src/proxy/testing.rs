//! Two pods on two nodes, in real network namespaces, with real redirection and a proxy each.

use std::io::Write;
use std::net::SocketAddr;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};

use super::{Names, NodeAddresses, PodProxy, Shared};
use crate::config::{Config, Limits, TelemetryConfig};
use crate::identity::Identity;
use crate::inpod::{Descriptors, Listeners, Netns, PodInfo};
use crate::state::Store;
use crate::state::fixture::{Push, pod};
use crate::telemetry::Telemetry;
use crate::tls::CertStore;
use crate::tls::testing::Ca;
use crate::wire::{control as pb, security, workload as wds};

pub const PATIENCE: Duration = Duration::from_secs(20);

const RULES: &str = "
table inet up {
  chain mark_in { type filter hook prerouting priority mangle;
    meta mark and 0xfff == 0x539 ct mark set 0x111
  }
  chain mark_out { type route hook output priority mangle;
    ct mark and 0xfff == 0x111 meta mark set ct mark
  }
  chain out { type nat hook output priority -100;
    meta mark and 0xfff == 0x111 accept
    oifname lo ip daddr != 127.0.0.1 accept
    oifname lo ip6 daddr != ::1 accept
    meta l4proto tcp ip daddr != 127.0.0.1 meta mark and 0xfff != 0x539 redirect to :15001
    meta l4proto tcp ip6 daddr != ::1 meta mark and 0xfff != 0x539 redirect to :15001
  }
  chain in { type nat hook prerouting priority dstnat;
    meta nfproto ipv4 tcp dport != 15008 ip daddr != 127.0.0.1 meta mark and 0xfff != 0x539 redirect to :15006
    meta nfproto ipv6 tcp dport != 15008 ip6 daddr != ::1 meta mark and 0xfff != 0x539 redirect to :15006
  }
}";

static NEXT: AtomicU32 = AtomicU32::new(0);

/// A namespace that goes with its value.
pub struct TestNetns {
    pub name: String,
}

/// Of both nodes; their names and network are the world's.
#[derive(Default)]
pub struct Settings {
    pub config: pb::InstanceConfig,
    /// Sockets that a process may open.
    pub descriptors: Option<usize>,
    /// db is its agent's own workload, which serves these.
    pub db_only_ports: Vec<u16>,
    /// Where db's node is, if not in web's network.
    pub db_network: Option<&'static str>,
}

/// One pod with its node's data plane.
pub struct Side {
    pub shared: Arc<Shared>,
    pub proxy: Arc<PodProxy>,
    pub netns: Arc<Netns>,
    test: TestNetns,
}

pub struct World {
    pub web: Side,
    pub db: Side,
    /// That signed both.
    pub ca: Ca,
    log: Receiver<Vec<u8>>,
    seen: String,
    _log: tracing::subscriber::DefaultGuard,
}

struct Tell(Sender<Vec<u8>>);

impl Write for Tell {
    fn write(&mut self, buf: &[u8]) -> std::io::Result<usize> {
        let _ = self.0.send(buf.to_vec());
        Ok(buf.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl TestNetns {
    pub fn new(role: &str) -> Self {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let it = Self {
            name: format!("up-proxy-{}-{role}{number}", std::process::id()),
        };
        run(&["ip", "netns", "add", &it.name]);
        it.ip("link set lo up");
        it
    }

    pub fn ip(&self, args: &str) {
        let mut all = vec!["ip", "-n", &self.name];
        all.extend(args.split(' '));
        run(&all);
    }

    fn redirect(&self) {
        let net = format!("--net=/run/netns/{}", self.name);
        run(&["nsenter", &net, "nft", RULES]);
        for family in ["-4", "-6"] {
            self.ip(&format!(
                "{family} rule add fwmark 0x111/0xfff pref 32764 lookup 100"
            ));
            self.ip(&format!(
                "{family} route add local default dev lo table 100"
            ));
        }
    }

    pub fn open(&self) -> Arc<Netns> {
        let file = std::fs::File::open(format!("/run/netns/{}", self.name)).expect("made in new");
        Arc::new(Netns::new(file.into()).expect("a network namespace"))
    }
}

impl Drop for TestNetns {
    fn drop(&mut self) {
        let _ = Command::new("ip")
            .args(["netns", "del", &self.name])
            .status();
    }
}

fn run(command: &[&str]) {
    let output = Command::new(command[0]).args(&command[1..]).output();
    let output = output.expect("is installed");
    let text = String::from_utf8_lossy(&output.stderr);
    let program = command[0];
    assert!(output.status.success(), "{program}: {text}");
}

/// The record of one of the two pods.
pub fn record(name: &str) -> wds::Workload {
    let (node, addresses) = match name {
        "web" => ("node-1", ["10.77.0.1", "fd77::1"]),
        _ => ("node-2", ["10.77.0.2", "fd77::2"]),
    };
    wds::Workload {
        node: node.into(),
        addresses: addresses.map(crate::state::fixture::ip).to_vec(),
        canonical_name: name.into(),
        canonical_revision: "v1".into(),
        workload_name: format!("{name}-deploy"),
        cluster_id: "c1".into(),
        ..pod("shop", name, "10.77.0.9")
    }
}

/// DENY of one principal in the namespace.
pub fn deny(name: &str, principal: &str) -> security::Authorization {
    let exact = security::string_match::MatchType::Exact(principal.into());
    let matches = vec![security::Match {
        principals: vec![security::StringMatch {
            match_type: Some(exact),
        }],
        ..Default::default()
    }];
    security::Authorization {
        name: name.into(),
        namespace: "shop".into(),
        scope: security::Scope::Namespace.into(),
        action: security::Action::Deny.into(),
        rules: vec![security::Rule {
            clauses: vec![security::Clause { matches }],
        }],
        ..Default::default()
    }
}

impl Side {
    fn new(
        name: &str,
        node: &str,
        test: TestNetns,
        ca: &Ca,
        telemetry: Arc<Telemetry>,
        settings: &Settings,
    ) -> Self {
        let raw = pb::InstanceConfig {
            node: node.into(),
            network: match (name, settings.db_network) {
                ("db", Some(network)) => network.into(),
                _ => "net".into(),
            },
            ..settings.config.clone()
        };
        let config = Arc::new(Config::parse(&raw).unwrap());
        let store = Store::new(config.clone());
        let push = Push::addresses()
            .workload(record("web"))
            .workload(record("db"));
        push.accepted_by(&store);
        let (certs, _events) = CertStore::new();
        certs.trust.count_with(telemetry.metrics.crl.clone());
        let account = format!("{name}-sa");
        let identity = Identity::new("cluster.local", "shop", account.as_str());
        ca.install(&certs, &identity);
        let shared = Arc::new(Shared {
            config: config.clone(),
            // web plays the other node's host.
            node: NodeAddresses::new(|| Ok(vec!["10.77.0.1".parse().unwrap()])),
            dns_cache: crate::dns::Cache::new(config.dns.cache_entries),
            limits: Arc::new(arc_swap::ArcSwap::from_pointee(Limits::default())),
            names: Names::new(&config),
            descriptors: match settings.descriptors {
                Some(budget) => Descriptors::new(budget),
                None => Descriptors::of_process(),
            },
            store,
            certs,
            telemetry,
        });
        let netns = test.open();
        let info = PodInfo {
            uid: format!("uid-{name}"),
            name: name.into(),
            namespace: "shop".into(),
            service_account: account,
            only_ports: match name {
                "db" => settings.db_only_ports.clone(),
                _ => Vec::new(),
            },
        };
        let listeners = match info.is_own() {
            true => Listeners::bind_hbone(&netns, &config),
            false => Listeners::bind(&netns, &config),
        };
        let proxy = PodProxy::new(shared.clone(), info, netns.clone());
        proxy.serve(listeners.unwrap());
        Self {
            shared,
            proxy,
            netns,
            test,
        }
    }

    /// `ip` in the pod's namespace.
    pub fn ip(&self, args: &str) {
        self.test.ip(args);
    }

    /// Further rules in the pod's namespace.
    pub fn nft(&self, rules: &str) {
        let net = format!("--net=/run/netns/{}", self.test.name);
        run(&["nsenter", &net, "nft", rules]);
    }

    /// As an application of the pod would.
    pub async fn dial(&self, dst: &str) -> std::io::Result<TcpStream> {
        let dst: SocketAddr = dst.parse().unwrap();
        let socket = self.netns.enter(|| match dst {
            SocketAddr::V4(_) => TcpSocket::new_v4(),
            SocketAddr::V6(_) => TcpSocket::new_v6(),
        })??;
        soon(socket.connect(dst)).await
    }

    /// A server of the pod that gives back what it gets; returns the peers it saw.
    pub fn echo(&self, bind: &str) -> Arc<Mutex<Vec<SocketAddr>>> {
        let listener = self.netns.enter(|| std::net::TcpListener::bind(bind));
        let listener = listener.unwrap().unwrap();
        listener.set_nonblocking(true).unwrap();
        let listener = TcpListener::from_std(listener).unwrap();
        let peers: Arc<Mutex<Vec<SocketAddr>>> = Arc::default();
        let seen = peers.clone();
        tokio::spawn(async move {
            while let Ok((mut stream, peer)) = listener.accept().await {
                seen.lock().unwrap().push(peer);
                tokio::spawn(async move {
                    let (mut read, mut write) = stream.split();
                    let _ = tokio::io::copy(&mut read, &mut write).await;
                    let _ = stream.shutdown().await;
                });
            }
        });
        peers
    }

    /// One without labels.
    pub fn plain_metric(&self, name: &str) -> u64 {
        let text = self.shared.telemetry.encode();
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix(&format!("{name} ")));
        line.expect("registered").parse().unwrap()
    }

    pub fn metric(&self, name: &str, labels: &[&str]) -> u64 {
        let text = self.shared.telemetry.encode();
        let matches = |line: &&str| {
            line.starts_with(&format!("{name}{{")) && labels.iter().all(|l| line.contains(l))
        };
        let values = text.lines().filter(matches);
        values
            .map(|line| line.rsplit(' ').next().unwrap().parse::<u64>().unwrap())
            .sum()
    }
}

impl World {
    pub fn new() -> Self {
        Self::with(&Settings::default())
    }

    pub fn with(settings: &Settings) -> Self {
        let (web, db) = (TestNetns::new("web"), TestNetns::new("db"));
        web.ip(&format!(
            "link add eth0 type veth peer name eth0 netns {}",
            db.name
        ));
        for (ns, four, six) in [
            (&web, "10.77.0.1", "fd77::1"),
            (&db, "10.77.0.2", "fd77::2"),
        ] {
            ns.ip(&format!("addr add {four}/24 dev eth0"));
            ns.ip(&format!("addr add {six}/64 dev eth0 nodad"));
            ns.ip("link set eth0 up");
            ns.redirect();
        }
        let (output, log) = channel();
        let config = pb::LogConfig::default();
        let (at_db, subscriber) = Telemetry::for_test(&config, Box::new(Tell(output)));
        let guard = tracing::subscriber::set_default(subscriber);
        let ca = Ca::new("root");
        Self {
            web: {
                let telemetry = Telemetry::new(&config, &TelemetryConfig::default(), false);
                Side::new("web", "node-1", web, &ca, telemetry, settings)
            },
            db: Side::new("db", "node-2", db, &ca, at_db, settings),
            ca,
            log,
            seen: String::new(),
            _log: guard,
        }
    }

    /// Waits for a log line that holds all of `parts`.
    pub async fn logged(&mut self, parts: &[&str]) -> String {
        let deadline = tokio::time::Instant::now() + PATIENCE;
        loop {
            for bytes in self.log.try_iter() {
                self.seen.push_str(&String::from_utf8_lossy(&bytes));
            }
            let found = self
                .seen
                .lines()
                .find(|line| parts.iter().all(|p| line.contains(p)));
            if let Some(line) = found {
                return line.to_owned();
            }
            let seen = &self.seen;
            assert!(
                tokio::time::Instant::now() < deadline,
                "no {parts:?} in:\n{seen}"
            );
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

pub async fn soon<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, what)
        .await
        .expect("took too long")
}

pub async fn eventually(claim: &str, holds: impl Fn() -> bool) {
    let deadline = tokio::time::Instant::now() + PATIENCE;
    while !holds() {
        assert!(tokio::time::Instant::now() < deadline, "never: {claim}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Sends, finishes, and reads the answer to its end.
pub async fn exchange(mut stream: TcpStream, data: &[u8]) -> std::io::Result<Vec<u8>> {
    let mut answer = Vec::new();
    stream.write_all(data).await?;
    stream.shutdown().await?;
    soon(stream.read_to_end(&mut answer)).await?;
    Ok(answer)
}
