//! A persistent hash table: cloning is O(1), a change copies only the path to one small leaf, and a
//! writer that owns a path alone changes it in place, so that a bulk load copies nothing.
//!
//! Entries are found by a 32-bit tag and the caller's comparison, so a record that knows its own key
//! costs 16 bytes a table, and several records may share a key. Entries of one tag keep the order in
//! which they were inserted.

use std::hash::Hash;
use std::sync::{Arc, LazyLock};

const BITS: u32 = 3;
const FAN_OUT: usize = 1 << BITS;
/// A full leaf is scanned by comparing 32 integers: less than one miss in memory.
const LEAF: usize = 32;
/// Deeper there are no bits of the tag left to tell entries apart.
const MAX_DEPTH: u32 = 32 / BITS;

pub struct Table<T> {
    root: Node<T>,
    len: usize,
}

enum Node<T> {
    Empty,
    Leaf(Arc<Vec<(u32, T)>>),
    Branch(Arc<[Node<T>; FAN_OUT]>),
}

/// Seeded once a process: names come from outside.
pub fn tag<K: Hash + ?Sized>(key: &K) -> u32 {
    static SEED: LazyLock<ahash::RandomState> = LazyLock::new(ahash::RandomState::new);
    let hash = SEED.hash_one(key);
    (hash ^ (hash >> 32)) as u32
}

impl<T> Table<T> {
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// All entries of this tag, oldest first. The caller compares keys.
    pub fn matching(&self, tag: u32) -> impl DoubleEndedIterator<Item = &T> {
        let leaf: &[(u32, T)] = self.leaf(tag);
        leaf.iter()
            .filter(move |(t, _)| *t == tag)
            .map(|(_, entry)| entry)
    }

    pub fn get(&self, tag: u32, is: impl Fn(&T) -> bool) -> Option<&T> {
        self.matching(tag).find(|entry| is(entry))
    }

    pub fn iter(&self) -> Iter<'_, T> {
        Iter {
            nodes: vec![&self.root],
            leaf: [].iter(),
        }
    }

    fn leaf(&self, tag: u32) -> &[(u32, T)] {
        let mut node = &self.root;
        for depth in 0.. {
            match node {
                Node::Empty => break,
                Node::Leaf(leaf) => return leaf,
                Node::Branch(children) => node = &children[slot(tag, depth)],
            }
        }
        &[]
    }
}

impl<T: Clone> Table<T> {
    /// Adds an entry; never replaces one.
    pub fn insert(&mut self, tag: u32, entry: T) {
        self.len += 1;
        self.root.insert(0, tag, entry);
    }

    /// Replaces the entry for which `is` holds, in its place, or adds this one.
    pub fn upsert(&mut self, tag: u32, entry: T, is: impl Fn(&T) -> bool) -> Option<T> {
        match self.get_mut(tag, is) {
            Some(found) => Some(std::mem::replace(found, entry)),
            None => {
                self.insert(tag, entry);
                None
            }
        }
    }

    /// Copies the path to the entry if a snapshot shares it.
    pub fn get_mut(&mut self, tag: u32, is: impl Fn(&T) -> bool) -> Option<&mut T> {
        let index = self.position(tag, is)?;
        let leaf = self.root.leaf_mut(tag)?;
        Arc::make_mut(leaf).get_mut(index).map(|(_, entry)| entry)
    }

    pub fn remove(&mut self, tag: u32, is: impl Fn(&T) -> bool) -> Option<T> {
        let index = self.position(tag, is)?;
        self.len -= 1;
        let leaf = self.root.leaf_mut(tag)?;
        // Keeps the order: among equals the last one added wins (facts ztunnel 2.7).
        Some(Arc::make_mut(leaf).remove(index).1)
    }

    fn position(&self, tag: u32, is: impl Fn(&T) -> bool) -> Option<usize> {
        self.leaf(tag)
            .iter()
            .position(|(t, entry)| *t == tag && is(entry))
    }
}

