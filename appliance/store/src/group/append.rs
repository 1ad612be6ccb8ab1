//! Appending to one line: the only code that makes frames durable.
//!
//! Invariants, each with a test that tries to break it:
//! * a frame counts as appended only after its durable write has returned;
//! * one commit is written only when the one before it is durable, and each copy of a frame names
//!   the last frame that was durable then;
//! * after a failed write nothing is appended until the group was opened anew.

use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError, RwLock};

use srn_core::epoch::Position;
use srn_core::ids::EpochId;
use srn_core::mutants::{self, Mutant};
use srn_core::time::{LogClock, LogTime, Now, WallTime};

use super::build::{Change, FrameChain, OwnedRecord};
use super::{Group, Unsealed};
use crate::error::{Result, StoreError};
use crate::frame::Frame;
use crate::index::MemTable;
use crate::manifest::Keep;
use crate::segment::{HEADER_LEN, Segment, SegmentHeader, SegmentWriter};

/// Appends below this size, in bytes, gain from segment files that were filled.
const SMALL_APPEND: u64 = 32 << 10;

/// What a commit did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Committed {
    /// The newest durable frame.
    pub head: Position,
    /// Frames appended.
    pub frames: usize,
    /// Changes that are durable now, counted from the first.
    pub changes: usize,
    /// Why not all of them are, if there was no room.
    pub full: Option<String>,
}

/// The end of a line.
#[derive(Debug)]
pub struct Appender {
    group: Arc<Group>,
    epoch: EpochId,
    writer: Option<SegmentWriter>,
    head: Position,
    clock: LogClock,
    stopped: Option<String>,
    /// Set while recovering: frames that were there must find room.
    beyond_cap: bool,
}

impl Appender {
    pub(super) const fn new(
        group: Arc<Group>,
        epoch: EpochId,
        head: Position,
        clock: LogClock,
    ) -> Self {
        Self { group, epoch, writer: None, head, clock, stopped: None, beyond_cap: false }
    }

    /// The group.
    #[must_use]
    pub const fn group(&self) -> &Arc<Group> {
        &self.group
    }

    /// The newest durable frame.
    #[must_use]
    pub const fn head(&self) -> Position {
        self.head
    }

    /// Appends changes in order, in as few frames as they fit, durably. An empty list appends an
    /// empty frame, which tells later readers of the log that all frames before it were durable.
    ///
    /// When the log is full, as many as fit are appended; `full` says so.
    ///
    /// # Errors
    /// As the volume says; then this appender has stopped. [`StoreError::Full`] when nothing fits.
    pub fn commit(&mut self, changes: &[Change], now: Now) -> Result<Committed> {
        self.check()?;
        let (log_time, step) = self.clock.tick(now);
        if let Some(step) = step {
            let record = Change::Record(OwnedRecord::ClockStep(step));
            self.commit_at(&[record], log_time, now)?;
        }
        self.commit_at(changes, log_time, now)
    }

    fn commit_at(&mut self, changes: &[Change], log_time: LogTime, now: Now) -> Result<Committed> {
        let mut chain = FrameChain {
            group: self.group.id,
            at: Position { epoch: self.epoch, ..self.head },
            durable: self.head.seq,
            log_time,
            wall_time: now.wall,
            pool: &self.group.shared.pool,
        };
        let built = chain.build(changes)?;
        let frames: Vec<Arc<Frame>> = built.iter().map(|(frame, _)| frame.clone()).collect();
        let (done, full) = self.append(&frames)?;
        let last = if mutants::is(Mutant::ShortCommitAnswered) { built.len() } else { done };
        let changes = last.checked_sub(1).and_then(|last| built.get(last)).map_or(0, |(_, n)| *n);
        Ok(Committed { head: self.head, frames: done, changes, full })
    }

    /// Appends frames that came from the primary, durably. They must continue the line, or begin an
    /// epoch that the caller knows to fork from its end; their content must have been verified.
    ///
    /// # Errors
    /// As [`Appender::commit`]; [`StoreError::NotNext`] for a frame that does not continue the line.
    pub fn commit_frames(&mut self, frames: &[Arc<Frame>]) -> Result<Committed> {
        self.check()?;
        let mut at = self.head;
        for frame in frames {
            let header = frame.header();
            if header.seq != at.seq.next() || header.prev != at.hash {
                return Err(StoreError::NotNext { got: header.seq, last: at.seq });
            }
            at = frame.position();
        }
        let mut done = 0;
        let mut full = None;
        while let Some(next) = frames.get(done)
            && full.is_none()
        {
            let epoch = next.header().epoch;
            let stretch = frames.get(done..).unwrap_or_default();
            let count = stretch.iter().take_while(|frame| frame.header().epoch == epoch).count();
            let appended = self
                .enter(epoch, next.header().wall_time)
                .and_then(|()| self.append(stretch.get(..count).unwrap_or_default()));
            match appended {
                Ok((these, why)) => {
                    done += these;
                    full = why;
                }
                Err(StoreError::Full(why)) if done > 0 => full = Some(why),
                Err(error) => return Err(error),
            }
        }
        Ok(Committed { head: self.head, frames: done, changes: 0, full })
    }

