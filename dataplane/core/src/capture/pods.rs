//! One pod in the maps: enrolled by the cookie of its network namespace, with an instance of the
//! lookup program in it.

use std::collections::HashSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::CaptureError;
use super::kernel::{Kernel, map, place};
use super::layout::{self, PodValue};
use super::sys::{self, AttachType, Link};
use crate::inpod::Netns;

/// Longest wait for connections that were led to the listener to be accepted. Each takes a
/// handshake over loopback; more only while nobody accepts, and then they are lost anyway.
const ARRIVAL: Duration = Duration::from_millis(250);
/// From the decision at connect to the record before the SYN it takes microseconds, more where the
/// process has to wait for its turn.
const RECORDING: Duration = Duration::from_millis(5);

/// What the kernel side has to know of a pod.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Enrolment {
    /// From the pod's source; those of its interfaces are added.
    pub addresses: Vec<IpAddr>,
    pub dns: bool,
    pub bypass_inbound: bool,
    pub udp_deny: bool,
    /// Of the pod itself, where that is known.
    pub cgroup: Option<PathBuf>,
    /// Which the node's kubelet reaches past the mesh.
    pub probe_ports: Vec<u16>,
}

/// What others see as the pod's address, by family.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OwnAddresses {
    pub v4: Option<IpAddr>,
    pub v6: Option<IpAddr>,
}

struct Described {
    cookie: u64,
    own: OwnAddresses,
    all: Vec<IpAddr>,
}

impl Kernel {
    /// Captures the pod, whatever is there; safe to repeat. Outbound first: it comes with the record
    /// that lets the data plane's own connections to the application past inbound capture. Where it
    /// fails for a pod that wasn't captured, nothing stays.
    pub fn enrol(
        &mut self,
        netns: &Netns,
        pod: &Enrolment,
        listener: BorrowedFd<'_>,
    ) -> Result<OwnAddresses, CaptureError> {
        let described = describe(netns, pod)?;
        let held = self.slot(described.cookie);
        let slot = match held {
            Some(slot) => slot,
            None => self.free_slot()?,
        };
        if held.is_none() {
            self.clear_datagrams(slot)?;
        }
        self.take_place(slot);
        let done = self.write(netns, pod, &described, slot, listener);
        if done.is_err() && held.is_none() {
            self.withdraw(described.cookie, slot);
        }
        done.map(|()| described.own)
    }

    fn write(
        &mut self,
        netns: &Netns,
        pod: &Enrolment,
        described: &Described,
        slot: u32,
        listener: BorrowedFd<'_>,
    ) -> Result<(), CaptureError> {
        let flags = self.flags(pod);
        self.write_addresses(slot, &described.all)?;
        let probe_ports = self.probe_ports(&described.all, &pod.probe_ports);
        self.write_probe_ports(slot, &probe_ports)?;
        self.listen(slot, listener)?;
        let lookup = self.objects.lookup(slot, flags)?;
        let value = PodValue {
            slot,
            flags,
            budget: self.config.pod_budget,
            own4: described.own.v4,
            own6: described.own.v6,
        };
        let inserted = self.pods.insert(described.cookie, value.encode(), 0);
        inserted.map_err(|error| map("pods", &error))?;
        let (fd, inode) = (netns.as_fd(), netns.id().0);
        let pin = self.pin(slot);
        place(lookup.fd()?, &fd, inode, AttachType::SkLookup, &pin)
            .map_err(|source| CaptureError::Attach {
                program: "lookup",
                to: "the pod's network namespace".into(),
                source,
            })
            .map(drop)
    }

    /// A pod that is captured already gets the listener of this data plane, before anything else is
    /// known of it.
    pub fn adopt(
        &mut self,
        netns: &Netns,
        pod: &Enrolment,
        listener: BorrowedFd<'_>,
    ) -> Result<Option<OwnAddresses>, CaptureError> {
        let described = describe(netns, pod)?;
        let Some(slot) = self.slot(described.cookie) else {
            return Ok(None);
        };
        self.listen(slot, listener)?;
        Ok(Some(described.own))
    }

    /// Whether the pod's new connections are captured.
    pub fn captures(&self, netns: &Netns) -> Result<bool, CaptureError> {
        Ok(self.slot(cookie(netns)?).is_some())
    }

    /// Problems in words; none when everything is as `enrol` would leave it.
    pub fn verify(
        &mut self,
        netns: &Netns,
        pod: &Enrolment,
        listening: bool,
    ) -> Result<Vec<String>, CaptureError> {
        let described = describe(netns, pod)?;
        let Some(slot) = self.slot(described.cookie) else {
            return Ok(vec!["the pod is not enrolled".into()]);
        };
        // Its last process may have gone, and its cgroup with it.
        let cgroup = pod.cgroup.as_deref().filter(|path| path.is_dir());
        let mut problems = self.verify_hooks(cgroup);
        problems.extend(self.overtaken(cgroup));
        let wanted = PodValue {
            slot,
            flags: self.flags(pod),
            budget: self.config.pod_budget,
            own4: described.own.v4,
            own6: described.own.v6,
        };
        let found = self.pods.get(&described.cookie, 0);
        if found.map_err(|error| map("pods", &error))? != wanted.encode() {
            problems.push("its settings or addresses aren't those in the map".into());
        }
        if !self.has_addresses(slot, &described.all) {
            problems.push("its own addresses aren't those in the map".into());
        }
        let probe_ports = self.probe_ports(&described.all, &pod.probe_ports);
        if !self.has_probe_ports(slot, &probe_ports) {
            problems.push("its probe ports aren't those in the map".into());
        }
        match Link::pinned(&self.pin(slot)).and_then(|link| link.info()) {
            Ok(info) if info.target(AttachType::SkLookup) == netns.id().0 => {}
            Ok(_) => problems.push("inbound capture is attached to another namespace".into()),
            Err(error) => problems.push(format!("inbound capture isn't attached: {error}")),
        }
        if !listening {
            problems.push("nobody listens for it".into());
        }
        Ok(problems)
    }

