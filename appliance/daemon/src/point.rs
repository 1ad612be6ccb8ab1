//! The point in time that a person means, and what is reachable at all.
//!
//! Whatever takes a point takes it through here, so that it means the same everywhere. A point that
//! is chosen can be recovered; what cannot be is refused, with the nearest points that can. It
//! refuses to guess: a time that means several positions is refused with all of them.

use std::sync::Arc;

use jiff::tz::{AmbiguousOffset, Offset, TimeZone};
use serde::{Deserialize, Serialize};
use srn_core::ids::Seq;
use srn_core::point::{Clock, Standing, Timeline, Wanted};
use srn_core::time::WallTime;
use srn_store::catalog::Catalog;
use srn_store::group::{Checkpoint, Group as Store};
use srn_store::manifest::Keep;

use crate::clock;
use crate::error::{Failure, Result};
use crate::group::{BranchStatus, CheckpointStatus, Group};

/// The fewest characters of a checkpoint's id that name it.
const ID_PREFIX_MIN: usize = 4;

/// Times that a refusal lists.
const LISTED: usize = 8;

/// A point that was chosen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Point {
    /// The frame behind which the disks are shown.
    pub seq: Seq,
    /// What was chosen, in words.
    pub words: String,
}

/// A group's history, wherever it is kept.
#[derive(Debug)]
pub struct Recorded<'a> {
    /// What people call the group.
    pub name: String,
    /// Its history.
    pub store: &'a Arc<Store>,
}

impl Recorded<'_> {
    fn name(&self) -> String {
        self.name.clone()
    }

    const fn store(&self) -> &Arc<Store> {
        self.store
    }

    fn catalog(&self) -> Catalog {
        self.store.catalog()
    }
}

/// What can be recovered of a group.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct HistoryStatus {
    /// The group's name.
    pub group: String,
    /// The time zone of this node, in which times without one are read.
    pub zone: String,
    /// The oldest point from which on every one can be recovered; before it only checkpoints can.
    /// None when there is none at all.
    pub from: Option<Moment>,
    /// The newest one.
    pub to: Option<Moment>,
    /// Where within that no point can be recovered.
    pub gaps: Vec<GapStatus>,
    /// The checkpoints, oldest first.
    pub checkpoints: Vec<CheckpointStatus>,
    /// What failovers have left behind here, with its own checkpoints.
    pub branches: Vec<BranchStatus>,
    /// What was asked for, if something was.
    pub chosen: Option<Chosen>,
}

/// A position and its time.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Moment {
    /// The frame.
    pub frame: u64,
    /// Its wall time, in RFC 3339.
    pub time: String,
    /// The same in the node's zone.
    pub local: String,
}

/// A part of the history in which nothing can be recovered.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct GapStatus {
    /// Its first frame.
    pub from: Moment,
    /// Its last frame.
    pub to: Moment,
    /// Why.
    pub reason: String,
    /// Whether it goes on.
    pub open: bool,
}

/// What a point in words means.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Chosen {
    /// As it was asked for.
    pub at: String,
    /// The frame.
    pub frame: u64,
    /// In words.
    pub words: String,
}

pub(crate) fn moment(seq: Seq, time: WallTime) -> Moment {
    Moment { frame: seq.0, time: clock::rfc3339(time), local: clock::in_zone(time) }
}

/// What can be recovered, and what `at` means if it is given.
///
/// # Errors
/// When this node keeps no copy, or the history cannot be read; as [`choose`] for `at`.
pub fn history(group: &Group, at: Option<&str>) -> Result<HistoryStatus> {
    check_replica(group.store(), &group.name())?;
    let store = group.store();
    let line = store.timeline()?;
    let full = line.full_from().map_or(Seq::ZERO, |from| from.0);
    let first = line
        .blocks
        .iter()
        .find(|block| block.first >= full && block.standing == Standing::Whole)
        .map(|block| (block.first, block.wall_time));
    let newest = match line.standing(line.head) {
        Some(Standing::Whole) => Some((line.head, line.head_time)),
        _ => line.nearest(line.head).0,
    };
    let chosen = match at {
        Some(at) => {
            let Point { seq, words } = choose(group, at)?;
            Some(Chosen { at: at.to_owned(), frame: seq.0, words })
        }
        None => None,
    };
    Ok(HistoryStatus {
        group: group.name(),
        zone: clock::zone(),
        from: first.map(|(seq, time)| moment(seq, time)),
        to: newest.map(|(seq, time)| moment(seq, time)),
        gaps: line
            .gaps()
            .iter()
            .map(|gap| GapStatus {
                from: moment(gap.first, gap.from),
                to: moment(gap.last, gap.to),
                reason: gap.reason.words().to_owned(),
                open: gap.open,
            })
            .collect(),
        checkpoints: store.checkpoints()?.iter().map(CheckpointStatus::from).collect(),
        branches: group.read_branches()?,
        chosen,
    })
}

