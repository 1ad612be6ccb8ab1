//! A directory tree that is read and never written: what is written to it stays in memory.
//!
//! Opening a group repairs what a crash has left: it rewrites the end of the log, finishes a
//! retirement, seals segments, removes left-over files. On top of this file system the same code
//! runs, and finds the same ends and the same content, while not one byte on the volume changes.
//! So there is no second reader of the store's files that could see them differently.
//!
//! It knows nothing of the store's formats. What is written is gone with it.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, IoSlice};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use srn_core::extent::{Extent, ExtentMap, Slice};
use srn_core::ids::DiskNo;

use super::{Access, File, Fs};

/// A file system in which all changes stay in memory.
#[derive(Debug)]
pub struct ShadowFs {
    lower: Arc<dyn Fs>,
    changes: Mutex<Changes>,
    room: Arc<Room>,
}

/// What differs from the tree below.
#[derive(Debug, Default)]
struct Changes {
    /// Files that were opened or made here; `None` for those that were removed.
    files: BTreeMap<PathBuf, Option<Arc<ShadowFile>>>,
    /// Directories made here.
    dirs: BTreeSet<PathBuf>,
}

/// Memory for what is written. Never given back: whoever opens a group to look at it writes little.
#[derive(Debug)]
struct Room {
    used: AtomicU64,
    max: u64,
}

impl Room {
    fn take(&self, bytes: u64) -> io::Result<()> {
        let taken = self.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |used| {
            used.checked_add(bytes).filter(|used| *used <= self.max)
        });
        taken.map(|_| ()).map_err(|_| io::ErrorKind::StorageFull.into())
    }
}

impl ShadowFs {
    /// Shows `lower`, of which nothing but [`Fs::open`], [`Fs::list`] and reads are used. At most
    /// `bytes_max` bytes can be written before it counts as full.
    #[must_use]
    pub fn new(lower: Arc<dyn Fs>, bytes_max: u64) -> Self {
        let room = Arc::new(Room { used: AtomicU64::new(0), max: bytes_max });
        Self { lower, changes: Mutex::default(), room }
    }

    fn lock(&self) -> MutexGuard<'_, Changes> {
        self.changes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn find(
        &self,
        changes: &mut Changes,
        path: &Path,
        access: Access,
    ) -> io::Result<Arc<ShadowFile>> {
        match changes.files.get(path) {
            Some(Some(file)) => return Ok(file.clone()),
            Some(None) => return Err(io::ErrorKind::NotFound.into()),
            None => {}
        }
        let below = self.lower.open(path, access)?;
        let len = below.size()?;
        let over = Over { len, below: len, parts: ExtentMap::new() };
        let file =
            ShadowFile { below: Some(below), over: Mutex::new(over), room: self.room.clone() };
        let file = Arc::new(file);
        changes.files.insert(path.into(), Some(file.clone()));
        Ok(file)
    }

    fn is_below(&self, path: &Path) -> bool {
        let name = path.file_name().and_then(|name| name.to_str());
        let names = path.parent().map(|parent| self.lower.list(parent));
        matches!((name, names), (Some(name), Some(Ok(names))) if names.iter().any(|is| is == name))
    }
}

