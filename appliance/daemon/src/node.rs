//! The node: what holds peers, groups, exports and recoveries together.

pub mod backend;
mod groups;
mod peers;
mod reversal;
mod shaping;
mod state_dir;

pub use groups::GroupRequest;
pub use peers::PeerStatus;
pub use reversal::ReversalRequest;
pub use state_dir::StateDir;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use srn_core::ids::{GroupId, NodeId};
use srn_core::pairing::TokenBook;
use srn_core::state::Cause;
use srn_core::token::Token;
use srn_link::{Endpoint, EndpointConfig, Identity, LinkError};
use srn_nbd::server::{Limits, Listener, PayloadBudget, Server};
use srn_nbd::tls::ServerTls;
use tokio_util::sync::CancellationToken;

use crate::clock;
use crate::context::Context;
use crate::error::{Failure, Kind, Result};
use crate::fleet::Level;
use crate::group::{Group, GroupStatus};
use crate::nbd_cert::NbdAuthority;
use crate::recovery::Recoveries;
use crate::source::{Mirrors, Pulls};
use backend::Exports;
use peers::Peers;

/// Content of writes that NBD clients may have in flight together, in bytes.
const NBD_BUDGET: usize = 64 << 20;

/// How long clients are given when the node stops.
const NBD_PATIENCE: Duration = Duration::from_secs(2);

/// A running node.
#[derive(Debug)]
pub struct Node {
    context: Context,
    identity: Arc<Identity>,
    endpoint: Endpoint,
    tokens: Arc<Mutex<TokenBook>>,
    peers: Peers,
    groups: Mutex<BTreeMap<GroupId, Arc<Group>>>,
    /// Groups that could not be opened, and why; by name.
    broken: Mutex<BTreeMap<String, Failure>>,
    /// Held while a group is made or removed.
    making: tokio::sync::Mutex<()>,
    exports: Arc<Exports>,
    nbd: Server<Exports>,
    nbd_authority: Arc<NbdAuthority>,
    recoveries: Recoveries,
    mirrors: Mirrors,
    pulls: Pulls,
    stopping: CancellationToken,
    started_at: srn_core::time::WallTime,
}

/// A node as people see it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct NodeStatus {
    /// `safe`, or why not.
    pub verdict: Verdict,
    /// The node.
    pub node: NodeInfo,
    /// Its peers.
    pub peers: Vec<PeerStatus>,
    /// Its groups.
    pub groups: Vec<GroupStatus>,
    /// Groups that could not be opened, and why.
    pub broken_groups: BTreeMap<String, String>,
    /// Recovered servers.
    pub recoveries: Vec<crate::recovery::RecoveryStatus>,
}

/// The first line of every status.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Verdict {
    /// Whether everything is as it should be.
    pub safe: bool,
    /// Why not, worst first.
    pub reasons: Vec<String>,
}

/// Who a node is.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct NodeInfo {
    /// Its name.
    pub name: String,
    /// The SHA-256 of its public key.
    pub id: String,
    /// Its software version.
    pub version: String,
    /// Where its link listens.
    pub link: String,
    /// The NBD socket.
    pub nbd_socket: PathBuf,
    /// TCP addresses of exports.
    pub nbd_listen: Vec<SocketAddr>,
    /// When the daemon was started, in RFC 3339.
    pub started_at: String,
    /// Bytes free on the state volume.
    pub state_free_bytes: Option<u64>,
    /// Tokens that could pair a node now.
    pub tokens_outstanding: usize,
    /// What may be sent to each peer at this time of the day, where that is ever limited.
    pub bandwidth: Option<crate::bandwidth::BandwidthStatus>,
}

/// A new token, shown once.
#[derive(Debug, Serialize, Deserialize)]
pub struct NewToken {
    /// The text to type at the other node.
    pub token: String,
    /// When it expires, in RFC 3339.
    pub expires_at: String,
    /// Where the other node reaches this one.
    pub link: String,
}

