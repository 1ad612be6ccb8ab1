//! Damage to files at rest: it is repaired or named, and never passed over in silence.

mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use common::{Model, Write, contents, shared};
use srn_core::epoch::Position;
use srn_core::extent::Extent;
use srn_core::ids::{DiskNo, EpochId, GroupId, Seq};
use srn_core::time::{Mono, Now, WallTime};
use srn_store::StoreError;
use srn_store::frame::Frame;
use srn_store::group::damage::{Damage, DamagedPart};
use srn_store::group::{
    Appender, Change, Group, Missing, NewGroup, Opened, Options, Repaired, Retention, SpanKind,
    Sums, Worked, pages_of,
};
use srn_store::io::Fs;
use srn_store::manifest::{Keep, Role};
use srn_testkit::{Chance, SimDisk};

const DISKS: u32 = 1;
const SECTORS: u64 = 512;
const SEED: u64 = 11;

fn now(second: u64) -> Now {
    let wall = WallTime(1_000_000_000_000 + second as i64 * 1_000_000);
    Now { mono: Mono(second * 1_000_000), wall }
}

fn options() -> Options {
    Options { segment_bytes: 1 << 20, cap_bytes: 8 << 20, fill: false, ..Options::default() }
}

fn dir() -> PathBuf {
    PathBuf::from("/state/group")
}

fn open(disk: &SimDisk) -> srn_store::Result<Opened> {
    Group::open(&shared(disk, SEED), options(), &dir(), now(100))
}

/// A group with some content, closed in order. Returns what its disk holds.
fn written(disk: &SimDisk) -> (Model, Seq) {
    let made = Group::create(
        &shared(disk, SEED),
        options(),
        &dir(),
        &NewGroup {
            group: GroupId([1; 16]),
            name: "web".into(),
            role: Role::Primary,
            keep: Keep::Replica,
            epoch: EpochId([2; 16]),
            now: now(1),
        },
    );
    let Opened { mut main, .. } = made.expect("a group");
    let mut chance = Chance::new(SEED);
    let mut model = Model::blank(DISKS, SECTORS);
    main.commit(&[Write::add_disk(0, SECTORS).change()], now(1)).expect("room");
    for second in 2..12 {
        let writes = Write::some(&mut chance, DISKS, SECTORS);
        let changes: Vec<_> = writes.iter().map(Write::change).collect();
        main.commit(&changes, now(second)).expect("room");
        writes.iter().for_each(|write| model.apply(write));
    }
    (model, main.head().seq)
}

fn files(disk: &SimDisk, sub: &str) -> Vec<PathBuf> {
    let dir = dir().join(sub);
    disk.list(&dir).expect("a list").into_iter().map(|name| dir.join(name)).collect()
}

fn same(opened: &Opened, model: &Model) {
    let view = opened.group.view_head().expect("a view");
    assert!(contents(&view, DISKS, SECTORS).expect("it reads") == *model, "the content differs");
}

#[test]
fn a_damaged_header_does_not_cost_the_frames_behind_it() {
    for offset in [0, 5, 100, 4090] {
        let disk = SimDisk::new(SEED, 64 << 20);
        let (model, head) = written(&disk);
        for file in files(&disk, "log") {
            disk.rot(&file, offset);
        }
        let opened = open(&disk).expect("it opens");
        assert_eq!(opened.group.head().seq, head, "frames are lost, offset {offset}");
        same(&opened, &model);
        drop(opened);
        // It was repaired for good.
        same(&open(&disk).expect("it opens again"), &model);
    }
}

#[test]
fn a_base_that_lost_its_files_is_not_read_as_zeros() {
    let disk = SimDisk::new(SEED, 64 << 20);
    let (model, _) = written(&disk);
    let opened = open(&disk).expect("it opens");
    let retention = Retention::from(Seq(u64::MAX));
    while opened.group.maintain(&retention).expect("work") == Worked::Something {}
    same(&opened, &model);
    drop(opened);
    assert_eq!(files(&disk, "base").len(), 2, "a disk and its checksums");
    for file in files(&disk, "base") {
        let named = |error: &StoreError| {
            let name = file.file_name().and_then(|name| name.to_str()).expect("a name");
            matches!(error, StoreError::Corrupt(text) if text.contains(name))
        };
        let content = read(&disk, &file);
        disk.remove(&file).expect("removed");
        let error = open(&disk).map(drop).expect_err("it is missing");
        assert!(named(&error), "{error}");
        write(&disk, &file, &content[..content.len() / 2]);
        let error = open(&disk).map(drop).expect_err("it is too short");
        assert!(named(&error), "{error}");
        disk.remove(&file).expect("removed");
        write(&disk, &file, &content);
        same(&open(&disk).expect("it is whole again"), &model);
    }
}

