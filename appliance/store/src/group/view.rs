//! Reading disks at one position, or at the head of a line that is being written.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use srn_core::bytes::content_sum;
use srn_core::epoch::Position;
use srn_core::extent::{Extent, gaps};
use srn_core::frame::envelope::Codec;
use srn_core::ids::{DiskNo, EpochId, Seq};
use srn_core::limits::{BLOCK_MAX, PAGE, PAGE_SECTORS, SECTOR};
use srn_core::mutants::{self, Mutant};

use super::{Group, State};
use crate::base::Base;
use crate::catalog::Catalog;
use crate::codec::Codecs;
use crate::error::{Doing, Result, StoreError};
use crate::index::{Lookup, MemTable, Place, Run, RunMeta, SeqPoint, cover};
use crate::io::{BufPool, File, PooledBuf};
use crate::layer::LayerFile;
use crate::manifest::{Keep, PieceMeta};
use crate::segment::{Segment, scan};

/// What a lookup asks, newest first, and the segments that the answers lie in.
#[derive(Debug)]
pub(crate) struct Sources {
    tables: Vec<Arc<RwLock<MemTable>>>,
    runs: Vec<Arc<Run>>,
    contents: BTreeMap<u32, Content>,
    base: Option<Arc<Base>>,
}

/// A file with content that index entries name. Whoever holds it may read it.
#[derive(Debug, Clone)]
pub(crate) enum Content {
    Segment(Arc<Segment>),
    Layer(Arc<LayerFile>),
}

impl Content {
    fn file(&self) -> &Arc<dyn File> {
        match self {
            Self::Segment(segment) => &segment.file,
            Self::Layer(layer) => &layer.file,
        }
    }
}

impl std::fmt::Display for Content {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Segment(segment) => write!(f, "log segment {}", segment.slot),
            Self::Layer(layer) => write!(f, "layer file {}", layer.ordinal),
        }
    }
}

/// Positions that readers hold on to: the base does not pass the lowest.
#[derive(Debug, Default)]
pub(crate) struct Leases {
    held: BTreeMap<Seq, usize>,
}

impl Leases {
    pub(crate) fn lowest(&self) -> Option<Seq> {
        self.held.keys().next().copied()
    }
}

/// Keeps a position readable until it is dropped.
#[derive(Debug)]
pub struct Lease {
    group: Arc<Group>,
    seq: Seq,
}

impl Drop for Lease {
    fn drop(&mut self) {
        let mut state = self.group.lock();
        if let Some(count) = state.leases.held.get_mut(&self.seq) {
            *count -= 1;
            if *count == 0 {
                state.leases.held.remove(&self.seq);
            }
        }
    }
}

/// Disks at one position, or at the head of a line.
#[derive(Debug)]
pub struct View {
    group: Arc<Group>,
    at: At,
    /// A person accepts that what is damaged reads as zero; and what that was, so far.
    accepted: Option<Mutex<BTreeMap<(DiskNo, u64), u64>>>,
}

#[derive(Debug)]
enum At {
    Head(EpochId),
    Point { catalog: Box<Catalog>, sources: Sources, _lease: Lease },
}

/// How a span of a disk is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SpanKind {
    /// There is content.
    Data,
    /// Zeros that were written.
    Zero,
    /// Zeros because nothing was ever written, or it was discarded.
    Hole,
}

impl Group {
    /// The head of the main line, following it as it grows.
    ///
    /// # Errors
    /// [`StoreError::Invalid`] for a cache, which holds no full copy.
    pub fn view_head(self: &Arc<Self>) -> Result<View> {
        self.view_head_of(self.epochs().current())
    }

    /// The head of one line, following it as it grows.
    ///
    /// # Errors
    /// [`StoreError::Invalid`] for a cache, which holds no full copy.
    pub fn view_head_of(self: &Arc<Self>, line: EpochId) -> Result<View> {
        self.check_replica()?;
        Ok(View { group: self.clone(), at: At::Head(line), accepted: None })
    }

    fn check_replica(&self) -> Result<()> {
        if self.keep == Keep::Cache {
            return Err(StoreError::Invalid(
                "a local cache holds no copy of the disks; read them at the recovery node".into(),
            ));
        }
        Ok(())
    }

