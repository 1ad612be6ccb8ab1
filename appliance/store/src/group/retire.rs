//! Moving the oldest part of the main line into the base.
//!
//! The order that makes it survive a crash at any point:
//! 1. the pieces to retire are read and every byte verified; pages of which only a part changes are
//!    put together whole;
//! 2. those pages are written to an *intent* file, which is synced;
//! 3. the base is written and synced; until it is published, readers see these pages through the
//!    log, so what is half-written is seen by nobody;
//! 4. the manifest is published with the base at its new position and without the pieces;
//! 5. the intent is removed; the segment files become free when their last reader is gone.
//!
//! After a crash between 2 and 4 the same is done again from the same pieces and the intent: whole
//! pages come from the log again, partial ones from the intent, whatever state the base is in.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use srn_core::bytes::{Reader, Truncated, Writer};
use srn_core::epoch::Position;
use srn_core::extent::Extent;
use srn_core::ids::{DiskNo, Seq};
use srn_core::limits::{DISK_SECTORS_MAX, PAGE, PAGE_SECTORS, SECTOR};
use srn_core::mutants::{self, Mutant};

use super::maintain::Worked;
use super::view::decode_catalog;
use super::{BASE_DIR, Group, LAYER_DIR};
use crate::base::{Base, BaseDisk};
use crate::catalog::{Catalog, position, put_position};
use crate::durable;
use crate::error::{Result, StoreError};
use crate::index::{Item, Merge, Place, Run};
use crate::io::{AlignedBuf, Fs};
use crate::manifest::{BaseMeta, Manifest, PieceMeta};

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

/// Bytes written to the base at once.
const GATHER: usize = 1 << 20;

/// The intent's file name and most bytes: a segment of sector-sized random writes makes a page of
/// each.
pub(super) const INTENT: &str = "retire.intent";
const INTENT_MAX: u64 = 4 << 30;

/// A page that is only partly changed, put together whole.
struct WholePage {
    disk: DiskNo,
    page: u64,
    bytes: AlignedBuf,
}

/// What retiring a piece takes.
struct Prepared {
    run: Arc<Run>,
    behind: Catalog,
    partial: Vec<WholePage>,
    intent: Vec<u8>,
}

impl Group {
    /// Retires the oldest piece of the main line, if `retention` and all readers allow.
    ///
    /// # Errors
    /// [`StoreError::Corrupt`] when a piece to retire is damaged: it stays where it is. As the
    /// volume says.
    pub(super) fn retire_oldest(self: &Arc<Self>, retention: &Retention) -> Result<Worked> {
        if self.lock().retiring.is_some() {
            if retention.keeps_all() {
                return Ok(Worked::Nothing);
            }
            // One that failed halfway, for want of room or for damage: the base holds a part of it
            // already, so it comes before all others, whatever is to be kept by now.
            self.redo_retirement()?;
            self.lock().retiring = None;
            return Ok(Worked::Something);
        }
        let Some((piece, base)) = self.retirable(retention) else { return Ok(Worked::Nothing) };
        let prepared = self.prepare(&piece, &base);
        if prepared.is_err() {
            // Nothing of the base has changed.
            self.lock().retiring = None;
        }
        let Prepared { run, behind, partial, intent } = prepared?;
        let dir = self.dir.join(BASE_DIR);
        if !mutants::is(Mutant::RetireWithoutIntent) {
            let written = durable::replace(&self.shared.volume, &dir, INTENT, &intent);
            if written.is_err() {
                self.lock().retiring = None;
            }
            written?;
        }
        self.apply(&base, &run, &partial)?;
        self.finish_retirement(&base, &piece, behind)?;
        Ok(Worked::Something)
    }

    /// What retiring a piece takes, read and put together; nothing is changed yet.
    fn prepare(&self, piece: &PieceMeta, base: &Base) -> Result<Prepared> {
        let run = self.lock().run_of(piece)?;
        let behind = decode_catalog(&run.catalog()?)?;
        self.open_disks(base, &behind)?;
        let partial = self.partial_pages(base, &run)?;
        let intent = encode_intent(&piece.last, &partial);
        if intent.len() as u64 > INTENT_MAX {
            return Err(StoreError::Invalid("a segment has too many partial pages".into()));
        }
        Ok(Prepared { run, behind, partial, intent })
    }

    /// Goes on opening with a retirement that cannot be finished now: what the base holds of it is
    /// shadowed by the log, and what lies before its end cannot be read until it is.
    pub(super) fn redo_or_remember(self: &Arc<Self>) -> Result<()> {
        let why = match self.redo_retirement() {
            Err(error @ (StoreError::Corrupt(_) | StoreError::Full(_))) => error,
            done => return done,
        };
        let first = {
            let state = self.lock();
            let line = state.manifest.timelines.get(&state.manifest.main);
            line.and_then(|line| line.pieces.first()).map(|piece| piece.last)
        };
        // A damaged intent says nothing about the base, and is no reason to go on.
        match (self.intent_of(), first) {
            (Some(to), Some(first)) if to == first => {
                log::error!("group {}: history that was to be given up stays: {why}", self.id);
                self.lock().retiring = Some(to.seq);
                Ok(())
            }
            _ => Err(why),
        }
    }

