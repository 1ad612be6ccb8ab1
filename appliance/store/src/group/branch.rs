//! Branches: history that was left behind by a failover. They are read, listed and at last deleted,
//! never appended to.
//!
//! Invariant: a branch is deleted whole or not at all, and never what another line shares with it.
//! While it is there the base stays at or before the place where it left the main line.

use std::sync::Arc;

use srn_core::epoch::Position;
use srn_core::frame::Record;
use srn_core::ids::{EpochId, Seq};
use srn_core::time::{LogTime, WallTime};

use super::{Checkpoint, Group, View};
use crate::error::{Result, StoreError};
use crate::manifest::{Manifest, Purpose, TimelineMeta};
use crate::segment::HEADER_LEN;

/// A branch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Branch {
    /// Its last epoch, which is its name.
    pub id: EpochId,
    /// The last frame that it shares with the main line.
    pub fork: Seq,
    /// Its last frame.
    pub end: Position,
    /// That frame's log time.
    pub end_log_time: LogTime,
    /// When it was left behind, by the wall clock.
    pub since: WallTime,
    /// Bytes of the log behind the fork, rounded up to where reading begins.
    pub bytes: u64,
}

impl Branch {
    /// Frames behind the fork.
    #[must_use]
    pub const fn frames(&self) -> u64 {
        self.end.seq.0.saturating_sub(self.fork.0)
    }
}

/// What a line has behind a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Tail {
    /// Frames.
    pub frames: u64,
    /// Changes of disks in them: frames may hold none.
    pub changes: u64,
    /// Content in bytes.
    pub bytes: u64,
    /// When the first frame with a change was written, and the last one, by the wall clock.
    pub times: Option<(WallTime, WallTime)>,
}

impl Group {
    /// What the main line has behind frame `seq`: its frames are read.
    ///
    /// # Errors
    /// [`StoreError::NotInHistory`] when some of it is not in the log any more; as the volume says.
    pub fn tail_behind(self: &Arc<Self>, seq: Seq) -> Result<Tail> {
        let mut tail = Tail::default();
        let mut cursor = self.cursor(seq.next());
        while let Some(frame) = cursor.next()? {
            let header = frame.header();
            let head = frame.head().map_err(|error| {
                StoreError::Corrupt(format!("the table of frame {}: {error}", header.seq))
            })?;
            let is_change = |record: &Record<'_>| {
                !matches!(record, Record::Mark { .. } | Record::Epoch(_) | Record::ClockStep { .. })
            };
            let changes = head.records().filter(is_change).count() as u64;
            tail.frames += 1;
            tail.bytes += u64::from(header.content_len);
            tail.changes += changes;
            if changes > 0 {
                let first = tail.times.map_or(header.wall_time, |(first, _)| first);
                tail.times = Some((first, header.wall_time));
            }
        }
        Ok(tail)
    }

    /// How many branches there are.
    #[must_use]
    pub fn branch_count(&self) -> usize {
        let state = self.lock();
        let lines = state.manifest.timelines.values();
        lines.filter(|line| line.purpose == Purpose::Branch).count()
    }

    /// The branches, by name.
    ///
    /// # Errors
    /// When an index file cannot be read.
    pub fn branches(&self) -> Result<Vec<Branch>> {
        let (manifest, main) = {
            let state = self.lock();
            (state.manifest.clone(), state.manifest.main)
        };
        let Some(main) = manifest.timelines.get(&main) else { return Ok(Vec::new()) };
        let branches =
            manifest.timelines.iter().filter(|(_, line)| line.purpose == Purpose::Branch);
        branches
            .filter_map(|(id, line)| {
                let last = line.pieces.last()?;
                let fork = main.epochs.common_with(&line.epochs).unwrap_or(Seq::ZERO);
                Some((id, line, last, fork.min(last.last.seq)))
            })
            .map(|(id, line, last, fork)| {
                Ok(Branch {
                    id: *id,
                    fork,
                    end: last.last,
                    end_log_time: last.last_log_time,
                    since: line.since,
                    bytes: self.bytes_behind(&manifest, line, fork)?,
                })
            })
            .collect()
    }

    /// Bytes of the log that a line's sealed pieces take behind frame `seq`.
    fn bytes_behind(&self, manifest: &Manifest, line: &TimelineMeta, seq: Seq) -> Result<u64> {
        let mut bytes = 0;
        for piece in line.pieces.iter().filter(|piece| piece.last.seq > seq) {
            let Some(meta) = manifest.segments.get(&piece.ordinal) else { continue };
            let mut from = HEADER_LEN;
            if meta.first <= seq {
                let segment = self.lock().segments.get(&piece.ordinal).cloned();
                let points = segment.map(|segment| self.seq_points(&segment)).transpose()?;
                let points = points.unwrap_or_default();
                let before = points.iter().rev().find(|point| point.seq <= seq.next());
                from = before.map_or(from, |point| u64::from(point.offset));
            }
            bytes += u64::from(meta.end).saturating_sub(from);
        }
        Ok(bytes)
    }

    fn branch(&self, id: EpochId) -> Result<Branch> {
        let found = self.branches()?.into_iter().find(|branch| branch.id == id);
        found.ok_or_else(|| StoreError::Invalid(format!("{id} is no branch of this group")))
    }

    /// All disks as they were just behind frame `seq` of a branch; none: behind its last.
    ///
    /// # Errors
    /// [`StoreError::Invalid`] when there is no such branch; [`StoreError::NotInHistory`] for a frame
    /// that is not behind its fork.
    pub fn view_branch(self: &Arc<Self>, id: EpochId, seq: Option<Seq>) -> Result<View> {
        let branch = self.branch(id)?;
        let seq = seq.unwrap_or(branch.end.seq);
        if seq <= branch.fork || seq > branch.end.seq {
            return Err(StoreError::NotInHistory(format!(
                "branch {} has frames {} to {}, not {seq}",
                id.short(),
                branch.fork.next(),
                branch.end.seq
            )));
        }
        self.view_on(id, seq, branch.fork)
    }

    /// The checkpoints of a branch behind its fork, oldest first.
    ///
    /// # Errors
    /// When an index file cannot be read.
    pub fn branch_checkpoints(&self, branch: &Branch) -> Result<Vec<Checkpoint>> {
        let (runs, notes) = {
            let state = self.lock();
            (state.piece_runs(branch.id)?, state.manifest.notes.clone())
        };
        let mut found = Vec::new();
        for run in runs.iter().filter(|run| run.last().seq > branch.fork) {
            for mark in run.marks()?.into_iter().filter(|mark| mark.seq > branch.fork) {
                let epoch = run.meta().epoch;
                let position = Position { epoch, seq: mark.seq, hash: mark.hash };
                let note = notes.get(&mark.id).cloned().unwrap_or_default();
                found.push(Checkpoint { mark, position, note });
            }
        }
        found.sort_by_key(|checkpoint| checkpoint.position.seq);
        Ok(found)
    }

    /// Deletes a branch. What it shares with other lines stays.
    ///
    /// # Errors
    /// [`StoreError::Invalid`] when there is no such branch; as the volume says.
    pub fn delete_branch(&self, id: EpochId) -> Result<()> {
        let _one_at_a_time =
            self.maintaining.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        self.branch(id)?;
        self.forget_line(id)
    }
}
