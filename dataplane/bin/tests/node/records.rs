//! What a control plane would push.

use std::net::IpAddr;

use bytes::Bytes;
use prost::Message;
use underpass_core::wire::{discovery, security, workload as wds};

const ADDRESS: &str = "type.googleapis.com/istio.workload.Address";
const AUTHORIZATION: &str = "type.googleapis.com/istio.security.Authorization";

pub fn identity(account: &str) -> String {
    format!("spiffe://cluster.local/ns/shop/sa/{account}")
}

/// A healthy HBONE pod in namespace `shop`.
pub fn pod(node: &str, name: &str, account: &str, addresses: &[&str]) -> wds::Workload {
    wds::Workload {
        uid: format!("Kubernetes//Pod/shop/{name}"),
        name: name.into(),
        namespace: "shop".into(),
        service_account: account.into(),
        addresses: addresses.iter().map(|address| octets(address)).collect(),
        network: "net".into(),
        node: node.into(),
        tunnel_protocol: wds::TunnelProtocol::Hbone.into(),
        ..Default::default()
    }
}

pub fn workloads(all: &[wds::Workload]) -> Bytes {
    let named = all.iter().map(|workload| {
        let r#type = Some(wds::address::Type::Workload(workload.clone()));
        let bytes = wds::Address { r#type }.encode_to_vec();
        (workload.uid.clone(), bytes)
    });
    response(ADDRESS, named)
}

/// Refuses one account everywhere.
pub fn deny(name: &str, account: &str) -> security::Authorization {
    let principal = format!("cluster.local/ns/shop/sa/{account}");
    let matches = vec![security::Match {
        principals: vec![security::StringMatch {
            match_type: Some(security::string_match::MatchType::Exact(principal)),
        }],
        ..Default::default()
    }];
    security::Authorization {
        name: name.into(),
        namespace: "shop".into(),
        scope: security::Scope::Namespace.into(),
        action: security::Action::Deny.into(),
        rules: vec![security::Rule {
            clauses: vec![security::Clause { matches }],
        }],
        ..Default::default()
    }
}

pub fn policies(all: &[security::Authorization]) -> Bytes {
    let named = all.iter().map(|policy| {
        let name = format!("{}/{}", policy.namespace, policy.name);
        (name, policy.encode_to_vec())
    });
    response(AUTHORIZATION, named)
}

fn response(type_url: &str, named: impl Iterator<Item = (String, Vec<u8>)>) -> Bytes {
    let resource = |(name, value)| discovery::Resource {
        name,
        version: "1".into(),
        resource: Some(prost_types::Any {
            type_url: type_url.into(),
            value,
        }),
        ..Default::default()
    };
    let response = discovery::DeltaDiscoveryResponse {
        type_url: type_url.into(),
        nonce: "n".into(),
        resources: named.map(resource).collect(),
        ..Default::default()
    };
    response.encode_to_vec().into()
}

fn octets(address: &str) -> Bytes {
    match address.parse().expect("an address") {
        IpAddr::V4(v4) => v4.octets().to_vec().into(),
        IpAddr::V6(v6) => v6.octets().to_vec().into(),
    }
}
