//! The kernel calls that aya keeps to itself: links with their pins and updates, what is attached to
//! a cgroup and who made it, and the cookie of a network namespace.
#![allow(unsafe_code)] // bpf(2), getifaddrs(3), unshare(2) and one socket option

use std::ffi::CString;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

pub(super) mod maps;

const OBJ_PIN: libc::c_long = 6;
const OBJ_GET: libc::c_long = 7;
const PROG_GET_NEXT_ID: libc::c_long = 11;
const PROG_GET_FD_BY_ID: libc::c_long = 13;
const MAP_GET_FD_BY_ID: libc::c_long = 14;
const OBJ_GET_INFO_BY_FD: libc::c_long = 15;
const PROG_QUERY: libc::c_long = 16;
#[cfg(test)]
const PROG_TEST_RUN: libc::c_long = 10;
const LINK_CREATE: libc::c_long = 28;
const LINK_UPDATE: libc::c_long = 29;
const LINK_DETACH: libc::c_long = 34;

const QUERY_EFFECTIVE: u32 = 1;
/// `enum bpf_prog_type` of linux/bpf.h.
const CGROUP_SOCK_ADDR: u32 = 18;
const SO_NETNS_COOKIE: libc::c_int = 71;

/// `enum bpf_attach_type` of linux/bpf.h.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum AttachType {
    InetEgress = 1,
    SockCreate = 2,
    SockOps = 3,
    Connect4 = 10,
    Connect6 = 11,
    Sendmsg4 = 14,
    Sendmsg6 = 15,
    Recvmsg4 = 19,
    Recvmsg6 = 20,
    Getsockopt = 21,
    Getpeername4 = 29,
    Getpeername6 = 30,
    Getsockname4 = 31,
    Getsockname6 = 32,
    SkLookup = 36,
}

/// A program's attachment to a cgroup or a network namespace. Ends when neither a descriptor nor a
/// pin holds it.
#[derive(Debug)]
pub(super) struct Link(OwnedFd);

/// `struct bpf_link_info`, as far as we look.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(super) struct LinkInfo {
    kind: u32,
    id: u32,
    pub program: u32,
    pad: u32,
    /// Of a cgroup link its cgroup's id; of a namespace link the namespace's inode, in the lower
    /// half. 0: what it was attached to is gone.
    target: u64,
    rest: [u64; 8],
}

#[derive(Default)]
#[repr(C)]
struct PathAttr {
    path: u64,
    fd: u32,
    flags: u32,
}

#[derive(Default)]
#[repr(C)]
struct InfoAttr {
    fd: u32,
    len: u32,
    info: u64,
}

/// `struct bpf_prog_info`, as far as we look.
#[derive(Default)]
#[repr(C)]
struct ProgramInfo {
    kind: u32,
    rest: [u32; 12],
    map_count: u32,
    map_ids: u64,
    name: [u8; 16],
}

/// `struct bpf_map_info`, as far as we look.
#[derive(Default)]
#[repr(C)]
struct MapInfo {
    rest: [u32; 6],
    name: [u8; 16],
}

#[derive(Default)]
#[repr(C)]
struct IdAttr {
    id: u32,
    next: u32,
    flags: u32,
}

/// A program of anybody's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Known {
    pub id: u32,
    /// At most 15 letters of it.
    pub name: String,
    /// It decides about addresses of sockets.
    pub of_addresses: bool,
    /// Names of the maps that such a program uses.
    pub maps: Vec<String>,
}

#[derive(Default)]
#[repr(C)]
struct QueryAttr {
    target: u32,
    attach_type: u32,
    query_flags: u32,
    attach_flags: u32,
    ids: u64,
    count: u32,
    pad: u32,
    prog_attach_flags: u64,
}

#[cfg(test)]
#[derive(Default)]
#[repr(C)]
struct TestRunAttr {
    program: u32,
    verdict: u32,
    data_sizes: [u32; 2],
    data: [u64; 2],
    repeat: u32,
    duration: u32,
    context_in_size: u32,
    context_out_size: u32,
    context_in: u64,
    context_out: u64,
    flags: [u32; 4],
}

#[derive(Default)]
#[repr(C)]
struct LinkAttr {
    first: u32,
    second: u32,
    third: u32,
    fourth: u32,
    rest: [u64; 4],
}

impl LinkInfo {
    /// Id of the cgroup, or inode of the network namespace; 0: it is gone.
    pub fn target(&self, at: AttachType) -> u64 {
        match at {
            // The attach type stands in the upper half.
            AttachType::SkLookup => self.target & u64::from(u32::MAX),
            _ => self.target,
        }
    }
}

impl Link {
    pub fn attach(
        program: BorrowedFd<'_>,
        target: BorrowedFd<'_>,
        at: AttachType,
    ) -> io::Result<Self> {
        let mut attr = LinkAttr {
            first: raw(program),
            second: raw(target),
            third: at as u32,
            ..LinkAttr::default()
        };
        Ok(Self(descriptor(bpf(LINK_CREATE, &mut attr)?)))
    }

