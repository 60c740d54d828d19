//! Who calls: a pod of this node, or any workload of the mesh.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::SystemTime;

use super::steps::Steps;
use super::{Known, Unclear, up};
use crate::identity::Identity;
use crate::state::Workload;
use crate::wire::control as pb;

/// At most so many names are offered where one was ambiguous.
const OFFERED: usize = 5;

pub struct Source<'a> {
    pod: Option<&'a pb::PodStatus>,
    workload: Option<Arc<Workload>>,
}

/// A source whose connections can be followed.
pub struct Caller {
    pub workload: Arc<Workload>,
    /// Its connections go through a proxy of the mesh, with its identity.
    pub captured: bool,
    /// That proxy is this one.
    pub here: bool,
    /// As the data plane was told; nothing is demanded of a pod that isn't here.
    pub settings: pb::PodSettings,
}

impl<'a> Source<'a> {
    /// A uid, `namespace/name`, or a name that is unique.
    pub fn find(known: &Known<'a>, text: &str) -> Result<Self, Unclear> {
        let info = |pod: &'a pb::PodStatus| pod.pod.clone().unwrap_or_default();
        let of = |pod: &'a pb::PodStatus| {
            let pb::Pod {
                namespace,
                name,
                service_account,
                ..
            } = info(pod);
            let snapshot = known.snapshot;
            Self {
                pod: Some(pod),
                workload: snapshot.local_workload(&namespace, &name, &service_account),
            }
        };
        if let Some(pod) = known.pods.iter().find(|pod| info(pod).uid == text) {
            return Ok(of(pod));
        }
        if let Some(workload) = known.snapshot.workload_by_uid(text) {
            let pod = known.pod_of(text);
            let workload = Some(workload);
            return Ok(Self { pod, workload });
        }
        let called = |namespace: &str, name: &str| match text.split_once('/') {
            Some(wanted) => wanted == (namespace, name),
            None => name == text,
        };
        let named = |pod: &&pb::PodStatus| called(&info_of(pod).0, &info_of(pod).1);
        // One that leaves may have a successor of its name.
        let mut here = known.pods.iter().filter(|pod| up(pod)).filter(named);
        if let (Some(pod), None) = (here.next(), here.next()) {
            return Ok(of(pod));
        }
        let mut found: Vec<_> = known
            .snapshot
            .workloads()
            .filter(|workload| called(&workload.namespace, &workload.name))
            .collect();
        found.sort_by(|a, b| a.uid.cmp(&b.uid));
        match &found[..] {
            [] => Err(Unclear::NoSource(text.to_owned())),
            [only] => Ok(Self {
                pod: known.pod_of(&only.uid),
                workload: Some((*only).clone()),
            }),
            several => {
                let names = several.iter().take(OFFERED).map(|w| w.uid.to_string());
                let names = names.collect::<Vec<_>>().join(", ");
                Err(Unclear::Ambiguous(text.to_owned(), names))
            }
        }
    }

    /// None where its connections are refused before anything is asked.
    pub fn caller(self, known: &Known<'_>, steps: &mut Steps) -> Option<Caller> {
        let Some(workload) = self.workload else {
            let (namespace, name) = self.pod.map(info_of).unwrap_or_default();
            let text = "the control plane hasn't sent the pod's own workload";
            let remedy = "check that the control plane is connected (underpass status), and that \
                          the pod's name, namespace and service account are the same there and in \
                          the pod list";
            steps.refused("source", &format!("{namespace}/{name}"), text, remedy);
            return None;
        };
        let subject = format!("{}/{}", workload.namespace, workload.name);
        let identity = workload.identity();
        let node = &*workload.node;
        let mut captured = true;
        match self.pod {
            Some(pod) if !up(pod) => {
                steps.unknown("source", &subject, "its listeners aren't up");
            }
            Some(_) => steps.ok(
                "source",
                &subject,
                format!("a pod of this node, {identity}"),
            ),
            None if !workload.hbone => {
                captured = false;
                let text =
                    "outside the mesh: its connections aren't captured and carry no identity";
                steps.ok("source", &subject, text);
            }
            None if workload.native_tunnel => {
                let text = format!("speaks HBONE itself, as {identity}: it decides by itself");
                steps.unknown("source", &subject, text);
            }
            None if node == known.config.node => {
                captured = false;
                let text = "wanted in the mesh, but this data plane doesn't have the pod: its \
                            connections leave in clear, without identity (underpass pods tells why)";
                steps.unknown("source", &subject, text);
            }
            None => {
                let text =
                    format!("on node {node}, {identity}: whether it is captured is known there");
                steps.unknown("source", &subject, text);
            }
        }
        Some(Caller {
            workload,
            captured,
            here: self.pod.is_some(),
            settings: self
                .pod
                .and_then(|p| p.settings.clone())
                .unwrap_or_default(),
        })
    }
}

impl Caller {
    /// Its address towards this one: of the same family, where it has one.
    pub fn address(&self, towards: IpAddr) -> IpAddr {
        let addresses = &self.workload.addresses;
        let same = addresses
            .iter()
            .find(|ip| ip.is_ipv4() == towards.is_ipv4());
        // Host-network workloads without addresses come from the node's, which isn't known.
        let none = IpAddr::from([0, 0, 0, 0]);
        same.or(addresses.first()).copied().unwrap_or(none)
    }
}

/// The certificate of an identity of this node: usable, and until when.
pub fn certificate(known: &Known<'_>, identity: &Identity, steps: &mut Steps) {
    let subject = identity.to_string();
    let see = "see underpass certificates, and the agent's log";
    let mut all = known.certificates.iter();
    let status = all.find(|status| status.identity == *identity);
    let validity = status.and_then(|s| Some((s.not_before?, s.not_after?)));
    let error = status.map_or("", |status| &status.error);
    let now = SystemTime::now();
    match validity {
        Some((from, until)) if from <= now && now < until => {
            let left = until.duration_since(now).unwrap_or_default().as_secs();
            steps.ok("certificate", &subject, format!("valid for {}", span(left)));
        }
        Some((from, _)) if now < from => {
            steps.refused(
                "certificate",
                &subject,
                "not valid yet",
                "check the node's clock",
            );
        }
        Some(_) => {
            let text = format!("expired and not renewed: {error}");
            steps.refused("certificate", &subject, text.trim_end_matches(": "), see);
        }
        None if !error.is_empty() => {
            steps.refused(
                "certificate",
                &subject,
                format!("there is none: {error}"),
                see,
            );
        }
        None => {
            let text = "not there yet: a connection waits a few seconds for it";
            steps.unknown("certificate", &subject, text);
        }
    }
}

/// (namespace, name)
fn info_of(pod: &pb::PodStatus) -> (String, String) {
    let pod = pod.pod.clone().unwrap_or_default();
    (pod.namespace, pod.name)
}

/// In its two largest units.
fn span(seconds: u64) -> String {
    let (days, hours) = (seconds / 86_400, seconds / 3600 % 24);
    let (minutes, seconds) = (seconds / 60 % 60, seconds % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds} s"),
        (0, 0, minutes) => format!("{minutes} min"),
        (0, hours, minutes) => format!("{hours} h {minutes} min"),
        (days, hours, _) => format!("{days} d {hours} h"),
    }
}
