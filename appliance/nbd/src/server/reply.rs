//! Completing requests: from any thread, cheaply, and never to the wrong connection.

use std::sync::Arc;

use bytes::Bytes;

use super::connection::Connection;
use super::flow::Charge;
use crate::proto::{
    ALLOCATION_CONTEXT_ID, ErrorCode, StatusExtent, put_data_header, put_done, put_hole,
    put_simple, put_status, tidy_extents,
};
use crate::transport::Queue;

/// The most extents of one block status reply: 64 KiB of them.
pub(super) const EXTENTS_MAX: usize = 8192;

/// What a block status request may occupy until its reply was sent, in bytes.
pub(super) const EXTENTS_BYTES: u32 = EXTENTS_MAX as u32 * 8;

/// Zeroes to send where a hole must be spelled out.
static ZEROES: [u8; 64 << 10] = [0; 64 << 10];

/// One part of what was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ReadChunk {
    /// Content.
    Data(Bytes),
    /// So many bytes of zeroes.
    Hole(u32),
}

impl ReadChunk {
    fn length(&self) -> u64 {
        match self {
            Self::Data(data) => data.len() as u64,
            Self::Hole(length) => u64::from(*length),
        }
    }
}

/// What was read: parts in order, without gaps, of exactly the requested length together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReadData(Parts);

/// Most reads have one part, which needs no list.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Parts {
    One(ReadChunk),
    Many(Vec<ReadChunk>),
}

impl ReadData {
    fn parts(&self) -> &[ReadChunk] {
        match &self.0 {
            Parts::One(part) => std::slice::from_ref(part),
            Parts::Many(parts) => parts,
        }
    }
}

impl From<Bytes> for ReadData {
    fn from(data: Bytes) -> Self {
        Self(Parts::One(ReadChunk::Data(data)))
    }
}

impl From<Vec<u8>> for ReadData {
    fn from(data: Vec<u8>) -> Self {
        Bytes::from(data).into()
    }
}

impl From<ReadChunk> for ReadData {
    fn from(chunk: ReadChunk) -> Self {
        Self(Parts::One(chunk))
    }
}

impl From<Vec<ReadChunk>> for ReadData {
    fn from(chunks: Vec<ReadChunk>) -> Self {
        Self(Parts::Many(chunks))
    }
}

/// The answer a request waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Expected {
    Nothing,
    Data { offset: u64, length: u32, unfragmented: bool },
    Extents { length: u32, one: bool },
}

/// Completes one request, once. Dropped without completion it answers `EIO`: no client waits for
/// ever because a backend forgot.
///
/// The payload of a write counts against the limits until its reply is completed, also when the
/// backend keeps the bytes for longer; the data of a read until it was sent.
#[derive(Debug)]
#[must_use = "dropped without completion this answers an input/output error"]
pub struct Reply {
    connection: Arc<Connection>,
    cookie: u64,
    expected: Expected,
    charge: Option<Charge>,
}

impl Reply {
    pub(super) fn new(
        connection: Arc<Connection>,
        cookie: u64,
        expected: Expected,
        charge: Charge,
    ) -> Self {
        Self { connection, cookie, expected, charge: Some(charge) }
    }

    /// Success, for all requests that return nothing.
    pub fn ok(mut self) {
        let outcome = Outcome::Done;
        self.complete_and_send(&outcome);
    }

    /// What was read, for [`Request::Read`](super::Request::Read).
    pub fn data(mut self, data: impl Into<ReadData>) {
        let outcome = Outcome::Data(data.into());
        self.complete_and_send(&outcome);
    }

    /// The status of the range from its start on, for
    /// [`Request::BlockStatus`](super::Request::BlockStatus). Neighbours of the same status are
    /// merged, and what reaches past the range is cut. It need not cover the range, but something
    /// of it: the client asks again for the rest.
    pub fn extents(mut self, extents: &[StatusExtent]) {
        let outcome = Outcome::Extents(extents);
        self.complete_and_send(&outcome);
    }

