//! Calendar expressions as systemd writes them in `OnCalendar=` (systemd.time(7)), and when one
//! comes next.
//!
//! `Mon..Fri *-*-* 02:00` is a set of times of the clock: of each part the values that count, or any
//! (`*`). What is asked is the first of them behind a given time. Civil time in, civil time out: this
//! module refuses to know clocks and what a zone means, so who calls it decides what becomes of an hour
//! that is there twice, or not at all. No published crate reads this syntax, only that of cron.
//!
//! Invariants, tested against what systemd itself says and against a reading of the expression as sets:
//! what comes next is later than what it is asked for, is one of the times that are meant, and none of
//! them lies between.

mod parse;
#[cfg(test)]
mod tests;

pub use parse::{BadCalendar, Wrong};

use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;

use crate::civil::{Civil, Date, days_in};

/// The years in which there are times; those of systemd.
const YEARS: (u32, u32) = (1970, 2199);

/// Microseconds of a second, a minute and an hour.
const SECOND: u32 = 1_000_000;
const MINUTE: i64 = 60_000_000;
const HOUR: i64 = 60 * MINUTE;

const DAYS: [&str; 7] = ["Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun"];

/// The clock by which an expression is meant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Zone {
    /// That of whoever reads it.
    Local,
    /// Coordinated universal time.
    Utc,
    /// That of a zone by its name, as `Europe/Berlin`; whether there is one is not known here.
    Named(String),
}

/// A set of times of the clock.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Calendar {
    /// A bit for each day of the week, Monday the lowest; all for any.
    weekdays: u8,
    year: Field,
    month: Field,
    day: Field,
    /// Days are counted from the end of the month; the last is 1.
    from_end: bool,
    hour: Field,
    minute: Field,
    /// In microseconds.
    second: Field,
    zone: Zone,
}

/// The values of one part; empty for any.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
struct Field(Vec<Item>);

/// A value, or several in even steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Item {
    first: u32,
    /// None: only the first when there are no steps, else up to the end of what is possible.
    last: Option<u32>,
    /// The step; 0 for none.
    every: u32,
}

impl Item {
    const fn one(value: u32) -> Self {
        Self { first: value, last: None, every: 0 }
    }

    /// Its first value of at least `least`, where `most` is the greatest that can be.
    fn at_least(&self, least: u32, most: u32) -> Option<u32> {
        let ahead = least.saturating_sub(self.first);
        let last = match (self.last, self.every) {
            (Some(last), _) => last,
            (None, 0) => self.first,
            (None, _) => most,
        };
        let steps = if self.every == 0 { ahead.min(1) } else { ahead.div_ceil(self.every) };
        let value = self.first.checked_add(steps.checked_mul(self.every.max(1))?)?;
        (value <= last.min(most)).then_some(value)
    }

    /// The same days of a month of so many, counted from its beginning.
    fn turned(&self, days: u32) -> Self {
        let turn = |day: u32| (days + 1).saturating_sub(day);
        match self.last {
            Some(last) => Self { first: turn(last), last: Some(turn(self.first)), ..*self },
            None => Self { first: turn(self.first), ..*self },
        }
    }
}

impl Field {
    /// The first value of at least `least`, where `most` is the greatest that can be.
    fn at_least(&self, least: u32, most: u32) -> Option<u32> {
        if self.0.is_empty() {
            return (least <= most).then_some(least);
        }
        self.0.iter().filter_map(|item| item.at_least(least, most)).min()
    }
}

impl Calendar {
    /// By which clock it is meant.
    #[must_use]
    pub const fn zone(&self) -> &Zone {
        &self.zone
    }

    /// The first of its times behind `after`; none when there are no more, up to the year 2199.
    #[must_use]
    pub fn next(&self, after: Civil) -> Option<Civil> {
        let least = after.of_day_us.max(-1) + 1;
        if self.is_on(after.date)
            && let Some(of_day_us) = self.time(least)
        {
            return Some(Civil { date: after.date, of_day_us });
        }
        let date = self.date(Date::of_days(after.date.days() + 1))?;
        Some(Civil { date, of_day_us: self.time(0)? })
    }

    /// Whether it has times on this day.
    fn is_on(&self, date: Date) -> bool {
        date.year >= 1970
            && self.date_in_month(date) == Some(date)
            && self.year.at_least(year_of(date), YEARS.1) == Some(year_of(date))
            && self.month.at_least(date.month.into(), 12) == Some(date.month.into())
    }

    /// Its first day of at least this one.
    fn date(&self, least: Date) -> Option<Date> {
        let begin = Date { year: 1970, month: 1, day: 1 };
        let mut least = least.max(begin);
        loop {
            let year = self.year.at_least(year_of(least), YEARS.1)?;
            if year != year_of(least) {
                least = Date { year: i32::try_from(year).ok()?, month: 1, day: 1 };
            }
            let Some(month) = self.month.at_least(least.month.into(), 12) else {
                least = Date { year: least.year + 1, month: 1, day: 1 };
                continue;
            };
            if month != u32::from(least.month) {
                least = Date { month: u8::try_from(month).ok()?, day: 1, ..least };
            }
            if let Some(date) = self.date_in_month(least) {
                return Some(date);
            }
            least = match least.month {
                12 => Date { year: least.year + 1, month: 1, day: 1 },
                month => Date { month: month + 1, day: 1, ..least },
            };
        }
    }

