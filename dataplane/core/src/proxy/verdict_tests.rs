//! What is kept of refused and failed connections, and that an explanation agrees with them.

use std::time::Duration;

use super::testing::{Side, World, eventually, exchange, record};
use crate::explain::Known;
use crate::identity::Identity;
use crate::state::fixture::Push;
use crate::wire::security::string_match::MatchType;
use crate::wire::{control as pb, security};

fn explained(side: &Side, name: &str, destination: &str) -> pb::ExplainReply {
    let pod = pb::PodStatus {
        pod: Some(pb::Pod {
            uid: format!("uid-{name}"),
            name: name.into(),
            namespace: "shop".into(),
            service_account: format!("{name}-sa"),
        }),
        state: pb::pod_status::State::Up.into(),
        workload_uid: record(name).uid,
        ..Default::default()
    };
    let ask = pb::Explain {
        source: "shop/web".into(),
        destination: destination.into(),
    };
    let known = Known {
        snapshot: &side.shared.store.snapshot(),
        config: &side.shared.config,
        certificates: &side.shared.certs.status(),
        pods: &[pod],
    };
    known.explain(&ask).unwrap()
}

fn verdicts(side: &Side) -> Vec<pb::Verdict> {
    side.shared.telemetry.verdicts.list("", usize::MAX).0
}

#[tokio::test]
async fn a_denied_connection_is_kept_at_both_ends_and_at_one_with_its_rule() {
    let world = World::new();
    let _peers = world.db.echo("0.0.0.0:8080");
    let principal = |name: &str| security::Rule {
        clauses: vec![security::Clause {
            matches: vec![security::Match {
                principals: vec![security::StringMatch {
                    match_type: Some(MatchType::Suffix(name.into())),
                }],
                ..Default::default()
            }],
        }],
    };
    let deny = security::Authorization {
        name: "no-web".into(),
        namespace: "shop".into(),
        scope: security::Scope::Namespace as i32,
        action: security::Action::Deny as i32,
        rules: vec![principal("/nobody"), principal("/web-sa")],
        ..Default::default()
    };
    for side in [&world.web, &world.db] {
        let push = Push::policies().policy(deny.clone());
        push.accepted_by(&side.shared.store);
    }
    for _ in 0..3 {
        let stream = world.web.dial("10.77.0.2:8080").await.unwrap();
        exchange(stream, b"x").await.unwrap_err();
    }
    let ended = || verdicts(&world.web).iter().map(|v| v.count).sum::<u64>() == 3;
    eventually("all three have ended", ended).await;

    let at_db = &verdicts(&world.db)[..];
    let [kept] = at_db else {
        panic!("{at_db:#?}");
    };
    let who = (&*kept.src_workload, &*kept.dst_workload, &*kept.dst);
    assert_eq!(who, ("shop/web", "shop/db", "10.77.0.2:8080"));
    assert_eq!(
        kept.src_identity,
        "spiffe://cluster.local/ns/shop/sa/web-sa"
    );
    assert_eq!(
        (&*kept.policy, kept.rule, &*kept.flag),
        ("shop/no-web", 1, "DENY")
    );
    assert_eq!((kept.count, &*kept.pod_uid), (3, "uid-db"));
    assert!(kept.remedy.contains("change that rule"), "{kept:?}");
    let snapshot = world.db.shared.store.snapshot();
    let policy = snapshot.policies().get("shop/no-web").unwrap();
    assert_eq!(policy.hits().counts().0, 3);

    let at_web = &verdicts(&world.web)[0];
    assert!(
        at_web.cause.contains("401") && at_web.rule == -1,
        "{at_web:?}"
    );
    assert!(
        at_web
            .remedy
            .contains("underpass why on the destination's node")
    );

    for (side, name) in [(&world.web, "web"), (&world.db, "db")] {
        let told = explained(side, name, "10.77.0.2:8080");
        assert_eq!(told.verdict, format!("refused: {}", kept.cause));
        assert_eq!(told.remedy, kept.remedy);
    }
}

#[tokio::test]
async fn without_a_certificate_both_the_connection_and_the_explanation_say_why() {
    let world = World::new();
    let _peers = world.db.echo("0.0.0.0:8080");
    let told = explained(&world.web, "web", "10.77.0.2:8080");
    assert!(told.allowed, "{told:#?}");
    let stream = world.web.dial("10.77.0.2:8080").await.unwrap();
    assert_eq!(exchange(stream, b"x").await.unwrap(), b"x");

    let certs = &world.web.shared.certs;
    let identity = Identity::new("cluster.local", "shop", "web-sa");
    certs.retain(&identity);
    certs.release(&identity);
    certs.retain(&identity);
    certs.fail(&identity, "the CA said 403");
    let stream = world.web.dial("10.77.0.2:8080").await.unwrap();
    exchange(stream, b"x").await.unwrap_err();
    eventually("it is kept", || !verdicts(&world.web).is_empty()).await;
    let kept = &verdicts(&world.web)[0];
    assert_eq!(kept.flag, "IDENTITY_ERROR");
    let told = explained(&world.web, "web", "10.77.0.2:8080");
    assert!(!told.allowed, "{told:#?}");
    for text in [&kept.cause, &told.verdict] {
        assert!(text.contains("the CA said 403"), "{text}");
    }
}

#[tokio::test]
async fn an_early_refusal_names_the_ends_by_their_addresses() {
    let world = World::new();
    let limits = crate::config::Limits {
        workload_wait: Duration::from_millis(50),
        ..Default::default()
    };
    world.db.shared.limits.store(limits.into());
    let leaves = Push::addresses().removed(&record("db").uid);
    leaves.accepted_by(&world.db.shared.store);
    let stream = world.web.dial("10.77.0.2:8080").await.unwrap();
    exchange(stream, b"x").await.unwrap_err();
    eventually("it is kept", || !verdicts(&world.db).is_empty()).await;
    let kept = &verdicts(&world.db)[0];
    assert_eq!(kept.flag, "UNKNOWN_OWN_WORKLOAD");
    assert_eq!(
        (&*kept.src_workload, &*kept.pod_uid),
        ("shop/web", "uid-db")
    );
    assert!(
        kept.src.starts_with("10.77.0.1:") && kept.dst == "10.77.0.2:15008",
        "{kept:?}"
    );
    assert!(kept.remedy.contains("control plane"), "{kept:?}");
}