/// A group whose base holds its first writes, and whose next piece has the first page twice and another
/// page behind it, which is damaged: the file and the place of the damage, and the positions behind the
/// first write and the last.
struct Torn {
    group: Arc<Group>,
    main: Appender,
    file: PathBuf,
    at: u64,
    middle: Seq,
    end: Seq,
}

fn torn(disk: &SimDisk, options: Options) -> Torn {
    let torn = untorn(disk, options);
    disk.rot(&torn.file, torn.at);
    torn
}

/// The same before it is damaged.
fn untorn(disk: &SimDisk, options: Options) -> Torn {
    let _ = written(disk);
    let opened = Group::open(&shared(disk, SEED), options, &dir(), now(100));
    let Opened { group, mut main, .. } = opened.expect("it opens");
    let before = main.head().seq;
    while group.maintain(&Retention::from(before)).expect("work") == Worked::Something {}
    let middle = write_page(&mut main, 0, 0x61);
    write_page(&mut main, 0, 0x62);
    let end = write_page(&mut main, 64, 0x63);
    main.close_segment();
    let (file, at) = place_of(disk, 0x63);
    Torn { group, main, file, at, middle, end }
}

fn write_page(main: &mut Appender, start: u64, value: u8) -> Seq {
    let data: bytes::Bytes = vec![value; 4096].into();
    let sums = Sums::of(&data);
    let change = Change::Write { disk: DiskNo(0), start, data, sums };
    main.commit(&[change], now(101)).expect("room").head.seq
}

/// Where eight of these bytes lie in the log.
fn place_of(disk: &SimDisk, value: u8) -> (PathBuf, u64) {
    let place = |file: &PathBuf| read(disk, file).windows(8).position(|some| some == [value; 8]);
    let mut all = files(disk, "log").into_iter();
    all.find_map(|file| place(&file).map(|at| (file, at as u64))).expect("it is in the log")
}

/// Maintains until there is nothing to do, or as long as it goes.
fn maintained(group: &Arc<Group>, retention: &Retention) -> srn_store::Result<()> {
    while group.maintain(retention)? == Worked::Something {}
    Ok(())
}

/// A retirement that meets damage halfway has changed a part of the base. Nobody reads what is a
/// mixture, now or after a restart, the group can be opened, and the rest is finished when the damage
/// is mended.
#[test]
fn a_retirement_that_meets_damage_halfway_is_finished_later() {
    let disk = SimDisk::new(SEED, 64 << 20);
    let options = Options { slice_entries: 1, ..options() };
    let Torn { group, main, file, at, middle, end } = torn(&disk, options);
    let retention = Retention::from(Seq(u64::MAX));
    let check = |group: &Arc<Group>, when: &str| {
        let refused = maintained(group, &retention);
        assert!(matches!(refused, Err(StoreError::Corrupt(_))), "{when}: {refused:?}");
        let view = group.view_at(middle).map(drop);
        assert!(matches!(view, Err(StoreError::NotInHistory(_))), "{when}: a mixture is shown");
        assert_eq!(group.window_start().expect("a replica").seq, end, "{when}: what is shown");
        let view = group.view_at(end).expect("the end is there");
        let mut content = vec![0; 4096];
        view.read(DiskNo(0), Extent::new(0, 8), &mut content).expect("it is sound");
        assert_eq!(content, [0x62; 4096], "{when}");
    };
    check(&group, "at first");
    check(&group, "again");
    drop((group, main));
    let opened = Group::open(&shared(&disk, SEED), options, &dir(), now(100));
    let Opened { group, main, .. } = opened.expect("it opens with a half retirement");
    check(&group, "after a restart");
    // Mended: the rest is done, and the base is whole.
    disk.rot(&file, at);
    maintained(&group, &retention).expect("work");
    let mut content = vec![0; 4096];
    let view = group.view_head().expect("a view");
    view.read(DiskNo(0), Extent::new(64, 8), &mut content).expect("it is sound");
    assert_eq!(content, [0x63; 4096]);
    assert_eq!(group.window_start().expect("a replica").seq, end);
    drop(main);
}

