//! Every field of facts ztunnel 5.3, positive and negative, with mTLS and in plaintext.

use std::net::IpAddr;

use proptest::prelude::*;
use prost::Message;

use super::{Policy, Published, Subject};
use crate::identity::Identity;
use crate::state::fixture::{addr, ip};
use crate::wire::security as pb;
use crate::wire::security::string_match::MatchType;

fn exact(text: &str) -> pb::StringMatch {
    kind(MatchType::Exact(text.into()))
}

fn prefix(text: &str) -> pb::StringMatch {
    kind(MatchType::Prefix(text.into()))
}

fn suffix(text: &str) -> pb::StringMatch {
    kind(MatchType::Suffix(text.into()))
}

fn presence() -> pb::StringMatch {
    kind(MatchType::Presence(()))
}

fn kind(kind: MatchType) -> pb::StringMatch {
    pb::StringMatch {
        match_type: Some(kind),
    }
}

fn net(text: &str) -> pb::Address {
    let (address, length) = text.split_once('/').unwrap();
    pb::Address {
        address: ip(address),
        length: length.parse().unwrap(),
    }
}

fn account(namespace: &str, name: &str) -> pb::ServiceAccountMatch {
    pb::ServiceAccountMatch {
        namespace: namespace.into(),
        service_account: name.into(),
    }
}

fn policy(rules: Vec<pb::Rule>) -> Policy {
    let raw = pb::Authorization {
        name: "p".into(),
        namespace: "shop".into(),
        rules,
        ..Default::default()
    };
    let value = raw.encode_to_vec().into();
    let (name, version) = ("shop/p", "");
    Policy::parse(&Published {
        name,
        version,
        value,
    })
    .unwrap()
}

fn one(field: pb::Match) -> Policy {
    let matches = vec![field];
    let clauses = vec![pb::Clause { matches }];
    policy(vec![pb::Rule { clauses }])
}

/// `td/ns/shop/sa/web` from 10.1.2.3 to 10.0.0.1:8080.
fn mtls() -> Subject {
    Subject {
        identity: Some(Identity::new("td", "shop", "web")),
        source: "10.1.2.3".parse().unwrap(),
        dst: addr("10.0.0.1:8080"),
    }
}

fn plaintext() -> Subject {
    Subject {
        identity: None,
        ..mtls()
    }
}

/// A field with a value: whether it matches with mTLS and in plaintext, as positive and as `not_`.
struct Row {
    what: &'static str,
    any: pb::Match,
    not: pb::Match,
    mtls: bool,
    plain: bool,
    not_mtls: bool,
    not_plain: bool,
}

macro_rules! row {
    ($any:ident, $not:ident, $value:expr, $mtls:expr, $plain:expr) => {
        Row {
            what: stringify!($any: $value),
            any: pb::Match { $any: vec![$value], ..Default::default() },
            not: pb::Match { $not: vec![$value], ..Default::default() },
            mtls: $mtls,
            plain: $plain,
            not_mtls: !$mtls,
            not_plain: !$plain,
        }
    };
}

