//! The real store on the simulated disk: append, reopen, resume reading, trim, retire, merge, clone
//! and fail over, with power cuts and failing disks at any operation, against an oracle that holds
//! every write.
//!
//! What is checked after each step (the promises are those of the design):
//! * P1: whatever was answered is there after any crash;
//! * P2: what is there is exactly the result of a prefix of all writes, at every position asked for;
//! * P3: what is read is right or an error, never wrong, also after a bit has flipped; what has to
//!   be kept can be read;
//! * P5: a cache trims only what was acknowledged;
//! * P6: what was not durable is cut, what was is not, and nothing is written after a failed write
//!   or sync.
//!
//! `SIM_SEED=n` replays one seed; `SIM_SEEDS=n` runs more of them.

mod exhaustive;
mod rot;

pub use exhaustive::EVERY_OPERATION;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use srn_core::epoch::Position;
use srn_core::extent::Extent;
use srn_core::ids::{DiskNo, EpochId, GroupId, Seq};
use srn_core::state::Content;
use srn_core::time::{Mono, Now, WallTime};
use srn_store::StoreError;
use srn_store::codec::Codecs;
use srn_store::group::{
    Appender, Change, Group, NewGroup, Opened, Options, Retention, Shared, Worked,
};
use srn_store::io::{BufPool, Fs};
use srn_store::manifest::{Keep, Role};

use crate::oracle::{self, History, Model, Write, contents};
use crate::seeds::{Coverage, Simulation};
use crate::{Chance, Fault, SimDisk};

const DISKS: u32 = 2;
const SECTORS: u64 = 320;

/// When every world begins.
const EPOCH: WallTime = WallTime(1_700_000_000_000_000);

struct World {
    chance: Chance,
    disk: SimDisk,
    group: Arc<Group>,
    main: Option<Appender>,
    clones: BTreeMap<EpochId, (Appender, Model)>,
    keep: Keep,
    options: Options,
    /// Every write in order; `answered` of them were answered.
    writes: History,
    answered: usize,
    /// For the head after each answered commit: how many writes it holds.
    known: BTreeMap<Seq, usize>,
    /// What has to stay readable. It only ever shrinks.
    retention: Retention,
    /// Whether the line was ever left at a position of the past.
    left: bool,
    /// What the peer is said to hold.
    acked: Seq,
    clock: u64,
    /// How far the wall clock has stepped.
    stepped: i64,
    /// Whether faults happen by chance.
    faults: bool,
    next_id: u64,
    coverage: Coverage,
    /// Memory that outlives a restart, to be quick.
    pool: BufPool,
    codecs: Codecs,
}

/// Bytes of a disk that is not short of space.
const ROOM: u64 = 64 << 20;

impl World {
    fn new(seed: u64) -> Self {
        let mut chance = Chance::new(seed);
        let keep = if chance.percent(70) { Keep::Replica } else { Keep::Cache };
        let options = Options {
            segment_bytes: 416 * 1024,
            cap_bytes: if keep == Keep::Cache && chance.percent(50) {
                416 * 1024 * chance.between(3, 6)
            } else {
                u64::MAX
            },
            fill: chance.percent(10),
            table_entries_max: chance.between(4, 60) as usize,
            unsealed_max: chance.between(1, 4) as usize,
            layer_fan: chance.between(2, 8) as usize,
            // From a page or two at once to all of it.
            slice_bytes: chance.between(4, 256) * 1024,
            slice_entries: chance.between(1, 40) as usize,
        };
        let disk = SimDisk::new(seed, ROOM);
        let new = NewGroup {
            group: GroupId([1; 16]),
            name: "sim".into(),
            role: Role::Primary,
            keep,
            epoch: EpochId([1; 16]),
            now: Now { mono: Mono(0), wall: EPOCH },
        };
        let pool = BufPool::new(8 << 20);
        let shared = oracle::shared_with(&disk, seed, &pool);
        let opened = Group::create(&shared, options, Path::new("/g"), &new).expect("create");
        let Opened { group, main, .. } = opened;
        let mut world = Self {
            chance,
            disk,
            group,
            main: Some(main),
            clones: BTreeMap::new(),
            keep,
            options,
            writes: History::new(DISKS, SECTORS),
            answered: 0,
            known: BTreeMap::from([(Seq(0), 0)]),
            retention: Retention::from(Seq(0)),
            left: false,
            acked: Seq(0),
            clock: 0,
            stepped: 0,
            faults: true,
            next_id: 2,
            coverage: Coverage::new(),
            pool,
            codecs: Codecs::new(),
        };
        world.commit(|_| (0..DISKS).map(|no| Write::add_disk(no, SECTORS)).collect());
        world
    }

