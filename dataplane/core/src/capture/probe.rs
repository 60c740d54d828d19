//! Whether this node can capture by eBPF. The programs are loaded and attached for real, but to a
//! file system, a cgroup and a network namespace of the probe's own, of which nothing stays.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsmount, fsopen};
use serde::Serialize;

use super::cgroup2;
use super::foreign::{self, Look};
use super::kernel::missing_bpffs;
use super::objects::{HOOKS, Hook, Objects};
use super::sys::{self, AttachType, Link};
use crate::config::Ports;

const BTF: &str = "/sys/kernel/btf/vmlinux";
/// As `underpass uninstall` knows leaves of this node by.
const LEAF: &str = "dataplane-probe-";
const OTHER_KERNEL: &str = "run a kernel that has it (6.18 is known to), or capture by nftables";

/// Any: no connection is ever led to them.
const PORTS: Ports = Ports {
    outbound: 1,
    inbound_plaintext: 2,
    inbound_hbone: 3,
    dns: 4,
    socks5: None,
};

/// The agent's settings of the same names.
#[derive(Clone, Debug)]
pub struct Asked {
    pub pods_cgroup: PathBuf,
    /// Of the data planes' leaves on this node; needn't be there yet.
    pub leaf_parent: PathBuf,
    /// Where programs will be pinned; needn't be there yet.
    pub folder: PathBuf,
}

/// One thing that capture needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Requirement {
    pub name: String,
    /// Why it isn't met; "" when it is.
    pub reason: String,
    /// What an operator can do then.
    pub remedy: String,
}

/// For the agent.
pub fn json(found: &[Requirement]) -> String {
    serde_json::json!({ "requirements": found }).to_string()
}

/// Each requirement with what was found. What can't be tried without another one is left out.
pub fn probe(asked: &Asked) -> Vec<Requirement> {
    let mut found = Found::default();
    let allowed = found.take(
        "bpf(2)",
        bpf(),
        "grant CAP_SYS_ADMIN, and let seccomp pass bpf(2)",
    );
    found.take("BTF", btf(), "run a kernel with CONFIG_DEBUG_INFO_BTF");
    found.take(
        "bpffs",
        missing_bpffs(&asked.folder).map(drop).map_err(text),
        "mount -t bpf bpf /sys/fs/bpf, or name a folder on one: ebpf.folder",
    );
    let pods = found.take(
        "pods' cgroup",
        pods_cgroup(&asked.pods_cgroup),
        "name the cgroup2 folder above all processes of all pods: --pods-cgroup",
    );
    let leaf = found.take(
        "data plane's cgroup",
        Leaf::make(asked),
        "name a writable folder of cgroup2 for its leaf: --dataplane-cgroup-parent",
    );
    if allowed.is_some() {
        kernel(&mut found, leaf.as_ref(), pods.and(Some(asked)));
    }
    found.0
}

/// What only the kernel itself can tell: its verifier, and its order of programs.
fn kernel(found: &mut Found, leaf: Option<&Leaf>, asked: Option<&Asked>) {
    let objects = found.take("maps and socket storage", Private::open(), OTHER_KERNEL);
    let Some(mut objects) = objects else { return };
    let mut ahead = Vec::new();
    for hook in &HOOKS {
        let name = format!("program {}", hook.program);
        let done = cgroup_program(hook, &mut objects.objects, leaf);
        ahead.push(found.take(&name, done, OTHER_KERNEL).unwrap_or_default());
    }
    let done = lookup_program(&mut objects.objects);
    found.take("program lookup", done, OTHER_KERNEL);
    if let Some(asked) = asked {
        let done = nobody_first(asked, &ahead);
        found.take("no other program first", done, foreign::REMEDY);
    }
}

#[derive(Default)]
struct Found(Vec<Requirement>);

impl Found {
    fn take<T>(&mut self, name: &str, done: Result<T, String>, remedy: &str) -> Option<T> {
        let reason = done.as_ref().err().cloned();
        self.0.push(Requirement {
            name: name.into(),
            remedy: reason.as_ref().map_or(String::new(), |_| remedy.into()),
            reason: reason.unwrap_or_default(),
        });
        done.ok()
    }
}

fn bpf() -> Result<(), String> {
    sys::programs().map(drop).map_err(|error| match error {
        error if error.raw_os_error() == Some(libc::ENOSYS) => {
            "the kernel has no bpf(2) (CONFIG_BPF_SYSCALL)".into()
        }
        error => text(error),
    })
}

fn btf() -> Result<(), String> {
    match Path::new(BTF).exists() {
        true => Ok(()),
        false => Err(format!("{BTF} isn't there")),
    }
}

fn pods_cgroup(cgroup: &Path) -> Result<(), String> {
    let shown = cgroup.display();
    if !cgroup.is_dir() {
        return Err(format!("{shown} isn't there"));
    }
    match cgroup2::holds(cgroup).map_err(text)? {
        false => Err(format!("{shown} isn't on cgroup2")),
        true if cgroup2::is_root(cgroup).map_err(text)? => Err(format!(
            "{shown} is the root: the host's processes are in it"
        )),
        true => Ok(()),
    }
}