#[test]
fn every_field_matches_what_the_facts_say_and_its_negation_the_rest() {
    let rows = [
        row!(namespaces, not_namespaces, exact("shop"), true, false),
        row!(namespaces, not_namespaces, exact("Shop"), false, false),
        row!(namespaces, not_namespaces, exact("sho"), false, false),
        row!(namespaces, not_namespaces, prefix("sh"), true, false),
        row!(namespaces, not_namespaces, prefix("hop"), false, false),
        row!(namespaces, not_namespaces, suffix("op"), true, false),
        row!(namespaces, not_namespaces, suffix("sh"), false, false),
        row!(namespaces, not_namespaces, presence(), true, false),
        // An anonymous peer's namespace is the empty string.
        row!(namespaces, not_namespaces, exact(""), false, true),
        row!(namespaces, not_namespaces, prefix(""), true, true),
        row!(
            principals,
            not_principals,
            exact("td/ns/shop/sa/web"),
            true,
            false
        ),
        row!(
            principals,
            not_principals,
            exact("spiffe://td/ns/shop/sa/web"),
            false,
            false
        ),
        row!(
            principals,
            not_principals,
            exact("td/ns/shop/sa/we"),
            false,
            false
        ),
        row!(
            principals,
            not_principals,
            prefix("td/ns/shop/"),
            true,
            false
        ),
        row!(
            principals,
            not_principals,
            prefix("td/ns/shop/sa/web/more"),
            false,
            false
        ),
        row!(principals, not_principals, prefix("ns/shop"), false, false),
        row!(principals, not_principals, suffix("/sa/web"), true, false),
        row!(principals, not_principals, suffix("p/sa/web"), true, false),
        row!(principals, not_principals, suffix("/sa/we"), false, false),
        row!(principals, not_principals, presence(), true, false),
        row!(principals, not_principals, exact(""), false, false),
        row!(principals, not_principals, prefix(""), true, false),
        row!(
            service_accounts,
            not_service_accounts,
            account("shop", "web"),
            true,
            false
        ),
        row!(
            service_accounts,
            not_service_accounts,
            account("shop", "api"),
            false,
            false
        ),
        row!(
            service_accounts,
            not_service_accounts,
            account("bank", "web"),
            false,
            false
        ),
        row!(source_ips, not_source_ips, net("10.1.0.0/16"), true, true),
        row!(source_ips, not_source_ips, net("10.1.2.3/32"), true, true),
        row!(source_ips, not_source_ips, net("10.1.9.9/16"), true, true),
        row!(source_ips, not_source_ips, net("10.2.0.0/16"), false, false),
        row!(source_ips, not_source_ips, net("0.0.0.0/0"), true, true),
        row!(source_ips, not_source_ips, net("::/0"), false, false),
        row!(
            source_ips,
            not_source_ips,
            net("::ffff:10.1.0.0/112"),
            true,
            true
        ),
        row!(
            destination_ips,
            not_destination_ips,
            net("10.0.0.1/32"),
            true,
            true
        ),
        row!(
            destination_ips,
            not_destination_ips,
            net("10.0.0.2/32"),
            false,
            false
        ),
        row!(destination_ports, not_destination_ports, 8080, true, true),
        row!(destination_ports, not_destination_ports, 80, false, false),
    ];
    for row in rows {
        let (any, not) = (one(row.any), one(row.not));
        let seen = (any.matches(&mtls()), any.matches(&plaintext()));
        assert_eq!(seen, (row.mtls, row.plain), "{}", row.what);
        let seen = (not.matches(&mtls()), not.matches(&plaintext()));
        assert_eq!(seen, (row.not_mtls, row.not_plain), "not {}", row.what);
    }
}

#[test]
fn mapped_peers_are_compared_as_ipv4() {
    let policy = one(pb::Match {
        source_ips: vec![net("10.1.0.0/16")],
        ..Default::default()
    });
    let subject = Subject {
        source: "::ffff:10.1.2.3".parse().unwrap(),
        ..mtls()
    };
    assert!(policy.matches(&subject));
}

#[test]
fn fields_are_anded_and_so_are_positive_and_negative() {
    let both = |port| {
        one(pb::Match {
            namespaces: vec![exact("shop")],
            destination_ports: vec![port],
            ..Default::default()
        })
    };
    assert!(both(8080).matches(&mtls()));
    assert!(!both(80).matches(&mtls()));
    let contradiction = one(pb::Match {
        namespaces: vec![presence()],
        not_namespaces: vec![exact("shop")],
        ..Default::default()
    });
    assert!(!contradiction.matches(&mtls()));
}

#[test]
fn empty_parts_match_as_the_facts_say() {
    let clause = |matches| pb::Clause { matches };
    assert!(!policy(vec![]).matches(&mtls()), "no rules: never");
    let no_clauses = policy(vec![pb::Rule { clauses: vec![] }]);
    assert!(no_clauses.matches(&mtls()), "no clauses: always");
    let clauses = vec![clause(vec![])];
    assert!(
        policy(vec![pb::Rule { clauses }]).matches(&plaintext()),
        "no matches: always"
    );
    assert!(
        !one(pb::Match::default()).matches(&mtls()),
        "no fields: never"
    );
    let clauses = vec![clause(vec![]), clause(vec![pb::Match::default()])];
    assert!(
        !policy(vec![pb::Rule { clauses }]).matches(&mtls()),
        "clauses are anded"
    );
}

