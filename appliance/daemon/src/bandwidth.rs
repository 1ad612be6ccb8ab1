//! How much of the line a node may use, by the time of the day. Pure: the caller has the clock.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The least that can be set, in bytes per second: with less nothing would ever be in step.
const RATE_MIN: u64 = 8_000;

/// Minutes of a day.
const DAY: u16 = 24 * 60;

const DAYS: [&str; 7] = ["mon", "tue", "wed", "thu", "fri", "sat", "sun"];

/// A rate as people read it: bytes per second, written in bits as lines are sold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate(pub u64);

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bits = self.0 as f64 * 8.0;
        let (value, unit) = match bits {
            bits if bits >= 1e9 => (bits / 1e9, "Gbit/s"),
            bits if bits >= 1e6 => (bits / 1e6, "Mbit/s"),
            bits => (bits / 1e3, "kbit/s"),
        };
        let text = if value >= 100.0 || value.fract() == 0.0 {
            format!("{value:.0} {unit}")
        } else {
            format!("{value:.1} {unit}")
        };
        f.pad(&text)
    }
}

/// Reads a rate such as "100 Mbit/s" or "12MB/s", in bytes per second; `None` for "none".
///
/// # Errors
/// A text that says what is expected.
pub fn parse_rate(text: &str) -> Result<Option<u64>, String> {
    let bad = || {
        format!("{text:?} is no rate; write for example \"100 Mbit/s\", \"12 MB/s\" or \"none\"")
    };
    let trimmed = text.trim();
    if trimmed == "none" {
        return Ok(None);
    }
    let end = trimmed.find(|c: char| !c.is_ascii_digit() && c != '.').ok_or_else(bad)?;
    let (number, unit) = trimmed.split_at(end);
    let number: f64 = number.parse().map_err(|_| bad())?;
    let (prefix, bytes) = match unit.trim() {
        unit if unit.ends_with("bit/s") => (unit.trim_end_matches("bit/s"), 0.125),
        unit if unit.ends_with("B/s") => (unit.trim_end_matches("B/s"), 1.0),
        _ => return Err(bad()),
    };
    let factor = match prefix {
        "" => 1.0,
        "k" | "K" => 1e3,
        "M" => 1e6,
        "G" => 1e9,
        _ => return Err(bad()),
    };
    let rate = number * factor * bytes;
    if !(rate >= RATE_MIN as f64 && rate <= 1e12) {
        return Err(format!("{text:?} is not between {} and 8000 Gbit/s", Rate(RATE_MIN)));
    }
    Ok(Some(rate as u64))
}

/// A time of the week: local time of the node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Moment {
    /// 0 for Monday.
    pub weekday: u8,
    /// Minute of the day.
    pub minute: u16,
}

impl Moment {
    const fn next(self) -> Self {
        if self.minute + 1 < DAY {
            return Self { minute: self.minute + 1, ..self };
        }
        Self { weekday: (self.weekday + 1) % 7, minute: 0 }
    }
}

/// A limit for some hours of some days.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    from: u16,
    to: u16,
    /// A bit for each day on which it begins.
    days: u8,
    limit: Option<u64>,
}

impl Rule {
    /// Reads a rule as it stands in the configuration. `from` and `to` are "HH:MM"; a rule that
    /// ends before it begins goes over midnight, and one that ends when it begins lasts a day.
    ///
    /// # Errors
    /// A text that says what is expected.
    pub fn parse(from: &str, to: &str, days: Option<&str>, limit: &str) -> Result<Self, String> {
        Ok(Self {
            from: parse_minute(from)?,
            to: parse_minute(to)?,
            days: days.map_or(Ok(0x7f), parse_days)?,
            limit: parse_rate(limit)?,
        })
    }

    const fn begins_on(&self, weekday: u8) -> bool {
        self.days >> weekday & 1 == 1
    }

