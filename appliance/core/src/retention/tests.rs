use super::*;
use alloc::vec;
use proptest::prelude::*;

const MINUTE: u64 = 60_000_000;
const HOUR: u64 = 60 * MINUTE;
const DAY: u64 = 24 * HOUR;

/// 2026-11-20 00:00 UTC, a Friday.
const FRIDAY: i64 = 20_777 * DAY_US;

fn point(number: u64, time: u64) -> Point {
    Point {
        seq: Seq(number),
        log_time: LogTime(time),
        clean: true,
        pinned: false,
        proven: false,
        in_use: false,
    }
}

fn only_ladder() -> Policy {
    Policy { window_us: 0, ten_minutes: 2, hours: 2, days: 2, weeks: 0, months: 0, min_points: 0 }
}

fn decide(policy: &Policy, points: &[Point], now: u64) -> Vec<Reason> {
    policy.decide(points, LogTime(now), FRIDAY, Squeeze::NONE).reasons
}

#[test]
fn each_span_keeps_its_newest_point() {
    let at = [1, DAY + 1, DAY + 2, DAY + HOUR, DAY + HOUR + 25 * MINUTE, DAY + HOUR + 29 * MINUTE];
    let points: Vec<Point> =
        at.iter().zip(1..).map(|(time, number)| point(number, *time)).collect();
    let wall = |time: u64| FRIDAY + time as i64;
    assert_eq!(
        decide(&only_ladder(), &points, 2 * DAY),
        [
            Reason::NewestOf(Rung::Day, wall(0)),
            Reason::Beyond,
            Reason::NewestOf(Rung::Hour, wall(DAY)),
            Reason::NewestOf(Rung::TenMinutes, wall(DAY + HOUR)),
            Reason::Beyond,
            Reason::NewestClean,
        ]
    );
}

#[test]
fn weeks_begin_on_monday_and_months_on_the_first() {
    let day = |date: &str| {
        let mut parts = date.split('-').map(|part| part.parse::<i32>().unwrap());
        let (year, month, day) = (parts.next(), parts.next(), parts.next());
        Date::new(year.unwrap(), month.unwrap() as u8, day.unwrap() as u8).unwrap().days() * DAY_US
    };
    for (time, week, month) in [
        ("2026-11-20", "2026-11-16", "2026-11-01"),
        ("2026-11-16", "2026-11-16", "2026-11-01"),
        ("2026-11-15", "2026-11-09", "2026-11-01"),
        ("2026-01-01", "2025-12-29", "2026-01-01"),
        ("1969-12-31", "1969-12-29", "1969-12-01"),
    ] {
        let late = day(time) + DAY_US - 1;
        assert_eq!(start_of(Rung::Week, late), day(week), "{time}");
        assert_eq!(start_of(Rung::Month, late), day(month), "{time}");
    }
}

#[test]
fn the_default_keeps_at_least_what_drs_does() {
    // A checkpoint every minute for ten days.
    let points: Vec<Point> = (1..10 * 24 * 60).map(|n| point(n, n * MINUTE)).collect();
    let now = 10 * DAY;
    let kept = |policy: &Policy| {
        let reasons = decide(policy, &points, now);
        let kept = points.iter().zip(reasons).filter(|(_, reason)| reason.keeps());
        kept.map(|(point, _)| point.log_time.0).collect::<Vec<_>>()
    };
    let all = kept(&Policy::default());
    // Without the window the ladder stands by itself.
    let ladder = kept(&Policy { window_us: 0, ..Policy::default() });
    for kept in [&all, &ladder] {
        let newest_in = |from: u64, to: u64| kept.iter().any(|time| (from..to).contains(time));
        for span in 0..6 {
            assert!(newest_in(now - (span + 1) * 10 * MINUTE, now - span * 10 * MINUTE + 1));
        }
        for hour in 0..24 {
            assert!(newest_in(now - (hour + 1) * HOUR, now - hour * HOUR + 1), "{hour}");
        }
        for day in 0..7 {
            assert!(newest_in(now - (day + 1) * DAY, now - day * DAY + 1), "{day}");
        }
        assert!(kept.len() >= 60);
    }
}

#[test]
fn some_points_are_never_dropped() {
    let nothing = Policy {
        window_us: 0,
        ten_minutes: 0,
        hours: 0,
        days: 0,
        weeks: 0,
        months: 0,
        min_points: 0,
    };
    let points = [
        Point { pinned: true, clean: false, ..point(1, 1) },
        Point { proven: true, ..point(2, 2) },
        Point { proven: true, ..point(3, 3) },
        Point { in_use: true, ..point(4, 4) },
        point(5, 5),
        point(6, 6),
        Point { clean: false, ..point(7, 7) },
    ];
    let expected = [
        Reason::Pinned,
        Reason::Beyond,
        Reason::NewestProven,
        Reason::InUse,
        Reason::Beyond,
        Reason::NewestClean,
        Reason::Unclean,
    ];
    assert_eq!(decide(&nothing, &points, 100), expected);
    // Nor for want of space.
    let squeeze = Squeeze { given_up: Seq(100), window_us: 0 };
    let squeezed = nothing.decide(&points, LogTime(100), FRIDAY, squeeze);
    assert_eq!(squeezed.reasons, expected);
    assert_eq!(squeezed.sacrifice, []);
}

