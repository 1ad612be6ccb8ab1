//! Moving the oldest part of the main line into the base, slice by slice.
//!
//! A piece may be a layer of any length. It is moved in *slices*: a bounded number of index entries and
//! bytes in the order of disks and sectors, each slice in one maintenance step. Appender and failover
//! wait for one slice at most, and no more than one is in memory.
//!
//! **Invariant.** While a piece is half in the base, the base claims its old position, and nobody reads
//! a position before the piece's end ([`Retiring`]): what the base holds of the piece is seen only
//! through the piece itself, which shadows it until it is dropped. So a slice may be written again at any
//! time, whatever a crash has left of it; but for sectors that share a page with what changes. These are
//! in the base alone, and their pages are in the intent before the base is touched. The intent also says
//! where the slice begins: everything of the piece before that place is in the base, durably.
//!
//! The order of one slice, which makes it survive a crash at any point:
//! 1. all of it is read and every byte verified; pages of which only a part changes are put together
//!    whole. What is damaged stops it here, before anything is changed;
//! 2. the *intent* is put in place, durably: those pages, and where the slice begins;
//! 3. the base is written and synced;
//! 4. behind the last slice the manifest is published with the base at its new position and without the
//!    piece, and the intent is removed; the files become free when their last reader is gone.
//!
//! After a crash the pages of the intent are put in place again, and its slice is done anew. What breaks
//! first when this is wrong: the simulation `store`, with slices of a few sectors.
//!
//! **Damage.** What is damaged in the piece is repaired by others, if it can be. When that was tried
//! ([`Group::carry_damage`]) it is carried along: its sectors are *lost* in the base. Reads of them fail
//! as before, no others do, and they are found by each scrub until a repair or a write takes their place.

mod intent;
mod slice;

use std::collections::BTreeSet;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

use srn_core::epoch::Position;
use srn_core::extent::Extent;
use srn_core::ids::{DiskNo, Seq};
use srn_core::mutants::{self, Mutant};

use super::maintain::Worked;
use super::view::decode_catalog;
use super::{BASE_DIR, Group, LAYER_DIR};
use crate::base::Base;
use crate::catalog::Catalog;
use crate::durable;
use crate::error::{Result, StoreError};
use crate::index::Run;
use crate::io::Fs;
use crate::manifest::{BaseMeta, Manifest, PieceMeta};
use intent::{INTENT, INTENT_MAX, Intent};
use slice::Slice;

/// What has to stay recoverable. The caller decides; the store only makes sure that nobody who
/// holds on to a position loses it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Retention {
    /// Positions from this one on stay recoverable, every one.
    pub keep_from: Seq,
    /// Positions before that which stay recoverable, ascending: the checkpoints that the group's
    /// policy keeps.
    pub points: Vec<Seq>,
}

impl Retention {
    /// Every position from `seq` on, and none before.
    #[must_use]
    pub const fn from(seq: Seq) -> Self {
        Self { keep_from: seq, points: Vec::new() }
    }

    /// Whether nothing is to be given up.
    pub(super) fn keeps_all(&self) -> bool {
        self.keep_from == Seq::ZERO
    }

    /// The last position that nobody needs: the base may come up to it. It stays before the oldest
    /// point, whose mark lies in the log.
    pub(super) fn floor(&self) -> Seq {
        self.points.first().map_or(self.keep_from, |point| self.keep_from.min(point.prev()))
    }
}

/// Stretches of damage that are remembered until somebody is told.
const CARRIED_MAX: usize = 1000;

/// Where a retirement goes on: what the piece has before this page is in the base.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct PageAt {
    disk: DiskNo,
    page: u64,
}

impl PageAt {
    const START: Self = Self { disk: DiskNo(0), page: 0 };
}

/// A retirement under way. No position before its end is read from now on.
#[derive(Debug, Clone)]
pub(crate) struct Retiring {
    /// The last frame of the piece.
    pub(crate) to: Position,
    /// The group there, once it is known.
    pub(crate) behind: Option<Arc<Catalog>>,
    next: PageAt,
    stage: Stage,
}

