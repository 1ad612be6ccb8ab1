//! What can go wrong in the store, sorted by whose fault it is.

use std::io;

use srn_core::ids::Seq;

/// An error of the store.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The operating system or the medium failed.
    #[error("{doing}: {source}")]
    Io {
        /// The operation and the object.
        doing: String,
        /// What the system said.
        source: io::Error,
    },
    /// There is no room; nothing was changed.
    #[error("no space: {0}")]
    Full(String),
    /// Bytes that were durable are not what was written.
    #[error("damaged: {0}")]
    Corrupt(String),
    /// It was written by a newer version of this program.
    #[error("{what} has format version {found}, this program knows up to {known}")]
    NewerVersion {
        /// What was read.
        what: String,
        /// Its version.
        found: u16,
        /// The newest version known here.
        known: u16,
    },
    /// The position asked for is not part of the history kept here.
    #[error("{0}")]
    NotInHistory(String),
    /// A frame that does not continue the log.
    #[error("frame {got} does not continue the log, whose last frame is {last}")]
    NotNext {
        /// The frame.
        got: Seq,
        /// The last frame of the log.
        last: Seq,
    },
    /// An earlier failure stopped this log; it has to be opened anew.
    #[error("stopped by an earlier failure: {0}")]
    Stopped(String),
    /// The caller asked for something that cannot be.
    #[error("{0}")]
    Invalid(String),
}

/// Short for results of the store.
pub type Result<T> = std::result::Result<T, StoreError>;

/// Says what was being done when the system failed. A full disk is told apart.
pub(crate) trait Doing<T> {
    fn doing(self, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T> Doing<T> for io::Result<T> {
    fn doing(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|source| {
            if source.kind() == io::ErrorKind::StorageFull {
                StoreError::Full(what())
            } else {
                StoreError::Io { doing: what(), source }
            }
        })
    }
}
