//! The work itself: what waits is taken, committed and answered, by the thread or by whoever brought
//! it. It refuses to know who may hand anything over.

use std::collections::VecDeque;
use std::sync::atomic::Ordering;
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use srn_nbd::proto::ErrorCode;
use srn_nbd::server::ReplyBatch;
use srn_store::StoreError;
use srn_store::frame::Frame;
use srn_store::group::{Appender, Committed};
use tokio::sync::oneshot;

use super::{Closed, Done, FrameStream, INLINE_OPS, MEAN_OF, Op, Queue, Shared, refuse};
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

/// After a commit that took this long, the thread that is made for waiting does them all,
const SLOW: Duration = Duration::from_millis(2);

/// for so long.
const SLOW_REST: Duration = Duration::from_secs(1);

/// Commits. There is one.
pub(super) struct Worker {
    pub(super) appender: Appender,
    pub(super) replies: ReplyBatch,
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
    pub(super) fn run(&self) -> Option<Appender> {
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
    pub(super) fn commit_inline(&self) {
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
            // What was in the commit waits for an acknowledgement that may never come.
            let held = self.gate.give_up();
            super::gate::refuse(held, ErrorCode::ShuttingDown, &closed.0);
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
        // What is durable here and not at the peer: nobody is told that it is safe.
        super::gate::refuse(self.gate.give_up(), ErrorCode::Io, &closed.0);
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
        // What they brought may all have been in the log already: then they are only answered.
        let nothing = changes.is_empty();
        let result = (!nothing).then(|| self.appender.commit(&changes, clock::now()));
        let (done, why) = match result {
            None => (0, None),
            Some(Ok(Committed { changes, full, .. })) => (changes, full),
            Some(Err(StoreError::Full(why))) => (0, Some(why)),
            Some(Err(error)) => {
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
                    Done::Reply(reply) => {
                        if let Some(reply) = shared.gate.pass(head.seq, reply) {
                            self.replies.ok(reply);
                        }
                    }
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
        if !nothing {
            shared.set_full(why.as_deref());
        }
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
