//! What of a disk a pass reads: extents in, requests out. Pure, and of bounded memory whatever a
//! server tells: one bit for each *grain* of the disk.
//!
//! Invariant: *every byte that was marked lies in exactly one request*, and no request goes beyond the
//! disk.

use std::ops::Range;

/// The smallest grain, in bytes: that of QEMU's bitmaps.
pub(super) const GRAIN_MIN: u64 = 64 << 10;

/// Bytes of one request, unless the server takes less.
pub(super) const REQUEST_MAX: u64 = 1 << 20;

/// Grains of a disk: at most 8 MiB of bits. Above 4 TiB a grain is larger.
const GRAINS_MAX: u64 = 1 << 26;

/// Parts of a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Plan {
    size: u64,
    grain: u64,
    words: Vec<u64>,
}

impl Plan {
    /// Nothing of a disk of `size` bytes.
    pub(super) fn nothing(size: u64) -> Self {
        let mut grain = GRAIN_MIN;
        while size.div_ceil(grain) > GRAINS_MAX {
            grain *= 2;
        }
        let words = usize::try_from(size.div_ceil(grain).div_ceil(64)).unwrap_or(0);
        Self { size, grain, words: vec![0; words] }
    }

    /// Marks a range of bytes, as far as it lies on the disk.
    pub(super) fn mark(&mut self, range: Range<u64>) {
        let end = range.end.min(self.size);
        if range.start >= end {
            return;
        }
        let (first, last) = (range.start / self.grain, (end - 1) / self.grain);
        let mut at = first;
        while at <= last {
            let bit = at % 64;
            let bits = (64 - bit).min(last - at + 1);
            let mask = if bits == 64 { u64::MAX } else { ((1 << bits) - 1) << bit };
            if let Some(word) = self.words.get_mut((at / 64) as usize) {
                *word |= mask;
            }
            at += bits;
        }
    }

    /// What is marked here and not there. Both are of one disk.
    pub(super) fn without(&self, other: &Self) -> Self {
        let words =
            self.words.iter().zip(&other.words).map(|(mine, other)| mine & !other).collect();
        Self { words, ..*self }
    }

    /// Marks what is marked there.
    pub(super) fn add(&mut self, other: &Self) {
        for (mine, other) in self.words.iter_mut().zip(&other.words) {
            *mine |= other;
        }
    }

    /// Bytes that are marked.
    pub(super) fn bytes(&self) -> u64 {
        let grains: u64 = self.words.iter().map(|word| u64::from(word.count_ones())).sum();
        let last = self.size.div_ceil(self.grain).saturating_sub(1);
        let beyond = if self.has(last) { (last + 1) * self.grain - self.size } else { 0 };
        grains * self.grain - beyond
    }

