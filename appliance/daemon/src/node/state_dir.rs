//! The state directory: held by one daemon at a time, with the node's key in it.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;
use srn_link::Identity;

use crate::error::{Failure, Kind, Result};

/// The state directory, locked.
#[derive(Debug)]
pub struct StateDir {
    path: PathBuf,
    _lock: File,
}

impl StateDir {
    /// Makes the directory if it is not there, and takes its lock.
    ///
    /// # Errors
    /// [`Kind::Conflict`] when another daemon has it; [`Kind::Storage`] when it cannot be written.
    pub fn take(path: &Path) -> Result<Self> {
        let failed = |doing: &str, error: std::io::Error| {
            let way_out = match error.kind() {
                std::io::ErrorKind::ReadOnlyFilesystem => "; mount it writable",
                std::io::ErrorKind::StorageFull => "; make room on it",
                std::io::ErrorKind::PermissionDenied => "; run the daemon as root",
                _ => "",
            };
            Failure::new(
                Kind::Storage,
                format!("state directory {}: {doing}: {error}{way_out}", path.display()),
            )
        };
        for dir in [path.to_owned(), path.join("groups")] {
            std::fs::create_dir_all(&dir).map_err(|error| failed("making it", error))?;
        }
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(path.join("lock"))
            .map_err(|error| failed("opening its lock", error))?;
        match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => {
                return Err(Failure::conflict(format!(
                    "state directory {} is in use by another daemon, or srn inspect looks at it; \
                     stop that first, or give this one its own node.state_dir",
                    path.display()
                )));
            }
            Err(error) => return Err(failed("locking it", error.into())),
        }
        Ok(Self { path: path.to_owned(), _lock: lock })
    }

    /// The node's memory.
    #[must_use]
    pub fn fleet_path(&self) -> PathBuf {
        self.path.join("fleet.db")
    }

    /// The node's identity, made at the first start.
    ///
    /// # Errors
    /// When the key cannot be read or written.
    pub fn identity(&self) -> Result<Identity> {
        let path = self.path.join("node.key");
        let failed = |doing: &str, error: &dyn std::fmt::Display| {
            Failure::new(Kind::Storage, format!("{doing} {}: {error}", path.display()))
        };
        match std::fs::read(&path) {
            Ok(der) => {
                return Identity::from_pkcs8(&der).map_err(|error| {
                    failed("the node's key cannot be used; restore it from a backup:", &error)
                });
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed("reading the node's key", &error)),
        }
        let identity = Identity::generate()?;
        // Whole or not at all: a node with half a key would be another node.
        let temporary = self.path.join("node.key.tmp");
        let write = || {
            let _ = std::fs::remove_file(&temporary);
            let mut file =
                OpenOptions::new().create_new(true).write(true).mode(0o600).open(&temporary)?;
            file.write_all(identity.pkcs8())?;
            file.sync_all()?;
            rustix::fs::rename(&temporary, &path)?;
            File::open(&self.path)?.sync_all()
        };
        write().map_err(|error| failed("writing the node's key", &error))?;
        Ok(identity)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_daemon_at_a_time_and_one_key_for_ever() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state");
        let first = StateDir::take(&path).unwrap();
        let id = first.identity().unwrap().id();
        let error = StateDir::take(&path).unwrap_err();
        assert_eq!(error.kind, Kind::Conflict);
        assert!(error.message.contains("another daemon"), "{error}");
        drop(first);
        let again = StateDir::take(&path).unwrap();
        assert_eq!(again.identity().unwrap().id(), id);
        std::fs::write(path.join("node.key"), b"garbage").unwrap();
        assert_eq!(again.identity().unwrap_err().kind, Kind::Storage);
    }
}
