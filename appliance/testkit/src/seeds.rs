//! Running a simulation for many seeds, on all processors.
//!
//! It refuses to know what is simulated. Each seed is a world of its own, so their order is nobody's
//! business; the one that failed is named.

use std::any::Any;
use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::panic::{catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread::ScopedJoinHandle;
use std::time::Duration;

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
    let outcome = run_all(simulation, &seeds, |_| true);
    for (what, count) in &outcome.coverage {
        println!("{count:8} {what}");
    }
    if let Some(failure) = outcome.failure {
        println!("replay with SIM_SEED={}", failure.seed);
        panic!("seed {}: {}", failure.seed, failure.message);
    }
    if seeds.end - seeds.start >= default {
        let missing = missing(simulation, &outcome.coverage);
        assert!(missing.is_empty(), "these never happened: {missing:?}");
    }
}

/// What should have happened and did not.
#[must_use]
pub fn missing(simulation: &Simulation, coverage: &Coverage) -> Vec<&'static str> {
    simulation.wanted.iter().filter(|what| !coverage.contains_key(*what)).copied().collect()
}

/// How a run over many seeds went.
#[derive(Debug)]
pub struct Outcome {
    /// What happened in all seeds that were clean.
    pub coverage: Coverage,
    /// How many these are.
    pub clean: u64,
    /// The lowest seed that failed; all below it are clean.
    pub failure: Option<Failure>,
}

/// A promise that was broken.
#[derive(Debug, Clone)]
pub struct Failure {
    /// The seed of its world.
    pub seed: u64,
    /// What the oracle said.
    pub message: String,
}

/// Runs the simulation for all `seeds`, until one fails or `go_on`, which hears now and then how
/// many were clean, says no.
pub fn run_all(
    simulation: &Simulation,
    seeds: &Range<u64>,
    go_on: impl Fn(u64) -> bool,
) -> Outcome {
    let (next, clean) = (AtomicU64::new(seeds.start), AtomicU64::new(0));
    // Seeds from here on are not worth running.
    let end = AtomicU64::new(seeds.end);
    let failure: Mutex<Option<Failure>> = Mutex::new(None);
    let work = || {
        let mut seen = Coverage::new();
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= end.load(Ordering::Relaxed) {
                return seen;
            }
            match catch_unwind(|| (simulation.run)(seed)) {
                Ok(found) => {
                    clean.fetch_add(1, Ordering::Relaxed);
                    add(&mut seen, found);
                }
                Err(panic) => {
                    end.fetch_min(seed, Ordering::Relaxed);
                    let mut failure = failure.lock().unwrap_or_else(PoisonError::into_inner);
                    if failure.as_ref().is_none_or(|other| seed < other.seed) {
                        *failure = Some(Failure { seed, message: message(&*panic) });
                    }
                }
            }
        }
    };
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let mut coverage = Coverage::new();
    std::thread::scope(|scope| {
        let running: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        while !running.iter().all(ScopedJoinHandle::is_finished) {
            if !go_on(clean.load(Ordering::Relaxed)) {
                end.store(0, Ordering::Relaxed);
            }
            std::thread::park_timeout(Duration::from_millis(20));
        }
        for thread in running {
            match thread.join() {
                Ok(seen) => add(&mut coverage, seen),
                Err(panic) => resume_unwind(panic),
            }
        }
    });
    let failure = failure.into_inner().unwrap_or_else(PoisonError::into_inner);
    Outcome { coverage, clean: clean.into_inner(), failure }
}

fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("a panic").to_owned()
}

fn add(all: &mut Coverage, some: Coverage) {
    for (what, count) in some {
        *all.entry(what).or_default() += count;
    }
}
