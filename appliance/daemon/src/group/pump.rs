//! Sends a group's frames while there are any, credit and a link: reads them, from memory or ahead
//! of the link from the log, encodes them as hard as the link leaves time for, hands them to it.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use srn_core::ids::Seq;
use srn_core::sender::{Sender, Stream};
use srn_core::wire::StreamHeader;
use srn_link::{FrameWriter, LinkError, Session};
use srn_store::StoreError;
use srn_store::codec::{Codecs, Effort};
use srn_store::frame::Frame;
use srn_store::group::Cursor;
use tokio::sync::Notify;
use tokio::task::JoinHandle;

use super::Group;
use super::effort::EffortControl;
use super::outgoing::lock;

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

/// Sends frames.
pub(super) struct Pump {
    pub(super) group: Arc<Group>,
    pub(super) session: Session,
    pub(super) sender: Arc<Mutex<Sender>>,
    pub(super) wake: Arc<Notify>,
}

/// Frames ready to be sent.
type Batch = Vec<Arc<Frame>>;

impl Pump {
    pub(super) async fn run(self, stream: Stream) {
        let name = self.group.name();
        match self.send_all(stream).await {
            Ok(()) => {}
            // The session's end is told by the session; the peer may also have ended this stream.
            Err(PumpError::Link(error)) => log::debug!("group {name}: sending: {error}"),
            // Trimmed meanwhile: the next offer says how far the log goes back.
            Err(PumpError::Store(StoreError::NotInHistory(why))) => {
                log::info!("group {name}: sending: {why}");
            }
            Err(PumpError::Store(error)) => self.group.cannot_send(&error.to_string()),
            Err(PumpError::Lost) => log::error!("group {name}: sending: a reader was lost"),
        }
        // It must not look as if it went on.
        lock(&self.sender).on_link_down();
        self.group.review();
    }

    async fn send_all(&self, stream: Stream) -> Result<(), PumpError> {
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
    async fn next_batch(&self, log: Log, effort: Effort) -> Result<(Batch, Log), PumpError> {
        let read = match log {
            Log::Here(mut reader) => {
                if let Some(frame) = reader.cursor.next_recent() {
                    return self.encode(frame, reader, effort).await;
                }
                self.read_ahead(reader, effort)
            }
            Log::Away(read) => read,
        };
        let (mut reader, result) = read.await.map_err(|_| PumpError::Lost)?;
        let mut batch = result.map_err(PumpError::Store)?;
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
    ) -> Result<(Batch, Log), PumpError> {
        let pool = self.group.context.store().pool.clone();
        if effort == Effort::None || frame.memory() <= INLINE_BYTES {
            let batch = vec![frame.encoded(effort, &mut reader.codecs, &pool)];
            return Ok((batch, Log::Here(reader)));
        }
        let encoded = tokio::task::spawn_blocking(move || {
            (vec![frame.encoded(effort, &mut reader.codecs, &pool)], Log::Here(reader))
        });
        encoded.await.map_err(|_| PumpError::Lost)
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
    ) -> Result<u64, PumpError> {
        let envelope = frame.envelope();
        let mut parts = Vec::with_capacity(2 + frame.content().len());
        parts.push(Bytes::copy_from_slice(&envelope.encode(frame.table())));
        parts.push(frame.front().clone());
        parts.extend(frame.content().iter().cloned());
        let wire = envelope.wire_len() as u64;
        let seq = frame.header().seq;
        let (traffic, weight) = self.group.share();
        writer.set_share(traffic, weight);
        // Before it leaves: its acknowledgement may be here before the write returns.
        self.group.remember_sent(frame.position());
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
            let frame = match self.cursor.next() {
                Ok(Some(frame)) => frame,
                Ok(None) => break,
                // What was read before is sent first; the error comes again.
                Err(_) if !batch.is_empty() => break,
                Err(error) => return Err(error),
            };
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
    Store(StoreError),
    /// A task ended: ours.
    Lost,
}

impl From<LinkError> for PumpError {
    fn from(error: LinkError) -> Self {
        Self::Link(error)
    }
}
