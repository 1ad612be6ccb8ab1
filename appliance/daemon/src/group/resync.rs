//! Bringing a secondary up to date without frames: where the log does not reach back to it, where it
//! has nothing, where its content has to be compared.
//!
//! Content is carried from the secondary's newest frame to one of the primary's, in order of disk and
//! sector; then frames flow from there. Every point that the secondary had stays what it was, and
//! between the two frames there is none.
//!
//! Invariants:
//! * the secondary is at the later frame when all that leads to it is durable, and not before;
//! * only where the secondary's frame is proven by its hash to be ours is it enough to send what
//!   changed since; else contents are compared, leaf by leaf, whatever the nodes remember;
//! * what waits in memory at either node is bounded by credit;
//! * a cut costs what was on its way: both nodes hold on to what they have for a while.

mod asked;
mod compare;
mod give;
mod seed;
mod take;

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use std::time::Duration;

use serde::{Deserialize, Serialize};
use srn_core::epoch::Position;
use srn_core::ids::{FrameHash, Seq};
use srn_core::state::Cause;
use srn_core::time::Mono;
use srn_core::wire::Way;
use srn_store::manifest::Role;

use super::Group;
use crate::clock;
use crate::fleet::Level;

pub(super) use give::Giver;
use seed::Seeds;
pub(super) use take::{Taker, catalog_of};

/// After one that failed the next is not tried for so long, in microseconds.
const REST_US: u64 = 60_000_000;

/// Whoever takes something in ends within this time, unless what it reads from hangs.
const REST_PATIENCE: Duration = Duration::from_secs(10);

/// Frames whose hashes are remembered while they are on their way; far more than credit allows.
const SENT_MAX: usize = 65_536;

/// What waits for the peer to come back is held for so long, in microseconds.
const HELD_US: u64 = 600_000_000;

/// What a group remembers of it.
#[derive(Debug, Default)]
pub(super) struct Resync {
    /// What is given to the peer, and when it was used last.
    given: Mutex<Option<(Arc<give::Given>, Mono)>>,
    /// What has been taken in and is not whole, and since when it waits.
    taken: Mutex<Option<(take::Taken, Mono)>>,
    /// What is under way.
    work: Mutex<Option<Work>>,
    /// Held by whoever takes something in: one at a time.
    busy: Arc<tokio::sync::Mutex<()>>,
    /// Whoever takes something in shall end.
    stop: AtomicBool,
    /// The log is to be merged before something is given, so that this does not hold on to it.
    merging: AtomicBool,
    /// Why the last one failed, and when.
    trouble: Mutex<Option<(String, Mono)>>,
    /// Frames that were sent and are not acknowledged, with their hashes: the peer may turn out to
    /// hold any of them when the log holds none.
    sent: Mutex<VecDeque<(Seq, FrameHash)>>,
}

/// How far it is.
#[derive(Debug, Clone)]
struct Work {
    /// Tells it from the one before.
    number: u64,
    way: Way,
    done: u64,
    total: u64,
    since: Mono,
    /// What was done before, in an earlier session.
    before: u64,
}

/// A resync that is under way, as people see it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ResyncStatus {
    /// `changes`, `full copy` or `compare`.
    pub kind: String,
    /// Why it is done, in words.
    pub reason: String,
    /// Bytes done: of content, or of disks where they are compared.
    pub done: u64,
    /// Bytes in all.
    pub total: u64,
    /// Bytes per second.
    pub rate: u64,
    /// Seconds left at that rate.
    pub seconds_left: Option<u64>,
}

const fn cause_of(way: Way) -> Cause {
    match way {
        Way::Changed => Cause::BeyondLog,
        Way::All => Cause::FullCopy,
        Way::Compared => Cause::Comparing,
    }
}

