//! Somebody else's programs that see an address before ours do. What translates a service's address
//! there hides the service from us (design section 4). A child cgroup's program runs before its
//! ancestors'; on one cgroup, the first attached runs first.

use std::collections::HashMap;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::objects::{HOOKS, Hook};
use super::sys::{self, AttachType, Known};

/// Each program of ours has one of these, whatever its version: who decides counts its exits, who
/// answers for a socket reads what was dialled with it.
const OUR_MAPS: [&str; 2] = ["reasons", "dialled"];
const NONE_STAYS: [Option<u32>; HOOKS.len()] = [None; HOOKS.len()];
/// Far above what a node's pods have; whoever makes more hides behind them.
const MAX_CGROUPS: usize = 65_536;
/// Of one look at all cgroups, which serves all pods that are verified meanwhile.
const FRESH: Duration = Duration::from_secs(2);

pub(super) const REMEDY: &str = "attach it to the root cgroup, where it runs after ours, or capture \
                                 by nftables (--capture nftables)";

/// One program in the way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Foreign {
    pub hook: &'static str,
    pub id: u32,
    pub name: String,
    /// That it is attached to.
    pub cgroup: PathBuf,
}

impl fmt::Display for Foreign {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self.name.as_str() {
            "" => "without a name",
            name => name,
        };
        write!(
            f,
            "the program {name} (id {}) on {} runs before ours at {} and may translate a service's \
             address",
            self.id,
            self.cgroup.display(),
            self.hook
        )
    }
}

/// The hooks at which addresses are translated, with what belongs to each in a list by HOOKS.
pub(super) fn hooks<T>(by_hook: &[T]) -> impl Iterator<Item = (&'static Hook, &T)> {
    let all = HOOKS.iter().zip(by_hook);
    all.filter(|(hook, _)| {
        matches!(
            hook.at,
            AttachType::Connect4
                | AttachType::Connect6
                | AttachType::Sendmsg4
                | AttachType::Sendmsg6
                | AttachType::Recvmsg4
                | AttachType::Recvmsg6
        )
    })
}

/// None: there is none.
pub(super) fn words(found: &[Foreign]) -> Option<String> {
    match found {
        [] => None,
        [one] => Some(one.to_string()),
        [one, rest @ ..] => Some(format!("{one}; {} more like it", rest.len())),
    }
}

/// Looks programs up, each once.
#[derive(Default)]
pub(super) struct Look {
    /// None: it is ours, or gone.
    known: HashMap<u32, Option<Known>>,
}

impl Look {
    /// Of the effective list of `cgroup`, what comes before `own`.
    pub fn before(
        &mut self,
        cgroup: &Path,
        hook: &Hook,
        effective: &[u32],
        own: u32,
    ) -> Vec<Foreign> {
        let earlier = effective.iter().take_while(|id| **id != own).copied();
        let foreign = earlier.filter_map(|id| self.foreign(id));
        let foreign: Vec<_> = foreign.collect();
        let named = foreign.into_iter().map(|program| {
            let at = holder(cgroup, hook.at, program.id);
            named(hook, program, at.unwrap_or(cgroup))
        });
        named.collect()
    }

    /// What is attached to `cgroup` itself. `stays`, by HOOKS: a program of ours that is there
    /// already and keeps its place, so that nothing behind it counts.
    pub fn on(&mut self, cgroup: &Path, stays: &[Option<u32>]) -> io::Result<Vec<Foreign>> {
        let file = File::open(cgroup)?;
        let mut found = Vec::new();
        for (hook, stays) in hooks(stays) {
            let attached = sys::attached(file.as_fd(), hook.at)?;
            let earlier = attached.into_iter().take_while(|id| Some(*id) != *stays);
            let foreign = earlier.filter_map(|id| self.foreign(id));
            found.extend(foreign.map(|program| named(hook, program, cgroup)));
        }
        Ok(found)
    }

    /// What is attached to any cgroup below `top`.
    pub fn below(&mut self, top: &Path) -> io::Result<Vec<Foreign>> {
        let mut found = Vec::new();
        // Most nodes have no such program, and needn't be walked through.
        let ids = sys::programs()?;
        let addresses = |known: Known| known.of_addresses.then_some(());
        if !ids
            .iter()
            .any(|id| self.foreign(*id).and_then(addresses).is_some())
        {
            return Ok(found);
        }
        let mut left = children(top)?;
        let mut seen = 0;
        while let Some(cgroup) = left.pop() {
            seen += 1;
            if seen > MAX_CGROUPS {
                let text = format!("more than {MAX_CGROUPS} cgroups below {}", top.display());
                return Err(io::Error::other(text));
            }
            // It may be gone by now, with all that was attached.
            if let (Ok(here), Ok(deeper)) = (self.on(&cgroup, &NONE_STAYS), children(&cgroup)) {
                found.extend(here);
                left.extend(deeper);
            }
        }
        Ok(found)
    }

    /// None: the program is ours, or gone.
    fn foreign(&mut self, id: u32) -> Option<Known> {
        let look = || sys::program(id).ok().flatten().filter(|known| !ours(known));
        self.known.entry(id).or_insert_with(look).clone()
    }
}

/// What is attached below the pods' cgroup, looked up now and then.
#[derive(Default)]
pub(super) struct Below {
    looked: Option<(Instant, Vec<Foreign>)>,
}

impl Below {
    /// Of the sockets of `cgroup`, which is the pods' or below it.
    pub fn of(&mut self, pods: &Path, cgroup: &Path) -> io::Result<Vec<Foreign>> {
        let found = match &self.looked {
            Some((when, found)) if when.elapsed() < FRESH => found,
            _ => {
                let found = Look::default().below(pods)?;
                &self.looked.insert((Instant::now(), found)).1
            }
        };
        let below = found.iter().filter(|one| one.cgroup.starts_with(cgroup));
        Ok(below.cloned().collect())
    }
}

/// Also an older version's, or another node's on this machine: it leaves alone what isn't enrolled
/// with it.
fn ours(known: &Known) -> bool {
    HOOKS.iter().any(|hook| hook.program == known.name)
        && known
            .maps
            .iter()
            .any(|name| OUR_MAPS.contains(&name.as_str()))
}

fn named(hook: &Hook, program: Known, cgroup: &Path) -> Foreign {
    Foreign {
        hook: hook.program,
        id: program.id,
        name: program.name,
        cgroup: cgroup.to_owned(),
    }
}

/// `cgroup` or the ancestor of it that the program is attached to.
fn holder(cgroup: &Path, at: AttachType, id: u32) -> Option<&Path> {
    cgroup.ancestors().find(|path| {
        let attached = File::open(path).and_then(|file| sys::attached(file.as_fd(), at));
        attached.is_ok_and(|ids| ids.contains(&id))
    })
}

fn children(cgroup: &Path) -> io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(cgroup)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            found.push(entry.path());
        }
    }
    Ok(found)
}
