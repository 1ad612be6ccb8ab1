//! How much may be on its way, and how fast: a machine that is told what was sent, acknowledged and
//! lost, and by whose clock. It has no clock of its own and knows no packets.
//!
//! It sends at the rate at which the path delivers, and asks for more now and then. A lost packet
//! by itself means nothing: radio, a worn cable and a busy receiver lose some whatever the rate.
//! Only what is lost beyond [`LOSS_PERCENT`] in a round trip, or beyond the usual while a queue
//! stands, tells that too much is sent. The rate is measured as [`super::delivery`] says, the model is that of BBR (draft-cardwell-ccwg-bbr):
//!
//! * **Startup** doubles each round trip until the delivery grows no more, **Drain** takes the queue
//!   away that this has built.
//! * **Cruise** sends as fast as the path delivers; **Up** a quarter faster for a round trip, and
//!   **Down** slower until that queue is gone. Finding nothing makes the next Up come later.
//! * Every ten seconds **Empty** halves what is on its way for a round trip: the queue of our own is
//!   gone then, and the path shows its shortest time.
//!
//! The caller can hold back by a window only, which is asked for at each acknowledgement. So the
//! rate is kept by a window that grows with the time: what is on its way, and what the rate allows.

use super::delivery::{Delivery, Highest, Lowest, SECOND, bytes_in, percent};

/// What may be lost in a round trip, in percent of what was sent: more means that a queue is full.
pub(crate) const LOSS_PERCENT: u64 = 4;

/// Fewer packets lost in a round trip say nothing.
const LOST_PACKETS: u64 = 6;

/// Fewer packets than this are never allowed.
const PACKETS_MIN: u64 = 4;

/// What may be on its way while nothing is known, of what the path delivers in a round trip, in
/// percent; it is also the rate. The least that doubles the delivery in each round trip.
const STARTUP: u64 = 277;

/// The rate in Drain: what Startup took a round trip to build up, a round trip takes away.
const DRAIN: u64 = 36;

/// The rate in Up and Down.
const UP: u64 = 125;
const DOWN: u64 = 80;

/// The rate in each second Up while a queue stands that is not ours: what it costs others is more
/// than what it finds.
const UP_GENTLE: u64 = 112;

/// What may be on its way at most, of what the path holds: packets wait for others' queues too.
const WINDOW: u64 = 200;

/// What may be on its way in Empty.
const EMPTY: u64 = 50;

/// Startup goes on while the delivery grows by this, in percent, within three round trips.
const GROWTH: u64 = 125;

/// Round trips of Cruise after an Up that found nothing; they double each time.
const CRUISE_ROUNDS: u64 = 6;
const CRUISE_ROUNDS_MAX: u64 = 32;

/// An Up has found more when the path delivers so many percent of what it did before; the next one
/// comes after this many round trips then.
const FOUND: u64 = 110;
const AGAIN_ROUNDS: u64 = 2;

/// Cruise ends after this time on a long path, in nanoseconds.
const CRUISE_NS: u64 = 3 * SECOND;

/// Time from one Empty to the next, in nanoseconds.
const EMPTY_NS: u64 = 10 * SECOND;

/// Below this round trip the rate is not kept, only the window: acknowledgements come too rarely
/// for it, and waking up often costs more than a queue does. In nanoseconds.
const NEAR_NS: u64 = 2_000_000;

/// What is allowed beside what the path holds, as time: a receiver that was not woken at once. The
/// second for a path below [`NEAR_NS`].
const STALL_NS: u64 = 4_000_000;
const STALL_NEAR_NS: u64 = 10_000_000;

/// What fits through a queue that is full, in percent of what has just come through.
const FITS: u64 = 97;

/// A queue stands when the shortest time of a round trip in Cruise is so many percent of the
/// shortest ever. What is lost then beyond the usual tells that it is full: others give way, and so
/// do we.
const QUEUED: u64 = 120;

/// The rate of the first round trips in which a queue stands in Cruise: if it was ours, it goes.
const EASE: u64 = 90;
const EASE_ROUNDS: u64 = 4;

/// Loss beside the usual that means nothing yet, in millionths.
const LOSS_NOISE_PPM: u64 = 300;

