//! A planned failover, at both sides: the secondary asks, the primary's servers stand still, no more
//! writes are taken, and the last frame is handed over. Either the secondary goes on behind that
//! frame, or the primary goes on as if nothing had been.
//!
//! Invariants:
//! * behind the final mark nothing is answered, and from the moment that the secondary is told of it
//!   the primary is fenced, durably;
//! * that fence is lifted only by the secondary's answer to an offer made behind it; while it takes
//!   over, the secondary judges no offers;
//! * a server that was made to stand still goes on if and only if the primary does.
//!
//! It refuses to know how a server is made to stand still, and which point is recovered.

use std::sync::Arc;
use std::time::Duration;

use srn_core::epoch::Position;
use srn_core::frame::MarkKind;
use srn_core::ids::{CheckpointId, DiskNo};
use srn_core::state::Cause;
use srn_core::wire::{Message, RefuseCode};
use srn_link::Session;
use srn_store::group::{Change, OwnedRecord};
use srn_store::manifest::{Fence, Role};

use super::takeover::NoOffers;
use super::{Group, Side};
use crate::clock;
use crate::error::{Failure, Kind, Result};
use crate::fleet::{Level, Source};

/// How long a planned failover waits until servers stand still.
const HALT_PATIENCE: Duration = Duration::from_secs(15);

/// How long it waits for what clients have asked for before.
const DRAIN_PATIENCE: Duration = Duration::from_secs(30);

/// How long a node that stops waits for one that is being decided.
const STOP_PATIENCE: Duration = Duration::from_secs(5);

/// How often it looks again at what may have changed without a word.
const LOOK: Duration = Duration::from_millis(100);

/// How far a primary is in giving its group away.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Handover {
    /// It does not.
    #[default]
    No,
    /// Servers that have their own disks are made to stand still; writes are still taken.
    Halting,
    /// No more writes are taken.
    Draining,
}

/// The group is not handed over while this is there.
#[derive(Debug)]
pub struct Kept(Arc<Group>);

impl Drop for Kept {
    fn drop(&mut self) {
        self.0.facts().kept -= 1;
    }
}

/// The primary's part.
impl Group {
    /// The peer wants to take over in good order.
    pub(super) async fn on_drain(self: &Arc<Self>, session: &Session) {
        let name = self.name();
        if let Err(why) = self.begin_handover(session) {
            log::info!("group {name}: not drained: {why}");
            let refuse = self.refuse(RefuseCode::NotDrained, why.to_string());
            let _ = session.send(&refuse).await;
            return;
        }
        let text = "draining for a planned failover: no more writes are taken";
        self.context.event(Level::Warning, Some(&name), text);
        self.changed.notify_waiters();
        if let Err(why) = self.hand_over(session).await {
            log::warn!("group {name}: draining failed, production goes on: {why}");
            self.goes_on_as_primary();
            let refuse = self.refuse(RefuseCode::NotDrained, why.to_string());
            let _ = session.send(&refuse).await;
        }
    }

    /// A recovered server runs from the group here: it is stopped first, by a person.
    pub async fn cannot_be_drained(&self, session: &Session, recovered: &str) {
        let text = format!(
            "the recovered server {recovered} runs there from group {}; stop it first with srn \
             failover stop {recovered}",
            self.name()
        );
        let _ = session.send(&self.refuse(RefuseCode::NotDrained, text)).await;
    }

    /// Begins it, if nothing is in the way and nobody else has.
    fn begin_handover(&self, session: &Session) -> Result<()> {
        self.check_writable()?;
        let name = self.name();
        let refused = |why: &str| Err(Failure::refused(format!("group {name} {why}")));
        if self.settings().paused {
            return refused("is paused at the production node; resume it there");
        }
        if !self.streams_to(session) {
            return refused("is not being replicated now");
        }
        if !self.catalog().is_clean() {
            return refused("is not in step: a disk's initial replication or resync is under way");
        }
        let mut facts = self.facts();
        if facts.handover != Handover::No {
            return refused("is being drained already");
        }
        if facts.kept > 0 {
            return refused("is being changed, or its production node is stopping; try again");
        }
        facts.handover = Handover::Halting;
        // Whoever stands still says so anew.
        facts.halted.clear();
        Ok(())
    }

