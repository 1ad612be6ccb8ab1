//! Hashes of a disk's content at one position, to compare two copies by.
//!
//! A grain that reads as zero has no hash but is said to be zero, whether it was written, discarded
//! or never touched: two copies that read alike compare alike. What the index knows to be zero is
//! not read. A grain that cannot be read, because it is damaged, is said to be unreadable; it does
//! not end the comparison.

use srn_core::bytes::is_zero;
use srn_core::extent::Extent;
use srn_core::ids::DiskNo;
use srn_core::limits::SECTOR;

use super::view::{SpanKind, View};
use crate::error::{Result, StoreError};

/// Disk looked at in one question about spans, in sectors: 64 MiB.
const SPAN_SECTORS: u64 = (64 << 20) / SECTOR;

/// The hash of one grain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GrainHash {
    /// It reads as zero.
    Zero,
    /// The first 16 bytes of BLAKE3 of its content.
    Known([u8; 16]),
    /// It is damaged here.
    Unreadable,
}

/// What spans are known of the disk, from where on.
struct Spans<'a> {
    view: &'a View,
    disk: DiskNo,
    end: u64,
    known: Vec<(Extent, SpanKind)>,
}

impl Spans<'_> {
    /// Whether an extent has content. Asked in rising order.
    fn has_content(&mut self, extent: Extent) -> Result<bool> {
        let mut at = extent.start;
        let mut found = false;
        while at < extent.end() && !found {
            let span = self.known.iter().find(|(span, _)| span.start <= at && at < span.end());
            match span {
                Some((span, kind)) => {
                    found = *kind == SpanKind::Data;
                    at = span.end();
                }
                None => {
                    let sectors = SPAN_SECTORS.min(self.end - at);
                    self.known = self.view.spans(self.disk, Extent::new(at, sectors))?;
                    if self.known.first().is_none_or(|(first, _)| first.start != at) {
                        return Err(StoreError::Invalid("a disk told nothing of its spans".into()));
                    }
                }
            }
        }
        // What lies behind is never asked for again.
        let done = self.known.iter().take_while(|(span, _)| span.end() <= extent.start).count();
        self.known.drain(..done);
        Ok(found)
    }
}

impl View {
    /// The hashes of `count` grains of `grain` sectors, from number `first` on. The disk's last one
    /// may be shorter. Ends early, but never empty, once `read_max` bytes of content were read.
    ///
    /// # Errors
    /// [`StoreError::Invalid`] when there is no such disk, or it ends before; as the volume says.
    /// Damage is no error, see [`GrainHash::Unreadable`].
    pub fn hashes(
        &self,
        disk: DiskNo,
        grain: u64,
        first: u64,
        count: u64,
        read_max: u64,
    ) -> Result<Vec<GrainHash>> {
        let sectors = self.catalog().disks.get(&disk).map(|disk| disk.sectors);
        let end = sectors.ok_or_else(|| StoreError::Invalid(format!("there is no disk {disk}")))?;
        let fits = first.checked_add(count).is_some_and(|last| last <= end.div_ceil(grain));
        if count == 0 || !fits {
            return Err(StoreError::Invalid(format!("disk {disk} ends before what was asked for")));
        }
        let mut spans = Spans { view: self, disk, end, known: Vec::new() };
        let mut buf = vec![0; usize::try_from(grain * SECTOR).unwrap_or(0)];
        let mut hashes = Vec::new();
        let mut read = 0;
        for number in first..first + count {
            let start = number * grain;
            let extent = Extent::new(start, grain.min(end - start));
            if !spans.has_content(extent)? {
                hashes.push(GrainHash::Zero);
                continue;
            }
            let content = buf.get_mut(..usize::try_from(extent.bytes()).unwrap_or(0));
            let content = content.unwrap_or_default();
            hashes.push(match self.read(disk, extent, content) {
                Ok(()) if is_zero(content) => GrainHash::Zero,
                Ok(()) => GrainHash::Known(content_hash(content)),
                Err(StoreError::Corrupt(_)) => GrainHash::Unreadable,
                Err(error) => return Err(error),
            });
            read += extent.bytes();
            if read >= read_max {
                break;
            }
        }
        Ok(hashes)
    }
}

/// The hash that content is compared by.
#[must_use]
pub fn content_hash(content: &[u8]) -> [u8; 16] {
    let hash = blake3::hash(content);
    hash.as_bytes().first_chunk().copied().unwrap_or_default()
}
