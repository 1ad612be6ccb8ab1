//! How fast the path delivers, and how long it takes when nobody queues: what the controller knows
//! of the path. Times are nanoseconds of one clock, whichever; rates are bytes per second.

use std::collections::VecDeque;

/// Nanoseconds of a second.
pub(crate) const SECOND: u64 = 1_000_000_000;

/// Points of the delivery's history that are kept. They lie a part of a round trip apart, so this
/// covers many of them.
const HISTORY_MAX: usize = 512;

/// Points of the history in one round trip.
const POINTS_PER_TRIP: u64 = 32;

/// `bytes` in `ns` nanoseconds, as bytes per second.
pub(crate) fn rate_of(bytes: u64, ns: u64) -> u64 {
    let rate = u128::from(bytes) * u128::from(SECOND) / u128::from(ns.max(1));
    u64::try_from(rate).unwrap_or(u64::MAX)
}

/// What goes at `rate` bytes per second in `ns` nanoseconds.
pub(crate) fn bytes_in(rate: u64, ns: u64) -> u64 {
    let bytes = u128::from(rate) * u128::from(ns) / u128::from(SECOND);
    u64::try_from(bytes).unwrap_or(u64::MAX)
}

/// So many percent of a value.
pub(crate) fn percent(value: u64, of_hundred: u64) -> u64 {
    u64::try_from(u128::from(value) * u128::from(of_hundred) / 100).unwrap_or(u64::MAX)
}

/// The state of the delivery at one moment.
#[derive(Debug, Clone, Copy)]
struct Point {
    at: u64,
    /// Bytes that had been acknowledged by then.
    delivered: u64,
    /// When the newest of those had been sent.
    newest_sent: u64,
}

/// A measured rate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Sample {
    /// Bytes per second.
    pub(crate) rate: u64,
    /// There was not always something to send: the path may be faster.
    pub(crate) app_limited: bool,
}

/// Measures the rate at which sent bytes are acknowledged: between the sending of a packet and its
/// acknowledgement, over the longer of the time that sending took and the time that acknowledging
/// took. So neither a burst of packets nor a bunch of acknowledgements looks like a fast path.
#[derive(Debug, Clone)]
pub(crate) struct Delivery {
    history: VecDeque<Point>,
    delivered: u64,
    newest_sent: u64,
    /// What was sent before this many bytes were delivered was sent for lack of more.
    app_limited_until: u64,
}

impl Delivery {
    pub(crate) fn new(now: u64) -> Self {
        let start = Point { at: now, delivered: 0, newest_sent: now };
        Self {
            history: VecDeque::from([start]),
            delivered: 0,
            newest_sent: now,
            app_limited_until: 0,
        }
    }

    /// Something is sent, and nothing was on its way: what was before says nothing about it.
    pub(crate) fn restart(&mut self, now: u64) {
        self.newest_sent = self.newest_sent.max(now);
        self.push(Point { at: now, delivered: self.delivered, newest_sent: now });
    }

    /// `bytes` that were sent at `sent` are acknowledged.
    pub(crate) fn acked(&mut self, sent: u64, bytes: u64) {
        self.delivered += bytes;
        self.newest_sent = self.newest_sent.max(sent);
    }

    /// All of a bunch of acknowledgements is counted, the newest of it sent at `sent`. A rate comes
    /// of it when the time is long enough to tell, which is `trip`.
    pub(crate) fn sample(&mut self, now: u64, sent: u64, trip: u64) -> Option<Sample> {
        // The newest point at or before the sending; those before it are of no use any more.
        while self.history.get(1).is_some_and(|next| next.at <= sent) {
            self.history.pop_front();
        }
        let from = *self.history.front()?;
        if self.history.back().is_none_or(|last| now >= last.at + trip / POINTS_PER_TRIP) {
            self.push(Point { at: now, delivered: self.delivered, newest_sent: self.newest_sent });
        }
        let acking = now.saturating_sub(from.at);
        let sending = sent.saturating_sub(from.newest_sent);
        let took = acking.max(sending);
        if from.at > sent || took == 0 || took < percent(trip, 90) {
            return None;
        }
        Some(Sample {
            rate: rate_of(self.delivered - from.delivered, took),
            app_limited: from.delivered < self.app_limited_until,
        })
    }

    /// There was nothing more to send, with `in_flight` bytes on their way.
    pub(crate) fn app_limited(&mut self, in_flight: u64) {
        self.app_limited_until = self.delivered + in_flight;
    }

    fn push(&mut self, point: Point) {
        if self.history.len() >= HISTORY_MAX {
            // The oldest: it belongs to a packet that was sent many round trips ago.
            self.history.pop_front();
        }
        self.history.push_back(point);
    }
}

