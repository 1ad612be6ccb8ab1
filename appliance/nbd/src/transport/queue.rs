//! Bytes waiting to be sent, in order: small ones copied together, large ones by reference.

use std::collections::VecDeque;
use std::io::{self, IoSlice};

use bytes::{Buf, Bytes};

use super::socket::WriteHalf;

/// Slices of one system call; the kernel takes up to 1024, past a few dozen nothing is gained.
const SLICES: usize = 64;

/// Data up to this many bytes is copied beside the headers: cheaper than a slice of its own.
const COPY_MAX: usize = 1024;

/// Memory an empty queue keeps for the next replies, in bytes.
const KEPT_BYTES: usize = 64 << 10;

#[derive(Debug)]
enum Piece<T> {
    /// The next bytes of the arena.
    Copied(usize),
    Shared(Bytes),
    Token(T),
}

/// A queue of bytes to send. `T` is a token that comes back when all bytes before it were sent.
#[derive(Debug)]
pub(crate) struct Queue<T> {
    arena: Vec<u8>,
    /// How much of the arena was sent.
    arena_sent: usize,
    pieces: VecDeque<Piece<T>>,
}

/// How a try to send ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sent {
    All,
    /// The socket takes no more now.
    Some,
}

impl<T> Default for Queue<T> {
    fn default() -> Self {
        Self { arena: Vec::new(), arena_sent: 0, pieces: VecDeque::new() }
    }
}

impl<T> Queue<T> {
    pub(crate) fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// Copied bytes not yet sent.
    pub(crate) fn copied_bytes(&self) -> usize {
        self.arena.len() - self.arena_sent
    }

    /// Appends what `write` writes.
    pub(crate) fn put(&mut self, write: impl FnOnce(&mut Vec<u8>)) {
        let before = self.arena.len();
        write(&mut self.arena);
        let added = self.arena.len() - before;
        match self.pieces.back_mut() {
            Some(Piece::Copied(length)) => *length += added,
            _ => self.pieces.push_back(Piece::Copied(added)),
        }
    }

    pub(crate) fn put_data(&mut self, data: Bytes) {
        if data.len() <= COPY_MAX {
            self.put(|arena| arena.extend_from_slice(&data));
        } else {
            self.pieces.push_back(Piece::Shared(data));
        }
    }

    pub(crate) fn put_token(&mut self, token: T) {
        self.pieces.push_back(Piece::Token(token));
    }

    /// Sends until the queue is empty or the socket full; `done` gets the tokens passed.
    pub(crate) fn send(&mut self, socket: &WriteHalf, mut done: impl FnMut(T)) -> io::Result<Sent> {
        loop {
            self.take_tokens(&mut done);
            if self.pieces.is_empty() {
                self.recycle();
                // What is encrypted and not yet taken counts as unsent.
                return Ok(if socket.try_flush()? { Sent::All } else { Sent::Some });
            }
            let (offered, sent) = self.send_once(socket)?;
            match sent {
                None => return Ok(Sent::Some),
                Some(0) => return Err(io::ErrorKind::WriteZero.into()),
                Some(count) => {
                    self.consume(count, &mut done);
                    if count < offered {
                        return Ok(Sent::Some);
                    }
                }
            }
        }
    }

    /// How many bytes were offered, and how many of them the socket took.
    fn send_once(&self, socket: &WriteHalf) -> io::Result<(usize, Option<usize>)> {
        let mut slices = [IoSlice::new(&[]); SLICES];
        let (mut used, mut offered) = (0, 0);
        let mut arena = self.arena.get(self.arena_sent..).unwrap_or_default();
        for piece in &self.pieces {
            let slice = match piece {
                Piece::Copied(length) => match arena.split_at_checked(*length) {
                    Some((now, later)) => {
                        arena = later;
                        now
                    }
                    None => arena,
                },
                Piece::Shared(data) => data,
                Piece::Token(_) => continue,
            };
            let Some(place) = slices.get_mut(used) else { break };
            *place = IoSlice::new(slice);
            used += 1;
            offered += slice.len();
        }
        Ok((offered, socket.try_write(slices.get(..used).unwrap_or_default())?))
    }

    fn consume(&mut self, mut count: usize, done: &mut impl FnMut(T)) {
        while count > 0 {
            match self.pieces.front_mut() {
                Some(Piece::Copied(length)) => {
                    let now = count.min(*length);
                    *length -= now;
                    count -= now;
                    self.arena_sent += now;
                    if *length > 0 {
                        return;
                    }
                }
                Some(Piece::Shared(data)) => {
                    let now = count.min(data.len());
                    data.advance(now);
                    count -= now;
                    if !data.is_empty() {
                        return;
                    }
                }
                Some(Piece::Token(_)) => {}
                None => return,
            }
            if let Some(Piece::Token(token)) = self.pieces.pop_front() {
                done(token);
            }
        }
    }

    /// Hands back the tokens nothing waits before, and drops pieces of no bytes.
    fn take_tokens(&mut self, done: &mut impl FnMut(T)) {
        while let Some(piece) = self.pieces.front() {
            match piece {
                Piece::Copied(0) => drop(self.pieces.pop_front()),
                Piece::Token(_) => {
                    if let Some(Piece::Token(token)) = self.pieces.pop_front() {
                        done(token);
                    }
                }
                Piece::Copied(_) | Piece::Shared(_) => return,
            }
        }
    }

    fn recycle(&mut self) {
        self.arena.clear();
        self.arena_sent = 0;
        if self.arena.capacity() > KEPT_BYTES {
            self.arena.shrink_to(KEPT_BYTES);
        }
    }
}
