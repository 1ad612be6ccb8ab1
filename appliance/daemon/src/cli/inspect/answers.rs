//! What `srn inspect` tells, as programs read it.

use serde::Serialize;
use srn_core::epoch::Position;
use srn_core::extent::Extent;
use srn_core::time::WallTime;
use srn_store::catalog::Catalog;
use srn_store::inspect::SegmentInfo;
use srn_store::manifest::{Keep, Purpose, Role};

use super::place::GroupDir;
use crate::clock;
use crate::config::Size;
use crate::error::Result;

/// One group, by its manifest.
#[derive(Debug, Serialize)]
pub(super) struct GroupAnswer {
    pub(super) id: String,
    pub(super) name: Option<String>,
    pub(super) role: Option<&'static str>,
    pub(super) keep: Option<&'static str>,
    pub(super) fenced: bool,
    pub(super) lines: usize,
    pub(super) segments: usize,
    pub(super) log_bytes: u64,
    pub(super) base_frame: Option<u64>,
    /// The last frame that the manifest lists; newer ones may follow.
    pub(super) sealed_frame: Option<u64>,
    /// Why it cannot be looked at.
    pub(super) error: Option<String>,
}

impl GroupAnswer {
    pub(super) fn of(group: &GroupDir) -> Result<Self> {
        let nothing = Self {
            id: group.id.clone(),
            name: None,
            role: None,
            keep: None,
            fenced: false,
            lines: 0,
            segments: 0,
            log_bytes: 0,
            base_frame: None,
            sealed_frame: None,
            error: None,
        };
        let files = match group.files() {
            Ok(files) => files,
            Err(failure) => return Ok(Self { error: Some(failure.message), ..nothing }),
        };
        let manifest = &files.manifest;
        let segments = files.segments()?;
        let main = manifest.timelines.get(&manifest.main);
        Ok(Self {
            id: manifest.group.to_string(),
            name: Some(manifest.name.clone()),
            role: Some(match manifest.role {
                Role::Primary => "primary",
                Role::Secondary => "secondary",
            }),
            keep: Some(match manifest.keep {
                Keep::Cache => "cache",
                Keep::Replica => "replica",
            }),
            fenced: manifest.fence.is_some(),
            lines: manifest.timelines.len(),
            segments: segments.len(),
            log_bytes: segments.iter().map(|segment: &SegmentInfo| segment.bytes).sum(),
            base_frame: manifest.base.as_ref().map(|base| base.catalog.at.seq.0),
            sealed_frame: main.and_then(|line| line.pieces.last()).map(|piece| piece.last.seq.0),
            ..nothing
        })
    }
}

pub(super) fn group_row(group: &GroupAnswer) -> Vec<String> {
    let word = |text: Option<&str>| text.unwrap_or("-").to_owned();
    let frame = |frame: Option<u64>| frame.map_or_else(|| "-".into(), |seq| format!("frame {seq}"));
    vec![
        word(group.name.as_deref()),
        group.id.clone(),
        word(group.role),
        word(group.keep),
        format!("{} in {} files", Size(group.log_bytes), group.segments),
        frame(group.base_frame),
        frame(group.sealed_frame),
        match (&group.error, group.fenced) {
            (Some(error), _) => error.clone(),
            (None, true) => "fenced".into(),
            (None, false) => "ok".into(),
        },
    ]
}

/// A position and its time.
#[derive(Debug, Clone, Serialize)]
pub(super) struct PointAnswer {
    pub(super) frame: u64,
    pub(super) hash: String,
    pub(super) epoch: String,
    pub(super) time: Option<String>,
}

impl PointAnswer {
    pub(super) fn of(at: &Position, time: Option<WallTime>) -> Self {
        Self {
            frame: at.seq.0,
            hash: at.hash.to_string(),
            epoch: at.epoch.to_string(),
            time: time.map(clock::rfc3339),
        }
    }

    pub(super) fn of_catalog(catalog: &Catalog) -> Self {
        // Before the first frame there is no time.
        Self::of(&catalog.at, (catalog.at.seq.0 > 0).then_some(catalog.wall_time))
    }

    pub(super) fn words(&self) -> String {
        match &self.time {
            Some(time) => format!("frame {} of {time}", self.frame),
            None => format!("frame {}", self.frame),
        }
    }
}

/// A stretch of a disk.
#[derive(Debug, Clone, Serialize)]
pub(super) struct SectorsAnswer {
    pub(super) first: u64,
    pub(super) sectors: u64,
}

impl SectorsAnswer {
    pub(super) const fn of(extent: &Extent) -> Self {
        Self { first: extent.start, sectors: extent.sectors }
    }
}

pub(super) const fn purpose(purpose: Purpose) -> &'static str {
    match purpose {
        Purpose::Main => "main",
        Purpose::Clone => "clone",
        Purpose::Branch => "branch",
    }
}
