//! What of a group's history is kept at this node: the policy put to the checkpoints that there are,
//! for the store and for people.
//!
//! The node that keeps the copy decides for it alone. Nothing that the peer says shortens history:
//! time is log time, and while that runs away from the wall clock, or ahead of this node's own, all
//! is kept until a person has looked.

use serde::{Deserialize, Serialize};
use srn_core::civil::Date;
use srn_core::ids::Seq;
use srn_core::retention::clock::{Baseline, Distrust};
use srn_core::retention::{Decision, Point, Policy, Reason, Rung, Squeeze};
use srn_core::time::{Mono, WallTime};
use srn_store::catalog::Catalog;
use srn_store::group::{Checkpoint, Retention};
use srn_store::manifest::{Keep, Role};

use super::{CheckpointStatus, Group};
use crate::clock;
use crate::config::Size;
use crate::error::{Failure, Result};
use crate::fleet::{Level, RetentionRecord};
use crate::point::{Moment, moment};

/// What was decided is looked at again after this, in microseconds: it reads an index block of every
/// segment.
const FRESH_US: u64 = 5_000_000;

/// A window is not shrunk below this, in microseconds of log time.
const WINDOW_MIN_US: u64 = 60_000_000;

/// What this node has decided of late.
#[derive(Debug)]
pub(super) struct Keeping {
    decided: Option<(Mono, Retention)>,
    sacrifice: Vec<Seq>,
    squeeze: Squeeze,
    /// Nothing is given up, and why.
    paused: Option<String>,
    /// It was said that the cap cannot be kept.
    told_over_cap: bool,
}

impl Default for Keeping {
    fn default() -> Self {
        Self {
            decided: None,
            sacrifice: Vec::new(),
            squeeze: Squeeze::NONE,
            paused: None,
            told_over_cap: false,
        }
    }
}

/// What shall be changed of a policy. What is not given stays.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PolicyChange {
    /// Seconds for which every position is kept.
    pub window_s: Option<u64>,
    /// Spans of ten minutes of which the newest checkpoint is kept.
    pub ten_minutes: Option<u32>,
    /// Hours.
    pub hours: Option<u32>,
    /// Days, by UTC.
    pub days: Option<u32>,
    /// Weeks.
    pub weeks: Option<u32>,
    /// Months.
    pub months: Option<u32>,
    /// The newest checkpoints that are kept at any age.
    pub min_points: Option<u32>,
    /// The most bytes that history may take here; 0 for no cap.
    pub cap_bytes: Option<u64>,
}

/// A policy, and what it does.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RetentionStatus {
    /// The group's name.
    pub group: String,
    /// Seconds for which every position is kept.
    pub window_s: u64,
    /// What else is kept.
    pub policy: RetentionRecord,
    /// Bytes that history takes here, beside the base.
    pub used_bytes: u64,
    /// The oldest position from which on every one can be recovered now.
    pub full_from: Option<Moment>,
    /// Nothing is given up now, and why.
    pub paused: Option<String>,
    /// The window is shorter than the policy says, for want of space: seconds.
    pub squeezed_to_s: Option<u64>,
    /// What becomes of each checkpoint, oldest first.
    pub points: Vec<PointFate>,
    /// Checkpoints that are kept as it is, and dropped as it would be.
    pub drops: usize,
    /// Whether the window would be shorter than it is.
    pub shortens: bool,
}

/// What becomes of a checkpoint.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PointFate {
    /// The checkpoint.
    pub checkpoint: CheckpointStatus,
    /// Whether it is kept.
    pub keep: bool,
    /// Why, or why not.
    pub why: String,
}

fn policy_of(record: &RetentionRecord, window_s: u64) -> Policy {
    Policy {
        window_us: window_s.saturating_mul(1_000_000),
        ten_minutes: record.ten_minutes,
        hours: record.hours,
        days: record.days,
        weeks: record.weeks,
        months: record.months,
        min_points: record.min_points,
    }
}

