//! One copy of a frame in memory: its head, and its content as it is stored.
//!
//! Content is held as page-aligned pieces, so that a frame goes to the log without being copied
//! and from there to the link without being read. A frame is immutable once made.

use std::sync::Arc;

use bytes::Bytes;
use srn_core::bytes::content_sum;
use srn_core::epoch::Position;
use srn_core::frame::envelope::{self, Envelope, EnvelopeError, Stored};
use srn_core::frame::{Block, FrameError, Head, Header, hash_head};
use srn_core::ids::{FrameHash, Seq};
use srn_core::limits::PAGE;

use crate::codec::{Codecs, Effort};
use crate::io::{BufPool, is_aligned};

/// A frame with its content.
#[derive(Debug, Clone)]
pub struct Frame {
    header: Header,
    envelope: Envelope,
    /// Head and encoding table, one behind the other.
    front: Bytes,
    content: Vec<Bytes>,
}

/// Room for one block's content.
#[derive(Debug)]
pub(crate) struct Scratch {
    gathered: Vec<u8>,
    decoded: [u8; srn_core::limits::BLOCK_MAX],
}

impl Scratch {
    pub(crate) const fn new() -> Self {
        Self { gathered: Vec::new(), decoded: [0; srn_core::limits::BLOCK_MAX] }
    }
}

