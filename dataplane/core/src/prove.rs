//! The short-lived process that proves pods captured: it makes connections that only their proxies
//! know how to read (proxy/proof.rs), and says what it met. Whether they arrived isn't its to say.
//!
//! A line of input asks for one connection: `out|in FD 4|6 NONCE`, FD being an inherited descriptor
//! of the pod's network namespace; `out` leaves the pod, `in` comes from this process's own
//! namespace. A line of output answers: `NONCE WORD TEXT`, in any order.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, UdpSocket};
use std::path::Path;
use std::str::FromStr;
use std::time::Duration;

use rustix::io::Errno;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpSocket;
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::capture;
use crate::inpod::Netns;
use crate::proxy::proof::{Nonce, OUTBOUND_V4, OUTBOUND_V6, PORT};

/// Captured, it is established within the machine.
const CONNECT: Duration = Duration::from_secs(1);
/// A busy proxy may take its time to read and close.
const END: Duration = Duration::from_secs(5);
/// Far above what an agent asks at once.
const INPUT: u64 = 1 << 20;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Out,
    In,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Leg {
    way: Way,
    fd: i32,
    v6: bool,
    nonce: Nonce,
}

/// What became of a connection.
struct Met {
    word: &'static str,
    text: String,
}

/// Moves into `cgroup`, then makes all connections at once. Only where no other thread runs.
pub fn run(cgroup: Option<&Path>) -> io::Result<()> {
    if let Some(cgroup) = cgroup {
        let procs = cgroup.join("cgroup.procs");
        let named = |error: io::Error| io::Error::other(format!("{}: {error}", procs.display()));
        std::fs::write(&procs, "0").map_err(named)?;
    }
    let mut input = String::new();
    io::stdin().take(INPUT).read_to_string(&mut input)?;
    let legs: Vec<Leg> = input.lines().map(parse).collect::<io::Result<_>>()?;
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    runtime.enable_all().build()?.block_on(make_all(legs))
}

fn parse(line: &str) -> io::Result<Leg> {
    let wrong = || io::Error::new(io::ErrorKind::InvalidInput, format!("not a leg: {line:?}"));
    let fields: Vec<_> = line.split(' ').collect();
    let [way, fd, family, nonce] = fields[..] else {
        return Err(wrong());
    };
    Ok(Leg {
        way: match way {
            "out" => Way::Out,
            "in" => Way::In,
            _ => return Err(wrong()),
        },
        fd: i32::from_str(fd)
            .ok()
            .filter(|fd| *fd >= 0)
            .ok_or_else(wrong)?,
        v6: match family {
            "4" => false,
            "6" => true,
            _ => return Err(wrong()),
        },
        nonce: u128::from_str_radix(nonce, 16)
            .map_err(|_| wrong())?
            .to_be_bytes(),
    })
}

async fn make_all(legs: Vec<Leg>) -> io::Result<()> {
    let mut pods = HashMap::new();
    let mut running = JoinSet::new();
    for leg in legs {
        let pod = match pods.entry(leg.fd) {
            std::collections::hash_map::Entry::Occupied(known) => known.into_mut(),
            std::collections::hash_map::Entry::Vacant(new) => new.insert(Pod::open(leg.fd)),
        };
        let made = pod
            .as_ref()
            .map_err(Met::clone_of)
            .and_then(|pod| pod.begin(&leg));
        running.spawn(async move {
            let met = match made {
                Ok((socket, to)) => connect(socket, to, &leg.nonce).await,
                Err(met) => met,
            };
            (leg.nonce, met)
        });
    }
    let mut out = String::new();
    while let Some(done) = running.join_next().await {
        let (nonce, met) = done.map_err(io::Error::other)?;
        let nonce = u128::from_be_bytes(nonce);
        out += &format!("{nonce:032x} {} {}\n", met.word, met.text);
    }
    io::stdout().write_all(out.as_bytes())
}

struct Pod {
    netns: Netns,
    addresses: Vec<IpAddr>,
}

impl Pod {
    fn open(fd: i32) -> Result<Self, Met> {
        let lost = |error: io::Error| Met::new("error", format!("its namespace: {error}"));
        let netns = Netns::inherited(fd).map_err(lost)?;
        let found = netns.enter(capture::addresses).and_then(|found| found);
        Ok(Self {
            addresses: found.map_err(lost)?,
            netns,
        })
    }

