//! One slice of a piece: read, verified and put together in memory, then written to the base.

use std::collections::BTreeMap;
use std::sync::Arc;

use srn_core::extent::{Extent, Slice as _};
use srn_core::ids::DiskNo;
use srn_core::limits::{BLOCK_MAX, PAGE, PAGE_SECTORS, SECTOR};
use srn_core::mutants::{self, Mutant};

use super::PageAt;
use super::intent::WholePage;
use crate::base::{Base, BaseDisk, mark_lost};
use crate::error::{Result, StoreError};
use crate::group::Group;
use crate::group::view::read_block;
use crate::index::{Item, Place, Run};
use crate::io::AlignedBuf;

/// Every sector of a page.
const WHOLE: u8 = u8::MAX;

/// What a slice changes in the base.
pub(super) struct Slice {
    /// The pages, in the order of disks and sectors.
    pages: AlignedBuf,
    /// Which sectors of each of them are lost, one bit for each.
    lost: Vec<u8>,
    strokes: Vec<Stroke>,
    /// Which of the pages change only in part: disk, page, and its place among them.
    partial: Vec<(DiskNo, u64, usize)>,
    until: Option<PageAt>,
}

/// Something that is written at once.
enum Stroke {
    /// So many of the pages, from this one on, in the place of those from `first` on.
    Pages { disk: Arc<BaseDisk>, no: DiskNo, first: u64, at: usize, count: usize },
    /// Zeros.
    Zero { disk: Arc<BaseDisk>, no: DiskNo, first: u64, pages: u64 },
}

impl Slice {
    /// Where the next one begins; none: this is the last.
    pub(super) const fn until(&self) -> Option<PageAt> {
        self.until
    }

    /// The pages of which only a part changes.
    pub(super) fn partial(&self) -> impl ExactSizeIterator<Item = WholePage<&[u8]>> {
        self.partial.iter().map(|(disk, page, at)| WholePage {
            disk: *disk,
            page: *page,
            lost: self.lost.get(*at).copied().unwrap_or(0),
            bytes: self.pages.get(at * PAGE..(at + 1) * PAGE).unwrap_or_default(),
        })
    }

    /// Writes it to the base, and syncs it.
    ///
    /// # Errors
    /// As the volume says.
    pub(super) fn write(&self) -> Result<()> {
        let mut touched: BTreeMap<DiskNo, &Arc<BaseDisk>> = BTreeMap::new();
        for stroke in &self.strokes {
            match stroke {
                Stroke::Pages { disk, no, first, at, count } => {
                    let bytes = self.pages.get(at * PAGE..(at + count) * PAGE).unwrap_or_default();
                    let lost = self.lost.get(*at..at + count).unwrap_or_default();
                    disk.put_pages(*first, bytes, lost)?;
                    touched.insert(*no, disk);
                }
                Stroke::Zero { disk, no, first, pages } => {
                    disk.zero_pages(*first, *pages)?;
                    touched.insert(*no, disk);
                }
            }
        }
        for disk in touched.values().filter(|_| !mutants::is(Mutant::BaseNotSynced)) {
            disk.sync()?;
        }
        Ok(())
    }
}

impl Group {
    /// The slice of a piece that begins at `from`: everything in it is verified.
    ///
    /// # Errors
    /// [`StoreError::Corrupt`] when something is damaged that is not to be carried along; as the volume
    /// says.
    pub(super) fn slice(&self, run: &Run, base: &Base, from: PageAt) -> Result<Slice> {
        let (items, until) = self.items_of(run, from)?;
        let most: u64 = items.iter().map(|(_, extent, place)| pages_held(*extent, place)).sum();
        let most = usize::try_from(most).unwrap_or(usize::MAX);
        let mut slice = Building {
            group: self,
            pages: AlignedBuf::zeroed(most * PAGE),
            lost: Vec::new(),
            strokes: Vec::new(),
            partial: Vec::new(),
            open: None,
            content: Box::new([0; BLOCK_MAX]),
            refused: None,
        };
        for (no, extent, place) in items {
            // A disk that was removed meanwhile has no base any more.
            if let Some(disk) = base.disk(no) {
                slice.item(&disk, no, extent, &place)?;
            }
        }
        slice.close()?;
        let Building { pages, lost, strokes, partial, refused, .. } = slice;
        match refused {
            Some(error) => Err(error),
            None => Ok(Slice { pages, lost, strokes, partial, until }),
        }
    }

