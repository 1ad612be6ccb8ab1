//! Names that people give to groups, disks and nodes.
//!
//! A name is also used as an NBD export name, in file names and in shell commands, so its alphabet
//! is small. Names can change; identity is always an id.

use alloc::string::String;
use core::fmt;
use core::str::FromStr;

use crate::limits::NAME_LEN_MAX;

/// A well-formed name: 1 to 63 characters of `a-z 0-9 . _ -`, beginning with a letter or digit.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Name(String);

/// Why a text is not a name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "malformed name {0:?}: use 1 to {NAME_LEN_MAX} of a-z, 0-9, '.', '_', '-', \
     beginning with a letter or a digit"
)]
pub struct MalformedName(pub String);

impl Name {
    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether a text is a name.
    #[must_use]
    pub fn is_well_formed(text: &str) -> bool {
        let first_ok =
            text.bytes().next().is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
        let rest_ok = text.bytes().all(|b| {
            b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'.' | b'_' | b'-')
        });
        first_ok && rest_ok && text.len() <= NAME_LEN_MAX
    }
}

impl FromStr for Name {
    type Err = MalformedName;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if Self::is_well_formed(text) {
            Ok(Self(text.into()))
        } else {
            Err(MalformedName(text.chars().take(NAME_LEN_MAX + 1).collect()))
        }
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn good_names() {
        for text in ["a", "0", "web-1", "db.prod_2", &"x".repeat(63)] {
            assert_eq!(text.parse::<Name>().map(|n| n.0), Ok(text.into()));
        }
    }

    #[test]
    fn malformed_names() {
        for text in ["", "-a", ".a", "A", "a b", "a/b", "\u{e4}", "..", &"x".repeat(64)] {
            assert!(text.parse::<Name>().is_err(), "{text:?}");
        }
    }
}
