//! The index runs: each block, and each entry against the frames or the runs that it was made from.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::sync::Arc;

use srn_core::bytes::Reader;
use srn_core::extent::Slice;
use srn_core::ids::{FrameHash, Seq};
use srn_core::limits::PAGE;

use super::super::LogFile;
use super::{Damage, Work};
use crate::catalog::Catalog;
use crate::error::{Result, StoreError};
use crate::group::INDEX_DIR;
use crate::index::{
    BlockCache, Item, MemTable, Merge, PREFIX_LEVEL, Place, Run, RunMeta, run_file_name, span,
};
use crate::manifest::{Keep, PieceMeta, SegmentMeta};
use crate::segment::scan;

fn name(file: u32) -> String {
    format!("{INDEX_DIR}/{}", run_file_name(file))
}

impl Work<'_> {
    /// About how many bytes of index files will be read; entries fill their leaves.
    pub(super) fn index_bytes(&self) -> u64 {
        // The numbers of a manifest may be anything.
        let runs = self.files.manifest.runs.values();
        runs.fold(0, |sum: u64, run| {
            sum.saturating_add(run.entries.div_ceil(127).saturating_mul(PAGE as u64))
        })
    }

    pub(super) fn check_index(&mut self, log: &BTreeMap<u32, LogFile>) -> Result<ControlFlow<()>> {
        // Damage that is read around must not be in a cache.
        let cache = Arc::new(BlockCache::new(1 << 20));
        let dir = self.files.dir.join(INDEX_DIR);
        let metas = self.files.manifest.runs.clone();
        let mut runs: BTreeMap<u32, Run> = BTreeMap::new();
        for meta in metas.values() {
            match Run::open(&self.files.volume, &dir, self.files.manifest.group, meta, &cache) {
                Ok(run) => {
                    runs.insert(meta.file, run);
                }
                Err(StoreError::Io { source, .. })
                    if source.kind() == std::io::ErrorKind::NotFound =>
                {
                    self.run_is_damaged(meta, "the file is missing");
                }
                Err(StoreError::Corrupt(_)) => {
                    self.run_is_damaged(
                        meta,
                        "its footer is damaged, or not what the manifest says",
                    );
                }
                Err(error) => return Err(error),
            }
        }
        let mut sound = runs;
        let all: Vec<u32> = sound.keys().copied().collect();
        for file in all {
            let Some(run) = sound.get(&file) else { continue };
            let (is_sound, flow) = self.check_blocks(run)?;
            if !is_sound {
                sound.remove(&file);
            }
            if flow.is_break() {
                return Ok(flow);
            }
        }
        self.name_lost_sectors(&sound);
        if self.check_layers(&sound)?.is_break() {
            return Ok(ControlFlow::Break(()));
        }
        for run in sound.values() {
            let made_again = self.made_again(run, &sound, log)?;
            if let Some(text) = made_again {
                self.run_is_damaged(run.meta(), text);
            }
        }
        Ok(ControlFlow::Continue(()))
    }

    fn run_is_damaged(&mut self, meta: &RunMeta, text: &str) {
        let mut damage = Damage::of(name(meta.file), text);
        damage.frames = Some((meta.first, meta.last));
        self.damaged(damage);
    }

    fn check_blocks(&mut self, run: &Run) -> Result<(bool, ControlFlow<()>)> {
        let (bad, digest) = run.check()?;
        self.report.counts.runs += 1;
        self.report.counts.entries += run.meta().entries;
        for block in &bad {
            let file = name(run.meta().file);
            let text = format!("block {} does not have its checksum", block.number);
            let mut damage = Damage::of(file, text).at(u64::from(block.number) * PAGE as u64);
            damage.frames = Some((run.meta().first, run.meta().last));
            damage.sectors.extend(block.covers);
            self.damaged(damage);
        }
        if bad.is_empty() && !digest {
            self.run_is_damaged(run.meta(), "the file does not have the hash in its footer");
        }
        Ok((bad.is_empty(), self.step(run.file_len())))
    }

    /// Of frames that cannot be read the index still tells which sectors they were about.
    fn name_lost_sectors(&mut self, runs: &BTreeMap<u32, Run>) {
        let lost = std::mem::take(&mut self.lost);
        for run in runs.values().filter(|run| run.meta().level == 0) {
            for (disk, extent, place) in run.iter().map_while(Result::ok) {
                let Place::Block { segment, offset, .. } = place else { continue };
                let inside = lost.iter().filter(|(ordinal, from, to, _)| {
                    *ordinal == segment && (*from..*to).contains(&u64::from(offset))
                });
                for (.., at) in inside {
                    let Some(damage) = self.report.damage.get_mut(*at) else { continue };
                    match damage.sectors.last_mut() {
                        Some((same, last)) if *same == disk && last.end() == extent.start => {
                            last.sectors += extent.sectors;
                        }
                        _ => damage.sectors.push((disk, extent)),
                    }
                }
            }
        }
    }

    /// Makes what a run says again from what it was made from, and says how it differs. What it was
    /// made from may be damaged or gone: that is said elsewhere.
    fn made_again(
        &self,
        run: &Run,
        runs: &BTreeMap<u32, Run>,
        log: &BTreeMap<u32, LogFile>,
    ) -> Result<Option<&'static str>> {
        let meta = run.meta();
        if meta.level != 0 && meta.level != PREFIX_LEVEL {
            return self.merged_again(run, runs);
        }
        let (ordinal, last) = meta.pieces;
        if ordinal == last && self.files.manifest.layers.contains_key(&ordinal) {
            // Its frames are gone; each entry was verified with the layer.
            return Ok(None);
        }
        let segment = self.files.manifest.segments.get(&ordinal);
        let fits = |segment: &&SegmentMeta| {
            ordinal == last && segment.epoch == meta.epoch && segment.first == meta.first
        };
        let Some(segment) = segment.filter(fits) else {
            return Ok(Some("it is about a piece of history that is not listed"));
        };
        let Some(file) = log.get(&segment.slot) else { return Ok(None) };
        self.indexed_again(run, ordinal, segment, file, runs)
    }

    fn indexed_again(
        &self,
        run: &Run,
        ordinal: u32,
        segment: &SegmentMeta,
        file: &LogFile,
        runs: &BTreeMap<u32, Run>,
    ) -> Result<Option<&'static str>> {
        let Some(target) = file.target() else { return Ok(None) };
        let before = self.catalog_behind(segment.first.prev(), segment.prev, runs)?;
        let mut catalog = before.clone().unwrap_or_else(|| Catalog::new(segment.last));
        let entries = self.files.manifest.keep == Keep::Replica;
        let mut table = MemTable::behind(&catalog);
        let mut frames = scan(&target, &self.files.pool)?;
        let mut last = segment.first.prev();
        while last < run.meta().last {
            let Some((offset, frame)) = frames.next(false)? else { return Ok(None) };
            let bad = |_| StoreError::Invalid("a frame that was read does not decode".into());
            catalog.apply(&frame).map_err(bad)?;
            let offset = u32::try_from(offset).unwrap_or(u32::MAX);
            table.add(&frame, ordinal, offset, entries, catalog.standing()).map_err(bad)?;
            last = frame.header().seq;
        }
        let found = run.iter().map_while(Result::ok);
        if !found.eq(table.entries()) {
            return Ok(Some("its entries are not what the frames say"));
        }
        // Times and which disks were clean are known only with the catalog before.
        if before.is_some() && run.points()? != table.points() {
            return Ok(Some("its points are not what the frames say"));
        }
        if before.is_some() && run.marks()? != table.marks() {
            return Ok(Some("its marks are not what the frames say"));
        }
        if before.is_some() && run.catalog()? != catalog.encode() {
            return Ok(Some("its catalog is not what the frames say"));
        }
        Ok(None)
    }

    /// The catalog behind a frame, where the base or a run tells it.
    fn catalog_behind(
        &self,
        seq: Seq,
        hash: FrameHash,
        runs: &BTreeMap<u32, Run>,
    ) -> Result<Option<Catalog>> {
        let base = self.files.manifest.base.as_ref().map(|base| &base.catalog);
        if let Some(base) = base.filter(|base| base.at.seq == seq && base.at.hash == hash) {
            return Ok(Some(base.clone()));
        }
        let ends_there =
            |run: &&Run| run.meta().level == 0 && run.last().seq == seq && run.last().hash == hash;
        let Some(run) = runs.values().find(ends_there) else { return Ok(None) };
        Ok(Catalog::decode(&mut Reader::new(&run.catalog()?)).ok().flatten())
    }
}

