//! What people are told about a group: its state, why, and what would be lost now.

use serde::{Deserialize, Serialize};
use srn_core::ids::{DiskNo, Seq};
use srn_core::limits::SECTOR;
use srn_core::state::{Cause, Content, Facts as StateFacts, Link, State, decide};
use srn_core::time::WallTime;
use srn_store::group::Checkpoint;
use srn_store::manifest::{Keep, Role};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::Ordering;

use super::integrity::{DamageStatus, WorkStatus};
use super::pulled::{self, PullStatus};
use super::quiesce::QuiesceStatus;
use super::resync::ResyncStatus;
use super::synchronous::SyncStatus;
use super::ways_out::EpochStatus;
use super::{Group, Side};
use crate::clock;
use crate::fleet::{FullPolicy, IsolatedStart, Level, Priority, Source};

/// A group as people see it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct GroupStatus {
    /// Its name.
    pub name: String,
    /// Its id.
    pub id: String,
    /// `primary` or `secondary`.
    pub role: String,
    /// `cache` or `replica`.
    pub keep: String,
    /// The peer's name.
    pub peer: Option<String>,
    /// The worst state of its disks.
    pub state: String,
    /// Why.
    pub cause: String,
    /// More about why, if there is more to say.
    pub detail: Option<String>,
    /// What the primary said last of its own state; only at the secondary, while it is heard.
    #[serde(default)]
    pub said_by_primary: Option<String>,
    /// Whether everything is as it should be.
    pub safe: bool,
    /// Since when it is not, in RFC 3339.
    pub unsafe_since: Option<String>,
    /// Seconds that would be lost if production vanished now; none when nobody knows.
    pub lag_seconds: Option<f64>,
    /// Bytes that would be lost if production vanished now; none when nobody knows.
    pub lag_bytes: Option<u64>,
    /// When the lag was last known, if it is not known now, in RFC 3339.
    pub lag_unknown_since: Option<String>,
    /// The newest frame here.
    pub head: u64,
    /// Its wall time, in RFC 3339.
    pub head_time: Option<String>,
    /// The newest frame that the peer holds durably, at the primary.
    pub acknowledged: Option<u64>,
    /// The epoch.
    pub epoch: String,
    /// The epochs that lead to it, oldest first.
    pub epochs: Vec<EpochStatus>,
    /// Branches that are kept here.
    pub branches: usize,
    /// The disks.
    pub disks: Vec<DiskStatus>,
    /// The log.
    pub log: LogStatus,
    /// The link's counters.
    pub link: LinkStatus,
    /// What a full log does.
    pub full_policy: FullPolicy,
    /// Seconds between periodic checkpoints.
    pub checkpoint_every_s: u64,
    /// Seconds of history that stay recoverable.
    pub history_s: u64,
    /// What a primary does that starts without its peer.
    pub isolated_start: IsolatedStart,
    /// Whether answers wait for the peer; none where that was not declared.
    #[serde(default)]
    pub synchronous: Option<SyncStatus>,
    /// Its part of a link that it shares with other groups.
    #[serde(default)]
    pub priority: Priority,
    /// What makes sure that production is off before a forced failover, if anything does.
    pub fence_hook: Option<PathBuf>,
    /// What makes the applications quiet for a checkpoint, if anything does.
    #[serde(default)]
    pub quiesce: Option<QuiesceStatus>,
    /// How many schedules of checkpoints it has.
    #[serde(default)]
    pub schedules: usize,
    /// Paused by a person.
    pub paused: bool,
    /// How its history is looked after.
    #[serde(default)]
    pub upkeep: UpkeepStatus,
    /// Content that is carried in place of frames now.
    #[serde(default)]
    pub resync: Option<ResyncStatus>,
    /// Somebody has asked for the replica to be compared.
    #[serde(default)]
    pub resync_asked: bool,
    /// What is being compared or scrubbed now.
    #[serde(default)]
    pub work: Option<WorkStatus>,
    /// What is known to be damaged here.
    #[serde(default)]
    pub damaged: Vec<DamageStatus>,
    /// Seconds between scrubs; 0 for none.
    #[serde(default)]
    pub scrub_every_s: u64,
    /// When the last one ended, in RFC 3339; before the first: when the group came to this node.
    #[serde(default)]
    pub scrubbed_at: Option<String>,
}

