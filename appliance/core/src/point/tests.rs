use super::*;
use crate::civil::Date;
use alloc::vec;
use proptest::prelude::*;

#[test]
fn what_people_type() {
    let clock = |date, of_day_us, offset_s| Ok(Wanted::Clock(Clock { date, of_day_us, offset_s }));
    let day = Date::new(2026, 11, 20);
    let (hour, minute, second) = (3_600_000_000, 60_000_000, 1_000_000);
    let afternoon = 14 * hour + 3 * minute;
    for (text, wanted) in [
        ("latest", Ok(Wanted::Latest)),
        ("123", Ok(Wanted::Frame(Seq(123)))),
        ("frame:123", Ok(Wanted::Frame(Seq(123)))),
        ("-90s", Ok(Wanted::Ago(90_000_000))),
        ("-2h", Ok(Wanted::Ago(7_200_000_000))),
        ("-1d12h", Ok(Wanted::Ago(129_600_000_000))),
        ("-1h 30min", Ok(Wanted::Ago(5_400_000_000))),
        ("-250ms", Ok(Wanted::Ago(250_000))),
        ("2026-11-20 14:03:07.25", clock(day, afternoon + 7 * second + 250_000, None)),
        ("2026-11-20T14:03:07.25Z", clock(day, afternoon + 7 * second + 250_000, Some(0))),
        ("2026-11-20 14:03 UTC", clock(day, afternoon, Some(0))),
        ("2026-11-20 14:03+01:00", clock(day, afternoon, Some(3600))),
        ("2026-11-20 14:03:00 -0530", clock(day, afternoon, Some(-19_800))),
        ("2026-11-20T14:03:00.123456789+02", clock(day, afternoon + 123_456, Some(7200))),
        ("14:03", clock(None, afternoon, None)),
        ("9:03", clock(None, 9 * hour + 3 * minute, None)),
        ("14:03:07Z", clock(None, afternoon + 7 * second, Some(0))),
        ("14:03-05:00", clock(None, afternoon, Some(-18_000))),
        ("before-the-update", Ok(Wanted::Name)),
        ("deadbeef", Ok(Wanted::Name)),
        ("2026-q4", Ok(Wanted::Name)),
        ("1b", Ok(Wanted::Name)),
        ("v2: final", Ok(Wanted::Name)),
        ("", Ok(Wanted::Name)),
        ("frame:", Err(BadPoint::Frame)),
        ("frame:x", Err(BadPoint::Frame)),
        ("frame:99999999999999999999", Err(BadPoint::Frame)),
        ("-", Err(BadPoint::Ago)),
        ("-90", Err(BadPoint::Ago)),
        ("-2 fortnights", Err(BadPoint::Ago)),
        ("-99999999999999w", Err(BadPoint::Ago)),
        ("2026-11-20", Err(BadPoint::Clock)),
        ("2026-11-20 14", Err(BadPoint::Clock)),
        ("14:3", Err(BadPoint::Clock)),
        ("14:03:07.", Err(BadPoint::Clock)),
        ("14:03 CET", Err(BadPoint::Clock)),
        ("14:03:07:08", Err(BadPoint::Clock)),
        ("14:03+25:00", Err(BadPoint::Clock)),
        ("2026-02-30 14:03", Err(BadPoint::Day)),
        ("2026-13-01 14:03", Err(BadPoint::Day)),
        ("24:00", Err(BadPoint::OfDay)),
        ("23:60", Err(BadPoint::OfDay)),
        ("23:59:60", Err(BadPoint::OfDay)),
    ] {
        assert_eq!(Wanted::parse(text), wanted, "{text:?}");
    }
}

proptest! {
    #[test]
    fn nothing_typed_panics(text in "[-0-9: TZ.+a-zé]{0,24}") {
        let _ = Wanted::parse(&text);
    }
}

fn whole(first: u64, wall: i64, before: i64) -> Block {
    Block {
        first: Seq(first),
        log_time: LogTime(first),
        wall_time: WallTime(wall),
        before: WallTime(before),
        standing: Standing::Whole,
        alone: false,
    }
}