/// What is left of the bound after a round trip that lost too much, in percent.
const BACK_OFF: u64 = 85;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    Startup,
    Drain,
    Cruise,
    Up,
    Down,
    Empty,
}

/// The machine.
#[derive(Debug, Clone)]
pub(crate) struct RateControl {
    mtu: u64,
    initial: u64,
    delivery: Delivery,
    /// The rate at which the path delivers.
    highest: Highest,
    /// The newest measured.
    newest_rate: u64,
    /// The time that the path takes.
    lowest: Lowest,
    /// The newest round trip.
    latest: u64,
    in_flight: u64,
    /// When the newest packet of this bunch of acknowledgements was sent.
    newest_acked: Option<u64>,

    phase: Phase,
    phase_since: u64,
    /// Startup: the rate from which growth is counted, and round trips without any.
    full: u64,
    full_rounds: u64,
    /// Up: the rate before it.
    rate_before: u64,
    cruise_rounds: u64,
    emptied: u64,

    /// A round trip ends when something is acknowledged that was sent after this.
    round_began: u64,
    phase_rounds: u64,
    round_lost: u64,
    round_delivered: u64,
    round_marked: bool,
    /// The shortest time that a packet took in this round trip.
    round_lowest: u64,
    /// What may be on its way without losing too much.
    bound: u64,
    /// The rate since the bound was found: forgotten with the next Up.
    rate_bound: u64,
    /// Round trips of this Cruise that were slowed down because a queue stood.
    eased: u64,
    /// This is one.
    eases: bool,
    /// A queue stood in the newest round trip of Cruise.
    queued: bool,
    /// Up asks for less.
    gentle: bool,
    /// Loss over the last round trips, in millionths; and over many, which is what the path loses
    /// whatever is sent.
    loss_ppm: u64,
    usual_ppm: u64,

    /// What the rate allows to be sent now, in bytes.
    tokens: u64,
    refilled: u64,
}

impl RateControl {
    /// A path of which nothing is known. `initial` is what may be on its way then, in bytes.
    pub(crate) fn new(initial: u64, mtu: u16, now: u64) -> Self {
        Self {
            mtu: mtu.into(),
            initial,
            delivery: Delivery::new(now),
            highest: Highest::default(),
            newest_rate: 0,
            lowest: Lowest::new(now),
            latest: 0,
            in_flight: 0,
            newest_acked: None,
            phase: Phase::Startup,
            phase_since: now,
            full: 0,
            full_rounds: 0,
            rate_before: 0,
            cruise_rounds: CRUISE_ROUNDS,
            emptied: now,
            round_began: now,
            phase_rounds: 0,
            round_lost: 0,
            round_delivered: 0,
            round_marked: false,
            round_lowest: u64::MAX,
            bound: u64::MAX,
            rate_bound: u64::MAX,
            eased: 0,
            eases: false,
            queued: false,
            gentle: false,
            loss_ppm: 0,
            usual_ppm: 0,
            tokens: 0,
            refilled: now,
        }
    }

    /// `bytes` were sent.
    pub(crate) fn on_sent(&mut self, now: u64, bytes: u64) {
        if self.in_flight == 0 {
            self.delivery.restart(now);
            self.refilled = now;
            self.tokens = self.burst();
        }
        self.refill(now);
        self.in_flight += bytes;
        self.tokens = self.tokens.saturating_sub(bytes);
    }

    /// `bytes` that were sent at `sent` have arrived.
    pub(crate) fn on_ack(&mut self, now: u64, sent: u64, bytes: u64) {
        self.delivery.acked(sent, bytes);
        self.round_delivered += bytes;
        if self.newest_acked.is_none_or(|newest| sent >= newest) {
            self.newest_acked = Some(sent);
            self.latest = now.saturating_sub(sent).max(1);
        }
    }

    /// All of a bunch of acknowledgements was counted; `in_flight` bytes are on their way. With
    /// `app_limited` there was not enough to send.
    pub(crate) fn on_acks_end(&mut self, now: u64, in_flight: u64, app_limited: bool) {
        self.in_flight = in_flight;
        let Some(sent) = self.newest_acked.take() else { return };
        self.lowest.put(self.latest, now);
        self.round_lowest = self.round_lowest.min(self.latest);
        if let Some(sample) = self.delivery.sample(now, sent, self.trip())
            && (!sample.app_limited || sample.rate > self.highest.get())
        {
            self.highest.put(sample.rate);
            self.newest_rate = sample.rate;
        }
        if app_limited {
            self.delivery.app_limited(in_flight);
        }
        self.refill(now);
        if sent >= self.round_began {
            self.end_round(now, app_limited);
        }
        self.advance(now);
    }

