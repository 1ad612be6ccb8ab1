//! What a node remembers besides the histories of its groups: peers, settings, recoveries, events.
//!
//! Behind a small trait, so that a database of a fleet can hold it too. What decides who may write
//! where (roles, epochs, fences) is not here but in each group's manifest, beside its history.

mod sqlite;

pub use sqlite::SqliteFleet;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::error::Result;

/// A paired node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerRecord {
    /// The SHA-256 of its public key, in hexadecimal.
    pub id: String,
    /// The name it had when it was paired; people may change it here.
    pub name: String,
    /// Where to dial it: host and port. None when it dials us.
    pub address: Option<String>,
    /// When it was paired, in microseconds since 1970.
    pub paired_at: i64,
}

/// What a full log does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FullPolicy {
    /// Frames that the peer has not got are given up: it gets what changed instead. Nothing waits.
    Track,
    /// Writes wait until there is room.
    Throttle,
    /// Protection ends and the server goes on.
    Stop,
}

/// What a primary does that starts and cannot reach its peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum IsolatedStart {
    /// It serves: production comes first.
    Serve,
    /// It waits until the peer has said that it did not take over.
    Wait,
}

/// Whether a write is answered only when the peer holds it too.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Synchronous {
    /// It is answered when it is durable here.
    #[default]
    Off,
    /// It is answered when it is durable at the peer, and waits for as long as the peer is away.
    Wait,
    /// The same while the peer is there; without it writes are answered as if this were off.
    Degrade,
}

/// Whose writes go first on a link that many groups share.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Priority {
    /// Twice what a normal group gets.
    High,
    /// The usual.
    #[default]
    Normal,
    /// Half of what a normal group gets.
    Low,
}

impl Priority {
    /// A group's part of a link, beside those of others.
    #[must_use]
    pub const fn weight(self) -> u64 {
        match self {
            Self::High => 4,
            Self::Normal => 2,
            Self::Low => 1,
        }
    }
}

/// Seconds that branches are kept unless said otherwise: 30 days.
#[must_use]
pub const fn keep_branches_default_s() -> u64 {
    30 * 24 * 3600
}

/// What is kept of a group's history behind the window in which every position is, and how far the
/// clock that tells its age is trusted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct RetentionRecord {
    /// Spans of ten minutes of which the newest checkpoint is kept.
    pub ten_minutes: u32,
    /// Hours.
    pub hours: u32,
    /// Days, by UTC.
    pub days: u32,
    /// Weeks, from Monday.
    pub weeks: u32,
    /// Months.
    pub months: u32,
    /// The newest checkpoints that are kept at any age.
    pub min_points: u32,
    /// The most bytes that history may take, beside the base.
    pub cap_bytes: Option<u64>,
    /// What the wall clock said at log time 0, in microseconds since 1970: spans are aligned to it.
    pub anchor_us: Option<i64>,
    /// Wall time less log time as it was when it was right, in microseconds.
    pub clock_offset_us: Option<i64>,
    /// How far the log's wall time was ahead of this node's then, in microseconds.
    pub clock_ahead_us: Option<i64>,
}

impl Default for RetentionRecord {
    fn default() -> Self {
        let policy = srn_core::retention::Policy::default();
        Self {
            ten_minutes: policy.ten_minutes,
            hours: policy.hours,
            days: policy.days,
            weeks: policy.weeks,
            months: policy.months,
            min_points: policy.min_points,
            cap_bytes: None,
            anchor_us: None,
            clock_offset_us: None,
            clock_ahead_us: None,
        }
    }
}

/// When checkpoints are made by the calendar.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScheduleRecord {
    /// What it is called within its group.
    pub number: u32,
    /// The expression, as it was typed.
    pub calendar: String,
    /// Whether the applications are made quiet for it.
    pub application: bool,
    /// What its checkpoints are called, before their time.
    pub label: Option<String>,
    /// Its times until this one have been dealt with: microseconds since 1970.
    pub since_us: i64,
}