fn candidate(first: u64, last: u64) -> Candidate {
    Candidate { first: Seq(first), last: Seq(last) }
}

/// 100 to 200, then back to 150 and on to 300.
fn stepped_back() -> Timeline {
    Timeline {
        blocks: vec![
            whole(1, 100, 100),
            whole(10, 160, 155),
            whole(20, 150, 200),
            whole(30, 250, 240),
        ],
        head: Seq(39),
        head_time: WallTime(300),
    }
}

#[test]
fn a_time_means_the_block_it_lies_in() {
    let line = stepped_back();
    let at = |time| line.at(WallTime(time), WallTime(310));
    assert_eq!(at(99), []);
    assert_eq!(at(100), [candidate(1, 9)]);
    assert_eq!(at(149), [candidate(1, 9)]);
    // In both stretches.
    assert_eq!(at(155), [candidate(1, 9), candidate(20, 29)]);
    assert_eq!(at(170), [candidate(10, 19), candidate(20, 29)]);
    assert_eq!(at(200), [candidate(10, 19), candidate(20, 29)]);
    // Behind the first stretch.
    assert_eq!(at(201), [candidate(20, 29)]);
    assert_eq!(at(299), [candidate(30, 39)]);
    // The newest frame stands until now, and for what nobody knows yet.
    assert_eq!(at(305), [candidate(30, 39)]);
    assert_eq!(at(400), [candidate(39, 39)]);
}

#[test]
fn a_time_behind_all_stretches_means_the_newest_frame() {
    let line = Timeline {
        blocks: vec![whole(1, 100, 100), whole(20, 50, 200)],
        head: Seq(29),
        head_time: WallTime(80),
    };
    assert_eq!(line.at(WallTime(90), WallTime(90)), [candidate(20, 29)]);
    assert_eq!(line.at(WallTime(150), WallTime(90)), [candidate(1, 19)]);
    assert_eq!(line.at(WallTime(250), WallTime(90)), [candidate(29, 29)]);
}

#[test]
fn gaps_have_a_point_before_and_one_behind() {
    let mixture = |first, wall, reason| Block {
        standing: Standing::Mixture(reason),
        ..whole(first, wall, wall)
    };
    let empty = Block { standing: Standing::NoDisk, ..whole(0, 90, 90) };
    let line = Timeline {
        blocks: vec![
            empty,
            mixture(1, 100, ResyncReason::Seeding),
            mixture(5, 110, ResyncReason::Seeding),
            whole(10, 120, 119),
            mixture(20, 130, ResyncReason::MirrorReconnected),
            whole(25, 140, 140),
            mixture(30, 150, ResyncReason::MirrorRestarted),
        ],
        head: Seq(31),
        head_time: WallTime(151),
    };
    let gap = |first, last, from, to, reason, open| Gap {
        first: Seq(first),
        last: Seq(last),
        from: WallTime(from),
        to: WallTime(to),
        reason,
        open,
    };
    assert_eq!(
        line.gaps(),
        [
            gap(1, 9, 100, 119, ResyncReason::Seeding, false),
            gap(20, 24, 130, 140, ResyncReason::MirrorReconnected, false),
            gap(30, 31, 150, 151, ResyncReason::MirrorRestarted, true),
        ]
    );
    let nearest = |seq| line.nearest(Seq(seq));
    let point = |seq, wall| Some((Seq(seq), WallTime(wall)));
    assert_eq!(nearest(6), (None, point(10, 120)));
    assert_eq!(nearest(22), (point(19, 130), point(25, 140)));
    assert_eq!(nearest(31), (point(29, 150), None));
    assert_eq!(nearest(32), (None, None));
    assert_eq!(line.standing(Seq(24)), Some(Standing::Mixture(ResyncReason::MirrorReconnected)));
    assert_eq!(line.standing(Seq(25)), Some(Standing::Whole));
    assert_eq!(line.standing(Seq(0)), Some(Standing::NoDisk));
}

