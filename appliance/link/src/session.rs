//! A session with a paired node: the control stream, the frame streams and those of changes.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use srn_core::frame::envelope;
use srn_core::ids::NodeId;
use srn_core::wire::{
    ChangesHeader, Hello, Message, PREFIX_LEN, StreamHeader, WireFrame, carries_changes,
};
use tokio::sync::mpsc;

use crate::changes::{Changes, ChangesReader};
use crate::congestion::RateController;
use crate::endpoint::{
    CLOSE_DONE, CLOSE_MISBEHAVED, CLOSE_REPLACED, CLOSE_VERSION, Connection, HANDSHAKE,
    SEND_WINDOW, refine,
};
use crate::error::LinkError;
use crate::shaping::{self, Lane, Shaper, Traffic};

/// Control messages waiting to be sent. They are small, and whoever sends waits at the cap.
const OUTGOING_MAX: usize = 256;

/// Events waiting to be taken. At the cap the peer is not read any more.
const EVENTS_MAX: usize = 64;

/// Code of a frame stream that ends without having been finished.
const STREAM_GIVEN_UP: quinn::VarInt = quinn::VarInt::from_u32(1);

/// Priority of the control stream over frame streams, and of live ones over bulk.
const CONTROL_PRIORITY: i32 = 10;
const LIVE_PRIORITY: i32 = 1;
const BULK_PRIORITY: i32 = 0;

/// Time that the last control messages have to leave before a session is closed.
const DRAIN: Duration = Duration::from_millis(500);

/// What is known of the way to the peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Path {
    /// The round trip time as measured.
    pub round_trip: Duration,
    /// The largest packet that the path is known to take, in bytes of UDP payload.
    pub packet_bytes: u16,
    /// The rate at which the path delivers as far as is known, in bytes per second; none before
    /// something was sent.
    pub rate: Option<u64>,
    /// What was lost over the last round trips, in millionths.
    pub loss_ppm: u64,
    /// How often packets of the size that the path took before no longer arrived.
    pub black_holes: u64,
    /// Bytes of UDP sent in this session.
    pub sent: u64,
    /// Bytes of UDP received in this session.
    pub received: u64,
}

/// What happens in a session.
#[derive(Debug)]
pub enum SessionEvent {
    /// The peer said something.
    Message(Message),
    /// The peer begins to send a group's frames.
    Frames(StreamHeader, FrameReader),
    /// The peer begins to send what changed in a group.
    Changes(Changes),
    /// The session is over; nothing follows.
    Closed(LinkError),
}

/// A session.
#[derive(Debug, Clone)]
pub struct Session {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    connection: Connection,
    hello: Hello,
    outgoing: mpsc::Sender<Vec<u8>>,
    shaper: Arc<Shaper>,
    number: u64,
}

/// Numbers sessions, so that a late event of an old one is told from the new one's.
static NEXT_NUMBER: AtomicU64 = AtomicU64::new(1);

impl Session {
    /// Begins a session on a connection whose key is that of a paired node: both sides say hello.
    /// Events arrive at the receiver until [`SessionEvent::Closed`].
    ///
    /// # Errors
    /// [`LinkError::Version`], [`LinkError::Misbehaved`], [`LinkError::Unreachable`].
    pub async fn begin(
        connection: Connection,
        hello: Hello,
    ) -> Result<(Self, mpsc::Receiver<SessionEvent>), LinkError> {
        let addr = connection.remote_address();
        let greeting = async {
            let (mut send, mut receive) = if connection.dialled {
                connection.quic.open_bi().await
            } else {
                connection.quic.accept_bi().await
            }
            .map_err(|error| refine(addr, &error))?;
            let _ = send.set_priority(CONTROL_PRIORITY);
            send.write_all(&Message::Hello(hello).encode())
                .await
                .map_err(|error| LinkError::gone(&addr, &error))?;
            match read_message(&mut receive, addr).await? {
                Some(Message::Hello(theirs)) => Ok((send, receive, theirs)),
                _ => Err(LinkError::Misbehaved("the first message is no hello".into())),
            }
        };
        let greeted = tokio::time::timeout(HANDSHAKE, greeting)
            .await
            .unwrap_or_else(|_| Err(LinkError::gone(&addr, &"no hello in time")));
        let (send, receive, theirs) = match greeted {
            Ok(greeted) => greeted,
            Err(error) => {
                close_for(&connection, &error);
                return Err(error);
            }
        };
        let (outgoing, queue) = mpsc::channel(OUTGOING_MAX);
        let (events, taken) = mpsc::channel(EVENTS_MAX);
        let number = NEXT_NUMBER.fetch_add(1, Ordering::Relaxed);
        let shaper = Shaper::new();
        let inner = Inner { connection, hello: theirs, outgoing, shaper, number };
        let session = Self { inner: Arc::new(inner) };
        tokio::spawn(write_control(send, queue));
        tokio::spawn(session.clone().run(receive, events));
        Ok((session, taken))
    }