/// The base was changed before the whole of what was to be moved had been verified.
#[test]
fn damage_is_met_before_the_base_is_touched() {
    let disk = SimDisk::new(SEED, 64 << 20);
    let Torn { group, middle, .. } = torn(&disk, options());
    let base = || files(&disk, "base").iter().map(|file| read(&disk, file)).collect::<Vec<_>>();
    let before = base();
    let refused = maintained(&group, &Retention::from(Seq(u64::MAX)));
    assert!(matches!(refused, Err(StoreError::Corrupt(_))), "{refused:?}");
    assert_eq!(base(), before, "the base, or an intent");
    let view = group.view_at(middle).expect("nothing has changed");
    let mut content = vec![0; 4096];
    view.read(DiskNo(0), Extent::new(0, 8), &mut content).expect("it is sound");
    assert_eq!(content, [0x61; 4096]);
}

/// A piece of many ragged pages was held in memory whole, and one of more than 4 GiB of them was refused
/// for ever. A step moves no more than a slice, and whoever waits for it waits for no more.
#[test]
fn a_long_piece_is_moved_in_steps_of_bounded_size() {
    let disk = SimDisk::new(SEED, 64 << 20);
    let options = Options { slice_bytes: 16 << 10, slice_entries: 16, ..options() };
    let _ = written(&disk);
    let opened = Group::open(&shared(&disk, SEED), options, &dir(), now(100));
    let Opened { group, mut main, .. } = opened.expect("it opens");
    // A sector in each page: every page is ragged.
    for page in 0..SECTORS / 8 {
        let data: bytes::Bytes = vec![page as u8 | 0x80; 512].into();
        let sums = Sums::of(&data);
        let change = Change::Write { disk: DiskNo(0), start: page * 8 + 3, data, sums };
        main.commit(&[change], now(101)).expect("room");
    }
    main.close_segment();
    let expected = contents(&group.view_head().expect("a view"), DISKS, SECTORS).expect("content");
    let retention = Retention::from(Seq(u64::MAX));
    let intent = dir().join("base/retire.intent");
    let mut slices = 0;
    while group.maintain(&retention).expect("work") == Worked::Something {
        if files(&disk, "base").contains(&intent) {
            slices += 1;
            assert!(read(&disk, &intent).len() < 32 << 10, "an intent of more than a slice");
        }
        let found = contents(&group.view_head().expect("a view"), DISKS, SECTORS);
        assert!(found.expect("content") == expected, "after slice {slices}");
    }
    assert!(slices >= SECTORS / 8 / 16, "{slices} slices");
    assert_eq!(group.window_start().expect("a replica").seq, main.head().seq);
}

fn read_at(group: &Arc<Group>, start: u64, sectors: u64) -> srn_store::Result<Vec<u8>> {
    let mut content = vec![0; sectors as usize * 512];
    let view = group.view_head().expect("a view");
    view.read(DiskNo(0), Extent::new(start, sectors), &mut content).map(|()| content)
}