#[test]
fn between_single_points_there_is_nothing() {
    let alone = |first, wall| Block { alone: true, ..whole(first, wall, wall) };
    let line = Timeline {
        blocks: vec![alone(10, 100), alone(20, 200), alone(30, 300), whole(31, 310, 300)],
        head: Seq(40),
        head_time: WallTime(400),
    };
    let at = |time| line.at(WallTime(time), WallTime(400));
    assert_eq!(at(150), [candidate(10, 10)]);
    assert_eq!(at(305), [candidate(30, 30)]);
    assert_eq!(at(311), [candidate(31, 40)]);
    assert_eq!(line.standing(Seq(20)), Some(Standing::Whole));
    assert_eq!(line.standing(Seq(21)), None);
    assert_eq!(line.behind_hole(Seq(10)), Some(Seq(20)));
    assert_eq!(line.behind_hole(Seq(20)), Some(Seq(30)));
    assert_eq!(line.behind_hole(Seq(30)), None);
    assert_eq!(line.behind_hole(Seq(35)), None);
    assert_eq!(line.full_from(), Some((Seq(30), WallTime(300))));
    assert_eq!(stepped_back().full_from(), Some((Seq(1), WallTime(100))));
}

#[test]
fn standings_have_a_code() {
    for standing in [
        Standing::Whole,
        Standing::NoDisk,
        Standing::Mixture(ResyncReason::Seeding),
        Standing::Mixture(ResyncReason::MirrorReconnected),
    ] {
        assert_eq!(Standing::from_code(standing.code()), Some(standing));
    }
    assert_eq!(Standing::from_code([2, 0]), None);
    assert_eq!(Standing::from_code([3, 0]), None);
    assert_eq!(Standing::from_code([0, 1]), None);
}

/// Frames with wall times that jump about, cut to blocks as an index does, against a search through
/// all of them.
#[derive(Debug, Clone)]
struct Frames(Vec<i64>);

fn frames() -> impl Strategy<Value = Frames> {
    prop::collection::vec((-30..60_i64, prop::bool::weighted(0.1)), 1..60).prop_map(|steps| {
        let mut wall = 1000;
        Frames(
            steps
                .into_iter()
                .map(|(step, back)| {
                    wall += if back { step } else { step.abs() };
                    wall
                })
                .collect(),
        )
    })
}

proptest! {
    #[test]
    fn a_time_means_what_a_search_finds(walls in frames(), every in 1_usize..9, time in 900..3000_i64) {
        let walls = walls.0;
        let mut blocks = Vec::new();
        for (index, wall) in walls.iter().enumerate() {
            let before = index.checked_sub(1).map_or(*wall, |at| walls[at]);
            if index % every == 0 || *wall < before {
                blocks.push(whole(index as u64, *wall, before));
            }
        }
        let line = Timeline {
            blocks,
            head: Seq(walls.len() as u64 - 1),
            head_time: WallTime(walls[walls.len() - 1]),
        };
        let mut stretches: Vec<Vec<usize>> = vec![vec![0]];
        for index in 1..walls.len() {
            if walls[index] < walls[index - 1] {
                stretches.push(Vec::new());
            }
            stretches.last_mut().unwrap().push(index);
        }
        let newest = |stretch: &[usize]| stretch.iter().rev().find(|at| walls[**at] <= time).copied();
        let mut expected: Vec<usize> = stretches
            .iter()
            .filter(|stretch| walls[stretch[stretch.len() - 1]] >= time)
            .filter_map(|stretch| newest(stretch))
            .collect();
        if expected.is_empty() {
            expected.extend(stretches.iter().rev().find_map(|stretch| newest(stretch)));
        }
        let found: Vec<usize> = line
            .at(WallTime(time), WallTime(0))
            .into_iter()
            .map(|found| {
                let (first, last) = (found.first.0 as usize, found.last.0 as usize);
                (first..=last).rev().find(|at| walls[*at] <= time).unwrap()
            })
            .collect();
        prop_assert_eq!(found, expected);
    }
}
