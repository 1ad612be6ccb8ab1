//! Answers that wait for the peer.
//!
//! Where a group is synchronous a write is answered only when the peer holds it durably too. The gate
//! keeps such answers, in the order of their frames, until the peer has acknowledged them. It refuses
//! to know why it is closed or open.
//!
//! Invariant: while the gate is closed, no answer passes before its frame is acknowledged.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use srn_core::ids::Seq;
use srn_nbd::proto::ErrorCode;
use srn_nbd::server::{Reply, ReplyBatch};

/// An answer and what it waits for.
#[derive(Debug)]
struct Held<T> {
    seq: Seq,
    since: Instant,
    answer: T,
}

#[derive(Debug)]
struct Waiting<T> {
    closed: bool,
    held: VecDeque<Held<T>>,
}

/// Holds answers back. `T` is an answer: a client's reply, or what a test takes for one.
#[derive(Debug)]
pub(super) struct Gate<T = Reply> {
    /// What [`Waiting::closed`] says, for those who need not lock to see that it is open.
    is_closed: AtomicBool,
    /// The last frame that the peer acknowledged.
    acked: AtomicU64,
    waiting: Mutex<Waiting<T>>,
}

impl<T> Default for Gate<T> {
    fn default() -> Self {
        Self {
            is_closed: AtomicBool::new(false),
            acked: AtomicU64::new(0),
            waiting: Mutex::new(Waiting { closed: false, held: VecDeque::new() }),
        }
    }
}

impl<T> Gate<T> {
    fn lock(&self) -> MutexGuard<'_, Waiting<T>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn is_closed(&self) -> bool {
        self.is_closed.load(Ordering::SeqCst)
    }

    /// An answer that is due when frame `seq` is safe: gives it back if that is now.
    pub(super) fn pass(&self, seq: Seq, answer: T) -> Option<T> {
        if !self.is_closed() {
            return Some(answer);
        }
        let mut waiting = self.lock();
        // Acknowledgements are written down before they look for answers under this lock.
        if !waiting.closed || seq.0 <= self.acked.load(Ordering::SeqCst) {
            return Some(answer);
        }
        waiting.held.push_back(Held { seq, since: Instant::now(), answer });
        None
    }

    /// The peer holds everything up to `seq`: gives the answers that waited for that.
    pub(super) fn acknowledged(&self, seq: Seq) -> Vec<T> {
        self.acked.fetch_max(seq.0, Ordering::SeqCst);
        if !self.is_closed() {
            return Vec::new();
        }
        let mut waiting = self.lock();
        let due = waiting.held.partition_point(|held| held.seq <= seq);
        waiting.held.drain(..due).map(|held| held.answer).collect()
    }

    /// The peer holds less than it had acknowledged.
    pub(super) fn set_back(&self, seq: Seq) {
        self.acked.store(seq.0, Ordering::SeqCst);
    }

    /// Closes it: answers wait from now on.
    pub(super) fn close(&self) {
        // Both under the lock: they must not part for good.
        let mut waiting = self.lock();
        waiting.closed = true;
        self.is_closed.store(true, Ordering::SeqCst);
    }

    /// Opens it: gives all answers that waited.
    pub(super) fn open(&self) -> Vec<T> {
        let mut waiting = self.lock();
        waiting.closed = false;
        self.is_closed.store(false, Ordering::SeqCst);
        waiting.held.drain(..).map(|held| held.answer).collect()
    }

    /// Gives all answers that wait, and stays as it is: they are to be refused.
    pub(super) fn give_up(&self) -> Vec<T> {
        self.lock().held.drain(..).map(|held| held.answer).collect()
    }

    /// How many answers wait, and for how long the oldest has.
    pub(super) fn held(&self) -> (usize, Duration) {
        let waiting = self.lock();
        let oldest = waiting.held.front().map_or(Duration::ZERO, |held| held.since.elapsed());
        (waiting.held.len(), oldest)
    }
}

/// Answers clients that their writes are safe.
pub(super) fn grant(answers: Vec<Reply>) {
    let mut replies = ReplyBatch::new();
    answers.into_iter().for_each(|reply| replies.ok(reply));
    replies.send();
}

/// Answers clients that nothing is known of their writes.
pub(super) fn refuse(answers: Vec<Reply>, code: ErrorCode, why: &str) {
    answers.into_iter().for_each(|reply| reply.error(code, why));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_open_gate_holds_nothing() {
        let gate = Gate::default();
        assert_eq!(gate.pass(Seq(9), "nine"), Some("nine"));
        assert_eq!(gate.held().0, 0);
    }

    #[test]
    fn answers_wait_for_their_own_frame() {
        let gate = Gate::default();
        gate.close();
        for (seq, answer) in [(1, "a"), (2, "b"), (2, "c"), (5, "d")] {
            assert_eq!(gate.pass(Seq(seq), answer), None);
        }
        assert_eq!(gate.acknowledged(Seq(0)), Vec::<&str>::new());
        assert_eq!(gate.acknowledged(Seq(2)), ["a", "b", "c"]);
        assert_eq!(gate.acknowledged(Seq(4)), Vec::<&str>::new());
        assert_eq!(gate.held().0, 1);
        assert_eq!(gate.open(), ["d"]);
        assert_eq!(gate.pass(Seq(6), "e"), Some("e"));
    }

    /// A quick peer: the frame was read from memory and acknowledged before its writer came here.
    #[test]
    fn an_acknowledgement_may_come_first() {
        let gate = Gate::default();
        gate.close();
        assert_eq!(gate.acknowledged(Seq(7)), Vec::<&str>::new());
        assert_eq!(gate.pass(Seq(7), "a"), Some("a"));
        assert_eq!(gate.pass(Seq(8), "b"), None);
        gate.open();
        gate.acknowledged(Seq(9));
        gate.close();
        assert_eq!(gate.pass(Seq(9), "c"), Some("c"), "it was heard while the gate was open");
        gate.set_back(Seq(3));
        assert_eq!(gate.pass(Seq(9), "d"), None, "what the peer lost is not safe");
        assert_eq!(gate.give_up(), ["d"]);
    }

    /// Whatever the threads do, every answer passes once, and none before its acknowledgement.
    #[test]
    fn nothing_is_lost_between_threads() {
        let gate = std::sync::Arc::new(Gate::default());
        gate.close();
        let (sent, acks) = std::sync::mpsc::channel::<u64>();
        let of_peer = gate.clone();
        let peer = std::thread::spawn(move || {
            let mut passed = Vec::new();
            for seq in acks {
                let due = of_peer.acknowledged(Seq(seq));
                assert!(due.iter().all(|answer| *answer <= seq));
                passed.extend(due);
            }
            passed
        });
        let mut passed: Vec<u64> = Vec::new();
        for seq in 1..20_000 {
            // The peer may have it before its writer gets here.
            sent.send(seq).unwrap();
            passed.extend(gate.pass(Seq(seq), seq));
        }
        drop(sent);
        passed.extend(peer.join().unwrap());
        passed.sort_unstable();
        assert_eq!(passed, (1..20_000).collect::<Vec<u64>>());
        assert_eq!(gate.held().0, 0);
    }
}