impl Node {
    /// Starts everything that a node does. Must be called in the runtime that serves NBD.
    ///
    /// # Errors
    /// Ports and sockets that cannot be had, a state directory that cannot be used.
    pub async fn start(context: Context, identity: Identity) -> Result<Arc<Self>> {
        let identity = Arc::new(identity);
        let config = context.config().clone();
        let endpoint = {
            // The link's sockets live in the link's runtime.
            let _inside = context.link().enter();
            let config = EndpointConfig { listen: config.link_listen };
            Endpoint::open(&config, identity.clone()).map_err(port_taken)?
        };
        let exports = Arc::new(Exports::default());
        let mut names = vec![config.name.to_string(), host_name()];
        names.extend(config.nbd_names.iter().cloned());
        let nbd_authority = Arc::new(NbdAuthority::open(&config.state_dir, names)?);
        let budget = PayloadBudget::new(NBD_BUDGET);
        let limits = Limits { pool_bytes: 32 << 20, ..Limits::default() };
        let nbd = Server::new(exports.clone(), limits, budget);
        let node = Arc::new(Self {
            identity,
            endpoint,
            tokens: Arc::default(),
            peers: Peers::new(context.fleet().peers()?),
            groups: Mutex::default(),
            broken: Mutex::default(),
            making: tokio::sync::Mutex::default(),
            exports,
            nbd,
            nbd_authority,
            recoveries: Recoveries::new(&context),
            mirrors: Mirrors::default(),
            pulls: Pulls::default(),
            stopping: CancellationToken::new(),
            started_at: clock::wall(),
            context,
        });
        node.exports.set_node(&node);
        node.open_groups().await?;
        node.listen_nbd().await?;
        node.clone().run_link();
        node.recoveries.resume(&node).await;
        node.start_sources();
        node.clone().run_ticks();
        Ok(node)
    }

    /// What is shared.
    #[must_use]
    pub const fn context(&self) -> &Context {
        &self.context
    }

    /// This node's id.
    #[must_use]
    pub fn id(&self) -> NodeId {
        self.identity.id()
    }

    /// The exports.
    #[must_use]
    pub const fn exports(&self) -> &Arc<Exports> {
        &self.exports
    }

    /// The recovered servers.
    #[must_use]
    pub const fn recoveries(&self) -> &Recoveries {
        &self.recoveries
    }

    /// The disks that are pulled.
    #[must_use]
    pub const fn pulls(&self) -> &Pulls {
        &self.pulls
    }

    /// The mirrors.
    #[must_use]
    pub const fn mirrors(&self) -> &Mirrors {
        &self.mirrors
    }

    /// Cancelled when the node stops.
    #[must_use]
    pub const fn stopping(&self) -> &CancellationToken {
        &self.stopping
    }

    /// Where exports are served on this machine.
    #[must_use]
    pub fn nbd_socket(&self) -> PathBuf {
        self.context.config().run_dir.join("nbd.sock")
    }

    async fn listen_nbd(&self) -> Result<()> {
        let config = self.context.config();
        let socket = self.nbd_socket();
        let failed = |what: String, error: std::io::Error| {
            let kind = match error.kind() {
                std::io::ErrorKind::AddrInUse => Kind::Conflict,
                _ => Kind::Invalid,
            };
            Failure::new(kind, format!("serving NBD on {what}: {error}; set nbd.listen"))
        };
        let unix = Listener::unix(&socket)
            .await
            .map_err(|error| failed(socket.display().to_string(), error))?;
        crate::access::restrict(&socket, config.nbd_socket_group.as_deref())?;
        self.nbd.listen(unix);
        for address in &config.nbd_listen {
            let secure = config.nbd_tls && !address.ip().is_loopback();
            let allowed = match config.nbd_allow.is_empty() {
                true if secure => Listener::anywhere(),
                true => Listener::loopback(),
                false => config.nbd_allow.clone(),
            };
            let tcp = Listener::tcp(*address, allowed)
                .await
                .map_err(|error| failed(address.to_string(), error))?;
            let tcp = if secure { tcp.requiring_tls(self.nbd_tls().await?) } else { tcp };
            self.nbd.listen(tcp);
        }
        Ok(())
    }

