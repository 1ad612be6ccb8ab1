//! Going on with the peer's line where ours has left it: a secondary does so by itself, a fenced
//! primary when a person turns the direction of its group.
//!
//! Invariants:
//! * what lies behind the place where the lines parted stays here as a branch, until its time is over
//!   or a person deletes it;
//! * nothing is left behind before it is known that the peer can still send what follows that place;
//! * a primary that has not been fenced gives way only when a person says so, by name.
//!
//! It refuses to know how the store keeps a branch, and what else a node does with a group.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use srn_core::course::Course;
use srn_core::epoch::EpochTable;
use srn_core::ids::Seq;
use srn_core::state::Cause;
use srn_core::wire::{Message, Offer, RefuseCode};
use srn_link::Session;
use srn_store::StoreError;
use srn_store::group::Tail;
use srn_store::manifest::{Keep, Role};

use super::handover::Handover;
use super::lag::Lag;
use super::takeover::FENCED;
use super::{Group, Side};
use crate::clock;
use crate::error::{Failure, Kind, Result};
use crate::fleet::Level;

/// What a primary has been offered by its peer, which is primary too.
#[derive(Debug, Clone)]
pub(super) struct Offered {
    session: Session,
    epochs: EpochTable,
    oldest: Seq,
    has_copy: bool,
}

/// What turning the direction of a group means for this node.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Reversal {
    /// The group.
    pub group: String,
    /// The last frame that both nodes have.
    pub fork: u64,
    /// Frames behind it here.
    pub frames: u64,
    /// Changes of disks in these, which the peer has not got.
    pub changes: u64,
    /// Their content in bytes.
    pub bytes: u64,
    /// When the first of them was written, in RFC 3339.
    pub first: Option<String>,
    /// When the last of them was written, in RFC 3339.
    pub last: Option<String>,
    /// The branch that keeps them, once it is there.
    pub branch: Option<String>,
}

impl Group {
    /// The peer is primary too: keeps what it says, for whoever turns this node round.
    pub(super) fn remember_offer(&self, session: &Session, offer: &Offer) {
        self.facts().offered = Some(Offered {
            session: session.clone(),
            epochs: offer.epochs.clone(),
            oldest: offer.oldest,
            has_copy: offer.has_copy,
        });
    }

    /// The last frame before this node's own reign.
    pub(super) fn fork(&self) -> Seq {
        self.store.epochs().list().last().map_or(Seq::ZERO, |epoch| epoch.forked_from.seq)
    }

    /// Whether the peer is primary too, and neither line is the newer one.
    pub(super) fn has_rival(&self) -> bool {
        let ours = self.store.epochs();
        self.role() == Role::Primary
            && self.facts().offered.as_ref().is_some_and(|offered| {
                !ours.is_superseded_by(&offered.epochs) && !offered.epochs.is_superseded_by(&ours)
            })
    }

    /// A secondary whose line has left the offered one goes back to where that was.
    ///
    /// # Errors
    /// The refusal of the offer; then nothing was changed.
    pub(super) async fn leave_line(
        self: &Arc<Self>,
        offer: &Offer,
    ) -> std::result::Result<(), (RefuseCode, String)> {
        let Course::Leave { at, .. } =
            Course::of(&self.store.epochs(), &self.store.head(), &offer.epochs)
        else {
            return Ok(());
        };
        if at.seq.next() < offer.oldest && !offer.has_copy {
            let text = format!(
                "the histories parted behind frame {}, and the log of the production node begins \
                 at {}",
                at.seq, offer.oldest
            );
            return Err((RefuseCode::TooFarBehind, text));
        }
        let head = self.store.head().seq;
        let before = self.store.epochs().current();
        self.follow_line(offer.epochs.clone()).await.map_err(|error| {
            let text = format!(
                "the recovery node cannot go back to frame {}, where the histories parted: {error}",
                at.seq
            );
            (RefuseCode::Diverged, text)
        })?;
        if head > at.seq {
            self.tell_branch(&before.short(), at.seq, head);
        }
        Ok(())
    }

    fn tell_branch(&self, branch: &str, fork: Seq, head: Seq) {
        let name = self.name();
        let text = format!(
            "frames {} to {head} here are not in the history of the peer; they are kept as branch \
             {branch}: srn group branches {name}",
            fork.next()
        );
        self.context.event(Level::Warning, Some(&name), &text);
    }

