//! The thread that owns the end of a line: it takes what waits, makes it durable in one commit, and
//! answers.
//!
//! Group commit needs no timer: whatever arrives while one commit is being written goes into the
//! next one. At low load a write is alone in its commit and waits for nothing; under load commits
//! grow by themselves.
//!
//! A lone small write is committed by the thread that brings it ([`Engine::gathered`]): handing it
//! to another and back takes longer than the disk does. That thread has other clients to serve, so
//! it does this only while the disk is quick.
//!
//! Rules that the tests try to break:
//! * an operation is answered only after its commit has returned, and, while answers are held, a
//!   client's only after the peer has acknowledged it;
//! * operations of one client are appended in the order in which they were handed over;
//! * operations of a client that is gone are dropped if they are not appended yet, and never run
//!   later; [`Engine::settled`] tells a newcomer when that is certain.

mod gate;
mod worker;

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use srn_core::epoch::Position;
use srn_core::ids::Seq;
use srn_nbd::proto::ErrorCode;
use srn_nbd::server::{Reply, ReplyBatch};
use srn_store::StoreError;
use srn_store::frame::Frame;
use srn_store::group::{Appender, Change};
use tokio::sync::{Notify, oneshot, watch};

use gate::Gate;
use worker::Worker;

/// The most operations, and bytes of content, that whoever brings them commits.
const INLINE_OPS: usize = 2;
const INLINE_BYTES: usize = 32 << 10;

/// Commits over which the mean of their operations is taken.
const MEAN_OF: usize = 16;

/// Whether somebody commits what it has brought: one at a time in the whole process, so that there
/// is always somebody left to serve clients.
static INLINE: AtomicBool = AtomicBool::new(false);

/// A connection whose operations die with it.
#[derive(Debug, Default)]
pub struct Client {
    gone: AtomicBool,
}

impl Client {
    /// The connection is gone: what it asked for and is not appended yet never will be.
    pub fn leave(&self) {
        self.gone.store(true, Ordering::SeqCst);
    }

    fn is_gone(&self) -> bool {
        self.gone.load(Ordering::SeqCst)
    }
}

/// Whom to tell.
#[derive(Debug)]
pub enum Done {
    /// An NBD client.
    Reply(Reply),
    /// A task, which learns the position behind its changes.
    Task(oneshot::Sender<Result<Position, Closed>>),
}

/// Changes that are answered together.
#[derive(Debug)]
pub struct Op {
    /// Who asked, if it can go away.
    pub client: Option<Arc<Client>>,
    /// In order.
    pub changes: Vec<Change>,
    /// Content in bytes.
    pub bytes: usize,
    /// Whom to tell.
    pub done: Done,
}

/// Why nothing is appended any more.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Closed(pub String);

/// What the engine tells its owner. Called from the engine's thread: it must not block.
pub trait Watcher: Send + Sync {
    /// A commit is durable.
    fn committed(&self, head: Position, content_bytes: u64);
    /// The log is full (`Some`, with the reason) or no longer so.
    fn full(&self, why: Option<&str>);
    /// Frames from the peer are durable: the newest, and how many bytes of the stream they were.
    fn received(&self, head: Position, wire_bytes: u64);
    /// Frames of the peer's stream do not continue the line; none of them was appended.
    fn out_of_line(&self, error: &StoreError);
    /// The line has stopped for good.
    fn failed(&self, error: &StoreError);
}

/// A stream of the peer's frames, by a number that no other in this process has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameStream(u64);

impl FrameStream {
    fn new() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self(NEXT.fetch_add(1, Ordering::Relaxed))
    }
}

