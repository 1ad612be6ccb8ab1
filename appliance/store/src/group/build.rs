//! Making frames from changes: the primary's side of the log.

use std::sync::Arc;

use bytes::Bytes;
use srn_core::bytes::content_sum;
use srn_core::epoch::{Epoch, Position};
use srn_core::extent::Extent;
use srn_core::frame::{Builder, HeaderFields, MarkKind, Record, ResyncReason, block_lens};
use srn_core::ids::{CheckpointId, DiskId, DiskNo, GroupId, Seq};
use srn_core::limits::{BLOCK_MAX, FRAME_PAYLOAD_MAX, PAGE};
use srn_core::name::Name;
use srn_core::time::{LogTime, WallTime};

use crate::error::{Result, StoreError};
use crate::frame::Frame;
use crate::io::{BufPool, PooledBuf, is_aligned};

/// Checksums of the blocks of one write of at most [`FRAME_PAYLOAD_MAX`] bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sums {
    count: u8,
    sums: [u64; FRAME_PAYLOAD_MAX / BLOCK_MAX],
}

impl Sums {
    /// Computes them. Content beyond the largest frame is left out, and then refused when built.
    #[must_use]
    pub fn of(content: &[u8]) -> Self {
        let mut sums = [0; FRAME_PAYLOAD_MAX / BLOCK_MAX];
        let mut count = 0;
        for (block, sum) in content.chunks(BLOCK_MAX).zip(&mut sums) {
            *sum = content_sum(block);
            count += 1;
        }
        Self { count, sums }
    }

    fn as_slice(&self) -> &[u64] {
        self.sums.get(..usize::from(self.count)).unwrap_or_default()
    }
}

/// Something to append.
#[derive(Debug, Clone)]
pub enum Change {
    /// Content: at most [`FRAME_PAYLOAD_MAX`] bytes, a multiple of 512.
    Write {
        /// The disk.
        disk: DiskNo,
        /// First sector.
        start: u64,
        /// The content.
        data: Bytes,
        /// Its checksums.
        sums: Sums,
    },
    /// A record without content.
    Record(OwnedRecord),
}

impl Change {
    fn content_len(&self) -> usize {
        match self {
            Self::Write { data, .. } => data.len(),
            Self::Record(_) => 0,
        }
    }
}

/// A record that owns its name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OwnedRecord {
    /// The extent reads as zero.
    Zero(DiskNo, Extent),
    /// The extent is discarded.
    Trim(DiskNo, Extent),
    /// A checkpoint, and whether the applications are quiet.
    Mark(CheckpointId, MarkKind, bool),
    /// A disk joins: number, id, sectors, name.
    DiskAdd(DiskNo, DiskId, u64, Name),
    /// A disk leaves.
    DiskRemove(DiskNo),
    /// A disk has a new size.
    Resize(DiskNo, u64),
    /// An epoch begins.
    Epoch(Epoch),
    /// A disk's content is sent anew.
    ResyncBegin(DiskNo, ResyncReason),
    /// It is one point in time again.
    ResyncEnd(DiskNo),
    /// The wall clock stepped.
    ClockStep(i64),
}

impl OwnedRecord {
    fn borrow(&self) -> Record<'_> {
        match self {
            Self::Zero(disk, extent) => Record::Zero { disk: *disk, extent: *extent },
            Self::Trim(disk, extent) => Record::Trim { disk: *disk, extent: *extent },
            Self::Mark(id, kind, application) => {
                Record::Mark { id: *id, kind: *kind, application: *application }
            }
            Self::DiskAdd(disk, id, sectors, name) => {
                Record::DiskAdd { disk: *disk, id: *id, sectors: *sectors, name: name.as_str() }
            }
            Self::DiskRemove(disk) => Record::DiskRemove { disk: *disk },
            Self::Resize(disk, sectors) => Record::Resize { disk: *disk, sectors: *sectors },
            Self::Epoch(epoch) => Record::Epoch(*epoch),
            Self::ResyncBegin(disk, reason) => Record::ResyncBegin { disk: *disk, reason: *reason },
            Self::ResyncEnd(disk) => Record::ResyncEnd { disk: *disk },
            Self::ClockStep(step) => Record::ClockStep { step_us: *step },
        }
    }
}

