//! When a calendar expression comes next by the clock of its zone, as a time since 1970.
//!
//! An hour that is there twice, as clocks are put back, counts the first time. A time that is not
//! there, as clocks are put forward, counts at the moment when they are. So nothing that comes daily is
//! left out or made twice; what comes every few minutes pauses in the second of the two hours, as
//! systemd's timers do, and never in UTC.

use jiff::Timestamp;
use jiff::civil::DateTime;
use jiff::tz::{AmbiguousOffset, TimeZone};
use srn_core::calendar::{Calendar, Zone};
use srn_core::civil::{Civil, Date};
use srn_core::time::WallTime;

use crate::clock;
use crate::error::{Failure, Result};

/// A calendar expression with the clock that it goes by.
#[derive(Debug)]
pub struct Timetable {
    calendar: Calendar,
    zone: TimeZone,
}

impl Timetable {
    /// Reads an expression.
    ///
    /// # Errors
    /// [`crate::error::Kind::Invalid`] with the character that is wrong and with examples, or when there
    /// is no such zone.
    pub fn parse(text: &str) -> Result<Self> {
        let calendar = Calendar::parse(text)
            .map_err(|error| Failure::invalid(format!("{text:?}: {error}")))?;
        let zone = match calendar.zone() {
            Zone::Local => clock::time_zone(),
            Zone::Utc => TimeZone::UTC,
            Zone::Named(name) => TimeZone::get(name).map_err(|error| {
                Failure::invalid(format!(
                    "{text:?}: {error}; write UTC, a zone as Europe/Berlin (this node has those of \
                     its package tzdata), or none for the node's own"
                ))
            })?,
        };
        Ok(Self { calendar, zone })
    }

    /// The expression in its usual form.
    #[must_use]
    pub fn normal(&self) -> String {
        self.calendar.to_string()
    }

    /// Its first time behind `after`; none when it comes no more.
    #[must_use]
    pub fn next(&self, after: WallTime) -> Option<WallTime> {
        let timestamp = Timestamp::from_microsecond(after.0).ok()?;
        let mut civil = of_jiff(self.zone.to_datetime(timestamp))?;
        loop {
            civil = self.calendar.next(civil)?;
            let time = self.time(civil)?;
            if time > after {
                return Some(time);
            }
            // In an hour that is there for the second time all of it has been.
            civil = self.end_of_fold(civil).unwrap_or(civil);
        }
    }

    /// The newest of its times behind `after`, up to `until`; of very many the end.
    #[must_use]
    pub fn newest(&self, after: WallTime, until: WallTime) -> Option<WallTime> {
        /// More are not counted.
        const MANY: usize = 4096;
        let due = std::iter::successors(self.next(after), |time| self.next(*time));
        let mut due = due.take_while(|time| *time <= until);
        let mut newest = None;
        for _ in 0..MANY {
            match due.next() {
                Some(time) => newest = Some(time),
                None => return newest,
            }
        }
        Some(until)
    }

    /// A time as its clock shows it.
    #[must_use]
    pub fn local(&self, time: WallTime) -> String {
        match Timestamp::from_microsecond(time.0) {
            Ok(time) => time.to_zoned(self.zone.clone()).strftime("%F %T").to_string(),
            Err(_) => clock::rfc3339(time),
        }
    }

    /// The last microsecond of the hour that is there twice, if this time is in one.
    fn end_of_fold(&self, civil: Civil) -> Option<Civil> {
        let ambiguous = self.zone.to_ambiguous_timestamp(to_jiff(civil)?);
        let AmbiguousOffset::Fold { before, .. } = ambiguous.offset() else { return None };
        let put_back = self.zone.following(ambiguous.earlier().ok()?).next()?.timestamp();
        let last = put_back - jiff::SignedDuration::from_micros(1);
        of_jiff(before.to_datetime(last))
    }

    fn time(&self, civil: Civil) -> Option<WallTime> {
        let ambiguous = self.zone.to_ambiguous_timestamp(to_jiff(civil)?);
        let gap = matches!(ambiguous.offset(), AmbiguousOffset::Gap { .. });
        let time = ambiguous.earlier().ok()?;
        let time = if gap { self.zone.following(time).next()?.timestamp() } else { time };
        Some(WallTime(time.as_microsecond()))
    }
}

fn of_jiff(time: DateTime) -> Option<Civil> {
    let narrow = |number: i8| u8::try_from(number).ok();
    let date =
        Date { year: time.year().into(), month: narrow(time.month())?, day: narrow(time.day())? };
    let seconds = (i64::from(time.hour()) * 60 + i64::from(time.minute())) * 60;
    let seconds = seconds + i64::from(time.second());
    let us = i64::from(time.subsec_nanosecond()) / 1000;
    Some(Civil { date, of_day_us: seconds * 1_000_000 + us })
}

