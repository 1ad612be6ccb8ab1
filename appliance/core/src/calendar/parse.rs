//! Reading an expression, and saying where it is wrong.

use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;

use super::{Calendar, Field, Item, SECOND, YEARS, Zone};

/// The longest expression, in bytes.
const LEN_MAX: usize = 512;

/// Whole names behind short ones, so that the longer is found first.
const NAMES: [(&str, u8); 14] = [
    ("monday", 0),
    ("tuesday", 1),
    ("wednesday", 2),
    ("thursday", 3),
    ("friday", 4),
    ("saturday", 5),
    ("sunday", 6),
    ("mon", 0),
    ("tue", 1),
    ("wed", 2),
    ("thu", 3),
    ("fri", 4),
    ("sat", 5),
    ("sun", 6),
];

/// What systemd has words for; the odd spellings are its own.
const WORDS: [(&str, &str); 13] = [
    ("minutely", "*-*-* *:*:00"),
    ("hourly", "*-*-* *:00:00"),
    ("daily", "*-*-* 00:00:00"),
    ("weekly", "Mon *-*-* 00:00:00"),
    ("monthly", "*-*-01 00:00:00"),
    ("quarterly", "*-01,04,07,10-01 00:00:00"),
    ("semiannually", "*-01,07-01 00:00:00"),
    ("semi-annually", "*-01,07-01 00:00:00"),
    ("biannually", "*-01,07-01 00:00:00"),
    ("bi-annually", "*-01,07-01 00:00:00"),
    ("yearly", "*-01-01 00:00:00"),
    ("annually", "*-01-01 00:00:00"),
    ("anually", "*-01-01 00:00:00"),
];

/// An expression that is none, and where.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "at character {character}: {what}; write it as in \"Mon..Fri *-*-* 02:00\", \"*-*~01 23:30 UTC\", \
     \"*:0/15\" or \"daily\""
)]
pub struct BadCalendar {
    /// The first character that is wrong, counted from 1.
    pub character: usize,
    /// What is wrong there.
    pub what: Wrong,
}

/// What is wrong with an expression.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Wrong {
    /// There is nothing.
    #[error("there is no expression")]
    Empty,
    /// More than anybody writes.
    #[error("an expression has at most {LEN_MAX} bytes")]
    TooLong,
    /// Not one of seven.
    #[error("there is no such day of the week")]
    Weekday,
    /// From Saturday to Monday, say.
    #[error("days of the week go from Mon to Sun, so a range over Sunday is two: Sat..Sun,Mon")]
    WeekdayRange,
    /// Neither a number nor a star.
    #[error("here a number or * is missing")]
    Number,
    /// What follows a star.
    #[error("behind * no step can stand; every fifth minute is 0/5")]
    StarStep,
    /// Nothing of it can stand there.
    #[error("this cannot stand here")]
    Sign,
    /// Of a time only the hour.
    #[error("a time has hours and minutes, as 02:00")]
    HourOnly,
    /// Seconds since 1970.
    #[error("a time since 1970 comes once, and is no schedule")]
    SinceEpoch,
    /// There is no such value.
    #[error("{0} goes from {1} to {2}")]
    Bounds(&'static str, u32, u32),
    /// The end before the beginning.
    #[error("a range goes from the smaller value to the greater one")]
    Backward,
    /// A step that leads nowhere.
    #[error("a step is at least 1, and one step at least must fit")]
    Step,
}

/// What a part is called, and what it can be.
struct Part(&'static str, u32, u32);

const YEAR: Part = Part("the year", YEARS.0, YEARS.1);
const MONTH: Part = Part("the month", 1, 12);
const DAY: Part = Part("the day", 1, 31);
/// Every month has it.
const DAY_FROM_END: Part = Part("a day counted from the end of the month", 1, 28);
const HOUR: Part = Part("the hour", 0, 23);
const MINUTE: Part = Part("the minute", 0, 59);
const SECONDS: Part = Part("the second", 0, 59);

/// What was read of a part, with where each of it began; empty for any.
type Raw = Vec<(usize, Item)>;

type Read<T> = Result<T, (usize, Wrong)>;

struct Cursor<'a> {
    text: &'a str,
    at: usize,
}

impl Calendar {
    /// Reads an expression. Blanks around it do not count, nor does the case of letters.
    ///
    /// # Errors
    /// [`BadCalendar`], which tells where and has examples.
    pub fn parse(text: &str) -> Result<Self, BadCalendar> {
        read(text).map_err(|(at, what)| {
            let before = text.get(..at).unwrap_or(text);
            BadCalendar { character: before.chars().count() + 1, what }
        })
    }
}

fn read(text: &str) -> Read<Calendar> {
    if text.len() > LEN_MAX {
        return Err((LEN_MAX, Wrong::TooLong));
    }
    let end = text.trim_end();
    let begin = end.len() - end.trim_start().len();
    if begin == end.len() {
        return Err((0, Wrong::Empty));
    }
    let (end, zone) = zone(end, begin);
    let words = end.get(begin..).unwrap_or_default();
    if let Some((_, long)) = WORDS.iter().find(|(word, _)| word.eq_ignore_ascii_case(words)) {
        return Ok(Calendar { zone, ..expression(&mut Cursor { text: long, at: 0 })? });
    }
    let read = expression(&mut Cursor { text: end, at: begin })?;
    Ok(Calendar { zone, ..read })
}