    /// Failure; `text` is shown to people at the client where the protocol permits.
    pub fn error(mut self, code: ErrorCode, text: &str) {
        let outcome = Outcome::Error(code, text);
        self.complete_and_send(&outcome);
    }

    fn complete_and_send(&mut self, outcome: &Outcome<'_>) {
        if self.complete(outcome) {
            self.connection.send();
        }
    }

    /// Puts the reply into the connection's queue. Whether sending it is needed.
    fn complete(&mut self, outcome: &Outcome<'_>) -> bool {
        let Some(charge) = self.charge.take() else { return false };
        let connection = &self.connection;
        let structured = connection.structured;
        let (cookie, expected) = (self.cookie, self.expected);
        let checked = checked(outcome, expected).unwrap_or_else(|Misfit| {
            let client = &connection.client;
            log::error!(target: "nbd", "{client}: backend gave an answer that does not fit");
            Checked::Error(ErrorCode::Io, "server gave no proper answer")
        });
        let mut charge = Some(charge);
        let needs_send = connection.outbox.put(|queue| {
            match checked {
                Checked::Done => queue.put(|out| put_simple(out, cookie, None)),
                Checked::Data { data, offset, unfragmented } => {
                    put_read(queue, cookie, structured, offset, unfragmented, data);
                }
                Checked::Extents(extents) => queue.put(|out| {
                    put_status(out, cookie, ALLOCATION_CONTEXT_ID, &extents);
                }),
                Checked::Error(code, text) => connection.put_error(queue, cookie, code, text),
            }
            // What a reply carries stays in memory until it was sent.
            if expected != Expected::Nothing
                && let Some(charge) = charge.take()
            {
                queue.put_token(charge);
            }
        });
        if let Some(charge) = charge {
            connection.flow.release(charge);
        }
        connection.flow.request_done();
        needs_send
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        if self.charge.is_some() {
            // Of a connection that is gone, the backend is even asked to drop them.
            if !self.connection.outbox.is_closed() {
                let client = &self.connection.client;
                log::error!(target: "nbd", "{client}: backend dropped a request unanswered");
            }
            self.complete_and_send(&Outcome::Error(ErrorCode::Io, "request was dropped"));
        }
    }
}