/// Damage in the oldest piece kept all history from being given up for ever. When it was looked at and
/// cannot be repaired, it goes along, sector by sector: it is zero nowhere, and a copy that still has the
/// content at a position at which nothing was written there since can put it right.
#[test]
fn damage_that_cannot_be_repaired_is_carried_into_the_base() {
    let disks = [SimDisk::new(SEED, 64 << 20), SimDisk::new(SEED, 64 << 20)];
    let options = options();
    let [here, there] = [torn(&disks[0], options), untorn(&disks[1], options)];
    let sector = |main: &mut Appender, start: u64| {
        let data: bytes::Bytes = vec![0x77; 512].into();
        let sums = Sums::of(&data);
        let change = Change::Write { disk: DiskNo(0), start, data, sums };
        main.commit(&[change], now(102)).expect("room");
        main.close_segment();
    };
    let retention = Retention::from(Seq(u64::MAX));
    let mut ends = [here.main, there.main];
    let groups = [here.group, there.group];
    for end in &mut ends {
        // One sector of the first page, which is damaged too; the rest of the page is in the base.
        sector(end, 2);
    }
    let (file, at) = place_of(&disks[0], 0x77);
    disks[0].rot(&file, at);
    assert!(matches!(maintained(&groups[0], &retention), Err(StoreError::Corrupt(_))));
    assert!(groups[0].take_damage_seen(), "nobody is told to look at it");
    groups[0].carry_damage(true);
    maintained(&groups[0], &retention).expect("damage keeps nothing from being done");
    let lost = [(DiskNo(0), Extent::new(64, 8)), (DiskNo(0), Extent::new(2, 1))];
    assert_eq!(groups[0].take_carried(), lost);
    assert!(groups[0].take_damage_seen());
    maintained(&groups[1], &retention).expect("work");
    let head = ends[0].head();
    assert_eq!(ends[1].head(), head, "the two are not alike");
    assert_eq!(groups[0].window_start().expect("a replica"), head);
    drop((groups, ends));

    // A newer write in the same page as what was lost; and a restart.
    let mut opened = disks.each_ref().map(|disk| open(disk).expect("it opens"));
    for opened in &mut opened {
        sector(&mut opened.main, 70);
        maintained(&opened.group, &retention).expect("nothing new is damaged");
    }
    let [here, there] = &opened;
    for start in 0..SECTORS {
        let is_lost = start == 2 || (64..72).contains(&start) && start != 70;
        match read_at(&here.group, start, 1) {
            Ok(content) => {
                assert!(!is_lost, "sector {start} is served");
                assert_eq!(content, read_at(&there.group, start, 1).expect("it reads"), "{start}");
            }
            Err(error) => assert!(is_lost && matches!(error, StoreError::Corrupt(_)), "{error}"),
        }
    }
    // A person may do without it, and is told what it is.
    let view = here.group.view_head().expect("a view").accepting_damage();
    let found = contents(&view, DISKS, SECTORS).expect("it reads");
    let named = [Extent::new(2, 1), Extent::new(64, 6), Extent::new(71, 1)];
    assert_eq!(view.accepted_damage(), named.map(|extent| (DiskNo(0), extent)));
    assert!(found.is_zero(DiskNo(0), Extent::new(64, 6)));

    // The base of the other one has moved on; both are at its position.
    let damaged = scrubbed(here);
    assert_eq!(damaged.len(), 2, "{damaged:?}");
    for part in damaged {
        assert_eq!(repair(here, there, part), Repaired::Yes);
    }
    assert_eq!(scrubbed(here), []);
    let all = |opened: &Opened| {
        contents(&opened.group.view_head().expect("a view"), DISKS, SECTORS).expect("content")
    };
    assert!(all(here) == all(there));
}

/// Only the base's own position proved content; the peer's base is seldom there.
#[test]
fn a_page_is_repaired_from_any_position_at_which_the_base_answers() {
    let (disks, _) = twins(Seq(u64::MAX));
    let mut opened = disks.each_ref().map(|disk| open(disk).expect("it opens"));
    for opened in &mut opened {
        write_page(&mut opened.main, 16, 0x31);
        opened.main.close_segment();
    }
    let [here, there] = &opened;
    maintained(&there.group, &Retention::from(Seq(u64::MAX))).expect("work");
    let ending = |path: &PathBuf, what: &str| path.extension().is_some_and(|found| found == what);
    let sums = files(&disks[0], "base").into_iter().find(|path| ending(path, "sum"));
    // Of a page that was written since, and of one that was not.
    let sums = sums.expect("checksums");
    disks[0].rot(&sums, 2 * 8);
    disks[0].rot(&sums, 3 * 8);
    let at = there.main.head();
    let content = read_at(&there.group, 16, 16).expect("it reads");
    let done = here.group.repair_pages(DiskNo(0), 2, &content, at).expect("an attempt");
    assert_eq!(done, [Repaired::NotTheSame, Repaired::Yes]);
}

