//! Two real stores of which one falls behind: what changed meanwhile is carried over as a layer, with
//! power cuts and failing disks at the one that takes it in, and the giver's history being merged and
//! retired; against an oracle of every write.
//!
//! What is checked:
//! * after a leap the taker's newest position is the giver's, with exactly its content (P2);
//! * a leap that is cut leaves the line where it was, or is whole (P6);
//! * every point that the taker had before stays what it was (P3);
//! * frames go on behind it;
//! * a giver that does not know what changed says so.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use srn_core::ids::{EpochId, GroupId, Seq};
use srn_core::time::{Mono, Now, WallTime};
use srn_store::StoreError;
use srn_store::codec::Effort;
use srn_store::group::{
    Appender, Change, Changed, Group, NewGroup, Opened, Options, Retention, Worked,
};
use srn_store::manifest::{Keep, Role};

use crate::oracle::{self, Model, Write, contents};
use crate::seeds::{Coverage, Simulation};
use crate::{Chance, Fault, SimDisk};

const DISKS: u32 = 2;
const SECTORS: u64 = 400;

fn now(clock: u64) -> Now {
    Now { mono: Mono(clock), wall: WallTime(1_700_000_000_000_000 + clock as i64) }
}

struct World {
    chance: Chance,
    seed: u64,
    options: Options,
    clock: u64,
    epochs: u8,
    giver: Arc<Group>,
    giver_end: Option<Appender>,
    taker_disk: SimDisk,
    taker: Arc<Group>,
    taker_end: Option<Appender>,
    writes: Vec<Write>,
    /// For each head that the giver had: how many writes it holds.
    known: BTreeMap<Seq, usize>,
    coverage: Coverage,
}

impl World {
    fn new(seed: u64) -> Self {
        let mut chance = Chance::new(seed);
        let options = Options {
            segment_bytes: 416 * 1024,
            fill: false,
            table_entries_max: chance.between(4, 60) as usize,
            layer_fan: chance.between(2, 8) as usize,
            slice_bytes: chance.between(4, 256) * 1024,
            slice_entries: chance.between(1, 40) as usize,
            ..Options::default()
        };
        let disks = [SimDisk::new(seed, 64 << 20), SimDisk::new(seed ^ 1, 64 << 20)];
        let [giver, taker] =
            [(&disks[0], Role::Primary), (&disks[1], Role::Secondary)].map(|(disk, role)| {
                let new = NewGroup {
                    group: GroupId([1; 16]),
                    name: "sim".into(),
                    role,
                    keep: Keep::Replica,
                    epoch: EpochId([1; 16]),
                    now: now(0),
                };
                let shared = oracle::shared(disk, seed);
                Group::create(&shared, options, Path::new("/g"), &new).expect("create")
            });
        let [_, taker_disk] = disks;
        let mut world = Self {
            chance,
            seed,
            options,
            clock: 0,
            epochs: 1,
            giver: giver.group,
            giver_end: Some(giver.main),
            taker_disk,
            taker: taker.group,
            taker_end: Some(taker.main),
            writes: Vec::new(),
            known: BTreeMap::from([(Seq(0), 0)]),
            coverage: Coverage::new(),
        };
        world.commit((0..DISKS).map(|no| Write::add_disk(no, SECTORS)).collect());
        world
    }

    fn saw(&mut self, what: &'static str) {
        *self.coverage.entry(what).or_default() += 1;
    }

    fn model(&self, count: usize) -> Model {
        Model::of(&self.writes[..count], DISKS, SECTORS)
    }

    fn commit(&mut self, writes: Vec<Write>) {
        let changes: Vec<Change> = writes.iter().map(Write::change).collect();
        self.clock += 1000;
        let end = self.giver_end.as_mut().expect("the giver never fails");
        let done = end.commit(&changes, now(self.clock)).expect("the giver never fails");
        self.writes.extend(writes);
        self.known.insert(done.head.seq, self.writes.len());
        if self.chance.percent(20)
            && let Some(end) = &mut self.giver_end
        {
            end.close_segment();
        }
    }

