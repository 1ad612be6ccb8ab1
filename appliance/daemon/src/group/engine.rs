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
//! * an operation is answered only after its commit has returned;
//! * operations of one client are appended in the order in which they were handed over;
//! * operations of a client that is gone are dropped if they are not appended yet, and never run
//!   later; [`Engine::settled`] tells a newcomer when that is certain.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use srn_core::epoch::Position;
use srn_nbd::proto::ErrorCode;
use srn_nbd::server::{Reply, ReplyBatch};
use srn_store::StoreError;
use srn_store::frame::Frame;
use srn_store::group::{Appender, Change, Committed};
use tokio::sync::{Notify, oneshot, watch};

use crate::clock;

/// Content in one commit, in bytes. Larger commits gain nothing and make others wait.
const COMMIT_BYTES_MAX: usize = 4 << 20;

/// Operations in one commit.
const COMMIT_OPS_MAX: usize = 4096;

/// Frames from a peer in one commit.
const COMMIT_FRAMES_MAX: usize = 64;

/// After this time without work an empty frame tells that the last commit was durable.
const IDLE: Duration = Duration::from_millis(50);

/// A full log is tried again at least this often.
const FULL_RETRY: Duration = Duration::from_millis(200);

/// The most operations, and bytes of content, that whoever brings them commits.
const INLINE_OPS: usize = 2;
const INLINE_BYTES: usize = 32 << 10;

/// Commits over which the mean of their operations is taken.
const MEAN_OF: usize = 16;

/// After a commit that took this long, the thread that is made for waiting does them all,
const SLOW: Duration = Duration::from_millis(2);

/// for so long.
const SLOW_REST: Duration = Duration::from_secs(1);

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

/// Commits. There is one.
struct Worker {
    appender: Appender,
    replies: ReplyBatch,
}

/// What to do next.
enum Work {
    Ops(Vec<Op>),
    Frames(Vec<(Arc<Frame>, u64)>, FrameStream),
    CloseSegment(Vec<oneshot::Sender<()>>),
    /// Nothing for a while.
    Idle,
    Stop,
}

impl Shared {
    fn worker(&self) -> MutexGuard<'_, Option<Worker>> {
        self.worker.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The thread.
    fn run(&self) -> Option<Appender> {
        loop {
            let work = self.next_work();
            let mut guard = self.worker();
            let worker = guard.as_mut()?;
            match work {
                Work::Ops(ops) => {
                    // A lone client's next write comes right after its answer, and is committed by
                    // whoever brings it if this thread is done by then.
                    let last = ops.len() <= INLINE_OPS;
                    worker.commit_ops(self, ops, last);
                    if last {
                        let mut replies = std::mem::take(&mut worker.replies);
                        drop(guard);
                        replies.send();
                    }
                }
                Work::Frames(frames, stream) => worker.commit_frames(self, frames, stream),
                Work::CloseSegment(asked) => {
                    worker.appender.close_segment();
                    for done in asked {
                        let _ = done.send(());
                    }
                }
                Work::Idle => worker.prove(self),
                Work::Stop => return guard.take().map(|worker| worker.appender),
            }
        }
    }

    /// Commits the little that waits, in the calling thread.
    fn commit_inline(&self) {
        // Held by the thread only while it commits, and then it takes what waits next.
        let Ok(mut guard) = self.worker.try_lock() else { return self.wake_if_idle(self.lock()) };
        let Some(worker) = guard.as_mut() else { return };
        let ops = {
            let mut queue = self.lock();
            queue.drop_gone();
            if queue.ops.is_empty() {
                return;
            }
            if !queue.is_at_rest() {
                return self.wake_if_idle(queue);
            }
            queue.committing = true;
            take_ops(&mut queue)
        };
        let began = Instant::now();
        worker.commit_ops(self, ops, false);
        drop(guard);
        let mut queue = self.lock();
        if began.elapsed() > SLOW {
            queue.slow_until = Some(Instant::now() + SLOW_REST);
        }
        // The thread takes what has come meanwhile, and sees to what is not proven.
        if queue.has_work() || !queue.watched {
            self.wake_if_idle(queue);
        }
    }

