//! Times of frames, over segments, restarts and a clock that jumps about: what the index says a time
//! means is what a search through all frames says.

mod common;

use std::path::PathBuf;

use common::{Write, shared};
use srn_core::frame::ResyncReason;
use srn_core::ids::{DiskNo, EpochId, GroupId, Seq};
use srn_core::point::{Standing, Timeline};
use srn_core::time::{Mono, Now, WallTime};
use srn_store::group::{Change, Group, NewGroup, Opened, Options, OwnedRecord, Retention, Worked};
use srn_store::manifest::{Keep, Role};
use srn_testkit::seeds::{self, Coverage, Simulation};
use srn_testkit::{Chance, SimDisk};

const SECTORS: u64 = 512;

fn options() -> Options {
    Options { segment_bytes: 1 << 20, cap_bytes: 64 << 20, fill: false, ..Options::default() }
}

/// Every frame there is: its number, its wall time and how the position behind it stands.
type Frames = Vec<(Seq, WallTime, Standing)>;

/// Stretches of frames in which the wall time does not go back.
fn stretches(frames: &Frames) -> Vec<&[(Seq, WallTime, Standing)]> {
    frames.chunk_by(|one, next| next.1 >= one.1).collect()
}

/// What a search through all frames says that `time` means.
fn search(frames: &Frames, time: WallTime) -> Vec<Seq> {
    let newest = |stretch: &&[(Seq, WallTime, Standing)]| {
        stretch.iter().rev().find(|frame| frame.1 <= time).map(|frame| frame.0)
    };
    let all = stretches(frames);
    let reach =
        |stretch: &&&[(Seq, WallTime, Standing)]| stretch.last().is_some_and(|last| last.1 >= time);
    let found: Vec<Seq> = all.iter().filter(reach).filter_map(newest).collect();
    if found.is_empty() { all.iter().rev().find_map(newest).into_iter().collect() } else { found }
}

fn check(group: &std::sync::Arc<Group>, frames: &Frames, chance: &mut Chance, seen: &mut Coverage) {
    let line: Timeline = group.timeline().expect("it is readable");
    let oldest = line.blocks[0].first;
    let kept: Frames = frames.iter().filter(|frame| frame.0 >= oldest).copied().collect();
    for (seq, _, standing) in &kept {
        assert_eq!(line.standing(*seq), Some(*standing), "frame {seq}");
    }
    for _ in 0..40 {
        // Frames' own times, and times around them.
        let near = chance.pick(&kept).1.0 + chance.below(3_000_000) as i64 - 1_500_000;
        let own = chance.pick(&kept).1.0;
        let time = WallTime(*chance.pick(&[near, own]));
        let found: Vec<Seq> = line
            .at(time, WallTime(i64::MIN))
            .into_iter()
            .map(|candidate| group.newest_at(candidate, time).expect("it is readable"))
            .collect();
        if found.len() > 1 {
            *seen.entry("ambiguous time").or_default() += 1;
        }
        assert_eq!(found, search(&kept, time), "{time:?} in {:?}", line.blocks);
    }
}

#[test]
fn times_mean_what_a_search_through_all_frames_says() {
    let wanted = &["step of the clock", "restart", "retirement", "ambiguous time", "mixture"];
    let simulation = Simulation { name: "times", run, wanted };
    seeds::run(&simulation, 6);
}

fn run(seed: u64) -> Coverage {
    let mut seen = Coverage::new();
    let mut chance = Chance::new(seed);
    let disk = SimDisk::new(seed, 1 << 30);
    let dir = PathBuf::from("/state/group");
    let mut now = Now { mono: Mono(1), wall: WallTime(1_000_000_000_000) };
    let new = NewGroup {
        group: GroupId([1; 16]),
        name: "web".into(),
        role: Role::Primary,
        keep: Keep::Replica,
        epoch: EpochId([2; 16]),
        now,
    };
    let Opened { mut group, mut main, .. } =
        Group::create(&shared(&disk, seed), options(), &dir, &new).expect("a group");
    let mut frames: Frames = vec![(Seq::ZERO, WallTime(0), Standing::NoDisk)];
    let (mut mixed, mut disks) = (false, 0);
    for round in 0..400 {
        let elapsed = chance.below(2_000_000);
        now.mono.0 += elapsed;
        now.wall.0 += elapsed as i64;
        if chance.percent(4) {
            // An hour at most, there or back; now and then too little to be recorded.
            let most = if chance.percent(50) { 900_000 } else { 3_600_000_000 };
            now.wall.0 += chance.below(2 * most) as i64 - most as i64;
            *seen.entry("step of the clock").or_default() += 1;
        }
        let changes: Vec<Change> = if round == 5 {
            disks = 1;
            vec![Write::add_disk(0, SECTORS).change()]
        } else if disks == 0 {
            Vec::new()
        } else if chance.percent(8) {
            mixed = !mixed;
            *seen.entry("mixture").or_default() += u64::from(mixed);
            let record = if mixed {
                OwnedRecord::ResyncBegin(DiskNo(0), ResyncReason::MirrorReconnected)
            } else {
                OwnedRecord::ResyncEnd(DiskNo(0))
            };
            vec![Change::Record(record)]
        } else {
            Write::some(&mut chance, 1, SECTORS).iter().map(Write::change).collect()
        };
        let before = main.head().seq;
        let was = match (disks, frames.last()) {
            (_, Some(last)) => last.2,
            (_, None) => Standing::NoDisk,
        };
        let committed = main.commit(&changes, now).expect("room");
        let standing = match (disks, mixed) {
            (0, _) => Standing::NoDisk,
            (_, true) => Standing::Mixture(ResyncReason::MirrorReconnected),
            (_, false) => Standing::Whole,
        };
        for seq in before.0 + 1..=committed.head.seq.0 {
            // A step has a frame of its own, before what comes with it.
            let first_of_step = seq != committed.head.seq.0 && committed.head.seq.0 > before.0 + 1;
            let is_step = first_of_step && seq == before.0 + 1 && {
                let mut cursor = group.cursor(Seq(seq));
                let frame = cursor.next().expect("it is readable").expect("it is there");
                let head = frame.head().expect("a head");
                head.records().any(|r| matches!(r, srn_core::frame::Record::ClockStep { .. }))
            };
            frames.push((Seq(seq), now.wall, if is_step { was } else { standing }));
        }
        if chance.percent(5) {
            main.close_segment();
        }
        if chance.percent(10) {
            let retention = Retention::from(Seq(chance.below(main.head().seq.0 / 2 + 1)));
            let oldest = group.oldest();
            while group.maintain(&retention).expect("it works") == Worked::Something {}
            *seen.entry("retirement").or_default() += u64::from(group.oldest() > oldest);
        }
        if chance.percent(2) {
            drop((group, main));
            *seen.entry("restart").or_default() += 1;
            Opened { group, main, .. } =
                Group::open(&shared(&disk, seed), options(), &dir, now).expect("it opens");
            // It may have written the last frames again, and one that says that they are durable.
            for seq in frames.last().map_or(0, |last| last.0.0) + 1..=main.head().seq.0 {
                frames.push((Seq(seq), now.wall, frames[frames.len() - 1].2));
            }
        }
        if chance.percent(5) && frames.len() > 10 {
            check(&group, &frames, &mut chance, &mut seen);
        }
    }
    check(&group, &frames, &mut chance, &mut seen);
    seen
}