struct Queue {
    ops: VecDeque<Op>,
    ops_bytes: usize,
    frames: VecDeque<(Arc<Frame>, u64)>,
    /// What the frames that wait are of; those of an earlier one were dropped.
    stream: FrameStream,
    /// Set when operations are refused.
    closed: Option<Closed>,
    /// The last operation was handed over, and why; what waits before it is still done.
    ended: Option<Closed>,
    /// The thread shall end and give back the appender.
    stop: bool,
    /// The segment being written shall be closed.
    close_segment: Vec<oneshot::Sender<()>>,
    /// The thread waits for work,
    idle: bool,
    /// and looks again by itself after a while.
    watched: bool,
    /// There may be room in the log that there was not.
    room: bool,
    /// A commit is being written.
    committing: bool,
    /// The log is full: operations wait.
    full: bool,
    /// When the last commit ended that nothing in the log proves to be durable.
    unproven: Option<Instant>,
    /// Nobody but the thread commits until then.
    slow_until: Option<Instant>,
    /// Operations in a commit of late, on average, times [`MEAN_OF`].
    mean_ops: usize,
}

struct Shared {
    queue: Mutex<Queue>,
    wake: Condvar,
    /// The newest durable position.
    head: watch::Sender<Position>,
    /// Commits that have ended, and a signal for each.
    commits: AtomicU64,
    commit_ended: Notify,
    watcher: Box<dyn Watcher>,
    /// Answers that wait for the peer.
    gate: Gate,
    /// Whoever holds it commits. Taken before the queue, never while holding it; none once the
    /// thread has ended.
    worker: Mutex<Option<Worker>>,
}

/// A running line.
pub struct Engine {
    shared: Arc<Shared>,
    thread: Mutex<Option<std::thread::JoinHandle<Option<Appender>>>>,
}

impl std::fmt::Debug for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Engine(head {})", *self.shared.head.borrow())
    }
}