/// A throw-away cgroup where data planes would have theirs.
struct Leaf {
    path: PathBuf,
    /// That was there before.
    existing: PathBuf,
}

impl Leaf {
    fn make(asked: &Asked) -> Result<Self, String> {
        let parent = &asked.leaf_parent;
        let shown = parent.display();
        if !parent.is_absolute() || !cgroup2::holds(parent).map_err(text)? {
            return Err(format!("{shown} isn't on cgroup2"));
        }
        if asked.pods_cgroup.starts_with(parent) {
            return Err(format!("the pods' cgroup lies in it ({shown})"));
        }
        sweep(parent);
        let existing = parent.ancestors().find(|path| path.exists());
        let leaf = Self {
            path: parent.join(format!("{LEAF}{}", std::process::id())),
            existing: existing.unwrap_or(parent).to_owned(),
        };
        std::fs::create_dir_all(&leaf.path).map_err(|error| format!("{shown}: {error}"))?;
        match cgroup2::is_root(parent).map_err(text)? {
            true => Err(format!("{shown} is the root: all processes are in it")),
            false => Ok(leaf),
        }
    }
}

impl Drop for Leaf {
    fn drop(&mut self) {
        let made = self.path.ancestors();
        for folder in made.take_while(|path| *path != self.existing) {
            // Somebody may have settled in a parent meanwhile.
            let _ = std::fs::remove_dir(folder);
        }
    }
}

/// Those of probes that were killed.
fn sweep(parent: &Path) {
    for entry in std::fs::read_dir(parent).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let pid = name.to_str().and_then(|name| name.strip_prefix(LEAF));
        if pid.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
            let _ = std::fs::remove_dir(entry.path());
        }
    }
}

/// Objects whose maps lie on a BPF file system that nobody else sees, and that ends with its
/// descriptor.
struct Private {
    objects: Objects,
    _root: OwnedFd,
}

impl Private {
    fn open() -> Result<Self, String> {
        let root = mount_private().map_err(|error| format!("a BPF file system: {error}"))?;
        let folder = format!("/proc/self/fd/{}", root.as_raw_fd());
        let mut objects = Objects::new(Path::new(&folder), &PORTS);
        objects.open_maps().map_err(text)?;
        Ok(Self {
            objects,
            _root: root,
        })
    }
}

fn mount_private() -> io::Result<OwnedFd> {
    let context = fsopen("bpf", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_create(context.as_fd())?;
    let flags = FsMountFlags::FSMOUNT_CLOEXEC;
    Ok(fsmount(context.as_fd(), flags, MountAttrFlags::empty())?)
}

/// Loads it, and attaches it to `leaf`. Returns programs that run first even there, as an ancestor
/// may claim for its own.
fn cgroup_program(
    hook: &Hook,
    objects: &mut Objects,
    leaf: Option<&Leaf>,
) -> Result<Vec<u32>, String> {
    let loaded = objects.hook(hook).map_err(text)?;
    let Some(leaf) = leaf else {
        return Ok(Vec::new());
    };
    let program = loaded.fd().map_err(text)?;
    let cgroup = File::open(&leaf.path).map_err(text)?;
    let refused = |error: io::Error| format!("it can't be attached to a cgroup: {error}");
    let link = Link::attach(program, cgroup.as_fd(), hook.at).map_err(refused)?;
    let own = link.info().map_err(text)?.program;
    let effective = sys::effective(cgroup.as_fd(), hook.at).map_err(text)?;
    let ahead = effective.into_iter().take_while(|id| *id != own);
    Ok(ahead.collect())
}

fn lookup_program(objects: &mut Objects) -> Result<(), String> {
    let loaded = objects.lookup(0, 0).map_err(text)?;
    let program = loaded.fd().map_err(text)?;
    let attach = || {
        sys::leave_network()?;
        let own = File::open("/proc/thread-self/ns/net")?;
        Link::attach(program, own.as_fd(), AttachType::SkLookup).map(drop)
    };
    // The namespace goes with the thread.
    let done = std::thread::scope(|scope| scope.spawn(attach).join());
    let done = done.map_err(|_| "it can't be attached: the thread ended".to_owned())?;
    done.map_err(|error| format!("it can't be attached to a network namespace: {error}"))
}

fn nobody_first(asked: &Asked, ahead: &[Vec<u32>]) -> Result<(), String> {
    let pods = &asked.pods_cgroup;
    let mut look = Look::default();
    let stays = HOOKS.iter().map(|hook| {
        let link = Link::pinned(&asked.folder.join("links").join(hook.program)).ok()?;
        Some(link.info().ok()?.program)
    });
    let stays: Vec<_> = stays.collect();
    let mut found = look.on(pods, &stays).map_err(text)?;
    found.extend(look.below(pods).map_err(text)?);
    let file = File::open(pods).map_err(text)?;
    for (hook, ids) in foreign::hooks(ahead) {
        let effective = sys::effective(file.as_fd(), hook.at).map_err(text)?;
        let here = ids.iter().copied().filter(|id| effective.contains(id));
        // None of these is ours: 0 is no program's id.
        found.extend(look.before(pods, hook, &here.collect::<Vec<_>>(), 0));
    }
    foreign::words(&found).map_or(Ok(()), Err)
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}