/// The largest of the values of this cycle and of the one before.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Highest {
    before: u64,
    now: u64,
}

impl Highest {
    pub(crate) fn get(&self) -> u64 {
        self.before.max(self.now)
    }

    pub(crate) fn put(&mut self, value: u64) {
        self.now = self.now.max(value);
    }

    /// A new cycle begins. One that has seen nothing does not count as one.
    pub(crate) const fn turn(&mut self) {
        if self.now > 0 {
            self.before = self.now;
            self.now = 0;
        }
    }
}

/// The smallest of the values of the last five to ten seconds.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Lowest {
    before: u64,
    now: u64,
    since: u64,
}

/// Half of the time for which a smallest value counts, in nanoseconds.
const LOWEST_NS: u64 = 5 * SECOND;

impl Lowest {
    pub(crate) const fn new(now: u64) -> Self {
        Self { before: u64::MAX, now: u64::MAX, since: now }
    }

    /// Nothing before the first value.
    pub(crate) fn get(&self) -> Option<u64> {
        let lowest = self.before.min(self.now);
        (lowest != u64::MAX).then_some(lowest)
    }

    pub(crate) fn put(&mut self, value: u64, now: u64) {
        if now.saturating_sub(self.since) >= LOWEST_NS {
            self.before = self.now;
            self.now = u64::MAX;
            self.since = now;
        }
        self.now = self.now.min(value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    #[test]
    fn rates_are_bytes_per_second() {
        assert_eq!(rate_of(25_000, MS), 25_000_000);
        assert_eq!(bytes_in(25_000_000, MS), 25_000);
        assert_eq!(bytes_in(u64::MAX, u64::MAX), u64::MAX);
    }

    /// 1,000 bytes a millisecond, 10 ms there and back.
    fn steady(delivery: &mut Delivery, from: u64, to: u64) -> Vec<Sample> {
        let mut samples = Vec::new();
        for ms in from..to {
            let sent = ms * MS;
            delivery.acked(sent, 1_000);
            samples.extend(delivery.sample(sent + 10 * MS, sent, 10 * MS));
        }
        samples
    }

    #[test]
    fn a_steady_flow_has_its_rate() {
        let mut delivery = Delivery::new(0);
        let samples = steady(&mut delivery, 0, 500);
        assert!(samples.len() > 400);
        for sample in &samples[50..] {
            assert!((950_000..=1_050_000).contains(&sample.rate), "{sample:?}");
            assert!(!sample.app_limited);
        }
    }

    #[test]
    fn a_bunch_of_acknowledgements_is_no_fast_path() {
        let mut delivery = Delivery::new(0);
        let _ = steady(&mut delivery, 0, 100);
        // Twenty milliseconds' worth arrive at once.
        for ms in 100..120 {
            delivery.acked(ms * MS, 1_000);
        }
        let sample = delivery.sample(129 * MS, 119 * MS, 10 * MS).unwrap();
        assert!(sample.rate <= 1_150_000, "{sample:?}");
    }

    #[test]
    fn a_pause_is_not_a_slow_path() {
        let mut delivery = Delivery::new(0);
        let _ = steady(&mut delivery, 0, 100);
        delivery.restart(5_000 * MS);
        let samples = steady(&mut delivery, 5_000, 5_100);
        assert!(samples[20..].iter().all(|sample| sample.rate > 900_000), "{samples:?}");
    }

    #[test]
    fn what_was_sent_for_lack_of_more_is_marked() {
        let mut delivery = Delivery::new(0);
        let _ = steady(&mut delivery, 0, 100);
        delivery.app_limited(10_000);
        let samples = steady(&mut delivery, 100, 140);
        assert!(samples[1].app_limited && !samples.last().unwrap().app_limited);
    }

    #[test]
    fn extremes_are_forgotten_in_time() {
        let mut highest = Highest::default();
        highest.put(9);
        highest.turn();
        highest.put(4);
        assert_eq!(highest.get(), 9);
        highest.turn();
        assert_eq!(highest.get(), 4);
        highest.turn();
        assert_eq!(highest.get(), 4, "a cycle without a value is none");
        let mut lowest = Lowest::new(0);
        assert_eq!(lowest.get(), None);
        lowest.put(5, 1);
        lowest.put(8, 6 * SECOND);
        assert_eq!(lowest.get(), Some(5));
        lowest.put(9, 12 * SECOND);
        assert_eq!(lowest.get(), Some(8));
    }

    #[test]
    fn memory_is_bounded() {
        let mut delivery = Delivery::new(0);
        for ms in 0..100_000 {
            // Nothing newer is ever acknowledged.
            delivery.acked(0, 1);
            let _ = delivery.sample(ms * MS, 0, 1);
        }
        assert!(delivery.history.len() <= HISTORY_MAX);
    }
}
