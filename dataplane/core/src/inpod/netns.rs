//! A pod's network namespace: proof that a descriptor is one, and entering it for one short call.
#![allow(unsafe_code)] // one ioctl that no library wraps

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use arc_swap::ArcSwapOption;
use rustix::fs::{Mode, OFlags};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::capture::{OwnAddresses, REPLY_MARK};
use crate::config::Config;

/// A pod's network namespace, kept open.
#[derive(Debug)]
pub struct Netns {
    fd: OwnedFd,
    id: (u64, u64),
    /// Of one that is, or was, captured by eBPF.
    own: ArcSwapOption<OwnAddresses>,
    captured: AtomicBool,
}

#[derive(Debug, thiserror::Error)]
pub enum NotANetns {
    #[error("the descriptor is no network namespace but {0}")]
    Other(&'static str),
    #[error("the descriptor can't be examined: {0}")]
    Io(#[from] io::Error),
}

/// Where every worker lives between visits: the process's own namespace.
static HOME: OnceLock<OwnedFd> = OnceLock::new();

const NSFS_MAGIC: rustix::fs::FsWord = 0x6e73_6673;
/// `_IO(0xb7, 3)` of linux/nsfs.h.
const NS_GET_NSTYPE: libc::c_ulong = 0xb703;

impl Netns {
    pub fn new(fd: OwnedFd) -> Result<Self, NotANetns> {
        let fs = rustix::fs::fstatfs(&fd).map_err(io::Error::from)?;
        if fs.f_type != NSFS_MAGIC {
            return Err(NotANetns::Other("an ordinary file or socket"));
        }
        match ns_type(fd.as_fd())? {
            libc::CLONE_NEWNET => {}
            libc::CLONE_NEWNS => return Err(NotANetns::Other("a mount namespace")),
            libc::CLONE_NEWPID => return Err(NotANetns::Other("a pid namespace")),
            libc::CLONE_NEWUSER => return Err(NotANetns::Other("a user namespace")),
            _ => return Err(NotANetns::Other("another kind of namespace")),
        }
        let stat = rustix::fs::fstat(&fd).map_err(io::Error::from)?;
        Ok(Self {
            fd,
            id: (stat.st_ino, stat.st_dev),
            own: ArcSwapOption::empty(),
            captured: AtomicBool::new(false),
        })
    }

    /// The namespace of this process.
    pub fn own() -> Result<Self, NotANetns> {
        Self::new(home()?.try_clone_to_owned()?)
    }

    /// (inode, device)
    pub fn id(&self) -> (u64, u64) {
        self.id
    }

    /// Runs `visit` on this thread inside the namespace. It must not block: a worker is away from
    /// home for its length. The process aborts if the thread can't come home, because every socket
    /// that it opened afterwards would belong to this pod.
    pub fn enter<T>(&self, visit: impl FnOnce() -> T) -> io::Result<T> {
        let home = home()?;
        move_into_link_name_space(self.fd.as_fd(), Some(LinkNameSpaceType::Network))?;
        let _way_back = WayHome(home);
        Ok(visit())
    }
}

/// Capture by eBPF leads connections over loopback instead of translating addresses.
impl Netns {
    pub fn captured_as(&self, own: OwnAddresses) {
        self.own.store(Some(own.into()));
        self.captured.store(true, Ordering::Relaxed);
    }

    /// What was led over loopback until now is known by its own addresses still.
    pub fn captured_no_more(&self) {
        self.captured.store(false, Ordering::Relaxed);
    }

    /// The client as everybody else would see it, where it dialled and was led over loopback.
    pub fn as_seen(&self, peer: SocketAddr) -> SocketAddr {
        let own = match self.own.load_full() {
            Some(own) if peer.ip().is_loopback() => own,
            _ => return peer,
        };
        let ip = if peer.is_ipv4() { own.v4 } else { own.v6 };
        SocketAddr::new(ip.unwrap_or(peer.ip()), peer.port())
    }

    /// SO_MARK of connections to the application that carry the client's address: what leads the
    /// answers back. nftables marks them itself, by the data plane's own mark.
    pub(super) fn reply_mark(&self, config: &Config) -> u32 {
        match self.captured.load(Ordering::Relaxed) {
            true => REPLY_MARK,
            false => config.mark,
        }
    }
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Comes home also when the visit panics.
struct WayHome(BorrowedFd<'static>);

impl Drop for WayHome {
    fn drop(&mut self) {
        if let Err(errno) = move_into_link_name_space(self.0, Some(LinkNameSpaceType::Network)) {
            tracing::error!(%errno, "a worker can't leave a pod's network namespace: aborting");
            std::process::abort();
        }
    }
}

fn home() -> io::Result<BorrowedFd<'static>> {
    if let Some(fd) = HOME.get() {
        return Ok(fd.as_fd());
    }
    // The main thread's namespace: it never enters another one.
    let fd = rustix::fs::open(
        "/proc/self/ns/net",
        OFlags::RDONLY | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    Ok(HOME.get_or_init(|| fd).as_fd())
}

fn ns_type(fd: BorrowedFd<'_>) -> io::Result<i32> {
    // SAFETY: NS_GET_NSTYPE takes no argument and writes no memory; `fd` is open and on nsfs.
    match unsafe { libc::ioctl(fd.as_raw_fd(), NS_GET_NSTYPE) } {
        -1 => Err(io::Error::last_os_error()),
        kind => Ok(kind),
    }
}