    /// A socket of the right namespace and cgroup, and where it goes.
    fn begin(&self, leg: &Leg) -> Result<(TcpSocket, SocketAddr), Met> {
        let made = |socket: io::Result<TcpSocket>| socket.map_err(|error| Met::of(&error));
        let new = || match leg.v6 {
            true => TcpSocket::new_v6(),
            false => TcpSocket::new_v4(),
        };
        match leg.way {
            Way::Out => {
                if leg.v6 && !self.has_loopback() {
                    return Err(Met::new("absent", "the pod has no ::1".into()));
                }
                let ip = match leg.v6 {
                    true => IpAddr::V6(OUTBOUND_V6),
                    false => IpAddr::V4(OUTBOUND_V4),
                };
                let socket = self.netns.enter(new).and_then(|socket| socket);
                Ok((made(socket)?, (ip, PORT).into()))
            }
            Way::In => {
                let ip = self.address(leg.v6).ok_or_else(|| {
                    Met::new("absent", "the pod has no address of the family".into())
                })?;
                Ok((made(new())?, (ip, PORT).into()))
            }
        }
    }

    /// Whether what is led to the proxies can come there. Without ::1 IPv6 goes nowhere.
    fn has_loopback(&self) -> bool {
        let bound = self
            .netns
            .enter(|| UdpSocket::bind((Ipv6Addr::LOCALHOST, 0)));
        bound.is_ok_and(|socket| socket.is_ok())
    }

    /// The first by which others may reach it.
    fn address(&self, v6: bool) -> Option<IpAddr> {
        let fits = |ip: &&IpAddr| match ip {
            IpAddr::V4(ip) => !v6 && !ip.is_link_local(),
            IpAddr::V6(ip) => v6 && !ip.is_unicast_link_local(),
        };
        self.addresses.iter().find(fits).copied()
    }
}

async fn connect(socket: TcpSocket, to: SocketAddr, nonce: &Nonce) -> Met {
    let mut stream = match timeout(CONNECT, socket.connect(to)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => return Met::of(&error),
        Err(_) => return Met::new("silent", format!("{to} doesn't answer")),
    };
    if let Err(error) = stream.write_all(nonce).await {
        return Met::new("ended", error.to_string());
    }
    let mut nothing = [0; 64];
    // Reset or closed: whoever read it is done.
    match timeout(END, stream.read(&mut nothing)).await {
        Ok(Ok(0) | Err(_)) => Met::new("ended", String::new()),
        Ok(Ok(_)) => Met::new("answered", format!("somebody at {to} talks")),
        Err(_) => Met::new("held", format!("{to} took it and doesn't close")),
    }
}

impl Met {
    fn new(word: &'static str, text: String) -> Self {
        Self { word, text }
    }

    fn of(error: &io::Error) -> Self {
        let word = match Errno::from_io_error(error) {
            Some(Errno::CONNREFUSED | Errno::CONNRESET) => "refused",
            Some(
                Errno::NETUNREACH
                | Errno::HOSTUNREACH
                | Errno::ADDRNOTAVAIL
                | Errno::AFNOSUPPORT
                | Errno::NETDOWN
                | Errno::ACCESS
                | Errno::INVAL,
            ) => "unreachable",
            Some(Errno::TIMEDOUT) => "silent",
            Some(Errno::PERM) => "denied",
            _ => "error",
        };
        Self::new(word, error.to_string())
    }

    fn clone_of(other: &Self) -> Self {
        Self::new(other.word, other.text.clone())
    }
}

/// Of a descriptor that the agent left open for us.
impl Netns {
    fn inherited(fd: i32) -> io::Result<Self> {
        // Through its name: a number is no proof that it is open.
        let opened = std::fs::File::open(format!("/proc/self/fd/{fd}"))?;
        Self::new(opened.into()).map_err(io::Error::other)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_names_way_namespace_family_and_nonce() {
        let leg = parse("out 7 6 0102030405060708090a0b0c0d0e0f10").unwrap();
        assert_eq!((leg.way, leg.fd, leg.v6), (Way::Out, 7, true));
        assert_eq!(
            leg.nonce,
            [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]
        );
        for wrong in [
            "",
            "out 7 6",
            "up 7 6 00",
            "out -1 4 00",
            "in 7 5 00",
            "in 7 4 xyz",
        ] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn what_no_descriptor_names_is_an_error_of_that_leg() {
        let leg = parse("out 9999 4 01").unwrap();
        let met = Pod::open(leg.fd).err().unwrap();
        assert_eq!(met.word, "error");
    }
}