impl Engine {
    /// Starts the thread.
    ///
    /// # Errors
    /// When the system gives no thread.
    pub fn start(
        name: &str,
        appender: Appender,
        watcher: Box<dyn Watcher>,
    ) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            queue: Mutex::new(Queue {
                ops: VecDeque::new(),
                ops_bytes: 0,
                frames: VecDeque::new(),
                stream: FrameStream::new(),
                closed: None,
                ended: None,
                stop: false,
                close_segment: Vec::new(),
                idle: false,
                watched: false,
                room: false,
                committing: false,
                full: false,
                unproven: None,
                slow_until: None,
                mean_ops: MEAN_OF,
            }),
            wake: Condvar::new(),
            head: watch::Sender::new(appender.head()),
            commits: AtomicU64::new(0),
            commit_ended: Notify::new(),
            watcher,
            gate: Gate::default(),
            worker: Mutex::new(Some(Worker { appender, replies: ReplyBatch::new() })),
        });
        let of_thread = shared.clone();
        let thread = std::thread::Builder::new()
            .name(format!("log-{name}"))
            .spawn(move || of_thread.run())?;
        Ok(Self { shared, thread: Mutex::new(Some(thread)) })
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.shared.lock()
    }

    /// Appends changes behind everything that was handed over before, and refuses whatever comes
    /// after them, until [`Engine::reopen`]. Waits until they are durable.
    ///
    /// # Errors
    /// [`Closed`] when nothing is appended any more.
    pub async fn append_last(&self, changes: Vec<Change>, why: &str) -> Result<Position, Closed> {
        let (done, told) = oneshot::channel();
        {
            let mut queue = self.lock();
            if let Some(closed) = queue.refuses() {
                return Err(closed.clone());
            }
            queue.ops.push_back(Op { client: None, changes, bytes: 0, done: Done::Task(done) });
            queue.ended = Some(Closed(why.to_owned()));
            self.shared.wake_if_idle(queue);
        }
        told.await.unwrap_or_else(|_| Err(Closed("the log was closed".into())))
    }

    /// Hands over an operation. [`Engine::gathered`] must follow, once for any number of them.
    pub fn submit(&self, op: Op) {
        let mut queue = self.lock();
        if let Some(closed) = queue.refuses().cloned() {
            drop(queue);
            return refuse(op.done, &closed);
        }
        queue.ops_bytes += op.bytes;
        queue.ops.push_back(op);
        if !queue.is_small() {
            self.shared.wake_if_idle(queue);
        }
    }

    /// Hands over an operation that the thread shall do.
    pub fn submit_one(&self, op: Op) {
        self.submit(op);
        self.shared.wake_if_idle(self.lock());
    }

    /// Nothing more will be handed over for the moment: what was, is committed, if it is little
    /// here and now, else by the thread.
    pub fn gathered(&self) {
        let queue = self.lock();
        if queue.ops.is_empty() {
            return;
        }
        let quick = queue.slow_until.is_none_or(|until| Instant::now() > until);
        if !(quick && queue.is_small() && queue.is_calm() && queue.is_at_rest())
            || INLINE.swap(true, Ordering::Acquire)
        {
            return self.shared.wake_if_idle(queue);
        }
        drop(queue);
        self.shared.commit_inline();
        INLINE.store(false, Ordering::Release);
    }

    /// Appends changes and waits until they are durable.
    ///
    /// # Errors
    /// [`Closed`] when nothing is appended any more.
    pub async fn append(&self, changes: Vec<Change>) -> Result<Position, Closed> {
        let (done, told) = oneshot::channel();
        self.submit_one(Op { client: None, changes, bytes: 0, done: Done::Task(done) });
        told.await.unwrap_or_else(|_| Err(Closed("the log was closed".into())))
    }

    /// Hands over a frame of the peer's stream, and its size on the wire in bytes. Nothing is done
    /// if the frames were dropped since that stream began: whoever reads it may be behind.
    pub fn take_frame(&self, stream: FrameStream, frame: Arc<Frame>, wire_bytes: u64) {
        let mut queue = self.lock();
        if queue.closed.is_none() && queue.stream == stream {
            queue.frames.push_back((frame, wire_bytes));
            self.shared.wake_if_idle(queue);
        }
    }

    /// Drops the peer's frames that are not appended yet: they will come again, in the new stream
    /// that this begins.
    pub async fn drop_frames(&self) -> FrameStream {
        let stream = {
            let mut queue = self.lock();
            queue.frames.clear();
            queue.stream = FrameStream::new();
            queue.stream
        };
        self.settled().await;
        stream
    }

    /// Refuses operations from now on; those that wait are refused too.
    pub fn close(&self, why: &str) {
        let closed = Closed(why.to_owned());
        let waiting = {
            let mut queue = self.lock();
            queue.closed = Some(closed.clone());
            queue.frames.clear();
            queue.ops_bytes = 0;
            let waiting = std::mem::take(&mut queue.ops);
            self.shared.wake.notify_one();
            waiting
        };
        waiting.into_iter().for_each(|op| refuse(op.done, &closed));
        gate::refuse(self.shared.gate.give_up(), ErrorCode::ShuttingDown, why);
    }

    /// Holds clients' answers back until the peer has acknowledged their writes, or no longer.
    pub fn hold(&self, hold: bool) {
        if hold == self.holds() {
            return;
        }
        if hold {
            self.shared.gate.close();
        } else {
            gate::grant(self.shared.gate.open());
        }
    }

    /// Whether answers are held back.
    #[must_use]
    pub fn holds(&self) -> bool {
        self.shared.gate.is_closed()
    }

    /// How many answers are held back, and for how long the oldest has been.
    #[must_use]
    pub fn held(&self) -> (usize, Duration) {
        self.shared.gate.held()
    }

    /// The peer holds every frame up to `seq` durably.
    pub fn acknowledged(&self, seq: Seq) {
        gate::grant(self.shared.gate.acknowledged(seq));
    }

    /// The peer holds less than it had acknowledged: only up to `seq`.
    pub fn set_back_acknowledged(&self, seq: Seq) {
        self.shared.gate.set_back(seq);
    }

    /// What came last was not the last: takes more, unless it is closed for another reason.
    pub fn go_on(&self) {
        self.lock().ended = None;
    }

    /// Refuses nothing any more.
    pub fn reopen(&self) {
        let mut queue = self.lock();
        queue.closed = None;
        queue.ended = None;
    }

    /// Why operations are refused.
    #[must_use]
    pub fn closed(&self) -> Option<String> {
        self.lock().refuses().map(|closed| closed.0.clone())
    }

    /// Bytes of content that wait.
    #[must_use]
    pub fn waiting_bytes(&self) -> usize {
        self.lock().ops_bytes
    }

    /// The newest durable position, as it moves.
    #[must_use]
    pub fn head(&self) -> watch::Receiver<Position> {
        self.shared.head.subscribe()
    }

    /// There may be room in the log again.
    pub fn room(&self) {
        let mut queue = self.lock();
        queue.room = true;
        self.shared.wake_if_idle(queue);
    }

    /// Returns when no operation of a client that left before can be appended any more.
    pub async fn settled(&self) {
        // What still waits of gone clients goes now; the rest is in the commit under way, if any.
        let ended = self.shared.commit_ended.notified();
        tokio::pin!(ended);
        ended.as_mut().enable();
        let busy = {
            let mut queue = self.lock();
            queue.drop_gone();
            queue.committing
        };
        if busy {
            ended.await;
        }
    }

    /// Closes the segment being written, so that a clone can begin at the head.
    pub async fn close_segment(&self) {
        let (done, told) = oneshot::channel();
        {
            let mut queue = self.lock();
            queue.close_segment.push(done);
            self.shared.wake.notify_one();
        }
        let _ = told.await;
    }

    /// Ends the thread after the commit under way and gives back the appender. Whoever waits is
    /// refused. Blocks: not for async code.
    pub fn stop(&self, why: &str) -> Option<Appender> {
        self.close(why);
        self.lock().stop = true;
        self.shared.wake.notify_one();
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        thread.and_then(|thread| thread.join().ok().flatten())
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        let _ = self.stop("the group is closed");
    }
}

