//! The routes, one noun after the other.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::{FromRequest, Path, State};
use axum::routing::{delete, get, patch, post};
use axum::{Json, Router};
use serde::{Deserialize, Serialize};
use srn_core::limits::{DISK_SECTORS_MAX, SECTOR};
use srn_core::name::Name;
use srn_core::token::Token;

use super::{exports, integrity, nbd_certs, points, resync, retention, reversal, schedules};
use crate::config::Size;
use crate::error::{Failure, Result};
use crate::fleet::{
    EventRecord, FullPolicy, IsolatedStart, PeerRecord, Priority, Source, Synchronous,
};
use crate::group::GroupStatus;
use crate::node::{GroupRequest, NewToken, Node, NodeStatus, PeerStatus};
use crate::recovery::{RecoveryRequest, RecoveryStatus};
use crate::source::PullRequest;

type Shared = State<Arc<Node>>;

/// A JSON body whose faults are told the way all faults are.
pub(super) struct Body<T>(pub(super) T);

impl<T: serde::de::DeserializeOwned, S: Send + Sync> FromRequest<S> for Body<T> {
    type Rejection = Failure;

    async fn from_request(request: axum::extract::Request, state: &S) -> Result<Self> {
        match Json::<T>::from_request(request, state).await {
            Ok(Json(body)) => Ok(Self(body)),
            Err(rejection) => Err(Failure::invalid(rejection.body_text())),
        }
    }
}

pub(super) fn router(node: Arc<Node>) -> Router {
    Router::new()
        .route("/v1/status", get(status))
        .route("/v1/events", get(events))
        .route("/v1/tokens", post(new_token))
        .route("/v1/peers", get(peers).post(pair))
        .route("/v1/peers/{name}", delete(remove_peer))
        .route("/v1/groups", get(groups).post(create_group))
        .route("/v1/groups/{group}", get(group).patch(change_group).delete(delete_group))
        .route("/v1/groups/{group}/disks", post(add_disk))
        .route("/v1/groups/{group}/disks/{disk}", delete(remove_disk))
        .route("/v1/groups/{group}/checkpoints", get(points::list).post(points::create))
        .route("/v1/groups/{group}/checkpoints/{name}", patch(points::note).delete(points::remove))
        .route("/v1/groups/{group}/schedules", get(schedules::list).post(schedules::add))
        .route("/v1/groups/{group}/schedules/{number}", delete(schedules::remove))
        .route("/v1/groups/{group}/history", get(points::history))
        .route("/v1/groups/{group}/retention", get(retention::show).patch(retention::set))
        .route("/v1/groups/{group}/retention/preview", post(retention::preview))
        .route("/v1/groups/{group}/retention/resume", post(retention::resume))
        .route("/v1/groups/{group}/reversal", post(reversal::reverse))
        .route("/v1/groups/{group}/resync", post(resync::ask).delete(resync::cancel))
        .route("/v1/groups/{group}/branches", get(reversal::branches))
        .route("/v1/groups/{group}/branches/{branch}", delete(reversal::delete_branch))
        .route("/v1/groups/{group}/recoveries", post(start_recovery))
        .route("/v1/groups/{group}/verify", post(integrity::verify))
        .route("/v1/groups/{group}/scrub", post(integrity::scrub))
        .route("/v1/recoveries", get(recoveries))
        .route("/v1/recoveries/{id}", get(recovery))
        .route("/v1/recoveries/{id}/stop", post(stop_recovery))
        .route("/v1/exports", post(exports::open))
        .route("/v1/nbd-certs", get(nbd_certs::list).post(nbd_certs::issue))
        .route("/v1/nbd-certs/{name}", delete(nbd_certs::revoke))
        .fallback(async |uri: axum::http::Uri| {
            Failure::not_found(format!("there is no path {} in this version", uri.path()))
        })
        .with_state(node)
}

async fn status(State(node): Shared) -> Json<NodeStatus> {
    Json(node.status())
}

async fn events(State(node): Shared) -> Result<Json<Vec<EventRecord>>> {
    // What happened before the question is part of the answer.
    let written = node.clone();
    let _ = tokio::task::spawn_blocking(move || written.context().write_events()).await;
    node.context().fleet().events(200).map(Json)
}

/// A request for a token.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenRequest {
    /// How long it is valid, in seconds.
    pub ttl_s: u64,
}

/// The longest life of a token: a week.
const TOKEN_TTL_MAX_S: u64 = 7 * 24 * 3600;