    async fn hand_over(self: &Arc<Self>, session: &Session) -> Result<()> {
        self.servers_halted().await?;
        self.changed.notify_waiters();
        // What was asked for before is appended first; what comes after is refused.
        let marked = tokio::time::timeout(DRAIN_PATIENCE, self.append_final()).await;
        let last = marked.unwrap_or_else(|_| {
            Err(Failure::refused("what waits at the production node cannot be appended in time"))
        })?;
        if !self.streams_to(session) {
            return Err(Failure::refused("the peer that asked for it is gone"));
        }
        if !self.catalog().is_clean() {
            return Err(Failure::refused("a disk's initial replication or resync has begun"));
        }
        let fence = Fence { cause: Cause::Handover, epochs: None, since: clock::wall() };
        if let Err(error) = self.fence_off(fence).await {
            log::error!("group {}: writing down the fence: {error}", self.name());
            // Closed for that fence, and there is none.
            if self.fence().is_none() {
                self.engine().reopen();
            }
            return Err(error);
        }
        // The stream goes on: the peer takes over when it has the last frame.
        let _ = session.send(&Message::Drained { group: self.id, last }).await;
        // A session that came meanwhile was offered a group without a fence.
        if let Some(current) = self.session().filter(|new| new.number() != session.number()) {
            self.session_up(&current).await;
        }
        Ok(())
    }

    /// Waits until the servers that have their own disks write nothing more; from then on no more
    /// writes are taken.
    async fn servers_halted(&self) -> Result<()> {
        let halted = async {
            while !self.drains_if_halted()? {
                let _ = tokio::time::timeout(LOOK, self.changed.notified()).await;
            }
            Ok(())
        };
        tokio::time::timeout(HALT_PATIENCE, halted).await.unwrap_or_else(|_| {
            Err(Failure::refused(
                "a mirrored server cannot be made to stand still at the production node, or is not \
                 followed there, or a last pass over a pulled disk did not come to its end; once the \
                 server is off, fail over without its consent (--force)",
            ))
        })
    }

    /// In one step, so that no server is let go on in between.
    fn drains_if_halted(&self) -> Result<bool> {
        let disks = self.catalog().disks;
        let mirrored: Vec<DiskNo> = self
            .settings()
            .sources
            .iter()
            .filter(|record| matches!(record.source, Source::Mirror { .. } | Source::Pull { .. }))
            .map(|record| DiskNo(record.disk))
            // What could not be added may have left its source behind.
            .filter(|disk| disks.contains_key(disk))
            .collect();
        let mut facts = self.facts();
        if facts.handover != Handover::Halting {
            return Err(Failure::refused("the production node is stopping"));
        }
        let all = mirrored.iter().all(|disk| facts.halted.contains(disk));
        if all {
            facts.handover = Handover::Draining;
        }
        Ok(all)
    }

    /// Whether the servers of this group shall stand still.
    #[must_use]
    pub fn is_halting(&self) -> bool {
        self.facts().handover == Handover::Halting
    }

    /// A mirrored disk's server writes nothing now, and all that it wrote is here; or a last pass over
    /// a pulled disk has come to its end.
    pub fn halted(&self, disk: DiskNo) {
        {
            let mut facts = self.facts();
            if facts.handover != Handover::Halting {
                return;
            }
            facts.halted.insert(disk);
        }
        self.changed.notify_waiters();
    }

    /// Takes that back.
    pub fn not_halted(&self, disk: DiskNo) {
        self.facts().halted.remove(&disk);
    }

    /// Whether a server that was made to stand still may go on: nobody is about to take over, or
    /// has.
    #[must_use]
    pub fn may_go_on(&self) -> bool {
        self.role() == Role::Primary
            && self.fence().is_none()
            && self.facts().handover == Handover::No
    }

    /// Until what is returned is dropped, the group is not handed over: its disks change, or it is
    /// deleted.
    ///
    /// # Errors
    /// [`Kind::Conflict`] when it is being handed over already, and that is not decided.
    pub fn keep(self: &Arc<Self>) -> Result<Kept> {
        let decided = self.fence().is_some();
        let mut facts = self.facts();
        if facts.handover != Handover::No && !decided {
            return Err(Failure::conflict(format!(
                "a failover of group {} is under way; wait for its end",
                self.name()
            )));
        }
        facts.kept += 1;
        drop(facts);
        Ok(Kept(self.clone()))
    }

