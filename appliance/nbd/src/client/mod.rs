//! The tokio client.
//!
//! A [`Client`] is a handle to one connection; its methods may be called from many tasks at once,
//! and clones share the connection. Requests leave from the caller's own thread; one task receives
//! the replies. A call that is dropped forgets its answer, nothing else.
//!
//! It does not reconnect, retry or split requests: who uses it knows what is right there.

mod connect;
mod error;
mod receiver;
mod slots;
mod uri;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::{Semaphore, oneshot};

pub use error::ClientError;
pub use uri::{Address, Uri, UriError, UriTls};

use crate::proto::constants::{BASE_ALLOCATION, STRING_MAX, command, command_flag};
use crate::proto::{
    ClientHandshake, Coverage, ExportInfo, ExportSummary, MetaContext, Negotiated, RawExtent,
    RequestHeader, StatusExtent, Wish,
};
use crate::tls::{ClientTls, TlsError};
use crate::transport::{Outbox, PayloadPool, Stream};
use connect::Outcome;
use receiver::Receiver;
use slots::{Answer, Buffer, Progress, Slot, Slots};

/// Reads from this length on are put together in page-aligned buffers that are used again.
const POOLED_BYTES: u32 = 64 << 10;

/// The flag of `qemu:dirty-bitmap` (QEMU's `docs/interop/nbd.txt`).
const DIRTY: u32 = 1;

/// How to connect, and the bounds of a connection.
#[derive(Debug, Clone)]
pub struct ConnectOptions {
    /// Ask for structured replies; without them there is no block status.
    pub structured: bool,
    /// Metadata contexts to ask for; what the server does not have is left out.
    pub contexts: Vec<String>,
    /// Certificates for an `nbds://` URI that names none. Other connections are in plain text.
    pub tls: Option<ClientTls>,
    /// Time for connecting and the handshake.
    pub timeout: Duration,
    /// Requests in flight; more wait.
    pub requests: usize,
    /// Bytes of payload in flight in either direction; more wait.
    pub payload_bytes: usize,
    /// A server that takes no more bytes is given up after this.
    pub stall: Duration,
    /// A TCP server that vanished without a word is noticed within about this time.
    pub dead_peer: Duration,
}

impl Default for ConnectOptions {
    fn default() -> Self {
        Self {
            structured: true,
            contexts: vec![BASE_ALLOCATION.to_owned()],
            tls: None,
            timeout: Duration::from_secs(30),
            requests: 128,
            payload_bytes: 64 << 20,
            stall: Duration::from_secs(300),
            dead_peer: Duration::from_secs(60),
        }
    }
}

/// A connection to an export. When the last clone is dropped the server is told goodbye.
#[derive(Debug, Clone)]
pub struct Client {
    handle: Arc<Handle>,
}

/// Dropped with the last clone of a client.
#[derive(Debug)]
struct Handle {
    shared: Arc<Shared>,
}

/// What callers and the receiving task share.
#[derive(Debug)]
struct Shared {
    outbox: Outbox<()>,
    slots: Slots,
    export: ExportInfo,
    flags: u16,
    canonical_name: Option<String>,
    structured: bool,
    contexts: Vec<MetaContext>,
    request_room: Arc<Semaphore>,
    payload_room: Arc<Semaphore>,
    requests_max: u32,
    payload_max: u32,
    pool: PayloadPool,
}

/// How zeroes are to be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ZeroOptions {
    /// Keep the range allocated.
    pub no_hole: bool,
    /// Fail rather than be as slow as a write.
    pub fast: bool,
    /// Answer only when durable.
    pub fua: bool,
}

/// A request before it has a cookie.
struct Call {
    operation: &'static str,
    command: u16,
    flags: u16,
    offset: u64,
    length: u32,
    /// Bytes of memory the request or its answer needs.
    occupies: u32,
    payload: Option<Bytes>,
}

