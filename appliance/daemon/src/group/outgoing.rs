//! The primary's side of the link for one group: drives the sender machine with what the peer says.
//!
//! Two tasks share the machine: messages are taken as they come, in the session's own task, and
//! never wait; frames are sent by the pump, which waits for the link, for new frames, for credit.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use srn_core::epoch::EpochTable;
use srn_core::ids::{FrameHash, Seq};
use srn_core::sender::{Here, PeerFault, Phase, Sender, Stop};
use srn_core::state::{Cause, Link};
use srn_core::time::Mono;
use srn_core::wire::{Accept, Message, Offer, OfferedDisk, Progress, Refuse, RefuseCode, Wanted};
use srn_link::Session;
use srn_store::manifest::{Fence, Keep, Role};
use tokio::sync::{Notify, mpsc};
use tokio_util::task::AbortOnDropHandle;

use super::lag::Lag;
use super::pump::Pump;
use super::resync::Giver;
use super::{Group, Side};
use crate::clock;
use crate::error::Result;
use crate::fleet::Level;

/// The time after which a group that does not flow in this session is offered again, in
/// microseconds.
const OFFER_AGAIN_US: u64 = 5_000_000;

/// What the peer may want before it is answered; it wants something only where it was told hashes.
const WANTED_MAX: usize = 8;

/// The primary's side of one session.
#[derive(Debug)]
pub(super) struct Outgoing {
    session: Session,
    sender: Arc<Mutex<Sender>>,
    /// Credit came, or frames.
    wake: Arc<Notify>,
    hindrance: Option<String>,
    /// Why the peer refused the last time, until it accepts.
    refused: Option<(RefuseCode, String)>,
    offered: Mono,
    pump: Option<AbortOnDropHandle<()>>,
    /// What the peer wants, where contents are compared.
    wanted: Option<mpsc::Sender<Wanted>>,
    notes_sent: bool,
    /// The fence that stood when the group was offered, and that the peer's acceptance lifts. One
    /// that was put up since stays: what was said before it says nothing about it.
    lifts: Option<Fence>,
}

impl Outgoing {
    pub(super) const fn session(&self) -> &Session {
        &self.session
    }

    pub(super) fn end(&mut self) {
        self.pump = None;
        self.wanted = None;
        lock(&self.sender).on_link_down();
    }

    /// How the link stands for the group, and in words what the peer said.
    pub(super) fn link(&self) -> (Link, Option<String>) {
        let sender = lock(&self.sender);
        match (sender.phase(), &self.hindrance) {
            // Offered again: still refused for all that is known.
            (Phase::Offered { .. }, _) if self.refused.is_some() => {
                (Link::Refused, self.refused.as_ref().map(|(_, text)| text.clone()))
            }
            // Once it is known how, the group says so.
            (Phase::Offline | Phase::Offered { .. } | Phase::Carrying(_), _) => {
                (Link::Negotiating, None)
            }
            (Phase::Streaming(_), Some(text)) => (Link::Hindered, Some(text.clone())),
            (Phase::Streaming(_), None) => (Link::Streaming, None),
            (Phase::Stopped(stop), _) => {
                let text = self.refused.as_ref().map(|(_, text)| text.clone());
                match stop {
                    Stop::PeerIsAhead { theirs, ours } => (
                        Link::Diverged(Cause::PeerAhead),
                        Some(format!("the peer is at frame {theirs}, this node at {ours}")),
                    ),
                    Stop::NotOurHistory | Stop::HashDiffers(_) => {
                        (Link::Diverged(Cause::HistoriesDiffer), text)
                    }
                    Stop::TooFarBehind { theirs, oldest } => (
                        Link::Diverged(Cause::TooFarBehind),
                        Some(format!("it is at frame {theirs}, the log begins at {oldest}")),
                    ),
                    Stop::Refused(RefuseCode::Diverged) => {
                        (Link::Diverged(Cause::HistoriesDiffer), text)
                    }
                    Stop::Refused(RefuseCode::Ahead) => (Link::Diverged(Cause::PeerAhead), text),
                    Stop::Refused(RefuseCode::TooFarBehind) => {
                        (Link::Diverged(Cause::TooFarBehind), text)
                    }
                    Stop::Refused(_) | Stop::Fenced => (Link::Refused, text),
                }
            }
        }
    }
}

