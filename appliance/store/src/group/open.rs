//! Opening a group after a stop or a crash.
//!
//! What the manifest lists is taken as it is. Behind it lie frames that were appended but not
//! sealed: they are found by following the chain from segment to segment. Then:
//! * a bad frame that anything found here knows to have been durable is damage: nothing is cut,
//!   opening fails and says what is missing;
//! * good frames up to the first bad one are kept, whether they were answered or not;
//! * those of them that nothing proves to be durable are written again, to a fresh segment, and
//!   synced, before anything is told to anyone: what a failed sync has left in some cache looks
//!   just like what is on the medium.

use std::collections::{BTreeMap, BTreeSet};
use std::io::IoSlice;
use std::path::Path;
use std::sync::{Arc, Mutex, RwLock};

use srn_core::epoch::{Epoch, Position};
use srn_core::ids::{EpochId, Seq};
use srn_core::limits::PAGE;
use srn_core::mutants::{self, Mutant};
use srn_core::time::{LogClock, Now};

use super::append::Appender;
use super::fork::begin_epoch;
use super::view::{Leases, decode_catalog};
use super::{
    BASE_DIR, DIRS, Group, INDEX_DIR, LAYER_DIR, LOG_DIR, Line, Options, Shared, State, Unsealed,
    check_options,
};
use crate::base::Base;
use crate::catalog::Catalog;
use crate::error::{Doing, Result, StoreError};
use crate::frame::Frame;
use crate::index::{MemTable, Run, run_number_of};
use crate::io::{Access, AlignedBuf, File, Fs};
use crate::layer::{self, LayerFile, LayerHeader};
use crate::manifest::{Keep, Manifest, Purpose, Role, TimelineMeta};
use crate::segment::{self, FreeSlots, HEADER_LEN, Segment, SegmentHeader, scan};

/// What opening gave.
#[derive(Debug)]
pub struct Opened {
    /// The group.
    pub group: Arc<Group>,
    /// The end of the main line.
    pub main: Appender,
    /// The ends of clones that were there.
    pub clones: Vec<(EpochId, Appender)>,
    /// Frames that were written again because nothing proved them durable.
    pub rewritten: usize,
}

/// A segment file that the manifest does not list.
struct Loose {
    slot: u32,
    file: Arc<dyn File>,
    header: Option<SegmentHeader>,
}

impl Loose {
    fn target(&self) -> Option<segment::Target> {
        let header = self.header?;
        Some(segment::Target { slot: self.slot, header, file: self.file.clone() })
    }
}

/// The frames found behind what is sealed, of one line.
struct Tail {
    closed: Vec<Unsealed>,
    /// Frames that have to be written again.
    again: Vec<Arc<Frame>>,
    head: Position,
    catalog: Catalog,
}

impl Group {
    /// Opens the group in `dir`; its log time goes on from `now`.
    ///
    /// # Errors
    /// [`StoreError::Corrupt`] when something that was durable is not there any more;
    /// [`StoreError::NewerVersion`]; [`StoreError::Full`] when there is no room to go on; as the
    /// volume says.
    pub fn open(shared: &Shared, options: Options, dir: &Path, now: Now) -> Result<Opened> {
        check_options(&options)?;
        // Names may be there that are not durable yet, and everything from here on relies on them.
        let sync = |path: &Path| {
            shared.volume.sync_dir(path).doing(|| format!("syncing {}", path.display()))
        };
        sync(dir)?;
        DIRS.iter().try_for_each(|sub| sync(&dir.join(sub)))?;
        let manifest = Manifest::load(&shared.volume, dir)?;
        let free = Arc::new(FreeSlots::default());
        let (segments, mut loose) = open_segments(shared, dir, &manifest, &free)?;
        let slot_count = (segments.len() + loose.len()) as u64;
        let layers = open_layers(shared, dir, &manifest)?;
        let runs = open_runs(shared, dir, &manifest)?;
        let base = open_base(shared, dir, &manifest)?;
        let next_slot = loose.iter().map(|loose| loose.slot + 1).max().unwrap_or(0);
        let (id, keep, acked) = (manifest.group, manifest.keep, manifest.acked);
        let mut state = State {
            manifest,
            segments,
            layers,
            runs,
            lines: BTreeMap::new(),
            base,
            spares: Vec::new(),
            small_appends: true,
            slot_count,
            acked,
            leases: Leases::default(),
            retiring: None,
        };
        state.manifest.next_slot = state.manifest.next_slot.max(next_slot);
        let group = Arc::new(Self {
            shared: shared.clone(),
            options,
            dir: dir.into(),
            id,
            keep,
            free,
            publishing: Mutex::default(),
            damage_seen: false.into(),
            frees_log: false.into(),
            maintaining: Mutex::new(()),
            carries: false.into(),
            carried: Mutex::default(),
            compacting: Mutex::default(),
            state: Mutex::new(state),
        });
        group.resume_retirement()?;
        group.sweep()?;
        group.recover(&mut loose, now)
    }