    /// The giver's history becomes shorter; most often the taker's position stays in it.
    fn maintain_giver(&mut self) {
        let known: Vec<Seq> = self.known.keys().copied().collect();
        let keep_from = *self.chance.pick(&known);
        let behind = self.taker.head().seq;
        let points =
            if self.chance.percent(80) && behind < keep_from { vec![behind] } else { Vec::new() };
        let retention = Retention { keep_from, points };
        for _ in 0..self.chance.between(1, 20) {
            if self.giver.maintain(&retention).expect("the giver never fails") == Worked::Nothing {
                break;
            }
        }
    }

    fn maintain_taker(&mut self) {
        let head = self.taker.head().seq;
        let keep_from = if self.chance.percent(30) { head } else { Seq(0) };
        for _ in 0..self.chance.between(1, 6) {
            match self.taker.maintain(&Retention::from(keep_from)) {
                Ok(Worked::Something) => self.saw("the taker's maintenance"),
                Ok(Worked::Nothing) => break,
                Err(_) => return self.crash("failed maintenance"),
            }
        }
    }

    /// A few frames, while the giver has them.
    fn send_frames(&mut self) {
        let mut cursor = self.giver.cursor(self.taker.head().seq.next());
        let most = self.chance.between(1, 12);
        let mut frames = Vec::new();
        while (frames.len() as u64) < most {
            match cursor.next() {
                Ok(Some(frame)) => frames.push(frame),
                Ok(None) => break,
                Err(StoreError::NotInHistory(_)) => return self.saw("too far behind for frames"),
                Err(error) => panic!("the giver's log: {error}"),
            }
        }
        let Some(end) = &mut self.taker_end else { return };
        match end.commit_frames(&frames) {
            Ok(_) => self.saw("frames sent"),
            Err(_) => self.crash("failed frames"),
        }
    }

    /// Carries over what changed.
    fn leap(&mut self) {
        if self.taker.head().seq >= self.giver.head().seq {
            return;
        }
        if let Some(end) = &mut self.giver_end {
            end.close_segment();
        }
        let from = self.taker.head();
        let mut delta = match self.giver.delta(from.seq) {
            Ok(delta) => delta,
            Err(StoreError::NotInHistory(_)) => return self.saw("nobody knows what changed"),
            Err(error) => panic!("what changed behind {from}: {error}"),
        };
        if self.chance.percent(40) {
            let operations = self.chance.between(1, 40);
            let fault = if self.chance.percent(65) { Fault::PowerCut } else { Fault::Error };
            self.taker_disk.fault_in(operations, fault);
        }
        // What is being read stays readable, whatever happens to the giver's history meanwhile.
        if self.chance.percent(30) {
            self.maintain_giver();
            self.saw("maintenance in the middle of a leap");
        }
        self.taker_end = None;
        let to = delta.to().clone();
        let effort = if self.chance.percent(50) { Effort::Lz4 } else { Effort::None };
        let expected = delta.content_bytes().expect("the giver never fails");
        let mut content = 0;
        let leapt = (|| {
            let mut leap = self.taker.begin_leap(to.clone(), effort)?;
            while let Some((disk, extent, changed)) = delta.next().expect("the giver never fails") {
                match changed {
                    Changed::Zero { trim } => leap.zero(disk, extent, trim)?,
                    Changed::Content(bytes) => {
                        content += bytes.len() as u64;
                        leap.content(disk, extent.start, &bytes)?;
                    }
                }
            }
            self.clock += 1000;
            leap.finish(now(self.clock))
        })();
        match leapt {
            Ok(end) => {
                assert_eq!(end.head(), to.catalog.at);
                assert_eq!(content, expected, "as much came as was said");
                self.taker_end = Some(end);
                self.saw(if from.epoch == to.catalog.at.epoch {
                    "leap"
                } else {
                    "leap into another epoch"
                });
                self.taker_disk.no_fault();
                if self.taker_disk.is_off() {
                    // In something that nobody waits for.
                    return self.crash("cut behind a leap");
                }
                self.check_head();
            }
            Err(StoreError::Invalid(why)) => panic!("{why}"),
            Err(_) => self.crash("cut leap"),
        }
    }

