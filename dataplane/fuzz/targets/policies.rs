//! A policy's verdict against a second implementation: the words of facts ztunnel 5.3 over the
//! message as it came, without a parsed form.
#![no_main]

use std::net::{IpAddr, SocketAddr};

use arbitrary::{Arbitrary, Result, Unstructured};
use libfuzzer_sys::fuzz_target;
use prost::Message;
use underpass_core::identity::Identity;
use underpass_core::policy::{Policy, Published, Subject};
use underpass_core::wire::security as pb;
use underpass_core::wire::security::string_match::MatchType;

fuzz_target!(|data: &[u8]| {
    let mut bytes = Unstructured::new(data);
    let Ok((policy, subject)) = input(&mut bytes) else {
        return;
    };
    let value = policy.encode_to_vec().into();
    let published = Published {
        name: "ns/p",
        version: "1",
        value,
    };
    let Ok(parsed) = Policy::parse(&published) else {
        assert!(!well_formed(&policy), "refused: {policy:?}");
        return;
    };
    assert!(well_formed(&policy), "taken: {policy:?}");
    assert_eq!(
        parsed.matches(&subject),
        matches(&policy, &subject),
        "{policy:?} {subject:?}"
    );
});

// ---- the second implementation

fn matches(policy: &pb::Authorization, subject: &Subject) -> bool {
    policy.rules.iter().any(|rule| {
        rule.clauses.iter().all(|clause| {
            clause.matches.is_empty() || clause.matches.iter().any(|one| applies(one, subject))
        })
    })
}

fn applies(one: &pb::Match, subject: &Subject) -> bool {
    if *one == pb::Match::default() {
        return false;
    }
    let identity = subject.identity.as_ref();
    let namespace = identity.map_or(String::new(), |id| id.namespace().to_owned());
    let name = |id: &Identity| id.to_string().trim_start_matches("spiffe://").to_owned();
    let principal = |m: &pb::StringMatch| identity.is_some_and(|id| text(m, &name(id)));
    let account = |m: &pb::ServiceAccountMatch| {
        identity.is_some_and(|id| {
            id.namespace() == m.namespace && id.service_account() == m.service_account
        })
    };
    let source = |net: &pb::Address| inside(net, subject.source);
    let destination = |net: &pb::Address| inside(net, subject.dst.ip());
    let port = |port: &u32| *port == u32::from(subject.dst.port());
    let in_namespace = |m: &pb::StringMatch| text(m, &namespace);
    field(&one.namespaces, in_namespace)
        && !one.not_namespaces.iter().any(in_namespace)
        && field(&one.principals, principal)
        && !one.not_principals.iter().any(principal)
        && field(&one.service_accounts, account)
        && !one.not_service_accounts.iter().any(account)
        && field(&one.source_ips, source)
        && !one.not_source_ips.iter().any(source)
        && field(&one.destination_ips, destination)
        && !one.not_destination_ips.iter().any(destination)
        && field(&one.destination_ports, port)
        && !one.not_destination_ports.iter().any(port)
}

fn field<T>(values: &[T], is: impl Fn(&T) -> bool) -> bool {
    values.is_empty() || values.iter().any(is)
}

fn text(one: &pb::StringMatch, value: &str) -> bool {
    match &one.match_type {
        Some(MatchType::Exact(text)) => value == text,
        Some(MatchType::Prefix(text)) => value.starts_with(text.as_str()),
        Some(MatchType::Suffix(text)) => value.ends_with(text.as_str()),
        Some(MatchType::Presence(())) => !value.is_empty(),
        None => false,
    }
}

/// Bit by bit.
fn inside(net: &pb::Address, ip: IpAddr) -> bool {
    let ip = match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    };
    let bit = |bytes: &[u8], at: usize| bytes[at / 8] >> (7 - at % 8) & 1;
    ip.len() == net.address.len()
        && (0..net.length as usize).all(|at| bit(&ip, at) == bit(&net.address, at))
}

/// Facts ztunnel 5.1–5.3, and what the issue of the mesh adds: nothing is dropped silently.
fn well_formed(policy: &pb::Authorization) -> bool {
    let known = (0..=2).contains(&policy.scope) && (0..=1).contains(&policy.action);
    let each = policy
        .rules
        .iter()
        .flat_map(|r| &r.clauses)
        .flat_map(|c| &c.matches);
    known && each.into_iter().all(well_formed_match)
}

fn well_formed_match(one: &pb::Match) -> bool {
    let texts = [
        &one.namespaces,
        &one.not_namespaces,
        &one.principals,
        &one.not_principals,
    ];
    let nets = [
        &one.source_ips,
        &one.not_source_ips,
        &one.destination_ips,
        &one.not_destination_ips,
    ];
    let ports = [&one.destination_ports, &one.not_destination_ports];
    let net = |net: &pb::Address| {
        [4, 16].contains(&net.address.len()) && net.length as usize <= net.address.len() * 8
    };
    texts
        .iter()
        .all(|texts| texts.iter().all(|text| text.match_type.is_some()))
        && nets.iter().all(|nets| nets.iter().all(net))
        && ports
            .iter()
            .all(|ports| ports.iter().all(|port| *port <= 65535))
}