impl Fs for ShadowFs {
    fn create(&self, path: &Path, _access: Access) -> io::Result<Arc<dyn File>> {
        let mut changes = self.lock();
        let taken = match changes.files.get(path) {
            Some(file) => file.is_some(),
            None => self.is_below(path),
        };
        if taken {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let over = Over { len: 0, below: 0, parts: ExtentMap::new() };
        let file =
            Arc::new(ShadowFile { below: None, over: Mutex::new(over), room: self.room.clone() });
        changes.files.insert(path.into(), Some(file.clone()));
        Ok(file)
    }

    fn open(&self, path: &Path, access: Access) -> io::Result<Arc<dyn File>> {
        Ok(self.find(&mut self.lock(), path, access)?)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut changes = self.lock();
        let file = self.find(&mut changes, from, Access::Buffered)?;
        changes.files.insert(from.into(), None);
        changes.files.insert(to.into(), Some(file));
        Ok(())
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        let mut changes = self.lock();
        let there = match changes.files.get(path) {
            Some(file) => file.is_some(),
            None => self.is_below(path),
        };
        if !there {
            return Err(io::ErrorKind::NotFound.into());
        }
        changes.files.insert(path.into(), None);
        Ok(())
    }

    fn create_dir(&self, path: &Path) -> io::Result<()> {
        self.lock().dirs.insert(path.into());
        Ok(())
    }

    fn remove_dir(&self, _path: &Path) -> io::Result<()> {
        // Only a group that is deleted wants this, and it is not deleted by looking at it.
        Err(io::ErrorKind::Unsupported.into())
    }

    fn list(&self, path: &Path) -> io::Result<Vec<String>> {
        let changes = self.lock();
        let mut names: BTreeSet<String> = match self.lower.list(path) {
            Ok(names) => names.into_iter().collect(),
            Err(error)
                if error.kind() == io::ErrorKind::NotFound && changes.dirs.contains(path) =>
            {
                BTreeSet::new()
            }
            Err(error) => return Err(error),
        };
        for (file, now) in changes.files.iter().filter(|(file, _)| file.parent() == Some(path)) {
            let Some(name) = file.file_name().and_then(|name| name.to_str()) else { continue };
            if now.is_some() {
                names.insert(name.into());
            } else {
                names.remove(name);
            }
        }
        Ok(names.into_iter().collect())
    }

    fn sync_dir(&self, _path: &Path) -> io::Result<()> {
        Ok(())
    }

    fn free_bytes(&self, _path: &Path) -> io::Result<u64> {
        // Only what is written takes room; reserving does not.
        Ok(u64::MAX)
    }
}

#[derive(Debug)]
struct ShadowFile {
    below: Option<Arc<dyn File>>,
    over: Mutex<Over>,
    room: Arc<Room>,
}

/// What was written over a file. Extents count bytes here, of the one disk 0.
#[derive(Debug)]
struct Over {
    len: u64,
    /// How much of the file below still shows.
    below: u64,
    parts: ExtentMap<Part>,
}

#[derive(Debug, Clone)]
enum Part {
    Zero,
    Data(Bytes),
}

impl Slice for Part {
    fn slice(&self, skip: u64, len: u64) -> Self {
        match self {
            Self::Zero => Self::Zero,
            Self::Data(bytes) => {
                let at =
                    |offset: u64| usize::try_from(offset).unwrap_or(usize::MAX).min(bytes.len());
                Self::Data(bytes.slice(at(skip)..at(skip.saturating_add(len))))
            }
        }
    }
}

const FILE: DiskNo = DiskNo(0);

impl ShadowFile {
    fn lock(&self) -> MutexGuard<'_, Over> {
        self.over.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl File for ShadowFile {
    fn size(&self) -> io::Result<u64> {
        Ok(self.lock().len)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let over = self.lock();
        let wanted = usize::try_from(over.len.saturating_sub(offset)).unwrap_or(usize::MAX);
        let wanted = wanted.min(buf.len());
        // The whole buffer goes down: direct input wants whole pages, also where the file ends.
        let shown = usize::try_from(over.below.saturating_sub(offset)).unwrap_or(usize::MAX);
        let mut read = 0;
        if let Some(below) = self.below.as_ref().filter(|_| shown > 0) {
            read = below.read_at(buf, offset)?.min(shown);
        }
        if let Some(rest) = buf.get_mut(read.min(wanted)..wanted) {
            rest.fill(0);
        }
        for (part, what) in over.parts.overlaps(FILE, Extent::new(offset, wanted as u64)) {
            let from = usize::try_from(part.start - offset).unwrap_or(usize::MAX);
            let len = usize::try_from(part.sectors).unwrap_or(usize::MAX);
            let Some(to) = buf.get_mut(from..from.saturating_add(len)) else { continue };
            match what {
                Part::Zero => to.fill(0),
                Part::Data(bytes) => to.copy_from_slice(&bytes),
            }
        }
        Ok(wanted)
    }

    fn write_at(&self, parts: &[IoSlice<'_>], offset: u64, _durable: bool) -> io::Result<()> {
        let bytes: Vec<u8> = parts.iter().flat_map(|part| part.iter().copied()).collect();
        let len = bytes.len() as u64;
        self.room.take(len)?;
        let mut over = self.lock();
        over.parts.insert(FILE, Extent::new(offset, len), Part::Data(bytes.into()));
        over.len = over.len.max(offset.saturating_add(len));
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn allocate(&self, len: u64) -> io::Result<()> {
        let mut over = self.lock();
        over.len = over.len.max(len);
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut over = self.lock();
        if let Some(gone) = over.len.checked_sub(len) {
            over.parts.remove(FILE, Extent::new(len, gone));
            over.below = over.below.min(len);
        }
        over.len = len;
        Ok(())
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
        let over = self.lock();
        let rest = Extent::new(offset, over.len.saturating_sub(offset));
        let parts = over.parts.overlaps(FILE, rest);
        let own = parts.into_iter().find(|(_, what)| matches!(what, Part::Data(_)));
        let below = match &self.below {
            Some(below) => below.next_data(offset)?.filter(|at| *at < over.below),
            None => None,
        };
        // What was punched over data below is told as data: it may be, and reads as zero.
        Ok(own.map(|(part, _)| part.start).into_iter().chain(below).min())
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        let mut over = self.lock();
        let len = len.min(over.len.saturating_sub(offset));
        over.parts.insert(FILE, Extent::new(offset, len), Part::Zero);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::{OsFs, OsReadFs};

    fn all(file: &Arc<dyn File>) -> Vec<u8> {
        let mut bytes = vec![0xee; file.size().unwrap() as usize + 100];
        let read = file.read_at(&mut bytes, 0).unwrap();
        bytes.truncate(read);
        bytes
    }

    /// Every change is seen here, in the order of a real file system, and none is seen below.
    #[test]
    fn changes_show_and_stay_above() {
        let dir = tempfile::tempdir().unwrap();
        for (name, bytes) in [("a", "aaaaaaaa"), ("b", "bbbb")] {
            std::fs::write(dir.path().join(name), bytes).unwrap();
        }
        let path = |name: &str| dir.path().join(name);
        let shadow = ShadowFs::new(Arc::new(OsReadFs), 64);
        let list = || shadow.list(dir.path()).unwrap().join(" ");

        let a = shadow.open(&path("a"), Access::Buffered).unwrap();
        a.write_at(&[IoSlice::new(b"12"), IoSlice::new(b"3")], 2, true).unwrap();
        a.punch(6, 100).unwrap();
        assert_eq!(all(&a), b"aa123a\0\0", "written, kept, punched but no longer");
        a.write_at(&[IoSlice::new(b"zz")], 9, false).unwrap();
        assert_eq!(all(&a), b"aa123a\0\0\0zz");
        let again = shadow.open(&path("a"), Access::Direct).unwrap();
        assert_eq!(all(&again), all(&a), "another opening sees the same");
        a.set_len(3).unwrap();
        a.allocate(5).unwrap();
        assert_eq!(all(&a), b"aa1\0\0", "what was cut off does not come back");

        assert_eq!(
            shadow.create(&path("b"), Access::Buffered).unwrap_err().kind(),
            io::ErrorKind::AlreadyExists
        );
        let new = shadow.create(&path("c"), Access::Buffered).unwrap();
        new.write_at(&[IoSlice::new(b"new")], 0, true).unwrap();
        shadow.rename(&path("c"), &path("b")).unwrap();
        assert_eq!(list(), "a b");
        assert_eq!(all(&shadow.open(&path("b"), Access::Buffered).unwrap()), b"new");
        shadow.remove(&path("a")).unwrap();
        assert_eq!(list(), "b");
        for missing in ["a", "c"] {
            let error = shadow.open(&path(missing), Access::Buffered).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::NotFound, "{missing}");
            assert!(shadow.remove(&path(missing)).is_err(), "{missing}");
        }
        shadow.create(&path("a"), Access::Buffered).unwrap();
        assert_eq!(list(), "a b");
        let full = new.write_at(&[IoSlice::new(&[0; 64])], 0, true).unwrap_err();
        assert_eq!(full.kind(), io::ErrorKind::StorageFull);

        assert_eq!(std::fs::read(path("a")).unwrap(), b"aaaaaaaa");
        assert_eq!(std::fs::read(path("b")).unwrap(), b"bbbb");
        assert_eq!(OsFs.list(dir.path()).unwrap(), ["a", "b"]);
    }

    /// What is below is opened so that it cannot be written even by mistake.
    #[test]
    fn the_lower_tree_is_opened_for_reading_only() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        std::fs::write(&path, vec![7; 8192]).unwrap();
        let file = OsReadFs.open(&path, Access::Direct).unwrap();
        assert!(file.write_at(&[IoSlice::new(b"x")], 0, false).is_err());
        assert!(file.set_len(1).is_err() && file.allocate(1 << 20).is_err());
        assert!(OsReadFs.create(&dir.path().join("b"), Access::Buffered).is_err());
        assert!(OsReadFs.remove(&path).is_err() && OsReadFs.rename(&path, &path).is_err());
        assert_eq!(std::fs::read(&path).unwrap(), vec![7; 8192]);
    }
}
