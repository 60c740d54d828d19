//! Which names a query may stand for (facts ztunnel 9.2): Kubernetes' short forms, and names that a
//! resolver lengthened by a search domain. How many dots make a name complete (ndots) is decided by
//! the client's own resolver, which asks the forms in its order.

/// What a pod's names are read with.
#[derive(Clone, Copy, Debug)]
pub struct Scope<'a> {
    /// Of the client.
    pub namespace: &'a str,
    /// For example cluster.local.
    pub cluster_domain: &'a str,
    /// Lower case, without a dot at the end; the pod's own, or None for Kubernetes' usual three.
    pub search: Option<&'a [String]>,
}

/// A service's own name, that of one with such a pod, and one that is declared.
const MOST_KEYS: usize = 3;

/// A name to look up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    pub name: String,
    /// What was asked for without its search domain, where one was taken off.
    pub stripped: Option<String>,
}

impl Scope<'_> {
    /// In the order in which they count; none twice. `asked` is in lower case without a dot at the
    /// end.
    pub fn candidates(&self, asked: &str) -> Vec<Candidate> {
        let mut found = Vec::with_capacity(8);
        self.expand(asked, None, &mut found);
        match self.search {
            Some(search) => {
                let search = search.iter().map(String::as_str);
                search.for_each(|domain| self.strip(asked, domain, &mut found));
            }
            None => {
                let domain = self.cluster_domain;
                let own = format!("{}.svc.{domain}", self.namespace);
                for domain in [&own, &own[self.namespace.len() + 1..], domain] {
                    self.strip(asked, domain, &mut found);
                }
            }
        }
        found
    }

    /// As what a control plane is asked for them, on demand: `namespace/hostname`. Services of the
    /// cluster tell their namespace; another name may be declared in the client's. Names with a
    /// search domain aren't: without an answer the client asks for them bare.
    pub fn keys(&self, candidates: &[Candidate]) -> Vec<String> {
        let mut found = Vec::with_capacity(MOST_KEYS);
        for candidate in candidates.iter().filter(|c| c.stripped.is_none()) {
            let Some(key) = self.key(&candidate.name) else {
                continue;
            };
            if !found.contains(&key) {
                found.push(key);
            }
            if found.len() == MOST_KEYS {
                break;
            }
        }
        found
    }

    fn key(&self, name: &str) -> Option<String> {
        let sane = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_');
        if !name.bytes().all(sane) {
            return None;
        }
        let rest = name.strip_suffix(self.cluster_domain);
        let Some(rest) = rest.and_then(|rest| rest.strip_suffix('.')) else {
            // A bare word is nobody's hostname, and in the cluster it has longer forms.
            let whole = name.contains('.') && !name.ends_with(".svc");
            return whole.then(|| format!("{}/{name}", self.namespace));
        };
        let service = rest.strip_suffix(".svc")?;
        match service.split('.').collect::<Vec<_>>()[..] {
            [_, namespace] => Some(format!("{namespace}/{name}")),
            // A pod of a headless service.
            [pod, _, namespace] => Some(format!("{namespace}/{}", &name[pod.len() + 1..])),
            _ => None,
        }
    }

    fn strip(&self, asked: &str, domain: &str, found: &mut Vec<Candidate>) {
        let rest = asked.strip_suffix(domain);
        if let Some(stripped) = rest.and_then(|rest| rest.strip_suffix('.')) {
            self.expand(stripped, Some(stripped), found);
        }
    }

    /// The name, then what Kubernetes would take it for, by its number of labels.
    fn expand(&self, name: &str, stripped: Option<&str>, found: &mut Vec<Candidate>) {
        let (namespace, domain) = (self.namespace, self.cluster_domain);
        let service = name.ends_with(".svc");
        let mut add = |name: String| {
            if found.iter().all(|known| known.name != name) {
                let stripped = stripped.map(str::to_owned);
                found.push(Candidate { name, stripped });
            }
        };
        add(name.to_owned());
        match name.split('.').count() {
            1 => add(format!("{name}.{namespace}.svc.{domain}")),
            2 => {
                add(format!("{name}.svc.{domain}"));
                add(format!("{name}.{namespace}.svc.{domain}"));
            }
            3 if service => {
                add(format!("{name}.{domain}"));
                add(format!("{name}.svc.{domain}"));
            }
            3 => add(format!("{name}.svc.{domain}")),
            4 if service => add(format!("{name}.{domain}")),
            _ => {}
        }
    }
}

