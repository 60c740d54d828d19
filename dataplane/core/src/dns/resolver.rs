//! One pod's view of DNS: from a question to its answer.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use hickory_proto::op::ResponseCode;
use hickory_proto::rr::{DNSClass, RecordType};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::answer::{self, Answer};
use super::cache::{self, Cache, Owner};
use super::lookup::{self, Client, Hit, Target};
use super::names::Scope;
use super::relay::{Nameservers, Unanswered, Way};
use super::wire::{self, Query};
use crate::config::{BadConfig, nameservers};
use crate::inpod::Held;
use crate::proxy::Pod;
use crate::state::{ServiceRecord, Snapshot, Workload};
use crate::telemetry::{DnsLabels, DnsSeries};
use crate::wire::control as pb;

/// TCP connections of one pod to its DNS proxy; libc opens one a question at most.
const MOST_CONNECTIONS: usize = 256;

/// A pod's resolv.conf, as far as we need it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Resolv {
    /// Empty: those of the node.
    pub nameservers: Vec<SocketAddr>,
    /// Empty where it isn't known: then Kubernetes' usual ones.
    pub search: Vec<String>,
}

pub struct Resolver {
    pod: Arc<Pod>,
    upstream: ArcSwap<Upstream>,
    /// Questions that wait for a nameserver or for the pod's own record.
    pub(super) pending: Arc<Semaphore>,
    connections: Arc<Semaphore>,
}

struct Upstream {
    owner: Owner,
    nameservers: Nameservers,
    search: Option<Vec<String>>,
    resolv: Option<Resolv>,
}

/// How a question came, and so how large its answer may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    Udp,
    Tcp,
}

/// A question that was counted, and what else is needed to answer it.
pub struct Asked {
    pub query: Query,
    pub transport: Transport,
    series: Arc<DnsSeries>,
}

impl Resolv {
    pub fn parse(raw: &pb::ResolvConf) -> Result<Self, BadConfig> {
        let search = raw.search.iter().map(|domain| domain.trim_end_matches('.'));
        Ok(Self {
            nameservers: nameservers("resolv_conf.nameservers", &raw.nameservers)?,
            search: search
                .filter(|domain| !domain.is_empty())
                .map(str::to_ascii_lowercase)
                .collect(),
        })
    }
}

impl Resolver {
    pub fn new(pod: Arc<Pod>) -> Arc<Self> {
        let upstream = Upstream::new(&pod, None);
        let pending = pod.shared.config.dns.pod_max_pending;
        Arc::new(Self {
            upstream: ArcSwap::from_pointee(upstream),
            pending: Arc::new(Semaphore::new(pending.min(Semaphore::MAX_PERMITS))),
            connections: Arc::new(Semaphore::new(MOST_CONNECTIONS)),
            pod,
        })
    }

    /// None where the pod's own file isn't known: then the node's nameservers are asked. Takes
    /// effect with the next question.
    pub fn configure(&self, resolv: Option<Resolv>) {
        if self.upstream.load().resolv != resolv {
            let new = Arc::new(Upstream::new(&self.pod, resolv));
            let old = self.upstream.swap(new);
            self.cache().forget(old.owner);
        }
    }

    /// The answer where it is known now; else `later` finds it, and may wait for it.
    pub fn now(&self, packet: &[u8], transport: Transport) -> Result<Vec<u8>, Option<Later>> {
        let query = match Query::parse(packet) {
            Ok(query) => query,
            Err(wire::Unusable::Drop) => return Err(None),
            Err(wire::Unusable::Refuse(code)) => return Ok(answer::refusal(packet, code)),
        };
        let snapshot = self.pod.shared.store.snapshot();
        let Some(own) = self.pod.find_own(&snapshot) else {
            return Err(Some(Later::OwnRecord(Box::new(query), transport)));
        };
        let asked = self.count(query, transport, &own);
        match self.known(&snapshot, &own, packet, &asked) {
            Some(answer) => Ok(answer),
            None => Err(Some(Later::Nameserver(Box::new(asked)))),
        }
    }