    /// Goes on in another epoch of the peer's, if that is another one.
    fn enter(&mut self, epoch: EpochId, wall: WallTime) -> Result<()> {
        if epoch == self.epoch {
            return Ok(());
        }
        self.close_segment();
        match self.group.clone().enter(epoch, wall) {
            Ok(()) => {
                self.epoch = epoch;
                Ok(())
            }
            Err(error @ StoreError::Full(_)) => Err(error),
            Err(error) => Err(self.stop(error)),
        }
    }

    /// Appends frames that were in the log already, whatever the cap.
    pub(super) fn commit_beyond_cap(&mut self, frames: &[Arc<Frame>]) -> Result<Committed> {
        self.beyond_cap = true;
        let committed = self.commit_frames(frames);
        self.beyond_cap = false;
        committed
    }

    /// Sets the group's clock.
    pub(super) const fn resume_clock(&mut self, clock: LogClock) {
        self.clock = clock;
    }

    /// Makes as many frames durable as there is room for, from the first.
    fn append(&mut self, frames: &[Arc<Frame>]) -> Result<(usize, Option<String>)> {
        let mut done = 0;
        while let Some(rest) = frames.get(done..).filter(|rest| !rest.is_empty()) {
            let room = match &self.writer {
                Some(writer) if !self.table_is_full() => writer.room_for(rest),
                _ => 0,
            };
            if room == 0 {
                match self.roll() {
                    Ok(()) => continue,
                    Err(StoreError::Full(why)) if done > 0 => return Ok((done, Some(why))),
                    Err(StoreError::Full(why)) => return Err(StoreError::Full(why)),
                    Err(error) => return Err(self.stop(error)),
                }
            }
            let some = rest.get(..room).unwrap_or_default();
            let durable = self.head.seq;
            let Some(writer) = &mut self.writer else { continue };
            let written = writer.append(some, durable);
            let offsets = written.map_err(|error| self.stop(error))?;
            self.publish(some, &offsets).map_err(|error| self.stop(error))?;
            done += room;
        }
        Ok((done, None))
    }

    /// Frames are durable: let readers see them.
    fn publish(&mut self, frames: &[Arc<Frame>], offsets: &[u32]) -> Result<()> {
        let keep_entries = self.group.keep == Keep::Replica;
        let Some(last) = frames.last() else { return Ok(()) };
        let mut guard = self.group.lock();
        let state = &mut *guard;
        let lost = || StoreError::Invalid("the line's end is not known any more".into());
        let line = state.lines.get_mut(&self.epoch).ok_or_else(lost)?;
        let open = line.unsealed.last_mut().ok_or_else(lost)?;
        let mut table = open.table.write().unwrap_or_else(PoisonError::into_inner);
        let bad = |error| StoreError::Invalid(format!("indexing a frame: {error}"));
        for (frame, offset) in frames.iter().zip(offsets) {
            line.catalog.apply(frame).map_err(bad)?;
            let standing = line.catalog.standing();
            table.add(frame, open.segment.ordinal, *offset, keep_entries, standing).map_err(bad)?;
        }
        drop(table);
        open.last = last.position();
        let len = offsets.last().map_or(0, |offset| *offset as usize + last.envelope().disk_len());
        open.end = u32::try_from(len).unwrap_or(u32::MAX);
        line.head = last.position();
        self.head = last.position();
        let budget = &self.group.shared.recent;
        for frame in frames {
            let memory = frame.memory();
            budget.used.fetch_add(memory, Ordering::Relaxed);
            line.recent_bytes += memory;
            line.recent.push_back(frame.clone());
        }
        // Over the cap each group gives up its own oldest.
        while budget.used.load(Ordering::Relaxed) > budget.max
            && let Some(oldest) = line.recent.pop_front()
        {
            budget.used.fetch_sub(oldest.memory(), Ordering::Relaxed);
            line.recent_bytes -= oldest.memory();
        }
        Ok(())
    }

