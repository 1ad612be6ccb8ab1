//! Leaving the main line at a position: for a failover (the new line is the main one from then on),
//! for a writable clone (thrown away after use), or to follow a peer that has left it ([`follow`]).
//!
//! [`follow`]: Group::follow
//!
//! Everything up to the position is shared, nothing is copied; only the segment in whose middle
//! the position lies gets an index of its own up to there.

use std::sync::{Arc, PoisonError};

use srn_core::epoch::{Epoch, EpochTable, Position};
use srn_core::ids::{EpochId, Seq};
use srn_core::time::{LogClock, Now, WallTime};

use super::append::Appender;
use super::build::{Change, OwnedRecord};
use super::{Group, Line, View};
use crate::catalog::Catalog;
use crate::error::{Result, StoreError};
use crate::index::{PREFIX_LEVEL, Run, RunMeta, RunScope};
use crate::manifest::{Keep, PieceMeta, Purpose, Role, TimelineMeta};

/// A line to be laid.
pub(super) struct Laid {
    /// Its epochs; the last one is its own.
    pub(super) line: EpochTable,
    /// What it is for.
    pub(super) purpose: Purpose,
    /// This node's part from then on, unfenced; none: as before.
    pub(super) role: Option<Role>,
    /// When.
    pub(super) since: WallTime,
}

impl Group {
    /// Makes a writable clone of the group as it was behind frame `seq`. Throw it away with
    /// [`Group::discard`].
    ///
    /// The main line's appender must have closed its segment if `seq` lies in it.
    ///
    /// # Errors
    /// [`StoreError::NotInHistory`] when the position is not kept; as the volume says.
    pub fn clone_at(self: &Arc<Self>, id: EpochId, seq: Seq, now: Now) -> Result<Appender> {
        self.fork(id, seq, now, Purpose::Clone)
    }

    /// Goes on behind frame `seq` in a new epoch, as primary. What the old line had behind it is
    /// kept as a branch.
    ///
    /// The old line's appender must have been dropped.
    ///
    /// # Errors
    /// As [`Group::clone_at`].
    pub fn fail_over(self: &Arc<Self>, id: EpochId, seq: Seq, now: Now) -> Result<Appender> {
        self.fork(id, seq, now, Purpose::Main)
    }

    fn fork(
        self: &Arc<Self>,
        id: EpochId,
        seq: Seq,
        now: Now,
        purpose: Purpose,
    ) -> Result<Appender> {
        if self.keep != Keep::Replica {
            return Err(StoreError::Invalid("a local cache holds no copy to recover from".into()));
        }
        while self.seal_oldest()? {}
        let catalog = {
            let _still = self.hold_still();
            let view = self.view_at(seq)?;
            let at = view.catalog().at;
            let line = self.epochs().fork(id, at).map_err(|error| {
                StoreError::Invalid(format!("a new epoch cannot begin at {at}: {error}"))
            })?;
            let role = (purpose == Purpose::Main).then_some(Role::Primary);
            self.lay(&view, Laid { line, purpose, role, since: now.wall })?;
            view.catalog()
        };
        let at = catalog.at;
        let clock = LogClock::resume(catalog.log_time, catalog.wall_time, now);
        let mut appender = Appender::new(self.clone(), id, at, clock);
        begin_epoch(&mut appender, Epoch { id, forked_from: at }, now)?;
        Ok(appender)
    }

