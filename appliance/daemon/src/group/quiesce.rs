//! Application-consistent checkpoints: the applications of the group's servers are made quiet, the mark
//! is appended, and they go on.
//!
//! A program of the administrator does the first and the last: `HOOK freeze GROUP`, `HOOK thaw GROUP`.
//!
//! Invariants:
//! * that a thaw is owed is durable before the program is told to freeze, and stays so until it has said
//!   that it has thawed; nothing is frozen before;
//! * from the freeze to the beginning of the thaw it takes no longer than the limit, whatever hangs, and
//!   what it takes to kill that;
//! * a checkpoint counts as application-consistent only if all that the servers wrote before the freeze
//!   was done is in the log before its mark, and the mark was durable before the thaw began, which
//!   succeeded. What cannot be told after a crash counts as not so;
//! * of one group one is made at a time, and it is not handed over meanwhile.
//!
//! Where anything of this fails the checkpoint is made all the same, crash-consistent, and says why: a
//! point that is a little worse is better than none.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use srn_core::epoch::Position;
use srn_core::frame::MarkKind;
use srn_core::ids::{CheckpointId, DiskNo};
use srn_core::time::{Mono, WallTime};
use srn_store::manifest::{Note, Role};
use tokio::sync::{Notify, OwnedMutexGuard};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::Group;
use crate::clock;
use crate::context::Context;
use crate::error::{Failure, Result};
use crate::fleet::{FrozenRecord, GroupRecord, Level, Source, SourceRecord};
use crate::hook::{Hook, Ran, end_run, span};

/// How long one thaw may take.
const THAW_PATIENCE: Duration = Duration::from_secs(30);

/// How often it is tried at once, and the pause between.
const THAW_TRIES: usize = 2;
const THAW_PAUSE: Duration = Duration::from_secs(1);

/// The pause before it is tried again later, in microseconds.
const THAW_AGAIN_US: u64 = 10_000_000;

/// How long a node that stops waits for a thaw.
const STOP_PATIENCE: Duration = Duration::from_secs(65);

/// Bounds of the limit.
const LIMITS: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(600));

/// How often it is looked again whether all has arrived.
const LOOK: Duration = Duration::from_millis(100);

/// What of quiet applications is not remembered over a restart.
#[derive(Debug, Default)]
pub(super) struct Quiescing {
    /// Held from before a freeze until after its thaw.
    one: Arc<tokio::sync::Mutex<()>>,
    /// The node is stopping.
    stopping: CancellationToken,
    /// Signals who follows sources that something is asked.
    asking: Notify,
    question: Mutex<Question>,
    again: Mutex<Again>,
}

/// Whether all that the servers wrote is here.
#[derive(Debug, Default)]
struct Question {
    number: u64,
    /// Disks whose sources have not said yes.
    open: BTreeSet<DiskNo>,
}

/// A thaw that failed is tried again.
#[derive(Debug, Default)]
struct Again {
    /// Not before. None: this daemon has not tried yet.
    not_before: Option<Mono>,
}

/// How a group's applications are made quiet.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct QuiesceStatus {
    /// The program that does it.
    pub hook: Option<std::path::PathBuf>,
    /// The longest that they stand still, in milliseconds.
    pub limit_ms: u64,
    /// They may be frozen since then, in RFC 3339.
    pub frozen_since: Option<String>,
}

/// A checkpoint for which the applications were to be quiet.
#[derive(Debug)]
pub struct Quiet {
    /// The checkpoint.
    pub id: CheckpointId,
    /// Where it is.
    pub position: Position,
    /// Why it is crash-consistent only.
    pub crash_only: Option<String>,
}

/// How far it came before the thaw.
enum Frozen {
    /// The mark is durable.
    Marked(Position),
    /// It is not durable in time, and comes too late.
    Late(JoinHandle<Result<Position>>, String),
    /// The applications are not known to be quiet, and why.
    Not(String),
    /// Nothing can be appended.
    Failed(Failure),
}

