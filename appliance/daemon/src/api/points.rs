//! Points in time of a group: its history, and its checkpoints.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, Query, State};
use serde::{Deserialize, Serialize};
use srn_core::frame::MarkKind;
use srn_core::limits::TEXT_MAX;

use super::routes::Body;
use crate::error::{Failure, Result};
use crate::group::{CheckpointStatus, Group};
use crate::node::Node;
use crate::point::{self, HistoryStatus};

type Shared = State<Arc<Node>>;

/// Runs something that may wait for the disk.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|error| Failure::internal(format!("a task ended: {error}")))?
}

/// What of a history is asked for.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct HistoryQuery {
    /// A point in words: which one does it mean?
    pub at: Option<String>,
}

pub(super) async fn history(
    State(node): Shared,
    Path(group): Path<String>,
    Query(query): Query<HistoryQuery>,
) -> Result<Json<HistoryStatus>> {
    let group = node.find_group(&group)?;
    blocking(move || point::history(&group, query.at.as_deref())).await.map(Json)
}

async fn checkpoints(group: &Arc<Group>) -> Result<Vec<CheckpointStatus>> {
    let store = group.store().clone();
    let listed = blocking(move || store.checkpoints().map_err(Failure::from)).await?;
    Ok(listed.iter().map(CheckpointStatus::from).collect())
}

pub(super) async fn list(
    State(node): Shared,
    Path(group): Path<String>,
) -> Result<Json<Vec<CheckpointStatus>>> {
    checkpoints(&node.find_group(&group)?).await.map(Json)
}

/// A request for a checkpoint.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CheckpointRequest {
    /// A person's label.
    pub label: Option<String>,
    /// It is never to be retired.
    pub pin: bool,
    /// The applications are made quiet for it.
    pub application: bool,
}

/// A checkpoint that was made or asked for.
#[derive(Debug, Serialize, Deserialize)]
pub struct NewCheckpoint {
    /// Its id.
    pub id: String,
    /// Its frame; none when the production node was asked and has not answered yet.
    pub frame: Option<u64>,
    /// Whether the applications were quiet: `application` or `crash`.
    #[serde(default)]
    pub consistent: String,
    /// Why it is crash-consistent although it was to be more.
    #[serde(default)]
    pub crash_only: Option<String>,
}

/// Whether a label can be given.
async fn check_label(group: &Arc<Group>, label: &str) -> Result<()> {
    if label.is_empty() || label.len() > TEXT_MAX || label.chars().any(char::is_control) {
        return Err(Failure::invalid(format!(
            "a label has 1 to {TEXT_MAX} bytes and no control characters"
        )));
    }
    if checkpoints(group).await?.iter().any(|other| other.label.as_deref() == Some(label)) {
        return Err(Failure::conflict(format!(
            "group {} has a checkpoint {label:?} already; choose another label",
            group.name()
        )));
    }
    Ok(())
}

pub(super) async fn create(
    State(node): Shared,
    Path(group): Path<String>,
    Body(request): Body<CheckpointRequest>,
) -> Result<Json<NewCheckpoint>> {
    let group = node.find_group(&group)?;
    if let Some(label) = &request.label {
        check_label(&group, label).await?;
    }
    if request.application {
        let made = group.quiet_checkpoint(MarkKind::Manual, request.label, request.pin).await?;
        return Ok(Json(NewCheckpoint {
            id: made.id.to_string(),
            frame: Some(made.position.seq.0),
            consistent: if made.crash_only.is_none() { "application" } else { "crash" }.into(),
            crash_only: made.crash_only,
        }));
    }
    let made = group.checkpoint(MarkKind::Manual, request.label, request.pin).await?;
    Ok(Json(NewCheckpoint {
        id: made.0.to_string(),
        frame: made.1.map(|at| at.seq.0),
        consistent: "crash".into(),
        crash_only: None,
    }))
}

/// A checkpoint of a group by its label or the beginning of its id.
async fn found(group: &Arc<Group>, name: String) -> Result<srn_store::group::Checkpoint> {
    let of = group.clone();
    blocking(move || {
        point::find_checkpoint(&of, &name)?.ok_or_else(|| {
            Failure::not_found(format!(
                "group {0} has no checkpoint {name:?}; list them with: srn checkpoint list {0}",
                of.name()
            ))
        })
    })
    .await
}

/// What is to be noted of a checkpoint. What is not given stays.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct NoteRequest {
    /// A label; empty for none.
    pub label: Option<String>,
    /// Never to be retired, or no longer so.
    pub pin: Option<bool>,
}

pub(super) async fn note(
    State(node): Shared,
    Path((group, name)): Path<(String, String)>,
    Body(request): Body<NoteRequest>,
) -> Result<Json<CheckpointStatus>> {
    let group = node.find_group(&group)?;
    let checkpoint = found(&group, name).await?;
    if let Some(label) = request.label.as_ref().filter(|label| !label.is_empty())
        && *label != checkpoint.note.label
    {
        check_label(&group, label).await?;
    }
    if request.pin == Some(true) && !checkpoint.mark.clean {
        return Err(Failure::refused(
            "the checkpoint is unclean: a resync was under way, and nothing can be recovered from \
             it",
        ));
    }
    let id = checkpoint.mark.id;
    let change = move |note: &mut srn_store::manifest::Note| {
        if let Some(label) = request.label {
            note.label = label;
        }
        if let Some(pin) = request.pin {
            note.unpinned = note.pinned && !pin;
            note.pinned = pin;
        }
    };
    group.change_note(id, change).await?;
    let note = group.store().note(id);
    Ok(Json(CheckpointStatus::from(&srn_store::group::Checkpoint { note, ..checkpoint })))
}

pub(super) async fn remove(
    State(node): Shared,
    Path((group, name)): Path<(String, String)>,
) -> Result<Json<CheckpointStatus>> {
    let group = node.find_group(&group)?;
    let checkpoint = found(&group, name).await?;
    if checkpoint.note.pinned {
        return Err(Failure::refused(format!(
            "checkpoint {0} of group {1} is pinned; first: srn checkpoint unpin {1} {0}",
            checkpoint.mark.id.short(),
            group.name()
        )));
    }
    let forget = |note: &mut srn_store::manifest::Note| {
        note.deleted = true;
        note.label.clear();
    };
    group.change_note(checkpoint.mark.id, forget).await?;
    Ok(Json(CheckpointStatus::from(&checkpoint)))
}
