//! Damage to files at rest: it is repaired or named, and never passed over in silence.

mod common;

use std::path::{Path, PathBuf};

use common::{Model, Write, contents, shared};
use srn_core::extent::Extent;
use srn_core::ids::{DiskNo, EpochId, GroupId, Seq};
use srn_core::time::{Mono, Now, WallTime};
use srn_store::StoreError;
use srn_store::group::{Change, Group, NewGroup, Opened, Options, Retention, Sums, Worked};
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
    let view = group.view_head().expect("a view");
    for number in 0..8 {
        let mut content = vec![0; 4096];
        match view.read(DiskNo(0), own(number), &mut content) {
            Ok(()) => assert!(number != 2 && content == [0x50 + number; 4096], "number {number}"),
            Err(error) => {
                assert!(number == 2 && matches!(error, StoreError::Corrupt(_)), "{error}");
            }
        }
    }
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
