//! What can go wrong for a client, sorted by whose fault it is.

use std::io;
use std::sync::Arc;

use super::uri::UriError;
use crate::proto::{ClientHandshakeError, ErrorCode, ReplyViolation};
use crate::tls::TlsError;

/// Why a connection or a request failed.
///
/// After [`Server`](Self::Server), [`Usage`](Self::Usage) and [`NotOffered`](Self::NotOffered) the
/// connection goes on; after all others it is at an end.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ClientError {
    /// The server answered a request with an error.
    #[error(
        "server failed to {operation} {length} bytes at {offset}: {code}{}",
        in_brackets(message)
    )]
    Server {
        /// What was asked for.
        operation: &'static str,
        /// First byte.
        offset: u64,
        /// Bytes.
        length: u32,
        /// The server's error.
        code: ErrorCode,
        /// The server's words for it; may be empty.
        message: String,
    },
    /// The server breaks the protocol.
    #[error("server breaks the protocol: {0}")]
    Violation(#[from] ReplyViolation),
    /// No transmission phase was reached.
    #[error(transparent)]
    Handshake(#[from] ClientHandshakeError),
    /// Certificates cannot be used, or name no such server.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// TLS could not be started: a side does not trust the other.
    #[error("TLS failed: {0}")]
    TlsFailed(String),
    /// The server went away.
    #[error("server closed the connection")]
    ServerGone,
    /// The handshake took too long.
    #[error("server did not answer in time")]
    Late,
    /// The network failed.
    #[error("{operation} failed: {error}")]
    Io {
        /// What was being done.
        operation: &'static str,
        /// What the system said.
        error: Arc<io::Error>,
    },
    /// We said goodbye.
    #[error("connection is closed")]
    Closed,
    /// The caller asked for what no server could answer well.
    #[error("cannot {operation} {length} bytes at {offset}: {reason}")]
    Usage {
        /// What was asked for.
        operation: &'static str,
        /// First byte.
        offset: u64,
        /// Bytes.
        length: u64,
        /// Which rule is broken.
        reason: &'static str,
    },
    /// The export cannot do it.
    #[error("export does not offer to {0}")]
    NotOffered(&'static str),
    /// The operator's URI is not understood.
    #[error(transparent)]
    Uri(#[from] UriError),
}

impl ClientError {
    pub(super) fn io(operation: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |error| Self::Io { operation, error: Arc::new(error) }
    }
}

fn in_brackets(message: &str) -> String {
    if message.is_empty() { String::new() } else { format!(" ({message})") }
}
