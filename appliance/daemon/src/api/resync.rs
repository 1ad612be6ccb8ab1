//! Having a replica compared with the production node's copy.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, State};
use serde::{Deserialize, Serialize};

use super::routes::Body;
use crate::error::Result;
use crate::fleet::SeedRecord;
use crate::group::GroupStatus;
use crate::node::Node;

/// A request to compare.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ResyncRequest {
    /// What is there already.
    pub seeds: Vec<SeedRecord>,
}

pub(super) async fn ask(
    State(node): State<Arc<Node>>,
    Path(group): Path<String>,
    Body(request): Body<ResyncRequest>,
) -> Result<Json<GroupStatus>> {
    let group = node.find_group(&group)?;
    group.ask_resync(request.seeds).await?;
    Ok(Json(node.group_status(&group)))
}

pub(super) async fn cancel(
    State(node): State<Arc<Node>>,
    Path(group): Path<String>,
) -> Result<Json<GroupStatus>> {
    let group = node.find_group(&group)?;
    group.cancel_resync().await?;
    Ok(Json(node.group_status(&group)))
}
