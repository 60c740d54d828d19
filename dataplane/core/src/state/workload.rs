//! A WDS workload record, parsed.

use std::net::IpAddr;
use std::ops::Deref;
use std::sync::Arc;

use smallvec::SmallVec;

use super::gateway::Gateway;
use super::intern::Interner;
use super::parse::{Bad, ip, port};
use super::service::{Membership, PortMap};
use super::version::Version;
use crate::identity::Identity;
use crate::wire::workload as wds;

/// What is a workload's own; the rest, which the replicas of one Deployment have in common, is read
/// through `Deref` and held once: 100 000 workloads in a third of the memory.
#[derive(Debug, PartialEq, Eq)]
pub struct Workload {
    pub uid: Arc<str>,
    pub name: Arc<str>,
    pub node: Arc<str>,
    pub addresses: SmallVec<[IpAddr; 2]>,
    pub locality: Arc<Locality>,
    pub healthy: bool,
    pub(super) version: Version,
    common: Arc<Common>,
}

#[derive(Debug, PartialEq, Eq, Hash)]
pub struct Common {
    pub namespace: Arc<str>,
    pub service_account: Arc<str>,
    pub trust_domain: Arc<str>,
    pub cluster_id: Arc<str>,
    pub canonical_name: Arc<str>,
    pub canonical_revision: Arc<str>,
    pub workload_name: Arc<str>,
    /// Lower case: deployment, cronjob, pod, job.
    pub workload_type: &'static str,
    pub network: Arc<str>,
    pub hostname: Arc<str>,
    pub hbone: bool,
    pub native_tunnel: bool,
    /// Its address is the node's and doesn't lead to it.
    pub host_network: bool,
    /// Policy resource names this workload lists.
    pub authorization_policies: Arc<[Arc<str>]>,
    pub services: Arc<[Membership]>,
    pub waypoint: Option<Gateway>,
    pub network_gateway: Option<Gateway>,
    pub application_tunnel: Option<ApplicationTunnel>,
    /// Weight among the endpoints of a service.
    pub capacity: u32,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Locality {
    pub region: Arc<str>,
    pub zone: Arc<str>,
    pub subzone: Arc<str>,
}

/// How the application wants to receive tunnelled traffic (facts ztunnel 3.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ApplicationTunnel {
    /// A PROXY protocol header precedes the bytes.
    pub proxy: bool,
    /// None leaves the port as it was resolved.
    pub port: Option<u16>,
}

impl Workload {
    pub fn identity(&self) -> Identity {
        Identity::new(
            self.trust_domain.clone(),
            self.namespace.clone(),
            self.service_account.clone(),
        )
    }

    pub fn has_identity(&self, identity: &Identity) -> bool {
        identity.trust_domain() == &*self.trust_domain
            && identity.namespace() == &*self.namespace
            && identity.service_account() == &*self.service_account
    }

    /// This workload as an endpoint of the service `namespace/hostname`.
    pub fn membership(&self, service: &str) -> Option<&Membership> {
        self.services.iter().find(|m| &*m.service == service)
    }

    /// Who owns an address that several claim: the highest wins (facts ztunnel 2.7).
    pub(super) fn claim(&self) -> u8 {
        let pod = self.uid.contains("//Pod/");
        u8::from(pod) * 2 + u8::from(self.hbone)
    }

    /// `trust_domain` is the mesh's, for records that name none.
    pub(super) fn parse(
        raw: &wds::Workload,
        version: Version,
        trust_domain: &str,
        interner: &mut Interner,
    ) -> Result<Self, Bad> {
        if raw.uid.is_empty() {
            return Err(Bad::new("uid", "it is empty"));
        }
        let common = Common::parse(raw, trust_domain, interner)?;
        let mut addresses = SmallVec::new();
        for bytes in &raw.addresses {
            let address = ip("addresses", bytes)?;
            if !addresses.contains(&address) {
                addresses.push(address);
            }
        }
        addresses.shrink_to_fit();
        let locality = raw.locality.as_ref();
        let locality = Locality {
            region: interner.text(locality.map_or("", |l| &l.region)),
            zone: interner.text(locality.map_or("", |l| &l.zone)),
            subzone: interner.text(locality.map_or("", |l| &l.subzone)),
        };
        Ok(Self {
            uid: raw.uid.as_str().into(),
            name: raw.name.as_str().into(),
            node: interner.text(&raw.node),
            addresses,
            locality: interner.localities.owned(locality),
            healthy: match raw.status {
                0 => true,
                1 => false,
                other => return Err(Bad::unknown("status", other)),
            },
            version,
            common: interner.commons.owned(common),
        })
    }
}

