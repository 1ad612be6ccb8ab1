//! The group's part of the link, beside other groups.

use srn_core::state::State;
use srn_link::Traffic;

use super::Group;

impl Group {
    /// What the group sends now, and its weight among others that send the same. Initial replication
    /// and resync are in the same ordered log as the writes between them, so it is the group's
    /// stream that is bulk or not, as long as one of its disks is.
    pub(super) fn share(&self) -> (Traffic, u64) {
        let bulk = matches!(self.facts().last_state, Some((State::Seeding | State::Resync, _)));
        let traffic = if bulk { Traffic::Bulk } else { Traffic::Live };
        (traffic, self.record().priority.weight())
    }
}
