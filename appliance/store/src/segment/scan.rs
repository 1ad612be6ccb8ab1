//! Reading the frames of a segment from its start, and judging where and why they end.
//!
//! A log that was cut by a crash ends with frames that were being written: anything from nothing
//! to all of them may be there. A log that was damaged later looks alike at the first bad frame.
//! What tells them apart is what lies behind: a commit is only begun when the one before it is
//! durable, and each copy of a frame says which frame was durable when it was written. So if any later frame
//! is there that knew the bad one to be durable, it is damage, and nothing may be cut.

use std::sync::Arc;

use bytes::Bytes;
use srn_core::frame::envelope::{self, Envelope};
use srn_core::ids::{EpochId, FrameHash, GroupId, Seq};
use srn_core::limits::{FRAME_DISK_MAX, PAGE};
use srn_core::mutants::{self, Mutant};

use super::{HEADER_LEN, SegmentHeader};
use crate::codec::Codecs;
use crate::error::{Doing, Result};
use crate::frame::Frame;
use crate::io::{BufPool, File};

/// Bytes read at once. Any frame fits.
const CHUNK: usize = 1 << 20;

const _: () = assert!(CHUNK >= FRAME_DISK_MAX);

/// Where and why the frames end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tail {
    /// Offset behind the last good frame.
    pub offset: u64,
    /// The last good frame; the one before the segment's first if there is none.
    pub last: Seq,
    /// Its hash.
    pub hash: FrameHash,
    /// The highest sequence number that any frame found here, good or behind the end, knew to be
    /// durable. Above `last`, it proves damage.
    pub watermark: Seq,
}

/// What comes next in a segment that may be damaged.
#[derive(Debug, Clone)]
pub enum Found {
    /// A good frame, and where it begins.
    Frame(u64, Arc<Frame>),
    /// Frames that cannot be read.
    Gap {
        /// The first.
        from: Seq,
        /// The last.
        to: Seq,
        /// Where they begin.
        offset: u64,
        /// Where the next good one begins, or the frames end.
        end: u64,
    },
    /// That was all.
    End,
}

/// A segment file to read.
#[derive(Debug, Clone)]
pub struct Target {
    /// The file's number, for messages.
    pub slot: u32,
    /// The header.
    pub header: SegmentHeader,
    /// The file.
    pub file: Arc<dyn File>,
}

/// Reads frames one after the other.
pub struct Scan {
    segment: Target,
    pool: BufPool,
    codecs: Codecs,
    len: u64,
    chunk: Bytes,
    chunk_at: u64,
    offset: u64,
    last: Seq,
    hash: FrameHash,
    watermark: Seq,
}

impl std::fmt::Debug for Scan {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Scan(slot {}, offset {})", self.segment.slot, self.offset)
    }
}

/// Starts reading a segment from its first frame.
///
/// # Errors
/// As the volume says.
pub fn scan(segment: &Target, pool: &BufPool) -> Result<Scan> {
    let len = segment
        .file
        .size()
        .doing(|| format!("asking for the length of log segment {}", segment.slot))?;
    Ok(Scan {
        segment: segment.clone(),
        pool: pool.clone(),
        codecs: Codecs::new(),
        len,
        chunk: Bytes::new(),
        chunk_at: 0,
        offset: HEADER_LEN,
        last: segment.header.first.prev(),
        hash: segment.header.prev,
        watermark: Seq::ZERO,
    })
}

/// What the header of a segment must have said, by its first frame; none when there is no sound
/// one.
///
/// # Errors
/// As the volume says.
pub fn header_from_frame(
    slot: u32,
    group: GroupId,
    file: &Arc<dyn File>,
    pool: &BufPool,
) -> Result<Option<SegmentHeader>> {
    let nothing = SegmentHeader {
        id: 0,
        group,
        epoch: EpochId([0; 16]),
        first: Seq(1),
        prev: FrameHash([0; 16]),
    };
    let mut frames = scan(&Target { slot, header: nothing, file: file.clone() }, pool)?;
    let Some(page) = frames.bytes(HEADER_LEN, PAGE)? else { return Ok(None) };
    let fixed = page.first_chunk::<{ envelope::LEN }>();
    let envelope = fixed.map(|fixed| Envelope::decode(fixed));
    let Some(Ok(envelope)) = envelope else { return Ok(None) };
    frames.segment.header.id = envelope.segment;
    let Some((frame, _)) = frames.frame_at(HEADER_LEN, true)? else { return Ok(None) };
    let first = frame.header();
    Ok(Some(SegmentHeader {
        id: envelope.segment,
        group: first.group,
        epoch: first.epoch,
        first: first.seq,
        prev: first.prev,
    }))
}

impl Scan {
    /// Where the next frame is looked for, and the frame it has to follow.
    pub(crate) const fn place(&self) -> (u64, Seq) {
        (self.offset, self.last)
    }

    /// Length of the file in bytes.
    pub(crate) const fn file_len(&self) -> u64 {
        self.len
    }

    /// Goes on at a frame that is known to begin at `offset`, behind frame `last` with `hash`.
    pub fn seek(&mut self, offset: u64, last: Seq, hash: FrameHash) {
        self.offset = offset;
        self.last = last;
        self.hash = hash;
    }