#[test]
fn for_want_of_space_the_oldest_go_first_and_then_the_window() {
    let policy = Policy { window_us: HOUR, min_points: 4, ..only_ladder() };
    let at = [1, DAY, 2 * DAY, 2 * DAY + 30 * MINUTE, 2 * DAY + 50 * MINUTE];
    let points: Vec<Point> =
        at.iter().zip(1..).map(|(time, number)| point(number, *time)).collect();
    let now = LogTime(2 * DAY + 70 * MINUTE);
    let decided = policy.decide(&points, now, FRIDAY, Squeeze::NONE);
    assert_eq!(decided.sacrifice, [Seq(2), Seq(3)]);
    let squeeze = Squeeze { given_up: Seq(2), ..Squeeze::NONE };
    let decided = policy.decide(&points, now, FRIDAY, squeeze);
    assert_eq!(decided.reasons[1], Reason::GivenUp);
    assert!(decided.reasons[2].keeps());
    assert_eq!(decided.sacrifice, [Seq(3)]);
    let squeeze = Squeeze { window_us: 25 * MINUTE, ..squeeze };
    let decided = policy.decide(&points, now, FRIDAY, squeeze);
    assert_eq!(decided.reasons[2..], [Reason::GivenUp, Reason::GivenUp, Reason::Window]);
    assert_eq!(decided.window_from, LogTime(now.0 - 25 * MINUTE));
}

fn policies() -> impl Strategy<Value = Policy> {
    (0..4 * HOUR, 0..4_u32, 0..4_u32, 0..4_u32, 0..3_u32, 0..3_u32, 0..6_u32).prop_map(
        |(window_us, ten_minutes, hours, days, weeks, months, min_points)| Policy {
            window_us,
            ten_minutes,
            hours,
            days,
            weeks,
            months,
            min_points,
        },
    )
}

/// Points over some weeks, close together and far apart.
fn histories() -> impl Strategy<Value = Vec<Point>> {
    let step = prop_oneof![1..MINUTE, 1..HOUR, 1..3 * DAY];
    let flag = |weight| prop::bool::weighted(weight);
    prop::collection::vec((step, flag(0.85), flag(0.05), flag(0.05), flag(0.03)), 1..80).prop_map(
        |steps| {
            let mut time = 0;
            let mut points = vec![];
            for (number, (step, clean, pinned, proven, in_use)) in steps.into_iter().enumerate() {
                time += step;
                let seq = 10 * (number as u64 + 1);
                points.push(Point { clean, pinned, proven, in_use, ..point(seq, time) });
            }
            points
        },
    )
}

fn kept(policy: &Policy, points: &[Point], now: LogTime) -> Vec<Point> {
    let reasons = policy.decide(points, now, FRIDAY, Squeeze::NONE).reasons;
    assert_eq!(reasons.len(), points.len());
    points.iter().zip(reasons).filter(|(_, reason)| reason.keeps()).map(|(p, _)| *p).collect()
}

proptest! {
    #[test]
    fn applying_it_again_changes_nothing(policy in policies(), points in histories(), later in 0..DAY) {
        let now = LogTime(points.last().unwrap().log_time.0 + later);
        let once = kept(&policy, &points, now);
        prop_assert_eq!(kept(&policy, &once, now), once);
    }

    #[test]
    fn applying_it_often_keeps_what_applying_it_late_would(
        policy in policies(), points in histories(), every in 1..5_usize, later in 0..DAY,
    ) {
        let now = LogTime(points.last().unwrap().log_time.0 + later);
        let mut often: Vec<Point> = vec![];
        for some in points.chunks(every) {
            often.extend(some);
            often = kept(&policy, &often, some.last().unwrap().log_time);
        }
        let often = kept(&policy, &often, now);
        for point in kept(&policy, &points, now) {
            prop_assert!(often.contains(&point), "{:?}", point);
        }
    }

    #[test]
    fn protected_points_stay_whatever_comes(
        policy in policies(), points in histories(), more in histories(), given_up in 0..900_u64,
        window_us in 0..HOUR,
    ) {
        let last = points.last().unwrap();
        let mut all = points.clone();
        all.extend(more.iter().map(|point| Point {
            seq: Seq(last.seq.0 + point.seq.0),
            log_time: LogTime(last.log_time.0 + point.log_time.0),
            ..*point
        }));
        let squeeze = Squeeze { given_up: Seq(given_up), window_us };
        let now = all.last().unwrap().log_time;
        let reasons = policy.decide(&all, now, FRIDAY, squeeze).reasons;
        let newest_clean = all.iter().rposition(|point| point.clean);
        let newest_proven = all.iter().rposition(|point| point.clean && point.proven);
        for (index, (point, reason)) in all.iter().zip(&reasons).enumerate() {
            if point.pinned || point.in_use || Some(index) == newest_clean || Some(index) == newest_proven {
                prop_assert!(reason.keeps(), "{:?} {:?}", point, reason);
            }
        }
    }

    #[test]
    fn there_are_never_fewer_than_the_least_number(
        policy in policies(), points in histories(), later in 0..90 * DAY,
    ) {
        let now = LogTime(points.last().unwrap().log_time.0 + later);
        let clean = points.iter().filter(|point| point.clean).count();
        let left = kept(&policy, &points, now).iter().filter(|point| point.clean).count();
        prop_assert!(left >= clean.min(policy.min_points as usize));
    }
}
