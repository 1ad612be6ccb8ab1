//! Looking at a group's files without a daemon: after any crash it finds what the daemon will find,
//! it changes nothing, and it names what is damaged and nothing else.

mod common;

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use common::{Write, contents, shared};
use srn_core::extent::Extent;
use srn_core::frame::MarkKind;
use srn_core::ids::{CheckpointId, DiskNo, EpochId, GroupId, Seq};
use srn_core::time::{Mono, Now, WallTime};
use srn_store::StoreError;
use srn_store::group::{
    Appender, Change, Group, NewGroup, Opened, Options, OwnedRecord, Retention, Worked,
};
use srn_store::inspect::{self, Damage, Files, Report, SegmentUse};
use srn_store::io::{Access, Fs};
use srn_store::manifest::{Keep, Role};
use srn_testkit::seeds::{Coverage, Simulation};
use srn_testkit::{Chance, Fault, SimDisk};

const DISKS: u32 = 2;
const SECTORS: u64 = 512;

fn now(tick: u64) -> Now {
    let wall = WallTime(1_000_000_000_000 + tick as i64 * 1_000_000);
    Now { mono: Mono(tick * 1_000_000), wall }
}

fn dir() -> PathBuf {
    PathBuf::from("/g")
}

fn options() -> Options {
    Options {
        segment_bytes: 416 * 1024,
        fill: false,
        table_entries_max: 40,
        unsealed_max: 2,
        ..Options::default()
    }
}

fn read(disk: &SimDisk, path: &Path) -> std::io::Result<Vec<u8>> {
    let file = disk.open(path, Access::Buffered)?;
    let mut bytes = vec![0; file.size()? as usize];
    file.read_at(&mut bytes, 0)?;
    Ok(bytes)
}

fn verify(disk: &SimDisk, tick: u64) -> Report {
    let tell = &mut |_| ControlFlow::Continue(());
    inspect::verify(Arc::new(disk.clone()), &dir(), now(tick), tell).expect("it can be verified")
}

struct World {
    chance: Chance,
    disk: SimDisk,
    group: Arc<Group>,
    main: Option<Appender>,
    clock: u64,
    next_id: u64,
    seen: Coverage,
}

impl World {
    fn new(seed: u64, keep: Keep) -> Self {
        let disk = SimDisk::new(seed, 512 << 20);
        let new = NewGroup {
            group: GroupId([1; 16]),
            name: "web".into(),
            role: Role::Primary,
            keep,
            epoch: EpochId([1; 16]),
            now: now(0),
        };
        let opened = Group::create(&shared(&disk, seed), options(), &dir(), &new).expect("create");
        let Opened { group, main, .. } = opened;
        let chance = Chance::new(seed);
        let mut world = Self {
            chance,
            disk,
            group,
            main: Some(main),
            clock: 0,
            next_id: 1 << 32,
            seen: Coverage::new(),
        };
        let disks: Vec<Change> =
            (0..DISKS).map(|no| Write::add_disk(no, SECTORS).change()).collect();
        assert!(world.commit(&disks));
        world
    }

    fn saw(&mut self, what: &'static str) {
        *self.seen.entry(what).or_default() += 1;
    }

    fn commit(&mut self, changes: &[Change]) -> bool {
        self.clock += 1;
        let main = self.main.as_mut().expect("a main line");
        main.commit(changes, now(self.clock)).is_ok()
    }

    fn id(&mut self) -> [u8; 16] {
        self.next_id += 1;
        u128::from(self.next_id).to_le_bytes()
    }

    /// Everything from a frame on, and a few points before it.
    fn retention(&mut self, keep_from: Seq) -> Retention {
        let mut points: Vec<Seq> =
            (0..3).map(|_| Seq(self.chance.below(keep_from.0 + 1))).collect();
        points.sort();
        points.dedup();
        Retention { keep_from, points }
    }

