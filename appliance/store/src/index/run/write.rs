//! Writing a run.

use std::io::IoSlice;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use srn_core::bytes::Writer;
use srn_core::epoch::Position;
use srn_core::extent::Extent;
use srn_core::ids::{DiskNo, GroupId};
use srn_core::limits::PAGE;
use srn_core::mutants::{self, Mutant};

use super::super::Place;
use super::super::entry::{self, ENTRY_LEN};
use super::super::table::{MarkPoint, SeqPoint};
use super::{
    BLOCK_ROOM, INNER_LEN, LEVEL_CATALOG, LEVEL_FOOTER, LEVEL_MARKS, LEVEL_POINTS, MAGIC, MARK_LEN,
    POINT_LEN, RunMeta, VERSION, file_name, seal_block,
};
use crate::error::{Doing, Result, StoreError};
use crate::io::{Access, AlignedBuf, File, Fs, Volume};

/// Bytes gathered before they are written.
const GATHER: usize = 256 * 1024;

/// Writes one run, front to back. Dropped before [`RunWriter::finish`], it leaves no file.
pub struct RunWriter {
    volume: Volume,
    dir: PathBuf,
    number: u32,
    file: Arc<dyn File>,
    gathered: AlignedBuf,
    filled: usize,
    written: u64,
    hasher: blake3::Hasher,
    leaf: Vec<u8>,
    /// First key and block number of every block of the level being written.
    level: Vec<(u64, u32)>,
    first_key: u64,
    entries: u64,
    finished: bool,
}

impl std::fmt::Debug for RunWriter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "RunWriter({}, {} entries)", self.number, self.entries)
    }
}

/// The tree and the sections, as the footer names them: block numbers and counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Layout {
    pub(super) leaves: u32,
    pub(super) root: u32,
    pub(super) height: u32,
    pub(super) points: (u32, u32),
    pub(super) marks: (u32, u32),
    pub(super) catalog: (u32, u32),
}

/// What a run is about.
#[derive(Debug, Clone, Copy)]
pub struct RunScope<'a> {
    /// The group.
    pub group: GroupId,
    /// 0 for one segment's index.
    pub level: u8,
    /// The first frame's sequence number.
    pub first: srn_core::ids::Seq,
    /// The last frame.
    pub last: Position,
    /// Ordinals of the first and the last piece of history that it is the index of.
    pub pieces: (u32, u32),
    /// Places to begin reading; only for one segment's index.
    pub points: &'a [SeqPoint],
    /// The marks in it.
    pub marks: &'a [MarkPoint],
    /// The group's catalog behind the last frame, in its own encoding.
    pub catalog: &'a [u8],
}

impl RunWriter {
    /// Makes the file.
    ///
    /// # Errors
    /// As the volume says.
    pub fn create(volume: &Volume, dir: &Path, number: u32) -> Result<Self> {
        let path = dir.join(file_name(number));
        let file = volume
            .create(&path, Access::Direct)
            .doing(|| format!("making index file {}", path.display()))?;
        Ok(Self {
            volume: volume.clone(),
            dir: dir.into(),
            number,
            file,
            gathered: AlignedBuf::zeroed(GATHER),
            filled: 0,
            written: 0,
            hasher: blake3::Hasher::new(),
            leaf: Vec::with_capacity(PAGE),
            level: Vec::new(),
            first_key: 0,
            entries: 0,
            finished: false,
        })
    }

    /// Adds the next entry in order of disk and sector.
    ///
    /// # Errors
    /// As the volume says.
    pub fn push(&mut self, disk: DiskNo, extent: Extent, place: &Place) -> Result<()> {
        if self.leaf.is_empty() {
            self.first_key = entry::key(disk, extent.start);
        }
        entry::encode(disk, extent, place, &mut self.leaf);
        self.entries += 1;
        if self.leaf.len() + ENTRY_LEN > BLOCK_ROOM {
            self.close_leaf()?;
        }
        Ok(())
    }

    fn close_leaf(&mut self) -> Result<()> {
        if self.leaf.is_empty() {
            return Ok(());
        }
        let content = std::mem::take(&mut self.leaf);
        let number = self.block(&content, content.len() / ENTRY_LEN, 0)?;
        self.level.push((self.first_key, number));
        self.leaf = content;
        self.leaf.clear();
        Ok(())
    }