    /// Finds the ends of all lines and makes them fit to go on.
    fn recover(self: &Arc<Self>, loose: &mut Vec<Loose>, now: Now) -> Result<Opened> {
        let lines: Vec<(EpochId, TimelineMeta)> = {
            let state = self.lock();
            state.manifest.timelines.iter().map(|(id, line)| (*id, line.clone())).collect()
        };
        let main = self.epochs().current();
        let mut tails = Vec::new();
        for (id, line) in &lines {
            let (at, catalog) = self.sealed_end(*id, line)?;
            tails.push((*id, line.clone(), self.find_tail(*id, at, catalog, loose)?));
        }
        self.check_acked(main, &tails)?;
        // Files that no segment was ever begun in, or that were cleared, can be used at once.
        let (stale, blank): (Vec<Loose>, Vec<Loose>) =
            loose.drain(..).partition(|loose| loose.header.is_some());
        for blank in blank {
            self.free.add(blank.slot, blank.file);
        }
        let mut rewritten = 0;
        let mut opened: Option<Appender> = None;
        let mut clones = Vec::new();
        for (id, line, tail) in tails {
            rewritten += tail.again.len();
            let appender = self.resume(id, &line, tail, now)?;
            match line.purpose {
                Purpose::Main => opened = Some(appender),
                Purpose::Clone => clones.push((id, appender)),
                Purpose::Branch => {}
            }
        }
        let main =
            opened.ok_or_else(|| StoreError::Corrupt("the manifest has no main line".into()))?;
        // What was not followed is stale. It is made unrecognisable before anything new is
        // answered, but only now that all frames are durable elsewhere: until then it may be the
        // only copy, when an earlier opening was cut short.
        for stale in stale {
            let page = AlignedBuf::zeroed(PAGE);
            stale
                .file
                .write_at(&[IoSlice::new(&page)], 0, true)
                .doing(|| format!("clearing log segment {}", stale.slot))?;
            self.free.add(stale.slot, stale.file);
        }
        Ok(Opened { group: self.clone(), main, clones, rewritten })
    }

    /// The position behind a line's sealed pieces, and the catalog there.
    fn sealed_end(&self, id: EpochId, line: &TimelineMeta) -> Result<(Position, Catalog)> {
        let state = self.lock();
        let fork = line.epochs.list().last().map(|epoch| epoch.forked_from);
        let fork = fork.ok_or_else(|| StoreError::Corrupt(format!("line {id} has no epoch")))?;
        let base = state.manifest.base.as_ref().map(|base| base.catalog.clone());
        if let Some(piece) = line.pieces.last() {
            let run = state.run_of(piece)?;
            drop(state);
            return Ok((piece.last, decode_catalog(&run.catalog()?)?));
        }
        match base {
            Some(base) => Ok((base.at, base)),
            // A cache keeps at least one piece once it has any.
            None => Ok((fork, Catalog::new(fork))),
        }
    }

