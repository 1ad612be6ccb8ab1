//! The operating system's files.

use std::io;
use std::io::IoSlice;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{FallocateFlags, Mode, OFlags};
use rustix::io::ReadWriteFlags;

use super::{Access, File, Fs};

/// The most parts that one vectored write takes (`IOV_MAX`).
const PARTS_MAX: usize = 1024;

/// The operating system's file system.
#[derive(Debug, Clone, Copy, Default)]
pub struct OsFs;

/// The operating system's file system, for looking only: files are opened for reading, through the
/// page cache, and nothing else is allowed. Works on volumes that are mounted read-only.
#[derive(Debug, Clone, Copy, Default)]
pub struct OsReadFs;

#[derive(Debug)]
struct OsFile {
    fd: OwnedFd,
}

fn open(path: &Path, access: Access, create: bool) -> io::Result<Arc<dyn File>> {
    let mut flags = OFlags::RDWR | OFlags::CLOEXEC;
    if create {
        flags |= OFlags::CREATE | OFlags::EXCL;
    }
    let mode = Mode::RUSR | Mode::WUSR;
    let fd = match access {
        Access::Buffered => rustix::fs::open(path, flags, mode)?,
        Access::Direct => match rustix::fs::open(path, flags | OFlags::DIRECT, mode) {
            // Some file systems have no direct access; the store is right without it, only slower.
            Err(rustix::io::Errno::INVAL) => {
                // The file may have been made before the flag was refused.
                rustix::fs::open(path, flags.difference(OFlags::EXCL), mode)?
            }
            other => other?,
        },
    };
    Ok(Arc::new(OsFile { fd }))
}

impl Fs for OsFs {
    fn create(&self, path: &Path, access: Access) -> io::Result<Arc<dyn File>> {
        open(path, access, true)
    }

    fn open(&self, path: &Path, access: Access) -> io::Result<Arc<dyn File>> {
        open(path, access, false)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        Ok(rustix::fs::rename(from, to)?)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        std::fs::remove_file(path)
    }

    fn create_dir(&self, path: &Path) -> io::Result<()> {
        std::fs::create_dir_all(path)
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        std::fs::remove_dir_all(path)
    }

    fn list(&self, path: &Path) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in std::fs::read_dir(path)? {
            // Names that are not UTF-8 are not ours.
            if let Ok(name) = entry?.file_name().into_string() {
                names.push(name);
            }
        }
        names.sort();
        Ok(names)
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        let dir = rustix::fs::open(path, OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        Ok(rustix::fs::fsync(dir)?)
    }

    fn free_bytes(&self, path: &Path) -> io::Result<u64> {
        let stat = rustix::fs::statvfs(path)?;
        Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
    }
}

impl Fs for OsReadFs {
    fn create(&self, _path: &Path, _access: Access) -> io::Result<Arc<dyn File>> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn open(&self, path: &Path, _access: Access) -> io::Result<Arc<dyn File>> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        Ok(Arc::new(OsFile { fd: rustix::fs::open(path, flags, Mode::empty())? }))
    }

    fn rename(&self, _from: &Path, _to: &Path) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn remove(&self, _path: &Path) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn create_dir(&self, _path: &Path) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn remove_dir(&self, _path: &Path) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn list(&self, path: &Path) -> io::Result<Vec<String>> {
        OsFs.list(path)
    }

    fn sync_dir(&self, _path: &Path) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn free_bytes(&self, _path: &Path) -> io::Result<u64> {
        Ok(0)
    }
}

