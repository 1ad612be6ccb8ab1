//! One connection from its first byte to its last: handshake, TLS, transmission, end.
//!
//! ```text
//! negotiate --session--> transmit --goodbye, shutdown--> settle (answer what is in flight)
//!     |                      |                              |
//!     +--no session--> end   +--gone, violation, stall, ----+--> closed() --> end
//!                               dropped on demand
//! ```

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use bytes::BytesMut;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::Notify;
use tokio::time::{Instant, timeout_at};

use super::Tracked;
use super::backend::{Backend, ClientInfo, Export, Request};
use super::flow::{Charge, Flow};
use super::limits::{Limits, PayloadBudget};
use super::reader::{End, Parts, Reader};
use crate::proto::{
    Answer, ErrorCode, Event, Handshake, HandshakeError, OpenError, Session, UnlawfulExport,
    put_error, put_simple,
};
use crate::tls::ServerTls;
use crate::transport::{Outbox, PayloadPool, Queue, Stream};

/// What replies need of a connection; lives as long as the last of them.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) client: ClientInfo,
    pub(super) outbox: Outbox<Charge>,
    pub(super) flow: Flow,
    pub(super) structured: bool,
}

impl Connection {
    pub(super) fn send(&self) {
        self.outbox.send(|charge| self.flow.release(charge));
    }

    pub(super) fn uncork(&self) {
        self.outbox.uncork(|charge| self.flow.release(charge));
    }

    pub(super) fn put_error(
        &self,
        queue: &mut Queue<Charge>,
        cookie: u64,
        code: ErrorCode,
        text: &str,
    ) {
        queue.put(|out| {
            if self.structured {
                put_error(out, cookie, code, text);
            } else {
                put_simple(out, cookie, Some(code));
            }
        });
    }
}

/// What a connection has done so far.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) requests: AtomicU64,
    pub(super) bytes_read: AtomicU64,
    pub(super) bytes_written: AtomicU64,
}

impl Counters {
    /// Only the reader counts, so a load and a store suffice.
    pub(super) fn count(&self, request: &Request) {
        let add = |counter: &AtomicU64, amount: u64| {
            counter.store(counter.load(Ordering::Relaxed) + amount, Ordering::Relaxed);
        };
        add(&self.requests, 1);
        match request {
            Request::Read { length, .. } => add(&self.bytes_read, u64::from(*length)),
            Request::Write { data, .. } => add(&self.bytes_written, data.len() as u64),
            _ => {}
        }
    }
}

/// How others end a connection.
#[derive(Debug, Default)]
pub(super) struct Control {
    phase: AtomicU8,
    changed: Notify,
}

const SETTLE: u8 = 1;
const DROP: u8 = 2;

impl Control {
    /// Take no more requests, answer those in flight, close.
    pub(super) fn settle(&self) {
        self.raise(SETTLE);
    }

    /// Close now.
    pub(super) fn drop_now(&self) {
        self.raise(DROP);
    }

    fn raise(&self, phase: u8) {
        self.phase.fetch_max(phase, Ordering::SeqCst);
        self.changed.notify_waiters();
    }

    async fn reached(&self, phase: u8) {
        loop {
            let mut changed = std::pin::pin!(self.changed.notified());
            changed.as_mut().enable();
            if self.phase.load(Ordering::SeqCst) >= phase {
                return;
            }
            changed.await;
        }
    }

    async fn stopped(&self) -> End {
        self.reached(SETTLE).await;
        if self.phase.load(Ordering::SeqCst) >= DROP { End::Dropped } else { End::Shutdown }
    }
}

/// What a connection is served with.
pub(super) struct Service<B> {
    pub(super) backend: Arc<B>,
    pub(super) limits: Limits,
    pub(super) budget: PayloadBudget,
    pub(super) pool: PayloadPool,
}

