//! The stream that carries what changed in a group instead of its frames: for a secondary that needs
//! more than the primary's log still holds, or whose content has to be compared.
//!
//! Like a frame stream it is one-way, from primary to secondary, and has a header of its own. What the
//! secondary lacks when contents are compared it says on the control stream, as [`Wanted`].

use alloc::vec::Vec;

use super::integrity::{put_runs, runs};
use super::stream::opening;
use super::{VERSION, WireError};
use crate::bytes::{Reader, Writer};
use crate::extent::Extent;
use crate::frame::envelope::Codec;
use crate::ids::{DiskNo, GroupId};
use crate::limits::{BLOCK_MAX, DISK_SECTORS_MAX, PAGE_SECTORS, SECTOR};
use crate::wire::{CONTENT_HASH_LEN, Grain, HashRun};

/// First bytes of the stream.
pub(super) const MAGIC: [u8; 4] = *b"SRNc";

/// The longest catalog that a header may announce, in bytes.
pub const CATALOG_MAX: usize = 1 << 20;

/// Leaves whose hashes go together, and that are wanted together: 64 MiB of a disk.
pub const LEAVES_MAX: usize = 1024;

/// Pages of a leaf.
pub const LEAF_PAGES: usize = (Grain::Leaf.sectors() / PAGE_SECTORS) as usize;

/// How the primary finds out what the secondary lacks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// It knows what changed since the secondary's position.
    Changed,
    /// The secondary has nothing: everything that is not zero.
    All,
    /// Contents are compared, leaf by leaf.
    Compared,
}

impl Way {
    const fn code(self) -> u8 {
        match self {
            Self::Changed => 0,
            Self::All => 1,
            Self::Compared => 2,
        }
    }

    const fn from_code(code: u8) -> Option<Self> {
        match code {
            0 => Some(Self::Changed),
            1 => Some(Self::All),
            2 => Some(Self::Compared),
            _ => None,
        }
    }
}

/// A place in all disks of a group; everything comes in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// The disk.
    pub disk: DiskNo,
    /// The sector.
    pub sector: u64,
}

impl Place {
    /// Before everything.
    pub const START: Self = Self { disk: DiskNo(0), sector: 0 };
}

/// The first bytes of the stream, but for the catalog behind them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChangesHeader {
    /// The group.
    pub group: GroupId,
    /// The nonce of the offer that was accepted.
    pub nonce: u64,
    /// How it is found out what is sent.
    pub way: Way,
    /// Length of the catalog that follows, in bytes. It names the position that this leads to.
    pub catalog_len: u32,
    /// Bytes of disks that are gone through: of content, or when compared of all disks.
    pub total: u64,
    /// Where it begins: what is before it came in an earlier stream to the same position.
    pub begin: Place,
}

impl ChangesHeader {
    /// Length in bytes, without the catalog.
    pub const LEN: usize = 4 + 2 + 2 + 16 + 8 + 4 + 4 + 8 + 8 + 4 + 4;

    /// The header's bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(Self::LEN);
        out.put(&MAGIC);
        out.put_u16(VERSION);
        out.put_u16(0);
        out.put(&self.group.0);
        out.put_u64(self.nonce);
        out.put_u32(u32::from(self.way.code()));
        out.put_u32(self.catalog_len);
        out.put_u64(self.total);
        out.put_u64(self.begin.sector);
        out.put_u32(self.begin.disk.0);
        out.put_u32(0);
        out
    }

    /// Reads the header.
    ///
    /// # Errors
    /// [`WireError`] when it is none, or of another version.
    pub fn decode(bytes: &[u8; Self::LEN]) -> Result<Self, WireError> {
        let mut reader = Reader::new(bytes);
        let (group, nonce) = opening(&mut reader, MAGIC)?;
        let way = u8::try_from(reader.u32()?).ok().and_then(Way::from_code);
        let way = way.ok_or(WireError::OutOfRange("way of finding changes"))?;
        let catalog_len = reader.u32()?;
        if catalog_len == 0 || catalog_len as usize > CATALOG_MAX {
            return Err(WireError::OutOfRange("length of the catalog"));
        }
        let total = reader.u64()?;
        let sector = reader.u64()?;
        let begin = Place { disk: DiskNo(reader.u32()?), sector };
        if sector > DISK_SECTORS_MAX || reader.u32()? != 0 {
            return Err(WireError::OutOfRange("place to begin"));
        }
        Ok(Self { group, nonce, way, catalog_len, total, begin })
    }
}