/// How the group's history is looked after.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct UpkeepStatus {
    /// What history takes that is to be given up, in bytes.
    pub debt_bytes: u64,
    /// Stretches of history that stay as they are because something in them is damaged.
    pub damaged: usize,
    /// Why it does not go, when a person is needed.
    pub trouble: Option<String>,
}

/// A disk as people see it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DiskStatus {
    /// Its name.
    pub name: String,
    /// Its number in the group.
    pub number: u32,
    /// Its id.
    pub id: String,
    /// Its size in bytes.
    pub size: u64,
    /// Its state.
    pub state: String,
    /// Why.
    pub cause: String,
    /// More about why.
    pub detail: Option<String>,
    /// `served`, `mirror` or `pull`; only at the primary.
    pub source: Option<String>,
    /// The export's name; only at the primary.
    pub export: Option<String>,
    /// A copy that is under way.
    pub copy: Option<CopyStatus>,
    /// The passes over a pulled disk; only at the primary.
    #[serde(default)]
    pub pull: Option<PullStatus>,
}

/// A copy that is under way.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct CopyStatus {
    /// Bytes done.
    pub done: u64,
    /// Bytes in all.
    pub total: u64,
    /// Bytes per second.
    pub rate: u64,
    /// Seconds left at that rate.
    pub seconds_left: Option<u64>,
}

/// A group's log.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LogStatus {
    /// Bytes of its files.
    pub bytes: u64,
    /// The most they may take; none when there is no cap.
    pub cap: Option<u64>,
    /// Bytes that the peer has not acknowledged, in whole segments.
    pub unacknowledged: u64,
    /// The oldest frame kept.
    pub oldest: u64,
}

/// Counters since the daemon was started.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LinkStatus {
    /// Content written by servers, in bytes.
    pub content_written: u64,
    /// Content sent, in bytes.
    pub content_sent: u64,
    /// Bytes of frames sent, as encoded for the link.
    pub wire_sent: u64,
    /// Bytes of frames received.
    pub wire_received: u64,
    /// Frames sent a second time after a cut.
    pub frames_sent_again: u64,
}

/// A checkpoint as people see it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct CheckpointStatus {
    /// Its id.
    pub id: String,
    /// When it was made, in RFC 3339.
    pub time: String,
    /// How it came about.
    pub kind: String,
    /// A person's label.
    pub label: Option<String>,
    /// Whether every disk was whole.
    pub clean: bool,
    /// The frame.
    pub frame: u64,
    /// Whether it is never retired.
    pub pinned: bool,
    /// `application` when the applications were quiet, else `crash`.
    pub consistent: String,
    /// Whether a server has booted from it.
    pub proven: bool,
    /// Whether a person has recovered it with damage in it.
    pub damage_accepted: bool,
    /// When it was made, in the node's time zone.
    pub local: String,
}

impl From<&Checkpoint> for CheckpointStatus {
    fn from(checkpoint: &Checkpoint) -> Self {
        let note = &checkpoint.note;
        Self {
            id: checkpoint.mark.id.to_string(),
            time: clock::rfc3339(checkpoint.mark.wall_time),
            kind: checkpoint.mark.kind.word().to_owned(),
            label: (!note.label.is_empty()).then(|| note.label.clone()),
            clean: checkpoint.mark.clean,
            frame: checkpoint.position.seq.0,
            pinned: note.pinned,
            consistent: if checkpoint.is_application_consistent() {
                "application".into()
            } else {
                "crash".into()
            },
            proven: note.proven,
            damage_accepted: note.damage_accepted,
            local: clock::in_zone(checkpoint.mark.wall_time),
        }
    }
}

