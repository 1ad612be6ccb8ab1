//! The `mirror` source: QEMU pushes a running server's disk into our export.
//!
//! For each disk one task drives `blockdev-mirror` in the administrator's QEMU over QMP, the way
//! that administrator would: it adds our export as a block node, starts the mirror with
//! `copy-mode=write-blocking`, takes the ready state as the mark from which every write is in our
//! log before the server hears of it, limits the background copy by the fill of the log, notices
//! when the job ends, and starts it again.
//!
//! Production comes first: the server's writes never wait for a node that is gone. The job pauses
//! and remembers what the server wrote meanwhile; when the node is back it is resumed and sends just
//! that. For a planned failover the server is made to stand still, and goes on if nobody takes over.
//! From the moment at which QEMU connects anew until both sides are equal again the disk is in
//! a resync ([`Group::mirror_connected`]): what was missed and what is new arrive in no order.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use srn_core::frame::ResyncReason;
use srn_core::ids::{DiskNo, GroupId};
use srn_core::limits::SECTOR;
use srn_core::state::Content;
use srn_targets::qemu::qmp::block::{BlockJob, BlockNode, NbdAddress, NbdNode};
use srn_targets::qemu::qmp::event::{EventError, Kind as EventKind};
use srn_targets::qemu::qmp::mirror::{MirrorEnd, MirrorJob};
use srn_targets::qemu::qmp::{Qmp, QmpError};
use tokio_util::task::AbortOnDropHandle;

use crate::error::{Failure, Kind, Result};
use crate::fleet::Level;
use crate::group::{CopyProgress, Group};
use crate::node::Node;

/// Patience with a monitor.
const PATIENCE: Duration = Duration::from_secs(5);

/// The pause before a mirror is tried again.
const RETRY: Duration = Duration::from_secs(2);

/// How often a job is looked at.
const LOOK: Duration = Duration::from_millis(500);

/// Fill of the log above which the background copy is slowed down to what the peer takes.
const FILL_SLOW: f64 = 0.5;

/// Fill of the log above which the background copy hardly moves.
const FILL_CRAWL: f64 = 0.85;

/// The slowest a background copy is set to, in bytes per second.
const SPEED_MIN: u64 = 1 << 20;

/// A limit at or above this is none, in bytes per second.
const SPEED_MAX: u64 = 4 << 30;

/// Bounds of what a background copy has under way at once, in bytes; the upper one is QEMU's own.
const BURST_MIN: u64 = 256 << 10;
const BURST_MAX: u64 = 16 << 20;

/// The mirrors of a node.
#[derive(Debug, Default)]
pub struct Mirrors {
    tasks: Mutex<BTreeMap<(GroupId, DiskNo), Running>>,
}

#[derive(Debug)]
struct Running {
    qmp: PathBuf,
    names: Names,
    _task: AbortOnDropHandle<()>,
}

/// What our job and node are called in that QEMU.
#[derive(Debug, Clone)]
struct Names {
    job: String,
    target: String,
}

/// Looks for a disk in a QEMU.
///
/// # Errors
/// [`Kind::Unreachable`] when there is no QEMU; [`Kind::NotFound`], naming the disks that there
/// are.
pub async fn find_disk(qmp: &Path, name: &str) -> Result<BlockNode> {
    let monitor = Qmp::connect(qmp, PATIENCE).await.map_err(unreachable)?;
    if let Some(found) = monitor.find_disk(name).await.map_err(unreachable)? {
        return Ok(found);
    }
    let nodes = monitor.block_nodes().await.map_err(unreachable)?;
    let known: Vec<String> = nodes.into_iter().map(|node| node.node_name).collect();
    Err(Failure::not_found(format!(
        "the QEMU at {} has no block node or device {name:?}; its nodes are: {}",
        qmp.display(),
        known.join(", ")
    )))
}

fn unreachable(error: QmpError) -> Failure {
    Failure::new(Kind::Unreachable, error.to_string())
}

