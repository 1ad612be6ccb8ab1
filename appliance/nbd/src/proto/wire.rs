//! Reading fields off received bytes without ever trusting a length.
//!
//! A short input is an ordinary answer (`None`), never a panic; nothing here knows what a field
//! means.

/// A cursor over received bytes; each take either yields a whole field or nothing.
#[derive(Debug, Clone)]
pub(crate) struct Fields<'a> {
    rest: &'a [u8],
}

impl<'a> Fields<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    pub(crate) fn take_u16(&mut self) -> Option<u16> {
        self.take_array().map(u16::from_be_bytes)
    }

    pub(crate) fn take_u32(&mut self) -> Option<u32> {
        self.take_array().map(u32::from_be_bytes)
    }

    pub(crate) fn take_u64(&mut self) -> Option<u64> {
        self.take_array().map(u64::from_be_bytes)
    }

    /// The next `length` bytes; `length` may be anything a peer sent.
    pub(crate) fn take_bytes(&mut self, length: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.rest.split_at_checked(length)?;
        self.rest = rest;
        Some(taken)
    }

    /// Like [`Fields::take_bytes`] with a length field as it stands on the wire.
    pub(crate) fn take_bytes_u32(&mut self, length: u32) -> Option<&'a [u8]> {
        self.take_bytes(usize::try_from(length).ok()?)
    }

    pub(crate) fn rest(self) -> &'a [u8] {
        self.rest
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }

    fn take_array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (taken, rest) = self.rest.split_first_chunk()?;
        self.rest = rest;
        Some(*taken)
    }
}

/// The longest prefix of `text` of at most `cap` bytes that does not split a character.
pub(crate) fn truncate_text(text: &str, cap: usize) -> &str {
    if text.len() <= cap {
        return text;
    }
    let mut end = cap;
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.get(..end).unwrap_or("")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_is_whole_or_absent() {
        let mut fields = Fields::new(&[0, 1, 0, 0, 0, 2, 9, 9]);
        assert_eq!(fields.take_u16(), Some(1));
        assert_eq!(fields.take_u32(), Some(2));
        assert_eq!(fields.take_u32(), None);
        assert_eq!(fields.take_u64(), None);
        assert_eq!(fields.take_bytes(3), None);
        assert_eq!(fields.take_bytes_u32(u32::MAX), None);
        assert_eq!(fields.take_bytes(2), Some(&[9, 9][..]));
        assert!(fields.is_empty());
    }

    #[test]
    fn text_is_cut_between_characters() {
        assert_eq!(truncate_text("abc", 8), "abc");
        assert_eq!(truncate_text("abc", 2), "ab");
        assert_eq!(truncate_text("a\u{e9}b", 2), "a");
        assert_eq!(truncate_text("\u{1f600}", 3), "");
    }
}
