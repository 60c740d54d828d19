//! What each name leads to (facts ztunnel 9.2, 9.3, 17.3 `src/dns/server.rs`), asked over UDP and
//! TCP of a pod in namespace ns1.

use hickory_proto::op::{Message, OpCode, ResponseCode};
use hickory_proto::rr::RecordType::{self, A, AAAA, SRV};

use super::testing::*;
use crate::state::fixture::{Push, ip, member, pod, port, service, vip_of};
use crate::wire::workload as wds;

/// What the nameserver says to everything.
const RELAYED: &str = "203.0.113.9";

fn host(namespace: &str, hostname: &str, vips: &[&str]) -> wds::Service {
    wds::Service {
        name: hostname.split('.').next().unwrap().into(),
        hostname: hostname.into(),
        addresses: vips.iter().map(|vip| vip_of(vip)).collect(),
        ..service(namespace, "any", "10.0.0.1")
    }
}

fn headless(namespace: &str, name: &str) -> wds::Service {
    host(
        namespace,
        &format!("{name}.{namespace}.svc.cluster.local"),
        &[],
    )
}

/// The whole mesh of this file.
fn mesh() -> Push {
    let elsewhere = |address: &str| wds::NetworkAddress {
        network: "other".into(),
        ..vip_of(address)
    };
    let range = |address: &str| wds::NetworkAddress {
        length: Some(24),
        ..vip_of(address)
    };
    let both = ["10.1.0.5", "fd10::5"];
    let with = |mut s: wds::Service, change: &dyn Fn(&mut wds::Service)| {
        change(&mut s);
        s
    };
    let cluster =
        |n: &str, ns: &str, vips: &[&str]| host(ns, &format!("{n}.{ns}.svc.cluster.local"), vips);
    let db = headless("ns1", "db");
    let endpoint = |name: &str, addresses: &[&str]| wds::Workload {
        addresses: addresses.iter().map(|a| ip(a)).collect(),
        ..member(pod("ns1", name, "10.3.0.1"), &db, &[port(80, 5432)])
    };
    let private = |s: wds::Service| with(s, &|s| s.visibility = 1);
    let canonical = |s: wds::Service| with(s, &|s| s.canonical = true);
    Push::addresses()
        .workload(pod("ns1", "web", "10.99.0.1"))
        .service(cluster("prod", "ns1", &["10.1.0.1"]))
        .service(cluster("prod", "ns2", &["10.1.0.2"]))
        .service(cluster("details", "ns2", &["10.1.0.3", "10.1.0.4"]))
        .service(cluster("both", "ns1", &both))
        .service(with(cluster("only4", "ns1", &both), &|s| s.ip_families = 1))
        .service(with(cluster("only6", "ns1", &both), &|s| s.ip_families = 2))
        .service(with(cluster("dual", "ns1", &both), &|s| s.ip_families = 3))
        .service(with(cluster("far", "ns1", &[]), &|s| {
            s.addresses = vec![elsewhere("10.1.0.6"), vip_of("10.1.0.7")]
        }))
        .service(with(cluster("remote", "ns1", &[]), &|s| {
            s.addresses = vec![elsewhere("10.1.0.6")]
        }))
        .service(private(cluster("hidden", "ns2", &["10.1.0.8"])))
        .service(private(cluster("own", "ns1", &["10.1.0.9"])))
        .service(host("ns1", "www.google.com", &["10.2.0.1"]))
        .service(host("ns1", "*.wild.com", &["10.2.0.2"]))
        .service(host("ns1", "*.deep.wild.com", &["10.2.0.3"]))
        .service(host("ns1", "exact.wild.com", &["10.2.0.4"]))
        .service(host("ns1", "*.farm.svc.cluster.local", &["10.2.0.5"]))
        .service(host("ns1", "no-address.com", &[]))
        .service(with(host("ns1", "range.com", &[]), &|s| {
            s.addresses = vec![range("10.5.0.0")]
        }))
        .service(host("ns1", "MiXed.com", &["10.2.0.6"]))
        .service(host("ns2", "shared.com", &["10.2.1.2"]))
        .service(host("preferred", "shared.com", &["10.2.1.3"]))
        .service(host("ns3", "shared.com", &["10.2.1.4"]))
        .service(host("preferred", "canonical.com", &["10.2.2.1"]))
        .service(canonical(host("ns2", "canonical.com", &["10.2.2.2"])))
        .service(host("ns2", "home.com", &["10.2.3.1"]))
        .service(canonical(host("ns3", "home.com", &["10.2.3.2"])))
        .service(host("ns1", "home.com", &["10.2.3.3"]))
        .service(private(host("ns2", "half.com", &["10.2.4.1"])))
        .service(host("ns3", "half.com", &["10.2.4.2"]))
        .service(host("ns1", "nowhere.svc.cluster.local", &[]))
        .service(db.clone())
        .service(headless("ns1", "empty"))
        .workload(endpoint("db-0", &["10.3.0.1", "fd30::1"]))
        .workload(endpoint("db-1", &["10.3.0.2"]))
        .workload(wds::Workload {
            status: wds::WorkloadStatus::Unhealthy as i32,
            ..endpoint("db-2", &["10.3.0.3"])
        })
        .workload(wds::Workload {
            network: "other".into(),
            ..endpoint("db-3", &["10.3.0.4"])
        })
        .workload(wds::Workload {
            hostname: "vm.corp".into(),
            ..pod("ns2", "vm", "10.4.0.1")
        })
        .workload(wds::Workload {
            hostname: "nohost.corp".into(),
            addresses: vec![],
            ..pod("ns2", "nohost", "10.4.0.2")
        })
}