    /// The entries of a slice, cut to it; and where the next one begins.
    fn items_of(&self, run: &Run, from: PageAt) -> Result<(Vec<Item>, Option<PageAt>)> {
        let mut items: Vec<Item> = Vec::new();
        let mut bytes = 0;
        let mut until = None;
        for item in run.iter_from(from.disk, from.page * PAGE_SECTORS)? {
            let (disk, extent, place) = item?;
            let begin = if disk == from.disk { from.page * PAGE_SECTORS } else { 0 };
            if disk < from.disk || extent.end() <= begin {
                continue;
            }
            if let Some(PageAt { disk: last, page }) = until {
                // There is more. What this slice has of the page in which the next one begins is its.
                items.retain_mut(|(disk, extent, _)| {
                    if *disk == last {
                        let end = extent.end().min(page * PAGE_SECTORS);
                        extent.sectors = end.saturating_sub(extent.start);
                    }
                    extent.sectors > 0
                });
                return Ok((items, until));
            }
            let skip = begin.saturating_sub(extent.start);
            let extent = Extent::new(extent.start + skip, extent.sectors - skip);
            let place = place.slice(skip, extent.sectors);
            bytes += pages_held(extent, &place) * PAGE as u64;
            items.push((disk, extent, place));
            if bytes >= self.options.slice_bytes || items.len() >= self.options.slice_entries {
                let end = PageAt { disk, page: extent.end() / PAGE_SECTORS };
                until = Some(end).filter(|end| *end > from);
            }
        }
        Ok((items, None))
    }
}

/// Pages that an entry has in memory, at most.
fn pages_held(extent: Extent, place: &Place) -> u64 {
    let touched = extent.end().div_ceil(PAGE_SECTORS) - extent.start / PAGE_SECTORS;
    if matches!(place, Place::Zero { .. }) { touched.min(2) } else { touched }
}

struct Building<'a> {
    group: &'a Group,
    pages: AlignedBuf,
    lost: Vec<u8>,
    strokes: Vec<Stroke>,
    partial: Vec<(DiskNo, u64, usize)>,
    open: Option<OpenPage>,
    content: Box<[u8; BLOCK_MAX]>,
    /// Damage that is not to be carried along; all of it is looked for.
    refused: Option<StoreError>,
}

/// The page that is being put together; its place is behind those that are.
struct OpenPage {
    disk: Arc<BaseDisk>,
    no: DiskNo,
    page: u64,
    /// Its sectors that are there, and those of them that are lost, one bit for each.
    covered: u8,
    lost: u8,
}

