//! The kubelet's way to declared ports past the mesh (design section 4): a hook on its cgroup, which
//! may come later or be made anew, and the ports in the map that the hook asks.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io;
use std::net::{IpAddr, Ipv4Addr, UdpSocket};
use std::os::fd::AsFd;
use std::path::Path;

use super::CaptureError;
use super::kernel::{Kernel, cgroup_id, map, open, place};
use super::layout::{self, ProbePortBytes, TupleBytes};
use super::sys::{self, AttachType, Link};

const PROGRAM: &str = "sockops_kubelet";
const CGROUP2_MAGIC: rustix::fs::FsWord = 0x6367_7270;

/// Of one pod: its addresses are what its interfaces have, and it may have given them many. With
/// MOST_PORTS a 256th of the map.
const MOST_ADDRESSES: usize = 8;
/// As many as the pod file takes.
const MOST_PORTS: usize = 64;

/// What is in `probe_ports`: slots by address and port.
pub(super) type Claims = HashMap<ProbePortBytes, u32>;

/// Of the hook, when it was last looked at.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) enum Hooked {
    #[default]
    Unknown,
    On(u64),
    Not(String),
}

impl Kernel {
    /// Attaches the hook to the cgroup that has the kubelet's name now. Where that fails probes take
    /// the mesh's way, which a line of the log says once.
    pub fn follow_kubelet(&mut self) {
        let pin = self.config.folder.join("links").join(PROGRAM);
        let Some(path) = self.config.kubelet_cgroup.clone() else {
            // Of a data plane that was told of one.
            let _ = std::fs::remove_file(pin);
            return;
        };
        let found = match self.hook_kubelet(&path, &pin) {
            Ok(cgroup) => Hooked::On(cgroup),
            Err(error) => Hooked::Not(error.to_string()),
        };
        if found == self.kubelet {
            return;
        }
        match &found {
            Hooked::Not(error) => tracing::warn!(
                error,
                "the kubelet isn't known by its cgroup: its probes take the mesh's way; correct \
                 kubelet-cgroup, or start the kubelet"
            ),
            _ => tracing::info!(cgroup = %path.display(), "the kubelet is known by its cgroup"),
        }
        self.kubelet = found;
    }

    /// The cgroup's id.
    fn hook_kubelet(&mut self, path: &Path, pin: &Path) -> Result<u64, CaptureError> {
        let cgroup = open(path)?;
        on_cgroup2(&cgroup).map_err(|error| CaptureError::Path(path.to_owned(), error))?;
        let id = cgroup_id(&cgroup, path)?;
        if self.kubelet == Hooked::On(id) && runs(&cgroup, pin) {
            return Ok(id);
        }
        let failed = |source| CaptureError::Attach {
            program: PROGRAM,
            to: path.display().to_string(),
            source,
        };
        let node_netns = own_netns().map_err(failed)?;
        let loaded = self.objects.kubelet(node_netns)?;
        place(loaded.fd()?, &cgroup, id, AttachType::SockOps, pin).map_err(failed)?;
        Ok(id)
    }

    /// By the addresses that others may know the pod by.
    pub(super) fn probe_ports(&self, addresses: &[IpAddr], ports: &[u16]) -> Wanted {
        let own = self.config.ports;
        let captured = |port: &&u16| !own.is_own(**port) && **port != own.dns;
        let ports = ports.iter().filter(captured).take(MOST_PORTS);
        let of = |ip: IpAddr| ports.clone().map(move |port| layout::probe_port(ip, *port));
        let addresses = addresses.iter().copied();
        // A link-local address is one of many links.
        let lasting =
            addresses.filter(|ip| !matches!(ip, IpAddr::V6(ip) if ip.is_unicast_link_local()));
        Wanted(lasting.take(MOST_ADDRESSES).flat_map(of).collect())
    }

    /// What another pod that lives has claimed stays that pod's: no pod takes the probes of another
    /// one by giving itself its address.
    pub(super) fn write_probe_ports(
        &mut self,
        slot: u32,
        wanted: &Wanted,
    ) -> Result<(), CaptureError> {
        let failed = |error: aya::maps::MapError| map("probe_ports", &error);
        let held = self.claims.iter().filter(|(_, of)| **of == slot);
        let superfluous: Vec<_> = held
            .map(|(key, _)| *key)
            .filter(|key| !wanted.0.contains(key))
            .collect();
        for key in superfluous {
            self.claims.remove(&key);
            match self.probe_ports.remove(&key) {
                Ok(()) | Err(aya::maps::MapError::KeyNotFound) => {}
                Err(error) => return Err(failed(error)),
            }
        }
        for key in &wanted.0 {
            match self.claims.get(key) {
                Some(of) if *of != slot && self.is_taken(*of) => {
                    let (ip, port) = layout::of_probe_port(key);
                    tracing::warn!(
                        %ip,
                        port,
                        "two pods have this address: the kubelet reaches only the first past the mesh"
                    );
                }
                _ => {
                    self.probe_ports.insert(key, slot, 0).map_err(failed)?;
                    self.claims.insert(*key, slot);
                }
            }
        }
        Ok(())
    }

    /// Whether all is in the map that isn't another pod's.
    pub(super) fn has_probe_ports(&self, slot: u32, wanted: &Wanted) -> bool {
        let mut held = self.claims.iter().filter(|(_, of)| **of == slot);
        let there = |key| match self.probe_ports.get(key, 0) {
            Ok(of) => of == slot || self.is_taken(of),
            Err(_) => false,
        };
        held.all(|(key, _)| wanted.0.contains(key)) && wanted.0.iter().all(there)
    }

    /// Nothing of the pod stays, nor of a connection to it that wasn't established.
    pub(super) fn withdraw_probes(&mut self, slot: u32) {
        let _ = self.write_probe_ports(slot, &Wanted::default());
        let all = self.probes.keys().filter_map(Result::ok);
        let of: Vec<TupleBytes> = all.filter(|key| key[..4] == slot.to_ne_bytes()).collect();
        for key in of {
            let _ = self.probes.remove(&key);
        }
    }
}

/// Keys of one pod.
#[derive(Debug, Default)]
pub(super) struct Wanted(HashSet<ProbePortBytes>);

/// Still the program behind the pin, on this cgroup.
fn runs(cgroup: &File, pin: &Path) -> bool {
    let info = Link::pinned(pin).and_then(|link| link.info());
    let effective = sys::effective(cgroup.as_fd(), AttachType::SockOps);
    match (info, effective) {
        (Ok(info), Ok(effective)) => effective.contains(&info.program),
        _ => false,
    }
}

fn on_cgroup2(cgroup: &File) -> io::Result<()> {
    if rustix::fs::fstatfs(cgroup)?.f_type == CGROUP2_MAGIC {
        return Ok(());
    }
    Err(io::Error::new(
        io::ErrorKind::Unsupported,
        "is not on cgroup2",
    ))
}

/// The cookie of the node's network namespace, which is this process's own.
fn own_netns() -> io::Result<u64> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    sys::netns_cookie(socket.as_fd())
}
