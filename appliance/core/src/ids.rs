//! Identities: fixed-size opaque numbers that never change and are never reused.
//!
//! Ids are made from entropy that the caller supplies. Their text form is lower-case hexadecimal;
//! parsing accepts exactly what printing makes, in either case.

use core::fmt;
use core::str::FromStr;

/// Why a text is not an id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("expected {expected} hexadecimal digits")]
pub struct ParseIdError {
    expected: usize,
}

macro_rules! id {
    ($(#[$doc:meta])* $name:ident, $bytes:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub [u8; $bytes]);

        impl $name {
            /// Length of the binary form in bytes.
            pub const LEN: usize = $bytes;

            /// The first eight hexadecimal digits, for people; never for comparison.
            #[must_use]
            pub fn short(&self) -> alloc::string::String {
                let mut text = alloc::format!("{self}");
                text.truncate(8);
                text
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({self})", stringify!($name))
            }
        }

        impl FromStr for $name {
            type Err = ParseIdError;

            fn from_str(text: &str) -> Result<Self, Self::Err> {
                let mut bytes = [0u8; $bytes];
                parse_hex(text, &mut bytes).ok_or(ParseIdError { expected: 2 * $bytes })?;
                Ok(Self(bytes))
            }
        }
    };
}

id!(
    /// A protection group, the same at both nodes.
    GroupId,
    16
);
id!(
    /// A protected disk, unique for ever.
    DiskId,
    16
);
id!(
    /// One uninterrupted reign of one primary over a group's log; a failover makes a new one.
    EpochId,
    16
);
id!(
    /// A checkpoint, named by the mark in the log.
    CheckpointId,
    16
);
id!(
    /// A node: the SHA-256 of its public key (the DER SubjectPublicKeyInfo). This is what peers pin.
    NodeId,
    32
);
id!(
    /// The chained identity of a frame: the first 16 bytes of BLAKE3 over its header and table.
    FrameHash,
    16
);

impl EpochId {
    /// An epoch's id: its reign, and chance for the rest.
    #[must_use]
    pub fn new(reign: u32, random: [u8; 16]) -> Self {
        let mut bytes = random;
        if let Some(last) = bytes.last_chunk_mut() {
            *last = reign.to_be_bytes();
        }
        Self(bytes)
    }

    /// Its number: a failover takes the next one after all that its node has heard of. Of two epochs
    /// that do not lie on one line the one with the higher number is the newer one: whoever began it
    /// knew of the other, or of one that came after that.
    #[must_use]
    pub fn reign(&self) -> u32 {
        self.0.last_chunk().map_or(0, |last| u32::from_be_bytes(*last))
    }
}

impl FrameHash {
    /// What the first frame of a group's first epoch names as its predecessor.
    pub const ORIGIN: Self = Self([0; 16]);
}

fn parse_hex(text: &str, out: &mut [u8]) -> Option<()> {
    let digits = text.as_bytes();
    if digits.len() != out.len() * 2 {
        return None;
    }
    for (pair, byte) in digits.chunks_exact(2).zip(out.iter_mut()) {
        let &[high, low] = pair else { return None };
        *byte = (hex_digit(high)? << 4) | hex_digit(low)?;
    }
    Some(())
}

const fn hex_digit(digit: u8) -> Option<u8> {
    match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        b'A'..=b'F' => Some(digit - b'A' + 10),
        _ => None,
    }
}

/// The place of a frame in its lineage: 1 for the first frame of a group, rising by one across
/// epochs, so that a fork's first frame follows the frame it forked from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Seq(pub u64);

impl Seq {
    /// Before the first frame.
    pub const ZERO: Self = Self(0);

    /// The sequence number that follows.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0 + 1)
    }

    /// The sequence number before, or zero.
    #[must_use]
    pub const fn prev(self) -> Self {
        Self(self.0.saturating_sub(1))
    }
}

impl fmt::Display for Seq {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A disk's number inside its group: given by the log at `DiskAdd`, never reused in that group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DiskNo(pub u32);

impl fmt::Display for DiskNo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::string::ToString;

    #[test]
    fn an_epochs_id_ends_in_its_reign() {
        let id = EpochId::new(0x0102_0304, [0xaa; 16]);
        assert_eq!(alloc::format!("{id}"), "aaaaaaaaaaaaaaaaaaaaaaaa01020304");
        assert_eq!(id.reign(), 0x0102_0304);
    }

    #[test]
    fn text_form_round_trips() {
        let id = GroupId([0xa5; 16]);
        assert_eq!(id.to_string().parse(), Ok(id));
        assert_eq!(id.to_string().to_uppercase().parse(), Ok(id));
        assert_eq!(id.short(), "a5a5a5a5");
    }

    #[test]
    fn malformed_text_is_refused() {
        for text in ["", "a5", "zz5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a", &"a".repeat(33)] {
            assert!(text.parse::<GroupId>().is_err(), "{text:?}");
        }
    }
}
