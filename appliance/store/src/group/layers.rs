//! Writing one layer: its content to layer files, its index to a run. Who writes it, and from what, is
//! the business of others; so is listing it in the manifest.
//!
//! What was written and is never listed is removed when it is dropped; what a crash leaves behind is
//! removed at the next opening.

use std::path::PathBuf;
use std::sync::Arc;

use srn_core::epoch::Position;
use srn_core::extent::Extent;
use srn_core::frame::envelope::Codec;
use srn_core::ids::{DiskNo, Seq};
use srn_core::time::LogTime;

use super::{Group, INDEX_DIR, LAYER_DIR, State};
use crate::error::{Doing, Result, StoreError};
use crate::index::{MarkPoint, Place, Run, RunMeta, RunScope, RunWriter, run_file_name};
use crate::io::{Fs, Volume};
use crate::layer::{self, LayerFile, LayerHeader, LayerWriter};
use crate::manifest::{LayerFileMeta, LayerMeta, Manifest, PieceMeta};

/// Space to leave free on the volume, in bytes.
pub(super) const RESERVE_BYTES: u64 = 64 << 20;

/// A block as a layer stores it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Block<'a> {
    pub(super) stored: &'a [u8],
    pub(super) codec: Codec,
    /// Checksum of its content.
    pub(super) sum: u64,
    /// Its content in sectors.
    pub(super) sectors: u8,
}

/// A layer that is being written.
pub(super) struct LayerOutput {
    group: Arc<Group>,
    first: Seq,
    last: Position,
    run: RunWriter,
    file: Option<LayerWriter>,
    files: Files,
}

impl std::fmt::Debug for LayerOutput {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "LayerOutput({} to {})", self.first, self.last.seq)
    }
}

/// Complete files that nothing lists yet: removed when dropped.
#[derive(Debug)]
pub(super) struct Files {
    pub(super) layers: Vec<(Arc<LayerFile>, u64)>,
    pub(super) run: Option<u32>,
    volume: Volume,
    dir: PathBuf,
}

impl Files {
    pub(super) fn none_of(group: &Group) -> Self {
        let (volume, dir) = (group.shared.volume.clone(), group.dir.clone());
        Self { layers: Vec::new(), run: None, volume, dir }
    }

    /// They are listed now: nothing is to be removed.
    pub(super) fn keep(mut self) {
        self.layers.clear();
        self.run = None;
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        for (file, _) in &self.layers {
            let name = layer::file_name(file.ordinal);
            let _ = self.volume.remove(&self.dir.join(LAYER_DIR).join(name));
        }
        if let Some(run) = self.run {
            let _ = self.volume.remove(&self.dir.join(INDEX_DIR).join(run_file_name(run)));
        }
    }
}

/// A layer whose files are complete and durable, but for their names.
#[derive(Debug)]
pub(super) struct WrittenLayer {
    pub(super) piece: PieceMeta,
    layer: LayerMeta,
    meta: RunMeta,
    run: Arc<Run>,
    files: Files,
}

impl LayerOutput {
    /// A layer of the frames `first` to `last`.
    ///
    /// # Errors
    /// As the volume says.
    pub(super) fn begin(group: &Arc<Group>, first: Seq, last: Position) -> Result<Self> {
        let files = Files::none_of(group);
        let run = group.new_run()?;
        Ok(Self { group: group.clone(), first, last, run, file: None, files })
    }

    /// Adds zeros, in order of disk and sector.
    ///
    /// # Errors
    /// As the volume says.
    pub(super) fn zero(&mut self, disk: DiskNo, extent: Extent, trim: bool) -> Result<()> {
        self.run.push(disk, extent, &Place::Zero { trim })
    }

    /// Adds a block at `start`, in order of disk and sector.
    ///
    /// # Errors
    /// As the volume says.
    pub(super) fn block(&mut self, disk: DiskNo, start: u64, block: Block<'_>) -> Result<()> {
        self.part(disk, Extent::new(start, u64::from(block.sectors)), block, 0)
    }