    /// Waits as long as `now` could not; the caller holds a permit of `pending` meanwhile.
    pub async fn later(&self, packet: &[u8], later: Later) -> Vec<u8> {
        let asked = match later {
            Later::Nameserver(asked) => asked,
            Later::OwnRecord(query, transport) => match self.pod.own_workload().await {
                Ok(own) => {
                    let snapshot = self.pod.shared.store.snapshot();
                    let asked = self.count(*query, transport, &own);
                    if let Some(answer) = self.known(&snapshot, &own, packet, &asked) {
                        return answer;
                    }
                    Box::new(asked)
                }
                // facts ztunnel 9.2 step 1
                Err(error) => {
                    self.pod
                        .shared
                        .telemetry
                        .metrics
                        .dns
                        .refused("unknown_own_workload");
                    self.log(&query, None, &error.to_string(), 0);
                    return answer::failure(&query, ResponseCode::ServFail);
                }
            },
        };
        match self.told(&asked).await {
            Some(answer) => answer,
            None => self.relay(packet, &asked).await,
        }
    }

    /// On demand: what may be in the mesh is asked for before any nameserver.
    async fn told(&self, asked: &Asked) -> Option<Vec<u8>> {
        let shared = &self.pod.shared;
        if !shared.config.on_demand || asked.query.class != DNSClass::IN {
            return None;
        }
        let own = self.pod.find_own(&shared.store.snapshot())?;
        let name = plain(&asked.query);
        let name = match asked.query.kind {
            RecordType::A | RecordType::AAAA => &name,
            RecordType::SRV => place(&name)?.1,
            _ => return None,
        };
        let names = {
            let upstream = self.upstream.load();
            let scope = self.scope(&own, &upstream);
            scope.keys(&scope.candidates(name))
        };
        self.pod.learn(&names).await;
        self.local(&shared.store.snapshot(), &own, asked)
    }

