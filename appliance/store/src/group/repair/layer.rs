//! Putting a block of a layer right: one more file for the layer, and its index anew with the block there.

use std::sync::{Arc, PoisonError};

use srn_core::bytes::content_sum;
use srn_core::epoch::Position;
use srn_core::extent::Extent;
use srn_core::ids::DiskNo;
use srn_core::limits::{BLOCK_MAX, SECTOR};

use super::super::layers::Files;
use super::super::view::read_block;
use super::{Repaired, forget_runs_of};
use crate::codec::{Codecs, Effort};
use crate::error::{Result, StoreError};
use crate::group::{Group, LAYER_DIR};
use crate::index::{Lookup, Place, Run, RunScope};
use crate::layer::{LayerHeader, LayerWriter};
use crate::manifest::{LayerFileMeta, LayerMeta};

/// Ends of history behind a layer at which its content may still be what it was.
const LATER_MAX: usize = 4;

/// A damaged block of a layer: what has to be fetched for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerBlock {
    /// The sectors of the whole block, of which the layer may need a part only.
    pub whole: Extent,
    /// Positions at which they have that content, unless they were written since: first that of the
    /// layer.
    pub places: Vec<Position>,
}

/// A layer with an entry of its index.
struct Found {
    ordinal: u32,
    meta: LayerMeta,
    run: Arc<Run>,
    extent: Extent,
    place: Place,
}

impl Found {
    /// The sectors of the whole block.
    fn whole(&self) -> Option<Extent> {
        let Place::Block { sectors, skip, .. } = self.place else { return None };
        let start = self.extent.start.checked_sub(u64::from(skip))?;
        Some(Extent::new(start, u64::from(sectors)))
    }
}

impl Group {
    /// What has to be fetched for these sectors of a layer file; none when nothing is damaged there, or it
    /// is not there any more.
    ///
    /// # Errors
    /// [`StoreError::Corrupt`] when the index is damaged; as the volume says.
    pub fn damaged_block(
        &self,
        file: u32,
        disk: DiskNo,
        extent: Extent,
    ) -> Result<Option<LayerBlock>> {
        let Some(found) = self.find_in_layer(file, disk, extent)? else { return Ok(None) };
        if self.is_sound(&found)? {
            return Ok(None);
        }
        let state = self.lock();
        let line = state.manifest.timelines.get(&state.manifest.main);
        let pieces = line.map_or(&[][..], |line| &line.pieces);
        let behind = pieces.iter().filter(|piece| piece.last.seq > found.meta.last.seq);
        let later = behind.map(|piece| piece.last).take(LATER_MAX);
        let places = std::iter::once(found.meta.last).chain(later).collect();
        Ok(found.whole().map(|whole| LayerBlock { whole, places }))
    }

    fn find_in_layer(&self, file: u32, disk: DiskNo, extent: Extent) -> Result<Option<Found>> {
        let (ordinal, meta, run) = {
            let state = self.lock();
            let mut all = state.manifest.layers.iter();
            let has_it = |layer: &LayerMeta| layer.files.iter().any(|one| one.ordinal == file);
            let Some((ordinal, meta)) = all.find(|(_, layer)| has_it(layer)) else {
                return Ok(None);
            };
            let mut runs = state.runs.values();
            let Some(run) = runs.find(|run| run.meta().pieces == (*ordinal, *ordinal)) else {
                return Ok(None);
            };
            (*ordinal, meta.clone(), run.clone())
        };
        let mut parts = Vec::new();
        run.lookup(disk, extent, &mut parts)?;
        let is_there = |(_, place): &(Extent, Place)| matches!(place, Place::Block { segment, .. } if *segment == file);
        let found = parts.into_iter().find(is_there);
        Ok(found.map(|(extent, place)| Found { ordinal, meta, run, extent, place }))
    }

