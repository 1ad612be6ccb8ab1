//! What of a group's history is kept at this node.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, State};
use serde::{Deserialize, Serialize};

use super::points::blocking;
use super::routes::Body;
use crate::error::Result;
use crate::group::{PolicyChange, RetentionStatus};
use crate::node::Node;

type Shared = State<Arc<Node>>;

pub(super) async fn show(
    State(node): Shared,
    Path(group): Path<String>,
) -> Result<Json<RetentionStatus>> {
    let group = node.find_group(&group)?;
    blocking(move || group.retention_status(&PolicyChange::default())).await.map(Json)
}

pub(super) async fn preview(
    State(node): Shared,
    Path(group): Path<String>,
    Body(change): Body<PolicyChange>,
) -> Result<Json<RetentionStatus>> {
    let group = node.find_group(&group)?;
    blocking(move || group.retention_status(&change)).await.map(Json)
}

/// A change of a policy.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RetentionChange {
    /// What shall be changed.
    pub change: PolicyChange,
    /// A person has confirmed that checkpoints are dropped.
    pub confirmed: bool,
}

pub(super) async fn set(
    State(node): Shared,
    Path(group): Path<String>,
    Body(request): Body<RetentionChange>,
) -> Result<Json<RetentionStatus>> {
    let group = node.find_group(&group)?;
    blocking(move || group.set_retention(&request.change, request.confirmed)).await.map(Json)
}

pub(super) async fn resume(
    State(node): Shared,
    Path(group): Path<String>,
) -> Result<Json<RetentionStatus>> {
    let group = node.find_group(&group)?;
    let work = move || {
        group.resume_retention()?;
        group.retention_status(&PolicyChange::default())
    };
    blocking(work).await.map(Json)
}