/// What a stream of changes consists of, in order of disk and sector.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Item {
    /// An extent reads as zero.
    Zero {
        /// The disk.
        disk: DiskNo,
        /// Where.
        extent: Extent,
        /// Because it was discarded.
        trim: bool,
    },
    /// Content of at most 32 KiB.
    Content {
        /// The disk.
        disk: DiskNo,
        /// Where.
        extent: Extent,
        /// How it is encoded.
        codec: Codec,
        /// Checksum of the content, not encoded, as in a frame.
        sum: u64,
        /// The encoded content.
        stored: Vec<u8>,
    },
    /// Hashes of leaves, which the secondary answers with [`Wanted`].
    Hashes {
        /// The disk.
        disk: DiskNo,
        /// The first leaf.
        first: u64,
        /// Their hashes: of 1 to [`LEAVES_MAX`] leaves.
        runs: Vec<HashRun>,
    },
    /// Everything that was wanted of these leaves has come.
    Settled {
        /// The disk.
        disk: DiskNo,
        /// The first of the leaves.
        first: u64,
    },
    /// Everything has come.
    End,
}

const ZERO: u8 = 1;
const CONTENT: u8 = 2;
const HASHES: u8 = 3;
const SETTLED: u8 = 4;
const END: u8 = 5;

const ZERO_LEN: usize = 8 + 1;
const CONTENT_HEAD: usize = 8 + 2 + 1 + 2;
/// Content that does not become smaller is sent as it is.
const CONTENT_LEN_MAX: usize = CONTENT_HEAD + BLOCK_MAX;
const HASHES_LEN_MAX: usize = 4 + LEAVES_MAX * (5 + CONTENT_HASH_LEN);

/// What stands before each item: what it is, where, and how long it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ItemHead {
    kind: u8,
    disk: DiskNo,
    start: u64,
    len: usize,
}

impl ItemHead {
    /// Length in bytes.
    pub const LEN: usize = 4 + 4 + 8 + 4;

    /// Reads it.
    ///
    /// # Errors
    /// [`WireError`] for an unknown kind, and a length that no such item has.
    pub fn decode(bytes: &[u8; Self::LEN]) -> Result<Self, WireError> {
        let mut reader = Reader::new(bytes);
        let kind = reader.u32()?;
        let disk = DiskNo(reader.u32()?);
        let start = reader.u64()?;
        let len = usize::try_from(reader.u32()?).unwrap_or(usize::MAX);
        let kind = u8::try_from(kind).unwrap_or(0);
        let fits = match kind {
            ZERO => len == ZERO_LEN,
            CONTENT => (CONTENT_HEAD + 1..=CONTENT_LEN_MAX).contains(&len),
            HASHES => len <= HASHES_LEN_MAX,
            SETTLED | END => len == 0,
            other => return Err(WireError::UnknownType(other)),
        };
        if fits && start < DISK_SECTORS_MAX {
            Ok(Self { kind, disk, start, len })
        } else {
            Err(WireError::OutOfRange("length of a change"))
        }
    }

    /// Bytes that follow.
    #[must_use]
    pub const fn body_len(&self) -> usize {
        self.len
    }
}

