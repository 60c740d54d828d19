//! The decision at the destination, in the order of facts ztunnel 5.2.

use std::sync::Arc;

use super::record::{Action, Policy};
use super::set::Entry;
use super::{Decision, DenyReason, Subject, Verdict};
use crate::state::{Snapshot, Workload};

/// Deterministic: of several policies that match, the first by name decides.
///
/// Beyond upstream, what isn't known denies: a policy that the workload lists and that hasn't
/// arrived, and one that was rejected without a good version.
pub fn decide(snapshot: &Snapshot, destination: &Workload, subject: &Subject) -> Decision {
    let applicable = || {
        let listed = &destination.authorization_policies;
        snapshot
            .policies()
            .applicable(&destination.namespace, listed)
    };
    let good = |action, dry_run| {
        applicable().filter_map(move |entry| match entry {
            Entry::Good(p) if p.action == action && p.dry_run == dry_run => Some(p),
            _ => None,
        })
    };
    let matching = |action| {
        let all = good(action, false);
        let matching = all.filter_map(|p| Some((&p.key, p.matching_rule(subject)?)));
        matching.min_by_key(|(key, _)| *key)
    };
    let malformed = || {
        let malformed = applicable().filter_map(|entry| match entry {
            Entry::Malformed(malformed) if !malformed.dry_run => Some(&malformed.key),
            _ => None,
        });
        malformed.min()
    };
    let missing = || {
        let listed = destination.authorization_policies.iter();
        listed
            .filter(|name| snapshot.policies().get(name).is_none())
            .min()
    };

    let verdict = if let Some((policy, rule)) = matching(Action::Deny) {
        let policy = policy.clone();
        Verdict::Deny(DenyReason::Explicit { policy, rule })
    } else if let Some(by) = malformed() {
        Verdict::Deny(DenyReason::Malformed(by.clone()))
    } else if let Some(by) = missing() {
        Verdict::Deny(DenyReason::NotArrived(by.clone()))
    } else if good(Action::Allow, false).next().is_none() {
        Verdict::Allow { by: None }
    } else if let Some((by, _)) = matching(Action::Allow) {
        Verdict::Allow {
            by: Some(by.clone()),
        }
    } else {
        Verdict::Deny(DenyReason::NotAllowed)
    };

    let restricted = good(Action::Allow, false).next().is_some();
    let dry_denies = good(Action::Deny, true);
    let dry_allows = good(Action::Allow, true);
    Decision {
        verdict,
        dry_run: dry_run(dry_denies, dry_allows, restricted, subject),
    }
}

/// What the dry-run policies would have done. An ALLOW policy that doesn't match would deny only
/// where no ALLOW policy allows: none of the dry-run ones, and no real one exists.
fn dry_run<'a>(
    denies: impl Iterator<Item = &'a Policy>,
    allows: impl Iterator<Item = &'a Policy>,
    restricted: bool,
    subject: &Subject,
) -> Vec<(Arc<str>, &'static str)> {
    let mut outcome: Vec<_> = denies
        .filter(|p| p.matches(subject))
        .map(|p| (p.key.clone(), "would deny"))
        .collect();
    let (matched, others): (Vec<_>, Vec<_>) = allows.partition(|p| p.matches(subject));
    if matched.is_empty() && !restricted {
        outcome.extend(others.iter().map(|p| (p.key.clone(), "would deny")));
    }
    outcome.extend(matched.iter().map(|p| (p.key.clone(), "would allow")));
    outcome.sort();
    outcome.dedup();
    outcome
}
