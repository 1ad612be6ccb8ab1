//! Merging pieces of history into layers: what single checkpoints need of a stretch, and no more.
//!
//! Behind the window in which every position is kept, only some points still matter. The pieces
//! between two of them are merged: for each sector the newest content at the later point is copied
//! to a layer, then the pieces are let go. This is done where it gives back at least a quarter of
//! the space.
//!
//! Invariants:
//! * no point that is kept lies inside a layer; a layer ends at one, or where a piece ends;
//! * every byte that is copied was verified; what is damaged is left where it is, or, when a repair was
//!   tried in vain ([`Group::carry_damage`]), is copied as it is with the checksum that it ought to have:
//!   damage stays damage, and what is proven to be the same can still take its place;
//! * files of a layer and their names are durable before the manifest lists it; until then the
//!   pieces stay as they are, so a crash at any moment costs only the work;
//! * a line has either all of the pieces that are merged, or none: a line that shares a part of
//!   them keeps them for all;
//! * readers hold the files that they read; nothing is taken from under them.
//!
//! The work is done in small steps between other maintenance, and begun anew after a restart.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

use srn_core::bytes::content_sum;
use srn_core::epoch::Position;
use srn_core::frame::envelope::Codec;
use srn_core::ids::{EpochId, Seq};
use srn_core::limits::PAGE;
use srn_core::mutants::{self, Mutant};
use srn_core::time::LogTime;

use super::layers::{Block, LayerOutput, WrittenLayer};
use super::maintain::Worked;
use super::retire::Retention;
use super::view::{damaged, part_of_block, stored_block};
use super::{Group, State};
use crate::catalog::Catalog;
use crate::codec::{Codecs, Effort};
use crate::error::{Result, StoreError};
use crate::index::{Entries, Item, MarkPoint, MemTable, Merge, Place, Run, span};
use crate::manifest::{Keep, LayerMeta, Manifest, PieceMeta, Purpose};
use crate::segment::scan;

/// The most bytes that are merged at once, unless two pieces alone have more.
const WINDOW_BYTES: u64 = 8 << 30;

/// The most index entries of segments that are taken apart in memory at once.
const WINDOW_ENTRIES: u64 = 256 * 1024;

/// Bytes copied in one step.
const STEP_BYTES: u64 = 8 << 20;

/// History that is to be given up and still takes space.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Debt {
    /// Pieces that no kept point needs.
    pub pieces: usize,
    /// What they take, in bytes.
    pub bytes: u64,
    /// Pieces that could not be merged because something in them is damaged.
    pub damaged: usize,
}

/// What the merging is at.
#[derive(Debug, Default)]
pub(crate) struct Compacting {
    job: Option<Box<Job>>,
    /// Windows that would give back too little: first and last piece, and points inside.
    poor: BTreeSet<(u32, u32, Vec<Seq>)>,
    /// The same that find no room for what they would become, until they are looked at again.
    cramped: BTreeSet<(u32, u32, Vec<Seq>)>,
    /// Pieces in which something is damaged, left as they are.
    damaged: BTreeSet<u32>,
    /// Whether damage was carried along when they were looked at last.
    carried: bool,
}

/// Pieces that follow each other in one epoch, with no kept point where one of them ends.
#[derive(Debug, Clone)]
struct Window {
    pieces: Vec<PieceMeta>,
    /// Kept points inside, each in the middle of a piece.
    cuts: Vec<Seq>,
    /// What the pieces take, in bytes.
    bytes: u64,
}

impl Window {
    /// Whether merging it loses nothing that is to be kept.
    fn heeds(&self, retention: &Retention) -> bool {
        let (Some(first), Some(last)) = (self.pieces.first(), self.pieces.last()) else {
            return false;
        };
        let mut inside =
            retention.points.iter().filter(|seq| **seq >= first.first && **seq < last.last.seq);
        let heeded = inside.all(|seq| self.cuts.contains(seq)) || mutants::is(Mutant::PointDropped);
        last.last.seq <= retention.keep_from && heeded
    }

