//! From bytes to answers. The server is not trusted: what does not fit a request in flight ends
//! the connection, and nothing is stored that was not asked for.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Buf, BytesMut};
use tokio::io::AsyncReadExt;

use super::Shared;
use super::error::ClientError;
use super::slots::{Answer, Progress, Slot};
use crate::proto::{
    ChunkKind, ErrorCode, ReplyHeader, ReplyViolation, decode_error, decode_hole, decode_status,
};
use crate::transport::{Gulp, ReadHalf};

/// Data from this length on is received straight into its place.
const DIRECT_BYTES: usize = 16 << 10;

/// What is received past such data, to have the next header.
const TAIL_BYTES: usize = 4096;

pub(super) struct Receiver {
    half: ReadHalf,
    gulp: Gulp,
    shared: Arc<Shared>,
    tail: Box<[u8; TAIL_BYTES]>,
    /// The last data was long: receive little beyond headers.
    bulk: bool,
}

impl Receiver {
    pub(super) fn new(half: ReadHalf, input: BytesMut, shared: Arc<Shared>) -> Self {
        // Nothing is handed out of this gulp, so nothing pins it.
        let gulp = Gulp::new(0, input);
        Self { half, gulp, shared, tail: Box::new([0; TAIL_BYTES]), bulk: false }
    }

    /// Serves the connection to its end, and tells everybody who waits.
    pub(super) async fn run(mut self, stall: Duration) {
        let shared = Arc::clone(&self.shared);
        let error = tokio::select! {
            error = self.receive() => error,
            error = shared.outbox.drain(stall, |()| {}) => match error.kind() {
                io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => {
                    ClientError::ServerGone
                }
                _ => ClientError::io("sending")(error),
            },
        };
        shared.slots.end(&error);
    }

    async fn receive(&mut self) -> ClientError {
        loop {
            if let Err(error) = self.receive_reply().await {
                return error;
            }
        }
    }

    async fn receive_reply(&mut self) -> Result<(), ClientError> {
        let header = loop {
            match ReplyHeader::decode(&self.gulp.bytes)? {
                Some((header, length)) => {
                    self.gulp.bytes.advance(length);
                    break header;
                }
                None => self.fill(1).await?,
            }
        };
        match header {
            ReplyHeader::Simple { error, cookie } => self.take_simple(error, cookie).await,
            ReplyHeader::Chunk { done, kind, cookie, length } => {
                if !self.shared.structured {
                    return Err(ReplyViolation::NotNegotiated.into());
                }
                self.take_chunk(done, kind, cookie, length).await
            }
        }
    }

    async fn take_simple(
        &mut self,
        error: Option<ErrorCode>,
        cookie: u64,
    ) -> Result<(), ClientError> {
        let mut slot = self.take_slot(cookie)?;
        slot.error = error.map(|code| (code, String::new()));
        let successful = slot.error.is_none();
        match &mut slot.progress {
            Progress::Read { buffer, coverage } if successful && !self.shared.structured => {
                let range = coverage.arrive(slot.offset, slot.length)?;
                let place = buffer.as_mut().get_mut(range).unwrap_or_default();
                self.receive_data(place).await?;
            }
            Progress::Read { .. } | Progress::Status { .. } if successful => {
                return Err(ReplyViolation::SimpleReply.into());
            }
            _ => {}
        }
        self.finish(cookie, slot)
    }

    async fn take_chunk(
        &mut self,
        done: bool,
        kind: ChunkKind,
        cookie: u64,
        length: u32,
    ) -> Result<(), ClientError> {
        let mut slot = self.take_slot(cookie)?;
        match (kind, &mut slot.progress) {
            (ChunkKind::None, _) => {}
            (ChunkKind::Data, Progress::Read { buffer, coverage }) => {
                self.need(8).await?;
                let offset = self.gulp.bytes.get_u64();
                let range = coverage.arrive(offset, length.saturating_sub(8))?;
                let place = buffer.as_mut().get_mut(range).unwrap_or_default();
                self.receive_data(place).await?;
            }
            (ChunkKind::Hole, Progress::Read { buffer, coverage }) => {
                let payload = self.take_payload(length).await?;
                let (offset, length) = decode_hole(&payload)?;
                let range = coverage.arrive(offset, length)?;
                buffer.as_mut().get_mut(range).unwrap_or_default().fill(0);
            }
            (ChunkKind::Status, Progress::Status { one, told }) => {
                let payload = self.take_payload(length).await?;
                let (context, extents) = decode_status(&payload, slot.length, *one)?;
                let selected = self.shared.contexts.iter().any(|known| known.id == context);
                if !selected || told.iter().any(|(id, _)| *id == context) {
                    return Err(ReplyViolation::StrangeContext.into());
                }
                told.push((context, extents));
            }
            (ChunkKind::Error | ChunkKind::ErrorOffset | ChunkKind::OtherError, _) => {
                let payload = self.take_payload(length).await?;
                let error = decode_error(&payload)?;
                slot.error.get_or_insert(error);
            }
            (ChunkKind::Data, _) => return Err(ReplyViolation::StrangeChunk(1).into()),
            (ChunkKind::Hole, _) => return Err(ReplyViolation::StrangeChunk(2).into()),
            (ChunkKind::Status, _) => return Err(ReplyViolation::StrangeChunk(5).into()),
        }
        if done {
            return self.finish(cookie, slot);
        }
        self.shared.slots.put_back(cookie, slot);
        Ok(())
    }

