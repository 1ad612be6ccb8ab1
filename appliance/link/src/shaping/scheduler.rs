//! Who may send next: a machine that is asked with the time as an argument.
//!
//! Each stream of frames asks for a turn for its next slice of bytes, and says when the connection
//! has taken it. Turns are given so that
//!
//! * no more than the limit is sent, whatever waits;
//! * *live* streams go before *bulk* ones (initial replication, resync), but for a tenth that bulk
//!   always has while it waits: it would never end otherwise;
//! * within each of the two, streams share by bytes in proportion to their weights: start-time fair
//!   queueing, which is deficit round robin for streams that have one slice to send at a time;
//! * one slice of each kind is in the connection's hands at a time, so that what comes next is
//!   decided here and not by who has filled its buffers. A slice that the connection does not take
//!   for long (the peer does not read that stream) does not count: no stream stalls another.
//!
//! Times are nanoseconds of one clock, whichever.

use std::collections::BTreeMap;

use crate::congestion::delivery::{SECOND, bytes_in};

/// A stream, by its number in the session.
pub(crate) type Flow = u64;

/// Slices: small enough that whoever comes next waits some ten milliseconds at most, and large
/// enough that asking costs nothing.
const SLICE_MAX: u64 = 64 << 10;
const SLICE_MIN: u64 = 8 << 10;
const SLICE_NS: u64 = SECOND / 100;

/// Live bytes for which bulk may send one byte.
const LIVE_PER_BULK: u64 = 9;

/// What bulk may claim at once after it has waited, in bytes.
const CLAIM_MAX: u64 = 1 << 20;

/// What a stream that paused for a moment may catch up, in bytes at weight 1.
const SLACK: u64 = 256 << 10;

/// A slice that was not taken after this time, and after four times what the rate makes of it, does
/// not hold up others. In nanoseconds.
const STUCK_NS: u64 = SECOND / 50;

/// The rate may not be known well: after this time in any case.
const STUCK_MAX_NS: u64 = SECOND / 2;

/// What the limit allows to be sent at once after a pause, as time and in bytes at least.
const BURST_NS: u64 = SECOND / 100;

/// What headers add to content, in percent.
const HEADERS_PERCENT: u64 = 4;

/// The kind of a stream, now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Traffic {
    /// Writes as they come: what is behind here is at risk.
    Live,
    /// Initial replication and resync.
    Bulk,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// It asks for nothing.
    Idle,
    /// It waits for its turn with so many bytes.
    Waiting(u64),
    /// It was given its turn then, and the connection has not taken the slice.
    InHand(u64),
}

#[derive(Debug, Clone)]
struct Entry {
    kind: Traffic,
    weight: u64,
    stage: Stage,
    /// The virtual time at which what it sends next starts.
    start: u64,
}

/// What is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Next {
    /// This stream has its turn.
    Turn(Flow),
    /// Nothing before this time, if nobody says anything.
    At(u64),
    /// Nobody waits.
    Nothing,
}

/// The machine.
#[derive(Debug, Clone)]
pub(crate) struct Scheduler {
    flows: BTreeMap<Flow, Entry>,
    /// Virtual time of live and of bulk.
    virtual_time: [u64; 2],
    /// Bytes that bulk may send although live waits.
    claim: u64,
    /// Bytes per second.
    limit: Option<u64>,
    /// Bytes that may be sent now; below zero when too much was.
    tokens: i64,
    refilled: u64,
    /// The rate of the line as far as is known, in bytes per second.
    line: Option<u64>,
}

impl Scheduler {
    pub(crate) const fn new(now: u64) -> Self {
        Self {
            flows: BTreeMap::new(),
            virtual_time: [0; 2],
            claim: 0,
            limit: None,
            tokens: 0,
            refilled: now,
            line: None,
        }
    }

    /// From now on no more than this is sent, in bytes per second with all headers.
    pub(crate) fn set_limit(&mut self, limit: Option<u64>, now: u64) {
        self.refill(now);
        self.limit = limit.map(|limit| limit.max(1));
        // What was overdrawn at another limit is not paid for hours at this one.
        self.tokens = self.tokens.clamp(-(SLICE_MAX as i64), self.burst());
    }

    /// The limit, in bytes per second.
    pub(crate) const fn limit(&self) -> Option<u64> {
        self.limit
    }

    /// The rate of the line as far as is known.
    pub(crate) const fn set_line(&mut self, rate: Option<u64>) {
        self.line = rate;
    }

    /// How many bytes to ask for at a time.
    pub(crate) fn slice(&self) -> u64 {
        self.rate().map_or(SLICE_MAX, |rate| bytes_in(rate, SLICE_NS).clamp(SLICE_MIN, SLICE_MAX))
    }

    /// A stream has something to send.
    pub(crate) fn ask(&mut self, flow: Flow, kind: Traffic, weight: u64, bytes: u64) {
        let weight = weight.max(1);
        let now = self.virtual_time[kind as usize];
        let earliest = now.saturating_sub(SLACK / weight);
        let entry = self.flows.entry(flow).or_insert(Entry {
            kind,
            weight,
            stage: Stage::Idle,
            start: now,
        });
        if entry.kind != kind {
            entry.kind = kind;
            entry.start = now;
        }
        entry.weight = weight;
        entry.start = entry.start.max(earliest);
        entry.stage = Stage::Waiting(bytes);
    }

