//! What becomes of a packet on a line: pure, with the time and the chance from outside.

use std::time::Duration;

use crate::Chance;

/// What a line is like in one direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Bytes per second, with all headers; no limit when 0.
    pub rate: u64,
    /// Bytes that wait for the line at most; what comes then is dropped.
    pub queue: u64,
    /// How long each packet is on its way.
    pub delay: Duration,
    /// How much longer it may be, by chance: packets overtake each other.
    pub jitter: Duration,
    /// Packets of ten thousand that are delayed by `late` more.
    pub reordered: u64,
    /// How late those are.
    pub late: Duration,
    /// Packets of ten thousand that are lost.
    pub loss: u64,
    /// The largest packet, with all headers; no limit when 0.
    pub mtu: usize,
    /// Nothing passes.
    pub cut: bool,
}

impl Shape {
    /// A clear line.
    pub const CLEAR: Self = Self {
        rate: 0,
        queue: 0,
        delay: Duration::ZERO,
        jitter: Duration::ZERO,
        reordered: 0,
        late: Duration::ZERO,
        loss: 0,
        mtu: 0,
        cut: false,
    };

    /// A line of so many Mbit/s and this round trip, half of it in each direction, with a queue that
    /// holds as much as the line does. Packets have at most 1500 bytes.
    #[must_use]
    pub const fn of(mbit: u64, trip: Duration) -> Self {
        let rate = mbit * 125_000;
        let holds = rate * trip.as_micros() as u64 / 1_000_000;
        let delay = Duration::from_micros(trip.as_micros() as u64 / 2);
        Self { rate, queue: holds, delay, mtu: 1500, ..Self::CLEAR }
    }
}

/// What has passed, and what has not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counts {
    /// Packets that passed, and their bytes with all headers.
    pub packets: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Packets that were lost by chance.
    pub lost: u64,
    /// Packets for which there was no room in the queue.
    pub dropped: u64,
    /// Packets that were too large.
    pub oversized: u64,
}

/// One direction of a line.
#[derive(Debug, Clone)]
pub struct Line {
    shape: Shape,
    chance: Chance,
    /// When all that waits has gone.
    free: Duration,
    counts: Counts,
}

impl Line {
    /// A line with its own chance.
    #[must_use]
    pub const fn new(shape: Shape, seed: u64) -> Self {
        Self {
            shape,
            chance: Chance::new(seed),
            free: Duration::ZERO,
            counts: Counts { packets: 0, bytes: 0, lost: 0, dropped: 0, oversized: 0 },
        }
    }

    /// From now on it is like this.
    pub const fn set(&mut self, shape: Shape) {
        self.shape = shape;
    }

    /// From now on nothing passes, or it does again.
    pub const fn cut(&mut self, cut: bool) {
        self.shape.cut = cut;
    }

    /// What it is like.
    #[must_use]
    pub const fn shape(&self) -> Shape {
        self.shape
    }

    /// What has passed so far.
    #[must_use]
    pub const fn counts(&self) -> Counts {
        self.counts
    }

    /// When a packet of `length` bytes with all headers, put on the line at `now`, arrives; none
    /// when it does not.
    pub fn fate(&mut self, now: Duration, length: usize) -> Option<Duration> {
        let Shape { rate, queue, delay, jitter, reordered, late, loss, mtu, cut } = self.shape;
        if cut {
            return None;
        }
        if mtu > 0 && length > mtu {
            self.counts.oversized += 1;
            return None;
        }
        let begins = self.free.max(now);
        let gone = if rate == 0 {
            now
        } else {
            let waiting = u128::from(rate) * (begins - now).as_nanos() / 1_000_000_000;
            if waiting + length as u128 > u128::from(queue.max(length as u64)) {
                self.counts.dropped += 1;
                return None;
            }
            begins + Duration::from_nanos(length as u64 * 1_000_000_000 / rate)
        };
        self.free = gone;
        if self.chance.below(10_000) < loss {
            self.counts.lost += 1;
            return None;
        }
        self.counts.packets += 1;
        self.counts.bytes += length as u64;
        let longer = self.chance.below(jitter.as_micros() as u64 + 1);
        let later = if self.chance.below(10_000) < reordered { late } else { Duration::ZERO };
        Some(gone + delay + Duration::from_micros(longer) + later)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn a_line_passes_its_rate_and_drops_what_it_cannot_keep() {
        // 1,000 bytes a millisecond, ten of them wait.
        let shape = Shape { rate: 1_000_000, queue: 10_000, delay: 5 * MS, ..Shape::CLEAR };
        let mut line = Line::new(shape, 1);
        let arrived: Vec<Duration> =
            (0..20).filter_map(|_| line.fate(Duration::ZERO, 1000)).collect();
        assert_eq!(arrived.len(), 10);
        assert_eq!((arrived[0], arrived[9]), (6 * MS, 15 * MS));
        assert_eq!(line.counts().dropped, 10);
        assert_eq!(line.fate(20 * MS, 1000), Some(26 * MS));
    }

    #[test]
    fn losses_and_delays_are_those_of_the_seed() {
        let shape = Shape { loss: 1_000, jitter: 9 * MS, reordered: 100, late: MS, ..Shape::CLEAR };
        let run = |seed| {
            let mut line = Line::new(shape, seed);
            (0..10_000).map(|_| line.fate(Duration::ZERO, 1)).collect::<Vec<_>>()
        };
        assert_eq!(run(3), run(3));
        assert_ne!(run(3), run(4));
        let lost = run(3).iter().filter(|fate| fate.is_none()).count();
        assert!((900..1100).contains(&lost), "{lost}");
    }

    #[test]
    fn what_is_too_large_does_not_pass() {
        let mut line = Line::new(Shape { mtu: 1280, ..Shape::CLEAR }, 1);
        assert!(line.fate(MS, 1280).is_some() && line.fate(MS, 1281).is_none());
        line.set(Shape { cut: true, ..Shape::CLEAR });
        assert_eq!(line.fate(MS, 1), None);
    }
}
