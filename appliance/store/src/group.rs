//! A group's history as one object: lines of frames, their index, the base.
//!
//! Who does what:
//! * an [`Appender`] owns the end of one line and makes frames durable. One thread has it.
//! * [`Group::maintain`] seals segments, prepares new ones, trims, merges and retires. One thread
//!   calls it, in small steps.
//! * [`View`]s read any disk at one position, [`Cursor`]s read frames in order; from any thread.
//!
//! They meet in [`State`], which is locked for moments only, never during input or output.
//! What the manifest says is changed by [`Group::publish`] alone: durable first, then visible.

mod append;
mod branch;
mod build;
mod compact;
mod cursor;
pub mod damage;
mod delta;
mod digest;
mod follow;
mod fork;
mod layers;
mod leap;
mod maintain;
mod open;
mod repair;
mod retire;
mod scrub;
mod slots;
mod times;
mod view;

pub use append::{Appender, Committed};
pub use branch::{Branch, Tail};
pub use build::{Change, OwnedRecord, Sums};
pub use compact::Debt;
pub use cursor::Cursor;
pub use delta::{Changed, Delta};
pub use digest::{GrainHash, content_hash};
pub use leap::{Leap, LeapTo};
pub use maintain::Worked;
pub use open::Opened;
pub use repair::{LayerBlock, Missing, Repaired, pages_of};
pub use retire::Retention;
pub use scrub::{Scrub, Scrubbed};
pub(crate) use view::{Content, read_block};
pub use view::{Lease, SpanKind, View};

use std::collections::{BTreeMap, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use srn_core::epoch::{EpochTable, Position};
use srn_core::extent::Extent;
use srn_core::ids::{CheckpointId, DiskNo, EpochId, FrameHash, GroupId, Seq};
use srn_core::mutants::{self, Mutant};
use srn_core::time::{Now, WallTime};

use crate::base::Base;
use crate::catalog::Catalog;
use crate::error::{Doing, Result, StoreError};
use crate::frame::Frame;
use crate::index::{BlockCache, MarkPoint, MemTable, Run};
use crate::io::{BufPool, Fs, Volume};
use crate::layer::LayerFile;
use crate::manifest::{
    BaseMeta, Fence, Keep, LayerMeta, Manifest, Note, PieceMeta, Purpose, Role, TimelineMeta,
};
use crate::segment::{FreeSlots, SEGMENT_BYTES_MAX, SEGMENT_BYTES_MIN, Segment};

/// What all groups of a node share.
#[derive(Clone)]
pub struct Shared {
    /// The state volume.
    pub volume: Volume,
    /// Page-aligned memory.
    pub pool: BufPool,
    /// Blocks of index files.
    pub cache: Arc<BlockCache>,
    /// Bytes of recent frames kept in memory by all groups together, and their cap.
    pub recent: Arc<RecentBudget>,
    /// Fresh random numbers, for segment ids.
    pub entropy: Arc<dyn Fn() -> u64 + Send + Sync>,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Shared")
    }
}

/// Bounds the memory for frames that were just written and are about to be sent.
#[derive(Debug)]
pub struct RecentBudget {
    pub(crate) used: AtomicUsize,
    pub(crate) max: usize,
}

impl RecentBudget {
    /// At most `max` bytes.
    #[must_use]
    pub const fn new(max: usize) -> Self {
        Self { used: AtomicUsize::new(0), max }
    }
}

/// How a group is kept.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Size of each log segment file in bytes.
    pub segment_bytes: u64,
    /// Most bytes that log segment files may take together.
    pub cap_bytes: u64,
    /// Whether new segment files are filled with zeros before use while appends are small, which
    /// makes these twice as fast: file systems convert reserved space at the first write. For large
    /// ones it would only double what is written.
    pub fill: bool,
    /// Index entries after which a segment is closed early, to bound memory.
    pub table_entries_max: usize,
    /// Segments that may wait for sealing before the appender seals them itself.
    pub unsealed_max: usize,
    /// Pieces of history that are merged into a layer at once; at least 2.
    pub layer_fan: usize,
    /// Content in bytes that is moved to the base in one step, at most 32 MiB: it is held in memory
    /// meanwhile.
    pub slice_bytes: u64,
    /// Index entries that are moved to the base in one step, at least 1.
    pub slice_entries: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            segment_bytes: 64 << 20,
            cap_bytes: u64::MAX,
            fill: true,
            table_entries_max: 128 * 1024,
            unsealed_max: 4,
            layer_fan: 8,
            slice_bytes: 8 << 20,
            slice_entries: 1024,
        }
    }
}

