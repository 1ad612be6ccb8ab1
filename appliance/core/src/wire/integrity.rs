//! What two nodes ask each other about the content that both hold: hashes to compare by.
//!
//! Either node may ask the other. A question names a position of the log, so that both look at
//! exactly the same moment whatever is written meanwhile. Answers are bounded by the question, and
//! may be shorter than it.

use alloc::string::String;
use alloc::vec::Vec;

use super::message::{position, put_position};
use super::{WireError, put_text, text};
use crate::bytes::{Reader, Writer};
use crate::epoch::Position;
use crate::extent::Extent;
use crate::ids::{DiskNo, EpochId, GroupId, Seq};
use crate::limits::{DISK_SECTORS_MAX, DISKS_MAX, FRAME_DISK_MAX, PAGE_SECTORS, SECTOR};

/// Bytes of a content hash: the first of BLAKE3.
pub const CONTENT_HASH_LEN: usize = 16;

/// Hashes that one question may ask for.
pub const HASHES_MAX: u32 = 16_384;

/// Content that one question may ask for, in sectors: 64 KiB.
pub const CONTENT_SECTORS_MAX: u64 = 128;

const CONTENT_MAX: usize = 64 * 1024;
const _: () = assert!(CONTENT_MAX as u64 == CONTENT_SECTORS_MAX * SECTOR);

/// A question about a group's content, an answer, or a word about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Integrity {
    /// The group.
    pub group: GroupId,
    /// Chosen by who asks; the answer repeats it.
    pub number: u64,
    /// What is said.
    pub words: Words,
}

/// How much content one hash covers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Grain {
    /// 64 KiB.
    Leaf,
    /// 4 KiB.
    Page,
}

impl Grain {
    /// Sectors that one hash covers.
    #[must_use]
    pub const fn sectors(self) -> u64 {
        match self {
            Self::Leaf => 16 * PAGE_SECTORS,
            Self::Page => PAGE_SECTORS,
        }
    }

    const fn code(self) -> u8 {
        match self {
            Self::Leaf => 0,
            Self::Page => 1,
        }
    }

    const fn from_code(code: u8) -> Option<Self> {
        match code {
            0 => Some(Self::Leaf),
            1 => Some(Self::Page),
            _ => None,
        }
    }
}

/// Grains of a disk, one behind the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HashRange {
    /// The disk.
    pub disk: DiskNo,
    /// How much each hash covers.
    pub grain: Grain,
    /// The first grain: it begins at sector `first` × its sectors.
    pub first: u64,
    /// Number of grains, 1 to [`HASHES_MAX`].
    pub count: u32,
}

/// Hashes of grains that follow each other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HashRun {
    /// So many grains read as zero.
    Zero(u32),
    /// A hash of each.
    Known(Vec<[u8; CONTENT_HASH_LEN]>),
    /// So many grains cannot be read: they are damaged where the answer comes from.
    Unreadable(u32),
}

impl HashRun {
    /// Grains in it.
    #[must_use]
    pub fn count(&self) -> u64 {
        match self {
            Self::Zero(count) | Self::Unreadable(count) => u64::from(*count),
            Self::Known(hashes) => hashes.len() as u64,
        }
    }
}

/// Why a question is not answered. The codes are part of the wire format.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CannotCode {
    /// The position is not, or no longer, in the history there.
    NotInHistory,
    /// There is no copy: a local cache.
    NoCopy,
    /// Too many questions at once; ask again later.
    Busy,
    /// Anything else; the text says what.
    Failed,
}

impl CannotCode {
    const fn code(self) -> u8 {
        match self {
            Self::NotInHistory => 1,
            Self::NoCopy => 2,
            Self::Busy => 3,
            Self::Failed => 4,
        }
    }

    const fn from_code(code: u8) -> Option<Self> {
        match code {
            1 => Some(Self::NotInHistory),
            2 => Some(Self::NoCopy),
            3 => Some(Self::Busy),
            4 => Some(Self::Failed),
            _ => None,
        }
    }
}