/// A damaged stretch of history is not merged and not passed over; the others are.
#[test]
fn a_damaged_stretch_of_history_is_left_alone() {
    let disk = SimDisk::new(SEED, 64 << 20);
    let options = Options { layer_fan: 2, cap_bytes: 32 << 20, ..options() };
    let (_, _) = written(&disk);
    let opened = Group::open(&shared(&disk, SEED), options, &dir(), now(100)).expect("it opens");
    let Opened { group, mut main, .. } = opened;
    let before = main.head().seq;
    let own = |number: u8| Extent::new(100 + 8 * u64::from(number), 8);
    for number in 0..8 {
        // The first is written again by all that follow, the second is each one's own.
        let changes = [Extent::new(0, 8), own(number)].map(|extent| {
            let data: bytes::Bytes = vec![0x50 + number; 4096].into();
            let sums = Sums::of(&data);
            Change::Write { disk: DiskNo(0), start: extent.start, data, sums }
        });
        main.commit(&changes, now(101)).expect("room");
        main.close_segment();
    }
    let head = main.head().seq;
    let third = files(&disk, "log").into_iter().find(|file| read(&disk, file)[12288] == 0x52);
    disk.rot(&third.expect("the third segment"), 12288 + 5);
    let retention = Retention { keep_from: head, points: vec![before] };
    while group.maintain(&retention).expect("damage keeps nothing from being done")
        == Worked::Something
    {}
    assert_eq!(group.debt(&retention).damaged, 2, "the pair that it is in");
    assert!(!files(&disk, "layer").is_empty(), "the other pairs are merged");
    let check = |group: &Arc<Group>| {
        for number in 0..8 {
            match read_at(group, own(number).start, 8) {
                Ok(content) => assert!(number != 2 && content == [0x50 + number; 4096], "{number}"),
                Err(error) => {
                    assert!(number == 2 && matches!(error, StoreError::Corrupt(_)), "{error}");
                }
            }
        }
    };
    check(&group);
    // When it was looked at in vain it goes along, with the checksum of what was there: so it can be
    // repaired from anywhere.
    assert!(group.take_damage_seen());
    group.carry_damage(true);
    maintained(&group, &retention).expect("work");
    assert_eq!(group.debt(&retention).damaged, 0);
    assert_eq!(group.take_carried(), [(DiskNo(0), own(2))]);
    check(&group);
    let opened = Opened { group, main, clones: Vec::new(), rewritten: 0 };
    let found = scrubbed(&opened);
    let &[DamagedPart::Layer { file, disk, extent }] = &found[..] else { panic!("{found:?}") };
    assert_eq!(extent, own(2));
    let mended = opened.group.repair_block(file, disk, extent, &[0x52; 4096]);
    assert_eq!(mended.expect("a repair"), Repaired::Yes);
    assert_eq!(scrubbed(&opened), []);
    assert_eq!(read_at(&opened.group, own(2).start, 8).expect("it reads"), [0x52; 4096]);
}

fn read(disk: &SimDisk, path: &Path) -> Vec<u8> {
    let file = disk.open(path, srn_store::io::Access::Buffered).expect("a file");
    let mut bytes = vec![0; file.size().expect("a size") as usize];
    file.read_at(&mut bytes, 0).expect("it reads");
    bytes
}

fn write(disk: &SimDisk, path: &Path, bytes: &[u8]) {
    let file = disk.create(path, srn_store::io::Access::Buffered).expect("a file");
    file.set_len(bytes.len() as u64).expect("room");
    file.write_at(&[std::io::IoSlice::new(bytes)], 0, true).expect("room");
    disk.sync_dir(path.parent().expect("a directory")).expect("a sync");
}

/// What a scrub finds.
fn scrubbed(opened: &Opened) -> Vec<DamagedPart> {
    let mut scrub = opened.group.scrub().expect("a scrub");
    let (mut found, mut bytes) = (Vec::new(), 0);
    while let Some(step) = scrub.step().expect("it goes on") {
        found.extend(step.damaged);
        bytes += step.bytes;
    }
    assert_eq!(bytes, scrub.total(), "it has not looked at everything");
    found
}