    /// Waits for work. When the log is full, room is waited for as well.
    fn next_work(&self) -> Work {
        let mut queue = self.lock();
        let mut wait_for_room = queue.full;
        queue.room = false;
        loop {
            if queue.stop && !queue.committing {
                return Work::Stop;
            }
            if !queue.committing {
                if !queue.close_segment.is_empty() {
                    return Work::CloseSegment(std::mem::take(&mut queue.close_segment));
                }
                queue.drop_gone();
                if !wait_for_room && !queue.ops.is_empty() {
                    queue.committing = true;
                    return Work::Ops(take_ops(&mut queue));
                }
                if !wait_for_room && !queue.frames.is_empty() {
                    queue.committing = true;
                    let count = queue.frames.len().min(COMMIT_FRAMES_MAX);
                    let frames = queue.frames.drain(..count).collect();
                    return Work::Frames(frames, queue.stream);
                }
            }
            let unproven = queue.unproven.filter(|_| !queue.full && queue.closed.is_none());
            let patience = match (wait_for_room, unproven) {
                (true, _) => Some(FULL_RETRY),
                (false, Some(since)) => Some(IDLE.saturating_sub(since.elapsed())),
                (false, None) => None,
            };
            if patience == Some(Duration::ZERO) && !queue.committing {
                queue.unproven = None;
                queue.committing = true;
                return Work::Idle;
            }
            queue.idle = true;
            queue.watched = patience.is_some();
            let mut timed_out = false;
            queue = match patience {
                None => self.wake.wait(queue).unwrap_or_else(PoisonError::into_inner),
                Some(patience) => {
                    // Never for no time at all: whoever commits now takes a moment.
                    let patience = patience.max(Duration::from_millis(1));
                    let waited = self.wake.wait_timeout(queue, patience);
                    let (queue, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
                    timed_out = timeout.timed_out();
                    queue
                }
            };
            queue.idle = false;
            if wait_for_room {
                // Newcomers do not make room.
                wait_for_room = !timed_out && !queue.room;
            }
        }
    }

    /// Puts back operations that found no room, in front, and tells who waits for the commit to end.
    fn commit_over(&self, ops: VecDeque<Op>) {
        let refused = {
            let mut queue = self.lock();
            queue.committing = false;
            match queue.closed.clone() {
                // Closed meanwhile: nobody will come back for them.
                Some(closed) => Some((ops, closed)),
                None => {
                    for op in ops.into_iter().rev() {
                        queue.ops_bytes += op.bytes;
                        queue.ops.push_front(op);
                    }
                    None
                }
            }
        };
        if let Some((ops, closed)) = refused {
            ops.into_iter().for_each(|op| refuse(op.done, &closed));
        }
        self.commits.fetch_add(1, Ordering::Relaxed);
        self.commit_ended.notify_waiters();
    }

    /// Puts back frames that found no room, in front. Those of a stream that was given up meanwhile
    /// come again in the next one.
    fn put_back(&self, frames: VecDeque<(Arc<Frame>, u64)>, stream: FrameStream) {
        let mut queue = self.lock();
        if queue.stream == stream && queue.closed.is_none() {
            frames.into_iter().rev().for_each(|frame| queue.frames.push_front(frame));
        }
    }

    fn set_full(&self, why: Option<&str>) {
        let was_full = std::mem::replace(&mut self.lock().full, why.is_some());
        if why.is_some() != was_full {
            self.watcher.full(why);
        }
    }

    fn fail(&self, error: &StoreError, waiting: impl Iterator<Item = Done>) {
        let closed = Closed(error.to_string());
        let queued = {
            let mut queue = self.lock();
            queue.closed = Some(closed.clone());
            queue.frames.clear();
            queue.ops_bytes = 0;
            std::mem::take(&mut queue.ops)
        };
        for done in waiting.chain(queued.into_iter().map(|op| op.done)) {
            match done {
                Done::Reply(reply) => reply.error(ErrorCode::Io, &closed.0),
                Done::Task(task) => {
                    let _ = task.send(Err(closed.clone()));
                }
            }
        }
        self.commit_over(VecDeque::new());
        self.watcher.failed(error);
    }
}

impl Worker {
    /// `later`: the answers stay in `self.replies`.
    fn commit_ops(&mut self, shared: &Shared, ops: Vec<Op>, later: bool) {
        let mut changes = Vec::with_capacity(ops.len());
        let mut waiting = Vec::with_capacity(ops.len());
        let count = ops.len();
        for op in ops {
            changes.extend(op.changes);
            waiting.push((changes.len(), op.client, op.bytes, op.done));
        }
        let result = self.appender.commit(&changes, clock::now());
        let (done, why) = match result {
            Ok(Committed { changes, full, .. }) => (changes, full),
            Err(StoreError::Full(why)) => (0, Some(why)),
            Err(error) => {
                return shared.fail(&error, waiting.into_iter().map(|(.., done)| done));
            }
        };
        let head = self.appender.head();
        let mut left = VecDeque::new();
        let mut from = 0;
        let mut content = 0u64;
        for (end, client, bytes, answer) in waiting {
            if end <= done {
                content += bytes as u64;
                match answer {
                    Done::Reply(reply) => self.replies.ok(reply),
                    Done::Task(task) => {
                        let _ = task.send(Ok(head));
                    }
                }
            } else {
                let rest = changes.get(from.max(done)..end).unwrap_or_default().to_vec();
                left.push_back(Op { client, changes: rest, bytes, done: answer });
            }
            from = end;
        }
        // Whoever waits is told first; the rest can come a moment later.
        if !later {
            self.replies.send();
        }
        if done > 0 {
            let mut queue = shared.lock();
            queue.unproven = Some(Instant::now());
            queue.mean_ops = queue.mean_ops - queue.mean_ops / MEAN_OF + count;
            drop(queue);
            shared.head.send_replace(head);
            shared.watcher.committed(head, content);
        }
        // Before anybody else looks at what is left.
        shared.set_full(why.as_deref());
        shared.commit_over(left);
    }