/// A new group.
#[derive(Debug, Clone)]
pub struct NewGroup {
    /// Its id.
    pub group: GroupId,
    /// Its name.
    pub name: String,
    /// This node's part.
    pub role: Role,
    /// What is kept here.
    pub keep: Keep,
    /// The group's first epoch.
    pub epoch: EpochId,
    /// The clocks.
    pub now: Now,
}

/// Whether manifests are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Publishing {
    #[default]
    Open,
    /// The group is being deleted.
    Over,
}

/// An open group.
#[derive(Debug)]
pub struct Group {
    pub(crate) shared: Shared,
    pub(crate) options: Options,
    pub(crate) dir: PathBuf,
    pub(crate) id: GroupId,
    pub(crate) keep: Keep,
    pub(crate) free: Arc<FreeSlots>,
    /// Held while the manifest is changed.
    publishing: Mutex<Publishing>,
    /// A read has found damage since this was last asked.
    pub(crate) damage_seen: AtomicBool,
    /// The log is short of room: merging need not pay to be done.
    pub(crate) frees_log: AtomicBool,
    /// Held while a maintenance step runs.
    pub(crate) maintaining: Mutex<()>,
    /// Whether maintenance carries damaged content along, as damage.
    carries: AtomicBool,
    /// What it has carried along, until that is asked for.
    carried: Mutex<Vec<(DiskNo, Extent)>>,
    /// The merging of pieces into layers; of its own, because it takes long.
    pub(crate) compacting: Mutex<compact::Compacting>,
    state: Mutex<State>,
}

/// What changes. Locked for moments only.
#[derive(Debug)]
pub(crate) struct State {
    pub(crate) manifest: Manifest,
    /// Sealed segments by ordinal.
    pub(crate) segments: BTreeMap<u32, Arc<Segment>>,
    /// Open layer files by ordinal.
    pub(crate) layers: BTreeMap<u32, Arc<LayerFile>>,
    /// Open index files by number.
    pub(crate) runs: BTreeMap<u32, Arc<Run>>,
    pub(crate) lines: BTreeMap<EpochId, Line>,
    pub(crate) base: Option<Arc<Base>>,
    /// Segment files ready for use.
    pub(crate) spares: Vec<slots::Slot>,
    /// Whether the latest appends were small, so that new segment files had better be filled.
    pub(crate) small_appends: bool,
    /// Segment files there are, in use or not.
    pub(crate) slot_count: u64,
    /// Newer than the manifest's.
    pub(crate) acked: Seq,
    pub(crate) leases: view::Leases,
    /// The base is on its way to a later frame: what lies before that cannot be read any more.
    pub(crate) retiring: Option<retire::Retiring>,
}

/// The end of one line, and what is not in the manifest yet.
#[derive(Debug)]
pub(crate) struct Line {
    pub(crate) head: Position,
    pub(crate) catalog: Catalog,
    /// Segments not sealed yet, oldest first; the last one is being written.
    pub(crate) unsealed: Vec<Unsealed>,
    /// The newest frames, for sending.
    pub(crate) recent: VecDeque<Arc<Frame>>,
    pub(crate) recent_bytes: usize,
    /// What a reader of the head looks at; made when it is asked for.
    pub(crate) sources: Option<Arc<view::Sources>>,
}

/// A segment that is not sealed.
#[derive(Debug, Clone)]
pub(crate) struct Unsealed {
    pub(crate) segment: Arc<Segment>,
    pub(crate) table: Arc<RwLock<MemTable>>,
    /// Behind its last frame.
    pub(crate) last: Position,
    pub(crate) end: u32,
    /// Set when it is closed: the catalog behind its last frame.
    pub(crate) closed: Option<Arc<Catalog>>,
}

impl Unsealed {
    pub(crate) fn is_empty(&self) -> bool {
        self.last.seq < self.segment.header.first
    }
}

/// A line of frames, as it stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LineInfo {
    /// What it is for.
    pub purpose: Purpose,
    /// Its line of epochs; the last one is its own.
    pub epochs: EpochTable,
    /// When it was begun.
    pub since: WallTime,
    /// Its oldest frame that can still be read.
    pub oldest: Seq,
    /// The group at the oldest point that can be recovered; none for a cache.
    pub base: Option<Catalog>,
    /// The group at its end.
    pub catalog: Catalog,
}

