//! One type for TCP and unix sockets, in plain text or under TLS, whole and in halves.
//!
//! The write half may be used by any thread, also one that tokio knows nothing of; the read half
//! belongs to one task.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::{TcpStream, UnixStream, tcp, unix};

use super::tls::{Past, READ_BYTES, TlsSession, shake_hands};

/// Reads or writes without blocking: `None` if nothing can be done now.
///
/// Less than all that was wanted shows that the socket is drained or full. Telling tokio "would
/// block" then makes it forget the readiness, which spares the system call that would only find
/// out the same. (Tokio does so itself, in its methods that poll.)
macro_rules! try_whole {
    ($half:expr, $stream:ty, $interest:expr, $wanted:expr, $act:expr) => {{
        let stream: &$stream = $half.as_ref();
        let mut done = None;
        let outcome = stream.try_io($interest, || {
            let count = $act(SockRef::from(stream))?;
            done = Some(count);
            if 0 < count && count < $wanted {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            Ok(())
        });
        match (done, outcome) {
            (Some(count), _) => Ok(Some(count)),
            (None, Ok(())) => Ok(None),
            (None, Err(error)) => match error.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(None),
                _ => Err(error),
            },
        }
    }};
}

/// A connected socket.
#[derive(Debug)]
pub(crate) enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
    Tls(TcpStream, TlsSession),
}

impl Stream {
    /// Sets what a disk connection needs: no delay for small packets, and notice of a peer that
    /// died without a word within about `dead_after`.
    pub(crate) fn prepare(&self, dead_after: Duration) -> io::Result<()> {
        let (Self::Tcp(stream) | Self::Tls(stream, _)) = self else { return Ok(()) };
        stream.set_nodelay(true)?;
        let socket = SockRef::from(stream);
        let probe = (dead_after / 4).max(Duration::from_secs(1));
        let keepalive = TcpKeepalive::new().with_time(probe).with_interval(probe).with_retries(3);
        socket.set_tcp_keepalive(&keepalive)?;
        // Keepalive says nothing while data waits to be acknowledged; this does.
        socket.set_tcp_user_timeout(Some(dead_after))
    }

    /// Resolves when the peer can send nothing more, even if there is data left to read.
    pub(crate) async fn peer_gone(&self) {
        // Priority interest is met by out-of-band data, which nobody sends, or the end.
        let ready = match self {
            Self::Tcp(stream) | Self::Tls(stream, _) => stream.ready(Interest::PRIORITY).await,
            Self::Unix(stream) => stream.ready(Interest::PRIORITY).await,
        };
        forever_unless_closed(ready).await;
    }

    /// Secures a TCP connection: from now on everything goes through `connection`.
    ///
    /// # Errors
    /// `InvalidData` with a [`rustls::Error`] inside when a side refuses the other, `Unsupported` for
    /// what is no plain TCP connection; otherwise as the socket gives them.
    pub(crate) async fn secure(self, connection: rustls::Connection) -> io::Result<Self> {
        let Self::Tcp(stream) = self else { return Err(io::ErrorKind::Unsupported.into()) };
        let session = shake_hands(&stream, connection).await?;
        Ok(Self::Tls(stream, session))
    }

    /// The address of this machine that a TCP peer came to.
    #[cfg(feature = "server")]
    pub(crate) fn local_address(&self) -> Option<std::net::IpAddr> {
        match self {
            Self::Tcp(stream) | Self::Tls(stream, _) => {
                stream.local_addr().ok().map(|address| address.ip().to_canonical())
            }
            Self::Unix(_) => None,
        }
    }

    /// The certificate the peer has proven to own; none without TLS.
    pub(crate) fn peer_certificate(&self) -> Option<Vec<u8>> {
        match self {
            Self::Tls(_, session) => session.peer_certificate(),
            Self::Tcp(_) | Self::Unix(_) => None,
        }
    }

    pub(crate) fn into_split(self) -> (ReadHalf, WriteHalf) {
        match self {
            Self::Tcp(stream) => {
                let (read, write) = stream.into_split();
                (ReadHalf::Tcp(read), WriteHalf::Tcp(write))
            }
            Self::Unix(stream) => {
                let (read, write) = stream.into_split();
                (ReadHalf::Unix(read), WriteHalf::Unix(write))
            }
            Self::Tls(stream, session) => {
                let (read, write) = stream.into_split();
                (ReadHalf::Tls(read, session.clone()), WriteHalf::Tls(write, session))
            }
        }
    }
}

fn poll_read_tls(
    stream: &TcpStream,
    session: &TlsSession,
    context: &mut Context<'_>,
    buffer: &mut ReadBuf<'_>,
) -> Poll<io::Result<()>> {
    let most = buffer.remaining().min(READ_BYTES);
    loop {
        let place = buffer.initialize_unfilled_to(most);
        if let Some(count) = session.try_read(stream, place, &mut [], Past::Nobody)? {
            buffer.advance(count);
            return Poll::Ready(Ok(()));
        }
        std::task::ready!(stream.poll_read_ready(context))?;
    }
}

async fn forever_unless_closed(ready: io::Result<tokio::io::Ready>) {
    if ready.is_ok_and(|ready| !ready.is_read_closed()) {
        // Out-of-band data: it stays, so asking again would spin.
        std::future::pending::<()>().await;
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_read(context, buffer),
            Self::Unix(stream) => Pin::new(stream).poll_read(context, buffer),
            Self::Tls(stream, session) => poll_read_tls(stream, session, context, buffer),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_write(context, bytes),
            Self::Unix(stream) => Pin::new(stream).poll_write(context, bytes),
            Self::Tls(stream, session) => loop {
                if let Some(count) = session.try_write(stream, &[IoSlice::new(bytes)])? {
                    return Poll::Ready(Ok(count));
                }
                std::task::ready!(stream.poll_write_ready(context))?;
            },
        }
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        if let Self::Tls(stream, session) = self.get_mut() {
            while !session.try_flush(stream)? {
                std::task::ready!(stream.poll_write_ready(context))?;
            }
        }
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_shutdown(context),
            Self::Unix(stream) => Pin::new(stream).poll_shutdown(context),
            Self::Tls(stream, session) => {
                session.say_goodbye(stream);
                Pin::new(stream).poll_shutdown(context)
            }
        }
    }
}

