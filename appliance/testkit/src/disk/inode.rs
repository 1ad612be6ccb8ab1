//! One simulated file: what is durable, and every version that might be.

use std::collections::BTreeMap;

use crate::chance::Chance;

const SECTOR: u64 = 512;

type Sector = [u8; SECTOR as usize];

const ZERO: Sector = [0; SECTOR as usize];

/// A file's content.
#[derive(Debug, Default)]
pub(super) struct Inode {
    /// What a reader sees.
    seen: BTreeMap<u64, Sector>,
    /// What a power cut certainly leaves, where it differs from what is seen: for each sector that
    /// was written since, the durable version and all later ones, oldest first.
    versions: BTreeMap<u64, Vec<Sector>>,
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

    pub(super) fn used(&self) -> u64 {
        self.reserved.max(self.seen.len() as u64 * SECTOR)
    }

    /// Space that a write would take beyond what is there.
    pub(super) fn growth(&self, offset: u64, len: u64) -> u64 {
        let end = offset + len;
        if end <= self.reserved {
            return 0;
        }
        let sectors = offset / SECTOR..end.div_ceil(SECTOR);
        sectors.filter(|sector| !self.seen.contains_key(sector)).count() as u64 * SECTOR
    }

    pub(super) fn read(&self, buf: &mut [u8], offset: u64) -> usize {
        let len = (buf.len() as u64).min(self.len.saturating_sub(offset));
        let read = usize::try_from(len).unwrap_or(0);
        let Some(buf) = buf.get_mut(..read) else { return 0 };
        buf.fill(0);
        // Only what was ever written is there; most of a segment is not.
        let sectors = offset / SECTOR..(offset + len).div_ceil(SECTOR);
        for (number, sector) in self.seen.range(sectors) {
            let start = number * SECTOR;
            let from = start.max(offset);
            let to = (start + SECTOR).min(offset + len);
            let part = sector.get((from - start) as usize..(to - start) as usize);
            let into = buf.get_mut((from - offset) as usize..(to - offset) as usize);
            if let (Some(part), Some(into)) = (part, into) {
                into.copy_from_slice(part);
            }
        }
        read
    }

    fn put(&mut self, number: u64, sector: Sector) {
        let seen = self.seen.get(&number).copied().unwrap_or(ZERO);
        let before = self.given_up.remove(&number).unwrap_or(seen);
        self.versions.entry(number).or_insert_with(|| vec![before]).push(sector);
        self.seen.insert(number, sector);
    }

    pub(super) fn write(&mut self, bytes: &[u8], offset: u64) {
        let end = offset + bytes.len() as u64;
        for number in offset / SECTOR..end.div_ceil(SECTOR) {
            let mut sector = self.seen.get(&number).copied().unwrap_or(ZERO);
            let start = number * SECTOR;
            let from = start.max(offset);
            let to = (start + SECTOR).min(end);
            let part = bytes.get((from - offset) as usize..(to - offset) as usize);
            let into = sector.get_mut((from - start) as usize..(to - start) as usize);
            if let (Some(part), Some(into)) = (part, into) {
                into.copy_from_slice(part);
            }
            self.put(number, sector);
        }
        if end > self.len {
            self.set_len(end);
        }
    }

    pub(super) fn set_len(&mut self, len: u64) {
        if self.lens.is_empty() {
            self.lens.push(self.len);
        }
        self.lens.push(len);
        if len < self.len {
            let beyond: Vec<u64> =
                self.seen.range(len.div_ceil(SECTOR)..).map(|(number, _)| *number).collect();
            for number in beyond {
                self.put(number, ZERO);
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
            let there: Vec<u64> = self
                .seen
                .range(offset / SECTOR..end.div_ceil(SECTOR))
                .map(|(number, _)| *number)
                .collect();
            for number in there {
                let start = number * SECTOR;
                if start >= offset && start + SECTOR <= end {
                    self.put(number, ZERO);
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
        for number in offset / SECTOR..(offset + len).div_ceil(SECTOR) {
            self.versions.remove(&number);
        }
    }

    /// A sync has returned.
    pub(super) fn sync(&mut self) {
        self.versions.clear();
        self.lens.clear();
    }

    /// A write or sync failed: what was not durable is still seen, but nothing will save it any
    /// more. Some of it may have got through.
    pub(super) fn forget_unsynced(&mut self, chance: &mut Chance) {
        for (number, versions) in std::mem::take(&mut self.versions) {
            let kept = *chance.pick(&versions);
            if versions.last() != Some(&kept) {
                self.given_up.insert(number, kept);
            }
        }
        // Lengths are journalled metadata: they are taken to survive.
        self.lens.clear();
    }

    /// The power goes off: each sector keeps one of its versions. Returns how many lost the newest.
    pub(super) fn power_cut(&mut self, chance: &mut Chance) -> u64 {
        let mut lost = 0;
        for (number, versions) in std::mem::take(&mut self.versions) {
            let kept = *chance.pick(&versions);
            if self.seen.insert(number, kept) != Some(kept) {
                lost += 1;
            }
        }
        for (number, durable) in std::mem::take(&mut self.given_up) {
            self.seen.insert(number, durable);
            lost += 1;
        }
        if !self.lens.is_empty() {
            self.len = *chance.pick(&self.lens);
            self.lens.clear();
            let _ = self.seen.split_off(&self.len.div_ceil(SECTOR));
        }
        lost
    }

    /// The power goes off: each sector that is not durable keeps the version that `choose` picks, of
    /// as many as it is told, the durable one first.
    pub(super) fn cut_by(&mut self, mut choose: impl FnMut(u64, usize) -> usize) {
        for (number, versions) in std::mem::take(&mut self.versions) {
            if let Some(kept) = versions.get(choose(number, versions.len())) {
                self.seen.insert(number, *kept);
            }
        }
    }

    /// Flips a bit.
    pub(super) fn rot(&mut self, offset: u64) {
        let sector = self.seen.entry(offset / SECTOR).or_insert(ZERO);
        if let Some(byte) = sector.get_mut((offset % SECTOR) as usize) {
            *byte ^= 1;
        }
    }
}