fn refuse(done: Done, closed: &Closed) {
    match done {
        Done::Reply(reply) => reply.error(ErrorCode::ShuttingDown, &closed.0),
        Done::Task(task) => {
            let _ = task.send(Err(closed.clone()));
        }
    }
}

impl Queue {
    /// Whether what waits is little enough to be committed by whoever brings it.
    fn is_small(&self) -> bool {
        self.ops.len() <= INLINE_OPS && self.ops_bytes <= INLINE_BYTES
    }

    /// Whether commits are small these days. Of a client that has much under way the first two
    /// requests come alone, too; committing them by themselves would keep the rest waiting.
    const fn is_calm(&self) -> bool {
        self.mean_ops <= INLINE_OPS * MEAN_OF
    }

    /// Whether nothing but operations has to be done, and nobody does it.
    fn is_at_rest(&self) -> bool {
        !self.committing
            && !self.full
            && !self.stop
            && self.closed.is_none()
            && self.frames.is_empty()
            && self.close_segment.is_empty()
    }

    /// Why nothing more is taken.
    fn refuses(&self) -> Option<&Closed> {
        self.closed.as_ref().or(self.ended.as_ref())
    }

    fn has_work(&self) -> bool {
        self.stop
            || !self.ops.is_empty()
            || !self.frames.is_empty()
            || !self.close_segment.is_empty()
    }

    fn drop_gone(&mut self) {
        let before = self.ops.len();
        self.ops.retain(|op| !op.client.as_ref().is_some_and(|client| client.is_gone()));
        if self.ops.len() != before {
            self.ops_bytes = self.ops.iter().map(|op| op.bytes).sum();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake_if_idle(&self, queue: MutexGuard<'_, Queue>) {
        let idle = queue.idle;
        drop(queue);
        if idle {
            self.wake.notify_one();
        }
    }
}
