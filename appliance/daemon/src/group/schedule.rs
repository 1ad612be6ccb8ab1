//! Checkpoints by the calendar.
//!
//! A schedule is kept with the settings of this node, with the time until which it has been dealt with.
//! What is due is made by the tick, one at a time; while it cannot be made it waits and says so, and of
//! all that was missed meanwhile, also while the daemon was down, one is made. While this node is not
//! the group's primary its schedules rest, and what passes then is nobody's. Where only the peer is away,
//! or the group is paused, they are made in time: the mark is in the log, and reaches the peer with it.
//!
//! Invariant: the time until which a schedule has been dealt with moves only when the checkpoint is in
//! the log, or nobody wants it; so one may be made twice over a crash, and none is forgotten.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use srn_core::frame::MarkKind;
use srn_core::limits::TEXT_MAX;
use srn_core::time::{Mono, WallTime};
use srn_store::manifest::Role;

use super::Group;
use crate::clock;
use crate::error::{Failure, Result};
use crate::fleet::{Level, ScheduleRecord};
use crate::timetable::Timetable;

/// The most schedules of a group.
const SCHEDULES_MAX: usize = 64;

/// Longest label, in bytes: a time comes behind it.
const LABEL_MAX: usize = TEXT_MAX - 32;

/// What is made later than this after its time is late, in microseconds.
const LATE_US: i64 = 60_000_000;

/// A clock that was set back by more than this is believed, in microseconds.
const SET_BACK_US: i64 = 60_000_000;

/// The pause before one that failed is tried again, in microseconds.
const RETRY_US: u64 = 10_000_000;

/// How many coming times are shown.
const SHOWN: usize = 3;

/// What of schedules is not remembered over a restart.
#[derive(Debug, Default)]
pub(super) struct Scheduling {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// One is being made.
    busy: bool,
    /// Those that are due and cannot be made, and why; by number.
    waiting: BTreeMap<u32, String>,
    /// None is made before.
    not_before: Option<Mono>,
}

/// A schedule as people see it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ScheduleStatus {
    /// What it is called within its group.
    pub number: u32,
    /// The expression, as it was typed.
    pub calendar: String,
    /// The same in its usual form.
    pub normal: String,
    /// `application` when the applications are made quiet for it, else `crash`.
    pub consistent: String,
    /// What its checkpoints are called, before their time.
    pub label: Option<String>,
    /// When it comes next.
    pub next: Vec<ScheduledTime>,
    /// One is due and cannot be made now, and why.
    pub waiting: Option<String>,
    /// None are made at this node now, and why.
    pub rests: Option<String>,
}

/// A time of a schedule.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ScheduledTime {
    /// In RFC 3339.
    pub time: String,
    /// As the clock of its zone shows it.
    pub local: String,
}

/// A schedule that is due.
struct Due {
    record: ScheduleRecord,
    /// Its newest time.
    at: WallTime,
    /// The same as its clock shows it.
    local: String,
    /// Why it was not made before.
    waited: Option<String>,
}

impl Scheduling {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Group {
    /// Makes checkpoints at the times of a calendar expression from now on.
    ///
    /// # Errors
    /// [`crate::error::Kind::Invalid`] for an expression that is none or comes no more, and for a label
    /// that cannot be; [`crate::error::Kind::Conflict`] for one too many.
    pub fn add_schedule(
        &self,
        calendar: &str,
        application: bool,
        label: Option<String>,
    ) -> Result<ScheduleStatus> {
        if application {
            self.has_hook()?;
        }
        let table = Timetable::parse(calendar)?;
        let now = clock::wall();
        if table.next(now).is_none() {
            return Err(Failure::invalid(format!("{calendar:?} comes no more")));
        }
        if let Some(label) = &label
            && (label.is_empty() || label.len() > LABEL_MAX || label.chars().any(char::is_control))
        {
            return Err(Failure::invalid(format!(
                "the label of a schedule has 1 to {LABEL_MAX} bytes and no control characters"
            )));
        }
        let calendar = calendar.trim().to_owned();
        let mut added = None;
        self.change_settings(|record| {
            if record.schedules.len() >= SCHEDULES_MAX {
                return;
            }
            let last = record.schedules.iter().map(|schedule| schedule.number).max();
            let number = last.unwrap_or_default() + 1;
            let schedule = ScheduleRecord { number, calendar, application, label, since_us: now.0 };
            record.schedules.push(schedule.clone());
            added = Some(schedule);
        })?;
        let added = added.ok_or_else(|| {
            Failure::conflict(format!(
                "group {} has {SCHEDULES_MAX} schedules already",
                self.name()
            ))
        })?;
        let text =
            format!("schedule {} of checkpoints was added: {}", added.number, added.calendar);
        self.tell(Level::Info, &text);
        Ok(self.schedule_status(&added))
    }

