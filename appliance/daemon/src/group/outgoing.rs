//! The primary's side of the link for one group: drives the sender machine, feeds its stream.
//!
//! Two tasks share the machine: messages are taken as they come, in the session's own task, and
//! never wait; frames are sent by a task that waits for the link, for new frames and for credit.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use srn_core::epoch::Position;
use srn_core::ids::{FrameHash, Seq};
use srn_core::sender::{PeerFault, Phase, Sender, Stop, Stream};
use srn_core::state::{Cause, Link};
use srn_core::time::Mono;
use srn_core::wire::{
    Accept, Message, Offer, OfferedDisk, Progress, Refuse, RefuseCode, StreamHeader,
};
use srn_link::{FrameWriter, LinkError, Session};
use srn_store::codec::{Codecs, Effort};
use srn_store::frame::Frame;
use srn_store::group::Cursor;
use srn_store::manifest::Fence;
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio_util::task::AbortOnDropHandle;

use super::effort::EffortControl;
use super::{Group, Side};
use crate::clock;
use crate::error::Result;

/// Frames read and encoded in one go, in bytes of content.
const BATCH_BYTES: usize = 1 << 20;

/// While small frames come one after the other they are gathered for this long: sending, receiving
/// and committing each by itself costs both nodes more than all the rest. A frame that comes after
/// a pause goes at once.
const GATHER: Duration = Duration::from_millis(2);

/// With this many frames waiting there is nothing to gain by gathering more.
const GATHERED: u64 = 16;

/// Frames below this size are encoded where they are: handing them over would take longer.
const INLINE_BYTES: usize = 64 * 1024;

/// The time after which a group that the peer could not store is offered again, in microseconds.
const OFFER_AGAIN_US: u64 = 5_000_000;

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
    notes_sent: bool,
}

impl Outgoing {
    pub(super) const fn session(&self) -> &Session {
        &self.session
    }

    pub(super) fn end(&mut self) {
        self.pump = None;
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
            (Phase::Offline | Phase::Offered { .. }, _) => (Link::Negotiating, None),
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
                    Stop::Refused(RefuseCode::TooFarBehind) => {
                        (Link::Diverged(Cause::TooFarBehind), text)
                    }
                    Stop::Refused(_) | Stop::Fenced => (Link::Refused, text),
                }
            }
        }
    }
}

