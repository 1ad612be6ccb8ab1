//! What else happens to disks: rot, snapshots of the machine they are in, and what a test wants to
//! know afterwards.

use std::path::Path;
use std::sync::{Arc, Mutex};

use super::{SimDisk, World};
use crate::chance::Chance;

impl SimDisk {
    /// Flips a bit of a file, durably: rot.
    pub fn rot(&self, path: &Path, offset: u64) {
        let mut world = self.lock();
        let inode = world.names.get(&super::key(path)).copied();
        if let Some(inode) = inode.and_then(|inode| world.inodes.get_mut(&inode)) {
            inode.rot(offset, 0);
        }
    }

    /// Flips a bit of any sector that was ever written to a file whose path has `part`. Says which:
    /// the file and the byte.
    pub fn rot_somewhere(&self, chance: &mut Chance, part: &str) -> Option<(String, u64)> {
        let mut guard = self.lock();
        let World { names, inodes, .. } = &mut *guard;
        let written: Vec<(String, u64, Vec<u64>)> = names
            .iter()
            .filter(|(name, _)| name.contains(part))
            .filter_map(|(name, inode)| {
                let sectors = inodes.get(inode)?.written();
                (!sectors.is_empty()).then(|| (name.clone(), *inode, sectors))
            })
            .collect();
        if written.is_empty() {
            return None;
        }
        let (name, inode, sectors) = chance.pick(&written);
        let offset = chance.pick(sectors) * super::SECTOR as u64 + chance.below(512);
        let inode = inodes.get_mut(inode)?;
        if offset >= inode.len() {
            return None;
        }
        inode.rot(offset, chance.below(8));
        Some((name.clone(), offset))
    }

    /// A disk of its own with what this one shows now, as a snapshot of a machine keeps it.
    #[must_use]
    pub fn snapshot(&self) -> Self {
        let mut world = self.lock().clone();
        (world.off, world.failed, world.fault_at) = (false, false, None);
        world.boot += 1;
        let boot = world.boot;
        Self { world: Arc::new(Mutex::new(world)), boot }
    }

    /// Bytes that are taken.
    #[must_use]
    pub fn used(&self) -> u64 {
        self.lock().used()
    }

    /// Changing operations that were asked for after a write or sync had failed, without a restart
    /// between: there must never be any.
    #[must_use]
    pub fn went_on(&self) -> u64 {
        self.lock().went_on
    }
}