    fn key(&self) -> (u32, u32, Vec<Seq>) {
        let ordinal = |piece: Option<&PieceMeta>| piece.map_or(0, |piece| piece.ordinal);
        (ordinal(self.pieces.first()), ordinal(self.pieces.last()), self.cuts.clone())
    }
}

/// Entries to merge: of an index file, or of a part of a segment.
#[derive(Debug)]
pub(super) enum Source {
    Run(Entries<Arc<Run>>),
    Table(std::vec::IntoIter<Item>),
}

impl Iterator for Source {
    type Item = Result<Item>;

    fn next(&mut self) -> Option<Self::Item> {
        match self {
            Self::Run(entries) => entries.next(),
            Self::Table(items) => items.next().map(Ok),
        }
    }
}

/// A layer to be written.
#[derive(Debug)]
struct Plan {
    first: Seq,
    last: Position,
    last_log_time: LogTime,
    catalog: Vec<u8>,
    marks: Vec<MarkPoint>,
    /// Newest first.
    inputs: Vec<Input>,
}

/// What a plan's entries are read from, as often as needed.
#[derive(Debug, Clone)]
enum Input {
    Run(Arc<Run>),
    Table(Arc<Vec<Item>>),
}

impl Plan {
    fn merge(&self) -> Result<Merge<Source>> {
        Merge::new(self.inputs.iter().map(|input| match input {
            Input::Run(run) => Source::Run(Run::into_iter(run.clone())),
            Input::Table(items) => Source::Table(items.as_ref().clone().into_iter()),
        }))
    }

    /// Bytes that the layer's files will have.
    fn bytes(&self) -> Result<u64> {
        let mut bytes = 2 * PAGE as u64;
        for item in self.merge()? {
            let (_, extent, place) = item?;
            bytes += match place {
                Place::Zero { .. } => 0,
                Place::Block { stored_len, sectors, .. }
                    if extent.sectors == u64::from(sectors) =>
                {
                    u64::from(stored_len)
                }
                Place::Block { .. } => extent.bytes(),
            };
        }
        Ok(bytes)
    }
}

/// A layer that is being written, from what.
#[derive(Debug)]
struct Output {
    plan: Plan,
    merge: Merge<Source>,
    layer: LayerOutput,
}

#[derive(Debug)]
struct Job {
    window: Window,
    plans: VecDeque<Plan>,
    output: Option<Output>,
    finished: Vec<WrittenLayer>,
    codecs: Codecs,
}

impl Group {
    /// Takes one step of merging pieces into layers.
    ///
    /// A piece that is damaged is left alone from then on, until damage is carried along or the group is
    /// opened anew.
    ///
    /// # Errors
    /// As the volume says.
    pub(super) fn compact(self: &Arc<Self>, retention: &Retention) -> Result<Worked> {
        if self.keep != Keep::Replica {
            return Ok(Worked::Nothing);
        }
        let retention = &self.lock().with_last_clean(retention);
        let mut compacting = self.compacting.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(mut job) = compacting.job.take() else {
            return self.begin(&mut compacting, retention);
        };
        // Retirement may have been quicker: then there is nothing left to merge. Or a point is to be
        // kept by now that was not when this was planned.
        let is_there = {
            let state = self.lock();
            let retires = job.window.pieces.iter().any(|piece| state.is_retiring(piece));
            !retires && state.has_pieces(&job.window.pieces)
        };
        if !is_there || !job.window.heeds(retention) {
            return Ok(Worked::Something);
        }
        match self.step(&mut job) {
            Ok(true) => {
                self.finish(*job)?;
                Ok(Worked::Something)
            }
            Ok(false) => {
                compacting.job = Some(job);
                Ok(Worked::Something)
            }
            Err(error) => {
                compacting.give_up(self, &job.window.pieces, error, &job.window)?;
                Ok(Worked::Something)
            }
        }
    }

