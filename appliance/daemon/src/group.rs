//! A protection group as this node runs it: its store, its engine, its side of the link, its
//! sources and its exports.

mod branches;
mod breaker;
mod checkpoint;
pub mod effort;
pub mod engine;
mod equal;
mod export;
mod following;
mod handover;
mod incoming;
pub mod integrity;
mod lag;
mod maintainer;
mod mirrored;
mod outgoing;
mod pulled;
mod pump;
mod quiesce;
mod resync;
mod retention;
mod room;
mod schedule;
mod session;
mod share;
mod status;
mod synchronous;
mod takeover;
mod watch;
mod ways_out;

pub use branches::BranchStatus;
pub use equal::Held;
pub use export::{DiskExport, ReadOnlyExport, Slot, Slots};
pub use following::Reversal;
pub use handover::Kept;
pub use pulled::{Landing, PassGuard, PassStatus, PullStatus, in_words};
pub use quiesce::{QuiesceStatus, Quiet, check_limit, thaw_all, thaw_broken};
pub use resync::ResyncStatus;
pub use retention::{PointFate, PolicyChange, RetentionStatus};
pub use schedule::{ScheduleStatus, ScheduledTime};
pub use status::{CheckpointStatus, DiskStatus, GroupStatus, LinkStatus, LogStatus, UpkeepStatus};
pub use synchronous::SyncStatus;
pub use ways_out::EpochStatus;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock};
use std::time::Duration;

use srn_core::epoch::Position;
use srn_core::frame::ResyncReason;
use srn_core::ids::{DiskId, DiskNo, EpochId, GroupId, NodeId, Seq};
use srn_core::name::Name;
use srn_core::state::{Cause, State};
use srn_store::catalog::Catalog;
use srn_store::group::{Appender, Change, Group as Store, Opened, Options, OwnedRecord};
use srn_store::manifest::{Fence, Keep, Role};
use tokio::sync::{Notify, oneshot};

use crate::clock;
use crate::context::Context;
use crate::error::{Failure, Kind, Result};
use crate::fleet::{GroupRecord, IsolatedStart, Level, Source, SourceRecord};
use engine::{Client, Closed, Done, Engine, Op};
use handover::Handover;
use lag::Lag;
use maintainer::Maintainer;
use takeover::FENCED;
use watch::{GroupSlot, Watch};

/// How long somebody waits for room in a full log before they are told that there is none.
const NO_ROOM_PATIENCE: Duration = Duration::from_secs(1);

/// A running group.
#[derive(Debug)]
pub struct Group {
    context: Context,
    id: GroupId,
    record: Mutex<GroupRecord>,
    store: Arc<Store>,
    engine: RwLock<Arc<Engine>>,
    maintainer: Maintainer,
    lag: Mutex<Lag>,
    side: Mutex<Side>,
    facts: Mutex<Facts>,
    /// Signals that something about the group changed.
    changed: Notify,
    counters: Counters,
    /// Held while a fence is put up or taken down.
    fencing: tokio::sync::Mutex<()>,
    /// Held while an offer of the peer is judged, and while this node takes over from it.
    offers: Arc<tokio::sync::Mutex<()>>,
    /// Held while a recovery is begun, until it is known by its name.
    pub(crate) recovering: tokio::sync::Mutex<()>,
    /// Who has the exports of this group open.
    pub(crate) slots: Slots,
    /// What was decided of late about what is kept of the history.
    keeping: Mutex<retention::Keeping>,
    /// The group is being deleted: its settings are not written any more.
    forgotten: AtomicBool,
    /// Looking at whether what is held here is what it should be.
    integrity: integrity::Integrity,
    /// How often a mirror has opened each disk. Held while it is decided what that means.
    mirror_connections: tokio::sync::Mutex<std::collections::BTreeMap<DiskNo, u64>>,
    /// Whether what each disk's mirror sends is to be compared with what is held.
    comparing: mirrored::Comparing,
    /// Bringing a secondary up to date without frames.
    resync: resync::Resync,
    /// Checkpoints that are due by the calendar.
    scheduling: schedule::Scheduling,
    /// Checkpoints for which applications are made quiet.
    quiescing: quiesce::Quiescing,
}