    /// All disks as they were just behind frame `seq` of the main line.
    ///
    /// # Errors
    /// [`StoreError::NotInHistory`] when that is not kept any more, or is not there yet.
    pub fn view_at(self: &Arc<Self>, seq: Seq) -> Result<View> {
        self.view_on(self.epochs().current(), seq, seq)
    }

    /// All disks as they were just behind frame `seq` of one line.
    ///
    /// # Errors
    /// [`StoreError::NotInHistory`] when that is not kept any more, or is not there yet.
    pub fn view_at_of(self: &Arc<Self>, epoch: EpochId, seq: Seq) -> Result<View> {
        let shared = {
            let state = self.lock();
            let lines = &state.manifest.timelines;
            let main = lines.get(&state.manifest.main).map(|line| &line.epochs);
            let line = lines.get(&epoch).map(|line| &line.epochs);
            main.zip(line).and_then(|(main, line)| main.common_with(line)).unwrap_or(Seq::ZERO)
        };
        self.view_on(epoch, seq, seq.min(shared))
    }

    /// All disks as they were just behind frame `seq` of one line, which holds on to frame `held` of
    /// the main line.
    pub(super) fn view_on(self: &Arc<Self>, epoch: EpochId, seq: Seq, held: Seq) -> Result<View> {
        self.check_replica()?;
        // The lease first: from here on the base stays behind the position.
        let lease = self.lease(held)?;
        // One look at the state, so that all of it is of one moment; what is found stays readable
        // as long as it is held, whatever maintenance does meanwhile.
        let (mut sources, behind, partial) = self.lock().snapshot(epoch, seq)?;
        let mut catalog = behind.catalog()?;
        if let Some(segment) = partial {
            let table = self.table_up_to(&segment, seq, &mut catalog)?;
            sources.tables.insert(0, Arc::new(RwLock::new(table)));
            sources.contents.insert(segment.ordinal, Content::Segment(segment));
        }
        if catalog.at.seq != seq {
            return Err(StoreError::NotInHistory(format!("there is no frame {seq} in the log")));
        }
        Ok(View {
            group: self.clone(),
            at: At::Point { catalog: Box::new(catalog), sources, _lease: lease },
            accepted: None,
        })
    }

    fn lease(self: &Arc<Self>, seq: Seq) -> Result<Lease> {
        let mut state = self.lock();
        let base = state.manifest.base.as_ref().map_or(Seq::ZERO, |base| base.catalog.at.seq);
        let head = state.lines.get(&state.manifest.main).map_or(Seq::ZERO, |line| line.head.seq);
        if seq < base {
            return Err(StoreError::NotInHistory(format!(
                "the history begins at frame {base}, frame {seq} is no longer kept"
            )));
        }
        if state.retiring.as_ref().is_some_and(|retiring| seq < retiring.to.seq) {
            return Err(StoreError::NotInHistory(format!("frame {seq} is just being given up")));
        }
        if seq > head {
            return Err(StoreError::NotInHistory(format!(
                "the newest frame is {head}, there is no frame {seq} yet"
            )));
        }
        *state.leases.held.entry(seq).or_default() += 1;
        drop(state);
        Ok(Lease { group: self.clone(), seq })
    }

    /// The index of a segment up to frame `seq`, made by reading its frames.
    pub(super) fn table_up_to(
        &self,
        segment: &Arc<Segment>,
        seq: Seq,
        catalog: &mut Catalog,
    ) -> Result<MemTable> {
        let mut table = MemTable::behind(catalog);
        let mut scan = scan(&segment.target(), &self.shared.pool)?;
        while catalog.at.seq < seq {
            let damaged = || {
                StoreError::Corrupt(format!(
                    "frame {} cannot be read from log segment {}",
                    catalog.at.seq.next(),
                    segment.ordinal
                ))
            };
            let (offset, frame) = scan.next(false)?.ok_or_else(damaged)?;
            let bad = |error| StoreError::Corrupt(format!("indexing a frame: {error}"));
            catalog.apply(&frame).map_err(bad)?;
            let offset = u32::try_from(offset).unwrap_or(u32::MAX);
            table.add(&frame, segment.ordinal, offset, true, catalog.standing()).map_err(bad)?;
        }
        Ok(table)
    }

