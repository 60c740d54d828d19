//! Real network namespaces for tests. Each test owns its names; a namespace goes with its value.

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::Command;
use std::sync::Once;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use crate::config::Config;
use crate::inpod::Netns;
use crate::wire::control as pb;

/// A namespace with `lo` up, `10.99.0.1` and `fd99::1` on it.
pub(crate) struct TestNetns {
    pub name: String,
}

static NEXT: AtomicU32 = AtomicU32::new(0);

/// Removes what killed test processes left: names hold the pid of their process.
pub(crate) fn sweep() {
    static SWEPT: Once = Once::new();
    SWEPT.call_once(|| {
        let entries = std::fs::read_dir("/run/netns").into_iter().flatten();
        for name in entries.flatten().map(|entry| entry.file_name()) {
            let Some(name) = name.to_str() else { continue };
            let rest = ["up-control-p", "up-control-", "up-proxy-"]
                .iter()
                .find_map(|prefix| name.strip_prefix(prefix));
            let pid = rest.and_then(|rest| rest.split('-').next()?.parse::<u32>().ok());
            if pid.is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists()) {
                // Another test process may sweep at the same time: a failure is its success.
                let _ = Command::new("ip").args(["netns", "del", name]).status();
            }
        }
    });
}

impl TestNetns {
    pub fn new() -> Self {
        sweep();
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("up-control-{}-{number}", std::process::id());
        run("ip", &["netns", "add", &name]);
        let it = Self { name };
        it.ip("link set lo up");
        it.ip("addr add 10.99.0.1/32 dev lo");
        it.ip("addr add fd99::1/128 dev lo nodad");
        it
    }

    pub fn ip(&self, args: &str) {
        let mut all = vec!["-n", &self.name];
        all.extend(args.split(' '));
        run("ip", &all);
    }

    pub fn nft(&self, rules: &str) {
        let net = format!("--net=/run/netns/{}", self.name);
        run("nsenter", &[&net, "nft", rules]);
    }

    pub fn fd(&self) -> OwnedFd {
        let path = format!("/run/netns/{}", self.name);
        std::fs::File::open(path).expect("made in new()").into()
    }

    pub fn open(&self) -> Netns {
        Netns::new(self.fd()).expect("a network namespace")
    }
}

impl Drop for TestNetns {
    fn drop(&mut self) {
        let _ = Command::new("ip")
            .args(["netns", "del", &self.name])
            .status();
    }
}

/// Connects from inside. For a moment after an IPv6 address was added, its route comes and goes.
pub(crate) fn dial(ns: &Netns, addr: &str) -> io::Result<TcpStream> {
    let addr: SocketAddr = addr.parse().expect("an address");
    let end = Instant::now() + Duration::from_secs(5);
    loop {
        let connected = ns.enter(|| TcpStream::connect(addr))?;
        match connected {
            Err(error) if error.kind() == io::ErrorKind::NetworkUnreachable => {
                assert!(Instant::now() < end, "{addr}: {error}");
                std::thread::sleep(Duration::from_millis(5));
            }
            other => return other,
        }
    }
}

pub(crate) fn config() -> Config {
    let raw = pb::InstanceConfig {
        node: "up-control-node".into(),
        ..Default::default()
    };
    Config::parse(&raw).expect("the node is named")
}

fn run(program: &str, args: &[&str]) {
    let output = Command::new(program)
        .args(args)
        .output()
        .expect("is installed");
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {args:?}: {text}");
}
