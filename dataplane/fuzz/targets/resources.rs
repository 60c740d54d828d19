//! What a control plane sends: delta responses as raw bytes, and single resources under the name
//! that they claim. Whatever is accepted must route, dump and survive its own removal.
#![no_main]

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use prost::Message;
use underpass_core::config::Config;
use underpass_core::state::{ADDRESS_TYPE, AUTHORIZATION_TYPE, Store, resolve};
use underpass_core::wire::{control, discovery, security, workload as wds};

fuzz_target!(|data: &[u8]| {
    let Some((kind, body)) = data.split_first() else {
        return;
    };
    let config = config();
    let store = Store::new(config.clone());
    // Somebody must be there to send from.
    push(&store, ADDRESS_TYPE, &[client()]);
    match kind % 4 {
        0 => drop(store.apply(Bytes::copy_from_slice(body))),
        1 => push(
            &store,
            AUTHORIZATION_TYPE,
            &[(policy_name(body), body.to_vec())],
        ),
        _ => push(&store, ADDRESS_TYPE, &addresses(body)),
    }
    check_routes(&store, &config);
    check_dump(&store);
    check_removal(&store);
});

fn config() -> Arc<Config> {
    let raw = control::InstanceConfig {
        node: "n".into(),
        ..Default::default()
    };
    Arc::new(Config::parse(&raw).expect("a node is all that is needed"))
}

fn client() -> (String, Vec<u8>) {
    let workload = wds::Workload {
        uid: "client".into(),
        name: "client".into(),
        namespace: "ns".into(),
        addresses: vec![vec![10, 0, 0, 1].into()],
        node: "n".into(),
        ..Default::default()
    };
    named(wds::address::Type::Workload(workload))
}

/// Several, each after its length: one byte, so that small inputs hold many.
fn addresses(mut body: &[u8]) -> Vec<(String, Vec<u8>)> {
    let mut found = Vec::new();
    while let Some((length, rest)) = body.split_first() {
        let (one, rest) = rest.split_at(rest.len().min(*length as usize));
        body = rest;
        match wds::Address::decode(one).map(|address| address.r#type) {
            Ok(Some(address)) => found.push(named(address)),
            _ => found.push(("broken".into(), one.to_vec())),
        }
    }
    found
}

fn named(address: wds::address::Type) -> (String, Vec<u8>) {
    let name = match &address {
        wds::address::Type::Workload(workload) => workload.uid.clone(),
        wds::address::Type::Service(service) => {
            format!("{}/{}", service.namespace, service.hostname)
        }
    };
    (
        name,
        wds::Address {
            r#type: Some(address),
        }
        .encode_to_vec(),
    )
}

fn policy_name(body: &[u8]) -> String {
    let policy = security::Authorization::decode(body).unwrap_or_default();
    format!("{}/{}", policy.namespace, policy.name)
}

fn push(store: &Store, type_url: &str, resources: &[(String, Vec<u8>)]) {
    let resource = |(name, value): &(String, Vec<u8>)| discovery::Resource {
        name: name.clone(),
        version: "1".into(),
        resource: Some(prost_types(type_url, value)),
        ..Default::default()
    };
    let response = discovery::DeltaDiscoveryResponse {
        type_url: type_url.into(),
        resources: resources.iter().map(resource).collect(),
        ..Default::default()
    };
    let applied = store.apply(response.encode_to_vec().into());
    let applied = applied.expect("the response itself is well formed");
    let answered = applied.accepted as usize + applied.rejected.len();
    assert_eq!(answered, resources.len(), "each is accepted or rejected");
}

fn prost_types(type_url: &str, value: &[u8]) -> prost_types::Any {
    prost_types::Any {
        type_url: type_url.into(),
        value: value.to_vec(),
    }
}

fn check_routes(store: &Store, config: &Config) {
    let snapshot = store.snapshot();
    let Some(source) = snapshot.workload_by_uid("client") else {
        return;
    };
    let types = store.types();
    let names = types
        .iter()
        .flat_map(|state| &state.versions)
        .map(|(name, _)| name);
    let known = names.filter_map(|name| snapshot.workload_by_uid(name));
    let mut targets: Vec<IpAddr> = known.flat_map(|w| w.addresses.to_vec()).take(8).collect();
    targets.push(Ipv4Addr::new(10, 1, 0, 1).into());
    for ip in targets {
        for port in [0, 80, 15008] {
            let dst = SocketAddr::new(ip, port);
            let client = IpAddr::from([10, 0, 0, 1]);
            drop(resolve::outbound(
                &snapshot,
                config,
                &source,
                client,
                dst,
                &[],
            ));
            let authority = resolve::Authority::Ip(dst);
            let local = SocketAddr::from(([10, 0, 0, 1], 15008));
            drop(resolve::inbound(
                &snapshot, config, &source, local, &authority, None,
            ));
        }
    }
}

fn check_dump(store: &Store) {
    for section in ["workloads", "services", "policies"] {
        let chunks = store.dump(section).expect("a section of the dump");
        let text: Vec<u8> = chunks.flatten().collect();
        let read: Result<serde_json::Value, _> = serde_json::from_slice(&text);
        assert!(
            read.is_ok(),
            "{section} is no JSON: {}",
            String::from_utf8_lossy(&text)
        );
    }
}

/// Nothing stays of what is removed by the names that the store itself tells.
fn check_removal(store: &Store) {
    for state in store.types() {
        let names: Vec<String> = state
            .versions
            .iter()
            .map(|(name, _)| name.clone())
            .collect();
        let response = discovery::DeltaDiscoveryResponse {
            type_url: state.type_url.to_string(),
            removed_resources: names,
            ..Default::default()
        };
        store
            .apply(response.encode_to_vec().into())
            .expect("well formed");
    }
    for state in store.types() {
        assert_eq!(
            state.versions.len(),
            0,
            "{} keeps what was removed",
            state.type_url
        );
    }
}