fn world(change: impl FnOnce(&mut crate::wire::control::InstanceConfig)) -> World {
    let mut raw = raw(&["10.99.0.1"]);
    change(&mut raw);
    let world = World::new(&raw, mesh());
    world.nameserver("10.99.0.1:53", |query, _| {
        Some(reply(query, 0, [1, 0, 0], &a_record([203, 0, 113, 9], 0)))
    });
    world
}

/// Both transports must say the same.
async fn ask(world: &World, name: &str, kind: RecordType) -> String {
    let query = with_payload(question(name, kind), 4096);
    let packet = query.to_vec().unwrap();
    let udp = world.udp(&packet).await;
    let tcp = world.tcp(&packet).await;
    assert_eq!(shown(&udp), shown(&tcp), "{name}: UDP and TCP differ");
    let answer = Message::from_vec(&udp).unwrap();
    let case = format!("{name} {kind}");
    assert_eq!(answer.metadata.id, query.metadata.id, "{case}");
    assert_eq!(answer.queries, query.queries, "{case}");
    if !shown(&udp).contains(RELAYED) {
        assert!(answer.metadata.authoritative, "{case}");
        assert!(answer.metadata.recursion_available, "{case}");
        assert_eq!(
            answer.metadata.response_code,
            ResponseCode::NoError,
            "{case}"
        );
        assert!(answer.answers.iter().all(|r| r.ttl == 30), "{case}");
        let edns = answer.edns.as_ref().expect("EDNS is echoed");
        assert!(
            edns.flags().dnssec_ok && edns.max_payload() == 4096,
            "{case}"
        );
    }
    shown(&udp)
}

/// What is answered, without the names of the records; those are in tests of their own.
async fn addresses(world: &World, name: &str, kind: RecordType) -> String {
    let answer = ask(world, name, kind).await;
    let address = |part: &str| part.rsplit(' ').next().unwrap().to_owned();
    let parts = answer.split(", ").filter(|part| !part.contains(" -> "));
    parts.map(address).collect::<Vec<_>>().join(" ")
}

