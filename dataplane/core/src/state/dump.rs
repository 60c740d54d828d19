//! The dump in the shape of facts ztunnel 13.1, record by record: never a whole document in memory.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use serde::Serialize;

use super::gateway::Gateway;
use super::service::{Balancing, Families, PortMap, Service, ServiceRecord};
use super::snapshot::Snapshot;
use super::workload::{Locality, Workload};
use crate::policy::{Action, Entry, Match, Policy, Scope, Text};
use crate::wire::workload::load_balancing as lb;

const CHUNK: usize = 64 * 1024;

type Chunks = Box<dyn Iterator<Item = Vec<u8>> + Send>;

pub fn section(snapshot: &Snapshot, name: &str) -> Option<Chunks> {
    match name {
        "workloads" => {
            let mut all: Vec<_> = snapshot.workloads.iter().cloned().collect();
            all.sort_by(|a, b| a.uid.cmp(&b.uid));
            Some(array(all, |w, out| write(&WorkloadView::new(w), out)))
        }
        "services" => {
            let published = snapshot.services.iter().filter(|s| s.record.is_some());
            let mut all: Vec<_> = published.cloned().collect();
            let hostname = |s: &Arc<Service>| s.record.as_ref().map(|r| r.name.hostname.clone());
            all.sort_by_cached_key(|s| (hostname(s), s.key.clone()));
            Some(array(all, |service, out| {
                if let Some(record) = &service.record {
                    write(&ServiceView::new(service, record), out);
                }
            }))
        }
        "policies" => Some(array(snapshot.policies().good(), |entry, out| {
            if let Entry::Good(policy) = &**entry {
                write(&PolicyView::new(policy), out);
            }
        })),
        "stagedServices" => Some(Box::new(std::iter::once(staged(snapshot)))),
        _ => None,
    }
}

/// Endpoints of services that aren't known yet: an object, one member a service.
fn staged(snapshot: &Snapshot) -> Vec<u8> {
    let waiting = snapshot.services.iter().filter(|s| s.record.is_none());
    let views: BTreeMap<&str, BTreeMap<&str, EndpointView>> = waiting
        .map(|service| {
            let endpoints = service.endpoints.iter();
            let views = endpoints.map(|w| (&*w.uid, EndpointView::new(w, &service.key)));
            (&*service.key, views.collect())
        })
        .collect();
    let mut out = Vec::new();
    write(&views, &mut out);
    out
}

fn array<T: Send + 'static>(records: Vec<T>, write: fn(&T, &mut Vec<u8>)) -> Chunks {
    let mut records = records.into_iter();
    let mut next = Some(b'[');
    Box::new(std::iter::from_fn(move || {
        let mut chunk = Vec::with_capacity(CHUNK + CHUNK / 4);
        while let Some(separator) = next
            && chunk.len() < CHUNK
        {
            match records.next() {
                Some(record) => {
                    chunk.push(separator);
                    write(&record, &mut chunk);
                    next = Some(b',');
                }
                None => {
                    chunk.extend_from_slice(if separator == b'[' { b"[]" } else { b"]" });
                    next = None;
                }
            }
        }
        (!chunk.is_empty()).then_some(chunk)
    }))
}

fn write(view: &impl Serialize, out: &mut Vec<u8>) {
    serde_json::to_writer(out, view).expect("writing text and numbers to memory can't fail");
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct WorkloadView<'a> {
    workload_ips: &'a [IpAddr],
    #[serde(skip_serializing_if = "Option::is_none")]
    waypoint: Option<GatewayView>,
    #[serde(skip_serializing_if = "Option::is_none")]
    network_gateway: Option<GatewayView>,
    protocol: &'static str,
    network_mode: &'static str,
    uid: &'a str,
    name: &'a str,
    namespace: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    trust_domain: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    service_account: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    network: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    workload_name: &'a str,
    #[serde(skip_serializing_if = "is_deployment")]
    workload_type: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    canonical_name: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    canonical_revision: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    hostname: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    node: &'a str,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    native_tunnel: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    application_tunnel: Option<TunnelView>,
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    authorization_policies: &'a [Arc<str>],
    status: &'static str,
    cluster_id: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    locality: Option<LocalityView<'a>>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    services: Vec<&'a str>,
    capacity: u32,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct GatewayView {
    destination: String,
    hbone_mtls_port: u16,
}

#[derive(Serialize)]
struct TunnelView {
    protocol: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    port: Option<u16>,
}

#[derive(Serialize)]
struct LocalityView<'a> {
    #[serde(skip_serializing_if = "str::is_empty")]
    region: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    zone: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    subzone: &'a str,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct ServiceView<'a> {
    name: &'a str,
    namespace: &'a str,
    hostname: &'a str,
    vips: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    cidr_vips: Vec<CidrView<'a>>,
    ports: BTreeMap<u16, u16>,
    endpoints: BTreeMap<&'a str, EndpointView<'a>>,
    subject_alt_names: &'a [Arc<str>],
    #[serde(skip_serializing_if = "Option::is_none")]
    waypoint: Option<GatewayView>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    weighted_waypoints: Vec<WeightedView>,
    #[serde(skip_serializing_if = "Option::is_none")]
    load_balancer: Option<BalancingView>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ip_families: Option<&'static str>,
    canonical: bool,
    visibility: &'static str,
}

#[derive(Serialize)]
struct CidrView<'a> {
    network: &'a str,
    cidr: String,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct EndpointView<'a> {
    workload_uid: &'a str,
    port: BTreeMap<u16, u16>,
    status: &'static str,
}