    #[expect(clippy::print_stdout, reason = "a trace is asked for")]
    fn saw(&mut self, what: &'static str) {
        if std::env::var_os("SIM_TRACE").is_some() {
            println!(
                "{what}: head {} of {} answered {}",
                self.group.head(),
                self.writes.len(),
                self.answered
            );
        }
        *self.coverage.entry(what).or_default() += 1;
    }

    fn new_epoch(&mut self) -> EpochId {
        self.next_id += 1;
        let mut id = [0; 16];
        id[..8].copy_from_slice(&self.next_id.to_le_bytes());
        EpochId(id)
    }

    fn now(&self) -> Now {
        let wall = WallTime(EPOCH.0 + self.clock as i64 + self.stepped);
        Now { mono: Mono(self.clock), wall }
    }

    fn shared(&mut self) -> Shared {
        let seed = self.chance.any();
        oracle::shared_with(&self.disk, seed, &self.pool)
    }

    /// Appends; whatever was answered has to stay.
    fn commit(&mut self, make: impl FnOnce(&mut Chance) -> Vec<Write>) {
        let writes = make(&mut self.chance);
        let changes: Vec<Change> = writes.iter().map(Write::change).collect();
        self.clock += 1000;
        let now = self.now();
        let Some(main) = &mut self.main else { return };
        self.writes.truncate(self.answered);
        self.writes.extend(writes);
        match main.commit(&changes, now) {
            Ok(done) => {
                self.answered += done.changes;
                self.writes.truncate(self.answered);
                self.known.insert(done.head.seq, self.answered);
                self.saw("commit");
                if done.full.is_some() {
                    self.saw("log full in the middle of a commit");
                }
            }
            Err(StoreError::Full(_)) => {
                self.writes.truncate(self.answered);
                self.saw("log full");
            }
            Err(error) => self.fail("failed commit", &error),
        }
    }

    fn maintain(&mut self) {
        if self.chance.percent(50) {
            self.give_up_history();
        }
        for _ in 0..self.chance.between(1, 12) {
            match self.group.maintain(&self.retention) {
                Ok(Worked::Something) => {
                    self.saw("maintenance");
                    if self.group.layer_bytes() > 0 {
                        self.saw("layers");
                    }
                    if self.is_retiring() {
                        self.saw("slice of a retirement");
                    }
                }
                Ok(Worked::Nothing) => break,
                Err(StoreError::Full(_)) => {
                    self.saw("no room for the next segment");
                    break;
                }
                Err(error) => return self.fail("failed maintenance", &error),
            }
        }
        if self.keep == Keep::Cache {
            let (oldest, acked) = (self.group.oldest(), self.acked);
            assert!(oldest <= acked.next(), "{oldest} is the oldest, {acked} is acknowledged");
        }
    }

    /// Whether a piece of history is half in the base.
    fn is_retiring(&self) -> bool {
        let names = self.disk.list(Path::new("/g/base")).unwrap_or_default();
        names.iter().any(|name| name == "retire.intent")
    }

    /// What a server writes, and now and then a mirror that is interrupted or whole again.
    fn some_writes(&mut self) -> Vec<Write> {
        let mut writes = Write::some(&mut self.chance, DISKS, SECTORS);
        if self.chance.percent(6) {
            let disk = self.chance.below(u64::from(DISKS)) as u32;
            let stands = self.writes.stands(self.answered);
            let content = match stands.get(disk as usize) {
                Some(Content::Clean) => Content::Resync,
                _ => Content::Clean,
            };
            writes.push(Write::Content { disk, content });
        }
        writes
    }

    /// An operation has failed: by a fault that was injected, and never for another reason.
    fn fail(&mut self, what: &'static str, error: &StoreError) {
        let injected = matches!(error, StoreError::Io { .. } | StoreError::Stopped(_));
        assert!(injected || self.disk.is_off(), "{what}: {error}");
        self.crash(what);
    }