async fn new_token(
    State(node): Shared,
    Body(request): Body<TokenRequest>,
) -> Result<Json<NewToken>> {
    if !(1..=TOKEN_TTL_MAX_S).contains(&request.ttl_s) {
        return Err(Failure::invalid("a token is valid for one second to one week"));
    }
    Ok(Json(node.new_token(Duration::from_secs(request.ttl_s))))
}

async fn peers(State(node): Shared) -> Json<Vec<PeerStatus>> {
    Json(node.peer_statuses())
}

/// A request to pair.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PairRequest {
    /// Host, or host and port.
    pub address: String,
    /// The token as it was typed.
    pub token: String,
}

impl std::fmt::Debug for PairRequest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PairRequest({})", self.address)
    }
}

async fn pair(State(node): Shared, Body(request): Body<PairRequest>) -> Result<Json<PeerRecord>> {
    // A typing error is found before anything is sent.
    let token =
        Token::parse(&request.token).map_err(|error| Failure::invalid(error.to_string()))?;
    node.pair(&request.address, &token).await.map(Json)
}

async fn remove_peer(State(node): Shared, Path(name): Path<String>) -> Result<Json<PeerRecord>> {
    node.remove_peer(&name).await.map(Json)
}

async fn groups(State(node): Shared) -> Json<Vec<GroupStatus>> {
    Json(node.groups().iter().map(|group| node.group_status(group)).collect())
}

async fn create_group(
    State(node): Shared,
    Body(request): Body<GroupRequest>,
) -> Result<Json<GroupStatus>> {
    let group = node.create_group(request).await?;
    Ok(Json(node.group_status(&group)))
}

async fn group(State(node): Shared, Path(name): Path<String>) -> Result<Json<GroupStatus>> {
    let group = node.find_group(&name)?;
    Ok(Json(node.group_status(&group)))
}

/// What can be changed about a group. What is not given stays.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct GroupChange {
    /// Pause or resume replication.
    pub paused: Option<bool>,
    /// Seconds between periodic checkpoints; 0 for none.
    pub checkpoint_every_s: Option<u64>,
    /// Seconds of history that stay recoverable here.
    pub history_s: Option<u64>,
    /// The peer to replicate with from now on, by its name.
    pub peer: Option<String>,
    /// Seconds that branches are kept.
    pub keep_branches_s: Option<u64>,
    /// What a full log does.
    pub full_policy: Option<FullPolicy>,
    /// At start without the peer.
    pub isolated_start: Option<IsolatedStart>,
    /// Whether answers wait for the peer.
    pub synchronous: Option<Synchronous>,
    /// The most that the log may take, in bytes; takes effect at the next start.
    pub log_cap_bytes: Option<u64>,
    /// Seconds between scrubs; 0 for none.
    #[serde(default)]
    pub scrub_every_s: Option<u64>,
    /// A program that makes sure that production is off; empty for none.
    pub fence_hook: Option<PathBuf>,
    /// A program that makes the applications quiet for a checkpoint; empty for none.
    pub quiesce_hook: Option<PathBuf>,
    /// Milliseconds for which they stand still at most.
    pub quiesce_limit_ms: Option<u64>,
    /// Its part of a link that it shares.
    pub priority: Option<Priority>,
    /// A person has made sure that the peer, to which the group was handed over, has not taken over.
    #[serde(default)]
    pub not_taken_over: bool,
}