    /// The newest position of the taker is one of the giver's, with its content.
    fn check_head(&mut self) {
        let head = self.taker.head();
        let Some(count) = self.known.get(&head.seq).copied() else { return };
        let view = self.taker.view_head().expect("a view");
        let found = contents(&view, DISKS, SECTORS).expect("it reads");
        assert!(found == self.model(count), "the taker at {head} is not what the giver was");
        self.saw("taker compared");
    }

    fn check_point(&mut self) {
        let known: Vec<(Seq, usize)> = self.known.iter().map(|(seq, n)| (*seq, *n)).collect();
        let (seq, count) = *self.chance.pick(&known);
        match self.taker.view_at(seq) {
            Ok(view) => {
                let found = contents(&view, DISKS, SECTORS).expect("reading a point");
                assert!(found == self.model(count), "frame {seq} of the taker is not what it was");
                self.saw("older point read");
            }
            Err(StoreError::NotInHistory(_)) => self.saw("point not there"),
            Err(error) => panic!("frame {seq} cannot be read: {error}"),
        }
    }

    fn crash(&mut self, why: &'static str) {
        self.saw(why);
        self.taker_end = None;
        self.taker_disk.no_fault();
        let power = self.taker_disk.is_off() || self.chance.percent(50);
        self.taker_disk =
            if power { self.taker_disk.power_cycle() } else { self.taker_disk.process_restart() };
        self.clock += 1000;
        let shared = oracle::shared(&self.taker_disk, self.seed ^ self.clock);
        let opened = Group::open(&shared, self.options, Path::new("/g"), now(self.clock));
        let Opened { group, main, .. } = opened.expect("it opens");
        self.taker = group;
        self.taker_end = Some(main);
        self.check_head();
        self.check_point();
    }

    fn fail_over(&mut self) {
        self.giver_end = None;
        self.epochs += 1;
        self.clock += 1000;
        let at = self.giver.head().seq;
        let end = self.giver.fail_over(EpochId([self.epochs; 16]), at, now(self.clock));
        let end = end.expect("the giver never fails");
        self.known.insert(end.head().seq, self.writes.len());
        self.giver_end = Some(end);
    }

    fn step(&mut self) {
        match self.chance.below(100) {
            0..50 => {
                let writes = Write::some(&mut self.chance, DISKS, SECTORS);
                self.commit(writes);
            }
            50..60 => self.maintain_giver(),
            60..66 => self.send_frames(),
            66..78 => self.leap(),
            78..84 => self.maintain_taker(),
            84..94 => self.check_point(),
            94..96 => self.fail_over(),
            _ => self.crash("crash at rest"),
        }
    }
}

/// One seed.
///
/// # Panics
/// When a promise is broken.
fn run(seed: u64) -> Coverage {
    let mut world = World::new(seed);
    for _ in 0..world.chance.between(30, 120) {
        world.step();
    }
    world.crash("crash at the end");
    world.coverage
}

/// What must have happened for the run to count.
const WANTED: &[&str] = &[
    "crash at rest",
    "cut leap",
    "frames sent",
    "leap",
    "leap into another epoch",
    "maintenance in the middle of a leap",
    "nobody knows what changed",
    "older point read",
    "point not there",
    "taker compared",
    "the taker's maintenance",
    "too far behind for frames",
];

/// This simulation.
pub const SIMULATION: Simulation = Simulation { name: "leap", run, wanted: WANTED };
