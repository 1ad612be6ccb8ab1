//! Making, opening and removing groups.

use std::path::PathBuf;
use std::sync::{Arc, PoisonError};

use serde::{Deserialize, Serialize};
use srn_core::ids::NodeId;
use srn_core::name::Name;
use srn_core::wire::Offer;
use srn_link::Session;
use srn_store::manifest::{Keep, Role};

use super::Node;
use crate::error::{Failure, Kind, Result};
use crate::fleet::{
    FullPolicy, GroupRecord, IsolatedStart, Level, Priority, RetentionRecord, Synchronous,
    keep_branches_default_s,
};
use crate::group::{Group, NewGroup};

/// Log of a local cache unless said otherwise, in bytes.
const CACHE_CAP_DEFAULT: u64 = 10 << 30;

/// Seconds between periodic checkpoints unless said otherwise.
const CHECKPOINT_EVERY_DEFAULT_S: u64 = 60;

/// Seconds of history that a recovery node keeps unless said otherwise: a day.
const HISTORY_DEFAULT_S: u64 = 24 * 3600;

/// What a person asks for.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GroupRequest {
    /// The group's name.
    pub name: String,
    /// The peer's name; none for a group that is not replicated.
    pub peer: Option<String>,
    /// `cache` or `replica`.
    pub keep: String,
    /// The most that the log may take, in bytes.
    pub log_cap_bytes: Option<u64>,
    /// What a full log does.
    pub full_policy: Option<FullPolicy>,
    /// Seconds between periodic checkpoints.
    pub checkpoint_every_s: Option<u64>,
    /// Seconds of history that stay recoverable here.
    pub history_s: Option<u64>,
    /// At start without the peer.
    pub isolated_start: Option<IsolatedStart>,
    /// Whether answers wait for the peer.
    #[serde(default)]
    pub synchronous: Option<Synchronous>,
    /// Its part of a link that it shares.
    #[serde(default)]
    pub priority: Option<Priority>,
    /// Seconds between scrubs.
    #[serde(default)]
    pub scrub_every_s: Option<u64>,
}

impl Node {
    /// Opens every group that the node remembers.
    pub(super) async fn open_groups(self: &Arc<Self>) -> Result<()> {
        for record in self.context.fleet().groups()? {
            let (context, name) = (self.context.clone(), record.name.clone());
            let as_it_was = record.clone();
            let opened = tokio::task::spawn_blocking(move || Group::open(&context, record)).await;
            let opened = opened
                .unwrap_or_else(|error| Err(Failure::internal(format!("a task ended: {error}"))));
            match opened {
                Ok((group, clones)) => {
                    self.recoveries.inherit(&group, clones);
                    self.groups_lock().insert(group.id(), group);
                }
                Err(error) => {
                    // One group that cannot be opened is no reason to leave the others alone.
                    self.context.event(Level::Alert, Some(&name), &error.message);
                    crate::group::thaw_broken(&self.context, &as_it_was);
                    self.broken.lock().unwrap_or_else(PoisonError::into_inner).insert(name, error);
                }
            }
        }
        Ok(())
    }

    /// Why the group of this id could not be opened.
    pub(super) fn why_broken(&self, id: &str) -> Option<String> {
        let records = self.context.fleet().groups().unwrap_or_default();
        let name = records.into_iter().find(|record| record.id == id)?.name;
        let broken = self.broken.lock().unwrap_or_else(PoisonError::into_inner);
        broken.get(&name).map(|why| why.message.clone())
    }

    /// The group of this name.
    ///
    /// # Errors
    /// Not found, naming those that there are.
    pub fn find_group(&self, name: &str) -> Result<Arc<Group>> {
        let groups = self.groups();
        if let Some(group) =
            groups.iter().find(|group| group.name() == name || group.id().to_string() == name)
        {
            return Ok(group.clone());
        }
        if let Some(why) = self.broken.lock().unwrap_or_else(PoisonError::into_inner).get(name) {
            return Err(why.clone().while_doing(&format!("group {name} cannot be opened")));
        }
        let names: Vec<String> = groups.iter().map(|group| group.name()).collect();
        Err(Failure::not_found(format!(
            "there is no group {name:?}; there are: {}",
            if names.is_empty() { "none".into() } else { names.join(", ") }
        )))
    }

