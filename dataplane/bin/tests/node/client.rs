//! A small agent: asks over the socket and signs certificates.

use std::io::{IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use pb::event::Event;
use pb::hello::Role;
use pb::reply::Body;
use pb::request::Body as Ask;
use prost::Message;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use underpass_core::wire::control as pb;

use super::PATIENCE;
use super::ca::Ca;
use super::netns::Netns;

pub struct Client {
    stream: UnixStream,
    next: u64,
    /// Not yet waited for.
    pub events: Vec<Event>,
    pub hello: pb::HelloReply,
}

impl Client {
    pub fn agent(socket: &Path, node: &str) -> Self {
        let config = pb::InstanceConfig {
            node: node.into(),
            network: "net".into(),
            ..Default::default()
        };
        Self::connect(socket, Role::Agent, Some(config))
    }

    pub fn observer(socket: &Path) -> Self {
        Self::connect(socket, Role::Observer, None)
    }

    fn connect(socket: &Path, role: Role, config: Option<pb::InstanceConfig>) -> Self {
        let stream = UnixStream::connect(socket).expect("it serves");
        stream.set_read_timeout(Some(PATIENCE)).expect("a socket");
        let mut it = Self {
            stream,
            next: 1,
            events: Vec::new(),
            hello: pb::HelloReply::default(),
        };
        let hello = pb::Hello {
            role: role.into(),
            version: 1,
            config,
        };
        match it.ask(Ask::Hello(hello)) {
            Body::Hello(hello) => it.hello = hello,
            other => panic!("{other:?}"),
        }
        it
    }

    pub fn ask(&mut self, ask: Ask) -> Body {
        self.ask_with(ask, &[])
    }

    /// The last part of the answer.
    pub fn ask_with(&mut self, ask: Ask, fds: &[BorrowedFd<'_>]) -> Body {
        let id = self.send(ask, fds);
        loop {
            let reply = self.receive();
            if reply.id == id && !reply.more {
                return reply.body.expect("an answer has a body");
            }
        }
    }

    /// All parts of the answer.
    pub fn chunks(&mut self, ask: Ask) -> Vec<u8> {
        let id = self.send(ask, &[]);
        let mut all = Vec::new();
        loop {
            let reply = self.receive();
            match reply.body {
                Some(Body::Chunk(chunk)) if reply.id == id => all.extend_from_slice(&chunk.data),
                Some(Body::Error(error)) => panic!("{error:?}"),
                _ => continue,
            }
            if !reply.more {
                return all;
            }
        }
    }

    pub fn add(&mut self, uid: &str, account: &str, netns: &Netns, prepare_only: bool) {
        let add = pb::AddPod {
            pod: Some(pb::Pod {
                uid: uid.into(),
                name: uid.into(),
                namespace: "shop".into(),
                service_account: account.into(),
            }),
            settings: None,
            prepare_only,
        };
        let fd = netns.fd();
        done(self.ask_with(Ask::AddPod(add), &[fd.as_fd()]));
    }

    pub fn apply(&mut self, response: bytes::Bytes) {
        match self.ask(Ask::Apply(pb::Apply { response })) {
            Body::Apply(applied) => assert_eq!(applied.rejected, []),
            other => panic!("{other:?}"),
        }
    }

    /// Waits until this identity is wanted, and installs a certificate for it.
    pub fn certify(&mut self, ca: &Ca, identity: &str) {
        self.event(|event| matches!(event, Event::CertificateWanted(w) if w.identity == identity));
        let csr = pb::NewCsr {
            identity: identity.into(),
        };
        let csr = match self.ask(Ask::NewCsr(csr)) {
            Body::NewCsr(reply) => reply.csr,
            other => panic!("{other:?}"),
        };
        let install = pb::InstallCertificate {
            identity: identity.into(),
            chain: vec![ca.sign(&csr, identity)],
            roots: vec![ca.root()],
            ..Default::default()
        };
        match self.ask(Ask::InstallCertificate(install)) {
            Body::Certificate(_) => {}
            other => panic!("{other:?}"),
        }
    }

    /// Waits for such an event, and takes it.
    pub fn event(&mut self, is: impl Fn(&Event) -> bool) -> Event {
        loop {
            if let Some(at) = self.events.iter().position(&is) {
                return self.events.remove(at);
            }
            self.receive();
        }
    }

    pub fn connections(&mut self) -> Vec<pb::Connection> {
        let list = pb::ListConnections::default();
        match self.ask(Ask::ListConnections(list)) {
            Body::Connections(reply) => reply.connections,
            other => panic!("{other:?}"),
        }
    }

    pub fn pods(&mut self) -> Vec<pb::PodStatus> {
        match self.ask(Ask::ListPods(pb::ListPods {})) {
            Body::Pods(reply) => reply.pods,
            other => panic!("{other:?}"),
        }
    }

    pub fn metrics(&mut self) -> String {
        let text = self.chunks(Ask::GetMetrics(pb::GetMetrics {}));
        String::from_utf8(text).expect("text")
    }

    pub fn send(&mut self, ask: Ask, fds: &[BorrowedFd<'_>]) -> u64 {
        let id = self.next;
        self.next += 1;
        let request = pb::Request {
            id,
            fds: fds.len() as u32,
            body: Some(ask),
        };
        let body = request.encode_to_vec();
        let mut all = (body.len() as u32).to_be_bytes().to_vec();
        all.extend(body);
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
        }
        let buffers = [IoSlice::new(&all)];
        let sent = rustix::net::sendmsg(&self.stream, &buffers, &mut control, SendFlags::empty());
        let sent = sent.expect("it reads");
        self.stream.write_all(&all[sent..]).expect("it reads");
        id
    }

    pub fn receive(&mut self) -> pb::Reply {
        let mut length = [0; 4];
        self.stream.read_exact(&mut length).expect("an answer");
        let mut body = vec![0; u32::from_be_bytes(length) as usize];
        self.stream.read_exact(&mut body).expect("an answer");
        let reply = pb::Reply::decode(&body[..]).expect("a Reply");
        if let Some(Body::Event(event)) = &reply.body {
            self.events.extend(event.event.clone());
        }
        reply
    }
}

pub fn done(body: Body) {
    assert!(matches!(body, Body::Done(_)), "{body:?}");
}