    /// The marked bytes as requests of at most `most` bytes, in order.
    pub(super) fn requests(&self, most: u64) -> impl Iterator<Item = Range<u64>> + '_ {
        // Neither grows beyond what it shares: a grain is a multiple of any lawful block size.
        let most = most.clamp(512, REQUEST_MAX);
        let mut run = 0..0;
        std::iter::from_fn(move || {
            if run.start == run.end {
                run = self.run(run.end, true)?;
            }
            let piece = run.start..run.end.min(run.start + most);
            run.start = piece.end;
            Some(piece)
        })
    }

    /// The bytes that are not marked, as ranges of at most `most` bytes, in order.
    pub(super) fn gaps(&self, most: u64) -> impl Iterator<Item = Range<u64>> + '_ {
        let mut run = 0..0;
        std::iter::from_fn(move || {
            if run.start == run.end {
                run = self.run(run.end, false)?;
            }
            let piece = run.start..run.end.min(run.start + most.max(self.grain));
            run.start = piece.end;
            Some(piece)
        })
    }

    fn has(&self, grain: u64) -> bool {
        self.words.get((grain / 64) as usize).is_some_and(|word| word >> (grain % 64) & 1 == 1)
    }

    /// The first grain at or behind `grain` that is marked or is not.
    fn find(&self, grain: u64, marked: bool) -> Option<u64> {
        let flip = if marked { 0 } else { u64::MAX };
        let mut at = (grain / 64) as usize;
        let mut word = (self.words.get(at)? ^ flip) & (u64::MAX << (grain % 64));
        while word == 0 {
            at += 1;
            word = self.words.get(at)? ^ flip;
        }
        Some(at as u64 * 64 + u64::from(word.trailing_zeros()))
    }

    /// The first run of bytes at or behind `from`, a grain's start or the disk's end, that are all
    /// marked or all not.
    fn run(&self, from: u64, marked: bool) -> Option<Range<u64>> {
        let first = self.find(from.div_ceil(self.grain), marked)?;
        let start = first * self.grain;
        if start >= self.size {
            return None;
        }
        let end = self.find(first, !marked).map_or(self.size, |end| end * self.grain);
        Some(start..end.min(self.size))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const K: u64 = 1 << 10;
    const M: u64 = 1 << 20;

    fn plan(size: u64, ranges: &[(u64, u64)]) -> Plan {
        let mut plan = Plan::nothing(size);
        ranges.iter().for_each(|(start, end)| plan.mark(*start..*end));
        plan
    }

    /// The requests as pairs of start and end.
    fn requests(plan: &Plan) -> Vec<(u64, u64)> {
        pairs(plan.requests(REQUEST_MAX))
    }

    fn pairs(ranges: impl Iterator<Item = Range<u64>>) -> Vec<(u64, u64)> {
        ranges.map(|range| (range.start, range.end)).collect()
    }

    #[test]
    fn extents_become_requests() {
        assert_eq!(requests(&plan(8 * M, &[])), []);
        assert_eq!(requests(&plan(8 * M, &[(0, 1)])), [(0, 64 * K)]);
        // Neighbours are one request, whatever order they come in; the end is the disk's.
        let ranges = [(128 * K, 192 * K), (0, K), (64 * K, 65 * K), (8 * M, 9 * M), (5 * M, 5 * M)];
        let apart = plan(8 * M + 512, &ranges);
        assert_eq!(requests(&apart), [(0, 192 * K), (8 * M, 8 * M + 512)]);
        assert_eq!(apart.bytes(), 192 * K + 512);
        let whole = plan(5 * M / 2, &[(0, u64::MAX)]);
        assert_eq!(requests(&whole), [(0, M), (M, 2 * M), (2 * M, 5 * M / 2)]);
        let small = pairs(plan(8 * M, &[(M, M + 1)]).requests(32 * K));
        assert_eq!(small, [(M, M + 32 * K), (M + 32 * K, M + 64 * K)]);
        // What lies beyond the disk.
        assert_eq!(requests(&plan(M, &[(M, 2 * M), (u64::MAX, u64::MAX)])), []);
    }

    #[test]
    fn gaps_are_the_rest() {
        let some = plan(8 * M + 512, &[(M, 2 * M), (7 * M, 8 * M)]);
        let gaps = pairs(some.gaps(2 * M));
        let (first, last) = ((0, M), (8 * M, 8 * M + 512));
        assert_eq!(gaps, [first, (2 * M, 4 * M), (4 * M, 6 * M), (6 * M, 7 * M), last]);
        assert_eq!(pairs(Plan::nothing(M).gaps(u64::MAX)), [(0, M)]);
    }

    #[test]
    fn a_second_look_finds_what_is_new() {
        let first = plan(8 * M, &[(0, M)]);
        let second = plan(8 * M, &[(M / 2, 2 * M)]);
        let new = second.without(&first);
        assert_eq!(requests(&new), [(M, 2 * M)]);
        let mut both = first;
        both.add(&new);
        assert_eq!(requests(&both), [(0, M), (M, 2 * M)]);
    }

    /// Against a plain list of bytes marked, with extents as a hostile server might tell them.
    #[test]
    fn every_marked_byte_lies_in_exactly_one_request() {
        let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
        let mut random = move |below: u64| {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            seed % below
        };
        for round in 0..200 {
            let size = (random(20 * M) / 512 + 1) * 512;
            let mut plan = Plan::nothing(size);
            let mut grains = vec![false; size.div_ceil(GRAIN_MIN) as usize];
            for _ in 0..random(12) {
                let start = random(size + M);
                let end = start + random(3 * M);
                plan.mark(start..end);
                let hit = (start.min(size) / GRAIN_MIN)..end.min(size).div_ceil(GRAIN_MIN);
                if start < end.min(size) {
                    hit.for_each(|grain| grains[grain as usize] = true);
                }
            }
            let mut found = vec![0; grains.len()];
            let (mut bytes, mut end) = (0, 0);
            for request in plan.requests(512 + random(2 * M) / 512 * 512) {
                assert!(request.start < request.end && request.end <= size, "round {round}");
                assert!(request.end - request.start <= REQUEST_MAX, "round {round}");
                assert!(request.start >= end, "round {round}: twice");
                end = request.end;
                bytes += request.end - request.start;
                (request.start / GRAIN_MIN..request.end.div_ceil(GRAIN_MIN))
                    .for_each(|grain| found[grain as usize] = 1);
            }
            assert_eq!(bytes, plan.bytes(), "round {round}");
            let gaps: u64 = plan.gaps(M).map(|gap| gap.end - gap.start).sum();
            assert_eq!(bytes + gaps, size, "round {round}");
            let expected: Vec<i32> = grains.into_iter().map(i32::from).collect();
            assert_eq!(found, expected, "round {round}");
        }
    }

    #[test]
    fn the_largest_disk_takes_bounded_memory() {
        let mut plan = Plan::nothing(1 << 50);
        assert!(plan.words.len() * 8 <= 8 << 20);
        plan.mark((1 << 50) - 1..u64::MAX);
        assert_eq!(plan.bytes(), plan.grain);
        assert_eq!(plan.requests(REQUEST_MAX).count() as u64, plan.grain / REQUEST_MAX);
    }
}