    /// The node is stopping: no handover begins any more, and one that has begun is decided when
    /// this returns, within reason.
    pub async fn end_handovers(&self) {
        {
            let mut facts = self.facts();
            facts.kept += 1;
            if facts.handover == Handover::Halting {
                facts.handover = Handover::No;
            }
        }
        self.changed.notify_waiters();
        let decided = async {
            while self.facts().handover == Handover::Draining && self.fence().is_none() {
                let _ = tokio::time::timeout(LOOK, self.changed.notified()).await;
            }
        };
        let _ = tokio::time::timeout(STOP_PATIENCE, decided).await;
    }

    /// A person says that the peer has not taken over, and will not: production goes on.
    ///
    /// # Errors
    /// When it was not handed over.
    pub async fn reclaim(self: &Arc<Self>) -> Result<()> {
        let name = self.name();
        let fence = self.fence();
        if fence.as_ref().is_some_and(|fence| fence.cause == Cause::FailoverAtPeer) {
            return self.take_back().await;
        }
        if fence.is_none() {
            return Err(Failure::conflict(format!(
                "group {name} was not drained for a failover, so there is nothing to take back"
            )));
        }
        let text = "an administrator says that the peer has not taken over, and will not";
        self.context.event(Level::Warning, Some(&name), text);
        self.peer_has_not_taken_over(fence).await;
        self.review();
        if self.fence().is_some() {
            return Err(Failure::new(
                Kind::Storage,
                format!("the fence of group {name} could not be lifted; srn events tells why"),
            ));
        }
        Ok(())
    }

    /// Whether this node has made a mirrored disk's server stand still.
    #[must_use]
    pub fn server_stands_still(&self, disk: DiskNo) -> bool {
        self.record().sources.iter().any(|record| {
            record.disk == disk.0
                && matches!(record.source, Source::Mirror { stands_still: true, .. })
        })
    }

    /// Remembers it, durably.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn set_server_stands_still(&self, disk: DiskNo, still: bool) -> Result<()> {
        self.change_settings(|record| {
            let source = record.sources.iter_mut().find(|source| source.disk == disk.0);
            if let Some(Source::Mirror { stands_still, .. }) = source.map(|found| &mut found.source)
            {
                *stands_still = still;
            }
        })
    }

    /// Nobody takes over: clients are served again.
    fn goes_on_as_primary(&self) {
        self.facts().handover = Handover::No;
        // A fence that was put up meanwhile stays, and so does a store that failed.
        self.engine().go_on();
        self.changed.notify_waiters();
        self.review();
    }

    /// Appends the mark behind which nothing comes.
    async fn append_final(&self) -> Result<Position> {
        let mark = OwnedRecord::Mark(CheckpointId(clock::random()), MarkKind::Final, false);
        let why = "drained for a planned failover";
        let appended = self.engine().append_last(vec![Change::Record(mark)], why).await;
        appended.map_err(|closed| Failure::refused(closed.to_string()))
    }

    /// The peer has answered an offer: it has not taken over. A primary that was drained before
    /// that offer, or that waited for the peer's word, goes on.
    pub(super) async fn peer_has_not_taken_over(self: &Arc<Self>, lifts: Option<Fence>) {
        let waited = std::mem::take(&mut self.facts().waiting_for_peer);
        let held = self.fencing.lock().await;
        let handover = lifts.is_some() && self.fence() == lifts;
        if handover {
            let store = self.store.clone();
            match self.blocking(move || store.set_fence(None)).await {
                Ok(()) => {
                    self.facts().handover = Handover::No;
                    self.engine().reopen();
                    let text = "the peer did not take over: this node goes on as primary";
                    self.context.event(Level::Info, Some(&self.name()), text);
                }
                Err(error) => {
                    let text = format!("the fence could not be lifted: {error}");
                    self.context.event(Level::Alert, Some(&self.name()), &text);
                }
            }
        }
        drop(held);
        if waited || handover {
            self.changed.notify_waiters();
        }
    }
}