/// Two nodes that hold the same, opened; `keep_from` says what is in the log and what in the base.
fn twins(keep_from: Seq) -> ([SimDisk; 2], Model) {
    let disks = [SimDisk::new(SEED, 64 << 20), SimDisk::new(SEED, 64 << 20)];
    let mut model = Model::blank(DISKS, SECTORS);
    for disk in &disks {
        model = written(disk).0;
        let opened = open(disk).expect("it opens");
        while opened.group.maintain(&Retention::from(keep_from)).expect("work") == Worked::Something
        {
        }
        assert_eq!(scrubbed(&opened), [], "what is whole is found whole");
    }
    (disks, model)
}

/// Repairs what was found from the other one, as two nodes do.
fn repair(here: &Opened, there: &Opened, part: DamagedPart) -> Repaired {
    match part {
        DamagedPart::Base { disk, extent } => {
            let at = there.group.base_position().expect("a base");
            let view = there.group.view_at(at.seq).expect("a view");
            for page in pages_of(extent) {
                let mut content = vec![0; 4096];
                let extent = Extent::new(page * 8, 8);
                view.read(disk, extent, &mut content).expect("it reads");
                let forged = vec![0xee; 4096];
                let elsewhere = Position { seq: Seq(at.seq.0 + 1), ..at };
                let refused = here.group.repair_pages(disk, page, &forged, elsewhere);
                assert_eq!(refused.expect("an attempt"), [Repaired::NotTheSame]);
                let done = here.group.repair_pages(disk, page, &content, at).expect("a repair");
                assert_eq!(done, [Repaired::Yes]);
            }
            Repaired::Yes
        }
        DamagedPart::Frames { epoch, first, last } => {
            let missing = here.group.missing_frames(epoch, first, last).expect("it is read");
            let Missing::Frames(missing) = missing else { panic!("{missing:?}") };
            let frames = missing.into_iter().map(|seq| {
                let frame = there.group.cursor(seq).next().expect("it reads").expect("a frame");
                let bytes = bytes::Bytes::from(frame.to_wire());
                (seq, Arc::new(Frame::from_wire(&bytes).expect("sound")))
            });
            let frames: BTreeMap<_, _> = frames.collect();
            let refused = here.group.repair_segment(epoch, first, &BTreeMap::new());
            assert_eq!(refused.expect("an attempt"), Repaired::NotTheSame);
            here.group.repair_segment(epoch, first, &frames).expect("a repair")
        }
        DamagedPart::Index { file } => here.group.repair_index(file).expect("a repair"),
        DamagedPart::Layer { file, disk, extent } => {
            let block = here.group.damaged_block(file, disk, extent).expect("an index");
            let Some(block) = block else { return Repaired::NotNeeded };
            let forged = vec![0xee; block.whole.bytes() as usize];
            let refused = here.group.repair_block(file, disk, extent, &forged);
            assert_eq!(refused.expect("an attempt"), Repaired::NotTheSame);
            for at in block.places {
                let Ok(view) = there.group.view_at(at.seq) else { continue };
                let mut content = vec![0; block.whole.bytes() as usize];
                view.read(disk, block.whole, &mut content).expect("it reads");
                let done = here.group.repair_block(file, disk, extent, &content).expect("a repair");
                if done == Repaired::Yes {
                    return done;
                }
            }
            Repaired::NotTheSame
        }
    }
}

/// Opened, with nothing in a segment that is still written to: that cannot be repaired yet.
fn settled(disk: &SimDisk, keep_from: Seq) -> Opened {
    let mut opened = open(disk).expect("it opens");
    opened.main.close_segment();
    let retention = Retention::from(keep_from);
    while opened.group.maintain(&retention).expect("work") == Worked::Something {}
    opened
}

