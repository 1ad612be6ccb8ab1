//! The one way out of a connection: any thread may put bytes in, one at a time sends them.
//!
//! Who puts a reply in and finds nobody sending, sends it at once from its own thread without
//! blocking; what others put in meanwhile leaves in the same or the next system call. What the
//! socket does not take is left to [`Outbox::drain`], which the connection's task runs. So a lone
//! reply needs no thread hop, many replies share system calls, and two senders never interleave.
//!
//! ```text
//!           put + send          socket full                       queue empty
//!   Idle  -------------> Sending -----------> HandedOver (drain) -------------> Idle
//!     ^                     |  queue empty
//!     +---------------------+
//! ```
//! Corked (by the task that is about to put in more) nothing is sent until it is uncorked.

use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;

use super::queue::{Queue, Sent};
use super::socket::WriteHalf;

/// After so many rounds a thread that sends for others leaves the rest to the connection's task.
const ROUNDS_MAX: usize = 4;

#[derive(Debug)]
pub(crate) struct Outbox<T> {
    socket: WriteHalf,
    state: Mutex<State<T>>,
    /// Wakes `drain`.
    handover: Notify,
    /// Wakes `idle`.
    emptied: Notify,
}

#[derive(Debug)]
struct State<T> {
    /// What nobody sends yet.
    pending: Queue<T>,
    /// What was handed over, before all of `pending`.
    left_over: Queue<T>,
    /// Memory for the next sender.
    spare: Queue<T>,
    phase: Phase,
    corked: bool,
    closed: bool,
    /// Somebody waits in `idle`.
    watched: bool,
    failure: Option<io::Error>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Idle,
    Sending,
    HandedOver,
}

impl<T> Outbox<T> {
    pub(crate) fn new(socket: WriteHalf) -> Self {
        let state = State {
            pending: Queue::default(),
            left_over: Queue::default(),
            spare: Queue::default(),
            phase: Phase::Idle,
            corked: false,
            closed: false,
            watched: false,
            failure: None,
        };
        Self { socket, state: Mutex::new(state), handover: Notify::new(), emptied: Notify::new() }
    }

    /// Puts bytes in without sending them. Whether [`Outbox::send`] is needed.
    pub(crate) fn put(&self, write: impl FnOnce(&mut Queue<T>)) -> bool {
        let mut state = self.lock();
        if state.closed {
            return false;
        }
        write(&mut state.pending);
        state.phase == Phase::Idle && !state.corked
    }

    /// Sends what is there, unless somebody else does or will; `done` gets the tokens passed.
    pub(crate) fn send(&self, done: impl FnMut(T)) {
        self.send_locked(self.lock(), done);
    }

    /// From now on nothing is sent until [`Outbox::uncork`]. Returns how many bytes of small
    /// replies wait for a slow socket; shared data has bounds of its own.
    pub(crate) fn cork(&self) -> usize {
        let mut state = self.lock();
        state.corked = true;
        state.left_over.copied_bytes() + state.pending.copied_bytes()
    }

    pub(crate) fn uncork(&self, done: impl FnMut(T)) {
        let mut state = self.lock();
        state.corked = false;
        self.send_locked(state, done);
    }

