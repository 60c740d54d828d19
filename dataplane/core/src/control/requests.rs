//! What each request does.

use std::str::FromStr;
use std::time::Duration;

use pb::reply::Body;
use pb::request::Body as Ask;
use zeroize::Zeroize;

use super::answer::Answer;
use super::failure::{Code, Failure};
use super::instance::Instance;
use super::session::{Job, Session};
use super::{handover, status, streams};
use crate::identity::Identity;
use crate::proxy::proof::{EXPECTED, Nonce};
use crate::telemetry::KEPT;
use crate::tls::Trust;
use crate::wire::control as pb;

type Result = std::result::Result<Body, Failure>;

const DONE: Result = Ok(Body::Done(pb::Done {}));

pub(super) async fn answer(session: &Session, job: Job) {
    let Job { ask, fds, answer } = job;
    let instance = &session.instance;
    let result = match ask {
        Ask::Drain(drain) => return self::drain(instance, &drain, &answer).await,
        Ask::AddPod(add) => add_pod(instance, add, fds).await,
        Ask::UpdatePod(update) => update_pod(instance, update).await,
        Ask::RemovePod(remove) => remove_pod(instance, &remove).await,
        Ask::KeepPods(keep) => keep_pods(instance, &keep).await,
        Ask::PodsSynced(_) => pods_synced(instance).await,
        Ask::ListPods(_) => list_pods(instance),
        Ask::Apply(apply) => self::apply(instance, apply).await,
        Ask::NewCsr(csr) => new_csr(instance, &csr),
        Ask::InstallCertificate(install) => install_certificate(instance, install),
        Ask::FailCertificate(fail) => fail_certificate(instance, &fail),
        Ask::ListConnections(list) => streams::connections(instance, &list.pod_uid, &answer).await,
        Ask::GetMetrics(_) => streams::metrics(instance, &answer).await,
        Ask::Dump(dump) => streams::dump(instance, &dump.section, &answer).await,
        Ask::Configure(configure) => self::configure(instance, configure),
        Ask::HandOver(_) => handover::give(session, &answer).await.and(DONE),
        Ask::HandOverDone(_) => handover::given(session).await.and(DONE),
        Ask::TakeListeners(take) => handover::take(instance, &take.socket).await.and(DONE),
        Ask::ListVerdicts(list) => list_verdicts(instance, &list),
        Ask::ListPolicyHits(_) => list_policy_hits(instance),
        Ask::SetTrust(trust) => set_trust(instance, trust).await,
        Ask::Explain(ask) => streams::explain(instance, ask).await,
        Ask::Capture(ask) => capture(instance, ask).await,
        Ask::Prove(ask) => prove(instance, &ask),
        Ask::Hello(_) => Err(Failure::invalid("", "Hello was said before")),
    };
    answer.last(result).await;
}

async fn add_pod(
    instance: &Instance,
    add: pb::AddPod,
    mut fds: Vec<std::os::fd::OwnedFd>,
) -> Result {
    let pods = &instance.configured()?.pods;
    let pod = add.pod.unwrap_or_default();
    let Some(fd) = fds.pop() else {
        let text = "AddPod needs the descriptor of the pod's network namespace";
        return Err(Failure::invalid(pod.uid, text));
    };
    let settings = add.settings.unwrap_or_default();
    pods.add(pod, settings, fd, add.prepare_only).await?;
    DONE
}

async fn update_pod(instance: &Instance, update: pb::UpdatePod) -> Result {
    let pods = &instance.configured()?.pods;
    let settings = update.settings.unwrap_or_default();
    pods.update(&update.uid, settings).await?;
    DONE
}

async fn remove_pod(instance: &Instance, remove: &pb::RemovePod) -> Result {
    // Without a node there are no pods, and unknown ones are Done.
    if let Some(node) = instance.node() {
        let deadline = deadline(instance, remove.deadline_ms);
        let drain = remove.drain.then_some(deadline);
        node.pods.remove(&remove.uid, drain).await;
    }
    DONE
}