impl Building<'_> {
    fn item(
        &mut self,
        disk: &Arc<BaseDisk>,
        no: DiskNo,
        extent: Extent,
        place: &Place,
    ) -> Result<()> {
        let is_zero = matches!(place, Place::Zero { .. });
        let mut is_lost = false;
        if let Place::Block { segment, .. } = place {
            let content = self.group.lock().content(*segment)?;
            let out = self.content.get_mut(..byte(extent.sectors));
            let out =
                out.ok_or_else(|| StoreError::Corrupt("an index entry is too long".into()))?;
            match read_block(&self.group.shared.pool, &content, place, out) {
                Err(error @ StoreError::Corrupt(_)) => {
                    is_lost = true;
                    self.damaged(no, extent, error);
                }
                read => read?,
            }
        }
        let mut at = extent.start;
        while at < extent.end() {
            let page = at / PAGE_SECTORS;
            let whole = (extent.end() - at) / PAGE_SECTORS;
            if is_zero && at.is_multiple_of(PAGE_SECTORS) && whole > 0 {
                self.close()?;
                let disk = disk.clone();
                self.strokes.push(Stroke::Zero { disk, no, first: page, pages: whole });
                at += whole * PAGE_SECTORS;
                continue;
            }
            let end = ((page + 1) * PAGE_SECTORS).min(extent.end());
            let same = |open: &OpenPage| open.no == no && open.page == page;
            if !self.open.as_ref().is_some_and(same) {
                self.close()?;
                let disk = disk.clone();
                self.open = Some(OpenPage { disk, no, page, covered: 0, lost: 0 });
            }
            self.part(at, end, if is_zero { None } else { Some(byte(at - extent.start)) }, is_lost);
            at = end;
        }
        Ok(())
    }

    /// Sectors `start` to `end` of the disk, in the open page: from this place of the content, or zeros.
    fn part(&mut self, start: u64, end: u64, from: Option<usize>, is_lost: bool) {
        let Some(open) = &mut self.open else { return };
        let (skip, sectors) = (start % PAGE_SECTORS, end - start);
        let at = self.lost.len() * PAGE + byte(skip);
        let to = self.pages.get_mut(at..at + byte(sectors)).unwrap_or_default();
        match from.and_then(|from| self.content.get(from..from + to.len())) {
            Some(content) => to.copy_from_slice(content),
            None => to.fill(0),
        }
        let bits = u8::try_from(((1u16 << sectors) - 1) << skip).unwrap_or(WHOLE);
        open.covered |= bits;
        if is_lost {
            open.lost |= bits;
        }
    }

    /// The open page is complete but for what the base has.
    fn close(&mut self) -> Result<()> {
        let Some(OpenPage { disk, no, page, covered, mut lost }) = self.open.take() else {
            return Ok(());
        };
        let at = self.lost.len();
        if covered != WHOLE {
            let (before, lost_before) = match disk.page(page)? {
                Some(found) => found,
                None => {
                    let error = StoreError::Corrupt(format!(
                        "sectors {}+{PAGE_SECTORS} of base disk {no} do not have their checksum",
                        page * PAGE_SECTORS
                    ));
                    self.damaged(no, Extent::new(page * PAGE_SECTORS, PAGE_SECTORS), error);
                    (AlignedBuf::zeroed(PAGE), WHOLE)
                }
            };
            let to = self.pages.get_mut(at * PAGE..(at + 1) * PAGE).unwrap_or_default();
            let sector = byte(1);
            let pairs = to.chunks_exact_mut(sector).zip(before.chunks_exact(sector));
            for (number, (to, before)) in pairs.enumerate() {
                if covered & (1 << number) == 0 {
                    to.copy_from_slice(before);
                }
            }
            lost |= lost_before & !covered;
            self.partial.push((no, page, at));
        }
        if let Some(page) = self.pages.get_mut(at * PAGE..(at + 1) * PAGE) {
            mark_lost(page, lost);
        }
        self.lost.push(lost);
        match self.strokes.last_mut() {
            Some(Stroke::Pages { no: same, first, count, .. })
                if *same == no && *first + *count as u64 == page =>
            {
                *count += 1;
            }
            _ => self.strokes.push(Stroke::Pages { disk, no, first: page, at, count: 1 }),
        }
        Ok(())
    }

    fn damaged(&mut self, no: DiskNo, extent: Extent, error: StoreError) {
        if !self.group.meets_damage(no, extent) {
            self.refused.get_or_insert(error);
        }
    }
}

fn byte(sectors: u64) -> usize {
    usize::try_from(sectors * SECTOR).unwrap_or(usize::MAX)
}
