//! What a group does when its log has no room.
//!
//! The engine says that it waits for room. Most often that passes within milliseconds: the peer has
//! taken what is old, and maintenance is about to give it up. Only when nothing can be given up, or
//! the wait lasts, the log is full, and the group does what was declared for that.

use std::time::Duration;

use srn_core::ids::Seq;
use srn_core::state::Cause;
use srn_core::time::Mono;
use srn_store::manifest::{Keep, Role};

use super::Group;
use super::engine::{Done, Op};
use crate::clock;
use crate::error::{Failure, Result};
use crate::fleet::{FullPolicy, Level};

/// A wait for room that lasts longer is a full log. A server's writes wait for so long at most
/// where the policy is `stop`, give or take the second between two looks.
const STALL_MAX: Duration = Duration::from_secs(1);

/// After a wait for room of this length not even what changed since the peer's frame is remembered:
/// then contents are compared.
const FORGET_AFTER: Duration = Duration::from_secs(60);

/// Room on the volume below which the log is merged before it has none, in bytes: twice what is merged
/// at once.
const MERGE_BELOW: u64 = 1 << 30;

/// So long after a wait for room the history here gives way to new writes.
const SHORT_OF_ROOM: Duration = Duration::from_secs(30);

fn is_older(at: Mono, than: Duration) -> bool {
    u128::from(clock::mono().since(at)) > than.as_micros()
}

impl Group {
    /// How full the log is, from 0 to 1: what the peer has not acknowledged against the cap.
    #[must_use]
    pub fn log_fill(&self) -> f64 {
        let (_, cap) = self.store.log_bytes();
        let needed = self.needed_bytes();
        if cap == 0 { 0.0 } else { needed as f64 / cap as f64 }
    }

    /// What the log still takes, in bytes: its cap less what the peer has not acknowledged.
    #[must_use]
    pub fn log_room(&self) -> u64 {
        self.store.log_bytes().1.saturating_sub(self.needed_bytes())
    }

    /// Bytes of the log that have to stay: frames that the peer has not acknowledged, and does not get
    /// otherwise.
    fn needed_bytes(&self) -> u64 {
        let acked = self.store.acked();
        let from = self.giving().map_or(acked, |(_, to)| acked.max(to));
        self.store.log_bytes_behind(from)
    }

    /// The engine waits for room (`Some`, with the reason), or has found it. Called from the
    /// engine's thread.
    pub(super) fn on_stall(&self, why: Option<&str>) {
        let was_full = {
            let mut facts = self.facts();
            let now = clock::mono();
            facts.stalled = why.map(|why| (why.to_owned(), now));
            facts.stalled_at = Some(now);
            facts.full.is_some()
        };
        match why {
            // Merging makes room, whatever the peer has got.
            Some(_) if self.may_track() => {}
            // Not a segment can be given up.
            Some(why) if self.log_room() <= 2 * self.context.config().segment_bytes => {
                self.on_full(why);
            }
            // Looked at again in [`Group::look_for_room`].
            Some(_) => {}
            None if was_full => self.on_room(),
            None => {}
        }
    }

    /// Once a second: is a wait for room too long?
    pub(super) fn look_for_room(&self) {
        let why = {
            let facts = self.facts();
            match &facts.stalled {
                Some((why, since)) if facts.full.is_none() && is_older(*since, STALL_MAX) => {
                    why.clone()
                }
                _ => return,
            }
        };
        self.on_full(&why);
    }

    /// The log is full: do what the group declared.
    fn on_full(&self, why: &str) {
        let name = self.name();
        self.facts().full = Some(why.to_owned());
        let policy = self.record().full_policy;
        let text = match (self.role(), policy) {
            (Role::Secondary, _) => format!("{why}: frames of the production node wait there"),
            (Role::Primary, FullPolicy::Throttle) => {
                format!("{why}: writes wait until there is room (throttle)")
            }
            (Role::Primary, FullPolicy::Track) if self.may_track() => {
                format!("{why}: writes wait until there is room; what is old is merged (track)")
            }
            // Without a peer there is nothing that could be tracked.
            (Role::Primary, FullPolicy::Track) => format!("{why}: writes wait until there is room"),
            (Role::Primary, FullPolicy::Stop) => {
                self.facts().failure = Some((Cause::LogFull, why.to_owned()));
                // Whoever waits is told now: the mirror ends with an error and its server goes on.
                self.engine().close("the log is full and the policy is stop");
                format!("{why}: the mirror ends, the server goes on unprotected (stop)")
            }
        };
        self.context.event(Level::Alert, Some(&name), &text);
        self.tell_hindrance();
        self.changed.notify_waiters();
        self.review();
    }

