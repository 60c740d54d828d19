//! A pod that asks, its DNS proxy, and nameservers that say what a test wants, all in one namespace.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use hickory_proto::op::{Edns, Message, MessageType, OpCode, Query};
use hickory_proto::rr::{Name, RData, RecordType};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream, UdpSocket};

use super::Cache;
use crate::config::{Config, Limits};
use crate::inpod::testing::TestNetns;
use crate::inpod::{Descriptors, DnsSockets, Netns, PodInfo};
use crate::proxy::{Names, PodProxy, Shared};
use crate::state::Store;
use crate::state::fixture::Push;
use crate::telemetry::Telemetry;
use crate::tls::CertStore;
use crate::wire::control as pb;

const PATIENCE: Duration = Duration::from_secs(20);

pub struct World {
    pub shared: Arc<Shared>,
    pub proxy: Arc<PodProxy>,
    pub netns: Arc<Netns>,
    // Declared last: removed after what lives in it.
    pub ns: TestNetns,
}

/// Answers every datagram and every message of a connection by `reply`.
pub struct Nameserver {
    pub asked: Arc<AtomicUsize>,
}

type Reply = Arc<dyn Fn(&[u8], bool) -> Option<Vec<u8>> + Send + Sync>;

/// Settings of the node with these nameservers.
pub fn raw(nameservers: &[&str]) -> pb::InstanceConfig {
    pb::InstanceConfig {
        node: "node-1".into(),
        network: "net".into(),
        dns: Some(pb::Dns {
            nameservers: nameservers.iter().map(|s| (*s).to_owned()).collect(),
            preferred_namespace: "preferred".into(),
            forward_timeout_ms: 1000,
            ..Default::default()
        }),
        ..Default::default()
    }
}

impl World {
    /// The pod is `web` of `ns1`.
    pub fn new(raw: &pb::InstanceConfig, push: Push) -> Self {
        let ns = TestNetns::new();
        let netns = Arc::new(ns.open());
        let config = Arc::new(Config::parse(raw).expect("tests write it well"));
        let store = Store::new(config.clone());
        push.accepted_by(&store);
        let shared = Arc::new(Shared {
            limits: Arc::new(arc_swap::ArcSwap::from_pointee(Limits::default())),
            descriptors: Descriptors::of_process(),
            names: Names::new(&config),
            store,
            certs: CertStore::new().0,
            telemetry: Telemetry::new(&pb::LogConfig::default(), &config.telemetry, false),
            node: crate::proxy::NodeAddresses::new(crate::capture::addresses),
            dns_cache: Cache::new(config.dns.cache_entries),
            config,
        });
        let info = PodInfo {
            uid: "web".into(),
            name: "web".into(),
            namespace: "ns1".into(),
            service_account: "web-sa".into(),
            only_ports: Vec::new(),
        };
        let proxy = PodProxy::new(shared.clone(), info, netns.clone());
        let sockets = DnsSockets::bind(&netns, &shared.config).expect("free ports");
        proxy.serve_dns(sockets);
        Self {
            shared,
            proxy,
            netns,
            ns,
        }
    }

    pub async fn udp(&self, packet: &[u8]) -> Vec<u8> {
        self.udp_from("127.0.0.1:0", "127.0.0.1:15053", packet)
            .await
    }

    pub async fn udp_from(&self, from: &str, to: &str, packet: &[u8]) -> Vec<u8> {
        let socket = self.socket(from);
        socket.connect(to).await.unwrap();
        socket.send(packet).await.unwrap();
        let mut answer = vec![0; 65536];
        let length = within(socket.recv(&mut answer)).await.unwrap();
        answer.truncate(length);
        answer
    }

    pub fn socket(&self, from: &str) -> UdpSocket {
        let socket = self.netns.enter(|| std::net::UdpSocket::bind(from));
        let socket = socket.unwrap().unwrap();
        socket.set_nonblocking(true).unwrap();
        UdpSocket::from_std(socket).unwrap()
    }

    pub async fn connect(&self) -> TcpStream {
        let socket = self.netns.enter(TcpSocket::new_v4).unwrap().unwrap();
        within(socket.connect(addr("127.0.0.1:15053")))
            .await
            .unwrap()
    }

    pub async fn tcp(&self, packet: &[u8]) -> Vec<u8> {
        let mut stream = self.connect().await;
        over(&mut stream, packet).await
    }

    pub fn metrics(&self) -> String {
        self.shared.telemetry.encode()
    }