    /// What is to be given up and is still there.
    #[must_use]
    pub fn debt(&self, retention: &Retention) -> Debt {
        let damaged = {
            let compacting = self.compacting.lock().unwrap_or_else(PoisonError::into_inner);
            compacting.damaged.len()
        };
        let state = self.lock();
        let main = state.manifest.main;
        let mut debt = Debt { damaged, ..Debt::default() };
        let pieces = state.manifest.timelines.get(&main).map_or(&[][..], |line| &line.pieces);
        for piece in pieces.iter().filter(|piece| piece.last.seq <= retention.floor()) {
            debt.pieces += 1;
            debt.bytes += self.piece_bytes(&state.manifest, piece);
        }
        debt
    }

    fn piece_bytes(&self, manifest: &Manifest, piece: &PieceMeta) -> u64 {
        manifest.layers.get(&piece.ordinal).map_or(self.options.segment_bytes, LayerMeta::bytes)
    }

    /// Looks for pieces that are worth merging, and plans it.
    fn begin(self: &Arc<Self>, to: &mut Compacting, retention: &Retention) -> Result<Worked> {
        if to.carried != self.carries_damage() {
            to.carried = !to.carried;
            to.damaged.clear();
        }
        let windows = {
            let state = self.lock();
            to.forget_gone(&state.manifest);
            self.windows(&state, retention, &to.damaged)
        };
        // The log needs its segments back, whatever that costs elsewhere.
        let frees = self.frees_log.load(Ordering::Relaxed);
        let passed = if frees { &to.cramped } else { &to.poor };
        let Some(window) = windows.into_iter().find(|window| !passed.contains(&window.key()))
        else {
            to.cramped.clear();
            return Ok(Worked::Nothing);
        };
        let mut planning = window.pieces.as_slice();
        let planned = self.plan(&window, &mut planning).and_then(|plans| {
            let bytes = plans.iter().map(Plan::bytes).sum::<Result<u64>>()?;
            Ok((plans, bytes))
        });
        let (plans, bytes) = match planned {
            Ok(planned) => planned,
            Err(error) => {
                to.give_up(self, planning, error, &window)?;
                return Ok(Worked::Something);
            }
        };
        let worth = window.bytes.saturating_sub(bytes) * 4 >= window.bytes;
        let fits = bytes <= self.room_for_layers()?;
        if !(worth || frees) || !fits {
            to.poor.insert(window.key());
            to.cramped.insert(window.key());
            return Ok(Worked::Something);
        }
        to.job = Some(Box::new(Job {
            window,
            plans: plans.into(),
            output: None,
            finished: Vec::new(),
            codecs: Codecs::new(),
        }));
        Ok(Worked::Something)
    }

