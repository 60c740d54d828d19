//! All policies of a snapshot, indexed by what they apply to, so that a decision looks only at those
//! that concern the destination. Policies are few and change seldom: each push rebuilds the index.

use std::collections::BTreeMap;
use std::sync::Arc;

use prost::Message;

use super::hits::Hits;
use super::record::{Policy, Published, Scope};
use crate::state::Bad;

type Map<V> = std::collections::HashMap<Arc<str>, V, ahash::RandomState>;

#[derive(Debug)]
pub enum Entry {
    Good(Policy),
    Malformed(Malformed),
}

/// A policy that was rejected and has no good version: it denies where it would have applied.
#[derive(Debug)]
pub struct Malformed {
    pub key: Arc<str>,
    pub namespace: Arc<str>,
    /// None where not even that could be read; it then holds for its namespace and for workloads
    /// that list it.
    pub scope: Option<Scope>,
    pub dry_run: bool,
    pub hits: Arc<Hits>,
}

#[derive(Debug, Default)]
pub struct PolicySet {
    by_name: Map<Arc<Entry>>,
    global: Box<[Arc<Entry>]>,
    by_namespace: Map<Vec<Arc<Entry>>>,
    /// Trust domains that are one to policies: this mesh's and its aliases. Empty without aliases.
    domains: Arc<[Arc<str>]>,
}

/// Changes of one push.
pub struct PolicyEdit {
    domains: Arc<[Arc<str>]>,
    entries: BTreeMap<Arc<str>, Arc<Entry>>,
}

impl Entry {
    pub fn key(&self) -> &Arc<str> {
        match self {
            Self::Good(policy) => &policy.key,
            Self::Malformed(malformed) => &malformed.key,
        }
    }

    pub fn hits(&self) -> &Arc<Hits> {
        match self {
            Self::Good(policy) => &policy.hits,
            Self::Malformed(malformed) => &malformed.hits,
        }
    }

    fn scope(&self) -> (Option<Scope>, &Arc<str>) {
        match self {
            Self::Good(policy) => (Some(policy.scope), &policy.namespace),
            Self::Malformed(malformed) => (malformed.scope, &malformed.namespace),
        }
    }
}

impl PolicySet {
    pub fn get(&self, name: &str) -> Option<&Arc<Entry>> {
        self.by_name.get(name)
    }

    pub fn len(&self) -> usize {
        self.by_name.len()
    }

    pub fn is_empty(&self) -> bool {
        self.by_name.is_empty()
    }

    /// All that concern a workload of this namespace that lists these. One that is both listed and
    /// in scope comes twice.
    pub fn applicable<'a>(
        &'a self,
        namespace: &str,
        listed: &'a [Arc<str>],
    ) -> impl Iterator<Item = &'a Entry> {
        let namespaced = self.by_namespace.get(namespace);
        let listed = listed.iter().filter_map(|name| self.by_name.get(name));
        self.global
            .iter()
            .chain(namespaced.into_iter().flatten())
            .chain(listed)
            .map(|entry| &**entry)
    }

    /// This one decided a connection; None: no policy did.
    pub fn count(&self, policy: Option<&str>) {
        if let Some(entry) = policy.and_then(|name| self.by_name.get(name)) {
            entry.hits().decided();
        }
    }

    /// All of them, good or not.
    pub fn entries(&self) -> impl Iterator<Item = &Entry> {
        self.by_name.values().map(|entry| &**entry)
    }

    /// By name.
    pub fn good(&self) -> Vec<Arc<Entry>> {
        let entries = self.by_name.values();
        let mut good: Vec<_> = entries
            .filter(|entry| matches!(***entry, Entry::Good(_)))
            .cloned()
            .collect();
        good.sort_by(|a, b| a.key().cmp(b.key()));
        good
    }

    pub fn domains(&self) -> &[Arc<str>] {
        &self.domains
    }

    /// The same policies where these trust domains are one.
    pub fn for_domains(&self, domains: Arc<[Arc<str>]>) -> Self {
        let mut edit = PolicyEdit::new(self);
        for entry in edit.entries.values_mut() {
            if let Entry::Good(policy) = &**entry {
                *entry = Arc::new(Entry::Good(policy.for_domains(&domains)));
            }
        }
        edit.domains = domains;
        edit.finish()
    }

    pub fn versions(&self) -> impl Iterator<Item = (String, String)> {
        self.by_name.values().filter_map(|entry| match &**entry {
            Entry::Good(policy) => Some((policy.key.to_string(), policy.version.to_string())),
            Entry::Malformed(_) => None,
        })
    }
}

