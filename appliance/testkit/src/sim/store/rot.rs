//! A bit of some file is not what it was: what is read is right or an error, nothing that was
//! answered is cut off, and nothing is moved without being verified.

use std::collections::BTreeSet;

use srn_core::extent::Extent;
use srn_core::ids::{DiskNo, Seq};
use srn_store::StoreError;
use srn_store::group::{Retention, View, Worked};

use super::{DISKS, SECTORS, World};
use crate::oracle::{Model, Write};

/// Sectors read at once.
const PART: u64 = 8;

impl World {
    /// P3, P6: the end of this world.
    pub(super) fn rot(&mut self) {
        // Also to what is not sealed yet.
        for _ in 0..self.chance.between(0, 3) {
            let writes = self.some_writes();
            self.commit(|_| writes);
        }
        let head = self.group.head().seq;
        // Only what a later frame knows to be durable can be told from the end of a crash.
        self.commit(|_| Vec::new());
        let part = *self.chance.pick(&["", "/log/", "/log/", "/base/", "/layer/", "/index/"]);
        let Some((file, offset)) = self.disk.rot_somewhere(&mut self.chance, part) else { return };
        let place = format!("byte {offset} of {file}");
        if self.chance.percent(60) {
            self.main = None;
            self.clones.clear();
            self.disk = self.disk.process_restart();
            match self.open() {
                Ok(opened) => {
                    self.group = opened.group;
                    self.main = Some(opened.main);
                    let found = self.group.head().seq;
                    assert!(found >= head, "rot in {place} cut the log from {head} to {found}");
                }
                Err(StoreError::Corrupt(_) | StoreError::NewerVersion { .. }) => {
                    return self.saw("rot keeps the group closed");
                }
                Err(error) => panic!("rot in {place}: {error}"),
            }
        }
        let found = self.read_rotten(&place);
        let lost = self.lost_sectors(&place);
        if self.chance.percent(50) {
            // So that there is something to be moved.
            self.retention = Retention::from(self.group.head().seq);
        }
        let mut carries = self.chance.percent(20);
        self.group.carry_damage(carries);
        for _ in 0..self.chance.between(0, 40) {
            match self.group.maintain(&self.retention) {
                Ok(Worked::Something) => {}
                Ok(Worked::Nothing) | Err(StoreError::Full(_)) => break,
                Err(StoreError::Corrupt(_)) => {
                    self.saw("rot stops maintenance");
                    if carries {
                        // In an index: nobody knows what is where.
                        break;
                    }
                    // It was looked at, and nobody has it: maintenance goes on around it.
                    carries = true;
                    self.group.carry_damage(true);
                }
                Err(error) => panic!("rot in {place}: maintenance: {error}"),
            }
        }
        if !self.group.take_carried().is_empty() {
            self.saw("rot carried along");
        }
        // What is carried along costs no sector that could be read before. A damaged index may not have
        // been needed then.
        let now = self.lost_sectors(&place);
        let more: Vec<_> = now.difference(&lost).collect();
        assert!(more.is_empty() || file.contains("/index/"), "rot in {place}: moved to {more:?}");
        let again = self.read_rotten(&place);
        self.saw(if found || again { "rot found by a reader" } else { "rot where nobody reads" });
    }

    /// The sectors that cannot be read at the head.
    fn lost_sectors(&self, place: &str) -> BTreeSet<(u32, u64)> {
        let mut lost = BTreeSet::new();
        if self.keep == srn_store::manifest::Keep::Cache {
            return lost;
        }
        let view = self.group.view_head().expect("view");
        for (disk, sector) in (0..DISKS).flat_map(|no| (0..SECTORS).map(move |at| (no, at))) {
            let mut content = [0; 512];
            match view.read(DiskNo(disk), Extent::new(sector, 1), &mut content) {
                Ok(()) => {}
                Err(StoreError::Corrupt(_)) => {
                    lost.insert((disk, sector));
                }
                Err(error) => panic!("rot in {place}: {error}"),
            }
        }
        lost
    }

    /// Reads everything; says whether any of it is known to be damaged.
    fn read_rotten(&mut self, place: &str) -> bool {
        let mut damaged = self.read_rotten_log(place);
        if self.keep == srn_store::manifest::Keep::Cache {
            return damaged;
        }
        let known: Vec<(Seq, usize)> = self.known.iter().map(|(seq, n)| (*seq, *n)).collect();
        for _ in 0..4 {
            let (seq, count) = *self.chance.pick(&known);
            match self.group.view_at(seq) {
                Ok(view) => damaged |= self.read_rotten_view(&view, count, place),
                Err(StoreError::Corrupt(_)) => damaged = true,
                Err(StoreError::NotInHistory(_)) if !self.is_promised(seq) => {}
                Err(error) => panic!("rot in {place}: frame {seq}: {error}"),
            }
        }
        let view = self.group.view_head().expect("view");
        damaged | self.read_rotten_view(&view, self.answered, place)
    }

    fn read_rotten_view(&mut self, view: &View, count: usize, place: &str) -> bool {
        let mut found: Model = self.writes.model(count);
        let mut damaged = false;
        for disk in 0..DISKS {
            for start in (0..SECTORS).step_by(PART as usize) {
                let extent = Extent::new(start, PART.min(SECTORS - start));
                let mut part = vec![0; extent.bytes() as usize];
                match view.read(DiskNo(disk), extent, &mut part) {
                    Ok(()) => found.put(disk, start, &part),
                    Err(StoreError::Corrupt(_)) => damaged = true,
                    Err(error) => panic!("rot in {place}: {error}"),
                }
            }
        }
        self.writes.check(count, &found, format_args!("with rot in {place}, what is read"));
        damaged
    }

    fn read_rotten_log(&mut self, place: &str) -> bool {
        let oldest = self.group.oldest();
        let from = self.known.iter().find(|(seq, _)| seq.next() >= oldest);
        let Some((seq, mut count)) = from.map(|(seq, count)| (*seq, *count)) else { return false };
        let mut cursor = self.group.cursor(seq.next());
        loop {
            match cursor.next() {
                Ok(Some(frame)) => {
                    for write in Write::of_frame(&frame, &mut self.codecs) {
                        assert_eq!(self.writes.get(count), Some(&write), "rot in {place}");
                        count += 1;
                    }
                }
                Ok(None) => return false,
                Err(StoreError::Corrupt(_)) => return true,
                // History was merged to layers: there are no frames of it any more.
                Err(StoreError::NotInHistory(_)) => return false,
                Err(error) => panic!("rot in {place}: the log: {error}"),
            }
        }
    }
}