/// The exports of the server a URI names; its export does not matter.
///
/// # Errors
/// [`ClientError`] as for [`Client::connect`].
pub async fn list_exports(
    uri: &Uri,
    options: &ConnectOptions,
) -> Result<Vec<ExportSummary>, ClientError> {
    let talk = async {
        let tls = certificates_for(uri, options)?;
        let tls = with_host(tls.as_ref(), &uri.address);
        let stream = connect::open(&uri.address).await?;
        let machine = ClientHandshake::list(tls.is_some());
        match connect::negotiate(stream, tls, machine, options).await?.0 {
            Outcome::Listed(exports) => Ok(exports),
            Outcome::Ready(_) => Err(ClientError::Closed),
        }
    };
    tokio::time::timeout(options.timeout, talk).await.unwrap_or(Err(ClientError::Late))
}

/// The certificates for a URI that asks for TLS.
fn certificates_for(uri: &Uri, options: &ConnectOptions) -> Result<Option<ClientTls>, ClientError> {
    let Some(wish) = &uri.tls else { return Ok(None) };
    let tls = match (&wish.certificates, &options.tls) {
        (Some(directory), _) => ClientTls::load(directory)?,
        (None, Some(tls)) => tls.clone(),
        (None, None) => {
            let text = "a nbds:// URI needs tls-certificates=DIRECTORY";
            return Err(TlsError::Unusable(text.to_owned()).into());
        }
    };
    Ok(Some(match &wish.hostname {
        Some(name) => tls.with_hostname(name.clone()),
        None => tls,
    }))
}

/// Certificates with the host that is expected. (A unix socket cannot be asked for by `nbds://`.)
fn with_host<'a>(
    tls: Option<&'a ClientTls>,
    address: &'a Address,
) -> Option<(&'a ClientTls, &'a str)> {
    match address {
        Address::Tcp { host, .. } => tls.map(|tls| (tls, host.as_str())),
        Address::Unix(_) => None,
    }
}

impl Client {
    /// Connects to the export a URI names. Must be called within a tokio runtime, as all of this.
    ///
    /// # Errors
    /// [`ClientError::Io`] if nobody listens, [`ClientError::Handshake`] if the server refuses or
    /// is none, [`ClientError::Late`] if it does not answer; [`ClientError::Tls`] and
    /// [`ClientError::TlsFailed`] if the URI asks for TLS and it cannot be had.
    pub async fn connect(uri: &Uri, options: &ConnectOptions) -> Result<Self, ClientError> {
        let talk = async {
            let tls = certificates_for(uri, options)?;
            let stream = connect::open(&uri.address).await?;
            let tls = with_host(tls.as_ref(), &uri.address);
            Self::start(stream, tls, &uri.export, options).await
        };
        tokio::time::timeout(options.timeout, talk).await.unwrap_or(Err(ClientError::Late))
    }

    /// Uses a TCP connection that was made elsewhere, in plain text.
    ///
    /// # Errors
    /// As [`Client::connect`].
    pub async fn over_tcp(
        stream: TcpStream,
        export: &str,
        options: &ConnectOptions,
    ) -> Result<Self, ClientError> {
        let talk = Self::start(Stream::Tcp(stream), None, export, options);
        tokio::time::timeout(options.timeout, talk).await.unwrap_or(Err(ClientError::Late))
    }

    /// Uses a unix socket that was connected elsewhere.
    ///
    /// # Errors
    /// As [`Client::connect`].
    pub async fn over_unix(
        stream: UnixStream,
        export: &str,
        options: &ConnectOptions,
    ) -> Result<Self, ClientError> {
        let talk = Self::start(Stream::Unix(stream), None, export, options);
        tokio::time::timeout(options.timeout, talk).await.unwrap_or(Err(ClientError::Late))
    }

    async fn start(
        stream: Stream,
        tls: Option<(&ClientTls, &str)>,
        export: &str,
        options: &ConnectOptions,
    ) -> Result<Self, ClientError> {
        if export.len() > STRING_MAX {
            return Err(ClientError::Uri(UriError::Name));
        }
        let machine = ClientHandshake::new(Wish {
            export: export.to_owned(),
            structured: options.structured,
            contexts: options.contexts.clone(),
            tls: tls.is_some(),
        });
        let (outcome, input, stream) = connect::negotiate(stream, tls, machine, options).await?;
        let Outcome::Ready(negotiated) = outcome else { return Err(ClientError::Closed) };
        let (half, write_half) = stream.into_split();
        let shared = Arc::new(Shared::new(*negotiated, Outbox::new(write_half), options));
        let receiver = Receiver::new(half, input, Arc::clone(&shared));
        tokio::spawn(receiver.run(options.stall));
        Ok(Self { handle: Arc::new(Handle { shared }) })
    }