    /// The connection has taken a stream's slice, or the stream does not want its turn any more.
    pub(crate) fn done(&mut self, flow: Flow) {
        if let Some(entry) = self.flows.get_mut(&flow) {
            entry.stage = Stage::Idle;
        }
    }

    /// A stream is over.
    pub(crate) fn forget(&mut self, flow: Flow) {
        self.flows.remove(&flow);
    }

    /// Whether a stream has its turn.
    pub(crate) fn has_turn(&self, flow: Flow) -> bool {
        self.flows.get(&flow).is_some_and(|entry| matches!(entry.stage, Stage::InHand(_)))
    }

    /// What is to be done at `now`.
    pub(crate) fn next(&mut self, now: u64) -> Next {
        self.refill(now);
        let first = |kind| {
            let waiting = self.flows.iter().filter_map(|(flow, entry)| match entry.stage {
                Stage::Waiting(bytes) if entry.kind == kind => Some((entry.start, *flow, bytes)),
                _ => None,
            });
            waiting.min()
        };
        let (live, bulk) = (first(Traffic::Live), first(Traffic::Bulk));
        if live.is_none() && bulk.is_none() {
            return Next::Nothing;
        }
        if self.limit.is_some() && self.tokens <= 0 {
            return Next::At(now + self.until_allowed());
        }
        let free_at = |kind| self.free_at(kind, now);
        let (live_free, bulk_free) = (free_at(Traffic::Live), free_at(Traffic::Bulk));
        let bulk_claims = bulk.is_some_and(|(.., bytes)| live.is_none() || self.claim >= bytes);
        if let Some((_, flow, bytes)) = bulk
            && bulk_claims
            && bulk_free <= now
        {
            if live.is_some() {
                self.claim -= bytes;
            }
            return self.give(flow, bytes, now);
        }
        if let Some((_, flow, bytes)) = live
            && live_free <= now
        {
            self.claim = if bulk.is_some() || bulk_free > now {
                (self.claim + bytes / LIVE_PER_BULK).min(CLAIM_MAX)
            } else {
                0
            };
            return self.give(flow, bytes, now);
        }
        let live_at = live.map_or(u64::MAX, |_| live_free);
        let bulk_at = if bulk_claims { bulk_free } else { u64::MAX };
        Next::At(live_at.min(bulk_at).max(now + 1))
    }

    fn give(&mut self, flow: Flow, bytes: u64, now: u64) -> Next {
        if self.limit.is_some() {
            let with_headers = bytes + bytes * HEADERS_PERCENT / 100;
            self.tokens -= i64::try_from(with_headers).unwrap_or(i64::MAX / 2);
        }
        if let Some(entry) = self.flows.get_mut(&flow) {
            entry.stage = Stage::InHand(now);
            let time = &mut self.virtual_time[entry.kind as usize];
            *time = (*time).max(entry.start);
            entry.start += bytes / entry.weight;
        }
        Next::Turn(flow)
    }

    /// When nothing of this kind that counts is in the connection's hands.
    fn free_at(&self, kind: Traffic, now: u64) -> u64 {
        let takes = self.rate().map_or(0, |rate| 4 * SLICE_MAX * SECOND / rate.max(1));
        let takes = takes.min(STUCK_MAX_NS);
        let in_hand = self.flows.values().filter_map(|entry| match entry.stage {
            Stage::InHand(since) if entry.kind == kind => Some(since + STUCK_NS.max(takes)),
            _ => None,
        });
        in_hand.max().filter(|at| *at > now).unwrap_or(now)
    }

    fn rate(&self) -> Option<u64> {
        match (self.limit, self.line) {
            (Some(limit), Some(line)) => Some(limit.min(line)),
            (one, other) => one.or(other),
        }
    }

    fn burst(&self) -> i64 {
        let bytes = self.limit.map_or(0, |limit| bytes_in(limit, BURST_NS).max(SLICE_MIN));
        i64::try_from(bytes).unwrap_or(i64::MAX / 2)
    }

    fn refill(&mut self, now: u64) {
        let Some(limit) = self.limit else {
            self.refilled = now;
            return;
        };
        let more = bytes_in(limit, now.saturating_sub(self.refilled));
        // A time too short for a byte is not forgotten.
        if more > 0 {
            self.refilled = now;
            let more = i64::try_from(more).unwrap_or(i64::MAX / 2);
            self.tokens = self.tokens.saturating_add(more).min(self.burst());
        }
    }

    fn until_allowed(&self) -> u64 {
        let missing = u64::try_from(1 - self.tokens).unwrap_or(1);
        let limit = u128::from(self.limit.unwrap_or(1));
        let ns = (u128::from(missing) * u128::from(SECOND)).div_ceil(limit);
        u64::try_from(ns).unwrap_or(u64::MAX / 2)
    }
}
