//! Why policies say what they say of a connection, for people: every policy that concerns the
//! destination, with the rule that matches or what keeps each from matching. Asked on demand only;
//! whether something matches is the matcher's answer, here as for connections.

use std::fmt::Write;
use std::sync::Arc;

use super::Subject;
use super::matcher::{Field, Mismatch};
use super::record::{Account, Action, Clause, Match, Policy, Text};
use super::set::Entry;
use crate::state::{Snapshot, Workload};

/// Values of a field that are named.
const NAMED: usize = 4;

/// A policy that concerns the destination.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Examined {
    /// Resource name, `namespace/name`.
    pub policy: Arc<str>,
    /// None where it isn't known.
    pub action: Option<Action>,
    pub dry_run: bool,
    pub finding: Finding,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Finding {
    /// The first rule that matches.
    Matches(usize),
    /// Why not, a text for each rule.
    Differs(Vec<String>),
    Malformed,
    /// Listed by the workload, but not here yet.
    NotArrived,
}

/// In the order in which they decide: DENY, what isn't known, ALLOW; each by name.
pub fn examine(snapshot: &Snapshot, destination: &Workload, subject: &Subject) -> Vec<Examined> {
    let listed = &destination.authorization_policies;
    let policies = snapshot.policies();
    let known = policies
        .applicable(&destination.namespace, listed)
        .map(|entry| examine_one(entry, subject));
    let missing = listed
        .iter()
        .filter(|name| policies.get(name).is_none())
        .map(|name| Examined {
            policy: name.clone(),
            action: None,
            dry_run: false,
            finding: Finding::NotArrived,
        });
    let mut found: Vec<_> = known.chain(missing).collect();
    let rank = |examined: &Examined| match (examined.action, &examined.finding) {
        (Some(Action::Deny), _) => 0,
        (None, Finding::Malformed) => 1,
        (None, _) => 2,
        (Some(Action::Allow), _) => 3,
    };
    found.sort_by(|a, b| (rank(a), &a.policy).cmp(&(rank(b), &b.policy)));
    // One that is both listed and in scope came twice.
    found.dedup_by(|a, b| a.policy == b.policy);
    found
}

fn examine_one(entry: &Entry, subject: &Subject) -> Examined {
    match entry {
        Entry::Good(policy) => Examined {
            policy: policy.key.clone(),
            action: Some(policy.action),
            dry_run: policy.dry_run,
            finding: match policy.matching_rule(subject) {
                Some(rule) => Finding::Matches(rule),
                None => Finding::Differs(differences(policy, subject)),
            },
        },
        Entry::Malformed(malformed) => Examined {
            policy: malformed.key.clone(),
            action: None,
            dry_run: malformed.dry_run,
            finding: Finding::Malformed,
        },
    }
}

fn differences(policy: &Policy, subject: &Subject) -> Vec<String> {
    let rules = policy.rules.iter().enumerate();
    rules
        .filter_map(|(index, rule)| {
            let failing = rule.failing_clause(subject)?;
            let text = difference(&rule.0[failing], subject);
            Some(format!("rule {index}: {text}"))
        })
        .collect()
}

/// None of its matches holds.
fn difference(clause: &Clause, subject: &Subject) -> String {
    let each = clause.0.iter().filter_map(|one| {
        let mismatch = one.mismatch(subject)?;
        Some(one.tell(mismatch, subject))
    });
    let mut texts: Vec<_> = each.collect();
    texts.dedup();
    let more = texts.len().saturating_sub(NAMED);
    texts.truncate(NAMED);
    let mut text = texts.join("; nor ");
    if more > 0 {
        // Writing to a String doesn't fail.
        let _ = write!(text, "; nor {more} more");
    }
    text
}

impl Match {
    /// Fields by the names of AuthorizationPolicy, since that is what a person wrote.
    fn tell(&self, mismatch: Mismatch, subject: &Subject) -> String {
        let Mismatch { field, negated } = mismatch;
        let pick = |any: Vec<String>, not: Vec<String>| if negated { not } else { any };
        let texts = |any: &[Text], not: &[Text]| pick(all(any, text), all(not, text));
        let anonymous = || "a connection without identity".to_owned();
        let identity = subject.identity.as_ref();
        let (name, values, actual) = match field {
            Field::Nothing => return "an empty condition never holds".to_owned(),
            Field::Namespaces => (
                "namespaces",
                texts(&self.namespaces, &self.not_namespaces),
                identity.map_or_else(anonymous, |id| id.namespace().to_owned()),
            ),
            Field::Principals => (
                "principals",
                texts(&self.principals, &self.not_principals),
                identity.map_or_else(anonymous, crate::identity::Identity::principal),
            ),
            Field::ServiceAccounts => (
                "serviceAccounts",
                pick(
                    all(&self.service_accounts, account),
                    all(&self.not_service_accounts, account),
                ),
                identity.map_or_else(anonymous, |id| {
                    format!("{}/{}", id.namespace(), id.service_account())
                }),
            ),
            Field::SourceIps => (
                "ipBlocks",
                pick(
                    all(&self.source_ips, ToString::to_string),
                    all(&self.not_source_ips, ToString::to_string),
                ),
                subject.source.to_canonical().to_string(),
            ),
            Field::DestinationIps => (
                "destination.ip",
                pick(
                    all(&self.destination_ips, ToString::to_string),
                    all(&self.not_destination_ips, ToString::to_string),
                ),
                subject.dst.ip().to_canonical().to_string(),
            ),
            Field::DestinationPorts => (
                "ports",
                pick(
                    all(&self.destination_ports, ToString::to_string),
                    all(&self.not_destination_ports, ToString::to_string),
                ),
                subject.dst.port().to_string(),
            ),
        };
        let values = values.join(", ");
        match negated {
            false => format!("{name} [{values}] don't include {actual}"),
            true => format!("excluded: not {name} [{values}] includes {actual}"),
        }
    }
}

fn all<T>(values: &[T], tell: impl Fn(&T) -> String) -> Vec<String> {
    let mut texts: Vec<_> = values.iter().take(NAMED).map(tell).collect();
    if values.len() > NAMED {
        texts.push(format!("{} more", values.len() - NAMED));
    }
    texts
}

/// As in a manifest.
fn text(text: &Text) -> String {
    match text {
        Text::Exact(text) => text.to_string(),
        Text::Prefix(text) => format!("{text}*"),
        Text::Suffix(text) => format!("*{text}"),
        Text::Presence => "*".to_owned(),
    }
}

fn account(account: &Account) -> String {
    format!("{}/{}", account.namespace, account.name)
}
