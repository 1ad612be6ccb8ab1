//! A whole block device with a volatile write cache, as a virtual machine has it.
//!
//! It knows no files: what a file system makes of it is the guest's affair. A power cut leaves any
//! subset of what was written since the last flush, in units that are drawn for each cut, from
//! single sectors (torn blocks) to everything or nothing. Older versions of a sector may be left
//! as well: a cache may have written them out before it was cut.

use std::sync::{Mutex, MutexGuard, PoisonError};

use super::inode::Inode;
use crate::chance::Chance;

const SECTOR: u64 = 512;

/// Sectors that share their fate in a power cut, one of these.
const GRAINS: [u64; 6] = [1, 1, 8, 8, 128, u64::MAX];

/// Chances, in percent, that something unflushed survives a power cut, one of these.
const SURVIVALS: [u64; 6] = [0, 25, 50, 75, 95, 100];

/// A block device in memory.
#[derive(Debug)]
pub struct BlockDisk {
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    content: Inode,
    chance: Chance,
    off: bool,
    ignores_flushes: bool,
    cut_after: Option<u64>,
    requests: Requests,
}

/// Changing requests since the power came on.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Requests {
    /// Writes, zeroes and trims.
    pub writes: u64,
    /// Flushes.
    pub flushes: u64,
}

/// What a power cut takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Toll {
    /// Whatever chance has it.
    Drawn,
    /// Each 4 KiB that were not flushed, or not, by equal chance.
    Half,
    /// Everything that was not flushed.
    Everything,
}

/// What a power cut did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cut {
    /// The requests of the time before it.
    pub requests: Requests,
    /// Sectors that were not durable.
    pub volatile: u64,
    /// Those of them that lost their newest version.
    pub lost: u64,
    /// Sectors that shared their fate; `u64::MAX` for all.
    pub grain: u64,
    /// The chance of surviving, in percent.
    pub survival: u64,
}

/// The power is off: the request is not answered, whether or not it has done something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PowerOff;

impl BlockDisk {
    /// A disk of `bytes` zeros, a multiple of the sector size of 512.
    #[must_use]
    pub fn new(seed: u64, bytes: u64) -> Self {
        assert!(bytes.is_multiple_of(SECTOR), "a disk of {bytes} bytes has half a sector");
        let mut content = Inode::default();
        content.set_len(bytes);
        content.sync();
        Self {
            state: Mutex::new(State {
                content,
                chance: Chance::new(seed),
                off: false,
                ignores_flushes: false,
                cut_after: None,
                requests: Requests::default(),
            }),
        }
    }