    /// Stretches of the main line that may be merged, oldest first.
    fn windows(
        &self,
        state: &State,
        retention: &Retention,
        damaged: &BTreeSet<u32>,
    ) -> Vec<Window> {
        let main = state.manifest.main;
        let (Some(line), Some(end)) = (state.manifest.timelines.get(&main), state.lines.get(&main))
        else {
            return Vec::new();
        };
        let floor = state.floor(retention);
        let mut until = retention.keep_from;
        // In the middle of a resync the newest point is the last clean one. What comes behind it is left
        // alone, unless the log needs its segments back.
        if !end.catalog.is_clean()
            && !self.frees_log.load(Ordering::Relaxed)
            && let Some(clean) = end.catalog.last_clean
        {
            until = until.min(clean.seq);
        }
        let shared_by = |piece: &PieceMeta| -> Vec<EpochId> {
            let others = state.manifest.timelines.iter().filter(|(id, _)| **id != main);
            others.filter(|(_, line)| line.pieces.contains(piece)).map(|(id, _)| *id).collect()
        };
        let is_layer = |piece: &PieceMeta| state.manifest.layers.contains_key(&piece.ordinal);
        let is_kept = |seq: Seq| retention.points.binary_search(&seq).is_ok();
        let mut windows = Vec::new();
        let mut open: Vec<PieceMeta> = Vec::new();
        let mut bytes = 0;
        let mut entries = 0;
        let mut close = |open: &mut Vec<PieceMeta>, bytes: &mut u64, entries: &mut u64| {
            let single_layer = open.len() == 1 && open.first().is_some_and(is_layer);
            if let (Some(first), Some(last)) = (open.first(), open.last())
                && !single_layer
            {
                let inside = |seq: &&Seq| **seq >= first.first && **seq < last.last.seq;
                let dropped = usize::from(mutants::is(Mutant::PointDropped));
                let cuts = retention.points.iter().filter(inside).skip(dropped);
                let mut cuts: Vec<Seq> = cuts.copied().collect();
                // A layer of nothing would stand between two of the same.
                cuts.dedup();
                windows.push(Window { pieces: open.clone(), cuts, bytes: *bytes });
            }
            open.clear();
            *bytes = 0;
            *entries = 0;
        };
        for piece in &line.pieces {
            if piece.last.seq <= floor || state.is_retiring(piece) {
                continue;
            }
            if piece.last.seq > until {
                // More will come to what is open now.
                break;
            }
            let fits = open.last().is_none_or(|last| {
                last.last.epoch == piece.last.epoch && shared_by(last) == shared_by(piece)
            });
            if !fits {
                close(&mut open, &mut bytes, &mut entries);
            }
            if damaged.contains(&piece.ordinal) {
                close(&mut open, &mut bytes, &mut entries);
                continue;
            }
            let more = self.piece_bytes(&state.manifest, piece);
            let of_index = if is_layer(piece) { 0 } else { state.entries_of(piece) };
            if open.len() >= 2 && bytes + more > WINDOW_BYTES
                || !open.is_empty() && entries + of_index > WINDOW_ENTRIES
            {
                close(&mut open, &mut bytes, &mut entries);
            }
            open.push(*piece);
            bytes += more;
            entries += of_index;
            if open.len() >= self.options.layer_fan || is_kept(piece.last.seq) {
                close(&mut open, &mut bytes, &mut entries);
            }
        }
        windows
    }