    /// This session's number, unique in this process.
    #[must_use]
    pub fn number(&self) -> u64 {
        self.inner.number
    }

    /// The peer's key.
    #[must_use]
    pub fn peer(&self) -> NodeId {
        self.inner.connection.peer
    }

    /// What the peer said of itself.
    #[must_use]
    pub fn hello(&self) -> &Hello {
        &self.inner.hello
    }

    /// The peer's address.
    #[must_use]
    pub fn remote_address(&self) -> SocketAddr {
        self.inner.connection.remote_address()
    }

    /// Whether this node dialled.
    #[must_use]
    pub fn dialled(&self) -> bool {
        self.inner.connection.dialled
    }

    /// From now on no more frames than this are sent, in bytes per second with all headers.
    pub fn set_limit(&self, limit: Option<u64>) {
        self.inner.shaper.set_limit(limit);
    }

    /// The most that is sent, in bytes per second.
    #[must_use]
    pub fn limit(&self) -> Option<u64> {
        self.inner.shaper.limit()
    }

    /// What is known of the way to the peer.
    #[must_use]
    pub fn path(&self) -> Path {
        let quic = &self.inner.connection.quic;
        let stats = quic.stats();
        let controller = quic.congestion_state().into_any().downcast::<RateController>().ok();
        let (rate, loss_ppm) =
            controller.map_or((0, 0), |known| (known.path_rate(), known.loss_ppm()));
        Path {
            round_trip: quic.rtt(),
            packet_bytes: stats.path.current_mtu,
            rate: (rate > 0).then_some(rate),
            loss_ppm,
            black_holes: stats.path.black_holes_detected,
            sent: stats.udp_tx.bytes,
            received: stats.udp_rx.bytes,
        }
    }

    /// Queues a message; waits while too many are queued.
    ///
    /// # Errors
    /// [`LinkError::Unreachable`] when the session is over.
    pub async fn send(&self, message: &Message) -> Result<(), LinkError> {
        let sent = self.inner.outgoing.send(message.encode()).await;
        sent.map_err(|_| LinkError::gone(&self.remote_address(), &"the session is over"))
    }

    /// Queues a message if there is room: for what will be said again anyway.
    ///
    /// Returns whether it was queued.
    #[must_use]
    pub fn try_send(&self, message: &Message) -> bool {
        self.inner.outgoing.try_send(message.encode()).is_ok()
    }

    /// Begins to send a group's frames.
    ///
    /// # Errors
    /// [`LinkError::Unreachable`].
    pub async fn open_frames(&self, header: &StreamHeader) -> Result<FrameWriter, LinkError> {
        self.open_stream(&header.encode()).await
    }

    /// Begins to send what changed in a group, with the catalog behind it.
    ///
    /// # Errors
    /// [`LinkError::Unreachable`].
    pub async fn open_changes(
        &self,
        header: &ChangesHeader,
        catalog: &[u8],
    ) -> Result<FrameWriter, LinkError> {
        let mut bytes = header.encode();
        bytes.extend_from_slice(catalog);
        self.open_stream(&bytes).await
    }