impl Mirrors {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<(GroupId, DiskNo), Running>> {
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Drives the mirror of a disk from now on.
    pub fn start(
        &self,
        node: &Arc<Node>,
        group: &Arc<Group>,
        disk: DiskNo,
        qmp: PathBuf,
        device: String,
    ) {
        let Some(known) = group.catalog().disks.get(&disk).cloned() else { return };
        let short = known.id.short();
        let names = Names { job: format!("srn-{short}"), target: format!("srn-target-{short}") };
        let mirror = Mirror {
            group: group.clone(),
            disk,
            size: known.sectors * SECTOR,
            export: format!("{}/{}", group.name(), known.name),
            socket: node.nbd_socket(),
            qmp: qmp.clone(),
            device,
            names: names.clone(),
        };
        let task = tokio::spawn(mirror.run());
        let running = Running { qmp, names, _task: AbortOnDropHandle::new(task) };
        self.lock().insert((group.id(), disk), running);
    }

    /// Ends the mirrors of a group, or of one disk of it, in QEMU too: the server goes on alone. The
    /// group is kept meanwhile ([`Group::keep`]).
    pub async fn forget(&self, group: &Group, disk: Option<DiskNo>) {
        let ended: Vec<(DiskNo, Running)> = {
            let mut tasks = self.lock();
            let keys: Vec<_> = tasks
                .keys()
                .filter(|(id, no)| *id == group.id() && disk.is_none_or(|disk| disk == *no))
                .copied()
                .collect();
            keys.into_iter().filter_map(|key| Some((key.1, tasks.remove(&key)?))).collect()
        };
        for (disk, Running { qmp, names, _task }) in ended {
            drop(_task);
            if let Ok(monitor) = Qmp::connect(&qmp, PATIENCE).await {
                end_job(&monitor, &names).await;
                release(group, disk, &monitor).await;
            }
            if group.server_stands_still(disk) {
                let text = format!(
                    "the server behind {} stands still since the planned failover; where it shall \
                     go on, send it cont",
                    qmp.display()
                );
                group.tell(Level::Warning, &text);
            }
        }
    }

    /// Drives nothing any more; jobs go on for as long as QEMU waits for us, and so do servers that
    /// stood still for a failover which came to nothing.
    pub async fn stop(&self, groups: &[Arc<Group>]) {
        for group in groups {
            group.end_handovers().await;
        }
        let tasks = std::mem::take(&mut *self.lock());
        for ((id, disk), Running { qmp, _task, .. }) in tasks {
            drop(_task);
            let Some(group) = groups.iter().find(|group| group.id() == id) else { continue };
            if group.server_stands_still(disk)
                && let Ok(monitor) = Qmp::connect(&qmp, PATIENCE).await
            {
                release(group, disk, &monitor).await;
            }
        }
    }
}

/// Ends our job, if there is one, and takes our node out.
async fn end_job(monitor: &Qmp, names: &Names) {
    match monitor.end_mirror(&names.job, &names.target).await {
        Ok(MirrorEnd::Orderly | MirrorEnd::BrokenOff) => {
            log::info!("the mirror {} in the server's QEMU has ended", names.job);
        }
        Ok(MirrorEnd::Already) => {}
        Err(error) => log::warn!("cannot end the mirror {}: {error}", names.job),
    }
    let _ = monitor.blockdev_del(&names.target).await;
}

/// Lets a server go on that was made to stand still for a failover, unless that may still come
/// about, or has.
async fn let_go_on(group: &Group, disk: DiskNo, monitor: &Qmp) -> Result<()> {
    if !group.server_stands_still(disk) || !group.may_go_on() {
        return Ok(());
    }
    group.not_halted(disk);
    monitor.cont().await.map_err(unreachable)?;
    log::info!("group {}: the server of disk {} goes on", group.name(), disk.0);
    group.set_server_stands_still(disk, false)
}

/// The same, by somebody who cannot try again.
async fn release(group: &Group, disk: DiskNo, monitor: &Qmp) {
    if let Err(error) = let_go_on(group, disk, monitor).await {
        log::warn!("group {}: a server stands still: {error}", group.name());
    }
}

struct Mirror {
    group: Arc<Group>,
    disk: DiskNo,
    size: u64,
    export: String,
    socket: PathBuf,
    qmp: PathBuf,
    device: String,
    names: Names,
}

/// How one attempt ended.
enum Ended {
    /// Something that may pass: try again.
    Failed(String),
    /// The group takes no writes: wait until it does.
    Closed(String),
}

impl From<QmpError> for Ended {
    fn from(error: QmpError) -> Self {
        Self::Failed(error.to_string())
    }
}

impl Mirror {
    async fn run(self) {
        // Whether the server was shut down while it was followed, and not started again.
        let mut off = false;
        loop {
            let ended = self.follow(&mut off).await;
            if !off {
                self.group.not_halted(self.disk);
            }
            self.group.copy_progress(self.disk, None);
            let (Err(Ended::Failed(why) | Ended::Closed(why)) | Ok(why)) = ended;
            self.group.source_state(self.disk, Some(why));
            let _ = tokio::time::timeout(RETRY, self.group.changed()).await;
            // The state may be told many times a second; a mirror is not tried that often.
            tokio::time::sleep(LOOK).await;
        }
    }