#[test]
fn what_cannot_be_read_exactly_rejects_the_whole_policy() {
    let untyped = pb::StringMatch { match_type: None };
    let field = |change: fn(&mut pb::Match, pb::StringMatch), text| {
        let mut field = pb::Match::default();
        change(&mut field, text);
        field
    };
    let long = |length| pb::Address {
        address: ip("10.0.0.0"),
        length,
    };
    let short = pb::Address {
        address: vec![1, 2, 3].into(),
        length: 8,
    };
    let cases = [
        (
            "namespaces[0]",
            field(|m, t| m.namespaces.push(t), untyped.clone()),
        ),
        (
            "not_principals[0]",
            field(|m, t| m.not_principals.push(t), untyped),
        ),
        (
            "source_ips[0]",
            pb::Match {
                source_ips: vec![long(33)],
                ..Default::default()
            },
        ),
        (
            "not_source_ips[0]",
            pb::Match {
                not_source_ips: vec![long(264)],
                ..Default::default()
            },
        ),
        (
            "destination_ips[0]",
            pb::Match {
                destination_ips: vec![short],
                ..Default::default()
            },
        ),
        (
            "destination_ports[1]",
            pb::Match {
                destination_ports: vec![80, 65_616],
                ..Default::default()
            },
        ),
    ];
    let parse = |raw: pb::Authorization| {
        let value = raw.encode_to_vec().into();
        let (name, version) = ("shop/p", "");
        let parsed = Policy::parse(&Published {
            name,
            version,
            value,
        });
        parsed.map(|_| ()).map_err(|bad| bad.to_string())
    };
    for (at, matched) in cases {
        let clauses = vec![pb::Clause {
            matches: vec![matched],
        }];
        let rules = vec![pb::Rule { clauses }];
        let reason = parse(pb::Authorization {
            rules,
            ..Default::default()
        })
        .unwrap_err();
        let path = format!("rules[0].clauses[0].matches[0].{at}");
        assert!(reason.contains(&path), "{reason}");
    }
    let reason = parse(pb::Authorization {
        scope: 3,
        ..Default::default()
    })
    .unwrap_err();
    assert!(reason.contains("scope"), "{reason}");
    let reason = parse(pb::Authorization {
        action: 2,
        ..Default::default()
    })
    .unwrap_err();
    assert!(reason.contains("action"), "{reason}");
}

/// The facts once more, read straight off the wire types with owned strings.
fn naive(raw: &[pb::Rule], subject: &Subject) -> bool {
    let (namespace, principal) = match &subject.identity {
        Some(id) => (id.namespace().to_owned(), Some(id.principal())),
        None => (String::new(), None),
    };
    let text = |value: &str, matcher: &pb::StringMatch| match matcher.match_type.as_ref().unwrap() {
        MatchType::Exact(text) => value == text,
        MatchType::Prefix(text) => value.starts_with(text.as_str()),
        MatchType::Suffix(text) => value.ends_with(text.as_str()),
        MatchType::Presence(()) => !value.is_empty(),
    };
    let contains = |net: &pb::Address, ip: IpAddr| {
        let (IpAddr::V4(ip), Ok(base)) = (ip, <[u8; 4]>::try_from(net.address.as_ref())) else {
            return false;
        };
        let shift = 32 - net.length;
        let bits = |octets: [u8; 4]| u64::from(u32::from_be_bytes(octets)) >> shift;
        bits(ip.octets()) == bits(base)
    };
    fn check<T>(any: &[T], not: &[T], is: impl Fn(&T) -> bool) -> [bool; 2] {
        let positive = any.is_empty() || any.iter().any(&is);
        let negative = not.is_empty() || !not.iter().any(&is);
        [positive, negative]
    }
    let matches = |m: &pb::Match| {
        let is_account = |a: &pb::ServiceAccountMatch| {
            let wanted = format!("/ns/{}/sa/{}", a.namespace, a.service_account);
            principal.as_ref().is_some_and(|p| p.ends_with(&wanted))
        };
        let is_principal = |t: &pb::StringMatch| principal.as_ref().is_some_and(|p| text(p, t));
        *m != pb::Match::default()
            && [
                check(&m.namespaces, &m.not_namespaces, |t| text(&namespace, t)),
                check(&m.principals, &m.not_principals, is_principal),
                check(&m.service_accounts, &m.not_service_accounts, is_account),
                check(&m.source_ips, &m.not_source_ips, |n| {
                    contains(n, subject.source)
                }),
                check(&m.destination_ips, &m.not_destination_ips, |n| {
                    contains(n, subject.dst.ip())
                }),
                check(&m.destination_ports, &m.not_destination_ports, |p| {
                    *p == u32::from(subject.dst.port())
                }),
            ]
            .concat()
            .iter()
            .all(|ok| *ok)
    };
    let clause = |c: &pb::Clause| c.matches.is_empty() || c.matches.iter().any(matches);
    raw.iter().any(|rule| rule.clauses.iter().all(clause))
}