    /// Gives the main line's end to the line of the peer. The offers are held.
    async fn follow_line(self: &Arc<Self>, theirs: EpochTable) -> Result<()> {
        self.end_stream();
        let this = self.clone();
        let work = move || -> Result<()> {
            let _ = this.engine().stop("the group follows its peer");
            match this.store.follow(&theirs, clock::now()) {
                Ok(appender) => this.replace_engine(appender),
                Err(error @ (StoreError::Io { .. } | StoreError::Stopped(_))) => {
                    // What the medium holds now is known at the next start, and not before.
                    let text = format!(
                        "turning round broke in the middle: {error}; mend that and restart the \
                         daemon, which then knows which line it has"
                    );
                    let mut facts = this.facts();
                    facts.failure = Some((Cause::DiskFailed, text.clone()));
                    facts.fork_uncertain = true;
                    Err(Failure::new(Kind::Storage, text))
                }
                Err(error) => {
                    // Go on as before: the main line is what it was.
                    this.reopen_engine()?;
                    if this.fence().is_some() {
                        this.engine().close(FENCED);
                    }
                    Err(error.into())
                }
            }
        };
        tokio::task::spawn_blocking(work)
            .await
            .map_err(|error| Failure::internal(format!("a task ended: {error}")))?
    }

    /// What turning round would mean here, and the line that would be followed.
    ///
    /// # Errors
    /// Why it cannot be, with the way out.
    pub async fn reversal(self: &Arc<Self>, give_way: bool) -> Result<(Reversal, EpochTable)> {
        let name = self.name();
        let offered = self.may_turn_round(give_way)?;
        let course = Course::of(&self.store.epochs(), &self.store.head(), &offered.epochs);
        let at = match course {
            Course::Straight => self.store.head(),
            Course::Leave { at, .. } => at,
            Course::Newer => {
                return Err(Failure::refused(format!(
                    "group {name}: the history here is newer than that of the peer, which was set \
                     back; nothing was changed"
                )));
            }
            Course::Foreign => {
                return Err(Failure::refused(format!(
                    "group {name}: the history here and that of the peer have nothing in common; \
                     keep what you need with srn export, and delete the group at the node that \
                     gives way: srn group delete {name}"
                )));
            }
        };
        let anew = format!(
            "this node cannot go back to where the histories parted; keep what you need of it with \
             srn export, and delete the group here: srn group delete {name}; it is then replicated \
             anew, with what is here already if you say so: srn group resync {name} --seed-from"
        );
        if at.seq.next() < offered.oldest && !offered.has_copy {
            return Err(Failure::refused(format!(
                "group {name}: the peer's log begins at frame {}, and both nodes have the same up to \
                 frame {}: {anew}",
                offered.oldest, at.seq
            )));
        }
        let store = self.store.clone();
        let looked = self.blocking(move || {
            let here = store.view_at(at.seq)?.catalog().at;
            Ok((here, if here == at { store.tail_behind(at.seq)? } else { Tail::default() }))
        });
        let (here, tail) = looked.await.map_err(|error| match error.kind {
            Kind::NotFound => Failure::refused(format!("group {name}: {error}: {anew}")),
            _ => error,
        })?;
        if here != at {
            return Err(Failure::refused(format!(
                "group {name}: frame {} here is not that of the peer; this node or the peer was set \
                 back and has written since: {anew}",
                at.seq
            )));
        }
        let reversal = Reversal {
            group: name,
            fork: at.seq.0,
            frames: tail.frames,
            changes: tail.changes,
            bytes: tail.bytes,
            first: tail.times.map(|(first, _)| clock::rfc3339(first)),
            last: tail.times.map(|(_, last)| clock::rfc3339(last)),
            branch: None,
        };
        Ok((reversal, offered.epochs))
    }

    /// Whether this node may follow its peer now.
    fn may_turn_round(&self, give_way: bool) -> Result<Offered> {
        let name = self.name();
        let refused = |why: String| Err(Failure::refused(format!("group {name} {why}")));
        let (role, fence) = self.store.role();
        if role == Role::Secondary {
            return Err(Failure::conflict(format!(
                "this node is the recovery node of group {name} already; the direction is turned at \
                 the node that was primary before"
            )));
        }
        let Some(session) = self.peer_session() else {
            return Err(Failure::unreachable(format!(
                "the peer of group {name} is not connected; the direction is turned when it is"
            )));
        };
        let peer = session.hello().name.clone();
        if fence.as_ref().is_some_and(|fence| fence.cause == Cause::Handover) {
            return refused(
                "was handed over, and the peer has not said that it took over; wait for that"
                    .into(),
            );
        }
        let offered = self.facts().offered.clone();
        let offered = offered.filter(|offered| offered.session.number() == session.number());
        if fence.is_none() && !self.has_rival() {
            return if self.awaits_reversal() {
                refused(format!(
                    "is turned round at the node that was primary before: there, once it is fenced, \
                     run srn group reverse {name} at {peer}"
                ))
            } else {
                refused(format!(
                    "is written here, and {peer} has not taken over; to turn the direction, fail over \
                     there: srn failover run {name} at {peer}"
                ))
            };
        }
        if self.store.keep() == Keep::Cache {
            return refused(format!(
                "is kept as a cache here, which holds no copy of the disks that could go on; delete \
                 it here with srn group delete {name}: {peer} then replicates a full copy to this node"
            ));
        }
        let Some(offered) = offered else {
            return refused(format!(
                "is not offered by {peer} now; see srn group show {name} there"
            ));
        };
        if fence.is_none() && !give_way {
            return refused(format!(
                "has two primaries, this node and {peer}, and neither history continues the other; \
                 decide which one goes on, and at the other one run srn group reverse {name} \
                 --give-way"
            ));
        }
        Ok(offered)
    }

