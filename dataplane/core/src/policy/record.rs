//! An authorization policy, parsed. Whatever can't be read exactly rejects the whole policy: a part
//! left out would widen what it allows or narrow what it denies.

use std::sync::Arc;

use bytes::Bytes;
use ipnet::IpNet;
use prost::Message;

use super::hits::Hits;
use crate::state::{Bad, cidr, port};
use crate::wire::security as pb;
use crate::wire::security::string_match::MatchType;

/// A policy resource as it came.
pub struct Published<'a> {
    pub name: &'a str,
    pub version: &'a str,
    pub value: Bytes,
}

#[derive(Clone, Debug)]
pub struct Policy {
    /// Resource name, `namespace/name`.
    pub key: Arc<str>,
    pub name: Arc<str>,
    pub namespace: Arc<str>,
    pub scope: Scope,
    pub action: Action,
    pub dry_run: bool,
    /// Any one of them.
    pub rules: Box<[Rule]>,
    pub version: Arc<str>,
    /// Shared by all versions.
    pub hits: Arc<Hits>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    Global,
    Namespace,
    Selector,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    Allow,
    Deny,
}

/// All of its clauses.
#[derive(Clone, Debug)]
pub struct Rule(pub Box<[Clause]>);

/// Any one of its matches.
#[derive(Clone, Debug)]
pub struct Clause(pub Box<[Match]>);

/// All of its fields; in one field any one value, in a `not_` field none (facts ztunnel 5.3).
#[derive(Clone, Debug, Default)]
pub struct Match {
    pub namespaces: Box<[Text]>,
    pub not_namespaces: Box<[Text]>,
    pub principals: Box<[Text]>,
    pub not_principals: Box<[Text]>,
    pub source_ips: Box<[IpNet]>,
    pub not_source_ips: Box<[IpNet]>,
    pub destination_ips: Box<[IpNet]>,
    pub not_destination_ips: Box<[IpNet]>,
    pub destination_ports: Box<[u16]>,
    pub not_destination_ports: Box<[u16]>,
    pub service_accounts: Box<[Account]>,
    pub not_service_accounts: Box<[Account]>,
    /// How many of the last principals, and of the last not-principals, stand for others before them
    /// in aliases of their trust domain.
    pub aliased: (usize, usize),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Text {
    Exact(Box<str>),
    Prefix(Box<str>),
    Suffix(Box<str>),
    Presence,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Account {
    pub namespace: Box<str>,
    pub name: Box<str>,
}

impl Policy {
    pub fn parse(published: &Published<'_>) -> Result<Self, Bad> {
        let raw = pb::Authorization::decode(published.value.clone())
            .map_err(|error| Bad::new("Authorization", error.to_string()))?;
        if published.name.is_empty() {
            return Err(Bad::new("name", "the resource has none"));
        }
        Ok(Self {
            key: published.name.into(),
            name: raw.name.as_str().into(),
            namespace: raw.namespace.as_str().into(),
            scope: Scope::parse(raw.scope)?,
            action: match raw.action {
                0 => Action::Allow,
                1 => Action::Deny,
                other => return Err(Bad::unknown("action", other)),
            },
            dry_run: raw.dry_run,
            rules: list("rules", &raw.rules, |at, rule| {
                let clauses = list(&format!("{at}.clauses"), &rule.clauses, |at, clause| {
                    let matches = list(&format!("{at}.matches"), &clause.matches, Match::parse)?;
                    Ok(Clause(matches))
                })?;
                Ok(Rule(clauses))
            })?,
            version: published.version.into(),
            hits: Arc::default(),
        })
    }
}

impl Scope {
    pub fn parse(raw: i32) -> Result<Self, Bad> {
        match raw {
            0 => Ok(Self::Global),
            1 => Ok(Self::Namespace),
            2 => Ok(Self::Selector),
            other => Err(Bad::unknown("scope", other)),
        }
    }
}

impl Match {
    /// Such a match never matches (facts ztunnel 5.3).
    pub fn is_empty(&self) -> bool {
        self.namespaces.is_empty()
            && self.not_namespaces.is_empty()
            && self.principals.is_empty()
            && self.not_principals.is_empty()
            && self.source_ips.is_empty()
            && self.not_source_ips.is_empty()
            && self.destination_ips.is_empty()
            && self.not_destination_ips.is_empty()
            && self.destination_ports.is_empty()
            && self.not_destination_ports.is_empty()
            && self.service_accounts.is_empty()
            && self.not_service_accounts.is_empty()
    }

    fn parse(at: &str, raw: &pb::Match) -> Result<Self, Bad> {
        let at = |field: &str| format!("{at}.{field}");
        let nets = |field: &str, raw: &[pb::Address]| {
            list(&at(field), raw, |at, net| {
                cidr(at, &net.address, net.length)
            })
        };
        let texts = |field: &str, raw: &[pb::StringMatch]| list(&at(field), raw, Text::parse);
        let ports = |field: &str, raw: &[u32]| list(&at(field), raw, |at, p| port(at, *p));
        let accounts = |raw: &[pb::ServiceAccountMatch]| -> Box<[Account]> {
            raw.iter().map(Account::new).collect()
        };
        Ok(Self {
            namespaces: texts("namespaces", &raw.namespaces)?,
            not_namespaces: texts("not_namespaces", &raw.not_namespaces)?,
            principals: texts("principals", &raw.principals)?,
            not_principals: texts("not_principals", &raw.not_principals)?,
            source_ips: nets("source_ips", &raw.source_ips)?,
            not_source_ips: nets("not_source_ips", &raw.not_source_ips)?,
            destination_ips: nets("destination_ips", &raw.destination_ips)?,
            not_destination_ips: nets("not_destination_ips", &raw.not_destination_ips)?,
            destination_ports: ports("destination_ports", &raw.destination_ports)?,
            not_destination_ports: ports("not_destination_ports", &raw.not_destination_ports)?,
            service_accounts: accounts(&raw.service_accounts),
            not_service_accounts: accounts(&raw.not_service_accounts),
            aliased: (0, 0),
        })
    }
}

impl Text {
    fn parse(at: &str, raw: &pb::StringMatch) -> Result<Self, Bad> {
        match &raw.match_type {
            Some(MatchType::Exact(text)) => Ok(Self::Exact(text.as_str().into())),
            Some(MatchType::Prefix(text)) => Ok(Self::Prefix(text.as_str().into())),
            Some(MatchType::Suffix(text)) => Ok(Self::Suffix(text.as_str().into())),
            Some(MatchType::Presence(())) => Ok(Self::Presence),
            None => Err(Bad::new(
                at,
                "it is none of exact, prefix, suffix, presence",
            )),
        }
    }
}

impl Account {
    fn new(raw: &pb::ServiceAccountMatch) -> Self {
        Self {
            namespace: raw.namespace.as_str().into(),
            name: raw.service_account.as_str().into(),
        }
    }
}

fn list<R, T>(
    field: &str,
    raw: &[R],
    parse: impl Fn(&str, &R) -> Result<T, Bad>,
) -> Result<Box<[T]>, Bad> {
    raw.iter()
        .enumerate()
        .map(|(i, raw)| parse(&format!("{field}[{i}]"), raw))
        .collect()
}
