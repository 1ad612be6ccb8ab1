//! Reading everything that a group holds, to find what is damaged before it is needed.
//!
//! A scrub goes in small steps and holds on to nothing between them but the file that it is in the
//! middle of: what is retired or merged meanwhile is gone, and what is new is looked at next time.
//! It changes nothing.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use srn_core::extent::Extent;
use srn_core::ids::{DiskNo, EpochId, Seq};
use srn_core::limits::{BLOCK_MAX, PAGE, PAGE_SECTORS};

use super::Group;
use super::damage::DamagedPart;
use super::view::{Content, read_block};
use crate::error::{Result, StoreError};
use crate::index::{Entries, Place, Run, RunCheck};
use crate::segment::{Found, Scan, Segment, scan};

/// Bytes looked at in one step.
const STEP_BYTES: u64 = 4 << 20;

/// A scrub under way.
#[derive(Debug)]
pub struct Scrub {
    group: Arc<Group>,
    rest: VecDeque<Part>,
    doing: Option<Doing>,
    total: u64,
}

/// What a step has found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Scrubbed {
    /// How far it has come, in bytes of [`Scrub::total`].
    pub bytes: u64,
    /// What is damaged.
    pub damaged: Vec<DamagedPart>,
}

/// A file to be looked at.
#[derive(Debug, Clone, Copy)]
enum Part {
    /// A log segment, up to a frame that ends at an offset.
    Segment { ordinal: u32, last: Seq, end: u32 },
    /// What an index names in a layer of so many bytes.
    Layer(u32, u64),
    /// An index file.
    Index(u32),
    /// Pages of a base.
    Base { disk: DiskNo, page: u64, end: u64 },
}

/// A file that is looked at in several steps. Held, so that it does not change under it.
#[derive(Debug)]
enum Doing {
    Segment { segment: Arc<Segment>, scan: Box<Scan>, last: Seq, end: u32, at: u64 },
    Index { run: Arc<Run>, check: Box<RunCheck> },
    Layer { entries: Entries<Arc<Run>>, files: Files, rest: u64 },
}

/// The files with a layer's content, by ordinal.
type Files = BTreeMap<u32, Content>;

impl Group {
    /// Begins to read everything that is held now.
    ///
    /// # Errors
    /// As the volume says.
    pub fn scrub(self: &Arc<Self>) -> Result<Scrub> {
        let state = self.lock();
        let mut rest: VecDeque<Part> = VecDeque::new();
        let mut total = 0;
        for (ordinal, segment) in &state.manifest.segments {
            total += u64::from(segment.end);
            let (last, end) = (segment.last.seq, segment.end);
            rest.push_back(Part::Segment { ordinal: *ordinal, last, end });
        }
        for open in state.lines.values().flat_map(|line| &line.unsealed) {
            if !open.is_empty() {
                total += u64::from(open.end);
                let ordinal = open.segment.ordinal;
                rest.push_back(Part::Segment { ordinal, last: open.last.seq, end: open.end });
            }
        }
        for (ordinal, layer) in &state.manifest.layers {
            total += layer.bytes();
            rest.push_back(Part::Layer(*ordinal, layer.bytes()));
        }
        let runs: Vec<Arc<Run>> = state.runs.values().cloned().collect();
        let base = state.manifest.base.as_ref().map(|base| base.catalog.disks.clone());
        drop(state);
        for run in runs {
            total += run.len()?;
            rest.push_back(Part::Index(run.meta().file));
        }
        for (no, disk) in base.unwrap_or_default() {
            let end = disk.sectors.div_ceil(PAGE_SECTORS);
            total += end * PAGE as u64;
            rest.push_back(Part::Base { disk: no, page: 0, end });
        }
        Ok(Scrub { group: self.clone(), rest, doing: None, total })
    }

