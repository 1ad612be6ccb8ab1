//! Peers: pairing, dialling, sessions, and handing what they say to the groups.

use std::collections::BTreeMap;
use std::net::{SocketAddr, ToSocketAddrs};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use srn_core::ids::{GroupId, NodeId};
use srn_core::pairing::Refusal;
use srn_core::token::Token;
use srn_core::wire::{Hello, Message, Offer, RefuseCode};
use srn_link::dial::Backoff;
use srn_link::pairing::{Paired, initiate, respond};
use srn_link::{Accepted, LinkError, Path, Session, SessionEvent};
use tokio::sync::mpsc;

use super::Node;
use crate::clock;
use crate::config::LINK_PORT;
use crate::error::{Failure, Kind, Result};
use crate::fleet::{Level, PeerRecord};

/// Connections that came in and wait to be looked at.
const ACCEPTED_MAX: usize = 32;

/// How often it is looked whether a session that the peer began is still there.
const REDIAL: Duration = Duration::from_millis(500);

/// Groups of which it is remembered that their offer was refused.
const REFUSED_MAX: usize = 1024;

/// After this time in microseconds it is known how large packets can be.
const SETTLED_US: i64 = 30_000_000;

/// What paths through usual tunnels take, in bytes of UDP payload.
const USUAL_PACKET: u16 = 1350;

/// A clock that differs by more than this is worth a warning, in microseconds.
const CLOCK_DIFFERENCE_US: u64 = 5_000_000;

/// Peers and their sessions.
#[derive(Debug)]
pub(super) struct Peers {
    known: Mutex<BTreeMap<NodeId, Known>>,
    /// Offers that were refused, and why: each is told once.
    refused: Mutex<BTreeMap<GroupId, String>>,
}

#[derive(Debug)]
struct Known {
    record: PeerRecord,
    session: Option<Session>,
    since: Option<srn_core::time::WallTime>,
    /// Why there is no session.
    trouble: Option<String>,
    dialler: Option<tokio_util::task::AbortOnDropHandle<()>>,
}

/// A peer as people see it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PeerStatus {
    /// Its name.
    pub name: String,
    /// The SHA-256 of its public key.
    pub id: String,
    /// Where it is dialled; none when it dials us.
    pub address: Option<String>,
    /// Whether there is a session.
    pub connected: bool,
    /// Its address in the session.
    pub remote: Option<String>,
    /// Since when, in RFC 3339.
    pub connected_since: Option<String>,
    /// Its software version.
    pub version: Option<String>,
    /// Round trip time in milliseconds.
    pub rtt_ms: Option<f64>,
    /// The largest packet that the path is known to take, in bytes of UDP payload.
    pub packet_bytes: Option<u16>,
    /// The rate at which the path delivers what this node sends, as far as is known, in bytes per
    /// second.
    pub rate: Option<u64>,
    /// What was lost over the last round trips of what this node sent, in percent.
    pub loss_percent: Option<f64>,
    /// The most that this node sends to it now, in bytes per second; no limit when none.
    pub limit: Option<u64>,
    /// What is odd about the path, and the way out.
    pub hint: Option<String>,
    /// Bytes of UDP sent in this session.
    pub udp_sent: Option<u64>,
    /// Bytes of UDP received in this session.
    pub udp_received: Option<u64>,
    /// Why there is no session.
    pub trouble: Option<String>,
    /// When it was paired, in RFC 3339.
    pub paired_at: String,
}