    /// The program behind a live link is another one from here on; no packet sees neither.
    pub fn update(&self, program: BorrowedFd<'_>) -> io::Result<()> {
        let mut attr = LinkAttr {
            first: raw(self.0.as_fd()),
            second: raw(program),
            ..LinkAttr::default()
        };
        bpf(LINK_UPDATE, &mut attr).map(drop)
    }

    /// The program runs no more once this returns; without a pin it would some time later.
    pub fn detach(&self) -> io::Result<()> {
        let mut attr = LinkAttr {
            first: raw(self.0.as_fd()),
            ..LinkAttr::default()
        };
        bpf(LINK_DETACH, &mut attr).map(drop)
    }

    pub fn pin(&self, path: &Path) -> io::Result<()> {
        let path = c_path(path)?;
        let mut attr = PathAttr {
            path: path.as_ptr() as u64,
            fd: raw(self.0.as_fd()),
            ..PathAttr::default()
        };
        bpf(OBJ_PIN, &mut attr).map(drop)
    }

    pub fn pinned(path: &Path) -> io::Result<Self> {
        object(path).map(Self)
    }

    pub fn info(&self) -> io::Result<LinkInfo> {
        let mut info = LinkInfo::default();
        describe(self.0.as_fd(), &mut info)?;
        Ok(info)
    }
}

/// Runs the program once with a context made up, which it may change. Its verdict.
#[cfg(test)]
pub(super) fn test_run(program: BorrowedFd<'_>, context: &mut [u8]) -> io::Result<u32> {
    let size = context.len() as u32;
    let given = context.to_vec();
    let mut attr = TestRunAttr {
        program: raw(program),
        context_in_size: size,
        context_out_size: size,
        context_in: given.as_ptr() as u64,
        context_out: context.as_mut_ptr() as u64,
        ..TestRunAttr::default()
    };
    bpf(PROG_TEST_RUN, &mut attr)?;
    Ok(attr.verdict)
}

/// Ids of the programs that run for sockets of this cgroup, in their order.
pub(super) fn effective(cgroup: BorrowedFd<'_>, at: AttachType) -> io::Result<Vec<u32>> {
    query(cgroup, at, QUERY_EFFECTIVE)
}

/// Of these, those that are attached to the very cgroup.
pub(super) fn attached(cgroup: BorrowedFd<'_>, at: AttachType) -> io::Result<Vec<u32>> {
    query(cgroup, at, 0)
}

fn query(cgroup: BorrowedFd<'_>, at: AttachType, flags: u32) -> io::Result<Vec<u32>> {
    // The kernel takes 64 programs a cgroup and attach type.
    let mut ids = [0_u32; 256];
    let mut attr = QueryAttr {
        target: raw(cgroup),
        attach_type: at as u32,
        query_flags: flags,
        ids: ids.as_mut_ptr() as u64,
        count: ids.len() as u32,
        ..QueryAttr::default()
    };
    bpf(PROG_QUERY, &mut attr)?;
    Ok(ids[..ids.len().min(attr.count as usize)].to_vec())
}

/// All programs of the machine; also tells whether bpf(2) is there and allowed.
pub(super) fn programs() -> io::Result<Vec<u32>> {
    let mut found = Vec::new();
    let mut attr = IdAttr::default();
    loop {
        match bpf(PROG_GET_NEXT_ID, &mut attr) {
            Ok(_) => found.push(attr.next),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(found),
            Err(error) => return Err(error),
        }
        attr.id = attr.next;
    }
}

/// None when there is no such program any more.
pub(super) fn program(id: u32) -> io::Result<Option<Known>> {
    let Some(fd) = by_id(PROG_GET_FD_BY_ID, id)? else {
        return Ok(None);
    };
    // Twice as many as we use; of others we needn't know all.
    let mut maps = [0_u32; 32];
    let mut info = ProgramInfo {
        map_count: maps.len() as u32,
        map_ids: maps.as_mut_ptr() as u64,
        ..ProgramInfo::default()
    };
    describe(fd.as_fd(), &mut info)?;
    let of_addresses = info.kind == CGROUP_SOCK_ADDR;
    let count = if of_addresses { info.map_count } else { 0 };
    let used = &maps[..maps.len().min(count as usize)];
    Ok(Some(Known {
        id,
        name: name(&info.name),
        of_addresses,
        maps: used.iter().filter_map(|id| map_name(*id)).collect(),
    }))
}

fn map_name(id: u32) -> Option<String> {
    let fd = by_id(MAP_GET_FD_BY_ID, id).ok()??;
    let mut info = MapInfo::default();
    describe(fd.as_fd(), &mut info).ok()?;
    Some(name(&info.name))
}