async fn capture(instance: &Instance, ask: pb::Capture) -> Result {
    use pb::capture::Verb;
    let pods = &instance.configured()?.pods;
    let verb = ask.verb;
    let verb = verb.ok_or_else(|| Failure::invalid("", "capture.verb is absent"))?;
    let mut reply = pb::CaptureReply::default();
    match verb {
        Verb::Install(uid) => {
            let entry = pods.known(&uid)?;
            pods.capture.install(entry).await?;
            reply.captured = true;
        }
        Verb::Verify(uid) => {
            let entry = pods.known(&uid)?;
            reply.problems = pods.capture.verify(entry).await?;
            reply.captured = reply.problems.is_empty();
        }
        // A pod that nobody knows isn't captured by us.
        Verb::Remove(uid) => {
            if let Ok(entry) = pods.known(&uid) {
                pods.capture.release(entry).await?;
            }
        }
        Verb::Datagrams(uid) => {
            let found = pods.capture.datagrams(pods.known(&uid)?).await?;
            reply.datagrams = found.map(super::capture::datagrams);
        }
        Verb::List(uid) => {
            let (captured, reasons) = pods.capture.list(pods.known(&uid).ok()).await?;
            reply.captured = captured;
            reply.reasons = reasons.into_iter().map(super::capture::reason).collect();
        }
    }
    Ok(Body::Capture(reply))
}

fn prove(instance: &Instance, ask: &pb::Prove) -> Result {
    let pods = &instance.configured()?.pods;
    for expected in &ask.expected {
        let (outbound, inbound) = (nonces(&expected.outbound)?, nonces(&expected.inbound)?);
        if let Ok(entry) = pods.known(&expected.uid) {
            entry.proxy.proofs().expect(&outbound, &inbound);
        }
    }
    let arrived = ask.arrived.iter().filter_map(|uid| {
        let entry = pods.known(uid).ok()?;
        let nonces = entry.proxy.proofs().arrived();
        Some(pb::prove_reply::Arrived {
            uid: uid.clone(),
            nonces: nonces.iter().map(|nonce| nonce.to_vec().into()).collect(),
        })
    });
    Ok(Body::Prove(pb::ProveReply {
        arrived: arrived.collect(),
    }))
}

fn nonces(given: &[bytes::Bytes]) -> std::result::Result<Vec<Nonce>, Failure> {
    if given.len() > EXPECTED {
        let text = format!("{} nonces, {EXPECTED} at most", given.len());
        return Err(Failure::invalid("prove", text));
    }
    let parsed = given.iter().map(|nonce| Nonce::try_from(&nonce[..]));
    let parsed: std::result::Result<_, _> = parsed.collect();
    parsed.map_err(|_| Failure::invalid("prove", "a nonce has 16 bytes"))
}

async fn keep_pods(instance: &Instance, keep: &pb::KeepPods) -> Result {
    instance.configured()?.pods.keep(&keep.uids).await;
    DONE
}

async fn pods_synced(instance: &Instance) -> Result {
    let node = instance.configured()?;
    node.pods.release_others().await?;
    let pods = node.pods.list().len();
    tracing::info!(pods, "the agent's first list of pods is complete");
    DONE
}

fn list_pods(instance: &Instance) -> Result {
    let pods = instance.node().map(|node| node.pods.list());
    Ok(Body::Pods(pb::PodsReply {
        pods: pods.unwrap_or_default(),
    }))
}

fn list_verdicts(instance: &Instance, list: &pb::ListVerdicts) -> Result {
    let verdicts = &instance.configured()?.shared.telemetry.verdicts;
    let limit = match list.limit as usize {
        0 => KEPT,
        limit => limit,
    };
    let (verdicts, lost) = verdicts.list(&list.pod_uid, limit);
    Ok(Body::Verdicts(pb::VerdictsReply { verdicts, lost }))
}

fn list_policy_hits(instance: &Instance) -> Result {
    let snapshot = instance.configured()?.shared.store.snapshot();
    let hits = snapshot.policies().entries().map(|entry| {
        let (decided, dry_run, last_ms) = entry.hits().counts();
        pb::PolicyHits {
            name: entry.key().to_string(),
            decided,
            dry_run,
            last_ms,
        }
    });
    let mut policies: Vec<_> = hits.collect();
    policies.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(Body::PolicyHits(pb::PolicyHitsReply { policies }))
}

