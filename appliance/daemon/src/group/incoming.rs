//! The secondary's side of the link for one group: drives the receiver machine, takes in frames.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use srn_core::epoch::{EpochTable, Position};
use srn_core::ids::Seq;
use srn_core::receiver::{Answer, PeerFault, Receiver};
use srn_core::state::Cause;
use srn_core::time::Mono;
use srn_core::wire::{Accept, Message, Offer, Progress, RefuseCode, StreamHeader};
use srn_link::{Changes, FrameReader, LinkError, Session};
use srn_store::codec::Codecs;
use srn_store::frame::Frame;
use srn_store::manifest::{Fence, Role};
use tokio::sync::Notify;
use tokio_util::task::AbortOnDropHandle;

use super::engine::FrameStream;
use super::resync::{Taker, catalog_of};
use super::{Group, Side};
use crate::clock;
use crate::fleet::Level;

/// Frames of one group that may be on their way or waiting to be durable, in bytes. All groups of
/// a node share [`WINDOWS_BYTES`].
const WINDOW_BYTES_MAX: u64 = 16 << 20;

/// The same for all groups of a node together.
const WINDOWS_BYTES: u64 = 64 << 20;

/// Less would make a group crawl: a few of the largest frames.
const WINDOW_BYTES_MIN: u64 = 1 << 20;

/// The secondary's side of one session.
#[derive(Debug)]
pub(super) struct Incoming {
    session: Session,
    receiver: Arc<Mutex<Receiver>>,
    stream: FrameStream,
    to_say: Arc<ToSay>,
    reader: Option<AbortOnDropHandle<()>>,
    _acker: AbortOnDropHandle<()>,
    /// What the primary said last, and when.
    progress: Option<(Progress, Mono)>,
    /// Why its offer was refused, if it was.
    refused: Option<(Cause, String)>,
    /// What the primary said when it was asked to hand over: its last frame, or why it does not.
    pub(super) drained: Option<Result<Position, String>>,
}

/// What the primary has to be told. Newer words replace older ones.
#[derive(Debug, Default)]
struct ToSay {
    words: Mutex<(Option<Seq>, Option<u64>)>,
    wake: Notify,
}

impl Incoming {
    pub(super) const fn session(&self) -> &Session {
        &self.session
    }

    pub(super) fn end(&mut self) {
        self.reader = None;
        lock(&self.receiver).on_link_down();
    }

    /// What the primary said last, and when.
    pub(super) const fn progress(&self) -> Option<&(Progress, Mono)> {
        self.progress.as_ref()
    }

    /// Whether the primary has begun to send.
    pub(super) fn has_begun(&self) -> bool {
        lock(&self.receiver).has_begun()
    }

    /// Why its offer was refused, if it was.
    pub(super) const fn refused(&self) -> Option<&(Cause, String)> {
        self.refused.as_ref()
    }

    /// Whether frames can flow.
    pub(super) fn is_streaming(&self) -> bool {
        lock(&self.receiver).is_streaming()
    }
}

