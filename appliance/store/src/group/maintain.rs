//! The work that goes on behind the appender, one small step at a time, most urgent first.
//!
//! Every step leaves the files in a state from which a crash loses nothing and from which the step
//! can be taken again.

use std::sync::{Arc, PoisonError};

use srn_core::ids::{EpochId, Seq};
use srn_core::mutants::{self, Mutant};

use super::retire::Retention;
use super::{Group, INDEX_DIR, Unsealed};
use crate::error::{Result, StoreError};
use crate::index::{Item, Merge, Run, RunMeta, RunScope, RunWriter, next_merge};
use crate::manifest::{Keep, PieceMeta, SegmentMeta};

/// Whether a step found anything to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Worked {
    /// There may be more: call again.
    Something,
    /// All is done.
    Nothing,
}

impl Group {
    /// Takes one step: seals a closed segment, trims a cache, prepares the next segment file,
    /// retires, merges indexes, or merges pieces of history into a layer.
    ///
    /// # Errors
    /// As the volume says; [`StoreError::Full`] when there is no room for the next segment file,
    /// [`StoreError::Corrupt`] when something that would have to be moved is damaged.
    pub fn maintain(self: &Arc<Self>, retention: &Retention) -> Result<Worked> {
        if self.seal_oldest()? {
            return Ok(Worked::Something);
        }
        let one_at_a_time = self.maintaining.lock().unwrap_or_else(PoisonError::into_inner);
        if self.trim_oldest()? || self.shrink()? {
            return Ok(Worked::Something);
        }
        let spare = self.prepare_spare();
        if matches!(spare, Ok(true)) {
            return Ok(Worked::Something);
        }
        // Retiring is what makes room again, so a full volume must not keep it from running.
        if self.retire_oldest(retention)? == Worked::Something || self.merge_runs()? {
            return Ok(Worked::Something);
        }
        drop(one_at_a_time);
        if self.compact(retention)? == Worked::Something {
            return Ok(Worked::Something);
        }
        spare.map(|_| Worked::Nothing)
    }

    /// Seals the oldest closed segment of any line: writes its index and lists it. Returns whether
    /// there was one.
    pub(super) fn seal_oldest(&self) -> Result<bool> {
        let _one_at_a_time = self.maintaining.lock().unwrap_or_else(PoisonError::into_inner);
        let found = {
            let state = self.lock();
            state.lines.iter().find_map(|(epoch, line)| {
                line.unsealed
                    .first()
                    .filter(|open| open.closed.is_some())
                    .map(|open| (*epoch, open.clone()))
            })
        };
        let Some((epoch, open)) = found else { return Ok(false) };
        if open.is_empty() {
            // Closed before anything was written: its file is free again.
            self.take_unsealed(epoch, &open);
            return Ok(true);
        }
        self.seal(epoch, &open)?;
        Ok(true)
    }

    fn take_unsealed(&self, epoch: EpochId, open: &Unsealed) {
        let mut state = self.lock();
        if let Some(line) = state.lines.get_mut(&epoch) {
            line.unsealed.retain(|other| other.segment.ordinal != open.segment.ordinal);
            line.sources = None;
        }
    }

    /// Writes the index of a closed segment and lists both.
    pub(super) fn seal(&self, epoch: EpochId, open: &Unsealed) -> Result<()> {
        let catalog = open.closed.as_ref().ok_or_else(|| {
            StoreError::Invalid("a segment that is still written cannot be sealed".into())
        })?;
        let header = &open.segment.header;
        let (meta, run) = {
            let table = open.table.read().unwrap_or_else(PoisonError::into_inner);
            self.write_run(
                table.entries().map(Ok),
                &RunScope {
                    group: self.id,
                    level: 0,
                    first: header.first,
                    last: open.last,
                    pieces: (open.segment.ordinal, open.segment.ordinal),
                    points: table.points(),
                    marks: table.marks(),
                    catalog: &catalog.encode(),
                },
            )?
        };
        let segment = SegmentMeta {
            slot: open.segment.slot,
            id: header.id,
            epoch: header.epoch,
            first: header.first,
            prev: header.prev,
            last: open.last,
            end: open.end,
        };
        let piece = PieceMeta {
            ordinal: open.segment.ordinal,
            first: header.first,
            last: open.last,
            last_log_time: catalog.log_time,
            is_prefix: false,
        };
        self.publish_with(
            |manifest| {
                manifest.segments.insert(piece.ordinal, segment);
                manifest.runs.insert(meta.file, meta);
                if let Some(line) = manifest.timelines.get_mut(&epoch) {
                    line.pieces.push(piece);
                }
            },
            |state| {
                state.segments.insert(open.segment.ordinal, open.segment.clone());
                state.runs.insert(meta.file, run);
            },
        )?;
        self.take_unsealed(epoch, open);
        Ok(())
    }

