//! What is explained: steps, verdicts and remedies, case by case.

use std::time::{Duration, SystemTime};

use proptest::prelude::*;

use super::{Known, Unclear};
use crate::identity::Identity;
use crate::policy::examine_test::{drawn, pushed};
use crate::policy::{Subject, Verdict, decide};
use crate::state::Store;
use crate::state::fixture::*;
use crate::tls::CertStatus;
use crate::wire::control::explain_reply::step::Outcome;
use crate::wire::security;
use crate::wire::{control as pb, workload as wds};

/// `shop/client` at 10.0.0.100 is a pod of this node with a certificate; so is `shop/web` at
/// 10.0.0.1, the endpoint of service `shop/web` at 10.1.0.1:80. `shop/far` is on another node,
/// `shop/legacy` outside the mesh.
struct World {
    store: std::sync::Arc<Store>,
    pods: Vec<pb::PodStatus>,
    certificates: Vec<CertStatus>,
}

fn certificate(account: &str, valid: Option<(i64, i64)>, error: &str) -> CertStatus {
    let now = SystemTime::now();
    let at = |seconds: i64| match seconds < 0 {
        true => now - Duration::from_secs(seconds.unsigned_abs()),
        false => now + Duration::from_secs(seconds.unsigned_abs()),
    };
    CertStatus {
        identity: Identity::new("cluster.local", "shop", account),
        not_before: valid.map(|(from, _)| at(from)),
        not_after: valid.map(|(_, until)| at(until)),
        serial: String::new(),
        error: error.into(),
    }
}

fn status(name: &str) -> pb::PodStatus {
    pb::PodStatus {
        pod: Some(pb::Pod {
            uid: format!("uid-{name}"),
            name: name.into(),
            namespace: "shop".into(),
            service_account: format!("{name}-sa"),
        }),
        state: pb::pod_status::State::Up.into(),
        workload_uid: format!("c//Pod/shop/{name}"),
        ..Default::default()
    }
}

impl World {
    fn new() -> Self {
        let store = store();
        let web = service("shop", "web", "10.1.0.1");
        let endpoint = member(pod("shop", "web", "10.0.0.1"), &web, &[]);
        let mut far = pod("shop", "far", "10.0.0.2");
        far.node = "node-2".into();
        let mut legacy = pod("shop", "legacy", "10.0.0.3");
        legacy.tunnel_protocol = 0;
        Push::addresses()
            .service(web)
            .workload(endpoint)
            .workload(pod("shop", "client", "10.0.0.100"))
            .workload(far)
            .workload(legacy)
            .accepted_by(&store);
        let day = Some((-3600, 86_399));
        Self {
            store,
            pods: vec![status("client"), status("web")],
            certificates: vec![
                certificate("client-sa", day, ""),
                certificate("web-sa", day, ""),
            ],
        }
    }

    fn push(self, push: Push) -> Self {
        push.to(&self.store);
        self
    }

    fn ask(&self, source: &str, destination: &str) -> Result<pb::ExplainReply, Unclear> {
        let ask = pb::Explain {
            source: source.into(),
            destination: destination.into(),
        };
        let snapshot = self.store.snapshot();
        let known = Known {
            snapshot: &snapshot,
            config: &config(),
            certificates: &self.certificates,
            pods: &self.pods,
        };
        known.explain(&ask)
    }

    fn explain(&self, destination: &str) -> pb::ExplainReply {
        self.ask("uid-client", destination).unwrap()
    }
}

/// Names of the steps of an outcome.
fn steps(reply: &pb::ExplainReply, outcome: Outcome) -> Vec<&str> {
    let steps = reply.steps.iter().filter(|step| step.outcome() == outcome);
    steps.map(|step| &*step.name).collect()
}

fn allowed(reply: &pb::ExplainReply, names: &[&str]) {
    assert!(
        reply.allowed && reply.verdict.starts_with("allowed: "),
        "{reply:#?}"
    );
    assert_eq!(steps(reply, Outcome::Ok), names);
    assert_eq!(reply.steps.len(), names.len(), "{reply:#?}");
    assert_eq!(reply.remedy, "");
}