fn lock(receiver: &Mutex<Receiver>) -> MutexGuard<'_, Receiver> {
    receiver.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Group {
    /// The peer offers to go on with this group as primary.
    pub async fn on_offer(self: &Arc<Self>, session: &Session, offer: Offer, groups: usize) {
        // One at a time, and none while this node takes over.
        let _held = self.offers.clone().lock_owned().await;
        let overtaken = self.session().is_some_and(|newer| newer.number() > session.number());
        if overtaken || session.is_over() {
            return;
        }
        self.judge(session, offer, groups).await;
        // If it ended meanwhile, nobody else says so.
        if session.is_over() {
            self.session_down(session.number());
        }
    }

    async fn judge(self: &Arc<Self>, session: &Session, offer: Offer, groups: usize) {
        self.look_for_failover(&offer.epochs).await;
        if self.role() == Role::Primary {
            self.remember_offer(session, &offer);
        }
        if let Some((code, text)) = self.objection() {
            let _ = session.send(&self.answer(code, text)).await;
            return self.review();
        }
        self.facts().no_primary = None;
        // Frames of an earlier stream must be durable or dropped before this is judged.
        self.end_stream();
        if !self.resync_at_rest().await {
            let text = "what came before is still being taken in at the recovery node".to_owned();
            let _ = session.send(&self.answer(RefuseCode::Storage, text)).await;
            return self.review();
        }
        let left = self.leave_line(&offer).await;
        let stream = self.engine().drop_frames().await;
        let mut receiver = Receiver::new(self.id, self.store.epochs(), self.store.head());
        let window =
            (WINDOWS_BYTES / groups.max(1) as u64).clamp(WINDOW_BYTES_MIN, WINDOW_BYTES_MAX);
        let (answer, why) = match left {
            Ok(()) => (receiver.on_offer(&offer, window), None),
            Err((code, why)) => (Answer::Refuse(code), Some(why)),
        };
        let refused = match answer {
            Answer::Accept { .. } => None,
            Answer::Refuse(code) => Some((code, why.unwrap_or_else(|| self.why_not(code, &offer)))),
        };
        let to_say: Arc<ToSay> = Arc::default();
        let acker = self.context.link().spawn(say(self.clone(), session.clone(), to_say.clone()));
        *self.side() = Side::Incoming(Incoming {
            session: session.clone(),
            receiver: Arc::new(Mutex::new(receiver)),
            stream,
            to_say,
            reader: None,
            _acker: AbortOnDropHandle::new(acker),
            progress: None,
            refused: refused.as_ref().map(|(code, text)| (cause_of(*code), text.clone())),
            drained: None,
        });
        let message = match answer {
            Answer::Accept { position, credit } => {
                log::info!(
                    "group {}: receiving from frame {} on",
                    self.name(),
                    position.seq.next()
                );
                Message::Accept(Accept {
                    group: self.id,
                    nonce: offer.nonce,
                    position,
                    credit,
                    compare: self.compares(offer.has_copy),
                    under: self.under(),
                })
            }
            Answer::Refuse(code) => {
                let text = refused.map(|(_, text)| text).unwrap_or_default();
                self.context.event(Level::Alert, Some(&self.name()), &text);
                self.answer(code, text)
            }
        };
        let _ = session.send(&message).await;
        if let Some(text) = self.hindrance() {
            let _ = session.send(&Message::Hindrance { group: self.id, text }).await;
        }
        self.review();
    }

    /// Whether a person has asked for contents to be compared, and that can be.
    fn compares(&self, has_copy: bool) -> bool {
        if self.settings().resync.is_none() {
            return false;
        }
        if !has_copy {
            let text = "the production node keeps a local cache, which is no copy to compare the \
                        replica with; it is replicated as before";
            self.context.event(Level::Alert, Some(&self.name()), text);
            self.resync_done();
        }
        has_copy
    }

    /// Why an offer cannot be accepted, in words.
    fn why_not(&self, code: RefuseCode, offer: &Offer) -> String {
        let head = self.store.head();
        match code {
            RefuseCode::TooFarBehind => format!(
                "the recovery node is at frame {}, the log of the production node begins at {}",
                head.seq, offer.oldest
            ),
            RefuseCode::Ahead => format!(
                "the recovery node is at {head}, the production node only at {}: that was set back",
                offer.head
            ),
            _ => format!(
                "the recovery node is at {head}, which is not part of the history of the \
                 production node"
            ),
        }
    }

    /// A peer that offers a newer epoch of what this node is primary of has taken over. A primary
    /// that is paused offers nothing itself, and hears of it only so.
    async fn look_for_failover(self: &Arc<Self>, theirs: &EpochTable) {
        let known = self.fence().is_some_and(|fence| fence.cause == Cause::FailoverAtPeer);
        if self.role() != Role::Primary || known || !self.store.epochs().is_superseded_by(theirs) {
            return;
        }
        let epochs = Some(theirs.clone());
        let fence = Fence { cause: Cause::FailoverAtPeer, epochs, since: clock::wall() };
        if let Err(error) = self.fence_off(fence).await {
            log::error!("group {}: writing down the fence: {error}", self.name());
        }
    }

    /// The refusal of an offer, with the epochs here as the proof of whether this node has taken
    /// over.
    fn answer(&self, code: RefuseCode, text: String) -> Message {
        let epochs = (!self.facts().fork_uncertain).then(|| self.store.epochs());
        Message::Refuse(srn_core::wire::Refuse { group: self.id, code, text, epochs })
    }

    /// Why no offer can be taken now.
    fn objection(&self) -> Option<(RefuseCode, String)> {
        let name = self.name();
        if self.role() == Role::Primary {
            return Some((
                RefuseCode::Fenced,
                format!("{} is primary of group {name} now", self.context.config().name),
            ));
        }
        if self.settings().paused {
            return Some((
                RefuseCode::Paused,
                format!("group {name} is paused at the recovery node; resume it there"),
            ));
        }
        if let Some(text) = self.resync_trouble() {
            return Some((RefuseCode::Storage, text));
        }
        self.facts().failure.as_ref().map(|(_, text)| {
            let text = format!("the recovery node cannot store group {name}: {text}");
            (RefuseCode::Storage, text)
        })
    }

    /// What keeps this secondary from taking frames, in words.
    pub(super) fn hindrance(&self) -> Option<String> {
        self.facts().full.as_ref().map(|why| format!("the recovery node is full: {why}"))
    }

    /// Tells the primary that something hinders this node, or no longer does.
    pub(super) fn tell_hindrance(&self) {
        let text = self.hindrance().unwrap_or_default();
        if let Side::Incoming(incoming) = &*self.side() {
            let _ = incoming.session.try_send(&Message::Hindrance { group: self.id, text });
        }
    }

    /// The primary begins to send frames.
    pub fn on_frames(
        self: &Arc<Self>,
        session: &Session,
        header: &StreamHeader,
        reader: FrameReader,
    ) {
        let mut side = self.side();
        let Side::Incoming(incoming) = &mut *side else { return };
        if incoming.session.number() != session.number() {
            return;
        }
        let begun = lock(&incoming.receiver).on_stream(header.nonce, header.first);
        if let Err(fault) = begun {
            // A stream of an offer that was overtaken by a newer one is no fault.
            return log::debug!("group {}: {fault}", self.name());
        }
        let task = TakeIn {
            group: self.clone(),
            session: session.clone(),
            receiver: incoming.receiver.clone(),
            stream: incoming.stream,
        };
        let task = self.context.link().spawn(task.run(reader));
        incoming.reader = Some(AbortOnDropHandle::new(task));
        drop(side);
        self.review();
    }

    /// The primary begins to send what changed, in place of frames.
    pub fn on_changes(self: &Arc<Self>, session: &Session, changes: Changes) {
        let catalog = match catalog_of(&changes.catalog) {
            Ok(catalog) => catalog,
            Err(why) => return session.misbehaved(&why),
        };
        let mut side = self.side();
        let Side::Incoming(incoming) = &mut *side else { return };
        if incoming.session.number() != session.number() {
            return;
        }
        let mut receiver = lock(&incoming.receiver);
        let epochs = receiver.offered().cloned();
        let begun = receiver.on_changes(changes.header.nonce, catalog.at);
        drop(receiver);
        match (begun, epochs) {
            (Ok(()), Some(epochs)) => {
                let task = Taker {
                    group: self.clone(),
                    session: session.clone(),
                    receiver: incoming.receiver.clone(),
                    epochs,
                    catalog,
                };
                let task = self.context.link().spawn(task.run(changes));
                incoming.reader = Some(AbortOnDropHandle::new(task));
                drop(side);
                self.review();
            }
            (Err(fault @ PeerFault::OtherEpoch(_)), _) => {
                drop(side);
                session.misbehaved(&fault.to_string());
            }
            // A stream of an offer that was overtaken by a newer one is no fault.
            (begun, _) => log::debug!("group {}: changes: {begun:?}", self.name()),
        }
    }

    /// Whether what comes in this session goes to this receiver.
    pub(super) fn takes_in(&self, receiver: &Arc<Mutex<Receiver>>) -> bool {
        match &*self.side() {
            Side::Incoming(incoming) => Arc::ptr_eq(&incoming.receiver, receiver),
            _ => false,
        }
    }

    /// More of what changed may come.
    pub(super) fn grant(&self, session: &Session, limit: u64) {
        let side = self.side();
        let Side::Incoming(incoming) = &*side else { return };
        if incoming.session.number() != session.number() {
            return;
        }
        let mut words = incoming.to_say.words.lock().unwrap_or_else(PoisonError::into_inner);
        words.1 = Some(limit);
        drop(words);
        incoming.to_say.wake.notify_one();
    }

    /// Frames are durable here: say so, and grant more.
    pub(super) fn frames_durable(&self, head: Position, wire_bytes: u64) {
        let side = self.side();
        let Side::Incoming(incoming) = &*side else { return };
        let durable = lock(&incoming.receiver).on_durable(head, wire_bytes);
        let mut words = incoming.to_say.words.lock().unwrap_or_else(PoisonError::into_inner);
        words.0 = durable.ack.or(words.0);
        words.1 = durable.credit.or(words.1);
        drop(words);
        incoming.to_say.wake.notify_one();
    }

    /// The store has failed: nothing more is taken in, and the primary is told why.
    pub(super) fn on_store_failed(&self, why: &str) {
        if let Side::Incoming(incoming) = &mut *self.side() {
            incoming.end();
            let text = format!("the recovery node cannot store group {}: {why}", self.name());
            let _ = incoming.session.try_send(&self.refuse(RefuseCode::Storage, text));
        }
    }

    /// What came does not continue the line here. The stream cannot go on; a new session finds out
    /// where the two nodes are.
    pub(super) fn on_frames_out_of_line(&self, why: &str) {
        let session = match &mut *self.side() {
            Side::Incoming(incoming) => {
                incoming.end();
                incoming.session.clone()
            }
            _ => return,
        };
        let text = format!("what the production node sends does not continue the replica: {why}");
        self.context.event(Level::Alert, Some(&self.name()), &text);
        session.misbehaved(&text);
        self.review();
    }

    /// The primary says how far it is.
    pub(super) fn on_progress(&self, session: &Session, progress: Progress) {
        if let Side::Incoming(incoming) = &mut *self.side()
            && incoming.session.number() == session.number()
        {
            incoming.progress = Some((progress, clock::mono()));
        }
    }
}