impl PolicyChange {
    fn apply(&self, window_s: &mut u64, record: &mut RetentionRecord) {
        *window_s = self.window_s.unwrap_or(*window_s);
        let set = |to: &mut u32, from: Option<u32>| *to = from.unwrap_or(*to);
        set(&mut record.ten_minutes, self.ten_minutes);
        set(&mut record.hours, self.hours);
        set(&mut record.days, self.days);
        set(&mut record.weeks, self.weeks);
        set(&mut record.months, self.months);
        set(&mut record.min_points, self.min_points);
        if let Some(cap) = self.cap_bytes {
            record.cap_bytes = (cap > 0).then_some(cap);
        }
    }
}

impl Group {
    fn keeping(&self) -> std::sync::MutexGuard<'_, Keeping> {
        self.keeping.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// What is to be kept may have changed: the next look decides anew.
    pub(super) fn decide_anew(&self) {
        self.keeping().decided = None;
    }

    /// What the store has to keep now.
    pub(super) fn retention(&self) -> Retention {
        let catalog = self.store.catalog();
        if self.store.keep() == Keep::Cache {
            return Retention::from(Seq::ZERO);
        }
        // There is no point to recover to yet.
        if !catalog.is_clean() && catalog.last_clean.is_none() {
            return self.with_unsent(Retention::from(Seq(u64::MAX)));
        }
        // Production needs room, and most of it the peer keeps; what is pinned here stays here.
        if self.history_gives_way() {
            let pinned = self.pinned().map(|points| Retention { keep_from: Seq(u64::MAX), points });
            return self.with_unsent(pinned.unwrap_or_else(|error| self.keep_all(&error)));
        }
        let fresh = |at: &Mono| clock::mono().since(*at) < FRESH_US;
        if let Some((at, decided)) = &self.keeping().decided
            && fresh(at)
        {
            return self.with_unsent(decided.clone());
        }
        let decided = self.decide(&catalog).unwrap_or_else(|error| self.keep_all(&error));
        self.keeping().decided = Some((clock::mono(), decided.clone()));
        self.with_unsent(decided)
    }

    /// What is to be kept cannot be told.
    fn keep_all(&self, why: &Failure) -> Retention {
        log::warn!("group {}: nothing is given up: {why}", self.name());
        Retention::from(Seq::ZERO)
    }

    /// The positions of pinned checkpoints. Cheap where there is no pin.
    fn pinned(&self) -> Result<Vec<Seq>> {
        if !self.store.notes().iter().any(|(_, note)| note.pinned) {
            return Ok(Vec::new());
        }
        let checkpoints = self.store.checkpoints()?;
        let pinned = checkpoints.iter().filter(|checkpoint| checkpoint.note.pinned);
        Ok(pinned.map(|checkpoint| checkpoint.position.seq).collect())
    }

    /// A primary keeps what its peer has not got. What the peer gets in place of frames need not stay
    /// in the log; that it began at its frame has to be told until it has all of it.
    fn with_unsent(&self, mut retention: Retention) -> Retention {
        let giving = self.giving();
        // After a failover, what the old primary lacks: while there is room for it.
        let awaits = self.awaits_reversal() && giving.is_none();
        let acked = if awaits { self.fork() } else { self.store.acked() };
        let needed = giving.map_or(acked, |(_, to)| acked.max(to));
        let tracked = if awaits { None } else { self.tracked_from() };
        self.store.set_frees_log(tracked.is_some());
        if self.role() == Role::Primary
            && self.peer().is_some()
            && !(awaits && self.is_short_of_room())
            && tracked.is_none()
        {
            retention.keep_from = retention.keep_from.min(needed);
        }
        let keep_from = retention.keep_from;
        retention.points.retain(|point| *point <= keep_from);
        // What changed since has to be told apart: behind the peer's frame, and behind the one to which
        // what it gets now leads.
        let goals = giving.map_or([tracked, None], |(from, to)| [from, Some(to)]);
        let base = self.store.base_position().map_or(Seq(u64::MAX), |base| base.seq);
        for goal in goals.into_iter().flatten() {
            let from = self.store.told_apart_at(goal);
            if from <= keep_from
                && base <= goal
                && (goal > Seq::ZERO || self.store.acked() == Seq::ZERO)
                && let Err(at) = retention.points.binary_search(&from)
            {
                retention.points.insert(at, from);
            }
        }
        retention
    }

