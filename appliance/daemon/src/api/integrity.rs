//! Comparisons that live as long as the one who asked keeps the answer open.
//!
//! The answer is lines of JSON: how far it is, twice a second, and at last the result or why there
//! is none. When the connection goes away, for whatever reason, the comparison ends.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body as HttpBody, Bytes};
use axum::extract::{Path, State};
use axum::response::Response;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use super::routes::Body;
use crate::error::{Failure, Result};
use crate::group::Group;
use crate::group::integrity::{Scrubbed, Verified, WorkStatus};
use crate::node::Node;

/// How often it is said how far it is.
const EVERY: Duration = Duration::from_millis(500);

/// A request to compare what two nodes hold.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct VerifyRequest {
    /// Only this disk.
    pub disk: Option<String>,
}

/// A line of the answer.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Said<T> {
    /// How far it is.
    Progress(WorkStatus),
    /// It is done.
    Done(T),
    /// It ended before.
    Failed(Failure),
}

pub(super) async fn verify(
    State(node): State<Arc<Node>>,
    Path(group): Path<String>,
    Body(request): Body<VerifyRequest>,
) -> Result<Response> {
    let group = node.find_group(&group)?;
    let verify = group.prepare_verify(request.disk.as_deref()).await?;
    Ok(follow::<Verified>(node, group, verify.run()))
}

/// A request to read everything that is held.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ScrubRequest {}

pub(super) async fn scrub(
    State(node): State<Arc<Node>>,
    Path(group): Path<String>,
    Body(ScrubRequest {}): Body<ScrubRequest>,
) -> Result<Response> {
    let group = node.find_group(&group)?;
    let scrub = group.prepare_scrub().await?;
    Ok(follow::<Scrubbed>(node, group, scrub.run()))
}

/// Runs `work` and says how far it is, for as long as somebody listens.
fn follow<T: Serialize + Send + 'static>(
    node: Arc<Node>,
    group: Arc<Group>,
    work: impl Future<Output = Result<T>> + Send + 'static,
) -> Response {
    let (lines, taken) = mpsc::channel(4);
    tokio::spawn(async move {
        let mut ticks = tokio::time::interval(EVERY);
        tokio::pin!(work);
        let last = loop {
            tokio::select! {
                done = &mut work => break done,
                // Whoever asked has gone away, or the node stops: so does the work.
                () = lines.closed() => return,
                () = node.stopping().cancelled() => return,
                _ = ticks.tick() => {
                    if let Some(work) = group.integrity_work() {
                        let _ = lines.try_send(line(&Said::<T>::Progress(work)));
                    }
                }
            }
        };
        let last = match last {
            Ok(done) => Said::Done(done),
            Err(failure) => Said::Failed(failure),
        };
        let _ = lines.send(line(&last)).await;
    });
    Response::new(HttpBody::from_stream(Lines(taken)))
}

fn line<T: Serialize>(said: &Said<T>) -> Bytes {
    let mut text = serde_json::to_string(said).unwrap_or_default();
    text.push('\n');
    text.into()
}

struct Lines(mpsc::Receiver<Bytes>);

impl futures_core::Stream for Lines {
    type Item = std::result::Result<Bytes, Infallible>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.poll_recv(context).map(|line| line.map(Ok))
    }
}