/// Damages each file of a directory at this offset, and sees it found, repaired, and whole after a
/// restart.
fn found_and_repaired(keep_from: Seq, sub: &str, ending: &str, offsets: &[u64]) {
    for offset in offsets {
        let (disks, model) = twins(keep_from);
        let there = settled(&disks[1], keep_from);
        let opened = settled(&disks[0], keep_from);
        let all = files(&disks[0], sub).into_iter();
        let listed: Vec<PathBuf> = all
            .filter(|path| path.extension().is_some_and(|found| found == ending))
            .filter(|path| {
                let file = disks[0].open(path, srn_store::io::Access::Buffered).expect("a file");
                file.size().expect("a size") > *offset
            })
            .collect();
        let mut damaged = 0;
        for path in listed {
            disks[0].rot(&path, *offset);
            let found = scrubbed(&opened);
            damaged += found.len();
            for part in found {
                assert_eq!(repair(&opened, &there, part), Repaired::Yes, "{path:?} at {offset}");
            }
            assert_eq!(scrubbed(&opened), [], "{path:?} at {offset}");
            same(&opened, &model);
            // What is merged or retired later is merged and retired from what was repaired.
            while opened.group.maintain(&Retention::from(keep_from)).expect("work")
                == Worked::Something
            {}
            same(&opened, &model);
        }
        assert!(damaged > 0, "nothing was damaged at {offset} of {sub}");
        drop(opened);
        let again = open(&disks[0]).expect("it opens again");
        same(&again, &model);
        assert_eq!(scrubbed(&again), []);
        assert_eq!(again.group.head(), there.group.head());
    }
}

#[test]
fn a_damaged_page_of_the_base_is_found_and_repaired() {
    found_and_repaired(Seq(u64::MAX), "base", "raw", &[0, 5000, 70_000]);
}

#[test]
fn a_damaged_checksum_of_the_base_is_found_and_repaired() {
    found_and_repaired(Seq(u64::MAX), "base", "sum", &[0, 9, 160]);
}

#[test]
fn damaged_frames_are_found_and_repaired() {
    // The envelope, the head, and content of one of the first frames.
    found_and_repaired(Seq::ZERO, "log", "seg", &[4100, 4200, 8192, 12_300]);
}

/// Of which the hash of the whole was written and never looked at.
#[test]
fn a_damaged_index_is_found_and_made_again() {
    found_and_repaired(Seq::ZERO, "index", "idx", &[100, 4096 + 30, 4095]);
}

/// A checksum of zero says that a page is a hole. Zeroed checksums must not make zeros of content.
#[test]
fn a_zeroed_checksum_file_is_no_empty_disk() {
    let (disks, model) = twins(Seq(u64::MAX));
    let opened = open(&disks[0]).expect("it opens");
    let there = open(&disks[1]).expect("it opens");
    let all = files(&disks[0], "base").into_iter();
    let sums = all.filter(|path| path.extension().is_some_and(|found| found == "sum"));
    for path in sums {
        let len = read(&disks[0], &path).len();
        let file = disks[0].open(&path, srn_store::io::Access::Buffered).expect("a file");
        file.write_at(&[std::io::IoSlice::new(&vec![0; len])], 0, true).expect("room");
    }
    let view = opened.group.view_head().expect("a view");
    let error = contents(&view, DISKS, SECTORS).expect_err("zeros are served for content");
    assert!(matches!(error, StoreError::Corrupt(_)), "{error}");
    // Who asks only where there is content learns the same.
    let spans = view.spans(DiskNo(0), Extent::new(0, SECTORS)).expect("spans");
    for (extent, kind) in spans {
        assert!(kind == SpanKind::Data || model.is_zero(DiskNo(0), extent), "{extent:?} {kind:?}");
    }
    assert!(opened.group.take_damage_seen() && !opened.group.take_damage_seen());
    for part in scrubbed(&opened) {
        assert_eq!(repair(&opened, &there, part), Repaired::Yes);
    }
    same(&opened, &model);
}