    /// Its size in bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.lock().content.len()
    }

    /// The power goes off in the middle of a changing request, after `requests` others from now.
    pub fn cut_after(&self, requests: u64) {
        self.lock().cut_after = Some(requests);
    }

    /// The power goes off now.
    pub fn cut(&self) {
        self.lock().off = true;
    }

    /// Whether the power is off.
    #[must_use]
    pub fn is_off(&self) -> bool {
        self.lock().off
    }

    /// From now on flushes and durable writes are answered, and nothing is made durable.
    pub fn ignore_flushes(&self) {
        self.lock().ignores_flushes = true;
    }

    /// The changing requests since the power came on.
    #[must_use]
    pub fn requests(&self) -> Requests {
        self.lock().requests
    }

    /// The power comes back, after it went off: what was not durable is there or not. An honest
    /// disk from here on.
    pub fn power_on(&self, toll: Toll) -> Cut {
        let mut guard = self.lock();
        let State { content, chance, .. } = &mut *guard;
        let (grain, survival) = match toll {
            Toll::Drawn => (*chance.pick(&GRAINS), *chance.pick(&SURVIVALS)),
            Toll::Half => (8, 50),
            Toll::Everything => (1, 0),
        };
        let mut fate = None;
        let (mut volatile, mut lost) = (0, 0);
        content.cut_by(|sector, versions| {
            // All sectors of one grain follow one draw: survived, or how far back it went.
            let this = sector / grain;
            let (survived, back) = match fate {
                Some((grain, survived, back)) if grain == this => (survived, back),
                _ => (chance.percent(survival), chance.any()),
            };
            fate = Some((this, survived, back));
            let newest = versions - 1;
            volatile += 1;
            lost += u64::from(!survived);
            match toll {
                Toll::Everything => 0,
                Toll::Drawn | Toll::Half if survived => newest,
                Toll::Drawn | Toll::Half => {
                    usize::try_from(back % newest.max(1) as u64).unwrap_or(0)
                }
            }
        });
        let requests = std::mem::take(&mut guard.requests);
        guard.off = false;
        guard.ignores_flushes = false;
        guard.cut_after = None;
        Cut { requests, volatile, lost, grain, survival }
    }

    /// Reads `bytes` at `offset`.
    ///
    /// # Errors
    /// [`PowerOff`].
    pub fn read(&self, offset: u64, bytes: &mut [u8]) -> Result<(), PowerOff> {
        let state = self.lock();
        if state.off {
            return Err(PowerOff);
        }
        state.content.read(bytes, offset);
        Ok(())
    }

    /// Writes `bytes` at `offset`, both multiples of the sector size.
    ///
    /// # Errors
    /// [`PowerOff`].
    pub fn write(&self, offset: u64, bytes: &[u8], durable: bool) -> Result<(), PowerOff> {
        self.change(offset, bytes.len() as u64, durable, |content| content.write(bytes, offset))
    }

    /// Makes a range read as zero.
    ///
    /// # Errors
    /// [`PowerOff`].
    pub fn zero(&self, offset: u64, len: u64, durable: bool) -> Result<(), PowerOff> {
        self.change(offset, len, durable, |content| content.punch(offset, len))
    }

    /// Makes everything durable that was answered.
    ///
    /// # Errors
    /// [`PowerOff`]; then nothing was.
    pub fn flush(&self) -> Result<(), PowerOff> {
        let mut state = self.lock();
        if state.off {
            return Err(PowerOff);
        }
        state.requests.flushes += 1;
        state.step()?;
        if !state.ignores_flushes {
            state.content.sync();
        }
        Ok(())
    }

    fn change(
        &self,
        offset: u64,
        len: u64,
        durable: bool,
        change: impl FnOnce(&mut Inode),
    ) -> Result<(), PowerOff> {
        let mut state = self.lock();
        if state.off {
            return Err(PowerOff);
        }
        assert!(
            offset.is_multiple_of(SECTOR) && len.is_multiple_of(SECTOR),
            "half a sector at {offset}, {len} bytes"
        );
        state.requests.writes += 1;
        // Even when the power goes off in the middle, any part of it may get through.
        change(&mut state.content);
        state.step()?;
        if durable && !state.ignores_flushes {
            state.content.settle(offset, len);
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Counts a changing request towards the cut.
    const fn step(&mut self) -> Result<(), PowerOff> {
        match &mut self.cut_after {
            Some(0) => self.off = true,
            Some(left) => *left -= 1,
            None => {}
        }
        if self.off { Err(PowerOff) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BLOCK: u64 = 4096;

    fn block(value: u8) -> Vec<u8> {
        vec![value; BLOCK as usize]
    }

    fn read(disk: &BlockDisk, block: u64) -> Vec<u8> {
        let mut bytes = vec![0xff; BLOCK as usize];
        disk.read(block * BLOCK, &mut bytes).unwrap();
        bytes
    }

    #[test]
    fn what_is_flushed_or_durable_survives_any_cut() {
        for seed in 0..200 {
            let disk = BlockDisk::new(seed, 64 * BLOCK);
            disk.write(0, &block(1), false).unwrap();
            disk.flush().unwrap();
            disk.write(BLOCK, &block(2), true).unwrap();
            disk.write(2 * BLOCK, &block(3), false).unwrap();
            disk.cut();
            assert_eq!(disk.write(0, &block(9), true), Err(PowerOff));
            let cut = disk.power_on(Toll::Drawn);
            assert_eq!(cut.requests, Requests { writes: 3, flushes: 1 });
            assert_eq!(cut.volatile, 8);
            assert_eq!(read(&disk, 0), block(1));
            assert_eq!(read(&disk, 1), block(2));
        }
    }

    #[test]
    fn cuts_lose_tear_and_reorder() {
        let (mut all, mut nothing, mut torn, mut reordered, mut middle) = (0, 0, 0, 0, 0);
        for seed in 0..1000 {
            let disk = BlockDisk::new(seed, 64 * BLOCK);
            for version in 1..=3 {
                disk.write(0, &block(version), false).unwrap();
            }
            disk.write(BLOCK, &block(4), false).unwrap();
            disk.cut();
            disk.power_on(Toll::Drawn);
            let (first, second) = (read(&disk, 0), read(&disk, 1));
            let whole = |block: &[u8]| block.iter().all(|byte| Some(byte) == block.first());
            all += u32::from(first == block(3) && second == block(4));
            nothing += u32::from(first == block(0) && second == block(0));
            torn += u32::from(!whole(&second));
            reordered += u32::from(first == block(0) && second == block(4));
            middle += u32::from(first == block(1) || first == block(2));
        }
        for (what, times) in [
            ("everything kept", all),
            ("nothing kept", nothing),
            ("torn", torn),
            ("reordered", reordered),
            ("an older version", middle),
        ] {
            assert!(times >= 5, "{what}: {times} of 1000");
        }
    }

    #[test]
    fn the_power_goes_off_in_the_middle_of_the_request_that_was_named() {
        let disk = BlockDisk::new(0, 64 * BLOCK);
        disk.cut_after(2);
        disk.write(0, &block(1), false).unwrap();
        disk.flush().unwrap();
        disk.write(0, &block(2), false).unwrap_err();
        assert!(disk.is_off());
        disk.flush().unwrap_err();
        assert_eq!(disk.power_on(Toll::Everything).lost, 8);
        assert_eq!(read(&disk, 0), block(1));

        disk.cut_after(1);
        disk.write(0, &block(3), false).unwrap();
        disk.flush().unwrap_err();
        disk.power_on(Toll::Everything);
        assert_eq!(read(&disk, 0), block(1), "a flush that was cut has done nothing");
    }

    #[test]
    fn a_liar_forgets_what_it_said_was_durable() {
        let disk = BlockDisk::new(0, 64 * BLOCK);
        disk.write(0, &block(1), true).unwrap();
        disk.ignore_flushes();
        disk.write(0, &block(2), true).unwrap();
        disk.flush().unwrap();
        disk.cut();
        disk.power_on(Toll::Everything);
        assert_eq!(read(&disk, 0), block(1));
        disk.write(0, &block(3), true).unwrap();
        disk.cut();
        disk.power_on(Toll::Everything);
        assert_eq!(read(&disk, 0), block(3), "honest again");
    }

    #[test]
    fn zeros_are_writes_like_others() {
        let disk = BlockDisk::new(0, 64 * BLOCK);
        disk.write(0, &block(1), true).unwrap();
        disk.zero(0, BLOCK, false).unwrap();
        assert_eq!(read(&disk, 0), block(0));
        disk.cut();
        disk.power_on(Toll::Everything);
        assert_eq!(read(&disk, 0), block(1));
        disk.zero(0, BLOCK, true).unwrap();
        disk.cut();
        disk.power_on(Toll::Everything);
        assert_eq!(read(&disk, 0), block(0));
    }
}
