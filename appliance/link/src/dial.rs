//! When to dial again. Pure: the caller has the clock and the dice.

use std::time::Duration;

/// The first wait.
const FIRST: Duration = Duration::from_millis(100);

/// The longest wait: a link that comes back is used again within this time.
const LONGEST: Duration = Duration::from_secs(5);

/// Waits between attempts: doubling from a tenth of a second to five, each shortened by chance so
/// that many nodes do not dial in step.
#[derive(Debug, Clone, Default)]
pub struct Backoff {
    failures: u32,
}

impl Backoff {
    /// How long to wait after one more failure; `chance` is any random number.
    pub fn after_failure(&mut self, chance: u64) -> Duration {
        let full = FIRST.saturating_mul(1 << self.failures.min(10)).min(LONGEST);
        self.failures = self.failures.saturating_add(1);
        full.mul_f64(0.5 + (chance % 512) as f64 / 1024.0)
    }

    /// A session was established.
    pub const fn success(&mut self) {
        self.failures = 0;
    }

    /// Attempts that failed in a row.
    #[must_use]
    pub const fn failures(&self) -> u32 {
        self.failures
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_to_a_bound_and_start_over() {
        let mut backoff = Backoff::default();
        let waits: Vec<Duration> =
            (0..20).map(|chance| backoff.after_failure(chance * 37)).collect();
        assert!(waits.iter().all(|wait| *wait >= FIRST / 2 && *wait <= LONGEST));
        assert!(waits[0] < waits[4] && *waits.last().unwrap() >= LONGEST / 2);
        backoff.success();
        assert!(backoff.after_failure(511) <= FIRST);
    }
}
