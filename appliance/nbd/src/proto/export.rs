//! What an export is and can do, and how that is put on the wire.
//!
//! Shared by both sides: the server fills an [`ExportInfo`] and encodes it, the client decodes one.

use super::constants::{
    DEFAULT_MAXIMUM_PAYLOAD, MINIMUM_BLOCK_CAP, STRING_MAX, transmission_flag as flag,
};

/// The size constraints of an export, all in bytes (protocol document, "Size constraints").
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockSizes {
    /// Smallest addressable length and alignment: a power of two, at most 65,536.
    pub minimum: u32,
    /// From here on aligned requests are efficient: a power of two, at least `minimum` and 512.
    pub preferred: u32,
    /// Longest payload of one request, at least `preferred`.
    pub maximum: u32,
}

impl BlockSizes {
    /// What holds when a peer negotiated nothing.
    pub const UNNEGOTIATED: Self =
        Self { minimum: 1, preferred: 4096, maximum: DEFAULT_MAXIMUM_PAYLOAD };

    /// Whether the three values obey the protocol document.
    #[must_use]
    pub fn are_lawful(&self) -> bool {
        self.minimum.is_power_of_two()
            && self.minimum <= MINIMUM_BLOCK_CAP
            && self.preferred.is_power_of_two()
            && self.preferred >= self.minimum.max(512)
            && self.maximum >= self.preferred
    }
}

impl Default for BlockSizes {
    /// Sectors of 512 bytes, 4 KiB preferred, 32 MiB a request.
    fn default() -> Self {
        Self { minimum: 512, preferred: 4096, maximum: DEFAULT_MAXIMUM_PAYLOAD }
    }
}

/// Everything a client may learn of an export before it uses it.
///
/// `NBD_FLAG_SEND_DF` has no field: a server that speaks structured replies always offers it,
/// because it joins the parts of a reply itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExportInfo {
    /// Size in bytes; a multiple of the minimum block size, at most `i64::MAX`.
    pub size: u64,
    /// Writes, zeroes and trims are refused with `EPERM`.
    pub read_only: bool,
    /// `FLUSH` is offered.
    pub can_flush: bool,
    /// The FUA flag is offered.
    pub can_fua: bool,
    /// `TRIM` is offered.
    pub can_trim: bool,
    /// `WRITE_ZEROES` is offered.
    pub can_write_zeroes: bool,
    /// `WRITE_ZEROES` with the FAST_ZERO flag is offered (only together with `can_write_zeroes`).
    pub can_fast_zero: bool,
    /// `CACHE` is offered.
    pub can_cache: bool,
    /// A flush on one connection covers what was answered on all of them.
    pub multi_conn: bool,
    /// The medium rotates.
    pub rotational: bool,
    /// Block status by `base:allocation` is offered.
    pub allocation: bool,
    /// Size constraints.
    pub block_sizes: BlockSizes,
    /// Text for people; may be empty.
    pub description: String,
}

impl ExportInfo {
    /// A writable export of `size` bytes that can do everything but promise more than one
    /// connection.
    #[must_use]
    pub fn writable(size: u64) -> Self {
        Self {
            size,
            read_only: false,
            can_flush: true,
            can_fua: true,
            can_trim: true,
            can_write_zeroes: true,
            can_fast_zero: false,
            can_cache: false,
            multi_conn: false,
            rotational: false,
            allocation: true,
            block_sizes: BlockSizes::default(),
            description: String::new(),
        }
    }

    /// A read-only export of `size` bytes; any number of connections may read it.
    #[must_use]
    pub fn read_only(size: u64) -> Self {
        Self { read_only: true, multi_conn: true, ..Self::writable(size) }
    }

    /// Checks what a backend says of an export before a client hears it.
    ///
    /// # Errors
    /// Names the first rule of the protocol document that is broken.
    pub fn check(&self) -> Result<(), UnlawfulExport> {
        if !self.block_sizes.are_lawful() {
            return Err(UnlawfulExport::BlockSizes(self.block_sizes));
        }
        if i64::try_from(self.size).is_err() {
            return Err(UnlawfulExport::Size(self.size));
        }
        if !self.size.is_multiple_of(u64::from(self.block_sizes.minimum)) {
            return Err(UnlawfulExport::Tail {
                size: self.size,
                minimum: self.block_sizes.minimum,
            });
        }
        if self.description.len() > STRING_MAX {
            return Err(UnlawfulExport::Description(self.description.len()));
        }
        Ok(())
    }

