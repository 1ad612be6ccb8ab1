//! Random numbers that can be had again: the seed is printed, `NBD_TEST_SEED` brings it back.

use std::time::{SystemTime, UNIX_EPOCH};

/// A small generator (SplitMix64).
#[derive(Debug)]
pub(crate) struct Random(u64);

impl Random {
    /// Seeded from the environment or the clock; says so.
    pub(crate) fn new(test: &str) -> Self {
        let given = std::env::var("NBD_TEST_SEED").ok().and_then(|seed| seed.parse().ok());
        let clock = || {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
            now.as_nanos() as u64
        };
        let seed = given.unwrap_or_else(clock);
        println!("{test}: NBD_TEST_SEED={seed}");
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// Less than `bound`.
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    pub(crate) fn chance(&mut self, one_in: u64) -> bool {
        self.below(one_in) == 0
    }

    /// A generator of its own, for a task of its own.
    pub(crate) fn fork(&mut self) -> Self {
        Self(self.next())
    }
}
