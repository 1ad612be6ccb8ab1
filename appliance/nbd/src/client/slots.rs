//! The requests in flight, found by their cookies.
//!
//! A cookie names a slot and how often it was used, so that a reply that comes twice finds nothing.

use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use tokio::sync::{Notify, OwnedSemaphorePermit, oneshot};

use super::error::ClientError;
use crate::proto::{Coverage, ErrorCode, RawExtent};
use crate::transport::PayloadBuffer;

/// What a request is answered with.
#[derive(Debug)]
pub(super) enum Answer {
    Done,
    Data(Bytes),
    /// Extents of each context by its id.
    Status(Vec<(u32, Vec<RawExtent>)>),
}

/// A request in flight.
#[derive(Debug)]
pub(super) struct Slot {
    pub(super) operation: &'static str,
    pub(super) offset: u64,
    pub(super) length: u32,
    pub(super) progress: Progress,
    /// The first error the server told.
    pub(super) error: Option<(ErrorCode, String)>,
    pub(super) waiter: oneshot::Sender<Result<Answer, ClientError>>,
    /// Held until the reply came, also when nobody waits for it any more.
    pub(super) _room: (OwnedSemaphorePermit, OwnedSemaphorePermit),
}

/// What has arrived of the answer.
#[derive(Debug)]
pub(super) enum Progress {
    Plain,
    Read { buffer: Buffer, coverage: Coverage },
    Status { one: bool, told: Vec<(u32, Vec<RawExtent>)> },
}

/// Where what is read is put together.
#[derive(Debug)]
pub(super) enum Buffer {
    Small(Vec<u8>),
    Large(PayloadBuffer),
}

impl Buffer {
    pub(super) fn as_mut(&mut self) -> &mut [u8] {
        match self {
            Self::Small(bytes) => bytes,
            Self::Large(buffer) => buffer.as_mut(),
        }
    }

    pub(super) fn freeze(self) -> Bytes {
        match self {
            Self::Small(bytes) => bytes.into(),
            Self::Large(buffer) => buffer.freeze(),
        }
    }
}

#[derive(Debug, Default)]
pub(super) struct Slots {
    table: Mutex<Table>,
    ended: Notify,
}

/// As long as the cap of requests in flight; a semaphore sees to that.
#[derive(Debug, Default)]
struct Table {
    entries: Vec<Entry>,
    free: Vec<u32>,
    /// Why there will be no more replies.
    end: Option<ClientError>,
}

#[derive(Debug, Default)]
struct Entry {
    uses: u32,
    slot: Option<Slot>,
}

impl Slots {
    /// Takes a request up and returns its cookie.
    ///
    /// # Errors
    /// The reason why the connection has ended.
    pub(super) fn insert(&self, slot: Slot) -> Result<u64, ClientError> {
        let mut table = self.lock();
        if let Some(end) = &table.end {
            return Err(end.clone());
        }
        let index = match table.free.pop() {
            Some(index) => index,
            None => {
                table.entries.push(Entry::default());
                u32::try_from(table.entries.len() - 1).unwrap_or(u32::MAX)
            }
        };
        let Some(entry) = table.entries.get_mut(index as usize) else {
            return Err(ClientError::Closed);
        };
        entry.uses = entry.uses.wrapping_add(1);
        entry.slot = Some(slot);
        Ok(u64::from(entry.uses) << 32 | u64::from(index))
    }

    /// Takes the request of a cookie out, to look at its reply.
    pub(super) fn take(&self, cookie: u64) -> Option<Slot> {
        let mut table = self.lock();
        table.entry(cookie)?.slot.take()
    }

    /// Puts a request back whose reply has more chunks to come.
    pub(super) fn put_back(&self, cookie: u64, slot: Slot) {
        if let Some(entry) = self.lock().entry(cookie) {
            entry.slot = Some(slot);
        }
    }

    /// Gives the cookie of a request free that was taken out and is answered.
    pub(super) fn release(&self, cookie: u64) {
        let mut table = self.lock();
        if table.entry(cookie).is_some() {
            // The low half of a cookie is the index.
            table.free.push(cookie as u32);
        }
    }

    /// Fails everything in flight and everything to come.
    pub(super) fn end(&self, error: &ClientError) {
        let mut table = self.lock();
        table.end.get_or_insert_with(|| error.clone());
        let waiting: Vec<_> =
            table.entries.iter_mut().filter_map(|entry| entry.slot.take()).collect();
        drop(table);
        self.ended.notify_waiters();
        for slot in waiting {
            // Nobody may be waiting any more.
            let _ = slot.waiter.send(Err(error.clone()));
        }
    }

    /// Why the connection has ended, if it has.
    pub(super) fn ended(&self) -> Option<ClientError> {
        self.lock().end.clone()
    }

    /// Why the connection has ended, once it has.
    pub(super) async fn reason(&self) -> ClientError {
        loop {
            let mut ended = std::pin::pin!(self.ended.notified());
            ended.as_mut().enable();
            if let Some(end) = &self.lock().end {
                return end.clone();
            }
            ended.await;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    fn entry(&mut self, cookie: u64) -> Option<&mut Entry> {
        let entry = self.entries.get_mut(cookie as u32 as usize)?;
        (u64::from(entry.uses) == cookie >> 32).then_some(entry)
    }
}