    /// The window begins later, of what was in it some points stay, and of the older ones some go.
    fn give_up_history(&mut self) {
        let known: Vec<Seq> = self.known.keys().copied().collect();
        let keep_from = (*self.chance.pick(&known)).max(self.retention.keep_from);
        let left =
            known.iter().filter(|seq| (self.retention.keep_from..keep_from).contains(seq)).copied();
        let all: Vec<Seq> = self.retention.points.iter().copied().chain(left).collect();
        let kept = self.chance.between(30, 100);
        let points = all.into_iter().filter(|_| self.chance.percent(kept)).collect();
        self.retention = Retention { keep_from, points };
    }

    /// Whether a position has to be readable.
    fn is_promised(&self, seq: Seq) -> bool {
        seq >= self.retention.keep_from || self.retention.points.contains(&seq)
    }

    /// The disk fails or loses power: start again, and see what is left.
    fn crash(&mut self, why: &'static str) {
        self.saw(why);
        self.main = None;
        let clones = std::mem::take(&mut self.clones);
        let models: BTreeMap<EpochId, Model> =
            clones.into_iter().map(|(id, (_, model))| (id, model)).collect();
        assert_eq!(self.disk.went_on(), 0, "something was written after a failed write or sync");
        self.disk.no_fault();
        self.disk.set_capacity(ROOM);
        let power = self.disk.is_off() || self.chance.percent(50);
        self.disk = if power {
            self.saw("power cut");
            self.disk.power_cycle()
        } else {
            self.saw("process restart");
            self.disk.process_restart()
        };
        for attempt in 0.. {
            // Opening may be cut too, a few times.
            if self.faults && attempt < 3 && self.chance.percent(40) {
                let operations = self.chance.between(1, 30);
                let fault = if self.chance.percent(70) { Fault::PowerCut } else { Fault::Error };
                self.disk.fault_in(operations, fault);
            }
            let opened = self.open();
            // A cut in something that does not matter is not reported, but it is a cut.
            let cut = || StoreError::Stopped("the power went off".into());
            let opened = if self.disk.is_off() { opened.and_then(|_| Err(cut())) } else { opened };
            match opened {
                Ok(opened) => {
                    self.disk.no_fault();
                    if opened.rewritten > 0 {
                        self.saw("unproven frames written again");
                    }
                    if self.is_retiring() {
                        self.saw("restart between slices of a retirement");
                    }
                    self.group = opened.group;
                    self.main = Some(opened.main);
                    self.check_survivors();
                    for (id, appender) in opened.clones {
                        if let Some(model) = models.get(&id) {
                            self.saw("clone survived a crash");
                            self.clones.insert(id, (appender, model.clone()));
                        }
                    }
                    self.check_clones();
                    return;
                }
                Err(error) => {
                    assert!(attempt < 4, "cannot be opened any more: {error}");
                    let injected = matches!(error, StoreError::Io { .. } | StoreError::Stopped(_));
                    assert!(injected || self.disk.is_off(), "opening: {error}");
                    assert_eq!(self.disk.went_on(), 0, "written after a failed write or sync");
                    self.saw("crash while opening");
                    self.disk.no_fault();
                    self.disk = if self.disk.is_off() || self.chance.percent(50) {
                        self.disk.power_cycle()
                    } else {
                        self.disk.process_restart()
                    };
                }
            }
        }
    }

    fn open(&mut self) -> srn_store::Result<Opened> {
        self.clock += 1_000_000;
        let shared = self.shared();
        Group::open(&shared, self.options, Path::new("/g"), self.now())
    }

    /// P1 and P2 at the head after a restart.
    fn check_survivors(&mut self) {
        let head = self.group.head();
        let last_answered = self.known.last_key_value().map_or(Seq(0), |(seq, _)| *seq);
        assert!(
            head.seq >= last_answered,
            "answered frames up to {last_answered} are gone, the head is {}",
            head.seq
        );
        let Some(count) = self.survivors_in_log() else {
            panic!("what is in the log is not what was written, in order");
        };
        if self.keep == Keep::Replica {
            let view = self.group.view_head().expect("view");
            let found = contents(&view, DISKS, SECTORS).expect("reading the head");
            self.writes.check(count, &found, format_args!("the head, frame {}", head.seq));
        }
        if count > self.answered {
            self.saw("unanswered writes survived");
        } else if self.writes.len() > self.answered {
            self.saw("unanswered writes were cut");
        }
        self.writes.truncate(count);
        self.answered = count;
        self.known.insert(head.seq, count);
        self.check_clean();
    }

