//! The node's programs and maps in the kernel: loaded, pinned, attached, adopted and removed.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::linux::fs::MetadataExt;
use std::path::{Path, PathBuf};

use aya::Ebpf;
use aya::maps::{Array, HashMap, MapData, PerCpuArray, SockMap};

use super::foreign::{self, Below, Look};
use super::layout::{
    DatagramsWords, OwnAddressBytes, PodBytes, ProbePortBytes, QuestionBytes, QuestionKeyWords,
    TupleBytes,
};
use super::objects::{HOOKS, Objects, Place};
use super::places::Places;
use super::probes::{Claims, Hooked};
use super::reasons::{REASONS, Reason};
use super::renewal;
use super::sys::{self, AttachType, Link};
use super::{CaptureConfig, CaptureError};

const BPF_FS_MAGIC: rustix::fs::FsWord = 0xcafe_4a11;

/// Owns the pins of this node. Dropping it changes nothing in the kernel.
pub struct Kernel {
    pub(super) config: CaptureConfig,
    pub(super) pods: HashMap<MapData, u64, PodBytes>,
    pub(super) own_addresses: HashMap<MapData, OwnAddressBytes, u32>,
    pub(super) listeners: SockMap<MapData>,
    pub(super) probe_ports: HashMap<MapData, ProbePortBytes, u32>,
    pub(super) probes: HashMap<MapData, TupleBytes, u32>,
    /// As in `probe_ports`, whose entries would cost a call each to go through.
    pub(super) claims: Claims,
    pub(super) kubelet: Hooked,
    exempt: HashMap<MapData, u64, u32>,
    reasons: PerCpuArray<MapData, u64>,
    /// By slot.
    pub(super) datagrams: PerCpuArray<MapData, DatagramsWords>,
    pub(super) questions: HashMap<MapData, QuestionKeyWords, QuestionBytes>,
    /// How many connections of each pod are led to its listener and not accepted yet.
    pub(super) records: Array<MapData, u32>,
    pub(super) objects: Objects,
    pub(super) places: Places,
    /// Programs of the pods' hooks, by their place in HOOKS.
    programs: Vec<u32>,
    below: Below,
}

impl Kernel {
    /// Whether an earlier data plane left capture in place.
    pub fn left_behind(config: &CaptureConfig) -> bool {
        config.folder.join("links").exists()
    }

    /// Loads everything, exempts this process, then attaches, or puts the new programs behind links
    /// that are there. Where it fails for a node that nothing was left on, nothing stays.
    pub fn open(config: CaptureConfig) -> Result<Self, CaptureError> {
        let fresh = !Self::left_behind(&config);
        let opened = Self::attach_all(&config);
        if opened.is_err() && fresh {
            let _ = remove_folder(&config.folder);
        }
        opened
    }

    fn attach_all(config: &CaptureConfig) -> Result<Self, CaptureError> {
        on_bpffs(&config.folder)?;
        for folder in ["maps", "links", "pods"] {
            make_folder(&config.folder.join(folder))?;
        }
        let maps = renewal::prepare(&config.folder)?;
        let mut objects = Objects::new(&config.folder.join(maps), &config.ports);
        let mut opened = objects.open_maps()?;
        let mut kernel = Self {
            pods: hash(&mut opened, "pods")?,
            own_addresses: hash(&mut opened, "own_addresses")?,
            probe_ports: hash(&mut opened, "probe_ports")?,
            probes: hash(&mut opened, "probes")?,
            claims: Claims::new(),
            kubelet: Hooked::default(),
            exempt: hash(&mut opened, "exempt")?,
            listeners: take(&mut opened, "listeners")?
                .try_into()
                .map_err(|error: aya::maps::MapError| map("listeners", &error))?,
            reasons: take(&mut opened, "reasons")?
                .try_into()
                .map_err(|error: aya::maps::MapError| map("reasons", &error))?,
            datagrams: take(&mut opened, "datagrams")?
                .try_into()
                .map_err(|error: aya::maps::MapError| map("datagrams", &error))?,
            questions: hash(&mut opened, "questions")?,
            records: take(&mut opened, "records")?
                .try_into()
                .map_err(|error: aya::maps::MapError| map("records", &error))?,
            config: config.clone(),
            objects,
            places: Places::default(),
            programs: Vec::new(),
            below: Below::default(),
        };
        kernel.sweep_exempt()?;
        kernel.exempt_self()?;
        kernel.attach(maps == "maps-new")?;
        kernel.sweep_places();
        kernel.claims = kernel.probe_ports.iter().filter_map(Result::ok).collect();
        kernel.follow_kubelet();
        Ok(kernel)
    }