    /// Where the retirement leads whose intent is there and sound.
    fn intent_of(&self) -> Option<Position> {
        let path = self.dir.join(BASE_DIR).join(INTENT);
        let bytes = durable::read(&self.shared.volume, &path, INTENT_MAX).ok()?;
        decode_intent(&bytes).map(|(to, _)| to)
    }

    /// Does again what a crash or a failure has interrupted.
    pub(super) fn redo_retirement(self: &Arc<Self>) -> Result<()> {
        let dir = self.dir.join(BASE_DIR);
        let volume = &self.shared.volume;
        if !volume.list(&dir).unwrap_or_default().iter().any(|name| name == INTENT) {
            return Ok(());
        }
        let bytes = durable::read(volume, &dir.join(INTENT), INTENT_MAX)?;
        let (to, partial) = decode_intent(&bytes)
            .ok_or_else(|| StoreError::Corrupt(format!("{INTENT} of group {}", self.id)))?;
        let (piece, base) = {
            let state = self.lock();
            let main = state.manifest.main;
            let first = state
                .manifest
                .timelines
                .get(&main)
                .and_then(|line| line.pieces.first())
                .filter(|piece| piece.last == to)
                .copied();
            (first, state.base.clone())
        };
        // Without the piece it was published already.
        if let (Some(piece), Some(base)) = (piece, base) {
            let run = self.lock().run_of(&piece)?;
            let behind = decode_catalog(&run.catalog()?)?;
            self.open_disks(&base, &behind)?;
            self.apply(&base, &run, &partial)?;
            self.finish_retirement(&base, &piece, behind)?;
        } else {
            let _ = volume.remove(&dir.join(INTENT));
        }
        Ok(())
    }

    /// The piece to retire next. From here on nobody begins to read inside of it: the base changes
    /// under whoever did.
    fn retirable(&self, retention: &Retention) -> Option<(PieceMeta, Arc<Base>)> {
        let mut state = self.lock();
        let base = state.base.clone()?;
        let main = state.manifest.main;
        let piece = *state.manifest.timelines.get(&main)?.pieces.first()?;
        let floor = state.floor(retention);
        if piece.last.seq > floor {
            return None;
        }
        state.retiring = Some(piece.last.seq);
        Some((piece, base))
    }

    fn open_disks(&self, base: &Base, catalog: &Catalog) -> Result<()> {
        for (no, disk) in &catalog.disks {
            if base.disk(*no).is_none() {
                base.add(*no, disk.id, disk.sectors)?;
            }
        }
        Ok(())
    }

    /// Puts together the pages of which `run` covers only a part.
    fn partial_pages(&self, base: &Base, run: &Run) -> Result<Vec<WholePage>> {
        let mut pages: Vec<WholePage> = Vec::new();
        for item in Merge::new([run.iter()])? {
            let (disk, extent, place) = item?;
            let Some(target) = base.disk(disk) else { continue };
            for part in ragged_parts(extent) {
                let page = part.start / PAGE_SECTORS;
                let same = pages.last().is_some_and(|last| last.disk == disk && last.page == page);
                if !same {
                    pages.push(WholePage { disk, page, bytes: target.page(page)? });
                }
                let Some(whole) = pages.last_mut() else { continue };
                let from = byte(part.start % PAGE_SECTORS);
                let to = from + byte(part.sectors);
                let out = whole.bytes.get_mut(from..to).unwrap_or_default();
                let skip = part.start - extent.start;
                self.content(&srn_core::extent::Slice::slice(&place, skip, part.sectors), out)?;
            }
        }
        Ok(pages)
    }