    /// The places to begin reading a segment.
    pub(super) fn seq_points(&self, segment: &Segment) -> Result<Vec<SeqPoint>> {
        let state = self.lock();
        for open in state.lines.values().flat_map(|line| &line.unsealed) {
            if open.segment.ordinal == segment.ordinal {
                let table = open.table.read().unwrap_or_else(PoisonError::into_inner);
                return Ok(table.points().to_vec());
            }
        }
        // That of a part of it up to a fork begins at the same places.
        let only = (segment.ordinal, segment.ordinal);
        let of_segment = state.runs.values().filter(|run| run.meta().pieces == only);
        let run = of_segment.max_by_key(|run| run.meta().last).cloned();
        drop(state);
        run.map_or_else(|| Ok(Vec::new()), |run| run.points())
    }
}

pub(super) fn decode_catalog(bytes: &[u8]) -> Result<Catalog> {
    let mut reader = srn_core::bytes::Reader::new(bytes);
    match Catalog::decode(&mut reader) {
        Ok(Some(catalog)) => Ok(catalog),
        _ => Err(StoreError::Corrupt("a catalog in an index file".into())),
    }
}

/// Where the catalog behind the last whole piece is told.
pub(super) enum Behind {
    Table(Arc<Catalog>),
    Run(Arc<Run>),
    Base(Box<Catalog>),
}

impl Behind {
    pub(super) fn catalog(self) -> Result<Catalog> {
        match self {
            Self::Table(catalog) => Ok((*catalog).clone()),
            Self::Run(run) => decode_catalog(&run.catalog()?),
            Self::Base(catalog) => Ok(*catalog),
        }
    }
}

impl State {
    /// What a reader of `seq` looks at: everything that ends at or before it, where the catalog
    /// there is told, and the segment in whose middle it lies.
    pub(super) fn snapshot(
        &self,
        epoch: EpochId,
        seq: Seq,
    ) -> Result<(Sources, Behind, Option<Arc<Segment>>)> {
        let gone = || StoreError::NotInHistory("the line is not kept any more".into());
        let line = self.lines.get(&epoch).ok_or_else(gone)?;
        let all = &self.manifest.timelines.get(&epoch).ok_or_else(gone)?.pieces;
        let whole = all.get(..all.partition_point(|piece| piece.last.seq <= seq));
        let whole = whole.unwrap_or_default();
        let mut partial = all
            .get(whole.len())
            .filter(|piece| piece.first <= seq)
            .map(|piece| {
                self.segments.get(&piece.ordinal).cloned().ok_or_else(|| {
                    StoreError::NotInHistory(format!(
                        "frame {seq} lies between two checkpoints that were kept, and was given up"
                    ))
                })
            })
            .transpose()?;
        let mut tables = Vec::new();
        let mut behind = None;
        for open in line.unsealed.iter().filter(|open| open.segment.header.first <= seq) {
            match &open.closed {
                Some(catalog) if open.last.seq <= seq => {
                    tables.push((open.table.clone(), open.segment.clone()));
                    behind = Some(Behind::Table(catalog.clone()));
                }
                _ => partial = Some(open.segment.clone()),
            }
        }
        let behind = match (behind, whole.last()) {
            (Some(behind), _) => behind,
            (None, Some(piece)) => Behind::Run(self.run_of(piece)?),
            (None, None) => {
                let base = self.manifest.base.as_ref();
                let base = base.ok_or_else(|| StoreError::Corrupt("there is no base".into()))?;
                Behind::Base(Box::new(base.catalog.clone()))
            }
        };
        Ok((self.sources(whole, &tables)?, behind, partial))
    }

    /// The index of one sealed piece.
    pub(super) fn run_of(&self, piece: &PieceMeta) -> Result<Arc<Run>> {
        self.runs
            .values()
            .find(|run| {
                run.meta().pieces == (piece.ordinal, piece.ordinal)
                    && run.last() == piece.last
                    && run.meta().first == piece.first
            })
            .cloned()
            .ok_or_else(|| {
                StoreError::Corrupt(format!("no index for frames up to {}", piece.last.seq))
            })
    }