impl Quiescing {
    fn question(&self) -> MutexGuard<'_, Question> {
        self.question.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn again(&self) -> MutexGuard<'_, Again> {
        self.again.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether applications may stand still for so long.
///
/// # Errors
/// [`crate::error::Kind::Invalid`].
pub fn check_limit(limit_ms: u64) -> Result<()> {
    let limit = Duration::from_millis(limit_ms);
    if limit < LIMITS.0 || limit > LIMITS.1 {
        return Err(Failure::invalid(format!(
            "applications stand still for {} to {}; {} is not between them",
            span(LIMITS.0),
            span(LIMITS.1),
            span(limit)
        )));
    }
    Ok(())
}

impl Group {
    /// Makes a checkpoint for which the applications are made quiet; crash-consistent where that fails.
    /// It goes on when the one who asked goes away.
    ///
    /// # Errors
    /// When there is no program for it or it is not to be trusted, when another one is being made, and
    /// when nothing can be appended.
    pub async fn quiet_checkpoint(
        self: &Arc<Self>,
        kind: MarkKind,
        label: Option<String>,
        pin: bool,
    ) -> Result<Quiet> {
        let this = self.clone();
        let made = tokio::spawn(async move { this.freeze_mark_thaw(kind, label, pin).await });
        made.await.map_err(|error| Failure::internal(format!("a task ended: {error}")))?
    }

    /// Why the applications cannot be made quiet at all. Blocks.
    ///
    /// # Errors
    /// The same.
    pub fn can_be_quiet(&self) -> Result<Hook> {
        let name = self.name();
        if self.role() == Role::Secondary {
            return Err(Failure::refused(format!(
                "the applications of group {name} are made quiet at its production node; ask there"
            )));
        }
        let settings = self.settings();
        if let Some(frozen) = settings.frozen {
            return Err(Failure::conflict(format!(
                "the applications of group {name} are frozen since {} and are yet to be thawed",
                clock::rfc3339(WallTime(frozen.since_us))
            )));
        }
        let disks = self.catalog().disks;
        let pulled = |record: &SourceRecord| {
            disks.contains_key(&DiskNo(record.disk)) && matches!(record.source, Source::Pull { .. })
        };
        if settings.sources.iter().any(pulled) {
            return Err(Failure::refused(format!("group {name}: {IN_PASSES}")));
        }
        Hook::trusted(&self.has_hook()?)
    }

    /// The program that makes the applications quiet.
    ///
    /// # Errors
    /// [`crate::error::Kind::Refused`] when there is none.
    pub(super) fn has_hook(&self) -> Result<std::path::PathBuf> {
        let settings = self.settings();
        settings.quiesce_hook.ok_or_else(|| {
            Failure::refused(format!(
                "group {0} has no program that makes its applications quiet; first: srn group set {0} \
                 --quiesce-hook PROGRAM",
                settings.name
            ))
        })
    }

    /// Does what may wait for the disk.
    pub(super) async fn asks<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let done = tokio::task::spawn_blocking(work).await;
        done.map_err(|error| Failure::internal(format!("a task ended: {error}")))?
    }

    async fn freeze_mark_thaw(
        self: Arc<Self>,
        kind: MarkKind,
        label: Option<String>,
        pin: bool,
    ) -> Result<Quiet> {
        let name = self.name();
        let Ok(_one) = self.quiescing.one.try_lock() else {
            return Err(Failure::conflict(format!(
                "an application-consistent checkpoint of group {name} is being made already"
            )));
        };
        let this = self.clone();
        let hook = self.asks(move || this.can_be_quiet()).await?;
        if let Some(why) = self.no_checkpoint_now() {
            return Err(Failure::refused(format!("group {name}: {why}")));
        }
        if self.quiescing.stopping.is_cancelled() {
            return Err(stopping());
        }
        let _kept = self.keep()?;
        let id = CheckpointId(clock::random());
        let settings = self.settings();
        let owed = FrozenRecord {
            hook: settings.quiesce_hook.clone().unwrap_or_default(),
            run: format!("{:016x}", clock::random_u64()),
            checkpoint: id.to_string(),
            since_us: clock::wall().0,
        };
        self.change_settings(|record| record.frozen = Some(owed.clone()))?;
        // From here on it is thawed whatever comes.
        let limit = Duration::from_millis(settings.quiesce_limit_ms);
        let begun = Instant::now();
        let frozen = self.mark_frozen(&hook, &owed, id, kind, limit).await;
        let stood = begun.elapsed();
        let unmarked = matches!(frozen, Frozen::Not(_));
        if unmarked {
            // The freeze may still be at it.
            end_run(&owed.run).await;
        }
        let thawed = self.thaw(&owed).await;
        let made = self.after_thaw(frozen, &thawed, id, kind).await;
        let outcome = match made {
            Ok((position, crash_only)) => {
                let unquiet = crash_only.is_some();
                let note = move |note: &mut Note| {
                    note.label = label.unwrap_or_default();
                    note.pinned = pin;
                    note.unquiet = unquiet;
                };
                let noted = self.change_note(id, note).await;
                noted.map(|()| Quiet { id, position, crash_only })
            }
            Err(error) => Err(error),
        };
        // Behind the note: until then a crash leaves it to the next daemon. Where the note failed, or
        // it is not known whether there is a mark, it is left to a later look.
        match (&thawed, &outcome) {
            (Ok(()), Err(_)) if !unmarked => self.put_off(None),
            (Ok(()), _) => self.nothing_is_owed(),
            (Err(_), _) => {}
        }
        let quiet = outcome?;
        self.facts().last_checkpoint = Some(clock::mono());
        match &quiet.crash_only {
            Some(why) => {
                let text =
                    format!("checkpoint {} is crash-consistent only: {why}", quiet.id.short());
                self.tell(Level::Warning, &text);
            }
            None => log::info!(
                "group {name}: checkpoint {} is application-consistent; the applications stood still \
                 for {}",
                quiet.id.short(),
                span(stood)
            ),
        }
        Ok(quiet)
    }

