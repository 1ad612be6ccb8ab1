//! Putting right what is damaged, from content that somebody else has and that is proven to be the
//! same.
//!
//! * A page of the base is written in place. It is damaged before and, if a crash tears the write,
//!   damaged after; it is never anything else that looks sound. What proves new content is the
//!   page's own checksum, or the position: the page as it was at exactly a position at which the base
//!   alone answers for it here.
//! * A segment is never changed. A whole new one is written beside it, from the frames that are good
//!   and those that were fetched, which the chain of hashes proves; then one manifest takes the new
//!   one and its index in the place of the old ones. Whoever still reads the old one goes on.
//! * A layer is not changed either. A block is written to one more file of it, and its index anew with
//!   the block there. What proves the content is the checksum in the index, whoever has it.
//! * An index file is made again from the frames.

mod layer;

use std::collections::BTreeMap;
use std::sync::Arc;

use srn_core::epoch::Position;
use srn_core::extent::Extent;
use srn_core::ids::{DiskNo, EpochId, Seq};
use srn_core::limits::{PAGE, PAGE_SECTORS, SECTOR};

use super::{Group, View};
use crate::base::BaseDisk;
use crate::codec::Codecs;
use crate::error::{Doing, Result, StoreError};
use crate::frame::Frame;
use crate::index::{MemTable, Run, RunMeta, RunScope, span};
use crate::io::AlignedBuf;
use crate::manifest::{Keep, Manifest, SegmentMeta};
use crate::segment::{Found, HEADER_LEN, SEGMENT_BYTES_MAX, Segment, SegmentHeader, SegmentWriter};
use crate::segment::{Target, scan};

pub use layer::LayerBlock;

/// Bytes of frames written at once.
const BATCH_BYTES: usize = 1 << 20;

/// What became of an attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Repaired {
    /// It is sound again.
    Yes,
    /// It was sound, or is not there any more.
    NotNeeded,
    /// The content offered is not what was there.
    NotTheSame,
    /// Not now: it is still being written.
    Later,
}

impl Group {
    /// The oldest position that can be read, at which the base answers for all that is damaged in it;
    /// none without a base.
    #[must_use]
    pub fn base_position(&self) -> Option<Position> {
        self.lock().oldest_point().map(|oldest| oldest.at)
    }

    /// Whether a page of the base is damaged now.
    ///
    /// # Errors
    /// As the volume says.
    pub fn is_page_damaged(&self, disk: DiskNo, page: u64) -> Result<bool> {
        match self.base_disk(disk) {
            Some(disk) => Ok(!disk.check(page, 1)?.0.is_empty()),
            None => Ok(false),
        }
    }

    fn base_disk(&self, disk: DiskNo) -> Option<Arc<BaseDisk>> {
        self.lock().base.as_ref().and_then(|base| base.disk(disk))
    }

    /// Puts pages of the base right, from page `first` on. `content` is what somebody else has there, and
    /// was read `at` this position; of a disk's last page it may be a part. Gives what became of each.
    ///
    /// # Errors
    /// As the volume says.
    pub fn repair_pages(
        self: &Arc<Self>,
        disk: DiskNo,
        first: u64,
        content: &[u8],
        at: Position,
    ) -> Result<Vec<Repaired>> {
        // Held from before the lock: what lies at or before it and is not in the base then is seen.
        let view = match self.view_at(at.seq) {
            Ok(view) => Some(view).filter(|view| view.catalog().at == at),
            Err(StoreError::NotInHistory(_) | StoreError::Corrupt(_)) => None,
            Err(error) => return Err(error),
        };
        // Nothing is retired meanwhile.
        let _alone = self.maintaining.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let Some(base) = self.base_disk(disk) else { return Ok(vec![Repaired::NotNeeded]) };
        let mut done = Vec::new();
        for (page, content) in (first..).zip(content.chunks(PAGE)) {
            done.push(repair_page(&base, view.as_ref(), (disk, page), content)?);
        }
        if done.contains(&Repaired::Yes) {
            base.sync()?;
        }
        Ok(done)
    }

    /// The frames that are damaged in the segment that holds these: what to ask for.
    ///
    /// # Errors
    /// As the volume says.
    pub fn missing_frames(&self, epoch: EpochId, first: Seq, last: Seq) -> Result<Missing> {
        let Some(old) = self.sealed(epoch, first, last) else { return Ok(Missing::Later) };
        let mut frames = scan(&old.target(), &self.shared.pool)?;
        let mut missing = Vec::new();
        loop {
            match frames.next_or_gap(old.meta.last.seq, u64::from(old.meta.end))? {
                Found::End => break,
                Found::Frame(..) => {}
                Found::Gap { from, to, .. } => {
                    let mut seq = from;
                    while seq <= to {
                        missing.push(seq);
                        seq = seq.next();
                    }
                }
            }
        }
        Ok(if missing.is_empty() { Missing::Nothing } else { Missing::Frames(missing) })
    }

