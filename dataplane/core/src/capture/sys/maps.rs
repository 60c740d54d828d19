//! Pinned maps as raw bytes: what they are like, and their entries brought into others.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use super::{OBJ_PIN, PathAttr, bpf, c_path, describe, object, raw};

#[cfg(test)]
const MAP_CREATE: libc::c_long = 0;
const LOOKUP_ELEM: libc::c_long = 1;
const UPDATE_ELEM: libc::c_long = 2;
const GET_NEXT_KEY: libc::c_long = 4;

/// `enum bpf_map_type`: those with a value for each processor, a hash and an array.
const PER_CPU: [u32; 2] = [5, 6];

/// `struct bpf_map_info`, as far as we look.
#[derive(Default)]
#[repr(C)]
struct Info {
    kind: u32,
    id: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    flags: u32,
}

#[derive(Default)]
#[repr(C)]
struct ElementAttr {
    map: u32,
    pad: u32,
    key: u64,
    /// Or the next key.
    value: u64,
    flags: u64,
}

/// What two maps have to share to be one for the programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::capture) struct Layout {
    pub kind: u32,
    pub key_size: u32,
    pub value_size: u32,
    pub max_entries: u32,
    pub flags: u32,
}

/// A map of any type and size.
pub(in crate::capture) struct PinnedMap {
    fd: OwnedFd,
    pub layout: Layout,
}

/// How many entries of a map.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(in crate::capture) struct Carried {
    pub entries: u32,
    /// The other map has no room for.
    pub lost: u32,
}

impl std::fmt::Display for Layout {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "type {}, key {}, value {}, entries {}, flags {:#x}",
            self.kind, self.key_size, self.value_size, self.max_entries, self.flags
        )
    }
}

impl Layout {
    /// Of a value as the calls copy it.
    fn room(self) -> usize {
        match PER_CPU.contains(&self.kind) {
            true => (self.value_size as usize).next_multiple_of(8),
            false => self.value_size as usize,
        }
    }
}

impl PinnedMap {
    pub fn open(path: &Path) -> io::Result<Self> {
        let fd = object(path)?;
        let mut info = Info::default();
        describe(fd.as_fd(), &mut info)?;
        let layout = Layout {
            kind: info.kind,
            key_size: info.key_size,
            value_size: info.value_size,
            max_entries: info.max_entries,
            flags: info.flags,
        };
        Ok(Self { fd, layout })
    }

    /// One that isn't pinned yet.
    #[cfg(test)]
    pub fn make(layout: Layout) -> io::Result<Self> {
        let mut attr = [
            layout.kind,
            layout.key_size,
            layout.value_size,
            layout.max_entries,
            layout.flags,
        ];
        let fd = super::descriptor(bpf(MAP_CREATE, &mut attr)?);
        Ok(Self { fd, layout })
    }

    pub fn pin(&self, path: &Path) -> io::Result<()> {
        let path = c_path(path)?;
        let mut attr = PathAttr {
            path: path.as_ptr() as u64,
            fd: raw(self.fd.as_fd()),
            ..PathAttr::default()
        };
        bpf(OBJ_PIN, &mut attr).map(drop)
    }

    /// Values grow and shrink at their end; what an older one hasn't is zero. None: keys of another
    /// size, or maps of another type.
    pub fn carry_to(&self, other: &Self) -> io::Result<Option<Carried>> {
        let (from, to) = (self.layout, other.layout);
        if from.kind != to.kind || from.key_size != to.key_size {
            return Ok(None);
        }
        let processors = match PER_CPU.contains(&from.kind) {
            true => aya::util::nr_cpus().map_err(|(_, error)| error)?,
            false => 1,
        };
        let mut old = vec![0_u8; from.room() * processors];
        let mut new = vec![0_u8; to.room() * processors];
        let mut key = vec![0_u8; from.key_size as usize];
        let mut carried = Carried::default();
        let mut more = self.next_key(None, &mut key)?;
        // An entry that goes meanwhile leads back to the first.
        let mut steps = 2 * u64::from(from.max_entries);
        while more && steps > 0 {
            steps -= 1;
            if self.element(LOOKUP_ELEM, &mut key, &mut old).is_ok() {
                let values = old.chunks_exact(from.room());
                for (old, new) in values.zip(new.chunks_exact_mut(to.room())) {
                    let both = old.len().min(new.len());
                    new.fill(0);
                    new[..both].copy_from_slice(&old[..both]);
                }
                match other.element(UPDATE_ELEM, &mut key, &mut new) {
                    Ok(()) => carried.entries += 1,
                    Err(_) => carried.lost += 1,
                }
            }
            let before = key.clone();
            more = self.next_key(Some(&before), &mut key)?;
        }
        Ok(Some(carried))
    }

    fn next_key(&self, after: Option<&[u8]>, key: &mut [u8]) -> io::Result<bool> {
        let mut attr = ElementAttr {
            map: raw(self.fd.as_fd()),
            key: after.map_or(0, |key| key.as_ptr() as u64),
            value: key.as_mut_ptr() as u64,
            ..ElementAttr::default()
        };
        match bpf(GET_NEXT_KEY, &mut attr) {
            Ok(_) => Ok(true),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn element(&self, command: libc::c_long, key: &mut [u8], value: &mut [u8]) -> io::Result<()> {
        let mut attr = ElementAttr {
            map: raw(self.fd.as_fd()),
            key: key.as_mut_ptr() as u64,
            value: value.as_mut_ptr() as u64,
            ..ElementAttr::default()
        };
        bpf(command, &mut attr).map(drop)
    }
}
