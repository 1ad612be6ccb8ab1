//! Reading a run: lookups through a cache of blocks, and reading it from front to back.

use std::ops::Deref;
use std::path::Path;
use std::sync::Arc;

use srn_core::bytes::{Reader, Truncated};
use srn_core::epoch::Position;
use srn_core::extent::Extent;
use srn_core::frame::MarkKind;
use srn_core::ids::{CheckpointId, DiskNo, EpochId, FrameHash, GroupId, Seq};
use srn_core::limits::PAGE;
use srn_core::point::Standing;
use srn_core::time::{LogTime, WallTime};

use super::super::entry::{self, ENTRY_LEN};
use super::super::merge::Item;
use super::super::table::{MarkPoint, SeqPoint};
use super::super::{Lookup, Place};
use super::write::Layout;
use super::{
    INNER_LEN, LEVEL_CATALOG, LEVEL_FOOTER, LEVEL_MARKS, LEVEL_POINTS, MAGIC, MARK_LEN, POINT_LEN,
    RunMeta, VERSION, file_name, open_block,
};
use crate::error::{Doing, Result, StoreError};
use crate::io::{Access, AlignedBuf, File, Fs, Volume};

type Block = Arc<[u8; PAGE]>;

/// Blocks of index files, shared by all groups of a node: the one cap on index memory.
#[derive(Debug)]
pub struct BlockCache {
    blocks: quick_cache::sync::Cache<(u64, u32), Block>,
    next_run: std::sync::atomic::AtomicU64,
}

impl BlockCache {
    /// A cache of at most `bytes` bytes of blocks.
    #[must_use]
    pub fn new(bytes: usize) -> Self {
        Self {
            blocks: quick_cache::sync::Cache::new((bytes / PAGE).max(16)),
            next_run: std::sync::atomic::AtomicU64::new(0),
        }
    }
}

/// An open run.
#[derive(Debug)]
pub struct Run {
    meta: RunMeta,
    last: Position,
    layout: Layout,
    file: Arc<dyn File>,
    /// This opening's number in the cache.
    cached_as: u64,
    cache: Arc<BlockCache>,
    /// BLAKE3 of all blocks before the footer.
    digest: [u8; 32],
    /// Blocks before the footer.
    blocks: u32,
}

/// A block of a run that is not what was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BadBlock {
    /// Its number.
    pub number: u32,
    /// For a leaf between two that are sound: the disk and sectors that its entries may be about.
    pub covers: Option<(DiskNo, Extent)>,
}

impl Run {
    /// Opens a run and checks that it is the one which the manifest means.
    ///
    /// # Errors
    /// [`StoreError::Corrupt`] when it is not, or as the volume says.
    pub fn open(
        volume: &Volume,
        dir: &Path,
        group: GroupId,
        meta: &RunMeta,
        cache: &Arc<BlockCache>,
    ) -> Result<Self> {
        let path = dir.join(file_name(meta.file));
        let file = volume
            .open(&path, Access::Direct)
            .doing(|| format!("opening index file {}", path.display()))?;
        let len = file.size().doing(|| format!("asking for the length of {}", path.display()))?;
        let damaged = || StoreError::Corrupt(format!("index file {}", path.display()));
        let at = len.checked_sub(PAGE as u64).ok_or_else(damaged)?;
        let mut page = AlignedBuf::zeroed(PAGE);
        file.read_at(&mut page, at).doing(|| format!("reading {}", path.display()))?;
        let page: &[u8; PAGE] = page.first_chunk().ok_or_else(damaged)?;
        let (_, content) = open_block(page, LEVEL_FOOTER).ok_or_else(damaged)?;
        let footer = Footer::decode(content).map_err(|_| damaged())?.ok_or_else(damaged)?;
        if footer.version != VERSION {
            return Err(StoreError::NewerVersion {
                what: format!("index file {}", path.display()),
                found: footer.version,
                known: VERSION,
            });
        }
        if footer.group != group
            || footer.first != meta.first
            || footer.last.seq != meta.last
            || footer.last.epoch != meta.epoch
            || footer.entries != meta.entries
        {
            return Err(damaged());
        }
        let cached_as = cache.next_run.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        Ok(Self {
            meta: *meta,
            last: footer.last,
            layout: footer.layout,
            file,
            cached_as,
            cache: cache.clone(),
            digest: footer.digest,
            blocks: u32::try_from(at / PAGE as u64).map_err(|_| damaged())?,
        })
    }

    /// Length of the file in bytes.
    #[must_use]
    pub fn file_len(&self) -> u64 {
        (u64::from(self.blocks) + 1) * PAGE as u64
    }