    /// Makes no more checkpoints by the schedule with this number.
    ///
    /// # Errors
    /// [`crate::error::Kind::NotFound`].
    pub fn remove_schedule(&self, number: u32) -> Result<ScheduleStatus> {
        let name = self.name();
        let found = self.settings().schedules.into_iter().find(|one| one.number == number);
        let found = found.ok_or_else(|| {
            Failure::not_found(format!(
                "group {name} has no schedule {number}; list them with: srn checkpoint schedule list \
                 {name}"
            ))
        })?;
        self.change_settings(|record| record.schedules.retain(|one| one.number != number))?;
        let mut status = self.schedule_status(&found);
        self.scheduling.lock().waiting.remove(&number);
        status.waiting = None;
        let text = format!("schedule {number} of checkpoints was removed: {}", found.calendar);
        self.tell(Level::Info, &text);
        Ok(status)
    }

    /// All schedules.
    #[must_use]
    pub fn schedules(&self) -> Vec<ScheduleStatus> {
        self.settings().schedules.iter().map(|record| self.schedule_status(record)).collect()
    }

    fn schedule_status(&self, record: &ScheduleRecord) -> ScheduleStatus {
        // What could be read once can be read again, but for a zone that was taken away.
        let table = Timetable::parse(&record.calendar);
        let now = clock::wall();
        let next = match &table {
            Ok(table) => std::iter::successors(table.next(now), |time| table.next(*time))
                .take(SHOWN)
                .map(|time| ScheduledTime { time: clock::rfc3339(time), local: table.local(time) })
                .collect(),
            Err(_) => Vec::new(),
        };
        let waiting = self.scheduling.lock().waiting.get(&record.number).cloned();
        ScheduleStatus {
            number: record.number,
            calendar: record.calendar.clone(),
            normal: table.as_ref().map(Timetable::normal).unwrap_or_default(),
            consistent: if record.application { "application" } else { "crash" }.into(),
            label: record.label.clone(),
            next,
            waiting: waiting.or_else(|| table.err().map(|error| error.message)),
            rests: self.schedules_rest().map(str::to_owned),
        }
    }

    /// Why no checkpoints are made by schedules at this node.
    fn schedules_rest(&self) -> Option<&'static str> {
        match self.store.role() {
            (Role::Secondary, _) => Some("this node is not the group's production node"),
            (Role::Primary, Some(_)) => Some("the group is fenced here"),
            (Role::Primary, None) => None,
        }
    }

    /// Looks whether a checkpoint is due, and has it made.
    pub(super) fn run_schedules(self: &Arc<Self>) {
        let schedules = self.record().schedules.clone();
        if schedules.is_empty() {
            return;
        }
        {
            let state = self.scheduling.lock();
            if state.busy || state.not_before.is_some_and(|until| clock::mono() < until) {
                return;
            }
        }
        let now = clock::wall();
        let rest = self.schedules_rest().is_some();
        let mut due = Vec::new();
        for record in schedules {
            // Its status says what is wrong with it.
            let Ok(table) = Timetable::parse(&record.calendar) else { continue };
            let since = WallTime(record.since_us);
            if since.0.saturating_sub(now.0) > SET_BACK_US {
                let text = format!(
                    "the clock was set back by {} s; schedule {} counts from now",
                    (since.0 - now.0) / 1_000_000,
                    record.number
                );
                self.tell(Level::Warning, &text);
                self.dealt_with(record.number, now);
                continue;
            }
            if table.next(since).is_none_or(|next| next > now) {
                continue;
            }
            if rest {
                self.dealt_with(record.number, now);
                continue;
            }
            let at = table.newest(since, now).unwrap_or(now);
            let waited = self.scheduling.lock().waiting.get(&record.number).cloned();
            due.push(Due { local: table.local(at), record, at, waited });
        }
        if due.is_empty() {
            return;
        }
        if let Some(why) = self.no_checkpoint_now() {
            for due in &due {
                self.wait_with(due, &why);
            }
            return;
        }
        self.scheduling.lock().busy = true;
        let this = self.clone();
        tokio::spawn(async move {
            for due in due {
                this.make_due(due).await;
            }
            this.scheduling.lock().busy = false;
        });
    }