    fn scope<'a>(&'a self, own: &'a Workload, upstream: &'a Upstream) -> Scope<'a> {
        Scope {
            namespace: &own.namespace,
            cluster_domain: &self.pod.shared.config.dns.cluster_domain,
            search: upstream.search.as_deref(),
        }
    }

    /// SERVFAIL at once: the pod has as many questions waiting as it may.
    pub fn overloaded(&self, later: &Later) -> Vec<u8> {
        self.pod.shared.telemetry.metrics.dns.refused("pending");
        answer::failure(later.query(), ResponseCode::ServFail)
    }

    /// For a connection of the pod to its DNS proxy; None, and counted, where it has its part.
    pub fn admit(&self) -> Option<(OwnedSemaphorePermit, Held)> {
        let permit = self.connections.clone().try_acquire_owned().ok();
        let admitted = permit.zip(self.pod.sockets.take(1).ok());
        if admitted.is_none() {
            self.pod.shared.telemetry.metrics.dns.refused("connections");
        }
        admitted
    }

    /// From the mesh, or as a nameserver said it before.
    fn known(
        &self,
        snapshot: &Snapshot,
        own: &Workload,
        packet: &[u8],
        asked: &Asked,
    ) -> Option<Vec<u8>> {
        self.local(snapshot, own, asked)
            .or_else(|| self.kept(packet, asked))
    }

    fn local(&self, snapshot: &Snapshot, own: &Workload, asked: &Asked) -> Option<Vec<u8>> {
        let query = &asked.query;
        if query.class != DNSClass::IN {
            return None;
        }
        let name = plain(query);
        let upstream = self.upstream.load();
        let config = &self.pod.shared.config;
        let scope = self.scope(own, &upstream);
        let client = Client {
            namespace: &own.namespace,
            network: &own.network,
            cluster_domain: &config.dns.cluster_domain,
            preferred_namespace: config.dns.preferred_namespace.as_deref(),
        };
        let find = |name: &str| client.lookup(snapshot, &scope.candidates(name));
        let mut answer = Answer::new(query);
        let (domain, count) = match query.kind {
            RecordType::A | RecordType::AAAA => {
                let hit = find(&name)?;
                let v6 = query.kind == RecordType::AAAA;
                let addresses = match v6 && !config.ipv6 {
                    true => Vec::new(),
                    false => client.addresses(snapshot, &hit.target, v6),
                };
                // Nothing stands at the end of an alias: then there is none.
                if let Some(alias) = hit.alias.filter(|_| !addresses.is_empty()) {
                    answer.alias(&alias);
                }
                answer.addresses(&addresses);
                (hit.domain, addresses.len())
            }
            RecordType::SRV => {
                let (port, service) = place(&name)?;
                let hit = find(service)?;
                let count = self.places(&client, snapshot, &hit, port, &mut answer)?;
                (hit.domain, count)
            }
            _ => return None,
        };
        self.log(query, Some(&domain), "success", count);
        Some(answer.encode(asked.room()))
    }

    /// `_80._tcp.service`: control planes don't tell names of ports, so those are left to the
    /// cluster's own DNS, as are services of other domains.
    fn places(
        &self,
        client: &Client<'_>,
        snapshot: &Snapshot,
        hit: &Hit,
        port: u16,
        answer: &mut Answer<'_>,
    ) -> Option<usize> {
        let Target::Service(service) = &hit.target else {
            return None;
        };
        let hostname = &service.name.hostname;
        let declared = service
            .port(port)
            .filter(|_| client.is_of_cluster(hostname))?;
        let v6 = self.pod.shared.config.ipv6;
        let both = |target: &Target| {
            let mut all = client.addresses(snapshot, target, false);
            if v6 {
                all.extend(client.addresses(snapshot, target, true));
            }
            all
        };
        if !service.vips.is_empty() {
            answer.place(100, port, hostname, &both(&hit.target));
            return Some(1);
        }
        let endpoints = lookup::endpoints(snapshot, service);
        for workload in &endpoints {
            let target = target_port(service, workload, port).unwrap_or(declared.target);
            let name = format!("{}.{hostname}", workload.name);
            let addresses = both(&Target::Pods(vec![workload.clone()]));
            answer.place(1, target, &name, &addresses);
        }
        Some(endpoints.len())
    }

    fn kept(&self, packet: &[u8], asked: &Asked) -> Option<Vec<u8>> {
        let key = asked.query.key(packet)?;
        let owner = self.upstream.load().owner;
        let (kept, age) = self.cache().get(owner, &key, Instant::now())?;
        self.pod.shared.telemetry.metrics.dns.cache_hits.inc();
        self.log(&asked.query, None, "cached", 0);
        let answer = wire::renewed(&kept.bytes, &kept.ttls, age, packet, &asked.query);
        Some(asked.fitting(answer))
    }

    async fn relay(&self, packet: &[u8], asked: &Asked) -> Vec<u8> {
        let shared = &self.pod.shared;
        let upstream = self.upstream.load_full();
        let way = Way {
            netns: &self.pod.netns,
            config: &shared.config,
            sockets: &self.pod.sockets,
            metrics: &shared.telemetry.metrics.dns,
            tcp: asked.transport == Transport::Tcp,
        };
        let query = &asked.query;
        let start = Instant::now();
        let answer = upstream.nameservers.ask(&way, packet, query).await;
        asked.series.relayed(start.elapsed(), answer.is_ok());
        match answer {
            Ok(answer) => {
                self.keep(&upstream, packet, query, &answer);
                let code = ResponseCode::from(0, wire::rcode(&answer));
                self.log(query, None, &code.to_string(), 0);
                asked.fitting(answer)
            }
            Err(error) => {
                if matches!(error, Unanswered::NoServers) {
                    way.metrics.refused("no_nameserver");
                }
                self.log(query, None, &error.to_string(), 0);
                answer::failure(query, ResponseCode::ServFail)
            }
        }
    }

    fn keep(&self, upstream: &Upstream, packet: &[u8], query: &Query, answer: &[u8]) {
        let Some(key) = query.key(packet) else { return };
        let Some(life) = wire::lifetime(answer, query) else {
            return;
        };
        let answer = cache::Answer {
            bytes: answer.into(),
            ttls: life.ttls.into(),
            since: Instant::now(),
            life: Duration::from_secs(life.seconds.into()),
        };
        self.cache().put(upstream.owner, &key, answer);
        self.show_cache();
    }

    fn count(&self, query: Query, transport: Transport, own: &Workload) -> Asked {
        let labels = DnsLabels {
            query_type: kind(query.kind),
            protocol: transport.as_str(),
            canonical_service: own.canonical_name.clone(),
            canonical_revision: own.canonical_revision.clone(),
        };
        Asked {
            query,
            transport,
            series: self.pod.shared.telemetry.metrics.dns.request(labels),
        }
    }

    /// facts ztunnel 9.5, with the true number of endpoints.
    fn log(&self, query: &Query, domain: Option<&str>, result: &str, endpoints: usize) {
        tracing::debug!(
            target: "dns",
            {
                src.workload = self.pod.info.name,
                src.namespace = self.pod.info.namespace,
                query = kind(query.kind),
                domain = domain.map_or_else(|| query.name.to_ascii(), str::to_owned),
                result,
                endpoints,
            },
            "question answered"
        );
    }

    fn cache(&self) -> &Cache {
        &self.pod.shared.dns_cache
    }

    fn show_cache(&self) {
        let entries = i64::try_from(self.cache().held()).unwrap_or(i64::MAX);
        self.pod
            .shared
            .telemetry
            .metrics
            .dns
            .cache_entries
            .set(entries);
    }
}