    /// Reads every block, around the cache. Returns those that are damaged, and whether the whole
    /// has the hash that the footer names.
    ///
    /// # Errors
    /// As the volume says.
    pub fn check(&self) -> Result<(Vec<BadBlock>, bool)> {
        let mut hasher = blake3::Hasher::new();
        let mut bad: Vec<BadBlock> = Vec::new();
        let mut last_key = 0;
        for number in 0..self.blocks {
            let block = self.read_block(number)?;
            hasher.update(&*block);
            let is_leaf = number < self.layout.leaves;
            let level = if is_leaf { 0 } else { block.get(2).copied().unwrap_or(u8::MAX) };
            let Some((count, content)) = open_block(&block, level) else {
                bad.push(BadBlock { number, covers: is_leaf.then(|| entry::from_key(last_key)) });
                continue;
            };
            if !is_leaf {
                continue;
            }
            let first = self.entry_in(content, 0);
            let last = self.entry_in(content, count.saturating_sub(1));
            if let (Ok((disk, extent, _)), Some(open)) = (first, bad.last_mut())
                && open.number + 1 == number
            {
                open.cover_up_to(disk, extent.start);
            }
            match last {
                Ok((disk, extent, _)) => last_key = entry::key(disk, extent.end()),
                Err(_) => bad.push(BadBlock { number, covers: None }),
            }
        }
        Ok((bad, hasher.finalize().as_bytes() == &self.digest))
    }

    /// What the manifest knows of it.
    #[must_use]
    pub const fn meta(&self) -> &RunMeta {
        &self.meta
    }

    /// Its last frame.
    #[must_use]
    pub const fn last(&self) -> Position {
        self.last
    }

    fn damaged(&self) -> StoreError {
        StoreError::Corrupt(format!("index file {}", file_name(self.meta.file)))
    }

    fn read_block(&self, number: u32) -> Result<Block> {
        let mut page = AlignedBuf::zeroed(PAGE);
        let read = self
            .file
            .read_at(&mut page, u64::from(number) * PAGE as u64)
            .doing(|| format!("reading index file {}", file_name(self.meta.file)))?;
        match page.first_chunk::<PAGE>() {
            Some(block) if read == PAGE => Ok(Arc::new(*block)),
            _ => Err(self.damaged()),
        }
    }

    fn block(&self, number: u32) -> Result<Block> {
        let key = (self.cached_as, number);
        if let Some(block) = self.cache.blocks.get(&key) {
            return Ok(block);
        }
        let block = self.read_block(number)?;
        self.cache.blocks.insert(key, block.clone());
        Ok(block)
    }

    /// The leaf that holds the last entry at or before `key`, or the first leaf.
    fn leaf_for(&self, key: u64) -> Result<u32> {
        let mut number = self.layout.root;
        for level in (1..=self.layout.height).rev() {
            let block = self.block(number)?;
            let level = u8::try_from(level).map_err(|_| self.damaged())?;
            let (count, content) = open_block(&block, level).ok_or_else(|| self.damaged())?;
            let mut child = None;
            for item in content.chunks_exact(INNER_LEN).take(count) {
                let mut reader = Reader::new(item);
                let (first, number) = (|| Ok::<_, Truncated>((reader.u64()?, reader.u32()?)))()
                    .map_err(|_| self.damaged())?;
                if child.is_some() && first > key {
                    break;
                }
                child = Some(number);
            }
            // Children come before their parents: no damage can lead in circles.
            number = child.filter(|child| *child < number).ok_or_else(|| self.damaged())?;
        }
        Ok(number)
    }

    /// The places to begin reading; empty for merged runs.
    ///
    /// # Errors
    /// When the file cannot be read or is damaged.
    pub fn points(&self) -> Result<Vec<SeqPoint>> {
        self.section(self.layout.points, POINT_LEN, LEVEL_POINTS, |reader| {
            let (seq, prev) = (Seq(reader.u64()?), FrameHash(reader.array()?));
            let (offset, log_time) = (reader.u32()?, LogTime(reader.u64()?));
            let (wall_time, before) = (WallTime(reader.i64()?), WallTime(reader.i64()?));
            let standing = Standing::from_code(reader.array()?);
            reader.take(2)?;
            Ok(standing.map(|standing| SeqPoint {
                seq,
                prev,
                offset,
                log_time,
                wall_time,
                before,
                standing,
            }))
        })
    }

