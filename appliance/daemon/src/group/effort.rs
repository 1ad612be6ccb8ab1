//! How hard the link compresses: as hard as the link leaves time for.
//!
//! Compression is by far the dearest step on the way, and whether it pays depends on the content,
//! on this machine and on the link. So it is measured: while the link is busy, each effort is
//! judged by the content that it brings across per second; now and then a neighbour is tried for a
//! moment, and taken when it is clearly better. On a link that is faster than the processor this
//! ends at no compression at all, on a slow line at the strongest. Pure: the caller has the clock.

use srn_store::codec::Effort;

/// From none to strongest. zstd 3 costs twice what zstd 1 does for a few percent.
const LADDER: [Effort; 4] = [Effort::None, Effort::Lz4, Effort::Zstd(1), Effort::Zstd(3)];

/// Content in one window, in bytes: less tells nothing.
const WINDOW_BYTES: u64 = 8 << 20;

/// Time of one window, in microseconds, if the content is not reached before.
const WINDOW_US: u64 = 400_000;

/// A neighbour is first tried after this many windows; each failure doubles it.
const TRY_FIRST: u32 = 2;

/// A neighbour is tried at least after this many windows: links and content change.
const TRY_LAST: u32 = 128;

/// A link that takes this much without compression, in bytes of content per second, is left at
/// that: no step of the ladder encodes fast enough on one processor to be clearly better, and
/// trying costs the most just there.
const FAST_ENOUGH: u64 = 250_000_000;

/// A neighbour must be better by this factor (in percent) to be taken.
const BETTER_PERCENT: u64 = 115;

/// The controller of one stream.
#[derive(Debug, Clone)]
pub struct EffortControl {
    level: usize,
    /// Set while a neighbour is tried: the level to go back to, and its rate.
    home: Option<(usize, u64)>,
    windows: u32,
    /// Windows until a neighbour is tried.
    patience: u32,
    try_up: bool,
    content: u64,
    busy_us: u64,
    idle_us: u64,
}

impl Default for EffortControl {
    fn default() -> Self {
        Self {
            level: 0,
            home: None,
            windows: 0,
            patience: TRY_FIRST,
            try_up: true,
            content: 0,
            busy_us: 0,
            idle_us: 0,
        }
    }
}

impl EffortControl {
    /// What to use now.
    #[must_use]
    pub fn effort(&self) -> Effort {
        LADDER.get(self.level).copied().unwrap_or(Effort::None)
    }

    /// `content` bytes were encoded and handed to the link in `us` microseconds.
    pub fn sent(&mut self, content: u64, us: u64) {
        self.content += content;
        self.busy_us += us;
        self.judge();
    }

    /// There was nothing to send for `us` microseconds.
    pub fn idle(&mut self, us: u64) {
        self.idle_us += us;
        self.judge();
    }

    fn judge(&mut self) {
        if self.content < WINDOW_BYTES && self.busy_us + self.idle_us < WINDOW_US {
            return;
        }
        let rate = self.content.saturating_mul(1_000_000) / self.busy_us.max(1);
        // With time to spare nobody is waiting: stay.
        let saturated = self.busy_us > 4 * self.idle_us && self.content > 0;
        self.content = 0;
        self.busy_us = 0;
        self.idle_us = 0;
        if !saturated {
            if let Some((home, _)) = self.home.take() {
                self.level = home;
            }
            return;
        }
        match self.home.take() {
            Some((home, rate_home)) => {
                if rate.saturating_mul(100) < rate_home.saturating_mul(BETTER_PERCENT) {
                    self.level = home;
                    self.try_up = !self.try_up;
                    self.patience = (2 * self.patience).min(TRY_LAST);
                } else {
                    self.patience = TRY_FIRST;
                }
                self.windows = 0;
            }
            None if self.level == 0 && rate >= FAST_ENOUGH => {}
            None => {
                self.windows += 1;
                if self.windows >= self.patience {
                    self.try_neighbour(rate);
                }
            }
        }
    }

    fn try_neighbour(&mut self, rate: u64) {
        let up = if self.level == 0 {
            true
        } else if self.level + 1 == LADDER.len() {
            false
        } else {
            self.try_up
        };
        self.home = Some((self.level, rate));
        self.level = if up { self.level + 1 } else { self.level - 1 };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A link of `link` MB/s of wire bytes; a processor that encodes as on a usual machine.
    fn settle(link: f64, ratios: [f64; 4]) -> Effort {
        const CPU: [f64; 4] = [1e9, 800.0, 400.0, 250.0];
        let mut control = EffortControl::default();
        let mut at = [0u32; 4];
        for _ in 0..20_000 {
            let level = LADDER.iter().position(|e| *e == control.effort()).unwrap();
            at[level] += 1;
            let content = 0.25; // MiB
            let us = content / CPU[level] * 1e6 + content / ratios[level] / link * 1e6;
            control.sent(256 * 1024, us as u64);
        }
        let most = (0..4).max_by_key(|level| at[*level]).unwrap();
        assert!(at[most] > 15_000, "restless: {at:?}");
        LADDER[most]
    }

    #[test]
    fn the_effort_follows_link_and_content() {
        let text = [1.0, 1.9, 2.4, 2.6];
        let noise = [1.0, 1.0, 1.0, 1.0];
        assert_eq!(settle(2000.0, text), Effort::None);
        assert_eq!(settle(150.0, text), Effort::Lz4);
        assert!(matches!(settle(20.0, text), Effort::Zstd(_)));
        assert_eq!(settle(20.0, noise), Effort::None);
    }

    #[test]
    fn a_fast_link_is_not_slowed_by_tries() {
        let mut control = EffortControl::default();
        for _ in 0..10_000 {
            control.sent(1 << 20, (1 << 20) / 500);
            assert_eq!(control.effort(), Effort::None);
        }
    }

    #[test]
    fn an_idle_link_is_left_alone() {
        let mut control = EffortControl::default();
        for _ in 0..10_000 {
            control.sent(4096, 100);
            control.idle(10_000);
        }
        assert_eq!(control.effort(), Effort::None);
    }
}
