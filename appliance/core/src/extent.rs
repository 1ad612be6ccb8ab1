//! Sector extents, and a map from non-overlapping extents to values.

use alloc::collections::BTreeMap;
use alloc::vec::Vec;
use core::fmt;
use core::ops::Range;

use crate::ids::DiskNo;
use crate::limits::SECTOR;

/// A run of sectors of one disk. Sectors are 512 bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Extent {
    /// First sector.
    pub start: u64,
    /// Number of sectors.
    pub sectors: u64,
}

impl Extent {
    /// An extent of `sectors` sectors from `start`.
    #[must_use]
    pub const fn new(start: u64, sectors: u64) -> Self {
        Self { start, sectors }
    }

    /// The extent that covers `len` bytes from `offset`; `None` unless both are sector-aligned.
    #[must_use]
    pub const fn from_bytes(offset: u64, len: u64) -> Option<Self> {
        if offset.is_multiple_of(SECTOR) && len.is_multiple_of(SECTOR) {
            Some(Self::new(offset / SECTOR, len / SECTOR))
        } else {
            None
        }
    }

    /// The sector behind the last one; `None` on overflow.
    #[must_use]
    pub const fn checked_end(&self) -> Option<u64> {
        self.start.checked_add(self.sectors)
    }

    /// The sector behind the last one.
    #[must_use]
    pub const fn end(&self) -> u64 {
        self.start.saturating_add(self.sectors)
    }

    /// Whether the extent lies on a disk of `size` sectors.
    #[must_use]
    pub fn fits(&self, size: u64) -> bool {
        self.checked_end().is_some_and(|end| end <= size)
    }

    /// Length in bytes.
    #[must_use]
    pub const fn bytes(&self) -> u64 {
        self.sectors * SECTOR
    }

    /// The part that both extents share.
    #[must_use]
    pub fn intersect(&self, other: &Self) -> Option<Self> {
        let start = self.start.max(other.start);
        let end = self.end().min(other.end());
        (start < end).then(|| Self::new(start, end - start))
    }
}

impl fmt::Display for Extent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}+{}", self.start, self.sectors)
    }
}

/// A value that belongs to an extent and can follow it when the extent is cut.
pub trait Slice: Clone {
    /// The value for the part that begins `skip` sectors further on and has `sectors` sectors.
    #[must_use]
    fn slice(&self, skip: u64, sectors: u64) -> Self;
}

impl Slice for () {
    fn slice(&self, _skip: u64, _sectors: u64) -> Self {}
}

/// Non-overlapping extents of many disks with a value each; the last insert wins.
#[derive(Debug, Clone)]
pub struct ExtentMap<V> {
    by_start: BTreeMap<(DiskNo, u64), (u64, V)>,
}

impl<V> Default for ExtentMap<V> {
    fn default() -> Self {
        Self { by_start: BTreeMap::new() }
    }
}

impl<V: Slice> ExtentMap<V> {
    /// An empty map.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Number of extents.
    #[must_use]
    pub fn len(&self) -> usize {
        self.by_start.len()
    }

