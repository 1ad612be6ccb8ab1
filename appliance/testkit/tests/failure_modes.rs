//! What bit others: each test is named after the project and the report or commit that it is from,
//! and would have found it here. `appliance/docs/simulation.md` lists them with those that other
//! rooms test.

mod common;

use std::path::Path;
use std::sync::Arc;

use common::{History, Write, contents, shared};
use srn_core::epoch::{EpochTable, Position};
use srn_core::ids::{EpochId, GroupId, Seq};
use srn_core::receiver::{Answer, Receiver};
use srn_core::sender::{Here, Phase, Sender};
use srn_core::time::{Mono, Now, WallTime};
use srn_core::wire::{Accept, Offer};
use srn_store::StoreError;
use srn_store::group::{Appender, Change, Group, NewGroup, Opened, Options, Retention, Worked};
use srn_store::manifest::{Keep, Role};
use srn_testkit::{Chance, Fault, SimDisk};

const DISKS: u32 = 1;
/// Odd: neither whole pages nor whole leaves.
const SECTORS: u64 = 301;
const SEGMENT: u64 = 416 * 1024;
const ROOM: u64 = 64 << 20;

fn now(second: u64) -> Now {
    let wall = WallTime(1_000_000_000_000 + second as i64 * 1_000_000);
    Now { mono: Mono(second * 1_000_000), wall }
}

/// A group, its disk, and what it was told.
struct Store {
    disk: SimDisk,
    options: Options,
    group: Arc<Group>,
    main: Appender,
    history: History,
    /// How many writes the head after each answered commit holds.
    known: Vec<(Seq, usize)>,
    second: u64,
}

impl Store {
    fn new(seed: u64, keep: Keep, cap_bytes: u64) -> Self {
        let disk = SimDisk::new(seed, ROOM);
        let options = Options {
            segment_bytes: SEGMENT,
            cap_bytes,
            fill: false,
            // Short segments, so that there is something to seal, retire and merge.
            table_entries_max: 16,
            ..Options::default()
        };
        let new = NewGroup {
            group: GroupId([1; 16]),
            name: "web".into(),
            role: Role::Primary,
            keep,
            epoch: EpochId([2; 16]),
            now: now(0),
        };
        let made = Group::create(&shared(&disk, seed), options, Path::new("/g"), &new);
        let Opened { group, main, .. } = made.expect("a group");
        let history = History::new(DISKS, SECTORS);
        let mut store = Self { disk, options, group, main, history, known: Vec::new(), second: 1 };
        store.commit(vec![Write::add_disk(0, SECTORS)]).expect("room");
        store
    }

    /// Appends; what is not answered is forgotten.
    fn commit(&mut self, writes: Vec<Write>) -> srn_store::Result<()> {
        self.second += 1;
        let changes: Vec<Change> = writes.iter().map(Write::change).collect();
        let answered = self.history.len();
        let done = self.main.commit(&changes, now(self.second))?;
        self.history.extend(writes);
        self.history.truncate(answered + done.changes);
        self.known.push((done.head.seq, self.history.len()));
        match done.full {
            Some(why) => Err(StoreError::Full(why)),
            None => Ok(()),
        }
    }

    fn commit_some(&mut self, chance: &mut Chance) -> srn_store::Result<()> {
        self.commit(Write::some(chance, DISKS, SECTORS))
    }

    fn maintain(&self, retention: &Retention) -> srn_store::Result<()> {
        while self.group.maintain(retention)? == Worked::Something {}
        Ok(())
    }

    /// Starts again after a power cut, or as a new process.
    fn restart(mut self, power_cut: bool) -> Self {
        self.disk.no_fault();
        self.disk.set_capacity(ROOM);
        let disk = if power_cut { self.disk.power_cycle() } else { self.disk.process_restart() };
        self.second += 1;
        let shared = shared(&disk, self.second);
        let opened = Group::open(&shared, self.options, Path::new("/g"), now(self.second));
        let Opened { group, main, .. } = opened.expect("it opens");
        Self { disk, group, main, ..self }
    }

    fn check_point(&mut self, seq: Seq, count: usize) {
        let view = self.group.view_at(seq).expect("a view");
        let found = contents(&view, DISKS, SECTORS).expect("it reads");
        self.history.check(count, &found, format_args!("frame {seq}"));
    }

