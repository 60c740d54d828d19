//! Capture by eBPF at the agent's word: which pods, and what the kernel says of it.

use std::net::IpAddr;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;

use super::failure::{Code, Failure};
use super::pods::Entry;
use crate::capture::{CaptureConfig, CaptureError, Datagrams, Enrolment, Kernel, Reason};
use crate::config::Config;
use crate::wire::control as pb;

/// The kernel side of this node, once a pod needs it.
pub(super) struct Capture {
    kernel: Mutex<Option<Kernel>>,
    /// Or why there can't be one.
    config: Mutex<Result<CaptureConfig, &'static str>>,
}

impl Capture {
    /// `leaf`: of this process, "" when it was given none.
    pub fn new(config: &Config, leaf: &str) -> Arc<Self> {
        Arc::new(Self {
            kernel: Mutex::default(),
            config: Mutex::new(capture_config(config, leaf)),
        })
    }

    /// As a later agent has it, where there was none yet.
    pub fn configure(&self, config: &Config, leaf: &str) {
        let mut held = self.config.lock();
        if held.is_err() {
            *held = capture_config(config, leaf);
        }
    }

    /// Before any socket of this process is made in a pod that may be captured already: afterwards
    /// it is exempt.
    pub async fn ready(self: &Arc<Self>) -> Result<(), Failure> {
        self.with(|_| Ok(())).await
    }

    /// A pod that an earlier data plane captured gets the listener of this one.
    pub async fn adopt(self: &Arc<Self>, entry: &Arc<Entry>) -> Result<(), Failure> {
        let Some(listener) = entry.inbound_listener()? else {
            return Ok(());
        };
        let (entry, wanted) = (entry.clone(), entry.enrolment());
        self.with(move |kernel| {
            let own = kernel.adopt(&entry.netns, &wanted, listener.as_fd())?;
            if let Some(own) = own {
                tracing::info!(uid = entry.info.uid, "captured pod adopted");
                entry.netns.captured_as(own);
            }
            Ok(())
        })
        .await
    }

    pub async fn install(self: &Arc<Self>, entry: Arc<Entry>) -> Result<(), Failure> {
        let wanted = entry.enrolment();
        self.enrol(entry, wanted).await
    }

    async fn enrol(self: &Arc<Self>, entry: Arc<Entry>, wanted: Enrolment) -> Result<(), Failure> {
        let listener = entry.inbound_listener()?;
        self.with(move |kernel| {
            let listener = listener.ok_or(CaptureError::NoListener)?;
            if !kernel.verify_hooks(None).is_empty() {
                kernel.repair_hooks()?;
            }
            let own = kernel.enrol(&entry.netns, &wanted, listener.as_fd())?;
            entry.netns.captured_as(own);
            Ok(())
        })
        .await
    }

    /// Other settings of a pod that is captured; one that isn't stays so.
    pub async fn change(
        self: &Arc<Self>,
        entry: Arc<Entry>,
        wanted: Enrolment,
    ) -> Result<(), Failure> {
        let (captured, _) = self.list(Some(entry.clone())).await?;
        match captured {
            true => self.enrol(entry, wanted).await,
            false => Ok(()),
        }
    }

    pub async fn verify(self: &Arc<Self>, entry: Arc<Entry>) -> Result<Vec<String>, Failure> {
        let listener = entry.inbound_listener()?;
        let wanted = entry.enrolment();
        self.with(move |kernel| {
            // One that was ended and listens again has lost its place.
            kernel.follow_kubelet();
            if let Some(listener) = &listener {
                kernel.adopt(&entry.netns, &wanted, listener.as_fd())?;
            }
            kernel.verify(&entry.netns, &wanted, listener.is_some())
        })
        .await
    }

    pub async fn release(self: &Arc<Self>, entry: Arc<Entry>) -> Result<(), Failure> {
        self.with(move |kernel| {
            kernel.release(&entry.netns)?;
            entry.netns.captured_no_more();
            Ok(())
        })
        .await
    }

    /// The programs' exits; none while they aren't loaded, or can't be asked.
    pub async fn counted(self: &Arc<Self>) -> Vec<Reason> {
        if self.kernel.lock().is_none() {
            return Vec::new();
        }
        self.with(|kernel| kernel.reasons())
            .await
            .unwrap_or_default()
    }

    /// Of all pods that an earlier data plane captured, only these stay captured.
    pub async fn release_others(self: &Arc<Self>, wanted: Vec<Arc<Entry>>) -> Result<(), Failure> {
        let unused = self.kernel.lock().is_none();
        let left_behind = |config: &CaptureConfig| Kernel::left_behind(config);
        if unused && !self.config.lock().as_ref().is_ok_and(left_behind) {
            return Ok(());
        }
        self.with(move |kernel| {
            let wanted = wanted.iter().filter(|entry| entry.captured_by_ebpf());
            kernel.release_others(wanted.map(|entry| &*entry.netns))
        })
        .await
    }