/// A thaw that is owed: written before applications are frozen.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FrozenRecord {
    /// The program that is told to thaw.
    pub hook: PathBuf,
    /// The word by which its processes are found again.
    pub run: String,
    /// The id of the checkpoint that they are frozen for.
    pub checkpoint: String,
    /// When it began, in microseconds since 1970.
    pub since_us: i64,
}

/// Milliseconds for which applications stand still at most, unless said otherwise: 10 s.
#[must_use]
pub const fn quiesce_limit_default_ms() -> u64 {
    10_000
}

/// A group's settings at this node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupRecord {
    /// The group's id.
    pub id: String,
    /// Its name.
    pub name: String,
    /// The peer's id; none when it is not replicated.
    pub peer: Option<String>,
    /// A person paused it.
    pub paused: bool,
    /// What a full log does.
    pub full_policy: FullPolicy,
    /// At start without the peer.
    pub isolated_start: IsolatedStart,
    /// Whether answers wait for the peer.
    #[serde(default)]
    pub synchronous: Synchronous,
    /// Seconds between periodic checkpoints; 0 for none.
    pub checkpoint_every_s: u64,
    /// Checkpoints by the calendar.
    #[serde(default)]
    pub schedules: Vec<ScheduleRecord>,
    /// Seconds of history that stay recoverable, where a replica is kept.
    pub history_s: u64,
    /// What is kept beyond that.
    #[serde(default)]
    pub retention: RetentionRecord,
    /// Seconds that branches are kept: what a failover has left behind.
    #[serde(default = "keep_branches_default_s")]
    pub keep_branches_s: u64,
    /// The most that the log may take, in bytes.
    pub log_cap_bytes: u64,
    /// A program that is run before a forced failover and makes sure that production is off.
    pub fence_hook: Option<PathBuf>,
    /// A program that makes the applications quiet for a checkpoint.
    #[serde(default)]
    pub quiesce_hook: Option<PathBuf>,
    /// Milliseconds from its beginning until they go on at the latest.
    #[serde(default = "quiesce_limit_default_ms")]
    pub quiesce_limit_ms: u64,
    /// They may be frozen now.
    #[serde(default)]
    pub frozen: Option<FrozenRecord>,
    /// Its part of a link that it shares.
    #[serde(default)]
    pub priority: Priority,
    /// Where the disks' writes come from, at the primary.
    pub sources: Vec<SourceRecord>,
    /// Seconds between scrubs; 0 for none.
    #[serde(default = "scrub_every_default")]
    pub scrub_every_s: u64,
    /// A person asks for the replica to be compared with the primary's copy.
    #[serde(default)]
    pub resync: Option<ResyncRecord>,
    /// When the last scrub ended, in microseconds since 1970; before the first: when the group came
    /// to this node.
    #[serde(default)]
    pub scrubbed_at: Option<i64>,
}

/// A comparison that was asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResyncRecord {
    /// When, in microseconds since 1970.
    pub since: i64,
    /// What is there already.
    pub seeds: Vec<SeedRecord>,
}

/// What holds much of a disk's content already.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SeedRecord {
    /// The disk's name; none where the group has only one.
    pub disk: Option<String>,
    /// A file's path, or an NBD URI.
    pub from: String,
}

/// Seconds between scrubs unless said otherwise: 30 days.
#[must_use]
pub const fn scrub_every_default() -> u64 {
    30 * 24 * 3600
}

/// Where a disk's writes come from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceRecord {
    /// The disk's number in its group.
    pub disk: u32,
    /// How.
    pub source: Source,
}

/// How writes come in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Source {
    /// The server's disk is our export.
    Served,
    /// QEMU mirrors the server's disk to our export.
    Mirror {
        /// The QMP socket of the server's QEMU.
        qmp: PathBuf,
        /// The block node or device there.
        node: String,
        /// This node has made the server stand still, and lets it go on if nobody takes over.
        #[serde(default)]
        stands_still: bool,
    },
    /// An NBD export is read in passes.
    Pull {
        /// Where it is, as a person typed it.
        uri: String,
        /// Seconds from the beginning of a pass to that of the next.
        every_s: u64,
        /// The QEMU that freezes a moment for each pass and knows what has changed; none when the
        /// export itself does not change while it is read.
        qemu: Option<PulledQemu>,
        /// The last pass that came to its end.
        #[serde(default)]
        last: Option<LastPass>,
    },
}