    /// Makes a group of which this node is primary.
    ///
    /// # Errors
    /// A name that is malformed or taken; a peer that does not exist; settings that cannot be.
    pub async fn create_group(self: &Arc<Self>, request: GroupRequest) -> Result<Arc<Group>> {
        let _one_at_a_time = self.making.lock().await;
        let name: Name =
            request.name.parse().map_err(|error| Failure::invalid(format!("{error}")))?;
        let taken = self.groups().iter().any(|group| group.name() == name.as_str())
            || self
                .broken
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .contains_key(name.as_str());
        if taken {
            return Err(Failure::conflict(format!(
                "there is a group {name} already; choose another name"
            )));
        }
        let peer = match &request.peer {
            Some(peer) => Some(self.find_peer(peer)?.0),
            None => None,
        };
        let keep = match request.keep.as_str() {
            "cache" => Keep::Cache,
            "replica" => Keep::Replica,
            other => {
                return Err(Failure::invalid(format!(
                    "{other:?} is no way to keep a group; it is cache or replica"
                )));
            }
        };
        if keep == Keep::Cache && peer.is_none() {
            return Err(Failure::invalid(
                "a local cache keeps only what the peer has not got yet, so it needs a peer",
            ));
        }
        let record = record(&request, &name, peer, keep)?;
        let context = self.context.clone();
        let new = NewGroup { name, peer, keep, record };
        let made = tokio::task::spawn_blocking(move || Group::create(&context, new));
        let group =
            made.await.map_err(|error| Failure::internal(format!("a task ended: {error}")))??;
        self.groups_lock().insert(group.id(), group.clone());
        self.context.event(Level::Info, Some(&group.name()), "the group was made");
        if let Some(session) = peer.and_then(|peer| self.session_with(peer)) {
            group.session_up(&session).await;
        }
        Ok(group)
    }

    /// Makes the replica of a group that a peer offers.
    pub(super) async fn make_replica(
        self: &Arc<Self>,
        session: &Session,
        offer: &Offer,
    ) -> Result<Arc<Group>> {
        let record = GroupRecord {
            id: offer.group.to_string(),
            name: offer.name.to_string(),
            peer: Some(session.peer().to_string()),
            paused: false,
            full_policy: FullPolicy::Throttle,
            isolated_start: IsolatedStart::Serve,
            synchronous: Synchronous::Off,
            checkpoint_every_s: CHECKPOINT_EVERY_DEFAULT_S,
            schedules: Vec::new(),
            history_s: HISTORY_DEFAULT_S,
            retention: RetentionRecord::default(),
            keep_branches_s: keep_branches_default_s(),
            log_cap_bytes: u64::MAX,
            fence_hook: None,
            quiesce_hook: None,
            quiesce_limit_ms: crate::fleet::quiesce_limit_default_ms(),
            frozen: None,
            priority: Priority::default(),
            sources: Vec::new(),
            scrub_every_s: crate::fleet::scrub_every_default(),
            resync: None,
            scrubbed_at: None,
        };
        let first = offer
            .epochs
            .list()
            .first()
            .map(|epoch| epoch.id)
            .ok_or_else(|| Failure::invalid("the offer has no epoch"))?;
        let (context, id) = (self.context.clone(), offer.group);
        let made =
            tokio::task::spawn_blocking(move || Group::create_replica(&context, id, first, record));
        let group =
            made.await.map_err(|error| Failure::internal(format!("a task ended: {error}")))??;
        self.groups_lock().insert(group.id(), group.clone());
        let peer = &session.hello().name;
        let text = format!("peer {peer} replicates this group to this node");
        self.context.event(Level::Info, Some(&group.name()), &text);
        Ok(group)
    }

