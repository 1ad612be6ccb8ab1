//! Encoding of replies: the bytes a server puts in front of, and instead of, data.

use bytes::BufMut;

use super::constants::{
    CHUNK_HEADER_BYTES, CHUNK_MAGIC, SIMPLE_REPLY_MAGIC, allocation_flag, chunk,
};
use super::error_code::ErrorCode;
use super::wire::truncate_text;

/// The text beside an error is cut to this many bytes.
pub(super) const ERROR_TEXT_MAX: usize = 256;

/// A run of bytes with one allocation status.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StatusExtent {
    /// Bytes; not zero.
    pub length: u64,
    /// Not allocated: a write may find no space.
    pub hole: bool,
    /// Reads as zeroes.
    pub zero: bool,
}

impl StatusExtent {
    /// Allocated, content unknown.
    #[must_use]
    pub fn data(length: u64) -> Self {
        Self { length, hole: false, zero: false }
    }

    /// Not allocated, reads as zeroes.
    #[must_use]
    pub fn hole(length: u64) -> Self {
        Self { length, hole: true, zero: true }
    }

    /// Whether `other` differs in nothing but its length.
    #[must_use]
    pub fn same_status(&self, other: &Self) -> bool {
        (self.hole, self.zero) == (other.hole, other.zero)
    }

    /// The flags field of `base:allocation`.
    #[must_use]
    pub fn flags(&self) -> u32 {
        let hole = if self.hole { allocation_flag::HOLE } else { 0 };
        let zero = if self.zero { allocation_flag::ZERO } else { 0 };
        hole | zero
    }
}

/// Brings extents into the form a reply may have: merged, clipped to `length` bytes, at most
/// `most` of them (one at most if `most` is one). `None` if nothing is left to tell.
#[must_use]
pub fn tidy_extents(
    extents: &[StatusExtent],
    length: u32,
    most: usize,
) -> Option<Vec<StatusExtent>> {
    let mut tidy: Vec<StatusExtent> = Vec::with_capacity(extents.len().min(most));
    let mut room = u64::from(length);
    for extent in extents {
        let clipped = StatusExtent { length: extent.length.min(room), ..*extent };
        if clipped.length == 0 {
            continue;
        }
        let full = tidy.len() == most;
        match tidy.last_mut() {
            Some(last) if last.same_status(&clipped) => last.length += clipped.length,
            _ if full => break,
            _ => tidy.push(clipped),
        }
        room -= clipped.length;
    }
    (!tidy.is_empty()).then_some(tidy)
}

/// A simple reply without data; `None` is success.
pub fn put_simple(out: &mut Vec<u8>, cookie: u64, error: Option<ErrorCode>) {
    out.put_u32(SIMPLE_REPLY_MAGIC);
    out.put_u32(error.map_or(0, ErrorCode::to_wire));
    out.put_u64(cookie);
}

/// The end of a structured reply that needs no other last chunk.
pub fn put_done(out: &mut Vec<u8>, cookie: u64) {
    put_chunk_header(out, chunk::FLAG_DONE, chunk::NONE, cookie, 0);
}

/// A structured reply that is one error with a text for people.
pub fn put_error(out: &mut Vec<u8>, cookie: u64, code: ErrorCode, text: &str) {
    let text = truncate_text(text, ERROR_TEXT_MAX);
    let length = u16::try_from(text.len()).unwrap_or(0);
    put_chunk_header(out, chunk::FLAG_DONE, chunk::ERROR, cookie, 6 + u32::from(length));
    out.put_u32(code.to_wire());
    out.put_u16(length);
    out.put_slice(text.as_bytes());
}

/// The header of a chunk of `length` bytes of data; the data follows.
pub fn put_data_header(out: &mut Vec<u8>, cookie: u64, done: bool, offset: u64, length: u32) {
    // A payload is at most the maximum payload, far from where eight more bytes would overflow.
    put_chunk_header(out, done_flag(done), chunk::OFFSET_DATA, cookie, length.saturating_add(8));
    out.put_u64(offset);
}

/// A chunk for `length` bytes of zeroes.
pub fn put_hole(out: &mut Vec<u8>, cookie: u64, done: bool, offset: u64, length: u32) {
    put_chunk_header(out, done_flag(done), chunk::OFFSET_HOLE, cookie, 12);
    out.put_u64(offset);
    out.put_u32(length);
}

