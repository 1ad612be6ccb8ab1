//! Layer files: content of a stretch of history of which only the end is still a point in time.
//!
//! A layer is what remains of a stretch when the checkpoints inside it are given up: for each
//! sector the newest content at the stretch's end. Its index is a run like any other; the content
//! lies in files of this kind, stored block behind stored block:
//!
//! ```text
//! header page | stored blocks, one behind the other | zeros up to a page
//! ```
//!
//! A layer file is written once, synced, listed in the manifest, and never changed. It knows
//! nothing of which blocks it holds: the run does, and every block there has its checksum.

use std::io::IoSlice;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use srn_core::bytes::{Reader, Writer, content_sum};
use srn_core::ids::{GroupId, Seq};
use srn_core::limits::PAGE;
use srn_core::mutants::{self, Mutant};

use crate::catalog::{position, put_position};
use crate::error::{Doing, Result, StoreError};
use crate::io::{Access, AlignedBuf, File, Fs, Volume};

/// First bytes of a layer file.
const MAGIC: [u8; 4] = *b"SRNl";

/// Version of the header's layout.
const VERSION: u16 = 1;

/// Bytes before the first block.
const HEADER_LEN: u64 = PAGE as u64;

/// The most bytes of one file: offsets of content fit 32 bits. A layer may have many files.
pub const LAYER_BYTES_MAX: u64 = 1 << 30;

/// Bytes gathered for one write.
const GATHER: usize = 1 << 20;

/// A layer file's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerHeader {
    /// The file's number, by which index entries name it.
    pub ordinal: u32,
    /// The group.
    pub group: GroupId,
    /// The first frame of the stretch.
    pub first: Seq,
    /// Its last frame: the point that it is about.
    pub last: srn_core::epoch::Position,
}

impl LayerHeader {
    fn encode(&self) -> AlignedBuf {
        let mut bytes = Vec::with_capacity(PAGE);
        bytes.put(&MAGIC);
        bytes.put_u16(VERSION);
        bytes.put_u16(0);
        bytes.put_u32(self.ordinal);
        bytes.put(&self.group.0);
        bytes.put_u64(self.first.0);
        put_position(&mut bytes, &self.last);
        let mut page = AlignedBuf::zeroed(PAGE);
        if let Some(front) = page.get_mut(..bytes.len()) {
            front.copy_from_slice(&bytes);
        }
        if let Some((body, sum)) = page.split_last_chunk_mut::<8>() {
            *sum = content_sum(body).to_le_bytes();
        }
        page
    }

    /// The header of a page; `None` when it is damaged.
    fn decode(page: &[u8]) -> Result<Option<Self>> {
        let Some((body, sum)) = page.split_last_chunk::<8>() else { return Ok(None) };
        if content_sum(body) != u64::from_le_bytes(*sum) {
            return Ok(None);
        }
        let mut reader = Reader::new(body);
        let mut read = || {
            let magic: [u8; 4] = reader.array()?;
            let version = reader.u16()?;
            reader.u16()?;
            let header = Self {
                ordinal: reader.u32()?,
                group: GroupId(reader.array()?),
                first: Seq(reader.u64()?),
                last: position(&mut reader)?,
            };
            Ok::<_, srn_core::bytes::Truncated>((magic, version, header))
        };
        match read() {
            Ok((MAGIC, VERSION, header)) => Ok(Some(header)),
            Ok((MAGIC, found, _)) => {
                Err(StoreError::NewerVersion { what: "a layer file".into(), found, known: VERSION })
            }
            _ => Ok(None),
        }
    }
}

/// An open layer file. Unlinked when the manifest no longer lists it; who still reads it holds it
/// open.
#[derive(Debug)]
pub struct LayerFile {
    /// Its number.
    pub ordinal: u32,
    /// The open file.
    pub file: Arc<dyn File>,
}

