//! The frame: a group's unit of order, and its bytes.
//!
//! A frame has a *head* (header, table of records, checksum of each content block) and *content*.
//! The frame's hash is taken over the head; as the head holds the checksum of every block and the
//! hash of the frame before, it names the content and all history too. How the content is stored
//! (raw, compressed) is not part of the frame: it lies beside it in the [`envelope`], and differs
//! between the copies of one frame.
//!
//! The layouts are specified in `docs/formats.md`; this is the only code that reads or writes them.

mod build;
mod decode;
pub mod envelope;
mod record;
#[cfg(test)]
mod tests;

pub use build::{Builder, HeaderFields};
pub use decode::{Block, FrameError, Head};
pub use record::{MarkKind, Record, ResyncReason};

use crate::ids::{EpochId, FrameHash, GroupId, Seq};
use crate::time::{LogTime, WallTime};

/// First bytes of a head.
pub const MAGIC: [u8; 4] = *b"SRNf";

/// Version of the head's layout.
pub const VERSION: u16 = 1;

/// Length of the header in bytes; the table follows.
pub const HEADER_LEN: usize = 128;

/// The header's fields.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// The group whose history this is.
    pub group: GroupId,
    /// The epoch in which the frame was written.
    pub epoch: EpochId,
    /// Its place in the lineage.
    pub seq: Seq,
    /// The hash of the frame before it.
    pub prev: FrameHash,
    /// The highest sequence number known to be durable at the writer when this was written.
    pub durable: Seq,
    /// The group's own time.
    pub log_time: LogTime,
    /// The writer's wall clock.
    pub wall_time: WallTime,
    /// Number of records.
    pub records: u32,
    /// Number of content blocks.
    pub blocks: u32,
    /// Content in bytes.
    pub content_len: u32,
}

/// The hash that names a frame.
#[must_use]
pub fn hash_head(head: &[u8]) -> FrameHash {
    let digest = blake3::hash(head);
    let mut hash = [0u8; 16];
    for (to, from) in hash.iter_mut().zip(digest.as_bytes()) {
        *to = *from;
    }
    FrameHash(hash)
}

/// Lengths in bytes of the blocks into which a write of `len` bytes is cut.
pub fn block_lens(len: usize) -> impl Iterator<Item = usize> {
    let max = crate::limits::BLOCK_MAX;
    (0..len.div_ceil(max)).map(move |at| max.min(len - at * max))
}
