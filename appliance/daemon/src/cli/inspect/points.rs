//! What can be recovered: each line of history, its range, its checkpoints and disks.

use serde::Serialize;
use srn_core::state::Content;
use srn_store::group::{Checkpoint, LineInfo};
use srn_store::inspect::Looked;

use super::answers::{PointAnswer, purpose};
use super::place::GroupDir;
use super::show;
use crate::cli::render;
use crate::clock;
use crate::config::Size;
use crate::error::Result;

#[derive(Debug, Serialize)]
struct PointsAnswer {
    group: String,
    id: String,
    /// Frames at the end that nothing proves to be durable; a daemon would write them again.
    unproven_frames: usize,
    lines: Vec<LineAnswer>,
}

#[derive(Debug, Serialize)]
struct LineAnswer {
    epoch: String,
    purpose: &'static str,
    since: String,
    /// Where it left the line before it; none for a group's first.
    forked_from: Option<PointAnswer>,
    /// The oldest frame of it that is still in the log.
    oldest_frame: u64,
    /// Every frame from here can be recovered; none for a cache, which holds no disks.
    from: Option<PointAnswer>,
    /// Its newest frame.
    to: PointAnswer,
    /// Whether the newest frame is whole; in the middle of a resync it is not.
    clean: bool,
    /// The newest frame that is whole.
    newest_clean: Option<PointAnswer>,
    disks: Vec<DiskAnswer>,
    checkpoints: Vec<CheckpointAnswer>,
}

#[derive(Debug, Serialize)]
struct DiskAnswer {
    number: u32,
    name: String,
    id: String,
    bytes: u64,
    content: &'static str,
}

#[derive(Debug, Serialize)]
struct CheckpointAnswer {
    id: String,
    label: String,
    kind: &'static str,
    clean: bool,
    pinned: bool,
    at: PointAnswer,
}

pub(super) fn points(group: &GroupDir, json: bool) -> Result<()> {
    let looked = group.look()?;
    let answer = PointsAnswer {
        group: group.name()?,
        id: looked.group.id().to_string(),
        unproven_frames: looked.unproven,
        lines: looked
            .group
            .lines()
            .iter()
            .map(|line| line_answer(&looked, line))
            .collect::<Result<_>>()?,
    };
    show(json, &answer, text);
    Ok(())
}

fn line_answer(looked: &Looked, line: &LineInfo) -> Result<LineAnswer> {
    let epoch = line.epochs.current();
    let forked = line.epochs.list();
    let forked = forked.last().filter(|_| forked.len() > 1).map(|epoch| epoch.forked_from);
    let checkpoints = looked.group.checkpoints_of(epoch)?;
    let catalog = &line.catalog;
    Ok(LineAnswer {
        epoch: epoch.to_string(),
        purpose: purpose(line.purpose),
        since: clock::rfc3339(line.since),
        forked_from: forked.map(|at| PointAnswer::of(&at, None)),
        oldest_frame: line.oldest.0,
        from: line.base.as_ref().map(PointAnswer::of_catalog),
        to: PointAnswer::of_catalog(catalog),
        clean: catalog.is_clean(),
        newest_clean: catalog.last_clean.map(|at| PointAnswer::of(&at, None)),
        disks: catalog
            .disks
            .iter()
            .map(|(no, disk)| DiskAnswer {
                number: no.0,
                name: disk.name.clone(),
                id: disk.id.to_string(),
                bytes: disk.sectors.saturating_mul(srn_core::limits::SECTOR),
                content: match disk.content {
                    Content::Clean => "clean",
                    Content::Seeding => "seeding",
                    Content::Resync => "resync",
                },
            })
            .collect(),
        checkpoints: checkpoints.iter().map(checkpoint_answer).collect(),
    })
}

fn checkpoint_answer(checkpoint: &Checkpoint) -> CheckpointAnswer {
    CheckpointAnswer {
        id: checkpoint.mark.id.to_string(),
        label: checkpoint.note.label.clone(),
        kind: checkpoint.mark.kind.word(),
        clean: checkpoint.mark.clean,
        pinned: checkpoint.note.pinned,
        at: PointAnswer::of(&checkpoint.position, Some(checkpoint.mark.wall_time)),
    }
}

fn text(answer: &PointsAnswer) -> String {
    let mut out = vec![format!("group {} ({})", answer.group, answer.id)];
    if answer.unproven_frames > 0 {
        out.push(format!(
            "newest frames that may be only in a cache of this machine: {}",
            answer.unproven_frames
        ));
    }
    for line in &answer.lines {
        out.push(String::new());
        out.push(format!("{} line {}", line.purpose, line.epoch));
        if let Some(fork) = &line.forked_from {
            out.push(format!("  forked from {} of epoch {}", fork.words(), fork.epoch));
        }
        out.push(match &line.from {
            Some(from) => format!("  any frame from {} to {}", from.words(), line.to.words()),
            None => format!(
                "  a local cache, from which no disk can be read: frame {} to {}",
                line.oldest_frame,
                line.to.words()
            ),
        });
        if !line.clean {
            out.push(match &line.newest_clean {
                Some(at) => format!("  its end is a mixture of times; {} is not", at.words()),
                None => "  nothing can be recovered yet: no disk was ever whole".into(),
            });
        }
        for disk in &line.disks {
            let words = format!("  disk {} ({}, {})", disk.name, Size(disk.bytes), disk.content);
            out.push(words);
        }
        if !line.checkpoints.is_empty() {
            let rows: Vec<_> = line.checkpoints.iter().map(checkpoint_row).collect();
            let head = ["CHECKPOINT", "FRAME", "TIME", "KIND", "STATE", "LABEL"];
            let table = render::table(&head, &rows);
            out.extend(table.lines().map(|line| format!("  {line}")));
        }
    }
    out.join("\n")
}

fn checkpoint_row(checkpoint: &CheckpointAnswer) -> Vec<String> {
    let state = if checkpoint.clean { "clean" } else { "unclean" };
    vec![
        checkpoint.id.clone(),
        checkpoint.at.frame.to_string(),
        checkpoint.at.time.clone().unwrap_or_default(),
        checkpoint.kind.to_owned(),
        if checkpoint.pinned { format!("{state}, pinned") } else { state.to_owned() },
        checkpoint.label.clone(),
    ]
}