    /// One thing that a group does; whether it could.
    fn step(&mut self) -> bool {
        match self.chance.below(20) {
            0..11 => {
                let writes = Write::some(&mut self.chance, DISKS, SECTORS);
                self.commit(&writes.iter().map(Write::change).collect::<Vec<_>>())
            }
            11..13 => {
                let id = CheckpointId(self.id());
                self.commit(&[Change::Record(OwnedRecord::Mark(id, MarkKind::Manual, false))])
            }
            13..18 => {
                let keep_from = Seq(self.chance.below(self.group.head().seq.0 + 1));
                let retention = self.retention(keep_from);
                for _ in 0..self.chance.between(1, 8) {
                    match self.group.maintain(&retention) {
                        Ok(Worked::Something) => {}
                        Ok(Worked::Nothing) => return true,
                        Err(_) => return false,
                    }
                }
                true
            }
            18 if self.group.keep() == Keep::Replica => {
                if let Some(main) = &mut self.main {
                    main.close_segment();
                }
                let (id, seq) = (EpochId(self.id()), self.group.head().seq);
                let Ok(mut clone) = self.group.clone_at(id, seq, now(self.clock)) else {
                    return false;
                };
                let writes = Write::some(&mut self.chance, DISKS, SECTORS);
                let changes: Vec<_> = writes.iter().map(Write::change).collect();
                clone.commit(&changes, now(self.clock)).is_ok()
            }
            19 if self.group.keep() == Keep::Replica => {
                let head = self.group.head().seq.0;
                let oldest = self.group.oldest().0.min(head);
                let seq = Seq(self.chance.between(oldest.max(head.saturating_sub(5)), head));
                if self.group.view_at(seq).is_err() {
                    return true;
                }
                self.main = None;
                let id = EpochId(self.id());
                match self.group.fail_over(id, seq, now(self.clock)) {
                    Ok(main) => self.main = Some(main),
                    Err(_) => return false,
                }
                self.saw("failover");
                true
            }
            _ => true,
        }
    }

    /// Runs until a fault hits, and starts the machine again.
    fn crash(&mut self) {
        let fault = if self.chance.percent(70) { Fault::PowerCut } else { Fault::Error };
        self.disk.fault_in(self.chance.between(20, 160), fault);
        // A fault may also hit something that does not matter; then it is the process that dies.
        let mut steps = 0;
        while steps < 120 && self.step() && !self.disk.is_off() {
            steps += 1;
        }
        self.main = None;
        self.disk.no_fault();
        self.disk = if self.disk.is_off() || self.chance.percent(50) {
            self.saw("power cut");
            self.disk.power_cycle()
        } else {
            self.saw("process restart");
            self.disk.process_restart()
        };
        self.clock += 1;
    }
}

/// After any crash: the tool sees what the daemon will see, finds no damage, and changes nothing.
#[test]
fn after_any_crash_it_sees_what_the_daemon_will_see() {
    let simulation = Simulation {
        name: "inspect",
        run: look_after_crashes,
        wanted: &[
            "failover",
            "power cut",
            "process restart",
            "unproven frames",
            "retirement under way",
            "clones or branches",
            "older point compared",
            "layer",
            "cache",
        ],
    };
    srn_testkit::seeds::run(&simulation, 80);
}

