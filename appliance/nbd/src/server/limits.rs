//! Every bound a server keeps, with its default and the reason for it.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Semaphore;

use crate::proto::HandshakeLimits;

/// The bounds of a server. All apply to each connection, except `connections` and `pool_bytes`.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Connections at one time; more are closed at once. A thousand: hundreds of disks with a few
    /// connections each.
    pub connections: usize,
    /// Time for the whole handshake, not counting what the backend takes to open the export. Ten
    /// seconds, as QEMU gives.
    pub handshake: Duration,
    /// Options of one handshake.
    pub options: HandshakeLimits,
    /// Requests in flight; at the cap no more are read.
    pub requests: usize,
    /// Bytes of payload in flight: of writes until they are answered, of reads and block status
    /// until the reply was sent. One request beyond it is permitted while nothing else is in
    /// flight.
    pub payload_bytes: usize,
    /// Payload of a write that is refused but still consumed, to answer it; the connection of one
    /// that sends more is dropped. The protocol asks for at least 32 MiB.
    pub discard_bytes: usize,
    /// A peer that takes no replies, or stops in the middle of a payload, is dropped after this.
    /// Long, because a paused virtual machine is no enemy.
    pub stall: Duration,
    /// The slowest a payload from 64 KiB on may arrive without being dropped, in bytes per second
    /// beyond the `stall`: it holds memory meanwhile.
    pub slowest_payload: u32,
    /// A TCP peer that vanished without a word is noticed within about this time. As long as
    /// `stall`, for the same reason; one that comes back earlier is for the backend to recognise
    /// (see `Peer::is_same_client` and `Server::disconnect`).
    pub dead_peer: Duration,
    /// Unused payload buffers kept for the next payload, in bytes, for the whole server.
    pub pool_bytes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 1024,
            handshake: Duration::from_secs(10),
            options: HandshakeLimits::default(),
            requests: 256,
            payload_bytes: 32 << 20,
            discard_bytes: 64 << 20,
            stall: Duration::from_secs(300),
            slowest_payload: 256 << 10,
            dead_peer: Duration::from_secs(300),
            pool_bytes: 64 << 20,
        }
    }
}

/// The payload bytes all connections may have in flight together; clones share it, and several
/// servers may.
///
/// A connection with nothing in flight may always take a small payload (up to
/// [`PayloadBudget::ALWAYS`]) past the budget, so that nobody who sits on the whole budget stops
/// the others.
#[derive(Debug, Clone)]
pub struct PayloadBudget {
    pub(super) bytes: Arc<Semaphore>,
    pub(super) total: usize,
}

impl PayloadBudget {
    /// The payload a connection with nothing in flight may always take, in bytes.
    pub const ALWAYS: usize = 256 << 10;

    /// A budget of `bytes`.
    #[must_use]
    pub fn new(bytes: usize) -> Self {
        let total = bytes.min(Semaphore::MAX_PERMITS).min(u32::MAX as usize);
        Self { bytes: Arc::new(Semaphore::new(total)), total }
    }

    /// Bytes nobody uses now.
    #[must_use]
    pub fn available(&self) -> usize {
        self.bytes.available_permits()
    }
}

impl Default for PayloadBudget {
    /// 256 MiB.
    fn default() -> Self {
        Self::new(256 << 20)
    }
}