fn refused(reply: &pb::ExplainReply, step: &str, parts: &[&str]) {
    assert!(
        !reply.allowed && reply.verdict.starts_with("refused: "),
        "{reply:#?}"
    );
    assert_eq!(steps(reply, Outcome::Refused), [step], "{reply:#?}");
    for part in parts {
        let told = [&reply.verdict, &reply.remedy]
            .iter()
            .any(|t| t.contains(part));
        assert!(
            told || format!("{:?}", reply.steps).contains(part),
            "{part} in {reply:#?}"
        );
    }
}

fn unknown(reply: &pb::ExplainReply, names: &[&str]) {
    assert!(
        reply.allowed && reply.verdict.contains("unknown: "),
        "{reply:#?}"
    );
    assert_eq!(steps(reply, Outcome::Unknown), names, "{reply:#?}");
}

fn policy(name: &str, action: security::Action, rules: Vec<security::Rule>) -> Push {
    Push::policies().policy(security::Authorization {
        name: name.into(),
        namespace: "shop".into(),
        scope: security::Scope::Namespace as i32,
        action: action as i32,
        rules,
        ..Default::default()
    })
}

fn port_is(port: u32) -> security::Rule {
    let matches = vec![security::Match {
        destination_ports: vec![port],
        ..Default::default()
    }];
    security::Rule {
        clauses: vec![security::Clause { matches }],
    }
}

#[test]
fn a_service_leads_through_endpoint_certificates_and_tunnel_to_the_policies() {
    let names = [
        "name",
        "service",
        "endpoint",
        "certificate",
        "tunnel",
        "destination",
        "certificate",
        "policy",
    ];
    let world = World::new();
    for (dialled, from) in [
        ("web.shop.svc.cluster.local:80", 0),
        ("WEB:80", 0),
        ("web.shop:80", 0),
        ("10.1.0.1:80", 1),
        ("10.0.0.1:8080", 2),
    ] {
        let reply = world.explain(dialled);
        let mut expected = vec!["source"];
        expected.extend(&names[from..]);
        allowed(&reply, &expected);
        assert!(
            reply
                .verdict
                .contains("mutual TLS to shop/web (10.0.0.1:8080)"),
            "{reply:?}"
        );
    }
}

#[test]
fn a_source_is_found_by_uid_of_pod_or_workload_by_its_name_and_by_its_namespaced_name() {
    let world = World::new();
    for source in ["uid-client", "c//Pod/shop/client", "client", "shop/client"] {
        let reply = world.ask(source, "10.0.0.1:8080").unwrap();
        assert_eq!(reply.steps[0].subject, "shop/client");
        assert!(reply.allowed);
    }
    let unclear = world.ask("nobody", "10.0.0.1:80").unwrap_err();
    assert_eq!(unclear, Unclear::NoSource("nobody".into()));
    let twin = pod("bank", "far", "10.0.0.50");
    let world = world.push(Push::addresses().workload(twin));
    let unclear = world.ask("far", "10.0.0.1:80").unwrap_err();
    let text = unclear.to_string();
    assert!(text.contains("c//Pod/bank/far, c//Pod/shop/far"), "{text}");
    for bad in [
        "web",
        "10.0.0.1",
        "10.0.0.1:0",
        ":80",
        "web:http",
        "we b:80",
        "web:99999",
    ] {
        let unclear = world.ask("client", bad).unwrap_err();
        assert_eq!(unclear, Unclear::Destination(bad.into()));
    }
}