    /// The runs that cover `pieces`, oldest first.
    pub(super) fn runs_for(&self, pieces: &[PieceMeta]) -> Result<Vec<Arc<Run>>> {
        let all: Vec<_> = self.manifest.runs.values().copied().collect();
        let chosen = cover(&all, pieces).ok_or_else(|| {
            let last = pieces.last().map_or(Seq::ZERO, |piece| piece.last.seq);
            StoreError::Corrupt(format!("no index covers frames up to {last}"))
        })?;
        let open = |run: &RunMeta| {
            self.runs
                .get(&run.file)
                .cloned()
                .ok_or_else(|| StoreError::Corrupt(format!("index file {} is not open", run.file)))
        };
        chosen.iter().map(open).collect()
    }

    /// The index of each sealed piece of a line, oldest first.
    pub(super) fn piece_runs(&self, epoch: EpochId) -> Result<Vec<Arc<Run>>> {
        let pieces = self.manifest.timelines.get(&epoch).map_or(&[][..], |line| &line.pieces);
        pieces.iter().map(|piece| self.run_of(piece)).collect()
    }

    pub(super) fn sources(
        &self,
        pieces: &[PieceMeta],
        tables: &[(Arc<RwLock<MemTable>>, Arc<Segment>)],
    ) -> Result<Sources> {
        let mut runs = self.runs_for(pieces)?;
        runs.reverse();
        let mut contents: BTreeMap<u32, Content> = tables
            .iter()
            .map(|(_, segment)| (segment.ordinal, Content::Segment(segment.clone())))
            .collect();
        for piece in pieces {
            for ordinal in self.files_of(piece) {
                contents.insert(ordinal, self.content(ordinal)?);
            }
        }
        Ok(Sources {
            tables: tables.iter().rev().map(|(table, _)| table.clone()).collect(),
            runs,
            contents,
            base: self.base.clone(),
        })
    }

    /// The files with a piece's content.
    fn files_of(&self, piece: &PieceMeta) -> Vec<u32> {
        self.manifest.layers.get(&piece.ordinal).map_or_else(
            || vec![piece.ordinal],
            |layer| layer.files.iter().map(|file| file.ordinal).collect(),
        )
    }

    /// The file that an index entry names.
    pub(super) fn content(&self, ordinal: u32) -> Result<Content> {
        let segment = self.segments.get(&ordinal).cloned().map(Content::Segment);
        let layer = || self.layers.get(&ordinal).cloned().map(Content::Layer);
        segment.or_else(layer).ok_or_else(|| gone(ordinal))
    }

    fn head_sources(&mut self, epoch: EpochId) -> Result<Arc<Sources>> {
        let gone = || StoreError::NotInHistory("the line is not kept any more".into());
        let line = self.lines.get(&epoch).ok_or_else(gone)?;
        if let Some(sources) = &line.sources {
            return Ok(sources.clone());
        }
        let tables: Vec<_> =
            line.unsealed.iter().map(|open| (open.table.clone(), open.segment.clone())).collect();
        let pieces = self.manifest.timelines.get(&epoch).ok_or_else(gone)?.pieces.clone();
        let sources = Arc::new(self.sources(&pieces, &tables)?);
        if let Some(line) = self.lines.get_mut(&epoch) {
            line.sources = Some(sources.clone());
        }
        Ok(sources)
    }
}

impl View {
    /// The group at this position: its disks, and whether the position is clean.
    #[must_use]
    pub fn catalog(&self) -> Catalog {
        match &self.at {
            At::Point { catalog, .. } => (**catalog).clone(),
            At::Head(line) => {
                let state = self.group.lock();
                let origin = Position {
                    epoch: *line,
                    seq: Seq::ZERO,
                    hash: srn_core::ids::FrameHash::ORIGIN,
                };
                state
                    .lines
                    .get(line)
                    .map_or_else(|| Catalog::new(origin), |line| line.catalog.clone())
            }
        }
    }

    /// The group.
    #[must_use]
    pub const fn group(&self) -> &Arc<Group> {
        &self.group
    }