fn to_jiff(civil: Civil) -> Option<DateTime> {
    let narrow = |number: u8| i8::try_from(number).ok();
    let year = i16::try_from(civil.date.year).ok()?;
    let date = jiff::civil::Date::new(year, narrow(civil.date.month)?, narrow(civil.date.day)?);
    let span = jiff::Span::new().try_microseconds(civil.of_day_us).ok()?;
    date.ok()?.at(0, 0, 0, 0).checked_add(span).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The next times by the clock of Berlin.
    fn berlin(text: &str, after: &str, count: usize) -> Vec<String> {
        let zone = TimeZone::posix("CET-1CEST,M3.5.0,M10.5.0/3").unwrap();
        let table = Timetable { calendar: Calendar::parse(text).unwrap(), zone };
        let after: Timestamp = after.parse().unwrap();
        let after = WallTime(after.as_microsecond());
        let times = std::iter::successors(table.next(after), |time| table.next(*time));
        times.take(count).map(|time| clock::rfc3339(time)[..16].to_owned()).collect()
    }

    #[test]
    fn a_time_that_is_not_there_counts_when_clocks_are_put_forward() {
        let at = |text, after, count| berlin(text, after, count);
        assert_eq!(
            at("02:30", "2026-03-27T12:00:00Z", 3),
            ["2026-03-28T01:30", "2026-03-29T01:00", "2026-03-30T00:30"]
        );
        // Behind it nothing is left of that day.
        assert_eq!(at("02:30", "2026-03-29T01:00:00Z", 1), ["2026-03-30T00:30"]);
        assert_eq!(at("02:30", "2026-03-29T00:59:59.999999Z", 1), ["2026-03-29T01:00"]);
        // What comes often comes once at that moment.
        assert_eq!(
            at("*:0/30", "2026-03-29T00:00:00Z", 4),
            ["2026-03-29T00:30", "2026-03-29T01:00", "2026-03-29T01:30", "2026-03-29T02:00"]
        );
    }

    #[test]
    fn an_hour_that_is_there_twice_counts_once() {
        let at = |text, after, count| berlin(text, after, count);
        assert_eq!(
            at("02:30", "2026-10-24T12:00:00Z", 2),
            ["2026-10-25T00:30", "2026-10-26T01:30"]
        );
        // Asked within the second one.
        assert_eq!(at("02:30", "2026-10-25T01:10:00Z", 1), ["2026-10-26T01:30"]);
        assert_eq!(
            at("*:0/30", "2026-10-25T00:00:00Z", 3),
            ["2026-10-25T00:30", "2026-10-25T02:00", "2026-10-25T02:30"]
        );
    }

    #[test]
    fn what_comes_every_microsecond_is_found_at_once_too() {
        let at = berlin("*:*:0/0.000001", "2026-10-25T01:10:00Z", 2);
        assert_eq!(at, ["2026-10-25T02:00", "2026-10-25T02:00"]);
    }

    #[test]
    fn the_zone_is_that_of_the_expression() {
        let table = Timetable::parse("Mon 02:00 UTC").unwrap();
        let after: Timestamp = "2026-11-20T12:00:00Z".parse().unwrap();
        let next = table.next(WallTime(after.as_microsecond())).unwrap();
        assert_eq!(clock::rfc3339(next), "2026-11-23T02:00:00.000Z");
        assert_eq!(table.local(next), "2026-11-23 02:00:00");
        assert_eq!(table.normal(), "Mon *-*-* 02:00:00 UTC");
        let nowhere = Timetable::parse("02:00 Europe/Nowhere").unwrap_err();
        assert!(nowhere.message.contains("Europe/Nowhere"), "{nowhere}");
        let wrong = Timetable::parse("Mon..Fry 02:00").unwrap_err();
        assert!(wrong.message.contains("at character 6") && wrong.message.contains("daily"));
    }

    #[test]
    fn of_many_that_were_missed_the_newest_counts() {
        let table = Timetable::parse("hourly UTC").unwrap();
        let at = |text: &str| WallTime(text.parse::<Timestamp>().unwrap().as_microsecond());
        let (from, to) = (at("2026-11-20T12:00:00Z"), at("2026-11-21T09:30:00Z"));
        assert_eq!(table.newest(from, to), Some(at("2026-11-21T09:00:00Z")));
        assert_eq!(table.newest(to, at("2026-11-21T09:59:59Z")), None);
        let often = Timetable::parse("*:*:* UTC").unwrap();
        assert_eq!(often.newest(from, to), Some(to));
    }
}