/// The expression without the zone at its end, and the zone.
fn zone(text: &str, begin: usize) -> (&str, Zone) {
    let Some((before, last)) = text.rsplit_once(' ') else { return (text, Zone::Local) };
    let before = before.trim_end();
    if before.len() <= begin {
        return (text, Zone::Local);
    }
    if last.eq_ignore_ascii_case("UTC") {
        return (before, Zone::Utc);
    }
    let named = last.starts_with(|c: char| c.is_ascii_alphabetic())
        && last.chars().all(|c| c.is_ascii_alphanumeric() || "/_+-".contains(c))
        && weekday(last).is_none();
    if named { (before, Zone::Named(last.into())) } else { (text, Zone::Local) }
}

/// The day of the week that a text begins with, and the length of its name.
fn weekday(text: &str) -> Option<(u8, usize)> {
    let begins =
        |name: &str| text.get(..name.len()).is_some_and(|begin| begin.eq_ignore_ascii_case(name));
    NAMES.iter().find(|(name, _)| begins(name)).map(|(name, day)| (*day, name.len()))
}

fn expression(cursor: &mut Cursor<'_>) -> Read<Calendar> {
    if cursor.peek() == Some('@') {
        return Err((cursor.at, Wrong::SinceEpoch));
    }
    let weekdays = cursor.weekdays()?;
    let (date, from_end, begun) = cursor.date()?;
    let [year, month, day] = date;
    let [hour, minute, second] = cursor.time(begun)?;
    let days = if from_end { DAY_FROM_END } else { DAY };
    // Of any day it does not matter from where it is counted.
    let from_end = from_end && !day.is_empty();
    Ok(Calendar {
        weekdays,
        year: sound(short_years(year), &YEAR, 1, false)?,
        month: sound(month, &MONTH, 1, false)?,
        day: sound(day, &days, 1, from_end)?,
        from_end,
        hour: sound(hour, &HOUR, 1, false)?,
        minute: sound(minute, &MINUTE, 1, false)?,
        second: sound(second, &SECONDS, SECOND, false)?,
        zone: Zone::Local,
    })
}