impl Group {
    /// How the link stands for this group, and in words what the peer said.
    fn link_state(&self) -> (Link, Option<String>) {
        if self.has_rival() {
            return (Link::Diverged(Cause::TwoPrimaries), None);
        }
        if self.awaits_reversal() {
            return (Link::FailedOver, None);
        }
        let no_primary = self.role() == Role::Secondary && self.facts().no_primary.is_some();
        let resync = self.resync_cause();
        match &*self.side() {
            Side::Apart if !self.record_has_peer() => (Link::NoPeer, None),
            _ if no_primary => (Link::Diverged(Cause::NoPrimary), None),
            Side::Apart if self.is_tracking() => (Link::Tracking, None),
            Side::Apart => (Link::Down, None),
            Side::Outgoing(outgoing) => match (outgoing.link(), resync) {
                ((Link::Negotiating, _), Some(cause)) => (Link::Resync(cause), None),
                ((Link::Negotiating, _), None) if self.is_tracking() => {
                    (Link::Tracking, self.resync_trouble())
                }
                ((Link::Negotiating, None), None) => (Link::Negotiating, self.resync_trouble()),
                (link, _) => link,
            },
            Side::Incoming(incoming) => match incoming.refused() {
                Some((cause, text)) => (Link::Diverged(*cause), Some(text.clone())),
                None if incoming.is_streaming() && resync.is_some() => {
                    (resync.map_or(Link::Negotiating, Link::Resync), None)
                }
                None if incoming.has_begun() => (Link::Streaming, None),
                None => (Link::Negotiating, None),
            },
        }
    }

    /// The group's state, and why.
    #[must_use]
    pub fn state(&self) -> (State, Cause) {
        let worst = self.disk_states().into_iter().map(|(_, state, cause, _)| (state, cause)).max();
        worst.unwrap_or_else(|| decide(&self.state_facts(Content::Clean, None).0))
    }

    /// Every disk's state and cause, and what more there is to say.
    fn disk_states(&self) -> Vec<(DiskNo, State, Cause, Option<String>)> {
        let catalog = self.catalog();
        catalog
            .disks
            .iter()
            .map(|(no, disk)| {
                let (facts, detail) = self.state_facts(pulled::stands(disk), Some(*no));
                let (state, cause) = decide(&facts);
                (*no, state, cause, detail)
            })
            .collect()
    }

    fn state_facts(&self, content: Content, disk: Option<DiskNo>) -> (StateFacts, Option<String>) {
        let (mut link, mut detail) = self.link_state();
        let fence = self.fence().map(|fence| fence.cause);
        let paused = self.record().paused;
        let primary = self.role() == Role::Primary;
        let source_cause = self.source_cause(disk);
        let facts = self.facts();
        let mut failure = facts.failure.as_ref().map(|(cause, text)| {
            detail = Some(text.clone());
            *cause
        });
        if let Some(why) = disk.and_then(|disk| facts.sources.get(&disk.0))
            && failure.is_none()
            && primary
            && fence.is_none()
        {
            failure = Some(source_cause);
            detail = Some(why.clone());
        }
        if let Some(why) = &facts.full
            && failure.is_none()
        {
            // What keeps the peer from taking any is the other half of the story.
            let more = detail.filter(|_| link == Link::Hindered);
            detail = Some(more.map_or_else(|| why.clone(), |more| format!("{why}; {more}")));
            if link != Link::Tracking {
                link = Link::NoRoom;
            }
        }
        drop(facts);
        (StateFacts { content, link, paused, fence, failure }, detail)
    }

    /// What it means that a disk's source is not running.
    fn source_cause(&self, disk: Option<DiskNo>) -> Cause {
        let record = self.record();
        let source = record.sources.iter().find(|source| Some(DiskNo(source.disk)) == disk);
        match source.map(|found| &found.source) {
            Some(Source::Pull { .. }) => Cause::PassFailed,
            _ => Cause::SourceGone,
        }
    }