    /// What the mesh didn't carry of the pod's; None where it isn't captured.
    pub async fn datagrams(
        self: &Arc<Self>,
        entry: Arc<Entry>,
    ) -> Result<Option<Datagrams>, Failure> {
        self.with(move |kernel| kernel.datagrams(&entry.netns))
            .await
    }

    pub async fn list(
        self: &Arc<Self>,
        entry: Option<Arc<Entry>>,
    ) -> Result<(bool, Vec<Reason>), Failure> {
        self.with(move |kernel| {
            let captured = match entry {
                Some(entry) => kernel.captures(&entry.netns)?,
                None => false,
            };
            Ok((captured, kernel.reasons()?))
        })
        .await
    }

    /// Off the workers, one at a time. The first call opens the kernel side.
    async fn with<T: Send + 'static>(
        self: &Arc<Self>,
        job: impl FnOnce(&mut Kernel) -> Result<T, CaptureError> + Send + 'static,
    ) -> Result<T, Failure> {
        let it = self.clone();
        let done = tokio::task::spawn_blocking(move || {
            let config = it.config.lock().clone();
            let config = config.map_err(|why| Failure::invalid("", why))?;
            let mut held = it.kernel.lock();
            let kernel = match &mut *held {
                Some(kernel) => kernel,
                none => none.insert(Kernel::open(config).map_err(|error| failure(&error))?),
            };
            job(kernel).map_err(|error| failure(&error))
        });
        let internal = |error: tokio::task::JoinError| {
            Failure::new(Code::Internal, "", format!("capture: {error}"))
        };
        done.await.map_err(internal)?
    }
}

fn capture_config(config: &Config, leaf: &str) -> Result<CaptureConfig, &'static str> {
    let ebpf = config.ebpf.as_ref();
    let ebpf = ebpf.ok_or("capture by eBPF isn't configured: config.ebpf is absent")?;
    // Without a leaf of its own nothing tells this process's sockets from a pod's.
    let leaf = (!leaf.is_empty()).then(|| PathBuf::from(leaf));
    let leaf =
        leaf.ok_or("capture by eBPF needs a cgroup2 leaf: start the data plane with --cgroup")?;
    let parent = leaf.parent().map(Path::to_owned);
    Ok(CaptureConfig {
        pods_cgroup: ebpf.pods_cgroup.clone(),
        kubelet_cgroup: ebpf.kubelet_cgroup.clone(),
        dataplanes_cgroup: parent.ok_or("the data plane's cgroup is the root")?,
        leaf,
        folder: ebpf.folder.clone(),
        ports: config.ports,
        ipv6: config.ipv6,
        pod_budget: ebpf.pod_max_pending,
    })
}

pub(super) fn enrolment(settings: &pb::PodSettings) -> Enrolment {
    let addresses = settings.addresses.iter();
    Enrolment {
        // Others are of no family that could be captured.
        addresses: addresses
            .filter_map(|ip| ip.parse::<IpAddr>().ok())
            .collect(),
        dns: settings.dns,
        bypass_inbound: settings.bypass_inbound,
        udp_deny: settings.udp_deny,
        cgroup: (!settings.cgroup.is_empty()).then(|| PathBuf::from(&settings.cgroup)),
        probe_ports: probe_ports(settings).collect(),
    }
}

/// What is no port isn't declared.
pub(super) fn probe_ports(settings: &pb::PodSettings) -> impl Iterator<Item = u16> {
    let ports = settings.probe_ports.iter();
    ports.filter_map(|port| u16::try_from(*port).ok().filter(|port| *port > 0))
}

pub(super) fn reason(reason: Reason) -> pb::capture_reply::Reason {
    pb::capture_reply::Reason {
        number: reason.number,
        name: reason.name.into(),
        text: reason.text.into(),
        count: reason.count,
    }
}

pub(super) fn datagrams(found: Datagrams) -> pb::capture_reply::Datagrams {
    pb::capture_reply::Datagrams {
        refused: found.refused,
        unprotected: found.unprotected,
    }
}

fn failure(error: &CaptureError) -> Failure {
    let code = match error {
        CaptureError::Namespace(_) => Code::NetnsGone,
        CaptureError::Path(_, source) | CaptureError::Attach { source, .. }
            if source.kind() == std::io::ErrorKind::PermissionDenied =>
        {
            Code::Permission
        }
        _ => Code::Internal,
    };
    Failure::new(code, "", format!("capture by eBPF: {error}"))
}
