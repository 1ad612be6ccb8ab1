//! What is kept of a group's history, and why: a function of the points there are, the policy and
//! the group's own time.
//!
//! Within a window every position is kept. Behind it checkpoints are, by a ladder: the newest of each
//! of the last ten-minute spans, hours, days, weeks and months in which there is one. Some are never
//! dropped: the newest clean one, the newest proven one, those in use and those that a person has
//! pinned.
//!
//! Spans are counted only where there is a clean point in them, newest first. So a night without
//! production takes nothing away, and applying the policy often keeps what applying it once would.
//!
//! Invariants, each with a test that tries to break it: applying it again changes nothing; applying
//! it often loses no point that applying it late would keep; more points never cost a protected one.
//!
//! It refuses to know where points are kept and how they are given up. Time is log time, so a wall
//! clock that steps cannot make history look old; see [`clock`] for one that runs away with it.

pub mod clock;

use alloc::collections::BTreeMap;
use alloc::vec::Vec;

use crate::civil::{DAY_US, Date};
use crate::ids::Seq;
use crate::time::LogTime;

/// Microseconds of a second.
const SECOND_US: u64 = 1_000_000;

/// What shall be kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Policy {
    /// For so long every position, in microseconds of log time.
    pub window_us: u64,
    /// The newest point of so many spans of ten minutes.
    pub ten_minutes: u32,
    /// Of so many hours.
    pub hours: u32,
    /// Of so many days (UTC).
    pub days: u32,
    /// Of so many weeks, which begin on Monday.
    pub weeks: u32,
    /// Of so many months.
    pub months: u32,
    /// So many of the newest clean points, whatever their age.
    pub min_points: u32,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            window_us: 24 * 3600 * SECOND_US,
            ten_minutes: 6,
            hours: 24,
            days: 7,
            weeks: 4,
            months: 0,
            min_points: 60,
        }
    }
}

/// A checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Point {
    /// Its position.
    pub seq: Seq,
    /// When it was made, in the group's own time.
    pub log_time: LogTime,
    /// Whether it can be recovered.
    pub clean: bool,
    /// A person wants it kept.
    pub pinned: bool,
    /// A server has booted from it.
    pub proven: bool,
    /// Something that runs depends on it.
    pub in_use: bool,
}

/// What had to be given up for want of space.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Squeeze {
    /// Points of the ladder up to here.
    pub given_up: Seq,
    /// The window is no longer than this, in microseconds.
    pub window_us: u64,
}

impl Squeeze {
    /// Nothing was given up.
    pub const NONE: Self = Self { given_up: Seq::ZERO, window_us: u64::MAX };
}

/// A span of the ladder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Rung {
    /// Ten minutes.
    TenMinutes,
    /// An hour.
    Hour,
    /// A day.
    Day,
    /// A week.
    Week,
    /// A month.
    Month,
}

/// Why a point is kept or dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// Kept: a person wants it.
    Pinned,
    /// Kept: every position is, at that age.
    Window,
    /// Kept: something depends on it.
    InUse,
    /// Kept: the newest from which a server has booted.
    NewestProven,
    /// Kept: the newest that can be recovered.
    NewestClean,
    /// Kept: the newest of a span, which begins at this time since 1970 in microseconds.
    NewestOf(Rung, i64),
    /// Kept: one of so many at least.
    AtLeast(u32),
    /// Dropped: it cannot be recovered.
    Unclean,
    /// Dropped: a newer one stands for its span, or its span is too old.
    Beyond,
    /// Dropped: the space is needed.
    GivenUp,
}

impl Reason {
    /// Whether the point is kept.
    #[must_use]
    pub const fn keeps(self) -> bool {
        !matches!(self, Self::Unclean | Self::Beyond | Self::GivenUp)
    }

    /// Whether it is kept whatever happens.
    const fn protects(self) -> bool {
        matches!(self, Self::Pinned | Self::InUse | Self::NewestProven | Self::NewestClean)
    }
}

/// What is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decision {
    /// From this time on every position is kept.
    pub window_from: LogTime,
    /// What becomes of each point and why, in the order of the points.
    pub reasons: Vec<Reason>,
    /// Points that can be given up for want of space, in this order; then the window shrinks.
    pub sacrifice: Vec<Seq>,
}

