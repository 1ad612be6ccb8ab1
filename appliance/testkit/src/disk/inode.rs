//! One simulated file: what is durable, and every version that might be.

use std::collections::BTreeMap;

use crate::chance::Chance;

const SECTOR: u64 = 512;

/// Sectors that lie together in memory.
const PAGE_SECTORS: u64 = 8;

const PAGE: usize = (SECTOR * PAGE_SECTORS) as usize;

type Sector = [u8; SECTOR as usize];

const ZERO: Sector = [0; SECTOR as usize];

/// Eight sectors.
#[derive(Debug, Clone)]
struct Page {
    bytes: [u8; PAGE],
    /// One bit for each sector that was ever written.
    written: u8,
}

impl Page {
    const fn blank() -> Self {
        Self { bytes: [0; PAGE], written: 0 }
    }

    fn sector(&self, number: u64) -> Sector {
        let from = ((number % PAGE_SECTORS) * SECTOR) as usize;
        let sector = self.bytes.get(from..from + SECTOR as usize);
        sector.and_then(|sector| sector.try_into().ok()).unwrap_or(ZERO)
    }
}

/// What sectors held before they were written, since they were last durable.
#[derive(Debug, Clone, Default)]
struct Older {
    /// The newest entry for each sector that is not durable.
    newest: BTreeMap<u64, u32>,
    /// The entry before it of the same sector, and the content.
    entries: Vec<(Option<u32>, Sector)>,
}

impl Older {
    fn push(&mut self, number: u64, content: Sector) {
        let entry = u32::try_from(self.entries.len()).unwrap_or(u32::MAX);
        let before = self.newest.insert(number, entry);
        self.entries.push((before, content));
    }

    /// The sector is durable.
    fn forget(&mut self, number: u64) {
        if !self.newest.is_empty() {
            self.newest.remove(&number);
        }
    }

    fn clear(&mut self) {
        self.newest.clear();
        self.entries.clear();
    }

    /// Takes everything out: each sector with its versions, the durable one first. The newest is
    /// not among them: it is what is seen.
    fn take(&mut self) -> impl Iterator<Item = (u64, Vec<Sector>)> + use<> {
        let Self { newest, entries } = std::mem::take(self);
        newest.into_iter().map(move |(number, newest)| {
            let mut versions = Vec::new();
            let mut next = Some(newest);
            while let Some((before, content)) = next.and_then(|at| entries.get(at as usize)) {
                versions.push(*content);
                next = *before;
            }
            versions.reverse();
            (number, versions)
        })
    }
}

/// A file's content.
#[derive(Debug, Clone, Default)]
pub(super) struct Inode {
    /// What a reader sees, by page.
    seen: BTreeMap<u64, Box<Page>>,
    /// Sectors that were ever written.
    written: u64,
    /// For each sector that was written and is not durable, the durable version and all later ones
    /// but the newest.
    older: Older,
    /// Sectors that a failed sync has given up: seen as they were written, durable as they are
    /// here, and no later sync changes that; only writing them again does.
    given_up: BTreeMap<u64, Sector>,
    len: u64,
    /// The durable length and all later ones.
    lens: Vec<u64>,
    reserved: u64,
}

impl Inode {
    pub(super) const fn len(&self) -> u64 {
        self.len
    }

    pub(super) const fn used(&self) -> u64 {
        let written = self.written * SECTOR;
        if self.reserved > written { self.reserved } else { written }
    }

    /// Space that a write would take beyond what is there.
    pub(super) fn growth(&self, offset: u64, len: u64) -> u64 {
        let end = offset + len;
        if end <= self.reserved {
            return 0;
        }
        let sectors = offset / SECTOR..end.div_ceil(SECTOR);
        sectors.filter(|sector| !self.is_written(*sector)).count() as u64 * SECTOR
    }

    fn is_written(&self, number: u64) -> bool {
        let page = self.seen.get(&(number / PAGE_SECTORS));
        page.is_some_and(|page| page.written & (1 << (number % PAGE_SECTORS)) != 0)
    }

    fn sector(&self, number: u64) -> Sector {
        self.seen.get(&(number / PAGE_SECTORS)).map_or(ZERO, |page| page.sector(number))
    }