    /// Why a checkpoint made now would not hold what the servers have written.
    pub(super) fn no_checkpoint_now(&self) -> Option<String> {
        if let Err(error) = self.check_writable() {
            return Some(error.message);
        }
        let catalog = self.catalog();
        if catalog.disks.is_empty() {
            return Some("there is no disk".into());
        }
        if !catalog.is_clean() {
            return Some("a disk's initial replication or resync is under way".into());
        }
        let facts = self.facts();
        if let Some(why) = &facts.full {
            return Some(why.clone());
        }
        let stopped = facts
            .sources
            .iter()
            .find(|(disk, _)| catalog.disks.contains_key(&srn_core::ids::DiskNo(**disk)));
        stopped.map(|(_, why)| why.clone())
    }

    /// A checkpoint that is due cannot be made; told once.
    fn wait_with(&self, due: &Due, why: &str) {
        let number = due.record.number;
        let before = self.scheduling.lock().waiting.insert(number, why.to_owned());
        if before.is_none() {
            let text = format!(
                "the checkpoint of schedule {number} ({}) for {} cannot be made now: {why}; it is made \
                 as soon as it can be",
                due.record.calendar, due.local
            );
            self.tell(Level::Warning, &text);
        }
    }

    async fn make_due(self: &Arc<Self>, due: Due) {
        let number = due.record.number;
        // Removed meanwhile.
        if !self.record().schedules.iter().any(|one| one.number == number) {
            return;
        }
        let label = due.record.label.as_ref().map(|label| format!("{label} {}", due.local));
        let made = self.scheduled(due.record.application, label).await;
        if let Err(error) = made {
            self.wait_with(&due, &error.message);
            let pause = clock::mono().0.saturating_add(RETRY_US);
            self.scheduling.lock().not_before = Some(Mono(pause));
            return;
        }
        let now = clock::wall();
        self.dealt_with(number, now.max(due.at));
        self.scheduling.lock().waiting.remove(&number);
        if now.0.saturating_sub(due.at.0) > LATE_US || due.waited.is_some() {
            let why = due.waited.unwrap_or_else(|| "nobody was there to make it then".into());
            let text = format!(
                "the checkpoint of schedule {number} ({}) for {} was made late: {why}",
                due.record.calendar, due.local
            );
            self.tell(Level::Info, &text);
        }
    }

    /// One whose applications cannot be made quiet is crash-consistent, and says so.
    async fn scheduled(self: &Arc<Self>, application: bool, label: Option<String>) -> Result<()> {
        let kind = MarkKind::Scheduled;
        if application {
            let this = self.clone();
            let able = self.asks(move || this.can_be_quiet()).await;
            match able {
                Ok(_) => return self.quiet_checkpoint(kind, label, false).await.map(|_| ()),
                Err(why) => {
                    let text =
                        format!("a scheduled checkpoint is crash-consistent only: {}", why.message);
                    self.tell(Level::Warning, &text);
                }
            }
        }
        self.checkpoint(kind, label, false).await.map(|_| ())
    }

    /// The times of a schedule until this one need nothing more.
    fn dealt_with(&self, number: u32, until: WallTime) {
        let changed = self.change_settings(|record| {
            let found = record.schedules.iter_mut().find(|one| one.number == number);
            if let Some(schedule) = found {
                schedule.since_us = until.0;
            }
        });
        if let Err(error) = changed {
            log::error!("group {}: remembering a scheduled checkpoint: {error}", self.name());
            let pause = clock::mono().0.saturating_add(RETRY_US);
            self.scheduling.lock().not_before = Some(Mono(pause));
        }
    }
}
