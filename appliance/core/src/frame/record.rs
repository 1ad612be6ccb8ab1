//! The records of a frame's table: what happened, in order.

use alloc::vec::Vec;

use crate::bytes::{Reader, Truncated, Writer};
use crate::epoch::{Epoch, Position};
use crate::extent::Extent;
use crate::ids::{CheckpointId, DiskId, DiskNo, EpochId, FrameHash, Seq};
use crate::limits::{DISK_SECTORS_MAX, DISKS_MAX, FRAME_PAYLOAD_MAX, NAME_LEN_MAX, SECTOR};
use crate::name::Name;

/// One entry of a frame's table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Record<'a> {
    /// Content was written; the frame's next content bytes are its payload.
    Write {
        /// The disk.
        disk: DiskNo,
        /// Where.
        extent: Extent,
    },
    /// The extent reads as zero.
    Zero {
        /// The disk.
        disk: DiskNo,
        /// Where.
        extent: Extent,
    },
    /// The extent was discarded: it reads as zero, and comparisons of two copies do not care.
    Trim {
        /// The disk.
        disk: DiskNo,
        /// Where.
        extent: Extent,
    },
    /// A checkpoint: a point of the whole group that was asked for. The last record of its frame.
    Mark {
        /// The checkpoint's id.
        id: CheckpointId,
        /// How it came about.
        kind: MarkKind,
        /// Whether the applications were quiet from before the mark until it was durable.
        application: bool,
    },
    /// A disk joins the group; it reads as zero until written.
    DiskAdd {
        /// Its number in this group.
        disk: DiskNo,
        /// Its identity.
        id: DiskId,
        /// Its size in sectors.
        sectors: u64,
        /// Its name when it joined.
        name: &'a str,
    },
    /// A disk leaves the group.
    DiskRemove {
        /// The disk.
        disk: DiskNo,
    },
    /// A disk has a new size in sectors.
    Resize {
        /// The disk.
        disk: DiskNo,
        /// The new size.
        sectors: u64,
    },
    /// The first record of an epoch.
    Epoch(Epoch),
    /// From here the disk's content is a mixture of times, until [`Record::ResyncEnd`].
    ResyncBegin {
        /// The disk.
        disk: DiskNo,
        /// Why.
        reason: ResyncReason,
    },
    /// The disk's content is that of one point in time again, and follows the server's writes.
    ResyncEnd {
        /// The disk.
        disk: DiskNo,
    },
    /// The writer's wall clock moved against its monotonic clock by this many microseconds.
    ClockStep {
        /// The step; negative when the clock went back.
        step_us: i64,
    },
}

/// How a checkpoint came about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum MarkKind {
    /// Taken because its time had come.
    Periodic,
    /// A person or a script asked for it.
    Manual,
    /// The last point before a planned failover.
    Final,
    /// Its schedule, a calendar expression, said so.
    Scheduled,
}

/// Why a disk's content is sent anew.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum ResyncReason {
    /// First replication: there was no copy.
    Seeding,
    /// The mirror of the source ended and began anew; what was written between is not known.
    MirrorRestarted,
    /// The mirror lost its connection and found it again; it knows what was written between.
    MirrorReconnected,
    /// What a pass over a pulled disk has read so far is here, and the rest is not.
    Pass,
}

const WRITE: u8 = 1;
const ZERO: u8 = 2;
const TRIM: u8 = 3;
const MARK: u8 = 4;
const DISK_ADD: u8 = 5;
const DISK_REMOVE: u8 = 6;
const RESIZE: u8 = 7;
const EPOCH: u8 = 8;
const RESYNC_BEGIN: u8 = 9;
const RESYNC_END: u8 = 10;
const CLOCK_STEP: u8 = 11;

/// Why a record is not well-formed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// It is longer than what is left, or than its kind.
    #[error("record {0}")]
    Truncated(#[from] Truncated),
    /// A kind that this version does not know.
    #[error("unknown record kind {0}")]
    UnknownKind(u8),
    /// The body's length is not that of its kind.
    #[error("record kind {kind} has {len} bytes")]
    WrongLength {
        /// The kind.
        kind: u8,
        /// The length it claims.
        len: u16,
    },
    /// A value outside its range; the text names the field.
    #[error("record field out of range: {0}")]
    OutOfRange(&'static str),
}

impl MarkKind {
    /// The number on disk and wire.
    #[must_use]
    pub const fn code(self) -> u8 {
        match self {
            Self::Periodic => 1,
            Self::Manual => 2,
            Self::Final => 3,
            Self::Scheduled => 4,
        }
    }

    /// The kind with this number.
    #[must_use]
    pub const fn from_code(code: u8) -> Option<Self> {
        match code {
            1 => Some(Self::Periodic),
            2 => Some(Self::Manual),
            3 => Some(Self::Final),
            4 => Some(Self::Scheduled),
            _ => None,
        }
    }

    /// The word that people read.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Periodic => "periodic",
            Self::Manual => "manual",
            Self::Final => "final",
            Self::Scheduled => "scheduled",
        }
    }
}

