use super::*;
use alloc::collections::BTreeSet;
use alloc::format;
use alloc::string::ToString;
use proptest::prelude::*;

use crate::civil::DAY_US;

fn civil(text: &str) -> Civil {
    let number = |range: core::ops::Range<usize>| text[range].parse::<i64>().unwrap();
    let part = |range| u8::try_from(number(range)).unwrap();
    let date = Date::new(i32::try_from(number(0..4)).unwrap(), part(5..7), part(8..10)).unwrap();
    let of_day_us = number(11..13) * HOUR + number(14..16) * MINUTE + number(17..19) * 1_000_000;
    Civil { date, of_day_us }
}

fn says(time: Civil) -> String {
    let Civil { date: Date { year, month, day }, of_day_us: us } = time;
    let (hour, minute, second) = (us / HOUR, us % HOUR / MINUTE, us % MINUTE / 1_000_000);
    format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02}")
}

#[test]
fn it_is_what_systemd_says() {
    let mut rows = 0;
    for row in include_str!("systemd.txt").lines().filter(|row| !row.starts_with('#')) {
        let parts: Vec<&str> = row.split('|').collect();
        let calendar = Calendar::parse(parts[0]).unwrap_or_else(|error| panic!("{row}: {error}"));
        assert_eq!(calendar.to_string(), parts[1], "{row}");
        // Its usual form means the same.
        assert_eq!(Calendar::parse(parts[1]).as_ref(), Ok(&calendar), "{row}");
        rows += 1;
        // Parts of a second are not shown there.
        let Some(time) = parts.get(2) else { continue };
        let mut time = Some(civil(time));
        let mut told = Vec::new();
        while let Some(next) = time.and_then(|time| calendar.next(time)).filter(|_| told.len() < 3)
        {
            told.push(says(next));
            time = Some(next);
        }
        assert_eq!(told, parts[3..], "{row}");
    }
    assert!(rows > 150, "{rows}");
}

#[test]
fn a_step_out_of_its_range_leaves_the_first_value() {
    assert_eq!(Calendar::parse("0..5/7:00").unwrap().to_string(), "*-*-* 00:00:00");
}

#[test]
fn parts_of_a_second_count() {
    let calendar = Calendar::parse("05:40:23.4200004/3.1700005").unwrap();
    let first = calendar.next(civil("2026-11-20 05:40:00")).unwrap();
    let morning = 5 * HOUR + 40 * MINUTE;
    assert_eq!(first.of_day_us, morning + 23_420_000);
    assert_eq!(calendar.next(first).unwrap().of_day_us, morning + 26_590_001);
}

#[test]
fn what_is_none_is_refused_where_it_is_wrong() {
    for (text, character, what) in [
        ("", 1, Wrong::Empty),
        ("  ", 1, Wrong::Empty),
        ("Mon..Fry 1:00", 6, Wrong::Weekday),
        ("Montag 1:00", 1, Wrong::Weekday),
        ("Mon Tue", 5, Wrong::Number),
        ("Mon..", 6, Wrong::Weekday),
        ("Sat..Mon 1:00", 1, Wrong::WeekdayRange),
        (", Mon", 1, Wrong::Number),
        ("Mon é", 5, Wrong::Number),
        ("é", 1, Wrong::Weekday),
        ("UTC", 1, Wrong::Weekday),
        ("*:*/15", 4, Wrong::StarStep),
        ("~1", 1, Wrong::Number),
        ("-1:00", 1, Wrong::Number),
        ("02", 1, Wrong::HourOnly),
        ("*-*-* 02", 7, Wrong::HourOnly),
        ("02:00:", 7, Wrong::Number),
        ("1:00-2:00", 5, Wrong::Sign),
        ("*-*-*T02:00", 6, Wrong::Sign),
        ("1:00:00:00", 8, Wrong::Sign),
        ("1,:00", 3, Wrong::Number),
        ("1..:00", 4, Wrong::Number),
        ("1/:00", 3, Wrong::Number),
        ("1:0/0", 5, Wrong::Step),
        ("1/30:00", 1, Wrong::Step),
        ("5..3:00", 4, Wrong::Backward),
        ("*-*~2..1", 8, Wrong::Backward),
        ("@1800000000", 1, Wrong::SinceEpoch),
        ("*-*-* 24:00", 7, Wrong::Bounds("the hour", 0, 23)),
        ("*-*-* 00:60", 10, Wrong::Bounds("the minute", 0, 59)),
        ("0:0:59.9999999", 5, Wrong::Bounds("the second", 0, 59)),
        ("0:0:99999999", 5, Wrong::Bounds("the second", 0, 59)),
        ("2026-12", 1, Wrong::Bounds("the month", 1, 12)),
        ("*-13-1", 3, Wrong::Bounds("the month", 1, 12)),
        ("*-*-0", 5, Wrong::Bounds("the day", 1, 31)),
        ("*-*~29", 5, Wrong::Bounds("a day counted from the end of the month", 1, 28)),
        ("2200-1-1", 1, Wrong::Bounds("the year", 1970, 2199)),
        ("99999999999-1-1", 1, Wrong::Bounds("the year", 1970, 2199)),
    ] {
        assert_eq!(Calendar::parse(text), Err(BadCalendar { character, what }), "{text:?}");
    }
    let long = "1,".repeat(400);
    assert_eq!(Calendar::parse(&long).unwrap_err().what, Wrong::TooLong);
    let said = Calendar::parse("Sat..Mon 1:00").unwrap_err().to_string();
    assert!(said.starts_with("at character 1: ") && said.contains("Sat..Sun,Mon"), "{said}");
    assert!(said.contains("\"Mon..Fri *-*-* 02:00\""), "{said}");
}