    /// Removes a group and everything that this node keeps of it. What the peer keeps stays.
    ///
    /// # Errors
    /// [`Kind::Conflict`] while a recovered server runs from it.
    pub async fn delete_group(self: &Arc<Self>, name: &str) -> Result<()> {
        let _one_at_a_time = self.making.lock().await;
        let group = match self.find_group(name) {
            Ok(group) => group,
            Err(error) => return self.delete_broken(name, error),
        };
        // While one is begun it is not known yet.
        let same = group.clone();
        let begun = same.recovering.try_lock();
        if begun.is_err() {
            return Err(Failure::conflict(format!(
                "a failover of group {name} is under way; wait for its end"
            )));
        }
        let _kept = group.keep()?;
        let running = self.recoveries.of_group(group.id());
        if !running.is_empty() {
            return Err(Failure::conflict(format!(
                "recovered servers run from group {name}: {}; stop them first with \
                 srn failover stop",
                running.join(", ")
            )));
        }
        let _quiet = group.end_quiet_for_good().await;
        group.tell_deleted().await;
        self.mirrors.forget(&group, None).await;
        self.pulls.forget(&group, None).await;
        group.forget_settings()?;
        self.groups_lock().remove(&group.id());
        self.disconnect(&group, "");
        let dir = self.context.group_dir(&group.id().to_string());
        let role = group.role();
        let removed = tokio::task::spawn_blocking(move || {
            group.shut_down();
            // A word from the peer may still be on its way to the manifest.
            group.store().close();
            remove_dir(dir)
        });
        removed.await.map_err(|error| Failure::internal(format!("a task ended: {error}")))??;
        let text = if role == Role::Primary {
            "the group was deleted here; what the recovery node keeps of it stays"
        } else {
            "the replica was deleted here"
        };
        self.context.event(Level::Warning, Some(name), text);
        Ok(())
    }

    fn delete_broken(&self, name: &str, error: Failure) -> Result<()> {
        let known = self.broken.lock().unwrap_or_else(PoisonError::into_inner).remove(name);
        if known.is_none() {
            return Err(error);
        }
        let records = self.context.fleet().groups()?;
        for record in records.into_iter().filter(|record| record.name == name) {
            self.context.fleet().remove_group(&record.id)?;
            remove_dir(self.context.group_dir(&record.id))?;
        }
        self.context.event(Level::Warning, Some(name), "the damaged group was deleted here");
        Ok(())
    }
}

fn remove_dir(dir: PathBuf) -> Result<()> {
    std::fs::remove_dir_all(&dir).map_err(|error| {
        Failure::new(Kind::Storage, format!("removing {}: {error}", dir.display()))
    })
}

fn record(
    request: &GroupRequest,
    name: &Name,
    peer: Option<NodeId>,
    keep: Keep,
) -> Result<GroupRecord> {
    let full_policy = request.full_policy.unwrap_or(match keep {
        // The server has its own disk and goes on.
        Keep::Cache => FullPolicy::Stop,
        // Nor does a server wait for its peer here: what changed can be read again.
        Keep::Replica => FullPolicy::Track,
    });
    if keep == Keep::Cache && full_policy == FullPolicy::Track {
        return Err(Failure::invalid(
            "a local cache holds no copy from which what changed could be read again; its policy is \
             stop or throttle",
        ));
    }
    if keep == Keep::Replica && full_policy == FullPolicy::Stop {
        return Err(Failure::invalid(
            "a replica's disks may be served from here, and a served disk cannot go on \
             unprotected; its policy is track or throttle",
        ));
    }
    let synchronous = request.synchronous.unwrap_or_default();
    if synchronous != Synchronous::Off && peer.is_none() {
        return Err(Failure::invalid(
            "a group without a peer has nobody that its writes could wait for",
        ));
    }
    let log_cap_bytes = match (request.log_cap_bytes, keep) {
        (Some(bytes), _) => bytes,
        (None, Keep::Cache) => CACHE_CAP_DEFAULT,
        (None, Keep::Replica) => u64::MAX,
    };
    Ok(GroupRecord {
        id: String::new(),
        name: name.to_string(),
        peer: peer.map(|peer| peer.to_string()),
        paused: false,
        full_policy,
        isolated_start: request.isolated_start.unwrap_or(IsolatedStart::Serve),
        synchronous,
        checkpoint_every_s: request.checkpoint_every_s.unwrap_or(CHECKPOINT_EVERY_DEFAULT_S),
        schedules: Vec::new(),
        history_s: request.history_s.unwrap_or(HISTORY_DEFAULT_S),
        retention: RetentionRecord::default(),
        keep_branches_s: keep_branches_default_s(),
        log_cap_bytes,
        fence_hook: None,
        quiesce_hook: None,
        quiesce_limit_ms: crate::fleet::quiesce_limit_default_ms(),
        frozen: None,
        priority: request.priority.unwrap_or_default(),
        sources: Vec::new(),
        scrub_every_s: request.scrub_every_s.unwrap_or_else(crate::fleet::scrub_every_default),
        resync: None,
        scrubbed_at: None,
    })
}