/// Why a copy of a frame is not sound.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BadFrame {
    /// The head is malformed.
    #[error(transparent)]
    Head(#[from] FrameError),
    /// The envelope is malformed or does not fit the head.
    #[error(transparent)]
    Envelope(#[from] EnvelopeError),
    /// The head's hash is not the one that the envelope names.
    #[error("frame {0} does not have the hash it claims")]
    Hash(u64),
    /// A block's content does not have the checksum that the head names.
    #[error("frame {seq}, block {block}: content does not have its checksum")]
    Content {
        /// The frame.
        seq: u64,
        /// The block's place in the frame.
        block: usize,
    },
    /// Fewer bytes than the envelope says.
    #[error("frame ends early")]
    Short,
}

impl Frame {
    /// A frame whose content is raw. `content` are its payload's pieces in order; all but the last
    /// must be page-aligned and a multiple of a page long.
    ///
    /// # Errors
    /// [`BadFrame`] when head and content do not fit each other. Checksums are taken as they are:
    /// whoever made the head computed them from this content.
    pub fn from_parts(
        head: Vec<u8>,
        hash: FrameHash,
        content: Vec<Bytes>,
    ) -> Result<Self, BadFrame> {
        let header = *Head::decode(&head)?.header();
        let stored_len: usize = content.iter().map(Bytes::len).sum();
        if stored_len != header.content_len as usize {
            return Err(EnvelopeError::OutOfRange("stored length").into());
        }
        let envelope = Envelope {
            segment: 0,
            head_len: u32::try_from(head.len()).unwrap_or(u32::MAX),
            encoded_blocks: 0,
            stored_len: header.content_len,
            hash,
            durable: Seq::ZERO,
        };
        Ok(Self { header, envelope, front: head.into(), content })
    }

    /// A frame from a disk or a peer: `fixed` is the envelope's fixed part, `front` the head and
    /// the encoding table, `content` the stored content. Everything but the content's checksums is
    /// verified; see [`Frame::verify`].
    ///
    /// # Errors
    /// [`BadFrame`].
    pub fn from_copy(
        fixed: &[u8; envelope::LEN],
        front: Bytes,
        content: Bytes,
    ) -> Result<Self, BadFrame> {
        let mut envelope = Envelope::decode(fixed)?;
        let head_len = envelope.head_len as usize;
        let (head_bytes, table) = front.split_at_checked(head_len).ok_or(BadFrame::Short)?;
        if table.len() != 4 * envelope.encoded_blocks as usize
            || content.len() != envelope.stored_len as usize
        {
            return Err(BadFrame::Short);
        }
        envelope.check_sum(fixed, table)?;
        let head = Head::decode(head_bytes)?;
        if hash_head(head_bytes) != envelope.hash {
            return Err(BadFrame::Hash(head.header().seq.0));
        }
        envelope.stored_blocks(&head, table)?;
        let header = *head.header();
        envelope.segment = 0;
        envelope.durable = Seq::ZERO;
        let content = if content.is_empty() { Vec::new() } else { vec![content] };
        Ok(Self { header, envelope, front, content })
    }

    /// A frame from its bytes as they are in a frame stream, verified byte by byte.
    ///
    /// # Errors
    /// [`BadFrame`].
    pub fn from_wire(bytes: &Bytes) -> Result<Self, BadFrame> {
        let fixed = *bytes.first_chunk::<{ envelope::LEN }>().ok_or(BadFrame::Short)?;
        let envelope = Envelope::decode(&fixed)?;
        if bytes.len() != envelope.wire_len() {
            return Err(BadFrame::Short);
        }
        let front = bytes.slice(envelope::LEN..envelope.front_len());
        let frame = Self::from_copy(&fixed, front, bytes.slice(envelope.front_len()..))?;
        frame.verify(&mut Codecs::new())?;
        Ok(frame)
    }

    /// Its bytes as they are in a frame stream.
    #[must_use]
    pub fn to_wire(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.envelope.wire_len());
        out.extend_from_slice(&self.envelope.encode(self.table()));
        out.extend_from_slice(&self.front);
        self.content.iter().for_each(|piece| out.extend_from_slice(piece));
        out
    }

    /// The header.
    #[must_use]
    pub const fn header(&self) -> &Header {
        &self.header
    }

    /// The position just behind this frame.
    #[must_use]
    pub const fn position(&self) -> Position {
        Position { epoch: self.header.epoch, seq: self.header.seq, hash: self.envelope.hash }
    }

    /// The envelope as it is on the wire: without segment id and watermark.
    #[must_use]
    pub const fn envelope(&self) -> &Envelope {
        &self.envelope
    }

    /// The head's bytes.
    #[must_use]
    pub fn head_bytes(&self) -> &[u8] {
        self.front.get(..self.envelope.head_len as usize).unwrap_or_default()
    }

    /// Head and encoding table as they follow the envelope's fixed part, on disk and wire.
    #[must_use]
    pub const fn front(&self) -> &Bytes {
        &self.front
    }

    /// The encoding table's bytes; empty when all content is raw.
    #[must_use]
    pub fn table(&self) -> &[u8] {
        self.front.get(self.envelope.head_len as usize..).unwrap_or_default()
    }

    /// The stored content's pieces.
    #[must_use]
    pub fn content(&self) -> &[Bytes] {
        &self.content
    }

    /// The decoded head.
    ///
    /// # Errors
    /// Never for a frame that was made: the head was decoded then.
    pub fn head(&self) -> Result<Head<'_>, FrameError> {
        Head::decode(self.head_bytes())
    }

    /// Bytes of memory that it holds.
    #[must_use]
    pub fn memory(&self) -> usize {
        self.front.len() + self.envelope.stored_len as usize
    }

    /// Each block with how and where it is stored: its offset in the stored content, in bytes.
    ///
    /// # Errors
    /// Never for a frame that was made: the same was checked then.
    pub fn blocks(&self) -> Result<Vec<(Block, Stored, u32)>, BadFrame> {
        let head = self.head()?;
        let stored = self.envelope.stored_blocks(&head, self.table())?;
        let mut offset = 0;
        let place = |(block, stored): (Block, Stored)| {
            let at = offset;
            offset += stored.len;
            (block, stored, at)
        };
        Ok(head.blocks().zip(stored).map(place).collect())
    }

    /// Verifies every block's content against its checksum.
    ///
    /// # Errors
    /// [`BadFrame::Content`] naming the first block that is not what it should be.
    pub fn verify(&self, codecs: &mut Codecs) -> Result<(), BadFrame> {
        let mut scratch = Scratch::new();
        for (at, block) in self.blocks()?.iter().enumerate() {
            if self.block_content(block, codecs, &mut scratch).is_none() {
                return Err(BadFrame::Content { seq: self.header.seq.0, block: at });
            }
        }
        Ok(())
    }

    /// The content of one of [`Frame::blocks`]; none when it does not have its checksum.
    pub(crate) fn block_content<'a>(
        &'a self,
        (block, stored, offset): &(Block, Stored, u32),
        codecs: &mut Codecs,
        scratch: &'a mut Scratch,
    ) -> Option<&'a [u8]> {
        let Scratch { gathered, decoded } = scratch;
        let bytes = self.stored_bytes(*offset as usize, stored.len as usize, gathered)?;
        let content = if stored.codec == envelope::Codec::Raw {
            bytes
        } else {
            let out = decoded.get_mut(..block.len())?;
            if !codecs.decode(stored.codec, bytes, out) {
                return None;
            }
            out
        };
        (content_sum(content) == block.sum).then_some(content)
    }

    /// A range of the stored content; gathered into `scratch` when it spans pieces.
    fn stored_bytes<'a>(
        &'a self,
        mut offset: usize,
        len: usize,
        scratch: &'a mut Vec<u8>,
    ) -> Option<&'a [u8]> {
        let mut pieces = self.content.iter();
        let piece = loop {
            let piece = pieces.next()?;
            if offset < piece.len() {
                break piece;
            }
            offset -= piece.len();
        };
        if let Some(whole) = piece.get(offset..offset + len) {
            return Some(whole);
        }
        scratch.clear();
        scratch.extend_from_slice(piece.get(offset..)?);
        for piece in pieces {
            let rest = len - scratch.len();
            scratch.extend_from_slice(piece.get(..rest.min(piece.len()))?);
            if scratch.len() == len {
                return Some(scratch);
            }
        }
        None
    }

    /// The same frame with its content encoded anew with `effort`; itself when it is encoded
    /// already or nothing was gained.
    #[must_use]
    pub fn encoded(
        self: &Arc<Self>,
        effort: Effort,
        codecs: &mut Codecs,
        pool: &BufPool,
    ) -> Arc<Self> {
        if effort == Effort::None || self.envelope.encoded_blocks > 0 || self.content.is_empty() {
            return self.clone();
        }
        self.try_encode(effort, codecs, pool).unwrap_or_else(|| self.clone())
    }

    fn try_encode(&self, effort: Effort, codecs: &mut Codecs, pool: &BufPool) -> Option<Arc<Self>> {
        let mut out = Vec::with_capacity(self.envelope.stored_len as usize);
        let mut table = Vec::new();
        let mut gathered = Vec::new();
        for (_, stored, offset) in self.blocks().ok()? {
            let bytes = self.stored_bytes(offset as usize, stored.len as usize, &mut gathered)?;
            table.push(codecs.encode(effort, bytes, &mut out));
        }
        if out.len() >= self.envelope.stored_len as usize {
            return None;
        }
        let mut front = Vec::with_capacity(self.front.len() + 4 * table.len());
        front.extend_from_slice(self.head_bytes());
        front.extend_from_slice(&envelope::encode_table(&table));
        let mut content = pool.take(out.len());
        content.copy_from_slice(&out);
        let envelope = Envelope {
            encoded_blocks: u32::try_from(table.len()).ok()?,
            stored_len: u32::try_from(out.len()).ok()?,
            ..self.envelope
        };
        Some(Arc::new(Self {
            header: self.header,
            envelope,
            front: front.into(),
            content: vec![Bytes::from_owner(content)],
        }))
    }

    /// Whether every piece can go to direct output as it is, but for the last one's tail.
    pub(crate) fn is_aligned(&self) -> bool {
        let Some((last, others)) = self.content.split_last() else { return true };
        others.iter().all(|piece| is_aligned(piece)) && last.as_ptr().addr().is_multiple_of(PAGE)
    }
}
