//! The branches of a group: what was left behind by failovers. Listed, and deleted when their time is
//! over or a person says so.
//!
//! Invariant: only this node decides when a branch goes. Both its own clock and the time in the log
//! have to say that it was kept for as long as was set: one of them alone may have stepped.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use srn_core::ids::{EpochId, Seq};
use srn_core::time::{LogTime, WallTime};
use srn_store::group::{Branch, View};

use super::{CheckpointStatus, Group};
use crate::clock;
use crate::error::{Failure, Result};
use crate::fleet::Level;

/// A branch as people see it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct BranchStatus {
    /// Its name: the beginning of its epoch's id.
    pub id: String,
    /// The last frame that it shares with the group's history.
    pub fork: u64,
    /// Its last frame.
    pub end: u64,
    /// Frames behind the fork.
    pub frames: u64,
    /// What they take in the log, in bytes.
    pub bytes: u64,
    /// When it was left behind, in RFC 3339.
    pub since: String,
    /// Until when it is kept, in RFC 3339.
    pub kept_until: String,
    /// The checkpoints in it.
    pub checkpoints: Vec<CheckpointStatus>,
}

/// Whether a branch was kept for `keep_us`, by the wall clock and by the log.
fn is_over(branch: &Branch, keep_us: u64, wall: WallTime, log: LogTime) -> bool {
    let by_wall = wall.0.saturating_sub(branch.since.0);
    let by_log = log.0.saturating_sub(branch.end_log_time.0);
    u64::try_from(by_wall).is_ok_and(|us| us >= keep_us) && by_log >= keep_us
}

impl Group {
    /// The branches, oldest first.
    ///
    /// # Errors
    /// When they cannot be read.
    pub async fn branches(self: &Arc<Self>) -> Result<Vec<BranchStatus>> {
        let this = self.clone();
        self.blocking(move || this.read_branches()).await
    }

    /// The same, for whoever may wait for the disk.
    ///
    /// # Errors
    /// When they cannot be read.
    pub fn read_branches(&self) -> srn_store::Result<Vec<BranchStatus>> {
        let keep_us = self.keep_branches_us();
        let mut branches = self.store.branches()?;
        branches.sort_by_key(|branch| branch.since);
        let status = |branch: &Branch| {
            let checkpoints = self.store.branch_checkpoints(branch)?;
            let until = branch.since.0.saturating_add_unsigned(keep_us);
            Ok(BranchStatus {
                id: branch.id.short(),
                fork: branch.fork.0,
                end: branch.end.seq.0,
                frames: branch.frames(),
                bytes: branch.bytes,
                since: clock::rfc3339(branch.since),
                kept_until: clock::rfc3339(WallTime(until)),
                checkpoints: checkpoints.iter().map(CheckpointStatus::from).collect(),
            })
        };
        branches.iter().map(status).collect()
    }

    fn keep_branches_us(&self) -> u64 {
        self.settings().keep_branches_s.saturating_mul(1_000_000)
    }

    /// The branch whose id begins so.
    ///
    /// # Errors
    /// Not found, naming those that there are; a conflict when several do.
    pub async fn find_branch(self: &Arc<Self>, id: &str) -> Result<EpochId> {
        let store = self.store.clone();
        let all = self.blocking(move || store.branches()).await?;
        let fits = |branch: &&Branch| branch.id.to_string().starts_with(&id.to_lowercase());
        let found: Vec<&Branch> = all.iter().filter(|_| id.len() >= 4).filter(fits).collect();
        match found.as_slice() {
            [one] => Ok(one.id),
            [] => {
                let known: Vec<String> = all.iter().map(|branch| branch.id.short()).collect();
                Err(Failure::not_found(format!(
                    "group {} has no branch {id:?}; it has: {}",
                    self.name(),
                    if known.is_empty() { "none".into() } else { known.join(", ") }
                )))
            }
            _ => Err(Failure::conflict(format!(
                "{id:?} fits several branches of group {}; give more of the id",
                self.name()
            ))),
        }
    }

    /// A branch at its end, at one of its checkpoints, or at one of its frames.
    ///
    /// # Errors
    /// When there is no such branch or point.
    pub async fn view_branch(self: &Arc<Self>, branch: &str, at: &str) -> Result<(View, String)> {
        let id = self.find_branch(branch).await?;
        let (store, at, name) = (self.store.clone(), at.to_owned(), self.name());
        let work = move || {
            let found = store.branches()?.into_iter().find(|found| found.id == id);
            let found = found.ok_or_else(|| Failure::not_found("the branch was just deleted"))?;
            let seq = if at == "latest" {
                found.end.seq
            } else {
                let all = store.branch_checkpoints(&found)?;
                let named = all.iter().find(|checkpoint| {
                    let id = checkpoint.mark.id.to_string();
                    checkpoint.note.label == at
                        || (at.len() >= 4 && id.starts_with(&at.to_lowercase()))
                });
                match (named, at.parse::<u64>()) {
                    (Some(checkpoint), _) => checkpoint.position.seq,
                    (None, Ok(frame)) => Seq(frame),
                    (None, Err(_)) => {
                        return Err(Failure::not_found(format!(
                            "branch {} of group {name} has no checkpoint {at:?}",
                            id.short()
                        )));
                    }
                }
            };
            let view = store.view_branch(id, Some(seq))?;
            Ok((view, format!("frame {seq} of branch {}", id.short())))
        };
        tokio::task::spawn_blocking(work)
            .await
            .map_err(|error| Failure::internal(format!("a task ended: {error}")))?
    }

    /// Deletes a branch.
    ///
    /// # Errors
    /// When there is none of that name; storage failures.
    pub async fn delete_branch(self: &Arc<Self>, id: EpochId, why: &str) -> Result<()> {
        let store = self.store.clone();
        self.blocking(move || store.delete_branch(id)).await?;
        let text = format!("branch {} was deleted: {why}", id.short());
        self.context.event(Level::Info, Some(&self.name()), &text);
        Ok(())
    }

    /// Now and then: deletes branches whose time is over.
    pub(super) async fn expire_branches(self: &Arc<Self>) {
        if self.store.branch_count() == 0 || self.fence().is_some() {
            return;
        }
        let (keep_us, log) = (self.keep_branches_us(), self.catalog().log_time);
        let store = self.store.clone();
        let all = match self.blocking(move || store.branches()).await {
            Ok(all) => all,
            Err(error) => return log::warn!("group {}: its branches: {error}", self.name()),
        };
        for branch in all.iter().filter(|branch| is_over(branch, keep_us, clock::wall(), log)) {
            if let Err(error) = self.delete_branch(branch.id, "its time is over").await {
                log::warn!("group {}: deleting a branch: {error}", self.name());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use srn_core::epoch::Position;
    use srn_core::ids::FrameHash;

    #[test]
    fn a_step_of_one_clock_ends_no_branch() {
        let id = EpochId([1; 16]);
        let end = Position { epoch: id, seq: Seq(9), hash: FrameHash([2; 16]) };
        let (since, end_log_time) = (WallTime(1_000), LogTime(500));
        let branch = Branch { id, fork: Seq(5), end, end_log_time, since, bytes: 1 };
        let over = |wall, log| is_over(&branch, 100, WallTime(wall), LogTime(log));
        assert!(over(1_100, 600));
        assert!(!over(1_100, 599) && !over(1_099, 600));
        assert!(!over(900, u64::MAX), "the wall clock was set back");
    }
}