    /// `bytes` are lost; none, but a mark of a queue that fills, when `bytes` is 0. After
    /// `persistent` loss the path is not what it was.
    pub(crate) fn on_lost(&mut self, now: u64, bytes: u64, persistent: bool) {
        if persistent {
            *self = Self::new(self.initial.min(16 * self.mtu), self.mtu_u16(), now);
            return;
        }
        self.in_flight = self.in_flight.saturating_sub(bytes);
        self.round_lost += bytes;
        self.round_marked |= bytes == 0;
    }

    /// The path takes packets of this size.
    pub(crate) fn on_mtu(&mut self, mtu: u16) {
        self.mtu = mtu.into();
    }

    /// What may be on its way now, in bytes.
    pub(crate) fn window(&self) -> u64 {
        let most = self.most();
        if !self.keeps_rate() {
            return most;
        }
        // With little on its way no acknowledgement may come that would let us go on.
        let least = (self.holds() / 2).max(PACKETS_MIN * self.mtu);
        (self.in_flight + self.tokens).max(least).min(most)
    }

    /// The rate at which is sent, in bytes per second, once one is known.
    pub(crate) fn rate(&self) -> Option<u64> {
        let rate = self.path_rate();
        (rate > 0).then(|| percent(rate, self.gain()))
    }

    /// The rate at which the path delivers as far as is known, in bytes per second.
    pub(crate) fn path_rate(&self) -> u64 {
        self.highest.get().min(self.rate_bound)
    }

    /// Loss over the last round trips, in millionths of what was sent.
    pub(crate) const fn loss_ppm(&self) -> u64 {
        self.loss_ppm
    }

    fn mtu_u16(&self) -> u16 {
        u16::try_from(self.mtu).unwrap_or(u16::MAX)
    }

    /// The shortest round trip.
    fn trip(&self) -> u64 {
        self.lowest.get().unwrap_or(0)
    }

    /// What the path holds without a queue.
    fn holds(&self) -> u64 {
        bytes_in(self.path_rate(), self.trip())
    }

    fn is_near(&self) -> bool {
        self.trip() < NEAR_NS
    }

    /// In Startup the window alone counts: what is measured first is how few packets were sent.
    fn keeps_rate(&self) -> bool {
        self.phase != Phase::Startup && self.path_rate() > 0 && !self.is_near()
    }

    const fn gain(&self) -> u64 {
        match self.phase {
            Phase::Startup => STARTUP,
            Phase::Drain => DRAIN,
            Phase::Cruise if self.eases => EASE,
            Phase::Cruise => 100,
            Phase::Up if self.gentle => UP_GENTLE,
            Phase::Up => UP,
            Phase::Down | Phase::Empty => DOWN,
        }
    }

    /// The most that may be on its way.
    fn most(&self) -> u64 {
        let least = PACKETS_MIN * self.mtu;
        if self.path_rate() == 0 {
            return self.initial.max(least);
        }
        let holds = self.holds();
        let stall = if self.is_near() { STALL_NEAR_NS } else { STALL_NS };
        let most = match self.phase {
            Phase::Startup => percent(holds, STARTUP).max(self.initial),
            Phase::Empty => return percent(holds, EMPTY).max(least),
            _ => percent(holds, WINDOW),
        };
        let most = most.saturating_add(bytes_in(self.path_rate(), stall));
        // Cubic would use all there is: on a near path the first window is never too much.
        let most = if self.is_near() { most.max(self.initial) } else { most };
        most.min(self.bound).max(least)
    }

    /// What the rate may save up, in bytes: acknowledgements come in bunches.
    fn burst(&self) -> u64 {
        let time = (self.trip() / 4).clamp(SECOND / 1000, SECOND / 50);
        bytes_in(self.path_rate(), time).max(10 * self.mtu)
    }