#[tokio::test]
async fn every_name_leads_where_the_mesh_says() {
    let world = world(|_| {});
    let cases = [
        // Kubernetes' short forms.
        ("prod", A, "10.1.0.1"),
        ("prod.ns1", A, "10.1.0.1"),
        ("prod.ns2", A, "10.1.0.2"),
        ("prod.ns1.svc", A, "10.1.0.1"),
        ("prod.ns2.svc", A, "10.1.0.2"),
        ("prod.ns2.svc.cluster.local", A, "10.1.0.2"),
        ("PROD.Ns2.svc.CLUSTER.local", A, "10.1.0.2"),
        ("details", A, RELAYED),
        ("details.ns2", A, "10.1.0.3 10.1.0.4"),
        ("details.ns2.svc.cluster.local.extra", A, RELAYED),
        // Lengthened by a search domain.
        ("prod.ns1.svc.cluster.local", A, "10.1.0.1"),
        ("prod.ns2.ns1.svc.cluster.local", A, "10.1.0.2"),
        ("prod.ns2.svc.ns1.svc.cluster.local", A, "10.1.0.2"),
        (
            "prod.ns2.svc.cluster.local.ns1.svc.cluster.local",
            A,
            "10.1.0.2",
        ),
        ("www.google.com.ns1.svc.cluster.local", A, "10.2.0.1"),
        ("www.google.com.svc.cluster.local", A, "10.2.0.1"),
        ("www.google.com.cluster.local", A, "10.2.0.1"),
        ("www.google.com", A, "10.2.0.1"),
        ("www.bing.com", A, RELAYED),
        ("mixed.COM", A, "10.2.0.6"),
        // Wildcards, the most specific first, none ahead of an exact name.
        ("any.wild.com", A, "10.2.0.2"),
        ("a.b.wild.com", A, "10.2.0.2"),
        ("a.deep.wild.com", A, "10.2.0.3"),
        ("exact.wild.com", A, "10.2.0.4"),
        ("wild.com", A, RELAYED),
        ("unknown.farm.svc.cluster.local", A, "10.2.0.5"),
        ("unknown.ns1.svc.cluster.local", A, RELAYED),
        // Networks and families.
        ("far", A, "10.1.0.7"),
        ("remote", A, "NoError"),
        ("both", A, "10.1.0.5"),
        ("both", AAAA, "fd10::5"),
        ("only4", A, "10.1.0.5"),
        ("only4", AAAA, "NoError"),
        ("only6", A, "NoError"),
        ("only6", AAAA, "fd10::5"),
        ("dual", A, "10.1.0.5"),
        ("dual", AAAA, "fd10::5"),
        ("prod", AAAA, "NoError"),
        // Without an address of their own.
        ("db", A, "10.3.0.1 10.3.0.2 10.3.0.4"),
        ("db", AAAA, "fd30::1"),
        ("empty", A, "NoError"),
        ("no-address.com", A, RELAYED),
        ("range.com", A, RELAYED),
        // Who may see what, and who comes first.
        ("hidden.ns2", A, RELAYED),
        ("own", A, "10.1.0.9"),
        ("shared.com", A, "10.2.1.3"),
        ("canonical.com", A, "10.2.2.2"),
        ("home.com", A, "10.2.3.3"),
        ("half.com", A, "10.2.4.2"),
        // Single pods.
        ("db-0.db", A, "10.3.0.1"),
        ("db-0.db.ns1", A, "10.3.0.1"),
        ("db-0.db.ns1.svc.cluster.local", AAAA, "fd30::1"),
        ("db-1.db.ns1.svc.cluster.local", AAAA, "NoError"),
        (
            "db-0.db.ns1.svc.cluster.local.ns1.svc.cluster.local",
            A,
            "10.3.0.1",
        ),
        ("vm.corp", A, "10.4.0.1"),
        ("nohost.corp", A, RELAYED),
        // Not for us.
        ("prod", RecordType::TXT, RELAYED),
        ("prod", RecordType::HTTPS, RELAYED),
    ];
    for (name, kind, expected) in cases {
        let answer = addresses(&world, name, kind).await;
        assert_eq!(answer, expected, "{name} {kind}");
    }
}

#[tokio::test]
async fn a_stripped_search_domain_shows_as_an_alias_and_nothing_else_does() {
    let world = world(|_| {});
    let stripped = ask(&world, "www.google.com.ns1.svc.cluster.local", A).await;
    let expected = "www.google.com.ns1.svc.cluster.local. -> www.google.com., \
        www.google.com. 10.2.0.1";
    assert_eq!(stripped, expected);
    let full = ask(&world, "prod.ns2", A).await;
    assert_eq!(full, "prod.ns2. 10.1.0.2");
    let wild = ask(&world, "x.wild.com", A).await;
    assert_eq!(wild, "x.wild.com. 10.2.0.2");
}

#[tokio::test]
async fn an_exact_name_of_a_later_candidate_goes_before_a_wildcard_of_an_earlier_one() {
    let world = world(|_| {});
    // It matches what the client's resolver made of the name.
    let wildcard = host("ns1", "*.ns1.svc.cluster.local", &["10.2.0.7"]);
    Push::addresses()
        .service(wildcard)
        .accepted_by(&world.shared.store);
    let name = "www.google.com.ns1.svc.cluster.local";
    assert_eq!(addresses(&world, name, A).await, "10.2.0.1");
    let name = "www.bing.com.ns1.svc.cluster.local";
    assert_eq!(addresses(&world, name, A).await, "10.2.0.7");
}

#[tokio::test]
async fn a_pods_own_search_list_replaces_kubernetes_usual_one() {
    let world = world(|_| {});
    let resolv = super::Resolv {
        nameservers: vec![addr("10.99.0.1:53")],
        search: vec!["corp.example".into()],
    };
    world.proxy.configure_dns(Some(resolv));
    assert_eq!(addresses(&world, "prod.corp.example", A).await, "10.1.0.1");
    assert_eq!(
        addresses(&world, "www.google.com.cluster.local", A).await,
        RELAYED
    );
    world.proxy.configure_dns(None);
    assert_eq!(
        addresses(&world, "www.google.com.cluster.local", A).await,
        "10.2.0.1"
    );
}

#[tokio::test]
async fn without_ipv6_a_known_name_has_no_ipv6_address() {
    let world = world(|raw| raw.ipv6_disabled = true);
    assert_eq!(addresses(&world, "both", AAAA).await, "NoError");
    assert_eq!(addresses(&world, "both", A).await, "10.1.0.5");
}

