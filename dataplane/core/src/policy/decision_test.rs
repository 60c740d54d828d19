//! Which policies apply, in which order they decide, and what denies because it isn't known.

use super::{Decision, DenyReason, Subject, Verdict, decide};
use crate::identity::Identity;
use crate::state::Store;
use crate::state::fixture::*;
use crate::wire::security::string_match::MatchType;
use crate::wire::security::{self as pb, Action, Scope};

const SELECTED: &[&str] = &["shop/selected"];

fn policy(name: &str, scope: Scope, action: Action) -> pb::Authorization {
    let (namespace, name) = name.split_once('/').unwrap();
    pb::Authorization {
        name: name.into(),
        namespace: namespace.into(),
        scope: scope as i32,
        action: action as i32,
        ..Default::default()
    }
}

/// Matches everything.
fn all(mut policy: pb::Authorization) -> pb::Authorization {
    policy.rules = vec![pb::Rule::default()];
    policy
}

/// Matches callers of the namespace `bank`.
fn bank(mut policy: pb::Authorization) -> pb::Authorization {
    let match_type = Some(MatchType::Exact("bank".into()));
    let namespaces = vec![pb::StringMatch { match_type }];
    let matches = vec![pb::Match {
        namespaces,
        ..Default::default()
    }];
    let clauses = vec![pb::Clause { matches }];
    policy.rules = vec![pb::Rule { clauses }];
    policy
}

fn dry(mut policy: pb::Authorization) -> pb::Authorization {
    policy.dry_run = true;
    policy
}

/// Can't be read: an untyped string match.
fn broken(policy: pb::Authorization) -> pb::Authorization {
    let mut policy = bank(policy);
    policy.rules[0].clauses[0].matches[0].namespaces[0].match_type = None;
    policy
}

/// `shop/web` lists these and is called by `bank/teller`.
fn store(listed: &[&str]) -> std::sync::Arc<Store> {
    let store = crate::state::fixture::store();
    let mut web = pod("shop", "web", "10.0.0.1");
    web.authorization_policies = listed.iter().map(ToString::to_string).collect();
    Push::addresses().workload(web).accepted_by(&store);
    store
}

fn push(store: &Store, policies: &[pb::Authorization]) {
    let push = policies
        .iter()
        .cloned()
        .fold(Push::policies(), Push::policy);
    push.to(store);
}

fn called(store: &Store) -> Decision {
    let subject = Subject {
        identity: Some(Identity::new("td", "bank", "teller")),
        source: "10.0.0.2".parse().unwrap(),
        dst: addr("10.0.0.1:80"),
    };
    let snapshot = store.snapshot();
    decide(&snapshot, &uid_of(&snapshot, "shop", "web"), &subject)
}

fn verdict(listed: &[&str], policies: &[pb::Authorization]) -> Verdict {
    let store = store(listed);
    push(&store, policies);
    called(&store).verdict
}

fn allowed_by(name: Option<&str>) -> Verdict {
    Verdict::Allow {
        by: name.map(Into::into),
    }
}

fn denied_by(name: &str) -> Verdict {
    let policy = name.into();
    Verdict::Deny(DenyReason::Explicit { policy, rule: 0 })
}

#[test]
fn without_policies_everybody_is_allowed() {
    assert_eq!(verdict(&[], &[]), allowed_by(None));
}

#[test]
fn policies_apply_by_scope() {
    use Scope::{Global, Namespace, WorkloadSelector};
    let deny = |name, scope| all(policy(name, scope, Action::Deny));
    let cases = [
        (deny("other/p", Global), true),
        (deny("shop/p", Namespace), true),
        (deny("other/p", Namespace), false),
        (deny("shop/p", WorkloadSelector), false),
        (deny("shop/selected", WorkloadSelector), true),
    ];
    let harmless = policy("shop/selected", WorkloadSelector, Action::Deny);
    for (policy, applies) in cases {
        let name = format!("{}/{}", policy.namespace, policy.name);
        let expected = if applies {
            denied_by(&name)
        } else {
            allowed_by(None)
        };
        let verdict = verdict(SELECTED, &[harmless.clone(), policy]);
        assert_eq!(verdict, expected, "{name}");
    }
}

#[test]
fn deny_comes_before_allow_and_without_a_match_allow_policies_reject() {
    use Scope::Global;
    let allow = |name| policy(name, Global, Action::Allow);
    let deny = bank(policy("a/deny", Global, Action::Deny));
    assert_eq!(
        verdict(&[], &[all(allow("a/x")), deny]),
        denied_by("a/deny")
    );
    assert_eq!(verdict(&[], &[bank(allow("a/x"))]), allowed_by(Some("a/x")));
    let none = Verdict::Deny(DenyReason::NotAllowed);
    assert_eq!(verdict(&[], &[allow("a/no-rules")]), none);
    assert_eq!(
        verdict(&[], &[policy("a/d", Global, Action::Deny)]),
        allowed_by(None)
    );
}