#[test]
fn policies_refuse_with_the_rule_or_with_what_keeps_each_from_matching() {
    use security::Action::{Allow, Deny};
    let deny = policy("no-8080", Deny, vec![port_is(1), port_is(8080)]);
    let reply = World::new().push(deny).explain("10.0.0.1:8080");
    let rule = "its rule 1 matches";
    refused(
        &reply,
        "policy",
        &["denied by: shop/no-8080", rule, "change that rule"],
    );

    let allow = policy("only-90", Allow, vec![port_is(90)]);
    let world = World::new().push(allow);
    let why = "rule 0: ports [90] don't include 8080";
    refused(
        &world.explain("10.0.0.1:8080"),
        "policy",
        &["none allowed", why, "add a rule"],
    );
    assert!(world.explain("10.0.0.1:90").allowed);

    let mut lists = pod("shop", "web", "10.0.0.1");
    lists.authorization_policies = vec!["shop/absent".into()];
    let world = World::new().push(Push::addresses().workload(lists));
    refused(
        &world.explain("10.0.0.1:8080"),
        "policy",
        &["shop/absent", "not arrived"],
    );
}

#[test]
fn a_dry_run_policy_is_told_and_refuses_nothing() {
    let trial = security::Authorization {
        name: "trial".into(),
        namespace: "shop".into(),
        scope: security::Scope::Namespace as i32,
        action: security::Action::Deny as i32,
        dry_run: true,
        rules: vec![port_is(8080)],
        ..Default::default()
    };
    let world = World::new().push(Push::policies().policy(trial));
    let reply = world.explain("10.0.0.1:8080");
    assert!(reply.allowed && reply.verdict.starts_with("allowed"));
    assert_eq!(steps(&reply, Outcome::DryRun), ["policy"]);
    assert!(
        reply
            .steps
            .last()
            .unwrap()
            .text
            .starts_with("would deny, in dry-run")
    );
}

#[test]
fn a_service_without_the_port_or_an_endpoint_says_what_it_has() {
    let world = World::new();
    let parts = [
        "doesn't declare port 81 (but ports 80)",
        "it has 1 endpoints",
    ];
    refused(&world.explain("10.1.0.1:81"), "endpoint", &parts);
    let mut ill = member(
        pod("shop", "web", "10.0.0.1"),
        &service("shop", "web", "10.1.0.1"),
        &[],
    );
    ill.status = 1;
    let world = world.push(Push::addresses().workload(ill));
    refused(
        &world.explain("10.1.0.1:80"),
        "endpoint",
        &["1 endpoints, 1 of them unhealthy"],
    );
    let empty = service("shop", "empty", "10.1.0.2");
    let world = world.push(Push::addresses().service(empty));
    refused(
        &world.explain("empty:80"),
        "endpoint",
        &["it has 0 endpoints", "underpass services"],
    );
}

#[test]
fn where_endpoints_differ_the_choice_is_unknown_and_where_all_refuse_it_is_refused() {
    let web = service("shop", "web", "10.1.0.1");
    let second = |listed: &[&str]| {
        let mut pod = member(pod("shop", "web-2", "10.0.0.5"), &web, &[]);
        pod.authorization_policies = listed.iter().map(ToString::to_string).collect();
        Push::addresses().workload(pod)
    };
    let mut world = World::new().push(second(&[]));
    world.pods.push(status("web-2"));
    world
        .certificates
        .push(certificate("web-2-sa", Some((-3600, 86_399)), ""));
    let stable = |world: &World| {
        let first = world.explain("10.1.0.1:80");
        for _ in 0..20 {
            assert_eq!(world.explain("10.1.0.1:80"), first, "however the dice fall");
        }
        first
    };
    let reply = stable(&world);
    assert!(reply.verdict.starts_with("allowed") && reply.verdict.contains("shop/web "));
    let world = world.push(second(&["shop/absent"]));
    let reply = stable(&world);
    unknown(&reply, &["endpoint"]);
    assert!(reply.verdict.contains("one of 2 endpoints") && reply.verdict.contains("shop/absent"));
    let deny = policy("no-8080", security::Action::Deny, vec![port_is(8080)]);
    let reply = stable(&world.push(deny));
    refused(&reply, "policy", &["shop/no-8080"]);
}

