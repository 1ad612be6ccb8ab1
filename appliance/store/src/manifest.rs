//! The manifest: the one authority on which files make up a group's history, and on the group's
//! role in it. Each change writes a whole new one, `manifest-<generation>`; the newest is the
//! truth, the one before it is kept. Files that it does not list are left over from a crash.
//!
//! ```text
//! magic, version | generation | group | role, keep, fence | acknowledged | counters
//! | timelines | segments | layers | runs | base | notes | BLAKE3 of all before
//! ```

mod codec;

use std::collections::BTreeMap;
use std::path::Path;

use srn_core::epoch::{EpochTable, Position};
use srn_core::ids::{CheckpointId, EpochId, FrameHash, GroupId, Seq};
use srn_core::state::Cause;
use srn_core::time::{LogTime, WallTime};

use crate::catalog::Catalog;
use crate::durable;
use crate::error::{Doing, Result, StoreError};
use crate::index::{RunMeta, span};
use crate::io::{Fs, Volume};

/// Which part a node plays in a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// It takes the server's writes.
    Primary,
    /// It takes the primary's frames.
    Secondary,
}

/// What a node keeps of a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keep {
    /// Only the log that the peer has not acknowledged, and what space allows.
    Cache,
    /// A full copy.
    Replica,
}

/// Why nothing is appended any more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fence {
    /// [`Cause::FailoverAtPeer`] or [`Cause::Handover`].
    pub cause: Cause,
    /// The peer's line of epochs, which goes on where ours ended.
    pub epochs: Option<EpochTable>,
    /// Since when, by the wall clock.
    pub since: WallTime,
}

/// What a line of frames is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// The group's history.
    Main,
    /// A writable clone of a point, thrown away after use.
    Clone,
    /// History that was left behind by a failover; kept, never written.
    Branch,
}

/// A line of frames.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TimelineMeta {
    /// Its line of epochs; the last one is its own.
    pub epochs: EpochTable,
    /// What it is for.
    pub purpose: Purpose,
    /// When it was begun.
    pub since: WallTime,
    /// Its sealed pieces in order, from the base.
    pub pieces: Vec<PieceMeta>,
}

/// A part of a line: a sealed segment, whole or up to a frame; or a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PieceMeta {
    /// The segment or the layer.
    pub ordinal: u32,
    /// Its first frame.
    pub first: Seq,
    /// The last frame that belongs to the line.
    pub last: Position,
    /// That frame's log time.
    pub last_log_time: LogTime,
    /// Whether the segment goes on behind it.
    pub is_prefix: bool,
}

/// A sealed segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SegmentMeta {
    /// The file's number.
    pub slot: u32,
    /// The id in its header.
    pub id: u64,
    /// The epoch of its frames.
    pub epoch: EpochId,
    /// Its first frame.
    pub first: Seq,
    /// The hash of the frame before that.
    pub prev: FrameHash,
    /// Its last frame.
    pub last: Position,
    /// Offset behind its last frame, in bytes.
    pub end: u32,
}

/// A stretch of history of which only the end is a point in time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerMeta {
    /// The first frame of the stretch.
    pub first: Seq,
    /// Its last frame.
    pub last: Position,
    /// The files with its content; none when nothing was written in it.
    pub files: Vec<LayerFileMeta>,
}

/// A file of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerFileMeta {
    /// Its number, by which index entries name it. It is never used again.
    pub ordinal: u32,
    /// Its length in bytes.
    pub bytes: u64,
}

impl LayerMeta {
    /// Length of all its files in bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.files.iter().fold(0, |sum, file| sum.saturating_add(file.bytes))
    }
}

/// The base: each disk's content at one position.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BaseMeta {
    /// The group at that position.
    pub catalog: Catalog,
}

/// What people and the node remember of a checkpoint beside its mark in the log.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Note {
    /// A person's label.
    pub label: String,
    /// Never to be retired.
    pub pinned: bool,
    /// A server has booted from it.
    pub proven: bool,
    /// A person has deleted it: it is a position like any other.
    pub deleted: bool,
    /// A person has taken the pin away: the peer cannot give it again.
    pub unpinned: bool,
    /// The applications turned out not to have been quiet, whatever its mark says.
    pub unquiet: bool,
    /// A person has recovered it although something in it was known to be damaged.
    pub damage_accepted: bool,
}