    pub(super) fn sealed(&self, epoch: EpochId, first: Seq, last: Seq) -> Option<Sealed> {
        let state = self.lock();
        let mut all = state.manifest.segments.iter();
        let (ordinal, meta) = all.find(|(_, meta)| {
            meta.epoch == epoch && meta.first <= first && last <= meta.last.seq
        })?;
        let segment = state.segments.get(ordinal)?.clone();
        Some(Sealed { ordinal: *ordinal, meta: *meta, segment })
    }

    /// Writes the segment that holds frame `of` anew, with these frames in the place of damaged
    /// ones, and its index.
    ///
    /// # Errors
    /// [`StoreError::Full`] when there is no room; as the volume says. Then nothing has changed.
    pub fn repair_segment(
        &self,
        epoch: EpochId,
        of: Seq,
        fetched: &BTreeMap<Seq, Arc<Frame>>,
    ) -> Result<Repaired> {
        let _alone = self.maintaining.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let Some(old) = self.sealed(epoch, of, of) else { return Ok(Repaired::Later) };
        let Some(len) = self.measure(&old, fetched)? else { return Ok(Repaired::NotTheSame) };
        let new = self.copy_segment(&old, fetched, len)?;
        let mut runs = Vec::new();
        for run in self.runs_of(&old) {
            // The marks and disks in it are the same; only the places are others.
            let table = self.table_of(&new, &run)?;
            runs.push(self.write_run(
                table.entries().map(Ok),
                &RunScope {
                    group: self.id,
                    level: run.meta().level,
                    first: run.meta().first,
                    last: run.last(),
                    pieces: (new.segment.ordinal, new.segment.ordinal),
                    points: table.points(),
                    marks: &run.marks()?,
                    catalog: &run.catalog()?,
                },
            )?);
        }
        self.exchange(&old, new, runs)?;
        Ok(Repaired::Yes)
    }

    /// The length that the new segment needs; none when the frames do not make a whole.
    fn measure(&self, old: &Sealed, fetched: &BTreeMap<Seq, Arc<Frame>>) -> Result<Option<u64>> {
        let mut len = HEADER_LEN;
        let mut at = (old.meta.first.prev(), old.meta.prev);
        let mut codecs = Codecs::new();
        let mut whole = true;
        self.each_frame(old, fetched, |frame| {
            let header = frame.header();
            whole &= header.seq == at.0.next()
                && header.prev == at.1
                && header.epoch == old.meta.epoch
                && header.group == self.id
                && frame.verify(&mut codecs).is_ok();
            at = (header.seq, frame.position().hash);
            len += frame.envelope().disk_len() as u64;
            Ok(())
        })?;
        let is_same = whole && at == (old.meta.last.seq, old.meta.last.hash);
        Ok((is_same && len <= SEGMENT_BYTES_MAX).then_some(len))
    }

    /// Every frame of the segment in order; damaged ones as they were fetched, if they were.
    fn each_frame(
        &self,
        old: &Sealed,
        fetched: &BTreeMap<Seq, Arc<Frame>>,
        mut each: impl FnMut(&Arc<Frame>) -> Result<()>,
    ) -> Result<()> {
        let mut frames = scan(&old.target(), &self.shared.pool)?;
        loop {
            match frames.next_or_gap(old.meta.last.seq, u64::from(old.meta.end))? {
                Found::End => return Ok(()),
                Found::Frame(_, frame) => each(&frame)?,
                Found::Gap { from, to, .. } => {
                    fetched.range(from..=to).try_for_each(|(_, frame)| each(frame))?;
                }
            }
        }
    }

