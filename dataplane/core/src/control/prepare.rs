//! What the process does to itself before it opens a socket.

use std::io;

use rustix::process::setrlimit;
use rustix::process::{DumpableBehavior, Resource, Rlimit, getrlimit, set_dumpable_behavior};

use super::Options;
use super::cgroup::{self, CgroupError};
use crate::inpod::{self, MissingAbility};

#[derive(Debug, thiserror::Error)]
pub enum NotReady {
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    #[error(transparent)]
    Ability(#[from] MissingAbility),
    #[error("can't turn core dumps off: {0}")]
    CoreDumps(io::Error),
}

/// Moves into the cgroup, keeps keys out of core dumps, takes all descriptors it may have, and
/// proves that it may do what every pod needs. Call it before threads and sockets exist.
pub fn prepare(options: &Options) -> Result<(), NotReady> {
    let core = |errno: rustix::io::Errno| NotReady::CoreDumps(errno.into());
    set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(core)?;
    let none = Rlimit {
        current: Some(0),
        maximum: Some(0),
    };
    setrlimit(Resource::Core, none).map_err(core)?;
    if let Some(leaf) = &options.cgroup {
        cgroup::enter(leaf)?;
    }
    let files = getrlimit(Resource::Nofile);
    let all = Rlimit {
        current: files.maximum,
        maximum: files.maximum,
    };
    // The soft limit serves, too, for fewer connections.
    let _ = setrlimit(Resource::Nofile, all);
    Ok(inpod::check_abilities()?)
}
