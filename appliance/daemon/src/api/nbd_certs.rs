//! Certificates of NBD clients. A client's key is in the answer to its request and nowhere else.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, State};
use serde::{Deserialize, Serialize};
use srn_core::name::Name;

use super::routes::Body;
use crate::error::{Failure, Result};
use crate::fleet::Level;
use crate::nbd_cert::{ClientCertificate, DAYS, NewCertificate};
use crate::node::Node;

/// A request for a certificate.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CertificateRequest {
    /// The client's name.
    pub name: String,
    /// How many days it is valid.
    #[serde(default = "default_days")]
    pub days: u32,
}

const fn default_days() -> u32 {
    DAYS
}

/// A certificate that was revoked.
#[derive(Debug, Serialize, Deserialize)]
pub struct Revoked {
    /// The certificate.
    pub certificate: ClientCertificate,
    /// How many connections were dropped.
    pub disconnected: usize,
}

/// Writing the list waits for the disk.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|error| Failure::internal(format!("certificates for NBD: {error}")))?
}

pub(super) async fn list(State(node): State<Arc<Node>>) -> Json<Vec<ClientCertificate>> {
    Json(node.nbd_authority().list())
}

pub(super) async fn issue(
    State(node): State<Arc<Node>>,
    Body(request): Body<CertificateRequest>,
) -> Result<Json<NewCertificate>> {
    let name: Name = request
        .name
        .parse()
        .map_err(|error| Failure::invalid(format!("name {:?}: {error}", request.name)))?;
    let authority = node.nbd_authority().clone();
    let issued = blocking(move || authority.issue(&name, request.days)).await?;
    let text = format!(
        "a certificate for the NBD client {} was issued, valid until {}",
        issued.name, issued.expires_at
    );
    node.context().event(Level::Info, None, &text);
    Ok(Json(issued))
}

pub(super) async fn revoke(
    State(node): State<Arc<Node>>,
    Path(name): Path<String>,
) -> Result<Json<Revoked>> {
    let (authority, asked) = (node.nbd_authority().clone(), name.clone());
    let certificate = blocking(move || authority.revoke(&asked)).await?;
    // Whoever gets past the list from now on does not; who did before is found here.
    let disconnected = node.disconnect_named(&name);
    let text = format!(
        "the certificate of the NBD client {name} was revoked; {disconnected} of its connections \
         were dropped"
    );
    node.context().event(Level::Info, None, &text);
    Ok(Json(Revoked { certificate, disconnected }))
}