/// Turns changes into a chain of frames.
#[derive(Debug)]
pub(super) struct FrameChain<'a> {
    pub(super) group: GroupId,
    pub(super) at: Position,
    pub(super) durable: Seq,
    pub(super) log_time: LogTime,
    pub(super) wall_time: WallTime,
    pub(super) pool: &'a BufPool,
}

impl FrameChain<'_> {
    /// Frames that hold `changes` in order, and for each frame the number of changes up to and in
    /// it.
    ///
    /// # Errors
    /// [`StoreError::Invalid`] for a change that no frame can hold.
    pub(super) fn build(&mut self, changes: &[Change]) -> Result<Vec<(Arc<Frame>, usize)>> {
        let mut frames = Vec::new();
        let mut builder = Builder::new();
        let mut payload = Payload::new(self.pool);
        payload.expected = changes.iter().map(Change::content_len).sum();
        for (index, change) in changes.iter().enumerate() {
            if !add(&mut builder, &mut payload, change) {
                if !builder.is_empty() {
                    frames.push((self.close(&mut builder, &mut payload)?, index));
                }
                if !add(&mut builder, &mut payload, change) {
                    return Err(StoreError::Invalid(format!("no frame can hold {change:?}")));
                }
            }
        }
        if !builder.is_empty() || changes.is_empty() {
            frames.push((self.close(&mut builder, &mut payload)?, changes.len()));
        }
        Ok(frames)
    }

    fn close(&mut self, builder: &mut Builder, payload: &mut Payload<'_>) -> Result<Arc<Frame>> {
        let fields = HeaderFields {
            group: self.group,
            epoch: self.at.epoch,
            seq: self.at.seq.next(),
            prev: self.at.hash,
            durable: self.durable,
            log_time: self.log_time,
            wall_time: self.wall_time,
        };
        let (head, hash) = builder.finish(&fields);
        let frame = Frame::from_parts(head, hash, payload.take())
            .map_err(|error| StoreError::Invalid(format!("built a bad frame: {error}")))?;
        self.at = frame.position();
        Ok(Arc::new(frame))
    }
}

fn add(builder: &mut Builder, payload: &mut Payload<'_>, change: &Change) -> bool {
    match change {
        Change::Write { disk, start, data, sums } => {
            let sectors = data.len() as u64 / srn_core::limits::SECTOR;
            let extent = Extent::new(*start, sectors);
            let whole = extent.bytes() == data.len() as u64
                && block_lens(data.len()).count() == sums.as_slice().len();
            let added = whole && builder.write(*disk, extent, sums.as_slice());
            if added {
                payload.push(data);
            }
            added
        }
        Change::Record(record) => builder.record(&record.borrow()),
    }
}

/// Content pieces fit for direct output: large aligned ones are taken as they are, small ones are
/// gathered.
struct Payload<'a> {
    pool: &'a BufPool,
    pieces: Vec<Bytes>,
    open: Option<PooledBuf>,
    len: usize,
    /// Content that is still to come, so that a small frame does not hold a large buffer.
    expected: usize,
}

impl<'a> Payload<'a> {
    const fn new(pool: &'a BufPool) -> Self {
        Self { pool, pieces: Vec::new(), open: None, len: 0, expected: 0 }
    }

    fn push(&mut self, data: &Bytes) {
        let at_page = self.open.as_ref().is_none_or(|open| open.len().is_multiple_of(PAGE));
        if at_page && is_aligned(data) {
            self.close();
            self.pieces.push(data.clone());
        } else {
            let room = (FRAME_PAYLOAD_MAX - self.len).min(self.expected);
            let open = self.open.get_or_insert_with(|| {
                let mut buf = self.pool.take(room);
                buf.set_len(0);
                buf
            });
            let at = open.len();
            open.set_len(at + data.len());
            if let Some(to) = open.get_mut(at..at + data.len()) {
                to.copy_from_slice(data);
            }
        }
        self.len += data.len();
        self.expected = self.expected.saturating_sub(data.len());
    }

    fn close(&mut self) {
        if let Some(open) = self.open.take() {
            self.pieces.push(Bytes::from_owner(open));
        }
    }

    fn take(&mut self) -> Vec<Bytes> {
        self.close();
        self.len = 0;
        std::mem::take(&mut self.pieces)
    }
}
