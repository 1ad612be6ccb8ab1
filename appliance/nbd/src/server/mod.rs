//! The tokio server.
//!
//! A [`Server`] joins [`Listener`]s to a [`Backend`]. Each connection is one task that reads; its
//! replies are sent by whoever completes them ([`Reply`], [`ReplyBatch`]), on any thread.
//!
//! It does not know what an export is made of, nor who may have which: the backend decides, and
//! learns of every connection who it is ([`ClientInfo`]) and when it is gone ([`Export::closed`]).

mod backend;
mod brisk;
mod connection;
mod flow;
mod limits;
mod listener;
mod reader;
mod reply;

use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use tokio::net::{TcpStream, UnixStream};
use tokio::sync::Notify;

pub use backend::{Backend, ClientInfo, ConnectionId, Export, Peer, Request};
pub use limits::{Limits, PayloadBudget};
pub use listener::Listener;
pub use reply::{ReadChunk, ReadData, Reply, ReplyBatch};

use crate::tls::ServerTls;
use crate::transport::{PayloadPool, Stream};
use connection::{Control, Counters, Newcomer, Service};
use listener::Accepted;

/// How long to wait before accepting again when the machine is out of something.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// An NBD server. Clones are handles to the same server.
pub struct Server<B> {
    inner: Arc<Inner<B>>,
}

struct Inner<B> {
    service: Service<B>,
    connections: Mutex<HashMap<ConnectionId, Arc<Tracked>>>,
    stopping: AtomicBool,
    stop: Notify,
    /// A connection ended.
    ended: Notify,
}

/// A connection as the server keeps track of it.
struct Tracked {
    client: ClientInfo,
    /// The name in its certificate, once that was checked.
    name: OnceLock<String>,
    export: OnceLock<String>,
    control: Control,
    counters: Arc<Counters>,
}

/// What a connection is and has done so far.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConnectionStatus {
    /// Who it is.
    pub client: ClientInfo,
    /// The export it has open, once the handshake is over.
    pub export: Option<String>,
    /// Requests handed to the export.
    pub requests: u64,
    /// Bytes asked for by reads.
    pub bytes_read: u64,
    /// Bytes brought by writes.
    pub bytes_written: u64,
}

impl<B> Clone for Server<B> {
    fn clone(&self) -> Self {
        Self { inner: Arc::clone(&self.inner) }
    }
}

impl<B> std::fmt::Debug for Server<B> {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Server").field("limits", &self.inner.service.limits).finish()
    }
}

impl<B: Backend> Server<B> {
    /// A server that listens nowhere yet.
    #[must_use]
    pub fn new(backend: Arc<B>, limits: Limits, budget: PayloadBudget) -> Self {
        let pool = PayloadPool::new(limits.pool_bytes);
        let inner = Inner {
            service: Service { backend, limits, budget, pool },
            connections: Mutex::default(),
            stopping: AtomicBool::new(false),
            stop: Notify::new(),
            ended: Notify::new(),
        };
        Self { inner: Arc::new(inner) }
    }

    /// Accepts connections from `listener` until the server shuts down. Must be called within a
    /// tokio runtime, whose tasks do the work.
    pub fn listen(&self, listener: Listener) {
        let server = self.clone();
        tokio::spawn(async move {
            tokio::select! {
                () = server.accept(&listener) => {}
                () = server.stopped() => {}
            }
        });
    }

    /// Serves a TCP connection that was accepted elsewhere; no address is refused.
    ///
    /// # Errors
    /// If the peer is gone already.
    pub fn serve_tcp(&self, stream: TcpStream) -> io::Result<()> {
        let peer = Peer::Tcp(stream.peer_addr()?);
        self.welcome(Stream::Tcp(stream), peer, None);
        Ok(())
    }

    /// Serves a connected unix socket, for instance one end of a pair.
    ///
    /// # Errors
    /// If the peer is gone already.
    pub fn serve_unix(&self, stream: UnixStream) -> io::Result<()> {
        let peer = listener::unix_peer(&stream)?;
        self.welcome(Stream::Unix(stream), peer, None);
        Ok(())
    }

