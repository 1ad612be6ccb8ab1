//! What people type for a point in time.

use crate::civil::Date;
use crate::ids::Seq;

/// What was typed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wanted {
    /// The newest point.
    Latest,
    /// A frame by its number.
    Frame(Seq),
    /// So many microseconds ago.
    Ago(u64),
    /// A time of the clock.
    Clock(Clock),
    /// Nothing of these: a checkpoint's name, then.
    Name,
}

/// A time of the clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Clock {
    /// The day; none for today.
    pub date: Option<Date>,
    /// Microseconds since midnight.
    pub of_day_us: i64,
    /// Seconds east of Greenwich; none for the local zone.
    pub offset_s: Option<i32>,
}

/// Why a text that looks like a time is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BadPoint {
    /// No such number of a frame.
    #[error("a frame is a number, as in frame:123")]
    Frame,
    /// No such span.
    #[error("a span is written as -90s, -2h or -1d12h, with w, d, h, m, s and ms")]
    Ago,
    /// No such time.
    #[error(
        "a time is written as 2026-11-20 14:03:07.25 or 14:03, and ends with Z or +01:00 when it is \
         not the local time"
    )]
    Clock,
    /// There is no such day.
    #[error("there is no such day")]
    Day,
    /// There is no such time of day.
    #[error("there is no such time of day")]
    OfDay,
}

impl Wanted {
    /// Reads what was typed.
    ///
    /// # Errors
    /// [`BadPoint`] for what looks like a time, a span or a frame and is none.
    pub fn parse(text: &str) -> Result<Self, BadPoint> {
        if text == "latest" {
            return Ok(Self::Latest);
        }
        if let Some(number) = text.strip_prefix("frame:") {
            return digits(number, 20).map(|n| Self::Frame(Seq(n))).ok_or(BadPoint::Frame);
        }
        if let Some(number) = digits(text, 20) {
            return Ok(Self::Frame(Seq(number)));
        }
        if let Some(span) = text.strip_prefix('-') {
            return ago(span).map(Self::Ago).ok_or(BadPoint::Ago);
        }
        if looks_like_a_time(text) { clock(text).map(Self::Clock) } else { Ok(Self::Name) }
    }
}

/// A number of at most `len` digits, and nothing else.
fn digits(text: &str, len: usize) -> Option<u64> {
    let sound = !text.is_empty() && text.len() <= len && text.bytes().all(|b| b.is_ascii_digit());
    if sound { text.parse().ok() } else { None }
}

/// Digits, and then one of the signs that stand in dates and times.
fn looks_like_a_time(text: &str) -> bool {
    let bytes = text.as_bytes();
    let sign = bytes.iter().position(|byte| !byte.is_ascii_digit());
    sign.is_some_and(|at| {
        let colon = (1..=2).contains(&at) && bytes.get(at) == Some(&b':');
        let date = at == 4
            && bytes.get(at) == Some(&b'-')
            && bytes.get(at + 1).is_some_and(u8::is_ascii_digit)
            && bytes.get(at + 3) == Some(&b'-');
        colon || date
    })
}

fn ago(text: &str) -> Option<u64> {
    let mut rest = text;
    let mut all: u64 = 0;
    while !rest.is_empty() {
        let number = rest.find(|c: char| !c.is_ascii_digit())?;
        let (count, behind) = rest.split_at_checked(number)?;
        let unit = behind.find(|c: char| c.is_ascii_digit()).unwrap_or(behind.len());
        let (unit, behind) = behind.split_at_checked(unit)?;
        let unit = match unit.trim() {
            "ms" => 1_000,
            "s" => 1_000_000,
            "m" | "min" => 60_000_000,
            "h" => 3_600_000_000,
            "d" => 86_400_000_000,
            "w" => 604_800_000_000,
            _ => return None,
        };
        all = all.checked_add(digits(count, 15)?.checked_mul(unit)?)?;
        rest = behind;
    }
    (!text.is_empty()).then_some(all)
}

