//! From bytes to requests: many requests a system call, large payloads straight into their place.
//!
//! The reader is the only one who submits, so requests reach the export in order of arrival. It
//! stops reading when the connection or the node has enough in flight; TCP does the rest.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Buf, BufMut, BytesMut};
use tokio::io::AsyncReadExt;
use tokio::time::{Instant, timeout_at};

use super::backend::{Export, Request};
use super::brisk::{self, Brisk};
use super::connection::{Connection, Counters};
use super::flow::{Admission, Charge};
use super::limits::{Limits, PayloadBudget};
use super::reply::{EXTENTS_BYTES, Expected, Reply};
use crate::proto::constants::REQUEST_HEADER_BYTES;
use crate::proto::{
    ErrorCode, Operation, RequestHeader, RequestMagic, Session, Verdict, put_simple,
};
use crate::transport::{Gulp, PayloadPool, ReadHalf};

/// Payloads from this length on get a buffer of their own and are read into it directly.
const DIRECT_BYTES: u32 = 64 << 10;

/// What is read past a large payload, to have the next header without a system call of its own.
/// Little, because a large payload that begins in it must be copied out.
const TAIL_BYTES: usize = 4096 + REQUEST_HEADER_BYTES;

/// Memory that small payloads may keep from being used again beyond what the limits count, because
/// they share it with their neighbours; past that they are copied out. In bytes.
const PINNED_BYTES: usize = 4 << 20;

/// Small replies that may wait for a slow socket before no more requests are taken, in bytes.
const BACKLOG_BYTES: usize = 256 << 10;

