//! The `pull` source: an NBD export is read in passes, and the end of each pass is a point.
//!
//! What is read must not change while it is read. Two ways to that:
//!
//! * *QEMU* (`--qmp`): for each pass we have the server's QEMU freeze a moment and export it, with a
//!   bitmap of what changed since the moment before ([`srn_targets::qemu::qmp::fleece`]). Only that is
//!   read.
//! * *No more than a URI*: whoever serves it promises that it shows one moment for as long as we are
//!   connected. Nothing tells what changed, so everything is read, and compared with what is held; that
//!   needs a replica.
//!
//! A bitmap that an NBD server tells of without QMP is not used: nothing in the protocol says since when
//! it marks, and whether it is still the same.
//!
//! Invariant: *only what changed is read exactly when the log's content of the disk is that of the
//! moment by whose token the bitmap is found*: the pass of that token came to its end here, in this
//! epoch, that was remembered durably, and QEMU's bitmap of that name has recorded since. Whatever came
//! to nothing behind it is marked too. In all other cases everything is read, and the reason is told.
//!
//! The server never waits for a pass: the log is never filled by one, what is not read yet stays with
//! the server, and a pass that fails is tried again. Points are its ends only
//! ([`crate::group::Landing`]).

mod pass;
mod plan;
mod qemu;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use srn_core::ids::DiskNo;
use srn_core::limits::SECTOR;
use srn_core::name::Name;
use srn_core::state::Content;
use srn_core::time::WallTime;
use srn_nbd::client::Uri;
use srn_store::manifest::Keep;
use srn_targets::qemu::qmp::fleece::{BitmapState, FleeceNames, Moment};
use tokio::task::JoinHandle;

use crate::clock;
use crate::error::{Failure, Result};
use crate::fleet::{LastPass, Level, PulledQemu, Source};
use crate::group::{Group, Landing, PassGuard, PassStatus, in_words};
use crate::node::Node;
use pass::{FOR_ROOM, Reader, connect};
use qemu::{Frozen, tidy};

/// Seconds from the beginning of a pass to that of the next, unless said otherwise.
const EVERY_DEFAULT_S: u64 = 60;

/// The longest time between two passes, in seconds: a week.
const EVERY_MAX_S: u64 = 7 * 24 * 3600;

/// The pause before a pass that failed is tried again, the first time; then twice as long each time,
const RETRY: Duration = Duration::from_secs(1);

/// up to this.
const RETRY_MAX: Duration = Duration::from_secs(60);

/// How often a task that waits looks whether it still should.
const LOOK: Duration = Duration::from_millis(200);

/// How long the daemon waits for a server's QEMU when it stops.
const STOP_PATIENCE: Duration = Duration::from_secs(5);

/// A pulled disk as a person asks for it.
#[derive(Debug)]
pub struct PullRequest {
    /// The NBD URI.
    pub uri: String,
    /// The QMP socket of the server's QEMU, and the node or device there.
    pub qmp: Option<(PathBuf, String)>,
    /// Where that QEMU puts what is overwritten during a pass.
    pub scratch: Option<PathBuf>,
    /// Seconds from pass to pass.
    pub every_s: Option<u64>,
}

/// The pulled disks of a node.
#[derive(Debug, Default)]
pub struct Pulls {
    tasks: Mutex<BTreeMap<(srn_core::ids::GroupId, DiskNo), JoinHandle<()>>>,
    /// By socket.
    monitors: Mutex<BTreeMap<PathBuf, Arc<Monitor>>>,
}

/// A QEMU's monitor, as its pulled disks share it.
#[derive(Debug, Default)]
struct Monitor {
    /// It takes one client at a time: passes come one after the other.
    turn: tokio::sync::Mutex<()>,
    /// Whether its NBD server was started for a pass that has not ended in order.
    started_nbd: AtomicBool,
}

