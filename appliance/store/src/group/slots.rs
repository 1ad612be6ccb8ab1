//! Segment files: made, reused, counted against the cap.

use std::io::IoSlice;
use std::sync::Arc;

use srn_core::mutants::{self, Mutant};

use super::{Group, LOG_DIR};
use crate::error::{Doing, Result, StoreError};
use crate::io::{Access, AlignedBuf, File, Fs};
use crate::segment;

/// A segment file that holds no frames that count.
pub(crate) type Slot = (u32, Arc<dyn File>);

/// Bytes written at once when a file is filled.
const FILL_STEP: usize = 1 << 20;

/// Free segment files that are kept for use.
const FREE_MAX: usize = 4;

/// Space to leave free on the volume for manifests and indexes, in bytes.
const RESERVE_BYTES: u64 = 32 << 20;

impl Group {
    /// A file for the next segment: one that is ready, one that is free, or a new one.
    pub(super) fn take_slot(&self, beyond_cap: bool) -> Result<Slot> {
        if let Some(slot) = self.lock().spares.pop() {
            return Ok(slot);
        }
        if let Some(slot) = self.free.take() {
            return Ok(slot);
        }
        self.make_slot(false, beyond_cap)
    }

    /// Makes a slot's file as long as segments are now; returns its length in bytes.
    pub(super) fn fit_slot(&self, file: &Arc<dyn File>) -> Result<u64> {
        let doing = || "sizing a log segment".to_owned();
        let len = file.size().doing(doing)?;
        if len >= self.options.segment_bytes {
            return Ok(len.min(segment::SEGMENT_BYTES_MAX));
        }
        file.allocate(self.options.segment_bytes).doing(doing)?;
        file.sync().doing(doing)?;
        Ok(self.options.segment_bytes)
    }

    /// Makes sure that a file is ready. Returns whether there was anything to do.
    ///
    /// # Errors
    /// [`StoreError::Full`] when the cap or the volume leaves no room.
    pub(super) fn prepare_spare(&self) -> Result<bool> {
        if !self.lock().spares.is_empty() {
            return Ok(false);
        }
        let slot = match self.free.take() {
            Some(slot) => slot,
            None => {
                let fill = self.options.fill && self.lock().small_appends;
                self.make_slot(fill, false)?
            }
        };
        self.lock().spares.push(slot);
        Ok(true)
    }

    /// Removes a free file when there are more than will be wanted soon. Returns whether there was.
    pub(super) fn shrink(&self) -> Result<bool> {
        if self.free.len() <= FREE_MAX {
            return Ok(false);
        }
        let Some((number, file)) = self.free.take() else { return Ok(false) };
        drop(file);
        let path = self.dir.join(LOG_DIR).join(segment::file_name(number));
        let removed = self.shared.volume.remove(&path);
        self.lock().slot_count -= 1;
        removed.doing(|| format!("removing {}", path.display()))?;
        Ok(true)
    }

    fn make_slot(&self, fill: bool, beyond_cap: bool) -> Result<Slot> {
        let bytes = self.options.segment_bytes;
        let number = {
            let mut state = self.lock();
            if !beyond_cap && (state.slot_count + 1) * bytes > self.options.cap_bytes {
                return Err(StoreError::Full(format!(
                    "the log is at its cap of {} bytes",
                    self.options.cap_bytes
                )));
            }
            // Counted before it is there, so that two at once do not pass the cap.
            state.slot_count += 1;
            let number = state.manifest.next_slot;
            state.manifest.next_slot += 1;
            number
        };
        let made = self.make_file(number, bytes, fill);
        if made.is_err() {
            self.lock().slot_count -= 1;
        }
        made
    }

    fn make_file(&self, number: u32, bytes: u64, fill: bool) -> Result<Slot> {
        let dir = self.dir.join(LOG_DIR);
        let volume = &self.shared.volume;
        let doing = || format!("making a log segment of {bytes} bytes");
        let free = volume.free_bytes(&dir).doing(doing)?;
        if free < bytes.saturating_add(RESERVE_BYTES) {
            return Err(StoreError::Full(format!(
                "the state volume has {free} bytes free, a log segment takes {bytes}"
            )));
        }
        let path = dir.join(segment::file_name(number));
        let file = volume.create(&path, Access::Direct).doing(doing)?;
        let made = (|| {
            file.allocate(bytes).doing(doing)?;
            if fill {
                let zeros = AlignedBuf::zeroed(FILL_STEP);
                let mut at = 0;
                while at < bytes {
                    let step = zeros.len().min(usize::try_from(bytes - at).unwrap_or(FILL_STEP));
                    let part = zeros.get(..step).unwrap_or_default();
                    file.write_at(&[IoSlice::new(part)], at, false).doing(doing)?;
                    at += step as u64;
                }
            }
            file.sync().doing(doing)?;
            if mutants::is(Mutant::SegmentDirectoryNotSynced) {
                return Ok(());
            }
            volume.sync_dir(&dir).doing(doing)
        })();
        if made.is_err() {
            let _ = volume.remove(&path);
        }
        made.map(|()| (number, file))
    }
}
