//! Page-aligned buffers for large payloads, kept for the next one.
//!
//! A fresh buffer costs a page fault for every 4 KiB; a kept one costs nothing. Aligned to 4096
//! bytes, so that a store may write it with O_DIRECT as it came.

use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;

/// Alignment of every buffer, in bytes.
pub(crate) const ALIGNMENT: usize = 4096;

/// The smallest buffer; each class is twice as large as the one before.
const SMALLEST: usize = 64 << 10;

/// Classes from 64 KiB to 64 MiB; what is larger is not kept.
const CLASSES: usize = 11;

/// A pool of buffers; clones share it.
#[derive(Debug, Clone)]
pub(crate) struct PayloadPool {
    shelf: Arc<Mutex<Shelf>>,
}

#[derive(Debug)]
struct Shelf {
    classes: [Vec<Box<[u8]>>; CLASSES],
    kept_bytes: usize,
    kept_max: usize,
}

/// A buffer of a pool that nobody else sees yet. Its content is arbitrary.
#[derive(Debug)]
pub(crate) struct PayloadBuffer {
    memory: Box<[u8]>,
    start: usize,
    length: usize,
    pool: PayloadPool,
}

impl PayloadPool {
    /// A pool that keeps at most `kept_max` bytes of unused buffers.
    pub(crate) fn new(kept_max: usize) -> Self {
        let shelf = Shelf { classes: std::array::from_fn(|_| Vec::new()), kept_bytes: 0, kept_max };
        Self { shelf: Arc::new(Mutex::new(shelf)) }
    }

    /// A buffer of `length` bytes.
    pub(crate) fn take(&self, length: usize) -> PayloadBuffer {
        let memory = self
            .take_kept(length)
            .unwrap_or_else(|| vec![0; class_bytes(length) + ALIGNMENT].into_boxed_slice());
        let start = memory.as_ptr().align_offset(ALIGNMENT).min(ALIGNMENT);
        PayloadBuffer { memory, start, length, pool: self.clone() }
    }

    fn take_kept(&self, length: usize) -> Option<Box<[u8]>> {
        let mut shelf = self.shelf.lock().unwrap_or_else(PoisonError::into_inner);
        let memory = shelf.classes.get_mut(class_index(length))?.pop()?;
        shelf.kept_bytes -= memory.len();
        Some(memory)
    }

    fn give_back(&self, memory: Box<[u8]>) {
        let mut shelf = self.shelf.lock().unwrap_or_else(PoisonError::into_inner);
        if shelf.kept_bytes + memory.len() > shelf.kept_max {
            return;
        }
        let added = memory.len();
        if let Some(class) = shelf.classes.get_mut(class_index(added - ALIGNMENT)) {
            class.push(memory);
            shelf.kept_bytes += added;
        }
    }
}

fn class_bytes(length: usize) -> usize {
    length.max(SMALLEST).next_power_of_two()
}

fn class_index(length: usize) -> usize {
    (class_bytes(length) / SMALLEST).trailing_zeros() as usize
}

impl PayloadBuffer {
    /// The filled buffer, to be shared; its memory goes back to the pool with the last clone.
    pub(crate) fn freeze(self) -> Bytes {
        Bytes::from_owner(self)
    }
}

impl AsRef<[u8]> for PayloadBuffer {
    fn as_ref(&self) -> &[u8] {
        self.memory.get(self.start..self.start + self.length).unwrap_or_default()
    }
}

impl AsMut<[u8]> for PayloadBuffer {
    fn as_mut(&mut self) -> &mut [u8] {
        self.memory.get_mut(self.start..self.start + self.length).unwrap_or_default()
    }
}

impl Drop for PayloadBuffer {
    fn drop(&mut self) {
        self.pool.give_back(std::mem::take(&mut self.memory));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_and_come_back() {
        let pool = PayloadPool::new(1 << 20);
        for length in [1, 65_536, 65_537, 1 << 20, (1 << 26) + 1] {
            let buffer = pool.take(length);
            assert_eq!(buffer.as_ref().len(), length);
            assert_eq!(buffer.as_ref().as_ptr().align_offset(ALIGNMENT), 0);
        }
        let mut first = pool.take(100_000);
        first.as_mut().fill(7);
        let address = first.as_ref().as_ptr();
        let shared = first.freeze();
        let clone = shared.slice(10..20);
        drop(shared);
        assert_ne!(pool.take(100_000).as_ref().as_ptr(), address, "still in use");
        assert_eq!(&clone[..], &[7; 10]);
        drop(clone);
        let again = pool.take(70_000);
        let other = pool.take(70_000);
        assert!([again.as_ref().as_ptr(), other.as_ref().as_ptr()].contains(&address));
    }

    #[test]
    fn no_more_is_kept_than_agreed() {
        let pool = PayloadPool::new(300 << 10);
        let many: Vec<_> = (0..16).map(|_| pool.take(64 << 10)).collect();
        drop(many);
        drop(pool.take(1 << 20));
        let kept = pool.shelf.lock().unwrap().kept_bytes;
        assert!(kept <= 300 << 10, "kept {kept}");
        assert!(kept >= 200 << 10, "kept {kept}");
    }
}
