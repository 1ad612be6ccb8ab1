//! Turning the direction of a group, and the branches that this leaves.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, State};

use super::routes::Body;
use crate::error::{Failure, Result};
use crate::group::{BranchStatus, Reversal};
use crate::node::{Node, ReversalRequest};

pub(super) async fn reverse(
    State(node): State<Arc<Node>>,
    Path(group): Path<String>,
    Body(request): Body<ReversalRequest>,
) -> Result<Json<Reversal>> {
    let group = node.find_group(&group)?;
    // Goes on when the one who asked goes away.
    let turned = tokio::spawn(async move { node.reverse_group(&group, request).await });
    turned.await.map_err(|error| Failure::internal(format!("a task ended: {error}")))?.map(Json)
}

pub(super) async fn branches(
    State(node): State<Arc<Node>>,
    Path(group): Path<String>,
) -> Result<Json<Vec<BranchStatus>>> {
    node.find_group(&group)?.branches().await.map(Json)
}

pub(super) async fn delete_branch(
    State(node): State<Arc<Node>>,
    Path((group, branch)): Path<(String, String)>,
) -> Result<Json<()>> {
    let group = node.find_group(&group)?;
    let id = group.find_branch(&branch).await?;
    group.delete_branch(id, "by an administrator").await.map(Json)
}