    fn send_locked<'a>(&'a self, mut state: MutexGuard<'a, State<T>>, mut done: impl FnMut(T)) {
        if state.phase != Phase::Idle || state.corked || state.closed || state.pending.is_empty() {
            return;
        }
        state.phase = Phase::Sending;
        let mut queue = std::mem::take(&mut state.spare);
        for _ in 0..ROUNDS_MAX {
            std::mem::swap(&mut queue, &mut state.pending);
            drop(state);
            let outcome = queue.send(&self.socket, &mut done);
            state = self.lock();
            if state.closed {
                // What the queue holds must not live as long as the last late reply.
                drop(state);
                return;
            }
            match outcome {
                Ok(Sent::All) if state.pending.is_empty() || state.corked => {
                    state.spare = queue;
                    self.become_idle(state);
                    return;
                }
                Ok(Sent::All) => {}
                Ok(Sent::Some) => break,
                Err(error) => {
                    state.failure = Some(error);
                    break;
                }
            }
        }
        state.left_over = queue;
        state.phase = Phase::HandedOver;
        drop(state);
        self.handover.notify_one();
    }

    fn become_idle(&self, mut state: MutexGuard<'_, State<T>>) {
        state.phase = Phase::Idle;
        let watched = std::mem::take(&mut state.watched);
        drop(state);
        if watched {
            self.emptied.notify_waiters();
        }
    }

    /// Sends what is handed over, for ever. Ends when the socket fails, or has taken nothing for
    /// `stall`. May be dropped only together with the connection.
    pub(crate) async fn drain(&self, stall: Duration, mut done: impl FnMut(T)) -> io::Error {
        loop {
            self.handover.notified().await;
            let mut queue = {
                let mut state = self.lock();
                if let Some(failure) = state.failure.take() {
                    return failure;
                }
                if state.phase != Phase::HandedOver {
                    continue;
                }
                std::mem::take(&mut state.left_over)
            };
            loop {
                match queue.send(&self.socket, &mut done) {
                    Ok(Sent::All) => {
                        let mut state = self.lock();
                        if state.pending.is_empty() {
                            state.spare = queue;
                            self.become_idle(state);
                            break;
                        }
                        std::mem::swap(&mut queue, &mut state.pending);
                    }
                    Ok(Sent::Some) => {
                        // Whoever asks how much is unsent must count this too.
                        self.lock().left_over = queue;
                        match tokio::time::timeout(stall, self.socket.writable()).await {
                            Ok(Ok(())) => {}
                            Ok(Err(error)) => return error,
                            Err(_) => return io::ErrorKind::TimedOut.into(),
                        }
                        queue = std::mem::take(&mut self.lock().left_over);
                    }
                    Err(error) => return error,
                }
            }
        }
    }

    /// Resolves when everything was sent, or never will be.
    pub(crate) async fn idle(&self) {
        loop {
            let mut emptied = std::pin::pin!(self.emptied.notified());
            emptied.as_mut().enable();
            {
                let mut state = self.lock();
                if state.closed || state.phase == Phase::Idle && state.pending.is_empty() {
                    return;
                }
                state.watched = true;
            }
            emptied.await;
        }
    }

    /// Drops what is unsent and all that is yet to come, and shuts the socket.
    pub(crate) fn close(&self) {
        let mut state = self.lock();
        state.closed = true;
        let dropped = (std::mem::take(&mut state.pending), std::mem::take(&mut state.left_over));
        drop(state);
        drop(dropped);
        self.emptied.notify_waiters();
        self.socket.shutdown();
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.lock().closed
    }

    fn lock(&self) -> MutexGuard<'_, State<T>> {
        // Nothing in a critical section can panic half way; a poisoned lock is still sound.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use bytes::Bytes;
    use tokio::io::AsyncReadExt;
    use tokio::net::UnixStream;

    use super::*;

    const STALL: Duration = Duration::from_secs(20);

    async fn outbox() -> (Outbox<u32>, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.writable().await.unwrap();
        let (_, write_half) = super::super::Stream::Unix(ours).into_split();
        (Outbox::new(write_half), theirs)
    }

    fn text(outbox: &Outbox<u32>, text: &str, token: u32) -> bool {
        outbox.put(|queue| {
            queue.put(|arena| arena.extend_from_slice(text.as_bytes()));
            queue.put_token(token);
        })
    }

    async fn received(stream: &mut UnixStream, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        let read = tokio::time::timeout(STALL, stream.read_exact(&mut bytes)).await;
        read.expect("nothing comes").unwrap();
        bytes
    }

    #[tokio::test]
    async fn what_is_put_in_while_somebody_sends_is_sent_by_him() {
        let (outbox, mut peer) = outbox().await;
        assert!(text(&outbox, "one", 1));
        assert!(text(&outbox, "two", 2));
        let mut tokens = Vec::new();
        outbox.send(|token| {
            tokens.push(token);
            if token == 2 {
                assert!(!text(&outbox, "three", 3), "somebody sends already");
                outbox.send(|token| panic!("{token} was sent by another"));
            }
        });
        assert_eq!(tokens, [1, 2, 3]);
        assert_eq!(received(&mut peer, 11).await, b"onetwothree");
        assert!(text(&outbox, "four", 4), "nobody sends any more");
    }

    #[tokio::test]
    async fn nothing_is_sent_while_corked() {
        let (outbox, mut peer) = outbox().await;
        assert_eq!(outbox.cork(), 0);
        assert!(!text(&outbox, "one", 1));
        outbox.send(|token| panic!("{token} was sent"));
        assert_eq!(outbox.cork(), 3, "bytes that wait");
        outbox.uncork(|token| assert_eq!(token, 1));
        assert_eq!(received(&mut peer, 3).await, b"one");
        // Corked in the middle of sending: what is new waits for the end of that.
        assert!(text(&outbox, "two", 2));
        outbox.send(|token| {
            assert_eq!(token, 2);
            outbox.cork();
            text(&outbox, "three", 3);
        });
        assert_eq!(received(&mut peer, 3).await, b"two");
        let sent = Cell::new(0);
        outbox.uncork(|token| sent.set(token));
        assert_eq!(sent.get(), 3);
        assert_eq!(received(&mut peer, 5).await, b"three");
    }

    #[tokio::test]
    async fn what_the_socket_does_not_take_is_drained_in_order() {
        let (outbox, mut peer) = outbox().await;
        let passed = Cell::new(0);
        let data = |index: u32| Bytes::from(vec![index as u8; 100_000]);
        let put = |index: u32| {
            let needs_send = outbox.put(|queue| {
                queue.put(|arena| arena.extend_from_slice(&index.to_be_bytes()));
                queue.put_data(data(index));
                queue.put_token(index);
            });
            if needs_send {
                outbox.send(|token| passed.set(passed.get().max(token)));
            }
        };
        (1..=40).for_each(put);
        assert!(passed.get() < 40, "a socket does not hold as much");
        let drain = outbox.drain(STALL, |token| {
            assert_eq!(token, passed.get() + 1, "in order");
            passed.set(token);
        });
        let receive = async {
            for index in 1..=80u32 {
                assert_eq!(received(&mut peer, 4).await, index.to_be_bytes());
                assert_eq!(received(&mut peer, 100_000).await, data(index));
                put(index + 40);
            }
            for index in 81..=120u32 {
                assert_eq!(received(&mut peer, 4).await, index.to_be_bytes());
                assert_eq!(received(&mut peer, 100_000).await, data(index));
            }
            outbox.idle().await;
        };
        tokio::select! {
            error = drain => panic!("{error}"),
            () = receive => {}
        }
        assert_eq!(passed.get(), 120);
    }

    #[tokio::test]
    async fn a_peer_that_takes_nothing_stalls() {
        let (outbox, _peer) = outbox().await;
        outbox.put(|queue| queue.put_data(Bytes::from(vec![1; 4 << 20])));
        outbox.send(drop);
        let error = outbox.drain(Duration::from_millis(50), drop).await;
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }

    #[tokio::test]
    async fn a_failure_is_told_and_ends_it() {
        let (outbox, peer) = outbox().await;
        drop(peer);
        text(&outbox, "one", 1);
        outbox.send(|token| panic!("{token} was sent"));
        let error = tokio::time::timeout(STALL, outbox.drain(STALL, drop)).await.unwrap();
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
        outbox.close();
        assert!(!text(&outbox, "two", 2));
        tokio::time::timeout(STALL, outbox.idle()).await.unwrap();
    }

    /// Tokens of what is not sent are dropped with the connection, wherever they are.
    #[tokio::test]
    async fn closing_gives_tokens_up() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        ours.writable().await.unwrap();
        let (_, write_half) = super::super::Stream::Unix(ours).into_split();
        let outbox = Outbox::new(write_half);
        let token = std::sync::Arc::new(());
        let put = |length| {
            outbox.put(|queue: &mut Queue<std::sync::Arc<()>>| {
                queue.put_data(Bytes::from(vec![1; length]));
                queue.put_token(token.clone());
            })
        };
        assert!(put(8 << 20));
        outbox.send(drop);
        assert!(!put(10), "handed over");
        assert_eq!(std::sync::Arc::strong_count(&token), 3);
        outbox.close();
        assert_eq!(std::sync::Arc::strong_count(&token), 1);
    }

    #[tokio::test]
    async fn closing_while_somebody_sends_gives_tokens_up() {
        let (outbox, _peer) = outbox().await;
        text(&outbox, "one", 1);
        outbox.put(|queue| queue.put_data(Bytes::from(vec![1; 8 << 20])));
        text(&outbox, "two", 2);
        // The first token comes back when its bytes and much of the rest were taken.
        outbox.send(|token| {
            assert_eq!(token, 1);
            outbox.close();
        });
        let state = outbox.lock();
        assert!(state.left_over.is_empty() && state.pending.is_empty());
    }
}