/// Checks what a person asks for, and looks at the disk. Gives its size in bytes.
///
/// # Errors
/// What cannot be, in words; a server that cannot be reached.
pub async fn check_pull(group: &Group, request: &PullRequest) -> Result<(u64, Source)> {
    let uri = request.uri.clone();
    let parsed: Uri =
        uri.parse().map_err(|error| Failure::invalid(format!("{uri} is no NBD URI: {error}")))?;
    let every_s = request.every_s.unwrap_or(EVERY_DEFAULT_S);
    if !(1..=EVERY_MAX_S).contains(&every_s) {
        return Err(Failure::invalid("from pass to pass it is one second to one week"));
    }
    let (size, qemu) = match &request.qmp {
        Some((qmp, node)) => {
            if !parsed.export.is_empty() {
                return Err(Failure::invalid(
                    "with a QMP socket each pass has an export of its own name; leave the name out of \
                     the URI",
                ));
            }
            let scratch = request.scratch.clone().ok_or_else(|| {
                Failure::invalid(
                    "a pulled disk of QEMU needs a directory for what the server overwrites during a \
                     pass (--scratch)",
                )
            })?;
            if !scratch.is_absolute() || !scratch.is_dir() {
                return Err(Failure::invalid(format!(
                    "there is no directory {}",
                    scratch.display()
                )));
            }
            let found = super::find_disk(qmp, node).await?;
            let (qmp, node) = (qmp.clone(), node.clone());
            (found.size_bytes, Some(PulledQemu { qmp, node, scratch }))
        }
        None => {
            if group.store().keep() == Keep::Cache {
                return Err(Failure::invalid(format!(
                    "group {} keeps a local cache, which holds nothing to compare with: each pass \
                     would send the whole disk; keep a replica, or give the QMP socket of the \
                     server's QEMU, which knows what has changed",
                    group.name()
                )));
            }
            let (client, size) = super::connect_nbd(&uri).await?;
            let _ = client.disconnect().await;
            (size, None)
        }
    };
    Ok((size, Source::Pull { uri, every_s, qemu, last: None }))
}

impl Pulls {
    fn tasks(&self) -> MutexGuard<'_, BTreeMap<(srn_core::ids::GroupId, DiskNo), JoinHandle<()>>> {
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn monitor(&self, qemu: &PulledQemu) -> Arc<Monitor> {
        let mut monitors = self.monitors.lock().unwrap_or_else(PoisonError::into_inner);
        monitors.entry(qemu.qmp.clone()).or_default().clone()
    }

    /// Pulls a disk from now on.
    pub fn start(&self, group: &Arc<Group>, disk: DiskNo, source: &Source) {
        let Source::Pull { uri, every_s, qemu, .. } = source else { return };
        let Some(known) = group.catalog().disks.get(&disk).cloned() else { return };
        let Ok(parsed) = uri.parse() else {
            return group.source_state(disk, Some(format!("{uri} is no NBD URI")));
        };
        let pull = Pull {
            group: group.clone(),
            disk,
            name: known.name,
            size: known.sectors * SECTOR,
            uri: parsed,
            every: Duration::from_secs(*every_s),
            names: FleeceNames::new(&known.id.short()),
            monitor: qemu.as_ref().map(|qemu| self.monitor(qemu)),
            qemu: qemu.clone(),
        };
        group.pull_status(disk, |status| {
            (status.uri, status.every_s) = (uri.clone(), *every_s);
            status.newest = group.last_pass(disk).as_ref().map(in_words);
        });
        let task = tokio::spawn(pull.run());
        self.tasks().insert((group.id(), disk), task);
    }

    /// Ends the passes of a group, or of one disk of it, and leaves nothing of them in the server's
    /// QEMU.
    pub async fn forget(&self, group: &Group, disk: Option<DiskNo>) {
        for disk in self.end(group, disk).await {
            if let Err(Ended::Failed(why) | Ended::Closed(why)) =
                self.clear(group, disk, None).await
            {
                group.tell(
                    Level::Warning,
                    &format!("what was made for pulling it is left in a server's QEMU: {why}"),
                );
            }
        }
    }

    /// The same when the daemon stops: what changes from now on is still marked there.
    pub async fn stop(&self, groups: &[Arc<Group>]) {
        for group in groups {
            for disk in self.end(group, None).await {
                let token = group.last_pass(disk).and_then(|last| last.token);
                let cleared = self.clear(group, disk, token.as_deref());
                match tokio::time::timeout(STOP_PATIENCE, cleared).await {
                    Ok(Ok(())) => {}
                    Ok(Err(Ended::Failed(why) | Ended::Closed(why))) => {
                        log::info!("group {}: clearing up behind a pass: {why}", group.name());
                    }
                    Err(_) => log::warn!(
                        "group {}: a server's QEMU does not answer; what a pass has left there is \
                         cleared away at the next start",
                        group.name()
                    ),
                }
            }
        }
    }