#[test]
fn a_certificate_that_is_missing_expired_or_failed_decides() {
    let mut world = World::new();
    world.certificates[0] = certificate("client-sa", Some((-7200, -60)), "CA away");
    let parts = ["expired and not renewed: CA away", "underpass certificates"];
    refused(&world.explain("10.0.0.1:8080"), "certificate", &parts);
    world.certificates[0] = certificate("client-sa", None, "the CA said 403");
    refused(
        &world.explain("10.0.0.1:8080"),
        "certificate",
        &["there is none: the CA said 403"],
    );
    world.certificates[0] = certificate("client-sa", Some((60, 7200)), "");
    refused(&world.explain("10.0.0.1:8080"), "certificate", &["clock"]);
    world.certificates.clear();
    unknown(
        &world.explain("10.0.0.1:8080"),
        &["certificate", "certificate"],
    );
    // None is needed where nothing is encrypted.
    assert!(world.explain("10.0.0.3:80").verdict.starts_with("allowed"));
}

#[test]
fn what_another_node_knows_is_unknown_and_what_it_decides_is_told() {
    let world = World::new();
    let reply = world.ask("shop/far", "10.0.0.1:8080").unwrap();
    unknown(&reply, &["source", "certificate"]);
    allowed(
        &world.explain("10.0.0.2:80"),
        &[
            "source",
            "endpoint",
            "certificate",
            "tunnel",
            "destination",
            "policy",
        ],
    );
    let deny = policy("no-80", security::Action::Deny, vec![port_is(80)]);
    let world = world.push(deny);
    refused(
        &world.explain("10.0.0.2:80"),
        "policy",
        &["shop/no-80", "node node-2"],
    );
    let reply = world.ask("shop/far", "10.0.0.1:80").unwrap();
    refused(&reply, "policy", &["shop/no-80"]);
}

#[test]
fn a_pod_outside_the_mesh_has_no_identity() {
    let world = World::new();
    let reply = world.ask("legacy", "10.0.0.1:8080").unwrap();
    allowed(&reply, &["source", "endpoint", "destination", "policy"]);
    assert!(reply.verdict.contains("in clear to shop/web"));
    let clauses = vec![security::Clause {
        matches: vec![security::Match {
            not_principals: vec![security::StringMatch {
                match_type: Some(security::string_match::MatchType::Presence(())),
            }],
            ..Default::default()
        }],
    }];
    let strict = policy(
        "strict",
        security::Action::Deny,
        vec![security::Rule { clauses }],
    );
    let world = world.push(strict);
    let reply = world.ask("legacy", "10.0.0.1:8080").unwrap();
    refused(&reply, "policy", &["shop/strict"]);
    assert!(world.explain("10.0.0.1:8080").allowed);
    let reply = world.ask("legacy", "10.1.0.1:80").unwrap();
    unknown(&reply, &["service"]);
}

#[test]
fn an_unknown_address_is_passed_through_unless_only_known_ones_are_allowed() {
    let mut world = World::new();
    allowed(&world.explain("1.2.3.4:443"), &["source", "destination"]);
    unknown(&world.explain("example.com:443"), &["name"]);
    let demand = |on: pb::Enforcement| pb::PodSettings {
        registry_only: on.into(),
        ..Default::default()
    };
    world.pods[0].settings = Some(demand(pb::Enforcement::DryRun));
    let reply = world.explain("1.2.3.4:443");
    assert!(reply.allowed && steps(&reply, Outcome::DryRun) == ["registry_only"]);
    world.pods[0].settings = Some(demand(pb::Enforcement::On));
    refused(
        &world.explain("1.2.3.4:443"),
        "registry_only",
        &["1.2.3.4:443", "registryOnly"],
    );
    assert!(world.explain("10.1.0.1:80").allowed);
}

#[test]
fn a_waypoint_that_is_required_refuses_what_comes_without_it() {
    let mut world = World::new();
    let demand = |on: pb::Enforcement| pb::PodSettings {
        waypoint_required: on.into(),
        ..Default::default()
    };
    world.pods[1].settings = Some(demand(pb::Enforcement::DryRun));
    let reply = world.explain("10.0.0.1:8080");
    assert!(reply.allowed && steps(&reply, Outcome::DryRun) == ["waypoint_required"]);
    world.pods[1].settings = Some(demand(pb::Enforcement::On));
    refused(
        &world.explain("10.0.0.1:8080"),
        "waypoint_required",
        &["has no waypoint"],
    );
}

