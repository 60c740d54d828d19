//! The dump as istioctl reads it (facts ztunnel 13.1).

use serde_json::{Value, json};

use super::fixture::*;
use super::{AUTHORIZATION_TYPE, Store};
use crate::wire::security::string_match::MatchType;
use crate::wire::{security as pb, workload as wds};

fn dump(store: &Store, section: &str) -> Value {
    let bytes: Vec<u8> = store.dump(section).unwrap().flatten().collect();
    serde_json::from_slice(&bytes).unwrap()
}

#[test]
fn an_empty_section_is_an_empty_array_and_an_unknown_one_is_none() {
    for section in ["workloads", "services", "policies"] {
        assert_eq!(dump(&store(), section), json!([]));
    }
    assert!(store().dump("secrets").is_none());
}

#[test]
fn workloads_are_sorted_and_leave_defaults_out() {
    let web = service("shop", "web", "10.1.0.1");
    let mut full = member(pod("shop", "web", "10.0.0.2"), &web, &[]);
    full.canonical_name = "web".into();
    full.workload_type = wds::WorkloadType::Job as i32;
    full.authorization_policies = vec!["shop/p".into()];
    full.waypoint = Some(gateway_at("10.0.0.9", 15008));
    full.locality = Some(wds::Locality {
        region: "eu".into(),
        ..Default::default()
    });
    full.application_tunnel = Some(wds::ApplicationTunnel {
        protocol: 1,
        port: 99,
    });
    let mut bare = pod("shop", "api", "10.0.0.1");
    bare.tunnel_protocol = 0;
    let store = store();
    Push::addresses()
        .workload(full)
        .workload(bare)
        .accepted_by(&store);
    let expected = json!([
        {
            "workloadIps": ["10.0.0.1"], "protocol": "TCP", "networkMode": "Standard",
            "uid": "c//Pod/shop/api", "name": "api", "namespace": "shop",
            "trustDomain": "cluster.local", "serviceAccount": "api-sa", "network": "net",
            "node": "node-1", "status": "Healthy", "clusterId": "Kubernetes", "capacity": 1,
        },
        {
            "workloadIps": ["10.0.0.2"], "protocol": "HBONE", "networkMode": "Standard",
            "waypoint": {"destination": "net/10.0.0.9", "hboneMtlsPort": 15008},
            "uid": "c//Pod/shop/web", "name": "web", "namespace": "shop",
            "trustDomain": "cluster.local", "serviceAccount": "web-sa", "network": "net",
            "workloadType": "job", "canonicalName": "web", "node": "node-1",
            "applicationTunnel": {"protocol": "PROXY", "port": 99},
            "authorizationPolicies": ["shop/p"], "status": "Healthy", "clusterId": "Kubernetes",
            "locality": {"region": "eu"}, "services": ["shop/web.shop.svc.cluster.local"],
            "capacity": 1,
        },
    ]);
    assert_eq!(dump(&store, "workloads"), expected);
}

#[test]
fn endpoints_of_a_service_to_come_are_staged() {
    let web = service("shop", "web", "10.1.0.1");
    let store = store();
    assert_eq!(dump(&store, "stagedServices"), json!({}));
    let early = member(pod("shop", "web", "10.0.0.2"), &web, &[port(80, 8080)]);
    Push::addresses().workload(early).accepted_by(&store);
    let endpoint = json!({
        "workloadUid": "c//Pod/shop/web", "port": {"80": 8080}, "status": "Healthy",
    });
    assert_eq!(
        dump(&store, "stagedServices"),
        json!({"shop/web.shop.svc.cluster.local": {"c//Pod/shop/web": endpoint}})
    );
    Push::addresses().service(web).accepted_by(&store);
    assert_eq!(dump(&store, "stagedServices"), json!({}));
}