impl Work<'_> {
    /// Compares a merged run with the merge of the runs of the pieces that it is the index of.
    fn merged_again(&self, run: &Run, runs: &BTreeMap<u32, Run>) -> Result<Option<&'static str>> {
        let mut lines = self.files.manifest.timelines.values();
        let pieces = lines.find_map(|line| line.pieces.get(span(run.meta(), &line.pieces)?));
        let Some(pieces) = pieces else {
            return Ok(Some("no line has the pieces of history that it is about"));
        };
        let of_piece = |piece: &PieceMeta| {
            runs.values().find(|run| {
                run.meta().pieces == (piece.ordinal, piece.ordinal) && run.last() == piece.last
            })
        };
        let Some(mut inputs) = pieces.iter().map(of_piece).collect::<Option<Vec<&Run>>>() else {
            return Ok(None);
        };
        inputs.reverse();
        let merged = Merge::new(inputs.iter().map(|input| input.iter()))?;
        let found = Joined::new(run.iter().map_while(Result::ok));
        let same = found.eq(Joined::new(merged.map_while(Result::ok)));
        Ok((!same).then_some("its entries are not what the runs say that it was merged from"))
    }
}

/// Joins entries that go on where the one before ends, in the same block: where a merge cuts them
/// depends on what it merges.
struct Joined<I: Iterator<Item = Item>> {
    items: std::iter::Peekable<I>,
}

impl<I: Iterator<Item = Item>> Joined<I> {
    fn new(items: I) -> Self {
        Self { items: items.peekable() }
    }
}

impl<I: Iterator<Item = Item>> Iterator for Joined<I> {
    type Item = Item;

    fn next(&mut self) -> Option<Item> {
        let (disk, mut extent, place) = self.items.next()?;
        while let Some((_, more, _)) = self.items.next_if(|(other, more, next)| {
            *other == disk
                && more.start == extent.end()
                && place.slice(extent.sectors, more.sectors) == *next
        }) {
            extent.sectors += more.sectors;
        }
        Some((disk, extent, place))
    }
}
