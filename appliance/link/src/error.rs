//! What can go wrong on the link, sorted by whose fault it is.

use std::net::SocketAddr;

use srn_core::frame::envelope::EnvelopeError;
use srn_core::ids::NodeId;
use srn_core::pairing::Refusal;
use srn_core::wire::WireError;

/// An error of the link.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The port cannot be used, or a socket failed.
    #[error("{doing}: {source}")]
    Io {
        /// The operation and the object.
        doing: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// An address that cannot be resolved or used.
    #[error("{0}")]
    Address(String),
    /// Nobody answers, or the connection is gone.
    #[error("no connection to {peer}: {why}")]
    Unreachable {
        /// The address.
        peer: String,
        /// In words.
        why: String,
    },
    /// The node at that address has another key than the one which was paired.
    #[error(
        "the node at {addr} has key {found}, but the paired node has key {expected}; \
         if it was rebuilt, remove the peer and pair again"
    )]
    WrongKey {
        /// The address.
        addr: SocketAddr,
        /// The pinned key.
        expected: NodeId,
        /// What answered.
        found: NodeId,
    },
    /// The peer does not know this node.
    #[error("the node at {0} does not know this node; pair them first")]
    NotPaired(String),
    /// The peer speaks another version of the protocol.
    #[error("{0}")]
    Version(String),
    /// The peer broke the protocol.
    #[error("peer broke the protocol: {0}")]
    Misbehaved(String),
    /// The peer refuses the token.
    #[error("{0}")]
    Refused(#[from] Refusal),
    /// The peer does not know the token: somebody is in between, or it is another node.
    #[error("the node at {0} could not prove that it made this token; nothing was paired")]
    Unproven(SocketAddr),
    /// A key or certificate cannot be made or read.
    #[error("identity: {0}")]
    Identity(String),
}

impl From<WireError> for LinkError {
    fn from(error: WireError) -> Self {
        match error {
            WireError::Version { .. } => Self::Version(error.to_string()),
            other => Self::Misbehaved(other.to_string()),
        }
    }
}

impl From<EnvelopeError> for LinkError {
    fn from(error: EnvelopeError) -> Self {
        Self::Misbehaved(error.to_string())
    }
}

impl LinkError {
    pub(crate) fn gone(peer: &impl ToString, why: &impl ToString) -> Self {
        Self::Unreachable { peer: peer.to_string(), why: why.to_string() }
    }
}
