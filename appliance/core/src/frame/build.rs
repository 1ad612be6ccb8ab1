//! Making a frame's head.

use alloc::vec::Vec;

use super::record::Record;
use super::{HEADER_LEN, MAGIC, VERSION, block_lens, hash_head};
use crate::bytes::Writer;
use crate::extent::Extent;
use crate::ids::{DiskNo, EpochId, FrameHash, GroupId, Seq};
use crate::limits::{FRAME_BLOCKS_MAX, FRAME_HEAD_MAX, FRAME_PAYLOAD_MAX, FRAME_RECORDS_MAX};
use crate::time::{LogTime, WallTime};

/// What the writer knows only when it closes the frame.
#[derive(Debug, Clone, Copy)]
pub struct HeaderFields {
    /// The group.
    pub group: GroupId,
    /// The epoch.
    pub epoch: EpochId,
    /// The frame's sequence number.
    pub seq: Seq,
    /// The hash of the frame before.
    pub prev: FrameHash,
    /// Highest sequence number known durable.
    pub durable: Seq,
    /// The group's time.
    pub log_time: LogTime,
    /// The wall clock.
    pub wall_time: WallTime,
}

/// Collects records until the frame is full or the writer closes it.
#[derive(Debug, Default)]
pub struct Builder {
    table: Vec<u8>,
    sums: Vec<u64>,
    records: usize,
    content_len: usize,
    closed: bool,
}

/// Head room kept for the header and for the largest record that is not a write.
const TABLE_MAX: usize = FRAME_HEAD_MAX - HEADER_LEN;

/// The largest record in bytes: a `DiskAdd` with the longest name, padded.
const RECORD_MAX: usize = 4 + 4 + 16 + 8 + 1 + crate::limits::NAME_LEN_MAX + 3;

impl Builder {
    /// An empty frame.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether nothing was added.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.records == 0
    }

    /// Content added so far in bytes.
    #[must_use]
    pub const fn content_len(&self) -> usize {
        self.content_len
    }

    /// Whether one more record with `content` bytes of payload fits.
    #[must_use]
    pub fn has_room(&self, content: usize) -> bool {
        let blocks = self.sums.len() + content.div_ceil(crate::limits::BLOCK_MAX);
        !self.closed
            && self.records < FRAME_RECORDS_MAX
            && blocks <= FRAME_BLOCKS_MAX
            && self.content_len + content <= FRAME_PAYLOAD_MAX
            && self.table.len() + RECORD_MAX + 8 * blocks <= TABLE_MAX
    }

    /// Adds a write whose blocks have these content checksums, in order.
    ///
    /// Returns whether it was added: it is not when there is no room ([`Self::has_room`]), or when
    /// the number of checksums is not that of the extent's blocks.
    #[must_use]
    pub fn write(&mut self, disk: DiskNo, extent: Extent, sums: &[u64]) -> bool {
        let record = Record::Write { disk, extent };
        let content = record.content_len();
        if content == 0 || !self.has_room(content) || sums.len() != block_lens(content).count() {
            return false;
        }
        self.sums.extend_from_slice(sums);
        self.content_len += content;
        self.append(&record);
        true
    }

    /// Adds a record without payload; a mark closes the frame. Returns whether it was added.
    #[must_use]
    pub fn record(&mut self, record: &Record<'_>) -> bool {
        if !self.has_room(0) || matches!(record, Record::Write { .. }) {
            return false;
        }
        self.closed = matches!(record, Record::Mark { .. });
        self.append(record);
        true
    }

    fn append(&mut self, record: &Record<'_>) {
        record.encode(&mut self.table);
        self.records += 1;
    }

    /// Closes the frame: its head and its hash. The builder is empty again.
    pub fn finish(&mut self, fields: &HeaderFields) -> (Vec<u8>, FrameHash) {
        // The caps of `has_room` keep every count far below 2^32.
        let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        let head_len = HEADER_LEN + self.table.len() + 8 * self.sums.len();
        let mut head = Vec::with_capacity(head_len);
        head.put(&MAGIC);
        head.put_u16(VERSION);
        head.put_u16(u16::try_from(HEADER_LEN).unwrap_or(u16::MAX));
        head.put_u32(count(head_len));
        head.put_u32(count(self.records));
        head.put_u32(count(self.sums.len()));
        head.put_u32(count(self.content_len));
        head.put_u64(fields.seq.0);
        head.put(&fields.group.0);
        head.put(&fields.epoch.0);
        head.put(&fields.prev.0);
        head.put_u64(fields.durable.0);
        head.put_u64(fields.log_time.0);
        head.put_i64(fields.wall_time.0);
        head.put(&[0; HEADER_LEN - 104]);
        head.put(&self.table);
        for sum in &self.sums {
            head.put_u64(*sum);
        }
        let hash = hash_head(&head);
        self.table.clear();
        self.sums.clear();
        self.records = 0;
        self.content_len = 0;
        self.closed = false;
        (head, hash)
    }
}
