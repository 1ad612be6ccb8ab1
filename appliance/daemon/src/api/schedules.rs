//! Checkpoints of a group by the calendar.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, State};
use serde::{Deserialize, Serialize};

use super::points::blocking;
use super::routes::Body;
use crate::error::{Failure, Result};
use crate::group::ScheduleStatus;
use crate::node::Node;

type Shared = State<Arc<Node>>;

/// A schedule to add.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ScheduleRequest {
    /// A calendar expression as systemd writes them.
    pub calendar: String,
    /// Whether the applications are made quiet for it.
    pub application: bool,
    /// What its checkpoints are called, before their time.
    pub label: Option<String>,
}

pub(super) async fn list(
    State(node): Shared,
    Path(group): Path<String>,
) -> Result<Json<Vec<ScheduleStatus>>> {
    let group = node.find_group(&group)?;
    blocking(move || Ok(group.schedules())).await.map(Json)
}

pub(super) async fn add(
    State(node): Shared,
    Path(group): Path<String>,
    Body(request): Body<ScheduleRequest>,
) -> Result<Json<ScheduleStatus>> {
    let group = node.find_group(&group)?;
    let ScheduleRequest { calendar, application, label } = request;
    blocking(move || group.add_schedule(&calendar, application, label)).await.map(Json)
}

pub(super) async fn remove(
    State(node): Shared,
    Path((group, number)): Path<(String, String)>,
) -> Result<Json<ScheduleStatus>> {
    let group = node.find_group(&group)?;
    let number = number
        .parse()
        .map_err(|_| Failure::invalid(format!("{number:?} is no number of a schedule")))?;
    blocking(move || group.remove_schedule(number)).await.map(Json)
}
