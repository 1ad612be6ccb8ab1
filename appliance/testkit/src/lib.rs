//! A simulated world for tests. Nothing of it is shipped.
//!
//! Everything is drawn from one seed, so that a failure can be replayed by naming it.

pub mod chance;
pub mod disk;

pub use chance::Chance;
pub use disk::{BlockDisk, Fault, SimDisk};

/// The seeds of a run: `SIM_SEED=n` for one, `SIM_SEEDS=n` for how many (from `SIM_FROM`).
#[must_use]
pub fn seeds(default: u64) -> std::ops::Range<u64> {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    if let Some(seed) = number("SIM_SEED") {
        return seed..seed + 1;
    }
    let from = number("SIM_FROM").unwrap_or(0);
    from..from + number("SIM_SEEDS").unwrap_or(default)
}