impl Drop for Resolver {
    fn drop(&mut self) {
        self.cache().forget(self.upstream.load().owner);
        self.show_cache();
    }
}

/// What a question still waits for.
pub enum Later {
    OwnRecord(Box<Query>, Transport),
    Nameserver(Box<Asked>),
}

impl Later {
    fn query(&self) -> &Query {
        match self {
            Self::OwnRecord(query, _) => query,
            Self::Nameserver(asked) => &asked.query,
        }
    }
}

impl Asked {
    fn room(&self) -> usize {
        match self.transport {
            Transport::Udp => self.query.payload(),
            Transport::Tcp => usize::from(u16::MAX),
        }
    }

    /// A kept answer may have come for a client with more room.
    fn fitting(&self, answer: Vec<u8>) -> Vec<u8> {
        match answer.len() > self.room() {
            true => wire::truncated(&answer, &self.query),
            false => answer,
        }
    }
}

impl Transport {
    fn as_str(self) -> &'static str {
        match self {
            Self::Udp => "udp",
            Self::Tcp => "tcp",
        }
    }
}

impl Upstream {
    fn new(pod: &Pod, resolv: Option<Resolv>) -> Self {
        let own = resolv.as_ref().map(|resolv| &resolv.nameservers);
        let node = &pod.shared.config.dns.nameservers;
        let servers = own.filter(|own| !own.is_empty()).unwrap_or(node);
        Self {
            owner: pod.shared.dns_cache.new_owner(),
            nameservers: Nameservers::new(servers.clone()),
            search: resolv
                .as_ref()
                .map(|resolv| resolv.search.clone())
                .filter(|search| !search.is_empty()),
            resolv,
        }
    }
}

/// In lower case, without the dot at the end.
fn plain(query: &Query) -> String {
    let mut name = query.name.to_ascii().to_ascii_lowercase();
    name.truncate(name.trim_end_matches('.').len());
    name
}

/// Port and service of `_80._tcp.service`.
fn place(name: &str) -> Option<(u16, &str)> {
    let (port, service) = name.split_once("._tcp.")?;
    Some((port.strip_prefix('_')?.parse().ok()?, service))
}

/// For labels: what is asked for often, in lower case.
fn kind(kind: RecordType) -> &'static str {
    match kind {
        RecordType::A => "a",
        RecordType::AAAA => "aaaa",
        RecordType::ANY => "any",
        RecordType::CAA => "caa",
        RecordType::CNAME => "cname",
        RecordType::HTTPS => "https",
        RecordType::MX => "mx",
        RecordType::NAPTR => "naptr",
        RecordType::NS => "ns",
        RecordType::PTR => "ptr",
        RecordType::SOA => "soa",
        RecordType::SRV => "srv",
        RecordType::SVCB => "svcb",
        RecordType::TXT => "txt",
        _ => "unknown",
    }
}

fn target_port(service: &ServiceRecord, workload: &Workload, port: u16) -> Option<u16> {
    let own = workload.membership(&service.key)?;
    let own = own.ports.iter().find(|map| map.service == port);
    own.map(|map| map.target).filter(|target| *target != 0)
}
