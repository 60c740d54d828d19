//! Records and pushes for tests, with the fewest fields that make them valid.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use bytes::Bytes;
use prost::Message;

use super::{ADDRESS_TYPE, AUTHORIZATION_TYPE, Applied, Snapshot, Store, Workload};
use crate::config::Config;
use crate::wire::workload::GatewayAddress;
use crate::wire::workload::gateway_address::Destination;
use crate::wire::{control, discovery, security, workload as wds};

/// One push, then as many as the test wants.
pub struct Push(discovery::DeltaDiscoveryResponse);

pub fn config() -> Arc<Config> {
    let raw = control::InstanceConfig {
        node: "node-1".into(),
        network: "net".into(),
        ..Default::default()
    };
    Arc::new(Config::parse(&raw).unwrap())
}

pub fn store() -> Arc<Store> {
    Store::new(config())
}

pub fn snapshot_of(push: Push) -> Arc<Snapshot> {
    let store = store();
    push.accepted_by(&store);
    store.snapshot()
}

/// A healthy HBONE pod of this node and network with one address.
pub fn pod(namespace: &str, name: &str, address: &str) -> wds::Workload {
    wds::Workload {
        uid: format!("c//Pod/{namespace}/{name}"),
        name: name.into(),
        namespace: namespace.into(),
        service_account: format!("{name}-sa"),
        addresses: vec![ip(address)],
        network: "net".into(),
        node: "node-1".into(),
        tunnel_protocol: wds::TunnelProtocol::Hbone as i32,
        ..Default::default()
    }
}

/// A service with port 80 at target 8080.
pub fn service(namespace: &str, name: &str, vip: &str) -> wds::Service {
    wds::Service {
        name: name.into(),
        namespace: namespace.into(),
        hostname: format!("{name}.{namespace}.svc.cluster.local"),
        addresses: vec![vip_of(vip)],
        ports: vec![port(80, 8080)],
        ..Default::default()
    }
}

pub fn key(service: &wds::Service) -> String {
    format!("{}/{}", service.namespace, service.hostname)
}

/// Makes the workload an endpoint of the service, with its own port mappings.
pub fn member(mut w: wds::Workload, service: &wds::Service, ports: &[wds::Port]) -> wds::Workload {
    let ports = ports.to_vec();
    w.services.insert(key(service), wds::PortList { ports });
    w
}

pub fn port(service_port: u32, target_port: u32) -> wds::Port {
    wds::Port {
        service_port,
        target_port,
        app_protocol: 0,
    }
}

pub fn vip_of(address: &str) -> wds::NetworkAddress {
    wds::NetworkAddress {
        network: "net".into(),
        address: ip(address),
        length: None,
    }
}

pub fn gateway_at(address: &str, hbone_mtls_port: u32) -> GatewayAddress {
    GatewayAddress {
        destination: Some(Destination::Address(vip_of(address))),
        hbone_mtls_port,
    }
}

pub fn gateway_named(namespace: &str, hostname: &str) -> GatewayAddress {
    GatewayAddress {
        destination: Some(Destination::Hostname(wds::NamespacedHostname {
            namespace: namespace.into(),
            hostname: hostname.into(),
        })),
        hbone_mtls_port: 15008,
    }
}

pub fn ip(text: &str) -> Bytes {
    match text.parse().unwrap() {
        IpAddr::V4(v4) => v4.octets().to_vec().into(),
        IpAddr::V6(v6) => v6.octets().to_vec().into(),
    }
}

pub fn addr(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

pub fn uid_of(snapshot: &Snapshot, namespace: &str, name: &str) -> Arc<Workload> {
    let uid = format!("c//Pod/{namespace}/{name}");
    snapshot
        .workload_by_uid(&uid)
        .expect("the test pushed this pod")
}

impl Push {
    pub fn addresses() -> Self {
        Self::of(ADDRESS_TYPE)
    }

    pub fn policies() -> Self {
        Self::of(AUTHORIZATION_TYPE)
    }

    pub fn of(type_url: &str) -> Self {
        Self(discovery::DeltaDiscoveryResponse {
            type_url: type_url.into(),
            nonce: "nonce".into(),
            ..Default::default()
        })
    }

    pub fn workload(self, workload: wds::Workload) -> Self {
        let name = workload.uid.clone();
        let r#type = Some(wds::address::Type::Workload(workload));
        self.raw(&name, "1", &wds::Address { r#type })
    }

    pub fn service(self, service: wds::Service) -> Self {
        let name = key(&service);
        let r#type = Some(wds::address::Type::Service(service));
        self.raw(&name, "1", &wds::Address { r#type })
    }

    pub fn policy(self, policy: security::Authorization) -> Self {
        let name = format!("{}/{}", policy.namespace, policy.name);
        self.raw(&name, "", &policy)
    }

    pub fn raw(self, name: &str, version: &str, body: &impl Message) -> Self {
        self.bytes(name, version, body.encode_to_vec())
    }

    pub fn bytes(mut self, name: &str, version: &str, value: Vec<u8>) -> Self {
        self.0.resources.push(discovery::Resource {
            name: name.into(),
            version: version.into(),
            resource: Some(prost_types::Any {
                type_url: self.0.type_url.clone(),
                value,
            }),
            ..Default::default()
        });
        self
    }

    /// Another name of the last resource.
    pub fn alias(mut self, alias: &str) -> Self {
        let last = self.0.resources.last_mut();
        last.expect("an alias follows a resource")
            .aliases
            .push(alias.into());
        self
    }

    pub fn removed(mut self, name: &str) -> Self {
        self.0.removed_resources.push(name.into());
        self
    }

    pub fn to(self, store: &Store) -> Applied {
        let bytes = self.0.encode_to_vec();
        store
            .apply(bytes.into())
            .expect("it was serialised a line ago")
    }

    pub fn accepted_by(self, store: &Store) {
        let applied = self.to(store);
        assert_eq!(applied.rejected, []);
    }
}