/// A checkpoint of the group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checkpoint {
    /// Its mark in the log.
    pub mark: MarkPoint,
    /// The position it recovers.
    pub position: Position,
    /// What is noted of it.
    pub note: Note,
}

impl Checkpoint {
    /// Whether the applications were quiet.
    #[must_use]
    pub const fn is_application_consistent(&self) -> bool {
        self.mark.application && !self.note.unquiet
    }
}

/// The most content that is moved to the base in one step, in bytes.
const SLICE_BYTES_MAX: u64 = 32 << 20;

/// The most notes on checkpoints: each is part of every manifest that is written.
const NOTES_MAX: usize = 10_000;

pub(crate) const LOG_DIR: &str = "log";
pub(crate) const INDEX_DIR: &str = "index";
pub(crate) const LAYER_DIR: &str = "layer";
pub(crate) const BASE_DIR: &str = "base";

/// The directories of a group.
pub(crate) const DIRS: [&str; 4] = [LOG_DIR, INDEX_DIR, LAYER_DIR, BASE_DIR];

impl Group {
    /// Makes a new group in `dir`, which must not hold one.
    ///
    /// # Errors
    /// As the volume says; [`StoreError::Invalid`] for unusable options or a taken directory.
    pub fn create(shared: &Shared, options: Options, dir: &Path, new: &NewGroup) -> Result<Opened> {
        check_options(&options)?;
        let doing = || format!("making the directory of group {}", new.name);
        shared.volume.create_dir(dir).doing(doing)?;
        if Manifest::exists(&shared.volume, dir)? {
            return Err(StoreError::Invalid(format!("{} holds a group already", dir.display())));
        }
        for sub in DIRS {
            shared.volume.create_dir(&dir.join(sub)).doing(doing)?;
        }
        let epochs = EpochTable::new(new.epoch);
        let origin = Position { epoch: new.epoch, seq: Seq::ZERO, hash: FrameHash::ORIGIN };
        let line = TimelineMeta {
            epochs,
            purpose: Purpose::Main,
            since: new.now.wall,
            pieces: Vec::new(),
        };
        let base = (new.keep == Keep::Replica).then(|| BaseMeta { catalog: Catalog::new(origin) });
        let manifest = Manifest {
            generation: 1,
            group: new.group,
            name: new.name.clone(),
            role: new.role,
            keep: new.keep,
            fence: None,
            acked: Seq::ZERO,
            main: new.epoch,
            timelines: BTreeMap::from([(new.epoch, line)]),
            segments: BTreeMap::new(),
            layers: BTreeMap::new(),
            runs: BTreeMap::new(),
            base,
            notes: BTreeMap::new(),
            next_ordinal: 0,
            next_slot: 0,
            next_run: 0,
        };
        manifest.store(&shared.volume, dir)?;
        if let Some(parent) = dir.parent() {
            shared.volume.sync_dir(parent).doing(doing)?;
        }
        let opened = Self::open(shared, options, dir, new.now)?;
        // The first writes shall be as quick as all others; and without room for one segment there
        // had better be no group.
        if let Err(error) = opened.group.prepare_spare() {
            drop(opened);
            let _ = shared.volume.remove_dir(dir);
            return Err(error);
        }
        Ok(opened)
    }