/// The secondary's part.
impl Group {
    /// The primary takes no more writes; this is its last frame.
    pub(super) fn on_drained(&self, session: &Session, last: Position) {
        self.answered(session, Ok(last));
    }

    /// The primary will not be drained.
    pub(super) fn on_not_drained(&self, session: &Session, why: String) {
        self.answered(session, Err(why));
    }

    fn answered(&self, session: &Session, answer: std::result::Result<Position, String>) {
        if let Side::Incoming(incoming) = &mut *self.side()
            && incoming.session().number() == session.number()
        {
            incoming.drained = Some(answer);
        }
        self.changed.notify_waiters();
    }

    /// Whether the primary can be asked to hand over, and in which session.
    fn can_be_handed_over(&self) -> Result<Session> {
        let name = self.name();
        let refused = |why: &str| {
            Err(Failure::refused(format!(
                "group {name} {why}, so its production node cannot hand it over; mend that, or \
                 fail over without its consent (--force) once the production server is off"
            )))
        };
        if self.role() != Role::Secondary {
            return refused("is not replicated to this node");
        }
        if self.settings().paused {
            return refused("is paused");
        }
        {
            let facts = self.facts();
            if let Some((_, why)) = &facts.failure {
                return refused(&format!("cannot be stored here ({why})"));
            }
            if facts.full.is_some() {
                return refused("finds no room here");
            }
        }
        match &mut *self.side() {
            Side::Incoming(incoming) if incoming.is_streaming() => {
                incoming.drained = None;
                Ok(incoming.session().clone())
            }
            _ => refused("is not being replicated now"),
        }
    }

    /// Asks the primary to drain, and waits until everything it has is durable here.
    ///
    /// # Errors
    /// When it cannot or will not, is lost, or does not answer in time; then it goes on.
    pub async fn drain_primary(
        self: &Arc<Self>,
        _held: &NoOffers,
        patience: Duration,
    ) -> Result<Position> {
        let session = self.can_be_handed_over()?;
        match self.drain(&session, patience).await {
            // It has said so itself.
            Err(error) if error.kind == Kind::Refused => Err(error),
            Err(error) => Err(self.let_primary_go_on(error).await),
            drained => drained,
        }
    }

    /// The failover has failed: a primary that was drained for it goes on once it finds, in a new
    /// session, that nobody has taken over.
    pub async fn let_primary_go_on(&self, error: Failure) -> Failure {
        if let Some(session) = self.session() {
            session.close("the failover failed; production goes on").await;
        }
        error
    }

    async fn drain(self: &Arc<Self>, session: &Session, patience: Duration) -> Result<Position> {
        let name = self.name();
        session.send(&Message::Drain { group: self.id }).await?;
        let last = tokio::time::timeout(patience, self.handed_over(session)).await;
        let last = last.unwrap_or_else(|_| {
            Err(Failure::unreachable(format!(
                "the production node of group {name} did not drain within {}",
                humantime::format_duration(patience)
            )))
        })?;
        let store = self.store.clone();
        if self.blocking(move || store.hash_at(last.seq)).await? != Some(last.hash) {
            return Err(Failure::conflict(format!(
                "frame {} of group {name} is not the same at both nodes; nothing was taken over",
                last.seq
            )));
        }
        Ok(last)
    }

    /// Waits until the last frame is durable here.
    async fn handed_over(&self, session: &Session) -> Result<Position> {
        let lost = || {
            Err(Failure::unreachable(format!(
                "the production node of group {} was lost while it handed over",
                self.name()
            )))
        };
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            let (answer, streams) = match &*self.side() {
                Side::Incoming(incoming) if incoming.session().number() == session.number() => {
                    (incoming.drained.clone(), incoming.is_streaming())
                }
                _ => return lost(),
            };
            match answer {
                Some(Ok(last)) if self.store.head().seq >= last.seq => return Ok(last),
                Some(Err(why)) => {
                    let text = format!("the production node does not hand over: {why}");
                    return Err(Failure::refused(text));
                }
                Some(Ok(_)) if !streams => return lost(),
                // A primary that is paused has ended its stream, and its answer is on the way.
                None if session.is_over() => return lost(),
                _ => {}
            }
            let _ = tokio::time::timeout(LOOK, changed).await;
        }
    }
}
