//! Maps that another version laid out otherwise: made anew beside the old ones, filled with what is
//! known, and swapped with them whole once all programs use the new ones.
//!
//! `maps` holds what runs, or what the next process begins with; `maps-new` is of nobody's when a
//! process starts. Until the swap a crash leaves the old maps, which capture as before together
//! with those programs that were renewed; after it the new ones.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, RenameFlags, renameat_with};

use super::kernel::{Kernel, make_folder, remove_folder};
use super::objects;
use super::sys::Link;
use super::sys::maps::{Layout, PinnedMap};
use super::{CaptureError, layout};

/// Whose entries are brought along. Others are of connections under way, whose state the programs
/// change meanwhile: a way past the lookup that was copied could stay open for ever. Or they are of
/// sockets, or fill up by themselves.
const CARRIED: [&str; 6] = [
    "datagrams",
    "exempt",
    "own_addresses",
    "pods",
    "probe_ports",
    "reasons",
];

/// What is made anew with any of others: numbers that count entries, and entries that sockets take
/// back.
const TIED: [(&str, &[&str]); 3] = [
    ("originals", &["records", "dialled"]),
    ("records", &["originals", "dialled"]),
    ("probes", &["probing"]),
];

/// A map of this version that is pinned with another layout.
struct Change {
    name: String,
    old: Layout,
    new: Layout,
}

/// Where this version's maps are: in `maps`, where those that are there fit or none are, else all of
/// them in `maps-new`.
pub(super) fn prepare(folder: &Path) -> Result<&'static str, CaptureError> {
    let (maps, coming) = (folder.join("maps"), folder.join("maps-new"));
    clear(folder)?;
    if names(&maps)?.is_empty() {
        return Ok("maps");
    }
    make_folder(&coming)?;
    objects::make_maps(&coming)?;
    let changes = changes(&maps, &coming)?;
    if changes.is_empty() {
        clear(folder)?;
        return Ok("maps");
    }
    for name in names(&coming)? {
        let (from, to) = (maps.join(&name), coming.join(&name));
        if let Some(change) = changes.iter().find(|change| change.name == name) {
            carry(change, &from, &to)?;
        } else if from.exists() && !is_tied(&name, &changes) {
            let old = PinnedMap::open(&from).map_err(at(&from))?;
            std::fs::remove_file(&to).map_err(at(&to))?;
            old.pin(&to).map_err(at(&to))?;
        }
    }
    Ok("maps-new")
}

/// The new maps are those that the next process finds.
pub(super) fn swap(folder: &Path) -> Result<(), CaptureError> {
    let (maps, coming) = (folder.join("maps"), folder.join("maps-new"));
    let swapped = renameat_with(CWD, &maps, CWD, &coming, RenameFlags::EXCHANGE);
    swapped.map_err(io::Error::from).map_err(at(&maps))?;
    clear(folder)
}

impl Kernel {
    /// Inbound capture of all pods by this version's program, not in their namespaces yet.
    pub(super) fn load_lookups(&mut self) -> Result<Vec<(u32, OwnedFd)>, CaptureError> {
        let known: Vec<_> = self.pods.iter().filter_map(Result::ok).collect();
        let mut loaded = Vec::new();
        for (_, value) in known {
            let slot = layout::slot_of(&value);
            let lookup = self.objects.lookup(slot, layout::flags_of(&value))?;
            let program = lookup.fd()?.try_clone_to_owned();
            let failed = |error: io::Error| CaptureError::Program("lookup", error.to_string());
            loaded.push((slot, program.map_err(failed)?));
        }
        Ok(loaded)
    }

    pub(super) fn renew_lookups(&self, loaded: &[(u32, OwnedFd)]) {
        for (slot, program) in loaded {
            let updated = Link::pinned(&self.pin(*slot));
            // Its namespace may be gone, and it is swept away later.
            if let Err(error) = updated.and_then(|link| link.update(program.as_fd())) {
                tracing::info!(slot, %error, "inbound capture of a pod that is gone isn't renewed");
            }
        }
    }
}

fn changes(maps: &Path, coming: &Path) -> Result<Vec<Change>, CaptureError> {
    let mut found = Vec::new();
    for name in names(coming)? {
        let path = maps.join(&name);
        if path.exists() {
            let (old, new) = (layout_of(&path)?, layout_of(&coming.join(&name))?);
            if old != new {
                found.push(Change { name, old, new });
            }
        }
    }
    Ok(found)
}

/// Brings along what can be. Without all its pods capture would end for some: then nothing changes.
fn carry(change: &Change, from: &Path, to: &Path) -> Result<(), CaptureError> {
    let Change { name, old, new } = change;
    let mut carried = None;
    if CARRIED.contains(&name.as_str()) {
        let old = PinnedMap::open(from).map_err(at(from))?;
        let new = PinnedMap::open(to).map_err(at(to))?;
        carried = old.carry_to(&new).map_err(at(from))?;
    }
    if name == "pods" && carried.is_none_or(|carried| carried.lost > 0) {
        let text = format!(
            "has another layout ({old}; {new} wanted) and its pods can't be brought along; start \
             the version that wrote it, and let the node's pods end before the change"
        );
        return Err(CaptureError::Map("pods", text));
    }
    let (old, new) = (old.to_string(), new.to_string());
    match carried {
        Some(carried) => tracing::warn!(
            map = name,
            old,
            new,
            entries = carried.entries,
            lost = carried.lost,
            "map of another layout: carried over"
        ),
        None => tracing::warn!(
            map = name,
            old,
            new,
            "map of another layout: made anew, empty"
        ),
    }
    Ok(())
}

fn is_tied(name: &str, changes: &[Change]) -> bool {
    let changed = |other: &&str| changes.iter().any(|change| change.name == **other);
    let mut ties = TIED.iter().filter(|(tied, _)| *tied == name);
    ties.any(|(_, others)| others.iter().any(changed))
}

fn layout_of(path: &Path) -> Result<Layout, CaptureError> {
    Ok(PinnedMap::open(path).map_err(at(path))?.layout)
}

fn names(folder: &Path) -> Result<Vec<String>, CaptureError> {
    let entries = std::fs::read_dir(folder).map_err(at(folder))?;
    let names = entries.flatten().map(|entry| entry.file_name());
    Ok(names.filter_map(|name| name.into_string().ok()).collect())
}

/// What a process that died before or after the swap left.
fn clear(folder: &Path) -> Result<(), CaptureError> {
    let beside: PathBuf = folder.join("maps-new");
    remove_folder(&beside).map_err(at(&beside))
}

fn at(path: &Path) -> impl Fn(io::Error) -> CaptureError {
    move |error| CaptureError::Path(path.to_owned(), error)
}