    /// Everything that was answered is there; something that was not may follow.
    fn check_head(&mut self, unanswered: &[Write]) {
        let view = self.group.view_head().expect("a view");
        let found = contents(&view, DISKS, SECTORS).expect("it reads");
        let answered = self.history.len();
        self.history.extend(unanswered.iter().cloned());
        let all = self.history.len();
        let fits = (answered..=all).find(|count| self.history.holds(*count, &found));
        self.history.truncate(answered);
        assert!(fits.is_some(), "the head is not the result of what was written");
    }

    /// The log has no hole from its oldest frame to its head.
    fn check_log(&self) {
        let oldest = self.group.oldest();
        let mut cursor = self.group.cursor(oldest);
        let mut next = oldest;
        while let Some(frame) = cursor.next().expect("the log reads") {
            assert_eq!(frame.header().seq, next);
            next = next.next();
        }
        assert_eq!(next, self.group.head().seq.next(), "the log has a hole");
    }
}

/// The cursor moved although the flush had failed: after the next attach there was a hole.
#[test]
fn neon_12043_cursor_past_a_failed_flush() {
    for seed in 0..40 {
        let mut chance = Chance::new(seed);
        let mut store = Store::new(seed, Keep::Replica, u64::MAX);
        store.commit_some(&mut chance).expect("room");
        store.disk.fault_in(1, Fault::Error);
        let lost = Write::some(&mut chance, DISKS, SECTORS);
        let head = store.main.head();
        store.commit(lost.clone()).expect_err("the write failed");
        assert_eq!(store.main.head(), head, "the cursor moved");
        store.commit(Vec::new()).expect_err("nothing goes on");
        let mut store = store.restart(seed % 2 == 0);
        store.check_log();
        store.check_head(&lost);
    }
}

/// An fsync persisted newer bytes of a sector for an earlier write of it.
#[test]
fn crucible_1788_two_writes_to_one_sector_between_syncs() {
    for operation in 1..12 {
        for seed in 0..20 {
            let mut chance = Chance::new(seed);
            let mut store = Store::new(seed, Keep::Replica, u64::MAX);
            store.disk.fault_in(operation, Fault::PowerCut);
            let mut unanswered = Vec::new();
            for _ in 0..6 {
                let content = chance.any().to_le_bytes().repeat(64);
                let write = Write::Data { disk: 0, start: 9, content: content.into() };
                if store.commit(vec![write.clone()]).is_err() {
                    unanswered.push(write);
                    break;
                }
                let keep_from = store.main.head().seq;
                if store.maintain(&Retention::from(keep_from)).is_err() {
                    break;
                }
            }
            let mut store = store.restart(true);
            store.check_head(&unanswered);
        }
    }
}

/// Two connections reset one cursor, and what lay between was never sent; a peer was answered while
/// it was still negotiating (Crucible 1513).
#[test]
fn neon_10677_two_sessions_and_one_cursor() {
    let mut store = Store::new(1, Keep::Replica, u64::MAX);
    for _ in 0..4 {
        store.commit_some(&mut Chance::new(3)).expect("room");
    }
    let (epochs, head) = (store.group.epochs(), store.group.head());
    let origin = EpochTable::new(epochs.current()).list()[0].forked_from;
    let group = GroupId([1; 16]);
    let mut sender = Sender::new(epochs.clone(), head.seq, Seq(0));
    let mut receiver = Receiver::new(group, epochs.clone(), origin);
    let mut session = |sender: &mut Sender, nonce| {
        sender.on_link_up(nonce);
        let offer = Offer {
            group,
            name: "web".parse().expect("a name"),
            nonce,
            epochs: epochs.clone(),
            head,
            oldest: Seq(1),
            has_copy: false,
            disks: Vec::new(),
        };
        match receiver.on_offer(&offer, 1 << 20) {
            Answer::Accept { position, credit } => (position, credit),
            Answer::Refuse(code) => panic!("{code:?}"),
        }
    };
    let (old, credit) = session(&mut sender, 7);
    let (new, _) = session(&mut sender, 8);
    let accept = |sender: &mut Sender, nonce, position: &Position| {
        let hash = store.group.hash_at(Seq(0)).expect("it reads");
        let position = *position;
        let accept = Accept { group, nonce, position, credit, compare: false, under: None };
        sender.on_accept(&accept, Here { hash, oldest: Seq(1), has_copy: false })
    };
    accept(&mut sender, 7, &old).expect_err("the answer belongs to another session");
    assert_eq!(sender.next_to_send(), None, "nothing is sent while nothing is agreed");
    accept(&mut sender, 8, &new).expect("the answer");
    sender.on_sent(Seq(1), 100);
    accept(&mut sender, 8, &new).expect_err("an answer counts once");
    assert!(matches!(sender.phase(), Phase::Streaming(stream) if stream.next == Seq(2)));
    receiver.on_stream(7, Seq(1)).expect_err("the stream of the old session");
    receiver.on_stream(8, Seq(1)).expect("the stream");
}

