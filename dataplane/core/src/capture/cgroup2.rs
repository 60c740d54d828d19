//! What the kernel tells about folders of cgroup2.

use std::io;
use std::os::linux::fs::MetadataExt;
use std::path::Path;

const CGROUP2_MAGIC: rustix::fs::FsWord = 0x6367_7270;

/// Whether `path`, or the nearest folder above it that is there, lies on cgroup2.
pub(crate) fn holds(path: &Path) -> io::Result<bool> {
    let existing = path.ancestors().find(|p| p.exists()).unwrap_or(path);
    Ok(rustix::fs::statfs(existing)?.f_type == CGROUP2_MAGIC)
}

/// Only the real root has no `cgroup.type`; a cgroup namespace's root is where the mount begins.
pub(crate) fn is_root(cgroup: &Path) -> io::Result<bool> {
    let mounted_here = match cgroup.parent() {
        Some(parent) => parent.metadata()?.st_dev() != cgroup.metadata()?.st_dev(),
        None => true,
    };
    Ok(mounted_here || !cgroup.join("cgroup.type").exists())
}
