//! One of the two nodes, and what the primary's history is known to be.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use srn_core::epoch::Position;
use srn_core::ids::{EpochId, FrameHash, Seq};
use srn_core::time::Now;
use srn_store::group::{Appender, Group, NewGroup, Options};
use srn_store::io::BufPool;
use srn_store::manifest::{Keep, Role};

use super::{DISKS, GROUP, SECTORS};
use crate::oracle::{self, History};
use crate::{Chance, SimDisk};

/// Bytes of a disk that is not short of space.
const ROOM: u64 = 4 << 30;

pub(super) struct Node {
    pub(super) disk: SimDisk,
    pub(super) options: Options,
    pub(super) group: Arc<Group>,
    pub(super) appender: Option<Appender>,
    /// The disk as a snapshot of the machine has it.
    pub(super) snapshot: Option<SimDisk>,
    /// Memory that outlives a restart, to be quick.
    pool: BufPool,
}

impl Node {
    pub(super) fn new(seed: u64, chance: &mut Chance, role: Role, keep: Keep, now: Now) -> Self {
        let disk = SimDisk::new(seed, ROOM);
        let segment_bytes = 416 * 1024;
        let capped = keep == Keep::Cache && chance.percent(50);
        let options = Options {
            segment_bytes,
            cap_bytes: if capped { segment_bytes * chance.between(3, 8) } else { u64::MAX },
            table_entries_max: chance.between(4, 60) as usize,
            fill: false,
            ..Options::default()
        };
        let new =
            NewGroup { group: GROUP, name: "sim".into(), role, keep, epoch: EpochId([1; 16]), now };
        let pool = BufPool::new(8 << 20);
        let shared = oracle::shared_with(&disk, seed, &pool);
        let opened = Group::create(&shared, options, Path::new("/g"), &new).expect("create");
        let appender = Some(opened.main);
        Self { disk, options, group: opened.group, appender, snapshot: None, pool }
    }

    /// Starts again, after a power cut or as a new process.
    pub(super) fn open(&mut self, chance: &mut Chance, now: Now) {
        self.appender = None;
        assert_eq!(self.disk.went_on(), 0, "something was written after a failed write or sync");
        self.disk.no_fault();
        self.disk.set_capacity(ROOM);
        self.disk = if self.disk.is_off() || chance.percent(50) {
            self.disk.power_cycle()
        } else {
            self.disk.process_restart()
        };
        let shared = oracle::shared_with(&self.disk, chance.any(), &self.pool);
        let opened = Group::open(&shared, self.options, Path::new("/g"), now)
            .expect("opening after a crash");
        self.group = opened.group;
        self.appender = Some(opened.main);
    }

    /// Takes space away, so that the next segment or index finds none.
    pub(super) fn squeeze(&self, chance: &mut Chance) {
        self.disk.set_capacity(self.disk.used() + chance.below(600 * 1024));
    }

    pub(super) fn relieve(&self) {
        self.disk.set_capacity(ROOM);
    }
}

/// A history that the primary has or once had.
#[derive(Debug, Clone)]
pub(super) struct Line {
    /// The hash of every frame that was durable, and how many writes there are up to it.
    pub(super) frames: BTreeMap<Seq, (FrameHash, usize)>,
    pub(super) writes: History,
}

impl Line {
    pub(super) fn new() -> Self {
        Self { frames: BTreeMap::new(), writes: History::new(DISKS, SECTORS) }
    }

    pub(super) fn last(&self) -> Seq {
        self.frames.last_key_value().map_or(Seq(0), |(seq, _)| *seq)
    }

    /// How many writes there are up to `at`, if that is a frame of this line.
    pub(super) fn count_at(&self, at: &Position) -> Option<usize> {
        if at.seq == Seq(0) {
            return Some(0);
        }
        self.frames.get(&at.seq).filter(|(hash, _)| *hash == at.hash).map(|(_, count)| *count)
    }

    /// Forgets what is behind `seq`.
    pub(super) fn set_back(&mut self, seq: Seq) {
        let _ = self.frames.split_off(&seq.next());
        let count = self.frames.last_key_value().map_or(0, |(_, (_, count))| *count);
        self.writes.truncate(count);
    }
}
