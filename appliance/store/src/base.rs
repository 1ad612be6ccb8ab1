//! The base: for each disk one sparse raw file with its content at the oldest position that is
//! still needed, and beside it one checksum for every 4 KiB page.
//!
//! A page whose checksum is zero was never written, or was zeroed: it reads as zero and the raw
//! file has a hole there. The base is changed only by retirement, which shadows every page it
//! changes with the log until the change is durable; what a reader takes from here is therefore
//! never in motion, but for pages that share sectors with one in motion, hence the lock.
//!
//! Content that was damaged where it came from is *lost* here, sector by sector: it is marked, reads
//! of it fail, and no checksum of the page's own says what would be right.

use std::collections::BTreeMap;
use std::io::IoSlice;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use srn_core::bytes::{content_sum, is_zero};
use srn_core::extent::Extent;
use srn_core::ids::{DiskId, DiskNo};
use srn_core::limits::{PAGE, PAGE_SECTORS, SECTOR};
use srn_core::mutants::{self, Mutant};

use crate::error::{Doing, Result, StoreError};
use crate::io::{Access, AlignedBuf, BufPool, File, Fs, Volume};

/// Bytes of a page's checksum.
const SUM_LEN: u64 = 8;

/// What a lost sector holds. It means nothing in a page with an ordinary checksum.
const LOST_SECTOR: [u8; SECTOR as usize] = {
    let (mut sector, words) = ([0; SECTOR as usize], b"SRN lost sector\n");
    let mut at = 0;
    while at < sector.len() {
        sector[at] = words[at % words.len()];
        at += 1;
    }
    sector
};

/// Pages looked at in one answer about spans: 256 MiB of disk.
const SPAN_PAGES_MAX: u64 = 64 * 1024;

/// The base of one group.
#[derive(Debug)]
pub(crate) struct Base {
    volume: Volume,
    dir: PathBuf,
    pool: BufPool,
    disks: Mutex<BTreeMap<DiskNo, Arc<BaseDisk>>>,
}

/// The base of one disk.
#[derive(Debug)]
pub(crate) struct BaseDisk {
    id: DiskId,
    raw: Arc<dyn File>,
    sums: Arc<dyn File>,
    /// Held for reading while pages and their checksums are read, for writing while they change.
    moving: RwLock<()>,
    pool: BufPool,
}

fn raw_name(id: DiskId) -> String {
    format!("{id}.raw")
}

fn sums_name(id: DiskId) -> String {
    format!("{id}.sum")
}

/// The sectors of page `number` that lie in an extent, one bit for each.
fn sectors_of(number: u64, extent: Extent) -> u8 {
    let page = Extent::new(number * PAGE_SECTORS, PAGE_SECTORS);
    let Some(part) = page.intersect(&extent) else { return 0 };
    let bits = (1u16 << part.sectors) - 1;
    u8::try_from(bits << (part.start - page.start)).unwrap_or(u8::MAX)
}

/// What a page's checksum says in the file: zero is kept for pages that read as zero.
fn page_sum(page: &[u8]) -> u64 {
    content_sum(page).max(1)
}

/// What the checksum file says of a page in which sectors are lost: no ordinary checksum of it.
fn sum_with_lost(page: &[u8]) -> u64 {
    (!page_sum(page)).max(1)
}

/// Puts the marks of lost sectors in place; bit *n* of `lost` is the page's sector *n*.
pub(crate) fn mark_lost(page: &mut [u8], lost: u8) {
    for (number, sector) in page.chunks_exact_mut(LOST_SECTOR.len()).enumerate() {
        if lost & (1 << number) != 0 {
            sector.copy_from_slice(&LOST_SECTOR);
        }
    }
}