/// A whole reply to a block status request with one context. `extents` are tidy (see
/// [`tidy_extents`]), so that their lengths fit their fields.
pub fn put_status(out: &mut Vec<u8>, cookie: u64, context: u32, extents: &[StatusExtent]) {
    let length = u32::try_from(extents.len() * 8 + 4).unwrap_or(u32::MAX);
    put_chunk_header(out, chunk::FLAG_DONE, chunk::BLOCK_STATUS, cookie, length);
    out.put_u32(context);
    for extent in extents {
        out.put_u32(u32::try_from(extent.length).unwrap_or(u32::MAX));
        out.put_u32(extent.flags());
    }
}

fn done_flag(done: bool) -> u16 {
    if done { chunk::FLAG_DONE } else { 0 }
}

fn put_chunk_header(out: &mut Vec<u8>, flags: u16, kind: u16, cookie: u64, length: u32) {
    out.reserve(CHUNK_HEADER_BYTES);
    out.put_u32(CHUNK_MAGIC);
    out.put_u16(flags);
    out.put_u16(kind);
    out.put_u64(cookie);
    out.put_u32(length);
}

#[cfg(test)]
mod tests {
    use super::*;

    const COOKIE: u64 = 0x1122_3344_5566_7788;

    fn hex(write: impl FnOnce(&mut Vec<u8>)) -> String {
        let mut out = Vec::new();
        write(&mut out);
        out.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    #[test]
    fn reply_bytes_are_pinned() {
        assert_eq!(
            hex(|out| put_simple(out, COOKIE, None)),
            concat!("67446698", "00000000", "1122334455667788")
        );
        assert_eq!(
            hex(|out| put_simple(out, COOKIE, Some(ErrorCode::NoSpace))),
            concat!("67446698", "0000001c", "1122334455667788")
        );
        assert_eq!(
            hex(|out| put_done(out, COOKIE)),
            concat!("668e33ef", "0001", "0000", "1122334455667788", "00000000")
        );
        assert_eq!(
            hex(|out| put_error(out, COOKIE, ErrorCode::Io, "bad")),
            concat!("668e33ef", "0001", "8001", "1122334455667788", "00000009", "00000005", "0003")
                .to_owned()
                + "626164"
        );
        assert_eq!(
            hex(|out| put_data_header(out, COOKIE, false, 0x1000, 0x200)),
            concat!("668e33ef", "0000", "0001", "1122334455667788", "00000208").to_owned()
                + "0000000000001000"
        );
        assert_eq!(
            hex(|out| put_hole(out, COOKIE, true, 0x1000, 0x200)),
            concat!("668e33ef", "0001", "0002", "1122334455667788", "0000000c").to_owned()
                + "000000000000100000000200"
        );
        let extents = [StatusExtent::data(512), StatusExtent::hole(1024)];
        assert_eq!(
            hex(|out| put_status(out, COOKIE, 1, &extents)),
            concat!("668e33ef", "0001", "0005", "1122334455667788", "00000014", "00000001")
                .to_owned()
                + "00000200000000000000040000000003"
        );
    }

    #[test]
    fn extents_are_merged_clipped_and_counted() {
        let (data, hole) = (StatusExtent::data, StatusExtent::hole);
        let tidy = |extents: &[StatusExtent], length, most| tidy_extents(extents, length, most);
        assert_eq!(tidy(&[data(1), data(2), hole(4)], 7, 9), Some(vec![data(3), hole(4)]));
        assert_eq!(tidy(&[data(1), data(2), hole(4)], 7, 1), Some(vec![data(3)]));
        assert_eq!(tidy(&[data(1), hole(9)], 4, 9), Some(vec![data(1), hole(3)]));
        assert_eq!(tidy(&[hole(u64::MAX), hole(u64::MAX)], u32::MAX, 9), {
            Some(vec![hole(u64::from(u32::MAX))])
        });
        assert_eq!(tidy(&[data(0), hole(2), data(0), hole(2)], 8, 9), Some(vec![hole(4)]));
        assert_eq!(tidy(&[], 8, 9), None);
        assert_eq!(tidy(&[data(0)], 8, 9), None);
    }
}
