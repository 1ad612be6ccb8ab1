//! The control API: HTTP and JSON on a unix socket that only root and one group may open.
//!
//! `curl --unix-socket /run/srn/control.sock http://srn/v1/status` works for everybody who may
//! open the socket. Failures are JSON too: `{"kind": ..., "message": ...}`.

mod exports;
mod integrity;
mod nbd_certs;
mod points;
mod resync;
mod retention;
mod reversal;
mod routes;
mod schedules;

use std::path::Path;
use std::sync::Arc;

use axum::Json;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use tokio::net::UnixListener;

use crate::error::{Failure, Kind, Result};
use crate::node::Node;

pub use exports::{ExportRequest, OpenExport};
pub use integrity::{Said, ScrubRequest, VerifyRequest};
pub use nbd_certs::{CertificateRequest, Revoked};
pub use points::{CheckpointRequest, HistoryQuery, NewCheckpoint, NoteRequest};
pub use resync::ResyncRequest;
pub use retention::RetentionChange;
pub use routes::{AddDisk, GroupChange, PairRequest, StopRequest, TokenRequest};
pub use schedules::ScheduleRequest;

/// The largest request body in bytes.
const BODY_MAX: usize = 1 << 20;

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let status = match self.kind {
            Kind::Usage | Kind::Invalid => StatusCode::BAD_REQUEST,
            Kind::NotFound => StatusCode::NOT_FOUND,
            Kind::Conflict => StatusCode::CONFLICT,
            Kind::Refused | Kind::Untrusted => StatusCode::FORBIDDEN,
            Kind::Unreachable => StatusCode::BAD_GATEWAY,
            Kind::Storage => StatusCode::INSUFFICIENT_STORAGE,
            Kind::Missing => StatusCode::FAILED_DEPENDENCY,
            Kind::Internal => StatusCode::INTERNAL_SERVER_ERROR,
        };
        (status, Json(self)).into_response()
    }
}

/// Opens the control socket.
///
/// # Errors
/// When it cannot be had.
pub fn listen(path: &Path, group: Option<&str>) -> Result<UnixListener> {
    let failed = |error: std::io::Error| {
        Failure::new(Kind::Conflict, format!("control socket {}: {error}", path.display()))
    };
    // The state directory's lock is held, so a socket that is there is left over.
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(failed(error)),
        _ => {}
    }
    let listener = UnixListener::bind(path).map_err(failed)?;
    crate::access::restrict(path, group)?;
    Ok(listener)
}

/// Answers until the node stops.
pub async fn serve(listener: UnixListener, node: Arc<Node>) {
    let stopping = node.stopping().clone();
    let app = routes::router(node).layer(axum::extract::DefaultBodyLimit::max(BODY_MAX));
    let served = axum::serve(listener, app)
        .with_graceful_shutdown(async move { stopping.cancelled().await })
        .await;
    if let Err(error) = served {
        log::error!("control socket: {error}");
    }
}