    /// The transmission flags to send; `structured` says whether structured replies were agreed.
    #[must_use]
    pub fn transmission_flags(&self, structured: bool) -> u16 {
        let writable = !self.read_only;
        let zeroes = writable && self.can_write_zeroes;
        [
            (true, flag::HAS_FLAGS),
            (self.read_only, flag::READ_ONLY),
            (self.can_flush, flag::SEND_FLUSH),
            (self.can_fua, flag::SEND_FUA),
            (self.rotational, flag::ROTATIONAL),
            (writable && self.can_trim, flag::SEND_TRIM),
            (zeroes, flag::SEND_WRITE_ZEROES),
            (structured, flag::SEND_DF),
            (self.multi_conn, flag::CAN_MULTI_CONN),
            (self.can_cache, flag::SEND_CACHE),
            (zeroes && self.can_fast_zero, flag::SEND_FAST_ZERO),
        ]
        .into_iter()
        .fold(0, |flags, (set, bit)| if set { flags | bit } else { flags })
    }

    /// What a client makes of the size and flags a server sent.
    pub(crate) fn from_wire(size: u64, flags: u16, block_sizes: BlockSizes) -> Self {
        let has = |bit| flags & bit != 0;
        Self {
            size,
            read_only: has(flag::READ_ONLY),
            can_flush: has(flag::SEND_FLUSH),
            can_fua: has(flag::SEND_FUA),
            can_trim: has(flag::SEND_TRIM),
            can_write_zeroes: has(flag::SEND_WRITE_ZEROES),
            can_fast_zero: has(flag::SEND_FAST_ZERO),
            can_cache: has(flag::SEND_CACHE),
            multi_conn: has(flag::CAN_MULTI_CONN),
            rotational: has(flag::ROTATIONAL),
            allocation: false,
            block_sizes,
            description: String::new(),
        }
    }
}

/// A backend described an export in a way no client could use: our own fault.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UnlawfulExport {
    /// Not powers of two, or out of order.
    #[error("unlawful block sizes {0:?}")]
    BlockSizes(BlockSizes),
    /// More than `i64::MAX` bytes.
    #[error("size {0} does not fit a signed 64-bit number")]
    Size(u64),
    /// The last bytes could not be addressed.
    #[error("size {size} is no multiple of the minimum block size {minimum}")]
    Tail {
        /// Size in bytes.
        size: u64,
        /// Minimum block size in bytes.
        minimum: u32,
    },
    /// Longer than the protocol's string limit.
    #[error("description of {0} bytes is longer than 4096")]
    Description(usize),
}

/// One line of an export list.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ExportSummary {
    /// The name a client asks for.
    pub name: String,
    /// Text for people; may be empty.
    pub description: String,
}

/// Why an export is not given to this client.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// There is no such export (or this client shall not learn that there is).
    #[error("no such export")]
    NotFound,
    /// The client may not have it; the text is shown to the client.
    #[error("not permitted: {0}")]
    Policy(String),
    /// Somebody else has it; the text is shown to the client.
    #[error("in use: {0}")]
    Busy(String),
    /// It exists and cannot be had now; the text is shown to the client.
    #[error("not available: {0}")]
    Unavailable(String),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_say_what_the_export_can_do() {
        let info = ExportInfo::writable(1 << 20);
        assert_eq!(info.transmission_flags(false), 0b0000_0000_0110_1101);
        assert_eq!(info.transmission_flags(true), 0b0000_0000_1110_1101);
        let reader =
            ExportInfo { can_fast_zero: true, can_cache: true, ..ExportInfo::read_only(0) };
        assert_eq!(reader.transmission_flags(true), 0b0000_0101_1000_1111);
    }

    #[test]
    fn flags_survive_the_wire() {
        let info = ExportInfo {
            can_fast_zero: true,
            can_cache: true,
            multi_conn: true,
            rotational: true,
            allocation: false,
            ..ExportInfo::writable(4096)
        };
        let flags = info.transmission_flags(true);
        assert_eq!(ExportInfo::from_wire(4096, flags, info.block_sizes), info);
    }

    #[test]
    fn unlawful_exports_are_named() {
        let with = |size, minimum, preferred, maximum| {
            ExportInfo {
                block_sizes: BlockSizes { minimum, preferred, maximum },
                ..ExportInfo::writable(size)
            }
            .check()
        };
        assert_eq!(with(1024, 512, 4096, 1 << 25), Ok(()));
        assert_eq!(with(1023, 1, 512, 512), Ok(()));
        assert!(matches!(with(1024, 0, 4096, 1 << 25), Err(UnlawfulExport::BlockSizes(_))));
        assert!(matches!(with(1024, 513, 4096, 1 << 25), Err(UnlawfulExport::BlockSizes(_))));
        assert!(matches!(
            with(1024, 1 << 17, 1 << 17, 1 << 25),
            Err(UnlawfulExport::BlockSizes(_))
        ));
        assert!(matches!(with(1024, 1, 256, 1 << 25), Err(UnlawfulExport::BlockSizes(_))));
        assert!(matches!(with(1024, 512, 4096, 2048), Err(UnlawfulExport::BlockSizes(_))));
        assert!(matches!(with(1000, 512, 4096, 1 << 25), Err(UnlawfulExport::Tail { .. })));
        assert!(matches!(with(1 << 63, 512, 4096, 1 << 25), Err(UnlawfulExport::Size(_))));
    }
}
