//! Errors as the API tells them: a kind that programs branch on, and one line for people that
//! names the thing and the way out.

use serde::{Deserialize, Serialize};

/// Kinds of failure. Each has its own exit code of the command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// The command line is not what the help says.
    Usage,
    /// What was asked for is malformed or makes no sense.
    Invalid,
    /// A thing of that name does not exist.
    NotFound,
    /// A thing of that name exists already, or is in use.
    Conflict,
    /// The state of things forbids it: fenced, not ready, not confirmed.
    Refused,
    /// The peer or another program cannot be reached or does not answer.
    Unreachable,
    /// The peer, a token or a key is not what it should be.
    Untrusted,
    /// The state volume is full or failed, or data is damaged.
    Storage,
    /// Something is missing on this machine, such as a package.
    Missing,
    /// A bug, or a system that does not do what it should.
    Internal,
}

impl Kind {
    /// The exit code of the command line. 0 is success.
    #[must_use]
    pub const fn exit_code(self) -> u8 {
        match self {
            Self::Internal => 1,
            Self::Usage => 2,
            Self::Invalid => 3,
            Self::NotFound => 4,
            Self::Conflict => 5,
            Self::Refused => 6,
            Self::Unreachable => 7,
            Self::Untrusted => 8,
            Self::Storage => 9,
            Self::Missing => 10,
        }
    }
}

/// A failure.
#[derive(Debug, Clone, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// Its kind.
    pub kind: Kind,
    /// One line for people.
    pub message: String,
}

/// Short for results of the daemon.
pub type Result<T> = std::result::Result<T, Failure>;

impl Failure {
    /// A failure of this kind.
    #[must_use]
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into() }
    }

    /// Malformed or senseless input.
    #[must_use]
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(Kind::Invalid, message)
    }

    /// A name that does not exist.
    #[must_use]
    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(Kind::NotFound, message)
    }

    /// A name that exists already.
    #[must_use]
    pub fn conflict(message: impl Into<String>) -> Self {
        Self::new(Kind::Conflict, message)
    }

    /// Forbidden by the state of things.
    #[must_use]
    pub fn refused(message: impl Into<String>) -> Self {
        Self::new(Kind::Refused, message)
    }

    /// Somebody who does not answer.
    #[must_use]
    pub fn unreachable(message: impl Into<String>) -> Self {
        Self::new(Kind::Unreachable, message)
    }

    /// A bug.
    #[must_use]
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(Kind::Internal, message)
    }

    /// The same with what was being done before it.
    #[must_use]
    pub fn while_doing(self, what: &str) -> Self {
        Self { kind: self.kind, message: format!("{what}: {}", self.message) }
    }
}

impl From<srn_store::StoreError> for Failure {
    fn from(error: srn_store::StoreError) -> Self {
        use srn_store::StoreError as E;
        let kind = match &error {
            E::NotInHistory(_) => Kind::NotFound,
            E::Invalid(_) | E::NotNext { .. } => Kind::Invalid,
            E::NewerVersion { .. } => Kind::Refused,
            E::Io { .. } | E::Full(_) | E::Corrupt(_) | E::Stopped(_) => Kind::Storage,
        };
        let way_out = match &error {
            E::NewerVersion { .. } => "; update srn",
            E::Full(_) => "; make room",
            _ => "",
        };
        Self::new(kind, format!("{error}{way_out}"))
    }
}

impl From<srn_link::LinkError> for Failure {
    fn from(error: srn_link::LinkError) -> Self {
        use srn_link::LinkError as E;
        let kind = match &error {
            E::Unreachable { .. } => Kind::Unreachable,
            E::WrongKey { .. } | E::NotPaired(_) | E::Refused(_) | E::Unproven(_) => {
                Kind::Untrusted
            }
            E::Address(_) => Kind::Invalid,
            E::Version(_) | E::Misbehaved(_) => Kind::Refused,
            E::Io { .. } | E::Identity(_) => Kind::Internal,
        };
        Self::new(kind, error.to_string())
    }
}
