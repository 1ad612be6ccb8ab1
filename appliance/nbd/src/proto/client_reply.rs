//! Decoding of replies, from a server that may lie.
//!
//! Pure judgement of what arrived; the buffers and the table of requests in flight are the
//! client's. [`Coverage`] is what keeps a read from being called complete when it is not
//! (CVE-2022-0485 was a reader that ignored an error, CVE-2023-5871 one that believed a length).

use std::collections::BTreeMap;
use std::ops::Range;

use super::constants::{
    CHUNK_HEADER_BYTES, CHUNK_MAGIC, SIMPLE_REPLY_BYTES, SIMPLE_REPLY_MAGIC, STATUS_EXTENTS_MAX,
    STRING_MAX, allocation_flag, chunk,
};
use super::error_code::ErrorCode;
use super::reply::StatusExtent;
use super::wire::Fields;

/// The most pieces the covered part of one read may fall into at any moment.
const COVERAGE_PIECES_MAX: usize = 65_536;

/// The longest error chunk: fixed fields, a string, and room for fields to come.
const ERROR_CHUNK_MAX: u32 = STRING_MAX as u32 + 64;

/// A header at the start of a reply or of one chunk of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReplyHeader {
    /// A simple reply; the data of a successful read follows.
    Simple {
        /// `None` is success.
        error: Option<ErrorCode>,
        /// The request's cookie.
        cookie: u64,
    },
    /// A chunk of a structured reply with its payload of `length` bytes following.
    Chunk {
        /// The last one of its reply.
        done: bool,
        /// What it holds.
        kind: ChunkKind,
        /// The request's cookie.
        cookie: u64,
        /// Bytes of payload; within the bounds of the kind.
        length: u32,
    },
}

/// What a chunk holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChunkKind {
    /// The end of a reply.
    None,
    /// An offset and data.
    Data,
    /// An offset and a length of zeroes.
    Hole,
    /// A context and extents.
    Status,
    /// An error for the whole request.
    Error,
    /// An error at an offset.
    ErrorOffset,
    /// An error of a kind from the future.
    OtherError,
}

/// How a server broke the transmission phase; the connection cannot be used any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ReplyViolation {
    /// Something else where a reply should start.
    #[error("{0:#010x} where a reply should start")]
    Magic(u32),
    /// A structured reply that was never agreed.
    #[error("structured reply without negotiation")]
    NotNegotiated,
    /// A simple reply to a request that must have a structured one.
    #[error("simple reply to a request with a payload in its answer")]
    SimpleReply,
    /// A reply to nothing.
    #[error("reply to a request that is not in flight")]
    StrangeCookie,
    /// A chunk of a kind that does not fit its request, or of no known kind.
    #[error("chunk of type {0} does not fit the request")]
    StrangeChunk(u16),
    /// A chunk whose length does not fit its kind.
    #[error("chunk of type {kind} with {length} bytes")]
    ChunkLength {
        /// The chunk's type.
        kind: u16,
        /// Its payload length in bytes.
        length: u32,
    },
    /// A chunk that is the end of a reply and does not say so.
    #[error("empty chunk that does not end its reply")]
    NotDone,
    /// Data or a hole outside the range of the read.
    #[error("content outside the requested range")]
    OutOfRange,
    /// Data or a hole that was sent before.
    #[error("content sent twice")]
    Overlap,
    /// A read cut into ever smaller pieces.
    #[error("content in too many pieces")]
    TooManyPieces,
    /// Success without all the content.
    #[error("success without all of the content")]
    Missing,
    /// Success without one status chunk for each context.
    #[error("success without the status of every context")]
    MissingStatus,
    /// A status chunk for a context that was not selected, or a second one.
    #[error("status of a context that was not selected")]
    StrangeContext,
    /// Extents that are empty, too many or too long.
    #[error("unlawful status extents")]
    Extents,
    /// An error chunk with no error, or whose text is longer than the chunk.
    #[error("malformed error chunk")]
    ErrorChunk,
}