/// The number of a file name.
#[must_use]
pub fn number_of(name: &str) -> Option<u32> {
    let hex = name.strip_suffix(".lay").filter(|hex| hex.len() == 8)?;
    u32::from_str_radix(hex, 16).ok()
}

/// The file name of a layer file.
#[must_use]
pub fn file_name(ordinal: u32) -> PathBuf {
    format!("{ordinal:08x}.lay").into()
}

impl LayerFile {
    /// Opens a layer file and checks that it is the one that is meant.
    ///
    /// # Errors
    /// [`StoreError::Corrupt`] when it is not, or is shorter than `bytes`; as the volume says.
    pub fn open(volume: &Volume, dir: &Path, header: &LayerHeader, bytes: u64) -> Result<Self> {
        let path = dir.join(file_name(header.ordinal));
        let doing = || format!("opening layer file {}", path.display());
        let file = volume.open(&path, Access::Direct).doing(doing)?;
        let mut page = AlignedBuf::zeroed(PAGE);
        file.read_at(&mut page, 0).doing(doing)?;
        let sound = LayerHeader::decode(&page)?.is_some_and(|found| found == *header)
            && file.size().doing(doing)? >= bytes;
        if !sound {
            return Err(StoreError::Corrupt(format!("layer file {}", path.display())));
        }
        Ok(Self { ordinal: header.ordinal, file })
    }
}

/// Writes one layer file, front to back. Dropped before [`LayerWriter::finish`], it leaves no file.
pub struct LayerWriter {
    volume: Volume,
    dir: PathBuf,
    ordinal: u32,
    file: Arc<dyn File>,
    gathered: AlignedBuf,
    filled: usize,
    written: u64,
    finished: bool,
}

impl std::fmt::Debug for LayerWriter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "LayerWriter({})", self.ordinal)
    }
}

impl LayerWriter {
    /// Makes the file.
    ///
    /// # Errors
    /// As the volume says.
    pub fn create(volume: &Volume, dir: &Path, header: &LayerHeader) -> Result<Self> {
        let path = dir.join(file_name(header.ordinal));
        let doing = || format!("making layer file {}", path.display());
        let file = volume.create(&path, Access::Direct).doing(doing)?;
        let mut writer = Self {
            volume: volume.clone(),
            dir: dir.into(),
            ordinal: header.ordinal,
            file,
            gathered: AlignedBuf::zeroed(GATHER),
            filled: 0,
            written: 0,
            finished: false,
        };
        writer.put(&header.encode())?;
        Ok(writer)
    }

    /// The file's number.
    #[must_use]
    pub const fn ordinal(&self) -> u32 {
        self.ordinal
    }

    /// Whether another `len` bytes still fit.
    #[must_use]
    pub const fn has_room(&self, len: usize) -> bool {
        self.written + self.filled as u64 + len as u64 <= LAYER_BYTES_MAX
    }