impl ResyncReason {
    /// The number on disk and wire.
    #[must_use]
    pub const fn code(self) -> u8 {
        match self {
            Self::Seeding => 1,
            Self::MirrorRestarted => 2,
            Self::MirrorReconnected => 3,
            Self::Pass => 4,
        }
    }

    /// The reason with this number.
    #[must_use]
    pub const fn from_code(code: u8) -> Option<Self> {
        match code {
            1 => Some(Self::Seeding),
            2 => Some(Self::MirrorRestarted),
            3 => Some(Self::MirrorReconnected),
            4 => Some(Self::Pass),
            _ => None,
        }
    }

    /// The words that people read.
    #[must_use]
    pub const fn words(self) -> &'static str {
        match self {
            Self::Seeding => "initial replication",
            Self::MirrorRestarted => "the mirror ended and was started again",
            Self::MirrorReconnected => "the mirror lost its connection for a while",
            Self::Pass => "a pass over a pulled disk",
        }
    }
}

impl Record<'_> {
    /// Payload content of this record in bytes.
    #[must_use]
    pub fn content_len(&self) -> usize {
        match self {
            // A decoded or built write is at most FRAME_PAYLOAD_MAX bytes long.
            Self::Write { extent, .. } => usize::try_from(extent.bytes()).unwrap_or(usize::MAX),
            _ => 0,
        }
    }

    /// Appends the record's bytes. Each record is a multiple of four bytes long.
    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        let start = out.len();
        out.put(&[0; 4]);
        let kind = self.encode_body(out);
        while !out.len().is_multiple_of(4) {
            out.put_u8(0);
        }
        let body = u16::try_from(out.len() - start - 4).unwrap_or(u16::MAX);
        if let Some([to_kind, _, to_len @ ..]) =
            out.get_mut(start..start + 4).and_then(|head| head.first_chunk_mut::<4>())
        {
            *to_kind = kind;
            *to_len = body.to_le_bytes();
        }
    }

    fn encode_body(&self, out: &mut Vec<u8>) -> u8 {
        match self {
            Self::Write { disk, extent } => {
                out.put_u32(disk.0);
                out.put_u32(u32::try_from(extent.sectors).unwrap_or(u32::MAX));
                out.put_u64(extent.start);
                WRITE
            }
            Self::Zero { disk, extent } => put_extent(out, *disk, *extent, ZERO),
            Self::Trim { disk, extent } => put_extent(out, *disk, *extent, TRIM),
            Self::Mark { id, kind, application } => {
                out.put(&id.0);
                out.put(&[kind.code(), u8::from(*application), 0, 0]);
                MARK
            }
            Self::DiskAdd { disk, id, sectors, name } => {
                out.put_u32(disk.0);
                out.put(&id.0);
                out.put_u64(*sectors);
                out.put_u8(u8::try_from(name.len()).unwrap_or(u8::MAX));
                out.put(name.as_bytes());
                DISK_ADD
            }
            Self::DiskRemove { disk } => {
                out.put_u32(disk.0);
                DISK_REMOVE
            }
            Self::Resize { disk, sectors } => {
                out.put_u32(disk.0);
                out.put_u64(*sectors);
                RESIZE
            }
            Self::Epoch(epoch) => {
                out.put(&epoch.id.0);
                out.put(&epoch.forked_from.epoch.0);
                out.put_u64(epoch.forked_from.seq.0);
                out.put(&epoch.forked_from.hash.0);
                EPOCH
            }
            Self::ResyncBegin { disk, reason } => {
                out.put_u32(disk.0);
                out.put(&[reason.code(), 0, 0, 0]);
                RESYNC_BEGIN
            }
            Self::ResyncEnd { disk } => {
                out.put_u32(disk.0);
                RESYNC_END
            }
            Self::ClockStep { step_us } => {
                out.put_i64(*step_us);
                CLOCK_STEP
            }
        }
    }
}

fn put_extent(out: &mut Vec<u8>, disk: DiskNo, extent: Extent, kind: u8) -> u8 {
    out.put_u32(disk.0);
    out.put_u64(extent.start);
    out.put_u64(extent.sectors);
    kind
}

