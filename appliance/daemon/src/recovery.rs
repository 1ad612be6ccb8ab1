//! Recovered servers: a point of a group becomes a running machine on this host.
//!
//! * A *test failover* runs on a writable clone of a point; replication goes on meanwhile, and
//!   everything is thrown away afterwards.
//! * A *failover* ends the reign of the production node: this node goes on in a new epoch from the
//!   point, and the machine writes to the group itself.
//!
//! Nothing is copied: the machine's disks are exports of this node. The machine lives independently
//! of the daemon; while that restarts, QEMU waits for its disks.

mod damage;
mod machine;
mod start;

pub use start::{RecoveryRequest, SignRequest};

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use srn_core::epoch::Position;
use srn_core::ids::{EpochId, GroupId};
use srn_core::time::{Mono, WallTime};
use srn_store::StoreError;
use srn_store::group::Appender;
use srn_targets::qemu::run::{Machine, Status};

use crate::clock;
use crate::context::Context;
use crate::error::{Failure, Result};
use crate::fleet::{Level, RecoveryRecord};
use crate::group::Group;
use crate::group::engine::{Engine, Watcher};
use crate::node::Node;

/// Bytes of each serial log that are kept.
const SERIAL_KEEP: u64 = 16 << 20;

/// The recovered servers of a node.
#[derive(Debug)]
pub struct Recoveries {
    context: Context,
    all: Mutex<BTreeMap<String, Arc<Recovery>>>,
    /// Held while a name is chosen for a recovery, until it is in `all`.
    naming: Mutex<()>,
    /// Ends of clones found at start, until their recoveries claim them.
    clones: Mutex<Vec<(Arc<Group>, EpochId, Appender)>>,
    accelerator: tokio::sync::OnceCell<srn_targets::qemu::accel::Verdict>,
}

/// A recovered server.
#[derive(Debug)]
struct Recovery {
    record: RecoveryRecord,
    group: Arc<Group>,
    /// A clone's own engine; none for a failover, which writes through the group's.
    clone: Mutex<Option<Arc<Engine>>>,
    /// The names of its exports.
    exports: Vec<String>,
    progress: Mutex<Progress>,
    machine: tokio::sync::Mutex<Option<Arc<Machine>>>,
}

/// How far a recovery is.
#[derive(Debug, Clone)]
struct Progress {
    phase: Phase,
    asked: Mono,
    started_after_us: Option<u64>,
    answered_after_us: Option<u64>,
    answer: Option<String>,
    problem: Option<String>,
    serial_log: Option<PathBuf>,
    firmware: Option<String>,
}

/// Where a recovery stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// Its disks are served; nobody was asked to start a machine.
    Served,
    /// Being prepared.
    Starting,
    /// The machine runs.
    Running,
    /// The machine has answered.
    Answered,
    /// The machine has ended by itself.
    Ended,
    /// It could not be started.
    Failed,
}

/// A recovered server as people see it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RecoveryStatus {
    /// Its name.
    pub id: String,
    /// The group.
    pub group: String,
    /// Whether it is a test.
    pub test: bool,
    /// Where it stands.
    pub phase: Phase,
    /// What it was started from.
    pub point: String,
    /// When, in RFC 3339.
    pub started_at: String,
    /// Seconds from the command until the machine ran.
    pub started_after_s: Option<f64>,
    /// Seconds from the command until it answered.
    pub answered_after_s: Option<f64>,
    /// What it answered.
    pub answer: Option<String>,
    /// What went wrong.
    pub problem: Option<String>,
    /// What it writes on its serial port.
    pub serial_log: Option<PathBuf>,
    /// BIOS or UEFI, and why.
    pub firmware: Option<String>,
    /// Its disks as exports.
    pub exports: Vec<String>,
}