    /// Reads an extent of a disk; `out` has exactly its length. Everything read is verified.
    ///
    /// # Errors
    /// [`StoreError::Corrupt`] when content is damaged; as the volume says.
    pub fn read(&self, disk: DiskNo, extent: Extent, out: &mut [u8]) -> Result<()> {
        if extent.bytes() != out.len() as u64 {
            return Err(StoreError::Invalid("a read's buffer does not fit its extent".into()));
        }
        let read = self.with_sources(|sources| sources.read(&self.group, disk, extent, out));
        if matches!(read, Err(StoreError::Corrupt(_))) {
            self.group.damage_seen.store(true, Ordering::Relaxed);
        }
        match (read, &self.accepted) {
            (Err(StoreError::Corrupt(_)), Some(accepted)) => {
                self.read_around_damage(disk, extent, out, accepted)
            }
            (read, _) => read,
        }
    }

    /// The same, but that damaged content reads as zero from now on, sector by sector. A person has to
    /// have accepted that, and has to be told what it was: [`View::accepted_damage`].
    #[must_use]
    pub fn accepting_damage(mut self) -> Self {
        self.accepted = Some(Mutex::default());
        self
    }

    /// What was read as zero because it is damaged.
    #[must_use]
    pub fn accepted_damage(&self) -> Vec<(DiskNo, Extent)> {
        let Some(accepted) = &self.accepted else { return Vec::new() };
        let all = accepted.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let mut joined: Vec<(DiskNo, Extent)> = Vec::new();
        for ((disk, start), sectors) in all {
            let extent = Extent::new(start, sectors);
            match joined.last_mut() {
                Some((same, last)) if *same == disk && extent.start <= last.end() => {
                    last.sectors = last.sectors.max(extent.end() - last.start);
                }
                _ => joined.push((disk, extent)),
            }
        }
        joined
    }

    fn read_around_damage(
        &self,
        disk: DiskNo,
        extent: Extent,
        out: &mut [u8],
        accepted: &Mutex<BTreeMap<(DiskNo, u64), u64>>,
    ) -> Result<()> {
        let mut rest = out;
        let mut at = extent.start;
        while at < extent.end() {
            let end = (at / PAGE_SECTORS + 1).saturating_mul(PAGE_SECTORS).min(extent.end());
            let part = Extent::new(at, end - at);
            let len = usize::try_from(part.bytes()).unwrap_or(usize::MAX);
            let (page, behind) = rest.split_at_mut_checked(len).ok_or_else(|| {
                StoreError::Invalid("a read's buffer does not fit its extent".into())
            })?;
            match self.with_sources(|sources| sources.read(&self.group, disk, part, page)) {
                Err(StoreError::Corrupt(_)) if part.sectors > 1 => {
                    let half = Extent::new(part.start, part.sectors / 2);
                    let rest = Extent::new(half.end(), part.sectors - half.sectors);
                    let len = usize::try_from(half.bytes()).unwrap_or(usize::MAX);
                    let (first, second) = page.split_at_mut_checked(len).unwrap_or_default();
                    self.read_around_damage(disk, half, first, accepted)?;
                    self.read_around_damage(disk, rest, second, accepted)?;
                }
                Err(StoreError::Corrupt(_)) => {
                    page.fill(0);
                    let mut accepted = accepted.lock().unwrap_or_else(PoisonError::into_inner);
                    let sectors = accepted.entry((disk, part.start)).or_default();
                    *sectors = part.sectors.max(*sectors);
                }
                other => other?,
            }
            rest = behind;
            at = end;
        }
        Ok(())
    }

    /// How an extent of a disk is stored, in order. It may end early, but is never empty.
    ///
    /// # Errors
    /// As [`View::read`].
    pub fn spans(&self, disk: DiskNo, extent: Extent) -> Result<Vec<(Extent, SpanKind)>> {
        self.with_sources(|sources| sources.spans(disk, extent))
    }

    /// Whether all of an extent is answered by the base: nothing behind it, up to this position, has
    /// written there.
    ///
    /// # Errors
    /// When an index cannot be read.
    pub(super) fn is_from_base(&self, disk: DiskNo, extent: Extent) -> Result<bool> {
        self.with_sources(|sources| {
            let places = sources.places(disk, extent)?;
            Ok(places.iter().all(|(_, place)| place.is_none()))
        })
    }