/// This node's side of replicating the group.
#[derive(Debug)]
enum Side {
    /// No session with the peer.
    Apart,
    /// We send.
    Outgoing(outgoing::Outgoing),
    /// We receive.
    Incoming(incoming::Incoming),
}

/// What decides the state besides log and link.
#[derive(Debug, Default)]
struct Facts {
    /// The store or the sources ended protection.
    failure: Option<(Cause, String)>,
    /// The log is full, and why.
    full: Option<String>,
    /// The engine waits for room: since when, and why. The log may be full, or its maintenance just
    /// behind.
    stalled: Option<(String, srn_core::time::Mono)>,
    /// When it last waited.
    stalled_at: Option<srn_core::time::Mono>,
    /// Sources that are not running, and why; by disk number.
    sources: std::collections::BTreeMap<u32, String>,
    /// Sources' progress of initial replication or resync.
    progress: std::collections::BTreeMap<u32, CopyProgress>,
    /// What people are told of pulled disks; by disk number.
    pulls: std::collections::BTreeMap<u32, PullStatus>,
    /// Since when the group is not safe.
    unsafe_since: Option<srn_core::time::WallTime>,
    last_state: Option<(State, Cause)>,
    last_disk_states: std::collections::BTreeMap<DiskNo, State>,
    /// How far this primary is in a planned failover.
    handover: Handover,
    /// Who does not want it to be handed over now.
    kept: u32,
    /// Whether this node has become primary is not known: the medium failed in the middle.
    fork_uncertain: bool,
    /// What the peer has offered although this node is primary.
    offered: Option<following::Offered>,
    /// The session in which the peer has said that it is secondary too.
    no_primary: Option<u64>,
    /// Mirrored disks whose servers write nothing now, and all that they wrote is here.
    halted: std::collections::BTreeSet<DiskNo>,
    /// At start without the peer: exports stay closed until it has been heard.
    waiting_for_peer: bool,
    last_checkpoint: Option<srn_core::time::Mono>,
    /// History that is to be given up and is still there, and why it does not go.
    upkeep: UpkeepStatus,
    /// Whether answers wait for the peer.
    synchronous: synchronous::Remembered,
    /// The node is stopping: what changes now is no news.
    silent: bool,
}

/// How far a copy is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CopyProgress {
    /// Bytes done.
    pub done: u64,
    /// Bytes in all.
    pub total: u64,
    /// Bytes per second of late.
    pub rate: u64,
}

#[derive(Debug, Default)]
struct Counters {
    content_written: AtomicU64,
    content_sent: AtomicU64,
    wire_sent: AtomicU64,
    wire_received: AtomicU64,
    frames_sent_again: AtomicU64,
    highest_sent: AtomicU64,
}

/// The ends of clones that were found when a group was opened.
pub type Clones = Vec<(EpochId, Appender)>;

/// A new group at its primary.
#[derive(Debug, Clone)]
pub struct NewGroup {
    /// Its name.
    pub name: Name,
    /// Its peer.
    pub peer: Option<NodeId>,
    /// What is kept here.
    pub keep: Keep,
    /// Its settings.
    pub record: GroupRecord,
}

impl Group {
    /// Makes a new group of which this node is primary.
    ///
    /// # Errors
    /// Storage failures; settings that cannot be.
    pub fn create(context: &Context, new: NewGroup) -> Result<Arc<Self>> {
        let id = GroupId(clock::random());
        let mut record = new.record;
        record.id = id.to_string();
        record.name = new.name.to_string();
        let new = srn_store::group::NewGroup {
            group: id,
            name: record.name.clone(),
            role: Role::Primary,
            keep: new.keep,
            epoch: EpochId::new(1, clock::random()),
            now: clock::now(),
        };
        Self::make(context, record, &new)
    }

