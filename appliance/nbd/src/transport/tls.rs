//! TLS between the buffers of a connection and its socket.
//!
//! The two halves of a connection share one rustls session behind a lock that is never held across
//! a wait: reading decrypts what the socket has, writing encrypts what the socket takes and a little
//! more. Bytes that were encrypted and not yet taken count as unsent, see [`TlsSession::try_flush`].
//!
//! A stream that ends without TLS's own goodbye is an end like any other: NBD says where its
//! messages end, so that nothing is gained by cutting one short.

use std::io::{self, IoSlice, Read, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustls::Connection;
use socket2::SockRef;
use tokio::io::Interest;
use tokio::net::TcpStream;

/// Bytes that may be encrypted ahead of what the socket takes.
const AHEAD_BYTES: usize = 128 << 10;

/// Slices that are encrypted together.
const SLICES: usize = 64;

/// Zero-filling more than this for one read would cost more than it brings: a record has 16 KiB.
pub(super) const READ_BYTES: usize = 16 << 10;

/// Whether to ask the runtime first if there is anything to read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Past {
    Nobody,
    TheRuntime,
}

/// A session whose handshake is over. Clones are the same session.
#[derive(Debug, Clone)]
pub(crate) struct TlsSession {
    connection: Arc<Mutex<Connection>>,
}

/// Leads the handshake of TLS to its end.
///
/// # Errors
/// `InvalidData` with a [`rustls::Error`] inside when the peer is refused or refuses; otherwise as
/// the socket gives them.
pub(crate) async fn shake_hands(
    socket: &TcpStream,
    mut connection: Connection,
) -> io::Result<TlsSession> {
    loop {
        while !flush(&mut connection, socket)? {
            socket.writable().await?;
        }
        if !connection.is_handshaking() {
            connection.set_buffer_limit(Some(AHEAD_BYTES));
            return Ok(TlsSession { connection: Arc::new(Mutex::new(connection)) });
        }
        socket.readable().await?;
        if receive(&mut connection, socket, Past::Nobody)? == Some(0) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
}

impl TlsSession {
    /// The certificate the peer has proven to own.
    pub(crate) fn peer_certificate(&self) -> Option<Vec<u8>> {
        let connection = self.lock();
        connection.peer_certificates()?.first().map(|certificate| certificate.to_vec())
    }

    /// Reads into the two buffers one after the other; `None` when there is nothing now, zero at the
    /// end of the stream.
    pub(super) fn try_read(
        &self,
        socket: &TcpStream,
        first: &mut [u8],
        second: &mut [u8],
        past: Past,
    ) -> io::Result<Option<usize>> {
        let mut connection = self.lock();
        loop {
            if let Some(count) = take_decrypted(&mut connection, first, second)? {
                return Ok(Some(count));
            }
            match receive(&mut connection, socket, past)? {
                Some(0) => return Ok(Some(0)),
                Some(_) => {}
                None => return Ok(None),
            }
        }
    }

    /// Encrypts and sends what the socket takes; `None` if that is nothing. Less than all means that
    /// the socket is full. What is counted as written may still have to be flushed.
    pub(super) fn try_write(
        &self,
        socket: &TcpStream,
        slices: &[IoSlice<'_>],
    ) -> io::Result<Option<usize>> {
        let mut room = [IoSlice::new(&[]); SLICES];
        let count = slices.len().min(SLICES);
        for (place, slice) in room.iter_mut().zip(slices) {
            *place = IoSlice::new(slice);
        }
        let mut left = room.get_mut(..count).unwrap_or_default();
        let mut written = 0;
        let mut connection = self.lock();
        loop {
            let free = flush(&mut connection, socket)?;
            if !free || left.iter().all(|slice| slice.is_empty()) {
                return Ok((free || written > 0).then_some(written));
            }
            let count = connection.writer().write_vectored(left)?;
            if count == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            IoSlice::advance_slices(&mut left, count);
            written += count;
        }
    }

    /// Sends what was encrypted. Whether nothing of it is left.
    pub(super) fn try_flush(&self, socket: &TcpStream) -> io::Result<bool> {
        flush(&mut self.lock(), socket)
    }

    /// Says TLS's goodbye, if the socket takes it.
    pub(super) fn say_goodbye(&self, socket: &TcpStream) {
        let mut connection = self.lock();
        connection.send_close_notify();
        // A socket that is full or dead gets none.
        let _ = flush(&mut connection, socket);
    }

    fn lock(&self) -> MutexGuard<'_, Connection> {
        self.connection.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// `None` when nothing is decrypted.
fn take_decrypted(
    connection: &mut Connection,
    first: &mut [u8],
    second: &mut [u8],
) -> io::Result<Option<usize>> {
    let mut take = |buffer: &mut [u8]| match connection.reader().read(buffer) {
        Ok(count) => Ok(Some(count)),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(Some(0)),
        Err(error) => Err(error),
    };
    let wanted = first.len();
    let Some(count) = take(first)? else { return Ok(None) };
    if count < wanted || count == 0 || second.is_empty() {
        return Ok(Some(count));
    }
    Ok(Some(count + take(second)?.unwrap_or(0)))
}

/// Receives and decrypts. How many bytes came, `None` when there are none now.
fn receive(
    connection: &mut Connection,
    socket: &TcpStream,
    past: Past,
) -> io::Result<Option<usize>> {
    let mut read = || connection.read_tls(&mut &*SockRef::from(socket));
    let received = match past {
        Past::Nobody => socket.try_io(Interest::READABLE, read),
        Past::TheRuntime => read(),
    };
    match received {
        Ok(0) => Ok(Some(0)),
        Ok(count) => match connection.process_new_packets() {
            Ok(_) => Ok(Some(count)),
            Err(error) => {
                // The peer is told why, if the socket takes it.
                let _ = flush(connection, socket);
                Err(io::Error::new(io::ErrorKind::InvalidData, error))
            }
        },
        Err(error) => match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(None),
            _ => Err(error),
        },
    }
}

/// Sends what is encrypted. Whether nothing is left.
fn flush(connection: &mut Connection, socket: &TcpStream) -> io::Result<bool> {
    while connection.wants_write() {
        let sent = socket
            .try_io(Interest::WRITABLE, || connection.write_tls(&mut &*SockRef::from(socket)));
        match sent {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(_) => {}
            Err(error) => match error.kind() {
                io::ErrorKind::WouldBlock => return Ok(false),
                io::ErrorKind::Interrupted => {}
                _ => return Err(error),
            },
        }
    }
    Ok(true)
}