async fn change_group(
    State(node): Shared,
    Path(name): Path<String>,
    Body(change): Body<GroupChange>,
) -> Result<Json<GroupStatus>> {
    let group = node.find_group(&name)?;
    let keeps_replica = group.store().keep() == srn_store::manifest::Keep::Replica;
    if change.full_policy == Some(FullPolicy::Stop) && keeps_replica {
        return Err(Failure::invalid(format!(
            "group {name} keeps a replica: a full log can track or throttle"
        )));
    }
    if change.full_policy == Some(FullPolicy::Track) && !keeps_replica {
        return Err(Failure::invalid(format!(
            "group {name} keeps a local cache, which holds no copy from which what changed could be \
             read again: a full log can stop or throttle"
        )));
    }
    if change.history_s.is_some() && !keeps_replica {
        return Err(Failure::refused(format!(
            "this node keeps only a cache of group {name}; what is kept of its history is decided at \
             the recovery node, with: srn retention set {name} --window DURATION"
        )));
    }
    if let Some(hook) = change.fence_hook.as_deref().filter(|hook| !hook.as_os_str().is_empty())
        && !hook.is_file()
    {
        return Err(Failure::invalid(format!("there is no program {}", hook.display())));
    }
    if let Some(hook) = change.quiesce_hook.clone().filter(|hook| !hook.as_os_str().is_empty()) {
        points::blocking(move || crate::hook::Hook::trusted(&hook)).await?;
    }
    if let Some(limit_ms) = change.quiesce_limit_ms {
        crate::group::check_limit(limit_ms)?;
    }
    if matches!(change.synchronous, Some(Synchronous::Wait | Synchronous::Degrade)) {
        group.check_synchronous()?;
    }
    let peer = change.peer.as_deref().map(|peer| node.find_peer(peer)).transpose()?;
    let peer = peer.map(|(id, record)| (id, record.name));
    group.change_settings(|record| {
        record.synchronous = change.synchronous.unwrap_or(record.synchronous);
        let set = |to: &mut u64, from: Option<u64>| *to = from.unwrap_or(*to);
        set(&mut record.checkpoint_every_s, change.checkpoint_every_s);
        set(&mut record.history_s, change.history_s);
        set(&mut record.keep_branches_s, change.keep_branches_s);
        set(&mut record.log_cap_bytes, change.log_cap_bytes);
        set(&mut record.scrub_every_s, change.scrub_every_s);
        record.full_policy = change.full_policy.unwrap_or(record.full_policy);
        record.priority = change.priority.unwrap_or(record.priority);
        record.isolated_start = change.isolated_start.unwrap_or(record.isolated_start);
        if let Some(hook) = change.fence_hook {
            record.fence_hook = (!hook.as_os_str().is_empty()).then_some(hook);
        }
        if let Some(hook) = change.quiesce_hook {
            record.quiesce_hook = (!hook.as_os_str().is_empty()).then_some(hook);
        }
        set(&mut record.quiesce_limit_ms, change.quiesce_limit_ms);
    })?;
    if let Some((peer, name)) = peer {
        group.set_peer(peer, &name).await?;
        if let Some(session) = node.session_with(peer) {
            group.session_up(&session).await;
        }
    }
    if change.isolated_start == Some(IsolatedStart::Serve) {
        group.stop_waiting();
    }
    if change.not_taken_over {
        let before = group.engine();
        group.reclaim().await?;
        if !Arc::ptr_eq(&before, &group.engine()) {
            // Whoever is connected holds on to the log as it was, which is closed; they come again.
            node.disconnect(&group, "");
        }
    }
    if let Some(paused) = change.paused {
        group.set_paused(paused).await?;
        if !paused && let Some(session) = group.peer().and_then(|peer| node.session_with(peer)) {
            group.session_up(&session).await;
        }
    }
    Ok(Json(node.group_status(&group)))
}

async fn delete_group(State(node): Shared, Path(name): Path<String>) -> Result<Json<()>> {
    node.delete_group(&name).await.map(Json)
}

/// A disk to add: by size, by a running server's QEMU, or filled from an NBD export.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AddDisk {
    /// Its name.
    pub name: String,
    /// Its size in bytes, for a disk that is served from here and begins empty.
    pub size: Option<u64>,
    /// The QMP socket of the server's QEMU.
    pub qmp: Option<PathBuf>,
    /// The block node or device there.
    pub node: Option<String>,
    /// An NBD export whose content the disk begins with.
    pub copy_from: Option<String>,
    /// An NBD export, or the NBD server of a QEMU, from which the disk is read in passes.
    pub pull: Option<String>,
    /// Seconds from pass to pass.
    pub every_s: Option<u64>,
    /// Where that QEMU puts what its server overwrites during a pass.
    pub scratch: Option<PathBuf>,
}