    /// Looks whether the state has changed, and says so.
    pub fn review(&self) {
        self.review_synchronous();
        let now = self.state();
        let name = self.name();
        let disks: BTreeMap<DiskNo, State> =
            self.disk_states().into_iter().map(|(no, state, ..)| (no, state)).collect();
        let mut facts = self.facts();
        if facts.silent {
            return;
        }
        for (no, state) in &disks {
            if let Some(before) = facts.last_disk_states.get(no)
                && before != state
                && !before.may_become(*state)
            {
                log::error!(
                    "group {name}: disk {} went from {before} to {state}, which should not happen",
                    no.0
                );
            }
        }
        facts.last_disk_states = disks;
        let before = facts.last_state.replace(now);
        if before == Some(now) {
            return;
        }
        let safe = now.0 == State::Streaming;
        match (safe, facts.unsafe_since) {
            (true, _) => facts.unsafe_since = None,
            (false, None) => facts.unsafe_since = Some(clock::wall()),
            (false, Some(_)) => {}
        }
        drop(facts);
        let words = now.1.words();
        let text = if words.is_empty() { now.0.to_string() } else { format!("{}: {words}", now.0) };
        let level = match now.0 {
            State::Streaming | State::Seeding | State::Resync | State::Paused => Level::Info,
            // On the way to being connected, or not meant to be.
            State::Disconnected if matches!(now.1, Cause::Negotiating | Cause::NoPeer) => {
                Level::Info
            }
            State::Disconnected | State::Tracking => Level::Warning,
            _ => Level::Alert,
        };
        // The first state after a start is no news.
        if before.is_some() || level == Level::Alert {
            self.context.event(level, Some(&name), &text);
        }
        self.changed.notify_waiters();
    }

    /// What would be lost now: seconds and bytes, or since when nobody knows.
    fn lag_status(&self) -> (Option<f64>, Option<u64>, Option<String>) {
        let seconds = |us: u64| us as f64 / 1e6;
        if self.role() == Role::Primary {
            if !self.record_has_peer() || self.awaits_reversal() {
                return (None, None, None);
            }
            let behind = self.lag().behind(clock::mono());
            // What a pulled disk's server has written since its last pass is nowhere yet.
            let lost = seconds(behind.us).max(self.pulled_seconds().unwrap_or_default());
            return (Some(lost), Some(behind.bytes), None);
        }
        match &*self.side() {
            Side::Incoming(incoming) => match incoming.progress() {
                Some((progress, at)) if clock::mono().since(*at) < 5_000_000 => {
                    (Some(seconds(progress.behind_us)), Some(progress.behind_bytes), None)
                }
                _ => (None, None, Some(self.head_time())),
            },
            _ => (None, None, Some(self.head_time())),
        }
    }

    fn head_time(&self) -> String {
        clock::rfc3339(self.catalog().wall_time)
    }