    /// Writes everything that `run` says to the base, and syncs it.
    fn apply(&self, base: &Base, run: &Run, partial: &[WholePage]) -> Result<()> {
        let mut gathered = Gathered { buf: AlignedBuf::zeroed(GATHER), filled: 0, at: None };
        for item in Merge::new([run.iter()])? {
            let (no, extent, place): Item = item?;
            // A disk that was removed meanwhile has no base any more.
            let Some(disk) = base.disk(no) else { continue };
            let Some(whole) = whole_pages(extent) else { continue };
            let skip = whole.start - extent.start;
            let place = srn_core::extent::Slice::slice(&place, skip, whole.sectors);
            if matches!(place, Place::Zero { .. }) {
                gathered.flush()?;
                disk.zero_pages(whole.start / PAGE_SECTORS, whole.sectors / PAGE_SECTORS)?;
            } else {
                let out = gathered.room(&disk, no, whole)?;
                self.content(&place, out)?;
            }
        }
        gathered.flush()?;
        for whole in partial {
            if let Some(disk) = base.disk(whole.disk) {
                disk.put_pages(whole.page, &whole.bytes)?;
            }
        }
        let touched: BTreeMap<DiskNo, Arc<BaseDisk>> = (0..run_disks(run)?)
            .filter_map(|no| Some((DiskNo(no), base.disk(DiskNo(no))?)))
            .collect();
        for disk in touched.values().filter(|_| !mutants::is(Mutant::BaseNotSynced)) {
            disk.sync()?;
        }
        Ok(())
    }

    /// The verified content of a place.
    fn content(&self, place: &Place, out: &mut [u8]) -> Result<()> {
        let Place::Block { segment, .. } = place else {
            out.fill(0);
            return Ok(());
        };
        let content = self.lock().content(*segment)?;
        super::view::read_block(&self.shared.pool, &content, place, out)
    }