impl Item {
    /// The item's bytes, with its head.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut body = Vec::new();
        let (kind, disk, start) = match self {
            Self::Zero { disk, extent, trim } => {
                body.put_u64(extent.sectors);
                body.put_u8(u8::from(*trim));
                (ZERO, *disk, extent.start)
            }
            Self::Content { disk, extent, codec, sum, stored } => {
                body.reserve(CONTENT_HEAD + stored.len());
                body.put_u64(*sum);
                body.put_u16(u16::try_from(extent.sectors).unwrap_or(u16::MAX));
                body.put_u8(codec.code());
                body.put_u16(0);
                body.put(stored);
                (CONTENT, *disk, extent.start)
            }
            Self::Hashes { disk, first, runs } => {
                put_runs(&mut body, runs);
                (HASHES, *disk, *first)
            }
            Self::Settled { disk, first } => (SETTLED, *disk, *first),
            Self::End => (END, DiskNo(0), 0),
        };
        let mut out = Vec::with_capacity(ItemHead::LEN + body.len());
        out.put_u32(u32::from(kind));
        out.put_u32(disk.0);
        out.put_u64(start);
        out.put_u32(u32::try_from(body.len()).unwrap_or(u32::MAX));
        out.put(&body);
        out
    }

    /// Reads what stands behind a head.
    ///
    /// # Errors
    /// [`WireError`].
    pub fn decode(head: &ItemHead, body: &[u8]) -> Result<Self, WireError> {
        let mut reader = Reader::new(body);
        let disk = head.disk;
        let item = match head.kind {
            ZERO => {
                let extent = Extent::new(head.start, reader.u64()?);
                let trim = match reader.u8()? {
                    0 => false,
                    1 => true,
                    _ => return Err(WireError::OutOfRange("flag")),
                };
                Self::Zero { disk, extent: checked(extent)?, trim }
            }
            CONTENT => {
                let sum = reader.u64()?;
                let extent = checked(Extent::new(head.start, u64::from(reader.u16()?)))?;
                let codec = Codec::from_code(reader.u8()?);
                let codec = codec.ok_or(WireError::OutOfRange("codec"))?;
                if extent.sectors * SECTOR > BLOCK_MAX as u64 || reader.u16()? != 0 {
                    return Err(WireError::OutOfRange("length of content"));
                }
                let stored = reader.take(reader.remaining())?.to_vec();
                Self::Content { disk, extent, codec, sum, stored }
            }
            HASHES => {
                let runs = runs(&mut reader)?;
                let leaves: u64 = runs.iter().map(HashRun::count).sum();
                if leaves > LEAVES_MAX as u64 {
                    return Err(WireError::OutOfRange("number of hashes"));
                }
                Self::Hashes { disk, first: head.start, runs }
            }
            SETTLED => Self::Settled { disk, first: head.start },
            _ => Self::End,
        };
        if reader.is_empty() { Ok(item) } else { Err(WireError::Trailing(reader.remaining())) }
    }
}

fn checked(extent: Extent) -> Result<Extent, WireError> {
    if extent.sectors > 0 && extent.fits(DISK_SECTORS_MAX) {
        Ok(extent)
    } else {
        Err(WireError::OutOfRange("extent"))
    }
}

/// Secondary to primary, the answer to [`Item::Hashes`]: which of the leaves it lacks, and what it
/// has in their place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// The group.
    pub group: GroupId,
    /// The nonce of the offer that was accepted.
    pub nonce: u64,
    /// The disk.
    pub disk: DiskNo,
    /// The first of the leaves, as in the hashes.
    pub first: u64,
    /// The leaves that are lacking, counted from the first, in order, each with the hashes of the
    /// pages in their place; what has no page, or none that can be read, is all zero.
    pub leaves: Vec<(u16, LeafPages)>,
}

/// The hashes of a leaf's pages.
pub type LeafPages = [[u8; CONTENT_HASH_LEN]; LEAF_PAGES];

impl Wanted {
    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        out.put(&self.group.0);
        out.put_u64(self.nonce);
        out.put_u32(self.disk.0);
        out.put_u64(self.first);
        out.put_u16(u16::try_from(self.leaves.len()).unwrap_or(u16::MAX));
        for (leaf, pages) in &self.leaves {
            out.put_u16(*leaf);
            pages.iter().for_each(|page| out.put(page));
        }
    }

    pub(super) fn decode(reader: &mut Reader<'_>) -> Result<Self, WireError> {
        let group = GroupId(reader.array()?);
        let nonce = reader.u64()?;
        let disk = DiskNo(reader.u32()?);
        let first = reader.u64()?;
        let count = usize::from(reader.u16()?);
        if count > LEAVES_MAX || first >= DISK_SECTORS_MAX {
            return Err(WireError::OutOfRange("number of leaves"));
        }
        let mut leaves: Vec<(u16, LeafPages)> = Vec::new();
        for _ in 0..count {
            let leaf = reader.u16()?;
            let in_order = leaves.last().is_none_or(|(last, _)| *last < leaf);
            if usize::from(leaf) >= LEAVES_MAX || !in_order {
                return Err(WireError::OutOfRange("order of leaves"));
            }
            let mut pages = LeafPages::default();
            for page in &mut pages {
                *page = reader.array()?;
            }
            leaves.push((leaf, pages));
        }
        Ok(Self { group, nonce, disk, first, leaves })
    }
}