    /// All programs are in the kernel before the first one is attached: they change within
    /// microseconds, and all or, where one is refused, none.
    fn attach(&mut self, renewed: bool) -> Result<(), CaptureError> {
        let mut loaded = Vec::new();
        for hook in &HOOKS {
            let program = self.objects.hook(hook)?.fd()?.try_clone_to_owned();
            let failed = |error: io::Error| CaptureError::Program(hook.program, error.to_string());
            loaded.push(program.map_err(failed)?);
        }
        let lookups = match renewed {
            true => self.load_lookups()?,
            false => Vec::new(),
        };
        let pods = open(&self.config.pods_cgroup)?;
        let dataplanes = open(&self.config.dataplanes_cgroup)?;
        for (hook, program) in HOOKS.iter().zip(&loaded) {
            let (cgroup, path) = match hook.place {
                Place::Pods => (&pods, &self.config.pods_cgroup),
                Place::DataPlanes => (&dataplanes, &self.config.dataplanes_cgroup),
            };
            let pin = self.config.folder.join("links").join(hook.program);
            let target = cgroup_id(cgroup, path)?;
            let placed = place(program.as_fd(), cgroup, target, hook.at, &pin);
            self.programs
                .push(placed.map_err(|source| CaptureError::Attach {
                    program: hook.program,
                    to: path.display().to_string(),
                    source,
                })?);
        }
        if renewed {
            self.renew_lookups(&lookups);
            renewal::swap(&self.config.folder)?;
            // Later programs find the maps where they are now.
            self.objects = Objects::new(&self.config.folder.join("maps"), &self.config.ports);
        }
        Ok(())
    }

    /// What is wrong with the hooks for the sockets of `cgroup`, in words.
    pub fn verify_hooks(&self, cgroup: Option<&Path>) -> Vec<String> {
        let path = cgroup.unwrap_or(&self.config.pods_cgroup);
        let cgroup = match open(path) {
            Ok(cgroup) => cgroup,
            Err(error) => return vec![error.to_string()],
        };
        let hooks = HOOKS.iter().zip(&self.programs);
        let of_pods = hooks.filter(|(hook, _)| hook.place == Place::Pods);
        let missing =
            of_pods.filter_map(|(hook, id)| match sys::effective(cgroup.as_fd(), hook.at) {
                Ok(effective) if effective.contains(id) => None,
                Ok(_) => Some(format!(
                    "{} doesn't run for {}",
                    hook.program,
                    path.display()
                )),
                Err(error) => Some(format!("{}: {error}", hook.program)),
            });
        missing.collect()
    }

    /// Whose programs see what the sockets of `cgroup` dial before ours do, in words. Nothing of
    /// ours helps.
    pub fn overtaken(&mut self, cgroup: Option<&Path>) -> Vec<String> {
        let pods = &self.config.pods_cgroup;
        let path = cgroup.unwrap_or(pods);
        let mut look = Look::default();
        let mut found = Vec::new();
        let mut ask = || -> io::Result<()> {
            let file = File::open(path)?;
            for (hook, own) in foreign::hooks(&self.programs) {
                let effective = sys::effective(file.as_fd(), hook.at)?;
                found.extend(look.before(path, hook, &effective, *own));
            }
            found.extend(self.below.of(pods, path)?);
            Ok(())
        };
        let asked = ask();
        match (foreign::words(&found), asked) {
            (Some(words), _) => vec![format!("{words}; {}", foreign::REMEDY)],
            (None, Err(error)) => vec![format!("programs of others on {path:?}: {error}")],
            (None, Ok(())) => Vec::new(),
        }
    }

    /// Puts back what somebody took away.
    pub fn repair_hooks(&mut self) -> Result<(), CaptureError> {
        let again = Self::attach_all(&self.config)?;
        *self = again;
        Ok(())
    }

    pub fn reasons(&self) -> Result<Vec<Reason>, CaptureError> {
        let counted = |(number, name, text): &(u32, &'static str, &'static str)| {
            let values = self.reasons.get(number, 0);
            let values = values.map_err(|error| map("reasons", &error))?;
            Ok(Reason {
                number: *number,
                name,
                text,
                count: values.iter().sum(),
            })
        };
        REASONS.iter().map(counted).collect()
    }

    /// Nothing of this node stays in the kernel.
    pub fn remove_all(self) -> Result<(), CaptureError> {
        let folder = self.config.folder.clone();
        drop(self);
        remove_folder(&folder).map_err(|error| CaptureError::Path(folder, error))
    }