#[derive(Serialize)]
struct WeightedView {
    destination: GatewayView,
    weight: u32,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct BalancingView {
    routing_preferences: Vec<&'static str>,
    mode: &'static str,
    health_policy: &'static str,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct PolicyView<'a> {
    name: &'a str,
    namespace: &'a str,
    scope: &'static str,
    action: &'static str,
    rules: Vec<Vec<Vec<MatchView<'a>>>>,
    dry_run: bool,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct MatchView<'a> {
    #[serde(skip_serializing_if = "Vec::is_empty")]
    namespaces: Vec<TextView<'a>>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    not_namespaces: Vec<TextView<'a>>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    principals: Vec<TextView<'a>>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    not_principals: Vec<TextView<'a>>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    service_accounts: Vec<AccountView<'a>>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    not_service_accounts: Vec<AccountView<'a>>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    source_ips: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    not_source_ips: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    destination_ips: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    not_destination_ips: Vec<String>,
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    destination_ports: &'a [u16],
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    not_destination_ports: &'a [u16],
}

/// `Presence` has an empty list as its value on purpose: so istioctl knows it.
#[derive(Serialize)]
enum TextView<'a> {
    Exact(&'a str),
    Prefix(&'a str),
    Suffix(&'a str),
    Presence(),
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct AccountView<'a> {
    namespace: &'a str,
    service_account: &'a str,
}

impl<'a> WorkloadView<'a> {
    fn new(w: &'a Arc<Workload>) -> Self {
        Self {
            workload_ips: &w.addresses,
            waypoint: w.waypoint.as_ref().map(GatewayView::new),
            network_gateway: w.network_gateway.as_ref().map(GatewayView::new),
            protocol: if w.hbone { "HBONE" } else { "TCP" },
            network_mode: if w.host_network {
                "HostNetwork"
            } else {
                "Standard"
            },
            uid: &w.uid,
            name: &w.name,
            namespace: &w.namespace,
            trust_domain: &w.trust_domain,
            service_account: &w.service_account,
            network: &w.network,
            workload_name: &w.workload_name,
            workload_type: w.workload_type,
            canonical_name: &w.canonical_name,
            canonical_revision: &w.canonical_revision,
            hostname: &w.hostname,
            node: &w.node,
            native_tunnel: w.native_tunnel,
            application_tunnel: w.application_tunnel.map(|tunnel| TunnelView {
                protocol: if tunnel.proxy { "PROXY" } else { "NONE" },
                port: tunnel.port,
            }),
            authorization_policies: &w.authorization_policies,
            status: status(w),
            cluster_id: &w.cluster_id,
            locality: (*w.locality != Locality::default()).then(|| LocalityView {
                region: &w.locality.region,
                zone: &w.locality.zone,
                subzone: &w.locality.subzone,
            }),
            services: w.services.iter().map(|m| &*m.service).collect(),
            capacity: w.capacity,
        }
    }
}

impl GatewayView {
    fn new(gateway: &Gateway) -> Self {
        Self {
            destination: gateway.destination.to_string(),
            hbone_mtls_port: gateway.hbone_port,
        }
    }
}

impl<'a> EndpointView<'a> {
    fn new(w: &'a Workload, service: &str) -> Self {
        Self {
            workload_uid: &w.uid,
            port: ports(w.membership(service).map_or(&[], |m| &m.ports)),
            status: status(w),
        }
    }
}

impl<'a> ServiceView<'a> {
    fn new(service: &'a Service, record: &'a ServiceRecord) -> Self {
        let endpoint = |w: &'a Arc<Workload>| (&*w.uid, EndpointView::new(w, &record.key));
        let cidr = |(network, net): &'a (Arc<str>, ipnet::IpNet)| CidrView {
            network,
            cidr: net.to_string(),
        };
        let weighted = |(gateway, weight): &(Gateway, u32)| WeightedView {
            destination: GatewayView::new(gateway),
            weight: *weight,
        };
        let vips = record.vips.iter();
        Self {
            name: &record.name.name,
            namespace: &record.name.namespace,
            hostname: &record.name.hostname,
            vips: vips
                .map(|(network, ip)| format!("{network}/{ip}"))
                .collect(),
            cidr_vips: record.cidrs.iter().map(cidr).collect(),
            ports: ports(&record.ports),
            endpoints: service.endpoints.iter().map(endpoint).collect(),
            subject_alt_names: &record.subject_alt_names,
            waypoint: record.waypoint.as_ref().map(GatewayView::new),
            weighted_waypoints: record.weighted_waypoints.iter().map(weighted).collect(),
            load_balancer: record.balancing.as_ref().map(BalancingView::new),
            ip_families: match record.families {
                Families::Automatic => None,
                Families::V4 => Some("IPv4"),
                Families::V6 => Some("IPv6"),
                Families::Dual => Some("Dual"),
            },
            canonical: record.canonical,
            visibility: if record.private {
                "Namespace"
            } else {
                "Public"
            },
        }
    }
}

impl BalancingView {
    fn new(balancing: &Balancing) -> Self {
        let scope = |scope: &lb::Scope| match scope {
            lb::Scope::UnspecifiedScope => "Unspecified",
            lb::Scope::Region => "Region",
            lb::Scope::Zone => "Zone",
            lb::Scope::Subzone => "Subzone",
            lb::Scope::Node => "Node",
            lb::Scope::Cluster => "Cluster",
            lb::Scope::Network => "Network",
        };
        Self {
            routing_preferences: balancing.preference.iter().map(scope).collect(),
            mode: match balancing.mode {
                lb::Mode::UnspecifiedMode => "Standard",
                lb::Mode::Strict => "Strict",
                lb::Mode::Failover => "Failover",
                lb::Mode::Passthrough => "Passthrough",
            },
            health_policy: if balancing.unhealthy_too {
                "AllowAll"
            } else {
                "OnlyHealthy"
            },
        }
    }
}

impl<'a> PolicyView<'a> {
    fn new(policy: &'a Policy) -> Self {
        let rules = policy.rules.iter().map(|rule| {
            let clauses = rule.0.iter();
            clauses
                .map(|clause| clause.0.iter().map(MatchView::new).collect())
                .collect()
        });
        Self {
            name: &policy.name,
            namespace: &policy.namespace,
            scope: match policy.scope {
                Scope::Global => "Global",
                Scope::Namespace => "Namespace",
                Scope::Selector => "WorkloadSelector",
            },
            action: match policy.action {
                Action::Allow => "Allow",
                Action::Deny => "Deny",
            },
            rules: rules.collect(),
            dry_run: policy.dry_run,
        }
    }
}

impl<'a> MatchView<'a> {
    fn new(m: &'a Match) -> Self {
        let texts = |texts: &'a [Text]| texts.iter().map(TextView::new).collect();
        let nets = |nets: &[ipnet::IpNet]| nets.iter().map(ToString::to_string).collect();
        let accounts = |accounts: &'a [crate::policy::Account]| {
            let view = |account: &'a crate::policy::Account| AccountView {
                namespace: &account.namespace,
                service_account: &account.name,
            };
            accounts.iter().map(view).collect()
        };
        Self {
            namespaces: texts(&m.namespaces),
            not_namespaces: texts(&m.not_namespaces),
            principals: texts(m.published().0),
            not_principals: texts(m.published().1),
            service_accounts: accounts(&m.service_accounts),
            not_service_accounts: accounts(&m.not_service_accounts),
            source_ips: nets(&m.source_ips),
            not_source_ips: nets(&m.not_source_ips),
            destination_ips: nets(&m.destination_ips),
            not_destination_ips: nets(&m.not_destination_ips),
            destination_ports: &m.destination_ports,
            not_destination_ports: &m.not_destination_ports,
        }
    }
}

impl<'a> TextView<'a> {
    fn new(text: &'a Text) -> Self {
        match text {
            Text::Exact(text) => Self::Exact(text),
            Text::Prefix(text) => Self::Prefix(text),
            Text::Suffix(text) => Self::Suffix(text),
            Text::Presence => Self::Presence(),
        }
    }
}

fn ports(ports: &[PortMap]) -> BTreeMap<u16, u16> {
    ports.iter().map(|p| (p.service, p.target)).collect()
}

fn status(workload: &Workload) -> &'static str {
    if workload.healthy {
        "Healthy"
    } else {
        "Unhealthy"
    }
}

fn is_deployment(kind: &&str) -> bool {
    *kind == "deployment"
}