    /// The session with the peer: a fenced node takes no part in it, but hears what is offered there.
    fn peer_session(&self) -> Option<Session> {
        let offered = self.facts().offered.as_ref().map(|offered| offered.session.clone());
        let is_there = |session: &Session| !session.is_over();
        offered.filter(is_there).or_else(|| self.session().filter(is_there))
    }

    /// Gives the group to the peer, whose line is `theirs`: from here on this node is its secondary.
    ///
    /// # Errors
    /// When the line cannot be followed after all; storage failures.
    pub async fn turn_round(self: &Arc<Self>, theirs: EpochTable, fork: u64) -> Result<()> {
        let held = self.offers.clone().lock_owned().await;
        let fencing = self.fencing.lock().await;
        let (name, head) = (self.name(), self.store.head().seq);
        let session = self.peer_session();
        let before = self.store.epochs().current();
        self.follow_line(theirs).await?;
        {
            let mut facts = self.facts();
            facts.handover = Handover::No;
            facts.waiting_for_peer = false;
            facts.offered = None;
            facts.halted.clear();
            facts.sources.clear();
            facts.progress.clear();
            if matches!(facts.failure, Some((Cause::LogFull, _))) {
                facts.failure = None;
            }
        }
        *self.lag() = Lag::default();
        *self.side() = Side::Apart;
        drop(fencing);
        drop(held);
        self.forget_sources();
        let text =
            format!("this node follows the peer from frame {fork} on: it is the recovery node");
        self.context.event(Level::Warning, Some(&name), &text);
        if head.0 > fork {
            self.tell_branch(&before.short(), Seq(fork), head);
        }
        self.changed.notify_waiters();
        // The peer was refused, and does not know that there is nothing in the way any more.
        if let Some(session) = session {
            let text = String::new();
            let _ = session.send(&Message::Hindrance { group: self.id, text }).await;
        }
        self.review();
        Ok(())
    }

    /// A person says that the peer which had taken over is lost: this node goes on, in an epoch that is
    /// newer than all that it knows of. Should the peer come back after all, it is fenced.
    ///
    /// # Errors
    /// While the peer is there and primary; for a cache; storage failures.
    pub(super) async fn take_back(self: &Arc<Self>) -> Result<()> {
        let name = self.name();
        let held = self.offers.clone().lock_owned().await;
        let session = self.peer_session();
        let offered = self.facts().offered.clone();
        let is_primary = offered.is_some_and(|offered| {
            session.as_ref().is_some_and(|session| session.number() == offered.session.number())
                && self.store.epochs().is_superseded_by(&offered.epochs)
        });
        if is_primary {
            return Err(Failure::refused(format!(
                "the peer of group {name} is there, and has taken over; this node can follow it: \
                 srn group reverse {name}"
            )));
        }
        if self.store.keep() == Keep::Cache {
            return Err(Failure::refused(format!(
                "group {name} is kept as a cache here, which holds no copy of the disks to go on \
                 with; delete it with srn group delete {name}, and protect the server anew"
            )));
        }
        let fencing = self.fencing.lock().await;
        let seq = self.store.head().seq;
        self.take_over_from(seq).await?;
        {
            let mut facts = self.facts();
            facts.handover = Handover::No;
            facts.offered = None;
        }
        *self.lag() = Lag::default();
        drop(fencing);
        drop(held);
        let text = format!(
            "an administrator says that the peer which had taken over is lost: this node goes on \
             as primary from frame {seq} on"
        );
        self.context.event(Level::Warning, Some(&name), &text);
        self.changed.notify_waiters();
        if let Some(session) = session {
            self.session_up(&session).await;
        }
        self.review();
        Ok(())
    }

    /// A secondary has no sources, and neither has a node that has just become primary: whoever wrote
    /// before must not come back by itself and write beside a recovered server.
    pub(super) fn forget_sources(&self) {
        if self.record().sources.is_empty() {
            return;
        }
        if let Err(error) = self.change_settings(|record| record.sources.clear()) {
            // They are not served: tried again when this node takes over.
            log::error!("group {}: forgetting its sources: {error}", self.name());
        }
    }
}