    fn is_sound(&self, found: &Found) -> Result<bool> {
        let Place::Block { segment, .. } = found.place else { return Ok(true) };
        let content = self.lock().content(segment)?;
        let mut out = vec![0; usize::try_from(found.extent.bytes()).unwrap_or(0)];
        match read_block(&self.shared.pool, &content, &found.place, &mut out) {
            Ok(()) => Ok(true),
            Err(StoreError::Corrupt(_)) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Puts the block right that holds these sectors of a layer file. `content` is that of the whole block,
    /// see [`LayerBlock::whole`]; where it is from does not matter.
    ///
    /// # Errors
    /// [`StoreError::Corrupt`] when the index is damaged; [`StoreError::Full`] when there is no room; as
    /// the volume says. Then nothing has changed.
    pub fn repair_block(
        self: &Arc<Self>,
        file: u32,
        disk: DiskNo,
        extent: Extent,
        content: &[u8],
    ) -> Result<Repaired> {
        let _alone = self.maintaining.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(found) = self.find_in_layer(file, disk, extent)? else {
            return Ok(Repaired::NotNeeded);
        };
        let Place::Block { sum, sectors, .. } = found.place else { return Ok(Repaired::NotNeeded) };
        if self.is_sound(&found)? {
            return Ok(Repaired::NotNeeded);
        }
        let is_same = content.len() as u64 == u64::from(sectors) * SECTOR
            && content.len() <= BLOCK_MAX
            && content_sum(content) == sum;
        if !is_same {
            return Ok(Repaired::NotTheSame);
        }
        self.exchange_block(&found, content)
    }

    /// Writes a block to a file of its own, and takes it into the layer.
    fn exchange_block(self: &Arc<Self>, found: &Found, content: &[u8]) -> Result<Repaired> {
        let mut files = Files::none_of(self);
        let mut stored = Vec::new();
        let how = Codecs::new().encode(Effort::Lz4, content, &mut stored);
        let header = LayerHeader {
            ordinal: self.lock().next_ordinal(),
            group: self.id,
            first: found.meta.first,
            last: found.meta.last,
        };
        let dir = self.dir.join(LAYER_DIR);
        let mut writer = LayerWriter::create(&self.shared.volume, &dir, &header)?;
        let offset = writer.push(&stored)?;
        let (file, bytes) = writer.finish()?;
        let file = Arc::new(file);
        files.layers.push((file.clone(), bytes));
        let old = found.run.clone();
        let entries = old.iter().map(|item| {
            item.map(|(disk, extent, place)| {
                (disk, extent, found.moved(place, &header, offset, &stored, how.codec))
            })
        });
        let (meta, run) = self.write_run(
            entries,
            &RunScope {
                group: self.id,
                level: old.meta().level,
                first: old.meta().first,
                last: old.last(),
                pieces: old.meta().pieces,
                points: &[],
                marks: &old.marks()?,
                catalog: &old.catalog()?,
            },
        )?;
        files.run = Some(meta.file);
        self.sync_layers()?;
        let published = self.publish_if(
            |manifest| {
                let is_same = manifest.runs.contains_key(&old.meta().file);
                let Some(layer) = manifest.layers.get_mut(&found.ordinal).filter(|_| is_same)
                else {
                    return false;
                };
                layer.files.push(LayerFileMeta { ordinal: file.ordinal, bytes });
                forget_runs_of(manifest, found.ordinal);
                manifest.runs.insert(meta.file, meta);
                true
            },
            |state| {
                state.layers.insert(file.ordinal, file.clone());
                state.runs.insert(meta.file, run);
            },
        )?;
        if !published {
            return Ok(Repaired::Later);
        }
        files.keep();
        self.forget_unlisted();
        Ok(Repaired::Yes)
    }
}

impl Found {
    /// A place of the layer's index, if it is in the block that was moved.
    fn moved(
        &self,
        place: Place,
        to: &LayerHeader,
        at: u32,
        bytes: &[u8],
        how: srn_core::frame::envelope::Codec,
    ) -> Place {
        let of = |place: &Place| match place {
            Place::Block { segment, offset, .. } => Some((*segment, *offset)),
            Place::Zero { .. } => None,
        };
        let Place::Block { sum, sectors, skip, .. } = place else { return place };
        if of(&place) != of(&self.place) {
            return place;
        }
        Place::Block {
            segment: to.ordinal,
            offset: at,
            stored_len: u32::try_from(bytes.len()).unwrap_or(u32::MAX),
            codec: how,
            sum,
            sectors,
            skip,
        }
    }
}
