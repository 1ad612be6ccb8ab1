//! The index of a segment that is being written: in memory.

use srn_core::extent::{Extent, ExtentMap};
use srn_core::frame::{MarkKind, Record, block_lens};
use srn_core::ids::{CheckpointId, DiskNo, FrameHash, Seq};
use srn_core::point::Standing;
use srn_core::time::{LogTime, WallTime};

use super::{Lookup, Place};
use crate::catalog::Catalog;
use crate::error::Result;
use crate::frame::{BadFrame, Frame};

/// A place to begin reading a segment: a frame and where it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SeqPoint {
    /// The frame.
    pub seq: Seq,
    /// The hash of the frame before it.
    pub prev: FrameHash,
    /// Its offset in the segment, in bytes.
    pub offset: u32,
    /// Its log time.
    pub log_time: LogTime,
    /// Its wall time.
    pub wall_time: WallTime,
    /// The wall time of the frame before it, or its own when that is not known.
    pub before: WallTime,
    /// How every position up to the next such place stands.
    pub standing: Standing,
}

/// A checkpoint's mark in the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MarkPoint {
    /// The checkpoint.
    pub id: CheckpointId,
    /// How it came about.
    pub kind: MarkKind,
    /// The frame it is in.
    pub seq: Seq,
    /// That frame's hash.
    pub hash: FrameHash,
    /// That frame's log time.
    pub log_time: LogTime,
    /// That frame's wall time.
    pub wall_time: WallTime,
    /// Whether every disk of the group was clean there.
    pub clean: bool,
    /// Whether the applications were quiet.
    pub application: bool,
}

/// Bytes between two [`SeqPoint`]s.
const SEQ_STEP: u32 = 256 * 1024;

/// Entries, marks and places to begin, of one segment.
#[derive(Debug, Clone, Default)]
pub struct MemTable {
    entries: ExtentMap<Place>,
    points: Vec<SeqPoint>,
    marks: Vec<MarkPoint>,
    /// Wall time of the last frame.
    wall_time: Option<WallTime>,
}

impl MemTable {
    /// The table of a segment that goes on behind this position.
    #[must_use]
    pub fn behind(catalog: &Catalog) -> Self {
        let wall_time = (catalog.at.seq > Seq::ZERO).then_some(catalog.wall_time);
        Self { wall_time, ..Self::default() }
    }

    /// Takes in a frame that lies at `offset` of segment `ordinal`. Without `entries` only places
    /// to begin and marks are kept. `standing` says how the position behind it stands.
    ///
    /// A frame is a place to begin also where the wall clock went back, and where positions stand
    /// otherwise than before: so a time is found, and what cannot be recovered, without reading
    /// all frames.
    ///
    /// # Errors
    /// Never for a frame that was made or read: the same was checked then.
    pub fn add(
        &mut self,
        frame: &Frame,
        ordinal: u32,
        offset: u32,
        entries: bool,
        standing: Standing,
    ) -> std::result::Result<(), BadFrame> {
        let header = frame.header();
        let before = self.wall_time.replace(header.wall_time).unwrap_or(header.wall_time);
        let same = |last: &SeqPoint| {
            offset - last.offset < SEQ_STEP
                && header.wall_time >= before
                && last.standing == standing
        };
        if !self.points.last().is_some_and(same) {
            self.points.push(SeqPoint {
                seq: header.seq,
                prev: header.prev,
                offset,
                log_time: header.log_time,
                wall_time: header.wall_time,
                before,
                standing,
            });
        }
        let head = frame.head()?;
        let mut blocks = if entries { frame.blocks()? } else { Vec::new() }.into_iter();
        let content = offset + u32::try_from(frame.envelope().disk_content_offset()).unwrap_or(0);
        for record in head.records() {
            match record {
                Record::Write { disk, .. } if entries => {
                    let count = block_lens(record.content_len()).count();
                    for (block, stored, at) in blocks.by_ref().take(count) {
                        let place = Place::Block {
                            segment: ordinal,
                            offset: content + at,
                            stored_len: stored.len,
                            codec: stored.codec,
                            sum: block.sum,
                            sectors: u8::try_from(block.extent.sectors).unwrap_or(u8::MAX),
                            skip: 0,
                        };
                        self.entries.insert(disk, block.extent, place);
                    }
                }
                Record::Zero { disk, extent } if entries => {
                    self.entries.insert(disk, extent, Place::Zero { trim: false });
                }
                Record::Trim { disk, extent } if entries => {
                    self.entries.insert(disk, extent, Place::Zero { trim: true });
                }
                Record::Mark { id, kind, application } => self.marks.push(MarkPoint {
                    id,
                    kind,
                    seq: header.seq,
                    hash: frame.envelope().hash,
                    log_time: header.log_time,
                    wall_time: header.wall_time,
                    clean: standing == Standing::Whole,
                    application,
                }),
                _ => {}
            }
        }
        Ok(())
    }

    /// Number of entries.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there is no entry.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Entries in order of disk and sector.
    pub fn entries(&self) -> impl Iterator<Item = (DiskNo, Extent, Place)> {
        self.entries.iter().map(|(disk, extent, place)| (disk, extent, *place))
    }

    /// Places to begin, in order.
    #[must_use]
    pub fn points(&self) -> &[SeqPoint] {
        &self.points
    }

    /// Marks, in order.
    #[must_use]
    pub fn marks(&self) -> &[MarkPoint] {
        &self.marks
    }
}

impl Lookup for MemTable {
    fn lookup(&self, disk: DiskNo, extent: Extent, out: &mut Vec<(Extent, Place)>) -> Result<()> {
        out.extend(self.entries.overlaps(disk, extent));
        Ok(())
    }
}