    /// A nameserver on this address of the namespace.
    pub fn nameserver(
        &self,
        at: &str,
        reply: impl Fn(&[u8], bool) -> Option<Vec<u8>> + Send + Sync + 'static,
    ) -> Nameserver {
        let asked = Arc::new(AtomicUsize::new(0));
        let reply: Reply = Arc::new(reply);
        let udp = self.socket(at);
        let tcp = self.netns.enter(|| std::net::TcpListener::bind(at));
        let tcp = tcp.unwrap().unwrap();
        tcp.set_nonblocking(true).unwrap();
        let tcp = TcpListener::from_std(tcp).unwrap();
        tokio::spawn(answer_udp(udp, reply.clone(), asked.clone()));
        tokio::spawn(answer_tcp(tcp, reply, asked.clone()));
        Nameserver { asked }
    }
}

impl Nameserver {
    pub fn count(&self) -> usize {
        self.asked.load(Ordering::SeqCst)
    }
}

pub async fn over(stream: &mut TcpStream, packet: &[u8]) -> Vec<u8> {
    let length = u16::try_from(packet.len()).unwrap().to_be_bytes();
    stream.write_all(&[&length, packet].concat()).await.unwrap();
    let length = within(stream.read_u16()).await.unwrap();
    let mut answer = vec![0; length.into()];
    within(stream.read_exact(&mut answer)).await.unwrap();
    answer
}

async fn answer_udp(socket: UdpSocket, reply: Reply, asked: Arc<AtomicUsize>) {
    let mut packet = vec![0; 4096];
    while let Ok((length, client)) = socket.recv_from(&mut packet).await {
        asked.fetch_add(1, Ordering::SeqCst);
        if let Some(answer) = reply(&packet[..length], false) {
            let _ = socket.send_to(&answer, client).await;
        }
    }
}

async fn answer_tcp(listener: TcpListener, reply: Reply, asked: Arc<AtomicUsize>) {
    while let Ok((mut stream, _)) = listener.accept().await {
        while let Ok(length) = stream.read_u16().await {
            let mut packet = vec![0; length.into()];
            if stream.read_exact(&mut packet).await.is_err() {
                break;
            }
            asked.fetch_add(1, Ordering::SeqCst);
            let Some(answer) = reply(&packet, true) else {
                break;
            };
            let length = u16::try_from(answer.len()).unwrap().to_be_bytes();
            let _ = stream
                .write_all(&[&length, answer.as_slice()].concat())
                .await;
        }
    }
}

pub async fn within<T>(what: impl Future<Output = T>) -> T {
    let waited = tokio::time::timeout(PATIENCE, what).await;
    waited.expect("it takes too long")
}

pub fn addr(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

pub fn question(name: &str, kind: RecordType) -> Message {
    let mut message = Message::new(rand::random(), MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    let mut name = Name::from_ascii(name).unwrap();
    name.set_fqdn(true);
    message.add_query(Query::query(name, kind));
    message
}

pub fn with_payload(mut message: Message, payload: u16) -> Message {
    let mut edns = Edns::new();
    edns.set_max_payload(payload);
    edns.set_dnssec_ok(true);
    message.set_edns(edns);
    message
}

/// The query turned into an answer: flags `0x84, rcode` (authoritative, to be told from ours), with
/// these section counts and records.
pub fn reply(query: &[u8], rcode: u8, counts: [u8; 3], records: &[u8]) -> Vec<u8> {
    let end = super::wire::Query::parse(query).unwrap().question.end;
    let mut answer = query[..end].to_vec();
    answer[2] = 0x84 | (query[2] & 1);
    answer[3] = rcode;
    answer[6..12].fill(0);
    for (index, count) in counts.into_iter().enumerate() {
        answer[7 + 2 * index] = count;
    }
    answer.extend_from_slice(records);
    answer
}

/// One A record for the question's name.
pub fn a_record(ip: [u8; 4], ttl: u32) -> Vec<u8> {
    let mut record = vec![0xc0, 12, 0, 1, 0, 1];
    record.extend_from_slice(&ttl.to_be_bytes());
    record.extend_from_slice(&[0, 4]);
    record.extend_from_slice(&ip);
    record
}

/// `A 10.0.0.1`, sorted, aliases first; `NOERROR`, `NXDOMAIN`, … where nothing is in it.
pub fn shown(answer: &[u8]) -> String {
    let message = Message::from_vec(answer).expect("an answer is well-formed");
    let mut lines: Vec<String> = Vec::new();
    let mut aliases = Vec::new();
    for record in &message.answers {
        let owner = record.name.to_ascii();
        match &record.data {
            RData::A(ip) => lines.push(format!("{owner} {}", ip.0)),
            RData::AAAA(ip) => lines.push(format!("{owner} {}", ip.0)),
            RData::CNAME(name) => aliases.push(format!("{owner} -> {}", name.0)),
            RData::SRV(srv) => lines.push(format!("{owner} {} {}", srv.port, srv.target)),
            other => lines.push(format!("{owner} {other}")),
        }
    }
    lines.sort();
    aliases.extend(lines);
    if aliases.is_empty() {
        return format!("{:?}", message.metadata.response_code);
    }
    aliases.join(", ")
}