impl Note {
    /// Whether it says nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// Everything about a group that is not in its frames.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    /// Rises by one with each change.
    pub generation: u64,
    /// The group.
    pub group: GroupId,
    /// Its name, for people who look at the files.
    pub name: String,
    /// This node's part.
    pub role: Role,
    /// What it keeps.
    pub keep: Keep,
    /// Set when nothing may be appended.
    pub fence: Option<Fence>,
    /// The last frame that the peer is known to hold durably.
    pub acked: Seq,
    /// The epoch of the main line.
    pub main: EpochId,
    /// Lines by their own epoch.
    pub timelines: BTreeMap<EpochId, TimelineMeta>,
    /// Sealed segments by ordinal.
    pub segments: BTreeMap<u32, SegmentMeta>,
    /// Layers by ordinal. Segments, layers and layer files share one sequence of ordinals.
    pub layers: BTreeMap<u32, LayerMeta>,
    /// Index files by number.
    pub runs: BTreeMap<u32, RunMeta>,
    /// The base; none for a cache.
    pub base: Option<BaseMeta>,
    /// Notes on checkpoints.
    pub notes: BTreeMap<CheckpointId, Note>,
    /// The next segment's ordinal.
    pub next_ordinal: u32,
    /// The next segment file's number.
    pub next_slot: u32,
    /// The next index file's number.
    pub next_run: u32,
}

/// The largest manifest in bytes: a hundred for each of a million segments and runs.
const MANIFEST_MAX: u64 = 256 << 20;

fn file_name(generation: u64) -> String {
    format!("manifest-{generation:016x}")
}

fn generation_of(name: &str) -> Option<u64> {
    let hex = name.strip_prefix("manifest-").filter(|hex| hex.len() == 16)?;
    u64::from_str_radix(hex, 16).ok()
}

/// The names among `names` that are those of manifests, oldest first.
pub(crate) fn manifest_names(names: &[String]) -> Vec<String> {
    let mut found: Vec<_> = names.iter().filter(|name| generation_of(name).is_some()).collect();
    found.sort_by_key(|name| generation_of(name));
    found.into_iter().cloned().collect()
}

impl Manifest {
    /// Forgets segments, layers and index files of pieces that no line has any more.
    pub(crate) fn drop_unused(&mut self) {
        let used: std::collections::BTreeSet<u32> = self
            .timelines
            .values()
            .flat_map(|line| line.pieces.iter().map(|piece| piece.ordinal))
            .collect();
        self.segments.retain(|ordinal, _| used.contains(ordinal));
        self.layers.retain(|ordinal, _| used.contains(ordinal));
        let lines: Vec<&TimelineMeta> = self.timelines.values().collect();
        self.runs.retain(|_, run| lines.iter().any(|line| span(run, &line.pieces).is_some()));
    }

    /// Makes it durable as the newest one in `dir`, and removes those before the last.
    ///
    /// # Errors
    /// As the volume says; then the one before is still the truth.
    pub fn store(&self, volume: &Volume, dir: &Path) -> Result<()> {
        durable::replace(volume, dir, &file_name(self.generation), &codec::encode(self))?;
        // Older ones are only in the way; a failure to remove them is tried again next time.
        for name in volume.list(dir).unwrap_or_default() {
            if generation_of(&name).is_some_and(|found| found + 1 < self.generation) {
                let _ = volume.remove(&dir.join(&name));
            }
        }
        Ok(())
    }

    /// Whether `dir` holds a manifest.
    ///
    /// # Errors
    /// As the volume says.
    pub fn exists(volume: &Volume, dir: &Path) -> Result<bool> {
        let names = volume.list(dir).doing(|| format!("listing {}", dir.display()))?;
        Ok(names.iter().any(|name| generation_of(name).is_some()))
    }

    /// Reads the newest one in `dir`.
    ///
    /// # Errors
    /// [`StoreError::Corrupt`] when it is damaged: as names appear only behind durable content, a
    /// bad one is no trace of a crash, and an older one must not silently stand in.
    pub fn load(volume: &Volume, dir: &Path) -> Result<Self> {
        let names = volume.list(dir).doing(|| format!("listing {}", dir.display()))?;
        let newest = names
            .iter()
            .filter_map(|name| generation_of(name))
            .max()
            .ok_or_else(|| StoreError::Corrupt(format!("{} has no manifest", dir.display())))?;
        Self::read(volume, dir, &file_name(newest))
    }

    /// Reads the one with this file name.
    ///
    /// # Errors
    /// As [`Manifest::load`].
    pub(crate) fn read(volume: &Volume, dir: &Path, name: &str) -> Result<Self> {
        let path = dir.join(name);
        let bytes = durable::read(volume, &path, MANIFEST_MAX)?;
        let manifest = codec::decode(&bytes).map_err(|error| match error {
            codec::BadManifest::Version(found) => StoreError::NewerVersion {
                what: path.display().to_string(),
                found,
                known: codec::VERSION,
            },
            codec::BadManifest::Damaged(what) => {
                StoreError::Corrupt(format!("{}: {what}", path.display()))
            }
        })?;
        if Some(manifest.generation) != generation_of(name) {
            return Err(StoreError::Corrupt(format!("{}: wrong generation", path.display())));
        }
        Ok(manifest)
    }
}