    fn commit_frames(
        &mut self,
        shared: &Shared,
        frames: Vec<(Arc<Frame>, u64)>,
        stream: FrameStream,
    ) {
        let only: Vec<Arc<Frame>> = frames.iter().map(|(frame, _)| frame.clone()).collect();
        let (done, why) = match self.appender.commit_frames(&only) {
            Ok(Committed { frames, full, .. }) => (frames, full),
            Err(StoreError::Full(why)) => (0, Some(why)),
            Err(error @ StoreError::NotNext { .. }) => {
                // Of a stream that was given up: the next one begins where it has to.
                let given_up = shared.lock().stream != stream;
                shared.commit_over(VecDeque::new());
                if !given_up {
                    shared.watcher.out_of_line(&error);
                }
                return;
            }
            Err(error) => return shared.fail(&error, std::iter::empty()),
        };
        let head = self.appender.head();
        let mut left: VecDeque<_> = frames.into();
        let bytes = left.drain(..done).map(|(_, bytes)| bytes).sum();
        if done > 0 {
            shared.head.send_replace(head);
            shared.watcher.received(head, bytes);
        }
        shared.set_full(why.as_deref());
        shared.put_back(left, stream);
        shared.commit_over(VecDeque::new());
    }

    /// Says in the log that everything before was durable.
    fn prove(&mut self, shared: &Shared) {
        let result = self.appender.commit(&[], clock::now());
        match result {
            Ok(done) => {
                shared.head.send_replace(done.head);
                shared.watcher.committed(done.head, 0);
                shared.commit_over(VecDeque::new());
            }
            Err(StoreError::Full(_)) => shared.commit_over(VecDeque::new()),
            Err(error) => shared.fail(&error, std::iter::empty()),
        }
    }
}

fn take_ops(queue: &mut Queue) -> Vec<Op> {
    let mut taken = Vec::new();
    let mut bytes = 0;
    while let Some(op) = queue.ops.front() {
        let over = bytes + op.bytes > COMMIT_BYTES_MAX || taken.len() >= COMMIT_OPS_MAX;
        if over && !taken.is_empty() {
            break;
        }
        bytes += op.bytes;
        queue.ops_bytes -= op.bytes.min(queue.ops_bytes);
        taken.extend(queue.ops.pop_front());
    }
    taken
}
