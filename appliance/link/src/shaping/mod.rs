//! Shaping of what a session sends: [`scheduler`] between the streams of frames and the connection.
//!
//! The connection's own buffers come behind it. They are kept as short as they can be, so that what
//! waits waits here, where its order can still be chosen: [`buffered`] says how short. In the
//! buffers live goes before bulk, too: the streams have priorities. Control messages do not come
//! through here; they go before everything.

mod scheduler;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

pub use scheduler::Traffic;
use scheduler::{Flow, Next, Scheduler};

/// What the connection holds, in windows. It holds what was acknowledged behind a lost packet too,
/// until that was sent again and acknowledged, and one of a hundred of those is lost again.
const WINDOWS: u64 = 4;

/// What may wait in the connection's buffers beside that, as time, and in bytes at least: the
/// connection must find something when it can send.
const BUFFERED: Duration = Duration::from_millis(20);
const BUFFERED_MIN: u64 = 256 << 10;

/// How often it is looked what the line takes.
const LOOK: Duration = Duration::from_millis(10);

/// Below this round trip buffers are not kept short: they are empty before anybody has waited.
const NEAR: Duration = Duration::from_millis(2);

/// How many bytes the connection may hold that are not acknowledged, when `window` bytes may be on
/// their way on a path of this round trip and `rate` in bytes per second; `most` in any case.
pub(crate) fn buffered(window: u64, round_trip: Duration, rate: u64, most: u64) -> u64 {
    if round_trip < NEAR || rate == 0 {
        return most;
    }
    let waiting = u128::from(rate) * BUFFERED.as_micros() / 1_000_000;
    let waiting = u64::try_from(waiting).unwrap_or(u64::MAX).max(BUFFERED_MIN);
    window.saturating_mul(WINDOWS).saturating_add(waiting).min(most)
}

/// The turns of one session.
#[derive(Debug)]
pub(crate) struct Shaper {
    began: Instant,
    inner: Mutex<Inner>,
    next_flow: AtomicU64,
}

#[derive(Debug)]
struct Inner {
    scheduler: Scheduler,
    /// Who waits for a turn.
    waiting: BTreeMap<Flow, Arc<Notify>>,
    looked: Option<Instant>,
}

impl Shaper {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self {
            began: Instant::now(),
            inner: Mutex::new(Inner {
                scheduler: Scheduler::new(0),
                waiting: BTreeMap::new(),
                looked: None,
            }),
            next_flow: AtomicU64::new(0),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    /// From now on no more than this is sent, in bytes per second.
    pub(crate) fn set_limit(&self, limit: Option<u64>) {
        let now = self.now();
        let mut inner = self.lock();
        inner.scheduler.set_limit(limit, now);
        // Whoever waits for the old limit looks anew.
        inner.waiting.values().for_each(|waiting| waiting.notify_one());
    }

    pub(crate) fn limit(&self) -> Option<u64> {
        self.lock().scheduler.limit()
    }

    /// A new stream.
    pub(crate) fn lane(self: &Arc<Self>) -> Lane {
        let flow = self.next_flow.fetch_add(1, Ordering::Relaxed);
        Lane { shaper: self.clone(), flow, traffic: Traffic::Live, weight: 1 }
    }

    /// Gives turns to whoever has one now, and says when to look again.
    fn give(inner: &mut Inner, now: u64) -> Option<u64> {
        loop {
            match inner.scheduler.next(now) {
                Next::Turn(flow) => {
                    if let Some(waiting) = inner.waiting.get(&flow) {
                        waiting.notify_one();
                    }
                }
                Next::At(at) => return Some(at),
                Next::Nothing => return None,
            }
        }
    }
}

/// One stream's place among the others.
#[derive(Debug)]
pub(crate) struct Lane {
    shaper: Arc<Shaper>,
    flow: Flow,
    traffic: Traffic,
    weight: u64,
}

impl Lane {
    /// What the stream sends from now on, and how much of the line it gets beside others of its
    /// kind.
    pub(crate) const fn set(&mut self, traffic: Traffic, weight: u64) {
        self.traffic = traffic;
        self.weight = weight;
    }

    pub(crate) const fn traffic(&self) -> Traffic {
        self.traffic
    }

    /// How many bytes to ask for at a time.
    pub(crate) fn slice(&self) -> usize {
        usize::try_from(self.shaper.lock().scheduler.slice()).unwrap_or(usize::MAX)
    }

    /// Whether it is time to look at the line again.
    pub(crate) fn looks(&self) -> bool {
        let mut inner = self.shaper.lock();
        let due = inner.looked.is_none_or(|looked| looked.elapsed() >= LOOK);
        if due {
            inner.looked = Some(Instant::now());
        }
        due
    }

    /// What the line takes as far as is known, in bytes per second.
    pub(crate) fn set_line(&self, rate: Option<u64>) {
        self.shaper.lock().scheduler.set_line(rate);
    }

    /// Waits for the turn of `bytes`. It lasts until what is returned is dropped.
    pub(crate) async fn turn(&self, bytes: usize) -> Turn<'_> {
        let turn = Turn { lane: self };
        let (mut at, asked) = {
            let mut inner = self.shaper.lock();
            inner.scheduler.ask(self.flow, self.traffic, self.weight, bytes as u64);
            let at = Shaper::give(&mut inner, self.shaper.now());
            if inner.scheduler.has_turn(self.flow) {
                return turn;
            }
            let asked = Arc::new(Notify::new());
            inner.waiting.insert(self.flow, asked.clone());
            (at, asked)
        };
        loop {
            let wait = at.map(|at| Duration::from_nanos(at.saturating_sub(self.shaper.now())));
            tokio::select! {
                () = asked.notified() => {}
                () = tokio::time::sleep(wait.unwrap_or(Duration::MAX)), if wait.is_some() => {}
            }
            let mut inner = self.shaper.lock();
            at = Shaper::give(&mut inner, self.shaper.now());
            if inner.scheduler.has_turn(self.flow) {
                return turn;
            }
        }
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        let now = self.shaper.now();
        let mut inner = self.shaper.lock();
        inner.waiting.remove(&self.flow);
        inner.scheduler.forget(self.flow);
        let _ = Shaper::give(&mut inner, now);
    }
}

/// A turn, or the wait for one.
#[derive(Debug)]
pub(crate) struct Turn<'a> {
    lane: &'a Lane,
}

impl Drop for Turn<'_> {
    /// The connection has taken the slice, or the stream was given up: the next one has its turn.
    fn drop(&mut self) {
        let Lane { shaper, flow, .. } = self.lane;
        let now = shaper.now();
        let mut inner = shaper.lock();
        inner.waiting.remove(flow);
        inner.scheduler.done(*flow);
        let _ = Shaper::give(&mut inner, now);
    }
}
