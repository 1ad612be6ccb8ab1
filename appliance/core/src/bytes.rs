//! Little-endian cursors for the hand-written layouts. Reading past the end is an error value,
//! never a panic; writing always goes to the end of a vector.

use alloc::vec::Vec;

/// The bytes ended before the layout did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("ends after {have} bytes where {need} more are needed")]
pub struct Truncated {
    /// Bytes that were left.
    pub have: usize,
    /// Bytes that were asked for.
    pub need: usize,
}

/// Reads fixed-size fields from the front of a slice.
#[derive(Debug, Clone)]
pub struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    /// A reader over all of `bytes`.
    #[must_use]
    pub const fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    /// Bytes not yet read.
    #[must_use]
    pub const fn remaining(&self) -> usize {
        self.rest.len()
    }

    /// Whether everything was read.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }

    /// The next `len` bytes.
    ///
    /// # Errors
    /// [`Truncated`] when fewer are left.
    pub fn take(&mut self, len: usize) -> Result<&'a [u8], Truncated> {
        let Some((head, tail)) = self.rest.split_at_checked(len) else {
            return Err(Truncated { have: self.rest.len(), need: len });
        };
        self.rest = tail;
        Ok(head)
    }

    /// The next `N` bytes as an array.
    ///
    /// # Errors
    /// [`Truncated`] when fewer are left.
    pub fn array<const N: usize>(&mut self) -> Result<[u8; N], Truncated> {
        let Some((head, tail)) = self.rest.split_first_chunk::<N>() else {
            return Err(Truncated { have: self.rest.len(), need: N });
        };
        self.rest = tail;
        Ok(*head)
    }

    /// One byte.
    ///
    /// # Errors
    /// [`Truncated`] at the end.
    pub fn u8(&mut self) -> Result<u8, Truncated> {
        self.array::<1>().map(|[byte]| byte)
    }

    /// Two bytes.
    ///
    /// # Errors
    /// [`Truncated`] at the end.
    pub fn u16(&mut self) -> Result<u16, Truncated> {
        self.array().map(u16::from_le_bytes)
    }

    /// Four bytes.
    ///
    /// # Errors
    /// [`Truncated`] at the end.
    pub fn u32(&mut self) -> Result<u32, Truncated> {
        self.array().map(u32::from_le_bytes)
    }

    /// Eight bytes.
    ///
    /// # Errors
    /// [`Truncated`] at the end.
    pub fn u64(&mut self) -> Result<u64, Truncated> {
        self.array().map(u64::from_le_bytes)
    }

    /// Eight bytes, signed.
    ///
    /// # Errors
    /// [`Truncated`] at the end.
    pub fn i64(&mut self) -> Result<i64, Truncated> {
        self.array().map(i64::from_le_bytes)
    }
}

/// Appends fixed-size fields to a vector.
pub trait Writer {
    /// Appends bytes as they are.
    fn put(&mut self, bytes: &[u8]);

    /// Appends one byte.
    fn put_u8(&mut self, value: u8) {
        self.put(&[value]);
    }
    /// Appends two bytes.
    fn put_u16(&mut self, value: u16) {
        self.put(&value.to_le_bytes());
    }
    /// Appends four bytes.
    fn put_u32(&mut self, value: u32) {
        self.put(&value.to_le_bytes());
    }
    /// Appends eight bytes.
    fn put_u64(&mut self, value: u64) {
        self.put(&value.to_le_bytes());
    }
    /// Appends eight bytes, signed.
    fn put_i64(&mut self, value: i64) {
        self.put(&value.to_le_bytes());
    }
}

impl Writer for Vec<u8> {
    fn put(&mut self, bytes: &[u8]) {
        self.extend_from_slice(bytes);
    }
}

/// The checksum of content: XXH3, 64 bits, seed 0.
///
/// It finds what disks and links damage. It is no defence against a forger; the peer is
/// authenticated and the frame chain is cryptographic.
#[must_use]
pub fn content_sum(content: &[u8]) -> u64 {
    xxhash_rust::xxh3::xxh3_64(content)
}

/// Whether every byte is zero. Checks the ends first, so that data is told from zeros at once.
#[must_use]
pub fn is_zero(content: &[u8]) -> bool {
    // Words of 16 bytes let the compiler use vector compares without any unsafe code.
    let (chunks, rest) = content.as_chunks::<128>();
    if content.first().is_some_and(|b| *b != 0) || content.last().is_some_and(|b| *b != 0) {
        return false;
    }
    chunks.iter().all(|chunk| chunk.iter().fold(0u8, |acc, b| acc | b) == 0)
        && rest.iter().all(|b| *b == 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;

    #[test]
    fn reader_checks_every_length() {
        let mut reader = Reader::new(&[1, 2, 0, 3]);
        assert_eq!(reader.u8(), Ok(1));
        assert_eq!(reader.u16(), Ok(2));
        assert_eq!(reader.u32(), Err(Truncated { have: 1, need: 4 }));
        assert_eq!(reader.u8(), Ok(3));
        assert!(reader.is_empty());
        assert_eq!(reader.take(1), Err(Truncated { have: 0, need: 1 }));
    }

    #[test]
    fn zero_test_sees_every_byte() {
        for len in [0, 1, 127, 128, 129, 4096] {
            assert!(is_zero(&vec![0; len]));
            for at in 0..len {
                let mut bytes = vec![0; len];
                bytes[at] = 1;
                assert!(!is_zero(&bytes), "byte {at} of {len}");
            }
        }
    }

    #[test]
    fn content_sum_is_pinned() {
        // The value of the reference implementation for the empty input, seed 0.
        assert_eq!(content_sum(b""), 0x2d06_8005_38d3_94c2);
    }
}