/// The half that is read by one task.
#[derive(Debug)]
pub(crate) enum ReadHalf {
    Tcp(tcp::OwnedReadHalf),
    Unix(unix::OwnedReadHalf),
    Tls(tcp::OwnedReadHalf, TlsSession),
}

impl ReadHalf {
    /// Reads into the two buffers one after the other, waiting until there is something.
    /// Zero is the end of the stream.
    pub(crate) async fn read_two(&self, first: &mut [u8], second: &mut [u8]) -> io::Result<usize> {
        loop {
            if let Some(read) = self.try_read_two(first, second)? {
                return Ok(read);
            }
            match self {
                Self::Tcp(half) | Self::Tls(half, _) => half.readable().await?,
                Self::Unix(half) => half.readable().await?,
            }
        }
    }

    /// Reads what is there now, past the runtime; `None` when there is nothing. Reading on through
    /// the runtime afterwards is fine: it finds what there is then.
    pub(crate) fn look(&self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        let read = match self {
            Self::Tcp(half) => (&*SockRef::from(half.as_ref())).read(buffer),
            Self::Unix(half) => (&*SockRef::from(half.as_ref())).read(buffer),
            Self::Tls(half, session) => {
                return session.try_read(half.as_ref(), buffer, &mut [], Past::TheRuntime);
            }
        };
        match read {
            Ok(count) => Ok(Some(count)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// `None` when there is nothing to read now.
    fn try_read_two(&self, first: &mut [u8], second: &mut [u8]) -> io::Result<Option<usize>> {
        if let Self::Tls(half, session) = self {
            return session.try_read(half.as_ref(), first, second, Past::Nobody);
        }
        let wanted = first.len() + second.len();
        let mut receive = |socket: SockRef<'_>| {
            let mut slices = [IoSliceMut::new(first), IoSliceMut::new(second)];
            (&*socket).read_vectored(&mut slices)
        };
        match self {
            Self::Tcp(half) => try_whole!(half, TcpStream, Interest::READABLE, wanted, receive),
            Self::Unix(half) => try_whole!(half, UnixStream, Interest::READABLE, wanted, receive),
            Self::Tls(..) => Ok(None),
        }
    }

    /// Resolves when the peer can send nothing more, even if there is data left to read.
    pub(crate) async fn peer_gone(&self) {
        let ready = match self {
            Self::Tcp(half) | Self::Tls(half, _) => half.ready(Interest::PRIORITY).await,
            Self::Unix(half) => half.ready(Interest::PRIORITY).await,
        };
        forever_unless_closed(ready).await;
    }
}

impl AsyncRead for ReadHalf {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(half) => Pin::new(half).poll_read(context, buffer),
            Self::Unix(half) => Pin::new(half).poll_read(context, buffer),
            Self::Tls(half, session) => poll_read_tls(half.as_ref(), session, context, buffer),
        }
    }
}

/// The half that any thread may write to, one at a time.
#[derive(Debug)]
pub(crate) enum WriteHalf {
    Tcp(tcp::OwnedWriteHalf),
    Unix(unix::OwnedWriteHalf),
    Tls(tcp::OwnedWriteHalf, TlsSession),
}

impl WriteHalf {
    /// Writes what the socket takes now; `None` if that is nothing. Less than all means that the
    /// socket is full.
    pub(crate) fn try_write(&self, slices: &[IoSlice<'_>]) -> io::Result<Option<usize>> {
        let wanted = slices.iter().map(|slice| slice.len()).sum();
        let send = |socket: SockRef<'_>| match slices {
            [one] => (&*socket).write(one),
            _ => (&*socket).write_vectored(slices),
        };
        match self {
            Self::Tcp(half) => try_whole!(half, TcpStream, Interest::WRITABLE, wanted, send),
            Self::Unix(half) => try_whole!(half, UnixStream, Interest::WRITABLE, wanted, send),
            Self::Tls(half, session) => session.try_write(half.as_ref(), slices),
        }
    }

    /// Sends what was written and not yet taken by the socket. Whether nothing of it is left.
    pub(crate) fn try_flush(&self) -> io::Result<bool> {
        match self {
            Self::Tcp(_) | Self::Unix(_) => Ok(true),
            Self::Tls(half, session) => session.try_flush(half.as_ref()),
        }
    }

    pub(crate) async fn writable(&self) -> io::Result<()> {
        match self {
            Self::Tcp(half) | Self::Tls(half, _) => half.writable().await,
            Self::Unix(half) => half.writable().await,
        }
    }

    /// Ends both directions; the peer sees it at once, however long the socket is held.
    pub(crate) fn shutdown(&self) {
        let how = std::net::Shutdown::Both;
        // An error means that the peer was faster.
        let _ = match self {
            Self::Tcp(half) => SockRef::from(AsRef::<TcpStream>::as_ref(half)).shutdown(how),
            Self::Unix(half) => SockRef::from(AsRef::<UnixStream>::as_ref(half)).shutdown(how),
            Self::Tls(half, session) => {
                session.say_goodbye(half.as_ref());
                SockRef::from(AsRef::<TcpStream>::as_ref(half)).shutdown(how)
            }
        };
    }
}