    /// Follows the chain behind `at` through the loose segments, taking out those it uses.
    fn find_tail(
        &self,
        line: EpochId,
        at: Position,
        catalog: Catalog,
        loose: &mut Vec<Loose>,
    ) -> Result<Tail> {
        let mut found = Tail { closed: Vec::new(), again: Vec::new(), head: at, catalog };
        loop {
            let next: Vec<usize> = loose
                .iter()
                .enumerate()
                .filter(|(_, loose)| {
                    loose.header.is_some_and(|header| {
                        header.group == self.id
                            && header.epoch == line
                            && header.first == found.head.seq.next()
                            && header.prev == found.head.hash
                    })
                })
                .map(|(index, _)| index)
                .collect();
            // More than one begins here only after a crash while opening: the longest has it all.
            let mut best: Option<(usize, segment::Tail)> = None;
            for index in next {
                let Some(target) = loose.get(index).and_then(Loose::target) else { continue };
                let mut frames = scan(&target, &self.shared.pool)?;
                while frames.next(true)?.is_some() {}
                let tail = frames.tail()?;
                if tail.watermark > tail.last && !mutants::is(Mutant::DamageCutAsCrash) {
                    return Err(self.lost(tail.last.next(), tail.watermark));
                }
                if best.as_ref().is_none_or(|(_, best)| best.last < tail.last) {
                    best = Some((index, tail));
                }
            }
            let Some((index, tail)) = best else { break };
            if tail.last < found.head.seq.next() {
                // Begun and never written to.
                break;
            }
            let used = loose.swap_remove(index);
            self.take_segment(used, &tail, loose, &mut found)?;
        }
        // A segment further on proves that everything before it was durable.
        let beyond = loose.iter().filter_map(|loose| loose.header).find(|header| {
            header.group == self.id && header.epoch == line && header.first > found.head.seq.next()
        });
        match beyond {
            Some(header) => Err(self.lost(found.head.seq.next(), header.first.prev())),
            None => Ok(found),
        }
    }

    fn lost(&self, from: Seq, to: Seq) -> StoreError {
        StoreError::Corrupt(format!(
            "frames {from} to {to} of group {} were durable and are not readable any more",
            self.id
        ))
    }

    fn segment_of(&self, loose: Loose) -> Option<Arc<Segment>> {
        Some(Arc::new(Segment {
            ordinal: self.lock().next_ordinal(),
            slot: loose.slot,
            header: loose.header?,
            file: loose.file,
            free: self.free.clone(),
        }))
    }

    /// Takes in a segment of the tail: what is proven durable stays where it is.
    fn take_segment(
        &self,
        used: Loose,
        tail: &segment::Tail,
        others: &[Loose],
        found: &mut Tail,
    ) -> Result<()> {
        let Some(segment) = self.segment_of(used) else { return Ok(()) };
        let is_last = !others.iter().any(|other| {
            other.header.is_some_and(|header| {
                header.epoch == segment.header.epoch
                    && header.first == tail.last.next()
                    && header.prev == tail.hash
            })
        });
        // The next segment's header is only written when everything in this one is durable.
        let unproven = is_last && !mutants::is(Mutant::TailNotRewritten);
        let proven = if unproven { tail.watermark } else { tail.last };

        let mut table = MemTable::behind(&found.catalog);
        let mut frames = scan(&segment.target(), &self.shared.pool)?;
        let (mut last, mut end) = (found.head, HEADER_LEN);
        while let Some((offset, frame)) = frames.next(true)? {
            if frame.header().seq > proven {
                found.again.push(frame);
                continue;
            }
            let bad = |error| StoreError::Corrupt(format!("indexing a frame: {error}"));
            found.catalog.apply(&frame).map_err(bad)?;
            let entries = self.keep == Keep::Replica;
            let standing = found.catalog.standing();
            let at = u32::try_from(offset).unwrap_or(u32::MAX);
            table.add(&frame, segment.ordinal, at, entries, standing).map_err(bad)?;
            last = frame.position();
            end = offset + frame.envelope().disk_len() as u64;
        }
        found.head = last;
        found.closed.push(Unsealed {
            segment,
            table: Arc::new(RwLock::new(table)),
            last,
            end: u32::try_from(end).unwrap_or(u32::MAX),
            closed: Some(Arc::new(found.catalog.clone())),
        });
        if let Some(last) = found.again.last() {
            // So that nothing is looked for in between; they are appended when the line resumes.
            found.head = last.position();
        }
        Ok(())
    }

    /// What the peer has acknowledged was durable here before it was sent.
    fn check_acked(&self, main: EpochId, tails: &[(EpochId, TimelineMeta, Tail)]) -> Result<()> {
        let acked = self.acked();
        let head = tails.iter().find(|(id, ..)| *id == main).map(|(.., tail)| tail.head.seq);
        match head {
            Some(head) if head < acked => Err(self.lost(head.next(), acked)),
            _ => Ok(()),
        }
    }

