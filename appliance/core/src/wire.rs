//! What two paired nodes say to each other, as bytes. Specified in `docs/wire.md`; this is the only
//! code that reads or writes them.
//!
//! There are two kinds of streams in a session. The *control* stream carries [`Message`]s in both
//! directions. A *frame* stream carries one group's frames, from primary to secondary: first
//! [`StreamHeader`], then each frame as its envelope, head, encoding table and stored content. A
//! stream of *changes* carries what changed instead: first [`ChangesHeader`] and a catalog, then each
//! [`Item`].

mod changes;
mod integrity;
mod message;
mod stream;
#[cfg(test)]
mod tests;

pub use changes::{
    CATALOG_MAX, ChangesHeader, Item, ItemHead, LEAF_PAGES, LEAVES_MAX, LeafPages, Place, Wanted,
    Way,
};
pub use integrity::{
    CONTENT_HASH_LEN, CONTENT_SECTORS_MAX, CannotCode, Grain, HASHES_MAX, HashRange, HashRun,
    Integrity, Words,
};
pub use message::{
    Accept, CheckpointNote, Hello, Message, Offer, OfferedDisk, Progress, Refuse, RefuseCode, Under,
};
pub use stream::{StreamHeader, WireFrame, carries_changes};

use alloc::string::String;
use alloc::vec::Vec;

use crate::bytes::{Reader, Truncated, Writer};
use crate::limits::TEXT_MAX;

/// The version of everything on the wire. A node speaks with peers of exactly this version.
pub const VERSION: u16 = 1;

/// Length of the prefix of every control message: its length (type and body) in bytes.
pub const PREFIX_LEN: usize = 4;

/// Why bytes from a peer are not what the protocol says. Always the peer's fault.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// It ends too early.
    #[error("message {0}")]
    Truncated(#[from] Truncated),
    /// A message longer than any may be.
    #[error("message of {0} bytes, the most is {max}", max = crate::limits::MESSAGE_MAX)]
    TooLong(usize),
    /// A message of a type that this version does not have.
    #[error("unknown message type {0}")]
    UnknownType(u8),
    /// The peer speaks another version.
    #[error(
        "the peer speaks wire version {theirs}, this node speaks {VERSION}; update the older one"
    )]
    Version {
        /// What the peer speaks.
        theirs: u16,
    },
    /// A field out of its range; the text names it.
    #[error("message field out of range: {0}")]
    OutOfRange(&'static str),
    /// Bytes behind the end of a message.
    #[error("message has {0} bytes too many")]
    Trailing(usize),
}

/// Appends a text with its length. Text beyond [`TEXT_MAX`] bytes is cut.
fn put_text(out: &mut Vec<u8>, text: &str) {
    let mut end = text.len().min(TEXT_MAX);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    let text = text.get(..end).unwrap_or_default();
    out.put_u16(u16::try_from(text.len()).unwrap_or(0));
    out.put(text.as_bytes());
}

fn text(reader: &mut Reader<'_>) -> Result<String, WireError> {
    let len = usize::from(reader.u16()?);
    if len > TEXT_MAX {
        return Err(WireError::OutOfRange("text length"));
    }
    let text = core::str::from_utf8(reader.take(len)?)
        .map_err(|_| WireError::OutOfRange("text is not UTF-8"))?;
    // What a peer says is shown on terminals and in logs.
    if text.chars().any(char::is_control) {
        return Err(WireError::OutOfRange("text has control characters"));
    }
    Ok(text.into())
}
