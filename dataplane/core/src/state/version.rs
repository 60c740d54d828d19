//! The version of a resource, kept beside it in little room.

use std::fmt;
use std::sync::Arc;

use super::intern::Interner;

/// istiod's versions are 64-bit hashes in hexadecimal: those take no memory of their own.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Version {
    #[default]
    None,
    Hex(u64),
    Text(Arc<str>),
}

impl Version {
    pub fn new(text: &str, interner: &mut Interner) -> Self {
        let canonical = text.len() <= 16
            && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
            && (text == "0" || !text.starts_with('0'));
        match u64::from_str_radix(text, 16) {
            _ if text.is_empty() => Self::None,
            Ok(hash) if canonical => Self::Hex(hash),
            _ => Self::Text(interner.text(text)),
        }
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => Ok(()),
            Self::Hex(hash) => write!(f, "{hash:x}"),
            Self::Text(text) => f.write_str(text),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_text_comes_back_as_it_was() {
        let mut interner = Interner::default();
        for text in [
            "",
            "0",
            "00",
            "7",
            "deadbeef",
            "0deadbeef",
            "DEADBEEF",
            "ffffffffffffffff",
            "+5",
            "12345678901234567",
            "2026-11-23T00:00:00Z/1",
        ] {
            assert_eq!(Version::new(text, &mut interner).to_string(), text);
        }
        assert_eq!(Version::new("9f", &mut interner), Version::Hex(0x9f));
    }
}