fn check_replica(store: &Store, name: &str) -> Result<()> {
    if store.keep() == Keep::Cache {
        return Err(Failure::refused(format!(
            "this node keeps only a cache of group {name}; its history is at the recovery node"
        )));
    }
    Ok(())
}

/// Chooses a point by what a person said: `latest`, a checkpoint's label or the beginning of its
/// id, a frame, a time, or a span before now.
///
/// # Errors
/// When there is no such point, or several, or it cannot be recovered.
pub fn choose(group: &Group, at: &str) -> Result<Point> {
    choose_in(&Recorded { name: group.name(), store: group.store() }, at)
}

/// The same of a group that no daemon runs.
///
/// # Errors
/// As [`choose`].
pub fn choose_in(group: &Recorded<'_>, at: &str) -> Result<Point> {
    if at == "latest" {
        return latest(group);
    }
    check_replica(group.store(), &group.name())?;
    if let Some(checkpoint) = find_checkpoint_in(group, at)? {
        return of_checkpoint(at, &checkpoint);
    }
    let wanted = Wanted::parse(at).map_err(|error| Failure::invalid(format!("{at:?}: {error}")))?;
    let now = clock::wall();
    match wanted {
        Wanted::Latest => latest(group),
        Wanted::Frame(seq) => frame_point(group, seq),
        Wanted::Ago(us) => {
            let back = i64::try_from(us).unwrap_or(i64::MAX);
            time_point(group, WallTime(now.0.saturating_sub(back)), now)
        }
        Wanted::Clock(said) => time_point(group, time_of(at, said, now, clock::time_zone())?, now),
        Wanted::Name => Err(Failure::not_found(format!(
            "group {0} has no checkpoint {at:?}; list them with: srn history {0}",
            group.name()
        ))),
    }
}

fn latest(group: &Recorded<'_>) -> Result<Point> {
    let catalog = group.catalog();
    if catalog.is_clean() {
        let seq = catalog.at.seq;
        let time = clock::rfc3339(catalog.wall_time);
        return Ok(Point { seq, words: format!("frame {seq} of {time}, the newest") });
    }
    match catalog.last_clean {
        Some(clean) => Ok(Point {
            seq: clean.seq,
            words: format!("frame {}, the newest before a resync began", clean.seq),
        }),
        None => Err(Failure::refused(format!(
            "group {} cannot be recovered yet: its initial replication is not complete",
            group.name()
        ))),
    }
}

/// The checkpoint with this label, or whose id begins so; none when there is none.
///
/// # Errors
/// [`Kind::Conflict`](crate::error::Kind::Conflict) when there are several.
pub fn find_checkpoint(group: &Group, name: &str) -> Result<Option<Checkpoint>> {
    find_checkpoint_in(&Recorded { name: group.name(), store: group.store() }, name)
}

fn find_checkpoint_in(group: &Recorded<'_>, name: &str) -> Result<Option<Checkpoint>> {
    let mut found = group.store().checkpoints()?;
    let lower = name.to_lowercase();
    found.retain(|checkpoint| {
        let by_id = || checkpoint.mark.id.to_string().starts_with(&lower);
        (!name.is_empty() && checkpoint.note.label == name)
            || (name.len() >= ID_PREFIX_MIN && by_id())
    });
    if found.len() > 1 {
        return Err(Failure::conflict(format!(
            "{name:?} fits {} checkpoints of group {}; give more of the id",
            found.len(),
            group.name()
        )));
    }
    Ok(found.pop())
}

fn of_checkpoint(at: &str, found: &Checkpoint) -> Result<Point> {
    if !found.mark.clean {
        return Err(Failure::refused(format!(
            "checkpoint {at} is unclean: a resync was under way, and its disks are a mixture of \
             times"
        )));
    }
    let time = clock::rfc3339(found.mark.wall_time);
    let label = match found.note.label.as_str() {
        "" => String::new(),
        label => format!(" \"{label}\""),
    };
    let words = format!("checkpoint {}{label} of {time}", found.mark.id.short());
    Ok(Point { seq: found.position.seq, words })
}