/// What is asked, answered or told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Words {
    /// A question: the hashes of these grains just behind a frame.
    HashesWanted {
        /// Behind this frame.
        at: Position,
        /// Of these.
        range: HashRange,
    },
    /// The answer, from the first grain on; at least one, perhaps fewer than asked for.
    Hashes(Vec<HashRun>),
    /// A question: the content of an extent just behind a frame.
    ContentWanted {
        /// Behind this frame.
        at: Position,
        /// The disk.
        disk: DiskNo,
        /// At most [`CONTENT_SECTORS_MAX`] sectors.
        extent: Extent,
    },
    /// The answer: all of it, and its hash.
    Content {
        /// The first bytes of BLAKE3 of it.
        hash: [u8; CONTENT_HASH_LEN],
        /// At most [`CONTENT_SECTORS_MAX`] sectors.
        bytes: Vec<u8>,
    },
    /// A question: a frame of the log.
    FrameWanted {
        /// Its epoch.
        epoch: EpochId,
        /// Its number.
        seq: Seq,
    },
    /// The answer: the frame as it is in a frame stream.
    Frame(Vec<u8>),
    /// The answer to any question that cannot be answered.
    Cannot {
        /// Why.
        code: CannotCode,
        /// In words.
        text: String,
    },
    /// No more questions about that position.
    Enough,
    /// Something that the people at the other node should know, in words.
    Report {
        /// Whether somebody has to act.
        alert: bool,
        /// What.
        text: String,
    },
}

const HASHES_WANTED: u8 = 32;
const HASHES: u8 = 33;
const CANNOT: u8 = 34;
const ENOUGH: u8 = 35;
const REPORT: u8 = 36;
const CONTENT_WANTED: u8 = 37;
const CONTENT: u8 = 38;
const FRAME_WANTED: u8 = 39;
const FRAME: u8 = 40;

const RUN_ZERO: u8 = 0;
const RUN_KNOWN: u8 = 1;
const RUN_UNREADABLE: u8 = 2;

impl Integrity {
    /// Appends the body; returns the kind.
    pub(super) fn encode(&self, out: &mut Vec<u8>) -> u8 {
        out.put(&self.group.0);
        out.put_u64(self.number);
        match &self.words {
            Words::HashesWanted { at, range } => {
                put_position(out, at);
                put_range(out, range);
                HASHES_WANTED
            }
            Words::Hashes(runs) => {
                put_runs(out, runs);
                HASHES
            }
            Words::ContentWanted { at, disk, extent } => {
                put_position(out, at);
                out.put_u32(disk.0);
                out.put_u64(extent.start);
                out.put_u32(u32::try_from(extent.sectors).unwrap_or(u32::MAX));
                CONTENT_WANTED
            }
            Words::Content { hash, bytes } => {
                out.put(hash);
                put_bytes(out, bytes);
                CONTENT
            }
            Words::FrameWanted { epoch, seq } => {
                out.put(&epoch.0);
                out.put_u64(seq.0);
                FRAME_WANTED
            }
            Words::Frame(bytes) => {
                put_bytes(out, bytes);
                FRAME
            }
            Words::Cannot { code, text } => {
                out.put_u8(code.code());
                put_text(out, text);
                CANNOT
            }
            Words::Enough => ENOUGH,
            Words::Report { alert, text } => {
                out.put_u8(u8::from(*alert));
                put_text(out, text);
                REPORT
            }
        }
    }

    /// Whether a message of this kind is one of these.
    pub(super) const fn is_kind(kind: u8) -> bool {
        matches!(kind, HASHES_WANTED..=FRAME)
    }