    /// The lines of frames that there are, the main one first.
    #[must_use]
    pub fn lines(&self) -> Vec<LineInfo> {
        let state = self.lock();
        let mut lines: Vec<LineInfo> = state
            .manifest
            .timelines
            .iter()
            .filter_map(|(id, meta)| {
                let line = state.lines.get(id)?;
                Some(LineInfo {
                    purpose: meta.purpose,
                    epochs: meta.epochs.clone(),
                    since: meta.since,
                    oldest: state.oldest(*id),
                    base: state.oldest_point().cloned(),
                    catalog: line.catalog.clone(),
                })
            })
            .collect();
        lines.sort_by_key(|line| line.purpose != Purpose::Main);
        lines
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The group's id.
    #[must_use]
    pub const fn id(&self) -> GroupId {
        self.id
    }

    /// What is kept here.
    #[must_use]
    pub const fn keep(&self) -> Keep {
        self.keep
    }

    /// This node's part, and the fence if there is one.
    #[must_use]
    pub fn role(&self) -> (Role, Option<Fence>) {
        let state = self.lock();
        (state.manifest.role, state.manifest.fence.clone())
    }

    /// The epoch of the main line, and the line of epochs that leads to it.
    #[must_use]
    pub fn epochs(&self) -> EpochTable {
        let state = self.lock();
        let main = state.manifest.main;
        state
            .manifest
            .timelines
            .get(&main)
            .map_or_else(|| EpochTable::new(main), |line| line.epochs.clone())
    }

    /// The id of an epoch that this node begins now: of a later reign than all that it knows of.
    #[must_use]
    pub fn next_epoch(&self, random: [u8; 16]) -> EpochId {
        let state = self.lock();
        let manifest = &state.manifest;
        let lines = manifest.timelines.values().filter(|line| line.purpose != Purpose::Clone);
        let fence = manifest.fence.as_ref().and_then(|fence| fence.epochs.as_ref());
        let known = lines.map(|line| &line.epochs).chain(fence).flat_map(EpochTable::list);
        let highest = known.map(|epoch| epoch.id.reign()).max().unwrap_or(0);
        EpochId::new(highest.saturating_add(1), random)
    }

    /// The newest durable frame of the main line.
    #[must_use]
    pub fn head(&self) -> Position {
        let state = self.lock();
        let main = state.manifest.main;
        state
            .lines
            .get(&main)
            .map_or(Position { epoch: main, seq: Seq::ZERO, hash: FrameHash::ORIGIN }, |line| {
                line.head
            })
    }

    /// The disks and their content at the head of the main line.
    #[must_use]
    pub fn catalog(&self) -> Catalog {
        let state = self.lock();
        let main = state.manifest.main;
        let origin = Position { epoch: main, seq: Seq::ZERO, hash: FrameHash::ORIGIN };
        state.lines.get(&main).map_or_else(|| Catalog::new(origin), |line| line.catalog.clone())
    }

    /// The last frame that the peer is known to hold durably.
    #[must_use]
    pub fn acked(&self) -> Seq {
        self.lock().acked
    }

    /// The peer holds every frame up to `seq` durably. Written down with the next change of the
    /// manifest: the peer will say it again.
    pub fn set_acked(&self, seq: Seq) {
        let mut state = self.lock();
        state.acked = state.acked.max(seq);
    }

    /// The peer holds less than it had acknowledged: it was deleted or set back. What was taken for
    /// safe is not.
    pub fn set_back_acked(&self, seq: Seq) {
        self.lock().acked = seq;
    }

    /// Why the state volume failed, if it did.
    #[must_use]
    pub fn failure(&self) -> Option<String> {
        self.shared.volume.failure()
    }

    /// Bytes that the log's segment files take, and the cap.
    #[must_use]
    pub fn log_bytes(&self) -> (u64, u64) {
        let slots = self.lock().slot_count;
        (slots * self.options.segment_bytes, self.options.cap_bytes)
    }

    /// Bytes of the log that are needed: frames which the peer has not acknowledged, in whole
    /// segments.
    #[must_use]
    pub fn unacked_bytes(&self) -> u64 {
        self.log_bytes_behind(self.acked())
    }

    /// Bytes of the log behind a frame, in whole segments.
    #[must_use]
    pub fn log_bytes_behind(&self, seq: Seq) -> u64 {
        let state = self.lock();
        let main = state.manifest.main;
        let Some(timeline) = state.manifest.timelines.get(&main) else { return 0 };
        // What was merged to a layer is in the log no longer.
        let is_log = |piece: &PieceMeta| state.manifest.segments.contains_key(&piece.ordinal);
        let behind = timeline.pieces.iter().filter(|piece| piece.last.seq > seq && is_log(piece));
        let sealed = behind.count() as u64;
        let open = state.lines.get(&main).map_or(0, |line| {
            line.unsealed.iter().filter(|open| open.last.seq > seq && !open.is_empty()).count()
        }) as u64;
        (sealed + open) * self.options.segment_bytes
    }

    /// The oldest frame that can still be read.
    #[must_use]
    pub fn oldest(&self) -> Seq {
        let state = self.lock();
        state.oldest(state.manifest.main)
    }

    /// The log is short of room, or no longer: what may be merged is merged then although that gives
    /// back nothing but log segments.
    pub fn set_frees_log(&self, frees: bool) {
        self.frees_log.store(frees, Ordering::Relaxed);
    }

    /// The position from which on every one can be recovered; before it only checkpoints can that
    /// were kept. None for a cache, which holds no copy.
    #[must_use]
    pub fn window_start(&self) -> Option<Position> {
        let state = self.lock();
        let oldest = state.oldest_point()?.at;
        let line = state.manifest.timelines.get(&state.manifest.main);
        let layer = line.and_then(|line| {
            let is_layer = |piece: &&PieceMeta| state.manifest.layers.contains_key(&piece.ordinal);
            line.pieces.iter().rev().find(is_layer).map(|piece| piece.last)
        });
        Some(layer.map_or(oldest, |layer| if layer.seq > oldest.seq { layer } else { oldest }))
    }

    /// Bytes that the layers take: history of which only single points are kept.
    #[must_use]
    pub fn layer_bytes(&self) -> u64 {
        self.lock().manifest.layers.values().map(LayerMeta::bytes).sum()
    }

    /// The checkpoints of the main line that can be recovered, oldest first.
    ///
    /// # Errors
    /// When an index file cannot be read.
    pub fn checkpoints(&self) -> Result<Vec<Checkpoint>> {
        self.checkpoints_of(self.epochs().current())
    }

    /// The checkpoints of one line that can be recovered, oldest first.
    ///
    /// # Errors
    /// When an index file cannot be read.
    pub fn checkpoints_of(&self, line: EpochId) -> Result<Vec<Checkpoint>> {
        let (runs, tables, notes, base) = {
            let state = self.lock();
            let runs = state.piece_runs(line)?;
            let tables: Vec<_> = state
                .lines
                .get(&line)
                .map(|line| line.unsealed.iter().map(|open| open.table.clone()).collect())
                .unwrap_or_default();
            let base = state.oldest_point().map(|oldest| oldest.at);
            (runs, tables, state.manifest.notes.clone(), base)
        };
        let mut found = Vec::new();
        let mut add = |mark: &MarkPoint, epoch: EpochId| {
            let position = Position { epoch, seq: mark.seq, hash: mark.hash };
            let note = notes.get(&mark.id).cloned().unwrap_or_default();
            found.push(Checkpoint { mark: *mark, position, note });
        };
        for run in &runs {
            for mark in run.marks()? {
                add(&mark, run.meta().epoch);
            }
        }
        for table in &tables {
            let table = table.read().unwrap_or_else(PoisonError::into_inner);
            table.marks().iter().for_each(|mark| add(mark, line));
        }
        found.retain(|checkpoint| {
            !checkpoint.note.deleted && base.is_none_or(|base| checkpoint.position.seq > base.seq)
        });
        found.sort_by_key(|checkpoint| checkpoint.position.seq);
        found.dedup_by_key(|checkpoint| checkpoint.mark.id);
        Ok(found)
    }

    /// Labels and pins of checkpoints.
    #[must_use]
    pub fn notes(&self) -> Vec<(CheckpointId, Note)> {
        let state = self.lock();
        state.manifest.notes.iter().map(|(id, note)| (*id, note.clone())).collect()
    }

    /// What is noted of a checkpoint.
    #[must_use]
    pub fn note(&self, id: CheckpointId) -> Note {
        self.lock().manifest.notes.get(&id).cloned().unwrap_or_default()
    }

    /// Changes what is noted of a checkpoint, durably. Nothing is written when nothing changes.
    ///
    /// # Errors
    /// As the volume says; [`StoreError::Invalid`] when there are too many notes.
    pub fn change_note(&self, id: CheckpointId, change: impl FnOnce(&mut Note)) -> Result<()> {
        let before = self.note(id);
        let mut note = before.clone();
        change(&mut note);
        if note == before {
            return Ok(());
        }
        if before.is_empty() && self.lock().manifest.notes.len() >= NOTES_MAX {
            return Err(StoreError::Invalid(format!(
                "there are {NOTES_MAX} notes on checkpoints of the group already"
            )));
        }
        self.publish(|manifest| {
            if note.is_empty() {
                manifest.notes.remove(&id);
            } else {
                manifest.notes.insert(id, note);
            }
        })
    }

    /// Fences the group, durably: nothing is appended to it from here on.
    ///
    /// # Errors
    /// As the volume says.
    pub fn set_fence(&self, fence: Option<Fence>) -> Result<()> {
        if mutants::is(Mutant::FenceNotDurable) {
            self.lock().manifest.fence = fence;
            return Ok(());
        }
        self.publish(|manifest| manifest.fence = fence)
    }

    /// Changes this node's part, durably.
    ///
    /// # Errors
    /// As the volume says.
    pub fn set_role(&self, role: Role) -> Result<()> {
        self.publish(|manifest| manifest.role = role)
    }

    /// Writes no manifest any more: the group's files are about to be deleted. Whoever appends to it
    /// or maintains it has ended before.
    pub fn close(&self) {
        *self.publishing() = Publishing::Over;
    }

    /// Whether it was closed.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        *self.publishing() == Publishing::Over
    }

