//! What is said of policies agrees with what they decide, and names what a person must look at.

use proptest::prelude::*;

use super::{Action, DenyReason, Examined, Finding, Subject, Verdict, decide, examine};
use crate::identity::Identity;
use crate::state::Store;
use crate::state::fixture::*;
use crate::wire::security as pb;
use crate::wire::security::string_match::MatchType;
use crate::wire::workload as wds;

fn text(kind: MatchType) -> pb::StringMatch {
    pb::StringMatch {
        match_type: Some(kind),
    }
}

fn exact(value: &str) -> pb::StringMatch {
    text(MatchType::Exact(value.into()))
}

fn rule(clauses: Vec<Vec<pb::Match>>) -> pb::Rule {
    let clauses = clauses.into_iter().map(|matches| pb::Clause { matches });
    pb::Rule {
        clauses: clauses.collect(),
    }
}

fn teller() -> Subject {
    Subject {
        identity: Some(Identity::new("td", "bank", "teller")),
        source: "10.0.0.2".parse().unwrap(),
        dst: addr("10.0.0.1:80"),
    }
}

/// Why the only rule of an ALLOW policy doesn't match.
fn difference(clauses: Vec<Vec<pb::Match>>, subject: &Subject) -> String {
    let policy = pb::Authorization {
        name: "p".into(),
        namespace: "shop".into(),
        rules: vec![rule(clauses)],
        ..Default::default()
    };
    let store = store();
    let web = pod("shop", "web", "10.0.0.1");
    Push::addresses().workload(web).accepted_by(&store);
    Push::policies().policy(policy).accepted_by(&store);
    let snapshot = store.snapshot();
    let examined = examine(&snapshot, &uid_of(&snapshot, "shop", "web"), subject);
    match &examined[..] {
        [
            Examined {
                finding: Finding::Differs(why),
                ..
            },
        ] => why.join("\n"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_difference_names_rule_field_wanted_and_actual_value() {
    let principals = pb::Match {
        principals: vec![
            exact("td/ns/shop/sa/web"),
            text(MatchType::Suffix("/x".into())),
        ],
        ..Default::default()
    };
    let said = difference(vec![vec![principals.clone()]], &teller());
    let wanted = "rule 0: principals [td/ns/shop/sa/web, */x] don't include td/ns/bank/sa/teller";
    assert_eq!(said, wanted);

    let plain = Subject {
        identity: None,
        ..teller()
    };
    let said = difference(vec![vec![principals]], &plain);
    assert!(
        said.ends_with("don't include a connection without identity"),
        "{said}"
    );
}

#[test]
fn of_several_clauses_the_first_that_fails_is_told_with_all_its_alternatives() {
    let holds = pb::Match {
        destination_ports: vec![80],
        ..Default::default()
    };
    let port = pb::Match {
        destination_ports: vec![1, 2, 3, 4, 5, 6],
        ..Default::default()
    };
    let excluded = pb::Match {
        not_namespaces: vec![exact("bank")],
        ..Default::default()
    };
    let empty = pb::Match::default();
    let said = difference(vec![vec![holds], vec![port, excluded, empty]], &teller());
    let wanted = "rule 0: ports [1, 2, 3, 4, 2 more] don't include 80; nor excluded: not \
                  namespaces [bank] includes bank; nor an empty condition never holds";
    assert_eq!(said, wanted);
}

#[test]
fn hits_outlive_versions_and_go_with_the_policy() {
    let store = store();
    let policy = |rules| pb::Authorization {
        name: "p".into(),
        namespace: "shop".into(),
        rules,
        ..Default::default()
    };
    let counts = || {
        let snapshot = store.snapshot();
        snapshot
            .policies()
            .get("shop/p")
            .map(|p| p.hits().counts().0)
    };
    Push::policies().policy(policy(vec![])).accepted_by(&store);
    store
        .snapshot()
        .policies()
        .get("shop/p")
        .unwrap()
        .hits()
        .decided();
    let newer = policy(vec![rule(vec![])]);
    Push::policies().policy(newer.clone()).accepted_by(&store);
    assert_eq!(counts(), Some(1));
    Push::policies().removed("shop/p").to(&store);
    Push::policies().policy(newer).accepted_by(&store);
    assert_eq!(counts(), Some(0));
}

#[derive(Clone, Debug)]
pub struct Drawn {
    policy: pb::Authorization,
    listed: bool,
    arrives: bool,
    broken: bool,
}

pub fn drawn() -> impl Strategy<Value = Vec<Drawn>> {
    let field = || {
        let names = proptest::sample::select(vec!["bank", "shop"]);
        (names, any::<bool>(), proptest::option::of(79u32..82)).prop_map(|(name, not, port)| {
            let mut field = pb::Match {
                destination_ports: port.into_iter().collect(),
                ..Default::default()
            };
            match not {
                true => field.not_namespaces.push(exact(name)),
                false => field.namespaces.push(exact(name)),
            }
            field
        })
    };
    let clause = || proptest::collection::vec(field(), 0..3);
    let rule = proptest::collection::vec(clause(), 0..3).prop_map(rule);
    let flags = (any::<bool>(), any::<bool>(), 0..8, 0..8);
    let one = (0..3, 0..2, proptest::collection::vec(rule, 0..3), flags);
    let one = one.prop_map(
        |(scope, action, rules, (listed, dry_run, lost, bad))| Drawn {
            policy: pb::Authorization {
                namespace: "shop".into(),
                scope,
                action,
                rules,
                dry_run,
                ..Default::default()
            },
            listed,
            arrives: lost > 0,
            broken: bad == 0,
        },
    );
    proptest::collection::vec(one, 0..6)
}

/// Pushes them, and returns the workload that lists those that are listed.
pub fn pushed(drawn: &[Drawn], mut web: wds::Workload, store: &Store) -> wds::Workload {
    for (index, drawn) in drawn.iter().enumerate() {
        let mut policy = drawn.policy.clone();
        policy.name = format!("p{index}");
        let name = format!("shop/p{index}");
        if drawn.listed {
            web.authorization_policies.push(name);
        }
        if drawn.broken {
            let matches = vec![pb::Match {
                namespaces: vec![pb::StringMatch { match_type: None }],
                ..Default::default()
            }];
            let clauses = vec![pb::Clause { matches }];
            policy.rules = vec![pb::Rule { clauses }];
        }
        if drawn.arrives {
            Push::policies().policy(policy).to(store);
        }
    }
    web
}

/// The verdict that follows from what is said of each policy.
fn concluded(examined: &[Examined]) -> Verdict {
    let real = || examined.iter().filter(|e| !e.dry_run);
    let matching = |action| {
        real().find_map(|e| match (e.action, &e.finding) {
            (Some(a), Finding::Matches(rule)) if a == action => Some((e.policy.clone(), *rule)),
            _ => None,
        })
    };
    let with = |finding: Finding| real().find(|e| e.finding == finding);
    if let Some((policy, rule)) = matching(Action::Deny) {
        return Verdict::Deny(DenyReason::Explicit { policy, rule });
    }
    if let Some(bad) = with(Finding::Malformed) {
        return Verdict::Deny(DenyReason::Malformed(bad.policy.clone()));
    }
    if let Some(lost) = with(Finding::NotArrived) {
        return Verdict::Deny(DenyReason::NotArrived(lost.policy.clone()));
    }
    let allowing = matching(Action::Allow).map(|(policy, _)| policy);
    match real().any(|e| e.action == Some(Action::Allow)) && allowing.is_none() {
        true => Verdict::Deny(DenyReason::NotAllowed),
        false => Verdict::Allow { by: allowing },
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn what_is_said_of_each_policy_leads_to_the_verdict(
        drawn in drawn(),
        plaintext in any::<bool>(),
    ) {
        let store = store();
        let web = pushed(&drawn, pod("shop", "web", "10.0.0.1"), &store);
        Push::addresses().workload(web).accepted_by(&store);
        let snapshot = store.snapshot();
        let web = uid_of(&snapshot, "shop", "web");
        let subject = Subject {
            identity: teller().identity.filter(|_| !plaintext),
            ..teller()
        };
        let examined = examine(&snapshot, &web, &subject);
        prop_assert_eq!(concluded(&examined), decide(&snapshot, &web, &subject).verdict);
        for (at, one) in examined.iter().enumerate() {
            prop_assert!(examined[..at].iter().all(|other| other.policy != one.policy));
        }
    }
}
