//! Whether a client's next request is worth a moment's looking out for.
//!
//! A client that waits for each answer before it asks again sends its next request some ten
//! microseconds after the answer. Going to sleep and being woken takes as long again, for every
//! request. So while requests keep coming that quickly the reader looks for the next one for a
//! moment before it sleeps; as soon as they do not, it sleeps at once. Pure: the reader has clock
//! and socket.

use std::time::Duration;

/// How long to look out.
pub(super) const LOOK: Duration = Duration::from_micros(20);

/// A request that woke a sleeper within this time would have been seen by looking out.
const QUICK: Duration = Duration::from_micros(40);

/// Points for a quick request, and off for a late one: one late in eight is too many.
const GAIN: u8 = 1;
const LOSS: u8 = 8;
const FULL: u8 = 32;
const ENOUGH: u8 = 16;

/// The habit of one client.
#[derive(Debug, Default)]
pub(super) struct Brisk {
    points: u8,
}

impl Brisk {
    /// Whether to look out for the next request.
    pub(super) const fn is_worth_a_look(&self) -> bool {
        self.points >= ENOUGH
    }

    /// The next request has come after `waited`, looked out for or slept.
    pub(super) fn came_after(&mut self, waited: Duration) {
        self.points = if waited <= QUICK {
            self.points.saturating_add(GAIN).min(FULL)
        } else {
            self.points.saturating_sub(LOSS)
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(waits: impl IntoIterator<Item = u64>) -> bool {
        let mut brisk = Brisk::default();
        waits.into_iter().for_each(|us| brisk.came_after(Duration::from_micros(us)));
        brisk.is_worth_a_look()
    }

    #[test]
    fn only_a_client_that_keeps_coming_is_looked_out_for() {
        assert!(!after([]));
        assert!(!after([5; 8]), "not yet");
        assert!(after([5; 40]));
        assert!(!after([5; 40].into_iter().chain([1000; 3])), "it has slowed down");
        assert!(!after((0..1000).map(|n| if n % 4 == 0 { 500 } else { 5 })), "now and then");
        assert!(after((0..1000).map(|n| if n % 100 == 0 { 500 } else { 5 })), "a hiccup");
    }
}