    /// Whether the head is one point in time of all disks is known, and when it is not, the newest
    /// position that was one can be read.
    fn check_clean(&mut self) {
        let catalog = self.group.catalog();
        assert_eq!(catalog.is_clean(), self.writes.is_clean(self.answered), "clean at the head");
        if catalog.is_clean() || self.keep == Keep::Cache {
            return;
        }
        if let Some(clean) = catalog.last_clean {
            self.saw("in the middle of a resync");
            match self.group.view_at(clean.seq) {
                Ok(view) => assert!(view.catalog().is_clean(), "the last clean position is clean"),
                Err(_) if self.disk.is_off() => {}
                // A position in the middle of a resync was kept without that, and gone back to.
                Err(StoreError::NotInHistory(_)) if self.left && !self.is_promised(clean.seq) => {}
                Err(error) => panic!("the last clean position, {}: {error}", clean.seq),
            }
        }
    }

    /// How many writes the log holds to its end, by reading its frames: all there are of a cache,
    /// else those behind the last known commit.
    fn survivors_in_log(&mut self) -> Option<usize> {
        let before = self.group.oldest().prev();
        // The boundary of a trimmed log lies at a segment, which need not be one of our commits:
        // count what is in frames that we know to be behind it.
        let (start, mut count) = match self.keep {
            Keep::Cache => self.known.range(before..).next(),
            Keep::Replica => self.known.last_key_value(),
        }
        .map(|(seq, count)| (*seq, *count))?;
        let mut cursor = self.group.cursor(start.next());
        while let Some(frame) = cursor.next().expect("reading the log") {
            for write in Write::of_frame(&frame, &mut self.codecs) {
                if self.writes.get(count) != Some(&write) {
                    return None;
                }
                count += 1;
            }
        }
        Some(count)
    }

    fn check_clones(&self) {
        self.clones.keys().for_each(|id| self.check_clone(*id));
    }

    fn check_clone(&self, id: EpochId) {
        let Some((appender, model)) = self.clones.get(&id) else { return };
        let view = appender.group().view_head_of(id).expect("view of a clone");
        let found = contents(&view, DISKS, SECTORS).expect("reading a clone");
        assert!(found == *model, "clone {id} is not what was written to it");
    }

    /// P2 at some position that was the head once.
    fn check_point(&mut self) {
        if self.keep == Keep::Cache {
            return self.check_log();
        }
        let points: Vec<(Seq, usize)> = self.known.iter().map(|(seq, n)| (*seq, *n)).collect();
        let (seq, count) = *self.chance.pick(&points);
        match self.group.view_at(seq) {
            Ok(view) => {
                self.saw("older position read");
                if self.group.window_start().is_some_and(|start| seq < start.seq) {
                    self.saw("kept point read from layers");
                }
                let found = contents(&view, DISKS, SECTORS).expect("reading an older position");
                self.writes.check(count, &found, format_args!("frame {seq}"));
                if count > 0 {
                    let clean = view.catalog().is_clean();
                    assert_eq!(clean, self.writes.is_clean(count), "clean at frame {seq}");
                }
                let disk = DiskNo(self.chance.below(u64::from(DISKS)) as u32);
                self.check_spans(&view, disk, count);
            }
            Err(StoreError::NotInHistory(why)) => {
                assert!(!self.is_promised(seq), "frame {seq} was to be kept: {why}");
                self.saw("position no longer kept");
            }
            Err(StoreError::Io { .. }) if self.disk.is_off() => {}
            Err(error) => panic!("frame {seq} cannot be read: {error}"),
        }
    }

    /// What is said to be zero is zero, and the answer covers what was asked for.
    fn check_spans(&mut self, view: &srn_store::group::View, disk: DiskNo, count: usize) {
        let start = self.chance.below(SECTORS);
        let extent = Extent::new(start, self.chance.between(1, SECTORS - start));
        let model = self.writes.model(count);
        let mut at = extent.start;
        for (part, kind) in view.spans(disk, extent).expect("spans") {
            assert_eq!(part.start, at, "spans follow each other");
            at = part.end();
            if kind != srn_store::group::SpanKind::Data {
                assert!(model.is_zero(disk, part), "{part} is said to be {kind:?}");
            }
        }
        assert!(at > extent.start && at <= extent.end());
    }