    async fn open_stream(&self, header: &[u8]) -> Result<FrameWriter, LinkError> {
        let addr = self.remote_address();
        let quic = &self.inner.connection.quic;
        let mut send = quic.open_uni().await.map_err(|error| refine(addr, &error))?;
        send.write_all(header).await.map_err(|error| LinkError::gone(&addr, &error))?;
        let _ = send.set_priority(LIVE_PRIORITY);
        let lane = self.inner.shaper.lane();
        Ok(FrameWriter { send, quic: quic.clone(), lane, addr, finished: false })
    }

    /// Ends the session on purpose, after what is queued has been sent.
    pub async fn close(&self, why: &str) {
        let connection = &self.inner.connection.quic;
        let _ = tokio::time::timeout(DRAIN, async {
            // The writer takes messages in order: when ours is taken, all before it were written.
            let _ = self.inner.outgoing.send(Vec::new()).await;
            self.inner.outgoing.closed().await;
        })
        .await;
        connection.close(CLOSE_DONE, why.as_bytes());
    }

    /// Ends the session at once, in favour of a newer one.
    pub fn replace(&self) {
        self.inner.connection.quic.close(CLOSE_REPLACED, b"replaced by a newer connection");
    }

    /// Whether it has ended.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.inner.connection.quic.close_reason().is_some()
    }

    /// Ends the session because the peer broke the protocol.
    pub fn misbehaved(&self, why: &str) {
        log::warn!("peer {} broke the protocol: {why}", self.peer().short());
        self.inner.connection.quic.close(CLOSE_MISBEHAVED, why.as_bytes());
    }

    async fn run(self, mut control: quinn::RecvStream, events: mpsc::Sender<SessionEvent>) {
        let addr = self.remote_address();
        let messages = async {
            loop {
                match read_message(&mut control, addr).await {
                    Ok(Some(Message::Hello(_))) => {
                        return LinkError::Misbehaved("a second hello".into());
                    }
                    Ok(Some(message)) => {
                        if events.send(SessionEvent::Message(message)).await.is_err() {
                            return LinkError::gone(&addr, &"the session was dropped");
                        }
                    }
                    Ok(None) => return LinkError::gone(&addr, &"the peer ended the session"),
                    Err(error) => return error,
                }
            }
        };
        let streams = async {
            loop {
                match self.accept_stream().await {
                    // Given up before it had begun.
                    Ok(None) => {}
                    Ok(Some(event)) => {
                        if events.send(event).await.is_err() {
                            return LinkError::gone(&addr, &"the session was dropped");
                        }
                    }
                    Err(error) => return error,
                }
            }
        };
        let error = tokio::select! {
            error = messages => error,
            error = streams => error,
            error = self.inner.connection.quic.closed() => refine(addr, &error),
        };
        close_for(&self.inner.connection, &error);
        let _ = events.send(SessionEvent::Closed(error)).await;
    }

    async fn accept_stream(&self) -> Result<Option<SessionEvent>, LinkError> {
        let addr = self.remote_address();
        let quic = &self.inner.connection.quic;
        let mut receive = quic.accept_uni().await.map_err(|error| refine(addr, &error))?;
        let mut bytes = [0; StreamHeader::LEN];
        let read = tokio::time::timeout(HANDSHAKE, receive.read_exact(&mut bytes)).await;
        match read {
            Ok(Ok(())) => {}
            Ok(Err(quinn::ReadExactError::ReadError(quinn::ReadError::Reset(_)))) => {
                return Ok(None);
            }
            Ok(Err(error)) => return Err(LinkError::gone(&addr, &error)),
            Err(_) => return Err(LinkError::Misbehaved("a stream without a header".into())),
        }
        if !carries_changes(&bytes) {
            let header = StreamHeader::decode(&bytes)?;
            return Ok(Some(SessionEvent::Frames(header, FrameReader { receive, addr })));
        }
        let mut reader = ChangesReader { receive, addr };
        let rest = tokio::time::timeout(HANDSHAKE, async {
            let mut all = [0; ChangesHeader::LEN];
            let (front, back) = all.split_at_mut(StreamHeader::LEN);
            front.copy_from_slice(&bytes);
            reader.read(back).await?;
            let header = ChangesHeader::decode(&all)?;
            let mut catalog = vec![0; header.catalog_len as usize];
            reader.read(&mut catalog).await?;
            Ok::<_, LinkError>((header, catalog))
        });
        let (header, catalog) = match rest.await {
            Ok(Ok(rest)) => rest,
            Ok(Err(error @ LinkError::Misbehaved(_))) => return Err(error),
            Ok(Err(_)) => return Ok(None),
            Err(_) => return Err(LinkError::Misbehaved("a stream without a header".into())),
        };
        Ok(Some(SessionEvent::Changes(Changes { header, catalog, reader })))
    }
}

