//! All input and output of this crate goes through two small traits, so that the same store runs
//! on a file system, on the simulated disk that loses, tears and reorders what was not synced, and
//! on whatever comes later.
//!
//! The traits promise what POSIX promises and nothing more: a write is durable only after a sync
//! (or when it was asked to be durable), a name only after its directory was synced, and the two
//! know nothing of each other.

mod buf;
mod os;
mod shadow;
mod volume;

pub use buf::{AlignedBuf, BufPool, PooledBuf, is_aligned};
pub use os::{OsFs, OsReadFs};
pub use shadow::ShadowFs;
pub use volume::Volume;

use std::fmt::Debug;
use std::io;
use std::io::IoSlice;
use std::path::Path;
use std::sync::Arc;

/// How a file is accessed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Around the page cache. Buffers, offsets and lengths must be multiples of 4096.
    Direct,
    /// Through the page cache.
    Buffered,
}

/// A directory tree on one state volume.
pub trait Fs: Send + Sync + Debug {
    /// Makes a new empty file; its name is durable only after [`Fs::sync_dir`].
    ///
    /// # Errors
    /// As the operating system says; `AlreadyExists` when there is one.
    fn create(&self, path: &Path, access: Access) -> io::Result<Arc<dyn File>>;

    /// Opens an existing file for reading and writing.
    ///
    /// # Errors
    /// As the operating system says.
    fn open(&self, path: &Path, access: Access) -> io::Result<Arc<dyn File>>;

    /// Renames over whatever is there; durable only after [`Fs::sync_dir`].
    ///
    /// # Errors
    /// As the operating system says.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;

    /// Removes a file.
    ///
    /// # Errors
    /// As the operating system says.
    fn remove(&self, path: &Path) -> io::Result<()>;

    /// Makes a directory, and its parents, if they are not there.
    ///
    /// # Errors
    /// As the operating system says.
    fn create_dir(&self, path: &Path) -> io::Result<()>;

    /// Removes a directory and everything in it.
    ///
    /// # Errors
    /// As the operating system says.
    fn remove_dir(&self, path: &Path) -> io::Result<()>;

    /// The names in a directory, sorted.
    ///
    /// # Errors
    /// As the operating system says.
    fn list(&self, path: &Path) -> io::Result<Vec<String>>;

    /// Makes the names in a directory durable.
    ///
    /// # Errors
    /// As the operating system says.
    fn sync_dir(&self, path: &Path) -> io::Result<()>;

    /// Bytes free for this process on the volume that holds `path`.
    ///
    /// # Errors
    /// As the operating system says.
    fn free_bytes(&self, path: &Path) -> io::Result<u64>;
}

/// An open file. Every method may be called from any thread.
pub trait File: Send + Sync + Debug {
    /// Length in bytes.
    ///
    /// # Errors
    /// As the operating system says.
    fn size(&self) -> io::Result<u64>;

    /// Reads until `buf` is full or the file ends; returns the bytes read.
    ///
    /// # Errors
    /// As the operating system says.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize>;

    /// Writes all parts one behind the other. With `durable` the bytes written here are durable
    /// when it returns (earlier writes need not be).
    ///
    /// # Errors
    /// As the operating system says; then any part of it may have been written.
    fn write_at(&self, parts: &[IoSlice<'_>], offset: u64, durable: bool) -> io::Result<()>;

    /// Makes everything written before, and the file's length, durable.
    ///
    /// # Errors
    /// As the operating system says; then nothing is known about what is durable.
    fn sync(&self) -> io::Result<()>;

    /// Reserves space for `len` bytes from the start and makes the file that long.
    ///
    /// # Errors
    /// As the operating system says; `StorageFull` when there is no room.
    fn allocate(&self, len: u64) -> io::Result<()>;

    /// Sets the length; what is beyond it reads as zero when the file grows.
    ///
    /// # Errors
    /// As the operating system says.
    fn set_len(&self, len: u64) -> io::Result<()>;

    /// The first offset at or behind `offset` where the file may hold anything but zeros; none when
    /// there is only a hole up to its end.
    ///
    /// # Errors
    /// As the operating system says.
    fn next_data(&self, offset: u64) -> io::Result<Option<u64>>;

    /// Frees the space of a range, which reads as zero from then on.
    ///
    /// # Errors
    /// As the operating system says.
    fn punch(&self, offset: u64, len: u64) -> io::Result<()>;
}