    fn publishing(&self) -> MutexGuard<'_, Publishing> {
        self.publishing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the manifest: the new one is durable before anyone sees it.
    pub(crate) fn publish(&self, change: impl FnOnce(&mut Manifest)) -> Result<()> {
        self.publish_with(change, |_| {})
    }

    /// The same; `install` puts what the new manifest lists where readers look for it, in the same
    /// moment: nobody may see a manifest that lists what is not open.
    pub(crate) fn publish_with(
        &self,
        change: impl FnOnce(&mut Manifest),
        install: impl FnOnce(&mut State),
    ) -> Result<()> {
        self.publish_if(
            |manifest| {
                change(manifest);
                true
            },
            install,
        )
        .map(|_| ())
    }

    /// The same, unless `change` says no; returns what it said.
    pub(crate) fn publish_if(
        &self,
        change: impl FnOnce(&mut Manifest) -> bool,
        install: impl FnOnce(&mut State),
    ) -> Result<bool> {
        let open = self.publishing();
        if *open == Publishing::Over {
            return Err(StoreError::Invalid("the group is being deleted".into()));
        }
        let mut next = {
            let state = self.lock();
            let mut next = state.manifest.clone();
            next.acked = state.acked;
            next
        };
        if !change(&mut next) {
            return Ok(false);
        }
        next.generation += 1;
        next.store(&self.shared.volume, &self.dir)?;
        let mut state = self.lock();
        // Counters may have gone on meanwhile; they only ever rise.
        next.next_ordinal = next.next_ordinal.max(state.manifest.next_ordinal);
        next.next_slot = next.next_slot.max(state.manifest.next_slot);
        next.next_run = next.next_run.max(state.manifest.next_run);
        state.manifest = next;
        install(&mut state);
        Ok(true)
    }
}

