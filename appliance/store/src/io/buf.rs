//! Page-aligned memory for direct input and output, and a bounded pool of it.

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, PoisonError};

use bytemuck::{Pod, Zeroable};
use srn_core::limits::PAGE;

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(4096))]
struct Page([u8; PAGE]);

/// A buffer whose start is aligned to 4096 bytes and whose length is a multiple of that.
pub struct AlignedBuf {
    pages: Vec<Page>,
}

impl AlignedBuf {
    /// A zeroed buffer of at least `len` bytes.
    #[must_use]
    pub fn zeroed(len: usize) -> Self {
        Self { pages: vec![Page::zeroed(); len.div_ceil(PAGE)] }
    }
}

impl Deref for AlignedBuf {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        bytemuck::cast_slice(&self.pages)
    }
}

impl DerefMut for AlignedBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        bytemuck::cast_slice_mut(&mut self.pages)
    }
}

impl AsRef<[u8]> for AlignedBuf {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl fmt::Debug for AlignedBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AlignedBuf({} bytes)", self.len())
    }
}

/// Whether `bytes` may be handed to direct input and output as they are.
#[must_use]
pub fn is_aligned(bytes: &[u8]) -> bool {
    bytes.as_ptr().addr().is_multiple_of(PAGE) && bytes.len().is_multiple_of(PAGE)
}

/// Sizes that are kept: powers of two from 4 KiB to 2 MiB.
const CLASSES: usize = 10;

/// Keeps buffers that were given back, up to a cap, so that the write path neither maps nor faults
/// nor zeroes memory in its steady state.
#[derive(Clone, Debug)]
pub struct BufPool {
    inner: Arc<Mutex<Kept>>,
}

struct Kept {
    by_class: [Vec<AlignedBuf>; CLASSES],
    bytes: usize,
    bytes_max: usize,
}

impl fmt::Debug for Kept {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {} bytes kept", self.bytes, self.bytes_max)
    }
}

impl BufPool {
    /// A pool that keeps at most `bytes_max` bytes of idle buffers.
    #[must_use]
    pub fn new(bytes_max: usize) -> Self {
        let kept = Kept { by_class: Default::default(), bytes: 0, bytes_max };
        Self { inner: Arc::new(Mutex::new(kept)) }
    }

    /// A buffer of at least `len` bytes with unspecified content.
    #[must_use]
    pub fn take(&self, len: usize) -> PooledBuf {
        let kept = class(len).and_then(|class| {
            let mut kept = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
            let buf = kept.by_class.get_mut(class)?.pop()?;
            kept.bytes -= buf.len();
            Some(buf)
        });
        let size = class(len).map_or(len, |class| PAGE << class);
        let buf = kept.unwrap_or_else(|| AlignedBuf::zeroed(size));
        PooledBuf { buf: Some(buf), len, pool: self.inner.clone() }
    }
}

/// The smallest class whose buffers have `len` bytes.
fn class(len: usize) -> Option<usize> {
    (0..CLASSES).find(|class| PAGE << class >= len)
}

/// A buffer that goes back to its pool when dropped. Its length is what was asked for; the aligned
/// space behind that up to the next page is reachable by [`PooledBuf::padded_mut`].
pub struct PooledBuf {
    buf: Option<AlignedBuf>,
    len: usize,
    pool: Arc<Mutex<Kept>>,
}

impl PooledBuf {
    fn all(&self) -> &[u8] {
        self.buf.as_deref().unwrap_or_default()
    }

    fn all_mut(&mut self) -> &mut [u8] {
        self.buf.as_deref_mut().unwrap_or_default()
    }

    /// The buffer up to the next page boundary.
    #[must_use]
    pub fn padded(&self) -> &[u8] {
        self.all().get(..self.len.next_multiple_of(PAGE)).unwrap_or_default()
    }

    /// The buffer up to the next page boundary, for filling.
    pub fn padded_mut(&mut self) -> &mut [u8] {
        let end = self.len.next_multiple_of(PAGE);
        self.all_mut().get_mut(..end).unwrap_or_default()
    }

    /// Changes the length to at most what the buffer holds.
    pub fn set_len(&mut self, len: usize) {
        self.len = len.min(self.all().len());
    }

    /// Bytes that the buffer can hold.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.all().len()
    }
}

impl Deref for PooledBuf {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.all().get(..self.len).unwrap_or_default()
    }
}

impl DerefMut for PooledBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        let len = self.len;
        self.all_mut().get_mut(..len).unwrap_or_default()
    }
}

impl AsRef<[u8]> for PooledBuf {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl AsMut<[u8]> for PooledBuf {
    fn as_mut(&mut self) -> &mut [u8] {
        self
    }
}

impl fmt::Debug for PooledBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PooledBuf({} bytes)", self.len)
    }
}

impl Drop for PooledBuf {
    fn drop(&mut self) {
        let Some(buf) = self.buf.take() else { return };
        let Some(class) = class(buf.len()).filter(|class| PAGE << class == buf.len()) else {
            return;
        };
        let mut kept = self.pool.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.bytes + buf.len() <= kept.bytes_max {
            kept.bytes += buf.len();
            if let Some(list) = kept.by_class.get_mut(class) {
                list.push(buf);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_and_come_back() {
        let pool = BufPool::new(64 * 1024);
        for len in [1, 4096, 4097, 300_000, 3 << 20] {
            let buf = pool.take(len);
            assert_eq!(buf.len(), len);
            assert!(is_aligned(buf.padded()), "{len}");
            assert_eq!(buf.padded().len(), len.next_multiple_of(PAGE));
        }
        let kept = |pool: &BufPool| pool.inner.lock().unwrap().bytes;
        assert_eq!(kept(&pool), 4096 + 8192, "small ones came back, large ones exceed the cap");
        let held = pool.take(5000);
        assert_eq!(kept(&pool), 4096);
        drop(held);
        assert_eq!(kept(&pool), 4096 + 8192);
    }
}
