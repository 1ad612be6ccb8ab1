//! The point in time that a person means, in one line of history.

use std::sync::Arc;

use srn_core::ids::Seq;
use srn_store::group::{Checkpoint, Group, LineInfo};
use srn_store::manifest::Purpose;

use super::answers::PointAnswer;
use crate::error::{Failure, Result};
use crate::point::{Recorded, choose_in};

/// A point that was chosen.
#[derive(Debug)]
pub(super) struct Point {
    pub(super) seq: Seq,
    /// What it is, in words.
    pub(super) words: String,
}

/// In the main line whatever the daemon takes too; in another one `latest`, a checkpoint's id (or its
/// beginning) or label, or a frame's number.
///
/// # Errors
/// When there is no such point, or several.
pub(super) fn choose(group: &Arc<Group>, name: &str, line: &LineInfo, at: &str) -> Result<Point> {
    if line.purpose == Purpose::Main {
        let recorded = Recorded { name: name.to_owned(), store: group };
        let crate::point::Point { seq, words } = choose_in(&recorded, at)?;
        return Ok(Point { seq, words });
    }
    if at == "latest" {
        let newest = line.catalog.last_clean.ok_or_else(|| {
            Failure::refused("nothing can be recovered yet: no disk was ever whole")
        })?;
        let is_head = newest == line.catalog.at;
        let words = PointAnswer::of(&newest, is_head.then_some(line.catalog.wall_time)).words();
        return Ok(Point { seq: newest.seq, words });
    }
    let checkpoints = group.checkpoints_of(line.epochs.current())?;
    let lower = at.to_lowercase();
    let fits = |checkpoint: &&Checkpoint| {
        checkpoint.note.label == at
            || (at.len() >= 4 && checkpoint.mark.id.to_string().starts_with(&lower))
    };
    let found: Vec<&Checkpoint> = checkpoints.iter().filter(fits).collect();
    match found.as_slice() {
        [one] => {
            let at = PointAnswer::of(&one.position, Some(one.mark.wall_time));
            let label = if one.note.label.is_empty() {
                String::new()
            } else {
                format!(" {:?}", one.note.label)
            };
            let words = format!("checkpoint {}{label}, {}", one.mark.id.short(), at.words());
            Ok(Point { seq: one.position.seq, words })
        }
        [] => match at.parse() {
            Ok(frame) => Ok(Point { seq: Seq(frame), words: format!("frame {frame}") }),
            Err(_) => Err(Failure::not_found(format!(
                "there is no point {at:?} in this line; list them with: srn inspect points"
            ))),
        },
        many => Err(Failure::conflict(format!(
            "{at:?} fits {} checkpoints; give more of the id",
            many.len()
        ))),
    }
}
