//! One connection of the control socket: reads requests, answers them in any order, Apply and
//! changes of pods in the order they came.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use pb::hello::Role;
use pb::reply::Body;
use pb::request::Body as Ask;
use prost::Message;
use tokio::net::UnixStream;
use tokio::sync::{Notify, Semaphore, mpsc};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::answer::{Answer, EVENTS, REPLIES, write_all};
use super::failure::{Code, Failure};
use super::frame::{self, Frame, FrameError};
use super::instance::Instance;
use super::requests;
use crate::wire::control as pb;

#[derive(Clone, Copy, Debug)]
pub(super) struct Peer {
    pub uid: u32,
    pub pid: i32,
}

/// What handlers know of the connection that asks.
pub(super) struct Session {
    pub instance: Arc<Instance>,
    pub role: Role,
    /// Pods whose listeners this successor received.
    pub handed_over: parking_lot::Mutex<Vec<String>>,
    /// No request is begun any more.
    over: AtomicBool,
}

pub(super) struct Job {
    pub ask: Ask,
    pub fds: Vec<OwnedFd>,
    pub answer: Answer,
}

const HELLO_WAIT: Duration = Duration::from_secs(10);
/// Requests of one connection in work at the same time.
const CONCURRENT: u32 = 64;
const LANE: usize = 64;

/// Returns when the connection is over and nothing that it asked for in order is still in work.
pub(super) async fn serve(instance: Arc<Instance>, stream: UnixStream, peer: Peer) {
    let stream = Arc::new(stream);
    let (replies, outgoing) = mpsc::channel(REPLIES);
    let (events, announced) = mpsc::channel(EVENTS);
    let cut_off = Arc::new(Notify::new());
    let mut writer = tokio::spawn(write_all(stream.clone(), outgoing, announced));
    let number = instance.next_session();
    let conversation = async {
        let answer = |id| Answer {
            id,
            replies: replies.clone(),
        };
        let Some((id, hello)) = first_frame(&stream, &answer).await? else {
            return Ok(());
        };
        let role = match admit(&instance, number, peer, hello, events, cut_off.clone()).await {
            Ok(role) => role,
            Err(failure) => {
                answer(id).last_and_flush(Err(failure)).await;
                return Ok(());
            }
        };
        answer(id)
            .last(Ok(Body::Hello(instance.hello().await)))
            .await;
        if role == Role::Agent {
            tracing::info!(pid = peer.pid, "agent connected");
            instance.ask_again_for_certificates();
            tokio::spawn(instance.clone().ask_again_for_names());
        }
        let session = Arc::new(Session {
            instance: instance.clone(),
            role,
            handed_over: parking_lot::Mutex::default(),
            over: AtomicBool::new(false),
        });
        let mut lanes = Lanes::start(&session);
        let read = tokio::select! {
            read = read_all(&stream, &session, &lanes, &answer) => read,
            () = cut_off.notified() => Ok(()),
            _ = &mut writer => Ok(()),
        };
        session.over.store(true, Ordering::Relaxed);
        lanes.finish().await;
        if role == Role::Agent {
            tracing::info!(pid = peer.pid, "agent gone: serving with what is known");
        }
        read
    };
    let ended: Result<(), FrameError> = conversation.await;
    if let Err(error) = ended {
        tracing::warn!(%error, pid = peer.pid, "control connection closed: broken frame");
    }
    instance.agent.release(number);
    writer.abort();
}

async fn first_frame(
    stream: &UnixStream,
    answer: &impl Fn(u64) -> Answer,
) -> Result<Option<(u64, pb::Hello)>, FrameError> {
    let Ok(frame) = timeout(HELLO_WAIT, frame::read(stream)).await else {
        return Ok(None);
    };
    let Some(frame) = frame? else {
        return Ok(None);
    };
    let request = decode(&frame)?;
    match request.body {
        Some(Ask::Hello(hello)) => Ok(Some((request.id, hello))),
        _ => {
            let failure = Failure::invalid("", "the first request must be Hello");
            answer(request.id).last_and_flush(Err(failure)).await;
            Ok(None)
        }
    }
}

/// Decides what the peer may do. An agent also configures.
async fn admit(
    instance: &Arc<Instance>,
    number: u64,
    peer: Peer,
    hello: pb::Hello,
    events: mpsc::Sender<pb::Event>,
    cut_off: Arc<Notify>,
) -> Result<Role, Failure> {
    if hello.version != super::VERSION {
        let text = format!(
            "protocol version {} was asked for, this data plane speaks {}: use an agent of the \
             same release",
            hello.version,
            super::VERSION
        );
        return Err(Failure::new(Code::Version, "version", text));
    }
    let role = Role::try_from(hello.role)
        .map_err(|_| Failure::invalid("role", format!("unknown role {}", hello.role)))?;
    if role == Role::Agent {
        instance
            .agent
            .claim(number, peer.pid, events, cut_off)
            .await?;
        instance.configure(hello.config)?;
    }
    Ok(role)
}

