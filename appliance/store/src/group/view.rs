//! Reading disks at one position, or at the head of a line that is being written.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock};

use srn_core::bytes::content_sum;
use srn_core::epoch::Position;
use srn_core::extent::{Extent, gaps};
use srn_core::frame::envelope::Codec;
use srn_core::ids::{DiskNo, EpochId, Seq};
use srn_core::limits::{BLOCK_MAX, PAGE, SECTOR};

use super::{Group, State};
use crate::base::Base;
use crate::catalog::Catalog;
use crate::codec::Codecs;
use crate::error::{Doing, Result, StoreError};
use crate::index::{Lookup, MemTable, Place, Run, SeqPoint, cover};
use crate::io::BufPool;
use crate::manifest::{Keep, PieceMeta};
use crate::segment::{Segment, scan};

/// What a lookup asks, newest first, and the segments that the answers lie in.
#[derive(Debug)]
pub(crate) struct Sources {
    tables: Vec<Arc<RwLock<MemTable>>>,
    runs: Vec<Arc<Run>>,
    segments: BTreeMap<u32, Arc<Segment>>,
    base: Option<Arc<Base>>,
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
        Ok(View { group: self.clone(), at: At::Head(line) })
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
        self.check_replica()?;
        let epoch = self.epochs().current();
        // The lease first: from here on the base stays behind the position.
        let lease = self.lease(seq)?;
        // One look at the state, so that all of it is of one moment; what is found stays readable
        // as long as it is held, whatever maintenance does meanwhile.
        let (mut sources, behind, partial) = self.lock().snapshot(epoch, seq)?;
        let mut catalog = behind.catalog()?;
        if let Some(segment) = partial {
            let table = self.table_up_to(&segment, seq, &mut catalog)?;
            sources.tables.insert(0, Arc::new(RwLock::new(table)));
            sources.segments.insert(segment.ordinal, segment);
        }
        if catalog.at.seq != seq {
            return Err(StoreError::NotInHistory(format!("there is no frame {seq} in the log")));
        }
        Ok(View {
            group: self.clone(),
            at: At::Point { catalog: Box::new(catalog), sources, _lease: lease },
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
        let mut table = MemTable::default();
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
            table.add(&frame, segment.ordinal, offset, true, catalog.is_clean()).map_err(bad)?;
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
        let header = &segment.header;
        let run = state
            .runs
            .values()
            .find(|run| {
                let meta = run.meta();
                meta.level == 0 && meta.epoch == header.epoch && meta.first == header.first
            })
            .cloned();
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
            .and_then(|piece| self.segments.get(&piece.ordinal))
            .filter(|segment| segment.header.first <= seq)
            .cloned();
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
        let first = self.segments.get(&piece.ordinal).map(|segment| segment.header.first);
        self.runs
            .values()
            .find(|run| run.last() == piece.last && Some(run.meta().first) == first)
            .cloned()
            .ok_or_else(|| {
                StoreError::Corrupt(format!("no index for frames up to {}", piece.last.seq))
            })
    }

    /// The runs that cover `pieces`, oldest first.
    pub(super) fn runs_for(&self, pieces: &[PieceMeta]) -> Result<Vec<Arc<Run>>> {
        let all: Vec<_> = self.manifest.runs.values().copied().collect();
        let mut found = Vec::new();
        let mut rest = pieces;
        while let Some(piece) = rest.first() {
            let first = self.segments.get(&piece.ordinal).ok_or_else(|| {
                StoreError::Corrupt(format!("log segment {} is not open", piece.ordinal))
            })?;
            let epoch = first.header.epoch;
            let of_epoch = rest.iter().take_while(|piece| {
                self.segments
                    .get(&piece.ordinal)
                    .is_some_and(|segment| segment.header.epoch == epoch)
            });
            let count = of_epoch.count();
            let (these, behind) = rest.split_at(count);
            let last = these.last().map_or(Seq::ZERO, |piece| piece.last.seq);
            let runs = cover(&all, epoch, first.header.first, last).ok_or_else(|| {
                StoreError::Corrupt(format!("no index covers frames up to {last}"))
            })?;
            for run in runs {
                let open = self.runs.get(&run.file).cloned();
                found.push(open.ok_or_else(|| {
                    StoreError::Corrupt(format!("index file {} is not open", run.file))
                })?);
            }
            rest = behind;
        }
        Ok(found)
    }

    /// The index of each sealed piece of a line, oldest first.
    pub(super) fn piece_runs(&self, epoch: EpochId) -> Result<Vec<Arc<Run>>> {
        let pieces = self.manifest.timelines.get(&epoch).map_or(&[][..], |line| &line.pieces);
        pieces.iter().map(|piece| self.run_of(piece)).collect()
    }

    fn sources(
        &self,
        pieces: &[PieceMeta],
        tables: &[(Arc<RwLock<MemTable>>, Arc<Segment>)],
    ) -> Result<Sources> {
        let mut runs = self.runs_for(pieces)?;
        runs.reverse();
        let sealed = pieces.iter().filter_map(|piece| {
            self.segments.get(&piece.ordinal).map(|segment| (piece.ordinal, segment.clone()))
        });
        let open = tables.iter().map(|(_, segment)| (segment.ordinal, segment.clone()));
        Ok(Sources {
            tables: tables.iter().rev().map(|(table, _)| table.clone()).collect(),
            runs,
            segments: sealed.chain(open).collect(),
            base: self.base.clone(),
        })
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
        self.with_sources(|sources| sources.read(&self.group, disk, extent, out))
    }

    /// How an extent of a disk is stored, in order. It may end early, but is never empty.
    ///
    /// # Errors
    /// As [`View::read`].
    pub fn spans(&self, disk: DiskNo, extent: Extent) -> Result<Vec<(Extent, SpanKind)>> {
        self.with_sources(|sources| sources.spans(disk, extent))
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
                    let segment = self.segments.get(&segment).ok_or_else(|| {
                        StoreError::Corrupt(format!(
                            "an index names log segment {segment}, which is gone"
                        ))
                    })?;
                    read_block(&group.shared.pool, segment, &place, to)?;
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

/// Reads the content of a place in the log, and verifies the whole block that holds it.
pub(super) fn read_block(
    pool: &BufPool,
    file: &Segment,
    place: &Place,
    out: &mut [u8],
) -> Result<()> {
    let Place::Block { segment, offset, stored_len, codec, sum, sectors, skip } = place else {
        out.fill(0);
        return Ok(());
    };
    let damaged = || {
        StoreError::Corrupt(format!(
            "content in log segment {segment} at {offset} does not have its checksum"
        ))
    };
    // Direct input wants whole pages.
    let page = PAGE as u64;
    let start = u64::from(*offset) / page * page;
    let end = (u64::from(*offset) + u64::from(*stored_len)).next_multiple_of(page);
    let mut buf = pool.take(usize::try_from(end - start).unwrap_or(BLOCK_MAX + PAGE));
    let read = file
        .file
        .read_at(&mut buf, start)
        .doing(|| format!("reading log segment {segment} at {start}"))?;
    let before = usize::try_from(u64::from(*offset) - start).unwrap_or(0);
    let stored = buf
        .get(before..before + *stored_len as usize)
        .filter(|_| read >= before + *stored_len as usize)
        .ok_or_else(damaged)?;
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
    if content_sum(content) != *sum {
        return Err(damaged());
    }
    let from = bytes(*skip);
    out.copy_from_slice(content.get(from..from + out.len()).ok_or_else(damaged)?);
    Ok(())
}