    fn decide(&self, catalog: &Catalog) -> Result<Retention> {
        let record = self.trusted_record(catalog)?;
        let Some(record) = record else { return Ok(Retention::from(Seq::ZERO)) };
        let checkpoints = self.store.checkpoints()?;
        let policy = policy_of(&record, self.settings().history_s);
        let squeeze = self.keeping().squeeze;
        let decision = self.put(&policy, &record, &checkpoints, catalog, squeeze);
        let keep_from = self.store.seq_before(decision.window_from.0);
        let mut points: Vec<Seq> = checkpoints
            .iter()
            .zip(&decision.reasons)
            .filter(|(checkpoint, why)| why.keeps() && checkpoint.position.seq <= keep_from)
            .map(|(checkpoint, _)| checkpoint.position.seq)
            .collect();
        // In the middle of a resync the newest point need not be a checkpoint.
        if let Some(clean) = catalog.last_clean.filter(|at| at.seq <= keep_from)
            && !catalog.is_clean()
        {
            points.push(clean.seq);
            points.sort_unstable();
            points.dedup();
        }
        self.keeping().sacrifice = decision.sacrifice;
        Ok(Retention { keep_from, points })
    }

    fn put(
        &self,
        policy: &Policy,
        record: &RetentionRecord,
        checkpoints: &[Checkpoint],
        catalog: &Catalog,
        squeeze: Squeeze,
    ) -> Decision {
        let forks = self.store.forks();
        let points: Vec<Point> = checkpoints
            .iter()
            .map(|checkpoint| Point {
                seq: checkpoint.position.seq,
                log_time: checkpoint.mark.log_time,
                clean: checkpoint.mark.clean,
                pinned: checkpoint.note.pinned,
                proven: checkpoint.note.proven,
                in_use: forks.contains(&checkpoint.position.seq),
            })
            .collect();
        let anchor = record.anchor_us.unwrap_or_else(|| anchor_of(catalog));
        policy.decide(&points, catalog.log_time, anchor, squeeze)
    }

    /// The policy, once there is an anchor and the clock is trusted; none while it is not.
    fn trusted_record(&self, catalog: &Catalog) -> Result<Option<RetentionRecord>> {
        let record = self.settings().retention;
        let (Some(offset_us), Some(ahead_us)) = (record.clock_offset_us, record.clock_ahead_us)
        else {
            if catalog.at.seq == Seq::ZERO {
                return Ok(None);
            }
            let now = Baseline::of(catalog.log_time, catalog.wall_time, clock::wall());
            self.change_settings(|settings| {
                let record = &mut settings.retention;
                record.anchor_us.get_or_insert_with(|| anchor_of(catalog));
                record.clock_offset_us = Some(now.offset_us);
                // What is ahead of this node from the start is for a person to judge, too.
                record.clock_ahead_us = Some(0);
            })?;
            return self.trusted_record(catalog);
        };
        let baseline = Baseline { offset_us, ahead_us };
        let distrust = baseline.judge(catalog.log_time, catalog.wall_time, clock::wall());
        let paused = distrust.map(|why| {
            let minutes = |us: i64| us / 60_000_000;
            let what = match why {
                Distrust::Stepped(us) => {
                    format!("the clock of the production node made a step of {} min", minutes(us))
                }
                Distrust::Ahead(us) => format!(
                    "the clock of the production node is {} min ahead of this node's",
                    minutes(us)
                ),
            };
            format!(
                "{what}, so the age of history cannot be told: nothing is given up until somebody \
                 has looked and says: srn retention resume {}",
                self.name()
            )
        });
        let is_paused = paused.is_some();
        let news = {
            let mut keeping = self.keeping();
            let news = is_paused != keeping.paused.is_some();
            keeping.paused.clone_from(&paused);
            news
        };
        if news {
            match &paused {
                Some(why) => self.tell(Level::Alert, &format!("retention is paused: {why}")),
                None => self.tell(Level::Info, "retention goes on"),
            }
        }
        Ok((!is_paused).then_some(record))
    }

