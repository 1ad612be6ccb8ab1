//! A disk that does what disks may do: lose, tear and reorder whatever was not synced, fail writes
//! and syncs, fill up.
//!
//! The model is harsher than any file system: each 512-byte sector that was written since the last
//! sync may keep any of its versions, each name may point to its old or new file, each length may
//! be old or new, all independently. After a failed sync the data is still there to be read, but
//! later syncs do not save it, as with the Linux page cache.

mod block;
mod inode;
mod mishap;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io::{self, IoSlice};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use srn_store::io::{Access, File, Fs};

use crate::chance::Chance;
use inode::Inode;

pub use block::{BlockDisk, Cut, PowerOff, Requests, Toll};

/// Bytes that are written or lost together.
const SECTOR: usize = 512;

/// What shall go wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The power goes off in the middle of the operation.
    PowerCut,
    /// The operation fails with an input/output error; some of it may have been done.
    Error,
}

/// A simulated disk with a directory tree.
#[derive(Clone)]
pub struct SimDisk {
    world: Arc<Mutex<World>>,
    /// The boot in which this handle is valid.
    boot: u64,
}

impl fmt::Debug for SimDisk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SimDisk(boot {})", self.boot)
    }
}

#[derive(Debug, Clone)]
struct World {
    chance: Chance,
    boot: u64,
    inodes: BTreeMap<u64, Inode>,
    next_inode: u64,
    /// Who has a file open: it stays readable without a name until the last one is gone.
    open: Vec<(u64, Weak<()>)>,
    names: BTreeMap<String, u64>,
    /// What the name may be after a power cut: every value since its directory was synced.
    name_versions: BTreeMap<String, Vec<Option<u64>>>,
    capacity: u64,
    /// Operations that change something, counted.
    operations: u64,
    fault_at: Option<(u64, Fault)>,
    off: bool,
    /// A write or sync has failed in this boot.
    failed: bool,
    /// Operations after that.
    went_on: u64,
    counts: Counts,
}

/// What happened, for the coverage of a run.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Power cuts in the middle of an operation.
    pub cuts: u64,
    /// Operations that failed.
    pub errors: u64,
    /// Syncs that failed.
    pub failed_syncs: u64,
    /// Sectors that lost their newest version in a power cut.
    pub sectors_lost: u64,
    /// Names that lost their newest target in a power cut.
    pub names_lost: u64,
    /// Operations refused for lack of space.
    pub full: u64,
}

impl SimDisk {
    /// An empty disk of `capacity` bytes.
    #[must_use]
    pub fn new(seed: u64, capacity: u64) -> Self {
        let world = World {
            chance: Chance::new(seed),
            boot: 0,
            inodes: BTreeMap::new(),
            next_inode: 0,
            open: Vec::new(),
            names: BTreeMap::new(),
            name_versions: BTreeMap::new(),
            capacity,
            operations: 0,
            fault_at: None,
            off: false,
            failed: false,
            went_on: 0,
            counts: Counts::default(),
        };
        Self { world: Arc::new(Mutex::new(world)), boot: 0 }
    }

    fn lock(&self) -> MutexGuard<'_, World> {
        self.world.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets `fault` happen `operations` changing operations from now.
    pub fn fault_in(&self, operations: u64, fault: Fault) {
        let mut world = self.lock();
        world.fault_at = Some((world.operations + operations, fault));
    }

    /// Calls off a fault that has not happened.
    pub fn no_fault(&self) {
        self.lock().fault_at = None;
    }

    /// Changes the capacity in bytes.
    pub fn set_capacity(&self, bytes: u64) {
        self.lock().capacity = bytes;
    }

    /// Whether the power is off.
    #[must_use]
    pub fn is_off(&self) -> bool {
        self.lock().off
    }

