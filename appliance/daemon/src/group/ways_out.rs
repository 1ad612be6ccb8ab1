//! What a person can do about a state that does not pass by itself, in words; and the group's epochs.
//!
//! It refuses to know how these states come about: see [`super::status`].

use serde::{Deserialize, Serialize};
use srn_core::state::Cause;
use srn_store::manifest::{Keep, Role};

use super::Group;
use crate::clock;

/// An epoch of a group's history.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct EpochStatus {
    /// Its id.
    pub id: String,
    /// The last frame before its first: where it forked from the one before.
    pub forked_from: u64,
}

impl Group {
    /// The epochs of the main line, oldest first.
    pub(super) fn epoch_statuses(&self) -> Vec<EpochStatus> {
        let epochs = self.store.epochs();
        let status = |epoch: &srn_core::epoch::Epoch| EpochStatus {
            id: epoch.id.to_string(),
            forked_from: epoch.forked_from.seq.0,
        };
        epochs.list().iter().map(status).collect()
    }

    /// The way out of a state that needs a person.
    pub(super) fn way_out(&self, cause: Cause) -> Option<String> {
        let name = self.name();
        let here = self.store.head().seq;
        let primary = self.role() == Role::Primary;
        Some(match cause {
            Cause::FailedOver => {
                let (fork, oldest) = (self.fork(), self.store.oldest());
                if oldest <= fork.next() {
                    format!(
                        "when the node that was primary before is back: srn group reverse {name} \
                         there"
                    )
                } else {
                    format!(
                        "the log begins at frame {oldest}, the node that was primary before has \
                         frames up to {fork}: turning the direction needs a full comparison of \
                         both, which this version does not do"
                    )
                }
            }
            Cause::FailoverAtPeer if self.store.keep() == Keep::Replica => format!(
                "to let this node follow its peer: srn group reverse {name} (if the peer is lost \
                 for good, this node goes on with srn group resume {name} --yes-not-taken-over)"
            ),
            Cause::FailoverAtPeer => format!(
                "a cache cannot follow its peer; when nothing here is needed: srn group delete {name}, \
                 and this node gets a full copy, if the peer's log still goes back to the beginning"
            ),
            Cause::PeerAhead => format!(
                "this node was set back to frame {here}, and what it lacks is at the peer: stop the \
                 server here, fail over there with srn failover run {name} --force, then srn group \
                 reverse {name} here"
            ),
            Cause::PeerSetBack => format!(
                "what it has lost is here, up to frame {here}: once its server is off, fail over \
                 here with srn failover run {name} --force, then srn group reverse {name} there"
            ),
            Cause::TwoPrimaries => format!(
                "decide which node goes on; at the other one: srn group reverse {name} --give-way"
            ),
            Cause::NoPrimary => format!(
                "this node is at frame {here} of {}; fail over at the node that has the newer one: \
                 srn failover run {name} --force",
                clock::rfc3339(self.catalog().wall_time)
            ),
            Cause::HistoriesDiffer | Cause::TooFarBehind => format!(
                "keep what is needed of one node with srn export, delete the group there with srn \
                 group delete {name}{}",
                if primary {
                    ""
                } else {
                    ", and it is replicated anew, by a full copy where the production node keeps one"
                }
            ),
            _ => return None,
        })
    }
}