impl PolicyEdit {
    pub fn new(set: &PolicySet) -> Self {
        let entries = set.by_name.iter();
        Self {
            domains: set.domains.clone(),
            entries: entries.map(|(k, e)| (k.clone(), e.clone())).collect(),
        }
    }

    pub fn remove(&mut self, name: &str) -> bool {
        self.entries.remove(name).is_some()
    }

    /// A policy that can't be read exactly is an error and leaves the last good version; where there
    /// is none, what can be read of its scope denies.
    pub fn put(&mut self, published: Published<'_>) -> Result<(), Bad> {
        match Policy::parse(&published) {
            Ok(policy) => {
                let mut policy = policy.for_domains(&self.domains);
                let key = policy.key.clone();
                if let Some(old) = self.entries.get(&key) {
                    policy.hits = old.hits().clone();
                }
                self.entries.insert(key, Arc::new(Entry::Good(policy)));
                Ok(())
            }
            Err(bad) => {
                self.deny(Malformed::read(published));
                Err(bad)
            }
        }
    }

    /// For a resource without any content: only its name says what it concerns.
    pub fn put_nothing(&mut self, name: &str) {
        self.deny(Malformed::named(name));
    }

    pub fn finish(self) -> PolicySet {
        let mut set = PolicySet {
            domains: self.domains,
            ..PolicySet::default()
        };
        let mut global = Vec::new();
        for (key, entry) in self.entries {
            let (scope, namespace) = entry.scope();
            match scope {
                Some(Scope::Global) => global.push(entry.clone()),
                Some(Scope::Namespace) | None => {
                    let entries = set.by_namespace.entry(namespace.clone());
                    entries.or_default().push(entry.clone());
                }
                Some(Scope::Selector) => {}
            }
            set.by_name.insert(key, entry);
        }
        set.global = global.into();
        set
    }

    fn deny(&mut self, malformed: Malformed) {
        let old = self.entries.get(&malformed.key);
        if malformed.key.is_empty() || old.is_some_and(|old| matches!(**old, Entry::Good(_))) {
            return;
        }
        let key = malformed.key.clone();
        self.entries
            .insert(key, Arc::new(Entry::Malformed(malformed)));
    }
}

impl Malformed {
    fn read(published: Published<'_>) -> Self {
        let mut malformed = Self::named(published.name);
        if let Ok(head) = Head::decode(published.value) {
            malformed.scope = Scope::parse(head.scope).ok();
            malformed.dry_run = head.dry_run;
            if !head.namespace.is_empty() {
                malformed.namespace = head.namespace.into();
            }
        }
        malformed
    }

    fn named(name: &str) -> Self {
        let namespace = name.split_once('/').map_or("", |(namespace, _)| namespace);
        Self {
            key: name.into(),
            namespace: namespace.into(),
            scope: None,
            dry_run: false,
            hits: Arc::default(),
        }
    }
}

/// istio.security.Authorization without its rules: readable also where a rule isn't.
#[derive(Clone, PartialEq, Message)]
struct Head {
    #[prost(string, tag = "2")]
    namespace: String,
    #[prost(int32, tag = "3")]
    scope: i32,
    #[prost(bool, tag = "6")]
    dry_run: bool,
}