/// Tells the peer what it did wrong, if it did.
fn close_for(connection: &Connection, error: &LinkError) {
    let code = match error {
        LinkError::Version(_) => CLOSE_VERSION,
        LinkError::Misbehaved(_) => CLOSE_MISBEHAVED,
        _ => CLOSE_DONE,
    };
    connection.quic.close(code, error.to_string().as_bytes());
}

async fn write_control(mut send: quinn::SendStream, mut queue: mpsc::Receiver<Vec<u8>>) {
    while let Some(message) = queue.recv().await {
        // An empty one asks to end.
        if message.is_empty() || send.write_all(&message).await.is_err() {
            break;
        }
    }
    let _ = send.finish();
    // Wait until it arrived, so that the last words are not lost with the connection.
    let _ = tokio::time::timeout(DRAIN, send.stopped()).await;
}

/// The next message; `None` when the peer has ended the stream.
async fn read_message(
    receive: &mut quinn::RecvStream,
    addr: SocketAddr,
) -> Result<Option<Message>, LinkError> {
    let lost = |error: quinn::ReadExactError| match error {
        quinn::ReadExactError::ReadError(quinn::ReadError::ConnectionLost(error)) => {
            refine(addr, &error)
        }
        other => LinkError::gone(&addr, &other),
    };
    let mut prefix = [0; PREFIX_LEN];
    match receive.read_exact(&mut prefix).await {
        Ok(()) => {}
        Err(quinn::ReadExactError::FinishedEarly(0)) => return Ok(None),
        Err(error) => return Err(lost(error)),
    }
    let len = Message::len_from_prefix(prefix)?;
    // Grown as it comes, so that a length alone costs no memory.
    let mut body = Vec::new();
    while body.len() < len {
        let want = (len - body.len()).min(64 * 1024);
        let chunk = receive.read_chunk(want, true).await.map_err(|error| match error {
            quinn::ReadError::ConnectionLost(error) => refine(addr, &error),
            other => LinkError::gone(&addr, &other),
        })?;
        match chunk {
            Some(chunk) => body.extend_from_slice(&chunk.bytes),
            None => return Err(LinkError::Misbehaved("a message ends early".into())),
        }
    }
    Ok(Some(Message::decode(&body)?))
}

/// Sends a group's frames, or what changed in it, in order.
#[derive(Debug)]
pub struct FrameWriter {
    send: quinn::SendStream,
    quic: quinn::Connection,
    lane: Lane,
    addr: SocketAddr,
    finished: bool,
}

impl Drop for FrameWriter {
    /// Given up, perhaps in the middle of a frame: that must not look like an end.
    fn drop(&mut self) {
        if !self.finished {
            let _ = self.send.reset(STREAM_GIVEN_UP);
        }
    }
}

impl FrameWriter {
    /// What is sent from now on, and the stream's part of the line beside others of its kind.
    pub fn set_share(&mut self, traffic: Traffic, weight: u64) {
        if traffic != self.lane.traffic() {
            let priority = match traffic {
                Traffic::Live => LIVE_PRIORITY,
                Traffic::Bulk => BULK_PRIORITY,
            };
            let _ = self.send.set_priority(priority);
        }
        self.lane.set(traffic, weight);
    }