    fn finish_retirement(&self, base: &Base, piece: &PieceMeta, behind: Catalog) -> Result<()> {
        let gone: Vec<DiskNo> = {
            let state = self.lock();
            let before = state.manifest.base.as_ref().map(|base| &base.catalog);
            before
                .map(|before| {
                    before
                        .disks
                        .keys()
                        .filter(|no| !behind.disks.contains_key(no))
                        .copied()
                        .collect()
                })
                .unwrap_or_default()
        };
        self.drop_first_piece(piece, Some(BaseMeta { catalog: behind }))?;
        for no in gone {
            base.remove(no);
        }
        let dir = self.dir.join(BASE_DIR);
        // Harmless if it stays: the piece it is about is gone.
        let _ = self.shared.volume.remove(&dir.join(INTENT));
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

/// One more than the highest disk number in a run.
fn run_disks(run: &Run) -> Result<u32> {
    let catalog = decode_catalog(&run.catalog()?)?;
    Ok(catalog.next_disk)
}

/// Pages gathered for one write.
struct Gathered {
    buf: AlignedBuf,
    filled: usize,
    at: Option<(Arc<BaseDisk>, DiskNo, u64)>,
}

impl Gathered {
    /// Room for the content of `extent`, which is made of whole pages.
    fn room(&mut self, disk: &Arc<BaseDisk>, no: DiskNo, extent: Extent) -> Result<&mut [u8]> {
        let first = extent.start / PAGE_SECTORS;
        let len = byte(extent.sectors);
        let follows = self.at.as_ref().is_some_and(|(_, same, start)| {
            *same == no && start + (self.filled / PAGE) as u64 == first
        });
        if !follows || self.filled + len > self.buf.len() {
            self.flush()?;
            self.at = Some((disk.clone(), no, first));
        }
        let from = self.filled;
        self.filled += len;
        self.buf
            .get_mut(from..from + len)
            .ok_or_else(|| StoreError::Corrupt("an index entry is too long".into()))
    }

    fn flush(&mut self) -> Result<()> {
        if let Some((disk, _, first)) = self.at.take() {
            disk.put_pages(first, self.buf.get(..self.filled).unwrap_or_default())?;
        }
        self.filled = 0;
        Ok(())
    }
}

fn byte(sectors: u64) -> usize {
    usize::try_from(sectors * SECTOR).unwrap_or(usize::MAX)
}

/// The whole pages inside an extent.
fn whole_pages(extent: Extent) -> Option<Extent> {
    let start = extent.start.next_multiple_of(PAGE_SECTORS);
    let end = extent.end() / PAGE_SECTORS * PAGE_SECTORS;
    (start < end).then(|| Extent::new(start, end - start))
}

/// The parts of an extent outside its whole pages: at most two, each inside one page.
fn ragged_parts(extent: Extent) -> impl Iterator<Item = Extent> {
    let whole = whole_pages(extent);
    let parts = match whole {
        Some(whole) => [
            Extent::new(extent.start, whole.start - extent.start),
            Extent::new(whole.end(), extent.end() - whole.end()),
        ],
        None => {
            // No whole page inside: it lies in one page or straddles one boundary.
            let boundary = (extent.start + 1).next_multiple_of(PAGE_SECTORS).min(extent.end());
            [
                Extent::new(extent.start, boundary - extent.start),
                Extent::new(boundary, extent.end() - boundary),
            ]
        }
    };
    parts.into_iter().filter(|part| part.sectors > 0)
}

const INTENT_MAGIC: [u8; 4] = *b"SRNi";

fn encode_intent(to: &Position, pages: &[WholePage]) -> Vec<u8> {
    let mut out = Vec::with_capacity(64 + pages.len() * (PAGE + 12));
    out.put(&INTENT_MAGIC);
    out.put_u32(1);
    put_position(&mut out, to);
    out.put_u64(pages.len() as u64);
    for page in pages {
        out.put_u32(page.disk.0);
        out.put_u64(page.page);
        out.put(&page.bytes);
    }
    let hash = blake3::hash(&out);
    out.put(hash.as_bytes());
    out
}

fn decode_intent(bytes: &[u8]) -> Option<(Position, Vec<WholePage>)> {
    let (body, hash) = bytes.split_last_chunk::<32>()?;
    if blake3::hash(body).as_bytes() != hash {
        return None;
    }
    let mut reader = Reader::new(body);
    let mut read = || {
        let magic: [u8; 4] = reader.array()?;
        let version = reader.u32()?;
        let to = position(&mut reader)?;
        let count = reader.u64()?;
        let mut pages = Vec::new();
        let mut in_range = true;
        for _ in 0..count {
            let disk = DiskNo(reader.u32()?);
            let page = reader.u64()?;
            in_range &= page < DISK_SECTORS_MAX / PAGE_SECTORS;
            let mut whole = AlignedBuf::zeroed(PAGE);
            whole.copy_from_slice(reader.take(PAGE)?);
            pages.push(WholePage { disk, page, bytes: whole });
        }
        let sound = magic == INTENT_MAGIC && version == 1 && in_range;
        Ok::<_, Truncated>((sound, to, pages))
    };
    match read() {
        Ok((true, to, pages)) => Some((to, pages)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A page number whose place in bytes is beyond all numbers was multiplied as it was.
    #[test]
    fn an_intent_for_a_page_beyond_any_disk_is_refused() {
        let to = Position {
            epoch: srn_core::ids::EpochId([1; 16]),
            seq: Seq(2),
            hash: srn_core::ids::FrameHash([3; 16]),
        };
        let intent = |page: u64| {
            let bytes = AlignedBuf::zeroed(PAGE);
            encode_intent(&to, &[WholePage { disk: DiskNo(0), page, bytes }])
        };
        let last = DISK_SECTORS_MAX / PAGE_SECTORS - 1;
        assert!(decode_intent(&intent(last)).is_some());
        for page in [last + 1, u64::MAX / PAGE as u64 + 1, u64::MAX] {
            assert!(decode_intent(&intent(page)).is_none(), "page {page}");
        }
    }

    #[test]
    fn intent_bytes_are_pinned() {
        let hex = |bytes: &[u8]| -> String { bytes.iter().map(|b| format!("{b:02x}")).collect() };
        let to = Position {
            epoch: srn_core::ids::EpochId([1; 16]),
            seq: Seq(9),
            hash: srn_core::ids::FrameHash([3; 16]),
        };
        let mut bytes = AlignedBuf::zeroed(PAGE);
        bytes.fill(0x5a);
        let pages = [WholePage { disk: DiskNo(2), page: 0x102, bytes }];
        let intent = encode_intent(&to, &pages);
        let front = "53524e69 01000000 01010101010101010101010101010101 0900000000000000 \
                     03030303030303030303030303030303 0100000000000000 02000000 0201000000000000";
        assert_eq!(hex(&intent[..68]), front.replace(' ', ""));
        assert!(intent[68..68 + PAGE].iter().all(|byte| *byte == 0x5a));
        let hash = "909b8ee3f46304031126b57774ad1f1a70e9a5c6244a4a7dae16654abc6e6a58";
        assert_eq!(hex(&intent[68 + PAGE..]), hash);
        let (found, pages) = decode_intent(&intent).unwrap();
        assert_eq!((found, pages.len()), (to, 1));
        assert_eq!((pages[0].disk, pages[0].page), (DiskNo(2), 0x102));
    }

    #[test]
    fn extents_split_into_whole_pages_and_ragged_ends() {
        let parts = |start, sectors| {
            let extent = Extent::new(start, sectors);
            let ragged: Vec<_> =
                ragged_parts(extent).map(|part| (part.start, part.sectors)).collect();
            (whole_pages(extent).map(|whole| (whole.start, whole.sectors)), ragged)
        };
        assert_eq!(parts(0, 8), (Some((0, 8)), vec![]));
        assert_eq!(parts(3, 2), (None, vec![(3, 2)]));
        assert_eq!(parts(6, 4), (None, vec![(6, 2), (8, 2)]));
        assert_eq!(parts(7, 10), (Some((8, 8)), vec![(7, 1), (16, 1)]));
        assert_eq!(parts(8, 9), (Some((8, 8)), vec![(16, 1)]));
        assert_eq!(parts(1, 7), (None, vec![(1, 7)]));
        assert_eq!(parts(0, 7), (None, vec![(0, 7)]));
    }
}