    /// Ends tasks, and waits until they have.
    async fn end(&self, group: &Group, disk: Option<DiskNo>) -> Vec<DiskNo> {
        let ended: Vec<(DiskNo, JoinHandle<()>)> = {
            let mut tasks = self.tasks();
            let is = |key: &(_, DiskNo)| key.0 == group.id() && disk.is_none_or(|no| no == key.1);
            let keys: Vec<_> = tasks.keys().filter(|key| is(key)).copied().collect();
            keys.into_iter().filter_map(|key| Some((key.1, tasks.remove(&key)?))).collect()
        };
        let mut disks = Vec::new();
        for (disk, task) in ended {
            task.abort();
            let _ = task.await;
            group.copy_progress(disk, None);
            disks.push(disk);
        }
        disks
    }

    async fn clear(
        &self,
        group: &Group,
        disk: DiskNo,
        keep: Option<&str>,
    ) -> std::result::Result<(), Ended> {
        let sources = group.settings().sources;
        let source = sources.into_iter().find(|source| source.disk == disk.0);
        let Some(Source::Pull { qemu: Some(qemu), .. }) = source.map(|record| record.source) else {
            return Ok(());
        };
        let Some(known) = group.catalog().disks.get(&disk).cloned() else { return Ok(()) };
        let monitor = self.monitor(&qemu);
        let _turn = monitor.turn.lock().await;
        let stop_nbd = monitor.started_nbd.swap(false, Ordering::Relaxed);
        tidy(&qemu, &FleeceNames::new(&known.id.short()), keep, stop_nbd).await.map(drop)
    }
}

/// How a pass ended that did not come to its end.
#[derive(Debug)]
enum Ended {
    /// Something that may pass: try again.
    Failed(String),
    /// The group takes no writes: wait until it does.
    Closed(String),
}

struct Pull {
    group: Arc<Group>,
    disk: DiskNo,
    name: String,
    size: u64,
    uri: Uri,
    every: Duration,
    qemu: Option<PulledQemu>,
    names: FleeceNames,
    monitor: Option<Arc<Monitor>>,
}

/// What a pass reads, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Kind {
    First,
    Changes,
    Everything(String),
}

impl Kind {
    const fn word(&self) -> &'static str {
        match self {
            Self::First => "first",
            Self::Changes => "changes",
            Self::Everything(_) => "everything",
        }
    }
}

impl Pull {
    async fn run(self) {
        let mut failures = 0;
        let rest = self.rest();
        if !rest.is_zero() {
            // A daemon that was killed in a pass has left one open, and QEMU saves for it.
            self.clear_up().await;
        }
        let mut due = Instant::now() + rest;
        // Whether this planned failover has had its last pass.
        let mut last = false;
        loop {
            let halting = self.wait(due, last).await;
            let began = Instant::now();
            let outcome = self.pass().await;
            self.group.copy_progress(self.disk, None);
            let pause = match outcome {
                Ok(()) => {
                    failures = 0;
                    last = halting;
                    if halting {
                        self.group.halted(self.disk);
                    }
                    self.group.source_state(self.disk, None);
                    self.every.saturating_sub(began.elapsed())
                }
                Err(Ended::Closed(why)) => {
                    log::info!("group {}: disk {}: {why}", self.group.name(), self.name);
                    self.status(|status| status.pass = None);
                    RETRY
                }
                Err(Ended::Failed(why)) => {
                    log::warn!("group {}: pulling disk {}: {why}", self.group.name(), self.name);
                    self.status(|status| {
                        status.pass = None;
                        status.failed = Some(why.clone());
                    });
                    self.group
                        .source_state(self.disk, Some(format!("the last pass failed: {why}")));
                    let pause = RETRY.saturating_mul(1 << failures.min(16));
                    failures += 1;
                    pause.min(RETRY_MAX)
                }
            };
            due = Instant::now() + pause;
            let next = WallTime(clock::wall().0.saturating_add(micros(pause)));
            self.status(|status| status.next = Some(clock::rfc3339(next)));
        }
    }

    fn status(&self, change: impl FnOnce(&mut crate::group::PullStatus)) {
        self.group.pull_status(self.disk, change);
    }

    async fn clear_up(&self) {
        let (Some(qemu), Some(monitor)) = (&self.qemu, &self.monitor) else { return };
        let _turn = monitor.turn.lock().await;
        let keep = self.group.last_pass(self.disk).and_then(|last| last.token);
        if let Err(Ended::Failed(why) | Ended::Closed(why)) =
            tidy(qemu, &self.names, keep.as_deref(), false).await
        {
            log::info!("group {}: clearing up for disk {}: {why}", self.group.name(), self.name);
        }
    }