    /// Hands a frame's bytes to the stream, without copying them: the envelope's fixed part, head
    /// and encoding table, content. Waits for the stream's turns, and while too much is on its way.
    ///
    /// # Errors
    /// [`LinkError::Unreachable`] when the stream or the session is over.
    pub async fn write(&mut self, parts: &mut [Bytes]) -> Result<(), LinkError> {
        self.look();
        let mut rest = parts.iter().map(Bytes::len).sum::<usize>();
        let mut from = 0;
        while rest > 0 {
            let mut slice = Vec::with_capacity(4);
            let mut wanted = self.lane.slice().min(rest);
            let turn = self.lane.turn(wanted).await;
            rest -= wanted;
            while wanted > 0
                && let Some(part) = parts.get_mut(from)
            {
                let taken = part.split_to(wanted.min(part.len()));
                from += usize::from(part.is_empty());
                wanted -= taken.len();
                slice.push(taken);
            }
            let written = self.send.write_all_chunks(&mut slice).await;
            drop(turn);
            written.map_err(|error| match error {
                quinn::WriteError::ConnectionLost(error) => refine(self.addr, &error),
                other => LinkError::gone(&self.addr, &other),
            })?;
        }
        Ok(())
    }

    /// Keeps the connection's buffers as short as the line allows.
    fn look(&self) {
        if !self.lane.looks() {
            return;
        }
        let controller = self.quic.congestion_state();
        let window = controller.window();
        let Ok(controller) = controller.into_any().downcast::<RateController>() else { return };
        let rate = controller.path_rate();
        self.lane.set_line((rate > 0).then_some(rate));
        let most = shaping::buffered(window, self.quic.rtt(), rate, SEND_WINDOW);
        self.quic.set_send_window(most);
    }

    /// Ends the stream.
    pub fn finish(&mut self) {
        self.finished = true;
        let _ = self.send.finish();
    }
}

/// Receives a group's frames, in order.
#[derive(Debug)]
pub struct FrameReader {
    receive: quinn::RecvStream,
    addr: SocketAddr,
}

/// A frame as it came, its lengths checked and nothing else.
#[derive(Debug)]
pub struct InFrame<B> {
    /// The envelope's fixed part.
    pub fixed: [u8; envelope::LEN],
    /// Head and encoding table.
    pub front: Bytes,
    /// Stored content, in the buffer that the caller has provided.
    pub content: B,
    /// Bytes on the wire.
    pub wire_len: u64,
}

impl FrameReader {
    /// The next frame; `None` when the peer has ended the stream. `buffer` provides room for
    /// content of a given length, at most that of one frame.
    ///
    /// # Errors
    /// [`LinkError::Misbehaved`], [`LinkError::Unreachable`].
    pub async fn next<B: AsMut<[u8]>>(
        &mut self,
        buffer: impl FnOnce(usize) -> B,
    ) -> Result<Option<InFrame<B>>, LinkError> {
        let mut fixed = [0; envelope::LEN];
        match self.receive.read_exact(&mut fixed).await {
            Ok(()) => {}
            Err(quinn::ReadExactError::FinishedEarly(0)) => return Ok(None),
            Err(error) => return Err(self.lost(error)),
        }
        let envelope = WireFrame::decode(&fixed)?.envelope;
        let mut front = vec![0; envelope.front_len() - envelope::LEN];
        self.receive.read_exact(&mut front).await.map_err(|error| self.lost(error))?;
        let mut content = buffer(envelope.stored_len as usize);
        let into = content
            .as_mut()
            .get_mut(..envelope.stored_len as usize)
            .ok_or_else(|| LinkError::Misbehaved("no room for a frame".into()))?;
        self.receive.read_exact(into).await.map_err(|error| self.lost(error))?;
        let wire_len = envelope.wire_len() as u64;
        Ok(Some(InFrame { fixed, front: front.into(), content, wire_len }))
    }

    fn lost(&self, error: quinn::ReadExactError) -> LinkError {
        match error {
            quinn::ReadExactError::FinishedEarly(_) => {
                LinkError::Misbehaved("a frame ends early".into())
            }
            quinn::ReadExactError::ReadError(quinn::ReadError::ConnectionLost(error)) => {
                refine(self.addr, &error)
            }
            quinn::ReadExactError::ReadError(other) => LinkError::gone(&self.addr, &other),
        }
    }
}