    /// Appends a stored block; returns its offset in bytes.
    ///
    /// # Errors
    /// As the volume says.
    pub fn push(&mut self, stored: &[u8]) -> Result<u32> {
        let at = self.written + self.filled as u64;
        self.put(stored)?;
        u32::try_from(at).map_err(|_| StoreError::Invalid("a layer file is too long".into()))
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        let mut rest = bytes;
        while !rest.is_empty() {
            let room = self.gathered.len() - self.filled;
            let (now, later) = rest.split_at(rest.len().min(room));
            if let Some(to) = self.gathered.get_mut(self.filled..self.filled + now.len()) {
                to.copy_from_slice(now);
            }
            self.filled += now.len();
            rest = later;
            if self.filled == self.gathered.len() {
                self.flush()?;
            }
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        let len = self.filled.next_multiple_of(PAGE);
        let Some(padded) = self.gathered.get_mut(..len) else { return Ok(()) };
        if let Some(padding) = padded.get_mut(self.filled..) {
            padding.fill(0);
        }
        self.file
            .write_at(&[IoSlice::new(padded)], self.written, false)
            .doing(|| format!("writing layer file {}", file_name(self.ordinal).display()))?;
        self.written += len as u64;
        self.filled = 0;
        Ok(())
    }

    /// Makes the file durable, but not its name. Returns it with its length in bytes.
    ///
    /// # Errors
    /// As the volume says.
    pub fn finish(mut self) -> Result<(LayerFile, u64)> {
        if self.filled > 0 {
            self.flush()?;
        }
        if mutants::is(Mutant::LayerNotSynced) {
            self.finished = true;
            return Ok((
                LayerFile { ordinal: self.ordinal, file: self.file.clone() },
                self.written,
            ));
        }
        self.file
            .sync()
            .doing(|| format!("syncing layer file {}", file_name(self.ordinal).display()))?;
        self.finished = true;
        Ok((LayerFile { ordinal: self.ordinal, file: self.file.clone() }, self.written))
    }
}

impl Drop for LayerWriter {
    fn drop(&mut self) {
        if !self.finished {
            let _ = self.volume.remove(&self.dir.join(file_name(self.ordinal)));
        }
    }
}

const _: () = assert!(HEADER_LEN == PAGE as u64 && LAYER_BYTES_MAX < u32::MAX as u64);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::OsFs;
    use srn_core::epoch::Position;
    use srn_core::ids::{EpochId, FrameHash};

    fn header() -> LayerHeader {
        LayerHeader {
            ordinal: 0xab,
            group: GroupId([0x11; 16]),
            first: Seq(5),
            last: Position { epoch: EpochId([0x22; 16]), seq: Seq(9), hash: FrameHash([0x33; 16]) },
        }
    }

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    #[test]
    fn layer_file_bytes_are_pinned() {
        let dir = tempfile::tempdir().unwrap();
        let volume = Volume::new(Arc::new(OsFs));
        let mut writer = LayerWriter::create(&volume, dir.path(), &header()).unwrap();
        assert_eq!(writer.push(&[0x5a; 700]).unwrap(), 4096);
        assert_eq!(writer.push(&[0x5b; 512]).unwrap(), 4796);
        let (_, bytes) = writer.finish().unwrap();
        assert_eq!(bytes, 8192);
        let file = std::fs::read(dir.path().join("000000ab.lay")).unwrap();
        let fields = "53524e6c 0100 0000 ab000000 11111111111111111111111111111111 \
                      0500000000000000 22222222222222222222222222222222 0900000000000000 \
                      33333333333333333333333333333333";
        assert_eq!(hex(&file[..76]), fields.replace(' ', ""));
        assert!(file[76..4088].iter().all(|byte| *byte == 0));
        assert_eq!(hex(&file[4088..4096]), "c729fe5ddb789efc");
        assert!(file[4096..4796].iter().all(|byte| *byte == 0x5a));
        assert!(file[4796..5308].iter().all(|byte| *byte == 0x5b));
        assert!(file[5308..].iter().all(|byte| *byte == 0) && file.len() == 8192);
        LayerFile::open(&volume, dir.path(), &header(), bytes).unwrap();
        let other = LayerHeader { first: Seq(6), ..header() };
        let refused = LayerFile::open(&volume, dir.path(), &other, bytes);
        assert!(matches!(refused, Err(StoreError::Corrupt(_))));
        assert!(matches!(
            LayerFile::open(&volume, dir.path(), &header(), bytes + 1),
            Err(StoreError::Corrupt(_))
        ));
    }

    #[test]
    fn what_is_not_finished_leaves_no_file() {
        let dir = tempfile::tempdir().unwrap();
        let volume = Volume::new(Arc::new(OsFs));
        let mut writer = LayerWriter::create(&volume, dir.path(), &header()).unwrap();
        writer.push(&vec![1; 3 << 20]).unwrap();
        drop(writer);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