    /// The export: size, abilities, size constraints.
    #[must_use]
    pub fn export(&self) -> &ExportInfo {
        &self.shared().export
    }

    /// The transmission flags as the server sent them.
    #[must_use]
    pub fn flags(&self) -> u16 {
        self.shared().flags
    }

    /// The server's own name for the export, if it told.
    #[must_use]
    pub fn canonical_name(&self) -> Option<&str> {
        self.shared().canonical_name.as_deref()
    }

    /// Whether structured replies were agreed.
    #[must_use]
    pub fn structured(&self) -> bool {
        self.shared().structured
    }

    /// The metadata contexts that were agreed.
    #[must_use]
    pub fn contexts(&self) -> &[MetaContext] {
        &self.shared().contexts
    }

    /// Reads `length` bytes at `offset`.
    ///
    /// # Errors
    /// [`ClientError`]; never less than all of the bytes.
    pub async fn read(&self, offset: u64, length: u32) -> Result<Bytes, ClientError> {
        let call = Call { occupies: length, ..Call::new("read", command::READ, 0, offset, length) };
        let pool = &self.shared().pool;
        let progress = || Progress::Read {
            buffer: if length >= POOLED_BYTES {
                Buffer::Large(pool.take(length as usize))
            } else {
                Buffer::Small(vec![0; length as usize])
            },
            coverage: Coverage::new(offset, length),
        };
        match self.call(call, progress).await? {
            Answer::Data(data) => Ok(data),
            _ => Err(ClientError::Closed),
        }
    }

    /// Writes `data` at `offset`; with `fua` it is durable when this returns.
    ///
    /// # Errors
    /// [`ClientError`]; part of the data may have been written.
    pub async fn write(&self, offset: u64, data: Bytes, fua: bool) -> Result<(), ClientError> {
        let operation = "write";
        let length = u32::try_from(data.len()).map_err(|_| ClientError::Usage {
            operation,
            offset,
            length: data.len() as u64,
            reason: "longer than any request",
        })?;
        let flags = self.fua_flag(fua)?;
        let call = Call {
            occupies: length,
            payload: Some(data),
            ..Call::new(operation, command::WRITE, flags, offset, length)
        };
        self.call_plain(call).await
    }

    /// Writes zeroes.
    ///
    /// # Errors
    /// [`ClientError::NotOffered`] if the export cannot; with `fast` an error of
    /// [`ErrorCode::NotSupported`](crate::proto::ErrorCode::NotSupported) means that it would
    /// not be.
    pub async fn write_zeroes(
        &self,
        offset: u64,
        length: u32,
        options: ZeroOptions,
    ) -> Result<(), ClientError> {
        let export = self.export();
        offered(export.can_write_zeroes, "write zeroes")?;
        offered(!options.fast || export.can_fast_zero, "write zeroes fast")?;
        let no_hole = if options.no_hole { command_flag::NO_HOLE } else { 0 };
        let fast = if options.fast { command_flag::FAST_ZERO } else { 0 };
        let flags = self.fua_flag(options.fua)? | no_hole | fast;
        let command = command::WRITE_ZEROES;
        self.call_plain(Call::new("write zeroes to", command, flags, offset, length)).await
    }

    /// Tells that the content of a range is not needed any more.
    ///
    /// # Errors
    /// [`ClientError::NotOffered`] if the export cannot.
    pub async fn trim(&self, offset: u64, length: u32, fua: bool) -> Result<(), ClientError> {
        offered(self.export().can_trim, "trim")?;
        let flags = self.fua_flag(fua)?;
        self.call_plain(Call::new("trim", command::TRIM, flags, offset, length)).await
    }

    /// Makes everything durable that was answered before.
    ///
    /// # Errors
    /// [`ClientError::NotOffered`] if the export cannot.
    pub async fn flush(&self) -> Result<(), ClientError> {
        offered(self.export().can_flush, "flush")?;
        self.call_plain(Call::new("flush", command::FLUSH, 0, 0, 0)).await
    }