    /// Everything there is to say about the group.
    #[must_use]
    pub fn status(&self, peer_name: Option<String>) -> GroupStatus {
        let (state, cause) = self.state();
        let states = self.disk_states();
        let detail = states
            .iter()
            .find(|(_, s, c, _)| (*s, *c) == (state, cause))
            .and_then(|(.., detail)| detail.clone())
            .or_else(|| self.state_facts(Content::Clean, None).1);
        let detail = match (detail, self.way_out(cause)) {
            (Some(detail), Some(way_out)) => Some(format!("{detail}; {way_out}")),
            (detail, way_out) => detail.or(way_out),
        };
        let (lag_seconds, lag_bytes, lag_unknown_since) = self.lag_status();
        let record = self.settings();
        let catalog = self.catalog();
        let role = self.role();
        let head = self.store.head();
        let (bytes, cap) = self.store.log_bytes();
        let load = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
        // What has only just become unsafe may not be written down yet.
        let now = || (state != State::Streaming).then(clock::wall);
        let unsafe_since = self.facts().unsafe_since.or_else(now).map(clock::rfc3339);
        let damaged = self.damage_status();
        let protected = role == Role::Secondary || record.peer.is_some();
        GroupStatus {
            name: record.name.clone(),
            id: record.id.clone(),
            role: if role == Role::Primary { "primary" } else { "secondary" }.into(),
            keep: if self.store.keep() == Keep::Cache { "cache" } else { "replica" }.into(),
            peer: peer_name,
            state: state.to_string(),
            cause: cause.words().into(),
            detail,
            said_by_primary: match &*self.side() {
                Side::Incoming(incoming) => {
                    incoming.progress().map(|(progress, _)| progress.state.clone())
                }
                _ => None,
            },
            safe: state == State::Streaming
                && protected
                && !catalog.disks.is_empty()
                && damaged.is_empty(),
            unsafe_since,
            lag_seconds,
            lag_bytes,
            lag_unknown_since,
            head: head.seq.0,
            head_time: (head.seq > Seq::ZERO).then(|| self.head_time()),
            acknowledged: (role == Role::Primary
                && record.peer.is_some()
                && !self.awaits_reversal())
            .then(|| self.store.acked().0),
            epoch: self.store.epochs().current().short(),
            epochs: self.epoch_statuses(),
            branches: self.store.branch_count(),
            disks: states
                .into_iter()
                .filter_map(|(no, state, cause, detail)| {
                    let disk = catalog.disks.get(&no)?;
                    Some(self.disk_status(no, disk, state, cause, detail, &record.name))
                })
                .collect(),
            log: LogStatus {
                bytes,
                cap: (cap < u64::MAX).then_some(cap),
                unacknowledged: if role == Role::Primary && record.peer.is_some() {
                    self.store.unacked_bytes()
                } else {
                    0
                },
                oldest: self.store.oldest().0,
            },
            link: LinkStatus {
                content_written: load(&self.counters.content_written),
                content_sent: load(&self.counters.content_sent),
                wire_sent: load(&self.counters.wire_sent),
                wire_received: load(&self.counters.wire_received),
                frames_sent_again: load(&self.counters.frames_sent_again),
            },
            full_policy: record.full_policy,
            checkpoint_every_s: record.checkpoint_every_s,
            history_s: record.history_s,
            isolated_start: record.isolated_start,
            synchronous: self.synchronous_status(),
            priority: record.priority,
            fence_hook: record.fence_hook.clone(),
            quiesce: self.quiesce_status(),
            schedules: record.schedules.len(),
            paused: record.paused,
            upkeep: self.facts().upkeep.clone(),
            resync: self.resync_status(),
            resync_asked: record.resync.is_some(),
            work: self.integrity_work(),
            damaged,
            scrub_every_s: record.scrub_every_s,
            scrubbed_at: record.scrubbed_at.map(|at| clock::rfc3339(WallTime(at))),
        }
    }

    fn disk_status(
        &self,
        no: DiskNo,
        disk: &srn_store::catalog::CatalogDisk,
        state: State,
        cause: Cause,
        detail: Option<String>,
        group: &str,
    ) -> DiskStatus {
        let record = self.record();
        let source = record.sources.iter().find(|source| source.disk == no.0);
        let kind = source.map(|source| match source.source {
            Source::Served => "served",
            Source::Mirror { .. } => "mirror",
            Source::Pull { .. } => "pull",
        });
        let pulled = source.is_some_and(|found| matches!(found.source, Source::Pull { .. }));
        let primary = self.role() == Role::Primary;
        let copy = self.facts().progress.get(&no.0).map(|progress| CopyStatus {
            done: progress.done,
            total: progress.total,
            rate: progress.rate,
            seconds_left: (progress.rate > 0)
                .then(|| progress.total.saturating_sub(progress.done) / progress.rate),
        });
        DiskStatus {
            name: disk.name.clone(),
            number: no.0,
            id: disk.id.to_string(),
            size: disk.sectors * SECTOR,
            state: state.to_string(),
            cause: cause.words().into(),
            detail,
            source: kind.map(str::to_owned),
            export: (primary && source.is_some() && !pulled)
                .then(|| format!("{group}/{}", disk.name)),
            copy,
            pull: self.facts().pulls.get(&no.0).filter(|_| primary && pulled).cloned(),
        }
    }
}