fn by_id(command: libc::c_long, id: u32) -> io::Result<Option<OwnedFd>> {
    let mut attr = IdAttr {
        id,
        ..IdAttr::default()
    };
    match bpf(command, &mut attr) {
        Ok(fd) => Ok(Some(descriptor(fd))),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
        Err(error) => Err(error),
    }
}

fn name(bytes: &[u8; 16]) -> String {
    let end = bytes.iter().position(|byte| *byte == 0);
    String::from_utf8_lossy(&bytes[..end.unwrap_or(bytes.len())]).into_owned()
}

/// `info` is one of the kernel's plain structs, or the beginning of one.
fn describe<T>(fd: BorrowedFd<'_>, info: &mut T) -> io::Result<()> {
    let mut attr = InfoAttr {
        fd: raw(fd),
        len: size_of::<T>() as u32,
        info: (&raw mut *info) as u64,
    };
    bpf(OBJ_GET_INFO_BY_FD, &mut attr).map(drop)
}

/// This thread leaves for a network namespace of its own, and can't come back.
pub(super) fn leave_network() -> io::Result<()> {
    // SAFETY: of what threads share, only the network namespace becomes this thread's own.
    match unsafe { libc::unshare(libc::CLONE_NEWNET) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Of the network namespace that `socket` was made in.
pub(super) fn netns_cookie(socket: BorrowedFd<'_>) -> io::Result<u64> {
    let mut cookie = 0_u64;
    let mut size = size_of::<u64>() as libc::socklen_t;
    // SAFETY: `cookie` and `size` live through the call, and `size` is what `cookie` has room for.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut size,
        )
    };
    match result {
        0 => Ok(cookie),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Addresses of all interfaces of the namespace that this thread is in, loopback's own 127/8 and
/// ::1 left out.
pub(crate) fn addresses() -> io::Result<Vec<IpAddr>> {
    let mut first: *mut libc::ifaddrs = std::ptr::null_mut();
    // SAFETY: `first` is written on success and freed once below.
    if unsafe { libc::getifaddrs(&raw mut first) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let mut found = Vec::new();
    let mut next = first;
    // SAFETY: the list is a null-terminated chain that stays valid until freeifaddrs.
    while let Some(entry) = unsafe { next.as_ref() } {
        found.extend(address(entry.ifa_addr).filter(|ip| !ip.is_loopback()));
        next = entry.ifa_next;
    }
    // SAFETY: it came from getifaddrs and nothing of it is kept.
    unsafe { libc::freeifaddrs(first) };
    Ok(found)
}

fn address(at: *const libc::sockaddr) -> Option<IpAddr> {
    // SAFETY: the caller's list holds null or a socket address; the family says how large it is.
    unsafe {
        match i32::from(at.as_ref()?.sa_family) {
            libc::AF_INET => {
                let v4 = at.cast::<libc::sockaddr_in>().read_unaligned();
                Some(Ipv4Addr::from(u32::from_be(v4.sin_addr.s_addr)).into())
            }
            libc::AF_INET6 => {
                let v6 = at.cast::<libc::sockaddr_in6>().read_unaligned();
                Some(Ipv6Addr::from(v6.sin6_addr.s6_addr).into())
            }
            _ => None,
        }
    }
}

/// Mounts a BPF file system where there is none yet.
pub(super) fn mount_bpffs(at: &Path) -> io::Result<()> {
    let (what, kind) = (c"bpf", c"bpf");
    let at = c_path(at)?;
    // SAFETY: four strings that end in null and live through the call, and no data.
    let result = unsafe {
        libc::mount(
            what.as_ptr(),
            at.as_ptr(),
            kind.as_ptr(),
            libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC,
            c"mode=0700".as_ptr().cast(),
        )
    };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// bpf(2) with the part of `union bpf_attr` that the command reads.
fn bpf<T>(command: libc::c_long, attr: &mut T) -> io::Result<libc::c_long> {
    // SAFETY: `attr` is a plain struct of the size given; pointers in it are to live memory of the
    // caller, who says how long it is.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, &raw mut *attr, size_of::<T>()) };
    match result {
        -1 => Err(io::Error::last_os_error()),
        value => Ok(value),
    }
}

/// What is pinned there.
fn object(path: &Path) -> io::Result<OwnedFd> {
    let path = c_path(path)?;
    let mut attr = PathAttr {
        path: path.as_ptr() as u64,
        ..PathAttr::default()
    };
    Ok(descriptor(bpf(OBJ_GET, &mut attr)?))
}

fn descriptor(value: libc::c_long) -> OwnedFd {
    // SAFETY: the kernel just made this descriptor for us, close on exec.
    unsafe { OwnedFd::from_raw_fd(value as i32) }
}

fn raw(fd: BorrowedFd<'_>) -> u32 {
    // A borrowed descriptor is never negative.
    fd.as_raw_fd() as u32
}

fn c_path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(io::Error::other)
}
