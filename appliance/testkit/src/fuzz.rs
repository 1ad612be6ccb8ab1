//! Mutation fuzzing as ordinary tests: inputs made by the real encoders are changed at random and
//! given to the real decoders, which may refuse them but may not panic, and may not allocate more
//! than their cap.
//!
//! It refuses to know what is decoded. Every input follows from the seed, the target's name and its
//! number alone, so a failure can be had again: `FUZZ_SEED=s FUZZ_INPUT=n` with the target's name as
//! the test's filter. `FUZZ_SECONDS` is the time for each target. A fuzzer that is led by coverage
//! (cargo-fuzz) needs a nightly compiler; here structure and checksums that are made anew lead deep
//! enough.

mod alloc;
mod mutate;

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::time::{Duration, Instant};

use crate::Chance;

pub use alloc::{Counting, allocated};
pub use mutate::mutate;

/// Seconds for each target when nothing else is asked for.
const SECONDS: u64 = 1;

/// At least so many inputs are tried, however slow they are.
const INPUTS_MIN: u64 = 50;

/// What is fuzzed.
#[derive(Debug)]
pub struct Target<'a> {
    /// What people call it; a part of what its inputs follow from.
    pub name: &'a str,
    /// Valid inputs, made by the real encoders.
    pub corpus: Vec<Vec<u8>>,
    /// Makes the checksums of a changed input right again, so that what lies behind them is
    /// reached; done for half of the inputs.
    pub seal: fn(&mut Vec<u8>),
    /// The most bytes that decoding one input may allocate, all in all; the test's binary must have
    /// [`Counting`] as its allocator.
    pub cap: u64,
}

/// Nothing to make right.
pub const fn unsealed(_input: &mut Vec<u8>) {}

/// Gives changed inputs to `decode` for as long as the environment says; `sealed` tells it whether
/// the checksums were made right. Returns how many inputs it took.
///
/// # Panics
/// When `decode` does, or allocates more than the cap; how to have that again is printed first.
#[expect(clippy::print_stdout, reason = "the runner shows it when the test fails")]
pub fn run(target: &Target<'_>, mut decode: impl FnMut(&[u8], bool)) -> u64 {
    alloc::check_installed();
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let seed = number("FUZZ_SEED").unwrap_or(0);
    let until = Instant::now() + Duration::from_secs(number("FUZZ_SECONDS").unwrap_or(SECONDS));
    for input in &target.corpus {
        one(target, input, true, seed, "the corpus", &mut decode);
    }
    if let Some(input) = number("FUZZ_INPUT") {
        let (bytes, sealed) = make(target, seed, input);
        one(target, &bytes, sealed, seed, &input.to_string(), &mut decode);
        return 1;
    }
    let mut count = 0;
    while count < INPUTS_MIN || Instant::now() < until {
        let (bytes, sealed) = make(target, seed, count);
        one(target, &bytes, sealed, seed, &count.to_string(), &mut decode);
        count += 1;
    }
    println!("{}: {count} inputs, FUZZ_SEED={seed}", target.name);
    count
}

/// The input with this number, and whether its checksums were made right.
fn make(target: &Target<'_>, seed: u64, input: u64) -> (Vec<u8>, bool) {
    let name = target.name.bytes().fold(0u64, |sum, byte| sum.rotate_left(5) ^ u64::from(byte));
    let mut chance = Chance::new(seed.rotate_left(32) ^ name.rotate_left(17) ^ input);
    let mut bytes = mutate(&mut chance, &target.corpus);
    let sealed = chance.percent(50);
    if sealed {
        (target.seal)(&mut bytes);
    }
    (bytes, sealed)
}

#[expect(clippy::print_stdout, reason = "the runner shows it when the test fails")]
fn one(
    target: &Target<'_>,
    bytes: &[u8],
    sealed: bool,
    seed: u64,
    input: &str,
    decode: &mut impl FnMut(&[u8], bool),
) {
    let before = allocated();
    let result = catch_unwind(AssertUnwindSafe(|| decode(bytes, sealed)));
    let taken = allocated() - before;
    let again = || {
        let shown = bytes.len().min(512);
        let hex: String = bytes.iter().take(shown).map(|byte| format!("{byte:02x}")).collect();
        println!("{}: replay with FUZZ_SEED={seed} FUZZ_INPUT={input}", target.name);
        println!("{} bytes: {hex}", bytes.len());
    };
    if let Err(panic) = result {
        again();
        resume_unwind(panic);
    }
    if taken > target.cap {
        again();
        panic!("{}: decoding allocated {taken} bytes, its cap is {}", target.name, target.cap);
    }
}