    /// Makes the applications quiet and appends the mark, within the limit.
    async fn mark_frozen(
        self: &Arc<Self>,
        hook: &Hook,
        owed: &FrozenRecord,
        id: CheckpointId,
        kind: MarkKind,
        limit: Duration,
    ) -> Frozen {
        let name = self.name();
        let deadline = Instant::now() + limit;
        let stop = || self.quiescing.stopping.cancelled();
        let arguments = ["freeze", name.as_str()];
        let ran = tokio::select! {
            biased;
            () = stop() => return Frozen::Not(STOPPING.into()),
            ran = hook.run(&arguments, &owed.run, limit) => ran,
        };
        if let Some(why) = &ran.failed {
            return Frozen::Not(format!(
                "{} freeze {name} {why}{}",
                owed.hook.display(),
                ran.words()
            ));
        }
        if !ran.said.is_empty() {
            log::info!("group {name}: {} freeze{}", owed.hook.display(), ran.words());
        }
        let arrived = tokio::select! {
            biased;
            () = stop() => return Frozen::Not(STOPPING.into()),
            arrived = tokio::time::timeout_at(deadline, self.all_is_here()) => arrived,
        };
        match arrived {
            Ok(Ok(())) => {}
            Ok(Err(why)) => return Frozen::Not(why),
            Err(_) => {
                return Frozen::Not(format!(
                    "within the limit of {} not all that the servers had written was here",
                    span(limit)
                ));
            }
        }
        let this = self.clone();
        // What was asked of the log is done or not done, and cannot be taken back.
        let mut marking = tokio::spawn(async move { this.append_mark(id, kind, true).await });
        let too_late = tokio::select! {
            biased;
            marked = &mut marking => return match flat(marked) {
                Ok(position) => Frozen::Marked(position),
                Err(error) => Frozen::Failed(error),
            },
            () = stop() => STOPPING.to_owned(),
            () = tokio::time::sleep_until(deadline) => format!(
                "its mark was not durable within the limit of {}",
                span(limit)
            ),
        };
        Frozen::Late(marking, too_late)
    }

    /// What became of the checkpoint: where it is, and why it is crash-consistent only.
    async fn after_thaw(
        self: &Arc<Self>,
        frozen: Frozen,
        thawed: &std::result::Result<(), String>,
        id: CheckpointId,
        kind: MarkKind,
    ) -> Result<(Position, Option<String>)> {
        match frozen {
            // One that failed may have come by itself before.
            Frozen::Marked(position) => Ok((position, thawed.clone().err())),
            Frozen::Late(marking, why) => Ok((flat(marking.await)?, Some(why))),
            Frozen::Not(_) if self.quiescing.stopping.is_cancelled() => Err(stopping()),
            Frozen::Not(why) => Ok((self.append_mark(id, kind, false).await?, Some(why))),
            Frozen::Failed(error) => Err(error),
        }
    }