impl Policy {
    const fn ladder(&self) -> [(Rung, u32); 5] {
        [
            (Rung::TenMinutes, self.ten_minutes),
            (Rung::Hour, self.hours),
            (Rung::Day, self.days),
            (Rung::Week, self.weeks),
            (Rung::Month, self.months),
        ]
    }

    /// What is kept of `points`, which are in the order of the log. `now` is the log time of the
    /// newest frame; `anchor_us` is what the wall clock says at log time 0, to which spans are
    /// aligned: it must be the same each time.
    #[must_use]
    pub fn decide(
        &self,
        points: &[Point],
        now: LogTime,
        anchor_us: i64,
        squeeze: Squeeze,
    ) -> Decision {
        let window_us = self.window_us.min(squeeze.window_us);
        let shrunk = squeeze.window_us < self.window_us;
        let window_from = LogTime(now.0.saturating_sub(window_us));
        let newest = |wanted: &dyn Fn(&Point) -> bool| points.iter().rposition(wanted);
        let newest_clean = newest(&|point| point.clean);
        let newest_proven = newest(&|point| point.clean && point.proven);
        let spans = self.spans(points, anchor_us);
        let mut newer_clean: u32 = 0;
        let mut reasons = Vec::with_capacity(points.len());
        for (index, point) in points.iter().enumerate().rev() {
            let squeezed = shrunk || point.seq <= squeeze.given_up;
            let reason = if point.pinned {
                Reason::Pinned
            } else if point.log_time >= window_from {
                Reason::Window
            } else if point.in_use {
                Reason::InUse
            } else if newest_proven == Some(index) {
                Reason::NewestProven
            } else if newest_clean == Some(index) {
                Reason::NewestClean
            } else if !point.clean {
                Reason::Unclean
            } else if let Some((rung, start)) = spans.get(&index).copied() {
                if squeezed { Reason::GivenUp } else { Reason::NewestOf(rung, start) }
            } else if newer_clean < self.min_points {
                if squeezed { Reason::GivenUp } else { Reason::AtLeast(self.min_points) }
            } else {
                Reason::Beyond
            };
            newer_clean = newer_clean.saturating_add(u32::from(point.clean));
            reasons.push(reason);
        }
        reasons.reverse();
        let gives = |(point, reason): (&Point, &Reason)| {
            let can = reason.keeps() && !reason.protects() && *reason != Reason::Window;
            can.then_some(point.seq)
        };
        let sacrifice = points.iter().zip(&reasons).filter_map(gives).collect();
        Decision { window_from, reasons, sacrifice }
    }

    /// Which points are the newest of a span of the ladder: of the shortest one, and where it begins.
    fn spans(&self, points: &[Point], anchor_us: i64) -> BTreeMap<usize, (Rung, i64)> {
        let mut found = BTreeMap::new();
        for (rung, count) in self.ladder() {
            let mut left = count;
            let mut last = None;
            for (index, point) in points.iter().enumerate().rev().filter(|(_, p)| p.clean) {
                let start = start_of(rung, wall_of(point.log_time, anchor_us));
                if last == Some(start) {
                    continue;
                }
                last = Some(start);
                match left.checked_sub(1) {
                    Some(rest) => left = rest,
                    None => break,
                }
                found.entry(index).or_insert((rung, start));
            }
        }
        found
    }
}

fn wall_of(time: LogTime, anchor_us: i64) -> i64 {
    anchor_us.saturating_add_unsigned(time.0)
}

/// When the span begins in which a time lies.
fn start_of(rung: Rung, wall_us: i64) -> i64 {
    let day = wall_us.div_euclid(DAY_US);
    let of_days = |day: i64| day.saturating_mul(DAY_US);
    let of_span = |us: i64| wall_us.div_euclid(us).saturating_mul(us);
    match rung {
        Rung::TenMinutes => of_span(600_000_000),
        Rung::Hour => of_span(3_600_000_000),
        Rung::Day => of_days(day),
        // 1970-01-01 was a Thursday.
        Rung::Week => of_days(day - (day + 3).rem_euclid(7)),
        Rung::Month => of_days(Date { day: 1, ..Date::of_days(day) }.days()),
    }
}

#[cfg(test)]
mod tests;
