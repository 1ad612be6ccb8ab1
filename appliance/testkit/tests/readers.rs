//! Readers beside maintenance, in threads of their own: what they read is right, or no longer kept.

mod common;

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use common::{Model, Write, contents, shared};
use srn_core::ids::{EpochId, GroupId, Seq};
use srn_core::time::{Mono, Now, WallTime};
use srn_store::StoreError;
use srn_store::group::{Group, NewGroup, Opened, Options, Retention, Worked};
use srn_store::manifest::{Keep, Role};
use srn_testkit::{Chance, SimDisk};

const DISKS: u32 = 1;
const SECTORS: u64 = 256;

fn now(second: u64) -> Now {
    Now { mono: Mono(second * 1_000_000), wall: WallTime(second as i64 * 1_000_000) }
}

/// The base comes up to a position while another thread opens and reads those before it.
#[test]
fn no_point_is_read_while_it_is_given_up() {
    for seed in 0..60 {
        let disk = SimDisk::new(seed, 64 << 20);
        let options = Options { segment_bytes: 1 << 20, fill: false, ..Options::default() };
        let new = NewGroup {
            group: GroupId([1; 16]),
            name: "web".into(),
            role: Role::Primary,
            keep: Keep::Replica,
            epoch: EpochId([2; 16]),
            now: now(1),
        };
        let made = Group::create(&shared(&disk, seed), options, Path::new("/g"), &new);
        let Opened { group, mut main, .. } = made.expect("a group");
        let mut chance = Chance::new(seed);
        let mut model = Model::blank(DISKS, SECTORS);
        main.commit(&[Write::add_disk(0, SECTORS).change()], now(1)).expect("room");
        let mut points = Vec::new();
        for second in 2..12 {
            let writes = Write::some(&mut chance, DISKS, SECTORS);
            let changes: Vec<_> = writes.iter().map(Write::change).collect();
            main.commit(&changes, now(second)).expect("room");
            writes.iter().for_each(|write| model.apply(write));
            points.push((main.head().seq, model.clone()));
        }
        main.close_segment();
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let retention = Retention::from(Seq(u64::MAX));
                while group.maintain(&retention).expect("work") == Worked::Something {}
                done.store(true, Ordering::SeqCst);
            });
            while !done.load(Ordering::SeqCst) {
                let (seq, model) = chance.pick(&points);
                match group.view_at(*seq) {
                    Ok(view) => {
                        let found = contents(&view, DISKS, SECTORS).expect("it reads");
                        assert!(found == *model, "seed {seed}: frame {seq} is not what it was");
                    }
                    Err(StoreError::NotInHistory(_)) => {}
                    Err(error) => panic!("seed {seed}: frame {seq}: {error}"),
                }
            }
        });
        let view = group.view_head().expect("a view");
        assert!(contents(&view, DISKS, SECTORS).expect("it reads") == model, "the head");
    }
}
