//! Does a policy match a connection? Facts ztunnel 5.3 in code; nothing here allocates.

use super::Subject;
use super::record::{Account, Clause, Match, Policy, Rule, Text};
use crate::identity::Identity;

impl Policy {
    /// A policy without rules never matches.
    pub fn matches(&self, subject: &Subject) -> bool {
        self.rules.iter().any(|rule| rule.matches(subject))
    }
}

impl Rule {
    /// A rule without clauses matches everything.
    pub fn matches(&self, subject: &Subject) -> bool {
        self.0.iter().all(|clause| clause.matches(subject))
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
        !self.is_empty()
            && holds(&self.namespaces, &self.not_namespaces, in_namespace)
            && holds(&self.principals, &self.not_principals, is_principal)
            && holds(
                &self.service_accounts,
                &self.not_service_accounts,
                is_account,
            )
            && holds(&self.source_ips, &self.not_source_ips, |net| {
                net.contains(&source)
            })
            && holds(&self.destination_ips, &self.not_destination_ips, |net| {
                net.contains(&dst)
            })
            && holds(&self.destination_ports, &self.not_destination_ports, |p| {
                *p == port
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

/// One of `any` unless there are none, and none of `not`.
fn holds<T>(any: &[T], not: &[T], is: impl Fn(&T) -> bool) -> bool {
    (any.is_empty() || any.iter().any(&is)) && !not.iter().any(&is)
}