async fn apply(instance: &Instance, apply: pb::Apply) -> Result {
    let applied = instance.configured()?.apply(apply.response).await?;
    let rejection = |(name, reason)| pb::Rejection { name, reason };
    Ok(Body::Apply(pb::ApplyReply {
        type_url: applied.type_url,
        nonce: applied.nonce,
        rejected: applied.rejected.into_iter().map(rejection).collect(),
        accepted: applied.accepted,
        removed: applied.removed,
    }))
}

fn new_csr(instance: &Instance, ask: &pb::NewCsr) -> Result {
    let identity = identity(&ask.identity)?;
    let csr = instance.certs.new_csr(&identity);
    let csr = csr.map_err(|error| Failure::certificate(&ask.identity, &error))?;
    Ok(Body::NewCsr(pb::NewCsrReply { csr }))
}

fn install_certificate(instance: &Instance, mut ask: pb::InstallCertificate) -> Result {
    let key = Secret::take(&mut ask.private_key);
    let identity = identity(&ask.identity)?;
    let certs = &instance.certs;
    let installed = match key.0.is_empty() {
        true => certs.install(&identity, &ask.chain, &ask.roots),
        false => certs.install_with_key(&identity, &ask.chain, &ask.roots, &key.0),
    };
    let installed = installed.map_err(|error| Failure::certificate(&ask.identity, &error))?;
    tracing::info!(%identity, serial = installed.serial, "certificate installed");
    Ok(Body::Certificate(pb::InstallCertificateReply {
        certificate: Some(status::certificate(&installed)),
    }))
}

fn fail_certificate(instance: &Instance, ask: &pb::FailCertificate) -> Result {
    instance.certs.fail(&identity(&ask.identity)?, &ask.text);
    DONE
}

/// The one key that may cross the socket: wiped as soon as it was used.
struct Secret(bytes::BytesMut);

impl Secret {
    /// Nobody else holds the frame that it came in, so this is no copy.
    fn take(from: &mut bytes::Bytes) -> Self {
        let taken = std::mem::take(from).try_into_mut();
        Self(taken.unwrap_or_else(|shared| shared[..].into()))
    }
}

impl Drop for Secret {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

/// Policies first: a tunnel that is let in under an alias finds them knowing it.
async fn set_trust(instance: &Instance, ask: pb::SetTrust) -> Result {
    let node = instance.configured()?;
    // A CRL may hold a million numbers: too much for a worker.
    let parsed = tokio::task::spawn_blocking(move || Trust::parse(&ask)).await;
    let parsed = parsed.map_err(|error| Failure::new(Code::Internal, "", error.to_string()))?;
    let trust = parsed.map_err(|error| Failure::invalid(error.field, error.to_string()))?;
    let (revoked, aliases) = (trust.crls.len(), trust.aliases.clone());
    let (roots, compliance) = (trust.additional_roots.len(), trust.compliance);
    node.shared.store.set_aliases(&aliases);
    let cut = instance.certs.set_trust(trust).await;
    tracing::info!(revoked, ?aliases, roots, ?compliance, cut, "trust changed");
    DONE
}

fn configure(instance: &Instance, ask: pb::Configure) -> Result {
    instance.configured()?.reconfigure(ask)?;
    DONE
}

async fn drain(instance: &Instance, ask: &pb::Drain, answer: &Answer) {
    if let Some(node) = instance.node() {
        let deadline = deadline(instance, ask.deadline_ms);
        tracing::info!(?deadline, exit = ask.exit, "draining: asked to");
        node.pods.drain_all(deadline).await;
    }
    answer.last_and_flush(DONE).await;
    if ask.exit {
        instance.exit.notify_one();
    }
}

fn deadline(instance: &Instance, asked_ms: u32) -> Duration {
    match (asked_ms, instance.node()) {
        (0, Some(node)) => node.shared.limits.load().drain_deadline,
        _ => Duration::from_millis(asked_ms.into()),
    }
}

fn identity(text: &str) -> std::result::Result<Identity, Failure> {
    Identity::from_str(text).map_err(|error| Failure::invalid(text, error.to_string()))
}
