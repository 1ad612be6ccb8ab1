//! Running a simulation for many seeds, on all processors.
//!
//! It refuses to know what is simulated. Each seed is a world of its own, so their order is nobody's
//! business; the one that failed is named.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::panic::{catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// How often each thing happened over all seeds.
pub type Coverage = BTreeMap<&'static str, u64>;

/// A simulated world.
#[derive(Clone, Copy)]
pub struct Simulation {
    /// What people call it.
    pub name: &'static str,
    /// Lives through the world of one seed; panics when a promise is broken.
    pub run: fn(u64) -> Coverage,
    /// What has to have happened: a simulation that no longer tries what it is for proves nothing.
    pub wanted: &'static [&'static str],
}

impl fmt::Debug for Simulation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Simulation({})", self.name)
    }
}

/// Runs the simulation for `default` seeds, or as the environment says: `SIM_SEED=n` for one,
/// `SIM_SEEDS=n` for how many, from `SIM_FROM` on. With `default` seeds or more, everything that is
/// wanted has to have happened.
///
/// # Panics
/// As the simulation does, once its seed is printed.
#[expect(clippy::print_stdout, reason = "the runner shows it when the test fails")]
pub fn run(simulation: &Simulation, default: u64) {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let seeds = if let Some(seed) = number("SIM_SEED") {
        seed..seed + 1
    } else {
        let from = number("SIM_FROM").unwrap_or(0);
        from..from + number("SIM_SEEDS").unwrap_or(default)
    };
    let coverage = run_all(simulation, &seeds);
    for (what, count) in &coverage {
        println!("{count:8} {what}");
    }
    if seeds.end - seeds.start >= default {
        let missing = missing(simulation, &coverage);
        assert!(missing.is_empty(), "these never happened: {missing:?}");
    }
}

/// What should have happened and did not.
#[must_use]
pub fn missing(simulation: &Simulation, coverage: &Coverage) -> Vec<&'static str> {
    simulation.wanted.iter().filter(|what| !coverage.contains_key(*what)).copied().collect()
}

#[expect(clippy::print_stdout, reason = "the runner shows it when the test fails")]
fn run_all(simulation: &Simulation, seeds: &Range<u64>) -> Coverage {
    let (next, failed) = (AtomicU64::new(seeds.start), AtomicBool::new(false));
    let work = || {
        let mut seen = Coverage::new();
        while !failed.load(Ordering::Relaxed) {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= seeds.end {
                break;
            }
            match catch_unwind(|| (simulation.run)(seed)) {
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
    coverage
}

fn add(all: &mut Coverage, some: Coverage) {
    for (what, count) in some {
        *all.entry(what).or_default() += count;
    }
}
