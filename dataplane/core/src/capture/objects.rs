//! The compiled programs of `bpf/`, and how they are loaded: maps by their pins, constants before
//! the verifier sees them.

use std::os::fd::BorrowedFd;
use std::path::Path;

use aya::programs::{
    CgroupSkb, CgroupSock, CgroupSockAddr, CgroupSockopt, Program, SkLookup, SockOps,
};
use aya::{Ebpf, EbpfLoader};

use super::CaptureError;
use super::layout::MAX_PODS;
use super::sys::AttachType;
use crate::config::Ports;

macro_rules! object {
    ($name:literal) => {
        aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/", $name, ".o"))
    };
}

/// Where a program's sockets belong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    Pods,
    DataPlanes,
}

pub(super) struct Hook {
    pub program: &'static str,
    pub at: AttachType,
    pub place: Place,
    object: &'static [u8],
}

const fn hook(program: &'static str, at: AttachType, place: Place, object: &'static [u8]) -> Hook {
    Hook {
        program,
        at,
        place,
        object,
    }
}

static CONNECT: &[u8] = object!("connect");
static NAMES: &[u8] = object!("names");
static DATAGRAM: &[u8] = object!("datagram");
static EGRESS: &[u8] = object!("egress");
static SOCK_CREATE: &[u8] = object!("sock_create");
static SOCKOPS_PODS: &[u8] = object!("sockops_pods");
static SOCKOPS_DATAPLANE: &[u8] = object!("sockops_dataplane");
static GETSOCKOPT: &[u8] = object!("getsockopt");
static SOCKOPS_KUBELET: &[u8] = object!("sockops_kubelet");
static LOOKUP: &[u8] = object!("lookup");

/// By the name of the source.
#[cfg(test)]
pub(super) static OBJECTS: [(&str, &[u8]); 10] = [
    ("egress", EGRESS),
    ("connect", CONNECT),
    ("datagram", DATAGRAM),
    ("getsockopt", GETSOCKOPT),
    ("lookup", LOOKUP),
    ("names", NAMES),
    ("sock_create", SOCK_CREATE),
    ("sockops_dataplane", SOCKOPS_DATAPLANE),
    ("sockops_kubelet", SOCKOPS_KUBELET),
    ("sockops_pods", SOCKOPS_PODS),
];

/// In the order in which they are attached: what answers first, what redirects last.
pub(super) static HOOKS: [Hook; 15] = [
    hook(
        "getsockopt",
        AttachType::Getsockopt,
        Place::DataPlanes,
        GETSOCKOPT,
    ),
    hook(
        "sockops_dataplane",
        AttachType::SockOps,
        Place::DataPlanes,
        SOCKOPS_DATAPLANE,
    ),
    hook(
        "sockops_pods",
        AttachType::SockOps,
        Place::Pods,
        SOCKOPS_PODS,
    ),
    hook("getpeername4", AttachType::Getpeername4, Place::Pods, NAMES),
    hook("getpeername6", AttachType::Getpeername6, Place::Pods, NAMES),
    hook("getsockname4", AttachType::Getsockname4, Place::Pods, NAMES),
    hook("getsockname6", AttachType::Getsockname6, Place::Pods, NAMES),
    hook("recvmsg4", AttachType::Recvmsg4, Place::Pods, DATAGRAM),
    hook("recvmsg6", AttachType::Recvmsg6, Place::Pods, DATAGRAM),
    hook("egress", AttachType::InetEgress, Place::Pods, EGRESS),
    hook(
        "sock_create",
        AttachType::SockCreate,
        Place::Pods,
        SOCK_CREATE,
    ),
    hook("sendmsg4", AttachType::Sendmsg4, Place::Pods, DATAGRAM),
    hook("sendmsg6", AttachType::Sendmsg6, Place::Pods, DATAGRAM),
    hook("connect4", AttachType::Connect4, Place::Pods, CONNECT),
    hook("connect6", AttachType::Connect6, Place::Pods, CONNECT),
];

/// A program in the kernel; its object keeps it and its maps open.
pub(super) struct Loaded {
    ebpf: Ebpf,
    program: &'static str,
}

/// Loads programs. Kept, since making a loader of the library parses all types of the kernel (seen:
/// tenths of a second in a debug build), which nothing here is relocated by.
pub(super) struct Objects {
    hooks: EbpfLoader<'static>,
    lookup: EbpfLoader<'static>,
}

/// Constants live as long as their loader: each number is its own place.
static NUMBERS: [u32; MAX_PODS as usize] = {
    let mut numbers = [0; MAX_PODS as usize];
    let mut at = 0;
    while at < numbers.len() {
        numbers[at] = at as u32;
        at += 1;
    }
    numbers
};

