//! Whether what this node holds of a group is what it should hold: comparing it with the peer's,
//! reading it all now and then, repairing it from the peer.
//!
//! Everything here is done at low priority, by one thread for the whole node, in pieces of bounded
//! size, and gives way: it holds on to a position of the log, and lets go of it as soon as the log
//! needs the room.

mod answer;
mod ask;
mod idle;
mod point;
mod repair;
mod scrub;
mod verify;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use srn_core::time::Mono;
use srn_core::wire::{HashRun, Words};
use srn_store::group::GrainHash;
use srn_store::group::damage::Damage;
use tokio::sync::oneshot;

use super::Group;
use crate::clock;
use crate::error::{Failure, Result};

pub use scrub::{DamageStatus, Scrubbed};
pub use verify::{DiskVerified, Range, Verified};

/// What a group remembers of this.
#[derive(Debug, Default)]
pub(super) struct Integrity {
    /// The position that the peer asks about.
    held: Mutex<Option<answer::Held>>,
    /// Questions of the peer that are being answered.
    answering: AtomicU64,
    /// Questions to the peer that wait for an answer.
    waiting: Mutex<BTreeMap<u64, oneshot::Sender<Words>>>,
    /// What is under way.
    work: Mutex<Option<Work>>,
    /// Held by what is under way.
    running: Arc<tokio::sync::Mutex<()>>,
    /// What is known to be damaged.
    damage: Mutex<Vec<Damage>>,
    /// When a scrub or a repair was tried last, by this process.
    tried: Mutex<Option<Mono>>,
    /// When one has ended last, whatever came of it.
    looked: Mutex<Option<Mono>>,
    /// Reports of the peer in this minute, and when it began.
    reports: Mutex<(u32, Mono)>,
}

/// How far something is.
#[derive(Debug, Clone)]
struct Work {
    kind: &'static str,
    done: u64,
    total: u64,
    since: Mono,
}

/// Something that looks at what is held here, as people see it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct WorkStatus {
    /// `verify` or `scrub`.
    pub kind: String,
    /// Bytes of disks looked at.
    pub done: u64,
    /// Bytes in all.
    pub total: u64,
    /// Bytes per second.
    pub rate: u64,
    /// Seconds left at that rate.
    pub seconds_left: Option<u64>,
}

impl Integrity {
    /// What is known from before.
    pub(super) fn load(store: &srn_store::group::Group) -> Self {
        let damage = store.damage().unwrap_or_else(|error| {
            log::error!("what was known to be damaged is not known any more: {error}");
            Vec::new()
        });
        Self { damage: Mutex::new(damage), ..Self::default() }
    }

    fn damage(&self) -> MutexGuard<'_, Vec<Damage>> {
        self.damage.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn held(&self) -> MutexGuard<'_, Option<answer::Held>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn waiting(&self) -> MutexGuard<'_, BTreeMap<u64, oneshot::Sender<Words>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn work(&self) -> MutexGuard<'_, Option<Work>> {
        self.work.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Something is under way, until this is dropped.
struct Running {
    group: Arc<Group>,
    _alone: tokio::sync::OwnedMutexGuard<()>,
}

impl Running {
    /// Begins something that goes through so many bytes.
    ///
    /// # Errors
    /// When something else is under way.
    fn begin(group: &Arc<Group>, kind: &'static str, total: u64) -> Result<Self> {
        let alone = group.integrity.running.clone().try_lock_owned().map_err(|_| {
            let what = group.integrity.work().as_ref().map_or("something", |work| work.kind);
            Failure::conflict(format!(
                "a {what} of group {} is under way; wait for its end",
                group.name()
            ))
        })?;
        *group.integrity.work() = Some(Work { kind, done: 0, total, since: clock::mono() });
        Ok(Self { group: group.clone(), _alone: alone })
    }

    fn done(&self, bytes: u64) {
        if let Some(work) = &mut *self.group.integrity.work() {
            work.done += bytes;
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        *self.group.integrity.work() = None;
    }
}

impl Group {
    /// What is looked at now, and how far it is.
    #[must_use]
    pub fn integrity_work(&self) -> Option<WorkStatus> {
        let work = self.integrity.work().clone()?;
        let us = clock::mono().since(work.since).max(1);
        let rate = u128::from(work.done) * 1_000_000 / u128::from(us);
        let rate = u64::try_from(rate).unwrap_or(u64::MAX);
        Some(WorkStatus {
            kind: work.kind.into(),
            done: work.done,
            total: work.total,
            rate,
            seconds_left: work.total.saturating_sub(work.done).checked_div(rate),
        })
    }

    /// Whether what holds on to a position of the log has to let go of it now.
    pub(super) fn log_needs_room(&self) -> bool {
        let facts = self.facts();
        facts.full.is_some() || facts.stalled.is_some()
    }

    /// Once a second: lets go of what nobody asks about any more.
    pub(super) fn tidy_integrity(&self) {
        let now = clock::mono();
        let needed = self.log_needs_room();
        let mut held = self.integrity.held();
        if held.as_ref().is_some_and(|held| needed || held.is_stale(now)) {
            let gone = held.take();
            drop(held);
            // Letting go of it may close files.
            drop(gone);
        }
    }
}

/// As an answer says it.
pub(super) fn to_runs(hashes: &[GrainHash]) -> Vec<HashRun> {
    let kind = |hash: &GrainHash| std::mem::discriminant(hash);
    let count = |same: &[GrainHash]| u32::try_from(same.len()).unwrap_or(u32::MAX);
    hashes
        .chunk_by(|a, b| kind(a) == kind(b))
        .map(|same| match same.first() {
            None | Some(GrainHash::Zero) => HashRun::Zero(count(same)),
            Some(GrainHash::Unreadable) => HashRun::Unreadable(count(same)),
            Some(GrainHash::Known(_)) => HashRun::Known(
                same.iter()
                    .filter_map(|hash| match hash {
                        GrainHash::Known(hash) => Some(*hash),
                        _ => None,
                    })
                    .collect(),
            ),
        })
        .collect()
}

/// As an answer said it.
pub(super) fn from_runs(runs: &[HashRun]) -> Vec<GrainHash> {
    let mut hashes = Vec::new();
    for run in runs {
        match run {
            HashRun::Zero(count) => {
                hashes.extend(std::iter::repeat_n(GrainHash::Zero, *count as usize));
            }
            HashRun::Unreadable(count) => {
                hashes.extend(std::iter::repeat_n(GrainHash::Unreadable, *count as usize));
            }
            HashRun::Known(known) => hashes.extend(known.iter().copied().map(GrainHash::Known)),
        }
    }
    hashes
}

/// Numbers questions; unique in this process.
fn next_number() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hashes_survive_being_told_in_runs() {
        use GrainHash::{Known, Unreadable, Zero};
        let all = [Zero, Zero, Known([1; 16]), Known([2; 16]), Unreadable, Zero, Known([3; 16])];
        let runs = to_runs(&all);
        assert_eq!(runs.iter().map(HashRun::count).collect::<Vec<_>>(), [2, 2, 1, 1, 1]);
        assert_eq!(from_runs(&runs), all);
    }
}
