//! Going on with a peer's line that has left ours: after a failover the old primary becomes the
//! secondary of the new one.
//!
//! Invariant (P4): nothing that is durable here is written over or lost. Frames behind the place
//! where the lines parted become a branch, which is never appended to, and the main line goes on from
//! that place, which both nodes have: the same epoch, number and hash. All of that is one change of
//! the manifest, so a crash leaves either the old line as it was, or the branch and the new line.
//! What breaks first when this is wrong: `testkit::sim::reversal`.
//!
//! A new epoch's first frame comes from the peer; this node never writes one.

use std::sync::Arc;

use srn_core::course::Course;
use srn_core::epoch::EpochTable;
use srn_core::ids::{EpochId, Seq};
use srn_core::time::{Now, WallTime};

use super::Group;
use super::append::Appender;
use super::fork::Laid;
use crate::error::{Result, StoreError};
use crate::manifest::{Keep, Purpose, Role};

impl Group {
    /// Goes on as secondary of a peer whose line is `theirs`. Where ours has left it, what we have
    /// behind that place is kept as a branch.
    ///
    /// The main line's appender must have been dropped.
    ///
    /// # Errors
    /// [`StoreError::Invalid`] for a cache, which holds no copy that could go on;
    /// [`StoreError::NotInHistory`] when the lines have nothing in common, ours is the newer one, the
    /// place is not kept any more, or another frame is there; then nothing was changed. As the volume
    /// says.
    pub fn follow(self: &Arc<Self>, theirs: &EpochTable, now: Now) -> Result<Appender> {
        if self.keep != Keep::Replica {
            return Err(StoreError::Invalid(
                "a local cache holds no copy of the disks that could go on".into(),
            ));
        }
        let refused = |why: &str| Err(StoreError::NotInHistory(why.into()));
        match Course::of(&self.epochs(), &self.head(), theirs) {
            Course::Foreign => refused("the two histories have nothing in common"),
            Course::Newer => refused("the history here is the newer one"),
            Course::Straight => {
                self.become_secondary()?;
                self.appender(now)
            }
            Course::Leave { at, line } => {
                while self.seal_oldest()? {}
                {
                    let _still = self.hold_still();
                    let view = self.view_at(at.seq)?;
                    let here = view.catalog().at;
                    if here != at {
                        return Err(StoreError::NotInHistory(format!(
                            "the two histories differ before the frame where they parted: {at} is \
                         {here} here"
                        )));
                    }
                    let role = Some(Role::Secondary);
                    self.lay(&view, Laid { line, purpose: Purpose::Main, role, since: now.wall })?;
                }
                self.appender(now)
            }
        }
    }

    /// This node takes frames from its peer from now on. What the peer holds of ours means nothing
    /// any more.
    fn become_secondary(&self) -> Result<()> {
        if self.role() == (Role::Secondary, None) {
            return Ok(());
        }
        self.publish_with(
            |manifest| {
                manifest.role = Role::Secondary;
                manifest.fence = None;
                manifest.acked = Seq::ZERO;
            },
            |state| state.acked = Seq::ZERO,
        )
    }

    /// The main line goes on in the epoch `id`, which the peer has begun behind our newest frame.
    /// Called by the line's appender, which has closed its segment.
    pub(super) fn enter(self: &Arc<Self>, id: EpochId, since: WallTime) -> Result<()> {
        while self.seal_oldest()? {}
        let head = self.head();
        let line = self.epochs().fork(id, head).map_err(|error| {
            StoreError::Invalid(format!("epoch {id} cannot begin at {head}: {error}"))
        })?;
        let _still = self.hold_still();
        let view = self.view_at(head.seq)?;
        self.forget_recent_of_main();
        self.lay(&view, Laid { line, purpose: Purpose::Main, role: None, since })
    }
}