impl Peers {
    pub(super) fn new(records: Vec<PeerRecord>) -> Self {
        let known = records.into_iter().filter_map(|record| {
            let id = record.id.parse().ok()?;
            Some((id, Known::new(record)))
        });
        Self { known: Mutex::new(known.collect()), refused: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<NodeId, Known>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn refused(&self) -> MutexGuard<'_, BTreeMap<GroupId, String>> {
        self.refused.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Known {
    const fn new(record: PeerRecord) -> Self {
        Self { record, session: None, since: None, trouble: None, dialler: None }
    }
}

/// Resolves where a person said a node is.
///
/// # Errors
/// [`Kind::Invalid`] when it cannot be resolved.
async fn resolve(address: &str) -> Result<SocketAddr> {
    let with_port = if address.parse::<std::net::IpAddr>().is_ok() {
        let ip: std::net::IpAddr =
            address.parse().map_err(|_| Failure::invalid("malformed address"))?;
        return Ok(SocketAddr::new(ip, LINK_PORT));
    } else if address.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok()) {
        address.to_owned()
    } else {
        format!("{address}:{LINK_PORT}")
    };
    let asked = with_port.clone();
    let found =
        tokio::task::spawn_blocking(move || asked.to_socket_addrs().map(|mut found| found.next()));
    match found.await {
        Ok(Ok(Some(found))) => Ok(found),
        Ok(Ok(None)) => Err(Failure::invalid(format!("{with_port} has no address"))),
        Ok(Err(error)) => Err(Failure::invalid(format!("{with_port} cannot be resolved: {error}"))),
        Err(error) => Err(Failure::internal(format!("a task ended: {error}"))),
    }
}

impl Node {
    fn hello(&self) -> Hello {
        Hello {
            name: self.context.config().name.clone(),
            software: crate::VERSION.to_owned(),
            wall_time: clock::wall(),
        }
    }

    /// Listens and dials for as long as the node runs.
    pub(super) fn run_link(self: Arc<Self>) {
        let (to, mut accepted) = mpsc::channel(ACCEPTED_MAX);
        let endpoint = self.endpoint.clone();
        let link = self.context.link().clone();
        link.spawn(async move { endpoint.accept(to).await });
        // Not in the loop's head: the lock would be held to its end, and dialling takes it too.
        let known: Vec<NodeId> = self.peers.lock().keys().copied().collect();
        for id in known {
            self.dial_peer(id);
        }
        let spawner = link.clone();
        link.spawn(async move {
            while let Some(connection) = accepted.recv().await {
                let node = self.clone();
                spawner.spawn(async move {
                    match connection {
                        Accepted::Data(connection) => node.on_connection(connection).await,
                        Accepted::Pair(connection) => node.on_pair(connection).await,
                    }
                });
            }
        });
    }

    async fn on_connection(self: Arc<Self>, connection: srn_link::endpoint::Connection) {
        let known = self.peers.lock().contains_key(&connection.peer);
        if !known {
            log::info!(
                "turned away {}: key {} is not paired with this node",
                connection.remote_address(),
                connection.peer
            );
            return connection.refuse_unpaired();
        }
        let (id, addr) = (connection.peer, connection.remote_address());
        match Session::begin(connection, self.hello()).await {
            Ok((session, events)) => self.run_session(session, events).await,
            Err(error) => {
                log::info!("session with {addr}: {error}");
                self.set_trouble(id, &error.into());
            }
        }
    }

    async fn on_pair(self: Arc<Self>, connection: srn_link::endpoint::Connection) {
        let from = connection.remote_address();
        let name = self.context.config().name.clone();
        let pin = {
            let node = self.clone();
            move |paired: Paired| async move { node.pin(&paired, None) }
        };
        let now = clock::mono();
        match respond(connection, self.id(), &name, &self.tokens, now, pin).await {
            Ok(paired) => {
                let text = format!("paired with {} ({}) by token", paired.name, paired.addr);
                self.context.event(Level::Info, None, &text);
            }
            Err(LinkError::Refused(refusal)) => {
                let level = if refusal == Refusal::Void { Level::Alert } else { Level::Warning };
                let text = format!("{from} tried to pair: {refusal}");
                self.context.event(level, None, &text);
            }
            Err(error) => log::info!("pairing with {from}: {error}"),
        }
    }

    /// Pairs with the node at `address`, which made `token`.
    ///
    /// # Errors
    /// As the link says; [`Kind::Conflict`] when it is paired already.
    pub async fn pair(self: &Arc<Self>, address: &str, token: &Token) -> Result<PeerRecord> {
        let addr = resolve(address).await?;
        let name = self.context.config().name.clone();
        let (node, endpoint, token) = (self.clone(), self.endpoint.clone(), token.clone());
        let dialled = address.to_owned();
        let work = async move {
            let pin = |paired: Paired| async move { node.pin(&paired, Some(&dialled)) };
            initiate(&endpoint, addr, &name, &token, pin).await
        };
        let paired = self
            .context
            .link()
            .spawn(work)
            .await
            .map_err(|error| Failure::internal(format!("a task ended: {error}")))?
            .map_err(|error| {
                Failure::from(error).while_doing(&format!("pairing with {address}"))
            })?;
        let text = format!("paired with {} ({addr}) by token", paired.name);
        self.context.event(Level::Info, None, &text);
        self.dial_peer(paired.peer);
        // Whoever paired wants to see them connected; if it takes longer, status tells.
        let connected = async {
            while self.session_with(paired.peer).is_none() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        let _ = tokio::time::timeout(Duration::from_secs(2), connected).await;
        let record = self.peers.lock().get(&paired.peer).map(|known| known.record.clone());
        record.ok_or_else(|| Failure::internal("the peer was removed at once"))
    }

    /// Makes a peer's key durable.
    fn pin(&self, paired: &Paired, address: Option<&str>) -> std::result::Result<(), LinkError> {
        let mut known = self.peers.lock();
        let before = known.get(&paired.peer).map(|known| known.record.clone());
        let name = before
            .as_ref()
            .map_or_else(|| self.free_peer_name(&known, paired), |before| before.name.clone());
        let record = PeerRecord {
            id: paired.peer.to_string(),
            name,
            address: address.map(str::to_owned).or_else(|| before.and_then(|b| b.address)),
            paired_at: clock::wall().0,
        };
        self.context
            .fleet()
            .put_peer(&record)
            .map_err(|error| LinkError::Identity(format!("keeping the peer's key: {error}")))?;
        known
            .entry(paired.peer)
            .and_modify(|known| known.record = record.clone())
            .or_insert_with(|| Known::new(record));
        Ok(())
    }

    fn free_peer_name(&self, known: &BTreeMap<NodeId, Known>, paired: &Paired) -> String {
        let taken = known.values().any(|known| known.record.name == paired.name.as_str());
        if taken {
            format!("{}-{}", paired.name, paired.peer.short())
        } else {
            paired.name.to_string()
        }
    }

    /// Dials a peer whenever there is no session, for as long as it is paired.
    fn dial_peer(self: &Arc<Self>, id: NodeId) {
        let mut known = self.peers.lock();
        let Some(peer) = known.get_mut(&id) else { return };
        let Some(address) = peer.record.address.clone() else { return };
        let node = self.clone();
        let task = self.context.link().spawn(async move {
            let mut backoff = Backoff::default();
            loop {
                // The peer may have come by itself; two sessions would drive each other out.
                if node.session_with(id).is_some() {
                    backoff.success();
                    tokio::time::sleep(REDIAL).await;
                    continue;
                }
                match node.dial_once(id, &address).await {
                    Ok(()) => backoff.success(),
                    Err(error) => {
                        if backoff.failures() == 0 {
                            log::info!("dialling {address}: {error}");
                        }
                        node.set_trouble(id, &error);
                    }
                }
                let pause = backoff.after_failure(clock::random_u64());
                tokio::select! {
                    () = tokio::time::sleep(pause) => {}
                    () = node.stopping.cancelled() => return,
                }
            }
        });
        peer.dialler = Some(tokio_util::task::AbortOnDropHandle::new(task));
    }

    /// One attempt: returns when the session that came of it is over.
    async fn dial_once(self: &Arc<Self>, id: NodeId, address: &str) -> Result<()> {
        let addr = resolve(address).await?;
        let connection = self.endpoint.dial(addr, id).await?;
        let (session, events) = Session::begin(connection, self.hello()).await?;
        self.clone().run_session(session, events).await;
        Ok(())
    }

    /// There is no session with a peer, and why. What does not pass by itself is told once.
    fn set_trouble(&self, id: NodeId, why: &Failure) {
        let text = {
            let mut known = self.peers.lock();
            let Some(known) = known.get_mut(&id) else { return };
            if known.session.is_some() {
                return;
            }
            let before = known.trouble.replace(why.message.clone());
            let lasts = matches!(why.kind, Kind::Untrusted | Kind::Refused);
            if !lasts || before.as_ref() == Some(&why.message) {
                return;
            }
            format!("no session with peer {}: {why}", known.record.name)
        };
        self.context.event(Level::Alert, None, &text);
    }

    /// Lives through one session.
    async fn run_session(
        self: Arc<Self>,
        session: Session,
        mut events: mpsc::Receiver<SessionEvent>,
    ) {
        let (id, number) = (session.peer(), session.number());
        let before = {
            let mut known = self.peers.lock();
            let Some(known) = known.get_mut(&id) else {
                session.replace();
                return;
            };
            known.since = Some(clock::wall());
            known.trouble = None;
            known.session.replace(session.clone())
        };
        if let Some(before) = before {
            // The peer would not have come again if it still had that one.
            before.replace();
            self.groups_down(&before);
        }
        let hello = session.hello();
        log::info!("connected with {} ({})", hello.name, session.remote_address());
        self.shape_links();
        self.warn_of_clock(&session);
        for group in self.groups() {
            if group.peer() == Some(id) {
                group.session_up(&session).await;
            }
        }
        let mut why = "the session ended".to_owned();
        while let Some(event) = events.recv().await {
            match event {
                SessionEvent::Message(Message::Goodbye { unpaired, text }) => {
                    why = text;
                    if unpaired {
                        let text =
                            format!("peer {} has removed this pairing", session.hello().name);
                        self.context.event(Level::Alert, None, &text);
                    }
                }
                SessionEvent::Message(message) => self.on_message(&session, message).await,
                SessionEvent::Frames(header, reader) => {
                    let group = self.groups_lock().get(&header.group).cloned();
                    if let Some(group) = group.filter(|group| group.peer() == Some(id)) {
                        group.on_frames(&session, &header, reader);
                    }
                }
                SessionEvent::Changes(changes) => {
                    let group = self.groups_lock().get(&changes.header.group).cloned();
                    if let Some(group) = group.filter(|group| group.peer() == Some(id)) {
                        group.on_changes(&session, changes);
                    }
                }
                SessionEvent::Closed(error) => {
                    why = error.to_string();
                    break;
                }
            }
        }
        log::info!("disconnected from {}: {why}", session.hello().name);
        self.groups_down(&session);
        let mut known = self.peers.lock();
        if let Some(known) = known.get_mut(&id)
            && known.session.as_ref().is_some_and(|current| current.number() == number)
        {
            known.session = None;
            known.since = None;
            known.trouble = Some(why);
        }
    }

    fn groups_down(&self, session: &Session) {
        for group in self.groups() {
            group.session_down(session.number());
        }
    }

    fn warn_of_clock(&self, session: &Session) {
        let difference = clock::wall().0.abs_diff(session.hello().wall_time.0);
        if difference > CLOCK_DIFFERENCE_US {
            log::info!(
                "the clocks of this node and of {} differ by {} s; histories are not harmed, but \
                 times are hard to compare",
                session.hello().name,
                difference / 1_000_000
            );
        }
    }

    async fn on_message(self: &Arc<Self>, session: &Session, message: Message) {
        let peer = session.peer();
        if let Message::Offer(offer) = message {
            return self.on_offer(session, offer);
        }
        let group = message.group().and_then(|id| self.groups_lock().get(&id).cloned());
        // A peer speaks of its own groups only.
        if let Some(group) = group.filter(|group| group.peer() == Some(peer)) {
            // A server that runs here would only see its disks fail.
            let running = match message {
                Message::Drain { .. } => self.recoveries.machines_of(group.id()),
                _ => Vec::new(),
            };
            if let Some(id) = running.first() {
                return group.cannot_be_drained(session, id).await;
            }
            group.on_message(session, message).await;
        }
    }

    /// A peer offers a group: it may be new here.
    fn on_offer(self: &Arc<Self>, session: &Session, offer: Offer) {
        let node = self.clone();
        let session = session.clone();
        // Making a group waits for the disk; other groups' messages do not wait for that.
        tokio::spawn(async move {
            let group = offer.group;
            let refused = match node.group_for_offer(&session, &offer).await {
                Ok(found) => {
                    node.peers.refused().remove(&group);
                    let groups = node.groups_lock().len();
                    return found.on_offer(&session, offer, groups).await;
                }
                Err(refused) => refused,
            };
            let (code, text) = refused;
            if node.is_news(group, &text) {
                node.context.event(Level::Alert, Some(offer.name.as_str()), &text);
            }
            let refuse = srn_core::wire::Refuse { group, code, text, epochs: None };
            let _ = session.send(&Message::Refuse(refuse)).await;
        });
    }

    /// Whether a group's offer was not refused in these words the last time.
    fn is_news(&self, group: GroupId, text: &str) -> bool {
        let mut refused = self.peers.refused();
        if refused.len() >= REFUSED_MAX {
            refused.clear();
        }
        refused.insert(group, text.to_owned()).is_none_or(|before| before != text)
    }

    async fn group_for_offer(
        self: &Arc<Self>,
        session: &Session,
        offer: &Offer,
    ) -> std::result::Result<Arc<crate::group::Group>, (RefuseCode, String)> {
        let _one_at_a_time = self.making.lock().await;
        let found = self.groups_lock().get(&offer.group).cloned();
        if let Some(group) = found {
            if group.peer() == Some(session.peer()) {
                return Ok(group);
            }
            let text = format!("group {} is replicated with another node", offer.name);
            return Err((RefuseCode::NameTaken, text));
        }
        if let Some(why) = self.why_broken(&offer.group.to_string()) {
            let text = format!("the recovery node cannot open group {}: {why}", offer.name);
            return Err((RefuseCode::Storage, text));
        }
        if self.groups().iter().any(|group| group.name() == offer.name.as_str()) {
            let text = format!(
                "the recovery node has another group named {}; delete that there, or make this one \
                 anew under another name",
                offer.name
            );
            return Err((RefuseCode::NameTaken, text));
        }
        self.make_replica(session, offer).await.map_err(|error| {
            let text = format!("the recovery node cannot store group {}: {error}", offer.name);
            (RefuseCode::Storage, text)
        })
    }

    /// All peers.
    #[must_use]
    pub fn peer_statuses(&self) -> Vec<PeerStatus> {
        let known = self.peers.lock();
        let mut all: Vec<PeerStatus> = known.values().map(Known::status).collect();
        all.sort_by(|a, b| a.name.cmp(&b.name));
        all
    }

    /// The peer of this name or id.
    ///
    /// # Errors
    /// [`Kind::NotFound`], naming those that there are.
    pub fn find_peer(&self, name: &str) -> Result<(NodeId, PeerRecord)> {
        let known = self.peers.lock();
        let found = known
            .iter()
            .find(|(_, known)| known.record.name == name || known.record.id == name)
            .map(|(id, known)| (*id, known.record.clone()));
        found.ok_or_else(|| {
            let names: Vec<&str> = known.values().map(|known| known.record.name.as_str()).collect();
            Failure::not_found(format!(
                "there is no peer {name:?}; paired are: {}",
                if names.is_empty() { "none".into() } else { names.join(", ") }
            ))
        })
    }

    /// The peer of this id.
    #[must_use]
    pub fn peer_name(&self, id: NodeId) -> Option<String> {
        self.peers.lock().get(&id).map(|known| known.record.name.clone())
    }

    /// Why there is no session with the peer of this id.
    pub(super) fn peer_trouble(&self, id: NodeId) -> Option<String> {
        self.peers.lock().get(&id).and_then(|known| known.trouble.clone())
    }

    /// The session with a peer.
    #[must_use]
    pub fn session_with(&self, id: NodeId) -> Option<Session> {
        self.peers.lock().get(&id).and_then(|known| known.session.clone())
    }

    pub(super) fn sessions(&self) -> Vec<Session> {
        self.peers.lock().values().filter_map(|known| known.session.clone()).collect()
    }

    /// Forgets a peer: from here on it is a stranger.
    ///
    /// # Errors
    /// [`Kind::Conflict`] while groups are replicated with it.
    pub async fn remove_peer(&self, name: &str) -> Result<PeerRecord> {
        let (id, record) = self.find_peer(name)?;
        let groups: Vec<String> = self
            .groups()
            .iter()
            .filter(|group| group.peer() == Some(id))
            .map(|group| group.name())
            .collect();
        if !groups.is_empty() {
            return Err(Failure::conflict(format!(
                "peer {name} replicates {}; delete that first with srn group delete",
                groups.join(", ")
            )));
        }
        self.context.fleet().remove_peer(&record.id)?;
        let session = self.peers.lock().remove(&id).and_then(|known| known.session);
        if let Some(session) = session {
            let text = format!("{} removed the pairing", self.context.config().name);
            let _ = session.send(&Message::Goodbye { unpaired: true, text }).await;
            session.close("the pairing was removed").await;
        }
        self.context.event(Level::Info, None, &format!("peer {} was removed", record.name));
        Ok(record)
    }

    /// Ends all sessions.
    pub(super) async fn close_sessions(&self, why: &str) {
        let sessions: Vec<Session> = {
            let mut known = self.peers.lock();
            known
                .values_mut()
                .filter_map(|known| {
                    known.dialler = None;
                    known.session.take()
                })
                .collect()
        };
        for session in sessions {
            let goodbye = Message::Goodbye { unpaired: false, text: why.to_owned() };
            let _ = tokio::time::timeout(Duration::from_millis(200), session.send(&goodbye)).await;
            session.close(why).await;
            self.groups_down(&session);
        }
    }
}

/// What is odd about a path, when it has been looked at for long enough.
fn hint(path: &Path, since: Option<srn_core::time::WallTime>) -> Option<String> {
    if path.black_holes > 0 {
        return Some(format!(
            "larger packets than {} bytes vanish on the way without a word, some of them after they \
             had passed: look at the MTU of tunnels there",
            path.packet_bytes
        ));
    }
    let age = since.map_or(0, |since| clock::wall().0.saturating_sub(since.0));
    (age > SETTLED_US && path.packet_bytes < USUAL_PACKET).then(|| {
        format!(
            "the path takes packets of {} bytes only, less than usual: it works, and costs speed; \
             look at the MTU of tunnels there",
            path.packet_bytes
        )
    })
}

impl Known {
    fn status(&self) -> PeerStatus {
        let session = self.session.as_ref();
        let path = session.map(Session::path);
        PeerStatus {
            name: self.record.name.clone(),
            id: self.record.id.clone(),
            address: self.record.address.clone(),
            connected: session.is_some(),
            remote: session.map(|session| session.remote_address().to_string()),
            connected_since: self.since.map(clock::rfc3339),
            version: session.map(|session| session.hello().software.clone()),
            rtt_ms: path.map(|path| path.round_trip.as_secs_f64() * 1e3),
            packet_bytes: path.map(|path| path.packet_bytes),
            rate: path.and_then(|path| path.rate),
            loss_percent: path.map(|path| path.loss_ppm as f64 / 1e4),
            limit: session.and_then(Session::limit),
            hint: path.and_then(|path| hint(&path, self.since)),
            udp_sent: path.map(|path| path.sent),
            udp_received: path.map(|path| path.received),
            trouble: if session.is_some() { None } else { self.trouble.clone() },
            paired_at: clock::rfc3339(srn_core::time::WallTime(self.record.paired_at)),
        }
    }
}