/// What a retirement moves, and where to.
struct UnderWay {
    piece: PieceMeta,
    base: Arc<Base>,
    run: Arc<Run>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// Nothing of the base has changed.
    Planned,
    /// There is an intent, and the base is sound.
    Between,
    /// There is an intent, and the base may be torn where it says so.
    Writing,
}

impl Group {
    /// Moves the next slice of the oldest piece of the main line, if `retention` and all readers allow.
    ///
    /// # Errors
    /// [`StoreError::Corrupt`] when something in the slice is damaged and is not to be carried along:
    /// nothing was changed. As the volume says.
    pub(super) fn retire_oldest(self: &Arc<Self>, retention: &Retention) -> Result<Worked> {
        let under_way = self.lock().retiring.is_some();
        // One that has begun comes before all others, whatever is to be kept by now.
        if under_way && retention.keeps_all() || !under_way && !self.plan_retirement(retention) {
            return Ok(Worked::Nothing);
        }
        self.retire_slice()?;
        Ok(Worked::Something)
    }

    /// Whether maintenance carries damaged content along from now on. Whoever says so has had it looked
    /// for and has tried to repair it.
    pub fn carry_damage(&self, carry: bool) {
        self.carries.store(carry, Ordering::Relaxed);
    }

    pub(super) fn carries_damage(&self) -> bool {
        self.carries.load(Ordering::Relaxed)
    }

