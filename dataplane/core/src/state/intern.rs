//! One copy of what many records repeat: strings, lists, and whole groups of fields. Only the writer
//! uses it; what no record holds any more is forgotten now and then.

use std::collections::HashSet;
use std::hash::Hash;
use std::sync::Arc;

use super::service::{Membership, PortMap};
use super::workload::{Common, Locality};

#[derive(Default)]
pub struct Interner {
    pub strings: Pool<str>,
    pub names: Pool<[Arc<str>]>,
    pub ports: Pool<[PortMap]>,
    pub memberships: Pool<[Membership]>,
    pub localities: Pool<Locality>,
    pub commons: Pool<Common>,
}

pub struct Pool<T: ?Sized> {
    known: HashSet<Arc<T>, ahash::RandomState>,
    sweep_at: usize,
}

impl Interner {
    pub fn text(&mut self, text: &str) -> Arc<str> {
        self.strings.borrowed(text)
    }

    pub fn text_or(&mut self, text: &str, default: &str) -> Arc<str> {
        self.text(if text.is_empty() { default } else { text })
    }
}

impl<T: ?Sized + Hash + Eq> Pool<T> {
    pub fn borrowed<'a>(&mut self, value: &'a T) -> Arc<T>
    where
        Arc<T>: From<&'a T>,
    {
        match self.known.get(value) {
            Some(known) => known.clone(),
            None => self.add(Arc::from(value)),
        }
    }

    pub fn owned(&mut self, value: T) -> Arc<T>
    where
        T: Sized,
    {
        match self.known.get(&value) {
            Some(known) => known.clone(),
            None => self.add(Arc::new(value)),
        }
    }

    fn add(&mut self, value: Arc<T>) -> Arc<T> {
        if self.known.len() >= self.sweep_at {
            self.known.retain(|known| Arc::strong_count(known) > 1);
            self.sweep_at = (2 * self.known.len()).max(1024);
        }
        self.known.insert(value.clone());
        value
    }
}

impl<T: ?Sized> Default for Pool<T> {
    fn default() -> Self {
        Self {
            known: HashSet::default(),
            sweep_at: 1024,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_texts_share_memory_and_unused_ones_are_forgotten() {
        let mut pool = Pool::<str>::default();
        let kept = pool.borrowed("kept");
        assert!(Arc::ptr_eq(&kept, &pool.borrowed("kept")));
        for n in 0..10_000 {
            pool.borrowed(n.to_string().as_str());
        }
        assert!(pool.known.len() <= 1025, "{}", pool.known.len());
        assert!(Arc::ptr_eq(&kept, &pool.borrowed("kept")));
    }
}