    async fn nbd_tls(&self) -> Result<ServerTls> {
        let authority = self.nbd_authority.clone();
        tokio::task::spawn_blocking(move || {
            authority.ensure()?;
            ServerTls::new(authority).map_err(|error| {
                let text = format!("serving NBD with TLS: {error}; see nbd-ca.json");
                Failure::new(Kind::Storage, text)
            })
        })
        .await
        .map_err(|error| Failure::internal(format!("making certificates: {error}")))?
    }

    /// Who issues certificates for NBD.
    #[must_use]
    pub const fn nbd_authority(&self) -> &Arc<NbdAuthority> {
        &self.nbd_authority
    }

    /// Drops the connections of NBD clients whose certificate has this name. Returns how many.
    pub fn disconnect_named(&self, name: &str) -> usize {
        let connections = self.nbd.connections().into_iter();
        connections
            .filter(|status| status.client.name.as_deref() == Some(name))
            .filter(|status| self.nbd.disconnect(status.client.connection))
            .count()
    }

    /// Drops the connections that have exports of this prefix open.
    pub fn disconnect(&self, group: &Group, prefix: &str) {
        for connection in group.slots.connections(prefix) {
            self.nbd.disconnect(connection);
        }
    }

    fn groups_lock(&self) -> MutexGuard<'_, BTreeMap<GroupId, Arc<Group>>> {
        self.groups.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All groups, by name.
    #[must_use]
    pub fn groups(&self) -> Vec<Arc<Group>> {
        let mut groups: Vec<Arc<Group>> = self.groups_lock().values().cloned().collect();
        groups.sort_by_key(|group| group.name());
        groups
    }

    /// Makes a token that pairs one node.
    #[must_use]
    pub fn new_token(&self, ttl: Duration) -> NewToken {
        let token = Token::new(clock::random());
        let text = token.reveal();
        let ttl_us = u64::try_from(ttl.as_micros()).unwrap_or(u64::MAX);
        self.tokens.lock().unwrap_or_else(PoisonError::into_inner).add(
            token,
            clock::mono(),
            ttl_us,
        );
        let text_ttl = humantime::format_duration(ttl);
        self.context.event(Level::Info, None, &format!("a token was made, valid for {text_ttl}"));
        let expires = srn_core::time::WallTime(clock::wall().0.saturating_add_unsigned(ttl_us));
        NewToken { token: text, expires_at: clock::rfc3339(expires), link: self.link_address() }
    }

    fn link_address(&self) -> String {
        self.endpoint.local_addr().map_or_else(|error| error.to_string(), |addr| addr.to_string())
    }

    /// Once a second: every group looks after itself.
    fn run_ticks(self: Arc<Self>) {
        tokio::spawn(async move {
            let mut ticks = tokio::time::interval(Duration::from_secs(1));
            ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
            loop {
                tokio::select! {
                    _ = ticks.tick() => {}
                    () = self.stopping.cancelled() => return,
                }
                self.shape_links();
                for group in self.groups() {
                    group.tick().await;
                }
            }
        });
    }

    /// Everything there is to say.
    #[must_use]
    pub fn status(&self) -> NodeStatus {
        let peers = self.peer_statuses();
        let groups: Vec<GroupStatus> =
            self.groups().iter().map(|group| self.group_status(group)).collect();
        let broken: BTreeMap<String, String> = {
            let broken = self.broken.lock().unwrap_or_else(PoisonError::into_inner);
            broken.iter().map(|(name, why)| (name.clone(), why.message.clone())).collect()
        };
        let config = self.context.config();
        let free = {
            use srn_store::io::Fs;
            self.context.store().volume.free_bytes(&config.state_dir).ok()
        };
        let tokens =
            self.tokens.lock().unwrap_or_else(PoisonError::into_inner).outstanding(clock::mono());
        NodeStatus {
            verdict: verdict(&groups, &broken, self.context.store().volume.failure()),
            node: NodeInfo {
                name: config.name.to_string(),
                id: self.id().to_string(),
                version: crate::VERSION.to_owned(),
                link: self.link_address(),
                nbd_socket: self.nbd_socket(),
                nbd_listen: config.nbd_listen.clone(),
                started_at: clock::rfc3339(self.started_at),
                state_free_bytes: free,
                tokens_outstanding: tokens,
                bandwidth: self.bandwidth(),
            },
            peers,
            groups,
            broken_groups: broken,
            recoveries: self.recoveries.statuses(self),
        }
    }