    fn with_sources<T>(&self, read: impl FnOnce(&Sources) -> Result<T>) -> Result<T> {
        match &self.at {
            At::Point { sources, .. } => read(sources),
            At::Head(line) => {
                let sources = self.group.lock().head_sources(*line)?;
                read(&sources)
            }
        }
    }
}

/// Spans that one answer has at most.
const SPANS_MAX: usize = 4096;

impl Sources {
    /// The index files, newest first.
    pub(super) fn runs(&self) -> &[Arc<Run>] {
        &self.runs
    }

    /// The file that an index entry names.
    pub(super) fn content(&self, ordinal: u32) -> Result<&Content> {
        self.contents.get(&ordinal).ok_or_else(|| gone(ordinal))
    }

    /// Who knows each part of `extent`, in order; `None` is the base.
    fn places(&self, disk: DiskNo, extent: Extent) -> Result<Vec<(Extent, Option<Place>)>> {
        let mut found: Vec<(Extent, Option<Place>)> = Vec::new();
        let mut open = vec![extent];
        for table in &self.tables {
            let table = table.read().unwrap_or_else(PoisonError::into_inner);
            open = ask(&*table, disk, &open, &mut found)?;
            if open.is_empty() {
                break;
            }
        }
        for run in &self.runs {
            if open.is_empty() {
                break;
            }
            open = ask(&**run, disk, &open, &mut found)?;
        }
        found.extend(open.into_iter().map(|extent| (extent, None)));
        found.sort_by_key(|(extent, _)| extent.start);
        Ok(found)
    }

    fn read(&self, group: &Group, disk: DiskNo, extent: Extent, out: &mut [u8]) -> Result<()> {
        let mut rest = out;
        for (part, place) in self.places(disk, extent)? {
            let len = usize::try_from(part.bytes()).unwrap_or(usize::MAX);
            let (to, behind) = rest.split_at_mut_checked(len).ok_or_else(|| {
                StoreError::Corrupt("an index entry is longer than what was asked for".into())
            })?;
            rest = behind;
            match (place, &self.base) {
                (Some(Place::Zero { .. }), _) | (None, None) => to.fill(0),
                (Some(place @ Place::Block { segment, .. }), _) => {
                    let content = self.content(segment)?;
                    read_block(&group.shared.pool, content, &place, to)?;
                }
                (None, Some(base)) => base.read(disk, part, to)?,
            }
        }
        Ok(())
    }

    fn spans(&self, disk: DiskNo, extent: Extent) -> Result<Vec<(Extent, SpanKind)>> {
        let mut spans: Vec<(Extent, SpanKind)> = Vec::new();
        let mut push = |part: Extent, kind: SpanKind| match spans.last_mut() {
            Some((last, same)) if *same == kind && last.end() == part.start => {
                last.sectors += part.sectors;
                true
            }
            _ => {
                spans.push((part, kind));
                spans.len() < SPANS_MAX
            }
        };
        for (part, place) in self.places(disk, extent)? {
            let more = match (place, &self.base) {
                (Some(Place::Block { .. }), _) => push(part, SpanKind::Data),
                (Some(Place::Zero { trim: false }), _) => push(part, SpanKind::Zero),
                (Some(Place::Zero { trim: true }), _) | (None, None) => push(part, SpanKind::Hole),
                (None, Some(base)) => {
                    let mut more = true;
                    let (known, whole) = base.spans(disk, part)?;
                    for (part, is_data) in known {
                        more &= push(part, if is_data { SpanKind::Data } else { SpanKind::Hole });
                    }
                    more && whole
                }
            };
            if !more {
                break;
            }
        }
        Ok(spans)
    }
}

/// Asks one source about the parts still open; returns those that stay open.
fn ask(
    source: &dyn Lookup,
    disk: DiskNo,
    open: &[Extent],
    found: &mut Vec<(Extent, Option<Place>)>,
) -> Result<Vec<Extent>> {
    let mut still = Vec::new();
    let mut known = Vec::new();
    for part in open {
        known.clear();
        source.lookup(disk, *part, &mut known)?;
        still.extend(gaps(*part, known.iter().map(|(extent, _)| *extent)));
        found.extend(known.iter().map(|(extent, place)| (*extent, Some(*place))));
    }
    Ok(still)
}

