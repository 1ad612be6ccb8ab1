//! The layers: each block that their runs lead to.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::sync::Arc;

use srn_core::limits::SECTOR;

use super::{Damage, Work};
use crate::error::{Result, StoreError};
use crate::group::{Content, LAYER_DIR, read_block};
use crate::index::{Item, Place, Run};
use crate::layer::{LayerFile, LayerHeader, file_name};
use crate::manifest::LayerMeta;

impl Work<'_> {
    pub(super) fn layer_bytes(&self) -> u64 {
        let layers = self.files.manifest.layers.values();
        layers.fold(0, |sum: u64, layer| sum.saturating_add(layer.bytes()))
    }

    pub(super) fn check_layers(&mut self, runs: &BTreeMap<u32, Run>) -> Result<ControlFlow<()>> {
        let layers = self.files.manifest.layers.clone();
        for (ordinal, layer) in &layers {
            let files = self.open_layer(layer)?;
            let of_layer =
                |run: &&Run| run.meta().level == 0 && run.meta().pieces == (*ordinal, *ordinal);
            // Without its run nobody knows what is a block; that is said with the runs.
            let Some(run) = runs.values().find(of_layer) else { continue };
            for entry in run.iter() {
                let entry = entry?;
                if self.check_entry(layer, &files, &entry)?.is_break() {
                    return Ok(ControlFlow::Break(()));
                }
            }
        }
        Ok(ControlFlow::Continue(()))
    }

    fn open_layer(&mut self, layer: &LayerMeta) -> Result<BTreeMap<u32, Arc<LayerFile>>> {
        let dir = self.files.dir.join(LAYER_DIR);
        let mut files = BTreeMap::new();
        for meta in &layer.files {
            self.report.counts.layer_files += 1;
            let header = LayerHeader {
                ordinal: meta.ordinal,
                group: self.files.manifest.group,
                first: layer.first,
                last: layer.last,
            };
            let text = match LayerFile::open(&self.files.volume, &dir, &header, meta.bytes) {
                Ok(file) => {
                    files.insert(meta.ordinal, Arc::new(file));
                    continue;
                }
                Err(StoreError::Io { source, .. })
                    if source.kind() == std::io::ErrorKind::NotFound =>
                {
                    "the file is missing"
                }
                Err(StoreError::Corrupt(_)) => "its header is damaged, or it is too short",
                Err(error) => return Err(error),
            };
            let mut damage = Damage::of(name(meta.ordinal), text);
            damage.frames = Some((layer.first, layer.last.seq));
            self.damaged(damage);
        }
        Ok(files)
    }

    fn check_entry(
        &mut self,
        layer: &LayerMeta,
        files: &BTreeMap<u32, Arc<LayerFile>>,
        (disk, extent, place): &Item,
    ) -> Result<ControlFlow<()>> {
        let Place::Block { segment, offset, stored_len, .. } = place else {
            return Ok(ControlFlow::Continue(()));
        };
        let Some(file) = files.get(segment) else {
            if !layer.files.iter().any(|file| file.ordinal == *segment) {
                let text = "the layer's index names a file that the layer does not have";
                let mut damage = Damage::of(name(*segment), text);
                damage.sectors.push((*disk, *extent));
                self.damaged(damage);
            }
            return Ok(ControlFlow::Continue(()));
        };
        self.report.counts.blocks += 1;
        let mut out = [0u8; srn_core::limits::BLOCK_MAX];
        let len = usize::try_from(extent.sectors * SECTOR).unwrap_or(0);
        let out = out.get_mut(..len).unwrap_or_default();
        match read_block(&self.files.pool, &Content::Layer(file.clone()), place, out) {
            Ok(()) => {}
            Err(StoreError::Corrupt(_)) => {
                let text = "content of a layer does not have its checksum";
                let mut damage = Damage::of(name(*segment), text).at(u64::from(*offset));
                damage.frames = Some((layer.first, layer.last.seq));
                damage.sectors.push((*disk, *extent));
                self.damaged(damage);
            }
            Err(error) => return Err(error),
        }
        Ok(self.step(u64::from(*stored_len)))
    }
}

fn name(ordinal: u32) -> String {
    format!("{LAYER_DIR}/{}", file_name(ordinal).display())
}