    /// Seals what was found, writes again what has to be, and makes the line ready to go on.
    fn resume(
        self: &Arc<Self>,
        id: EpochId,
        line: &TimelineMeta,
        tail: Tail,
        now: Now,
    ) -> Result<Appender> {
        let head = tail.catalog.at;
        // Until they are written again, the only copy of some frames is where they were found: none
        // of these files may be used for anything else.
        let _held: Vec<Arc<Segment>> =
            tail.closed.iter().map(|open| open.segment.clone()).collect();
        {
            let mut state = self.lock();
            let mut open = Line::at(head, tail.catalog.clone());
            open.unsealed = tail.closed;
            state.lines.insert(id, open);
        }
        let clock = LogClock::resume(tail.catalog.log_time, tail.catalog.wall_time, now);
        let mut appender = Appender::new(self.clone(), id, head, clock);
        // Before the segment they were found in is sealed without them.
        if !tail.again.is_empty() {
            appender.commit_beyond_cap(&tail.again)?;
            let last = tail.again.last().map(|frame| *frame.header());
            if let Some(last) = last {
                appender.resume_clock(LogClock::resume(last.log_time, last.wall_time, now));
            }
        }
        while self.seal_oldest()? {}
        let epochs = line.epochs.list();
        if let Some(epoch) = epochs.last()
            && epochs.len() > 1
            && self.begins_epochs(line.purpose)
            && appender.head() == epoch.forked_from
        {
            // The crash came between the fork and its first frame.
            begin_epoch(&mut appender, Epoch { ..*epoch }, now)?;
        }
        Ok(appender)
    }

    /// Whether this node writes the first frame of a line's epoch: what a secondary follows was begun
    /// by its peer.
    fn begins_epochs(&self, purpose: Purpose) -> bool {
        match purpose {
            Purpose::Main => self.role().0 == Role::Primary,
            Purpose::Clone => true,
            Purpose::Branch => false,
        }
    }

    /// Removes files that nothing lists.
    fn sweep(&self) -> Result<()> {
        let (runs, base): (BTreeSet<u32>, Vec<String>) = {
            let state = self.lock();
            let runs = state.manifest.runs.keys().copied().collect();
            (runs, state.base.as_ref().map(|base| base.file_names()).unwrap_or_default())
        };
        let volume = &self.shared.volume;
        let list = |dir: &Path| volume.list(dir).doing(|| format!("listing {}", dir.display()));
        let index = self.dir.join(INDEX_DIR);
        let mut highest = 0;
        for name in list(&index)? {
            let number = run_number_of(&name);
            highest = highest.max(number.map_or(0, |number| number + 1));
            if number.is_none_or(|number| !runs.contains(&number)) {
                let _ = volume.remove(&index.join(&name));
            }
        }
        let mut state = self.lock();
        state.manifest.next_run = state.manifest.next_run.max(highest);
        drop(state);
        let dir = self.dir.join(LAYER_DIR);
        for name in list(&dir)? {
            let ordinal = layer::number_of(&name);
            let mut state = self.lock();
            if ordinal.is_none_or(|ordinal| !state.layers.contains_key(&ordinal)) {
                // It may come back after a power cut: its number is not used again.
                let next = ordinal.map_or(0, |ordinal| ordinal.saturating_add(1));
                state.manifest.next_ordinal = state.manifest.next_ordinal.max(next);
                drop(state);
                let _ = volume.remove(&dir.join(&name));
            }
        }
        let dir = self.dir.join(BASE_DIR);
        // While a retirement is under way there may be disks in the base that the manifest does not
        // know yet.
        let under_way = self.lock().retiring.is_some();
        for name in list(&dir)? {
            let is_left_over = Path::new(&name).extension().is_some_and(|end| end == "tmp");
            if is_left_over || !(base.contains(&name) || under_way) {
                let _ = volume.remove(&dir.join(&name));
            }
        }
        for name in list(&self.dir)? {
            if Path::new(&name).extension().is_some_and(|extension| extension == "tmp") {
                let _ = volume.remove(&self.dir.join(&name));
            }
        }
        Ok(())
    }
}

type Segments = BTreeMap<u32, Arc<Segment>>;