    /// Adds a block of which only `extent` counts, behind `skip` of its sectors.
    ///
    /// # Errors
    /// As the volume says.
    pub(super) fn part(
        &mut self,
        disk: DiskNo,
        extent: Extent,
        block: Block<'_>,
        skip: u8,
    ) -> Result<()> {
        if self.file.as_ref().is_some_and(|file| !file.has_room(block.stored.len())) {
            self.close_file()?;
        }
        let file = match &mut self.file {
            Some(file) => file,
            empty => {
                let ordinal = self.group.lock().next_ordinal();
                let header = LayerHeader {
                    ordinal,
                    group: self.group.id,
                    first: self.first,
                    last: self.last,
                };
                let dir = self.group.dir.join(LAYER_DIR);
                empty.insert(LayerWriter::create(&self.group.shared.volume, &dir, &header)?)
            }
        };
        let place = Place::Block {
            segment: file.ordinal(),
            offset: file.push(block.stored)?,
            stored_len: u32::try_from(block.stored.len())
                .map_err(|_| StoreError::Invalid("a block is too long".into()))?,
            codec: block.codec,
            sum: block.sum,
            sectors: block.sectors,
            skip,
        };
        self.run.push(disk, extent, &place)
    }

    fn close_file(&mut self) -> Result<()> {
        if let Some(file) = self.file.take() {
            let (file, bytes) = file.finish()?;
            self.files.layers.push((Arc::new(file), bytes));
        }
        Ok(())
    }

    /// Completes the layer: the catalog is that behind its last frame, in its own encoding.
    ///
    /// # Errors
    /// As the volume says.
    pub(super) fn finish(
        mut self,
        last_log_time: LogTime,
        marks: &[MarkPoint],
        catalog: &[u8],
    ) -> Result<WrittenLayer> {
        self.close_file()?;
        let Self { group, first, last, run, mut files, .. } = self;
        let ordinal = group.lock().next_ordinal();
        let meta = run.finish(&RunScope {
            group: group.id,
            level: 0,
            first,
            last,
            pieces: (ordinal, ordinal),
            points: &[],
            marks,
            catalog,
        })?;
        files.run = Some(meta.file);
        let run = group.open_run(&meta)?;
        let of_file = |(file, bytes): &(Arc<LayerFile>, u64)| LayerFileMeta {
            ordinal: file.ordinal,
            bytes: *bytes,
        };
        let layer = LayerMeta { first, last, files: files.layers.iter().map(of_file).collect() };
        let piece = PieceMeta { ordinal, first, last, last_log_time, is_prefix: false };
        Ok(WrittenLayer { piece, layer, meta, run, files })
    }
}

impl WrittenLayer {
    /// Lists it; the caller puts its piece into a line.
    pub(super) fn list(&self, manifest: &mut Manifest) {
        manifest.runs.insert(self.meta.file, self.meta);
        manifest.layers.insert(self.piece.ordinal, self.layer.clone());
    }

    /// Puts it where readers look for it.
    pub(super) fn install(&self, state: &mut State) {
        state.runs.insert(self.meta.file, self.run.clone());
        let files = self.files.layers.iter().map(|(file, _)| (file.ordinal, file.clone()));
        state.layers.extend(files);
    }

    /// It is listed now: nothing is to be removed.
    pub(super) fn keep(self) {
        self.files.keep();
    }
}

impl Group {
    /// Makes the names of layer files durable.
    ///
    /// # Errors
    /// As the volume says.
    pub(super) fn sync_layers(&self) -> Result<()> {
        let dir = self.dir.join(LAYER_DIR);
        self.shared.volume.sync_dir(&dir).doing(|| format!("syncing {}", dir.display()))
    }

    /// Bytes that a layer may take: what is free on the volume, less a reserve.
    ///
    /// # Errors
    /// As the volume says.
    pub fn room_for_layers(&self) -> Result<u64> {
        let free = self.shared.volume.free_bytes(&self.dir);
        let free = free.doing(|| "asking for free space".to_owned())?;
        Ok(free.saturating_sub(RESERVE_BYTES))
    }
}