#[test]
fn services_show_their_endpoints() {
    let mut web = service("shop", "web", "10.1.0.1");
    web.load_balancing = Some(wds::LoadBalancing {
        routing_preference: vec![6, 1],
        mode: 2,
        health_policy: 1,
    });
    web.weighted_waypoints = vec![wds::WeightedWaypoint {
        destination: Some(gateway_named("infra", "wp")),
        weight: 3,
    }];
    web.addresses.push(wds::NetworkAddress {
        length: Some(24),
        ..vip_of("10.2.0.0")
    });
    let mut pod = member(pod("shop", "web", "10.0.0.1"), &web, &[port(80, 81)]);
    pod.status = 1;
    let store = store();
    Push::addresses()
        .service(web)
        .workload(pod)
        .accepted_by(&store);
    let expected = json!([{
        "name": "web", "namespace": "shop", "hostname": "web.shop.svc.cluster.local",
        "vips": ["net/10.1.0.1"], "cidrVips": [{"network": "net", "cidr": "10.2.0.0/24"}],
        "ports": {"80": 8080},
        "endpoints": {"c//Pod/shop/web": {
            "workloadUid": "c//Pod/shop/web", "port": {"80": 81}, "status": "Unhealthy",
        }},
        "subjectAltNames": [],
        "weightedWaypoints": [{
            "destination": {"destination": "infra/wp", "hboneMtlsPort": 15008}, "weight": 3,
        }],
        "loadBalancer": {
            "routingPreferences": ["Network", "Region"], "mode": "Failover",
            "healthPolicy": "AllowAll",
        },
        "canonical": false, "visibility": "Public",
    }]);
    assert_eq!(dump(&store, "services"), expected);
}

#[test]
fn policies_show_their_rules_and_rejected_ones_are_left_to_the_types() {
    let text = |kind| pb::StringMatch {
        match_type: Some(kind),
    };
    let matched = pb::Match {
        namespaces: vec![
            text(MatchType::Exact("a".into())),
            text(MatchType::Presence(())),
        ],
        not_principals: vec![text(MatchType::Prefix("b".into()))],
        source_ips: vec![pb::Address {
            address: ip("10.0.0.0"),
            length: 8,
        }],
        destination_ports: vec![80],
        service_accounts: vec![pb::ServiceAccountMatch {
            namespace: "n".into(),
            service_account: "s".into(),
        }],
        ..Default::default()
    };
    let clauses = vec![pb::Clause {
        matches: vec![matched],
    }];
    let policy = pb::Authorization {
        name: "p".into(),
        namespace: "shop".into(),
        scope: 2,
        action: 1,
        rules: vec![pb::Rule { clauses }],
        ..Default::default()
    };
    let store = store();
    Push::of(AUTHORIZATION_TYPE)
        .policy(policy)
        .bytes("shop/bad", "", vec![0xff])
        .to(&store);
    let expected = json!([{
        "name": "p", "namespace": "shop", "scope": "WorkloadSelector", "action": "Deny",
        "rules": [[[{
            "namespaces": [{"Exact": "a"}, {"Presence": []}],
            "notPrincipals": [{"Prefix": "b"}],
            "serviceAccounts": [{"namespace": "n", "serviceAccount": "s"}],
            "sourceIps": ["10.0.0.0/8"], "destinationPorts": [80],
        }]]],
        "dryRun": false,
    }]);
    assert_eq!(dump(&store, "policies"), expected);
}

#[test]
fn a_large_dump_comes_in_chunks() {
    let store = store();
    let pods = (0..2000).map(|n| {
        pod(
            "shop",
            &format!("p{n}"),
            &format!("10.0.{}.{}", n / 250, n % 250),
        )
    });
    pods.fold(Push::addresses(), Push::workload)
        .accepted_by(&store);
    let chunks: Vec<_> = store.dump("workloads").unwrap().collect();
    assert!(chunks.len() > 5);
    assert!(chunks.iter().all(|chunk| chunk.len() < 100_000));
    assert_eq!(dump(&store, "workloads").as_array().unwrap().len(), 2000);
}
