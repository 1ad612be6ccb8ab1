//! The buffer a connection is read into: large gulps, handed out in slices without copying.
//!
//! A slice keeps its whole gulp alive. Therefore spent gulps are remembered until their last slice
//! is gone, and counted: past a cap small payloads are copied out instead, so that the memory that
//! slices pin stays bounded whatever pattern a client and a slow store make of it.

use std::collections::VecDeque;

use bytes::{Bytes, BytesMut};

/// Size of a gulp in bytes at first; it doubles when a read fills it, up to [`LARGEST`].
const SMALLEST: usize = 32 << 10;

/// A gulp of this many bytes takes some sixty writes of 4 KiB in one system call.
const LARGEST: usize = 256 << 10;

#[derive(Debug)]
pub(crate) struct Gulp {
    /// What was read and not yet handed out.
    pub(crate) bytes: BytesMut,
    size: usize,
    spent: VecDeque<BytesMut>,
    spent_max: usize,
}

impl Gulp {
    /// `pinned_max` is how many bytes of spent gulps may be alive; `bytes` what was read before.
    pub(crate) fn new(pinned_max: usize, bytes: BytesMut) -> Self {
        let spent_max = (pinned_max / LARGEST).max(1);
        Self { bytes, size: SMALLEST, spent: VecDeque::new(), spent_max }
    }

    /// Makes room for at least `wanted` more bytes in one piece, and usually for much more.
    pub(crate) fn make_room(&mut self, wanted: usize) {
        let length = self.bytes.len();
        let room = self.bytes.capacity() - length;
        if room >= wanted && room >= self.size / 4 {
            return;
        }
        let size = self.size.max(length + wanted);
        let free = self.take_free(size);
        if self.bytes.try_reclaim(size - length) {
            self.spent.extend(free);
            return;
        }
        let mut next = free.unwrap_or_else(|| BytesMut::with_capacity(size));
        next.extend_from_slice(&self.bytes);
        let mut old = std::mem::replace(&mut self.bytes, next);
        old.clear();
        if !self.is_full() {
            // The end of a gulp, without any room of its own, is enough to have all of it back.
            self.spent.push_back(old.split_off(old.capacity()));
        }
    }

    fn is_full(&self) -> bool {
        self.spent.len() >= self.spent_max
    }

    /// Forgets spent gulps nobody holds a slice of any more, but for one that is large enough.
    fn take_free(&mut self, size: usize) -> Option<BytesMut> {
        let mut free = None;
        self.spent.retain_mut(|gulp| {
            let pinned = !gulp.try_reclaim(1);
            if !pinned && gulp.capacity() >= size {
                free.get_or_insert_with(|| std::mem::take(gulp));
            }
            pinned
        });
        free
    }

    /// The last read has left no room: the next gulp may be larger.
    pub(crate) fn note_filled(&mut self) {
        if self.bytes.len() == self.bytes.capacity() {
            self.size = (self.size * 2).min(LARGEST);
        }
    }

    /// Hands out the next `length` bytes, of which there are enough.
    pub(crate) fn take(&mut self, length: usize) -> Bytes {
        let slice = self.bytes.split_to(length.min(self.bytes.len()));
        if self.is_full() { Bytes::copy_from_slice(&slice) } else { slice.freeze() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fill(gulp: &mut Gulp, count: usize) {
        gulp.make_room(count);
        let length = gulp.bytes.len() + count;
        gulp.bytes.resize(length, 7);
    }

    #[test]
    fn a_gulp_is_used_again_when_its_slices_are_gone() {
        let mut gulp = Gulp::new(64 << 20, BytesMut::with_capacity(4096));
        let mut addresses = std::collections::BTreeSet::new();
        let mut before = Bytes::new();
        for _ in 0..1000 {
            fill(&mut gulp, 4096);
            let slice = gulp.take(4096);
            addresses.insert(slice.as_ptr() as usize);
            // One slice is always held, as by a store that is at work.
            before = std::mem::replace(&mut before, slice).slice(..0);
        }
        assert!(gulp.spent.len() <= 1, "{} spent", gulp.spent.len());
        assert!(addresses.len() <= 3 * SMALLEST / 4096, "{} places", addresses.len());
    }

    #[test]
    fn slices_that_stay_pin_no_more_than_agreed() {
        let pinned_max = 4 * LARGEST;
        let mut gulp = Gulp::new(pinned_max, BytesMut::with_capacity(4096));
        let mut kept = Vec::new();
        // One slice of 512 bytes of every few stays: the worst a pattern can do.
        for round in 0..10_000 {
            fill(&mut gulp, 4096);
            gulp.note_filled();
            let (full, at) = (gulp.is_full(), gulp.bytes.as_ptr());
            let slice = gulp.take(512);
            assert_eq!(slice.as_ptr() != at, full, "copied when, and only when, at the cap");
            kept.push(slice);
            gulp.bytes.clear();
            assert!(gulp.spent.len() <= 4, "round {round}");
        }
        assert!(gulp.is_full());
        assert!(kept.iter().all(|slice| slice[..] == [7; 512]));
        // When they are gone, slices are handed out again.
        kept.clear();
        for _ in 0..100 {
            fill(&mut gulp, 4096);
            drop(gulp.take(4096));
        }
        assert!(gulp.spent.len() <= 1, "{} spent", gulp.spent.len());
    }

    /// Memory of gulps that is alive is what is remembered, and the one in use.
    #[test]
    fn small_gulps_from_before_are_not_kept_for_ever() {
        let mut gulp = Gulp::new(16 * LARGEST, BytesMut::with_capacity(4096));
        for round in 0..2000 {
            gulp.make_room(1);
            let room = gulp.bytes.capacity() - gulp.bytes.len();
            fill(&mut gulp, if round % 3 == 0 { room } else { room.min(1000) });
            gulp.note_filled();
            let length = gulp.bytes.len();
            drop(gulp.take(length));
        }
        assert!(gulp.spent.len() <= 1, "{} spent", gulp.spent.len());
    }

    #[test]
    fn a_gulp_grows_when_it_is_filled() {
        let mut gulp = Gulp::new(1 << 20, BytesMut::with_capacity(4096));
        for _ in 0..10 {
            gulp.make_room(1);
            let room = gulp.bytes.capacity() - gulp.bytes.len();
            fill(&mut gulp, room);
            gulp.note_filled();
            gulp.bytes.clear();
        }
        gulp.make_room(1);
        assert!(gulp.bytes.capacity() >= LARGEST);
    }

    #[test]
    fn what_was_read_survives_a_new_gulp() {
        let mut gulp = Gulp::new(1 << 20, BytesMut::from(&b"abc"[..]));
        gulp.make_room(LARGEST);
        assert_eq!(&gulp.bytes[..], b"abc");
        assert!(gulp.bytes.capacity() >= LARGEST);
    }
}