    /// The layers that take the place of a window's pieces. `at` tells which of them it was at when it
    /// fails.
    fn plan<'a>(
        self: &Arc<Self>,
        window: &'a Window,
        at: &mut &'a [PieceMeta],
    ) -> Result<Vec<Plan>> {
        let mut plans = Vec::new();
        let mut inputs: Vec<Input> = Vec::new();
        let mut first = window.pieces.first().map_or(Seq::ZERO, |piece| piece.first);
        for piece in &window.pieces {
            *at = std::slice::from_ref(piece);
            let run = self.lock().run_of(piece)?;
            let inside = |seq: &&Seq| **seq >= piece.first && **seq < piece.last.seq;
            let cuts: Vec<Seq> = window.cuts.iter().filter(inside).copied().collect();
            if cuts.is_empty() {
                inputs.push(Input::Run(run));
                continue;
            }
            for (table, catalog) in self.parts(piece, &cuts)? {
                inputs.push(Input::Table(Arc::new(table.entries().collect())));
                if catalog.at.seq == piece.last.seq {
                    continue;
                }
                let at = catalog.at;
                plans.push(Plan {
                    first,
                    last: at,
                    last_log_time: catalog.log_time,
                    catalog: catalog.encode(),
                    marks: marks_at(table.marks(), at.seq),
                    inputs: std::mem::take(&mut inputs).into_iter().rev().collect(),
                });
                first = at.seq.next();
            }
        }
        if let Some(last) = window.pieces.last() {
            let run = self.lock().run_of(last)?;
            *at = &window.pieces;
            plans.push(Plan {
                first,
                last: last.last,
                last_log_time: last.last_log_time,
                catalog: run.catalog()?,
                marks: marks_at(&run.marks()?, last.last.seq),
                inputs: inputs.into_iter().rev().collect(),
            });
        }
        Ok(plans)
    }

    /// The index of a segment in parts that end at `cuts` and at its end, each with the catalog
    /// behind it.
    fn parts(
        self: &Arc<Self>,
        piece: &PieceMeta,
        cuts: &[Seq],
    ) -> Result<Vec<(MemTable, Catalog)>> {
        let (segment, behind) = {
            let state = self.lock();
            let segment = state.segments.get(&piece.ordinal).cloned().ok_or_else(|| {
                StoreError::NotInHistory(format!("frame {} was given up", piece.first))
            })?;
            let (_, behind, _) = state.snapshot(state.manifest.main, piece.first.prev())?;
            (segment, behind)
        };
        let mut catalog = behind.catalog()?;
        let mut frames = scan(&segment.target(), &self.shared.pool)?;
        let mut parts = Vec::new();
        for end in cuts.iter().copied().chain([piece.last.seq]) {
            let mut table = MemTable::default();
            while catalog.at.seq < end {
                let damaged = || {
                    StoreError::Corrupt(format!(
                        "frame {} cannot be read from log segment {}",
                        catalog.at.seq.next(),
                        segment.slot
                    ))
                };
                let (offset, frame) = frames.next(false)?.ok_or_else(damaged)?;
                let bad = |error| StoreError::Corrupt(format!("indexing a frame: {error}"));
                catalog.apply(&frame).map_err(bad)?;
                let at = u32::try_from(offset).unwrap_or(u32::MAX);
                table.add(&frame, segment.ordinal, at, true, catalog.standing()).map_err(bad)?;
            }
            parts.push((table, catalog.clone()));
        }
        Ok(parts)
    }

    /// Copies some content. Returns whether all of it is copied.
    fn step(self: &Arc<Self>, job: &mut Job) -> Result<bool> {
        let mut copied = 0;
        while copied < STEP_BYTES {
            let Some(output) = &mut job.output else {
                let Some(plan) = job.plans.pop_front() else { return Ok(true) };
                let merge = plan.merge()?;
                let layer = LayerOutput::begin(self, plan.first, plan.last)?;
                job.output = Some(Output { plan, merge, layer });
                continue;
            };
            match output.merge.next().transpose()? {
                Some((disk, extent, place)) => {
                    copied += extent.bytes().min(STEP_BYTES);
                    self.copy(&mut output.layer, &mut job.codecs, (disk, extent, place))?;
                }
                None => {
                    if let Some(Output { plan, layer, .. }) = job.output.take() {
                        let finished =
                            layer.finish(plan.last_log_time, &plan.marks, &plan.catalog)?;
                        job.finished.push(finished);
                    }
                }
            }
        }
        Ok(false)
    }

    /// Copies a block, or the part of it that still counts.
    fn copy(
        &self,
        output: &mut LayerOutput,
        codecs: &mut Codecs,
        (disk, extent, place): Item,
    ) -> Result<()> {
        let (segment, codec, sum, sectors) = match place {
            Place::Zero { trim } => return output.zero(disk, extent, trim),
            Place::Block { segment, codec, sum, sectors, .. } => (segment, codec, sum, sectors),
        };
        let content = self.lock().content(segment)?;
        let stored = match stored_block(&self.shared.pool, &content, &place) {
            Ok(stored) => Some(stored),
            // Its end is not there at all.
            Err(StoreError::Corrupt(_)) => None,
            Err(error) => return Err(error),
        };
        // Verified in either case.
        let part = match &stored {
            Some(stored) => part_of_block(&content, &place, stored, extent),
            None => Err(damaged(&content, &place)),
        };
        let (stored, part) = match (stored, part) {
            (Some(stored), Ok(part)) => (stored, part),
            (stored, Err(StoreError::Corrupt(_))) if self.meets_damage(disk, extent) => {
                return carry(output, (disk, extent, place), stored.as_deref());
            }
            (_, Err(error)) => return Err(error),
            (None, Ok(_)) => return Err(damaged(&content, &place)),
        };
        if extent.sectors == u64::from(sectors) {
            return output.block(
                disk,
                extent.start,
                Block { stored: &stored, codec, sum, sectors },
            );
        }
        let effort = if codec == Codec::Raw { Effort::None } else { Effort::Lz4 };
        let mut encoded = Vec::new();
        let how = codecs.encode(effort, &part, &mut encoded);
        let block = Block {
            stored: &encoded,
            codec: how.codec,
            sum: content_sum(&part),
            sectors: u8::try_from(extent.sectors).unwrap_or(u8::MAX),
        };
        output.block(disk, extent.start, block)
    }

    /// Puts the layers in the place of the pieces.
    fn finish(&self, job: Job) -> Result<()> {
        if !mutants::is(Mutant::LayerDirectoryNotSynced) {
            self.sync_layers()?;
        }
        let (window, layers) = (&job.window, &job.finished);
        let published = self.publish_if(
            |manifest| put_layers(manifest, window, layers),
            |state| layers.iter().for_each(|layer| layer.install(state)),
        )?;
        if published {
            job.finished.into_iter().for_each(WrittenLayer::keep);
            self.forget_unlisted();
        }
        Ok(())
    }
}