    /// The log is full no more.
    fn on_room(&self) {
        self.facts().full = None;
        self.context.event(Level::Info, Some(&self.name()), "the log has room again");
        self.tell_hindrance();
        self.changed.notify_waiters();
        self.review();
    }

    /// Whether the history here has to give way to new writes: a full log would stop the server
    /// for the sake of points that the peer keeps too.
    pub(super) fn history_gives_way(&self) -> bool {
        self.role() == Role::Primary
            && self.record_has_peer()
            && !self.awaits_reversal()
            && (self.is_short_of_room() || self.gives_way_early())
    }

    /// Whether a log that may track gives way before it has to.
    fn gives_way_early(&self) -> bool {
        self.may_track() && (self.merges_for_resync() || self.volume_gets_full())
    }

    /// Whether frames that the peer has not got may be given up.
    pub(super) fn may_track(&self) -> bool {
        self.role() == Role::Primary
            && self.record_has_peer()
            && self.record().full_policy == FullPolicy::Track
    }

    /// The frame from which on what changed has to be known, where the log gives way to new writes:
    /// the peer's. None where it does not; zero where not even that is affordable.
    pub(super) fn tracked_from(&self) -> Option<Seq> {
        if !self.may_track() || !(self.is_short_of_room() || self.gives_way_early()) {
            return None;
        }
        let stalled = self.facts().stalled.as_ref().map(|(_, since)| *since);
        let forget = stalled.is_some_and(|since| is_older(since, FORGET_AFTER));
        Some(if forget { Seq::ZERO } else { self.store.acked() })
    }

    /// Whether the volume has little room left while nothing flows to the peer: merging needs some of
    /// it, so it is not left until there is none.
    fn volume_gets_full(&self) -> bool {
        !self.streams()
            && self.store.unacked_bytes() > self.store.log_bytes().0 / 2
            && self.store.room_for_layers().is_ok_and(|room| room < MERGE_BELOW)
    }

    /// Whether the peer lacks more than the log holds, and what changed is known, or will be found
    /// out.
    pub(super) fn is_tracking(&self) -> bool {
        self.role() == Role::Primary
            && self.store.keep() == Keep::Replica
            && self.record_has_peer()
            && !self.awaits_reversal()
            && self.store.oldest() > self.store.acked().next()
    }

    /// Whether somebody has waited for room here of late.
    pub(super) fn is_short_of_room(&self) -> bool {
        self.facts().stalled_at.is_some_and(|at| !is_older(at, SHORT_OF_ROOM))
    }

    /// After a full log has ended protection: takes writes again if there is room now.
    ///
    /// # Errors
    /// Refused while there is none.
    pub fn try_again(&self) -> Result<()> {
        let full = matches!(self.facts().failure, Some((Cause::LogFull, _)));
        if !full {
            return self.check_writable();
        }
        // A connection that was refused something has missed it: it must not go on.
        if !self.slots.connections(&format!("{}/", self.name())).is_empty() {
            return Err(Failure::refused("the mirror that met the full log has not ended yet"));
        }
        if self.log_fill() > 0.5 {
            return Err(Failure::refused(format!(
                "the log of group {} is still more than half full; it empties as the peer takes it",
                self.name()
            )));
        }
        {
            let mut facts = self.facts();
            facts.failure = None;
            facts.full = None;
            // The engine has not looked since.
            if let Some((_, since)) = &mut facts.stalled {
                *since = clock::mono();
            }
        }
        let engine = self.engine();
        engine.reopen();
        // Nothing, so that it looks now: it tells of room only when it finds some.
        let (done, _) = tokio::sync::oneshot::channel();
        engine.submit_one(Op {
            client: None,
            changes: Vec::new(),
            bytes: 0,
            done: Done::Task(done),
        });
        self.review();
        self.check_writable()
    }
}