enum Outcome<'a> {
    Done,
    Data(ReadData),
    Extents(&'a [StatusExtent]),
    Error(ErrorCode, &'a str),
}

enum Checked<'a> {
    Done,
    Data { data: &'a ReadData, offset: u64, unfragmented: bool },
    Extents(Vec<StatusExtent>),
    Error(ErrorCode, &'a str),
}

/// An answer of another kind or length than the request asks for.
struct Misfit;

/// Refuses answers that do not fit the request: a wrong length would make the client misread
/// everything after it.
fn checked<'a>(outcome: &'a Outcome<'a>, expected: Expected) -> Result<Checked<'a>, Misfit> {
    match (outcome, expected) {
        (Outcome::Error(code, text), _) => Ok(Checked::Error(*code, text)),
        (Outcome::Done, Expected::Nothing) => Ok(Checked::Done),
        (Outcome::Data(data), Expected::Data { offset, length, unfragmented }) => {
            let total: u64 = data.parts().iter().map(ReadChunk::length).sum();
            let fits = total == u64::from(length);
            if fits { Ok(Checked::Data { data, offset, unfragmented }) } else { Err(Misfit) }
        }
        (Outcome::Extents(extents), Expected::Extents { length, one }) => {
            let most = if one { 1 } else { EXTENTS_MAX };
            tidy_extents(extents, length, most).map(Checked::Extents).ok_or(Misfit)
        }
        _ => Err(Misfit),
    }
}

fn put_read(
    queue: &mut Queue<Charge>,
    cookie: u64,
    structured: bool,
    offset: u64,
    unfragmented: bool,
    data: &ReadData,
) {
    let parts = data.parts();
    let total: u64 = parts.iter().map(ReadChunk::length).sum();
    // A read is never longer than the maximum payload, which is a u32.
    let total = u32::try_from(total).unwrap_or(u32::MAX);
    let all_hole = parts.iter().all(|part| matches!(part, ReadChunk::Hole(_)));
    if !structured {
        queue.put(|out| put_simple(out, cookie, None));
        put_content(queue, parts);
    } else if all_hole {
        queue.put(|out| put_hole(out, cookie, true, offset, total));
    } else if unfragmented || parts.len() == 1 {
        queue.put(|out| put_data_header(out, cookie, true, offset, total));
        put_content(queue, parts);
    } else {
        put_runs(queue, cookie, offset, parts);
    }
}

/// Everything spelled out, holes too.
fn put_content(queue: &mut Queue<Charge>, parts: &[ReadChunk]) {
    for part in parts {
        match part {
            ReadChunk::Data(data) => queue.put_data(data.clone()),
            ReadChunk::Hole(length) => {
                let mut left = *length as usize;
                while left > 0 {
                    let now = ZEROES.get(..left).unwrap_or(&ZEROES);
                    queue.put_data(Bytes::from_static(now));
                    left -= now.len();
                }
            }
        }
    }
}

/// One chunk for each run of data and each run of holes.
fn put_runs(queue: &mut Queue<Charge>, cookie: u64, offset: u64, parts: &[ReadChunk]) {
    let mut position = offset;
    let is_hole = |part: &ReadChunk| matches!(part, ReadChunk::Hole(_));
    let lawful = |part: &&ReadChunk| part.length() > 0;
    let parts: Vec<_> = parts.iter().filter(lawful).collect();
    for run in parts.chunk_by(|before, after| is_hole(before) == is_hole(after)) {
        let length: u64 = run.iter().map(|part| part.length()).sum();
        let length = u32::try_from(length).unwrap_or(u32::MAX);
        if run.first().is_some_and(|part| is_hole(part)) {
            queue.put(|out| put_hole(out, cookie, false, position, length));
        } else {
            queue.put(|out| put_data_header(out, cookie, false, position, length));
            for part in run {
                if let ReadChunk::Data(data) = part {
                    queue.put_data(data.clone());
                }
            }
        }
        position += u64::from(length);
    }
    queue.put(|out| put_done(out, cookie));
}

/// Completes many requests, of any number of connections, and then sends the replies of each
/// connection together: one system call where there would be many.
///
/// Whatever is in a batch is sent at the latest when it is dropped.
#[derive(Debug, Default)]
pub struct ReplyBatch {
    touched: Vec<Arc<Connection>>,
}

impl ReplyBatch {
    /// An empty batch.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Like [`Reply::ok`], sent later.
    pub fn ok(&mut self, reply: Reply) {
        self.add(reply, &Outcome::Done);
    }

    /// Like [`Reply::data`], sent later.
    pub fn data(&mut self, reply: Reply, data: impl Into<ReadData>) {
        self.add(reply, &Outcome::Data(data.into()));
    }

    /// Like [`Reply::extents`], sent later.
    pub fn extents(&mut self, reply: Reply, extents: &[StatusExtent]) {
        self.add(reply, &Outcome::Extents(extents));
    }

    /// Like [`Reply::error`], sent later.
    pub fn error(&mut self, reply: Reply, code: ErrorCode, text: &str) {
        self.add(reply, &Outcome::Error(code, text));
    }

    /// Sends all replies. The batch may be used again.
    pub fn send(&mut self) {
        for connection in self.touched.drain(..) {
            connection.send();
        }
    }

    fn add(&mut self, mut reply: Reply, outcome: &Outcome<'_>) {
        if !reply.complete(outcome) {
            return;
        }
        let connection = &reply.connection;
        if !self.touched.iter().rev().any(|known| Arc::ptr_eq(known, connection)) {
            self.touched.push(Arc::clone(connection));
        }
    }
}

impl Drop for ReplyBatch {
    fn drop(&mut self) {
        self.send();
    }
}