impl Objects {
    /// Maps are those pinned in `maps`, made where they aren't yet.
    pub fn new(maps: &Path, ports: &Ports) -> Self {
        // As long as the loaders; a process has one Objects, and another after a repair.
        let ports: &'static Ports = Box::leak(Box::new(*ports));
        Self {
            hooks: loader(maps, ports),
            lookup: loader(maps, ports),
        }
    }

    /// Raises what the verifier says.
    pub fn hook(&mut self, hook: &Hook) -> Result<Loaded, CaptureError> {
        load(hook.object, hook.program, &mut self.hooks)
    }

    /// The instance of `lookup` for one pod.
    pub fn lookup(&mut self, slot: u32, flags: u32) -> Result<Loaded, CaptureError> {
        for (name, value) in [("slot", slot), ("flags", flags)] {
            let number = NUMBERS.get(value as usize);
            let number = number.ok_or_else(|| {
                CaptureError::Program("lookup", format!("{name} {value} is out of range"))
            })?;
            self.lookup.override_global(name, number, true);
        }
        load(LOOKUP, "lookup", &mut self.lookup)
    }

    /// For the kubelet's cgroup, which comes and goes by itself: none of HOOKS. Connections count that
    /// are made in the network namespace of this cookie.
    pub fn kubelet(&mut self, node_netns: u64) -> Result<Loaded, CaptureError> {
        // As long as the loader; the node's namespace is one.
        let cookie: &'static u64 = Box::leak(Box::new(node_netns));
        self.hooks.override_global("node_netns", cookie, false);
        load(SOCKOPS_KUBELET, "sockops_kubelet", &mut self.hooks)
    }

    /// An object that only opens the maps.
    pub fn open_maps(&mut self) -> Result<Ebpf, CaptureError> {
        let opened = self.hooks.load(LOOKUP);
        opened.map_err(|error| CaptureError::Program("maps", text(&error)))
    }
}

/// This version's maps, pinned there where they aren't yet.
pub(super) fn make_maps(folder: &Path) -> Result<(), CaptureError> {
    let mut loader = EbpfLoader::new();
    loader.btf(None);
    loader.default_map_pin_directory(folder);
    let made = loader.load(LOOKUP).map(drop);
    made.map_err(|error| CaptureError::Program("maps", text(&error)))
}

impl Loaded {
    #[cfg(test)]
    pub fn info(&self) -> aya::programs::ProgramInfo {
        let program = self.ebpf.program(self.program).unwrap();
        program.info().unwrap()
    }

    pub fn fd(&self) -> Result<BorrowedFd<'_>, CaptureError> {
        use std::os::fd::AsFd;
        let program = self.ebpf.program(self.program);
        let fd = program.map(Program::fd).transpose();
        let failed =
            |error: &dyn std::error::Error| CaptureError::Program(self.program, text(error));
        match fd {
            Ok(Some(fd)) => Ok(fd.as_fd()),
            Ok(None) => Err(CaptureError::Program(self.program, "isn't there".into())),
            Err(error) => Err(failed(&error)),
        }
    }
}

fn loader(maps: &Path, ports: &'static Ports) -> EbpfLoader<'static> {
    let mut loader = EbpfLoader::new();
    loader.btf(None);
    loader.default_map_pin_directory(maps);
    loader.override_global("outbound_port", &ports.outbound, false);
    loader.override_global("hbone_port", &ports.inbound_hbone, false);
    loader.override_global("dns_port", &ports.dns, false);
    loader
}

fn load(
    object: &[u8],
    program: &'static str,
    loader: &mut EbpfLoader<'static>,
) -> Result<Loaded, CaptureError> {
    let failed = |error: &dyn std::error::Error| CaptureError::Program(program, text(error));
    let mut ebpf = loader.load(object).map_err(|error| failed(&error))?;
    let found = ebpf.program_mut(program);
    let found = found.ok_or_else(|| CaptureError::Program(program, "isn't there".into()))?;
    match found {
        Program::CgroupSockAddr(program) => CgroupSockAddr::load(program),
        Program::CgroupSkb(program) => CgroupSkb::load(program),
        Program::CgroupSock(program) => CgroupSock::load(program),
        Program::CgroupSockopt(program) => CgroupSockopt::load(program),
        Program::SockOps(program) => SockOps::load(program),
        Program::SkLookup(program) => SkLookup::load(program),
        _ => {
            return Err(CaptureError::Program(
                program,
                "is of an unknown type".into(),
            ));
        }
    }
    .map_err(|error| failed(&error))?;
    Ok(Loaded { ebpf, program })
}

/// With its causes: the verifier's words are the last of them.
fn text(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        let inner_text = inner.to_string();
        if !text.contains(&inner_text) {
            text = format!("{text}: {inner_text}");
        }
        cause = inner.source();
    }
    text
}