impl ReplyHeader {
    /// Decodes the header at the start of `input`; `None` if it is not whole yet. The second value
    /// is the length of the header in bytes.
    ///
    /// # Errors
    /// [`ReplyViolation`] for what is no reply, or a chunk of impossible length.
    pub fn decode(input: &[u8]) -> Result<Option<(Self, usize)>, ReplyViolation> {
        let mut fields = Fields::new(input);
        match fields.take_u32() {
            None => Ok(None),
            Some(SIMPLE_REPLY_MAGIC) => {
                let (Some(error), Some(cookie)) = (fields.take_u32(), fields.take_u64()) else {
                    return Ok(None);
                };
                let error = (error != 0).then(|| ErrorCode::from_wire(error));
                Ok(Some((Self::Simple { error, cookie }, SIMPLE_REPLY_BYTES)))
            }
            Some(CHUNK_MAGIC) => {
                let head = (fields.take_u16(), fields.take_u16(), fields.take_u64());
                let ((Some(flags), Some(kind), Some(cookie)), Some(length)) =
                    (head, fields.take_u32())
                else {
                    return Ok(None);
                };
                let done = flags & chunk::FLAG_DONE != 0;
                let kind = chunk_kind(kind, length, done)?;
                Ok(Some((Self::Chunk { done, kind, cookie, length }, CHUNK_HEADER_BYTES)))
            }
            Some(other) => Err(ReplyViolation::Magic(other)),
        }
    }
}

fn chunk_kind(number: u16, length: u32, done: bool) -> Result<ChunkKind, ReplyViolation> {
    let status_max = STATUS_EXTENTS_MAX as u32 * 8 + 4;
    let (kind, lawful) = match number {
        chunk::NONE => (ChunkKind::None, length == 0),
        chunk::OFFSET_DATA => (ChunkKind::Data, length >= 9),
        chunk::OFFSET_HOLE => (ChunkKind::Hole, length == 12),
        chunk::BLOCK_STATUS => {
            (ChunkKind::Status, length >= 12 && length % 8 == 4 && length <= status_max)
        }
        chunk::ERROR => (ChunkKind::Error, (6..=ERROR_CHUNK_MAX).contains(&length)),
        chunk::ERROR_OFFSET => (ChunkKind::ErrorOffset, (14..=ERROR_CHUNK_MAX).contains(&length)),
        _ if number & chunk::ERROR_BIT != 0 => {
            (ChunkKind::OtherError, (6..=ERROR_CHUNK_MAX).contains(&length))
        }
        _ => return Err(ReplyViolation::StrangeChunk(number)),
    };
    if !lawful {
        return Err(ReplyViolation::ChunkLength { kind: number, length });
    }
    if kind == ChunkKind::None && !done {
        return Err(ReplyViolation::NotDone);
    }
    Ok(kind)
}

/// The error of an error chunk and the server's text, from the chunk's whole payload.
///
/// # Errors
/// [`ReplyViolation::ErrorChunk`] if the fields do not add up.
pub fn decode_error(payload: &[u8]) -> Result<(ErrorCode, String), ReplyViolation> {
    let mut fields = Fields::new(payload);
    let decoded = fields.take_u32().zip(fields.take_u16()).and_then(|(number, length)| {
        let text = fields.take_bytes(usize::from(length))?;
        (number != 0 && text.len() <= STRING_MAX)
            .then(|| (ErrorCode::from_wire(number), String::from_utf8_lossy(text).into_owned()))
    });
    decoded.ok_or(ReplyViolation::ErrorChunk)
}

/// Offset and length in bytes of a hole chunk, from its whole payload.
///
/// # Errors
/// [`ReplyViolation::OutOfRange`] for a hole of nothing.
pub fn decode_hole(payload: &[u8]) -> Result<(u64, u32), ReplyViolation> {
    let mut fields = Fields::new(payload);
    match fields.take_u64().zip(fields.take_u32()) {
        Some((_, 0)) | None => Err(ReplyViolation::OutOfRange),
        Some(hole) => Ok(hole),
    }
}