    fn exempt_self(&mut self) -> Result<(), CaptureError> {
        let leaf = &self.config.leaf;
        let id = cgroup_id(&open(leaf)?, leaf)?;
        let inserted = self.exempt.insert(id, std::process::id(), 0);
        inserted.map_err(|error| map("exempt", &error))
    }

    /// Leaves of data planes that are no more. Their ids aren't given again, but the map is small.
    fn sweep_exempt(&mut self) -> Result<(), CaptureError> {
        let known: Vec<_> = self.exempt.iter().filter_map(Result::ok).collect();
        for (cgroup, pid) in known {
            if !Path::new(&format!("/proc/{pid}")).exists() {
                let removed = self.exempt.remove(&cgroup);
                removed.map_err(|error| map("exempt", &error))?;
            }
        }
        Ok(())
    }
}

/// Behind a live link of the same target, or as a new link in its place.
pub(super) fn place(
    program: std::os::fd::BorrowedFd<'_>,
    target: &impl AsFd,
    target_id: u64,
    at: AttachType,
    pin: &Path,
) -> io::Result<u32> {
    if let Ok(link) = Link::pinned(pin) {
        let same = link.info().is_ok_and(|info| info.target(at) == target_id);
        if same && link.update(program).is_ok() {
            return Ok(link.info()?.program);
        }
    }
    // The new one before the old one goes: never none.
    let link = Link::attach(program, target.as_fd(), at)?;
    // bpffs takes no name with a dot in it.
    let mut coming = pin.as_os_str().to_owned();
    coming.push("-new");
    let coming = PathBuf::from(coming);
    let _ = std::fs::remove_file(&coming);
    link.pin(&coming)?;
    std::fs::rename(&coming, pin)?;
    Ok(link.info()?.program)
}

/// cgroup2's ids are the inodes of its folders.
pub(super) fn cgroup_id(cgroup: &File, path: &Path) -> Result<u64, CaptureError> {
    let meta = cgroup.metadata();
    Ok(meta
        .map_err(|error| CaptureError::Path(path.to_owned(), error))?
        .st_ino())
}

pub(super) fn open(path: &Path) -> Result<File, CaptureError> {
    File::open(path).map_err(|error| CaptureError::Path(path.to_owned(), error))
}

pub(super) fn make_folder(path: &Path) -> Result<(), CaptureError> {
    std::fs::create_dir_all(path).map_err(|error| CaptureError::Path(path.to_owned(), error))
}

/// /sys/fs/bpf becomes a BPF file system where it isn't one yet.
fn on_bpffs(folder: &Path) -> Result<(), CaptureError> {
    let done = missing_bpffs(folder).and_then(|missing| missing.map_or(Ok(()), sys::mount_bpffs));
    done.map_err(|error| CaptureError::Path(folder.to_owned(), error))
}

/// Where one has to be mounted for `folder`; None: the nearest folder that is there lies on one.
/// Unsupported where that isn't ours to do.
pub(super) fn missing_bpffs(folder: &Path) -> io::Result<Option<&Path>> {
    let existing = folder.ancestors().find(|path| path.exists());
    let existing = existing.ok_or(io::ErrorKind::NotFound)?;
    if rustix::fs::statfs(existing)?.f_type == BPF_FS_MAGIC {
        return Ok(None);
    }
    if existing == Path::new("/sys/fs/bpf") {
        return Ok(Some(existing));
    }
    let text = format!(
        "{} is not on a BPF file system: mount one",
        existing.display()
    );
    Err(io::Error::new(io::ErrorKind::Unsupported, text))
}

/// What is pinned detaches, unless somebody holds a descriptor of it.
pub(super) fn remove_folder(folder: &Path) -> io::Result<()> {
    match std::fs::remove_dir_all(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

fn take(from: &mut Ebpf, name: &'static str) -> Result<aya::maps::Map, CaptureError> {
    let missing = || CaptureError::Map(name, "isn't there".into());
    from.take_map(name).ok_or_else(missing)
}

fn hash<K: aya::Pod, V: aya::Pod>(
    from: &mut Ebpf,
    name: &'static str,
) -> Result<HashMap<MapData, K, V>, CaptureError> {
    let opened = HashMap::try_from(take(from, name)?);
    opened.map_err(|error| map(name, &error))
}

pub(super) fn map(name: &'static str, error: &aya::maps::MapError) -> CaptureError {
    let cause = std::error::Error::source(error).map(|cause| format!(": {cause}"));
    CaptureError::Map(name, format!("{error}{}", cause.unwrap_or_default()))
}