    /// Writes an index file of these entries, durably, and opens it. Nothing lists it yet.
    pub(super) fn write_run(
        &self,
        entries: impl IntoIterator<Item = Result<Item>>,
        scope: &RunScope<'_>,
    ) -> Result<(RunMeta, Arc<Run>)> {
        let mut writer = self.new_run()?;
        for item in entries {
            let (disk, extent, place) = item?;
            writer.push(disk, extent, &place)?;
        }
        let meta = writer.finish(scope)?;
        let run = self.open_run(&meta)?;
        Ok((meta, run))
    }

    pub(super) fn new_run(&self) -> Result<RunWriter> {
        let number = self.lock().next_run();
        RunWriter::create(&self.shared.volume, &self.dir.join(INDEX_DIR), number)
    }

    pub(super) fn open_run(&self, meta: &RunMeta) -> Result<Arc<Run>> {
        let dir = self.dir.join(INDEX_DIR);
        let cache = &self.shared.cache;
        Ok(Arc::new(Run::open(&self.shared.volume, &dir, self.id, meta, cache)?))
    }

    /// A cache gives up its oldest segment when the peer has it and there is no room for the next.
    fn trim_oldest(&self) -> Result<bool> {
        if self.keep != Keep::Cache {
            return Ok(false);
        }
        let piece = {
            let state = self.lock();
            let room = !state.spares.is_empty()
                || !self.free.is_empty()
                || (state.slot_count + 1) * self.options.segment_bytes <= self.options.cap_bytes;
            let main = state.manifest.main;
            // The last piece stays: it tells where the log goes on.
            let oldest = state
                .manifest
                .timelines
                .get(&main)
                .filter(|line| line.pieces.len() > 1)
                .and_then(|line| line.pieces.first());
            let acked = |piece: &PieceMeta| {
                piece.last.seq <= state.acked || mutants::is(Mutant::TrimmedUnacknowledged)
            };
            oldest.filter(|piece| !room && acked(piece)).copied()
        };
        let Some(piece) = piece else { return Ok(false) };
        self.drop_first_piece(&piece, None)?;
        Ok(true)
    }

    /// Merges the index files of neighbouring segments.
    fn merge_runs(&self) -> Result<bool> {
        if self.keep != Keep::Replica {
            return Ok(false);
        }
        let inputs = {
            let state = self.lock();
            let all: Vec<RunMeta> = state.manifest.runs.values().copied().collect();
            let lines = state.manifest.timelines.values();
            let chosen = lines.into_iter().find_map(|line| next_merge(&all, &line.pieces));
            chosen.map(|metas| {
                metas
                    .iter()
                    .filter_map(|meta| state.runs.get(&meta.file).cloned())
                    .collect::<Vec<_>>()
            })
        };
        let Some(inputs) = inputs else { return Ok(false) };
        let (Some(first), Some(last)) = (inputs.first(), inputs.last()) else { return Ok(false) };
        let mut newest_first: Vec<&Arc<Run>> = inputs.iter().rev().collect();
        if mutants::is(Mutant::MergeOldestWins) {
            newest_first.reverse();
        }
        let (meta, run) = self.write_run(
            Merge::new(newest_first.iter().map(|run| run.iter()))?,
            &RunScope {
                group: self.id,
                level: first.meta().level + 1,
                first: first.meta().first,
                last: last.last(),
                pieces: (first.meta().pieces.0, last.meta().pieces.1),
                points: &[],
                marks: &[],
                catalog: &[],
            },
        )?;
        self.publish_with(
            |manifest| {
                manifest.runs.insert(meta.file, meta);
            },
            |state| {
                state.runs.insert(meta.file, run);
                for line in state.lines.values_mut() {
                    line.sources = None;
                }
            },
        )?;
        Ok(true)
    }

    /// The newest frame whose log time is at most `log_time_us`, to the precision of a segment:
    /// never newer than asked.
    #[must_use]
    pub fn seq_before(&self, log_time_us: u64) -> Seq {
        let state = self.lock();
        let main = state.manifest.main;
        let pieces = state.manifest.timelines.get(&main).map_or(&[][..], |line| &line.pieces);
        let base = state.manifest.base.as_ref().map_or(Seq::ZERO, |base| base.catalog.at.seq);
        pieces
            .iter()
            .take_while(|piece| piece.last_log_time.0 <= log_time_us)
            .last()
            .map_or(base, |piece| piece.last.seq)
    }
}