    /// Writes the frames to a fresh segment, durably.
    fn copy_segment(
        &self,
        old: &Sealed,
        fetched: &BTreeMap<Seq, Arc<Frame>>,
        len: u64,
    ) -> Result<New> {
        let (slot, file) = self.take_slot(true)?;
        let header = SegmentHeader { id: (self.shared.entropy)(), ..old.segment.header };
        let ordinal = self.lock().next_ordinal();
        let free = self.free.clone();
        // From here on its file goes back to the free ones by itself when this fails.
        let segment = Arc::new(Segment { ordinal, slot, header, file: file.clone(), free });
        {
            if file.size().doing(|| "sizing a log segment".to_owned())? < len {
                file.allocate(len).doing(|| "sizing a log segment".to_owned())?;
                file.sync().doing(|| "sizing a log segment".to_owned())?;
            }
            let size = file.size().doing(|| "sizing a log segment".to_owned())?;
            let mut writer = SegmentWriter::begin(segment.clone(), size, self.shared.pool.clone())?;
            let mut batch: Vec<Arc<Frame>> = Vec::new();
            let mut durable = old.meta.first.prev();
            let mut bytes = 0;
            self.each_frame(old, fetched, |frame| {
                batch.push(frame.clone());
                bytes += frame.memory();
                if bytes >= BATCH_BYTES {
                    writer.append(&batch, durable)?;
                    durable = frame.header().seq;
                    batch.clear();
                    bytes = 0;
                }
                Ok(())
            })?;
            if !batch.is_empty() {
                writer.append(&batch, durable)?;
            }
            let end = u32::try_from(writer.offset()).unwrap_or(u32::MAX);
            let meta = SegmentMeta { slot, id: header.id, end, ..old.meta };
            Ok(New { meta, segment })
        }
    }

    /// The index files of exactly this segment.
    fn runs_of(&self, old: &Sealed) -> Vec<Arc<Run>> {
        let state = self.lock();
        let only = (old.ordinal, old.ordinal);
        state.runs.values().filter(|run| run.meta().pieces == only).cloned().collect()
    }

    /// An index like `old`, of the same frames in their new places.
    fn table_of(&self, new: &New, old: &Run) -> Result<MemTable> {
        let (last, points) = (old.last().seq, old.points()?);
        let mut table = MemTable::default();
        let mut frames = scan(&new.segment.target(), &self.shared.pool)?;
        let mut at = new.meta.first.prev();
        while at < last {
            let Some((offset, frame)) = frames.next(false)? else {
                return Err(StoreError::Corrupt("a segment that was just written".into()));
            };
            at = frame.header().seq;
            let behind = points.partition_point(|point| point.seq <= at);
            let standing = behind.checked_sub(1).and_then(|before| points.get(before));
            let standing = standing.ok_or_else(|| {
                StoreError::Corrupt(format!("index file {} has no places", old.meta().file))
            })?;
            let offset = u32::try_from(offset).unwrap_or(u32::MAX);
            let entries = self.keep == Keep::Replica;
            table
                .add(&frame, new.segment.ordinal, offset, entries, standing.standing)
                .map_err(|error| StoreError::Corrupt(format!("indexing a frame: {error}")))?;
        }
        Ok(table)
    }

    /// Takes the new segment and its index in the place of the old ones.
    fn exchange(&self, old: &Sealed, new: New, runs: Vec<(RunMeta, Arc<Run>)>) -> Result<()> {
        let (gone, ordinal) = (old.ordinal, new.segment.ordinal);
        self.publish_with(
            |manifest| {
                forget_runs_of(manifest, gone);
                manifest.segments.remove(&gone);
                manifest.segments.insert(ordinal, new.meta);
                let pieces = manifest.timelines.values_mut().flat_map(|line| &mut line.pieces);
                pieces.filter(|piece| piece.ordinal == gone).for_each(|piece| {
                    piece.ordinal = ordinal;
                });
                manifest.runs.extend(runs.iter().map(|(meta, _)| (meta.file, *meta)));
            },
            |state| {
                state.segments.insert(ordinal, new.segment.clone());
                state.runs.extend(runs.iter().map(|(meta, run)| (meta.file, run.clone())));
            },
        )?;
        self.forget_unlisted();
        Ok(())
    }