    /// The log can be read from any frame on, and is what was written.
    fn check_log(&mut self) {
        let known: Vec<(Seq, usize)> = self.known.iter().map(|(seq, n)| (*seq, *n)).collect();
        let (seq, count) = *self.chance.pick(&known);
        if seq.next() < self.group.oldest() {
            self.saw("log no longer kept");
            return;
        }
        let mut count = count;
        let mut cursor = self.group.cursor(seq.next());
        let mut log_time = srn_core::time::LogTime(0);
        loop {
            match cursor.next() {
                Ok(Some(frame)) => {
                    assert!(frame.header().log_time >= log_time, "log time goes back");
                    log_time = frame.header().log_time;
                    for write in Write::of_frame(&frame, &mut self.codecs) {
                        assert_eq!(self.writes.get(count), Some(&write), "in frame order");
                        count += 1;
                    }
                }
                Ok(None) => break,
                Err(_) if self.disk.is_off() => return,
                Err(error) => panic!("the log cannot be read: {error}"),
            }
        }
        assert_eq!(count, self.answered);
        self.saw("log read");
    }

    fn make_clone(&mut self) {
        if self.keep == Keep::Cache || self.clones.len() > 2 {
            return;
        }
        let points: Vec<(Seq, usize)> = self.known.iter().map(|(seq, n)| (*seq, *n)).collect();
        let (seq, count) = *self.chance.pick(&points);
        if let Some(main) = &mut self.main {
            main.close_segment();
        }
        let id = self.new_epoch();
        self.clock += 1000;
        match self.group.clone_at(id, seq, self.now()) {
            Ok(appender) => {
                self.saw("clone made");
                let model = self.writes.model(count);
                self.clones.insert(id, (appender, model));
                self.check_clones();
            }
            Err(StoreError::NotInHistory(_)) => self.saw("clone of a position no longer kept"),
            Err(StoreError::Full(_)) => {}
            Err(error) => self.fail("failed clone", &error),
        }
    }

    fn write_to_clone(&mut self) {
        let ids: Vec<EpochId> = self.clones.keys().copied().collect();
        if ids.is_empty() {
            return;
        }
        let id = *self.chance.pick(&ids);
        if self.chance.percent(15) {
            if let Some((appender, _)) = self.clones.remove(&id) {
                drop(appender);
                match self.group.discard(id) {
                    Ok(()) => self.saw("clone discarded"),
                    Err(StoreError::Full(_)) => {}
                    Err(error) => self.fail("failed discard", &error),
                }
            }
            return;
        }
        let writes = Write::some(&mut self.chance, DISKS, SECTORS);
        let changes: Vec<Change> = writes.iter().map(Write::change).collect();
        self.clock += 1000;
        let now = self.now();
        let Some((appender, model)) = self.clones.get_mut(&id) else { return };
        match appender.commit(&changes, now) {
            Ok(done) => {
                for write in &writes[..done.changes] {
                    model.apply(write);
                }
                self.saw("clone written");
                self.check_clone(id);
                let other = *self.chance.pick(&ids);
                self.check_clone(other);
            }
            Err(StoreError::Full(_)) => {}
            Err(error) => {
                // What was in flight to the clone may or may not be there: forget the clone.
                self.clones.remove(&id);
                self.fail("failed commit to a clone", &error);
            }
        }
    }

    fn fail_over(&mut self) {
        if self.keep == Keep::Cache {
            return;
        }
        let points: Vec<(Seq, usize)> = self.known.iter().map(|(seq, n)| (*seq, *n)).collect();
        let (seq, count) = if self.chance.percent(50) {
            points[points.len() - 1]
        } else {
            *self.chance.pick(&points)
        };
        if !self.clones.is_empty() || self.group.view_at(seq).is_err() {
            return;
        }
        self.main = None;
        let id = self.new_epoch();
        self.clock += 1000;
        let before = self.group.epochs();
        match self.group.fail_over(id, seq, self.now()) {
            Ok(appender) => {
                self.saw(if seq == points[points.len() - 1].0 {
                    "failover"
                } else {
                    "failover to the past"
                });
                let head = appender.head();
                self.main = Some(appender);
                self.writes.truncate(count);
                self.answered = count;
                self.known.retain(|known, _| *known <= seq);
                self.known.insert(head.seq, count);
                self.left_at(seq);
                let after = self.group.epochs();
                assert!(before.is_superseded_by(&after) || !after.contains(before.current()));
                assert_eq!(before.common_with(&after), Some(seq), "where the lines part");
                let view = self.group.view_head().expect("view");
                let found = contents(&view, DISKS, SECTORS).expect("reading after a failover");
                self.writes.check(count, &found, format_args!("a failover to frame {seq}"));
            }
            Err(_) => {
                // It happened or it did not; both are histories.
                self.disk.no_fault();
                self.disk.set_capacity(ROOM);
                let power = self.disk.is_off();
                self.disk =
                    if power { self.disk.power_cycle() } else { self.disk.process_restart() };
                let opened = self.open().expect("opening after a cut failover");
                self.group = opened.group;
                self.main = Some(opened.main);
                if self.group.epochs().contains(id) {
                    self.saw("cut failover had happened");
                    self.writes.truncate(count);
                    self.answered = count;
                    self.known.retain(|known, _| *known <= seq);
                    self.left_at(seq);
                } else {
                    self.saw("cut failover had not happened");
                }
                self.check_survivors();
            }
        }
    }