/// What the state of a secondary is when it has refused its primary's offer so.
const fn cause_of(code: RefuseCode) -> Cause {
    match code {
        RefuseCode::Ahead => Cause::PeerSetBack,
        RefuseCode::TooFarBehind => Cause::TooFarBehind,
        _ => Cause::HistoriesDiffer,
    }
}

/// Tells the primary what became durable.
async fn say(group: Arc<Group>, session: Session, to_say: Arc<ToSay>) {
    let id = group.id;
    drop(group);
    loop {
        to_say.wake.notified().await;
        let (ack, credit) = {
            let mut words = to_say.words.lock().unwrap_or_else(PoisonError::into_inner);
            std::mem::take(&mut *words)
        };
        if let Some(seq) = ack
            && session.send(&Message::Ack { group: id, seq }).await.is_err()
        {
            return;
        }
        if let Some(limit) = credit
            && session.send(&Message::Credit { group: id, limit }).await.is_err()
        {
            return;
        }
    }
}

/// Takes in frames of one stream.
struct TakeIn {
    group: Arc<Group>,
    session: Session,
    receiver: Arc<Mutex<Receiver>>,
    stream: FrameStream,
}

impl TakeIn {
    async fn run(self, reader: FrameReader) {
        match self.take_in(reader).await {
            Ok(()) => {}
            Err(LinkError::Misbehaved(why)) => {
                let text = format!("what the production node sends is not sound: {why}");
                self.group.context.event(Level::Alert, Some(&self.group.name()), &text);
                self.session.misbehaved(&why);
            }
            // The session's end is told by the session.
            Err(error) => log::debug!("group {}: receiving: {error}", self.group.name()),
        }
        // It must not look as if it went on.
        lock(&self.receiver).on_link_down();
        self.group.review();
    }

    async fn take_in(&self, mut reader: FrameReader) -> Result<(), LinkError> {
        let pool = self.group.context.store().pool.clone();
        let mut codecs = Codecs::new();
        let misbehaved = |error: &dyn std::fmt::Display| LinkError::Misbehaved(error.to_string());
        while let Some(frame) = reader.next(|len| pool.take(len)).await? {
            let wire = frame.wire_len;
            let content = Bytes::from_owner(frame.content);
            let frame = Frame::from_copy(&frame.fixed, frame.front, content)
                .map_err(|error| misbehaved(&error))?;
            // Nothing is acknowledged that was not verified, byte by byte.
            frame.verify(&mut codecs).map_err(|error| misbehaved(&error))?;
            let hash = frame.position().hash;
            let taken = lock(&self.receiver).on_frame(frame.header(), hash, wire);
            match taken {
                Ok(()) => {}
                // The stream was ended here while this frame was looked at.
                Err(PeerFault::UnexpectedStream) => return Ok(()),
                Err(fault) => return Err(misbehaved(&fault)),
            }
            self.group.counters.wire_received.fetch_add(wire, Ordering::Relaxed);
            self.group.engine().take_frame(self.stream, Arc::new(frame), wire);
        }
        Ok(())
    }
}