pub(super) fn lock(sender: &Mutex<Sender>) -> MutexGuard<'_, Sender> {
    sender.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Group {
    /// Offers the group to the peer.
    pub(super) async fn offer(self: &Arc<Self>, session: &Session) -> Result<()> {
        let nonce = clock::random_u64();
        let (epochs, head) = (self.store.epochs(), self.store.head());
        let mut sender = Sender::new(epochs.clone(), head.seq, self.store.acked());
        sender.on_link_up(nonce);
        let catalog = self.catalog();
        let disks = catalog
            .disks
            .iter()
            .filter_map(|(no, disk)| {
                let name = disk.name.parse().ok()?;
                Some(OfferedDisk { no: *no, id: disk.id, sectors: disk.sectors, name })
            })
            .collect();
        let name = self.name().parse().map_err(|error: srn_core::name::MalformedName| {
            crate::error::Failure::internal(error.to_string())
        })?;
        let offer = Offer {
            group: self.id,
            name,
            nonce,
            epochs,
            head,
            oldest: self.store.oldest(),
            has_copy: self.store.keep() == Keep::Replica,
            disks,
        };
        let refused = match &mut *self.side() {
            Side::Outgoing(before) if before.session.number() == session.number() => {
                before.refused.take()
            }
            _ => None,
        };
        let lifts = self.fence().filter(|fence| fence.cause == Cause::Handover);
        *self.side() = Side::Outgoing(Outgoing {
            session: session.clone(),
            sender: Arc::new(Mutex::new(sender)),
            wake: Arc::default(),
            hindrance: None,
            refused,
            offered: clock::mono(),
            pump: None,
            wanted: None,
            notes_sent: false,
            lifts,
        });
        session.send(&Message::Offer(offer)).await?;
        Ok(())
    }

    /// What does not flow although there is a session is offered again now and then. What the peer
    /// could not store: it says when a group has room again, but a group that it could not even make
    /// is not there to say so. A stream that ended by itself: its log was trimmed, or its reader
    /// gave up.
    pub(super) async fn offer_again(self: &Arc<Self>) {
        if self.resync_trouble().is_some() {
            return;
        }
        // A log that cannot be read would end every stream.
        if self.facts().failure.as_ref().is_some_and(|(cause, _)| *cause != Cause::LogFull) {
            return;
        }
        let session = match &*self.side() {
            Side::Outgoing(outgoing)
                if matches!(
                    lock(&outgoing.sender).phase(),
                    Phase::Offline | Phase::Stopped(Stop::Refused(RefuseCode::Storage))
                ) && clock::mono().since(outgoing.offered) >= OFFER_AGAIN_US =>
            {
                outgoing.session.clone()
            }
            _ => return,
        };
        self.session_up(&session).await;
    }

    /// Whether frames flow in this session.
    pub(super) fn streams_to(&self, session: &Session) -> bool {
        match &*self.side() {
            Side::Outgoing(outgoing) => {
                outgoing.session.number() == session.number()
                    && matches!(lock(&outgoing.sender).phase(), Phase::Streaming(_))
            }
            _ => false,
        }
    }

    /// Whether frames flow to the peer.
    pub(super) fn streams(&self) -> bool {
        match &*self.side() {
            Side::Outgoing(outgoing) => {
                matches!(lock(&outgoing.sender).phase(), Phase::Streaming(_))
            }
            _ => false,
        }
    }

    /// New frames are durable here.
    pub(super) fn wake_outgoing(&self, head: Seq) {
        if let Side::Outgoing(outgoing) = &*self.side() {
            lock(&outgoing.sender).on_durable(head);
            outgoing.wake.notify_one();
        }
    }

    /// The peer accepts the offer.
    pub(super) async fn on_accept(self: &Arc<Self>, session: &Session, accept: Accept) {
        let (store, seq) = (self.store.clone(), accept.position.seq);
        let hash = match self.blocking(move || store.hash_at(seq)).await {
            // The log may have given it up since it was sent.
            Ok(hash) => hash.or_else(|| self.sent_hash(seq)),
            Err(error) => return self.cannot_send(&format!("looking up frame {seq}: {error}")),
        };
        // It is secondary, whatever it has offered before.
        self.facts().offered = None;
        if let Some(lifts) = self.is_answered(session, accept.nonce) {
            // The peer has not taken over: whoever waited for that may go on.
            self.peer_has_not_taken_over(lifts).await;
        }
        if let Err(fault) = self.begin_stream(session, &accept, hash) {
            session.misbehaved(&fault);
        }
        self.review();
        self.send_notes(session).await;
    }

    /// Whether this is the answer to the offer that stands, and which fence it lifts then.
    fn is_answered(&self, session: &Session, nonce: u64) -> Option<Option<Fence>> {
        match &mut *self.side() {
            Side::Outgoing(outgoing)
                if outgoing.session.number() == session.number()
                    && *lock(&outgoing.sender).phase() == (Phase::Offered { nonce }) =>
            {
                Some(outgoing.lifts.take())
            }
            _ => None,
        }
    }

    fn begin_stream(
        self: &Arc<Self>,
        session: &Session,
        accept: &Accept,
        hash: Option<FrameHash>,
    ) -> std::result::Result<(), String> {
        let mut side = self.side();
        let Side::Outgoing(outgoing) = &mut *side else { return Ok(()) };
        if outgoing.session.number() != session.number() {
            return Ok(());
        }
        let here = Here {
            hash,
            oldest: self.store.oldest(),
            has_copy: self.store.keep() == Keep::Replica,
        };
        let head = self.store.head().seq;
        outgoing.refused = None;
        let mut sender = lock(&outgoing.sender);
        sender.on_durable(head);
        let accepted = sender.on_accept(accept, here);
        if accepted == Err(PeerFault::UnexpectedAccept) {
            // The answer to an offer that was overtaken by a newer one is no fault.
            log::debug!("group {}: an answer came late", self.name());
            return Ok(());
        }
        accepted.map_err(|fault| fault.to_string())?;
        let (phase, acked) = (sender.phase().clone(), sender.acked());
        drop(sender);
        match phase {
            Phase::Streaming(stream) => {
                self.peer_holds(acked);
                self.gives_nothing();
                log::info!(
                    "group {}: sending from frame {} of {head} on",
                    self.name(),
                    stream.next
                );
                let pump = Pump {
                    group: self.clone(),
                    session: session.clone(),
                    sender: outgoing.sender.clone(),
                    wake: outgoing.wake.clone(),
                };
                let task = self.context.link().spawn(pump.run(stream));
                outgoing.pump = Some(AbortOnDropHandle::new(task));
            }
            Phase::Carrying(carry) => {
                self.peer_holds(acked);
                let (to, wanted) = mpsc::channel(WANTED_MAX);
                outgoing.wanted = Some(to);
                let giver = Giver {
                    group: self.clone(),
                    session: session.clone(),
                    sender: outgoing.sender.clone(),
                    wake: outgoing.wake.clone(),
                    wanted,
                };
                let task = self.context.link().spawn(giver.run(carry, accept.clone()));
                outgoing.pump = Some(AbortOnDropHandle::new(task));
            }
            Phase::Stopped(stop) => {
                log::warn!("group {}: cannot go on with the peer: {stop:?}", self.name());
            }
            Phase::Offline | Phase::Offered { .. } => {}
        }
        Ok(())
    }

    /// The peer begins with everything up to `acked`. Where it had acknowledged more, that is lost
    /// there, and at risk again here.
    fn peer_holds(&self, acked: Seq) {
        let before = self.store.acked();
        if before == Seq::ZERO && self.has_failed_over() {
            // It has turned round, and gets what was written here since.
            self.store.set_acked(acked);
            return self.at_risk_again();
        }
        if acked >= before {
            self.store.set_acked(acked);
            self.lag().acknowledged(acked);
            return self.engine().acknowledged(acked);
        }
        self.engine().set_back_acknowledged(acked);
        let text = format!(
            "the peer holds frames up to {acked} and had acknowledged {before}: it was deleted or \
             set back; what is missing there is sent again"
        );
        self.context.event(Level::Alert, Some(&self.name()), &text);
        self.store.set_back_acked(acked);
        self.at_risk_again();
    }

    /// Of what the peer has not got it is not known any more when it was written.
    fn at_risk_again(&self) {
        let (head, bytes) = (self.store.head().seq, self.store.unacked_bytes());
        let mut lag = self.lag();
        *lag = Lag::default();
        if bytes > 0 {
            lag.inherited(head, bytes, clock::mono());
        }
    }

    /// The log cannot be read for the peer. That is this group's trouble, and not that of others
    /// in the same session.
    pub(super) fn cannot_send(&self, why: &str) {
        let text = format!("the log cannot be read for the peer: {why}");
        self.context.event(Level::Alert, Some(&self.name()), &text);
        self.facts().failure = Some((Cause::Corrupt, text));
        self.review();
    }

    /// The peer refuses.
    pub(super) async fn on_refuse(self: &Arc<Self>, session: &Session, refuse: Refuse) {
        if refuse.code == RefuseCode::NotDrained {
            return self.on_not_drained(session, refuse.text);
        }
        let (fenced, lifts) = {
            let mut side = self.side();
            let Side::Outgoing(outgoing) = &mut *side else { return };
            if outgoing.session.number() != session.number() {
                return;
            }
            outgoing.pump = None;
            outgoing.refused = Some((refuse.code, refuse.text.clone()));
            let fenced = lock(&outgoing.sender).on_refuse(refuse.code, refuse.epochs.as_ref());
            // Only the answer to an offer bears the peer's epochs. They are ours: it has not taken
            // over.
            let same = refuse.epochs.as_ref().map(EpochTable::current)
                == Some(self.store.epochs().current());
            (fenced, if same { outgoing.lifts.take() } else { None })
        };
        log::info!("group {}: the peer refuses: {}", self.name(), refuse.text);
        if fenced {
            let fence =
                Fence { cause: Cause::FailoverAtPeer, epochs: refuse.epochs, since: clock::wall() };
            if let Err(error) = self.fence_off(fence).await {
                log::error!("group {}: writing down the fence: {error}", self.name());
            }
        }
        if lifts.is_some() {
            self.peer_has_not_taken_over(lifts).await;
        }
        self.review();
    }

    /// The peer wants what it lacks of leaves whose hashes it was told.
    pub(super) fn on_wanted(&self, session: &Session, wanted: Wanted) {
        let taken = match &*self.side() {
            Side::Outgoing(outgoing) if outgoing.session.number() == session.number() => {
                let is_this = matches!(
                    lock(&outgoing.sender).phase(),
                    Phase::Carrying(carry) if carry.nonce == wanted.nonce
                );
                // Of an offer that was overtaken: no fault.
                !is_this || outgoing.wanted.as_ref().is_none_or(|to| to.try_send(wanted).is_ok())
            }
            _ => true,
        };
        if !taken {
            session.misbehaved("wants more than it was told of");
        }
    }

    /// The peer holds every frame up to `seq` durably.
    pub(super) fn on_ack(self: &Arc<Self>, session: &Session, seq: Seq) {
        let (news, carried) = {
            let side = self.side();
            let Side::Outgoing(outgoing) = &*side else { return };
            // The last words of a session that was replaced concern nobody.
            if outgoing.session.number() != session.number() {
                return;
            }
            let mut sender = lock(&outgoing.sender);
            let was_carrying = matches!(sender.phase(), Phase::Carrying(_));
            let result = sender.on_ack(seq);
            drop(sender);
            match result {
                Ok(news) => (news, was_carrying && news),
                Err(fault) => {
                    drop(side);
                    return session.misbehaved(&fault.to_string());
                }
            }
        };
        if news {
            self.store.set_acked(seq);
            self.forget_sent(seq);
            self.lag().acknowledged(seq);
            self.answer_up_to(seq);
            if self.facts().stalled.is_some() {
                self.maintainer.wake();
            }
            self.changed.notify_waiters();
        }
        if carried {
            self.has_given(seq);
            log::info!("group {}: the peer is at frame {seq}, frames follow", self.name());
            // From there on frames can flow.
            let (this, session) = (self.clone(), session.clone());
            tokio::spawn(async move { this.session_up(&session).await });
        }
    }

    /// The peer grants more.
    pub(super) fn on_credit(&self, session: &Session, limit: u64) {
        let fault = {
            let side = self.side();
            let Side::Outgoing(outgoing) = &*side else { return };
            if outgoing.session.number() != session.number() {
                return;
            }
            let result = lock(&outgoing.sender).on_credit(limit);
            outgoing.wake.notify_one();
            result.err()
        };
        if let Some(fault) = fault {
            session.misbehaved(&fault.to_string());
        }
    }

    /// The peer says what hinders it; nothing when the text is empty. What it refused because of
    /// that is then offered again.
    pub(super) async fn on_hindrance(self: &Arc<Self>, session: &Session, text: String) {
        if self.role() == Role::Secondary {
            // Only a secondary says so: then there are two.
            self.facts().no_primary = Some(session.number());
            return self.review();
        }
        let again = match &mut *self.side() {
            Side::Outgoing(outgoing) if outgoing.session.number() == session.number() => {
                outgoing.hindrance = (!text.is_empty()).then_some(text);
                let refused = matches!(
                    lock(&outgoing.sender).phase(),
                    Phase::Stopped(Stop::Refused(
                        RefuseCode::Fenced | RefuseCode::Paused | RefuseCode::Storage
                    ))
                );
                refused && outgoing.hindrance.is_none()
            }
            _ => false,
        };
        if again {
            self.session_up(session).await;
        }
        self.review();
    }

    /// Tells the peer how far this node is, if there is anybody to tell.
    pub(super) fn tell_progress(&self) {
        let session = match &*self.side() {
            Side::Outgoing(outgoing) => outgoing.session.clone(),
            _ => return,
        };
        let behind = self.lag().behind(clock::mono());
        let catalog = self.catalog();
        let (state, cause) = self.state();
        let words = cause.words();
        let mut text =
            if words.is_empty() { state.to_string() } else { format!("{state} ({words})") };
        if let Some(words) = self.synchronous_words() {
            text = format!("{text}, {words}");
        }
        // Lost when the queue is full: the next one comes in a second.
        let _ = session.try_send(&Message::Progress(Progress {
            group: self.id,
            head: self.store.head().seq,
            log_time: catalog.log_time,
            wall_time: catalog.wall_time,
            behind_bytes: behind.bytes,
            behind_us: behind.us,
            state: text,
        }));
    }

    /// Sends the labels and pins of checkpoints, which are not in the log.
    async fn send_notes(&self, session: &Session) {
        let send = match &mut *self.side() {
            Side::Outgoing(outgoing) if !outgoing.notes_sent => {
                outgoing.notes_sent = true;
                true
            }
            _ => false,
        };
        if !send {
            return;
        }
        for (id, note) in self.store.notes() {
            let Some(message) = self.note_message(id, &note) else { continue };
            if session.send(&message).await.is_err() {
                return;
            }
        }
    }
}