    /// The connections there are now, in order of arrival.
    #[must_use]
    pub fn connections(&self) -> Vec<ConnectionStatus> {
        let mut all: Vec<_> = self.inner.lock().values().map(|tracked| tracked.status()).collect();
        all.sort_by_key(|status| status.client.connection);
        all
    }

    /// Drops a connection at once: requests in flight are not answered. Whether there was one.
    pub fn disconnect(&self, connection: ConnectionId) -> bool {
        let tracked = self.inner.lock().get(&connection).map(Arc::clone);
        if let Some(tracked) = &tracked {
            tracked.control.drop_now();
        }
        tracked.is_some()
    }

    /// Stops: accepts nobody, takes no more requests, answers those in flight, and drops what is
    /// not done by `patience`. Returns when every export was told that it is closed.
    pub async fn shutdown(&self, patience: Duration) {
        self.inner.stopping.store(true, Ordering::SeqCst);
        self.inner.stop.notify_waiters();
        self.for_each(Control::settle);
        if tokio::time::timeout(patience, self.all_ended()).await.is_err() {
            self.for_each(Control::drop_now);
            self.all_ended().await;
        }
    }

    async fn accept(&self, listener: &Listener) {
        loop {
            match listener.accept().await {
                Ok(Accepted::Welcome(stream, peer)) => {
                    self.welcome(stream, peer, listener.tls().cloned());
                }
                Ok(Accepted::Refused(address)) => {
                    log::warn!(target: "nbd", "refused {address}: not in the list of networks");
                }
                Err(error) => {
                    log::warn!(target: "nbd", "accepting a connection failed: {error}");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    fn welcome(&self, stream: Stream, peer: Peer, tls: Option<ServerTls>) {
        let client = ClientInfo { connection: ConnectionId::next(), peer, name: None };
        let tracked = Arc::new(Tracked {
            client: client.clone(),
            name: OnceLock::new(),
            export: OnceLock::new(),
            control: Control::default(),
            counters: Arc::default(),
        });
        {
            let mut connections = self.inner.lock();
            if connections.len() >= self.inner.service.limits.connections {
                log::warn!(target: "nbd", "refused {client}: {} connections", connections.len());
                return;
            }
            connections.insert(client.connection, Arc::clone(&tracked));
        }
        if self.inner.stopping.load(Ordering::SeqCst) {
            tracked.control.drop_now();
        }
        let entry = Entry { inner: Arc::clone(&self.inner), connection: client.connection };
        tokio::spawn(async move {
            let newcomer = Newcomer { stream, client: tracked.client.clone(), tls };
            connection::serve(&entry.inner.service, newcomer, &tracked).await;
            drop(entry);
        });
    }

    fn for_each(&self, act: impl Fn(&Control)) {
        for tracked in self.inner.lock().values() {
            act(&tracked.control);
        }
    }

    async fn stopped(&self) {
        loop {
            let mut stop = std::pin::pin!(self.inner.stop.notified());
            stop.as_mut().enable();
            if self.inner.stopping.load(Ordering::SeqCst) {
                return;
            }
            stop.await;
        }
    }

    async fn all_ended(&self) {
        loop {
            let mut ended = std::pin::pin!(self.inner.ended.notified());
            ended.as_mut().enable();
            if self.inner.lock().is_empty() {
                return;
            }
            ended.await;
        }
    }
}

impl<B> Inner<B> {
    fn lock(&self) -> MutexGuard<'_, HashMap<ConnectionId, Arc<Tracked>>> {
        self.connections.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Tracked {
    fn status(&self) -> ConnectionStatus {
        ConnectionStatus {
            client: ClientInfo { name: self.name.get().cloned(), ..self.client.clone() },
            export: self.export.get().cloned(),
            requests: self.counters.requests.load(Ordering::Relaxed),
            bytes_read: self.counters.bytes_read.load(Ordering::Relaxed),
            bytes_written: self.counters.bytes_written.load(Ordering::Relaxed),
        }
    }
}

/// A place among the connections; given up when the connection's task ends, however it ends.
struct Entry<B> {
    inner: Arc<Inner<B>>,
    connection: ConnectionId,
}

impl<B> Drop for Entry<B> {
    fn drop(&mut self) {
        self.inner.lock().remove(&self.connection);
        self.inner.ended.notify_waiters();
    }
}