impl Recovery {
    fn progress(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn failed(&self, error: &Failure) {
        let mut progress = self.progress();
        progress.phase = Phase::Failed;
        progress.problem = Some(error.message.clone());
    }

    fn status(&self) -> RecoveryStatus {
        let progress = self.progress().clone();
        let seconds = |us: u64| us as f64 / 1e6;
        RecoveryStatus {
            id: self.record.id.clone(),
            group: self.group.name(),
            test: self.record.test,
            phase: progress.phase,
            point: self.record.point.clone(),
            started_at: clock::rfc3339(WallTime(self.record.started_at)),
            started_after_s: progress.started_after_us.map(seconds),
            answered_after_s: progress.answered_after_us.map(seconds),
            answer: progress.answer,
            problem: progress.problem,
            serial_log: progress.serial_log,
            firmware: progress.firmware,
            exports: self.exports.clone(),
        }
    }
}

impl Recoveries {
    /// None yet.
    #[must_use]
    pub fn new(context: &Context) -> Self {
        Self {
            context: context.clone(),
            all: Mutex::default(),
            naming: Mutex::default(),
            clones: Mutex::default(),
            accelerator: tokio::sync::OnceCell::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Recovery>>> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Clones that were found when a group was opened.
    pub fn inherit(&self, group: &Arc<Group>, clones: Vec<(EpochId, Appender)>) {
        let mut kept = self.clones.lock().unwrap_or_else(PoisonError::into_inner);
        kept.extend(clones.into_iter().map(|(id, appender)| (group.clone(), id, appender)));
    }

    /// The recovered servers that run from a group.
    #[must_use]
    pub fn of_group(&self, group: GroupId) -> Vec<String> {
        let all = self.lock();
        let of_group = all.values().filter(|recovery| recovery.group.id() == group);
        of_group.map(|recovery| recovery.record.id.clone()).collect()
    }

    /// The machines that run from a group's newest state, tests aside.
    #[must_use]
    pub fn machines_of(&self, group: GroupId) -> Vec<String> {
        self.real(group, |phase| !matches!(phase, Phase::Served | Phase::Ended | Phase::Failed))
    }

    /// Recoveries of a group without a machine, tests aside.
    #[must_use]
    pub fn disks_of(&self, group: GroupId) -> Vec<String> {
        self.real(group, |phase| matches!(phase, Phase::Served | Phase::Ended | Phase::Failed))
    }

    fn real(&self, group: GroupId, is: impl Fn(Phase) -> bool) -> Vec<String> {
        let all = self.lock();
        let found = all.values().filter(|recovery| {
            !recovery.record.test && recovery.group.id() == group && is(recovery.progress().phase)
        });
        found.map(|recovery| recovery.record.id.clone()).collect()
    }

    /// All of them, as people see them.
    #[must_use]
    pub fn statuses(&self, _node: &Node) -> Vec<RecoveryStatus> {
        self.lock().values().map(|recovery| recovery.status()).collect()
    }

    /// One of them.
    ///
    /// # Errors
    /// Not found, naming those that there are.
    pub fn status(&self, id: &str) -> Result<RecoveryStatus> {
        self.find(id).map(|recovery| recovery.status())
    }

    fn find(&self, id: &str) -> Result<Arc<Recovery>> {
        let all = self.lock();
        all.get(id).cloned().ok_or_else(|| {
            let known: Vec<&str> = all.keys().map(String::as_str).collect();
            Failure::not_found(format!(
                "there is no recovered server {id:?}; there are: {}",
                if known.is_empty() { "none".into() } else { known.join(", ") }
            ))
        })
    }

    /// Takes up again what ran before this daemon was started.
    pub async fn resume(&self, node: &Arc<Node>) {
        let records = match self.context.fleet().recoveries() {
            Ok(records) => records,
            Err(error) => return log::error!("recovered servers: {error}"),
        };
        for record in records {
            let id = record.id.clone();
            if let Err(error) = self.resume_one(node, record).await {
                self.context.event(
                    Level::Alert,
                    None,
                    &format!("recovered server {id} cannot be taken up again: {error}"),
                );
            }
        }
        self.discard_orphans();
    }

    async fn resume_one(&self, node: &Arc<Node>, record: RecoveryRecord) -> Result<()> {
        let group = node
            .groups()
            .into_iter()
            .find(|group| group.id().to_string() == record.group)
            .ok_or_else(|| {
                Failure::not_found(format!("group {} is not open: see srn status", record.group))
            })?;
        let clone = if record.test {
            let epoch: EpochId =
                record.epoch.parse().map_err(|_| Failure::internal("malformed epoch"))?;
            Some(self.claim_clone(&group, epoch)?)
        } else {
            None
        };
        let exports = self.publish(node, &group, &record.id, clone.as_ref())?;
        let only_disks = record.only_disks;
        let progress = Progress {
            phase: if only_disks { Phase::Served } else { Phase::Running },
            asked: clock::mono(),
            started_after_us: None,
            answered_after_us: None,
            answer: None,
            problem: None,
            serial_log: None,
            firmware: None,
        };
        let folder = record.folder.clone();
        let recovery = Arc::new(Recovery {
            record,
            group,
            clone: Mutex::new(clone),
            exports,
            progress: Mutex::new(progress),
            machine: tokio::sync::Mutex::default(),
        });
        self.lock().insert(recovery.record.id.clone(), recovery.clone());
        if only_disks {
            return Ok(());
        }
        match Machine::adopt(&folder) {
            Ok(machine) => {
                let machine = Arc::new(machine);
                recovery.progress().serial_log = Some(machine.serial_log());
                *recovery.machine.lock().await = Some(machine.clone());
                tokio::spawn(watch_end(self.context.clone(), recovery, machine));
            }
            Err(error) => {
                let mut progress = recovery.progress();
                progress.phase = Phase::Ended;
                progress.problem = Some(error.to_string());
            }
        }
        Ok(())
    }

    fn claim_clone(&self, group: &Arc<Group>, epoch: EpochId) -> Result<Arc<Engine>> {
        let mut clones = self.clones.lock().unwrap_or_else(PoisonError::into_inner);
        let at = clones
            .iter()
            .position(|(of, id, _)| of.id() == group.id() && *id == epoch)
            .ok_or_else(|| Failure::not_found("its clone is not there any more"))?;
        let (_, _, appender) = clones.swap_remove(at);
        start_clone_engine(group, appender)
    }

    /// Clones that no recovery has claimed were left by a crash between two steps.
    fn discard_orphans(&self) {
        let orphans = {
            let mut clones = self.clones.lock().unwrap_or_else(PoisonError::into_inner);
            std::mem::take(&mut *clones)
        };
        for (group, id, appender) in orphans {
            drop(appender);
            if let Err(error) = group.store().discard(id) {
                log::warn!("group {}: throwing away a left-over clone: {error}", group.name());
            }
        }
    }

    /// Stops a recovered server. A test's clone is thrown away; after a failover the group stays
    /// as it is, and can be started again.
    ///
    /// # Errors
    /// Not found; a machine that cannot be stopped; storage failures.
    pub async fn stop(&self, node: &Arc<Node>, id: &str, graceful: Duration) -> Result<()> {
        let recovery = self.find(id)?;
        let machine = recovery.machine.lock().await.take();
        let machine = match machine {
            Some(machine) => Some(machine),
            None => Machine::adopt(&recovery.record.folder).ok().map(Arc::new),
        };
        if let Some(machine) = machine {
            machine
                .stop(graceful)
                .await
                .map_err(|error| Failure::internal(format!("stopping the machine: {error}")))?;
        }
        for export in &recovery.exports {
            node.exports().withdraw(export);
        }
        node.disconnect(&recovery.group, &format!("recovery/{id}/"));
        if recovery.record.test {
            self.throw_away(&recovery).await?;
        }
        if let Err(error) = srn_targets::qemu::run::remove(&recovery.record.folder) {
            log::debug!("removing {}: {error}", recovery.record.folder.display());
        }
        self.context.fleet().remove_recovery(id)?;
        self.lock().remove(id);
        let what = if recovery.record.test { "test failover" } else { "recovered server" };
        self.context.event(
            Level::Info,
            Some(&recovery.group.name()),
            &format!("{what} {id} was stopped"),
        );
        Ok(())
    }

    async fn throw_away(&self, recovery: &Arc<Recovery>) -> Result<()> {
        let epoch: EpochId =
            recovery.record.epoch.parse().map_err(|_| Failure::internal("malformed epoch"))?;
        let engine = recovery.clone.lock().unwrap_or_else(PoisonError::into_inner).take();
        let group = recovery.group.clone();
        let work = move || {
            if let Some(engine) = engine {
                let _ = engine.stop("the test failover was stopped");
            }
            group.store().discard(epoch)
        };
        tokio::task::spawn_blocking(work)
            .await
            .map_err(|error| Failure::internal(format!("a task ended: {error}")))??;
        Ok(())
    }

    /// The daemon stops: machines go on and wait for their disks. Blocks until engines have ended.
    pub fn release(&self) {
        let all: Vec<Arc<Recovery>> = self.lock().values().cloned().collect();
        for recovery in all {
            let engine = recovery.clone.lock().unwrap_or_else(PoisonError::into_inner).take();
            if let Some(engine) = engine {
                let _ = engine.stop("the node is stopping");
            }
        }
    }
}

/// Says in the recovery's status when its machine ends.
async fn watch_end(context: Context, recovery: Arc<Recovery>, machine: Arc<Machine>) {
    let trim = async {
        loop {
            tokio::time::sleep(Duration::from_secs(60)).await;
            // Where the file system cannot make holes the log grows; that is all.
            let _ = machine.trim_serial_log(SERIAL_KEEP);
        }
    };
    let ended = tokio::select! {
        ended = machine.ended() => ended,
        () = trim => return,
    };
    let text = match ended {
        Ok(Status::Exited { last_words, .. } | Status::Gone { last_words })
            if !last_words.is_empty() =>
        {
            format!("the machine has ended: {}", last_words.join(" / "))
        }
        Ok(_) => "the machine has ended".to_owned(),
        Err(error) => format!("the machine cannot be watched: {error}"),
    };
    // Stopped on purpose: then it is not in the list of those that run any more.
    if recovery.machine.lock().await.is_none() {
        return;
    }
    let mut progress = recovery.progress();
    progress.phase = Phase::Ended;
    progress.problem = Some(text.clone());
    drop(progress);
    let text = format!("recovered server {}: {text}", recovery.record.id);
    context.event(Level::Warning, Some(&recovery.group.name()), &text);
}

/// A clone's engine: nobody is told of its commits but its own clients.
fn start_clone_engine(group: &Arc<Group>, appender: Appender) -> Result<Arc<Engine>> {
    struct Quiet(String);

    impl Watcher for Quiet {
        fn committed(&self, _head: Position, _content_bytes: u64) {}
        fn full(&self, why: Option<&str>) {
            if let Some(why) = why {
                log::warn!("group {}: a recovered server's writes wait: {why}", self.0);
            }
        }
        fn received(&self, _head: Position, _wire_bytes: u64) {}
        fn out_of_line(&self, _error: &StoreError) {}
        fn failed(&self, error: &StoreError) {
            log::error!("group {}: a recovered server's disks failed: {error}", self.0);
        }
    }

    let name = group.name();
    let engine = Engine::start(&format!("{name}-c"), appender, Box::new(Quiet(name)))
        .map_err(|error| Failure::internal(format!("starting a thread: {error}")))?;
    Ok(Arc::new(engine))
}