impl Deref for Workload {
    type Target = Common;

    fn deref(&self) -> &Common {
        &self.common
    }
}

impl Common {
    fn parse(
        raw: &wds::Workload,
        trust_domain: &str,
        interner: &mut Interner,
    ) -> Result<Self, Bad> {
        let policies: Vec<_> = raw
            .authorization_policies
            .iter()
            .map(|name| interner.text(name))
            .collect();
        let gateway = |field, raw: &Option<_>, interner: &mut _| {
            raw.as_ref()
                .map(|raw| Gateway::parse(field, raw, interner))
                .transpose()
        };
        Ok(Self {
            namespace: interner.text(&raw.namespace),
            service_account: interner.text_or(&raw.service_account, "default"),
            trust_domain: interner.text_or(&raw.trust_domain, trust_domain),
            cluster_id: interner.text_or(&raw.cluster_id, "Kubernetes"),
            canonical_name: interner.text(&raw.canonical_name),
            canonical_revision: interner.text(&raw.canonical_revision),
            workload_name: interner.text(&raw.workload_name),
            workload_type: match raw.workload_type {
                1 => "cronjob",
                2 => "pod",
                3 => "job",
                _ => "deployment",
            },
            network: interner.text(&raw.network),
            hostname: interner.text(&raw.hostname),
            hbone: match wds::TunnelProtocol::try_from(raw.tunnel_protocol) {
                Ok(wds::TunnelProtocol::None) => false,
                Ok(wds::TunnelProtocol::Hbone) => true,
                Ok(wds::TunnelProtocol::LegacyIstioMtls) => {
                    return Err(Bad::new(
                        "tunnel_protocol",
                        "LEGACY_ISTIO_MTLS is not supported",
                    ));
                }
                Err(_) => return Err(Bad::unknown("tunnel_protocol", raw.tunnel_protocol)),
            },
            native_tunnel: raw.native_tunnel,
            host_network: match raw.network_mode {
                0 => false,
                1 => true,
                other => return Err(Bad::unknown("network_mode", other)),
            },
            authorization_policies: interner.names.borrowed(&policies),
            services: memberships(raw, interner)?,
            waypoint: gateway("waypoint", &raw.waypoint, interner)?,
            network_gateway: gateway("network_gateway", &raw.network_gateway, interner)?,
            application_tunnel: raw.application_tunnel.map(tunnel).transpose()?,
            capacity: raw.capacity.unwrap_or(1),
        })
    }
}

fn memberships(raw: &wds::Workload, interner: &mut Interner) -> Result<Arc<[Membership]>, Bad> {
    let mut memberships = Vec::with_capacity(raw.services.len());
    for (key, list) in &raw.services {
        if !key.contains('/') {
            let text = format!("`{key}` is not of the form namespace/hostname");
            return Err(Bad::new("services", text));
        }
        let ports = PortMap::parse_all("services", &list.ports)?;
        memberships.push(Membership {
            service: interner.text(key),
            ports: interner.ports.borrowed(&ports),
        });
    }
    Ok(interner.memberships.borrowed(&memberships))
}

fn tunnel(raw: wds::ApplicationTunnel) -> Result<ApplicationTunnel, Bad> {
    let number = port("application_tunnel.port", raw.port)?;
    Ok(ApplicationTunnel {
        proxy: match raw.protocol {
            0 => false,
            1 => true,
            other => return Err(Bad::unknown("application_tunnel.protocol", other)),
        },
        port: (number != 0).then_some(number),
    })
}