#[test]
fn what_a_waypoint_decides_is_unknown_and_a_missing_one_refuses() {
    let mut web = service("shop", "web", "10.1.0.1");
    web.waypoint = Some(gateway_named("infra", "wp.infra.svc.cluster.local"));
    let world = World::new().push(Push::addresses().service(web));
    refused(
        &world.explain("10.1.0.1:80"),
        "waypoint",
        &["wp.infra", "deploy the waypoint"],
    );
    let mut gateway = service("infra", "wp", "10.1.0.9");
    gateway.ports = vec![port(15008, 15008)];
    let waypoint = member(pod("infra", "wp", "10.0.0.9"), &gateway, &[]);
    let world = world.push(Push::addresses().service(gateway).workload(waypoint));
    let reply = world.explain("10.1.0.1:80");
    unknown(&reply, &["waypoint"]);
    assert!(
        reply.verdict.contains("through the waypoint infra/wp"),
        "{reply:?}"
    );
}

#[test]
fn what_is_not_captured_is_said() {
    let mut world = World::new();
    world.pods.truncate(1);
    refused(
        &world.explain("10.0.0.1:8080"),
        "destination",
        &["doesn't have the pod"],
    );
    let reply = world.ask("shop/web", "10.0.0.3:80").unwrap();
    unknown(&reply, &["source"]);
    allowed(&world.explain("127.0.0.1:80"), &["source", "destination"]);
    refused(
        &world.explain("127.0.0.1:15001"),
        "destination",
        &["listener of the proxy itself"],
    );
    let gone = Push::addresses().removed("c//Pod/shop/client");
    let world = world.push(gone);
    refused(
        &world.explain("10.0.0.3:80"),
        "source",
        &["own workload", "control plane"],
    );
}

#[test]
fn records_that_contradict_each_other_are_refused_at_the_destination() {
    let reserved = wds::Port {
        service_port: 80,
        target_port: 15008,
        app_protocol: 0,
    };
    let web = service("shop", "web", "10.1.0.1");
    let endpoint = member(pod("shop", "web", "10.0.0.1"), &web, &[reserved]);
    let world = World::new().push(Push::addresses().workload(endpoint));
    refused(
        &world.explain("10.1.0.1:80"),
        "inbound",
        &["listener of the proxy itself"],
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn the_verdict_is_that_of_the_decision(drawn in drawn(), plaintext in any::<bool>()) {
        let world = World::new();
        let web = pushed(&drawn, pod("shop", "web", "10.0.0.1"), &world.store);
        let world = world.push(Push::addresses().workload(web));
        let (source, account, from) = match plaintext {
            true => ("legacy", None, "10.0.0.3"),
            false => ("client", Some("client-sa"), "10.0.0.100"),
        };
        let subject = Subject {
            identity: account.map(|account| Identity::new("cluster.local", "shop", account)),
            source: from.parse().unwrap(),
            dst: addr("10.0.0.1:80"),
        };
        let snapshot = world.store.snapshot();
        let decision = decide(&snapshot, &uid_of(&snapshot, "shop", "web"), &subject);
        let reply = world.ask(source, "10.0.0.1:80").unwrap();
        let refusals = steps(&reply, Outcome::Refused);
        match decision.verdict {
            Verdict::Allow { .. } => {
                prop_assert!(reply.allowed, "{:#?}", reply);
                prop_assert!(refusals.is_empty());
            }
            Verdict::Deny(reason) => {
                prop_assert!(!reply.allowed && !refusals.is_empty());
                prop_assert_eq!(reply.verdict, format!("refused: {reason}"));
                prop_assert_eq!(reply.remedy, reason.remedy());
            }
        }
    }
}