    fn segment_now(&self, ordinal: u32) -> Option<Arc<Segment>> {
        let state = self.lock();
        let open = || {
            let mut open = state.lines.values().flat_map(|line| &line.unsealed);
            open.find(|open| open.segment.ordinal == ordinal).map(|open| open.segment.clone())
        };
        state.segments.get(&ordinal).cloned().or_else(open)
    }

    /// The sectors whose content lies in these frames, as far as an index can tell, at most `most`
    /// extents.
    ///
    /// # Errors
    /// When no index can be read.
    pub fn sectors_in(
        &self,
        epoch: EpochId,
        first: Seq,
        last: Seq,
        most: usize,
    ) -> Result<Vec<(DiskNo, Extent)>> {
        let Some(sealed) = self.sealed(epoch, first, last) else { return Ok(Vec::new()) };
        let only = (sealed.ordinal, sealed.ordinal);
        let run = {
            let state = self.lock();
            let own = state.runs.values().filter(|run| run.meta().pieces == only);
            own.max_by_key(|run| run.meta().last).cloned()
        };
        let Some(run) = run else { return Ok(Vec::new()) };
        let points = run.points()?;
        // To the precision of the places that are known: never less than what is damaged.
        let from = points.iter().rev().find(|point| point.seq <= first);
        let from = from.map_or(0, |point| point.offset);
        let to =
            points.iter().find(|point| point.seq > last).map_or(u32::MAX, |point| point.offset);
        let mut found = Vec::new();
        for item in run.iter() {
            let (disk, extent, place) = item?;
            if let Place::Block { offset, .. } = place
                && (from..to).contains(&offset)
            {
                found.push((disk, extent));
                if found.len() == most {
                    break;
                }
            }
        }
        Ok(found)
    }
}

impl Scrub {
    /// Bytes that it goes through.
    #[must_use]
    pub const fn total(&self) -> u64 {
        self.total
    }

    /// Looks at the next few megabytes; none when it is through.
    ///
    /// # Errors
    /// As the volume says. Damage is no error.
    pub fn step(&mut self) -> Result<Option<Scrubbed>> {
        let mut done = Scrubbed::default();
        if let Some(doing) = self.doing.take() {
            self.go_on(doing, &mut done)?;
            return Ok(Some(done));
        }
        match self.rest.pop_front() {
            None => return Ok(None),
            Some(Part::Segment { ordinal, last, end }) => {
                let Some(segment) = self.group.segment_now(ordinal) else {
                    done.bytes = u64::from(end);
                    return Ok(Some(done));
                };
                let scan = Box::new(scan(&segment.target(), &self.group.shared.pool)?);
                self.go_on(Doing::Segment { segment, scan, last, end, at: 0 }, &mut done)?;
            }
            Some(Part::Layer(ordinal, bytes)) => match self.layer_now(ordinal)? {
                Some((run, files)) => {
                    let entries = Run::into_iter(run);
                    self.go_on(Doing::Layer { entries, files, rest: bytes }, &mut done)?;
                }
                None => done.bytes = bytes,
            },
            Some(Part::Index(file)) => {
                let run = self.group.lock().runs.get(&file).cloned();
                if let Some(run) = run {
                    let check = Box::new(run.begin_check());
                    self.go_on(Doing::Index { run, check }, &mut done)?;
                }
            }
            Some(Part::Base { disk, page, end }) => self.base(disk, page, end, &mut done)?,
        }
        Ok(Some(done))
    }