    /// Reads the body of a message of `kind`.
    pub(super) fn decode(kind: u8, reader: &mut Reader<'_>) -> Result<Self, WireError> {
        let group = GroupId(reader.array()?);
        let number = reader.u64()?;
        let words = match kind {
            HASHES_WANTED => Words::HashesWanted { at: position(reader)?, range: range(reader)? },
            HASHES => Words::Hashes(runs(reader)?),
            CONTENT_WANTED => {
                let at = position(reader)?;
                let disk = DiskNo(reader.u32()?);
                let extent = Extent::new(reader.u64()?, u64::from(reader.u32()?));
                let fits = (1..=CONTENT_SECTORS_MAX).contains(&extent.sectors)
                    && extent.fits(DISK_SECTORS_MAX)
                    && is_disk(disk);
                if !fits {
                    return Err(WireError::OutOfRange("extent of content"));
                }
                Words::ContentWanted { at, disk, extent }
            }
            CONTENT => Words::Content { hash: reader.array()?, bytes: bytes(reader, CONTENT_MAX)? },
            FRAME_WANTED => {
                Words::FrameWanted { epoch: EpochId(reader.array()?), seq: Seq(reader.u64()?) }
            }
            FRAME => Words::Frame(bytes(reader, FRAME_DISK_MAX)?),
            CANNOT => Words::Cannot {
                code: CannotCode::from_code(reader.u8()?)
                    .ok_or(WireError::OutOfRange("reason for no answer"))?,
                text: text(reader)?,
            },
            ENOUGH => Words::Enough,
            REPORT => Words::Report { alert: super::message::flag(reader)?, text: text(reader)? },
            other => return Err(WireError::UnknownType(other)),
        };
        Ok(Self { group, number, words })
    }
}

fn is_disk(disk: DiskNo) -> bool {
    usize::try_from(disk.0).is_ok_and(|disk| disk < DISKS_MAX)
}

fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    out.put_u32(u32::try_from(bytes.len()).unwrap_or(u32::MAX));
    out.put(bytes);
}

fn bytes(reader: &mut Reader<'_>, max: usize) -> Result<Vec<u8>, WireError> {
    let len = usize::try_from(reader.u32()?).unwrap_or(usize::MAX);
    if len == 0 || len > max {
        return Err(WireError::OutOfRange("length of content"));
    }
    Ok(reader.take(len)?.to_vec())
}

fn put_range(out: &mut Vec<u8>, range: &HashRange) {
    out.put_u32(range.disk.0);
    out.put_u8(range.grain.code());
    out.put_u64(range.first);
    out.put_u32(range.count);
}

fn range(reader: &mut Reader<'_>) -> Result<HashRange, WireError> {
    let range = HashRange {
        disk: DiskNo(reader.u32()?),
        grain: Grain::from_code(reader.u8()?).ok_or(WireError::OutOfRange("grain of hashes"))?,
        first: reader.u64()?,
        count: reader.u32()?,
    };
    let fits = is_disk(range.disk)
        && range.first < DISK_SECTORS_MAX / range.grain.sectors()
        && (1..=HASHES_MAX).contains(&range.count);
    if fits { Ok(range) } else { Err(WireError::OutOfRange("range of hashes")) }
}

pub(super) fn put_runs(out: &mut Vec<u8>, runs: &[HashRun]) {
    out.put_u32(u32::try_from(runs.len()).unwrap_or(u32::MAX));
    for run in runs {
        let (kind, count) = match run {
            HashRun::Zero(count) => (RUN_ZERO, *count),
            HashRun::Known(hashes) => (RUN_KNOWN, u32::try_from(hashes.len()).unwrap_or(u32::MAX)),
            HashRun::Unreadable(count) => (RUN_UNREADABLE, *count),
        };
        out.put_u8(kind);
        out.put_u32(count);
        if let HashRun::Known(hashes) = run {
            hashes.iter().for_each(|hash| out.put(hash));
        }
    }
}

pub(super) fn runs(reader: &mut Reader<'_>) -> Result<Vec<HashRun>, WireError> {
    let count = reader.u32()?;
    let mut runs = Vec::new();
    let mut grains = 0u64;
    for _ in 0..count {
        let kind = reader.u8()?;
        let count = reader.u32()?;
        grains += u64::from(count);
        // Checked before anything is set aside for it.
        if count == 0 || grains > u64::from(HASHES_MAX) {
            return Err(WireError::OutOfRange("number of hashes"));
        }
        runs.push(match kind {
            RUN_ZERO => HashRun::Zero(count),
            RUN_UNREADABLE => HashRun::Unreadable(count),
            RUN_KNOWN => {
                let mut hashes = Vec::new();
                for _ in 0..count {
                    hashes.push(reader.array()?);
                }
                HashRun::Known(hashes)
            }
            _ => return Err(WireError::OutOfRange("kind of hashes")),
        });
    }
    if runs.is_empty() {
        return Err(WireError::OutOfRange("number of hashes"));
    }
    Ok(runs)
}