    /// Writes the rest, syncs, and returns what the manifest has to know.
    ///
    /// # Errors
    /// As the volume says; then there is no file.
    pub fn finish(mut self, scope: &RunScope<'_>) -> Result<RunMeta> {
        self.close_leaf()?;
        let mut layout = Layout { leaves: self.blocks()?, ..Layout::default() };
        while self.level.len() > 1 {
            layout.height += 1;
            let below = std::mem::take(&mut self.level);
            for children in below.chunks(BLOCK_ROOM / INNER_LEN) {
                let mut content = Vec::with_capacity(PAGE);
                for (key, number) in children {
                    content.put_u64(*key);
                    content.put_u32(*number);
                }
                let level = u8::try_from(layout.height).unwrap_or(u8::MAX);
                let number = self.block(&content, children.len(), level)?;
                self.level.push((children.first().map_or(0, |(key, _)| *key), number));
            }
        }
        layout.root = self.level.first().map_or(0, |(_, number)| *number);
        layout.points = self.section(scope.points, POINT_LEN, LEVEL_POINTS, encode_point)?;
        layout.marks = self.section(scope.marks, MARK_LEN, LEVEL_MARKS, encode_mark)?;
        layout.catalog =
            self.section(scope.catalog, 1, LEVEL_CATALOG, |byte, out| out.put_u8(*byte))?;
        self.flush()?;
        let footer = self.footer(scope, &layout);
        let mut page = AlignedBuf::zeroed(PAGE);
        page.copy_from_slice(&footer);
        let written = self.written;
        self.write(&page, written)?;
        let doing = || format!("syncing index file {}", self.number);
        if !mutants::is(Mutant::IndexNotSynced) {
            self.file.sync().doing(doing)?;
        }
        if !mutants::is(Mutant::IndexDirectoryNotSynced) {
            self.volume.sync_dir(&self.dir).doing(doing)?;
        }
        self.finished = true;
        Ok(RunMeta {
            file: self.number,
            level: scope.level,
            epoch: scope.last.epoch,
            first: scope.first,
            last: scope.last.seq,
            pieces: scope.pieces,
            entries: self.entries,
        })
    }

    /// Writes a list of items as blocks; returns the first block's number and the item count.
    fn section<T>(
        &mut self,
        items: &[T],
        len: usize,
        level: u8,
        encode: impl Fn(&T, &mut Vec<u8>),
    ) -> Result<(u32, u32)> {
        let first = self.blocks()?;
        for some in items.chunks(BLOCK_ROOM / len) {
            let mut content = Vec::with_capacity(PAGE);
            some.iter().for_each(|item| encode(item, &mut content));
            self.block(&content, some.len(), level)?;
        }
        let count = u32::try_from(items.len())
            .map_err(|_| StoreError::Invalid("an index section has too many items".into()))?;
        Ok((first, count))
    }

    fn footer(&self, scope: &RunScope<'_>, layout: &Layout) -> [u8; PAGE] {
        let mut out = Vec::with_capacity(PAGE);
        out.put(&MAGIC);
        out.put_u16(VERSION);
        out.put_u8(scope.level);
        out.put_u8(0);
        out.put(&scope.group.0);
        out.put_u64(scope.first.0);
        out.put(&scope.last.epoch.0);
        out.put_u64(scope.last.seq.0);
        out.put(&scope.last.hash.0);
        out.put_u64(self.entries);
        for number in [
            layout.leaves,
            layout.root,
            layout.height,
            layout.points.0,
            layout.points.1,
            layout.marks.0,
            layout.marks.1,
            layout.catalog.0,
            layout.catalog.1,
            0,
        ] {
            out.put_u32(number);
        }
        out.put(self.hasher.finalize().as_bytes());
        seal_block(&out, 0, LEVEL_FOOTER)
    }

    fn blocks(&self) -> Result<u32> {
        u32::try_from((self.written + self.filled as u64) / PAGE as u64)
            .map_err(|_| StoreError::Invalid("an index file has too many blocks".into()))
    }

    fn block(&mut self, content: &[u8], count: usize, level: u8) -> Result<u32> {
        let number = self.blocks()?;
        // A block's content is at most 4080 bytes, and an item at least one.
        let block = seal_block(content, u16::try_from(count).unwrap_or(u16::MAX), level);
        self.hasher.update(&block);
        if self.filled == GATHER {
            self.flush()?;
        }
        if let Some(to) = self.gathered.get_mut(self.filled..self.filled + PAGE) {
            to.copy_from_slice(&block);
        }
        self.filled += PAGE;
        Ok(number)
    }

    fn flush(&mut self) -> Result<()> {
        let gathered = std::mem::replace(&mut self.gathered, AlignedBuf::zeroed(0));
        let result = match gathered.get(..self.filled) {
            Some(bytes) if !bytes.is_empty() => self.write(bytes, self.written),
            _ => Ok(()),
        };
        self.gathered = gathered;
        self.written += self.filled as u64;
        self.filled = 0;
        result
    }

    fn write(&self, bytes: &[u8], offset: u64) -> Result<()> {
        self.file
            .write_at(&[IoSlice::new(bytes)], offset, false)
            .doing(|| format!("writing index file {}", self.number))
    }
}

impl Drop for RunWriter {
    fn drop(&mut self) {
        if !self.finished {
            // What is left behind is removed at the next start.
            let _ = self.volume.remove(&self.dir.join(file_name(self.number)));
        }
    }
}

fn encode_point(point: &SeqPoint, out: &mut Vec<u8>) {
    out.put_u64(point.seq.0);
    out.put(&point.prev.0);
    out.put_u32(point.offset);
    out.put_u64(point.log_time.0);
    out.put_i64(point.wall_time.0);
    out.put_i64(point.before.0);
    out.put(&point.standing.code());
    out.put(&[0; 2]);
}

fn encode_mark(mark: &MarkPoint, out: &mut Vec<u8>) {
    out.put(&mark.id.0);
    out.put_u8(mark.kind.code());
    out.put_u8(u8::from(mark.clean));
    out.put_u8(u8::from(mark.application));
    out.put(&[0; 5]);
    out.put_u64(mark.seq.0);
    out.put(&mark.hash.0);
    out.put_u64(mark.log_time.0);
    out.put_i64(mark.wall_time.0);
}
