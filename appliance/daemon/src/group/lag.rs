//! How far the peer is behind: seconds and bytes that would be lost if this node vanished now.
//!
//! The lag in seconds is the age of the oldest commit that the peer has not acknowledged, by the
//! monotonic clock; no clock of the peer enters into it. Commits that follow each other closely
//! are counted as one, so that the list stays short whatever the load.

use std::collections::VecDeque;

use srn_core::ids::Seq;
use srn_core::time::Mono;

/// Commits within this time count as one, in microseconds.
const STEP_US: u64 = 5_000;

/// Steps that are remembered; beyond that neighbours are joined, which makes the lag at most older.
const STEPS_MAX: usize = 4096;

#[derive(Debug, Clone, Copy)]
struct Step {
    /// When its first commit was durable.
    at: Mono,
    /// Its last frame.
    last: Seq,
    bytes: u64,
}

/// The commits which the peer has not acknowledged.
#[derive(Debug, Default)]
pub(super) struct Lag {
    steps: VecDeque<Step>,
    bytes: u64,
}

/// The lag at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Behind {
    /// Age of the oldest write that is not safe, in microseconds.
    pub(super) us: u64,
    /// Content that is not safe, in bytes.
    pub(super) bytes: u64,
}

impl Lag {
    /// A commit of `bytes` content bytes is durable here. Frames without content are not missed
    /// by anyone.
    pub(super) fn committed(&mut self, seq: Seq, bytes: u64, now: Mono) {
        if bytes == 0 {
            return;
        }
        self.bytes += bytes;
        let crowded = self.steps.len() >= STEPS_MAX;
        match self.steps.back_mut() {
            Some(step) if crowded || now.since(step.at) < STEP_US => {
                step.last = seq;
                step.bytes += bytes;
            }
            _ => self.steps.push_back(Step { at: now, last: seq, bytes }),
        }
    }

    /// The peer holds everything up to `seq`.
    pub(super) fn acknowledged(&mut self, seq: Seq) {
        while let Some(step) = self.steps.front().filter(|step| step.last <= seq) {
            self.bytes = self.bytes.saturating_sub(step.bytes);
            self.steps.pop_front();
        }
    }

    /// The lag now.
    #[must_use]
    pub(super) fn behind(&self, now: Mono) -> Behind {
        match self.steps.front() {
            Some(step) => Behind { us: now.since(step.at), bytes: self.bytes },
            None => Behind::default(),
        }
    }

    /// What was in the log before this process began is not safe either: `bytes` of it up to
    /// `seq`, of an age that is not known.
    pub(super) fn inherited(&mut self, seq: Seq, bytes: u64, now: Mono) {
        self.bytes += bytes;
        self.steps.push_back(Step { at: now, last: seq, bytes });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lag_is_the_age_of_the_oldest_unsafe_write() {
        let mut lag = Lag::default();
        assert_eq!(lag.behind(Mono(5)), Behind::default());
        lag.committed(Seq(1), 100, Mono(1_000));
        lag.committed(Seq(2), 50, Mono(2_000));
        lag.committed(Seq(3), 7, Mono(9_000));
        assert_eq!(lag.behind(Mono(10_000)), Behind { us: 9_000, bytes: 157 });
        lag.acknowledged(Seq(1));
        assert_eq!(lag.behind(Mono(10_000)).bytes, 157, "one step is one step");
        lag.acknowledged(Seq(2));
        assert_eq!(lag.behind(Mono(10_000)), Behind { us: 1_000, bytes: 7 });
        lag.committed(Seq(4), 0, Mono(99_000));
        lag.acknowledged(Seq(3));
        assert_eq!(lag.behind(Mono(100_000)), Behind::default());
    }

    #[test]
    fn memory_is_bounded() {
        let mut lag = Lag::default();
        for seq in 0..100_000 {
            lag.committed(Seq(seq), 1, Mono(seq * STEP_US));
        }
        assert!(lag.steps.len() <= STEPS_MAX);
        assert_eq!(lag.behind(Mono(100_000 * STEP_US)).bytes, 100_000);
        lag.acknowledged(Seq(99_999));
        assert_eq!(lag.bytes, 0);
    }
}