    /// A group as people see it.
    #[must_use]
    pub fn group_status(&self, group: &Group) -> GroupStatus {
        let peer = group.peer();
        let mut status = group.status(peer.and_then(|peer| self.peer_name(peer)));
        if status.cause == Cause::LinkDown.words() && status.detail.is_none() {
            status.detail = peer.and_then(|peer| self.peer_trouble(peer));
        }
        status
    }

    /// Stops everything, in the order that loses least: no more clients, then the groups, then the
    /// link. Recovered servers go on: their disks come back with the next start.
    pub async fn stop(self: &Arc<Self>) {
        self.stopping.cancel();
        crate::group::thaw_all(&self.groups()).await;
        self.mirrors.stop(&self.groups()).await;
        self.pulls.stop(&self.groups()).await;
        self.nbd.shutdown(NBD_PATIENCE).await;
        self.groups().iter().for_each(|group| group.fall_silent());
        self.close_sessions("the node is stopping").await;
        let this = self.clone();
        let stopped = tokio::task::spawn_blocking(move || {
            this.recoveries.release();
            for group in this.groups() {
                group.shut_down();
            }
        });
        let _ = stopped.await;
        self.endpoint.close().await;
        let _ = std::fs::remove_file(self.nbd_socket());
    }
}

/// What this machine calls itself.
fn host_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

/// A port that another program has is no fault of this one.
fn port_taken(error: LinkError) -> Failure {
    match &error {
        LinkError::Io { doing, source } if source.kind() == std::io::ErrorKind::AddrInUse => {
            Failure::conflict(format!(
                "{doing}: {source}; stop the program that has the port, or set link.listen"
            ))
        }
        LinkError::Io { .. } => Failure::invalid(format!("{error}; set link.listen")),
        _ => error.into(),
    }
}

fn verdict(
    groups: &[GroupStatus],
    broken: &BTreeMap<String, String>,
    volume: Option<String>,
) -> Verdict {
    let mut reasons = Vec::new();
    if let Some(why) = volume {
        reasons.push(format!("the state volume failed: {why}; repair it and restart the daemon"));
    }
    for (name, why) in broken {
        reasons.push(format!("group {name} cannot be opened: {why}"));
    }
    for group in groups.iter().filter(|group| !group.safe) {
        let mut text = format!("group {} is {}", group.name, group.state);
        if !group.cause.is_empty() {
            text = format!("{text}: {}", group.cause);
        }
        if group.disks.is_empty() {
            text = format!("group {} has no disk", group.name);
        } else if group.peer.is_none() && group.role == "primary" && group.state == "streaming" {
            text = format!("group {} has no peer", group.name);
        }
        if let Some(damage) = group.damaged.first() {
            let more = group.damaged.len() - 1;
            let more = if more > 0 { format!(" and {more} more") } else { String::new() };
            text = format!("{text}; damaged here: {}{more}", damage.what);
        }
        if let Some(detail) = &group.detail {
            text = format!("{text} ({detail})");
        }
        if let Some(bytes) = group.lag_bytes.filter(|bytes| *bytes > 0) {
            text = format!("{text}; {} at risk", crate::config::Size(bytes));
        }
        reasons.push(text);
    }
    if groups.is_empty() && broken.is_empty() {
        reasons.push("nothing is protected: there is no group".into());
    }
    Verdict { safe: reasons.is_empty(), reasons }
}
