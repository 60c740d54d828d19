//! Answers that take work. Long ones come in chunks, each made only when the one before it has left: a slow reader holds a
//! snapshot, never a worker or a queue.

use bytes::Bytes;
use pb::reply::Body;
use tokio::sync::mpsc;

use super::answer::Answer;
use super::failure::{Code, Failure};
use super::instance::Instance;
use crate::explain::{Known, Unclear};
use crate::wire::control as pb;

const CHUNK: usize = 64 << 10;
const CONNECTIONS_A_CHUNK: usize = 500;

type Pieces = Box<dyn Iterator<Item = Vec<u8>> + Send>;

pub(super) async fn metrics(instance: &Instance, answer: &Answer) -> Result<Body, Failure> {
    let node = instance.configured()?;
    let telemetry = node.shared.telemetry.clone();
    for reason in node.pods.capture.counted().await {
        let bounds = &telemetry.metrics.bounds;
        bounds.capture_exit(reason.name, reason.count);
    }
    let (mut pieces, mut rest) = Text::new();
    let writing = tokio::task::spawn_blocking(move || {
        // Fails when the reader is gone; then the text goes nowhere.
        let _ = telemetry.encode_to(&mut pieces);
        pieces.finish();
    });
    // One behind, since the last has a form of its own.
    let mut last = Bytes::new();
    while let Some(piece) = rest.recv().await {
        let before = std::mem::replace(&mut last, piece);
        if !before.is_empty() && !answer.more(chunk(before)).await {
            return Ok(chunk(Bytes::new()));
        }
    }
    let done = writing.await;
    done.map_err(|error| Failure::new(Code::Internal, "", error.to_string()))?;
    Ok(chunk(last))
}

/// Text that is sent while it is being made. The maker waits for a slow reader.
struct Text {
    chunks: mpsc::Sender<Bytes>,
    next: String,
}

impl Text {
    fn new() -> (Self, mpsc::Receiver<Bytes>) {
        let (chunks, rest) = mpsc::channel(1);
        let next = String::new();
        (Self { chunks, next }, rest)
    }

    /// False when nobody reads.
    fn finish(&mut self) -> bool {
        let text = std::mem::take(&mut self.next);
        self.chunks.blocking_send(text.into()).is_ok()
    }
}

impl std::fmt::Write for Text {
    fn write_str(&mut self, text: &str) -> std::fmt::Result {
        if self.next.is_empty() {
            self.next.reserve(CHUNK.max(text.len()));
        }
        self.next.push_str(text);
        match self.next.len() < CHUNK || self.finish() {
            true => Ok(()),
            false => Err(std::fmt::Error),
        }
    }
}

pub(super) async fn dump(
    instance: &Instance,
    section: &str,
    answer: &Answer,
) -> Result<Body, Failure> {
    let node = instance.configured()?;
    match section {
        "certificates" => {
            let certs = instance.certs.clone();
            let json = off_the_workers(move || certs.dump().to_string()).await?;
            whole(json.into(), answer).await
        }
        "version" => {
            let istio = &node.shared.config.telemetry.istio_version;
            let json = instance.build.dump(istio);
            whole(json.to_string().into(), answer).await
        }
        "workloadState" => {
            let pods = node.pods.clone();
            let json = off_the_workers(move || pods.dump().to_string()).await?;
            whole(json.into(), answer).await
        }
        _ => {
            let (store, name) = (node.shared.store.clone(), section.to_owned());
            let pieces = off_the_workers(move || store.dump(&name)).await?;
            let unknown = "no such section: workloads, services, stagedServices, policies, \
                           certificates, workloadState, version";
            match pieces {
                Some(pieces) => stream(pieces, answer).await,
                None => Err(Failure::new(Code::NotFound, section, unknown)),
            }
        }
    }
}

pub(super) async fn connections(
    instance: &Instance,
    pod_uid: &str,
    answer: &Answer,
) -> Result<Body, Failure> {
    let connections = instance.configured()?.pods.connections(pod_uid)?;
    let body = |connections: Vec<_>| Body::Connections(pb::ConnectionsReply { connections });
    let mut rest = connections.into_iter();
    loop {
        let next: Vec<_> = rest.by_ref().take(CONNECTIONS_A_CHUNK).collect();
        if rest.len() == 0 {
            return Ok(body(next));
        }
        answer.more(body(next)).await;
    }
}

/// Short, but it may look through all workloads.
pub(super) async fn explain(instance: &Instance, ask: pb::Explain) -> Result<Body, Failure> {
    let node = instance.configured()?;
    let (shared, pods) = (node.shared.clone(), node.pods.list());
    let certificates = instance.certs.status();
    let explained = off_the_workers(move || {
        let snapshot = shared.store.snapshot();
        let known = Known {
            snapshot: &snapshot,
            config: &shared.config,
            certificates: &certificates,
            pods: &pods,
        };
        known.explain(&ask)
    });
    let unclear = |unclear: Unclear| {
        let code = match unclear {
            Unclear::NoSource(_) => Code::NotFound,
            _ => Code::Invalid,
        };
        Failure::new(code, unclear.subject(), unclear.to_string())
    };
    explained.await?.map(Body::Explain).map_err(unclear)
}

async fn whole(mut text: Bytes, answer: &Answer) -> Result<Body, Failure> {
    while text.len() > CHUNK {
        answer.more(chunk(text.split_to(CHUNK))).await;
    }
    Ok(chunk(text))
}

async fn stream(mut pieces: Pieces, answer: &Answer) -> Result<Body, Failure> {
    let mut last = Vec::new();
    loop {
        let (piece, rest) = off_the_workers(move || (pieces.next(), pieces)).await?;
        pieces = rest;
        match piece {
            Some(piece) => {
                let before = std::mem::replace(&mut last, piece);
                if !before.is_empty() && !answer.more(chunk(before.into())).await {
                    // The reader is gone; what would follow goes nowhere.
                    return Ok(chunk(Bytes::new()));
                }
            }
            None => return Ok(chunk(last.into())),
        }
    }
}

async fn off_the_workers<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Failure> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|error| Failure::new(Code::Internal, "", error.to_string()))
}

fn chunk(data: Bytes) -> Body {
    Body::Chunk(pb::Chunk { data })
}
