//! Reading a frame's head. Input is hostile: it comes from a disk or a peer.

use super::record::{self, Record, RecordError};
use super::{HEADER_LEN, Header, MAGIC, VERSION, block_lens};
use crate::bytes::{Reader, Truncated};
use crate::extent::Extent;
use crate::ids::{DiskNo, EpochId, FrameHash, GroupId, Seq};
use crate::limits::{
    FRAME_BLOCKS_MAX, FRAME_HEAD_MAX, FRAME_PAYLOAD_MAX, FRAME_RECORDS_MAX, SECTOR,
};
use crate::time::{LogTime, WallTime};

/// Why bytes are not a frame's head.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// It ends too early.
    #[error("frame {0}")]
    Truncated(#[from] Truncated),
    /// It does not begin like a frame.
    #[error("frame has a wrong magic number")]
    Magic,
    /// It was written by a newer version.
    #[error("frame has format version {0}, this program knows {VERSION}")]
    Version(u16),
    /// A length or a count beyond its cap or against the others; the text names it.
    #[error("frame field out of range: {0}")]
    OutOfRange(&'static str),
    /// A record is malformed.
    #[error("frame {0}")]
    Record(#[from] RecordError),
    /// A mark is followed by another record.
    #[error("frame goes on after a mark")]
    AfterMark,
}

/// A checked head: every record in it decodes, and all lengths agree.
#[derive(Debug, Clone, Copy)]
pub struct Head<'a> {
    header: Header,
    table: &'a [u8],
    sums: &'a [u8],
}

/// One block of a frame's content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Block {
    /// The disk it belongs to.
    pub disk: DiskNo,
    /// Where on the disk.
    pub extent: Extent,
    /// Checksum of the content.
    pub sum: u64,
}

impl Block {
    /// Content in bytes: 512 to [`BLOCK_MAX`](crate::limits::BLOCK_MAX).
    #[must_use]
    pub fn len(&self) -> usize {
        usize::try_from(self.extent.bytes()).unwrap_or(usize::MAX)
    }

    /// Never: a block has at least one sector.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.extent.sectors == 0
    }
}

impl<'a> Head<'a> {
    /// Reads and checks a head. `bytes` may be longer than the head.
    ///
    /// # Errors
    /// [`FrameError`] for anything that this crate would not have written.
    pub fn decode(bytes: &'a [u8]) -> Result<Self, FrameError> {
        let mut reader = Reader::new(bytes);
        if reader.array()? != MAGIC {
            return Err(FrameError::Magic);
        }
        match reader.u16()? {
            VERSION => {}
            other => return Err(FrameError::Version(other)),
        }
        if usize::from(reader.u16()?) != HEADER_LEN {
            return Err(FrameError::OutOfRange("header length"));
        }
        let head_len = capped(reader.u32()?, FRAME_HEAD_MAX, "head length")?;
        let (records, records_len) = counted(reader.u32()?, FRAME_RECORDS_MAX, "record count")?;
        let (blocks, blocks_len) = counted(reader.u32()?, FRAME_BLOCKS_MAX, "block count")?;
        let (content_len, content) = counted(reader.u32()?, FRAME_PAYLOAD_MAX, "content length")?;
        let seq = Seq(reader.u64()?);
        let header = Header {
            seq,
            group: GroupId(reader.array()?),
            epoch: EpochId(reader.array()?),
            prev: FrameHash(reader.array()?),
            durable: Seq(reader.u64()?),
            log_time: LogTime(reader.u64()?),
            wall_time: WallTime(reader.i64()?),
            records,
            blocks,
            content_len,
        };
        if reader.take(HEADER_LEN - 104)?.iter().any(|byte| *byte != 0) {
            return Err(FrameError::OutOfRange("reserved bytes"));
        }
        if seq == Seq::ZERO || header.durable >= seq {
            return Err(FrameError::OutOfRange("sequence number"));
        }
        let table_len = head_len
            .checked_sub(HEADER_LEN + 8 * blocks_len)
            .ok_or(FrameError::OutOfRange("head length"))?;
        let head =
            Self { header, table: reader.take(table_len)?, sums: reader.take(8 * blocks_len)? };
        head.check_records(records_len, blocks_len, content)?;
        Ok(head)
    }

    fn check_records(&self, count: usize, blocks: usize, content: usize) -> Result<(), FrameError> {
        let mut table = Reader::new(self.table);
        let (mut content_seen, mut blocks_seen, mut ended) = (0usize, 0usize, false);
        for _ in 0..count {
            if ended {
                return Err(FrameError::AfterMark);
            }
            let record = record::decode(&mut table)?;
            content_seen += record.content_len();
            blocks_seen += block_lens(record.content_len()).count();
            ended = matches!(record, Record::Mark { .. });
        }
        if !table.is_empty() {
            return Err(FrameError::OutOfRange("record count"));
        }
        if content_seen != content {
            return Err(FrameError::OutOfRange("content length"));
        }
        if blocks_seen != blocks {
            return Err(FrameError::OutOfRange("block count"));
        }
        Ok(())
    }

    /// The header.
    #[must_use]
    pub const fn header(&self) -> &Header {
        &self.header
    }

    /// Content in bytes.
    #[must_use]
    pub const fn content_len(&self) -> usize {
        self.header.content_len as usize
    }

    /// Number of blocks.
    #[must_use]
    pub const fn block_count(&self) -> usize {
        self.sums.len() / 8
    }

    /// The records in order.
    pub fn records(&self) -> impl Iterator<Item = Record<'a>> + use<'a> {
        let mut table = Reader::new(self.table);
        // `decode` has checked the table: the first error is its end.
        core::iter::from_fn(move || record::decode(&mut table).ok())
    }

    /// The blocks of the content in order.
    pub fn blocks(&self) -> impl Iterator<Item = Block> + use<'a> {
        let mut sums = Reader::new(self.sums);
        self.records()
            .filter_map(|record| match record {
                Record::Write { disk, extent } => Some((disk, extent, record.content_len())),
                _ => None,
            })
            .flat_map(|(disk, extent, len)| {
                let mut start = extent.start;
                block_lens(len).map(move |len| {
                    let sectors = len as u64 / SECTOR;
                    let block = Extent::new(start, sectors);
                    start += sectors;
                    (disk, block)
                })
            })
            .map_while(move |(disk, extent)| Some(Block { disk, extent, sum: sums.u64().ok()? }))
    }
}

fn capped(value: u32, max: usize, what: &'static str) -> Result<usize, FrameError> {
    counted(value, max, what).map(|(_, value)| value)
}

fn counted(value: u32, max: usize, what: &'static str) -> Result<(u32, usize), FrameError> {
    match usize::try_from(value) {
        Ok(len) if len <= max => Ok((value, len)),
        _ => Err(FrameError::OutOfRange(what)),
    }
}
