//! Trust-domain aliases in policies: a principal that names one of this mesh's trust domains means
//! that account in all of them, so that policies hold while a mesh changes its name. Written out when
//! they change, so that a decision costs nothing more.
//!
//! What must be readable for that is the trust domain up to the first `/`: exact principals and
//! prefixes beyond it. `*`, suffixes and prefixes inside a trust domain stay as they are written.

use std::sync::Arc;

use super::record::{Clause, Match, Policy, Rule, Text};

impl Policy {
    /// As published, for `domains`, which are one. Aliases that it was written out for are gone.
    pub fn for_domains(&self, domains: &[Arc<str>]) -> Self {
        let rules = self.rules.iter();
        Self {
            rules: rules.map(|rule| rule.for_domains(domains)).collect(),
            ..self.clone()
        }
    }
}

impl Rule {
    fn for_domains(&self, domains: &[Arc<str>]) -> Self {
        let clauses = self.0.iter();
        Self(clauses.map(|clause| clause.for_domains(domains)).collect())
    }
}

impl Clause {
    fn for_domains(&self, domains: &[Arc<str>]) -> Self {
        let matches = self.0.iter().map(|one| {
            let (principals, not_principals) = one.published();
            let (principals, more) = written_out(principals, domains);
            let (not_principals, not_more) = written_out(not_principals, domains);
            Match {
                principals,
                not_principals,
                aliased: (more, not_more),
                ..one.clone()
            }
        });
        Self(matches.collect())
    }
}

impl Match {
    /// Principals and not-principals as the policy names them.
    pub fn published(&self) -> (&[Text], &[Text]) {
        let first = |texts: &'_ [Text], aliased: usize| texts.len().saturating_sub(aliased);
        (
            &self.principals[..first(&self.principals, self.aliased.0)],
            &self.not_principals[..first(&self.not_principals, self.aliased.1)],
        )
    }
}

/// The published ones, then what they mean in the other trust domains, and how many these are.
fn written_out(texts: &[Text], domains: &[Arc<str>]) -> (Box<[Text]>, usize) {
    let mut all = texts.to_vec();
    for text in texts {
        let (name, make): (_, fn(Box<str>) -> Text) = match text {
            Text::Exact(name) => (name, Text::Exact),
            Text::Prefix(name) => (name, Text::Prefix),
            Text::Suffix(_) | Text::Presence => continue,
        };
        let Some((domain, rest)) = name.split_once('/') else {
            continue;
        };
        if !domains.iter().any(|known| **known == *domain) {
            continue;
        }
        let others = domains.iter().filter(|other| ***other != *domain);
        all.extend(others.map(|other| make(format!("{other}/{rest}").into())));
    }
    let more = all.len() - texts.len();
    (all.into(), more)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn domains(names: &[&str]) -> Vec<Arc<str>> {
        names.iter().map(|name| Arc::from(*name)).collect()
    }

    fn exact(name: &str) -> Text {
        Text::Exact(name.into())
    }

    fn policy(principals: Vec<Text>) -> Clause {
        let one = Match {
            principals: principals.into(),
            not_principals: Box::new([exact("new/ns/a/sa/b")]),
            ..Match::default()
        };
        Clause(Box::new([one]))
    }

    #[test]
    fn a_principal_of_one_of_our_trust_domains_means_that_account_in_all() {
        let homes = domains(&["new", "old"]);
        let clause = policy(vec![
            exact("old/ns/shop/sa/web"),
            Text::Prefix("new/ns/shop/".into()),
            exact("foreign/ns/shop/sa/web"),
            Text::Suffix("/sa/web".into()),
            Text::Prefix("ol".into()),
        ]);
        let out = clause.for_domains(&homes);
        let texts = &out.0[0].principals;
        assert_eq!(
            texts[..5],
            clause.0[0].principals[..],
            "as published, first"
        );
        assert_eq!(
            texts[5..],
            [
                exact("new/ns/shop/sa/web"),
                Text::Prefix("old/ns/shop/".into())
            ]
        );
        assert_eq!(out.0[0].not_principals.len(), 2);
        assert_eq!(out.0[0].published().0.len(), 5);
    }

    #[test]
    fn aliases_that_are_gone_leave_nothing_behind() {
        let clause = policy(vec![exact("old/ns/shop/sa/web")]);
        let out = clause.for_domains(&domains(&["new", "old"]));
        let more = out.for_domains(&domains(&["new", "old", "older"]));
        assert_eq!(more.0[0].principals.len(), 3);
        let none = more.for_domains(&[]);
        assert_eq!(none.0[0].principals, clause.0[0].principals);
        assert_eq!(none.0[0].aliased, (0, 0));
    }
}