    /// Its first day of at least this one in this month, whatever is said of month and year.
    fn date_in_month(&self, least: Date) -> Option<Date> {
        let days = days_in(least.year, least.month);
        let field = if self.from_end {
            Field(self.day.0.iter().map(|item| item.turned(days.into())).collect())
        } else {
            self.day.clone()
        };
        let mut from = u32::from(least.day);
        loop {
            let day = field.at_least(from, days.into())?;
            let date = Date { day: u8::try_from(day).ok()?, ..least };
            // The first of 1970 was a Thursday.
            let weekday = (date.days() + 3).rem_euclid(7);
            if self.weekdays >> weekday & 1 == 1 {
                return Some(date);
            }
            from = day + 1;
        }
    }

    /// Its first time of day of at least this one, in microseconds since midnight.
    fn time(&self, least_us: i64) -> Option<i64> {
        let of = |us: i64| u32::try_from(us).ok();
        let hour = of(least_us / HOUR)?;
        let minute = of(least_us % HOUR / MINUTE)?;
        let second = of(least_us % MINUTE)?;
        // In this minute, else in this hour, else today.
        if self.hour.at_least(hour, 23) == Some(hour) {
            if self.minute.at_least(minute, 59) == Some(minute)
                && let Some(second) = self.second.at_least(second, 60 * SECOND - 1)
            {
                return Some(of_day(hour, minute, second));
            }
            if let Some(minute) = self.minute.at_least(minute + 1, 59) {
                return Some(of_day(hour, minute, self.second.at_least(0, 60 * SECOND - 1)?));
            }
        }
        let hour = self.hour.at_least(hour + 1, 23)?;
        let minute = self.minute.at_least(0, 59)?;
        Some(of_day(hour, minute, self.second.at_least(0, 60 * SECOND - 1)?))
    }
}

fn year_of(date: Date) -> u32 {
    u32::try_from(date.year).unwrap_or_default()
}

fn of_day(hour: u32, minute: u32, second_us: u32) -> i64 {
    i64::from(hour) * HOUR + i64::from(minute) * MINUTE + i64::from(second_us)
}

/// As systemd writes it when it normalises one.
impl fmt::Display for Calendar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.weekdays != 0x7f {
            weekdays(self.weekdays, f)?;
            f.write_str(" ")?;
        }
        field(&self.year, 4, f)?;
        f.write_str("-")?;
        field(&self.month, 2, f)?;
        f.write_str(if self.from_end { "~" } else { "-" })?;
        field(&self.day, 2, f)?;
        f.write_str(" ")?;
        field(&self.hour, 2, f)?;
        f.write_str(":")?;
        field(&self.minute, 2, f)?;
        f.write_str(":")?;
        seconds(&self.second, f)?;
        match &self.zone {
            Zone::Local => Ok(()),
            Zone::Utc => f.write_str(" UTC"),
            Zone::Named(name) => write!(f, " {name}"),
        }
    }
}

fn weekdays(bits: u8, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    let mut comma = "";
    let mut day = 0;
    while let Some(name) = DAYS.get(day) {
        let run = (bits >> day).trailing_ones() as usize;
        if run == 0 {
            day += 1;
            continue;
        }
        write!(f, "{comma}{name}")?;
        if let Some(last) = DAYS.get(day + run - 1).filter(|_| run > 1) {
            write!(f, "{}{last}", if run > 2 { ".." } else { "," })?;
        }
        comma = ",";
        day += run;
    }
    Ok(())
}

fn field(field: &Field, width: usize, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    if field.0.is_empty() {
        return f.write_str("*");
    }
    let mut comma = "";
    for item in &field.0 {
        write!(f, "{comma}{:0width$}", item.first)?;
        if let Some(last) = item.last {
            write!(f, "..{last:0width$}")?;
        }
        // A range goes in steps of one anyway.
        if item.every > 0 && !(item.last.is_some() && item.every == 1) {
            write!(f, "/{}", item.every)?;
        }
        comma = ",";
    }
    Ok(())
}

fn seconds(field: &Field, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    if field.0 == [Item { first: 0, last: None, every: SECOND }] {
        return f.write_str("*");
    }
    let fraction = |us: u32, f: &mut fmt::Formatter<'_>| match us % SECOND {
        0 => Ok(()),
        us => write!(f, ".{us:06}"),
    };
    let mut comma = "";
    for item in &field.0 {
        write!(f, "{comma}{:02}", item.first / SECOND)?;
        fraction(item.first, f)?;
        if let Some(last) = item.last {
            write!(f, "..{:02}", last / SECOND)?;
            fraction(last, f)?;
        }
        if item.every > 0 && !(item.last.is_some() && item.every == SECOND) {
            write!(f, "/{}", item.every / SECOND)?;
            fraction(item.every, f)?;
        }
        comma = ",";
    }
    Ok(())
}