    /// The next good frame that continues the chain, with its offset; `None` where they end. With
    /// `verify` its content is verified too.
    ///
    /// # Errors
    /// As the volume says. What is not a good frame is an end, not an error.
    pub fn next(&mut self, verify: bool) -> Result<Option<(u64, Arc<Frame>)>> {
        let at = self.offset;
        let Some((frame, durable)) = self.frame_at(at, verify)? else { return Ok(None) };
        let header = frame.header();
        if header.seq != self.last.next()
            || header.prev != self.hash
            || header.epoch != self.segment.header.epoch
        {
            return Ok(None);
        }
        self.last = header.seq;
        self.hash = frame.envelope().hash;
        self.watermark = self.watermark.max(durable);
        self.offset = at + frame.envelope().disk_len() as u64;
        Ok(Some((at, Arc::new(frame))))
    }

    /// What comes next in a segment whose frames are known to go on to `last` and end at offset
    /// `end`: a good frame, or those that are missing up to the next good one.
    ///
    /// # Errors
    /// As the volume says. Damage is no error.
    pub fn next_or_gap(&mut self, last: Seq, end: u64) -> Result<Found> {
        if self.last >= last {
            return Ok(Found::End);
        }
        if let Some((offset, frame)) = self.next(true)? {
            return Ok(Found::Frame(offset, frame));
        }
        let (from, offset) = (self.last.next(), self.offset);
        let mut at = offset + PAGE as u64;
        while at < end {
            if let Some((frame, _)) = self.frame_at(at, true)? {
                let header = frame.header();
                let fits = header.epoch == self.segment.header.epoch
                    && header.seq > from
                    && header.seq <= last;
                if fits {
                    let (seq, prev) = (header.seq, header.prev);
                    self.seek(at, seq.prev(), prev);
                    return Ok(Found::Gap { from, to: seq.prev(), offset, end: at });
                }
            }
            at += PAGE as u64;
        }
        self.last = last;
        Ok(Found::Gap { from, to: last, offset, end })
    }

    /// Looks at everything behind the last good frame, and says how it ends.
    ///
    /// # Errors
    /// As the volume says.
    pub fn tail(mut self) -> Result<Tail> {
        let tail =
            Tail { offset: self.offset, last: self.last, hash: self.hash, watermark: Seq::ZERO };
        let mut at = self.offset;
        while at < self.len {
            if let Some((frame, durable)) = self.frame_at(at, true)? {
                self.watermark = self.watermark.max(durable);
                at += frame.envelope().disk_len() as u64;
            } else {
                at += PAGE as u64;
            }
        }
        Ok(Tail { watermark: self.watermark, ..tail })
    }

    /// The sound frame of this segment at `at`, wherever it belongs in the chain, and the watermark
    /// that was written with it.
    pub(crate) fn frame_at(&mut self, at: u64, verify: bool) -> Result<Option<(Frame, Seq)>> {
        let Some(page) = self.bytes(at, PAGE)? else { return Ok(None) };
        let Some(fixed) = page.first_chunk::<{ envelope::LEN }>() else { return Ok(None) };
        let Ok(envelope) = Envelope::decode(fixed) else { return Ok(None) };
        if envelope.segment != self.segment.header.id && !mutants::is(Mutant::StaleFramesAccepted) {
            return Ok(None);
        }
        let fixed = *fixed;
        let Some(bytes) = self.bytes(at, envelope.disk_len())? else { return Ok(None) };
        let front = bytes.slice(envelope::LEN..envelope.front_len());
        let start = envelope.disk_content_offset();
        let content = bytes.slice(start..start + envelope.stored_len as usize);
        let Ok(frame) = Frame::from_copy(&fixed, front, content) else { return Ok(None) };
        if frame.header().group != self.segment.header.group {
            return Ok(None);
        }
        if verify && frame.verify(&mut self.codecs).is_err() {
            return Ok(None);
        }
        Ok(Some((frame, envelope.durable)))
    }

    /// `len` bytes from `at`; `None` when the file ends before.
    pub(crate) fn bytes(&mut self, at: u64, len: usize) -> Result<Option<Bytes>> {
        if at.checked_add(len as u64).is_none_or(|end| end > self.len) {
            return Ok(None);
        }
        let within = |chunk: &Bytes, chunk_at: u64| {
            let start = usize::try_from(at.checked_sub(chunk_at)?).ok()?;
            let end = start.checked_add(len)?;
            (end <= chunk.len()).then(|| chunk.slice(start..end))
        };
        if let Some(bytes) = within(&self.chunk, self.chunk_at) {
            return Ok(Some(bytes));
        }
        let want = CHUNK.min(usize::try_from(self.len - at).unwrap_or(CHUNK));
        let mut buf = self.pool.take(want.next_multiple_of(PAGE));
        // The frame that the last chunk cut in two is not read twice: its first part is moved.
        let kept = at.checked_sub(self.chunk_at).and_then(|skip| usize::try_from(skip).ok());
        let kept = kept.and_then(|skip| self.chunk.get(skip..)).unwrap_or_default();
        let kept = kept.get(..kept.len() / PAGE * PAGE).unwrap_or_default();
        let (first, rest) = buf.split_at_mut_checked(kept.len()).unwrap_or_default();
        first.copy_from_slice(kept);
        let kept = kept.len();
        let read = self
            .segment
            .file
            .read_at(rest, at + kept as u64)
            .doing(|| format!("reading log segment {} at {at}", self.segment.slot))?;
        buf.set_len(kept + read);
        self.chunk = Bytes::from_owner(buf);
        self.chunk_at = at;
        Ok(within(&self.chunk, self.chunk_at))
    }
}