/// Copies a damaged block as it is, whole, or zeros where it ends early: the checksum that it ought to have
/// says of it that it is damaged, and what would be right.
fn carry(
    output: &mut LayerOutput,
    (disk, extent, place): Item,
    stored: Option<&[u8]>,
) -> Result<()> {
    let Place::Block { stored_len, codec, sum, sectors, skip, .. } = place else {
        return Err(StoreError::Invalid("zeros are not stored".into()));
    };
    let zeros = vec![0; if stored.is_some() { 0 } else { stored_len as usize }];
    let stored = stored.unwrap_or(&zeros);
    output.part(disk, extent, Block { stored, codec, sum, sectors }, skip)
}

/// Changes the manifest, unless the pieces are not there any more or lines share only some of them.
fn put_layers(manifest: &mut Manifest, window: &Window, layers: &[WrittenLayer]) -> bool {
    if window.pieces.is_empty() {
        return false;
    }
    let mut changed: BTreeMap<EpochId, Vec<PieceMeta>> = BTreeMap::new();
    let mut stale: BTreeSet<u32> = BTreeSet::new();
    for (id, line) in &manifest.timelines {
        let at = line.pieces.windows(window.pieces.len()).position(|some| some == window.pieces);
        let Some(at) = at else {
            if line.pieces.iter().any(|piece| window.pieces.contains(piece)) {
                return false;
            }
            continue;
        };
        // An index that reaches into the stretch names segments that are gone from it.
        let touched = at..at + window.pieces.len();
        stale.extend(manifest.runs.iter().filter_map(|(file, run)| {
            let span = span(run, &line.pieces)?;
            (span.start < touched.end && touched.start < span.end).then_some(*file)
        }));
        let mut pieces = line.pieces.clone();
        let new = layers.iter().map(|layer| layer.piece);
        pieces.splice(at..at + window.pieces.len(), new);
        changed.insert(*id, pieces);
    }
    if !changed.contains_key(&manifest.main) {
        return false;
    }
    for (id, pieces) in changed {
        if let Some(line) = manifest.timelines.get_mut(&id) {
            line.pieces = pieces;
        }
    }
    manifest.runs.retain(|file, _| !stale.contains(file));
    layers.iter().for_each(|layer| layer.list(manifest));
    manifest.drop_unused();
    true
}

