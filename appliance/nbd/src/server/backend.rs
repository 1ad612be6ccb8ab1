//! What a server asks of those who have the disks: find an export, open it, answer requests.

use std::fmt;
use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;

use super::reply::Reply;
use crate::proto::{ExportInfo, ExportSummary, OpenError};

/// Finds exports. One backend serves all connections of a server.
pub trait Backend: Send + Sync + 'static {
    /// The exports this client may know of.
    fn list(&self, client: &ClientInfo) -> Vec<ExportSummary>;

    /// Describes an export without opening it. Must not block.
    ///
    /// # Errors
    /// [`OpenError`] as [`Backend::open`] would give it, as far as that can be told beforehand.
    fn describe(&self, name: &str, client: &ClientInfo) -> Result<ExportInfo, OpenError>;

    /// Opens an export for one connection. May take its time, for instance until the writes of a
    /// dead client are settled; the future is dropped when the client goes away meanwhile.
    ///
    /// # Errors
    /// [`OpenError`], which the client is told.
    fn open(
        &self,
        name: &str,
        client: &ClientInfo,
    ) -> impl Future<Output = Result<Arc<dyn Export>, OpenError>> + Send;
}

/// An export as one connection has it open.
pub trait Export: Send + Sync + 'static {
    /// What the client was told; asked once, right after opening.
    fn info(&self) -> ExportInfo;

    /// Takes a request, in the order of arrival. Never blocks: `reply` is completed now or later,
    /// here or on any thread. The range is within the export and on block boundaries.
    fn submit(&self, request: Request, reply: Reply);

    /// Everything that was at hand has been handed over; what comes next has to be waited for.
    /// Called after any number of [`Export::submit`], also after none. An export that gathers
    /// requests acts on them now; it may take as long as one small durable write here.
    fn gathered(&self) {}

    /// The connection is gone. Called exactly once, after the last [`Export::submit`], also when
    /// the client said goodbye in good order (then nothing is in flight any more). Requests in
    /// flight must never run after this returns; completing them is permitted and has no effect.
    fn closed(&self);
}

/// A request to an export; offsets and lengths are in bytes, lengths are not zero.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// Complete with [`Reply::data`].
    Read {
        /// First byte.
        offset: u64,
        /// Bytes.
        length: u32,
    },
    /// Complete with [`Reply::ok`].
    Write {
        /// First byte.
        offset: u64,
        /// What to write. From 64 KiB on its memory starts at a multiple of 4096, fit for
        /// O_DIRECT; shorter payloads share a large buffer with their neighbours.
        data: Bytes,
        /// Complete only when durable.
        fua: bool,
    },
    /// Complete with [`Reply::ok`].
    WriteZeroes {
        /// First byte.
        offset: u64,
        /// Bytes.
        length: u32,
        /// Keep the range allocated.
        no_hole: bool,
        /// Fail with `NotSupported` rather than be as slow as a write.
        fast: bool,
        /// Complete only when durable.
        fua: bool,
    },
    /// The content of the range may be forgotten. Complete with [`Reply::ok`].
    Trim {
        /// First byte.
        offset: u64,
        /// Bytes.
        length: u32,
        /// Complete only when durable.
        fua: bool,
    },
    /// Make every write durable that was answered before, on this connection and, if the export
    /// says `multi_conn`, on every other. Complete with [`Reply::ok`].
    Flush,
    /// A hint that the range will be read. Complete with [`Reply::ok`].
    Cache {
        /// First byte.
        offset: u64,
        /// Bytes.
        length: u32,
    },
    /// Complete with [`Reply::extents`].
    BlockStatus {
        /// First byte.
        offset: u64,
        /// Bytes.
        length: u32,
        /// Only the first extent is wanted.
        one: bool,
    },
}

/// Names a connection for as long as the process lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ConnectionId(u64);

impl ConnectionId {
    pub(super) fn next() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Self(NEXT.fetch_add(1, Ordering::Relaxed))
    }
}

impl fmt::Display for ConnectionId {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "#{}", self.0)
    }
}

/// Who is at the other end of a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Peer {
    /// A TCP client, by its address (an IPv4 address mapped into IPv6 is given as IPv4).
    Tcp(SocketAddr),
    /// A process on this machine, as the kernel vouches for it.
    Unix {
        /// Process id, if the kernel knows it.
        process: Option<i32>,
        /// User id.
        user: u32,
        /// Group id.
        group: u32,
    },
}

impl Peer {
    /// Whether both are the same client on two connections: the same host by TCP (whatever the
    /// ports), the same process by a unix socket.
    #[must_use]
    pub fn is_same_client(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Tcp(one), Self::Tcp(other)) => one.ip() == other.ip(),
            (Self::Unix { process: Some(_), .. }, Self::Unix { .. }) => self == other,
            _ => false,
        }
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => write!(formatter, "{address}"),
            Self::Unix { process: Some(process), user, .. } => {
                write!(formatter, "process {process} of user {user}")
            }
            Self::Unix { process: None, user, .. } => write!(formatter, "user {user}"),
        }
    }
}

/// A connection as a backend sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientInfo {
    /// The connection.
    pub connection: ConnectionId,
    /// Who is at its other end; see [`Peer::is_same_client`].
    pub peer: Peer,
    /// The name its certificate was issued for; only with TLS.
    pub name: Option<String>,
}

impl ClientInfo {
    /// Whether both are connections of the same client: see [`Peer::is_same_client`]; and their
    /// certificates are of the same name.
    #[must_use]
    pub fn is_same_client(&self, other: &Self) -> bool {
        self.peer.is_same_client(&other.peer) && self.name == other.name
    }
}

impl fmt::Display for ClientInfo {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.name {
            Some(name) => write!(formatter, "{name} at {} ({})", self.peer, self.connection),
            None => write!(formatter, "{} ({})", self.peer, self.connection),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clients_are_told_apart() {
        let tcp = |address: &str| Peer::Tcp(address.parse().unwrap());
        let unix = |process| Peer::Unix { process, user: 0, group: 0 };
        assert!(tcp("10.0.0.1:5").is_same_client(&tcp("10.0.0.1:6")));
        assert!(!tcp("10.0.0.1:5").is_same_client(&tcp("10.0.0.2:5")));
        assert!(unix(Some(7)).is_same_client(&unix(Some(7))));
        assert!(!unix(Some(7)).is_same_client(&unix(Some(8))));
        assert!(!unix(None).is_same_client(&unix(None)), "nobody knows");
        assert!(!unix(Some(7)).is_same_client(&tcp("10.0.0.1:5")));
    }
}