impl File for OsFile {
    fn size(&self) -> io::Result<u64> {
        let stat = rustix::fs::fstat(&self.fd)?;
        u64::try_from(stat.st_size).map_err(|_| io::Error::other("a file has a negative length"))
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let mut done = 0;
        while let Some(rest) = buf.get_mut(done..).filter(|rest| !rest.is_empty()) {
            match rustix::io::pread(self.fd.as_fd(), rest, offset + done as u64) {
                Ok(0) => break,
                Ok(read) => done += read,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(done)
    }

    fn write_at(&self, parts: &[IoSlice<'_>], mut offset: u64, durable: bool) -> io::Result<()> {
        let flags = if durable { ReadWriteFlags::DSYNC } else { ReadWriteFlags::empty() };
        for some in parts.chunks(PARTS_MAX) {
            let mut parts = some.to_vec();
            let mut rest = parts.as_mut_slice();
            IoSlice::advance_slices(&mut rest, 0);
            while !rest.is_empty() {
                match rustix::io::pwritev2(self.fd.as_fd(), rest, offset, flags) {
                    Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                    Ok(written) => {
                        offset += written as u64;
                        IoSlice::advance_slices(&mut rest, written);
                    }
                    Err(rustix::io::Errno::INTR) => {}
                    Err(error) => return Err(error.into()),
                }
            }
        }
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(rustix::fs::fdatasync(&self.fd)?)
    }

    fn allocate(&self, len: u64) -> io::Result<()> {
        match rustix::fs::fallocate(&self.fd, FallocateFlags::empty(), 0, len) {
            Err(rustix::io::Errno::OPNOTSUPP) => self.set_len(len),
            other => Ok(other?),
        }
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        Ok(rustix::fs::ftruncate(&self.fd, len)?)
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
        // The file's own offset, which this moves, is used by nobody.
        match rustix::fs::seek(&self.fd, rustix::fs::SeekFrom::Data(offset)) {
            Ok(at) => Ok(Some(at)),
            Err(rustix::io::Errno::NXIO) => Ok(None),
            // A file system that does not know its holes may hold anything anywhere.
            Err(rustix::io::Errno::INVAL | rustix::io::Errno::OPNOTSUPP) => Ok(Some(offset)),
            Err(error) => Err(error.into()),
        }
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        if len == 0 {
            return Ok(());
        }
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match rustix::fs::fallocate(&self.fd, flags, offset, len) {
            Err(rustix::io::Errno::OPNOTSUPP) => self.write_zeros(offset, len),
            other => Ok(other?),
        }
    }
}

impl OsFile {
    fn write_zeros(&self, mut offset: u64, mut len: u64) -> io::Result<()> {
        let zeros = super::AlignedBuf::zeroed(1 << 20);
        while len > 0 {
            let part = usize::try_from(len).unwrap_or(usize::MAX).min(zeros.len());
            let slice = zeros.get(..part).unwrap_or_default();
            self.write_at(&[IoSlice::new(slice)], offset, false)?;
            offset += part as u64;
            len -= part as u64;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_keep_what_is_written() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        for (access, durable) in
            [(Access::Direct, true), (Access::Direct, false), (Access::Buffered, true)]
        {
            let file = OsFs.create(&path, access).unwrap();
            assert!(OsFs.create(&path, access).is_err(), "create is exclusive");
            file.allocate(64 * 1024).unwrap();
            assert_eq!(file.size().unwrap(), 64 * 1024);
            let mut data = crate::io::AlignedBuf::zeroed(8192);
            data.fill(7);
            let parts = [IoSlice::new(&data[..4096]), IoSlice::new(&data)];
            file.write_at(&parts, 4096, durable).unwrap();
            file.sync().unwrap();
            file.punch(8192, 4096).unwrap();
            let mut back = crate::io::AlignedBuf::zeroed(64 * 1024);
            assert_eq!(file.read_at(&mut back, 0).unwrap(), 64 * 1024);
            for (page, value) in back.chunks(4096).zip([0u8, 7, 0, 7, 0]) {
                assert!(page.iter().all(|byte| *byte == value));
            }
            assert_eq!(file.read_at(&mut back, 60 * 1024).unwrap(), 4096, "the file ends");
            OsFs.remove(&path).unwrap();
        }
    }

    #[test]
    fn more_parts_than_one_call_takes() {
        let dir = tempfile::tempdir().unwrap();
        let file = OsFs.create(&dir.path().join("file"), Access::Buffered).unwrap();
        let bytes: Vec<u8> = (0..3000u32).map(|n| n.to_le_bytes()[0]).collect();
        let parts: Vec<IoSlice<'_>> = bytes.chunks(1).map(IoSlice::new).collect();
        file.write_at(&parts, 0, false).unwrap();
        let mut back = vec![0; 3000];
        assert_eq!(file.read_at(&mut back, 0).unwrap(), 3000);
        assert_eq!(back, bytes);
    }

    #[test]
    fn free_space_and_names() {
        let dir = tempfile::tempdir().unwrap();
        assert!(OsFs.free_bytes(dir.path()).unwrap() > 0);
        for name in ["b", "a"] {
            OsFs.create(&dir.path().join(name), Access::Buffered).unwrap();
        }
        OsFs.sync_dir(dir.path()).unwrap();
        assert_eq!(OsFs.list(dir.path()).unwrap(), ["a", "b"]);
    }
}