    /// New connections aren't captured any more; those that are live go on. Unknown ones are fine.
    pub fn release(&mut self, netns: &Netns) -> Result<(), CaptureError> {
        let cookie = cookie(netns)?;
        if let Some(slot) = self.slot(cookie) {
            self.let_arrive(cookie, slot)?;
            self.withdraw(cookie, slot);
        }
        Ok(())
    }

    /// What was dialled and led to the listener already is accepted with its destination, while
    /// nothing new is led there.
    fn let_arrive(&mut self, cookie: u64, slot: u32) -> Result<(), CaptureError> {
        let failed = |error: aya::maps::MapError| map("pods", &error);
        let mut value = self.pods.get(&cookie, 0).map_err(failed)?;
        layout::mark_leaving(&mut value);
        self.pods.insert(cookie, value, 0).map_err(failed)?;
        let until = Instant::now() + ARRIVAL;
        loop {
            // Also of one that was led there a moment ago and isn't on record yet.
            std::thread::sleep(RECORDING);
            let waiting = self.records.get(&slot, 0).is_ok_and(|count| count > 0);
            if !waiting || Instant::now() >= until {
                return Ok(());
            }
        }
    }

    /// All but these.
    pub fn release_others<'a>(
        &mut self,
        wanted: impl Iterator<Item = &'a Netns>,
    ) -> Result<(), CaptureError> {
        let wanted: HashSet<u64> = wanted.map(cookie).collect::<Result<_, _>>()?;
        let known: Vec<_> = self.pods.iter().filter_map(Result::ok).collect();
        for (cookie, value) in known {
            if !wanted.contains(&cookie) {
                self.withdraw(cookie, layout::slot_of(&value));
            }
        }
        Ok(())
    }

    pub(super) fn slot(&self, cookie: u64) -> Option<u32> {
        let found = self.pods.get(&cookie, 0).ok()?;
        Some(layout::slot_of(&found))
    }

    /// Inbound first: without the record of the pod, the data plane's own connections to the
    /// application would be led back to it.
    pub(super) fn withdraw(&mut self, cookie: u64, slot: u32) {
        let pin = self.pin(slot);
        let _ = Link::pinned(&pin).and_then(|link| link.detach());
        let _ = std::fs::remove_file(pin);
        let _ = self.pods.remove(&cookie);
        self.forget_questions(slot);
        let _ = self.write_addresses(slot, &[]);
        let _ = self.listeners.clear_index(&slot);
        self.withdraw_probes(slot);
        self.give_back(slot);
    }

    fn listen(&mut self, slot: u32, listener: BorrowedFd<'_>) -> Result<(), CaptureError> {
        use std::os::fd::AsRawFd;
        let set = self.listeners.set(slot, &listener.as_raw_fd(), 0);
        set.map_err(|error| map("listeners", &error))
    }

    fn flags(&self, pod: &Enrolment) -> u32 {
        let set = |on: bool, flag: u32| if on { flag } else { 0 };
        set(pod.dns, layout::FLAG_DNS)
            | set(pod.bypass_inbound, layout::FLAG_BYPASS_INBOUND)
            | set(pod.udp_deny, layout::FLAG_UDP_DENY)
            | set(!self.config.ipv6, layout::FLAG_IPV6_OFF)
    }

    pub(super) fn pin(&self, slot: u32) -> PathBuf {
        self.config.folder.join("pods").join(slot.to_string())
    }
}

fn describe(netns: &Netns, pod: &Enrolment) -> Result<Described, CaptureError> {
    let look = || Ok((own_cookie()?, sys::addresses()?));
    let found: io::Result<_> = netns.enter(look).and_then(|found| found);
    let (cookie, interfaces) = found.map_err(CaptureError::Namespace)?;
    let named = pod.addresses.iter().chain(&interfaces).copied();
    let first = |fits: fn(&IpAddr) -> bool| {
        let mut candidates = named.clone().filter(fits);
        candidates.next()
    };
    Ok(Described {
        cookie,
        own: OwnAddresses {
            v4: first(IpAddr::is_ipv4),
            v6: first(is_global_v6),
        },
        all: distinct(named.clone()),
    })
}

/// In their order.
fn distinct(all: impl Iterator<Item = IpAddr>) -> Vec<IpAddr> {
    let mut seen = HashSet::new();
    all.filter(|ip| seen.insert(*ip)).collect()
}

fn is_global_v6(ip: &IpAddr) -> bool {
    matches!(ip, IpAddr::V6(ip) if !ip.is_unicast_link_local())
}

pub(super) fn cookie(netns: &Netns) -> Result<u64, CaptureError> {
    let found = netns.enter(own_cookie).and_then(|cookie| cookie);
    found.map_err(CaptureError::Namespace)
}

/// Of the namespace that this thread is in.
fn own_cookie() -> io::Result<u64> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    sys::netns_cookie(socket.as_fd())
}