    /// What happened so far.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.lock().counts
    }

    /// How many operations that change something there were.
    #[must_use]
    pub fn operations(&self) -> u64 {
        self.lock().operations
    }

    /// The power goes off and on: what was not synced may be lost. Returns the disk as the next
    /// boot sees it; handles of the boot before are dead.
    #[must_use]
    pub fn power_cycle(&self) -> Self {
        let mut guard = self.lock();
        let world = &mut *guard;
        let mut lost = 0;
        for inode in world.inodes.values_mut() {
            lost += inode.power_cut(&mut world.chance);
        }
        world.counts.sectors_lost += lost;
        for (path, versions) in std::mem::take(&mut world.name_versions) {
            let chosen = *world.chance.pick(&versions);
            if Some(&chosen) != versions.last() {
                world.counts.names_lost += 1;
            }
            match chosen {
                Some(inode) => world.names.insert(path, inode),
                None => world.names.remove(&path),
            };
        }
        world.off = false;
        world.failed = false;
        world.fault_at = None;
        world.boot += 1;
        Self { world: self.world.clone(), boot: world.boot }
    }

    /// The process dies and starts again: nothing is lost, but handles of before are dead, and
    /// what was not synced is still not synced.
    #[must_use]
    pub fn process_restart(&self) -> Self {
        let mut world = self.lock();
        world.failed = false;
        world.fault_at = None;
        world.boot += 1;
        Self { world: self.world.clone(), boot: world.boot }
    }

    /// The world, if this handle is alive and the power is on.
    fn world(&self) -> io::Result<MutexGuard<'_, World>> {
        let world = self.lock();
        if world.off || world.boot != self.boot {
            return Err(io::Error::other("the simulated power is off"));
        }
        Ok(world)
    }

    /// Counts a changing operation; says whether a fault hits it.
    fn operate(&self) -> io::Result<(MutexGuard<'_, World>, Option<Fault>)> {
        let (mut world, fault) = self.operate_harmlessly()?;
        // Nobody knows what is durable after this.
        world.failed |= fault == Some(Fault::Error);
        Ok((world, fault))
    }

    /// The same for an operation whose failure changes nothing: one on a single name.
    fn operate_harmlessly(&self) -> io::Result<(MutexGuard<'_, World>, Option<Fault>)> {
        let mut world = self.world()?;
        world.operations += 1;
        world.went_on += u64::from(world.failed);
        let now = world.operations;
        let fault = world.fault_at.filter(|(at, _)| *at <= now).map(|(_, fault)| fault);
        if fault.is_some() {
            world.fault_at = None;
        }
        match fault {
            Some(Fault::PowerCut) => {
                world.off = true;
                world.counts.cuts += 1;
            }
            Some(Fault::Error) => world.counts.errors += 1,
            None => {}
        }
        Ok((world, fault))
    }

    fn set_name(world: &mut World, name: String, target: Option<u64>) {
        let old = world.names.get(&name).copied();
        world.name_versions.entry(name.clone()).or_insert_with(|| vec![old]).push(target);
        match target {
            Some(inode) => world.names.insert(name, inode),
            None => world.names.remove(&name),
        };
    }

    /// A handle on a file, which is noted in `world`, this disk's.
    fn handle(&self, world: &mut World, inode: u64) -> Arc<dyn File> {
        let holder = Arc::new(());
        world.open.push((inode, Arc::downgrade(&holder)));
        Arc::new(SimFile { disk: self.clone(), inode, _holder: holder })
    }
}

fn failed(fault: Fault) -> io::Error {
    match fault {
        Fault::PowerCut => io::Error::other("the simulated power went off"),
        Fault::Error => io::Error::other("a simulated input/output error"),
    }
}

