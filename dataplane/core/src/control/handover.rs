//! Listeners from one data plane to the next (design section 5). The old side gives second
//! descriptors and goes on accepting until it is told that the new one accepts; keys don't cross.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::time::Duration;

use pb::reply::Body;
use pb::request::Body as Ask;
use prost::Message;
use tokio::net::UnixStream;
use tokio::time::timeout;

use super::answer::Answer;
use super::failure::{Code, Failure};
use super::frame;
use super::instance::Instance;
use super::session::Session;
use crate::wire::control as pb;

/// A healthy predecessor answers in milliseconds; one that hangs must not hang its successor.
const ANSWER_WAIT: Duration = Duration::from_secs(5);

/// Old side, HandOver.
pub(super) async fn give(session: &Session, answer: &Answer) -> Result<(), Failure> {
    let pods = &session.instance.configured()?.pods;
    let given = pods.hand_over().await?;
    tracing::info!(pods = given.len(), "a successor asks for the listeners");
    for (pod_uid, listeners) in given {
        let (ports, fds) = listeners
            .0
            .into_iter()
            .map(|(p, fd)| (u32::from(p), fd))
            .unzip();
        let frame = pb::HandOverListeners {
            pod_uid: pod_uid.clone(),
            ports,
        };
        if !answer.more_with(Body::Listeners(frame), fds).await {
            break;
        }
        session.handed_over.lock().push(pod_uid);
    }
    Ok(())
}

/// Old side, HandOverDone.
pub(super) async fn given(session: &Session) -> Result<(), Failure> {
    let uids = std::mem::take(&mut *session.handed_over.lock());
    let pods = &session.instance.configured()?.pods;
    pods.handed_over(&uids).await;
    tracing::info!(
        pods = uids.len(),
        "the successor accepts, this data plane stopped"
    );
    Ok(())
}

/// New side, TakeListeners. When it fails, no pod accepts here, and the old side goes on.
pub(super) async fn take(instance: &Instance, socket: &str) -> Result<(), Failure> {
    let pods = &instance.configured()?.pods;
    let mut old = Predecessor::connect(socket, &instance.id).await?;
    let listeners = old.listeners().await?;
    tracing::info!(pods = listeners.len(), socket, "listeners received");
    pods.serve_prepared(listeners).await?;
    // From here on this side serves, whatever the old one says.
    if let Err(failure) = old.done().await {
        tracing::warn!(
            error = failure.text,
            "the predecessor didn't confirm its stop"
        );
    }
    Ok(())
}

struct Predecessor {
    socket: String,
    stream: UnixStream,
}

impl Predecessor {
    async fn connect(socket: &str, own_id: &str) -> Result<Self, Failure> {
        let connected = timeout(ANSWER_WAIT, UnixStream::connect(socket)).await;
        let stream = match connected {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) => {
                let text = format!("no data plane answers at {socket}: {error}");
                return Err(Failure::new(Code::NotFound, socket, text));
            }
            Err(_) => {
                let text = format!("no data plane answers at {socket}");
                return Err(Failure::new(Code::NotFound, socket, text));
            }
        };
        let old = Self {
            socket: socket.to_owned(),
            stream,
        };
        let uid = old.stream.peer_cred().map(|peer| peer.uid());
        if !uid.is_ok_and(|uid| uid == 0 || uid == rustix::process::geteuid().as_raw()) {
            return Err(old.failure(Code::Permission, "it belongs to another user"));
        }
        let hello = pb::Hello {
            role: pb::hello::Role::Successor.into(),
            version: super::VERSION,
            config: None,
        };
        old.ask(1, Ask::Hello(hello)).await?;
        match old.answer().await?.0.body {
            Some(Body::Hello(hello)) if hello.instance_id == own_id => {
                Err(old.failure(Code::Invalid, "that is this data plane's own socket"))
            }
            Some(Body::Hello(_)) => Ok(old),
            _ => Err(old.failure(Code::Internal, "it didn't answer Hello")),
        }
    }

    async fn listeners(&mut self) -> Result<HashMap<String, Vec<(u16, OwnedFd)>>, Failure> {
        self.ask(2, Ask::HandOver(pb::HandOver {})).await?;
        let mut received = HashMap::new();
        loop {
            let (reply, fds) = self.answer().await?;
            match reply.body {
                Some(Body::Done(_)) => return Ok(received),
                Some(Body::Listeners(listeners)) if listeners.ports.len() == fds.len() => {
                    let ports = listeners.ports.iter().map(|port| u16::try_from(*port));
                    let ports: Vec<u16> = ports
                        .collect::<Result<_, _>>()
                        .map_err(|_| self.failure(Code::Invalid, "it named a port over 65535"))?;
                    let pairs = ports.into_iter().zip(fds).collect();
                    received.insert(listeners.pod_uid, pairs);
                }
                _ => {
                    let text = "it sent something else than listeners with their descriptors";
                    return Err(self.failure(Code::Invalid, text));
                }
            }
        }
    }

    async fn done(&mut self) -> Result<(), Failure> {
        self.ask(3, Ask::HandOverDone(pb::HandOverDone {})).await?;
        self.answer().await.map(drop)
    }

    async fn ask(&self, id: u64, ask: Ask) -> Result<(), Failure> {
        let body = Some(ask);
        let request = pb::Request { id, fds: 0, body };
        let write = frame::write(&self.stream, &request, &[]);
        match timeout(ANSWER_WAIT, write).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(self.failure(Code::Internal, &error.to_string())),
            Err(_) => Err(self.failure(Code::Internal, "it doesn't read")),
        }
    }

    /// An Error becomes ours.
    async fn answer(&self) -> Result<(pb::Reply, Vec<OwnedFd>), Failure> {
        let frame = match timeout(ANSWER_WAIT, frame::read(&self.stream)).await {
            Ok(Ok(Some(frame))) => frame,
            Ok(Ok(None)) => return Err(self.failure(Code::Internal, "it closed the connection")),
            Ok(Err(error)) => return Err(self.failure(Code::Internal, &error.to_string())),
            Err(_) => return Err(self.failure(Code::Internal, "it doesn't answer")),
        };
        let reply = pb::Reply::decode(frame.body)
            .map_err(|error| self.failure(Code::Internal, &error.to_string()))?;
        if let Some(Body::Error(error)) = reply.body {
            return Err(self.failure(error.code(), &error.text));
        }
        Ok((reply, frame.fds))
    }

    fn failure(&self, code: Code, text: &str) -> Failure {
        let text = format!("hand-over from {}: {text}", self.socket);
        Failure::new(code, self.socket.clone(), text)
    }
}