    /// The marks in it, in order.
    ///
    /// # Errors
    /// When the file cannot be read or is damaged.
    pub fn marks(&self) -> Result<Vec<MarkPoint>> {
        self.section(self.layout.marks, MARK_LEN, LEVEL_MARKS, |reader| {
            let id = CheckpointId(reader.array()?);
            let kind = MarkKind::from_code(reader.u8()?);
            let clean = reader.u8()? == 1;
            let application = reader.u8()? == 1;
            reader.take(5)?;
            let seq = Seq(reader.u64()?);
            let hash = FrameHash(reader.array()?);
            let log_time = LogTime(reader.u64()?);
            let wall_time = WallTime(reader.i64()?);
            Ok(kind.map(|kind| MarkPoint {
                id,
                kind,
                seq,
                hash,
                log_time,
                wall_time,
                clean,
                application,
            }))
        })
    }

    /// The group's catalog behind the last frame, in its own encoding.
    ///
    /// # Errors
    /// When the file cannot be read or is damaged.
    pub fn catalog(&self) -> Result<Vec<u8>> {
        self.section(self.layout.catalog, 1, LEVEL_CATALOG, |reader| reader.u8().map(Some))
    }

    fn section<T>(
        &self,
        (first, count): (u32, u32),
        len: usize,
        level: u8,
        decode: impl Fn(&mut Reader<'_>) -> std::result::Result<Option<T>, Truncated>,
    ) -> Result<Vec<T>> {
        let mut items = Vec::new();
        let mut number = first;
        while items.len() < count as usize {
            let block = self.read_block(number)?;
            let (in_block, content) = open_block(&block, level).ok_or_else(|| self.damaged())?;
            for item in content.chunks_exact(len).take(in_block) {
                match decode(&mut Reader::new(item)) {
                    Ok(Some(item)) => items.push(item),
                    _ => return Err(self.damaged()),
                }
            }
            if in_block == 0 {
                return Err(self.damaged());
            }
            number += 1;
        }
        Ok(items)
    }

    /// Begins to compare the whole file with the hash in its footer.
    #[must_use]
    pub fn begin_check(&self) -> RunCheck {
        RunCheck { at: 0, hasher: blake3::Hasher::new() }
    }

    /// Bytes of the file.
    ///
    /// # Errors
    /// As the volume says.
    pub fn len(&self) -> Result<u64> {
        let doing = || format!("asking for the length of {}", file_name(self.meta.file));
        self.file.size().doing(doing)
    }

    /// Whether there is no entry in it.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.meta.entries == 0
    }

    /// Every entry, front to back, around the cache.
    #[must_use]
    pub const fn iter(&self) -> Entries<&Self> {
        Entries { run: self, leaf: 0, block: None, at: 0 }
    }

    /// The same; the reader holds on to the run.
    #[must_use]
    pub const fn into_iter(run: Arc<Self>) -> Entries<Arc<Self>> {
        Entries { run, leaf: 0, block: None, at: 0 }
    }

    /// Entries in order, around the cache, from one on that lies at or before this sector, if there
    /// is one: not all of them are behind it.
    ///
    /// # Errors
    /// When the file cannot be read or is damaged.
    pub fn iter_from(&self, disk: DiskNo, start: u64) -> Result<Entries<&Self>> {
        let leaf =
            if self.layout.leaves == 0 { 0 } else { self.leaf_for(entry::key(disk, start))? };
        Ok(Entries { run: self, leaf, block: None, at: 0 })
    }

    fn entry_in(&self, content: &[u8], at: usize) -> Result<Item> {
        content
            .get(at * ENTRY_LEN..(at + 1) * ENTRY_LEN)
            .and_then(|bytes| entry::decode(bytes).ok().flatten())
            .ok_or_else(|| self.damaged())
    }
}

/// A comparison of a run's file with its hash that is under way.
#[derive(Debug)]
pub struct RunCheck {
    at: u64,
    hasher: blake3::Hasher,
}

impl RunCheck {
    /// Reads on, at most `bytes`. Gives whether the file is sound, once that is known, and the bytes
    /// that were read.
    ///
    /// # Errors
    /// As the volume says. Damage is no error.
    pub fn step(&mut self, run: &Run, bytes: usize) -> Result<(Option<bool>, u64)> {
        let footer_at = run.len()?.saturating_sub(PAGE as u64);
        let left = usize::try_from(footer_at - self.at.min(footer_at)).unwrap_or(usize::MAX);
        if left > 0 {
            let mut buf = AlignedBuf::zeroed(bytes.min(left).next_multiple_of(PAGE));
            let doing = || format!("reading index file {}", file_name(run.meta.file));
            let read = run.file.read_at(&mut buf, self.at).doing(doing)?;
            if read < buf.len() {
                return Ok((Some(false), read as u64));
            }
            self.hasher.update(&buf);
            self.at += buf.len() as u64;
            return Ok((None, read as u64));
        }
        let mut page = AlignedBuf::zeroed(PAGE);
        let doing = || format!("reading index file {}", file_name(run.meta.file));
        run.file.read_at(&mut page, footer_at).doing(doing)?;
        let content = page.first_chunk().and_then(|page| open_block(page, LEVEL_FOOTER));
        let hash = content.and_then(|(_, content)| content.get(HASH_AT..HASH_AT + 32));
        let is_sound = hash == Some(self.hasher.finalize().as_bytes());
        Ok((Some(is_sound), PAGE as u64))
    }
}