/// Names are compared often, and paths slowly.
fn key(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

/// Whether `name` lies right in the directory.
fn is_in(name: &str, dir: &str) -> bool {
    name.rsplit_once('/').is_some_and(|(parent, _)| parent == dir)
}

fn not_found(path: &Path) -> io::Error {
    io::Error::new(io::ErrorKind::NotFound, format!("{} is not there", path.display()))
}

impl World {
    fn used(&self) -> u64 {
        self.inodes.values().map(Inode::used).sum()
    }

    fn check_space(&mut self, more: u64) -> io::Result<()> {
        if self.used() + more > self.capacity {
            self.counts.full += 1;
            // Nothing was tried, so nothing has failed.
            self.failed = false;
            return Err(io::ErrorKind::StorageFull.into());
        }
        Ok(())
    }
}

impl Fs for SimDisk {
    fn create(&self, path: &Path, _access: Access) -> io::Result<Arc<dyn File>> {
        let (mut world, fault) = self.operate_harmlessly()?;
        let name = key(path);
        if world.names.contains_key(&name) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let number = world.next_inode;
        world.next_inode += 1;
        world.inodes.insert(number, Inode::default());
        Self::set_name(&mut world, name, Some(number));
        match fault {
            Some(fault) => Err(failed(fault)),
            None => Ok(self.handle(&mut world, number)),
        }
    }

    fn open(&self, path: &Path, _access: Access) -> io::Result<Arc<dyn File>> {
        let mut world = self.world()?;
        let inode = *world.names.get(&key(path)).ok_or_else(|| not_found(path))?;
        Ok(self.handle(&mut world, inode))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let (mut world, fault) = self.operate()?;
        let inode = *world.names.get(&key(from)).ok_or_else(|| not_found(from))?;
        Self::set_name(&mut world, key(to), Some(inode));
        Self::set_name(&mut world, key(from), None);
        fault.map_or(Ok(()), |fault| Err(failed(fault)))
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        let (mut world, fault) = self.operate_harmlessly()?;
        let name = key(path);
        if !world.names.contains_key(&name) {
            return Err(not_found(path));
        }
        Self::set_name(&mut world, name, None);
        fault.map_or(Ok(()), |fault| Err(failed(fault)))
    }

    fn create_dir(&self, _path: &Path) -> io::Result<()> {
        // Directories are made once, when a group is made; their durability is not modelled.
        self.world().map(|_| ())
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        let (mut world, _) = self.operate_harmlessly()?;
        let dir = key(path) + "/";
        let inside: Vec<String> =
            world.names.keys().filter(|name| name.starts_with(&dir)).cloned().collect();
        for name in inside {
            Self::set_name(&mut world, name, None);
        }
        Ok(())
    }

    fn list(&self, path: &Path) -> io::Result<Vec<String>> {
        let world = self.world()?;
        let dir = key(path);
        let in_dir = world.names.keys().filter(|name| is_in(name, &dir));
        Ok(in_dir.filter_map(|name| Some(name.rsplit_once('/')?.1.to_owned())).collect())
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        let (mut world, fault) = self.operate()?;
        if let Some(fault) = fault {
            return Err(failed(fault));
        }
        let dir = key(path);
        world.name_versions.retain(|name, _| !is_in(name, &dir));
        // Files without a name, now or after a power cut, are gone.
        let kept: BTreeSet<u64> = world
            .names
            .values()
            .copied()
            .chain(world.name_versions.values().flatten().flatten().copied())
            .collect();
        world.open.retain(|(_, holder)| holder.strong_count() > 0);
        let open: BTreeSet<u64> = world.open.iter().map(|(inode, _)| *inode).collect();
        world.inodes.retain(|inode, _| kept.contains(inode) || open.contains(inode));
        Ok(())
    }

    fn free_bytes(&self, _path: &Path) -> io::Result<u64> {
        let world = self.world()?;
        // The store keeps a reserve that would be most of a simulated disk.
        Ok(world.capacity.saturating_sub(world.used()) + (64 << 20))
    }
}

#[derive(Debug)]
struct SimFile {
    disk: SimDisk,
    inode: u64,
    _holder: Arc<()>,
}

impl SimFile {
    fn gone() -> io::Error {
        io::Error::other("the simulated file was removed")
    }
}

impl File for SimFile {
    fn size(&self) -> io::Result<u64> {
        let world = self.disk.world()?;
        world.inodes.get(&self.inode).map(Inode::len).ok_or_else(Self::gone)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let world = self.disk.world()?;
        let inode = world.inodes.get(&self.inode).ok_or_else(Self::gone)?;
        Ok(inode.read(buf, offset))
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
        let world = self.disk.world()?;
        let inode = world.inodes.get(&self.inode).ok_or_else(Self::gone)?;
        let mut at = offset;
        let mut buf = [0; 4096];
        loop {
            match inode.read(&mut buf, at) {
                0 => return Ok(None),
                read if buf.iter().take(read).any(|byte| *byte != 0) => return Ok(Some(at)),
                read => at += read as u64,
            }
        }
    }

    fn write_at(&self, parts: &[IoSlice<'_>], offset: u64, durable: bool) -> io::Result<()> {
        let (mut guard, fault) = self.disk.operate()?;
        let world = &mut *guard;
        let len = parts.iter().map(|part| part.len() as u64).sum();
        let more = world
            .inodes
            .get(&self.inode)
            .map(|inode| inode.growth(offset, len))
            .ok_or_else(Self::gone)?;
        world.check_space(more)?;
        let inode = world.inodes.get_mut(&self.inode).ok_or_else(Self::gone)?;
        let mut at = offset;
        // A sector is written at once, also where two parts meet in it.
        let meet = parts.iter().rev().skip(1).any(|part| !part.len().is_multiple_of(SECTOR));
        let mut joined = Vec::new();
        if meet {
            parts.iter().for_each(|part| joined.extend_from_slice(part));
        }
        let joined = [IoSlice::new(&joined)];
        for part in if meet { &joined[..] } else { parts } {
            if durable && fault.is_none() {
                inode.write_durable(part, at);
            } else {
                inode.write(part, at);
            }
            at += part.len() as u64;
        }
        match fault {
            Some(fault) => {
                if fault == Fault::Error {
                    inode.forget_unsynced(&mut world.chance);
                }
                Err(failed(fault))
            }
            None => Ok(()),
        }
    }

    fn sync(&self) -> io::Result<()> {
        let (mut guard, fault) = self.disk.operate()?;
        let world = &mut *guard;
        let inode = world.inodes.get_mut(&self.inode).ok_or_else(Self::gone)?;
        match fault {
            Some(fault) => {
                if fault == Fault::Error {
                    inode.forget_unsynced(&mut world.chance);
                    world.counts.failed_syncs += 1;
                }
                Err(failed(fault))
            }
            None => {
                inode.sync();
                Ok(())
            }
        }
    }

    fn allocate(&self, len: u64) -> io::Result<()> {
        let (mut guard, fault) = self.disk.operate()?;
        let world = &mut *guard;
        let more = world
            .inodes
            .get(&self.inode)
            .map(|inode| len.saturating_sub(inode.used()))
            .ok_or_else(Self::gone)?;
        world.check_space(more)?;
        let inode = world.inodes.get_mut(&self.inode).ok_or_else(Self::gone)?;
        inode.reserve(len);
        fault.map_or(Ok(()), |fault| Err(failed(fault)))
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let (mut guard, fault) = self.disk.operate()?;
        let inode = guard.inodes.get_mut(&self.inode).ok_or_else(Self::gone)?;
        inode.set_len(len);
        fault.map_or(Ok(()), |fault| Err(failed(fault)))
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        let (mut guard, fault) = self.disk.operate()?;
        let inode = guard.inodes.get_mut(&self.inode).ok_or_else(Self::gone)?;
        inode.punch(offset, len);
        fault.map_or(Ok(()), |fault| Err(failed(fault)))
    }
}
