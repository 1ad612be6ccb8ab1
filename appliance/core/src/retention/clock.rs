//! Whether a group's clock can be trusted to say how old its history is.
//!
//! Log time comes from the primary. It advances with that node's monotonic clock and, over a restart,
//! with its wall clock. A clock that is wrong, or a node that lies, could make all history look old.
//! So the secondary compares: the distance of wall time to log time, which only a step changes, with
//! what it was; and the wall time of the newest frame with its own clock, which it cannot be ahead
//! of. Together they bound how far log time can run away, whatever the primary writes.

use crate::time::{LogTime, WallTime};

/// A difference of more than this, in microseconds, is for a person to judge.
pub const TRUST_US: i64 = 600_000_000;

/// What a person, or the group's beginning, has declared to be right.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Baseline {
    /// Wall time less log time, in microseconds.
    pub offset_us: i64,
    /// How far the newest frame was ahead of our clock, in microseconds; 0 when it was not.
    pub ahead_us: i64,
}

/// Why a clock is not trusted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Distrust {
    /// Wall time moved by so many microseconds against log time.
    Stepped(i64),
    /// The newest frame is of so many microseconds from now.
    Ahead(i64),
}

impl Baseline {
    /// What holds now is right.
    #[must_use]
    pub fn of(log_time: LogTime, wall: WallTime, own: WallTime) -> Self {
        let offset_us = wall.0.saturating_sub_unsigned(log_time.0);
        Self { offset_us, ahead_us: wall.0.saturating_sub(own.0).max(0) }
    }

    /// Whether the newest frame's times are as they should be, by our own clock.
    #[must_use]
    pub fn judge(&self, log_time: LogTime, wall: WallTime, own: WallTime) -> Option<Distrust> {
        let now = Self::of(log_time, wall, own);
        let step = now.offset_us.saturating_sub(self.offset_us);
        if step.saturating_abs() > TRUST_US {
            return Some(Distrust::Stepped(step));
        }
        let ahead = now.ahead_us.saturating_sub(self.ahead_us.max(0));
        (ahead > TRUST_US).then_some(Distrust::Ahead(now.ahead_us))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTE: i64 = 60_000_000;

    fn judge(baseline: Baseline, log: i64, wall: i64, own: i64) -> Option<Distrust> {
        let log = LogTime((log * MINUTE).unsigned_abs());
        baseline.judge(log, WallTime(wall * MINUTE), WallTime(own * MINUTE))
    }

    #[test]
    fn only_a_clock_that_runs_away_is_distrusted() {
        let right = Baseline { offset_us: 1000 * MINUTE, ahead_us: 0 };
        assert_eq!(judge(right, 0, 1000, 1000), None);
        // Behind for days, and catching up.
        assert_eq!(judge(right, 0, 1000, 9000), None);
        assert_eq!(judge(right, 8000, 9000, 9000), None);
        // A little ahead, or slewed.
        assert_eq!(judge(right, 109, 1109, 1100), None);
        assert_eq!(judge(right, 100, 1109, 1109), None);
        // A step of the wall clock.
        assert_eq!(judge(right, 100, 1111, 2000), Some(Distrust::Stepped(11 * MINUTE)));
        assert_eq!(judge(right, 100, 1089, 2000), Some(Distrust::Stepped(-11 * MINUTE)));
        // Log time alone cannot leap: that is a step too.
        assert_eq!(judge(right, 5000, 1100, 1100), Some(Distrust::Stepped(-4900 * MINUTE)));
        // Both together leap: that is ahead of us.
        assert_eq!(judge(right, 5000, 6000, 1100), Some(Distrust::Ahead(4900 * MINUTE)));
        // What a person has confirmed.
        let wall = WallTime(6000 * MINUTE);
        let log = LogTime(5000 * MINUTE.unsigned_abs());
        let confirmed = Baseline::of(log, wall, WallTime(1100 * MINUTE));
        assert_eq!(judge(confirmed, 5001, 6001, 1101), None);
        assert_eq!(judge(confirmed, 5020, 6020, 1101), Some(Distrust::Ahead(4919 * MINUTE)));
    }
}