    fn content(&self) -> Content {
        let catalog = self.group.catalog();
        catalog.disks.get(&self.disk).map_or(Content::Seeding, |disk| disk.content)
    }

    /// Has the mirror running, for as long as it runs. Returns why it does not.
    async fn follow(&self, off: &mut bool) -> std::result::Result<String, Ended> {
        // After a full log the group decides when there is room enough to begin anew.
        if let Err(error) = self.group.try_again() {
            // Production does not wait for a mirror that nobody listens to.
            if let Ok(monitor) = self.monitor(off).await {
                end_job(&monitor, &self.names).await;
                self.let_go_on(&monitor).await?;
            }
            return Err(Ended::Closed(error.message));
        }
        let monitor = self.monitor(off).await?;
        self.let_go_on(&monitor).await?;
        let mut events = monitor.events();
        let node = monitor.find_disk(&self.device).await?;
        let node = node.ok_or_else(|| {
            Ended::Failed(format!("the server's QEMU has no disk {} any more", self.device))
        })?;
        if node.size_bytes != self.size {
            return Err(Ended::Failed(format!(
                "disk {} has {} bytes at the server and {} bytes here; remove it and add it again",
                self.device, node.size_bytes, self.size
            )));
        }
        if !self.has_job(&monitor).await? {
            self.start(&monitor).await?;
        }
        let mut watch = Watch::new();
        self.look(&monitor, &mut watch).await?;
        loop {
            tokio::select! {
                event = events.next() => match event.map(|event| event.kind()) {
                    Ok(EventKind::JobStatus { job, status })
                        if job == self.names.job && status == "concluded" =>
                    {
                        return Ok(self.conclude(&monitor).await);
                    }
                    Ok(EventKind::JobReady { job }) if job == self.names.job => {
                        self.look(&monitor, &mut watch).await?;
                    }
                    Ok(EventKind::JobError { job, operation, .. }) if job == self.names.job => {
                        watch.failed = Some(operation);
                        watch.in_sync = false;
                        self.look(&monitor, &mut watch).await?;
                    }
                    Ok(EventKind::Shutdown { reason, .. }) => {
                        // Its writes were answered by us, or it has said that they were not.
                        *off = watch.in_sync && self.content() == Content::Clean;
                        return Ok(format!("the server was shut down ({reason})"));
                    }
                    Err(EventError::Missed(_)) => watch.in_sync = false,
                    Ok(_) | Err(EventError::Timeout(_)) => {}
                    Err(EventError::Lost(error)) => {
                        return Ok(format!("the server's QEMU is gone: {error}"));
                    }
                },
                () = tokio::time::sleep(LOOK) => self.look(&monitor, &mut watch).await?,
                () = self.group.step_is_asked() => {}
            }
            if let Err(error) = self.group.check_writable() {
                end_job(&monitor, &self.names).await;
                self.let_go_on(&monitor).await?;
                return Err(Ended::Closed(error.message));
            }
            if let Some(question) = self.group.asks_for_step(self.disk) {
                self.answer(question, &monitor, &mut watch).await?;
            }
            if self.group.is_halting() {
                self.halt(&monitor, &mut watch).await?;
            } else {
                self.let_go_on(&monitor).await?;
            }
        }
    }

    /// A server's write is done when it is done at both sides: while the job is in step, all that the
    /// server had written before it was looked at is here.
    async fn answer(
        &self,
        question: u64,
        monitor: &Qmp,
        watch: &mut Watch,
    ) -> std::result::Result<(), Ended> {
        watch.in_sync = false;
        self.look(monitor, watch).await?;
        if watch.in_sync && self.content() == Content::Clean {
            self.group.is_in_step(self.disk, question);
        }
        Ok(())
    }