    const fn holds_at(&self, at: Moment) -> bool {
        let today = self.begins_on(at.weekday);
        if self.from < self.to {
            return today && at.minute >= self.from && at.minute < self.to;
        }
        let yesterday = self.begins_on((at.weekday + 6) % 7);
        (today && at.minute >= self.from) || (yesterday && at.minute < self.to)
    }
}

fn parse_minute(text: &str) -> Result<u16, String> {
    let bad = || format!("{text:?} is no time of the day; write for example \"08:00\"");
    let (hours, minutes) = text.split_once(':').ok_or_else(bad)?;
    let number = |text: &str| match text.len() {
        1 | 2 => text.parse::<u16>().map_err(|_| bad()),
        _ => Err(bad()),
    };
    match (number(hours)?, number(minutes)?) {
        (24, 0) => Ok(0),
        (hours @ 0..24, minutes @ 0..60) => Ok(hours * 60 + minutes),
        _ => Err(bad()),
    }
}

fn parse_days(text: &str) -> Result<u8, String> {
    let bad =
        || format!("{text:?} is no list of days; write for example \"mon-fri\" or \"sat,sun\"");
    let day = |name: &str| DAYS.iter().position(|day| *day == name.trim()).ok_or_else(bad);
    let mut days = 0u8;
    for part in text.to_ascii_lowercase().split(',') {
        let (first, last) = match part.split_once('-') {
            Some((first, last)) => (day(first)?, day(last)?),
            None => (day(part)?, day(part)?),
        };
        let mut at = first;
        loop {
            days |= 1 << at;
            if at == last {
                break;
            }
            at = (at + 1) % 7;
        }
    }
    Ok(days)
}

/// What may be sent, and when.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    /// What holds when no rule does, in bytes per second.
    pub limit: Option<u64>,
    /// The first that holds counts.
    pub rules: Vec<Rule>,
}

impl Plan {
    /// Whether nothing is ever limited.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.limit.is_none() && self.rules.is_empty()
    }

    /// What holds at a time, in bytes per second.
    #[must_use]
    pub fn limit_at(&self, at: Moment) -> Option<u64> {
        self.rules.iter().find(|rule| rule.holds_at(at)).map_or(self.limit, |rule| rule.limit)
    }

    /// When that changes the next time, if it does.
    #[must_use]
    pub fn changes_after(&self, at: Moment) -> Option<Moment> {
        let now = self.limit_at(at);
        let mut later = at;
        for _ in 0..7 * DAY {
            later = later.next();
            if self.limit_at(later) != now {
                return Some(later);
            }
        }
        None
    }

    /// What holds now, as people see it.
    #[must_use]
    pub fn status(&self, at: Moment, time_zone: String) -> BandwidthStatus {
        let until = self.changes_after(at).map(|until| {
            let day = DAYS.get(usize::from(until.weekday)).copied().unwrap_or_default();
            let time = format!("{:02}:{:02}", until.minute / 60, until.minute % 60);
            if until.weekday == at.weekday { time } else { format!("{day} {time}") }
        });
        BandwidthStatus { limit: self.limit_at(at), until, time_zone }
    }
}

/// The limit of the link.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BandwidthStatus {
    /// What may be sent to each peer now, in bytes per second; no limit when none.
    pub limit: Option<u64>,
    /// Until when, in local time; for ever when none.
    pub until: Option<String>,
    /// What local time is.
    pub time_zone: String,
}