    fn refill(&mut self, now: u64) {
        let Some(rate) = self.rate() else { return };
        let elapsed = now.saturating_sub(self.refilled);
        let more = bytes_in(rate, elapsed);
        // A time too short for a byte is not forgotten.
        if more > 0 {
            self.refilled = now;
            self.tokens = self.tokens.saturating_add(more).min(self.burst());
        }
    }

    fn end_round(&mut self, now: u64, app_limited: bool) {
        self.round_began = now;
        self.phase_rounds += 1;
        let sent = self.round_lost + self.round_delivered;
        let ppm = self.round_lost.saturating_mul(1_000_000) / sent.max(1);
        let unusual = 2 * self.usual_ppm + LOSS_NOISE_PPM;
        self.usual_ppm = (31 * self.usual_ppm + ppm) / 32;
        self.loss_ppm = (7 * self.loss_ppm + ppm) / 8;
        let too_much = (ppm > LOSS_PERCENT * 10_000 && self.round_lost >= LOST_PACKETS * self.mtu)
            || self.round_marked;
        self.round_delivered = 0;
        let lost = std::mem::take(&mut self.round_lost);
        self.round_marked = false;
        if self.phase == Phase::Startup && !app_limited {
            self.judge_startup();
        }
        let queued = self.round_lowest >= percent(self.trip(), QUEUED);
        self.round_lowest = u64::MAX;
        self.eases = false;
        if self.phase == Phase::Cruise {
            self.queued = queued;
        }
        if too_much {
            self.back_off(now);
        } else if self.phase == Phase::Cruise && queued {
            if lost > 0 && ppm > unusual {
                self.give_way();
            } else if self.eased < EASE_ROUNDS {
                self.eased += 1;
                self.eases = true;
            }
        }
    }

    /// Whether the delivery has ceased to grow.
    fn judge_startup(&mut self) {
        let rate = self.highest.get();
        if rate >= percent(self.full, GROWTH) {
            self.full = rate;
            self.full_rounds = 0;
        } else {
            self.full_rounds += 1;
        }
    }

    /// Too much was lost: a queue was full. What is lost on the way down was sent before.
    fn back_off(&mut self, now: u64) {
        match self.phase {
            Phase::Startup => self.enter(Phase::Drain, now),
            Phase::Up => {
                self.lower_bound();
                self.enter(Phase::Down, now);
            }
            Phase::Cruise => {
                self.lower_bound();
                // What arrives is what fits.
                let fits = percent(self.newest_rate, FITS).min(self.path_rate());
                self.rate_bound = fits.max(percent(self.path_rate(), BACK_OFF));
            }
            Phase::Drain | Phase::Down | Phase::Empty => {}
        }
    }

    /// Less may be on its way: not less than the path holds without a queue.
    fn lower_bound(&mut self) {
        self.bound = percent(self.most(), BACK_OFF).max(self.holds());
    }

    /// Sends less, until the next Up.
    fn give_way(&mut self) {
        self.rate_bound = percent(self.path_rate(), BACK_OFF);
    }

    fn enter(&mut self, phase: Phase, now: u64) {
        self.phase = phase;
        self.phase_since = now;
        self.phase_rounds = 0;
    }

    fn advance(&mut self, now: u64) {
        let holds = self.holds();
        let elapsed = now.saturating_sub(self.phase_since);
        match self.phase {
            Phase::Startup => {
                if self.full_rounds >= 3 {
                    self.enter(Phase::Drain, now);
                }
            }
            Phase::Drain | Phase::Down => {
                if self.in_flight <= holds || self.phase_rounds >= 4 {
                    self.enter(Phase::Cruise, now);
                }
            }
            Phase::Cruise => {
                let found = self.path_rate() >= percent(self.rate_before, FOUND);
                if found {
                    self.cruise_rounds = CRUISE_ROUNDS;
                }
                let rounds = if found { AGAIN_ROUNDS } else { self.cruise_rounds };
                if now.saturating_sub(self.emptied) >= EMPTY_NS {
                    self.enter(Phase::Empty, now);
                } else if self.phase_rounds >= rounds || elapsed >= CRUISE_NS {
                    if !found {
                        self.cruise_rounds = (2 * self.cruise_rounds).min(CRUISE_ROUNDS_MAX);
                    }
                    self.begin_up(now);
                }
            }
            Phase::Up => {
                let reached = self.in_flight >= percent(holds, UP) || self.in_flight >= self.bound;
                if self.phase_rounds >= 3 || (self.phase_rounds >= 1 && reached) {
                    self.enter(Phase::Down, now);
                }
            }
            Phase::Empty => {
                if self.in_flight > percent(holds, EMPTY).max(PACKETS_MIN * self.mtu)
                    && self.phase_rounds < 3
                {
                    self.phase_since = now;
                } else if elapsed >= self.trip() {
                    self.emptied = now;
                    self.enter(Phase::Cruise, now);
                }
            }
        }
    }

