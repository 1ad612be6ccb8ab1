//! Synchronous groups: no answer before the peer holds the write durably, so that nothing that was
//! answered can be lost with this node.
//!
//! What happens while the peer is away is declared: writes wait, or the group goes on without the
//! peer, says so, and is synchronous again when the peer has caught up. While a disk has no point to
//! recover to, or is in a resync, nothing could be recovered without loss anyway, and answers do not
//! wait.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use srn_core::ids::Seq;
use srn_core::time::WallTime;
use srn_store::manifest::Role;

use super::Group;
use crate::clock;
use crate::error::{Failure, Result};
use crate::fleet::{Level, Synchronous};

/// An answer that waits longer than this shows that the peer is away, where going on is declared.
const PATIENCE: Duration = Duration::from_secs(5);

/// A wait that is worth telling of.
const SHORT_WAIT: Duration = Duration::from_secs(1);

/// A peer that is behind by no more than this has caught up.
const CAUGHT_UP: Duration = Duration::from_millis(200);

/// What decides whether answers wait.
#[derive(Debug, Clone, Copy)]
struct Situation {
    declared: Synchronous,
    /// This node sends the group to a peer.
    sends: bool,
    /// Every disk can be recovered at the newest position.
    clean: bool,
    /// Frames flow to the peer.
    streaming: bool,
    /// How far the peer is behind.
    behind: Duration,
    /// For how long the oldest answer has waited.
    waited: Duration,
    /// Answers wait now.
    waits: bool,
}

impl Situation {
    /// Whether answers shall wait.
    fn shall_wait(&self) -> bool {
        if !self.sends || !self.clean {
            return false;
        }
        match self.declared {
            Synchronous::Off => false,
            Synchronous::Wait => true,
            Synchronous::Degrade if !self.streaming => false,
            Synchronous::Degrade if self.waits => self.waited <= PATIENCE,
            Synchronous::Degrade => self.behind <= CAUGHT_UP,
        }
    }
}

/// What is remembered between two looks.
#[derive(Debug, Default)]
pub(super) struct Remembered {
    /// Answers wait for the peer, or do not although it was declared; since when.
    since: Option<(bool, WallTime)>,
    /// It was said that writes wait for a peer that is away.
    told_waiting: bool,
}

/// A synchronous group, as people see it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SyncStatus {
    /// What was declared.
    pub declared: Synchronous,
    /// Whether answers wait for the peer now.
    pub waits: bool,
    /// Since when that is so, in RFC 3339.
    pub since: String,
    /// Answers that wait at this moment.
    pub held: usize,
}

impl Group {
    /// Looks whether answers have to wait for the peer. Cheap where the group is not synchronous.
    pub(super) fn review_synchronous(&self) {
        let declared = self.record().synchronous;
        let engine = self.engine();
        if declared == Synchronous::Off && !engine.holds() {
            self.facts().synchronous = Remembered::default();
            return;
        }
        let streaming = self.streams();
        let situation = Situation {
            declared,
            sends: self.role() == Role::Primary && self.record_has_peer(),
            clean: {
                let catalog = self.catalog();
                catalog.is_clean() && !catalog.disks.is_empty()
            },
            streaming,
            behind: Duration::from_micros(self.lag().behind(clock::mono()).us),
            waited: engine.held().1,
            waits: engine.holds(),
        };
        let waits = situation.shall_wait();
        engine.hold(waits);
        let sends = situation.sends && declared != Synchronous::Off;
        let (changed, stuck) = {
            let mut facts = self.facts();
            let remembered = &mut facts.synchronous;
            if !sends {
                *remembered = Remembered::default();
                return;
            }
            let before = remembered.since.map(|(waits, _)| waits);
            if before != Some(waits) {
                remembered.since = Some((waits, clock::wall()));
            }
            // On the way to being connected nobody has waited yet.
            let away = waits && !streaming && situation.waited > SHORT_WAIT;
            let stuck = away && !remembered.told_waiting;
            remembered.told_waiting = away;
            (before.is_some_and(|before| before != waits), stuck)
        };
        let told = if stuck {
            Some((Level::Alert, "writes wait: the group is synchronous and its peer is away"))
        } else if changed && waits {
            Some((Level::Info, "synchronous again: every write is at the peer when it is answered"))
        } else if changed && situation.clean {
            Some((
                Level::Alert,
                "not synchronous any more: writes are answered without the peer, which is away \
                 or too slow (declared: degrade)",
            ))
        } else {
            None
        };
        if let Some((level, text)) = told {
            self.context.event(level, Some(&self.name()), text);
            self.changed.notify_waiters();
        }
    }

