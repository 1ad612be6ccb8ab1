//! The base: each page that has content against its checksum.
//!
//! When the group could be opened this is the base as the daemon would have it: a retirement that a
//! crash has interrupted leaves pages that are half changed, and is done again first, in memory.

use std::ops::ControlFlow;
use std::sync::Arc;

use srn_core::extent::Extent;
use srn_core::ids::DiskNo;
use srn_core::limits::{PAGE, PAGE_SECTORS, SECTOR};

use super::{Damage, Work};
use crate::base::{Base, BaseDisk};
use crate::catalog::Catalog;
use crate::error::{Result, StoreError};
use crate::group::BASE_DIR;

/// Sectors read at once.
const STEP: u64 = (1 << 20) / SECTOR;

/// One disk of the base.
pub(super) struct BaseCheck {
    no: DiskNo,
    file: String,
    sectors: u64,
    disk: Arc<BaseDisk>,
    /// Content to read.
    pub(super) bytes: u64,
}

impl Work<'_> {
    /// The disks of the base that can be read.
    pub(super) fn base_disks(&mut self) -> Result<Vec<BaseCheck>> {
        let Some((base, catalog)) = self.base() else { return Ok(Vec::new()) };
        let mut disks = Vec::new();
        for (no, meta) in &catalog.disks {
            self.report.disks.entry(*no).or_insert_with(|| meta.name.clone());
            if base.disk(*no).is_none() {
                match base.open_disk(*no, meta.id, meta.sectors) {
                    Ok(()) => {}
                    Err(StoreError::Corrupt(text)) => {
                        let mut damage = Damage::of(BASE_DIR, text);
                        damage.sectors.push((*no, Extent::new(0, meta.sectors)));
                        self.damaged(damage);
                    }
                    Err(error) => return Err(error),
                }
            }
            let Some(disk) = base.disk(*no) else { continue };
            disks.push(BaseCheck {
                no: *no,
                file: format!("{BASE_DIR}/{}.raw", meta.id),
                sectors: meta.sectors,
                bytes: disk.content_bytes(meta.sectors)?,
                disk,
            });
        }
        Ok(disks)
    }

    fn base(&self) -> Option<(Arc<Base>, Catalog)> {
        if let Some(group) = &self.opened {
            let state = group.lock();
            let catalog = state.manifest.base.as_ref()?.catalog.clone();
            return Some((state.base.clone()?, catalog));
        }
        let catalog = self.files.manifest.base.as_ref()?.catalog.clone();
        let dir = self.files.dir.join(BASE_DIR);
        Some((Arc::new(Base::new(&self.files.volume, &dir, &self.files.pool)), catalog))
    }

    pub(super) fn check_base(&mut self, disks: &[BaseCheck]) -> Result<ControlFlow<()>> {
        for disk in disks {
            let mut at = 0;
            while at < disk.sectors {
                let rest = Extent::new(at, disk.sectors - at);
                let (spans, _) = disk.disk.spans(rest)?;
                for (span, has_content) in spans {
                    at = span.end();
                    if has_content && self.check_span(disk, span)?.is_break() {
                        return Ok(ControlFlow::Break(()));
                    }
                }
            }
        }
        Ok(ControlFlow::Continue(()))
    }

    fn check_span(&mut self, disk: &BaseCheck, span: Extent) -> Result<ControlFlow<()>> {
        let mut buf = vec![0; usize::try_from(STEP * SECTOR).unwrap_or(PAGE)];
        let mut at = span.start;
        while at < span.end() {
            let part = Extent::new(at, STEP.min(span.end() - at));
            at = part.end();
            if !reads(disk, part, &mut buf)? {
                self.name_pages(disk, part, &mut buf)?;
            }
            self.report.counts.pages += part.sectors.div_ceil(PAGE_SECTORS);
            if self.step(part.bytes()).is_break() {
                return Ok(ControlFlow::Break(()));
            }
        }
        Ok(ControlFlow::Continue(()))
    }

    /// One damage for each stretch of damaged pages.
    fn name_pages(&mut self, disk: &BaseCheck, part: Extent, buf: &mut [u8]) -> Result<()> {
        let mut at = part.start;
        let mut bad: Vec<Extent> = Vec::new();
        while at < part.end() {
            let page = Extent::new(at, PAGE_SECTORS.min(part.end() - at));
            at = page.end();
            if reads(disk, page, buf)? {
                continue;
            }
            match bad.last_mut() {
                Some(last) if last.end() == page.start => last.sectors += page.sectors,
                _ => bad.push(page),
            }
        }
        for extent in bad {
            let pages = extent.sectors.div_ceil(PAGE_SECTORS);
            let words = if pages == 1 { "a page does" } else { "pages do" };
            let text = format!("{words} not have the checksum in the .sum file");
            let mut damage = Damage::of(disk.file.clone(), text).at(extent.start * SECTOR);
            damage.sectors.push((disk.no, extent));
            self.damaged(damage);
        }
        Ok(())
    }
}

fn reads(disk: &BaseCheck, extent: Extent, buf: &mut [u8]) -> Result<bool> {
    let len = usize::try_from(extent.bytes()).unwrap_or(usize::MAX);
    let Some(out) = buf.get_mut(..len) else { return Ok(false) };
    match disk.disk.read(extent, out) {
        Ok(()) => Ok(true),
        Err(StoreError::Corrupt(_)) => Ok(false),
        Err(error) => Err(error),
    }
}