    /// A person has looked: the clock is right as it is.
    ///
    /// # Errors
    /// When it is not paused, or that cannot be written down.
    pub fn resume_retention(&self) -> Result<()> {
        if self.keeping().paused.is_none() {
            return Err(Failure::conflict(format!(
                "retention of group {} is not paused",
                self.name()
            )));
        }
        let catalog = self.store.catalog();
        let now = Baseline::of(catalog.log_time, catalog.wall_time, clock::wall());
        self.change_settings(|settings| {
            settings.retention.clock_offset_us = Some(now.offset_us);
            settings.retention.clock_ahead_us = Some(now.ahead_us);
        })?;
        let mut keeping = self.keeping();
        keeping.paused = None;
        keeping.decided = None;
        drop(keeping);
        self.tell(Level::Info, "retention goes on: an administrator trusts the clock");
        self.maintainer.wake();
        Ok(())
    }

    /// What the policy does, or would do with these changes. Reads the history.
    ///
    /// # Errors
    /// When this node keeps no copy, or the history cannot be read.
    pub fn retention_status(&self, change: &PolicyChange) -> Result<RetentionStatus> {
        self.check_keeps_copy()?;
        let catalog = self.store.catalog();
        let checkpoints = self.store.checkpoints()?;
        let (record, window_s) = (self.settings().retention, self.settings().history_s);
        let squeeze = self.keeping().squeeze;
        let now = policy_of(&record, window_s);
        let as_it_is = self.put(&now, &record, &checkpoints, &catalog, squeeze);
        let (mut next, mut next_window_s) = (record, window_s);
        change.apply(&mut next_window_s, &mut next);
        let policy = policy_of(&next, next_window_s);
        let decision = self.put(&policy, &next, &checkpoints, &catalog, squeeze);
        let drops = as_it_is
            .reasons
            .iter()
            .zip(&decision.reasons)
            .filter(|(before, after)| before.keeps() && !after.keeps())
            .count();
        let points = checkpoints
            .iter()
            .zip(&decision.reasons)
            .map(|(checkpoint, why)| PointFate {
                checkpoint: CheckpointStatus::from(checkpoint),
                keep: why.keeps(),
                why: words(*why, next_window_s),
            })
            .collect();
        let squeezed = squeeze.window_us < policy.window_us;
        Ok(RetentionStatus {
            group: self.name(),
            window_s: next_window_s,
            policy: next,
            used_bytes: self.history_bytes(),
            full_from: self.store.timeline()?.full_from().map(|(seq, at)| moment(seq, at)),
            paused: self.keeping().paused.clone(),
            squeezed_to_s: squeezed.then_some(squeeze.window_us / 1_000_000),
            points,
            drops,
            shortens: next_window_s < window_s,
        })
    }

    /// Changes the policy. Where that drops what is kept now, a person has to have confirmed it.
    ///
    /// # Errors
    /// When it would drop something and is not confirmed; when it cannot be written.
    pub fn set_retention(&self, change: &PolicyChange, confirmed: bool) -> Result<RetentionStatus> {
        let would = self.retention_status(change)?;
        if !confirmed && (would.drops > 0 || would.shortens) {
            return Err(Failure::refused(format!(
                "that drops {} checkpoints of group {1} which are kept now{2}; look at it with: \
                 srn retention preview {1}, and confirm it with --yes",
                would.drops,
                self.name(),
                if would.shortens { ", and shortens its full history" } else { "" }
            )));
        }
        self.change_settings(|record| {
            change.apply(&mut record.history_s, &mut record.retention);
        })?;
        {
            let mut keeping = self.keeping();
            keeping.decided = None;
            keeping.squeeze = Squeeze::NONE;
            keeping.told_over_cap = false;
        }
        self.tell(Level::Info, "the retention policy was changed by an administrator");
        self.maintainer.wake();
        self.retention_status(&PolicyChange::default())
    }

    fn check_keeps_copy(&self) -> Result<()> {
        if self.store.keep() == Keep::Cache {
            return Err(Failure::refused(format!(
                "this node keeps only a cache of group {}; what is kept of its history is decided \
                 at the recovery node",
                self.name()
            )));
        }
        Ok(())
    }

    /// Bytes that history takes, beside the base.
    fn history_bytes(&self) -> u64 {
        self.store.log_bytes().0 + self.store.layer_bytes()
    }