/// After so much work without waiting, other connections of the same thread get their turn.
const TURN: u32 = 512;

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum End {
    #[error("client said goodbye")]
    Goodbye,
    #[error("server is shutting down")]
    Shutdown,
    #[error("connection was dropped on demand")]
    Dropped,
    #[error("client went away without a goodbye")]
    Gone,
    #[error("client went away in the middle of a request")]
    GoneInRequest,
    #[error(transparent)]
    Magic(#[from] RequestMagic),
    #[error("client sent a payload of {0} bytes")]
    Oversize(u32),
    #[error("client stopped in the middle of a payload")]
    Stalled,
    #[error("receiving failed: {0}")]
    Receive(io::Error),
    #[error("sending failed: {0}")]
    Send(io::Error),
}

/// What the reader needs before it can take the next request.
enum Next {
    /// So many bytes in the gulp.
    Input(usize),
    /// Room for so many bytes of payload.
    Room(u32),
    /// The payload of a large write.
    Large(RequestHeader, Operation),
    /// The payload of a write that is refused.
    Discard(RequestHeader, ErrorCode, &'static str),
    End(End),
}

pub(super) struct Reader {
    half: ReadHalf,
    gulp: Gulp,
    session: Session,
    export: Arc<dyn Export>,
    connection: Arc<Connection>,
    counters: Arc<Counters>,
    admission: Admission,
    pool: PayloadPool,
    limits: Limits,
    /// Room that was waited for, for the request at the start of the gulp.
    room: Option<Charge>,
    /// The last request had a large payload: read little beyond headers.
    bulk: bool,
    tail: Box<[u8; TAIL_BYTES]>,
    work: u32,
    brisk: Brisk,
}

/// What a reader is made of.
pub(super) struct Parts {
    pub(super) half: ReadHalf,
    /// What the client sent right behind the handshake.
    pub(super) input: BytesMut,
    pub(super) session: Session,
    pub(super) export: Arc<dyn Export>,
    pub(super) connection: Arc<Connection>,
    pub(super) counters: Arc<Counters>,
    pub(super) budget: PayloadBudget,
    pub(super) pool: PayloadPool,
    pub(super) limits: Limits,
}

impl Reader {
    pub(super) fn new(parts: Parts) -> Self {
        let Parts { half, input, session, export, connection, counters, budget, pool, limits } =
            parts;
        Self {
            half,
            gulp: Gulp::new(PINNED_BYTES, input),
            session,
            export,
            connection,
            counters,
            admission: Admission::new(&limits, budget),
            pool,
            limits,
            room: None,
            bulk: false,
            tail: Box::new([0; TAIL_BYTES]),
            work: 0,
            brisk: Brisk::default(),
        }
    }

    /// Takes requests until the connection ends. May be dropped at any point; what is in flight
    /// then can still be waited for.
    pub(super) async fn run(&mut self) -> End {
        loop {
            if let Err(end) = self.step().await {
                return end;
            }
        }
    }

    /// Waits until the client has closed the connection.
    pub(super) async fn peer_gone(&self) {
        self.half.peer_gone().await;
    }

    /// Waits until everything handed over was answered.
    pub(super) async fn all_done(&self) {
        self.admission.all_done(&self.connection.flow).await;
    }

    async fn step(&mut self) -> Result<(), End> {
        let backlog = self.connection.outbox.cork();
        let next = if backlog > BACKLOG_BYTES { None } else { Some(self.take_requests()) };
        self.connection.uncork();
        // Not while corked: what this completes is sent at once.
        self.export.gathered();
        match next {
            None => self.unless_gone(self.connection.outbox.idle()).await?,
            Some(Next::Input(total)) => self.fill(total).await?,
            Some(Next::Room(bytes)) => {
                let wait = self.admission.admit(&self.connection.flow, bytes);
                self.room = Some(self.unless_gone(wait).await?);
            }
            Some(Next::Large(header, operation)) => self.take_large(header, operation).await?,
            Some(Next::Discard(header, code, text)) => self.discard(header, code, text).await?,
            Some(Next::End(end)) => return Err(end),
        }
        if self.work >= TURN {
            self.work = 0;
            tokio::task::yield_now().await;
        }
        Ok(())
    }

    /// Hands over all requests that are whole. Does not wait.
    fn take_requests(&mut self) -> Next {
        loop {
            let header = match RequestHeader::decode(&self.gulp.bytes) {
                Ok(Some(header)) => header,
                Ok(None) => return Next::Input(REQUEST_HEADER_BYTES),
                Err(magic) => return Next::End(magic.into()),
            };
            let operation = match header.judge(&self.session) {
                Verdict::Run(operation) => operation,
                Verdict::Disconnect => return Next::End(End::Goodbye),
                Verdict::Nothing => {
                    self.gulp.bytes.advance(REQUEST_HEADER_BYTES);
                    self.answer_nothing(header.cookie);
                    continue;
                }
                Verdict::Refuse(code, text) if header.payload() > 0 => {
                    return Next::Discard(header, code, text);
                }
                Verdict::Refuse(code, text) => {
                    self.gulp.bytes.advance(REQUEST_HEADER_BYTES);
                    self.refuse(header.cookie, code, text);
                    continue;
                }
            };
            self.bulk = header.payload() >= DIRECT_BYTES;
            if self.bulk {
                return Next::Large(header, operation);
            }
            // The payload of a small write lies in the gulp, whole, before it counts as anything.
            let total = REQUEST_HEADER_BYTES + header.payload() as usize;
            if self.gulp.bytes.len() < total {
                return Next::Input(total);
            }
            let bytes = occupied(&operation);
            let room = self.room.take();
            let room = room.or_else(|| self.admission.try_admit(&self.connection.flow, bytes));
            let Some(room) = room else { return Next::Room(bytes) };
            self.gulp.bytes.advance(REQUEST_HEADER_BYTES);
            let data = self.gulp.take(header.payload() as usize);
            self.submit(header.cookie, operation, data, room);
        }
    }

    fn submit(&mut self, cookie: u64, operation: Operation, data: bytes::Bytes, room: Charge) {
        self.admission.submitted(&room);
        self.work += 1;
        let (request, expected) = request_of(operation, data);
        self.counters.count(&request);
        let reply = Reply::new(Arc::clone(&self.connection), cookie, expected, room);
        self.export.submit(request, reply);
    }

    async fn take_large(&mut self, header: RequestHeader, operation: Operation) -> Result<(), End> {
        let wait = self.admission.admit(&self.connection.flow, header.length);
        let room = self.unless_gone(wait).await?;
        let mut payload = self.pool.take(header.length as usize);
        self.gulp.bytes.advance(REQUEST_HEADER_BYTES);

        let buffer = payload.as_mut();
        let early = self.gulp.bytes.len().min(buffer.len());
        let (start, mut left) = buffer.split_at_mut(early);
        self.gulp.bytes.copy_to_slice(start);
        let deadline = self.payload_deadline(header.length);
        while !left.is_empty() {
            let receive = self.half.read_two(left, self.tail.as_mut_slice());
            let count = match timeout_at(deadline, receive).await {
                Ok(Ok(0)) => return Err(End::GoneInRequest),
                Ok(Ok(count)) => count,
                Ok(Err(error)) => return Err(End::Receive(error)),
                Err(_) => return Err(End::Stalled),
            };
            if let Some(beyond) = count.checked_sub(left.len()) {
                self.gulp.make_room(beyond);
                self.gulp.bytes.put_slice(self.tail.get(..beyond).unwrap_or_default());
                break;
            }
            left = left.split_at_mut(count).1;
        }
        self.work += TURN / 16;
        self.submit(header.cookie, operation, payload.freeze(), room);
        Ok(())
    }

    /// Consumes the payload of a write that is refused, and answers.
    async fn discard(
        &mut self,
        header: RequestHeader,
        code: ErrorCode,
        text: &'static str,
    ) -> Result<(), End> {
        let mut left = header.payload() as usize;
        if left > self.limits.discard_bytes {
            return Err(End::Oversize(header.payload()));
        }
        self.gulp.bytes.advance(REQUEST_HEADER_BYTES);
        let deadline = self.payload_deadline(header.payload());
        loop {
            let now = left.min(self.gulp.bytes.len());
            self.gulp.bytes.advance(now);
            left -= now;
            if left == 0 {
                break;
            }
            timeout_at(deadline, self.fill(1)).await.unwrap_or(Err(End::Stalled))?;
        }
        self.work += TURN / 16;
        self.refuse(header.cookie, code, text);
        self.connection.send();
        Ok(())
    }

    fn answer_nothing(&mut self, cookie: u64) {
        self.work += 1;
        self.connection.outbox.put(|queue| queue.put(|out| put_simple(out, cookie, None)));
    }

    fn refuse(&mut self, cookie: u64, code: ErrorCode, text: &str) {
        self.work += 1;
        let connection = &self.connection;
        connection.outbox.put(|queue| connection.put_error(queue, cookie, code, text));
    }

    /// Reads more, until there might be `total` bytes.
    async fn fill(&mut self, total: usize) -> Result<(), End> {
        let missing = total.saturating_sub(self.gulp.bytes.len());
        let began = Instant::now();
        // With requests under way there is something to wait for anyway, and what comes meanwhile is
        // better read in one gulp.
        let alone = self.admission.requests_in_flight(&self.connection.flow) == 0;
        if alone && self.brisk.is_worth_a_look() && self.look_out(began, missing)? {
            self.brisk.came_after(began.elapsed());
            return Ok(());
        }
        let filled = self.fill_asleep(missing).await;
        if alone {
            self.brisk.came_after(began.elapsed());
        }
        filled
    }

    /// Looks for a moment whether something comes. Returns whether it has.
    fn look_out(&mut self, began: Instant, missing: usize) -> Result<bool, End> {
        loop {
            match self.half.look(self.tail.as_mut_slice()) {
                // The end is found again when it is waited for.
                Ok(Some(0)) => return Ok(false),
                Ok(Some(count)) => {
                    self.gulp.make_room(missing.max(count));
                    self.gulp.bytes.put_slice(self.tail.get(..count).unwrap_or_default());
                    return Ok(true);
                }
                Ok(None) if began.elapsed() > brisk::LOOK => return Ok(false),
                Ok(None) => std::hint::spin_loop(),
                Err(error) => return Err(End::Receive(error)),
            }
        }
    }

    async fn fill_asleep(&mut self, missing: usize) -> Result<(), End> {
        let most = if self.bulk { missing.max(TAIL_BYTES) } else { usize::MAX };
        self.gulp.make_room(missing);
        match self.half.read_buf(&mut (&mut self.gulp.bytes).limit(most)).await {
            Ok(0) if self.gulp.bytes.is_empty() => Err(End::Gone),
            Ok(0) => Err(End::GoneInRequest),
            Ok(_) => {
                self.gulp.note_filled();
                Ok(())
            }
            Err(error) => Err(End::Receive(error)),
        }
    }

    /// While the reader waits for others it does not read, so it would not notice a client that
    /// goes away. One that ended its stream while requests of it wait, did not wait for answers.
    async fn unless_gone<T>(&self, wait: impl Future<Output = T>) -> Result<T, End> {
        tokio::select! {
            biased;
            result = wait => Ok(result),
            () = self.half.peer_gone() => Err(End::Gone),
        }
    }

    fn payload_deadline(&self, bytes: u32) -> Instant {
        let slowest = f64::from(self.limits.slowest_payload.max(1));
        Instant::now() + self.limits.stall + Duration::from_secs_f64(f64::from(bytes) / slowest)
    }
}

/// The payload a request occupies memory for, in bytes.
fn occupied(operation: &Operation) -> u32 {
    match operation {
        Operation::Read { length, .. } | Operation::Write { length, .. } => *length,
        Operation::BlockStatus { .. } => EXTENTS_BYTES,
        _ => 0,
    }
}

fn request_of(operation: Operation, data: bytes::Bytes) -> (Request, Expected) {
    match operation {
        Operation::Read { offset, length, unfragmented } => {
            (Request::Read { offset, length }, Expected::Data { offset, length, unfragmented })
        }
        Operation::Write { offset, fua, .. } => {
            (Request::Write { offset, data, fua }, Expected::Nothing)
        }
        Operation::WriteZeroes { offset, length, no_hole, fast, fua } => {
            (Request::WriteZeroes { offset, length, no_hole, fast, fua }, Expected::Nothing)
        }
        Operation::Trim { offset, length, fua } => {
            (Request::Trim { offset, length, fua }, Expected::Nothing)
        }
        Operation::Flush => (Request::Flush, Expected::Nothing),
        Operation::Cache { offset, length } => {
            (Request::Cache { offset, length }, Expected::Nothing)
        }
        Operation::BlockStatus { offset, length, one } => {
            (Request::BlockStatus { offset, length, one }, Expected::Extents { length, one })
        }
    }
}