#[test]
fn of_several_that_match_the_first_by_name_decides_whatever_their_scope() {
    use Scope::{Global, Namespace, WorkloadSelector};
    for action in [Action::Deny, Action::Allow] {
        let mut policies = vec![
            all(policy("z/global", Global, action)),
            all(policy("shop/named", Namespace, action)),
            all(policy("shop/selected", WorkloadSelector, action)),
        ];
        for _ in 0..policies.len() {
            policies.rotate_left(1);
            let expected = match action {
                Action::Deny => denied_by("shop/named"),
                Action::Allow => allowed_by(Some("shop/named")),
            };
            assert_eq!(verdict(SELECTED, &policies), expected);
        }
    }
}

#[test]
fn a_listed_policy_that_has_not_arrived_denies_until_it_does() {
    let store = store(&["shop/b", "shop/a"]);
    let waiting = |name: &str| Verdict::Deny(DenyReason::NotArrived(name.into()));
    assert_eq!(called(&store).verdict, waiting("shop/a"));
    let allow = |name| all(policy(name, Scope::WorkloadSelector, Action::Allow));
    push(&store, &[allow("shop/a")]);
    assert_eq!(called(&store).verdict, waiting("shop/b"));
    push(&store, &[allow("shop/b")]);
    assert_eq!(called(&store).verdict, allowed_by(Some("shop/a")));
    Push::policies().removed("shop/b").to(&store);
    assert_eq!(called(&store).verdict, waiting("shop/b"));
}

#[test]
fn a_malformed_policy_denies_where_it_would_have_applied() {
    use Scope::{Global, Namespace, WorkloadSelector};
    let bad = |name, scope| broken(policy(name, scope, Action::Allow));
    let denied = |name: &str| Verdict::Deny(DenyReason::Malformed(name.into()));
    assert_eq!(verdict(&[], &[bad("a/p", Global)]), denied("a/p"));
    assert_eq!(verdict(&[], &[bad("shop/p", Namespace)]), denied("shop/p"));
    assert_eq!(verdict(&[], &[bad("other/p", Namespace)]), allowed_by(None));
    assert_eq!(
        verdict(&[], &[bad("shop/p", WorkloadSelector)]),
        allowed_by(None)
    );
    let selected = bad("shop/selected", WorkloadSelector);
    assert_eq!(verdict(SELECTED, &[selected]), denied("shop/selected"));
    assert_eq!(verdict(&[], &[dry(bad("a/p", Global))]), allowed_by(None));

    let unknown_scope = pb::Authorization {
        scope: 9,
        ..policy("shop/p", Global, Action::Deny)
    };
    assert_eq!(verdict(&[], &[unknown_scope]), denied("shop/p"));
    for (name, expected) in [("shop/p", denied("shop/p")), ("other/p", allowed_by(None))] {
        let store = store(&[]);
        Push::policies().bytes(name, "", vec![0xff]).to(&store);
        assert_eq!(called(&store).verdict, expected);
    }
}

#[test]
fn a_malformed_update_leaves_the_last_good_version_in_force() {
    let store = store(&[]);
    let good = bank(policy("a/p", Scope::Global, Action::Allow));
    push(&store, std::slice::from_ref(&good));
    push(&store, &[broken(good.clone())]);
    assert_eq!(called(&store).verdict, allowed_by(Some("a/p")));
    assert_eq!(store.types()[1].rejected.len(), 1);
    assert_eq!(store.types()[1].versions.len(), 1);
    let denied = Verdict::Deny(DenyReason::Malformed("a/p".into()));
    Push::policies().removed("a/p").to(&store);
    push(&store, &[broken(good.clone())]);
    assert_eq!(called(&store).verdict, denied);
    push(&store, &[good]);
    assert_eq!(called(&store).verdict, allowed_by(Some("a/p")));
}

#[test]
fn dry_run_policies_report_and_decide_nothing() {
    let dry_run = |policies: &[pb::Authorization]| {
        let store = store(&[]);
        push(&store, policies);
        let decision = called(&store);
        assert!(matches!(decision.verdict, Verdict::Allow { .. }));
        let entries = decision.dry_run.into_iter();
        entries
            .map(|(name, what)| format!("{name} {what}"))
            .collect::<Vec<_>>()
    };
    use Scope::Global;
    let deny = dry(bank(policy("a/deny", Global, Action::Deny)));
    assert_eq!(dry_run(&[deny]), ["a/deny would deny"]);
    let harmless = dry(policy("a/deny", Global, Action::Deny));
    assert!(dry_run(&[harmless]).is_empty());

    let no = dry(policy("a/no", Global, Action::Allow));
    let yes = dry(bank(policy("a/yes", Global, Action::Allow)));
    assert_eq!(dry_run(std::slice::from_ref(&no)), ["a/no would deny"]);
    assert_eq!(dry_run(&[no.clone(), yes]), ["a/yes would allow"]);
    let real = all(policy("a/real", Global, Action::Allow));
    assert!(dry_run(&[no, real]).is_empty());
}

#[test]
fn a_policy_that_changes_its_scope_leaves_the_old_one() {
    let store = store(&[]);
    push(
        &store,
        &[all(policy("shop/p", Scope::Global, Action::Deny))],
    );
    assert_eq!(called(&store).verdict, denied_by("shop/p"));
    push(
        &store,
        &[all(policy("shop/p", Scope::WorkloadSelector, Action::Deny))],
    );
    assert_eq!(called(&store).verdict, allowed_by(None));
}