    /// Tells that a range will be read soon.
    ///
    /// # Errors
    /// [`ClientError::NotOffered`] if the export cannot.
    pub async fn cache(&self, offset: u64, length: u32) -> Result<(), ClientError> {
        offered(self.export().can_cache, "cache")?;
        self.call_plain(Call::new("cache", command::CACHE, 0, offset, length)).await
    }

    /// The status of a range from its start on: one list of extents for each of
    /// [`Client::contexts`], in their order. A list may end before the range, or, unless only
    /// `one` extent is asked for, after it.
    ///
    /// # Errors
    /// [`ClientError::NotOffered`] if no context was agreed.
    pub async fn block_status(
        &self,
        offset: u64,
        length: u32,
        one: bool,
    ) -> Result<Vec<Vec<RawExtent>>, ClientError> {
        offered(!self.contexts().is_empty(), "tell the block status")?;
        let flags = if one { command_flag::REQ_ONE } else { 0 };
        let operation = "tell the status of";
        let call = Call::new(operation, command::BLOCK_STATUS, flags, offset, length);
        let progress = || Progress::Status { one, told: Vec::new() };
        let Answer::Status(mut told) = self.call(call, progress).await? else {
            return Err(ClientError::Closed);
        };
        let order = |id| self.contexts().iter().position(|context| context.id == id);
        told.sort_by_key(|(id, _)| order(*id));
        Ok(told.into_iter().map(|(_, extents)| extents).collect())
    }

    /// Which parts of a range are allocated and which read as zeroes, by `base:allocation`.
    ///
    /// # Errors
    /// [`ClientError::NotOffered`] if that context was not agreed.
    pub async fn allocation(
        &self,
        offset: u64,
        length: u32,
    ) -> Result<Vec<StatusExtent>, ClientError> {
        let base = |context: &MetaContext| context.name == BASE_ALLOCATION;
        let Some(index) = self.contexts().iter().position(base) else {
            return Err(ClientError::NotOffered("tell what is allocated"));
        };
        let mut told = self.block_status(offset, length, false).await?;
        let extents = if index < told.len() { told.swap_remove(index) } else { Vec::new() };
        Ok(extents.into_iter().map(StatusExtent::from).collect())
    }

    /// Which parts of a range a dirty bitmap of QEMU's marks, by the context of that name (see
    /// [`dirty_bitmap`]): lengths in bytes, and whether they are marked. The list may end before the
    /// range, or after it.
    ///
    /// # Errors
    /// [`ClientError::NotOffered`] if that context was not agreed.
    pub async fn dirty(
        &self,
        context: &str,
        offset: u64,
        length: u32,
    ) -> Result<Vec<(u64, bool)>, ClientError> {
        let Some(index) = self.contexts().iter().position(|known| known.name == context) else {
            return Err(ClientError::NotOffered("tell what a dirty bitmap marks"));
        };
        let mut told = self.block_status(offset, length, false).await?;
        let extents = if index < told.len() { told.swap_remove(index) } else { Vec::new() };
        let marked = |extent: RawExtent| (u64::from(extent.length), extent.flags & DIRTY != 0);
        Ok(extents.into_iter().map(marked).collect())
    }

    /// Waits until nothing is in flight and says goodbye. Later calls fail.
    ///
    /// # Errors
    /// The reason why the connection had ended before.
    pub async fn disconnect(&self) -> Result<(), ClientError> {
        let shared = self.shared();
        // Whoever holds all permits knows that nothing is in flight.
        let all = shared.request_room.acquire_many(shared.requests_max).await;
        if let Some(reason) = shared.slots.ended() {
            return Err(reason);
        }
        shared.say_goodbye();
        shared.outbox.idle().await;
        shared.slots.end(&ClientError::Closed);
        shared.outbox.close();
        drop(all);
        Ok(())
    }

    fn shared(&self) -> &Shared {
        &self.handle.shared
    }

    fn fua_flag(&self, fua: bool) -> Result<u16, ClientError> {
        offered(!fua || self.export().can_fua, "write through its cache")?;
        Ok(if fua { command_flag::FUA } else { 0 })
    }