    fn go_on(&mut self, doing: Doing, done: &mut Scrubbed) -> Result<()> {
        match doing {
            Doing::Segment { segment, mut scan, last, end, at } => {
                let now = loop {
                    let now = match scan.next_or_gap(last, u64::from(end))? {
                        Found::End => {
                            done.bytes += u64::from(end).saturating_sub(at);
                            return Ok(());
                        }
                        Found::Frame(offset, frame) => offset + frame.envelope().disk_len() as u64,
                        Found::Gap { from, to, end, .. } => {
                            let epoch = segment.header.epoch;
                            done.damaged.push(DamagedPart::Frames { epoch, first: from, last: to });
                            end
                        }
                    };
                    if now - at >= STEP_BYTES {
                        break now;
                    }
                };
                done.bytes += now - at;
                self.doing = Some(Doing::Segment { segment, scan, last, end, at: now });
            }
            Doing::Layer { mut entries, files, rest } => {
                let mut read = 0;
                let mut content = vec![0; BLOCK_MAX];
                for item in entries.by_ref() {
                    // The index has a scrub of its own, which says so.
                    let Ok((disk, extent, place)) = item else { break };
                    let Place::Block { segment: file, stored_len, .. } = place else { continue };
                    read += u64::from(stored_len);
                    let from = files.get(&file);
                    let out = usize::try_from(extent.bytes()).ok();
                    let out = out.and_then(|len| content.get_mut(..len)).unwrap_or_default();
                    let pool = &self.group.shared.pool;
                    match from.map(|from| read_block(pool, from, &place, out)) {
                        Some(Ok(())) => {}
                        None | Some(Err(StoreError::Corrupt(_))) => {
                            done.damaged.push(DamagedPart::Layer { file, disk, extent });
                        }
                        Some(Err(error)) => return Err(error),
                    }
                    if read >= STEP_BYTES {
                        done.bytes += read.min(rest);
                        let rest = rest - read.min(rest);
                        self.doing = Some(Doing::Layer { entries, files, rest });
                        return Ok(());
                    }
                }
                done.bytes += rest;
            }
            Doing::Index { run, mut check } => {
                let (sound, read) =
                    check.step(&run, usize::try_from(STEP_BYTES).unwrap_or(PAGE))?;
                done.bytes += read;
                match sound {
                    None => self.doing = Some(Doing::Index { run, check }),
                    Some(true) => {}
                    Some(false) => {
                        done.damaged.push(DamagedPart::Index { file: run.meta().file });
                    }
                }
            }
        }
        Ok(())
    }

    /// A layer's index and its files, if it is there still.
    fn layer_now(&self, ordinal: u32) -> Result<Option<(Arc<Run>, Files)>> {
        let state = self.group.lock();
        let Some(layer) = state.manifest.layers.get(&ordinal) else { return Ok(None) };
        let mut files = Files::new();
        for file in &layer.files {
            files.insert(file.ordinal, state.content(file.ordinal)?);
        }
        let mut runs = state.runs.values();
        let run = runs.find(|run| run.meta().pieces == (ordinal, ordinal));
        Ok(run.map(|run| (run.clone(), files)))
    }

    fn base(&mut self, no: DiskNo, page: u64, end: u64, done: &mut Scrubbed) -> Result<()> {
        // Many pages at once while there is nothing to read: most disks are mostly empty.
        let mut at = page;
        let mut read = 0;
        let disk = self.group.lock().base.as_ref().and_then(|base| base.disk(no));
        let Some(disk) = disk else {
            done.bytes += (end - page) * PAGE as u64;
            return Ok(());
        };
        while at < end && read < STEP_BYTES && at - page < 64 * STEP_BYTES / PAGE as u64 {
            let pages = (STEP_BYTES / PAGE as u64).min(end - at);
            let (bad, bytes) = disk.check(at, pages)?;
            for same in bad.chunk_by(|a, b| a + 1 == *b) {
                let (Some(first), count) = (same.first(), same.len() as u64) else { continue };
                let extent = Extent::new(first * PAGE_SECTORS, count * PAGE_SECTORS);
                done.damaged.push(DamagedPart::Base { disk: no, extent });
            }
            read += bytes;
            at += pages;
        }
        done.bytes += (at - page) * PAGE as u64;
        if at < end {
            self.rest.push_front(Part::Base { disk: no, page: at, end });
        }
        Ok(())
    }
}
