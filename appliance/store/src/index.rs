//! Where the newest content of each sector lies.
//!
//! An index *entry* says where the content of one extent is: in a block of a frame in a segment,
//! or that it is zero. Entries of the segment being written are in memory, those of a sealed
//! segment in an immutable *run* file; runs are merged into larger ones in levels, so that a
//! lookup asks few of them. No index is truth: each can be made again from the frames.

mod cover;
mod entry;
mod merge;
mod run;
mod table;

pub use cover::{FAN_IN, PREFIX_LEVEL, cover, next_merge, span};
pub use entry::{ENTRY_LEN, Place};
pub use merge::{Item, Merge};
pub use run::{
    BadBlock, BlockCache, Entries, Run, RunCheck, RunMeta, RunScope, RunWriter,
    file_name as run_file_name, number_of as run_number_of,
};
pub use table::{MarkPoint, MemTable, SeqPoint};

use srn_core::extent::Extent;
use srn_core::ids::DiskNo;

use crate::error::Result;

/// One source of entries in a lookup.
pub trait Lookup {
    /// Appends the parts of `extent` that this source knows, in order and cut to it.
    ///
    /// # Errors
    /// When an index file cannot be read or is damaged.
    fn lookup(&self, disk: DiskNo, extent: Extent, out: &mut Vec<(Extent, Place)>) -> Result<()>;
}
