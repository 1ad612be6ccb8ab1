//! Times as values. Nothing here can read a clock.

use core::fmt;

/// Microseconds since 1970-01-01T00:00:00Z as the node's wall clock had it. It may step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct WallTime(pub i64);

/// Microseconds of a group's own time: advances by the monotonic clock, never goes back.
///
/// Retention counts in it, so a wall clock that steps cannot make history look old.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct LogTime(pub u64);

/// Microseconds on the caller's monotonic clock; only differences mean anything.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Mono(pub u64);

impl Mono {
    /// Microseconds since `earlier`, zero if that lies in the future.
    #[must_use]
    pub const fn since(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

/// A moment as the shell hands it in: all three clocks read together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Now {
    /// Monotonic clock.
    pub mono: Mono,
    /// Wall clock.
    pub wall: WallTime,
}

impl fmt::Display for LogTime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{:06}", self.0 / 1_000_000, self.0 % 1_000_000)
    }
}

/// A wall step of at least this many microseconds is recorded in the log.
pub const CLOCK_STEP_MIN_US: i64 = 1_000_000;

/// A group's own clock: turns the node's clocks into log time and notices wall steps.
#[derive(Debug, Clone, Copy)]
pub struct LogClock {
    log: LogTime,
    at: Now,
}

impl LogClock {
    /// Goes on from the last frame written: `last` and `wall_then` are that frame's times.
    ///
    /// The time the node was down is taken from the wall clock, as nothing else knows it; a wall
    /// clock that went back meanwhile counts as no time at all.
    #[must_use]
    pub fn resume(last: LogTime, wall_then: WallTime, now: Now) -> Self {
        let down = now.wall.0.saturating_sub(wall_then.0).max(0).unsigned_abs();
        let down = if last == LogTime(0) { 0 } else { down };
        Self { log: LogTime(last.0.saturating_add(down)), at: now }
    }

    /// Advances to `now`; returns the log time, and the step in microseconds if the wall clock
    /// moved by a second or more against the monotonic one since the last call.
    pub fn tick(&mut self, now: Now) -> (LogTime, Option<i64>) {
        let elapsed = now.mono.since(self.at.mono);
        let expected = self.at.wall.0.saturating_add_unsigned(elapsed);
        let step = now.wall.0.saturating_sub(expected);
        self.log = LogTime(self.log.0.saturating_add(elapsed));
        self.at = now;
        (self.log, (step.abs() >= CLOCK_STEP_MIN_US).then_some(step))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn now(mono: u64, wall: i64) -> Now {
        Now { mono: Mono(mono), wall: WallTime(wall) }
    }

    #[test]
    fn log_time_follows_the_monotonic_clock_and_reports_steps() {
        let mut clock = LogClock::resume(LogTime(0), WallTime(0), now(5, 1_000));
        assert_eq!(clock.tick(now(1_005, 2_000)), (LogTime(1_000), None));
        assert_eq!(clock.tick(now(2_005, 5_003_000)), (LogTime(2_000), Some(5_000_000)));
        assert_eq!(clock.tick(now(3_005, 4_000)), (LogTime(3_000), Some(-5_000_000)));
        assert_eq!(clock.tick(now(4_005, 5_000)), (LogTime(4_000), None));
    }

    #[test]
    fn time_spent_down_counts_unless_the_wall_went_back() {
        let mut clock = LogClock::resume(LogTime(7), WallTime(100), now(0, 600));
        assert_eq!(clock.tick(now(0, 600)).0, LogTime(507));
        let mut clock = LogClock::resume(LogTime(7), WallTime(100), now(0, 50));
        assert_eq!(clock.tick(now(0, 50)).0, LogTime(7));
    }
}