    /// For a planned failover the server stands still. Once it does, and the job is in step, all that
    /// it wrote is here.
    async fn halt(&self, monitor: &Qmp, watch: &mut Watch) -> std::result::Result<(), Ended> {
        if monitor.query_status().await?.running {
            // Remembered first: after a crash it is let go on.
            let remembered = self.group.set_server_stands_still(self.disk, true);
            remembered.map_err(|error| Ended::Failed(error.message))?;
            // QEMU finishes what its guest has asked for before it answers.
            monitor.stop().await?;
            log::info!("group {}: the server of {} stands still", self.group.name(), self.export);
        }
        watch.in_sync = false;
        self.look(monitor, watch).await?;
        if watch.in_sync && self.content() == Content::Clean {
            self.group.halted(self.disk);
        } else {
            self.group.not_halted(self.disk);
        }
        Ok(())
    }

    /// A server that was made to stand still goes on, unless the group is handed over.
    async fn let_go_on(&self, monitor: &Qmp) -> std::result::Result<(), Ended> {
        let let_go = let_go_on(&self.group, self.disk, monitor).await;
        let_go.map_err(|error| Ended::Failed(error.message))
    }

    /// The server's monitor.
    async fn monitor(&self, off: &mut bool) -> std::result::Result<Qmp, Ended> {
        let found = Qmp::connect(&self.qmp, PATIENCE).await;
        match &found {
            Err(QmpError::Connect { .. }) if *off => self.group.halted(self.disk),
            _ => {
                *off = false;
                self.group.not_halted(self.disk);
            }
        }
        Ok(found?)
    }

    /// Whether there is a job of ours already, from before this daemon was started. One that has
    /// ended is cleared away.
    async fn has_job(&self, monitor: &Qmp) -> std::result::Result<bool, Ended> {
        let jobs = monitor.jobs().await?;
        let Some(job) = jobs.into_iter().find(|job| job.id == self.names.job) else {
            return Ok(false);
        };
        match job.status.as_str() {
            "running" | "ready" | "paused" | "standby" => Ok(true),
            _ => {
                end_job(monitor, &self.names).await;
                Ok(false)
            }
        }
    }

    /// The job stands still because one side failed; the server goes on. QEMU connects again only
    /// when it is asked to go on, and fails again until it has.
    async fn resume(&self, monitor: &Qmp, watch: &Watch) -> std::result::Result<(), Ended> {
        let what = match watch.failed.as_deref() {
            Some("read") => "the server's disk cannot be read",
            _ => "the server's QEMU has lost this node",
        };
        self.group.copy_progress(self.disk, None);
        self.group.source_state(self.disk, Some(format!("{what}; the mirror is being resumed")));
        monitor.block_job_resume(&self.names.job).await.map_err(Ended::from)
    }

    async fn start(&self, monitor: &Qmp) -> std::result::Result<(), Ended> {
        // What the server wrote since an earlier mirror ended is not known: all is sent anew, and
        // until that is done the newest point to recover to is the last one from before.
        if self.content() == Content::Clean {
            self.group
                .begin_resync(self.disk, ResyncReason::MirrorRestarted)
                .await
                .map_err(|error| Ended::Closed(error.message))?;
        }
        // Left over from an earlier attempt.
        let _ = monitor.blockdev_del(&self.names.target).await;
        let (group, disk) = (self.group.clone(), self.disk);
        let kept = tokio::task::spawn_blocking(move || group.keeps_content(disk)).await;
        monitor
            .blockdev_add_nbd(&NbdNode {
                node_name: self.names.target.clone(),
                address: NbdAddress::Unix(self.socket.clone()),
                export: self.export.clone(),
                // The server's writes do not wait for us.
                reconnect_delay_seconds: 0,
                // Before a whole mirror QEMU makes a target zero that takes discards. What is here is
                // to be compared, not zeroed; the price is that this job passes on no discards.
                discards: !kept.unwrap_or(false),
                tls_credentials: None,
            })
            .await?;
        let mut job = MirrorJob::follow(&self.names.job, &self.device, &self.names.target);
        job.speed = self.speed_for_room();
        // Else a small log is full before the job is looked at for the first time.
        job.buf_size = Some((self.group.log_room() / 8).clamp(BURST_MIN, BURST_MAX));
        if let Err(error) = monitor.blockdev_mirror(&job).await {
            let _ = monitor.blockdev_del(&self.names.target).await;
            return Err(error.into());
        }
        log::info!("group {}: mirroring {} into {}", self.group.name(), self.device, self.export);
        Ok(())
    }