    /// The peer holds every frame up to `seq` durably: whoever waits for that is answered.
    pub(super) fn answer_up_to(&self, seq: Seq) {
        let engine = self.engine();
        engine.acknowledged(seq);
        // On the way back to being synchronous every acknowledgement may be the one.
        if self.record().synchronous == Synchronous::Degrade && !engine.holds() {
            self.review_synchronous();
        }
    }

    /// Whether this node can be told to have answers wait for the peer.
    ///
    /// # Errors
    /// Refused at a recovery node, and for a group without a peer.
    pub fn check_synchronous(&self) -> Result<()> {
        let name = self.name();
        if self.role() == Role::Secondary {
            return Err(Failure::refused(format!(
                "group {name} is written at the production node; set it there"
            )));
        }
        if !self.record_has_peer() {
            return Err(Failure::invalid(format!(
                "group {name} has no peer that its writes could wait for"
            )));
        }
        if self.awaits_reversal() {
            return Err(Failure::refused(format!(
                "nobody follows group {name} since the failover; first, at the old production node: \
                 srn group reverse {name}"
            )));
        }
        Ok(())
    }

    /// This node has taken over: the server runs here because the peer is lost, and its writes must
    /// not wait for it. Whoever wants that again declares it again.
    pub(super) fn forget_synchronous(&self) {
        if self.record().synchronous == Synchronous::Off {
            return;
        }
        let name = self.name();
        match self.change_settings(|record| record.synchronous = Synchronous::Off) {
            Ok(()) => {
                let text = "not synchronous after the failover; declare it again when the peer \
                            follows";
                self.context.event(Level::Warning, Some(&name), text);
            }
            Err(error) => log::error!("group {name}: writing down its settings: {error}"),
        }
    }

    /// Whether replication may be paused.
    ///
    /// # Errors
    /// Refused where writes would wait for as long.
    pub(super) fn check_pausable(&self) -> Result<()> {
        let name = self.name();
        if self.record().synchronous == Synchronous::Wait && self.role() == Role::Primary {
            return Err(Failure::refused(format!(
                "group {name} is synchronous and writes would wait for as long as it is paused; \
                 first: srn group set {name} --sync degrade, or off"
            )));
        }
        Ok(())
    }

    /// What people see of it, where it was declared.
    #[must_use]
    pub(super) fn synchronous_status(&self) -> Option<SyncStatus> {
        let declared = self.record().synchronous;
        if declared == Synchronous::Off {
            return None;
        }
        let (waits, since) = self.facts().synchronous.since?;
        let held = self.engine().held().0;
        Some(SyncStatus { declared, waits, since: clock::rfc3339(since), held })
    }

    /// The same in words, for the peer.
    pub(super) fn synchronous_words(&self) -> Option<String> {
        let status = self.synchronous_status()?;
        Some(if status.waits {
            "synchronous".into()
        } else {
            format!("synchronous was declared, but writes do not wait since {}", status.since)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CALM: Situation = Situation {
        declared: Synchronous::Degrade,
        sends: true,
        clean: true,
        streaming: true,
        behind: Duration::ZERO,
        waited: Duration::ZERO,
        waits: false,
    };

    #[test]
    fn whoever_declares_waiting_waits() {
        let away = Situation { streaming: false, waited: Duration::from_secs(99), ..CALM };
        assert!(Situation { declared: Synchronous::Wait, ..away }.shall_wait());
        assert!(!Situation { declared: Synchronous::Off, ..CALM }.shall_wait());
        for waits in [false, true] {
            assert!(!Situation { waits, ..away }.shall_wait());
        }
    }

    #[test]
    fn only_what_can_be_recovered_waits() {
        let wait = Situation { declared: Synchronous::Wait, ..CALM };
        assert!(!Situation { clean: false, ..wait }.shall_wait());
        assert!(!Situation { sends: false, ..wait }.shall_wait());
    }

    #[test]
    fn a_slow_peer_is_left_behind_and_waited_for_again() {
        let waiting = Situation { waits: true, ..CALM };
        assert!(Situation { waited: PATIENCE, ..waiting }.shall_wait());
        let late = PATIENCE + Duration::from_millis(1);
        assert!(!Situation { waited: late, ..waiting }.shall_wait());
        // It has to catch up first; how far behind it is while it is waited for says nothing.
        assert!(!Situation { behind: Duration::from_secs(1), ..CALM }.shall_wait());
        assert!(Situation { behind: CAUGHT_UP, ..CALM }.shall_wait());
        assert!(Situation { behind: Duration::from_secs(1), ..waiting }.shall_wait());
    }
}