    /// Makes the replica of a group that a peer offers.
    ///
    /// # Errors
    /// Storage failures.
    pub fn create_replica(
        context: &Context,
        id: GroupId,
        first_epoch: EpochId,
        record: GroupRecord,
    ) -> Result<Arc<Self>> {
        let new = srn_store::group::NewGroup {
            group: id,
            name: record.name.clone(),
            role: Role::Secondary,
            keep: Keep::Replica,
            epoch: first_epoch,
            now: clock::now(),
        };
        Self::make(context, record, &new)
    }

    /// Makes a group, or leaves nothing of it.
    fn make(
        context: &Context,
        record: GroupRecord,
        new: &srn_store::group::NewGroup,
    ) -> Result<Arc<Self>> {
        let dir = context.group_dir(&record.id);
        let was_there = dir.exists();
        let made = Store::create(context.store(), options(context, &record), &dir, new)
            .map_err(Failure::from)
            .and_then(|opened| {
                context.fleet().put_group(&record)?;
                Ok(opened)
            });
        if made.is_err() && !was_there {
            let _ = std::fs::remove_dir_all(&dir);
        }
        Self::run(context, record, made?).map(|(group, _)| group)
    }

    /// Opens a group that is there.
    ///
    /// Gives also the ends of its clones.
    ///
    /// # Errors
    /// Storage failures.
    pub fn open(context: &Context, record: GroupRecord) -> Result<(Arc<Self>, Clones)> {
        let dir = context.group_dir(&record.id);
        let opened = Store::open(context.store(), options(context, &record), &dir, clock::now())?;
        if opened.rewritten > 0 {
            log::info!(
                "group {}: {} frames at the end of the log were written again, as nothing proved \
                 them durable",
                record.name,
                opened.rewritten
            );
        }
        Self::run(context, record, opened)
    }

    fn run(context: &Context, record: GroupRecord, opened: Opened) -> Result<(Arc<Self>, Clones)> {
        let Opened { group: store, main, clones, .. } = opened;
        let name = record.name.clone();
        let (role, fence) = store.role();
        let waits = role == Role::Primary
            && record.peer.is_some()
            && record.isolated_start == IsolatedStart::Wait;
        let mut lag = Lag::default();
        let (head, acked) = (store.head(), store.acked());
        if role == Role::Primary && acked < head.seq && acked > Seq::ZERO {
            lag.inherited(head.seq, store.unacked_bytes(), clock::mono());
        }
        let integrity = integrity::Integrity::load(&store);
        let slot = Arc::new(OnceLock::new());
        let thread = |error| Failure::internal(format!("starting a thread: {error}"));
        let watch = Box::new(Watch { group: slot.clone() });
        let engine = Engine::start(&name, main, watch).map_err(thread)?;
        let maintainer = Maintainer::start(&name, store.clone(), slot.clone()).map_err(thread)?;
        let this = Arc::new(Self {
            context: context.clone(),
            id: store.id(),
            record: Mutex::new(record),
            store,
            engine: RwLock::new(Arc::new(engine)),
            maintainer,
            lag: Mutex::new(lag),
            side: Mutex::new(Side::Apart),
            facts: Mutex::new(Facts { waiting_for_peer: waits, ..Facts::default() }),
            changed: Notify::new(),
            counters: Counters::default(),
            fencing: tokio::sync::Mutex::default(),
            offers: Arc::default(),
            recovering: tokio::sync::Mutex::default(),
            slots: Slots::default(),
            keeping: Mutex::default(),
            forgotten: AtomicBool::new(false),
            integrity,
            mirror_connections: tokio::sync::Mutex::default(),
            comparing: mirrored::Comparing::default(),
            resync: resync::Resync::default(),
            scheduling: schedule::Scheduling::default(),
            quiescing: quiesce::Quiescing::default(),
        });
        // Set once, here.
        let _ = slot.set(Arc::downgrade(&this));
        if fence.is_some() {
            this.engine().close(FENCED);
        }
        // Before anything can be written.
        this.review_synchronous();
        Ok((this, clones))
    }

    /// The group's id.
    #[must_use]
    pub const fn id(&self) -> GroupId {
        self.id
    }

