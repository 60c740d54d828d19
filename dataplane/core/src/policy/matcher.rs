//! Does a policy match a connection, and if not, what doesn't hold? Facts ztunnel 5.3 in code;
//! nothing here allocates.

use super::Subject;
use super::record::{Account, Clause, Match, Policy, Rule, Text};
use crate::identity::Identity;

/// What of a connection a field tests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Field {
    /// None at all: such a match never holds.
    Nothing,
    Namespaces,
    Principals,
    ServiceAccounts,
    SourceIps,
    DestinationIps,
    DestinationPorts,
}

/// The first field of a match that doesn't hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mismatch {
    pub field: Field,
    /// Its `not_` sibling.
    pub negated: bool,
}

impl Policy {
    /// A policy without rules never matches.
    pub fn matches(&self, subject: &Subject) -> bool {
        self.matching_rule(subject).is_some()
    }

    /// The first that matches.
    pub fn matching_rule(&self, subject: &Subject) -> Option<usize> {
        self.rules.iter().position(|rule| rule.matches(subject))
    }
}

impl Rule {
    /// A rule without clauses matches everything.
    pub fn matches(&self, subject: &Subject) -> bool {
        self.failing_clause(subject).is_none()
    }

    /// The first that doesn't match.
    pub fn failing_clause(&self, subject: &Subject) -> Option<usize> {
        self.0.iter().position(|clause| !clause.matches(subject))
    }
}

impl Clause {
    /// A clause without matches matches everything.
    pub fn matches(&self, subject: &Subject) -> bool {
        self.0.is_empty() || self.0.iter().any(|one| one.matches(subject))
    }
}

impl Match {
    pub fn matches(&self, subject: &Subject) -> bool {
        self.mismatch(subject).is_none()
    }

    pub fn mismatch(&self, subject: &Subject) -> Option<Mismatch> {
        let identity = subject.identity.as_ref();
        let namespace = identity.map_or("", Identity::namespace);
        let in_namespace = |text: &Text| text.matches(&[namespace]);
        // Without an identity even "presence" is false, and so every negation true.
        let is_principal = |text: &Text| {
            identity.is_some_and(|id| {
                let (domain, namespace) = (id.trust_domain(), id.namespace());
                text.matches(&[domain, "/ns/", namespace, "/sa/", id.service_account()])
            })
        };
        let is_account = |account: &Account| {
            identity.is_some_and(|id| {
                *id.namespace() == *account.namespace && *id.service_account() == *account.name
            })
        };
        let (source, dst) = (
            subject.source.to_canonical(),
            subject.dst.ip().to_canonical(),
        );
        let port = subject.dst.port();
        if self.is_empty() {
            let negated = false;
            let field = Field::Nothing;
            return Some(Mismatch { field, negated });
        }
        let (any, not) = (&self.namespaces, &self.not_namespaces);
        broken(Field::Namespaces, any, not, in_namespace)
            .or_else(|| {
                let (any, not) = (&self.principals, &self.not_principals);
                broken(Field::Principals, any, not, is_principal)
            })
            .or_else(|| {
                let (any, not) = (&self.service_accounts, &self.not_service_accounts);
                broken(Field::ServiceAccounts, any, not, is_account)
            })
            .or_else(|| {
                let (any, not) = (&self.source_ips, &self.not_source_ips);
                broken(Field::SourceIps, any, not, |net| net.contains(&source))
            })
            .or_else(|| {
                let (any, not) = (&self.destination_ips, &self.not_destination_ips);
                broken(Field::DestinationIps, any, not, |net| net.contains(&dst))
            })
            .or_else(|| {
                let (any, not) = (&self.destination_ports, &self.not_destination_ports);
                broken(Field::DestinationPorts, any, not, |p| *p == port)
            })
    }
}

impl Text {
    /// Compares with the concatenation of the parts. Case-sensitive.
    pub fn matches(&self, parts: &[&str]) -> bool {
        let length: usize = parts.iter().map(|part| part.len()).sum();
        let bytes = || parts.iter().flat_map(|part| part.bytes());
        match self {
            Self::Exact(text) => length == text.len() && bytes().eq(text.bytes()),
            Self::Prefix(text) => length >= text.len() && text.bytes().eq(bytes().take(text.len())),
            Self::Suffix(text) => {
                length >= text.len() && text.bytes().eq(bytes().skip(length - text.len()))
            }
            Self::Presence => length > 0,
        }
    }
}

/// Holds: one of `any` unless there are none, and none of `not`.
fn broken<T>(field: Field, any: &[T], not: &[T], is: impl Fn(&T) -> bool) -> Option<Mismatch> {
    if !any.is_empty() && !any.iter().any(&is) {
        let negated = false;
        return Some(Mismatch { field, negated });
    }
    let negated = true;
    let excluded = not.iter().any(&is);
    excluded.then_some(Mismatch { field, negated })
}