/// `*.b.c`, `*.c` for `a.b.c`: from the most to the least specific.
pub fn wildcards(name: &str) -> impl Iterator<Item = String> {
    let dots = name.match_indices('.');
    dots.map(|(at, _)| format!("*{}", &name[at..]))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(asked: &str, search: Option<&[String]>) -> Vec<String> {
        let scope = Scope {
            namespace: "ns1",
            cluster_domain: "cluster.local",
            search,
        };
        let show = |c: Candidate| match c.stripped {
            Some(stripped) => format!("{} <- {stripped}", c.name),
            None => c.name,
        };
        scope.candidates(asked).into_iter().map(show).collect()
    }

    #[test]
    fn short_names_are_completed_as_kubernetes_would() {
        assert_eq!(names("db", None), ["db", "db.ns1.svc.cluster.local"]);
        let two = [
            "db.ns2",
            "db.ns2.svc.cluster.local",
            "db.ns2.ns1.svc.cluster.local",
        ];
        assert_eq!(names("db.ns2", None), two);
        let three = [
            "db.ns2.svc",
            "db.ns2.svc.cluster.local",
            "db.ns2.svc.svc.cluster.local",
        ];
        assert_eq!(names("db.ns2.svc", None), three);
        let pod = ["db-0.db.ns2", "db-0.db.ns2.svc.cluster.local"];
        assert_eq!(names("db-0.db.ns2", None), pod);
        let four = ["db-0.db.ns2.svc", "db-0.db.ns2.svc.cluster.local"];
        assert_eq!(names("db-0.db.ns2.svc", None), four);
        assert_eq!(names("a.b.c.d.e", None), ["a.b.c.d.e"]);
    }

    #[test]
    fn search_domains_are_taken_off_and_no_name_comes_twice() {
        let found = names("www.example.com.ns1.svc.cluster.local", None);
        assert_eq!(
            found,
            [
                "www.example.com.ns1.svc.cluster.local",
                "www.example.com <- www.example.com",
                "www.example.com.svc.cluster.local <- www.example.com",
                "www.example.com.ns1 <- www.example.com.ns1",
                "www.example.com.ns1.svc <- www.example.com.ns1.svc",
            ]
        );
        let own = ["corp.example".to_owned()];
        let found = names("db.corp.example", Some(&own));
        let expected = [
            "db.corp.example",
            "db.corp.example.svc.cluster.local",
            "db <- db",
            "db.ns1.svc.cluster.local <- db",
        ];
        assert_eq!(found, expected);
        assert_eq!(names("corp.example", Some(&own)).len(), 3);
    }

    #[test]
    fn what_may_be_in_the_mesh_is_asked_for_by_namespace_and_hostname() {
        let scope = Scope {
            namespace: "ns1",
            cluster_domain: "cluster.local",
            search: None,
        };
        let keys = |asked| scope.keys(&scope.candidates(asked));
        assert_eq!(keys("db"), ["ns1/db.ns1.svc.cluster.local"]);
        let other = "ns2/db.ns2.svc.cluster.local";
        assert!(keys("db.ns2").contains(&other.to_owned()));
        for asked in [
            "db.ns2.svc",
            "db.ns2.svc.cluster.local",
            "db-0.db.ns2.svc.cluster.local",
        ] {
            assert_eq!(keys(asked).first().map(String::as_str), Some(other));
        }
        let declared = "ns1/www.example.com".to_owned();
        assert!(keys("www.example.com").contains(&declared));
        // As libc asks first with its search list.
        assert!(keys("www.example.com.ns1.svc.cluster.local").is_empty());
        assert!(keys("odd\\name.example.com").is_empty());
        assert!(keys("a.b.c.d.e.f.ns1.svc.cluster.local").len() <= MOST_KEYS);
    }

    #[test]
    fn wildcards_go_from_the_most_specific_on() {
        let found: Vec<_> = wildcards("a.b.c").collect();
        assert_eq!(found, ["*.b.c", "*.c"]);
        assert_eq!(wildcards("a").count(), 0);
    }
}