impl Compacting {
    /// A window cannot be merged now. Damage is no reason to leave other work undone: what is
    /// damaged takes more room than it should, and is counted.
    fn give_up(
        &mut self,
        group: &Group,
        damaged: &[PieceMeta],
        error: StoreError,
        window: &Window,
    ) -> Result<()> {
        match error {
            StoreError::Corrupt(why) => {
                log::error!(
                    "group {}: frames {} to {} of the history stay as they are: {why}",
                    group.id,
                    damaged.first().map_or(0, |piece| piece.first.0),
                    damaged.last().map_or(0, |piece| piece.last.seq.0),
                );
                group.damage_seen.store(true, Ordering::Relaxed);
                self.damaged.extend(damaged.iter().map(|piece| piece.ordinal));
                Ok(())
            }
            StoreError::Full(_) | StoreError::NotInHistory(_) => {
                self.poor.insert(window.key());
                self.cramped.insert(window.key());
                Ok(())
            }
            error => Err(error),
        }
    }

    fn forget_gone(&mut self, manifest: &Manifest) {
        let Some(line) = manifest.timelines.get(&manifest.main) else { return };
        let there: BTreeSet<u32> = line.pieces.iter().map(|piece| piece.ordinal).collect();
        self.poor.retain(|(first, last, _)| there.contains(first) && there.contains(last));
        self.damaged.retain(|ordinal| there.contains(ordinal));
    }
}

impl State {
    /// Whether all these are pieces of the main line.
    fn has_pieces(&self, pieces: &[PieceMeta]) -> bool {
        let line = self.manifest.timelines.get(&self.manifest.main);
        line.is_some_and(|line| pieces.iter().all(|piece| line.pieces.contains(piece)))
    }

    /// Whether a piece is on its way to the base: it stays what it is until it is there.
    fn is_retiring(&self, piece: &PieceMeta) -> bool {
        self.retiring.as_ref().is_some_and(|retiring| piece.last.seq <= retiring.to.seq)
    }

    /// The same, and in the middle of a resync the newest point that can be recovered.
    fn with_last_clean(&self, retention: &Retention) -> Retention {
        let mut kept = retention.clone();
        let line = self.lines.get(&self.manifest.main);
        let clean = line.filter(|line| !line.catalog.is_clean());
        if let Some(clean) = clean.and_then(|line| line.catalog.last_clean)
            && clean.seq <= kept.keep_from
            && let Err(at) = kept.points.binary_search(&clean.seq)
        {
            kept.points.insert(at, clean.seq);
        }
        kept
    }

    /// The last position that nobody needs: neither the policy, nor a reader, nor another line.
    pub(super) fn floor(&self, retention: &Retention) -> Seq {
        let mut floor = retention.floor();
        if let Some(lowest) = self.leases.lowest() {
            floor = floor.min(lowest);
        }
        let main = self.manifest.main;
        let (Some(timeline), Some(line)) =
            (self.manifest.timelines.get(&main), self.lines.get(&main))
        else {
            return Seq::ZERO;
        };
        if mutants::is(Mutant::RetiredTooMuch) {
            floor = line.head.seq;
        }
        // A clone reads from its fork on; a branch was left where the main line forked.
        for other in self.manifest.timelines.values() {
            if other.purpose != Purpose::Main && !mutants::is(Mutant::RetiredUnderClone) {
                let fork = timeline.epochs.common_with(&other.epochs);
                floor = floor.min(fork.unwrap_or(Seq::ZERO));
            }
        }
        // In the middle of a resync the newest point that can be recovered is the last clean one.
        if !line.catalog.is_clean()
            && let Some(clean) = line.catalog.last_clean
        {
            floor = floor.min(clean.seq);
        }
        floor
    }

    /// Entries in the index of a piece.
    fn entries_of(&self, piece: &PieceMeta) -> u64 {
        let run =
            self.manifest.runs.values().find(|run| {
                run.pieces == (piece.ordinal, piece.ordinal) && run.last == piece.last.seq
            });
        run.map_or(0, |run| run.entries)
    }
}

fn marks_at(marks: &[MarkPoint], seq: Seq) -> Vec<MarkPoint> {
    marks.iter().filter(|mark| mark.seq == seq).copied().collect()
}