/// Where the hash of the file lies in the footer's content.
const HASH_AT: usize = 120;

impl Lookup for Run {
    fn lookup(&self, disk: DiskNo, extent: Extent, out: &mut Vec<(Extent, Place)>) -> Result<()> {
        if self.layout.leaves == 0 {
            return Ok(());
        }
        let mut leaf = self.leaf_for(entry::key(disk, extent.start))?;
        while leaf < self.layout.leaves {
            let block = self.block(leaf)?;
            let (count, content) = open_block(&block, 0).ok_or_else(|| self.damaged())?;
            // Entries do not overlap, so their ends are in order too.
            let mut low = 0;
            let mut high = count;
            while low < high {
                let middle = (low + high) / 2;
                let (other, entry, _) = self.entry_in(content, middle)?;
                if (other, entry.end()) <= (disk, extent.start) {
                    low = middle + 1;
                } else {
                    high = middle;
                }
            }
            for at in low..count {
                let (other, entry, place) = self.entry_in(content, at)?;
                if (other, entry.start) >= (disk, extent.end()) {
                    return Ok(());
                }
                if let Some(part) = entry.intersect(&extent) {
                    let skip = part.start - entry.start;
                    out.push((part, srn_core::extent::Slice::slice(&place, skip, part.sectors)));
                }
            }
            leaf += 1;
        }
        Ok(())
    }
}

impl BadBlock {
    /// The next sound leaf begins at `start` of `disk`.
    fn cover_up_to(&mut self, disk: DiskNo, start: u64) {
        if let Some((from, extent)) = &mut self.covers
            && *from == disk
        {
            extent.sectors = start.saturating_sub(extent.start);
        }
    }
}

/// Reads a run's entries in order.
#[derive(Debug)]
pub struct Entries<R> {
    run: R,
    leaf: u32,
    block: Option<Block>,
    at: usize,
}

impl<R: Deref<Target = Run>> Entries<R> {
    fn step(&mut self) -> Result<Option<Item>> {
        loop {
            let block = match self.block.take() {
                Some(block) => block,
                None if self.leaf < self.run.layout.leaves => {
                    self.leaf += 1;
                    self.at = 0;
                    self.run.read_block(self.leaf - 1)?
                }
                None => return Ok(None),
            };
            let (count, content) = open_block(&block, 0).ok_or_else(|| self.run.damaged())?;
            if self.at < count {
                let item = self.run.entry_in(content, self.at)?;
                self.at += 1;
                self.block = Some(block);
                return Ok(Some(item));
            }
        }
    }
}

impl<R: Deref<Target = Run>> Iterator for Entries<R> {
    type Item = Result<Item>;

    fn next(&mut self) -> Option<Self::Item> {
        self.step().transpose()
    }
}

struct Footer {
    version: u16,
    group: GroupId,
    first: Seq,
    last: Position,
    entries: u64,
    layout: Layout,
    digest: [u8; 32],
}

impl Footer {
    fn decode(content: &[u8]) -> std::result::Result<Option<Self>, Truncated> {
        let mut reader = Reader::new(content);
        if reader.array()? != MAGIC {
            return Ok(None);
        }
        let version = reader.u16()?;
        reader.u16()?;
        let group = GroupId(reader.array()?);
        let first = Seq(reader.u64()?);
        let epoch = EpochId(reader.array()?);
        let last = Position { epoch, seq: Seq(reader.u64()?), hash: FrameHash(reader.array()?) };
        let entries = reader.u64()?;
        let layout = Layout {
            leaves: reader.u32()?,
            root: reader.u32()?,
            height: reader.u32()?,
            points: (reader.u32()?, reader.u32()?),
            marks: (reader.u32()?, reader.u32()?),
            catalog: (reader.u32()?, reader.u32()?),
        };
        reader.u32()?;
        let digest = reader.array()?;
        // A tree of height 6 has more leaves than a file can have blocks.
        let sound = layout.height <= 6;
        Ok(sound.then_some(Self { version, group, first, last, entries, layout, digest }))
    }
}
