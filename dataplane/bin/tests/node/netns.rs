//! Pods: network namespaces joined by a wire, captured by the rules of facts istio-ambient 3.3.

use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

static NEXT: AtomicU32 = AtomicU32::new(0);

/// Goes with its value, links and rules included.
pub struct Netns {
    pub name: String,
}

impl Netns {
    pub fn new() -> Self {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("up-control-p{}-{number}", std::process::id());
        run("ip", &["netns", "add", &name], "");
        let it = Self { name };
        it.ip("link set lo up");
        it
    }

    /// 10.98.0.1 and 10.98.0.2, fd98::1 and fd98::2.
    pub fn pair() -> (Self, Self) {
        let (a, b) = (Self::new(), Self::new());
        let peer = format!("link add eth0 type veth peer name eth0 netns {}", b.name);
        a.ip(&peer);
        for (netns, last) in [(&a, 1), (&b, 2)] {
            netns.ip(&format!("addr add 10.98.0.{last}/24 dev eth0"));
            netns.ip(&format!("addr add fd98::{last}/64 dev eth0 nodad"));
            netns.ip("link set eth0 up");
        }
        // The kernel makes routes, and sees the other end, a moment after it has answered.
        a.await_reachable("[fd98::2]:9");
        b.await_reachable("[fd98::1]:9");
        (a, b)
    }

    fn await_reachable(&self, addr: &'static str) {
        let refused = move || {
            let socket = std::net::UdpSocket::bind("[::]:0")?;
            socket.connect(addr)?;
            socket.send(b"anybody?")?;
            socket.set_read_timeout(Some(std::time::Duration::from_millis(100)))?;
            socket.recv(&mut [0])
        };
        // Nobody listens: the far end's refusal is the proof.
        super::eventually("the other end is reachable", || {
            let answer = self.run(refused);
            answer.is_err_and(|error| error.kind() == std::io::ErrorKind::ConnectionRefused)
        });
    }

    pub fn ip(&self, args: &str) {
        let mut all = vec!["-n", &self.name];
        all.extend(args.split(' '));
        run("ip", &all, "");
    }

    pub fn nft(&self, rules: &str) -> String {
        let net = format!("--net=/run/netns/{}", self.name);
        run("nsenter", &[&net, "nft", "-f", "-"], rules)
    }

    pub fn fd(&self) -> OwnedFd {
        let path = format!("/run/netns/{}", self.name);
        std::fs::File::open(path).expect("made in new()").into()
    }

    /// Runs on a thread of its own inside the namespace.
    pub fn run<T: Send + 'static>(&self, visit: impl FnOnce() -> T + Send + 'static) -> T {
        let fd = self.fd();
        let thread = std::thread::spawn(move || {
            move_into_link_name_space(fd.as_fd(), Some(LinkNameSpaceType::Network))
                .expect("tests run as root");
            visit()
        });
        match thread.join() {
            Ok(value) => value,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }

    /// The redirection that an agent installs (facts istio-ambient 3.1, 3.3), without DNS. Counters
    /// see what arrives over the wire.
    pub fn capture(&self) {
        self.nft(RULES);
        for family in ["-4", "-6"] {
            self.ip(&format!(
                "{family} rule add fwmark 0x111/0xfff lookup 100 pref 32764"
            ));
        }
        self.ip("route add local 0.0.0.0/0 dev lo table 100");
        self.ip("-6 route add local ::/0 dev lo table 100");
    }

    /// Packets since `capture`: `plaintext` for the application's port, or `tunnelled`.
    pub fn packets(&self, counter: &str) -> u64 {
        let net = format!("--net=/run/netns/{}", self.name);
        let list = ["nft", "list", "counter", "inet", "watch", counter];
        let text = run("nsenter", &[&[net.as_str()], &list[..]].concat(), "");
        let mut words = text.split_whitespace();
        words.find(|word| *word == "packets");
        let count = words.next().and_then(|word| word.parse().ok());
        count.expect("nft prints `packets N`")
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        let _ = Command::new("ip")
            .args(["netns", "del", &self.name])
            .status();
    }
}

const RULES: &str = "
table inet watch {
  counter plaintext {}
  counter tunnelled {}
  chain prerouting {
    type filter hook prerouting priority -300;
    iifname eth0 tcp dport 8080 counter name plaintext
    iifname eth0 tcp dport 15008 counter name tunnelled
  }
}
table inet istio-ambient-mangle {
  chain prerouting {
    type filter hook prerouting priority -150;
    meta mark & 0xfff == 0x539 ct mark set ct mark & 0xfffff000 | 0x111
  }
  chain output {
    type route hook output priority -150;
    ct mark & 0xfff == 0x111 meta mark set ct mark
  }
}
table inet istio-ambient-nat {
  chain prerouting {
    type nat hook prerouting priority -100;
    ip daddr != 127.0.0.1/32 tcp dport != 15008 meta mark & 0xfff != 0x539 redirect to :15006
    ip6 daddr != ::1/128 tcp dport != 15008 meta mark & 0xfff != 0x539 redirect to :15006
  }
  chain output {
    type nat hook output priority -100;
    meta l4proto tcp meta mark & 0xfff == 0x111 accept
    oifname lo ip daddr != 127.0.0.1/32 accept
    oifname lo ip6 daddr != ::1/128 accept
    meta l4proto tcp ip daddr != 127.0.0.1/32 meta mark & 0xfff != 0x539 redirect to :15001
    meta l4proto tcp ip6 daddr != ::1/128 meta mark & 0xfff != 0x539 redirect to :15001
  }
}
";

fn run(program: &str, args: &[&str], input: &str) -> String {
    let mut child = Command::new(program)
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("is installed");
    let mut stdin = child.stdin.take().expect("piped");
    stdin.write_all(input.as_bytes()).expect("it reads");
    drop(stdin);
    let output = child.wait_with_output().expect("it ends");
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {args:?}: {text}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}