/// Opens every segment file: those that the manifest lists, and the others.
fn open_segments(
    shared: &Shared,
    dir: &Path,
    manifest: &Manifest,
    free: &Arc<FreeSlots>,
) -> Result<(Segments, Vec<Loose>)> {
    let log = dir.join(LOG_DIR);
    let by_slot: BTreeMap<u32, u32> =
        manifest.segments.iter().map(|(ordinal, meta)| (meta.slot, *ordinal)).collect();
    let mut segments = Segments::new();
    let mut loose = Vec::new();
    for name in shared.volume.list(&log).doing(|| format!("listing {}", log.display()))? {
        let Some(slot) = segment::slot_of(&name) else { continue };
        let doing = || format!("opening log segment {name}");
        let file = shared.volume.open(&log.join(&name), Access::Direct).doing(doing)?;
        let mut page = AlignedBuf::zeroed(PAGE);
        file.read_at(&mut page, 0).doing(doing)?;
        let header = match SegmentHeader::decode(&page)? {
            Some(header) => Some(header),
            None if page.iter().all(|byte| *byte == 0) => None,
            None => repair_header(shared, manifest, slot, &file)?,
        };
        let listed = by_slot
            .get(&slot)
            .and_then(|ordinal| manifest.segments.get(ordinal).map(|meta| (*ordinal, meta)));
        let Some((ordinal, meta)) = listed else {
            file.sync().doing(|| format!("syncing log segment {name}"))?;
            loose.push(Loose { slot, file, header });
            continue;
        };
        let header = header.filter(|header| {
            header.id == meta.id && header.group == manifest.group && header.first == meta.first
        });
        let header = header
            .ok_or_else(|| StoreError::Corrupt(format!("the header of log segment {name}")))?;
        let segment = Segment { ordinal, slot, header, file, free: free.clone() };
        segments.insert(ordinal, Arc::new(segment));
    }
    match manifest.segments.iter().find(|(ordinal, _)| !segments.contains_key(ordinal)) {
        Some((_, meta)) => Err(StoreError::Corrupt(format!(
            "log segment {} is missing",
            segment::file_name(meta.slot).display()
        ))),
        None => Ok((segments, loose)),
    }
}

/// Makes a header that is damaged anew from the frame behind it, which says the same, so that one
/// bad page does not cost a whole segment. None when there is no such frame: then the file was cut
/// off while it was begun, and holds nothing.
fn repair_header(
    shared: &Shared,
    manifest: &Manifest,
    slot: u32,
    file: &Arc<dyn File>,
) -> Result<Option<SegmentHeader>> {
    let header = segment::header_from_frame(slot, manifest.group, file, &shared.pool)?;
    if let Some(header) = &header {
        log::warn!(
            "group {}: the header of log segment {slot} was damaged, and is repaired",
            manifest.group
        );
        file.write_at(&[IoSlice::new(&header.encode())], 0, true)
            .doing(|| format!("repairing the header of log segment {slot}"))?;
    }
    Ok(header)
}

fn open_runs(shared: &Shared, dir: &Path, manifest: &Manifest) -> Result<BTreeMap<u32, Arc<Run>>> {
    let index = dir.join(INDEX_DIR);
    let open = |meta| Run::open(&shared.volume, &index, manifest.group, meta, &shared.cache);
    manifest.runs.iter().map(|(file, meta)| Ok((*file, Arc::new(open(meta)?)))).collect()
}

fn open_layers(
    shared: &Shared,
    dir: &Path,
    manifest: &Manifest,
) -> Result<BTreeMap<u32, Arc<LayerFile>>> {
    let dir = dir.join(LAYER_DIR);
    let mut open = BTreeMap::new();
    for meta in manifest.layers.values() {
        for file in &meta.files {
            let header = LayerHeader {
                ordinal: file.ordinal,
                group: manifest.group,
                first: meta.first,
                last: meta.last,
            };
            let layer = LayerFile::open(&shared.volume, &dir, &header, file.bytes)?;
            open.insert(file.ordinal, Arc::new(layer));
        }
    }
    Ok(open)
}

fn open_base(shared: &Shared, dir: &Path, manifest: &Manifest) -> Result<Option<Arc<Base>>> {
    let Some(meta) = &manifest.base else { return Ok(None) };
    let base = Base::new(&shared.volume, &dir.join(BASE_DIR), &shared.pool);
    for (no, disk) in &meta.catalog.disks {
        base.open_disk(*no, disk.id, disk.sectors)?;
    }
    Ok(Some(Arc::new(base)))
}