/// The sectors that are lost of a page that is as it was put, one bit for each; none when it is
/// damaged. A page whose every sector is lost is no damage: it says of itself what it lacks.
fn lost_in(page: &[u8], sum: u64) -> Option<u8> {
    if is_sound(page, sum) {
        return Some(0);
    }
    let marked = sum != 0 && sum_with_lost(page) == sum;
    marked.then(|| {
        let sectors = page.chunks_exact(LOST_SECTOR.len()).enumerate();
        sectors.filter(|(_, sector)| **sector == LOST_SECTOR).fold(0, |all, (n, _)| all | (1 << n))
    })
}

/// Whether a page is what its checksum says. One without a checksum has to be a hole: a checksum
/// file that was zeroed must not turn content into zeros.
fn is_sound(page: &[u8], sum: u64) -> bool {
    if sum == 0 { is_zero(page) } else { page_sum(page) == sum }
}

impl Base {
    /// The base in `dir`; its disks are opened by [`Base::add`].
    #[must_use]
    pub(crate) fn new(volume: &Volume, dir: &Path, pool: &BufPool) -> Self {
        Self {
            volume: volume.clone(),
            dir: dir.into(),
            pool: pool.clone(),
            disks: Mutex::new(BTreeMap::new()),
        }
    }

    /// Opens the files of a disk that the manifest says is in the base.
    ///
    /// # Errors
    /// [`StoreError::Corrupt`] when they are not there or too short: what is missing would read as
    /// zeros. As the volume says.
    pub(crate) fn open_disk(&self, no: DiskNo, id: DiskId, sectors: u64) -> Result<()> {
        self.insert(no, id, sectors, |name, len, access| {
            let doing = || format!("opening base file {name}");
            let file = match self.volume.open(&self.dir.join(name), access) {
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                    return Err(StoreError::Corrupt(format!("base file {name} is missing")));
                }
                other => other.doing(doing)?,
            };
            let found = file.size().doing(doing)?;
            if found < len {
                return Err(StoreError::Corrupt(format!(
                    "base file {name} has {found} bytes instead of {len}"
                )));
            }
            Ok(file)
        })
    }

    /// Opens a disk's files for a base that will hold it, or makes them, durably, with room for
    /// `sectors`.
    ///
    /// # Errors
    /// As the volume says.
    pub(crate) fn add(&self, no: DiskNo, id: DiskId, sectors: u64) -> Result<()> {
        self.insert(no, id, sectors, |name, len, access| {
            let path = self.dir.join(name);
            let doing = || format!("opening base file {name}");
            let file = match self.volume.open(&path, access) {
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                    let file = self.volume.create(&path, access).doing(doing)?;
                    self.volume.sync_dir(&self.dir).doing(doing)?;
                    file
                }
                other => other.doing(doing)?,
            };
            // Never shortened here: until the manifest says so, the rest still counts.
            if file.size().doing(doing)? < len {
                file.set_len(len).doing(doing)?;
                file.sync().doing(doing)?;
            }
            Ok(file)
        })
    }

    fn insert(
        &self,
        no: DiskNo,
        id: DiskId,
        sectors: u64,
        file: impl Fn(&str, u64, Access) -> Result<Arc<dyn File>>,
    ) -> Result<()> {
        let pages = sectors.div_ceil(PAGE_SECTORS);
        let disk = BaseDisk {
            id,
            raw: file(&raw_name(id), pages * PAGE as u64, Access::Direct)?,
            // Eight bytes at a time: the page cache is the right place for them.
            sums: file(&sums_name(id), pages * SUM_LEN, Access::Buffered)?,
            moving: RwLock::new(()),
            pool: self.pool.clone(),
        };
        self.lock().insert(no, Arc::new(disk));
        Ok(())
    }

    /// Forgets a disk and removes its files.
    pub(crate) fn remove(&self, no: DiskNo) {
        if let Some(disk) = self.lock().remove(&no) {
            // Whatever stays behind is found and removed at the next start.
            let _ = self.volume.remove(&self.dir.join(raw_name(disk.id)));
            let _ = self.volume.remove(&self.dir.join(sums_name(disk.id)));
        }
    }

    /// The names of the files that belong to the disks which are open.
    #[must_use]
    pub(crate) fn file_names(&self) -> Vec<String> {
        let disks = self.lock();
        disks.values().flat_map(|disk| [raw_name(disk.id), sums_name(disk.id)]).collect()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<DiskNo, Arc<BaseDisk>>> {
        self.disks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A disk's base; none when it has none yet.
    #[must_use]
    pub(crate) fn disk(&self, no: DiskNo) -> Option<Arc<BaseDisk>> {
        self.lock().get(&no).cloned()
    }

    /// Reads an extent; a disk that has no base yet reads as zero.
    ///
    /// # Errors
    /// [`StoreError::Corrupt`] naming the first damaged page; as the volume says.
    pub(crate) fn read(&self, no: DiskNo, extent: Extent, out: &mut [u8]) -> Result<()> {
        match self.disk(no) {
            Some(disk) => disk.read(extent, out),
            None => {
                out.fill(0);
                Ok(())
            }
        }
    }

    /// Which parts of an extent have content, and whether that is all of it.
    ///
    /// # Errors
    /// As the volume says.
    pub(crate) fn spans(&self, no: DiskNo, extent: Extent) -> Result<(Vec<(Extent, bool)>, bool)> {
        match self.disk(no) {
            Some(disk) => disk.spans(extent),
            None => Ok((vec![(extent, false)], true)),
        }
    }
}

impl BaseDisk {
    fn sums_of(&self, first: u64, pages: u64) -> Result<Vec<u64>> {
        let doing = || format!("reading checksums of base disk {}", self.id);
        let mut bytes = vec![0; usize::try_from(pages * SUM_LEN).unwrap_or(0)];
        // What is beyond the file's end belongs to pages that were never written.
        self.sums.read_at(&mut bytes, first * SUM_LEN).doing(doing)?;
        let (sums, _) = bytes.as_chunks::<8>();
        Ok(sums.iter().map(|sum| u64::from_le_bytes(*sum)).collect())
    }

    /// Reads an extent of the disk.
    ///
    /// # Errors
    /// [`StoreError::Corrupt`] naming the first damaged page; as the volume says.
    pub(crate) fn read(&self, extent: Extent, out: &mut [u8]) -> Result<()> {
        let first = extent.start / PAGE_SECTORS;
        let end = extent.end().div_ceil(PAGE_SECTORS);
        let _still = self.moving.read().unwrap_or_else(PoisonError::into_inner);
        let sums = self.sums_of(first, end - first)?;
        if sums.iter().all(|sum| *sum == 0) && !self.has_data(first, end)? {
            out.fill(0);
            return Ok(());
        }
        let mut pages = self.pool.take(sums.len() * PAGE);
        self.raw
            .read_at(&mut pages, first * PAGE as u64)
            .doing(|| format!("reading base disk {}", self.id))?;
        for ((page, sum), number) in pages.chunks_exact(PAGE).zip(&sums).zip(first..) {
            if is_sound(page, *sum) || mutants::is(Mutant::PageSumUnchecked) {
                continue;
            }
            let start = number * PAGE_SECTORS;
            match lost_in(page, *sum) {
                Some(lost) if lost & sectors_of(number, extent) == 0 => {}
                Some(_) => {
                    return Err(StoreError::Corrupt(format!(
                        "in sectors {start}+{PAGE_SECTORS} of base disk {} some are lost, whose \
                         content was damaged before it came there",
                        self.id
                    )));
                }
                None => {
                    return Err(StoreError::Corrupt(format!(
                        "sectors {start}+{PAGE_SECTORS} of base disk {} do not have their checksum",
                        self.id
                    )));
                }
            }
        }
        let skip = usize::try_from((extent.start - first * PAGE_SECTORS) * SECTOR).unwrap_or(0);
        let wanted = pages.get(skip..skip + out.len());
        out.copy_from_slice(wanted.ok_or_else(|| {
            StoreError::Invalid("a read's buffer does not fit its extent".into())
        })?);
        Ok(())
    }

    /// Which parts of an extent have content, and whether that is all of it.
    ///
    /// # Errors
    /// As the volume says.
    pub(crate) fn spans(&self, extent: Extent) -> Result<(Vec<(Extent, bool)>, bool)> {
        let first = extent.start / PAGE_SECTORS;
        let end = extent.end().div_ceil(PAGE_SECTORS);
        let pages = (end - first).min(SPAN_PAGES_MAX);
        let _still = self.moving.read().unwrap_or_else(PoisonError::into_inner);
        let mut spans: Vec<(Extent, bool)> = Vec::new();
        // A page without a checksum has to be a hole; what is none has to be read, to be judged.
        let mut hole_until = first;
        for (sum, number) in self.sums_of(first, pages)?.into_iter().zip(first..) {
            let page = Extent::new(number * PAGE_SECTORS, PAGE_SECTORS);
            let Some(part) = page.intersect(&extent) else { continue };
            if sum == 0 && hole_until <= number {
                hole_until = self.next_data(number)?.unwrap_or(u64::MAX).max(number);
            }
            let has_content = sum != 0 || hole_until <= number;
            match spans.last_mut() {
                Some((last, is_data)) if *is_data == has_content => last.sectors += part.sectors,
                _ => spans.push((part, has_content)),
            }
        }
        Ok((spans, first + pages == end))
    }

    /// How many of the disk's first `sectors` sectors are in pages that have content, in bytes.
    ///
    /// # Errors
    /// As the volume says.
    pub(crate) fn content_bytes(&self, sectors: u64) -> Result<u64> {
        let pages = sectors.div_ceil(PAGE_SECTORS);
        let mut count = 0;
        let mut first = 0;
        while first < pages {
            let these = (pages - first).min(SPAN_PAGES_MAX);
            let sums = self.sums_of(first, these)?;
            count += sums.iter().filter(|sum| **sum != 0).count() as u64;
            first += these;
        }
        Ok(count * PAGE as u64)
    }

    /// The first page at or behind `page` that is not a hole of the raw file.
    fn next_data(&self, page: u64) -> Result<Option<u64>> {
        let at = self.raw.next_data(page * PAGE as u64);
        let at = at.doing(|| format!("looking for holes of base disk {}", self.id))?;
        Ok(at.map(|at| at / PAGE as u64))
    }

    /// Whether any of these pages is not a hole of the raw file.
    fn has_data(&self, first: u64, end: u64) -> Result<bool> {
        Ok(self.next_data(first)?.is_some_and(|page| page < end))
    }

    /// Looks at `pages` pages from `first` on, and gives the numbers of those that are damaged, and
    /// the bytes that were read.
    ///
    /// # Errors
    /// As the volume says.
    pub(crate) fn check(&self, first: u64, pages: u64) -> Result<(Vec<u64>, u64)> {
        let _still = self.moving.read().unwrap_or_else(PoisonError::into_inner);
        let sums = self.sums_of(first, pages)?;
        let mut bad = Vec::new();
        let mut read = sums.len() as u64 * SUM_LEN;
        let mut at = first;
        for same in sums.chunk_by(|a, b| (*a == 0) == (*b == 0)) {
            let these = at..at + same.len() as u64;
            at = these.end;
            if same.first() == Some(&0) && !self.has_data(these.start, these.end)? {
                continue;
            }
            let mut bytes = self.pool.take(same.len() * PAGE);
            let doing = || format!("reading base disk {}", self.id);
            let found = self.raw.read_at(&mut bytes, these.start * PAGE as u64).doing(doing)?;
            read += found as u64;
            let whole = bytes.get(..found).unwrap_or_default().chunks_exact(PAGE);
            let sound = whole.zip(same).map(|(page, sum)| is_sound(page, *sum));
            let sound = sound.chain(std::iter::repeat(false));
            bad.extend(these.zip(sound).filter(|(_, sound)| !sound).map(|(page, _)| page));
        }
        Ok((bad, read))
    }

    /// What the checksum file says of a page.
    ///
    /// # Errors
    /// As the volume says.
    pub(crate) fn has_sum_of(&self, number: u64, page: &[u8]) -> Result<bool> {
        let _still = self.moving.read().unwrap_or_else(PoisonError::into_inner);
        Ok(self.sums_of(number, 1)?.first().is_some_and(|sum| is_sound(page, *sum)))
    }

    /// Puts whole pages in place; `bytes` begins at page `first`. Pages of zeros become holes. `lost`
    /// says of each page which of its sectors are lost, one bit for each; [`mark_lost`] has marked
    /// them. Not durable until [`BaseDisk::sync`].
    ///
    /// # Errors
    /// As the volume says.
    pub(crate) fn put_pages(&self, first: u64, bytes: &[u8], lost: &[u8]) -> Result<()> {
        let doing = || format!("writing base disk {}", self.id);
        let mut sums = Vec::with_capacity(bytes.len() / PAGE);
        for (page, lost) in bytes.chunks_exact(PAGE).zip(lost) {
            sums.push(match lost {
                0 if is_zero(page) => 0,
                0 => page_sum(page),
                _ => sum_with_lost(page),
            });
        }
        let _moving = self.moving.write().unwrap_or_else(PoisonError::into_inner);
        let mut at = 0;
        for same in sums.chunk_by(|a, b| (*a == 0) == (*b == 0)) {
            let offset = (first + at as u64) * PAGE as u64;
            let part = bytes.get(at * PAGE..(at + same.len()) * PAGE).unwrap_or_default();
            if same.first() == Some(&0) {
                self.raw.punch(offset, part.len() as u64).doing(doing)?;
            } else {
                self.raw.write_at(&[IoSlice::new(part)], offset, false).doing(doing)?;
            }
            at += same.len();
        }
        let bytes: Vec<u8> = sums.iter().flat_map(|sum| sum.to_le_bytes()).collect();
        self.sums.write_at(&[IoSlice::new(&bytes)], first * SUM_LEN, false).doing(doing)
    }

    /// Makes whole pages read as zero. Not durable until [`BaseDisk::sync`].
    ///
    /// # Errors
    /// As the volume says.
    pub(crate) fn zero_pages(&self, first: u64, pages: u64) -> Result<()> {
        let doing = || format!("freeing space of base disk {}", self.id);
        let _moving = self.moving.write().unwrap_or_else(PoisonError::into_inner);
        self.raw.punch(first * PAGE as u64, pages * PAGE as u64).doing(doing)?;
        self.sums.punch(first * SUM_LEN, pages * SUM_LEN).doing(doing)
    }

    /// Reads one page whole, and which of its sectors are lost, one bit for each. None when it is
    /// damaged.
    ///
    /// # Errors
    /// As the volume says.
    pub(crate) fn page(&self, number: u64) -> Result<Option<(AlignedBuf, u8)>> {
        let _still = self.moving.read().unwrap_or_else(PoisonError::into_inner);
        let sum = self.sums_of(number, 1)?.first().copied().unwrap_or(0);
        let mut page = AlignedBuf::zeroed(PAGE);
        // What is beyond the file's end was never written.
        if sum != 0 || self.has_data(number, number + 1)? {
            let doing = || format!("reading base disk {}", self.id);
            self.raw.read_at(&mut page, number * PAGE as u64).doing(doing)?;
        }
        if mutants::is(Mutant::PageSumUnchecked) {
            return Ok(Some((page, 0)));
        }
        Ok(lost_in(&page, sum).map(|lost| (page, lost)))
    }

    /// Makes room for `sectors`, durably, where the files are shorter: the disk has grown.
    ///
    /// # Errors
    /// As the volume says.
    pub(crate) fn grow(&self, sectors: u64) -> Result<()> {
        let doing = || format!("sizing base disk {}", self.id);
        let pages = sectors.div_ceil(PAGE_SECTORS);
        for (file, len) in [(&self.raw, pages * PAGE as u64), (&self.sums, pages * SUM_LEN)] {
            if file.size().doing(doing)? < len {
                file.set_len(len).doing(doing)?;
                file.sync().doing(doing)?;
            }
        }
        Ok(())
    }

    /// Makes everything put in place durable.
    ///
    /// # Errors
    /// As the volume says.
    pub(crate) fn sync(&self) -> Result<()> {
        let doing = || format!("syncing base disk {}", self.id);
        self.raw.sync().doing(doing)?;
        self.sums.sync().doing(doing)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::OsFs;

    /// Three pages: content, zeros (a hole), content.
    #[test]
    fn base_checksum_bytes_are_pinned() {
        let dir = tempfile::tempdir().unwrap();
        let pool = BufPool::new(1 << 20);
        let base = Base::new(&Volume::new(Arc::new(OsFs)), dir.path(), &pool);
        let id = DiskId([0xab; 16]);
        // 17 sectors: the last page is used in part, and is kept whole.
        base.add(DiskNo(0), id, 17).unwrap();
        let mut pages = AlignedBuf::zeroed(3 * PAGE);
        pages[..PAGE].fill(0x5a);
        pages[2 * PAGE..2 * PAGE + 512].fill(0xa5);
        let disk = base.disk(DiskNo(0)).unwrap();
        disk.put_pages(0, &pages, &[0; 3]).unwrap();
        disk.sync().unwrap();

        let name = "ab".repeat(16);
        assert_eq!(base.file_names(), [format!("{name}.raw"), format!("{name}.sum")]);
        let sums = std::fs::read(dir.path().join(format!("{name}.sum"))).unwrap();
        let hex: String = sums.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hex, "4eda9dd95f6b88b7 0000000000000000 8160d69d81fc8d48".replace(' ', ""));
        let raw = std::fs::read(dir.path().join(format!("{name}.raw"))).unwrap();
        assert_eq!(raw, pages[..]);
    }

    #[test]
    fn a_lost_sector_fails_its_own_reads_and_no_others() {
        let dir = tempfile::tempdir().unwrap();
        let base = Base::new(&Volume::new(Arc::new(OsFs)), dir.path(), &BufPool::new(1 << 20));
        base.add(DiskNo(0), DiskId([0xab; 16]), 24).unwrap();
        let disk = base.disk(DiskNo(0)).unwrap();
        let mut pages = AlignedBuf::zeroed(2 * PAGE);
        pages[..PAGE].fill(0x5a);
        // The second page has what marks a lost sector as content of its own.
        mark_lost(&mut pages[..PAGE], 0b0010_0100);
        mark_lost(&mut pages[PAGE..], 0b1000_0000);
        disk.put_pages(0, &pages, &[0b0010_0100, 0]).unwrap();
        for sector in 0..16 {
            let mut content = [0; 512];
            let read = disk.read(Extent::new(sector, 1), &mut content);
            assert_eq!(read.is_err(), [2, 5].contains(&sector), "sector {sector}");
            if read.is_ok() {
                let at = sector as usize * 512;
                assert_eq!(content, pages[at..at + 512]);
            }
        }
        assert_eq!(disk.page(0).unwrap().unwrap().1, 0b0010_0100);
        assert_eq!(disk.page(1).unwrap().unwrap().1, 0);
        assert_eq!(disk.page(2).unwrap().unwrap().1, 0);
        assert_eq!(disk.check(0, 3).unwrap().0, [0]);

        let sums = std::fs::read(dir.path().join(format!("{}.sum", "ab".repeat(16)))).unwrap();
        let plain = content_sum(&pages[..PAGE]);
        assert_eq!(sums[..8], (!plain).to_le_bytes());
    }
}