    /// All maintenance is done. If history takes more than its cap, gives up one thing more, and
    /// says so; returns whether it did.
    pub(super) fn give_up_for_cap(&self) -> bool {
        let settings = self.settings();
        let (Some(cap), Keep::Replica) = (settings.retention.cap_bytes, self.store.keep()) else {
            return false;
        };
        let used = self.history_bytes();
        // What was given up and is still held, by a reader, a clone or a branch, frees nothing yet;
        // neither would the next thing.
        if used > cap && self.store.debt(&self.retention()).bytes > 0 {
            return false;
        }
        let policy_us = settings.history_s.saturating_mul(1_000_000);
        let mut keeping = self.keeping();
        if used <= cap {
            keeping.told_over_cap = false;
            let squeeze = &mut keeping.squeeze;
            if squeeze.window_us < policy_us && used < cap / 4 * 3 {
                let wider = squeeze.window_us.saturating_add(squeeze.window_us / 4);
                squeeze.window_us = if wider < policy_us { wider } else { u64::MAX };
            }
            return false;
        }
        if keeping.paused.is_some() {
            return false;
        }
        let why = format!("history takes {}, its cap is {}", Size(used), Size(cap));
        let text = if let Some(seq) = keeping.sacrifice.first().copied() {
            keeping.squeeze.given_up = seq;
            format!("the checkpoint at frame {seq} is given up: {why}")
        } else {
            let kept = self.window_us().min(keeping.squeeze.window_us).min(policy_us);
            if kept <= WINDOW_MIN_US {
                let news = !std::mem::replace(&mut keeping.told_over_cap, true);
                drop(keeping);
                if news {
                    let text = format!("{why}, and nothing more can be given up");
                    self.tell(Level::Alert, &text);
                }
                return false;
            }
            let shorter = (kept / 4 * 3).max(WINDOW_MIN_US);
            keeping.squeeze.window_us = shorter;
            format!("the full history shrinks to {} s: {why}", shorter / 1_000_000)
        };
        keeping.decided = None;
        drop(keeping);
        self.tell(Level::Warning, &text);
        true
    }

    /// How far back every position is kept now, in microseconds of log time.
    fn window_us(&self) -> u64 {
        let head = self.store.catalog().log_time.0;
        let line = self.store.timeline().unwrap_or_default();
        let from = line.full_from().map_or(Seq::ZERO, |from| from.0);
        let block = line.blocks.iter().find(|block| block.first == from);
        block.map_or(0, |block| head.saturating_sub(block.log_time.0))
    }
}

/// What the wall clock says at log time 0.
fn anchor_of(catalog: &Catalog) -> i64 {
    catalog.wall_time.0.saturating_sub_unsigned(catalog.log_time.0)
}

/// Why a checkpoint is kept or dropped.
fn words(why: Reason, window_s: u64) -> String {
    let window = || humantime::format_duration(std::time::Duration::from_secs(window_s));
    match why {
        Reason::Pinned => "pinned".into(),
        Reason::Window => format!("within the window of {}", window()),
        Reason::InUse => "in use".into(),
        Reason::NewestProven => "the newest that is proven".into(),
        Reason::NewestClean => "the newest that is clean".into(),
        Reason::NewestOf(rung, start) => {
            let at = clock::rfc3339(WallTime(start));
            let date = Date::of_days(start.div_euclid(srn_core::civil::DAY_US));
            let day = format!("{:04}-{:02}-{:02}", date.year, date.month, date.day);
            let time = at.get(11..16).unwrap_or_default();
            match rung {
                Rung::TenMinutes => format!("the newest of ten minutes from {day} {time} UTC"),
                Rung::Hour => format!("the newest of the hour {day} {time} UTC"),
                Rung::Day => format!("the newest of the day {day}"),
                Rung::Week => format!("the newest of the week of {day}"),
                Rung::Month => {
                    format!("the newest of the month {:04}-{:02}", date.year, date.month)
                }
            }
        }
        Reason::AtLeast(count) => format!("one of {count} at least"),
        Reason::Unclean => "unclean: it cannot be recovered".into(),
        Reason::Beyond => {
            "a newer one stands for its span, or its span is beyond the ladder".into()
        }
        Reason::GivenUp => "given up for want of space".into(),
    }
}
