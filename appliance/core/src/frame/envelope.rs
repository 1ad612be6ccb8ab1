//! What lies around one copy of a frame: which segment it is in, and how its content is stored.
//!
//! Nothing in here is part of the frame: the primary keeps content raw, the link and the secondary
//! keep it compressed, and both copies have the same hash. On the wire the same bytes are used
//! with segment id zero and without padding.

use alloc::vec::Vec;

use super::decode::Head;
use crate::bytes::{Reader, Truncated, Writer, content_sum};
use crate::ids::{FrameHash, Seq};
use crate::limits::{BLOCK_MAX, FRAME_BLOCKS_MAX, FRAME_HEAD_MAX, FRAME_PAYLOAD_MAX, PAGE};

/// First bytes of an envelope.
pub const MAGIC: [u8; 4] = *b"SRNe";

/// Version of the envelope's layout.
pub const VERSION: u16 = 1;

/// Length of the fixed part in bytes; the frame's head follows, then the encoding table.
pub const LEN: usize = 64;

/// Flag: an encoding table is present. Without it all blocks are raw.
const ENCODED: u16 = 1;

/// How a block's content is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Codec {
    /// As it is.
    Raw,
    /// One LZ4 block.
    Lz4,
    /// One zstd frame.
    Zstd,
}

impl Codec {
    /// The number on disk and wire.
    #[must_use]
    pub const fn code(self) -> u8 {
        match self {
            Self::Raw => 0,
            Self::Lz4 => 1,
            Self::Zstd => 2,
        }
    }

    /// The codec with this number.
    #[must_use]
    pub const fn from_code(code: u8) -> Option<Self> {
        match code {
            0 => Some(Self::Raw),
            1 => Some(Self::Lz4),
            2 => Some(Self::Zstd),
            _ => None,
        }
    }
}

/// One entry of the encoding table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stored {
    /// How the block is stored.
    pub codec: Codec,
    /// Its stored length in bytes; never longer than its content.
    pub len: u32,
}

/// The fixed part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Envelope {
    /// The segment this copy was written to; zero on the wire. Stale frames in a recycled segment
    /// carry the id of its earlier life.
    pub segment: u64,
    /// Bytes of the frame's head.
    pub head_len: u32,
    /// Entries of the encoding table: the number of blocks, or zero when all are raw.
    pub encoded_blocks: u32,
    /// Bytes of stored content, without padding.
    pub stored_len: u32,
    /// The frame's hash.
    pub hash: FrameHash,
    /// The highest sequence number known to be durable *in this copy's log* when it was written;
    /// zero on the wire. It tells damage from a tail that a crash has torn.
    pub durable: Seq,
}

