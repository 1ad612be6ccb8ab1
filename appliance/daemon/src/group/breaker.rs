//! Leaves work alone that fails again and again, so that it neither fills the log nor keeps other work
//! from being done; tries it again ever more rarely, and says when a person is needed. Pure: time is
//! an argument.

use std::time::{Duration, Instant};

/// After the first failure the work is left alone for so long; after each further one twice as long,
const REST_MIN: Duration = Duration::from_secs(30);

/// up to this.
const REST_MAX: Duration = Duration::from_secs(3600);

/// Failures in a row after which a person has to know.
const ALERT_AFTER: u32 = 3;

/// What to say about a failure or its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Say {
    /// A line in the log is enough.
    Little,
    /// It does not go away by itself.
    Alert,
}

/// Counts failures in a row.
#[derive(Debug, Default)]
pub(super) struct Breaker {
    failures: u32,
    rests_until: Option<Instant>,
    why: String,
}

impl Breaker {
    /// Whether the work is left alone now.
    pub(super) fn rests(&self, now: Instant) -> bool {
        self.rests_until.is_some_and(|until| now < until)
    }

    /// It failed. Says how loudly to tell, and for how long it is left alone.
    pub(super) fn failed(&mut self, why: String, now: Instant) -> (Say, Duration) {
        self.failures = self.failures.saturating_add(1);
        let doublings = (self.failures - 1).min(16);
        let rest = REST_MIN.saturating_mul(1 << doublings).min(REST_MAX);
        self.rests_until = Some(now + rest);
        self.why = why;
        let say = if self.failures == ALERT_AFTER { Say::Alert } else { Say::Little };
        (say, rest)
    }

    /// Something has changed: it is worth another try now.
    pub(super) const fn again(&mut self) {
        self.rests_until = None;
    }

    /// It was done. Says whether that is worth telling.
    pub(super) fn succeeded(&mut self) -> Option<Say> {
        let failures = std::mem::take(&mut self.failures);
        self.rests_until = None;
        self.why.clear();
        match failures {
            0 => None,
            few if few < ALERT_AFTER => Some(Say::Little),
            _ => Some(Say::Alert),
        }
    }

    /// Why a person is needed, if one is.
    pub(super) fn trouble(&self) -> Option<&str> {
        (self.failures >= ALERT_AFTER).then_some(&*self.why)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_rests_longer_each_time_and_tells_a_person_once() {
        let (mut breaker, mut now) = (Breaker::default(), Instant::now());
        assert!(!breaker.rests(now));
        let mut rests = Vec::new();
        for failure in 1..=10 {
            let (say, rest) = breaker.failed("damaged".into(), now);
            assert_eq!(say == Say::Alert, failure == 3);
            assert!(breaker.rests(now + rest - Duration::from_millis(1)));
            assert!(!breaker.rests(now + rest));
            rests.push(rest.as_secs());
            now += rest;
        }
        assert_eq!(rests, [30, 60, 120, 240, 480, 960, 1920, 3600, 3600, 3600]);
        assert_eq!(breaker.trouble(), Some("damaged"));
        now -= Duration::from_secs(1);
        assert!(breaker.rests(now));
        breaker.again();
        assert!(!breaker.rests(now));
        assert_eq!(breaker.trouble(), Some("damaged"), "a try is no success");
        assert_eq!(breaker.succeeded(), Some(Say::Alert));
        assert_eq!((breaker.trouble(), breaker.rests(now)), (None, false));
        assert_eq!(breaker.succeeded(), None);
    }

    #[test]
    fn a_passing_failure_is_no_alert() {
        let mut breaker = Breaker::default();
        let (say, _) = breaker.failed("busy".into(), Instant::now());
        assert_eq!((say, breaker.succeeded()), (Say::Little, Some(Say::Little)));
    }
}