impl<T: Clone> Node<T> {
    fn insert(&mut self, depth: u32, tag: u32, entry: T) {
        match self {
            Self::Empty => *self = Self::Leaf(Arc::new(vec![(tag, entry)])),
            Self::Leaf(leaf) if leaf.len() < LEAF || depth == MAX_DEPTH => {
                Arc::make_mut(leaf).push((tag, entry));
            }
            Self::Leaf(leaf) => {
                let full = Arc::unwrap_or_clone(std::mem::take(leaf));
                let mut children = [const { Self::Empty }; FAN_OUT];
                for (tag, entry) in full.into_iter().chain([(tag, entry)]) {
                    children[slot(tag, depth)].insert(depth + 1, tag, entry);
                }
                *self = Self::Branch(Arc::new(children));
            }
            Self::Branch(children) => {
                Arc::make_mut(children)[slot(tag, depth)].insert(depth + 1, tag, entry);
            }
        }
    }

    fn leaf_mut(&mut self, tag: u32) -> Option<&mut Arc<Vec<(u32, T)>>> {
        let mut node = self;
        for depth in 0.. {
            match node {
                Self::Empty => break,
                Self::Leaf(leaf) => return Some(leaf),
                Self::Branch(children) => {
                    node = &mut Arc::make_mut(children)[slot(tag, depth)];
                }
            }
        }
        None
    }
}

fn slot(tag: u32, depth: u32) -> usize {
    (tag >> (depth * BITS)) as usize % FAN_OUT
}

impl<T> Default for Table<T> {
    fn default() -> Self {
        Self {
            root: Node::Empty,
            len: 0,
        }
    }
}

impl<T> Clone for Table<T> {
    fn clone(&self) -> Self {
        Self {
            root: self.root.clone(),
            len: self.len,
        }
    }
}

impl<T> Clone for Node<T> {
    fn clone(&self) -> Self {
        match self {
            Self::Empty => Self::Empty,
            Self::Leaf(leaf) => Self::Leaf(leaf.clone()),
            Self::Branch(children) => Self::Branch(children.clone()),
        }
    }
}

pub struct Iter<'a, T> {
    nodes: Vec<&'a Node<T>>,
    leaf: std::slice::Iter<'a, (u32, T)>,
}

impl<'a, T> Iterator for Iter<'a, T> {
    type Item = &'a T;

    fn next(&mut self) -> Option<&'a T> {
        loop {
            if let Some((_, entry)) = self.leaf.next() {
                return Some(entry);
            }
            match self.nodes.pop()? {
                Node::Empty => {}
                Node::Leaf(leaf) => self.leaf = leaf.iter(),
                Node::Branch(children) => self.nodes.extend(children.iter().rev()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Few tag bits make collisions and deep leaves; every step keeps an older clone unchanged.
        #[test]
        fn behaves_like_a_map_and_leaves_clones_alone(
            steps in proptest::collection::vec((0u16..600, any::<bool>()), 1..1500),
            mask in prop_oneof![Just(u32::MAX), Just(0xff), Just(0)],
        ) {
            let key_tag = |key: u16| tag(&key) & mask;
            let mut table = Table::default();
            let mut model = BTreeMap::new();
            let half = steps.len() / 2;
            let mut older = None;
            for (i, (key, put)) in steps.iter().enumerate() {
                if i == half {
                    older = Some((table.clone(), model.clone()));
                }
                if *put {
                    let was = table.upsert(key_tag(*key), (*key, i), |(k, _)| k == key);
                    prop_assert_eq!(was.map(|(_, v)| v), model.insert(*key, i));
                } else {
                    let was = table.remove(key_tag(*key), |(k, _)| k == key);
                    prop_assert_eq!(was.map(|(_, v)| v), model.remove(key));
                }
            }
            for (table, model) in older.into_iter().chain([(table, model)]) {
                prop_assert_eq!(table.len(), model.len());
                prop_assert_eq!(table.iter().copied().collect::<BTreeMap<_, _>>(), model.clone());
                for key in 0..600 {
                    let found = table.get(key_tag(key), |(k, _)| *k == key).map(|(_, v)| *v);
                    prop_assert_eq!(found, model.get(&key).copied());
                }
            }
        }
    }

    #[test]
    fn entries_of_one_key_keep_their_order() {
        let mut table = Table::default();
        (0..100).for_each(|n| table.insert(7, n));
        assert!(table.matching(7).copied().eq(0..100));
        table.remove(7, |n| *n == 50);
        assert_eq!(table.matching(7).copied().nth(50), Some(51));
    }
}