/// The QEMU of a disk that is pulled.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PulledQemu {
    /// Its QMP socket.
    pub qmp: PathBuf,
    /// The block node or device there.
    pub node: String,
    /// A directory for what the server overwrites during a pass.
    pub scratch: PathBuf,
}

/// The end of a pass: what the disk's content in the log is equal to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LastPass {
    /// The moment's token in QEMU, if it has one.
    pub token: Option<String>,
    /// The epoch in which the pass ended: behind a failover the content is another.
    pub epoch: String,
    /// The frame with its end.
    pub frame: u64,
    /// The moment that it read, in microseconds since 1970.
    pub moment: i64,
}

/// A recovered server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecoveryRecord {
    /// A short name, unique at this node.
    pub id: String,
    /// The group's id.
    pub group: String,
    /// Whether it is a test: then it runs on a clone that is thrown away.
    pub test: bool,
    /// The epoch it writes in.
    pub epoch: String,
    /// The position it was started from, in words.
    pub point: String,
    /// When it was started, in microseconds since 1970.
    pub started_at: i64,
    /// The machine's run directory.
    pub folder: PathBuf,
    /// Whether only its disks are served, and no machine was asked for.
    #[serde(default)]
    pub only_disks: bool,
}

/// How bad an event is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Level {
    /// For the record.
    Info,
    /// Somebody should look.
    Warning,
    /// Something is not protected.
    Alert,
}

/// Something that happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EventRecord {
    /// When, in microseconds since 1970.
    pub at: i64,
    /// How bad it is.
    pub level: Level,
    /// The group's name, if it is about one.
    pub group: Option<String>,
    /// What, in one line.
    pub text: String,
}

/// The node's memory. Everything put is durable when it returns.
pub trait Fleet: Send + Sync + std::fmt::Debug {
    /// All peers.
    ///
    /// # Errors
    /// When the memory cannot be read.
    fn peers(&self) -> Result<Vec<PeerRecord>>;
    /// Adds or changes a peer.
    ///
    /// # Errors
    /// When it cannot be written.
    fn put_peer(&self, peer: &PeerRecord) -> Result<()>;
    /// Forgets a peer.
    ///
    /// # Errors
    /// When it cannot be written.
    fn remove_peer(&self, id: &str) -> Result<()>;
    /// All groups.
    ///
    /// # Errors
    /// When the memory cannot be read.
    fn groups(&self) -> Result<Vec<GroupRecord>>;
    /// Adds or changes a group.
    ///
    /// # Errors
    /// When it cannot be written.
    fn put_group(&self, group: &GroupRecord) -> Result<()>;
    /// Forgets a group.
    ///
    /// # Errors
    /// When it cannot be written.
    fn remove_group(&self, id: &str) -> Result<()>;
    /// All recoveries.
    ///
    /// # Errors
    /// When the memory cannot be read.
    fn recoveries(&self) -> Result<Vec<RecoveryRecord>>;
    /// Adds or changes a recovery.
    ///
    /// # Errors
    /// When it cannot be written.
    fn put_recovery(&self, recovery: &RecoveryRecord) -> Result<()>;
    /// Forgets a recovery.
    ///
    /// # Errors
    /// When it cannot be written.
    fn remove_recovery(&self, id: &str) -> Result<()>;
    /// Adds an event; the oldest go when there are many.
    ///
    /// # Errors
    /// When it cannot be written.
    fn add_event(&self, event: &EventRecord) -> Result<()>;
    /// The newest events, newest first.
    ///
    /// # Errors
    /// When the memory cannot be read.
    fn events(&self, most: usize) -> Result<Vec<EventRecord>>;
}