#[tokio::test]
async fn a_client_of_ipv6_is_answered_alike() {
    let world = world(|_| {});
    let packet = question("prod", A).to_vec().unwrap();
    let answer = world.udp_from("[::1]:0", "[::1]:15053", &packet).await;
    assert_eq!(shown(&answer), "prod. 10.1.0.1");
}

#[tokio::test]
async fn services_have_srv_by_port_number_and_names_of_ports_are_relayed() {
    let world = world(|_| {});
    let name = "_80._tcp.prod.ns1.svc.cluster.local";
    let answer = world.udp(&question(name, SRV).to_vec().unwrap()).await;
    assert_eq!(
        shown(&answer),
        format!("{name}. 80 prod.ns1.svc.cluster.local.")
    );
    let more = Message::from_vec(&answer).unwrap().additionals;
    assert_eq!(more[0].data.ip_addr(), Some("10.1.0.1".parse().unwrap()));
    let endpoints = ask(&world, "_80._tcp.db", SRV).await;
    let expected = ["db-0", "db-1", "db-3"]
        .map(|pod| format!("_80._tcp.db. 5432 {pod}.db.ns1.svc.cluster.local."));
    assert_eq!(endpoints, expected.join(", "));
    for relayed in [
        "_http._tcp.prod.ns1.svc.cluster.local",
        "_81._tcp.prod.ns1.svc.cluster.local",
        "_80._udp.prod.ns1.svc.cluster.local",
        "_80._tcp.www.google.com",
    ] {
        assert!(
            ask(&world, relayed, SRV).await.contains(RELAYED),
            "{relayed}"
        );
    }
}

#[tokio::test]
async fn a_large_answer_is_cut_for_udp_and_whole_over_tcp() {
    let large = headless("ns1", "large");
    let mut push = mesh().service(large.clone());
    for n in 0..200 {
        let pod = pod("ns1", &format!("large-{n}"), &format!("10.9.0.{n}"));
        push = push.workload(member(pod, &large, &[]));
    }
    let world = World::new(&raw(&[]), push);
    let query = question("large", A);
    let packet = query.to_vec().unwrap();
    let udp = world.udp(&packet).await;
    assert!(udp.len() <= 512, "{}", udp.len());
    let cut = Message::from_vec(&udp).unwrap();
    assert!(cut.metadata.truncation && cut.answers.len() > 10, "{cut}");
    let whole = Message::from_vec(&world.tcp(&packet).await).unwrap();
    assert!(!whole.metadata.truncation);
    assert_eq!(whole.answers.len(), 200);
    let roomy = with_payload(query, 4096).to_vec().unwrap();
    let whole = Message::from_vec(&world.udp(&roomy).await).unwrap();
    assert_eq!(
        (whole.answers.len(), whole.metadata.truncation),
        (200, false)
    );
}

#[tokio::test]
async fn what_is_no_query_is_refused_and_answers_are_shuffled() {
    let world = world(|_| {});
    let mut notify = question("prod", A);
    notify.metadata.op_code = OpCode::Notify;
    let code = |answer: Vec<u8>| Message::from_vec(&answer).unwrap().metadata.response_code;
    let packet = notify.to_vec().unwrap();
    assert_eq!(code(world.udp(&packet).await), ResponseCode::NotImp);
    let response = question("prod", A).into_response().to_vec().unwrap();
    assert_eq!(code(world.tcp(&response).await), ResponseCode::FormErr);
    let mut first = std::collections::HashSet::new();
    for _ in 0..64 {
        let answer = world
            .udp(&question("details.ns2", A).to_vec().unwrap())
            .await;
        let answer = Message::from_vec(&answer).unwrap();
        first.insert(answer.answers[0].data.ip_addr());
    }
    assert_eq!(first.len(), 2);
}

#[tokio::test]
async fn a_pod_that_the_control_plane_does_not_know_is_told_servfail() {
    let world = World::new(
        &raw(&[]),
        Push::addresses().service(service("ns1", "prod", "10.1.0.1")),
    );
    let limits = crate::config::Limits {
        workload_wait: std::time::Duration::from_millis(50),
        ..Default::default()
    };
    world.shared.limits.store(limits.into());
    let answer = world.udp(&question("prod", A).to_vec().unwrap()).await;
    assert_eq!(shown(&answer), "ServFail");
    assert!(
        world
            .metrics()
            .contains("reason=\"unknown_own_workload\"} 1")
    );
    // The record comes while a question waits for it.
    let patient = crate::config::Limits::default();
    world.shared.limits.store(patient.into());
    let packet = question("prod", A).to_vec().unwrap();
    let (answer, ()) = tokio::join!(world.udp(&packet), async {
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        let own = Push::addresses().workload(pod("ns1", "web", "10.99.0.1"));
        own.accepted_by(&world.shared.store);
    });
    assert_eq!(shown(&answer), "prod. 10.1.0.1");
}
