//! Turning the direction of a group: what a node does around the group itself. Recovered servers and
//! sources go before, connections behind it.

use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::Node;
use crate::error::{Failure, Result};
use crate::group::{Group, Reversal};

/// What a person asks for.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ReversalRequest {
    /// Only say what it would mean.
    pub only_look: bool,
    /// What this node wrote and the peer has not got is to be kept as a branch.
    pub keep_tail: bool,
    /// This node gives way to a peer that is primary too.
    pub give_way: bool,
}

impl Node {
    /// Lets this node follow the peer that has taken the group over.
    ///
    /// # Errors
    /// Everything that can be in the way, in words, before anything is changed.
    pub async fn reverse_group(
        self: &Arc<Self>,
        group: &Arc<Group>,
        request: ReversalRequest,
    ) -> Result<Reversal> {
        let name = group.name();
        let Ok(_one_at_a_time) = group.recovering.try_lock() else {
            return Err(Failure::conflict(format!(
                "a failover of group {name} is under way; wait for its end"
            )));
        };
        let (mut reversal, theirs) = group.reversal(request.give_way).await?;
        let running = self.recoveries.machines_of(group.id());
        if !running.is_empty() {
            return Err(Failure::conflict(format!(
                "recovered servers run from group {name}: {}; stop them first with srn failover \
                 stop, as this node gives the group to its peer",
                running.join(", ")
            )));
        }
        if request.only_look {
            return Ok(reversal);
        }
        if reversal.changes > 0 && !request.keep_tail {
            return Err(Failure::refused(format!(
                "group {name}: {} changes here are not at the peer; they are kept as a branch, \
                 confirm that with --yes",
                reversal.changes
            )));
        }
        // What only serves disks ends here: nothing is written to them any more.
        for id in self.recoveries.disks_of(group.id()) {
            self.recoveries.stop(self, &id, Duration::ZERO).await?;
        }
        self.mirrors.forget(group, None).await;
        self.pulls.forget(group, None).await;
        let before = group.store().epochs().current();
        let turned = group.turn_round(theirs, reversal.fork).await;
        self.disconnect(group, "");
        turned?;
        let branches = group.branches().await?;
        let branch = branches.into_iter().find(|branch| branch.id == before.short());
        reversal.branch = branch.map(|branch| branch.id);
        Ok(reversal)
    }
}