    /// Waits until all that the servers wrote before is in the log.
    async fn all_is_here(&self) -> std::result::Result<(), String> {
        let disks = self.catalog().disks;
        let mut followed = BTreeSet::new();
        for record in self.settings().sources {
            let disk = DiskNo(record.disk);
            if !disks.contains_key(&disk) {
                continue;
            }
            match record.source {
                // What was answered is in the log.
                Source::Served => {}
                Source::Mirror { .. } => {
                    followed.insert(disk);
                }
                Source::Pull { .. } => return Err(IN_PASSES.into()),
            }
        }
        {
            let mut question = self.quiescing.question();
            question.number += 1;
            question.open = followed;
        }
        self.quiescing.asking.notify_waiters();
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            if self.quiescing.question().open.is_empty() {
                return Ok(());
            }
            // It would wait in vain.
            if let Some(why) = self.no_checkpoint_now() {
                return Err(why);
            }
            let _ = tokio::time::timeout(LOOK, changed).await;
        }
    }

    /// Waits until it is asked whether all that servers wrote is here.
    pub async fn step_is_asked(&self) {
        self.quiescing.asking.notified().await;
    }

    /// The number of the question whether all that this disk's server wrote until now is here, if there
    /// is one.
    #[must_use]
    pub fn asks_for_step(&self, disk: DiskNo) -> Option<u64> {
        let question = self.quiescing.question();
        question.open.contains(&disk).then_some(question.number)
    }

    /// It is, and was when it was asked.
    pub fn is_in_step(&self, disk: DiskNo, number: u64) {
        {
            let mut question = self.quiescing.question();
            if question.number == number {
                question.open.remove(&disk);
            }
        }
        self.changed.notify_waiters();
    }

    /// Thaws. When that fails an administrator is told, and it is tried again later.
    async fn thaw(&self, owed: &FrozenRecord) -> std::result::Result<(), String> {
        let name = self.name();
        let thawed = thaw(&name, owed).await;
        if let Err(why) = &thawed {
            self.put_off(Some(why));
        }
        thawed
    }

    fn put_off(&self, tell: Option<&str>) {
        let until = Mono(clock::mono().0.saturating_add(THAW_AGAIN_US));
        self.quiescing.again().not_before = Some(until);
        if let Some(why) = tell {
            let text = format!("applications may still be frozen: {why}; it is tried again");
            self.tell(Level::Alert, &text);
        }
    }

    fn nothing_is_owed(&self) {
        if let Err(error) = self.change_settings(|record| record.frozen = None) {
            // It is thawed once more, which does no harm.
            log::error!("group {}: remembering a thaw: {error}", self.name());
        }
    }

    /// Once a second: a thaw that is still owed, from before the daemon was started or because it
    /// failed.
    pub(super) fn thaw_what_is_left(self: &Arc<Self>) {
        // Whose freeze is under way thaws.
        let Ok(one) = self.quiescing.one.clone().try_lock_owned() else { return };
        let Some(owed) = self.record().frozen.clone() else { return };
        let not_before = self.quiescing.again().not_before;
        if not_before.is_some_and(|until| clock::mono() < until) {
            return;
        }
        let this = self.clone();
        tokio::spawn(async move { this.thaw_left(one, &owed, not_before.is_none()).await });
    }

    async fn thaw_left(&self, _one: OwnedMutexGuard<()>, owed: &FrozenRecord, first: bool) {
        if first {
            self.tell(Level::Warning, &left_over(owed));
            end_runs(owed).await;
        }
        if let Err(why) = thaw(&self.name(), owed).await {
            self.put_off(first.then_some(why.as_str()));
            return;
        }
        if let Err(error) = self.doubt(owed).await {
            log::error!("group {}: noting a checkpoint: {error}", self.name());
            self.put_off(None);
            return;
        }
        self.nothing_is_owed();
        self.tell(Level::Info, "the applications are thawed");
    }

    /// Whether the applications were quiet when its mark was appended is not known.
    async fn doubt(&self, owed: &FrozenRecord) -> Result<()> {
        let Ok(id) = owed.checkpoint.parse::<CheckpointId>() else { return Ok(()) };
        let store = self.store.clone();
        let listed = self.blocking(move || store.checkpoints()).await?;
        if listed.iter().any(|checkpoint| checkpoint.mark.id == id) {
            self.change_note(id, |note| note.unquiet = true).await?;
        }
        Ok(())
    }

    /// Waits for the end of one that is being made; none begins while what is returned is there. What
    /// is still owed is thawed, as nobody will do it later.
    pub async fn end_quiet_for_good(&self) -> OwnedMutexGuard<()> {
        let one = self.quiescing.one.clone().lock_owned().await;
        let owed = self.record().frozen.clone();
        if let Some(owed) = owed
            && let Err(why) = thaw(&self.name(), &owed).await
        {
            let text = format!("applications may still be frozen, and nobody thaws them: {why}");
            self.tell(Level::Alert, &text);
        }
        one
    }

    /// How the applications are made quiet; none where that was not declared.
    #[must_use]
    pub fn quiesce_status(&self) -> Option<QuiesceStatus> {
        let record = self.record();
        let frozen = record.frozen.as_ref();
        (record.quiesce_hook.is_some() || frozen.is_some()).then(|| QuiesceStatus {
            hook: record.quiesce_hook.clone(),
            limit_ms: record.quiesce_limit_ms,
            frozen_since: frozen.map(|frozen| clock::rfc3339(WallTime(frozen.since_us))),
        })
    }
}