/// The point at a frame, which must be kept and hold whole disks.
fn frame_point(group: &Recorded<'_>, seq: Seq) -> Result<Point> {
    let name = group.name();
    let view = group.store().view_at(seq).map_err(|error| {
        let failure = Failure::from(error);
        Failure::new(
            failure.kind,
            format!("group {name}: {failure}; list what there is with: srn history {name}"),
        )
    })?;
    let catalog = view.catalog();
    if !catalog.is_clean() {
        let line = group.store().timeline()?;
        return Err(not_whole(group, &line, seq, catalog.standing()));
    }
    Ok(Point { seq, words: format!("frame {seq} of {}", clock::rfc3339(catalog.wall_time)) })
}

/// The newest frame at or before a time.
fn time_point(group: &Recorded<'_>, time: WallTime, now: WallTime) -> Result<Point> {
    let name = group.name();
    let said = clock::rfc3339(time);
    let store = group.store();
    let line = store.timeline()?;
    if time > now && time > line.head_time {
        return Err(Failure::not_found(format!(
            "{said} is still to come; the newest write of group {name} is of {}",
            clock::rfc3339(line.head_time)
        )));
    }
    let candidates = line.at(time, now);
    let mut found = Vec::new();
    for candidate in candidates.iter().take(LISTED) {
        found.push(store.newest_at(*candidate, time)?);
    }
    let seq = match found.as_slice() {
        [seq] => *seq,
        [] => return Err(not_kept(group, &line, &said)),
        several => {
            let list: Vec<String> = several.iter().map(|seq| format!("frame:{seq}")).collect();
            let more = if candidates.len() > LISTED { " and more" } else { "" };
            return Err(Failure::conflict(format!(
                "it was {said} more than once for group {name}, as its clock was set back; choose \
                 one of: {}{more}",
                list.join(", ")
            )));
        }
    };
    if let Some(next) = line.behind_hole(seq) {
        let of = |seq: Seq| line.blocks.iter().find(|b| b.first == seq).map(|b| (seq, b.wall_time));
        let near: Vec<String> = [seq, next].into_iter().filter_map(of).map(place).collect();
        return Err(Failure::not_found(format!(
            "so long ago only single points of group {name} are kept; the nearest to {said} are {}",
            near.join(" and ")
        )));
    }
    match line.standing(seq) {
        Some(Standing::Whole) => {}
        Some(Standing::NoDisk) if line.nearest(seq).0.is_none() => {
            return Err(not_kept(group, &line, &said));
        }
        Some(standing) => return Err(not_whole(group, &line, seq, standing)),
        None => return frame_point(group, seq),
    }
    // What it is of is told by the frame, and that it can be read.
    let of = clock::rfc3339(store.view_at(seq)?.catalog().wall_time);
    let words = format!("frame {seq} of {of}, the newest at {said} ({})", clock::in_zone(time));
    Ok(Point { seq, words })
}

/// Nothing was there yet, or it is gone.
fn not_kept(group: &Recorded<'_>, line: &Timeline, said: &str) -> Failure {
    let oldest = line.blocks.iter().find(|block| block.standing == Standing::Whole);
    let begins = oldest.map_or_else(
        || "has not begun".to_owned(),
        |block| format!("begins with {}", place((block.first, block.wall_time))),
    );
    Failure::not_found(format!(
        "nothing is kept of {said}: the history of group {} {begins}",
        group.name()
    ))
}

fn place((seq, time): (Seq, WallTime)) -> String {
    format!("frame {seq} of {}", clock::rfc3339(time))
}

/// Why a position cannot be recovered, and which near it can.
fn not_whole(group: &Recorded<'_>, line: &Timeline, seq: Seq, standing: Standing) -> Failure {
    let name = group.name();
    let why = match standing {
        Standing::Mixture(reason) => {
            format!("a disk was a mixture of times ({})", reason.words())
        }
        Standing::NoDisk | Standing::Whole => "there was no disk".to_owned(),
    };
    let near = match line.nearest(seq) {
        (Some(before), Some(after)) => {
            format!("the nearest points are {} before and {} after", place(before), place(after))
        }
        (Some(before), None) => format!("the nearest point before is {}", place(before)),
        (None, Some(after)) => format!("the first point after is {}", place(after)),
        (None, None) => "there is no point yet".to_owned(),
    };
    Failure::refused(format!("group {name}: at frame {seq} {why}; {near}"))
}