fn look_after_crashes(seed: u64) -> Coverage {
    let keep = if seed.is_multiple_of(5) { Keep::Cache } else { Keep::Replica };
    let mut world = World::new(seed, keep);
    for _ in 0..2 {
        world.crash();
        if read(&world.disk, &dir().join("base/retire.intent")).is_ok() {
            world.saw("retirement under way");
        }
        let before = world.disk.operations();
        let fs = Arc::new(world.disk.clone());
        let looked = inspect::open(fs.clone(), &dir(), now(world.clock), seed);
        let looked = looked.expect("the tool opens it");
        let report = verify(&world.disk, world.clock);
        assert_eq!(report.damage, [], "there is no damage");
        let listed = Files::open(fs, &dir()).expect("a manifest");
        if !listed.manifest.layers.is_empty() {
            world.saw("layer");
        }
        let segments = listed.segments().expect("a list of segments");
        assert!(segments.iter().all(|file| file.purpose != SegmentUse::Unreadable));
        assert_eq!(before, world.disk.operations(), "looking changed something");

        let shared = shared(&world.disk, seed);
        let opened = Group::open(&shared, options(), &dir(), now(world.clock));
        if let Err(StoreError::Full(_)) = opened {
            // There is no room to go on in, but it can be looked at.
            world.saw("full");
            break;
        }
        let opened = opened.expect("the daemon opens it");
        if opened.rewritten > 0 {
            world.saw("unproven frames");
        }
        assert_eq!(looked.unproven, opened.rewritten);
        assert_eq!(looked.group.lines(), opened.group.lines());
        for line in opened.group.lines() {
            let id = line.epochs.current();
            let marks = |group: &Group| group.checkpoints_of(id).expect("checkpoints");
            assert_eq!(marks(&looked.group), marks(&opened.group));
            let Some(base) = line.base else {
                world.saw("cache");
                continue;
            };
            let (from, to) = (base.at.seq.0, line.catalog.at.seq.0);
            for _ in 0..3 {
                let seq = Seq(world.chance.between(from.min(to), to));
                let content =
                    |group: &Arc<Group>| contents(&group.view_at_of(id, seq)?, DISKS, SECTORS);
                let (a, b) = (content(&looked.group), content(&opened.group));
                match (a, b) {
                    (Ok(a), Ok(b)) => {
                        assert!(a == b, "frame {seq} of line {id} differs");
                        world.saw("older point compared");
                    }
                    (Err(StoreError::NotInHistory(_)), Err(StoreError::NotInHistory(_))) => {}
                    (a, b) => panic!("frame {seq}: {:?} and {:?}", a.err(), b.err()),
                }
            }
        }
        if opened.group.lines().len() > 1 {
            world.saw("clones or branches");
        }
        world.group = opened.group;
        world.main = Some(opened.main);
    }
    world.seen
}

/// A replica with a base, sealed segments, merged runs and an open end.
fn sound() -> World {
    let mut world = World::new(7, Keep::Replica);
    for _ in 0..120 {
        let writes = Write::some(&mut world.chance, DISKS, SECTORS);
        assert!(world.commit(&writes.iter().map(Write::change).collect::<Vec<_>>()));
    }
    // Seals everything, retires half of it.
    world.main.as_mut().expect("a main line").close_segment();
    let keep_from = Seq(world.group.head().seq.0 / 4);
    while world.group.maintain(&Retention::from(keep_from)).expect("work") == Worked::Something {}
    for start in 0..5 {
        let write = Write::Data { disk: 0, start, content: vec![0x5a; 512].into() };
        assert!(world.commit(&[write.change()]));
    }
    world.main = None;
    world.clock += 1;
    world
}

fn only(report: &Report, file: &str) -> Damage {
    let damage = report.damage.iter().filter(|damage| damage.file == file);
    let found: Vec<&Damage> = damage.collect();
    assert_eq!(found.len(), 1, "one damage in {file}: {:?}", report.damage);
    found[0].clone()
}