impl Resync {
    fn given(&self) -> MutexGuard<'_, Option<(Arc<give::Given>, Mono)>> {
        self.given.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn taken(&self) -> MutexGuard<'_, Option<(take::Taken, Mono)>> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn work(&self) -> MutexGuard<'_, Option<Work>> {
        self.work.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A resync is under way, until this is dropped.
#[derive(Debug)]
struct Running {
    group: Arc<Group>,
    number: u64,
}

impl Running {
    fn begin(group: &Arc<Group>, way: Way, total: u64, before: u64) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let work = Work { number, way, done: before, total, since: clock::mono(), before };
        *group.resync.work() = Some(work);
        group.review();
        Self { group: group.clone(), number }
    }

    fn done(&self, bytes: u64) {
        if let Some(work) = &mut *self.group.resync.work()
            && work.number == self.number
        {
            work.done = work.done.saturating_add(bytes);
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let mut work = self.group.resync.work();
        if work.as_ref().is_some_and(|work| work.number == self.number) {
            *work = None;
        }
    }
}

impl Group {
    /// A frame is on its way.
    pub(super) fn remember_sent(&self, frame: Position) {
        let mut sent = self.resync.sent.lock().unwrap_or_else(PoisonError::into_inner);
        if sent.back().is_some_and(|(last, _)| *last >= frame.seq) {
            sent.clear();
        }
        if sent.len() >= SENT_MAX {
            sent.pop_front();
        }
        sent.push_back((frame.seq, frame.hash));
    }

    /// The peer has acknowledged it, and everything before.
    pub(super) fn forget_sent(&self, acked: Seq) {
        let mut sent = self.resync.sent.lock().unwrap_or_else(PoisonError::into_inner);
        while sent.front().is_some_and(|(seq, _)| *seq < acked) {
            sent.pop_front();
        }
    }

    /// The hash of a frame that was on its way when the session ended.
    pub(super) fn sent_hash(&self, seq: Seq) -> Option<FrameHash> {
        let sent = self.resync.sent.lock().unwrap_or_else(PoisonError::into_inner);
        sent.iter().find(|(at, _)| *at == seq).map(|(_, hash)| *hash)
    }

    /// Why no resync is tried now: one has just failed.
    pub(super) fn resync_trouble(&self) -> Option<String> {
        let trouble = self.resync.trouble.lock().unwrap_or_else(PoisonError::into_inner);
        let (why, at) = trouble.as_ref()?;
        (clock::mono().since(*at) < REST_US).then(|| why.clone())
    }

    /// It has failed; people are told, but not of the same again and again.
    fn resync_failed(&self, why: String) {
        let news = {
            let mut trouble = self.resync.trouble.lock().unwrap_or_else(PoisonError::into_inner);
            let news = trouble.as_ref().is_none_or(|(before, _)| *before != why);
            *trouble = Some((why.clone(), clock::mono()));
            news
        };
        if news {
            self.tell(Level::Alert, &why);
        } else {
            log::info!("group {}: {why}", self.name());
        }
    }

    /// It goes well.
    fn resync_goes_on(&self) {
        *self.resync.trouble.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Waits until nothing is being taken in any more: what was, can go on where it was. Returns
    /// whether that was so within a time.
    pub(super) async fn resync_at_rest(&self) -> bool {
        self.resync.stop.store(true, Ordering::SeqCst);
        let rest = tokio::time::timeout(REST_PATIENCE, self.resync.busy.lock()).await;
        rest.is_ok()
    }

    /// Whether the log is to be merged as if it were full.
    pub(super) fn merges_for_resync(&self) -> bool {
        self.resync.merging.load(Ordering::SeqCst)
    }

    /// Why content is carried in place of frames now; none when it is not.
    pub(super) fn resync_cause(&self) -> Option<Cause> {
        self.resync.work().as_ref().map(|work| cause_of(work.way))
    }

    /// A resync that is under way.
    #[must_use]
    pub fn resync_status(&self) -> Option<ResyncStatus> {
        let work = self.resync.work().clone()?;
        let us = clock::mono().since(work.since).max(1);
        let rate = u128::from(work.done - work.before) * 1_000_000 / u128::from(us);
        let rate = u64::try_from(rate).unwrap_or(u64::MAX);
        Some(ResyncStatus {
            kind: match work.way {
                Way::Changed => "changes",
                Way::All => "full copy",
                Way::Compared => "compare",
            }
            .into(),
            reason: cause_of(work.way).words().into(),
            done: work.done,
            total: work.total,
            rate,
            seconds_left: work.total.saturating_sub(work.done).checked_div(rate),
        })
    }

    /// Once a second: lets go of what nobody comes back for.
    pub(super) fn tidy_resync(&self) {
        let now = clock::mono();
        let running = self.resync.work().is_some();
        let stale = |since: Mono| !running && now.since(since) > HELD_US;
        let needed = self.log_needs_room() && !running;
        let gone = {
            let mut given = self.resync.given();
            let over = self.role() != Role::Primary || self.fence().is_some();
            let gone = given.as_ref().is_some_and(|(_, used)| over || needed || stale(*used));
            if gone { given.take() } else { None }
        };
        drop(gone);
        let gone = {
            let mut taken = self.resync.taken();
            let over = self.role() == Role::Primary;
            let gone = taken.as_ref().is_some_and(|(_, since)| over || stale(*since));
            if gone { taken.take() } else { None }
        };
        drop(gone);
    }

    /// Lets go of everything: the group is closed, or its line goes on elsewhere.
    pub(super) fn forget_resync(&self) {
        let given = self.resync.given().take();
        let taken = self.resync.taken().take();
        // Letting go of them closes and removes files.
        drop((given, taken));
    }
}
