//! The control socket over real Unix sockets and real namespaces.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use pb::hello::Role;
use pb::reply::Body;
use pb::request::Body as Ask;
use prost::Message;
use tokio::net::UnixStream;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::build::Build;
use super::failure::Code;
use super::frame;
use super::instance::Instance;
use super::socket::ControlSocket;
use crate::inpod::testing::{TestNetns, dial};
use crate::wire::control as pb;

mod dns;
mod framing;
mod handover;
mod pods;
mod sessions;
mod start;
mod trust;

static NEXT: AtomicU32 = AtomicU32::new(0);

fn temporary(what: &str) -> PathBuf {
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let name = format!("up-control-{}-{number}-{what}", std::process::id());
    std::env::temp_dir().join(name)
}

/// A data plane in this process, with everything but the process's own preparation.
struct Plane {
    socket: PathBuf,
    instance: Arc<Instance>,
    server: JoinHandle<()>,
}

impl Plane {
    fn start() -> Self {
        let socket = temporary("sock");
        let instance = Instance::new(None, Build::default(), false);
        let bound = ControlSocket::bind(&socket).expect("a free path");
        let server = tokio::spawn(bound.serve(instance.clone()));
        Self {
            socket,
            instance,
            server,
        }
    }

    async fn agent(&self) -> Client {
        let mut client = Client::connect(self).await;
        match client.hello(Role::Agent).await {
            Body::Hello(_) => client,
            other => panic!("{other:?}"),
        }
    }

    async fn role(&self, role: Role) -> Client {
        let mut client = Client::connect(self).await;
        match client.hello(role).await {
            Body::Hello(_) => client,
            other => panic!("{other:?}"),
        }
    }
}

impl Drop for Plane {
    fn drop(&mut self) {
        self.server.abort();
        let _ = std::fs::remove_file(&self.socket);
    }
}

struct Client {
    stream: UnixStream,
    next: u64,
    /// Answers that came while another one was waited for.
    events: Vec<pb::event::Event>,
}

impl Client {
    async fn connect(plane: &Plane) -> Self {
        Self {
            stream: UnixStream::connect(&plane.socket).await.expect("serves"),
            next: 1,
            events: Vec::new(),
        }
    }

    async fn hello(&mut self, role: Role) -> Body {
        let config = pb::InstanceConfig {
            node: "up-control-node".into(),
            ..Default::default()
        };
        let hello = pb::Hello {
            role: role.into(),
            version: 1,
            config: (role == Role::Agent).then_some(config),
        };
        self.ask(Ask::Hello(hello), vec![]).await
    }

    async fn send(&mut self, ask: Ask, fds: Vec<OwnedFd>) -> u64 {
        let id = self.next;
        self.next += 1;
        let request = pb::Request {
            id,
            fds: fds.len() as u32,
            body: Some(ask),
        };
        let sent = frame::write(&self.stream, &request, &fds).await;
        sent.expect("the other side reads");
        id
    }

    /// None at the end of the connection.
    async fn receive(&mut self) -> Option<(pb::Reply, Vec<OwnedFd>)> {
        let frame = timeout(Duration::from_secs(10), frame::read(&self.stream))
            .await
            .expect("an answer within ten seconds");
        // A connection that is closed with unread bytes resets.
        let frame = frame.unwrap_or(None)?;
        let reply = pb::Reply::decode(frame.body).expect("a Reply");
        assert_eq!(reply.fds as usize, frame.fds.len());
        Some((reply, frame.fds))
    }

    async fn ask(&mut self, ask: Ask, fds: Vec<OwnedFd>) -> Body {
        let id = self.send(ask, fds).await;
        loop {
            let (reply, _) = self.receive().await.expect("an answer");
            let body = reply.body.expect("a body");
            match body {
                Body::Event(event) => self.events.extend(event.event),
                body if reply.id == id && !reply.more => return body,
                _ => {}
            }
        }
    }

    async fn event(&mut self) -> pb::event::Event {
        if !self.events.is_empty() {
            return self.events.remove(0);
        }
        loop {
            let (reply, _) = self.receive().await.expect("an event");
            if let Some(Body::Event(event)) = reply.body {
                return event.event.expect("an event");
            }
        }
    }

    async fn add(&mut self, uid: &str, netns: &TestNetns) -> Body {
        self.ask(add_pod(uid, false), vec![netns.fd()]).await
    }

    async fn pods(&mut self) -> Vec<pb::PodStatus> {
        match self.ask(Ask::ListPods(pb::ListPods {}), vec![]).await {
            Body::Pods(pods) => pods.pods,
            other => panic!("{other:?}"),
        }
    }
}

fn add_pod(uid: &str, prepare_only: bool) -> Ask {
    Ask::AddPod(pb::AddPod {
        pod: Some(pb::Pod {
            uid: uid.into(),
            name: format!("name-{uid}"),
            namespace: "shop".into(),
            service_account: "web".into(),
        }),
        settings: None,
        prepare_only,
    })
}

fn remove_pod(uid: &str, drain: bool) -> Ask {
    Ask::RemovePod(pb::RemovePod {
        uid: uid.into(),
        drain,
        deadline_ms: 500,
    })
}

fn done(body: Body) {
    assert!(matches!(body, Body::Done(_)), "{body:?}");
}

fn error(body: Body) -> (Code, String) {
    match body {
        Body::Error(error) => (error.code(), error.text),
        other => panic!("{other:?}"),
    }
}

/// True if something accepts there. A reset is an answer, too: the proxy refuses connections that
/// nothing redirected, sometimes before `connect` returns.
fn listens(netns: &TestNetns, addr: &str) -> bool {
    match dial(&netns.open(), addr).map_err(|error| error.kind()) {
        Ok(_) | Err(std::io::ErrorKind::ConnectionReset) => true,
        Err(std::io::ErrorKind::ConnectionRefused) => false,
        Err(other) => panic!("{addr}: {other}"),
    }
}

/// Waits, because a program that another test starts holds copies of our descriptors between its
/// fork and its exec.
async fn freed(netns: &TestNetns, addr: &str) {
    let wait = async {
        while listens(netns, addr) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let freed = timeout(Duration::from_secs(10), wait).await;
    assert!(freed.is_ok(), "somebody still listens at {addr}");
}