/// A fsync that failed was tried again, and the second one said that all was well.
#[test]
fn neon_9108_nothing_after_a_failed_fsync() {
    for operation in 1..60 {
        let mut chance = Chance::new(operation);
        let mut store = Store::new(operation, Keep::Replica, u64::MAX);
        store.disk.fault_in(operation, Fault::Error);
        let mut unanswered = Vec::new();
        for _ in 0..8 {
            let writes = Write::some(&mut chance, DISKS, SECTORS);
            if store.commit(writes.clone()).is_err() {
                unanswered = writes;
                break;
            }
            let _ = store.maintain(&Retention::from(store.main.head().seq));
        }
        if store.group.failure().is_some() {
            store.commit(Vec::new()).expect_err("the volume has failed");
            let _ = store.maintain(&Retention::from(Seq(0)));
        }
        assert_eq!(store.disk.went_on(), 0, "operation {operation}");
        let mut store = store.restart(false);
        store.check_head(&unanswered);
    }
}

/// A crash in the middle of compaction left a half-written layer in the place of the whole one; a
/// power cut came in the middle of clean-up.
#[test]
fn neon_rfc_027_a_crash_at_any_step_of_compaction() {
    let written = |seed| {
        let mut chance = Chance::new(seed);
        let mut store = Store::new(seed, Keep::Replica, u64::MAX);
        for _ in 0..24 {
            store.commit_some(&mut chance).expect("room");
        }
        store
    };
    let retention = |store: &Store| {
        let points = [3, 9, 14].map(|at| store.known[at].0).to_vec();
        Retention { keep_from: store.known[18].0, points }
    };
    let check = |store: &mut Store| {
        for at in [3, 9, 14, 18, 21, 24] {
            let (seq, count) = store.known[at];
            store.check_point(seq, count);
        }
    };
    let mut store = written(5);
    let before = store.disk.operations();
    let kept = retention(&store);
    store.main.close_segment();
    store.maintain(&kept).expect("work");
    let operations = store.disk.operations() - before;
    assert!(operations > 20 && store.group.layer_bytes() > 0, "nothing was compacted");
    for fault in [Fault::PowerCut, Fault::Error] {
        for operation in 1..=operations {
            let mut store = written(5);
            store.disk.fault_in(operation, fault);
            store.main.close_segment();
            let _ = store.maintain(&kept);
            let mut store = store.restart(fault == Fault::PowerCut);
            check(&mut store);
            store.maintain(&kept).expect("work");
            check(&mut store);
        }
    }
}

/// Clean-up took away what a running restore was about to read.
#[test]
fn pbs_c9756b40_a_reader_outlives_retirement() {
    let mut chance = Chance::new(4);
    let mut store = Store::new(4, Keep::Replica, u64::MAX);
    for _ in 0..12 {
        store.commit_some(&mut chance).expect("room");
    }
    let (seq, count) = store.known[5];
    let view = store.group.view_at(seq).expect("a view");
    for _ in 0..12 {
        store.commit_some(&mut chance).expect("room");
        store.main.close_segment();
        store.maintain(&Retention::from(store.main.head().seq)).expect("work");
        let found = contents(&view, DISKS, SECTORS).expect("it reads");
        store.history.check(count, &found, "what the reader holds on to");
    }
    drop(view);
    store.maintain(&Retention::from(store.main.head().seq)).expect("work");
    let gone = store.group.view_at(seq).map(drop);
    assert!(matches!(gone, Err(StoreError::NotInHistory(_))), "and then it goes: {gone:?}");
}