    /// Whether there is no extent.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.by_start.is_empty()
    }

    /// Sets `extent` to `value`, cutting away what it overlaps. An empty extent changes nothing.
    pub fn insert(&mut self, disk: DiskNo, extent: Extent, value: V) {
        if extent.sectors == 0 {
            return;
        }
        self.remove(disk, extent);
        self.by_start.insert((disk, extent.start), (extent.sectors, value));
    }

    /// Cuts `extent` out of the map.
    pub fn remove(&mut self, disk: DiskNo, extent: Extent) {
        let (start, end) = (extent.start, extent.end());
        if start >= end {
            return;
        }
        // At most one extent reaches into ours from the left; it may also reach out on the right.
        if let Some((&(_, left), &(sectors, ref value))) =
            self.by_start.range((disk, 0)..(disk, start)).next_back()
            && left + sectors > start
        {
            let keep = value.slice(0, start - left);
            let right = (left + sectors > end)
                .then(|| (left + sectors - end, value.slice(end - left, left + sectors - end)));
            self.by_start.insert((disk, left), (start - left, keep));
            if let Some(right) = right {
                self.by_start.insert((disk, end), right);
            }
        }
        while let Some((&(_, at), &(sectors, ref value))) =
            self.by_start.range((disk, start)..(disk, end)).next()
        {
            let right = (at + sectors > end)
                .then(|| (at + sectors - end, value.slice(end - at, at + sectors - end)));
            self.by_start.remove(&(disk, at));
            if let Some(right) = right {
                self.by_start.insert((disk, end), right);
            }
        }
    }

    /// The parts of the map inside `extent`, in order, cut to it.
    pub fn overlaps(&self, disk: DiskNo, extent: Extent) -> impl Iterator<Item = (Extent, V)> {
        let first = self
            .by_start
            .range((disk, 0)..=(disk, extent.start))
            .next_back()
            .filter(|((_, at), (sectors, _))| at + sectors > extent.start)
            .map_or(extent.start, |((_, at), _)| *at);
        let range: Range<(DiskNo, u64)> = (disk, first)..(disk, extent.end().max(first));
        self.by_start.range(range).filter_map(move |((_, at), (sectors, value))| {
            let whole = Extent::new(*at, *sectors);
            let part = whole.intersect(&extent)?;
            let value = if part == whole {
                value.clone()
            } else {
                value.slice(part.start - whole.start, part.sectors)
            };
            Some((part, value))
        })
    }

    /// Every extent with its disk and value, in order of disk and sector.
    pub fn iter(&self) -> impl Iterator<Item = (DiskNo, Extent, &V)> {
        self.by_start
            .iter()
            .map(|((disk, start), (sectors, value))| (*disk, Extent::new(*start, *sectors), value))
    }
}

/// The parts of `extent` that none of `covered` (sorted, non-overlapping) covers.
#[must_use]
pub fn gaps(extent: Extent, covered: impl IntoIterator<Item = Extent>) -> Vec<Extent> {
    let mut gaps = Vec::new();
    let mut at = extent.start;
    for part in covered {
        if part.start > at {
            gaps.push(Extent::new(at, part.start - at));
        }
        at = at.max(part.end());
    }
    if at < extent.end() {
        gaps.push(Extent::new(at, extent.end() - at));
    }
    gaps
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A value that knows which sector of which write it stands for.
    #[derive(Debug, Clone, PartialEq, Eq)]
    struct From {
        write: u32,
        skip: u64,
    }

    impl Slice for From {
        fn slice(&self, skip: u64, _sectors: u64) -> Self {
            Self { write: self.write, skip: self.skip + skip }
        }
    }

    const SIZE: u64 = 64;

    proptest! {
        #[test]
        fn behaves_as_an_array_of_sectors(
            ops in prop::collection::vec((0u32..2, 0..SIZE, 0u64..20, any::<bool>()), 0..60),
            query in (0..SIZE, 0u64..30),
        ) {
            let mut map = ExtentMap::new();
            let mut oracle: Vec<Vec<Option<From>>> = vec![vec![None; 2 * SIZE as usize]; 2];
            for (write, (disk, start, sectors, remove)) in (0u32..).zip(ops) {
                let extent = Extent::new(start, sectors);
                if remove {
                    map.remove(DiskNo(disk), extent);
                } else {
                    map.insert(DiskNo(disk), extent, From { write, skip: 0 });
                }
                for sector in 0..sectors {
                    oracle[disk as usize][(start + sector) as usize] =
                        (!remove).then_some(From { write, skip: sector });
                }
            }
            let query = Extent::new(query.0, query.1);
            for disk in 0..2u32 {
                let mut seen: Vec<Option<From>> = vec![None; 2 * SIZE as usize];
                let mut last_end = query.start;
                for (extent, value) in map.overlaps(DiskNo(disk), query) {
                    prop_assert!(extent.start >= last_end && extent.sectors > 0);
                    prop_assert!(extent.end() <= query.end());
                    last_end = extent.end();
                    for sector in 0..extent.sectors {
                        seen[(extent.start + sector) as usize] = Some(value.slice(sector, 1));
                    }
                }
                let wanted = &oracle[disk as usize][query.start as usize..query.end() as usize];
                prop_assert_eq!(&seen[query.start as usize..query.end() as usize], wanted);
                let covered: Vec<Extent> =
                    map.overlaps(DiskNo(disk), query).map(|(extent, _)| extent).collect();
                for gap in gaps(query, covered) {
                    for sector in gap.start..gap.end() {
                        prop_assert!(oracle[disk as usize][sector as usize].is_none());
                    }
                }
            }
        }
    }

    extern crate std;
    use std::vec;
}