#[test]
fn damage_that_a_person_accepts_reads_as_zero_and_is_named() {
    let (disks, model) = twins(Seq(u64::MAX));
    let opened = open(&disks[0]).expect("it opens");
    let raw = files(&disks[0], "base")
        .into_iter()
        .find(|path| path.extension().is_some_and(|found| found == "raw"));
    let raw = raw.expect("a base");
    disks[0].rot(&raw, 4096 * 3 + 17);
    let view = opened.group.view_head().expect("a view");
    assert!(contents(&view, DISKS, SECTORS).is_err(), "damage is served");
    let view = view.accepting_damage();
    let found = contents(&view, DISKS, SECTORS).expect("it reads");
    let lost = Extent::new(24, 8);
    assert_eq!(view.accepted_damage(), [(DiskNo(0), lost)]);
    assert!(found.is_zero(DiskNo(0), lost));
    let mut expected = model;
    expected.apply(&Write::Zero { disk: 0, start: 24, sectors: 8, trim: false });
    assert!(found == expected, "more than the damage differs");
}

#[test]
fn what_is_known_to_be_damaged_survives_a_restart() {
    let (disks, _) = twins(Seq::ZERO);
    let opened = open(&disks[0]).expect("it opens");
    let damage = Damage {
        part: DamagedPart::Base { disk: DiskNo(0), extent: Extent::new(8, 8) },
        since: WallTime(7),
    };
    assert_eq!(opened.group.damage().expect("it reads"), []);
    opened.group.set_damage(&[damage]).expect("room");
    drop(opened);
    let opened = open(&disks[0]).expect("it opens");
    assert_eq!(opened.group.damage().expect("it reads"), [damage]);
}

/// Two nodes with the same layers.
fn with_layers() -> ([SimDisk; 2], [Opened; 2]) {
    let disks = [SimDisk::new(SEED, 256 << 20), SimDisk::new(SEED, 256 << 20)];
    let roomy = Options { cap_bytes: 128 << 20, ..options() };
    let opened = disks.each_ref().map(|disk| {
        let _ = written(disk);
        let mut opened = Group::open(&shared(disk, SEED), roomy, &dir(), now(100)).expect("opens");
        let mut chance = Chance::new(SEED + 1);
        for second in 101..200 {
            let writes = Write::some(&mut chance, DISKS, SECTORS);
            let changes: Vec<_> = writes.iter().map(Write::change).collect();
            opened.main.commit(&changes, now(second)).expect("room");
            maintained(&opened.group, &Retention::from(Seq::ZERO)).expect("work");
        }
        opened.main.close_segment();
        let retention = Retention { keep_from: Seq(u64::MAX), points: vec![Seq(5)] };
        maintained(&opened.group, &retention).expect("work");
        opened
    });
    (disks, opened)
}

/// Damage of layers was found and could not be repaired: a block is the same wherever it is from, when it
/// has the checksum in the layer's index.
#[test]
fn damaged_content_of_a_layer_is_found_and_repaired() {
    let (disks, [here, there]) = with_layers();
    assert_eq!(there.main.head(), here.main.head(), "the two are not alike");
    let layers: Vec<PathBuf> = files(&disks[0], "layer");
    assert!(!layers.is_empty(), "there is no layer");
    assert_eq!(scrubbed(&here), []);
    for path in &layers {
        for offset in [4096 + 100, 9000, 40_000] {
            if offset < read(&disks[0], path).len() as u64 {
                disks[0].rot(path, offset);
            }
        }
    }
    let found = scrubbed(&here);
    assert!(!found.is_empty(), "nothing was found");
    assert!(found.iter().all(|part| matches!(part, DamagedPart::Layer { .. })), "{found:?}");
    for part in found {
        let done = repair(&here, &there, part);
        assert!(matches!(done, Repaired::Yes | Repaired::NotNeeded), "{part:?}: {done:?}");
    }
    let same = |here: &Opened| {
        assert_eq!(scrubbed(here), []);
        let all = |opened: &Opened| {
            contents(&opened.group.view_head().expect("a view"), DISKS, SECTORS).expect("content")
        };
        assert!(all(here) == all(&there), "the content differs");
    };
    same(&here);
    drop(here);
    let roomy = Options { cap_bytes: 128 << 20, ..options() };
    let opened = Group::open(&shared(&disks[0], SEED), roomy, &dir(), now(300));
    let opened = opened.expect("it opens");
    same(&opened);
    // And what is given up later is whole.
    maintained(&opened.group, &Retention::from(Seq(u64::MAX))).expect("work");
    same(&opened);
}