fn clock(text: &str) -> Result<Clock, BadPoint> {
    let bad = BadPoint::Clock;
    let (date, time) = match text.split_once(['T', ' ']) {
        Some((date, time)) if date.contains('-') => (Some(day(date)?), time.trim_start()),
        _ if text.contains(':') && text.find('-').is_none_or(|minus| minus > 4) => (None, text),
        _ => return Err(bad),
    };
    let zone = time.find(|c: char| !(c.is_ascii_digit() || matches!(c, ':' | '.')));
    let (time, zone) = time.split_at_checked(zone.unwrap_or(time.len())).ok_or(bad)?;
    let offset_s = offset(zone.trim())?;
    let mut parts = time.split(':');
    let hour = parts.next().and_then(|text| digits(text, 2)).ok_or(bad)?;
    let minute = parts.next().filter(|text| text.len() == 2).and_then(|text| digits(text, 2));
    let minute = minute.ok_or(bad)?;
    let (second, micros) = match parts.next() {
        None => (0, 0),
        Some(second) => {
            let (second, fraction) = second.split_once('.').unwrap_or((second, "0"));
            if second.len() != 2 {
                return Err(bad);
            }
            (digits(second, 2).ok_or(bad)?, fraction_us(fraction).ok_or(bad)?)
        }
    };
    if parts.next().is_some() {
        return Err(bad);
    }
    if hour > 23 || minute > 59 || second > 59 {
        return Err(BadPoint::OfDay);
    }
    let of_day = ((hour * 60 + minute) * 60 + second) * 1_000_000 + micros;
    Ok(Clock { date, of_day_us: i64::try_from(of_day).map_err(|_| bad)?, offset_s })
}

fn day(text: &str) -> Result<Date, BadPoint> {
    let mut parts = text.split('-');
    let mut next = |len: usize| {
        parts.next().filter(|part| part.len() == len).and_then(|part| digits(part, len))
    };
    let (Some(year), Some(month), Some(day)) = (next(4), next(2), next(2)) else {
        return Err(BadPoint::Clock);
    };
    if parts.next().is_some() {
        return Err(BadPoint::Clock);
    }
    let small = |number: u64| u8::try_from(number).unwrap_or(0);
    let year = i32::try_from(year).unwrap_or(-1);
    Date::new(year, small(month), small(day)).ok_or(BadPoint::Day)
}

/// Digits behind the point, to the microsecond; what is finer is cut off.
fn fraction_us(text: &str) -> Option<u64> {
    let sound = !text.is_empty() && text.len() <= 9 && text.bytes().all(|b| b.is_ascii_digit());
    let mut micros = 0;
    for digit in text.bytes().chain(core::iter::repeat(b'0')).take(6) {
        micros = micros * 10 + u64::from(digit.checked_sub(b'0')?);
    }
    sound.then_some(micros)
}

/// `Z`, `UTC`, `+01`, `+0100`, `-05:30`; nothing is the local zone.
fn offset(text: &str) -> Result<Option<i32>, BadPoint> {
    let bad = BadPoint::Clock;
    if text.is_empty() {
        return Ok(None);
    }
    if matches!(text, "Z" | "z" | "UTC") {
        return Ok(Some(0));
    }
    let (sign, rest) = match text.split_at_checked(1) {
        Some(("+", rest)) => (1, rest),
        Some(("-", rest)) => (-1, rest),
        _ => return Err(bad),
    };
    let (hours, minutes) = match (rest.split_once(':'), rest.len()) {
        (Some(parts), _) => parts,
        (None, 4) => rest.split_at_checked(2).ok_or(bad)?,
        (None, _) => (rest, "00"),
    };
    let number = |text: &str, most: u64| {
        digits(text, 2)
            .filter(|n| text.len() == 2 && *n <= most)
            .and_then(|n| i32::try_from(n).ok())
    };
    let hours = number(hours, 14).ok_or(bad)?;
    let minutes = number(minutes, 59).ok_or(bad)?;
    Ok(Some(sign * (hours * 3600 + minutes * 60)))
}