    /// The line was left at `seq`: what lay behind it is no history of this group any more.
    fn left_at(&mut self, seq: Seq) {
        self.left = true;
        self.retention.keep_from = self.retention.keep_from.min(seq);
        self.retention.points.retain(|point| *point < seq);
    }

    /// The wall clock steps, or the disk is nearly full for a while.
    fn mischief(&mut self) {
        if self.chance.percent(50) {
            self.saw("wall clock stepped");
            let day = 86_400_000_000;
            self.stepped += self.chance.below(2 * day) as i64 - day as i64;
        } else if self.faults {
            self.disk.set_capacity(self.disk.used() + self.chance.below(600 * 1024));
        }
    }

    /// The last crash, and what it left; then a bit flips.
    fn end(mut self) -> Coverage {
        self.disk.no_fault();
        self.crash("crash at the end");
        let position: Position = self.group.head();
        assert_eq!(position.epoch, self.group.epochs().current());
        if self.faults && self.chance.percent(50) {
            self.rot();
        }
        let counts = self.disk.counts();
        for (what, count) in [
            ("sector lost", counts.sectors_lost),
            ("name lost", counts.names_lost),
            ("cut in the middle", counts.cuts),
            ("failed operation", counts.errors),
            ("failed sync", counts.failed_syncs),
            ("disk full", counts.full),
        ] {
            if count > 0 {
                *self.coverage.entry(what).or_default() += count;
            }
        }
        self.coverage
    }

    fn step(&mut self) {
        if self.faults && self.chance.percent(12) {
            let operations = self.chance.between(1, 40);
            let fault = if self.chance.percent(65) { Fault::PowerCut } else { Fault::Error };
            self.disk.fault_in(operations, fault);
        }
        match self.chance.below(100) {
            0..45 => {
                let writes = self.some_writes();
                self.commit(|_| writes);
            }
            45..49 => self.commit(|_| Vec::new()),
            49 => self.mischief(),
            50..68 => self.maintain(),
            68..80 => self.check_point(),
            80..84 => self.make_clone(),
            84..90 => self.write_to_clone(),
            90..92 => self.fail_over(),
            92..96 => {
                let known: Vec<Seq> = self.known.keys().copied().collect();
                let acked = *self.chance.pick(&known);
                self.group.set_acked(acked);
                self.acked = self.acked.max(acked);
            }
            _ => self.crash("crash at rest"),
        }
        if self.disk.is_off() {
            self.crash("power was off");
        }
    }
}

fn run(seed: u64) -> Coverage {
    let mut world = World::new(seed);
    let steps = world.chance.between(30, 160);
    for _ in 0..steps {
        world.step();
    }
    world.end()
}

/// What must have happened for the run to count.
const WANTED: &[&str] = &[
    "clone discarded",
    "clone made",
    "clone survived a crash",
    "clone written",
    "crash at rest",
    "crash while opening",
    "cut failover had happened",
    "cut failover had not happened",
    "cut in the middle",
    "disk full",
    "failed commit",
    "failed maintenance",
    "failed operation",
    "failed sync",
    "failover",
    "failover to the past",
    "kept point read from layers",
    "layers",
    "log full",
    "log full in the middle of a commit",
    "log no longer kept",
    "in the middle of a resync",
    "log read",
    "maintenance",
    "name lost",
    "no room for the next segment",
    "older position read",
    "position no longer kept",
    "power cut",
    "process restart",
    "rot carried along",
    "rot found by a reader",
    "rot keeps the group closed",
    "rot stops maintenance",
    "restart between slices of a retirement",
    "sector lost",
    "slice of a retirement",
    "unanswered writes survived",
    "unanswered writes were cut",
    "unproven frames written again",
    "wall clock stepped",
];

/// This simulation.
pub const SIMULATION: Simulation = Simulation { name: "store", run, wanted: WANTED };