fn lock(sender: &Mutex<Sender>) -> MutexGuard<'_, Sender> {
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
        let offer =
            Offer { group: self.id, name, nonce, epochs, head, oldest: self.store.oldest(), disks };
        let refused = match &mut *self.side() {
            Side::Outgoing(before) if before.session.number() == session.number() => {
                before.refused.take()
            }
            _ => None,
        };
        *self.side() = Side::Outgoing(Outgoing {
            session: session.clone(),
            sender: Arc::new(Mutex::new(sender)),
            wake: Arc::default(),
            hindrance: None,
            refused,
            offered: clock::mono(),
            pump: None,
            notes_sent: false,
        });
        session.send(&Message::Offer(offer)).await?;
        Ok(())
    }

    /// What the peer could not store is offered again now and then: it says when a group has room
    /// again, but a group that it could not even make is not there to say so.
    pub(super) async fn offer_again(self: &Arc<Self>) {
        let session = match &*self.side() {
            Side::Outgoing(outgoing)
                if *lock(&outgoing.sender).phase()
                    == Phase::Stopped(Stop::Refused(RefuseCode::Storage))
                    && clock::mono().since(outgoing.offered) >= OFFER_AGAIN_US =>
            {
                outgoing.session.clone()
            }
            _ => return,
        };
        self.session_up(&session).await;
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
            Ok(hash) => hash,
            Err(error) => {
                log::error!("group {}: looking up frame {seq}: {error}", self.name());
                None
            }
        };
        // The peer has not taken over: whoever waited for that may go on.
        self.peer_has_not_taken_over().await;
        if let Err(fault) = self.begin_stream(session, &accept, hash) {
            session.misbehaved(&fault);
        }
        self.review();
        self.send_notes(session).await;
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
        let oldest = self.store.oldest();
        let head = self.store.head().seq;
        outgoing.refused = None;
        let mut sender = lock(&outgoing.sender);
        sender.on_durable(head);
        let accepted =
            sender.on_accept(accept.nonce, &accept.position, accept.credit, hash, oldest);
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
                self.store.set_acked(acked);
                self.lag().acknowledged(acked);
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
            Phase::Stopped(stop) => {
                log::warn!("group {}: cannot go on with the peer: {stop:?}", self.name());
            }
            Phase::Offline | Phase::Offered { .. } => {}
        }
        Ok(())
    }

    /// A primary that was drained, or that waited for the peer's word, goes on.
    async fn peer_has_not_taken_over(self: &Arc<Self>) {
        let waited = std::mem::take(&mut self.facts().waiting_for_peer);
        let handover = self.fence().is_some_and(|fence| fence.cause == Cause::Handover);
        if handover {
            let store = self.store.clone();
            match self.blocking(move || store.set_fence(None)).await {
                Ok(()) => {
                    self.facts().draining = false;
                    self.engine().reopen();
                    let text = "the peer did not take over: this node goes on as primary";
                    self.context.event(crate::fleet::Level::Info, Some(&self.name()), text);
                }
                Err(error) => log::error!("group {}: lifting the fence: {error}", self.name()),
            }
        }
        if waited || handover {
            self.changed.notify_waiters();
        }
    }

    /// The peer refuses.
    pub(super) async fn on_refuse(self: &Arc<Self>, session: &Session, refuse: Refuse) {
        let fenced = {
            let mut side = self.side();
            let Side::Outgoing(outgoing) = &mut *side else { return };
            if outgoing.session.number() != session.number() {
                return;
            }
            outgoing.pump = None;
            outgoing.refused = Some((refuse.code, refuse.text.clone()));
            lock(&outgoing.sender).on_refuse(refuse.code, refuse.epochs.as_ref())
        };
        log::info!("group {}: the peer refuses: {}", self.name(), refuse.text);
        if fenced {
            let fence =
                Fence { cause: Cause::FailoverAtPeer, epochs: refuse.epochs, since: clock::wall() };
            if let Err(error) = self.fence_off(fence).await {
                log::error!("group {}: writing down the fence: {error}", self.name());
            }
        }
        self.review();
    }

    /// The peer holds every frame up to `seq` durably.
    pub(super) fn on_ack(&self, session: &Session, seq: Seq) {
        let news = {
            let side = self.side();
            let Side::Outgoing(outgoing) = &*side else { return };
            let result = lock(&outgoing.sender).on_ack(seq);
            match result {
                Ok(news) => news,
                Err(fault) => {
                    drop(side);
                    return session.misbehaved(&fault.to_string());
                }
            }
        };
        if news {
            self.store.set_acked(seq);
            self.lag().acknowledged(seq);
            if self.facts().stalled.is_some() {
                self.maintainer.wake();
            }
            self.changed.notify_waiters();
        }
    }

    /// The peer grants more.
    pub(super) fn on_credit(&self, session: &Session, limit: u64) {
        let fault = {
            let side = self.side();
            let Side::Outgoing(outgoing) = &*side else { return };
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
        let again = match &mut *self.side() {
            Side::Outgoing(outgoing) => {
                outgoing.hindrance = (!text.is_empty()).then_some(text);
                let refused = matches!(
                    lock(&outgoing.sender).phase(),
                    Phase::Stopped(Stop::Refused(RefuseCode::Paused | RefuseCode::Storage))
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

    /// The peer wants to take over in good order: no more writes, everything sent, then the word.
    pub(super) async fn on_drain(self: &Arc<Self>, session: &Session) {
        let name = self.name();
        if self.check_writable().is_err() {
            return;
        }
        self.facts().draining = true;
        let text = "draining for a planned failover: no more writes are taken";
        self.context.event(crate::fleet::Level::Warning, Some(&name), text);
        self.changed.notify_waiters();
        // Clients are gone once their exports are; what they asked for before is appended first.
        let marked = self.append_final().await;
        let last = match marked {
            Ok(last) => last,
            Err(error) => {
                log::error!("group {name}: the final mark failed: {error}");
                self.facts().draining = false;
                return;
            }
        };
        let fence = Fence { cause: Cause::Handover, epochs: None, since: clock::wall() };
        if let Err(error) = self.fence_off(fence).await {
            log::error!("group {name}: writing down the fence: {error}");
            return;
        }
        // The stream goes on: the peer takes over when it has the last frame.
        let _ = session.send(&Message::Drained { group: self.id, last }).await;
    }

    async fn append_final(&self) -> Result<Position> {
        use srn_core::frame::MarkKind;
        use srn_core::ids::CheckpointId;
        use srn_store::group::OwnedRecord;
        let mark = OwnedRecord::Mark(CheckpointId(clock::random()), MarkKind::Final);
        self.append(vec![mark]).await
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
        let text = if words.is_empty() { state.to_string() } else { format!("{state} ({words})") };
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

    /// Sends the labels of checkpoints, which are not in the log.
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
            let message = Message::Note { group: self.id, id, label: note.label };
            if session.send(&message).await.is_err() {
                return;
            }
        }
    }
}

/// Sends frames.
struct Pump {
    group: Arc<Group>,
    session: Session,
    sender: Arc<Mutex<Sender>>,
    wake: Arc<Notify>,
}

/// Frames ready to be sent.
type Batch = Vec<Arc<Frame>>;

impl Pump {
    async fn run(self, stream: Stream) {
        let name = self.group.name();
        match self.send_all(stream).await {
            Ok(()) => {}
            // The session's end is told by the session.
            Err(PumpError::Link(error)) => log::debug!("group {name}: sending: {error}"),
            Err(PumpError::Store(error)) => {
                log::error!("group {name}: reading the log for the peer: {error}");
                self.session.close("the log cannot be read").await;
            }
        }
    }

    async fn send_all(&self, stream: Stream) -> std::result::Result<(), PumpError> {
        let header = StreamHeader { group: self.group.id, nonce: stream.nonce, first: stream.next };
        let mut writer = self.session.open_frames(&header).await?;
        let mut log = Log::Here(Box::new(Reader {
            cursor: self.group.store.cursor(stream.next),
            codecs: Codecs::new(),
        }));
        let mut control = EffortControl::default();
        let again = self.group.counters.highest_sent.load(Ordering::Relaxed);
        let mut sent_at: Option<Instant> = None;
        loop {
            let waiting = Instant::now();
            if self.until_granted().await {
                self.gather(sent_at).await;
                control.idle(micros(waiting));
            }
            let began = Instant::now();
            let (batch, back) = self.next_batch(log, control.effort()).await?;
            log = back;
            let mut content = 0;
            for frame in batch {
                self.until_granted().await;
                content += self.send(&mut writer, &frame, again).await?;
            }
            control.sent(content, micros(began));
            sent_at = Some(Instant::now());
        }
    }

    /// Waits for company, if there was something to send just before and there is little now.
    async fn gather(&self, sent_at: Option<Instant>) {
        let waiting = {
            let sender = lock(&self.sender);
            let next = sender.next_to_send().unwrap_or_else(|| sender.durable());
            sender.durable().0.saturating_sub(next.0)
        };
        if let Some(sent_at) = sent_at
            && waiting < GATHERED
            && let Some(rest) = GATHER.checked_sub(sent_at.elapsed())
        {
            tokio::time::sleep(rest).await;
        }
    }

    /// Waits until the machine names a frame to send. Returns whether that took time.
    async fn until_granted(&self) -> bool {
        let mut waited = false;
        while lock(&self.sender).next_to_send().is_none() {
            self.wake.notified().await;
            waited = true;
        }
        waited
    }

    /// Reads the next frames and encodes them. Small ones that are in memory are done here, the
    /// rest where waiting for a disk or computing disturbs nobody; of those that are read from the
    /// disk, the following ones are read while these are sent.
    async fn next_batch(
        &self,
        log: Log,
        effort: Effort,
    ) -> std::result::Result<(Batch, Log), PumpError> {
        let read = match log {
            Log::Here(mut reader) => {
                if let Some(frame) = reader.cursor.next_recent() {
                    return self.encode(frame, reader, effort).await;
                }
                self.read_ahead(reader, effort)
            }
            Log::Away(read) => read,
        };
        let lost = |_| PumpError::Store("a reader was lost".into());
        let (mut reader, result) = read.await.map_err(lost)?;
        let mut batch = result.map_err(|error| PumpError::Store(error.to_string()))?;
        // In memory again: caught up.
        if let Some(frame) = reader.cursor.next_recent() {
            batch.push(frame);
            return Ok((batch, Log::Here(reader)));
        }
        let more = reader.cursor.position() <= lock(&self.sender).durable();
        let log = if more { Log::Away(self.read_ahead(reader, effort)) } else { Log::Here(reader) };
        Ok((batch, log))
    }

    /// Encodes a frame that is in memory.
    async fn encode(
        &self,
        frame: Arc<Frame>,
        mut reader: Box<Reader>,
        effort: Effort,
    ) -> std::result::Result<(Batch, Log), PumpError> {
        let pool = self.group.context.store().pool.clone();
        if effort == Effort::None || frame.memory() <= INLINE_BYTES {
            let batch = vec![frame.encoded(effort, &mut reader.codecs, &pool)];
            return Ok((batch, Log::Here(reader)));
        }
        let encoded = tokio::task::spawn_blocking(move || {
            (vec![frame.encoded(effort, &mut reader.codecs, &pool)], Log::Here(reader))
        });
        encoded.await.map_err(|_| PumpError::Store("an encoder was lost".into()))
    }

    fn read_ahead(&self, mut reader: Box<Reader>, effort: Effort) -> JoinHandle<Read> {
        let limit = lock(&self.sender).durable();
        let pool = self.group.context.store().pool.clone();
        tokio::task::spawn_blocking(move || {
            let result = reader.read_batch(effort, limit, &pool);
            (reader, result)
        })
    }

    async fn send(
        &self,
        writer: &mut FrameWriter,
        frame: &Frame,
        again: u64,
    ) -> std::result::Result<u64, PumpError> {
        let envelope = frame.envelope();
        let mut parts = Vec::with_capacity(2 + frame.content().len());
        parts.push(Bytes::copy_from_slice(&envelope.encode(frame.table())));
        parts.push(frame.front().clone());
        parts.extend(frame.content().iter().cloned());
        let wire = envelope.wire_len() as u64;
        let seq = frame.header().seq;
        // Before it leaves: its acknowledgement may be here before the write returns.
        lock(&self.sender).on_sent(seq, wire);
        writer.write(&mut parts).await?;
        let counters = &self.group.counters;
        let content = u64::from(frame.header().content_len);
        counters.content_sent.fetch_add(content, Ordering::Relaxed);
        counters.wire_sent.fetch_add(wire, Ordering::Relaxed);
        if seq.0 <= again {
            counters.frames_sent_again.fetch_add(1, Ordering::Relaxed);
        }
        counters.highest_sent.fetch_max(seq.0, Ordering::Relaxed);
        Ok(content)
    }
}

/// Reads frames of the log, and encodes them.
struct Reader {
    cursor: Cursor,
    codecs: Codecs,
}

/// What has been read, and the reader back.
type Read = (Box<Reader>, srn_store::Result<Batch>);

/// The reader, or that it is reading.
enum Log {
    Here(Box<Reader>),
    Away(JoinHandle<Read>),
}

impl Reader {
    fn read_batch(
        &mut self,
        effort: Effort,
        limit: Seq,
        pool: &srn_store::io::BufPool,
    ) -> srn_store::Result<Batch> {
        let mut batch = Vec::new();
        let mut bytes = 0;
        while bytes < BATCH_BYTES && self.cursor.position() <= limit {
            let Some(frame) = self.cursor.next()? else { break };
            bytes += frame.memory();
            batch.push(frame.encoded(effort, &mut self.codecs, pool));
        }
        Ok(batch)
    }
}

fn micros(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX)
}

enum PumpError {
    Link(LinkError),
    Store(String),
}

impl From<LinkError> for PumpError {
    fn from(error: LinkError) -> Self {
        Self::Link(error)
    }
}
