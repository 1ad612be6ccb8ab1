//! An immutable index file: the entries of a range of frames, as a tree of 4 KiB blocks.
//!
//! ```text
//! leaf blocks (sorted entries) | inner blocks, level by level | points | marks | catalog | footer
//! ```
//!
//! Every block ends with a checksum of what is before it; the footer holds a BLAKE3 hash of the
//! whole file before it. It is written once, front to back, and never changed.

mod read;
mod write;

pub use read::{BlockCache, Run};
pub use write::{RunScope, RunWriter};

use srn_core::bytes::content_sum;
use srn_core::ids::{EpochId, Seq};
use srn_core::limits::PAGE;

/// First bytes of a footer.
const MAGIC: [u8; 4] = *b"SRNx";

/// Version of the file's layout.
const VERSION: u16 = 1;

/// Bytes of a block before its content: count, level.
const BLOCK_HEAD: usize = 8;

/// Bytes of content in a block; its checksum takes the last eight.
const BLOCK_ROOM: usize = PAGE - BLOCK_HEAD - 8;

/// Bytes of an entry of an inner block: first key of the child, its block number.
const INNER_LEN: usize = 12;

/// Bytes of a point and of a mark.
const POINT_LEN: usize = 36;
const MARK_LEN: usize = 64;

/// Block levels that are no part of the tree.
const LEVEL_POINTS: u8 = 0xf0;
const LEVEL_MARKS: u8 = 0xf1;
const LEVEL_CATALOG: u8 = 0xf2;
const LEVEL_FOOTER: u8 = 0xf3;

/// What the manifest knows of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RunMeta {
    /// The file's number; never reused.
    pub file: u32,
    /// 0 for the index of one segment, one more for each merging.
    pub level: u8,
    /// The epoch of its frames.
    pub epoch: EpochId,
    /// The first frame.
    pub first: Seq,
    /// The last frame.
    pub last: Seq,
    /// Number of entries.
    pub entries: u64,
}

/// The file name of a run.
#[must_use]
pub fn file_name(file: u32) -> String {
    format!("{file:08x}.idx")
}

/// The number of a file name.
#[must_use]
pub fn number_of(name: &str) -> Option<u32> {
    let hex = name.strip_suffix(".idx").filter(|hex| hex.len() == 8)?;
    u32::from_str_radix(hex, 16).ok()
}

/// Makes a block of `content`, which holds `count` items.
fn seal_block(content: &[u8], count: u16, level: u8) -> [u8; PAGE] {
    let mut block = [0u8; PAGE];
    let [count_low, count_high] = count.to_le_bytes();
    let head = [count_low, count_high, level, 0, 0, 0, 0, 0];
    for (to, from) in block.iter_mut().zip(head.iter().chain(content)) {
        *to = *from;
    }
    if let Some((bytes, sum)) = block.split_last_chunk_mut::<8>() {
        *sum = content_sum(bytes).to_le_bytes();
    }
    block
}

/// The count and content of a block; `None` when it is damaged or of another level.
fn open_block(block: &[u8; PAGE], level: u8) -> Option<(usize, &[u8])> {
    let (bytes, sum) = block.split_last_chunk::<8>()?;
    let (head, content) = bytes.split_first_chunk::<BLOCK_HEAD>()?;
    let [count_low, count_high, found, ..] = *head;
    let sound = content_sum(bytes) == u64::from_le_bytes(*sum) && found == level;
    sound.then(|| (usize::from(u16::from_le_bytes([count_low, count_high])), content))
}