    fn begin_up(&mut self, now: u64) {
        self.highest.turn();
        self.rate_bound = u64::MAX;
        self.eased = 0;
        self.gentle = self.queued && !self.gentle;
        self.rate_before = self.highest.get();
        if self.bound != u64::MAX {
            self.bound = percent(self.bound, UP);
            if self.bound > percent(self.holds(), WINDOW) {
                self.bound = u64::MAX;
            }
        }
        self.enter(Phase::Up, now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;
    const MTU: u64 = 1_400;

    fn new() -> RateControl {
        RateControl::new(65_000, 1_400, 0)
    }

    /// One packet there and back at a time.
    fn ping(rate: &mut RateControl, at: u64, trip: u64) {
        rate.on_sent(at, MTU);
        rate.on_ack(at + trip, at, MTU);
        rate.on_acks_end(at + trip, 0, true);
    }

    #[test]
    fn what_is_allowed_first_is_the_initial_window() {
        assert_eq!(new().window(), 65_000);
        assert_eq!(new().rate(), None);
    }

    #[test]
    fn whoever_says_little_is_not_held_back_later() {
        let mut rate = new();
        for n in 0..1000 {
            ping(&mut rate, n * 100 * MS, 50 * MS);
        }
        // All that is known is that little was said: that is not what the path takes.
        assert_eq!(rate.phase, Phase::Startup);
        assert!(rate.window() >= 65_000);
    }

    #[test]
    fn with_nothing_on_its_way_something_may_be_sent_whatever_was() {
        let mut chance = 7u64;
        for _ in 0..200 {
            let mut rate = new();
            let (mut now, mut in_flight) = (0, 0u64);
            for _ in 0..500 {
                chance = chance.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                let what = chance >> 33;
                now += what % (20 * MS);
                match what % 7 {
                    0..3 => {
                        in_flight += MTU;
                        rate.on_sent(now, MTU);
                    }
                    3..5 => {
                        in_flight = in_flight.saturating_sub(MTU);
                        rate.on_ack(now, now.saturating_sub(what % (90 * MS)), MTU);
                        rate.on_acks_end(now, in_flight, what.is_multiple_of(3));
                    }
                    5 => {
                        in_flight = in_flight.saturating_sub(MTU);
                        rate.on_lost(now, MTU, what.is_multiple_of(50));
                    }
                    _ => rate.on_lost(now, 0, false),
                }
                assert!(rate.window() >= PACKETS_MIN * MTU, "{rate:?}");
            }
        }
    }

    #[test]
    fn after_persistent_loss_nothing_is_known() {
        let mut rate = new();
        for n in 0..100 {
            ping(&mut rate, n * 50 * MS, 50 * MS);
        }
        rate.on_lost(6_000 * MS, MTU, true);
        assert_eq!((rate.rate(), rate.phase), (None, Phase::Startup));
        assert!(rate.window() < 65_000);
    }

    #[test]
    fn a_near_path_is_not_held_to_a_rate() {
        let mut rate = new();
        let (trip, packets) = (MS / 10, 20);
        for round in 0..50 {
            let at = round * trip;
            for _ in 0..packets {
                rate.on_sent(at, MTU);
            }
            for _ in 0..packets {
                rate.on_ack(at + trip, at, MTU);
            }
            rate.on_acks_end(at + trip, 0, false);
        }
        // 280 MB/s: ten milliseconds of that, so that a late reader finds work.
        assert_ne!(rate.phase, Phase::Startup);
        assert!(rate.window() > 2_500_000, "{}", rate.window());
    }
}