impl State {
    /// The group at the oldest position that can be recovered; none for a cache.
    pub(crate) fn oldest_point(&self) -> Option<&Catalog> {
        let ahead = self.retiring.as_ref().and_then(|retiring| retiring.behind.as_deref());
        ahead.or_else(|| self.manifest.base.as_ref().map(|base| &base.catalog))
    }

    /// The oldest readable frame of a line.
    pub(crate) fn oldest(&self, epoch: EpochId) -> Seq {
        // A layer has no frames any more, and nothing before it can be sent without it.
        let pieces = self.manifest.timelines.get(&epoch).map_or(&[][..], |line| &line.pieces);
        let piece = pieces
            .iter()
            .rev()
            .take_while(|piece| self.manifest.segments.contains_key(&piece.ordinal))
            .last()
            .map(|piece| piece.first);
        let open = || {
            self.lines.get(&epoch).map_or(Seq(1), |line| {
                line.unsealed
                    .first()
                    .map_or_else(|| line.head.seq.next(), |open| open.segment.header.first)
            })
        };
        piece.unwrap_or_else(open)
    }

    pub(crate) fn next_ordinal(&mut self) -> u32 {
        let ordinal = self.manifest.next_ordinal;
        self.manifest.next_ordinal += 1;
        ordinal
    }

    pub(crate) fn next_run(&mut self) -> u32 {
        let run = self.manifest.next_run;
        self.manifest.next_run += 1;
        run
    }
}

fn check_options(options: &Options) -> Result<()> {
    let page = srn_core::limits::PAGE as u64;
    if !(SEGMENT_BYTES_MIN..=SEGMENT_BYTES_MAX).contains(&options.segment_bytes)
        || !options.segment_bytes.is_multiple_of(page)
    {
        return Err(StoreError::Invalid(format!(
            "a log segment must have {SEGMENT_BYTES_MIN} to {SEGMENT_BYTES_MAX} bytes, in pages"
        )));
    }
    if options.slice_bytes > SLICE_BYTES_MAX || options.slice_entries == 0 {
        return Err(StoreError::Invalid(format!(
            "what is moved to the base at once must be at most {SLICE_BYTES_MAX} bytes, and not \
             nothing"
        )));
    }
    // One being written, one ready, one being trimmed.
    if options.cap_bytes < 3 * options.segment_bytes {
        return Err(StoreError::Invalid(format!(
            "the log's cap must be at least three segments of {} bytes",
            options.segment_bytes
        )));
    }
    Ok(())
}