    /// Until what is returned is dropped no piece of history is retired, merged or sealed: what was
    /// found of the lines stays so until it is published.
    pub(super) fn hold_still(&self) -> impl Sized + '_ {
        (
            self.maintaining.lock().unwrap_or_else(PoisonError::into_inner),
            self.compacting.lock().unwrap_or_else(PoisonError::into_inner),
        )
    }

    /// Adds a line that shares everything up to the view's position with the main line, whose
    /// segments are all sealed, while everything is held still; one manifest says all of it. A new
    /// main line takes the place of the old one: what that had behind the position is kept as a
    /// branch.
    pub(super) fn lay(self: &Arc<Self>, view: &View, laid: Laid) -> Result<()> {
        let Laid { line, purpose, role, since } = laid;
        let (catalog, id) = (view.catalog(), line.current());
        let at = catalog.at;
        if self.lock().manifest.timelines.contains_key(&id) {
            return Err(StoreError::NotInHistory(format!(
                "epoch {} was left behind here before, as a branch that is still kept",
                id.short()
            )));
        }
        let (mut pieces, partial) = self.pieces_up_to(at)?;
        let mut prefix = None;
        if let Some(whole) = partial {
            let (run, piece) = self.prefix(&whole, at)?;
            prefix = Some(run);
            pieces.push(piece);
        }
        let timeline = TimelineMeta { epochs: line, purpose, since, pieces };
        self.publish_with(
            |manifest| {
                if let Some((meta, _)) = &prefix {
                    manifest.runs.insert(meta.file, *meta);
                }
                if purpose == Purpose::Main {
                    let old = manifest.main;
                    let has_tail = manifest.timelines.get(&old).is_some_and(|line| {
                        line.pieces.last().is_some_and(|piece| piece.last.seq > at.seq)
                    });
                    if has_tail && let Some(line) = manifest.timelines.get_mut(&old) {
                        line.purpose = Purpose::Branch;
                        line.since = since;
                    } else {
                        // The new line holds all of it.
                        manifest.timelines.remove(&old);
                    }
                    manifest.main = id;
                    if let Some(role) = role {
                        manifest.role = role;
                        manifest.fence = None;
                    }
                    manifest.acked = Seq::ZERO;
                }
                manifest.timelines.insert(id, timeline);
            },
            |state| {
                if let Some((meta, run)) = prefix.clone() {
                    state.runs.insert(meta.file, run);
                }
                if purpose == Purpose::Main {
                    state.acked = Seq::ZERO;
                    let kept: Vec<EpochId> = state.manifest.timelines.keys().copied().collect();
                    state.lines.retain(|epoch, _| kept.contains(epoch));
                }
                state.lines.insert(id, Line::at(at, catalog));
            },
        )
    }

    /// Throws a clone away, and everything written to it.
    ///
    /// # Errors
    /// [`StoreError::Invalid`] when it is no clone; as the volume says.
    pub fn discard(&self, id: EpochId) -> Result<()> {
        {
            let state = self.lock();
            let clone = state.manifest.timelines.get(&id);
            if clone.is_none_or(|line| line.purpose != Purpose::Clone) {
                return Err(StoreError::Invalid(format!("{id} is no clone of this group")));
            }
        }
        self.forget_line(id)
    }

    /// Takes a line out of the manifest, and lets go of what only it had.
    pub(super) fn forget_line(&self, id: EpochId) -> Result<()> {
        self.publish(|manifest| {
            manifest.timelines.remove(&id);
            manifest.drop_unused();
        })?;
        let line = self.lock().lines.remove(&id);
        if let Some(mut line) = line {
            line.forget_recent(&self.shared.recent);
        }
        self.forget_unlisted();
        Ok(())
    }

    /// The clones that there are: epoch, position, and since when by the wall clock.
    #[must_use]
    pub fn clones(&self) -> Vec<(EpochId, Position, WallTime)> {
        let state = self.lock();
        state
            .manifest
            .timelines
            .iter()
            .filter(|(_, line)| line.purpose == Purpose::Clone)
            .filter_map(|(id, line)| {
                let fork = line.epochs.list().last()?.forked_from;
                Some((*id, fork, line.since))
            })
            .collect()
    }

    /// The main line's sealed pieces up to `at`; and the piece in whose middle it lies.
    fn pieces_up_to(&self, at: Position) -> Result<(Vec<PieceMeta>, Option<PieceMeta>)> {
        let state = self.lock();
        let main = state.manifest.main;
        let line = state.manifest.timelines.get(&main);
        let line = line.ok_or_else(|| StoreError::NotInHistory("there is no main line".into()))?;
        let whole = line.pieces.partition_point(|piece| piece.last.seq <= at.seq);
        let pieces = line.pieces.get(..whole).unwrap_or_default().to_vec();
        let partial = line.pieces.get(whole).copied().filter(|piece| piece.first <= at.seq);
        let sealed = pieces.last().map(|piece| piece.last.seq);
        let base = state.manifest.base.as_ref().map(|base| base.catalog.at.seq);
        if partial.is_none() && sealed.or(base) != Some(at.seq) {
            return Err(StoreError::Invalid(format!(
                "frame {} is in a segment that is still written",
                at.seq
            )));
        }
        Ok((pieces, partial))
    }

    /// An index of a piece up to `at`.
    fn prefix(&self, whole: &PieceMeta, at: Position) -> Result<((RunMeta, Arc<Run>), PieceMeta)> {
        let (segment, behind) = {
            let state = self.lock();
            let segment = state.segments.get(&whole.ordinal).cloned().ok_or_else(|| {
                StoreError::Corrupt(format!("log segment {} is not open", whole.ordinal))
            })?;
            let before = segment.header.first.prev();
            let (_, behind, _) = state.snapshot(state.manifest.main, before)?;
            (segment, behind)
        };
        let mut catalog = behind.catalog()?;
        let table = self.table_up_to(&segment, at.seq, &mut catalog)?;
        let (meta, run) = self.write_run(
            table.entries().map(Ok),
            &RunScope {
                group: self.id,
                level: PREFIX_LEVEL,
                first: segment.header.first,
                last: at,
                pieces: (whole.ordinal, whole.ordinal),
                points: table.points(),
                marks: table.marks(),
                catalog: &catalog.encode(),
            },
        )?;
        let piece = PieceMeta {
            ordinal: whole.ordinal,
            first: whole.first,
            last: at,
            last_log_time: catalog.log_time,
            is_prefix: true,
        };
        Ok(((meta, run), piece))
    }
}

impl Line {
    pub(super) const fn at(head: Position, catalog: Catalog) -> Self {
        Self {
            head,
            catalog,
            unsealed: Vec::new(),
            recent: std::collections::VecDeque::new(),
            recent_bytes: 0,
            sources: None,
        }
    }
}

/// The first frame of an epoch names it.
pub(super) fn begin_epoch(appender: &mut Appender, epoch: Epoch, now: Now) -> Result<()> {
    appender.commit(&[Change::Record(OwnedRecord::Epoch(epoch))], now).map(|_| ())
}