/// Why bytes are not an envelope.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum EnvelopeError {
    /// It ends too early.
    #[error("envelope {0}")]
    Truncated(#[from] Truncated),
    /// It does not begin like an envelope.
    #[error("no envelope here")]
    Magic,
    /// It was written by a newer version.
    #[error("envelope has format version {0}, this program knows {VERSION}")]
    Version(u16),
    /// Its own checksum does not match.
    #[error("envelope is damaged")]
    Sum,
    /// A length beyond its cap, or an encoding table that does not fit the frame.
    #[error("envelope field out of range: {0}")]
    OutOfRange(&'static str),
}

impl Envelope {
    /// Bytes from the envelope's start to the end of the encoding table.
    #[must_use]
    pub const fn front_len(&self) -> usize {
        LEN + self.head_len as usize + 4 * self.encoded_blocks as usize
    }

    /// Bytes on disk: front and stored content, each padded to [`PAGE`].
    #[must_use]
    pub const fn disk_len(&self) -> usize {
        self.front_len().next_multiple_of(PAGE) + (self.stored_len as usize).next_multiple_of(PAGE)
    }

    /// Bytes on the wire: the same without padding.
    #[must_use]
    pub const fn wire_len(&self) -> usize {
        self.front_len() + self.stored_len as usize
    }

    /// Offset of the stored content on disk, from the envelope's start.
    #[must_use]
    pub const fn disk_content_offset(&self) -> usize {
        self.front_len().next_multiple_of(PAGE)
    }

    /// The fixed part's bytes. `table` is the encoding table's bytes ([`encode_table`]); the
    /// checksum covers both.
    #[must_use]
    pub fn encode(&self, table: &[u8]) -> [u8; LEN] {
        let mut bytes = Vec::with_capacity(LEN + table.len());
        bytes.put(&MAGIC);
        bytes.put_u16(VERSION);
        bytes.put_u16(if self.encoded_blocks > 0 { ENCODED } else { 0 });
        bytes.put_u64(self.segment);
        bytes.put_u32(self.head_len);
        bytes.put_u32(self.encoded_blocks);
        bytes.put_u32(self.stored_len);
        bytes.put_u32(0);
        bytes.put(&self.hash.0);
        bytes.put_u64(self.durable.0);
        bytes.put(table);
        let sum = content_sum(&bytes);
        let mut out = [0u8; LEN];
        for (to, from) in out.iter_mut().zip(bytes.iter().take(LEN - 8).chain(&sum.to_le_bytes())) {
            *to = *from;
        }
        out
    }

    /// Reads the fixed part and checks its lengths. The checksum is checked by
    /// [`Self::check_sum`], once the encoding table is at hand.
    ///
    /// # Errors
    /// [`EnvelopeError`]; [`EnvelopeError::Magic`] for anything that is no envelope at all.
    pub fn decode(bytes: &[u8]) -> Result<Self, EnvelopeError> {
        let mut reader = Reader::new(bytes);
        if reader.array()? != MAGIC {
            return Err(EnvelopeError::Magic);
        }
        match reader.u16()? {
            VERSION => {}
            other => return Err(EnvelopeError::Version(other)),
        }
        let flags = reader.u16()?;
        let envelope = Self {
            segment: reader.u64()?,
            head_len: reader.u32()?,
            encoded_blocks: reader.u32()?,
            stored_len: reader.u32()?,
            hash: {
                if reader.u32()? != 0 {
                    return Err(EnvelopeError::OutOfRange("reserved bytes"));
                }
                FrameHash(reader.array()?)
            },
            durable: Seq(reader.u64()?),
        };
        reader.u64()?;
        let fits = |value: u32, max: usize| usize::try_from(value).is_ok_and(|value| value <= max);
        if !fits(envelope.head_len, FRAME_HEAD_MAX) {
            return Err(EnvelopeError::OutOfRange("head length"));
        }
        if !fits(envelope.encoded_blocks, FRAME_BLOCKS_MAX) {
            return Err(EnvelopeError::OutOfRange("encoding table length"));
        }
        if !fits(envelope.stored_len, FRAME_PAYLOAD_MAX) {
            return Err(EnvelopeError::OutOfRange("stored length"));
        }
        if flags != if envelope.encoded_blocks > 0 { ENCODED } else { 0 } {
            return Err(EnvelopeError::OutOfRange("flags"));
        }
        Ok(envelope)
    }

    /// Checks the checksum over the fixed part's bytes and the encoding table's.
    ///
    /// # Errors
    /// [`EnvelopeError::Sum`].
    pub fn check_sum(&self, fixed: &[u8; LEN], table: &[u8]) -> Result<(), EnvelopeError> {
        if self.encode(table) == *fixed { Ok(()) } else { Err(EnvelopeError::Sum) }
    }

    /// How each block of `head` is stored, in order, with the checks that make it safe to use:
    /// lengths add up, raw blocks have their content's length, encoded ones are shorter.
    ///
    /// # Errors
    /// [`EnvelopeError::OutOfRange`] or a truncated table.
    pub fn stored_blocks(
        &self,
        head: &Head<'_>,
        table: &[u8],
    ) -> Result<Vec<Stored>, EnvelopeError> {
        let mut stored = Vec::with_capacity(head.block_count());
        let mut total = 0usize;
        if self.encoded_blocks == 0 {
            for block in head.blocks() {
                let len = u32::try_from(block.len()).unwrap_or(u32::MAX);
                stored.push(Stored { codec: Codec::Raw, len });
                total += block.len();
            }
        } else {
            let mut reader = Reader::new(table);
            for block in head.blocks() {
                let entry = reader.u32()?;
                let [len0, len1, len2, code] = entry.to_le_bytes();
                let codec =
                    Codec::from_code(code).ok_or(EnvelopeError::OutOfRange("block codec"))?;
                let len = u32::from_le_bytes([len0, len1, len2, 0]);
                let stored_len = usize::try_from(len).unwrap_or(usize::MAX);
                let fits = match codec {
                    Codec::Raw => stored_len == block.len(),
                    Codec::Lz4 | Codec::Zstd => (1..block.len()).contains(&stored_len),
                };
                if !fits {
                    return Err(EnvelopeError::OutOfRange("stored length of a block"));
                }
                total += stored_len;
                stored.push(Stored { codec, len });
            }
            if !reader.is_empty() {
                return Err(EnvelopeError::OutOfRange("encoding table length"));
            }
        }
        if total != self.stored_len as usize {
            return Err(EnvelopeError::OutOfRange("stored length"));
        }
        Ok(stored)
    }
}

/// The encoding table's bytes: four an entry, stored length in the low three, codec in the top one.
#[must_use]
pub fn encode_table(blocks: &[Stored]) -> Vec<u8> {
    let mut table = Vec::with_capacity(4 * blocks.len());
    for block in blocks {
        table.put_u32(block.len | (u32::from(block.codec.code()) << 24));
    }
    table
}

const _: () = assert!(BLOCK_MAX < 1 << 24);