impl Cursor<'_> {
    fn rest(&self) -> &str {
        self.text.get(self.at..).unwrap_or_default()
    }

    fn peek(&self) -> Option<char> {
        self.rest().chars().next()
    }

    fn eat(&mut self, sign: &str) -> bool {
        let found = self.rest().starts_with(sign);
        if found {
            self.at += sign.len();
        }
        found
    }

    /// Blanks, or the end. Whether there was one of them.
    fn gap(&mut self) -> bool {
        let before = self.at;
        self.at += self.rest().len() - self.rest().trim_start_matches(' ').len();
        self.at > before || self.rest().is_empty()
    }

    /// Days of the week, if it begins with them; else all.
    fn weekdays(&mut self) -> Read<u8> {
        if !self.peek().is_some_and(char::is_alphabetic) {
            return Ok(0x7f);
        }
        let mut bits = 0;
        loop {
            let at = self.at;
            let first = self.weekday()?;
            let last = if self.eat("..") || self.eat("-") { self.weekday()? } else { first };
            if last < first {
                return Err((at, Wrong::WeekdayRange));
            }
            for day in first..=last {
                bits |= 1 << day;
            }
            let more = self.eat(",");
            if self.gap() {
                return Ok(bits);
            }
            if !more {
                return Err((self.at, Wrong::Sign));
            }
        }
    }

    fn weekday(&mut self) -> Read<u8> {
        let (day, len) = weekday(self.rest()).ok_or((self.at, Wrong::Weekday))?;
        self.at += len;
        if self.peek().is_some_and(char::is_alphanumeric) {
            return Err((self.at - len, Wrong::Weekday));
        }
        Ok(day)
    }

    /// Year, month and day, any where none are said; whether days are counted from the end; and what
    /// was read of the time, if it turned out to be one.
    fn date(&mut self) -> Read<([Raw; 3], bool, Option<Raw>)> {
        let any = || [vec![], vec![], vec![]];
        if self.rest().is_empty() {
            return Ok((any(), false, None));
        }
        let at = self.at;
        let first = self.chain(1)?;
        if self.peek() == Some(':') {
            return Ok((any(), false, Some(first)));
        }
        let mut from_end = self.eat("~");
        if !from_end && !self.eat("-") {
            let what = if self.rest().is_empty() { Wrong::HourOnly } else { Wrong::Sign };
            return Err((if what == Wrong::HourOnly { at } else { self.at }, what));
        }
        let second = self.chain(1)?;
        if self.gap() {
            return Ok(([vec![], first, second], from_end, None));
        }
        if from_end {
            return Err((self.at, Wrong::Sign));
        }
        from_end = self.eat("~");
        if !from_end && !self.eat("-") {
            return Err((self.at, Wrong::Sign));
        }
        let third = self.chain(1)?;
        if !self.gap() {
            return Err((self.at, Wrong::Sign));
        }
        Ok(([first, second, third], from_end, None))
    }

    /// Hour, minute and second; midnight where none are said.
    fn time(&mut self, begun: Option<Raw>) -> Read<[Raw; 3]> {
        let zero = || vec![(self.at, Item::one(0))];
        if begun.is_none() && self.rest().is_empty() {
            return Ok([zero(), zero(), zero()]);
        }
        let second = zero();
        let at = self.at;
        let hour = match begun {
            Some(hour) => hour,
            None => self.chain(1)?,
        };
        if !self.eat(":") {
            let what = if self.rest().is_empty() { Wrong::HourOnly } else { Wrong::Sign };
            return Err((if what == Wrong::HourOnly { at } else { self.at }, what));
        }
        let minute = self.chain(1)?;
        if self.rest().is_empty() {
            return Ok([hour, minute, second]);
        }
        if !self.eat(":") {
            return Err((self.at, Wrong::Sign));
        }
        let second = self.chain(SECOND)?;
        if self.rest().is_empty() {
            Ok([hour, minute, second])
        } else {
            Err((self.at, Wrong::Sign))
        }
    }

    /// A list of values, ranges and steps, in parts of `unit`.
    fn chain(&mut self, unit: u32) -> Read<Raw> {
        if self.eat("*") {
            if self.peek() == Some('/') {
                return Err((self.at, Wrong::StarStep));
            }
            // Of the parts of a second only the first is meant.
            let whole = (self.at, Item { first: 0, last: None, every: unit });
            return Ok(if unit == 1 { vec![] } else { vec![whole] });
        }
        let mut items = Vec::new();
        loop {
            let at = self.at;
            let mut item = Item::one(self.number(unit)?);
            if self.eat("..") {
                let end = self.at;
                item.last = Some(self.number(unit)?);
                item.every = unit;
                if item.last < Some(item.first) {
                    return Err((end, Wrong::Backward));
                }
            }
            if self.eat("/") {
                let step = self.at;
                item.every = self.number(unit)?;
                if item.every == 0 {
                    return Err((step, Wrong::Step));
                }
            }
            items.push((at, item));
            if !self.eat(",") {
                return Ok(items);
            }
        }
    }

    /// A number; of seconds with a fraction, rounded to the microsecond.
    fn number(&mut self, unit: u32) -> Read<u32> {
        let begin = self.at;
        let whole = self.digits();
        if whole.is_empty() {
            return Err((begin, Wrong::Number));
        }
        // What is too much is out of bounds.
        let mut value = whole.parse().unwrap_or(u32::MAX).saturating_mul(unit);
        let fraction = unit == SECOND
            && self
                .rest()
                .strip_prefix('.')
                .is_some_and(|r| r.starts_with(|c: char| c.is_ascii_digit()));
        if fraction {
            self.at += 1;
            let mut worth = SECOND;
            for digit in self.digits().chars().filter_map(|c| c.to_digit(10)).take(7) {
                // The seventh digit only rounds.
                value = match worth {
                    1 => value.saturating_add(u32::from(digit >= 5)),
                    _ => value.saturating_add(digit * (worth / 10)),
                };
                worth /= 10;
                worth = worth.max(1);
            }
        }
        Ok(value)
    }

    fn digits(&mut self) -> String {
        let rest = self.rest();
        let len = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
        let digits = rest.get(..len).unwrap_or_default().into();
        self.at += len;
        digits
    }
}

/// Years of two digits are those from 1970 to 2069.
fn short_years(raw: Raw) -> Raw {
    let long = |year: u32| match year {
        0..70 => 2000 + year,
        70..100 => 1900 + year,
        _ => year,
    };
    let item = |item: Item| Item { first: long(item.first), last: item.last.map(long), ..item };
    raw.into_iter().map(|(at, of)| (at, item(of))).collect()
}

/// Checks the values of a part and puts them into their usual form.
fn sound(raw: Raw, part: &Part, unit: u32, from_end: bool) -> Read<Field> {
    let Part(name, from, to) = *part;
    let (least, most) = (from * unit, to * unit + unit - 1);
    let mut items = Vec::new();
    for (at, item) in raw {
        let inside = |value: u32| (least..=most).contains(&value);
        if !inside(item.first) || !item.last.is_none_or(inside) {
            return Err((at, Wrong::Bounds(name, from, to)));
        }
        if item.last.is_some_and(|last| last < item.first) {
            return Err((at, Wrong::Backward));
        }
        items.push(match item.last {
            Some(last) if item.every > last - item.first => Item::one(item.first),
            Some(last) => Item { last: Some(last - (last - item.first) % item.every), ..item },
            None => {
                // Steps lead forward, so counted from the end they lead down to 1.
                let room = if from_end { item.first - least } else { most - item.first };
                if item.every > room {
                    return Err((at, Wrong::Step));
                }
                item
            }
        });
    }
    items.sort_unstable();
    items.dedup();
    Ok(Field(items))
}