async fn read_all(
    stream: &UnixStream,
    session: &Arc<Session>,
    lanes: &Lanes,
    answer: &impl Fn(u64) -> Answer,
) -> Result<(), FrameError> {
    let places = Arc::new(Semaphore::new(CONCURRENT as usize));
    while let Some(frame) = frame::read(stream).await? {
        let request = decode(&frame)?;
        let answer = answer(request.id);
        let ask = match check(session.role, &request, &frame) {
            Ok(()) => request.body,
            Err(failure) => {
                answer.last(Err(failure)).await;
                continue;
            }
        };
        // `check` refused requests without a body.
        let Some(ask) = ask else { continue };
        let job = Job {
            ask,
            fds: frame.fds,
            answer,
        };
        if let Some(lane) = lanes.of(&job.ask) {
            let _ = lane.send(job).await;
            continue;
        }
        let place = places.clone().acquire_owned().await;
        let session = session.clone();
        tokio::spawn(async move {
            work(session, job).await;
            drop(place);
        });
    }
    Ok(())
}

/// Answers one request. A panic is answered, too, and ends nothing else.
async fn work(session: Arc<Session>, job: Job) {
    let answer = job.answer.clone();
    let task = tokio::spawn(async move { requests::answer(&session, job).await });
    if let Err(error) = task.await {
        tracing::error!(%error, "a request failed");
        let failure = Failure::new(Code::Internal, "", format!("the request failed: {error}"));
        answer.last(Err(failure)).await;
    }
}

fn decode(frame: &Frame) -> Result<pb::Request, FrameError> {
    pb::Request::decode(frame.body.clone())
        .map_err(|error| FrameError::Io(std::io::Error::other(format!("no Request: {error}"))))
}

fn check(role: Role, request: &pb::Request, frame: &Frame) -> Result<(), Failure> {
    let Some(ask) = &request.body else {
        return Err(Failure::invalid(
            "",
            "this data plane doesn't know the request",
        ));
    };
    let takes = usize::from(matches!(ask, Ask::AddPod(_)));
    let came = frame.fds.len();
    if frame.fds_lost || came != takes || request.fds as usize != takes {
        let subject = match ask {
            Ask::AddPod(add) => add.pod.as_ref().map_or("", |pod| &pod.uid),
            _ => "",
        };
        let text = format!(
            "the request takes {takes} descriptors, announced {} and brought {came}{}",
            request.fds,
            if frame.fds_lost { " and more" } else { "" },
        );
        return Err(Failure::invalid(subject, text));
    }
    let reads = matches!(
        ask,
        Ask::ListPods(_)
            | Ask::ListConnections(_)
            | Ask::GetMetrics(_)
            | Ask::Dump(_)
            | Ask::Explain(_)
            | Ask::ListVerdicts(_)
            | Ask::ListPolicyHits(_)
    );
    let hands_over = matches!(ask, Ask::HandOver(_) | Ask::HandOverDone(_));
    let allowed = match role {
        Role::Agent => !hands_over,
        Role::Observer => reads,
        Role::Successor => hands_over,
    };
    match ask {
        Ask::Hello(_) => Err(Failure::invalid("", "Hello was said before")),
        _ if allowed => Ok(()),
        _ => {
            let text = format!("the role {} may not ask this", role.as_str_name());
            Err(Failure::new(Code::Permission, role.as_str_name(), text))
        }
    }
}

/// Queues whose requests take effect in the order they came.
struct Lanes {
    apply: Option<mpsc::Sender<Job>>,
    changes: Option<mpsc::Sender<Job>>,
    tasks: [JoinHandle<()>; 2],
}

impl Lanes {
    fn start(session: &Arc<Session>) -> Self {
        let lane = || {
            let (sender, mut jobs) = mpsc::channel::<Job>(LANE);
            let session = session.clone();
            let task = tokio::spawn(async move {
                while let Some(job) = jobs.recv().await {
                    if !session.over.load(Ordering::Relaxed) {
                        work(session.clone(), job).await;
                    }
                }
            });
            (Some(sender), task)
        };
        let ((apply, one), (changes, two)) = (lane(), lane());
        Self {
            apply,
            changes,
            tasks: [one, two],
        }
    }

    fn of(&self, ask: &Ask) -> Option<&mpsc::Sender<Job>> {
        match ask {
            Ask::Apply(_) => self.apply.as_ref(),
            Ask::AddPod(_)
            | Ask::UpdatePod(_)
            | Ask::RemovePod(_)
            | Ask::KeepPods(_)
            | Ask::PodsSynced(_)
            | Ask::HandOver(_)
            | Ask::HandOverDone(_)
            | Ask::TakeListeners(_) => self.changes.as_ref(),
            _ => None,
        }
    }

    async fn finish(&mut self) {
        self.apply = None;
        self.changes = None;
        for task in &mut self.tasks {
            let _ = task.await;
        }
    }
}
