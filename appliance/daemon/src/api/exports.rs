//! Exports of a point in time, alive for as long as the one who asked keeps the answer open.
//!
//! The answer is one line of JSON and then, now and then, an empty line. When the connection goes
//! away, for whatever reason, the export is withdrawn and the point may be retired again.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body as HttpBody, Bytes};
use axum::extract::State;
use axum::response::Response;
use serde::{Deserialize, Serialize};
use srn_core::limits::SECTOR;
use srn_core::state::Content;
use srn_store::group::View;

use super::routes::Body;
use crate::error::{Failure, Result};
use crate::fleet::Level;
use crate::group::Group;
use crate::node::Node;
use crate::node::backend::Extra;
use crate::point::{Point, choose};

/// How often an empty line is written, so that a connection that is gone is noticed.
const PULSE: Duration = Duration::from_secs(2);

/// A request for an export.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExportRequest {
    /// The group.
    pub group: String,
    /// The disk.
    pub disk: String,
    /// A point as [`crate::point::choose`] takes it.
    pub at: String,
    /// A branch, by the beginning of its id; none for the group's history.
    #[serde(default)]
    pub branch: Option<String>,
    /// A person accepts that what is damaged reads as zero.
    #[serde(default)]
    pub accept_damage: bool,
}

/// An export that is open.
#[derive(Debug, Serialize, Deserialize)]
pub struct OpenExport {
    /// Its name.
    pub name: String,
    /// The socket on which it is served.
    pub socket: String,
    /// Its size in bytes.
    pub size: u64,
    /// What it shows, in words.
    pub point: String,
    /// An NBD URI for programs on this machine.
    pub uri: String,
}

pub(super) async fn open(
    State(node): State<Arc<Node>>,
    Body(request): Body<ExportRequest>,
) -> Result<Response> {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    let group = node.find_group(&request.group)?;
    let (view, words) = match &request.branch {
        Some(branch) => group.view_branch(branch, &request.at).await?,
        None => newest_or(&group, &request.at).await?,
    };
    let view = Arc::new(if request.accept_damage { view.accepting_damage() } else { view });
    let catalog = view.catalog();
    let (disk, found) = catalog.by_name(&request.disk).ok_or_else(|| {
        let known: Vec<&str> = catalog.disks.values().map(|disk| disk.name.as_str()).collect();
        Failure::not_found(format!(
            "group {} had no disk {:?} at {words}; it had: {}",
            request.group,
            request.disk,
            known.join(", ")
        ))
    })?;
    if found.content != Content::Clean {
        return Err(Failure::refused(format!(
            "disk {} is a mixture of times at {words}; choose a clean checkpoint",
            request.disk
        )));
    }
    let words_of = format!("disk {} at {words}", request.disk);
    let size = found.sectors * SECTOR;
    let name = format!(
        "export/{}-{}-{}",
        request.group,
        request.disk,
        NEXT.fetch_add(1, Ordering::Relaxed)
    );
    let description = format!("disk {} of group {} at {words}", request.disk, request.group);
    node.exports()
        .publish(name.clone(), Extra::Point { view: view.clone(), disk, size, description });
    let socket = node.nbd_socket().display().to_string();
    let open = OpenExport {
        uri: format!("nbd+unix:///{name}?socket={socket}"),
        name: name.clone(),
        socket,
        size,
        point: words,
    };
    let mut line = serde_json::to_string(&open)
        .map_err(|error| Failure::internal(format!("encoding an answer: {error}")))?;
    line.push('\n');
    let accepted = request.accept_damage.then_some((group, view, words_of));
    let held = Held { node, name, accepted };
    let pulse = tokio::time::interval(PULSE);
    let lines = Lines { first: Some(line), pulse, _held: held };
    Ok(Response::new(HttpBody::from_stream(lines)))
}

/// The group's own history at a point that a person names.
async fn newest_or(group: &Arc<Group>, at: &str) -> Result<(View, String)> {
    let (group, at) = (group.clone(), at.to_owned());
    let found = tokio::task::spawn_blocking(move || {
        let Point { seq, words } = choose(&group, &at)?;
        Ok((group.store().view_at(seq)?, words))
    });
    found.await.map_err(|error| Failure::internal(format!("a task ended: {error}")))?
}

/// Withdraws the export when dropped.
struct Held {
    node: Arc<Node>,
    name: String,
    /// What was exported with its damage accepted.
    accepted: Option<(Arc<Group>, Arc<View>, String)>,
}

impl Drop for Held {
    fn drop(&mut self) {
        self.node.exports().withdraw(&self.name);
        // Which sectors were read as zero is part of the record.
        if let Some((group, view, what)) = &self.accepted {
            let lost: Vec<String> = view
                .accepted_damage()
                .iter()
                .map(|(_, extent)| format!("{}+{}", extent.start, extent.sectors))
                .collect();
            if !lost.is_empty() {
                let most: Vec<&str> = lost.iter().take(100).map(String::as_str).collect();
                let text = format!(
                    "{what} was exported with accepted damage: {} ranges of sectors were read as \
                     zero: {}",
                    lost.len(),
                    most.join(", ")
                );
                group.tell(Level::Warning, &text);
            }
        }
    }
}

struct Lines {
    first: Option<String>,
    pulse: tokio::time::Interval,
    _held: Held,
}

impl futures_core::Stream for Lines {
    type Item = std::result::Result<Bytes, Infallible>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if let Some(first) = self.first.take() {
            return Poll::Ready(Some(Ok(first.into())));
        }
        if self._held.node.stopping().is_cancelled() {
            return Poll::Ready(None);
        }
        self.pulse.poll_tick(context).map(|_| Some(Ok(Bytes::from_static(b"\n"))))
    }
}