/// The time since 1970 of a time of the clock, in `here` when it names no zone.
fn time_of(at: &str, wanted: Clock, now: WallTime, here: TimeZone) -> Result<WallTime> {
    let bad = |error: jiff::Error| Failure::invalid(format!("{at:?}: {error}"));
    let zone = match wanted.offset_s {
        Some(seconds) => TimeZone::fixed(Offset::from_seconds(seconds).map_err(bad)?),
        None => here,
    };
    let date = match wanted.date {
        Some(date) => {
            let year = i16::try_from(date.year).unwrap_or(i16::MAX);
            let narrow = |number: u8| i8::try_from(number).unwrap_or(i8::MAX);
            jiff::civil::Date::new(year, narrow(date.month), narrow(date.day)).map_err(bad)?
        }
        None => {
            let now = jiff::Timestamp::from_microsecond(now.0).map_err(bad)?;
            zone.to_datetime(now).date()
        }
    };
    let midnight = date.at(0, 0, 0, 0);
    let civil = midnight
        .checked_add(jiff::Span::new().try_microseconds(wanted.of_day_us).map_err(bad)?)
        .map_err(bad)?;
    let ambiguous = zone.to_ambiguous_timestamp(civil);
    let with_offset = |offset: Offset| format!("\"{}{offset}\"", civil.strftime("%F %T%.f"));
    match ambiguous.offset() {
        AmbiguousOffset::Unambiguous { .. } => {}
        AmbiguousOffset::Fold { before, after } => {
            return Err(Failure::conflict(format!(
                "{at:?} is twice in {}, as the clocks were put back; choose one of: {}, {}",
                clock::zone(),
                with_offset(before),
                with_offset(after)
            )));
        }
        AmbiguousOffset::Gap { .. } => {
            return Err(Failure::invalid(format!(
                "there was no {at} in {}, as the clocks were put forward",
                clock::zone()
            )));
        }
    }
    Ok(WallTime(ambiguous.unambiguous().map_err(bad)?.as_microsecond()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the clock of Berlin said means this time.
    fn berlin(at: &str, now: &str) -> Result<String> {
        let zone = TimeZone::posix("CET-1CEST,M3.5.0,M10.5.0/3").unwrap();
        let now: jiff::Timestamp = now.parse().unwrap();
        let Ok(Wanted::Clock(clock)) = Wanted::parse(at) else { panic!("{at}") };
        time_of(at, clock, WallTime(now.as_microsecond()), zone).map(clock::rfc3339)
    }

    #[test]
    fn local_times_are_those_of_the_zone() {
        let now = "2026-07-01T22:30:00Z";
        for (at, time) in [
            ("2026-01-20 14:03:07.25", "2026-01-20T13:03:07.250Z"),
            ("2026-07-01 14:03", "2026-07-01T12:03:00.000Z"),
            ("2026-07-01 14:03Z", "2026-07-01T14:03:00.000Z"),
            ("2026-07-01 14:03-05:30", "2026-07-01T19:33:00.000Z"),
            // It is the second of July there, and not yet in Greenwich.
            ("00:15", "2026-07-01T22:15:00.000Z"),
            ("00:15Z", "2026-07-01T00:15:00.000Z"),
            // One side of an hour that is there twice.
            ("2026-10-25 02:30+02:00", "2026-10-25T00:30:00.000Z"),
            ("2026-10-25 02:30+01:00", "2026-10-25T01:30:00.000Z"),
        ] {
            assert_eq!(berlin(at, now).unwrap(), time, "{at}");
        }
    }

    #[test]
    fn an_hour_that_is_there_twice_or_not_at_all_is_refused() {
        let now = "2026-12-01T12:00:00Z";
        let twice = berlin("2026-10-25 02:30", now).unwrap_err();
        assert_eq!(twice.kind, crate::error::Kind::Conflict);
        for offset in ["2026-10-25 02:30:00+02", "2026-10-25 02:30:00+01"] {
            assert!(twice.message.contains(offset), "{twice}");
            assert!(berlin(offset, now).is_ok());
        }
        let never = berlin("2026-03-29 02:30", now).unwrap_err();
        assert_eq!(never.kind, crate::error::Kind::Invalid);
        assert!(never.message.contains("put forward"), "{never}");
    }
}