    /// Changes what is seen, and nothing else.
    fn set(&mut self, number: u64, content: &Sector) {
        let page = self.page(number / PAGE_SECTORS, 1 << (number % PAGE_SECTORS));
        let from = ((number % PAGE_SECTORS) * SECTOR) as usize;
        if let Some(into) = page.bytes.get_mut(from..from + SECTOR as usize) {
            into.copy_from_slice(content);
        }
    }

    /// The page, of which `sectors` are about to be written.
    fn page(&mut self, number: u64, sectors: u8) -> &mut Page {
        let page = self.seen.entry(number).or_insert_with(|| Box::new(Page::blank()));
        self.written += u64::from((sectors & !page.written).count_ones());
        page.written |= sectors;
        page
    }

    pub(super) fn read(&self, buf: &mut [u8], offset: u64) -> usize {
        let len = (buf.len() as u64).min(self.len.saturating_sub(offset));
        let read = usize::try_from(len).unwrap_or(0);
        let Some(buf) = buf.get_mut(..read) else { return 0 };
        // Only what was ever written is there; most of a segment is not.
        let page = PAGE as u64;
        let mut filled = 0;
        for (number, content) in self.seen.range(offset / page..(offset + len).div_ceil(page)) {
            let start = number * page;
            let from = start.max(offset);
            let to = (start + page).min(offset + len);
            let part = content.bytes.get((from - start) as usize..(to - start) as usize);
            let (at, end) = ((from - offset) as usize, (to - offset) as usize);
            if let Some(gap) = buf.get_mut(filled..at) {
                gap.fill(0);
            }
            if let (Some(part), Some(into)) = (part, buf.get_mut(at..end)) {
                into.copy_from_slice(part);
            }
            filled = end;
        }
        if let Some(rest) = buf.get_mut(filled..) {
            rest.fill(0);
        }
        read
    }

    /// Remembers what a sector is before it is written.
    fn remember(&mut self, number: u64) {
        let seen = self.sector(number);
        let before = if self.given_up.is_empty() { None } else { self.given_up.remove(&number) };
        self.older.push(number, before.unwrap_or(seen));
    }

    fn put(&mut self, number: u64, sector: &Sector) {
        self.remember(number);
        self.set(number, sector);
    }

    pub(super) fn write(&mut self, bytes: &[u8], offset: u64) {
        for number in offset / SECTOR..(offset + bytes.len() as u64).div_ceil(SECTOR) {
            self.remember(number);
        }
        self.overwrite(bytes, offset);
    }

    /// A durable write that was answered: what its sectors were before cannot come back.
    pub(super) fn write_durable(&mut self, bytes: &[u8], offset: u64) {
        self.settle(offset, bytes.len() as u64);
        for number in offset / SECTOR..(offset + bytes.len() as u64).div_ceil(SECTOR) {
            if self.given_up.is_empty() {
                break;
            }
            self.given_up.remove(&number);
        }
        self.overwrite(bytes, offset);
    }

    fn overwrite(&mut self, bytes: &[u8], offset: u64) {
        let end = offset + bytes.len() as u64;
        let page = PAGE as u64;
        let mut at = offset;
        while at < end {
            let number = at / page;
            let to = end.min((number + 1) * page);
            let first = (at % page) / SECTOR;
            let last = (to - 1 - number * page) / SECTOR;
            let sectors = (first..=last).fold(0_u8, |bits, sector| bits | (1 << sector));
            let part = bytes.get((at - offset) as usize..(to - offset) as usize);
            let from = (at - number * page) as usize;
            let content = self.page(number, sectors);
            let into = content.bytes.get_mut(from..from + (to - at) as usize);
            if let (Some(part), Some(into)) = (part, into) {
                into.copy_from_slice(part);
            }
            at = to;
        }
        if end > self.len {
            self.set_len(end);
        }
    }

    /// The sectors from `first` on, up to `end`, that were ever written.
    fn written_in(&self, first: u64, end: u64) -> Vec<u64> {
        let pages = self.seen.range(first / PAGE_SECTORS..end.div_ceil(PAGE_SECTORS));
        pages
            .flat_map(|(number, page)| {
                let start = number * PAGE_SECTORS;
                (0..PAGE_SECTORS)
                    .filter(|sector| page.written & (1 << sector) != 0)
                    .map(move |sector| start + sector)
            })
            .filter(|sector| (first..end).contains(sector))
            .collect()
    }