/// The status flags of one extent and its length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RawExtent {
    /// Bytes; not zero.
    pub length: u32,
    /// Flags, whose meaning the context defines.
    pub flags: u32,
}

impl From<RawExtent> for StatusExtent {
    /// By the rules of `base:allocation`: unknown flags are ignored.
    fn from(extent: RawExtent) -> Self {
        Self {
            length: u64::from(extent.length),
            hole: extent.flags & allocation_flag::HOLE != 0,
            zero: extent.flags & allocation_flag::ZERO != 0,
        }
    }
}

/// Context id and extents of a status chunk, from its whole payload. `requested` is the length of
/// the request in bytes, `one` whether one extent was asked for.
///
/// # Errors
/// [`ReplyViolation::Extents`] if an extent is empty, comes after the requested range is told, or
/// is longer than the request where only one was asked for.
pub fn decode_status(
    payload: &[u8],
    requested: u32,
    one: bool,
) -> Result<(u32, Vec<RawExtent>), ReplyViolation> {
    let mut fields = Fields::new(payload);
    let context = fields.take_u32().ok_or(ReplyViolation::Extents)?;
    let mut extents = Vec::with_capacity(payload.len() / 8);
    let mut told = 0u64;
    while !fields.is_empty() {
        let fields = fields.take_u32().zip(fields.take_u32());
        let (length, flags) = fields.ok_or(ReplyViolation::Extents)?;
        let after_one = one && (!extents.is_empty() || length > requested);
        if length == 0 || told >= u64::from(requested) || after_one {
            return Err(ReplyViolation::Extents);
        }
        told += u64::from(length);
        extents.push(RawExtent { length, flags });
    }
    if extents.is_empty() { Err(ReplyViolation::Extents) } else { Ok((context, extents)) }
}

/// Which bytes of a read have arrived.
#[derive(Debug)]
pub struct Coverage {
    offset: u64,
    length: u32,
    /// Start to end of what has arrived, relative to `offset`, merged where they touch.
    pieces: BTreeMap<u32, u32>,
}

impl Coverage {
    /// Nothing of the range has arrived yet.
    #[must_use]
    pub fn new(offset: u64, length: u32) -> Self {
        Self { offset, length, pieces: BTreeMap::new() }
    }

    /// Notes that `length` bytes at `offset` of the export arrive, and returns where in the
    /// read's buffer they belong.
    ///
    /// # Errors
    /// [`ReplyViolation`] if they are not of this read or arrived before.
    pub fn arrive(&mut self, offset: u64, length: u32) -> Result<Range<usize>, ReplyViolation> {
        let start = offset.checked_sub(self.offset).and_then(|start| u32::try_from(start).ok());
        let start = start.ok_or(ReplyViolation::OutOfRange)?;
        let end = start.checked_add(length).filter(|end| *end <= self.length);
        let end = end.ok_or(ReplyViolation::OutOfRange)?;
        if length == 0 {
            return Err(ReplyViolation::OutOfRange);
        }
        let range = start as usize..end as usize;

        let before = self.pieces.range(..end).next_back().map(|(start, end)| (*start, *end));
        if before.is_some_and(|(_, before_end)| before_end > start) {
            return Err(ReplyViolation::Overlap);
        }
        let merged_end = self.pieces.remove(&end).unwrap_or(end);
        match before {
            Some((before_start, before_end)) if before_end == start => {
                self.pieces.insert(before_start, merged_end);
            }
            _ => {
                self.pieces.insert(start, merged_end);
            }
        }
        if self.pieces.len() > COVERAGE_PIECES_MAX {
            return Err(ReplyViolation::TooManyPieces);
        }
        Ok(range)
    }

    /// Checks that everything has arrived.
    ///
    /// # Errors
    /// [`ReplyViolation::Missing`] if not.
    pub fn finish(&self) -> Result<(), ReplyViolation> {
        if self.pieces.get(&0) == Some(&self.length) {
            Ok(())
        } else {
            Err(ReplyViolation::Missing)
        }
    }
}
