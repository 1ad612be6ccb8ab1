//! Running a simulation for many seeds, on all processors.
//!
//! It refuses to know what is simulated. Each seed is a world of its own, so their order is nobody's
//! business; the one that failed is named.

use std::collections::BTreeMap;
use std::panic::{RefUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// How often each thing happened over all seeds.
pub type Coverage = BTreeMap<&'static str, u64>;

/// Runs the simulation for `default` seeds, or as the environment says: `SIM_SEED=n` for one,
/// `SIM_SEEDS=n` for how many, from `SIM_FROM` on. With `default` seeds or more, everything in
/// `wanted` has to have happened: a simulation that no longer tries what it is for proves nothing.
///
/// # Panics
/// As the simulation does, once its seed is printed.
#[expect(clippy::print_stdout, reason = "the runner shows it when the test fails")]
pub fn run(
    default: u64,
    wanted: &[&str],
    simulate: impl Fn(u64) -> Coverage + Sync + RefUnwindSafe,
) {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let seeds = if let Some(seed) = number("SIM_SEED") {
        seed..seed + 1
    } else {
        let from = number("SIM_FROM").unwrap_or(0);
        from..from + number("SIM_SEEDS").unwrap_or(default)
    };
    let (next, failed) = (AtomicU64::new(seeds.start), AtomicBool::new(false));
    let work = || {
        let mut seen = Coverage::new();
        while !failed.load(Ordering::Relaxed) {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= seeds.end {
                break;
            }
            match catch_unwind(|| simulate(seed)) {
                Ok(found) => add(&mut seen, found),
                Err(panic) => {
                    failed.store(true, Ordering::Relaxed);
                    println!("replay with SIM_SEED={seed}");
                    resume_unwind(panic);
                }
            }
        }
        seen
    };
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let mut coverage = Coverage::new();
    std::thread::scope(|scope| {
        let running: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        for thread in running {
            match thread.join() {
                Ok(seen) => add(&mut coverage, seen),
                Err(panic) => resume_unwind(panic),
            }
        }
    });
    for (what, count) in &coverage {
        println!("{count:8} {what}");
    }
    if seeds.end - seeds.start >= default {
        let missing: Vec<_> = wanted.iter().filter(|what| !coverage.contains_key(*what)).collect();
        assert!(missing.is_empty(), "these never happened: {missing:?}");
    }
}

fn add(all: &mut Coverage, some: Coverage) {
    for (what, count) in some {
        *all.entry(what).or_default() += count;
    }
}