    fn table_is_full(&self) -> bool {
        let state = self.group.lock();
        state.lines.get(&self.epoch).and_then(|line| line.unsealed.last()).is_some_and(|open| {
            let table = open.table.read().unwrap_or_else(PoisonError::into_inner);
            table.len() >= self.group.options.table_entries_max
        })
    }

    /// Closes the segment being written; the next frame begins a new one.
    pub fn close_segment(&mut self) {
        let writer = self.writer.take();
        let mut state = self.group.lock();
        if let Some(mean) = writer.map(|writer| writer.mean_append()).filter(|mean| *mean > 0) {
            state.small_appends = mean < SMALL_APPEND;
        }
        if let Some(line) = state.lines.get_mut(&self.epoch)
            && let Some(open) = line.unsealed.last_mut()
            && open.closed.is_none()
        {
            open.closed = Some(Arc::new(line.catalog.clone()));
        }
    }

    /// Begins the next segment.
    fn roll(&mut self) -> Result<()> {
        self.close_segment();
        // Maintenance is behind: do its work here, so that memory stays bounded.
        while !self.beyond_cap && self.unsealed() >= self.group.options.unsealed_max {
            if !self.group.seal_oldest()? {
                break;
            }
        }
        let (slot, file) = self.group.take_slot(self.beyond_cap)?;
        let len = self.group.fit_slot(&file)?;
        let header = SegmentHeader {
            id: (self.group.shared.entropy)(),
            group: self.group.id,
            epoch: self.epoch,
            first: self.head.seq.next(),
            prev: self.head.hash,
        };
        let ordinal = self.group.lock().next_ordinal();
        let free = self.group.free.clone();
        let segment = Arc::new(Segment { ordinal, slot, header, file, free });
        let pool = self.group.shared.pool.clone();
        let writer = SegmentWriter::begin(segment.clone(), len, pool)?;
        let mut state = self.group.lock();
        if let Some(line) = state.lines.get_mut(&self.epoch) {
            line.unsealed.push(Unsealed {
                segment,
                table: Arc::new(RwLock::new(MemTable::behind(&line.catalog))),
                last: self.head,
                end: u32::try_from(HEADER_LEN).unwrap_or(u32::MAX),
                closed: None,
            });
            line.sources = None;
        }
        self.writer = Some(writer);
        Ok(())
    }

    fn unsealed(&self) -> usize {
        self.group.lock().lines.get(&self.epoch).map_or(0, |line| line.unsealed.len())
    }

    fn check(&self) -> Result<()> {
        match &self.stopped {
            Some(why) => Err(StoreError::Stopped(why.clone())),
            None => Ok(()),
        }
    }

    fn stop(&mut self, error: StoreError) -> StoreError {
        self.stopped = Some(error.to_string());
        self.writer = None;
        error
    }
}

impl Group {
    /// The end of the main line, after an earlier appender was dropped.
    ///
    /// # Errors
    /// [`StoreError::NotInHistory`] when the line is not kept any more.
    pub fn appender(self: &Arc<Self>, now: Now) -> Result<Appender> {
        let state = self.lock();
        let main = state.manifest.main;
        let line = state
            .lines
            .get(&main)
            .ok_or_else(|| StoreError::NotInHistory("the line is not kept any more".into()))?;
        let clock = LogClock::resume(line.catalog.log_time, line.catalog.wall_time, now);
        Ok(Appender::new(self.clone(), main, line.head, clock))
    }
}

impl Drop for Appender {
    fn drop(&mut self) {
        self.close_segment();
        let mut state = self.group.lock();
        if let Some(line) = state.lines.get_mut(&self.epoch) {
            line.forget_recent(&self.group.shared.recent);
        }
    }
}

impl Group {
    /// Gives back the memory of the main line's newest frames.
    pub(super) fn forget_recent_of_main(&self) {
        let mut state = self.lock();
        let main = state.manifest.main;
        if let Some(line) = state.lines.get_mut(&main) {
            line.forget_recent(&self.shared.recent);
        }
    }
}

impl super::Line {
    /// Gives back the memory of the newest frames.
    pub(super) fn forget_recent(&mut self, budget: &super::RecentBudget) {
        budget.used.fetch_sub(self.recent_bytes, Ordering::Relaxed);
        self.recent_bytes = 0;
        self.recent.clear();
    }
}
