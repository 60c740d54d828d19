//! The data plane's own cgroup2 leaf: redirection rules exempt it by this cgroup, so nothing else
//! may live there (design section 4).

use std::io;
use std::path::{Path, PathBuf};

use crate::capture::cgroup2;

#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    #[error("cgroup {0} is not an absolute path")]
    Relative(PathBuf),
    #[error("cgroup {0} is not on a cgroup2 file system: look for one in /proc/self/mountinfo")]
    NotCgroup2(PathBuf),
    #[error("cgroup {0} is the root: exempting it would exempt every process")]
    Root(PathBuf),
    #[error("cgroup {0} has children of its own: name a leaf")]
    NotALeaf(PathBuf),
    #[error("cgroup {0} holds other processes ({1}): they would escape capture; name another leaf")]
    Occupied(PathBuf, String),
    #[error("cgroup {0}: {1}")]
    Io(PathBuf, io::Error),
}

/// Moves this whole process into `leaf`, alone. Creates it where it is missing.
pub(super) fn enter(leaf: &Path) -> Result<(), CgroupError> {
    let path = || leaf.to_owned();
    let io = |error| CgroupError::Io(path(), error);
    if !leaf.is_absolute() {
        return Err(CgroupError::Relative(path()));
    }
    // Before anything is created: a wrong path mustn't leave folders on an ordinary file system.
    if !cgroup2::holds(leaf).map_err(io)? {
        return Err(CgroupError::NotCgroup2(path()));
    }
    std::fs::create_dir_all(leaf).map_err(io)?;
    if cgroup2::is_root(leaf).map_err(io)? {
        return Err(CgroupError::Root(path()));
    }
    if has_children(leaf).map_err(io)? {
        return Err(CgroupError::NotALeaf(path()));
    }
    let procs = leaf.join("cgroup.procs");
    let own = std::process::id().to_string();
    let others = |text: String| {
        let others: Vec<_> = text.lines().filter(|pid| *pid != own).collect();
        (!others.is_empty()).then(|| others.join(", "))
    };
    if let Some(pids) = others(std::fs::read_to_string(&procs).map_err(io)?) {
        return Err(CgroupError::Occupied(path(), pids));
    }
    std::fs::write(&procs, "0").map_err(io)?;
    // Somebody may have moved in between the look and the move.
    match others(std::fs::read_to_string(&procs).map_err(io)?) {
        Some(pids) => Err(CgroupError::Occupied(path(), pids)),
        None => Ok(()),
    }
}

fn has_children(leaf: &Path) -> io::Result<bool> {
    for entry in std::fs::read_dir(leaf)? {
        if entry?.file_type()?.is_dir() {
            return Ok(true);
        }
    }
    Ok(false)
}