#[test]
fn the_zone_is_read() {
    let zone = |text: &str| Calendar::parse(text).unwrap().zone;
    assert_eq!(zone("Mon 2:00"), Zone::Local);
    assert_eq!(zone(" Mon 2:00 utc "), Zone::Utc);
    assert_eq!(zone("Mon Europe/Berlin"), Zone::Named("Europe/Berlin".into()));
    assert_eq!(zone("daily Etc/GMT+5"), Zone::Named("Etc/GMT+5".into()));
    assert_eq!(
        Calendar::parse("weekly Pacific/Auckland").unwrap().to_string(),
        "Mon *-*-* 00:00:00 Pacific/Auckland"
    );
}

/// A part of an expression as it is written, and the values that it means.
type Written = (String, BTreeSet<u32>);

/// A list of values, ranges and steps from `from` to `to`.
fn part(from: u32, to: u32) -> impl Strategy<Value = Written> {
    let item =
        (from..=to, from..=to, 1..=to - from, 0..4_u8).prop_map(move |(a, b, step, kind)| {
            let (low, high) = (a.min(b), a.max(b));
            let each = |last: u32, step: u32| (low..=last).step_by(step as usize).collect();
            match kind {
                0 => (format!("{low:02}"), BTreeSet::from([low])),
                1 => (format!("{low}..{high}"), each(high, 1)),
                2 if step <= high - low => (format!("{low}..{high}/{step}"), each(high, step)),
                3 if step <= to - low => (format!("{low}/{step}"), each(to, step)),
                _ => (format!("{low}"), BTreeSet::from([low])),
            }
        });
    let list = prop::collection::vec(item, 1..4).prop_map(|items| {
        let texts: Vec<&str> = items.iter().map(|(text, _)| text.as_str()).collect();
        (texts.join(","), items.iter().flat_map(|(_, values)| values.clone()).collect())
    });
    prop_oneof![Just(("*".to_string(), (from..=to).collect())), list]
}

/// The same of days counted from the end: the values are distances from the end.
fn from_end() -> impl Strategy<Value = Written> {
    (1..=28_u32, 1..=28_u32, 0..3_u8).prop_map(|(a, b, kind)| {
        let (low, high) = (a.min(b), a.max(b));
        match kind {
            0 => (format!("{low}"), BTreeSet::from([low])),
            1 => (format!("{low}..{high}"), (low..=high).collect()),
            _ if high == 1 => ("1".to_string(), BTreeSet::from([1])),
            // Forward in time.
            _ => (format!("{high}/1"), (1..=high).collect()),
        }
    })
}

#[derive(Debug)]
struct Model {
    text: String,
    weekdays: BTreeSet<u32>,
    months: BTreeSet<u32>,
    days: BTreeSet<u32>,
    from_end: bool,
    hours: BTreeSet<u32>,
    minutes: BTreeSet<u32>,
    seconds: BTreeSet<u32>,
}

impl Model {
    fn holds(&self, time: Civil) -> bool {
        let Date { year, month, day } = time.date;
        let day = match self.from_end {
            true => u32::from(days_in(year, month) - day) + 1,
            false => day.into(),
        };
        let part = |unit: i64, most: i64| u32::try_from(time.of_day_us / unit % most).unwrap();
        self.weekdays.contains(&u32::try_from((time.date.days() + 3).rem_euclid(7)).unwrap())
            && self.months.contains(&month.into())
            && self.days.contains(&day)
            && self.hours.contains(&part(HOUR, 24))
            && self.minutes.contains(&part(MINUTE, 60))
            && self.seconds.contains(&part(1_000_000, 60))
            && time.of_day_us % 1_000_000 == 0
    }
}