/// Reads one record from the front of the table.
pub(super) fn decode<'a>(table: &mut Reader<'a>) -> Result<Record<'a>, RecordError> {
    let kind = table.u8()?;
    let flags = table.u8()?;
    let len = table.u16()?;
    if flags != 0 {
        return Err(RecordError::OutOfRange("flags"));
    }
    if !len.is_multiple_of(4) {
        return Err(RecordError::WrongLength { kind, len });
    }
    let mut body = Reader::new(table.take(usize::from(len))?);
    let wrong_length = RecordError::WrongLength { kind, len };
    let record = decode_body(kind, &mut body).map_err(|error| match error {
        RecordError::Truncated(_) => wrong_length,
        other => other,
    })?;
    // Only a name is padded.
    let padding = body.take(body.remaining())?;
    if padding.len() > 3 || padding.iter().any(|byte| *byte != 0) {
        return Err(wrong_length);
    }
    Ok(record)
}

fn decode_body<'a>(kind: u8, body: &mut Reader<'a>) -> Result<Record<'a>, RecordError> {
    Ok(match kind {
        WRITE => {
            let disk = disk_no(body)?;
            let sectors = u64::from(body.u32()?);
            let extent = extent(body.u64()?, sectors)?;
            if extent.bytes() > FRAME_PAYLOAD_MAX as u64 {
                return Err(RecordError::OutOfRange("length of a write"));
            }
            Record::Write { disk, extent }
        }
        ZERO | TRIM => {
            let disk = disk_no(body)?;
            let extent = extent(body.u64()?, body.u64()?)?;
            if kind == ZERO { Record::Zero { disk, extent } } else { Record::Trim { disk, extent } }
        }
        MARK => {
            let id = CheckpointId(body.array()?);
            let [code, application @ (0 | 1), 0, 0] = body.array::<4>()? else {
                return Err(RecordError::OutOfRange("reserved bytes"));
            };
            let kind = MarkKind::from_code(code).ok_or(RecordError::OutOfRange("mark kind"))?;
            Record::Mark { id, kind, application: application == 1 }
        }
        DISK_ADD => {
            let disk = disk_no(body)?;
            let id = DiskId(body.array()?);
            let sectors = disk_size(body.u64()?)?;
            let len = usize::from(body.u8()?);
            if len > NAME_LEN_MAX {
                return Err(RecordError::OutOfRange("length of a name"));
            }
            // Names reach terminals, file names and export names.
            let name = core::str::from_utf8(body.take(len)?)
                .ok()
                .filter(|name| Name::is_well_formed(name))
                .ok_or(RecordError::OutOfRange("text of a name"))?;
            Record::DiskAdd { disk, id, sectors, name }
        }
        DISK_REMOVE => Record::DiskRemove { disk: disk_no(body)? },
        RESIZE => Record::Resize { disk: disk_no(body)?, sectors: disk_size(body.u64()?)? },
        EPOCH => {
            let id = EpochId(body.array()?);
            let epoch = EpochId(body.array()?);
            let seq = Seq(body.u64()?);
            let hash = FrameHash(body.array()?);
            Record::Epoch(Epoch { id, forked_from: Position { epoch, seq, hash } })
        }
        RESYNC_BEGIN => {
            let disk = disk_no(body)?;
            let reason = ResyncReason::from_code(code(body)?)
                .ok_or(RecordError::OutOfRange("resync reason"))?;
            Record::ResyncBegin { disk, reason }
        }
        RESYNC_END => Record::ResyncEnd { disk: disk_no(body)? },
        CLOCK_STEP => Record::ClockStep { step_us: body.i64()? },
        other => return Err(RecordError::UnknownKind(other)),
    })
}

fn disk_no(body: &mut Reader<'_>) -> Result<DiskNo, RecordError> {
    let number = body.u32()?;
    if (number as usize) < DISKS_MAX {
        Ok(DiskNo(number))
    } else {
        Err(RecordError::OutOfRange("disk number"))
    }
}

fn disk_size(sectors: u64) -> Result<u64, RecordError> {
    if (1..=DISK_SECTORS_MAX).contains(&sectors) {
        Ok(sectors)
    } else {
        Err(RecordError::OutOfRange("disk size"))
    }
}

fn extent(start: u64, sectors: u64) -> Result<Extent, RecordError> {
    let extent = Extent::new(start, sectors);
    if sectors > 0 && extent.fits(DISK_SECTORS_MAX) {
        Ok(extent)
    } else {
        Err(RecordError::OutOfRange("extent"))
    }
}

/// A code byte followed by three zero bytes.
fn code(body: &mut Reader<'_>) -> Result<u8, RecordError> {
    match body.array::<4>()? {
        [code, 0, 0, 0] => Ok(code),
        _ => Err(RecordError::OutOfRange("reserved bytes")),
    }
}

const _: () = assert!(FRAME_PAYLOAD_MAX as u64 / SECTOR < u32::MAX as u64);
