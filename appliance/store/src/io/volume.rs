//! The state volume as the rest of the crate uses it: it stops for good at the first failed write
//! or sync.
//!
//! After a failed sync nobody knows which bytes are durable, and a second sync may claim success
//! for bytes that the first one dropped (this is how Linux page-cache write-back behaves). So
//! there is no second try: every later operation is refused until the store was opened anew, which
//! reads back what is really there.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use srn_core::mutants::{self, Mutant};

use super::{Access, File, Fs, IoSlice};

/// A file system that latches failed.
#[derive(Debug, Clone)]
pub struct Volume {
    fs: Arc<dyn Fs>,
    latch: Arc<Latch>,
}

#[derive(Debug, Default)]
struct Latch {
    failed: AtomicBool,
    reason: Mutex<String>,
}

impl Latch {
    fn check(&self) -> io::Result<()> {
        if self.failed.load(Ordering::Acquire) {
            let reason = self.reason.lock().unwrap_or_else(PoisonError::into_inner);
            return Err(io::Error::other(format!("the state volume failed earlier: {reason}")));
        }
        Ok(())
    }

    /// Latches on every error but a full disk, a quota, or a file that would be too large: those
    /// damage nothing, as space is reserved before it is relied on.
    fn watch<T>(&self, what: &str, result: io::Result<T>) -> io::Result<T> {
        if let Err(error) = &result
            && !mutants::is(Mutant::GoesOnAfterError)
            && !matches!(
                error.kind(),
                io::ErrorKind::StorageFull
                    | io::ErrorKind::QuotaExceeded
                    | io::ErrorKind::FileTooLarge
            )
        {
            let mut reason = self.reason.lock().unwrap_or_else(PoisonError::into_inner);
            if !self.failed.swap(true, Ordering::AcqRel) {
                *reason = format!("{what}: {error}");
                log::error!("state volume: {what}: {error}; all work on it stops");
            }
        }
        result
    }
}

impl Volume {
    /// Wraps a file system.
    #[must_use]
    pub fn new(fs: Arc<dyn Fs>) -> Self {
        Self { fs, latch: Arc::default() }
    }

    /// Why the volume failed, if it did.
    #[must_use]
    pub fn failure(&self) -> Option<String> {
        self.latch
            .failed
            .load(Ordering::Acquire)
            .then(|| self.latch.reason.lock().unwrap_or_else(PoisonError::into_inner).clone())
    }

    fn wrap(&self, file: Arc<dyn File>) -> Arc<dyn File> {
        Arc::new(Watched { file, latch: self.latch.clone() })
    }
}

impl Fs for Volume {
    fn create(&self, path: &Path, access: Access) -> io::Result<Arc<dyn File>> {
        self.latch.check()?;
        // A name that cannot be made has harmed nothing.
        Ok(self.wrap(self.fs.create(path, access)?))
    }

    fn open(&self, path: &Path, access: Access) -> io::Result<Arc<dyn File>> {
        Ok(self.wrap(self.fs.open(path, access)?))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.latch.check()?;
        self.latch.watch("renaming a file", self.fs.rename(from, to))
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.latch.check()?;
        self.fs.remove(path)
    }

    fn create_dir(&self, path: &Path) -> io::Result<()> {
        self.latch.check()?;
        self.fs.create_dir(path)
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        self.latch.check()?;
        self.fs.remove_dir(path)
    }

    fn list(&self, path: &Path) -> io::Result<Vec<String>> {
        self.fs.list(path)
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        self.latch.check()?;
        self.latch.watch("syncing a directory", self.fs.sync_dir(path))
    }

    fn free_bytes(&self, path: &Path) -> io::Result<u64> {
        self.fs.free_bytes(path)
    }
}

#[derive(Debug)]
struct Watched {
    file: Arc<dyn File>,
    latch: Arc<Latch>,
}

impl File for Watched {
    fn size(&self) -> io::Result<u64> {
        self.file.size()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        // Reading stays possible on a failed volume: it is what recovery lives on.
        self.file.read_at(buf, offset)
    }

    fn write_at(&self, parts: &[IoSlice<'_>], offset: u64, durable: bool) -> io::Result<()> {
        self.latch.check()?;
        self.latch.watch("writing", self.file.write_at(parts, offset, durable))
    }

    fn sync(&self) -> io::Result<()> {
        self.latch.check()?;
        let synced = self.file.sync();
        if mutants::is(Mutant::FailedSyncIgnored) {
            return Ok(());
        }
        self.latch.watch("syncing", synced)
    }

    fn allocate(&self, len: u64) -> io::Result<()> {
        self.latch.check()?;
        self.latch.watch("reserving space", self.file.allocate(len))
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.latch.check()?;
        self.latch.watch("setting a length", self.file.set_len(len))
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
        self.file.next_data(offset)
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        self.latch.check()?;
        self.latch.watch("freeing space", self.file.punch(offset, len))
    }
}