/// Why a handshake did not lead to transmission.
#[derive(Debug, thiserror::Error)]
enum HandshakeEnd {
    #[error("client ended the handshake")]
    Aborted,
    #[error("client went away during the handshake")]
    Gone,
    #[error("handshake took too long")]
    Late,
    #[error("TLS failed: {0}")]
    Tls(String),
    #[error("server is shutting down")]
    Stopped,
    #[error(transparent)]
    Refused(#[from] HandshakeError),
}

/// A connection that was accepted.
pub(super) struct Newcomer {
    pub(super) stream: Stream,
    pub(super) client: ClientInfo,
    /// What it has to start before it hears anything.
    pub(super) tls: Option<ServerTls>,
}

/// Serves one connection to its end; its name and its export are noted in `tracked`.
pub(super) async fn serve<B: Backend>(service: &Service<B>, newcomer: Newcomer, tracked: &Tracked) {
    let Newcomer { mut stream, mut client, tls } = newcomer;
    let Tracked { export, control, counters, .. } = tracked;
    if let Err(error) = stream.prepare(service.limits.dead_peer) {
        log::info!(target: "nbd", "{client}: preparing the socket failed: {error}");
        return;
    }
    let secured = |name: &str| {
        let _ = tracked.name.set(name.to_owned());
    };
    let negotiation = Negotiation { service, client: &mut client, stream, tls, secured };
    let negotiated = tokio::select! {
        result = negotiation.run() => result,
        _ = control.stopped() => Err(HandshakeEnd::Stopped),
    };
    let client = &client;
    match negotiated {
        Ok((agreed, negotiated)) => {
            stream = negotiated;
            // Each connection opens one export in its life.
            let _ = export.set(agreed.name.clone());
            let name = agreed.name.clone();
            let read_only = if agreed.session.export.read_only { ", read-only" } else { "" };
            log::info!(target: "nbd", "{client}: opened export {name:?}{read_only}");
            let end = transmit(service, stream, client, agreed, control, counters).await;
            log_end(client, &name, &end, counters);
        }
        Err(HandshakeEnd::Aborted) => {
            log::debug!(target: "nbd", "{client}: {}", HandshakeEnd::Aborted);
        }
        Err(end @ (HandshakeEnd::Gone | HandshakeEnd::Stopped)) => {
            log::info!(target: "nbd", "{client}: {end}");
        }
        Err(end @ (HandshakeEnd::Late | HandshakeEnd::Refused(_) | HandshakeEnd::Tls(_))) => {
            log::warn!(target: "nbd", "{client}: dropped: {end}");
        }
    }
}

fn log_end(client: &ClientInfo, name: &str, end: &End, counters: &Counters) {
    let level = match end {
        End::Magic(_) | End::Oversize(_) | End::Stalled => log::Level::Warn,
        _ => log::Level::Info,
    };
    log::log!(
        target: "nbd",
        level,
        "{client}: closed export {name:?}: {end}; {} requests, {} bytes read, {} bytes written",
        counters.requests.load(Ordering::Relaxed),
        counters.bytes_read.load(Ordering::Relaxed),
        counters.bytes_written.load(Ordering::Relaxed),
    );
}

/// An export that was opened and will be closed, once, whatever happens.
struct OpenExport {
    export: Arc<dyn Export>,
    /// Closed first, so that nothing is answered after the export was told.
    connection: Option<Arc<Connection>>,
}

impl Drop for OpenExport {
    fn drop(&mut self) {
        if let Some(connection) = &self.connection {
            connection.outbox.close();
        }
        self.export.closed();
    }
}

struct Agreed {
    name: String,
    session: Session,
    export: OpenExport,
    /// What the client sent right behind the handshake.
    input: BytesMut,
}

struct Negotiation<'a, B, F> {
    service: &'a Service<B>,
    client: &'a mut ClientInfo,
    stream: Stream,
    tls: Option<ServerTls>,
    /// Told the name of a client that has shown its certificate.
    secured: F,
}

