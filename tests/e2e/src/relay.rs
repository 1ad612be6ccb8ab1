//! A line between two nodes that is as bad as it is told to be: a relay for UDP. One node dials it,
//! which is all that either of them knows of the way. What it does is decided by its seed, and by
//! when packets come.
//!
//! It has threads of its own, so that it keeps time whatever the runtime of the test does.

pub mod line;

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::net::sockopt;

use crate::Chance;
use line::{Counts, Line, Shape};

/// A free port on the loopback.
const ANY: (Ipv4Addr, u16) = (Ipv4Addr::LOCALHOST, 0);

/// The largest datagram.
const DATAGRAM: usize = 1 << 16;

/// Headers of UDP and IPv4.
const HEADERS: usize = 28;

/// Kernel buffers of the relay's sockets: it is to lose what it is told to, and little else.
const SOCKET_BUFFER: usize = 4 << 20;

/// How long a thread waits before it looks whether it is still wanted.
const PATIENCE: Duration = Duration::from_millis(50);

/// Something on its way: when it arrives, in which order it came, what it is.
type OnItsWay = Reverse<(Duration, u64, Vec<u8>)>;

/// Packets on their way in one direction: one thread puts them in, another takes them out.
#[derive(Debug)]
pub struct Way {
    line: Mutex<Line>,
    queue: Mutex<BinaryHeap<OnItsWay>>,
    more: Condvar,
}