fn model() -> impl Strategy<Value = Model> {
    let day = prop_oneof![
        part(1, 31).prop_map(|written| (written, false)),
        from_end().prop_map(|written| (written, true)),
    ];
    let time = (part(0, 23), part(0, 59), part(0, 59));
    ((1..128_u32), part(1, 12), day, time).prop_map(|(bits, month, (day, from_end), time)| {
        let (hour, minute, second) = time;
        let weekdays: BTreeSet<u32> = (0..7).filter(|day| bits >> day & 1 == 1).collect();
        let names: Vec<&str> = weekdays.iter().map(|day| DAYS[*day as usize]).collect();
        let sign = if from_end { "~" } else { "-" };
        let text = format!(
            "{} *-{}{sign}{} {}:{}:{}",
            names.join(","),
            month.0,
            day.0,
            hour.0,
            minute.0,
            second.0
        );
        Model {
            text,
            weekdays,
            months: month.1,
            days: day.1,
            from_end,
            hours: hour.1,
            minutes: minute.1,
            seconds: second.1,
        }
    })
}

proptest! {
    #[test]
    fn what_comes_next_is_later_is_meant_and_nothing_lies_between(
        model in model(),
        days in 0..60_000_i64,
        of_day_us in 0..DAY_US,
        between in prop::collection::vec(any::<u64>(), 32),
    ) {
        let calendar = Calendar::parse(&model.text).unwrap();
        prop_assert_eq!(Calendar::parse(&calendar.to_string()), Ok(calendar.clone()));
        let after = Civil { date: Date::of_days(days), of_day_us };
        let end = Civil { date: Date::new(2199, 12, 31).unwrap(), of_day_us: DAY_US - 1 };
        let next = calendar.next(after);
        if let Some(next) = next {
            prop_assert!(next > after && next <= end);
            prop_assert!(model.holds(next), "{:?} of {}", next, model.text);
        }
        // On no day between is a day of it, and on the two days at the ends no such time.
        let until = next.unwrap_or(end);
        let first_time = calendar.time(0).unwrap();
        for day in days + 1..until.date.days() {
            let time = Civil { date: Date::of_days(day), of_day_us: first_time };
            prop_assert!(!model.holds(time), "{:?} of {}", time, model.text);
        }
        let span = (until.date.days() - days) * DAY_US + until.of_day_us - of_day_us;
        for at in between {
            // Whole seconds, many of them near both ends.
            let range = [span, MINUTE, HOUR][usize::try_from(at % 3).unwrap()].min(span);
            let back = i64::try_from(at / 3).unwrap_or_default() % range.max(1);
            for us in [of_day_us + back, of_day_us + span - 1 - back] {
                let us = us - us % 1_000_000;
                let date = Date::of_days(days + us.div_euclid(DAY_US));
                let time = Civil { date, of_day_us: us.rem_euclid(DAY_US) };
                prop_assert!(time <= after || time >= until || !model.holds(time), "{:?}", time);
            }
        }
    }

    #[test]
    fn no_text_is_too_much(text in "[ A-Za-z0-9*,./~:@é-]{0,60}") {
        if let Ok(calendar) = Calendar::parse(&text) {
            let usual = calendar.to_string();
            prop_assert_eq!(Calendar::parse(&usual), Ok(calendar.clone()), "{}", usual);
            let begin = Civil { date: Date::new(2026, 2, 28).unwrap(), of_day_us: 0 };
            prop_assert!(calendar.next(begin).is_none_or(|next| next > begin));
        }
    }
}

#[test]
fn the_last_moment_of_a_day_and_of_all_days() {
    let daily = Calendar::parse("23:59:59.999999").unwrap();
    let first = daily.next(civil("2026-12-31 23:59:59")).unwrap();
    assert_eq!(first.of_day_us, DAY_US - 1);
    assert_eq!(says(daily.next(first).unwrap()), "2027-01-01 23:59:59");
    assert_eq!(daily.next(Civil { date: Date::new(2199, 12, 31).unwrap(), ..first }), None);
    let before = Civil { date: Date::new(1850, 1, 1).unwrap(), of_day_us: 0 };
    assert_eq!(says(daily.next(before).unwrap()), "1970-01-01 23:59:59");
}