    /// Makes a damaged index file again, from the frames or, if it was merged, by leaving that to
    /// maintenance.
    ///
    /// # Errors
    /// [`StoreError::Corrupt`] when frames are damaged too; as the volume says.
    pub fn repair_index(self: &Arc<Self>, file: u32) -> Result<Repaired> {
        let _alone = self.maintaining.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let (run, old, behind) = {
            let state = self.lock();
            let Some(run) = state.runs.get(&file).cloned() else { return Ok(Repaired::NotNeeded) };
            let meta = *run.meta();
            let of_one = meta.pieces.0 == meta.pieces.1;
            let piece = state.manifest.timelines.iter().find_map(|(line, timeline)| {
                let mut pieces = timeline.pieces.iter();
                let piece = pieces
                    .find(|piece| piece.ordinal == meta.pieces.0 && piece.last == run.last())?;
                Some((*line, piece.ordinal))
            });
            match piece.filter(|_| of_one) {
                None => (run, None, None),
                Some((line, ordinal)) => {
                    let segment = state.segments.get(&ordinal).cloned();
                    let before = meta.first.prev();
                    let behind = state.snapshot(line, before).ok().map(|(_, behind, _)| behind);
                    (run, segment, behind)
                }
            }
        };
        let (Some(segment), Some(behind)) = (old, behind) else {
            if run.meta().pieces.0 == run.meta().pieces.1 {
                return Ok(Repaired::NotTheSame);
            }
            self.publish(|manifest| {
                manifest.runs.remove(&file);
            })?;
            self.forget_unlisted();
            return Ok(Repaired::Yes);
        };
        let mut catalog = behind.catalog()?;
        let table = self.table_up_to(&segment, run.last().seq, &mut catalog)?;
        let (meta, new) = self.write_run(
            table.entries().filter(|_| self.keep == Keep::Replica).map(Ok),
            &RunScope {
                group: self.id,
                level: run.meta().level,
                first: run.meta().first,
                last: run.last(),
                pieces: run.meta().pieces,
                points: table.points(),
                marks: table.marks(),
                catalog: &catalog.encode(),
            },
        )?;
        self.publish_with(
            |manifest| {
                manifest.runs.remove(&file);
                manifest.runs.insert(meta.file, meta);
            },
            |state| {
                state.runs.insert(meta.file, new);
            },
        )?;
        self.forget_unlisted();
        Ok(Repaired::Yes)
    }
}

/// Takes every run out that names places in this piece: merged ones are merged anew.
fn forget_runs_of(manifest: &mut Manifest, piece: u32) {
    let lines: Vec<_> = manifest.timelines.values().collect();
    manifest.runs.retain(|_, run| {
        !lines.iter().any(|line| {
            let pieces = span(run, &line.pieces).and_then(|at| line.pieces.get(at));
            pieces.is_some_and(|some| some.iter().any(|other| other.ordinal == piece))
        })
    });
}

fn repair_page(
    base: &BaseDisk,
    view: Option<&View>,
    (disk, page): (DiskNo, u64),
    content: &[u8],
) -> Result<Repaired> {
    let mut whole = AlignedBuf::zeroed(PAGE);
    if let Some(to) = whole.get_mut(..content.len()) {
        to.copy_from_slice(content);
    }
    let fits = match base.page(page)? {
        Some((_, 0)) => return Ok(Repaired::NotNeeded),
        // What is not lost of it is known.
        Some((found, lost)) => {
            let sectors =
                found.chunks_exact(SECTOR as usize).zip(whole.chunks_exact(SECTOR as usize));
            sectors.enumerate().all(|(at, (found, new))| lost & (1 << at) != 0 || found == new)
        }
        None => true,
    };
    let proven = base.has_sum_of(page, &whole)?
        || fits && view.is_some_and(|view| answers_alone(view, disk, page));
    if !proven {
        return Ok(Repaired::NotTheSame);
    }
    base.put_pages(page, &whole, &[0])?;
    Ok(Repaired::Yes)
}

/// Whether the base alone answers for a page at the position of a view.
fn answers_alone(view: &View, disk: DiskNo, page: u64) -> bool {
    let catalog = view.catalog();
    let Some(sectors) = catalog.disks.get(&disk).map(|disk| disk.sectors) else { return false };
    let whole = Extent::new(page * PAGE_SECTORS, PAGE_SECTORS);
    let Some(extent) = whole.intersect(&Extent::new(0, sectors)) else { return false };
    matches!(view.is_from_base(disk, extent), Ok(true))
}

/// What is missing of a segment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Missing {
    /// All is there.
    Nothing,
    /// These frames.
    Frames(Vec<Seq>),
    /// It is not sealed yet.
    Later,
}

pub(super) struct Sealed {
    pub(super) ordinal: u32,
    meta: SegmentMeta,
    segment: Arc<Segment>,
}

impl Sealed {
    fn target(&self) -> Target {
        self.segment.target()
    }
}

struct New {
    meta: SegmentMeta,
    segment: Arc<Segment>,
}

/// The pages of an extent.
pub fn pages_of(extent: Extent) -> impl Iterator<Item = u64> {
    extent.start / PAGE_SECTORS..extent.end().div_ceil(PAGE_SECTORS)
}