/// The node is stopping: what is frozen is thawed when this returns, within reason.
pub async fn thaw_all(groups: &[Arc<Group>]) {
    let mut waiting = JoinSet::new();
    for group in groups {
        group.quiescing.stopping.cancel();
        let one = group.quiescing.one.clone();
        waiting.spawn(async move { tokio::time::timeout(STOP_PATIENCE, one.lock_owned()).await });
    }
    while waiting.join_next().await.is_some() {}
}

/// Thaws the applications of a group that cannot be opened.
pub fn thaw_broken(context: &Context, record: &GroupRecord) {
    let (context, record) = (context.clone(), record.clone());
    let Some(owed) = record.frozen.clone() else { return };
    tokio::spawn(async move {
        context.event(Level::Warning, Some(&record.name), &left_over(&owed));
        end_runs(&owed).await;
        match thaw(&record.name, &owed).await {
            Ok(()) => {
                let thawed = GroupRecord { frozen: None, ..record };
                if let Err(error) = context.fleet().put_group(&thawed) {
                    log::error!("group {}: remembering a thaw: {error}", thawed.name);
                }
            }
            Err(why) => {
                let text =
                    format!("applications may still be frozen, and nobody thaws them: {why}");
                context.event(Level::Alert, Some(&record.name), &text);
            }
        }
    });
}

fn left_over(owed: &FrozenRecord) -> String {
    format!(
        "the daemon ended while the applications were being frozen, at {}: they are thawed first",
        clock::rfc3339(WallTime(owed.since_us))
    )
}

/// What an earlier daemon has started may still run, and a freeze end behind the thaw.
async fn end_runs(owed: &FrozenRecord) {
    end_run(&owed.run).await;
    end_run(&thaw_run(owed)).await;
}

/// The word that names the run of a thaw.
fn thaw_run(owed: &FrozenRecord) -> String {
    format!("{}-thaw", owed.run)
}

/// Tells the program to thaw, more than once if need be.
async fn thaw(name: &str, owed: &FrozenRecord) -> std::result::Result<(), String> {
    let shown = owed.hook.display();
    let run = thaw_run(owed);
    let mut why = String::new();
    for attempt in 0..THAW_TRIES {
        if attempt > 0 {
            tokio::time::sleep(THAW_PAUSE).await;
        }
        let path = owed.hook.clone();
        let hook = tokio::task::spawn_blocking(move || Hook::trusted(&path)).await;
        let ran = match hook {
            Ok(Ok(hook)) => hook.run(&["thaw", name], &run, THAW_PATIENCE).await,
            Ok(Err(error)) => Ran { failed: Some(error.message), said: String::new() },
            Err(error) => Ran { failed: Some(error.to_string()), said: String::new() },
        };
        match &ran.failed {
            None => return Ok(()),
            Some(failed) => why = format!("{shown} thaw {name} {failed}{}", ran.words()),
        }
    }
    Err(why)
}

const IN_PASSES: &str = "a disk is read in passes, which end when they have read all, and no application \
                         stands still for so long";

const STOPPING: &str = "the node is stopping";

fn stopping() -> Failure {
    Failure::refused(format!("{STOPPING}; no checkpoint was made"))
}

fn flat(joined: std::result::Result<Result<Position>, tokio::task::JoinError>) -> Result<Position> {
    joined.map_err(|error| Failure::internal(format!("a task ended: {error}")))?
}