async fn add_disk(
    State(node): Shared,
    Path(group): Path<String>,
    Body(request): Body<AddDisk>,
) -> Result<Json<GroupStatus>> {
    let group = node.find_group(&group)?;
    let name: Name = request.name.parse().map_err(|error| Failure::invalid(format!("{error}")))?;
    group.check_writable()?;
    if group.catalog().by_name(name.as_str()).is_some() {
        return Err(group.has_disk(&name));
    }
    if let Some(uri) = request.pull {
        if request.size.is_some() || request.copy_from.is_some() {
            return Err(Failure::invalid("a pulled disk has no other source"));
        }
        let qmp = request.qmp.zip(request.node);
        let (scratch, every_s) = (request.scratch, request.every_s);
        let asked = PullRequest { uri, qmp, scratch, every_s };
        let (size, source) = crate::source::check_pull(&group, &asked).await?;
        crate::source::add_pull(&node, &group, &name, sectors(size)?, source).await?;
        return Ok(Json(node.group_status(&group)));
    }
    match (request.size, request.qmp, request.node, request.copy_from) {
        (Some(size), None, None, None) => {
            group.add_disk(&name, sectors(size)?, Source::Served, false).await?;
        }
        (None, Some(qmp), Some(device), None) => {
            let found = crate::source::find_disk(&qmp, &device).await?;
            let size = sectors(found.size_bytes)?;
            let (socket, name_there) = (qmp.clone(), device.clone());
            let source = Source::Mirror { qmp: socket, node: name_there, stands_still: false };
            let disk = group.add_disk(&name, size, source, true).await?;
            node.mirrors().start(&node, &group, disk, qmp, device);
        }
        (None, None, None, Some(uri)) => {
            let (client, size) = crate::source::connect_nbd(&uri).await?;
            let disk = group.add_disk(&name, sectors(size)?, Source::Served, true).await?;
            let copying = group.clone();
            tokio::spawn(async move {
                let copied = crate::source::copy_from(client, &copying, disk, size).await;
                let group = copying.name();
                match copied {
                    Ok(()) => log::info!("group {group}: disk {name} was filled from {uri}"),
                    Err(error) => {
                        let why = format!(
                            "filling it from {uri} failed: {error}; remove the disk and add it again"
                        );
                        copying.source_state(disk, Some(why));
                    }
                }
            });
        }
        _ => {
            return Err(Failure::invalid(
                "a disk is added with a size, with a QMP socket and a node, or with an export to \
                 copy from",
            ));
        }
    }
    Ok(Json(node.group_status(&group)))
}

fn sectors(bytes: u64) -> Result<u64> {
    if bytes == 0 {
        return Err(Failure::invalid("a disk of size 0 protects nothing"));
    }
    if !bytes.is_multiple_of(SECTOR) {
        return Err(Failure::invalid(format!(
            "a disk's size is a multiple of 512 bytes; {bytes} is not"
        )));
    }
    if bytes / SECTOR > DISK_SECTORS_MAX {
        return Err(Failure::invalid(format!(
            "the largest disk has {}",
            Size(DISK_SECTORS_MAX * SECTOR)
        )));
    }
    Ok(bytes / SECTOR)
}

async fn remove_disk(
    State(node): Shared,
    Path((group, disk)): Path<(String, String)>,
) -> Result<Json<GroupStatus>> {
    let group = node.find_group(&group)?;
    let (no, _) = group.disk(&disk)?;
    group.check_writable()?;
    let _kept = group.keep()?;
    let source = group.settings().sources.into_iter().find(|source| source.disk == no.0);
    node.mirrors().forget(&group, Some(no)).await;
    node.pulls().forget(&group, Some(no)).await;
    node.disconnect(&group, &format!("{}/{disk}", group.name()));
    if let Err(error) = group.remove_disk(&disk).await {
        // It is still there, and followed as before.
        match source.map(|record| record.source) {
            Some(Source::Mirror { qmp, node: device, .. }) => {
                node.mirrors().start(&node, &group, no, qmp, device);
            }
            Some(source) => node.pulls().start(&group, no, &source),
            None => {}
        }
        return Err(error);
    }
    Ok(Json(node.group_status(&group)))
}

async fn start_recovery(
    State(node): Shared,
    Path(group): Path<String>,
    Body(request): Body<RecoveryRequest>,
) -> Result<Json<RecoveryStatus>> {
    let group = node.find_group(&group)?;
    // Goes on when the one who asked goes away: half a failover is worse than one nobody watches.
    let started =
        tokio::spawn(async move { node.recoveries().start(&node, &group, request).await });
    started.await.map_err(|error| Failure::internal(format!("a task ended: {error}")))?.map(Json)
}

async fn recoveries(State(node): Shared) -> Json<Vec<RecoveryStatus>> {
    Json(node.recoveries().statuses(&node))
}

async fn recovery(State(node): Shared, Path(id): Path<String>) -> Result<Json<RecoveryStatus>> {
    node.recoveries().status(&id).map(Json)
}

/// A request to stop a recovered server.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StopRequest {
    /// How long the server may take to shut down by itself, in seconds.
    pub graceful_s: u64,
}

async fn stop_recovery(
    State(node): Shared,
    Path(id): Path<String>,
    Body(request): Body<StopRequest>,
) -> Result<Json<()>> {
    let graceful = Duration::from_secs(request.graceful_s.min(3600));
    let stopped = tokio::spawn(async move { node.recoveries().stop(&node, &id, graceful).await });
    stopped.await.map_err(|error| Failure::internal(format!("a task ended: {error}")))?.map(Json)
}