    /// Behind a restart the next pass comes when it would have come.
    fn rest(&self) -> Duration {
        let Some(last) = self.group.last_pass(self.disk) else { return Duration::ZERO };
        let age = clock::wall().0.saturating_sub(last.moment);
        let age = Duration::from_micros(u64::try_from(age).unwrap_or(0));
        self.every.saturating_sub(age)
    }

    /// Waits until a pass is due, and there may be one; or until a planned failover wants a last one.
    /// Returns whether it is that.
    async fn wait(&self, due: Instant, mut last: bool) -> bool {
        loop {
            let halting = self.group.is_halting();
            if !halting {
                last = false;
                self.group.not_halted(self.disk);
                // Also after a full log, where another source has filled it.
                if Instant::now() >= due && self.group.try_again().is_ok() {
                    let room = self.group.has_room_for_pass();
                    self.status(|status| {
                        status.waits = (!room).then(|| FOR_ROOM.to_owned());
                    });
                    if room {
                        return false;
                    }
                }
            } else if !last {
                return true;
            }
            let _ = tokio::time::timeout(LOOK, self.group.changed()).await;
            // It may be told of changes many times a second.
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    async fn pass(&self) -> std::result::Result<(), Ended> {
        let closed = |error: Failure| Ended::Closed(error.message);
        match (&self.qemu, &self.monitor) {
            (Some(qemu), Some(monitor)) => {
                let _turn = monitor.turn.lock().await;
                self.frozen(qemu, monitor).await
            }
            _ => {
                let moment = clock::wall();
                let clients = connect(&self.uri, self.size, None).await?;
                let kind = match self.content() {
                    Content::Seeding => Kind::First,
                    _ => Kind::Everything(
                        "this source has no bitmap that says what has changed".into(),
                    ),
                };
                let (landing, _guard) = self.group.begin_pass(self.disk).await.map_err(closed)?;
                let read = self.begin(&kind, moment);
                let mut reader =
                    Reader::new(&self.group, self.disk, self.size, clients, read.clone());
                reader.everything(&landing).await?;
                self.end(&landing, None, moment, &read).await?;
                reader.close().await;
                Ok(())
            }
        }
    }

    fn content(&self) -> Content {
        let catalog = self.group.catalog();
        catalog.disks.get(&self.disk).map_or(Content::Seeding, |disk| disk.content)
    }

    /// A pass over a moment that QEMU freezes.
    async fn frozen(&self, qemu: &PulledQemu, shared: &Monitor) -> std::result::Result<(), Ended> {
        let last = self.group.last_pass(self.disk);
        let here = last.as_ref().is_none_or(|last| self.is_here(last));
        let since = last.as_ref().filter(|_| here).and_then(|last| last.token.clone());
        let (monitor, node, size, state) = tidy(qemu, &self.names, since.as_deref(), false).await?;
        if size != self.size {
            return Err(Ended::Failed(format!(
                "disk {} has {size} bytes at the server and {} bytes here; remove it and add it again",
                qemu.node, self.size
            )));
        }
        let kind = match (&last, state) {
            (None, _) => Kind::First,
            (Some(_), BitmapState::Usable) => Kind::Changes,
            (Some(_), _) if !here => Kind::Everything(
                "the group was failed over or set back since the last pass, so its content is another"
                    .into(),
            ),
            (Some(_), BitmapState::Gone) => Kind::Everything(
                "the server's QEMU has no bitmap of the last pass: it was started anew, has another \
                 disk there, or the bitmap was removed"
                    .into(),
            ),
            (Some(_), BitmapState::Inconsistent) => Kind::Everything(
                "the server's QEMU has not recorded everything in the bitmap of the last pass".into(),
            ),
        };
        let since = since.filter(|_| kind == Kind::Changes);
        let token = token();
        let moment = Moment { node: &node, token: &token, since: since.as_deref() };
        let wall = clock::wall();
        let names = self.names.clone();
        let opened =
            Frozen::open(monitor.clone(), names, &moment, self.size, qemu, &self.uri).await;
        let keep = self.group.last_pass(self.disk).and_then(|last| last.token);
        let frozen = match opened {
            Ok(frozen) => frozen,
            Err(ended) => {
                // As much as can be undone now; the rest before the next pass.
                let _ = monitor.end_fleece(&self.names, false).await;
                let _ = monitor.settle_bitmaps(&self.names, &node, keep.as_deref()).await;
                return Err(ended);
            }
        };
        if frozen.started_nbd() {
            shared.started_nbd.store(true, Ordering::Relaxed);
        }
        let outcome = tokio::select! {
            outcome = self.read_frozen(&frozen, &kind, wall) => outcome,
            ended = frozen.fails() => Err(ended),
        };
        // The bitmap that counts is that of the pass that is remembered.
        let keep = self.group.last_pass(self.disk).and_then(|last| last.token);
        let closed = frozen.close(keep.as_deref()).await;
        if closed.is_ok() {
            shared.started_nbd.store(false, Ordering::Relaxed);
        }
        outcome?;
        if let Err(Ended::Failed(why) | Ended::Closed(why)) = closed {
            log::warn!("group {}: clearing up behind a pass: {why}", self.group.name());
        }
        Ok(())
    }

    async fn read_frozen(
        &self,
        frozen: &Frozen,
        kind: &Kind,
        moment: WallTime,
    ) -> std::result::Result<(), Ended> {
        let clients = connect(frozen.uri(), self.size, Some(frozen.told())).await?;
        let begun = self.group.begin_pass(self.disk).await;
        let (landing, _guard): (Arc<Landing>, PassGuard) =
            begun.map_err(|error| Ended::Closed(error.message))?;
        let read = self.begin(kind, moment);
        let mut reader = Reader::new(&self.group, self.disk, self.size, clients, read.clone());
        match kind {
            Kind::Changes => reader.changes(frozen.told(), &landing).await?,
            Kind::First | Kind::Everything(_) => reader.everything(&landing).await?,
        }
        // Until here, without a gap.
        frozen.check().await?;
        self.end(&landing, Some(frozen.token().to_owned()), moment, &read).await?;
        reader.close().await;
        Ok(())
    }

    /// Tells what the pass is.
    fn begin(&self, kind: &Kind, moment: WallTime) -> Arc<AtomicU64> {
        let reason = match kind {
            Kind::Everything(reason) => Some(reason.clone()),
            Kind::First | Kind::Changes => None,
        };
        if let Some(reason) = reason.as_ref().filter(|_| self.qemu.is_some()) {
            let how = match self.group.store().keep() {
                Keep::Replica => "read and compared",
                Keep::Cache => "read and sent",
            };
            let text = format!("all of disk {} is {how}: {reason}", self.name);
            self.group.tell(Level::Warning, &text);
        }
        self.status(|status| {
            status.next = None;
            status.pass = Some(PassStatus {
                kind: kind.word().to_owned(),
                reason,
                time: clock::rfc3339(moment),
                read: 0,
                new: 0,
            });
        });
        Arc::default()
    }

    /// Everything that it read is in the log: its end is a point, and is remembered.
    async fn end(
        &self,
        landing: &Landing,
        token: Option<String>,
        moment: WallTime,
        read: &AtomicU64,
    ) -> std::result::Result<(), Ended> {
        let position = landing.end().await.map_err(|error| Ended::Closed(error.message))?;
        let pass = LastPass {
            token,
            epoch: position.epoch.to_string(),
            frame: position.seq.0,
            moment: moment.0,
        };
        let newest = in_words(&pass);
        self.group
            .remember_pass(self.disk, pass)
            .map_err(|error| Ended::Failed(format!("remembering the pass: {error}")))?;
        let (read, new) = (read.load(Ordering::Relaxed), landing.new_bytes());
        self.status(|status| {
            status.last = status.pass.take().map(|pass| PassStatus { read, new, ..pass });
            status.newest = Some(newest);
            status.failed = None;
        });
        log::info!(
            "group {}: a pass over disk {} has ended: {read} bytes read, {new} new",
            self.group.name(),
            self.name
        );
        Ok(())
    }

    /// Whether the log goes on behind the end of that pass: nobody else has written the disk since.
    fn is_here(&self, last: &LastPass) -> bool {
        let store = self.group.store();
        last.epoch == store.epochs().current().to_string() && last.frame <= store.head().seq.0
    }
}

/// A token that no other moment has.
fn token() -> String {
    clock::random::<8>().iter().map(|byte| format!("{byte:02x}")).collect()
}

fn micros(duration: Duration) -> i64 {
    i64::try_from(duration.as_micros()).unwrap_or(i64::MAX)
}

/// Adds a pulled disk to a group.
///
/// # Errors
/// As [`check_pull`] and [`Group::add_disk`].
pub async fn add_pull(
    node: &Node,
    group: &Arc<Group>,
    name: &Name,
    sectors: u64,
    source: Source,
) -> Result<()> {
    let disk = group.add_disk(name, sectors, source.clone(), true).await?;
    node.pulls().start(group, disk, &source);
    Ok(())
}