fn word() -> impl Strategy<Value = String> {
    proptest::sample::select(vec![
        "",
        "a",
        "b",
        "ab",
        "ba",
        "/",
        "td/ns/a/sa/b",
        "td/ns/a",
        "/sa/b",
    ])
    .prop_map(String::from)
}

fn texts() -> impl Strategy<Value = Vec<pb::StringMatch>> {
    let one = (0..4, word()).prop_map(|(n, text)| match n {
        0 => exact(&text),
        1 => prefix(&text),
        2 => suffix(&text),
        _ => presence(),
    });
    few(one)
}

fn nets() -> impl Strategy<Value = Vec<pb::Address>> {
    few(
        (0u8..4, 0u8..4, 0u32..=32).prop_map(|(a, b, length)| pb::Address {
            address: vec![10, a, 0, b].into(),
            length,
        }),
    )
}

fn few<T: std::fmt::Debug>(one: impl Strategy<Value = T>) -> impl Strategy<Value = Vec<T>> {
    // Mostly empty: a match with twelve restrictions never holds.
    let many = proptest::collection::vec(one, 1..=2);
    proptest::option::weighted(0.3, many).prop_map(Option::unwrap_or_default)
}

fn matches() -> impl Strategy<Value = pb::Match> {
    let account = || few((word(), word()).prop_map(|(n, a)| account(&n, &a)));
    let ports = || few(1u32..4);
    (
        (texts(), texts(), texts(), texts()),
        (nets(), nets(), nets(), nets()),
        (ports(), ports(), account(), account()),
    )
        .prop_map(|(t, n, o)| pb::Match {
            namespaces: t.0,
            not_namespaces: t.1,
            principals: t.2,
            not_principals: t.3,
            source_ips: n.0,
            not_source_ips: n.1,
            destination_ips: n.2,
            not_destination_ips: n.3,
            destination_ports: o.0,
            not_destination_ports: o.1,
            service_accounts: o.2,
            not_service_accounts: o.3,
            extensions: vec![],
        })
}

fn rules() -> impl Strategy<Value = Vec<pb::Rule>> {
    let clause =
        proptest::collection::vec(matches(), 0..3).prop_map(|matches| pb::Clause { matches });
    let rule = proptest::collection::vec(clause, 0..3).prop_map(|clauses| pb::Rule { clauses });
    proptest::collection::vec(rule, 0..3)
}

fn subject() -> impl Strategy<Value = Subject> {
    let name = || proptest::sample::select(vec!["a", "b", "ab"]);
    let identity =
        proptest::option::of((name(), name()).prop_map(|(n, a)| Identity::new("td", n, a)));
    (identity, 0u8..4, 0u8..4, 0u8..4, 1u16..4).prop_map(|(identity, a, b, c, port)| Subject {
        identity,
        source: [10, a, 0, b].into(),
        dst: ([10, c, 0, b], port).into(),
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn agrees_with_a_naive_reading(rules in rules(), subject in subject()) {
        prop_assert_eq!(policy(rules.clone()).matches(&subject), naive(&rules, &subject));
    }
}
