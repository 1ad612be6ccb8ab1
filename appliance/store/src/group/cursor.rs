//! Reading a line's frames in order, for sending them: from memory when they are recent, else from
//! the log.

use std::sync::Arc;

use srn_core::ids::{EpochId, FrameHash, Seq};

use super::{Group, State};
use crate::error::{Result, StoreError};
use crate::frame::Frame;
use crate::segment::{Scan, Segment, scan};

/// A reader of frames.
#[derive(Debug)]
pub struct Cursor {
    group: Arc<Group>,
    line: EpochId,
    next: Seq,
    reading: Option<Box<Reading>>,
}

#[derive(Debug)]
struct Reading {
    scan: Scan,
    /// Keeps the file from being used again.
    segment: Arc<Segment>,
    /// The last frame of this segment that belongs to the line, as far as was known.
    last: Seq,
}

impl Group {
    /// A reader of the main line from frame `next` on.
    #[must_use]
    pub fn cursor(self: &Arc<Self>, next: Seq) -> Cursor {
        let line = self.epochs().current();
        Cursor { group: self.clone(), line, next, reading: None }
    }

    /// The newest frame up to `seq` behind which what was written can be told from what was written
    /// before: `seq` itself while it lies in the log, else where a piece ends.
    #[must_use]
    pub fn told_apart_at(&self, seq: Seq) -> Seq {
        let state = self.lock();
        if seq.next() >= state.oldest(state.manifest.main) {
            return seq;
        }
        let pieces = state.manifest.timelines.get(&state.manifest.main).map(|line| &line.pieces);
        let ends = pieces.into_iter().flatten().map(|piece| piece.last.seq);
        let base = state.manifest.base.as_ref().map_or(Seq::ZERO, |base| base.catalog.at.seq);
        ends.take_while(|end| *end <= seq).last().unwrap_or(base)
    }

    /// The hash of frame `seq` of the main line, if it can still be told.
    ///
    /// # Errors
    /// When the log cannot be read.
    pub fn hash_at(self: &Arc<Self>, seq: Seq) -> Result<Option<FrameHash>> {
        let head = self.head();
        if seq == head.seq {
            return Ok(Some(head.hash));
        }
        if seq > head.seq {
            return Ok(None);
        }
        if seq == Seq::ZERO {
            return Ok(Some(FrameHash::ORIGIN));
        }
        if let Some(known) = self.lock().landmark(seq) {
            return Ok(Some(known));
        }
        // The next frame names it.
        let mut cursor = self.cursor(seq.next());
        match cursor.next() {
            Ok(frame) => Ok(frame.map(|frame| frame.header().prev)),
            Err(StoreError::NotInHistory(_)) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

impl State {
    /// The hash of a frame at which an epoch of the main line forked, a piece of it ends, or the base
    /// stands: these are known though the log no longer holds the frame.
    fn landmark(&self, seq: Seq) -> Option<FrameHash> {
        let line = self.manifest.timelines.get(&self.manifest.main)?;
        let forks = line.epochs.list().iter().map(|epoch| epoch.forked_from);
        let ends = line.pieces.iter().map(|piece| piece.last);
        let base = self.manifest.base.as_ref().map(|base| base.catalog.at);
        forks.chain(ends).chain(base).find(|at| at.seq == seq).map(|at| at.hash)
    }
}

impl Cursor {
    /// The sequence number of the frame that comes next.
    #[must_use]
    pub const fn position(&self) -> Seq {
        self.next
    }

    /// The next frame if it is still in memory; then there is no input or output at all.
    pub fn next_recent(&mut self) -> Option<Arc<Frame>> {
        let found = self.find(&self.group.lock());
        let Ok(Found::Recent(frame)) = found else { return None };
        // What was being read of the log is behind us now.
        self.reading = None;
        self.next = self.next.next();
        Some(frame)
    }

    /// The next frame; `None` at the head.
    ///
    /// # Errors
    /// [`StoreError::NotInHistory`] when it was trimmed; [`StoreError::Corrupt`] when it is damaged;
    /// as the volume says.
    #[expect(clippy::should_implement_trait, reason = "the head is no end: more may come")]
    pub fn next(&mut self) -> Result<Option<Arc<Frame>>> {
        // At most twice: the segment may turn out to have ended.
        for _ in 0..3 {
            if self.reading.is_none() {
                match self.locate()? {
                    Located::Head => return Ok(None),
                    Located::Recent(frame) => {
                        self.next = self.next.next();
                        return Ok(Some(frame));
                    }
                    Located::Log(reading) => self.reading = Some(reading),
                }
            }
            if let Some(reading) = &mut self.reading {
                if self.next > reading.last {
                    // What was known of this segment is read; see what there is now.
                    self.reading = None;
                    continue;
                }
                while let Some((_, frame)) = reading.scan.next(true)? {
                    if frame.header().seq == self.next {
                        self.next = self.next.next();
                        return Ok(Some(frame));
                    }
                    if frame.header().seq > self.next {
                        break;
                    }
                }
                let ordinal = reading.segment.ordinal;
                self.reading = None;
                return Err(StoreError::Corrupt(format!(
                    "frame {} cannot be read from log segment {ordinal}",
                    self.next
                )));
            }
        }
        Ok(None)
    }

    fn locate(&self) -> Result<Located> {
        let found = self.find(&self.group.lock())?;
        let (segment, last) = match found {
            Found::Head => return Ok(Located::Head),
            Found::Recent(frame) => return Ok(Located::Recent(frame)),
            Found::Segment(segment, last) => (segment, last),
        };
        let points = self.group.seq_points(&segment)?;
        let mut scan = scan(&segment.target(), &self.group.shared.pool)?;
        if let Some(point) = points.iter().rev().find(|point| point.seq <= self.next) {
            scan.seek(u64::from(point.offset), point.seq.prev(), point.prev);
        }
        Ok(Located::Log(Box::new(Reading { scan, segment, last })))
    }

    fn find(&self, state: &State) -> Result<Found> {
        let gone =
            || StoreError::NotInHistory(format!("frame {} is no longer in the log", self.next));
        let line = state.lines.get(&self.line).ok_or_else(gone)?;
        if self.next > line.head.seq {
            return Ok(Found::Head);
        }
        if let Some(first) = line.recent.front()
            && let Some(at) = self.next.0.checked_sub(first.header().seq.0)
            && let Some(frame) = usize::try_from(at).ok().and_then(|at| line.recent.get(at))
            && frame.header().seq == self.next
        {
            return Ok(Found::Recent(frame.clone()));
        }
        let open = line
            .unsealed
            .iter()
            .find(|open| open.segment.header.first <= self.next && self.next <= open.last.seq);
        if let Some(open) = open {
            return Ok(Found::Segment(open.segment.clone(), open.last.seq));
        }
        let pieces = state.manifest.timelines.get(&self.line).map(|line| &line.pieces);
        let pieces = pieces.ok_or_else(gone)?;
        let at = pieces.partition_point(|piece| piece.last.seq < self.next);
        let piece = pieces.get(at).ok_or_else(gone)?;
        let segment = state.segments.get(&piece.ordinal).ok_or_else(gone)?;
        if segment.header.first > self.next {
            return Err(gone());
        }
        Ok(Found::Segment(segment.clone(), piece.last.seq))
    }
}

enum Found {
    Head,
    Recent(Arc<Frame>),
    Segment(Arc<Segment>, Seq),
}

enum Located {
    Head,
    Recent(Arc<Frame>),
    Log(Box<Reading>),
}