    pub(super) fn set_len(&mut self, len: u64) {
        if self.lens.is_empty() {
            self.lens.push(self.len);
        }
        self.lens.push(len);
        if len < self.len {
            for number in self.written_in(len.div_ceil(SECTOR), self.len.div_ceil(SECTOR)) {
                self.put(number, &ZERO);
            }
        }
        self.len = len;
    }

    pub(super) fn reserve(&mut self, len: u64) {
        self.reserved = self.reserved.max(len);
        if len > self.len {
            self.set_len(len);
        }
    }

    pub(super) fn punch(&mut self, offset: u64, len: u64) {
        let end = (offset + len).min(self.len);
        if offset < end {
            for number in self.written_in(offset / SECTOR, end.div_ceil(SECTOR)) {
                let start = number * SECTOR;
                if start >= offset && start + SECTOR <= end {
                    self.put(number, &ZERO);
                } else {
                    let from = offset.max(start);
                    let zeros =
                        vec![0; usize::try_from(end.min(start + SECTOR) - from).unwrap_or(0)];
                    self.write(&zeros, from);
                }
            }
        }
    }

    /// A durable write has returned: its sectors are what they are.
    pub(super) fn settle(&mut self, offset: u64, len: u64) {
        if self.older.newest.is_empty() {
            return;
        }
        for number in offset / SECTOR..(offset + len).div_ceil(SECTOR) {
            self.older.forget(number);
        }
        if self.older.newest.is_empty() {
            self.older.clear();
        }
    }

    /// A sync has returned.
    pub(super) fn sync(&mut self) {
        self.older.clear();
        self.lens.clear();
    }

    /// A write or sync failed: what was not durable is still seen, but nothing will save it any
    /// more. Some of it may have got through.
    pub(super) fn forget_unsynced(&mut self, chance: &mut Chance) {
        for (number, mut versions) in self.older.take() {
            let seen = self.sector(number);
            versions.push(seen);
            let kept = *chance.pick(&versions);
            if seen != kept {
                self.given_up.insert(number, kept);
            }
        }
        // Lengths are journalled metadata: they are taken to survive.
        self.lens.clear();
    }

    /// The power goes off: each sector keeps one of its versions. Returns how many lost the newest.
    pub(super) fn power_cut(&mut self, chance: &mut Chance) -> u64 {
        let mut lost = 0;
        for (number, mut versions) in self.older.take() {
            let seen = self.sector(number);
            versions.push(seen);
            let kept = *chance.pick(&versions);
            self.set(number, &kept);
            lost += u64::from(seen != kept);
        }
        for (number, durable) in std::mem::take(&mut self.given_up) {
            self.set(number, &durable);
            lost += 1;
        }
        if !self.lens.is_empty() {
            self.len = *chance.pick(&self.lens);
            self.lens.clear();
            self.cut_off(self.len.div_ceil(SECTOR));
        }
        lost
    }

    /// Forgets all sectors from `first` on.
    fn cut_off(&mut self, first: u64) {
        let gone = self.seen.split_off(&first.div_ceil(PAGE_SECTORS));
        let count: u32 = gone.values().map(|page| page.written.count_ones()).sum();
        self.written -= u64::from(count);
        let kept = first % PAGE_SECTORS;
        if kept != 0
            && let Some(page) = self.seen.get_mut(&(first / PAGE_SECTORS))
        {
            let beyond = u8::MAX << kept;
            self.written -= u64::from((page.written & beyond).count_ones());
            page.written &= !beyond;
            if let Some(bytes) = page.bytes.get_mut((kept * SECTOR) as usize..) {
                bytes.fill(0);
            }
        }
    }

    /// The power goes off: each sector that is not durable keeps the version that `choose` picks, of
    /// as many as it is told, the durable one first.
    pub(super) fn cut_by(&mut self, mut choose: impl FnMut(u64, usize) -> usize) {
        for (number, versions) in self.older.take() {
            // The one behind the last is what is seen.
            if let Some(kept) = versions.get(choose(number, versions.len() + 1)) {
                self.set(number, kept);
            }
        }
    }

    /// The sectors that were ever written.
    pub(super) fn written(&self) -> Vec<u64> {
        self.written_in(0, u64::MAX)
    }

    /// Flips a bit of a byte.
    pub(super) fn rot(&mut self, offset: u64, bit: u64) {
        let mut sector = self.sector(offset / SECTOR);
        if let Some(byte) = sector.get_mut((offset % SECTOR) as usize) {
            *byte ^= 1 << bit;
        }
        self.set(offset / SECTOR, &sector);
    }
}