    async fn call_plain(&self, call: Call) -> Result<(), ClientError> {
        match self.call(call, || Progress::Plain).await? {
            Answer::Done => Ok(()),
            _ => Err(ClientError::Closed),
        }
    }

    async fn call(
        &self,
        call: Call,
        progress: impl FnOnce() -> Progress,
    ) -> Result<Answer, ClientError> {
        let shared = self.shared();
        shared.check(&call)?;
        let ended = |_| ClientError::Closed;
        let request = shared.request_room.clone().acquire_owned().await.map_err(ended)?;
        let bytes = call.occupies.min(shared.payload_max);
        let payload = shared.payload_room.clone().acquire_many_owned(bytes).await.map_err(ended)?;

        let Call { operation, command, flags, offset, length, payload: data, .. } = call;
        let (waiter, answer) = oneshot::channel();
        let cookie = shared.slots.insert(Slot {
            operation,
            offset,
            length,
            progress: progress(),
            error: None,
            waiter,
            _room: (request, payload),
        })?;
        let header = RequestHeader { flags, command, cookie, offset, length };
        let needs_send = shared.outbox.put(|queue| {
            queue.put(|out| header.encode(out));
            if let Some(data) = data {
                queue.put_data(data);
            }
        });
        if needs_send {
            shared.outbox.send(|()| {});
        }
        match answer.await {
            Ok(answer) => answer,
            Err(_) => Err(shared.slots.reason().await),
        }
    }
}

impl Call {
    fn new(operation: &'static str, command: u16, flags: u16, offset: u64, length: u32) -> Self {
        Self { operation, command, flags, offset, length, occupies: 0, payload: None }
    }
}

/// The name of the context by which QEMU tells what its dirty bitmap of this name marks.
#[must_use]
pub fn dirty_bitmap(bitmap: &str) -> String {
    format!("qemu:dirty-bitmap:{bitmap}")
}

fn offered(is: bool, what: &'static str) -> Result<(), ClientError> {
    if is { Ok(()) } else { Err(ClientError::NotOffered(what)) }
}

impl Shared {
    fn new(negotiated: Negotiated, outbox: Outbox<()>, options: &ConnectOptions) -> Self {
        let Negotiated { export, flags, canonical_name, structured, contexts } = negotiated;
        let requests_max = options.requests.clamp(1, 65_536) as u32;
        let payload_max = u32::try_from(options.payload_bytes.max(1)).unwrap_or(u32::MAX);
        Self {
            outbox,
            slots: Slots::default(),
            export,
            flags,
            canonical_name,
            structured,
            contexts,
            request_room: Arc::new(Semaphore::new(requests_max as usize)),
            payload_room: Arc::new(Semaphore::new(payload_max as usize)),
            requests_max,
            payload_max,
            pool: PayloadPool::new(options.payload_bytes),
        }
    }

    fn check(&self, call: &Call) -> Result<(), ClientError> {
        let usage = |reason| {
            let (operation, offset) = (call.operation, call.offset);
            Err(ClientError::Usage { operation, offset, length: u64::from(call.length), reason })
        };
        if call.command == command::FLUSH {
            return Ok(());
        }
        let end = call.offset.checked_add(u64::from(call.length));
        let sizes = &self.export.block_sizes;
        if call.length == 0 {
            usage("nothing is asked for")
        } else if end.is_none_or(|end| end > self.export.size) {
            usage("past the end of the export")
        } else if call.occupies > sizes.maximum {
            usage("longer than the maximum payload")
        } else if !call.offset.is_multiple_of(u64::from(sizes.minimum))
            || !call.length.is_multiple_of(sizes.minimum)
        {
            usage("not on block boundaries")
        } else {
            Ok(())
        }
    }

    fn say_goodbye(&self) {
        let header =
            RequestHeader { flags: 0, command: command::DISC, cookie: 0, offset: 0, length: 0 };
        if self.outbox.put(|queue| queue.put(|out| header.encode(out))) {
            self.outbox.send(|()| {});
        }
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        // As much of a goodbye as can be said without waiting.
        self.shared.say_goodbye();
        self.shared.slots.end(&ClientError::Closed);
        self.shared.outbox.close();
    }
}