    /// The job has ended: why, and everything of it cleared away.
    async fn conclude(&self, monitor: &Qmp) -> String {
        let jobs = monitor.jobs().await.unwrap_or_default();
        let error = jobs.into_iter().find(|job| job.id == self.names.job).and_then(|job| job.error);
        end_job(monitor, &self.names).await;
        match error {
            Some(error) => format!("the mirror ended: {error}"),
            None => "the mirror was ended at the server".into(),
        }
    }

    /// Looks at the job: progress, speed, and whether it follows the server now.
    async fn look(&self, monitor: &Qmp, watch: &mut Watch) -> std::result::Result<(), Ended> {
        // Counted before the job is asked: if QEMU connects anew in between, the answer is stale.
        let connections = self.group.mirror_connections(self.disk).await;
        let jobs = monitor.block_jobs().await?;
        let Some(job) = jobs.into_iter().find(|job| job.id == self.names.job) else {
            return Ok(());
        };
        // A job pauses for a moment for many a reason; only this one lasts.
        if job.io_status != "ok" {
            return self.resume(monitor, watch).await;
        }
        self.group.source_state(self.disk, None);
        watch.in_sync = job.is_in_sync();
        if job.is_in_sync() {
            self.group.copy_progress(self.disk, None);
            // Everything that was copied, and every write since, has been answered by us, so it is
            // in the log before this mark.
            let now = self.group.mirror_in_sync(self.disk, connections);
            if now.await.map_err(|error| Ended::Closed(error.message))? {
                log::info!("group {}: {} is in step", self.group.name(), self.export);
            }
        } else {
            let rate = watch.rate(job.offset);
            let progress = CopyProgress { done: job.offset, total: job.len, rate };
            let shown = (!job.ready || self.content() != Content::Clean).then_some(progress);
            self.group.copy_progress(self.disk, shown);
        }
        self.set_speed(monitor, &job, watch).await;
        Ok(())
    }

    /// The speed at which a background copy takes no more than a quarter of the log's room before it
    /// is looked at again; 0 for no limit.
    fn speed_for_room(&self) -> u64 {
        let looks = 1000 / u64::try_from(LOOK.as_millis()).unwrap_or(1000);
        let speed = (self.group.log_room() / 4).saturating_mul(looks).max(SPEED_MIN);
        if speed >= SPEED_MAX { 0 } else { speed }
    }

    /// The fuller the log, the slower the background copy: the server's own writes come first.
    async fn set_speed(&self, monitor: &Qmp, job: &BlockJob, watch: &mut Watch) {
        let fill = self.group.log_fill();
        let drained = watch.drain(self.group.content_sent());
        let speed = if job.ready || fill < FILL_SLOW {
            self.speed_for_room()
        } else if fill < FILL_CRAWL {
            drained.max(SPEED_MIN)
        } else {
            SPEED_MIN
        };
        // A tenth more or less is not worth a command.
        let same = if speed == 0 || job.speed == 0 {
            speed == job.speed
        } else {
            speed.abs_diff(job.speed) * 10 < speed
        };
        if !same && monitor.block_job_set_speed(&self.names.job, speed).await.is_ok() {
            log::debug!("{}: background copy limited to {speed} B/s (0: unlimited)", self.export);
        }
    }
}

/// What is known of a job from earlier looks.
struct Watch {
    copied: Rate,
    sent: Rate,
    /// What failed last: `read` or `write`.
    failed: Option<String>,
    /// Whether it followed the server when it was looked at last, and has not failed since.
    in_sync: bool,
}

impl Watch {
    fn new() -> Self {
        Self { copied: Rate::default(), sent: Rate::default(), failed: None, in_sync: false }
    }

    fn rate(&mut self, copied: u64) -> u64 {
        self.copied.next(copied)
    }

    fn drain(&mut self, sent: u64) -> u64 {
        self.sent.next(sent)
    }
}

/// A rate, smoothed.
#[derive(Default)]
struct Rate {
    last: Option<(Instant, u64)>,
    per_second: f64,
}

impl Rate {
    fn next(&mut self, value: u64) -> u64 {
        let now = Instant::now();
        if let Some((at, before)) = self.last {
            let seconds = now.duration_since(at).as_secs_f64();
            if seconds > 0.05 {
                let rate = value.saturating_sub(before) as f64 / seconds;
                self.per_second =
                    if self.per_second == 0.0 { rate } else { 0.7 * self.per_second + 0.3 * rate };
                self.last = Some((now, value));
            }
        } else {
            self.last = Some((now, value));
        }
        self.per_second as u64
    }
}