// ---- input: few words, so that they meet

fn input(bytes: &mut Unstructured<'_>) -> Result<(pb::Authorization, Subject)> {
    let subject = Subject {
        identity: match bool::arbitrary(bytes)? {
            true => Some(Identity::new(word(bytes)?, word(bytes)?, word(bytes)?)),
            false => None,
        },
        source: ip(bytes)?,
        dst: SocketAddr::new(ip(bytes)?, bytes.int_in_range(0..=3)?),
    };
    let policy = pb::Authorization {
        name: "p".into(),
        namespace: "ns".into(),
        scope: bytes.int_in_range(0..=3)?,
        action: bytes.int_in_range(0..=2)?,
        rules: some(bytes, |bytes| {
            let clauses = some(bytes, |bytes| {
                Ok(pb::Clause {
                    matches: some(bytes, one)?,
                })
            })?;
            Ok(pb::Rule { clauses })
        })?,
        ..Default::default()
    };
    Ok((policy, subject))
}

fn one(bytes: &mut Unstructured<'_>) -> Result<pb::Match> {
    let mut one = pb::Match::default();
    for _ in 0..bytes.int_in_range(0..=3)? {
        match bytes.int_in_range(0..=11)? {
            0 => one.namespaces.push(string_match(bytes)?),
            1 => one.not_namespaces.push(string_match(bytes)?),
            2 => one.principals.push(string_match(bytes)?),
            3 => one.not_principals.push(string_match(bytes)?),
            4 => one.source_ips.push(net(bytes)?),
            5 => one.not_source_ips.push(net(bytes)?),
            6 => one.destination_ips.push(net(bytes)?),
            7 => one.not_destination_ips.push(net(bytes)?),
            8 => one.destination_ports.push(port(bytes)?),
            9 => one.not_destination_ports.push(port(bytes)?),
            10 => one.service_accounts.push(account(bytes)?),
            _ => one.not_service_accounts.push(account(bytes)?),
        }
    }
    Ok(one)
}

fn string_match(bytes: &mut Unstructured<'_>) -> Result<pb::StringMatch> {
    let text = match bytes.int_in_range(0..=3)? {
        0 => String::new(),
        1 => format!("{}/ns/{}/sa/{}", word(bytes)?, word(bytes)?, word(bytes)?),
        2 => format!("{}/ns", word(bytes)?),
        _ => word(bytes)?,
    };
    let match_type = match bytes.int_in_range(0..=9)? {
        0..=2 => Some(MatchType::Exact(text)),
        3..=5 => Some(MatchType::Prefix(text)),
        6..=7 => Some(MatchType::Suffix(text)),
        8 => Some(MatchType::Presence(())),
        _ => None,
    };
    Ok(pb::StringMatch { match_type })
}

fn account(bytes: &mut Unstructured<'_>) -> Result<pb::ServiceAccountMatch> {
    Ok(pb::ServiceAccountMatch {
        namespace: word(bytes)?,
        service_account: word(bytes)?,
    })
}

fn net(bytes: &mut Unstructured<'_>) -> Result<pb::Address> {
    let address = match ip(bytes)? {
        _ if bytes.ratio(1, 20)? => vec![1, 2, 3],
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    };
    let bits = address.len() as u32 * 8;
    let length = bits - bytes.int_in_range(0..=bits)? + u32::from(bytes.ratio(1, 40)?);
    Ok(pb::Address {
        address: address.into(),
        length,
    })
}

fn port(bytes: &mut Unstructured<'_>) -> Result<u32> {
    Ok(bytes.int_in_range(0..=3u32)? + if bytes.ratio(1, 20)? { 65536 } else { 0 })
}

fn ip(bytes: &mut Unstructured<'_>) -> Result<IpAddr> {
    let low = bytes.int_in_range(0..=3u8)?;
    Ok(match bool::arbitrary(bytes)? {
        true => [10, 0, low / 2, low].into(),
        false => [0xfd00, 0, 0, 0, 0, 0, 0, u16::from(low)].into(),
    })
}

fn word(bytes: &mut Unstructured<'_>) -> Result<String> {
    Ok((*bytes.choose(&["", "a", "b", "ab", "/ns/", "td"])?).to_owned())
}

fn some<T>(
    bytes: &mut Unstructured<'_>,
    make: impl Fn(&mut Unstructured<'_>) -> Result<T>,
) -> Result<Vec<T>> {
    let count = bytes.int_in_range(0..=2)?;
    (0..count).map(|_| make(bytes)).collect()
}