impl<B: Backend, F: Fn(&str)> Negotiation<'_, B, F> {
    async fn run(mut self) -> Result<(Agreed, Stream), HandshakeEnd> {
        let mut deadline = Instant::now() + self.service.limits.handshake;
        let mut out = Vec::new();
        let limits = self.service.limits.options;
        let mut machine = match self.tls {
            Some(_) => Handshake::requiring_tls(limits, &mut out),
            None => Handshake::new(limits, &mut out),
        };
        let mut input = BytesMut::with_capacity(4096);
        let backend = &self.service.backend;
        loop {
            let event = match machine.step(&mut input, &mut out) {
                Ok(event) => event,
                Err(error) => {
                    self.send(&mut out, deadline).await?;
                    return Err(error.into());
                }
            };
            match event {
                Event::NeedInput => {
                    self.send(&mut out, deadline).await?;
                    input.reserve(4096);
                    match timeout_at(deadline, self.stream.read_buf(&mut input)).await {
                        Ok(Ok(0) | Err(_)) => return Err(HandshakeEnd::Gone),
                        Ok(Ok(_)) => {}
                        Err(_) => return Err(HandshakeEnd::Late),
                    }
                }
                Event::List => {
                    let exports = backend.list(self.client);
                    machine.answer(Answer::List(&exports), &mut out)?;
                }
                Event::Describe(name) => {
                    let described = self.described(&name);
                    machine.answer(Answer::Described(described.as_ref()), &mut out)?;
                }
                Event::Open(name) => {
                    self.send(&mut out, deadline).await?;
                    let before = Instant::now();
                    let opened = self.open(&name).await?;
                    deadline += before.elapsed();
                    let result = opened.as_ref().map(|(_, info)| info);
                    let session = machine.answer(Answer::Opened(result), &mut out)?;
                    if let (Some(session), Ok((export, _))) = (session, opened) {
                        self.send(&mut out, deadline).await?;
                        return Ok((Agreed { name, session, export, input }, self.stream));
                    }
                }
                Event::StartTls => {
                    self.send(&mut out, deadline).await?;
                    let secured = timeout_at(deadline, self.start_tls()).await;
                    self = secured.unwrap_or(Err(HandshakeEnd::Late))?;
                    machine.secured();
                }
                Event::Aborted => {
                    self.send(&mut out, deadline).await?;
                    return Err(HandshakeEnd::Aborted);
                }
            }
        }
    }

    async fn start_tls(mut self) -> Result<Self, HandshakeEnd> {
        let failed = |error: &dyn std::fmt::Display| HandshakeEnd::Tls(error.to_string());
        let Some(tls) = self.tls.clone() else { return Err(failed(&"it is not configured")) };
        let address = self.stream.local_address().ok_or(HandshakeEnd::Gone)?;
        let connection = tls.connection(address).map_err(|error| failed(&error))?;
        self.stream = self.stream.secure(connection).await.map_err(|error| match error.kind() {
            std::io::ErrorKind::UnexpectedEof => HandshakeEnd::Gone,
            _ => failed(&error),
        })?;
        let certificate = self.stream.peer_certificate();
        let certificate = certificate.ok_or_else(|| failed(&"client has no certificate"))?;
        let gone = || failed(&"client's certificate was taken back");
        let name = tls.name_of(&certificate).ok_or_else(gone)?;
        (self.secured)(&name);
        self.client.name = Some(name);
        // Taken back after the first question, by somebody who did not find this connection by its
        // name yet? Whoever takes it back from now on does.
        tls.name_of(&certificate).ok_or_else(gone)?;
        Ok(self)
    }

    fn described(&self, name: &str) -> Result<crate::proto::ExportInfo, OpenError> {
        let info = self.service.backend.describe(name, self.client)?;
        info.check().map_err(|error| self.unlawful(name, &error))?;
        Ok(info)
    }

    async fn open(
        &self,
        name: &str,
    ) -> Result<Result<(OpenExport, crate::proto::ExportInfo), OpenError>, HandshakeEnd> {
        let opened = tokio::select! {
            opened = self.service.backend.open(name, self.client) => opened,
            () = self.stream.peer_gone() => return Err(HandshakeEnd::Gone),
        };
        Ok(opened.and_then(|export| {
            let open = OpenExport { export, connection: None };
            let info = open.export.info();
            info.check().map_err(|error| self.unlawful(name, &error))?;
            Ok((open, info))
        }))
    }

    fn unlawful(&self, name: &str, error: &UnlawfulExport) -> OpenError {
        let client = &self.client;
        log::error!(target: "nbd", "{client}: backend describes {name:?} wrongly: {error}");
        OpenError::Unavailable("server has described it wrongly".to_owned())
    }

    async fn send(&mut self, out: &mut Vec<u8>, deadline: Instant) -> Result<(), HandshakeEnd> {
        let sent = timeout_at(deadline, async {
            self.stream.write_all(out).await?;
            self.stream.flush().await
        })
        .await;
        out.clear();
        match sent {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) => Err(HandshakeEnd::Gone),
            Err(_) => Err(HandshakeEnd::Late),
        }
    }
}

async fn transmit<B: Backend>(
    service: &Service<B>,
    stream: Stream,
    client: &ClientInfo,
    agreed: Agreed,
    control: &Control,
    counters: &Arc<Counters>,
) -> End {
    let Agreed { session, export: mut open, input, .. } = agreed;
    let (half, write_half) = stream.into_split();
    let connection = Arc::new(Connection {
        client: client.clone(),
        outbox: Outbox::new(write_half),
        flow: Flow::default(),
        structured: session.structured,
    });
    open.connection = Some(Arc::clone(&connection));
    let mut reader = Reader::new(Parts {
        half,
        input,
        session,
        export: Arc::clone(&open.export),
        connection: Arc::clone(&connection),
        counters: Arc::clone(counters),
        budget: service.budget.clone(),
        pool: service.pool.clone(),
        limits: service.limits.clone(),
    });
    let release = |charge| connection.flow.release(charge);
    let mut drain = std::pin::pin!(connection.outbox.drain(service.limits.stall, release));
    let end = tokio::select! {
        biased;
        end = reader.run() => end,
        error = &mut drain => End::Send(error),
        end = control.stopped() => end,
    };
    if matches!(end, End::Goodbye | End::Shutdown) {
        let answered = async {
            reader.all_done().await;
            connection.outbox.idle().await;
        };
        // A client that does not wait for its answers is gone, goodbye or not: what it asked for and
        // is not done may be done over a new connection by then, and must not be done after that.
        let gone = async {
            match end {
                End::Goodbye => reader.peer_gone().await,
                _ => std::future::pending().await,
            }
        };
        tokio::select! {
            () = answered => {}
            _ = &mut drain => {}
            () = gone => {}
            () = control.reached(DROP) => {}
        }
    }
    drop(open);
    end
}