impl fmt::Display for BandwidthStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.limit {
            Some(limit) => write!(f, "limited to {}", Rate(limit))?,
            None => write!(f, "not limited")?,
        }
        match &self.until {
            Some(until) => write!(f, " until {until} ({})", self.time_zone),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MBIT: u64 = 125_000;

    fn at(weekday: u8, hour: u16, minute: u16) -> Moment {
        Moment { weekday, minute: hour * 60 + minute }
    }

    #[test]
    fn rates_are_read_and_written() {
        for (text, rate, shown) in [
            ("100Mbit/s", 12_500_000, "100 Mbit/s"),
            (" 2.5 Gbit/s ", 312_500_000, "2.5 Gbit/s"),
            ("12 MB/s", 12_000_000, "96 Mbit/s"),
            ("64kbit/s", 8_000, "64 kbit/s"),
        ] {
            assert_eq!(parse_rate(text), Ok(Some(rate)), "{text}");
            assert_eq!(Rate(rate).to_string(), shown);
        }
        assert_eq!(parse_rate("none"), Ok(None));
        for text in ["", "100", "Mbit/s", "1 kbit/s", "-5 MB/s", "1..2 MB/s", "9e9 MB/s", "5 mbit"]
        {
            assert!(parse_rate(text).is_err(), "{text}");
        }
    }

    #[test]
    fn the_first_rule_that_holds_counts() {
        let plan = Plan {
            limit: Some(100 * MBIT),
            rules: vec![
                Rule::parse("12:00", "13:00", Some("wed"), "none").unwrap(),
                Rule::parse("08:00", "18:00", Some("mon-fri"), "20 Mbit/s").unwrap(),
            ],
        };
        let cases = [
            (at(0, 7, 59), Some(100 * MBIT)),
            (at(0, 8, 0), Some(20 * MBIT)),
            (at(2, 12, 30), None),
            (at(2, 13, 0), Some(20 * MBIT)),
            (at(4, 18, 0), Some(100 * MBIT)),
            (at(5, 9, 0), Some(100 * MBIT)),
        ];
        for (at, limit) in cases {
            assert_eq!(plan.limit_at(at), limit, "{at:?}");
        }
        assert_eq!(plan.changes_after(at(0, 9, 0)), Some(at(0, 18, 0)));
        assert_eq!(plan.changes_after(at(5, 9, 0)), Some(at(0, 8, 0)));
        let text = plan.status(at(5, 9, 0), "Europe/Berlin".into()).to_string();
        assert_eq!(text, "limited to 100 Mbit/s until mon 08:00 (Europe/Berlin)");
    }

    #[test]
    fn nights_and_weekends_go_over_midnight() {
        let night = Rule::parse("22:00", "06:00", Some("fri"), "none").unwrap();
        for (at, holds) in [
            (at(4, 21, 59), false),
            (at(4, 22, 0), true),
            (at(5, 5, 59), true),
            (at(5, 6, 0), false),
            (at(5, 22, 0), false),
            (at(4, 3, 0), false),
        ] {
            assert_eq!(night.holds_at(at), holds, "{at:?}");
        }
        let weekend = Rule::parse("00:00", "24:00", Some("sat-sun"), "none").unwrap();
        assert!(weekend.holds_at(at(6, 23, 59)) && !weekend.holds_at(at(0, 0, 0)));
        assert!(!weekend.holds_at(at(4, 23, 59)) && weekend.holds_at(at(5, 0, 0)));
        let over = Rule::parse("00:00", "00:00", Some("sun-mon"), "none").unwrap();
        assert!(over.holds_at(at(0, 12, 0)) && !over.holds_at(at(1, 0, 0)));
    }

    #[test]
    fn mistakes_are_named() {
        for (from, to, days, limit) in [
            ("8", "18:00", None, "none"),
            ("25:00", "18:00", None, "none"),
            ("08:00", "18:60", None, "none"),
            ("08:00", "018:00", None, "none"),
            ("08:00", "18:00", Some("mo-fr"), "none"),
            ("08:00", "18:00", Some(""), "none"),
            ("08:00", "18:00", None, "much"),
        ] {
            assert!(Rule::parse(from, to, days, limit).is_err(), "{from} {to} {days:?} {limit}");
        }
    }

    #[test]
    fn what_never_changes_has_no_end() {
        let plan = Plan { limit: Some(MBIT), rules: Vec::new() };
        assert_eq!(plan.changes_after(at(3, 3, 3)), None);
        assert_eq!(plan.status(at(3, 3, 3), "UTC".into()).to_string(), "limited to 1 Mbit/s");
        assert!(Plan::default().is_empty() && !plan.is_empty());
    }
}