/// A block of zeros was left out, and the old content of its place came back; deltas dropped what
/// had become zero (flexible-snapshot-proxy).
#[test]
fn coldsnap_395_what_became_zero_reads_as_zero() {
    let mut store = Store::new(6, Keep::Replica, u64::MAX);
    let full = vec![0x5a; (SECTORS * 512) as usize];
    let zeros = vec![0; 16 * 512];
    store.commit(vec![Write::Data { disk: 0, start: 0, content: full.into() }]).expect("room");
    store.main.close_segment();
    store.maintain(&Retention::from(store.main.head().seq)).expect("work");
    for (start, trim) in [(8, false), (83, true)] {
        store.commit(vec![Write::Zero { disk: 0, start, sectors: 70, trim }]).expect("room");
    }
    store.commit(vec![Write::Data { disk: 0, start: 200, content: zeros.into() }]).expect("room");
    store.check_head(&[]);
    store.main.close_segment();
    store.maintain(&Retention::from(store.main.head().seq)).expect("work");
    store.check_head(&[]);
    let mut store = store.restart(true);
    store.check_head(&[]);
}

/// The last part of a disk whose size is no multiple of the block's was dropped.
#[test]
fn fsp_19_the_tail_of_an_odd_sized_disk() {
    let mut store = Store::new(8, Keep::Replica, u64::MAX);
    for start in [SECTORS - 1, SECTORS - 6, SECTORS - 100] {
        let content = vec![start as u8; ((SECTORS - start) * 512) as usize];
        store.commit(vec![Write::Data { disk: 0, start, content: content.into() }]).expect("room");
        store.check_head(&[]);
        store.main.close_segment();
        store.maintain(&Retention::from(store.main.head().seq)).expect("work");
        store.check_head(&[]);
        store = store.restart(true);
        store.check_head(&[]);
    }
}

/// The target was unreachable for a week, and what was kept for it filled production's disk.
#[test]
fn zrepl_606_an_unreachable_target_does_not_fill_the_disk() {
    let cap = 5 * SEGMENT;
    let mut chance = Chance::new(9);
    let mut store = Store::new(9, Keep::Cache, cap);
    let mut full = false;
    for _ in 0..400 {
        match store.commit_some(&mut chance) {
            Ok(()) => {}
            Err(StoreError::Full(_)) => full = true,
            Err(error) => panic!("{error}"),
        }
        let _ = store.maintain(&Retention::from(Seq(0)));
        assert!(store.group.log_bytes().0 <= cap, "{:?}", store.group.log_bytes());
        assert!(store.disk.used() <= cap + (1 << 20), "{} bytes", store.disk.used());
    }
    assert!(full, "the cap was never reached");
    assert_eq!(store.group.oldest(), Seq(1), "what nobody else has is not given up");
    // The target is back, and nothing is missing.
    store.check_log();
    store.group.set_acked(store.main.head().seq);
    let _ = store.maintain(&Retention::from(Seq(0)));
    store.commit_some(&mut chance).expect("there is room again");
    assert!(store.group.oldest() > Seq(1));
}

/// The disk was full at one writer or another (log, index, layer, manifest, intent), and something
/// was missing afterwards.
#[test]
fn neon_3268_the_disk_is_full_at_each_writer() {
    let (mut full, mut whole) = (0, 0);
    for step in 0..60 {
        let mut chance = Chance::new(step);
        let mut store = Store::new(step, Keep::Replica, u64::MAX);
        store.disk.set_capacity(store.disk.used() + step * 37 * 1024);
        let before = full;
        for _ in 0..16 {
            let kept = Retention {
                keep_from: store.known[store.known.len() / 2].0,
                points: vec![store.known[store.known.len() / 4].0],
            };
            for done in [store.commit_some(&mut chance), store.maintain(&kept)] {
                match done {
                    Ok(()) => {}
                    Err(StoreError::Full(_)) => full += 1,
                    Err(error) => panic!("room for {step} steps: {error}"),
                }
            }
        }
        whole += u32::from(full == before);
        assert_eq!(store.group.failure(), None, "a full disk is no failed disk");
        store.check_head(&[]);
        let mut store = store.restart(true);
        store.check_head(&[]);
        store.check_log();
        store.commit_some(&mut chance).expect("there is room again");
        store.maintain(&Retention::from(store.main.head().seq)).expect("work");
        store.check_head(&[]);
    }
    assert!(full > 100 && whole > 0, "{full} times full, {whole} times not at all");
}