    /// The group's name.
    #[must_use]
    pub fn name(&self) -> String {
        self.record().name.clone()
    }

    /// The settings as they are now.
    #[must_use]
    pub fn settings(&self) -> GroupRecord {
        self.record().clone()
    }

    /// The store.
    #[must_use]
    pub const fn store(&self) -> &Arc<Store> {
        &self.store
    }

    /// The engine of the main line.
    #[must_use]
    pub fn engine(&self) -> Arc<Engine> {
        self.engine.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn record(&self) -> MutexGuard<'_, GroupRecord> {
        self.record.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn side(&self) -> MutexGuard<'_, Side> {
        self.side.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn facts(&self) -> MutexGuard<'_, Facts> {
        self.facts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lag(&self) -> MutexGuard<'_, Lag> {
        self.lag.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The peer, if the group has one.
    #[must_use]
    pub fn peer(&self) -> Option<NodeId> {
        self.record().peer.as_ref().and_then(|peer| peer.parse().ok())
    }

    fn record_has_peer(&self) -> bool {
        self.record().peer.is_some()
    }

    /// This node's part.
    #[must_use]
    pub fn role(&self) -> Role {
        self.store.role().0
    }

    /// Whether this node has taken over from its peer.
    #[must_use]
    pub fn has_failed_over(&self) -> bool {
        self.role() == Role::Primary && self.store.epochs().list().len() > 1
    }

    /// Whether this node has taken over from its peer, and that has not followed since.
    #[must_use]
    pub fn awaits_reversal(&self) -> bool {
        self.has_failed_over() && self.store.acked() == Seq::ZERO
    }

    /// The fence, if there is one.
    #[must_use]
    pub fn fence(&self) -> Option<Fence> {
        self.store.role().1
    }

    /// Waits until something about the group may have changed.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }

    /// Changes the settings, durably.
    ///
    /// # Errors
    /// When they cannot be written.
    pub fn change_settings(&self, change: impl FnOnce(&mut GroupRecord)) -> Result<()> {
        let mut record = self.record();
        if self.forgotten.load(Ordering::Relaxed) {
            return Err(Failure::conflict(format!("group {} is being deleted", record.name)));
        }
        let mut next = record.clone();
        change(&mut next);
        self.context.fleet().put_group(&next)?;
        *record = next;
        drop(record);
        self.review_synchronous();
        self.maintainer.wake();
        self.changed.notify_waiters();
        Ok(())
    }

    /// Removes the settings from the node's memory; they are not written again.
    ///
    /// # Errors
    /// When that cannot be written.
    pub fn forget_settings(&self) -> Result<()> {
        let record = self.record();
        self.context.fleet().remove_group(&record.id)?;
        // Read under the same lock.
        self.forgotten.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// The disks at the head.
    #[must_use]
    pub fn catalog(&self) -> Catalog {
        self.store.catalog()
    }

    /// The disk of this name.
    ///
    /// # Errors
    /// [`Kind::NotFound`], naming those that there are.
    pub fn disk(&self, name: &str) -> Result<(DiskNo, srn_store::catalog::CatalogDisk)> {
        let catalog = self.catalog();
        catalog.by_name(name).map(|(no, disk)| (no, disk.clone())).ok_or_else(|| {
            let known: Vec<&str> = catalog.disks.values().map(|disk| disk.name.as_str()).collect();
            Failure::not_found(format!(
                "group {} has no disk {name:?}; it has: {}",
                self.name(),
                if known.is_empty() { "none".into() } else { known.join(", ") }
            ))
        })
    }

    /// The failure of whoever wants to add a disk of a name that is taken.
    #[must_use]
    pub fn has_disk(&self, name: &Name) -> Failure {
        Failure::conflict(format!(
            "group {} has a disk {name} already; choose another name, or remove that disk first",
            self.name()
        ))
    }

    /// The group serves although its peer was not heard of, as its settings say now.
    pub fn stop_waiting(&self) {
        self.facts().waiting_for_peer = false;
        self.changed.notify_waiters();
        self.review();
    }

    /// Whether writes may be taken here now.
    ///
    /// # Errors
    /// [`Kind::Refused`] with the reason and the way out.
    pub fn check_writable(&self) -> Result<()> {
        let name = self.name();
        let (role, fence) = self.store.role();
        if role == Role::Secondary {
            return Err(Failure::refused(format!(
                "this node is the recovery node of group {name}; its disks are written at the \
                 production node"
            )));
        }
        if let Some(fence) = fence {
            let way_out = if fence.cause == Cause::Handover {
                format!(
                    "it goes on when the recovery node says that it has not taken over (when that \
                     node is lost for good: srn group resume {name} --yes-not-taken-over)"
                )
            } else {
                format!(
                    "nothing is written here any more (to let this node follow its peer: srn group \
                     reverse {name})"
                )
            };
            return Err(Failure::refused(format!(
                "group {name} is fenced since {}: {}; {way_out}",
                clock::rfc3339(fence.since),
                fence.cause
            )));
        }
        let facts = self.facts();
        if facts.handover == Handover::Draining {
            return Err(Failure::refused(format!(
                "group {name} is being drained for a planned failover"
            )));
        }
        if facts.waiting_for_peer {
            return Err(Failure::refused(format!(
                "group {name} waits for its peer before it serves (on-isolated-start = wait); \
                 restore the link, or serve without it: srn group set {name} \
                 --on-isolated-start serve"
            )));
        }
        drop(facts);
        match self.engine().closed() {
            Some(why) => Err(Failure::new(Kind::Storage, format!("group {name}: {why}"))),
            None => Ok(()),
        }
    }

    async fn append(&self, records: Vec<OwnedRecord>) -> Result<Position> {
        let changes = records.into_iter().map(Change::Record).collect();
        let appended = self.engine().append(changes).await;
        appended.map_err(|closed| {
            Failure::new(Kind::Refused, format!("group {}: {closed}", self.name()))
        })
    }

    /// Appends what somebody waits for: when the log is full it is refused, and never done later.
    async fn append_now(&self, records: Vec<OwnedRecord>) -> Result<Position> {
        let client = Arc::new(Client::default());
        let (done, mut told) = oneshot::channel();
        let engine = self.engine();
        engine.submit_one(Op {
            client: Some(client.clone()),
            changes: records.into_iter().map(Change::Record).collect(),
            bytes: 0,
            done: Done::Task(done),
        });
        let closed = |closed: Closed| Failure::refused(format!("group {}: {closed}", self.name()));
        loop {
            // Room is looked for several times in this time.
            if let Ok(answer) = tokio::time::timeout(NO_ROOM_PATIENCE, &mut told).await {
                let gone = |_| Err(Closed("the log was closed".into()));
                return answer.unwrap_or_else(gone).map_err(closed);
            }
            // Whoever looks otherwise may be the one that waits here.
            self.look_for_room();
            let Some(why) = self.facts().full.clone() else { continue };
            client.leave();
            engine.settled().await;
            // It is in the log by now, or never will be.
            return match told.await {
                Ok(answer) => answer.map_err(closed),
                Err(_) => Err(Failure::new(
                    Kind::Storage,
                    format!("group {}: {why}; nothing was done, make room first", self.name()),
                )),
            };
        }
    }

    /// Adds a disk. Where `fills` is set its initial replication is yet to come.
    ///
    /// # Errors
    /// [`Kind::Conflict`] when the name is taken; [`Kind::Invalid`] for a source that cannot be;
    /// [`Kind::Storage`] when there is no room.
    pub async fn add_disk(
        self: &Arc<Self>,
        name: &Name,
        sectors: u64,
        source: Source,
        fills: bool,
    ) -> Result<DiskNo> {
        self.check_writable()?;
        let _kept = self.keep()?;
        let catalog = self.catalog();
        if catalog.by_name(name.as_str()).is_some() {
            return Err(self.has_disk(name));
        }
        if source == Source::Served && self.store.keep() == Keep::Cache {
            return Err(Failure::invalid(format!(
                "group {} keeps a local cache, which holds no copy to serve; \
                 a served disk needs a group that keeps a replica",
                self.name()
            )));
        }
        let disk = DiskNo(catalog.next_disk);
        let id = DiskId(clock::random());
        let mut records = vec![OwnedRecord::DiskAdd(disk, id, sectors, name.clone())];
        if fills {
            // Until initial replication has ended there is nothing to recover.
            records.push(OwnedRecord::ResyncBegin(disk, ResyncReason::Seeding));
        }
        // First, as it can fail too; of a disk that does not come to be it means nothing.
        self.change_settings(|record| {
            record.sources.retain(|source| source.disk != disk.0);
            record.sources.push(SourceRecord { disk: disk.0, source });
        })?;
        self.append_now(records).await?;
        self.context.event(Level::Info, Some(&self.name()), &format!("disk {name} was added"));
        Ok(disk)
    }

    /// Takes a disk out of the group.
    ///
    /// # Errors
    /// When it does not exist, or nothing can be appended.
    pub async fn remove_disk(&self, name: &str) -> Result<DiskNo> {
        self.check_writable()?;
        let (disk, _) = self.disk(name)?;
        self.append_now(vec![OwnedRecord::DiskRemove(disk)]).await?;
        let forgotten =
            self.change_settings(|record| record.sources.retain(|source| source.disk != disk.0));
        if let Err(error) = forgotten {
            // The disk is gone, and its number is never used again.
            log::error!("group {}: forgetting a disk's source: {error}", self.name());
        }
        self.context.event(Level::Info, Some(&self.name()), &format!("disk {name} was removed"));
        Ok(disk)
    }

    /// Runs something that may wait for the disk.
    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> srn_store::Result<T> + Send + 'static,
    ) -> Result<T> {
        match tokio::task::spawn_blocking(work).await {
            Ok(result) => result.map_err(Failure::from),
            Err(error) => Err(Failure::internal(format!("a task ended: {error}"))),
        }
    }

    /// A source is not running (`Some`, with the reason) or is running again.
    pub fn source_state(&self, disk: DiskNo, why: Option<String>) {
        let mut facts = self.facts();
        match why {
            Some(why) => {
                facts.sources.insert(disk.0, why);
            }
            None => {
                facts.sources.remove(&disk.0);
            }
        }
        drop(facts);
        self.review();
    }

    /// How far a source's copy is; none when no copy is under way.
    pub fn copy_progress(&self, disk: DiskNo, progress: Option<CopyProgress>) {
        let mut facts = self.facts();
        match progress {
            Some(progress) => {
                facts.progress.insert(disk.0, progress);
            }
            None => {
                facts.progress.remove(&disk.0);
            }
        }
    }

    /// Content sent to the peer since the daemon was started, in bytes.
    #[must_use]
    pub fn content_sent(&self) -> u64 {
        self.counters.content_sent.load(Ordering::Relaxed)
    }

    /// Once a second: checkpoints that are due, words to the peer, states.
    pub async fn tick(self: &Arc<Self>) {
        self.look_for_room();
        self.expire_branches().await;
        self.periodic_checkpoint().await;
        self.thaw_what_is_left();
        self.run_schedules();
        self.offer_again().await;
        self.tell_progress();
        self.look_after_integrity();
        self.tidy_resync();
        self.review();
    }

    /// Writes an event down.
    pub fn tell(&self, level: Level, text: &str) {
        self.context.event(level, Some(&self.name()), text);
    }

    /// The node is stopping: from here on no change of state is told.
    pub fn fall_silent(&self) {
        self.facts().silent = true;
    }

    /// Stops everything of the group. Blocks until its threads have ended.
    pub fn shut_down(&self) {
        self.end_stream();
        *self.side() = Side::Apart;
        self.forget_resync();
        let _ = self.engine().stop("the node is stopping");
        self.maintainer.stop();
    }
}

fn options(context: &Context, record: &GroupRecord) -> Options {
    let segment_bytes = context.config().segment_bytes;
    Options {
        segment_bytes,
        cap_bytes: record.log_cap_bytes.max(3 * segment_bytes),
        ..Options::default()
    }
}