impl Way {
    /// A clear line.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        let line = Mutex::new(Line::new(Shape::CLEAR, seed));
        Self { line, queue: Mutex::default(), more: Condvar::new() }
    }

    /// From now on the line is like this.
    pub fn shape(&self, shape: Shape) {
        lock(&self.line).set(shape);
    }

    /// What has passed.
    #[must_use]
    pub fn counts(&self) -> Counts {
        lock(&self.line).counts()
    }

    /// Takes a packet, the number of which tells it from others of the same time, and which has
    /// headers of so many bytes more on a line.
    pub fn take(&self, now: Duration, number: u64, bytes: &[u8], headers: usize) {
        let fate = lock(&self.line).fate(now, bytes.len() + headers);
        if let Some(due) = fate {
            lock(&self.queue).push(Reverse((due, number, bytes.to_vec())));
            self.more.notify_one();
        }
    }

    /// The next packet that is due by a clock that began then; none when there was none for some
    /// time.
    #[must_use]
    pub fn give(&self, began: Instant) -> Option<Vec<u8>> {
        let deadline = Instant::now() + PATIENCE;
        let mut queue = lock(&self.queue);
        loop {
            let now = began.elapsed();
            let due = queue.peek().map(|Reverse((due, ..))| *due);
            if due.is_some_and(|due| due <= now) {
                return queue.pop().map(|Reverse((.., bytes))| bytes);
            }
            let rest = deadline.checked_duration_since(Instant::now())?;
            let wait = due.map_or(rest, |due| (due - now).min(rest));
            let waited = self.more.wait_timeout(queue, wait);
            queue = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What the threads share.
#[derive(Debug)]
struct Shared {
    began: Instant,
    /// Towards the node that dials.
    front: UdpSocket,
    /// Towards the node that is dialled.
    upstream: Mutex<Arc<UdpSocket>>,
    target: SocketAddr,
    /// Where the node that dials was heard last.
    dialler: Mutex<Option<SocketAddr>>,
    there: Way,
    back: Way,
    /// The line is cut when so many bytes have passed from the node that dials.
    cut_at: Mutex<u64>,
    stop: AtomicBool,
}

impl Shared {
    fn stopped(&self) -> bool {
        self.stop.load(Ordering::SeqCst)
    }

    fn cut(&self, there: bool, back: bool) {
        lock(&self.there.line).cut(there);
        lock(&self.back.line).cut(back);
    }

    fn upstream(&self) -> Arc<UdpSocket> {
        lock(&self.upstream).clone()
    }

    fn read_front(&self) {
        let mut buffer = vec![0; DATAGRAM];
        let mut number = 0;
        while !self.stopped() {
            // An error tells of an earlier datagram that nobody took, or that none comes.
            let Ok((length, from)) = self.front.recv_from(&mut buffer) else { continue };
            *lock(&self.dialler) = Some(from);
            number += 1;
            self.there.take(self.began.elapsed(), number, &buffer[..length], HEADERS);
            let passed = lock(&self.there.line).counts().bytes;
            if passed >= *lock(&self.cut_at) {
                self.cut(true, true);
            }
        }
    }

    fn write_upstream(&self) {
        while !self.stopped() {
            if let Some(bytes) = self.there.give(self.began) {
                let _ = self.upstream().send_to(&bytes, self.target);
            }
        }
    }

    fn read_upstream(&self) {
        let mut buffer = vec![0; DATAGRAM];
        let mut number = 0;
        while !self.stopped() {
            let Ok((length, _)) = self.upstream().recv_from(&mut buffer) else { continue };
            number += 1;
            self.back.take(self.began.elapsed(), number, &buffer[..length], HEADERS);
        }
    }

    fn write_front(&self) {
        while !self.stopped() {
            let to = *lock(&self.dialler);
            if let (Some(bytes), Some(to)) = (self.back.give(self.began), to) {
                let _ = self.front.send_to(&bytes, to);
            }
        }
    }
}

/// A relay between the node that dials and the one that is dialled.
#[derive(Debug)]
pub struct Relay {
    shared: Arc<Shared>,
}

fn socket() -> UdpSocket {
    let socket = UdpSocket::bind(ANY).expect("a UDP port");
    // As much as the system allows.
    if sockopt::set_socket_recv_buffer_size_force(&socket, SOCKET_BUFFER).is_err() {
        let _ = sockopt::set_socket_recv_buffer_size(&socket, SOCKET_BUFFER);
    }
    let _ = sockopt::set_socket_send_buffer_size(&socket, SOCKET_BUFFER);
    socket.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    socket
}

impl Relay {
    /// A clear line to `target`.
    ///
    /// # Panics
    /// When there are no ports or threads.
    #[must_use]
    pub fn start(target: SocketAddr, seed: u64) -> Self {
        let mut chance = Chance::new(seed);
        let shared = Arc::new(Shared {
            began: Instant::now(),
            front: socket(),
            upstream: Mutex::new(Arc::new(socket())),
            target,
            dialler: Mutex::default(),
            there: Way::new(chance.next()),
            back: Way::new(chance.next()),
            cut_at: Mutex::new(u64::MAX),
            stop: AtomicBool::new(false),
        });
        let work: [fn(&Shared); 4] = [
            Shared::read_front,
            Shared::write_upstream,
            Shared::read_upstream,
            Shared::write_front,
        ];
        for work in work {
            let shared = shared.clone();
            let thread = std::thread::Builder::new().name("relay".into());
            let _detached = thread.spawn(move || work(&shared)).expect("a thread");
        }
        Self { shared }
    }

    /// What to dial.
    ///
    /// # Panics
    /// When the socket is gone.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.shared.front.local_addr().expect("an address")
    }

    /// From now on the line is like this in both directions.
    pub fn shape(&self, shape: Shape) {
        self.shape_each(|_| shape);
    }

    fn shape_each(&self, shape: impl Fn(Shape) -> Shape) {
        for way in [&self.shared.there, &self.shared.back] {
            let mut line = lock(&way.line);
            let now = line.shape();
            line.set(shape(now));
        }
    }

    /// What has passed from the node that dials, and to it.
    #[must_use]
    pub fn counts(&self) -> (Counts, Counts) {
        (self.shared.there.counts(), self.shared.back.counts())
    }

    /// Cuts the line in these directions.
    pub fn cut(&self, there: bool, back: bool) {
        self.shared.cut(there, back);
    }

    /// Cuts the line when `bytes` more have passed from the node that dials.
    pub fn cut_after(&self, bytes: u64) {
        let passed = lock(&self.shared.there.line).counts().bytes;
        *lock(&self.shared.cut_at) = passed + bytes;
    }

    /// Whether nothing passes from the node that dials.
    #[must_use]
    pub fn is_cut(&self) -> bool {
        lock(&self.shared.there.line).shape().cut
    }

    /// Loses so many datagrams of a thousand, and delays each by up to `delay`.
    pub fn disturb(&self, loss: u64, delay: Duration) {
        self.shape_each(|now| Shape { loss: 10 * loss, jitter: delay, ..now });
    }

    /// A clear line again.
    pub fn restore(&self) {
        *lock(&self.shared.cut_at) = u64::MAX;
        self.shape(Shape::CLEAR);
    }

    /// From now on comes from another port, as behind a router that has forgotten.
    pub fn rebind(&self) {
        *lock(&self.shared.upstream) = Arc::new(socket());
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
    }
}