fn gone(ordinal: u32) -> StoreError {
    StoreError::Corrupt(format!("an index names file {ordinal} of the history, which is gone"))
}

/// Reads the content of a place in the history, and verifies the whole block that holds it.
pub(crate) fn read_block(
    pool: &BufPool,
    from: &Content,
    place: &Place,
    out: &mut [u8],
) -> Result<()> {
    if matches!(place, Place::Zero { .. }) {
        out.fill(0);
        return Ok(());
    }
    let stored = stored_block(pool, from, place)?;
    decode_block(from, place, &stored, |content, skip| {
        let part = content.get(skip..skip + out.len());
        part.map(|part| out.copy_from_slice(part))
    })
}

/// A block as it is stored: a part of a buffer that was read around it.
pub(super) struct StoredBlock {
    buf: PooledBuf,
    range: std::ops::Range<usize>,
}

impl std::ops::Deref for StoredBlock {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.buf.get(self.range.clone()).unwrap_or_default()
    }
}

pub(super) fn damaged(from: &Content, place: &Place) -> StoreError {
    let at = if let Place::Block { offset, .. } = place { *offset } else { 0 };
    StoreError::Corrupt(format!("content in {from} at {at} does not have its checksum"))
}

/// Reads the whole block of a place, as it is stored. Nothing is verified yet.
pub(super) fn stored_block(pool: &BufPool, from: &Content, place: &Place) -> Result<StoredBlock> {
    let Place::Block { offset, stored_len, .. } = place else {
        return Err(StoreError::Invalid("zeros are not stored".into()));
    };
    // Direct input wants whole pages.
    let page = PAGE as u64;
    let start = u64::from(*offset) / page * page;
    let end = (u64::from(*offset) + u64::from(*stored_len)).next_multiple_of(page);
    let mut buf = pool.take(usize::try_from(end - start).unwrap_or(BLOCK_MAX + PAGE));
    let read =
        from.file().read_at(&mut buf, start).doing(|| format!("reading {from} at {start}"))?;
    let before = usize::try_from(u64::from(*offset) - start).unwrap_or(0);
    let range = before..before + *stored_len as usize;
    if read < range.end || buf.len() < range.end {
        return Err(damaged(from, place));
    }
    Ok(StoredBlock { buf, range })
}

/// The part of a block that a place means, verified.
pub(super) fn part_of_block(
    from: &Content,
    place: &Place,
    stored: &[u8],
    extent: Extent,
) -> Result<Vec<u8>> {
    let len = usize::try_from(extent.bytes()).unwrap_or(usize::MAX);
    let mut part = Vec::new();
    decode_block(from, place, stored, |content, skip| {
        part.extend_from_slice(content.get(skip..skip.checked_add(len)?)?);
        Some(())
    })?;
    Ok(part)
}

/// Decodes and verifies a block, and hands its content to `take`, with the bytes to skip.
fn decode_block(
    from: &Content,
    place: &Place,
    stored: &[u8],
    take: impl FnOnce(&[u8], usize) -> Option<()>,
) -> Result<()> {
    let Place::Block { codec, sum, sectors, skip, .. } = place else {
        return Err(StoreError::Invalid("zeros are not stored".into()));
    };
    let damaged = || damaged(from, place);
    let bytes = |sectors: u8| usize::from(sectors) * usize::try_from(SECTOR).unwrap_or(512);
    let mut decoded = [0u8; BLOCK_MAX];
    let content = if *codec == Codec::Raw {
        stored
    } else {
        let to = decoded.get_mut(..bytes(*sectors)).ok_or_else(damaged)?;
        if !Codecs::new().decode(*codec, stored, to) {
            return Err(damaged());
        }
        to
    };
    if content_sum(content) != *sum && !mutants::is(Mutant::BlockSumUnchecked) {
        return Err(damaged());
    }
    take(content, bytes(*skip)).ok_or_else(damaged)
}
