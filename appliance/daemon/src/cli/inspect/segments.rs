//! The files of a log.

use serde::Serialize;
use srn_store::inspect::{HeaderState, SegmentInfo, SegmentUse};

use super::place::GroupDir;
use super::show;
use crate::cli::render;
use crate::config::Size;
use crate::error::Result;

#[derive(Debug, Serialize)]
struct SegmentAnswer {
    file: String,
    bytes: u64,
    /// sealed, open, stale, free or newer; layer for a file of a layer.
    state: &'static str,
    ordinal: Option<u32>,
    header: &'static str,
    epoch: Option<String>,
    first_frame: Option<u64>,
    last_frame: Option<u64>,
    /// Offset behind the last frame.
    end: u64,
    /// Frames behind the last one that were durable and cannot be read.
    missing_up_to: Option<u64>,
}

impl SegmentAnswer {
    fn of(segment: &SegmentInfo) -> Self {
        let header = segment.header.header();
        let last = segment.last.map(|last| last.seq);
        let end = last.or_else(|| header.map(|header| header.first.prev()));
        let missing = segment.watermark.filter(|durable| {
            segment.purpose == SegmentUse::Open && end.is_some_and(|end| *durable > end)
        });
        Self {
            file: format!("log/{:08x}.seg", segment.slot),
            bytes: segment.bytes,
            state: match segment.purpose {
                SegmentUse::Sealed(_) => "sealed",
                SegmentUse::Open => "open",
                SegmentUse::Stale => "stale",
                SegmentUse::Free => "free",
                SegmentUse::Unreadable => "newer",
            },
            ordinal: match segment.purpose {
                SegmentUse::Sealed(ordinal) => Some(ordinal),
                _ => None,
            },
            header: match segment.header {
                HeaderState::Blank => "blank",
                HeaderState::Sound(_) => "sound",
                HeaderState::Damaged(_) => "damaged",
                HeaderState::Lost => "lost",
                HeaderState::Newer(_) => "newer",
            },
            epoch: header.map(|header| header.epoch.to_string()),
            first_frame: last.and(header).map(|header| header.first.0),
            last_frame: last.map(|last| last.0),
            end: segment.end,
            missing_up_to: missing.map(|seq| seq.0),
        }
    }

    fn row(&self) -> Vec<String> {
        let frames = match (self.first_frame, self.last_frame) {
            (Some(first), Some(last)) => format!("{first} to {last}"),
            _ => "-".into(),
        };
        let missing = self.missing_up_to.map(|seq| format!(", frames up to {seq} are missing"));
        let header = if self.header == "sound" || self.state == "free" {
            String::new()
        } else {
            format!(", header {}", self.header)
        };
        vec![
            self.file.clone(),
            self.ordinal.map_or_else(|| "-".into(), |ordinal| ordinal.to_string()),
            format!("{} of {}", Size(self.end), Size(self.bytes)),
            frames,
            self.epoch.as_deref().and_then(|epoch| epoch.get(..8)).unwrap_or("-").to_owned(),
            format!("{}{header}{}", self.state, missing.unwrap_or_default()),
        ]
    }
}

pub(super) fn segments(group: &GroupDir, json: bool) -> Result<()> {
    let files = group.files()?;
    let mut answer: Vec<SegmentAnswer> = files.segments()?.iter().map(SegmentAnswer::of).collect();
    for (ordinal, layer) in &files.manifest.layers {
        answer.extend(layer.files.iter().map(|file| SegmentAnswer {
            file: format!("layer/{:08x}.lay", file.ordinal),
            bytes: file.bytes,
            state: "layer",
            ordinal: Some(*ordinal),
            header: "sound",
            epoch: Some(layer.last.epoch.to_string()),
            first_frame: Some(layer.first.0),
            last_frame: Some(layer.last.seq.0),
            end: file.bytes,
            missing_up_to: None,
        }));
    }
    show(json, &answer, |answer| {
        let rows: Vec<_> = answer.iter().map(SegmentAnswer::row).collect();
        render::table(&["FILE", "ORDINAL", "USED", "FRAMES", "EPOCH", "STATE"], &rows)
    });
    Ok(())
}