    fn take_slot(&self, cookie: u64) -> Result<Slot, ClientError> {
        let slot = self.shared.slots.take(cookie);
        slot.ok_or_else(|| ReplyViolation::StrangeCookie.into())
    }

    /// The reply is whole: judge it and tell who waits.
    fn finish(&self, cookie: u64, slot: Slot) -> Result<(), ClientError> {
        let Slot { operation, offset, length, progress, error, waiter, .. } = slot;
        let answer = match (error, progress) {
            (Some((code, message)), _) => {
                Err(ClientError::Server { operation, offset, length, code, message })
            }
            (None, Progress::Plain) => Ok(Answer::Done),
            (None, Progress::Read { buffer, coverage }) => {
                coverage.finish()?;
                Ok(Answer::Data(buffer.freeze()))
            }
            (None, Progress::Status { told, .. }) => {
                if told.len() != self.shared.contexts.len() {
                    return Err(ReplyViolation::MissingStatus.into());
                }
                Ok(Answer::Status(told))
            }
        };
        self.shared.slots.release(cookie);
        // Nobody may be waiting any more.
        let _ = waiter.send(answer);
        Ok(())
    }

    /// Receives exactly `place.len()` bytes of data.
    async fn receive_data(&mut self, place: &mut [u8]) -> Result<(), ClientError> {
        self.bulk = place.len() >= DIRECT_BYTES;
        let early = self.gulp.bytes.len().min(place.len());
        let (start, mut left) = place.split_at_mut(early);
        self.gulp.bytes.copy_to_slice(start);
        while !left.is_empty() {
            let receive = self.half.read_two(left, self.tail.as_mut_slice());
            let count = match receive.await {
                Ok(0) => return Err(ClientError::ServerGone),
                Ok(count) => count,
                Err(error) => return Err(receive_error(error)),
            };
            if let Some(beyond) = count.checked_sub(left.len()) {
                self.gulp.make_room(beyond);
                let beyond = self.tail.get(..beyond).unwrap_or_default();
                self.gulp.bytes.extend_from_slice(beyond);
                break;
            }
            left = left.split_at_mut(count).1;
        }
        Ok(())
    }

    /// A whole payload of a length its kind permits.
    async fn take_payload(&mut self, length: u32) -> Result<BytesMut, ClientError> {
        self.need(length as usize).await?;
        Ok(self.gulp.bytes.split_to(length as usize))
    }

    async fn need(&mut self, total: usize) -> Result<(), ClientError> {
        while self.gulp.bytes.len() < total {
            self.fill(total - self.gulp.bytes.len()).await?;
        }
        Ok(())
    }

    async fn fill(&mut self, missing: usize) -> Result<(), ClientError> {
        use bytes::BufMut;

        let most = if self.bulk { missing.max(TAIL_BYTES) } else { usize::MAX };
        self.gulp.make_room(missing);
        match self.half.read_buf(&mut (&mut self.gulp.bytes).limit(most)).await {
            Ok(0) => Err(ClientError::ServerGone),
            Ok(_) => {
                self.gulp.note_filled();
                Ok(())
            }
            Err(error) => Err(receive_error(error)),
        }
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        // Unless another reason was told before, the runtime is going down.
        self.shared.slots.end(&ClientError::Closed);
        self.shared.outbox.close();
    }
}

fn receive_error(error: io::Error) -> ClientError {
    match error.kind() {
        io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => ClientError::ServerGone,
        _ => ClientError::io("receiving")(error),
    }
}