    /// What maintenance has carried along as damage since this was last asked.
    #[must_use]
    pub fn take_carried(&self) -> Vec<(DiskNo, Extent)> {
        std::mem::take(&mut *self.carried.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Maintenance has met damage. Says whether to carry it along.
    pub(super) fn meets_damage(&self, disk: DiskNo, extent: Extent) -> bool {
        self.damage_seen.store(true, Ordering::Relaxed);
        let carries = self.carries_damage();
        if carries {
            let mut carried = self.carried.lock().unwrap_or_else(PoisonError::into_inner);
            let has_room = carried.len() < CARRIED_MAX;
            match carried.last_mut() {
                Some((same, last)) if *same == disk && last.end() == extent.start => {
                    last.sectors += extent.sectors;
                }
                _ if has_room => carried.push((disk, extent)),
                _ => {}
            }
        }
        carries
    }

    /// Finds the piece to retire next. From here on nobody begins to read inside of it: the base
    /// changes under whoever did.
    fn plan_retirement(&self, retention: &Retention) -> bool {
        let mut state = self.lock();
        if state.base.is_none() {
            return false;
        }
        let main = state.manifest.main;
        let line = state.manifest.timelines.get(&main);
        let Some(to) = line.and_then(|line| line.pieces.first()).map(|piece| piece.last) else {
            return false;
        };
        if to.seq > state.floor(retention) {
            return false;
        }
        let (next, stage) = (PageAt::START, Stage::Planned);
        state.retiring = Some(Retiring { to, behind: None, next, stage });
        true
    }

    /// The piece that is being retired, and the base; none when it is in the base already.
    fn under_way(&self, to: Position) -> Result<Option<UnderWay>> {
        let state = self.lock();
        let line = state.manifest.timelines.get(&state.manifest.main);
        let first = line.and_then(|line| line.pieces.first()).filter(|piece| piece.last == to);
        let reached = state.manifest.base.as_ref().is_none_or(|base| base.catalog.at.seq >= to.seq);
        match (first, &state.base) {
            (Some(piece), Some(base)) => {
                let (run, base) = (state.run_of(piece)?, base.clone());
                Ok(Some(UnderWay { piece: *piece, base, run }))
            }
            _ if reached => Ok(None),
            _ => Err(StoreError::Corrupt(format!(
                "the history that was being given up, up to frame {}, is not where it was",
                to.seq
            ))),
        }
    }

    /// Does one slice of the retirement under way.
    fn retire_slice(self: &Arc<Self>) -> Result<()> {
        let Some(at) = self.lock().retiring.clone() else { return Ok(()) };
        let Some(UnderWay { piece, base, run }) = self.under_way(at.to)? else {
            self.forget_intent();
            self.lock().retiring = None;
            return Ok(());
        };
        let prepared = (|| {
            let behind = match &at.behind {
                Some(known) => known.clone(),
                None => {
                    let behind = Arc::new(decode_catalog(&run.catalog()?)?);
                    self.open_disks(&base, &behind)?;
                    behind
                }
            };
            if at.stage == Stage::Writing {
                self.replay(&base)?;
            }
            Ok((self.slice(&run, &base, at.next)?, behind))
        })();
        let Ok((slice, behind)) = prepared else {
            if at.stage == Stage::Planned {
                self.lock().retiring = None;
            }
            return prepared.map(drop);
        };
        let at = Retiring { behind: Some(behind.clone()), ..at };
        self.write_intent(&at, &slice)?;
        self.lock().retiring = Some(Retiring { stage: Stage::Writing, ..at.clone() });
        slice.write()?;
        match slice.until() {
            // Only now: what was written is durable.
            Some(next) => {
                self.lock().retiring = Some(Retiring { next, stage: Stage::Between, ..at });
                Ok(())
            }
            None => self.finish_retirement(&base, &piece, Arc::unwrap_or_clone(behind)),
        }
    }

    /// Puts the intent of a slice in place, durably.
    fn write_intent(&self, at: &Retiring, slice: &Slice) -> Result<()> {
        if mutants::is(Mutant::RetireWithoutIntent) {
            return Ok(());
        }
        let next = match slice.until() {
            Some(until) if mutants::is(Mutant::SliceCursorEarly) => until,
            _ => at.next,
        };
        let intent = intent::encode(&at.to, next, slice.partial());
        let dir = self.dir.join(BASE_DIR);
        let written = durable::replace(&self.shared.volume, &dir, INTENT, &intent);
        if written.is_err() && at.stage == Stage::Planned && !self.has_intent() {
            self.lock().retiring = None;
        }
        written
    }

    fn has_intent(&self) -> bool {
        let names = self.shared.volume.list(&self.dir.join(BASE_DIR));
        names.is_ok_and(|names| names.iter().any(|name| name == INTENT))
    }

    fn forget_intent(&self) {
        // Harmless if it stays: the piece it is about is gone.
        let _ = self.shared.volume.remove(&self.dir.join(BASE_DIR).join(INTENT));
    }

    fn read_intent(&self) -> Result<Intent> {
        let path = self.dir.join(BASE_DIR).join(INTENT);
        let bytes = durable::read(&self.shared.volume, &path, INTENT_MAX)?;
        let damaged = || StoreError::Corrupt(format!("{INTENT} of group {}", self.id));
        intent::decode(&bytes).ok_or_else(damaged)
    }

    /// Puts the pages of the intent in place: what was torn in them is whole again.
    fn replay(&self, base: &Base) -> Result<()> {
        if !self.has_intent() {
            return Ok(());
        }
        for page in self.read_intent()?.pages {
            // A disk that was removed meanwhile has no base any more.
            if let Some(disk) = base.disk(page.disk) {
                disk.put_pages(page.page, &page.bytes, &[page.lost])?;
                disk.sync()?;
            }
        }
        Ok(())
    }

    /// Goes on with a retirement that a crash has interrupted: does the slice that it was in anew. When
    /// that cannot be done now, for want of room or for damage, opening goes on: the base may be torn
    /// only where the intent says so or the piece shadows it, and the slice is done first of all later.
    ///
    /// # Errors
    /// [`StoreError::Corrupt`] when the intent itself is damaged: it says nothing about the base, and
    /// there is no way to go on. As the volume says.
    pub(super) fn resume_retirement(self: &Arc<Self>) -> Result<()> {
        if !self.has_intent() {
            return Ok(());
        }
        let Intent { to, next, .. } = self.read_intent()?;
        self.under_way(to).map(drop)?;
        self.lock().retiring = Some(Retiring { to, behind: None, next, stage: Stage::Writing });
        match self.retire_slice() {
            Err(error @ (StoreError::Corrupt(_) | StoreError::Full(_))) => {
                log::error!("group {}: history that was to be given up stays: {error}", self.id);
                Ok(())
            }
            done => done,
        }
    }

    fn open_disks(&self, base: &Base, catalog: &Catalog) -> Result<()> {
        for (no, disk) in &catalog.disks {
            match base.disk(*no) {
                Some(known) => known.grow(disk.sectors)?,
                None => base.add(*no, disk.id, disk.sectors)?,
            }
        }
        Ok(())
    }

    fn finish_retirement(&self, base: &Base, piece: &PieceMeta, behind: Catalog) -> Result<()> {
        let gone: Vec<DiskNo> = {
            let state = self.lock();
            let before = state.manifest.base.as_ref().map(|base| &base.catalog);
            let before = before.into_iter().flat_map(|before| before.disks.keys());
            before.filter(|no| !behind.disks.contains_key(no)).copied().collect()
        };
        self.drop_first_piece(piece, Some(BaseMeta { catalog: behind }))?;
        for no in gone {
            base.remove(no);
        }
        self.forget_intent();
        Ok(())
    }

    /// Publishes the main line without its first piece, and forgets what only that needed.
    pub(super) fn drop_first_piece(&self, piece: &PieceMeta, base: Option<BaseMeta>) -> Result<()> {
        let change = |manifest: &mut Manifest| {
            for line in manifest.timelines.values_mut() {
                if line.pieces.first().is_some_and(|first| first.last.seq <= piece.last.seq) {
                    line.pieces.retain(|kept| kept.last.seq > piece.last.seq);
                }
            }
            manifest.drop_unused();
            if let Some(base) = base {
                manifest.base = Some(base);
            }
        };
        self.publish_with(change, |state| state.retiring = None)?;
        self.forget_unlisted();
        Ok(())
    }

    /// Lets go of segments, layers and index files that the manifest no longer lists.
    pub(super) fn forget_unlisted(&self) {
        let (runs, segments, layers) = {
            let mut guard = self.lock();
            let state = &mut *guard;
            let listed = &state.manifest;
            let runs: Vec<u32> =
                state.runs.keys().filter(|file| !listed.runs.contains_key(file)).copied().collect();
            let segments: Vec<u32> = state
                .segments
                .keys()
                .filter(|ordinal| !listed.segments.contains_key(ordinal))
                .copied()
                .collect();
            let used: BTreeSet<u32> = listed
                .layers
                .values()
                .flat_map(|layer| layer.files.iter().map(|file| file.ordinal))
                .collect();
            let layers: Vec<u32> =
                state.layers.keys().filter(|ordinal| !used.contains(ordinal)).copied().collect();
            for ordinal in &layers {
                state.layers.remove(ordinal);
            }
            let dropped: Vec<_> =
                segments.iter().filter_map(|ordinal| state.segments.remove(ordinal)).collect();
            for file in &runs {
                state.runs.remove(file);
            }
            for line in state.lines.values_mut() {
                line.sources = None;
            }
            (runs, dropped, layers)
        };
        // Outside the lock: the last holder gives the file back.
        drop(segments);
        for file in runs {
            let path = self.dir.join(super::INDEX_DIR).join(crate::index::run_file_name(file));
            let _ = self.shared.volume.remove(&path);
        }
        // Who still reads one holds it open.
        for ordinal in layers {
            let path = self.dir.join(LAYER_DIR).join(crate::layer::file_name(ordinal));
            let _ = self.shared.volume.remove(&path);
        }
    }
}