#[test]
fn each_kind_of_damage_is_named() {
    let world = sound();
    let report = verify(&world.disk, world.clock);
    assert_eq!(report.damage, []);
    let counts = report.counts;
    assert!(counts.frames > 20 && counts.runs > 9 && counts.pages > 10, "{counts:?}");
    let fs = Arc::new(world.disk.clone());
    let files = Files::open(fs, &dir()).expect("a manifest");
    let segments = files.segments().expect("a list");
    let sealed = segments.iter().find(|file| matches!(file.purpose, SegmentUse::Sealed(_)));
    let sealed = sealed.expect("a sealed segment");
    let log = format!("log/{:08x}.seg", sealed.slot);
    let SegmentUse::Sealed(ordinal) = sealed.purpose else { unreachable!("it is sealed") };
    let first = files.manifest.segments[&ordinal].first;
    // A frame with content.
    let written = (first.0..).map(Seq).find_map(|seq| {
        let dump = files.frame(None, seq).expect("a frame");
        (!dump.blocks.is_empty()).then_some((seq, dump))
    });
    let (seq, dump) = written.expect("a frame with content");
    let frame = dump.frame.as_ref().expect("it is sound");
    let content = dump.offset + frame.envelope().disk_content_offset() as u64;
    let (block, ..) = dump.blocks[0];

    let rotten = |file: &str, offset: u64| {
        world.disk.rot(&dir().join(file), offset);
        let report = verify(&world.disk, world.clock);
        // A bit that is flipped twice is what it was.
        world.disk.rot(&dir().join(file), offset);
        report
    };
    let damage = only(&rotten(&log, content + 5), &log);
    assert_eq!(damage.frames, Some((seq, seq)));
    assert_eq!(damage.sectors, [(block.disk, block.extent)]);
    assert_eq!(damage.offset, Some(content));

    let damage = only(&rotten(&log, dump.offset + 80), &log);
    assert_eq!(damage.frames, Some((seq, seq)), "a head that is damaged");
    let covered = damage
        .sectors
        .iter()
        .any(|(disk, extent)| *disk == block.disk && extent.intersect(&block.extent).is_some());
    assert!(covered, "the index tells what it was about: {damage:?}");

    let damage = only(&rotten(&log, 100), &log);
    assert_eq!((damage.offset, damage.text.contains("header")), (Some(0), true));

    let run = *files.manifest.runs.keys().next().expect("a run");
    let index = format!("index/{run:08x}.idx");
    let damage = only(&rotten(&index, 2000), &index);
    assert!(damage.text.contains("block 0"), "{damage:?}");
    let report =
        rotten(&index, read(&world.disk, &dir().join(&index)).expect("it").len() as u64 - 1);
    assert!(only(&report, &index).text.contains("footer"));

    let base = files.manifest.base.as_ref().expect("a base");
    let (no, disk) = base.catalog.disks.first_key_value().expect("a disk");
    let raw = format!("base/{}.raw", disk.id);
    let sums = read(&world.disk, &dir().join(format!("base/{}.sum", disk.id))).expect("sums");
    let page = sums.chunks(8).position(|sum| sum != [0; 8]).expect("a page") as u64;
    let damage = only(&rotten(&raw, page * 4096 + 9), &raw);
    assert_eq!(damage.sectors, [(*no, Extent::new(page * 8, 8))]);
    let damage = only(&rotten(&format!("base/{}.sum", disk.id), page * 8), &raw);
    assert_eq!(damage.sectors, [(*no, Extent::new(page * 8, 8))]);

    let newest = format!("manifest-{:016x}", files.manifest.generation);
    let report = rotten(&newest, 60);
    assert!(only(&report, &newest).text.contains("damaged") || !report.damage.is_empty());

    let report = verify(&world.disk, world.clock);
    assert_eq!(report.damage, [], "it is whole again");
    assert!(report.disks.get(&DiskNo(0)).is_some_and(|name| name == "d0"));
}

/// A frame that something later knew to be durable is missed, although nothing lists it.
#[test]
fn damage_in_the_open_end_of_the_log_is_told_from_a_torn_one() {
    let world = sound();
    let files = Files::open(Arc::new(world.disk.clone()), &dir()).expect("a manifest");
    let open = files.segments().expect("a list");
    let open = open.iter().find(|file| file.purpose == SegmentUse::Open).expect("an open segment");
    let log = format!("log/{:08x}.seg", open.slot);
    let header = open.header.header().expect("a header");
    let last = open.last.expect("frames").seq;
    assert!(last > header.first.next(), "there are some");

    let torn = files.frame(None, last).expect("the last frame");
    world.disk.rot(&dir().join(&log), torn.offset + 70);
    assert_eq!(verify(&world.disk, world.clock).damage, [], "it looks like one that was torn");
    world.disk.rot(&dir().join(&log), torn.offset + 70);

    let first = files.frame(None, header.first).expect("the first frame");
    world.disk.rot(&dir().join(&log), first.offset + 70);
    let report = verify(&world.disk, world.clock);
    assert_eq!(only(&report, &log).frames, Some((header.first, header.first)));
    assert!(report.damage.iter().any(|damage| damage.text.contains("does not open")));
    // And it can still be looked at.
    let dump = files.frame_at(open.slot, first.offset).expect("something is there");
    assert!(dump.frame.is_err());
    let next = files.frame(None, header.first.next()).expect("the frame behind it");
    assert!(next.frame.is_ok());
}
