//! Requests: the header on the wire, and whether an export permits one.
//!
//! [`RequestHeader::judge`] is the only place that knows the rules of ranges, alignment and flags,
//! so that a backend never sees a request that breaks one.

use bytes::BufMut;

use super::constants::{REQUEST_HEADER_BYTES, REQUEST_MAGIC, command, command_flag};
use super::error_code::ErrorCode;
use super::handshake::Session;
use super::wire::Fields;

/// The header of a request, as sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RequestHeader {
    /// Command flags.
    pub flags: u16,
    /// Request type, perhaps unknown.
    pub command: u16,
    /// The client's name for the request; opaque.
    pub cookie: u64,
    /// First byte of the range.
    pub offset: u64,
    /// Bytes of the range, and of the payload of a write.
    pub length: u32,
}

/// A client lost its place in the stream: nothing it sends can be understood any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("client sent {0:#010x} where a request should start")]
pub struct RequestMagic(pub u32);

/// A request an export permits. Ranges lie within the export and on block boundaries; lengths are
/// in bytes and never zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// Read; `unfragmented` asks for one piece.
    Read {
        /// First byte.
        offset: u64,
        /// Bytes.
        length: u32,
        /// The reply must be one piece.
        unfragmented: bool,
    },
    /// Write; the payload follows.
    Write {
        /// First byte.
        offset: u64,
        /// Bytes.
        length: u32,
        /// Answer only when durable.
        fua: bool,
    },
    /// Write zeroes.
    WriteZeroes {
        /// First byte.
        offset: u64,
        /// Bytes.
        length: u32,
        /// Keep the range allocated.
        no_hole: bool,
        /// Fail with [`ErrorCode::NotSupported`] rather than be as slow as a write.
        fast: bool,
        /// Answer only when durable.
        fua: bool,
    },
    /// Forget the range.
    Trim {
        /// First byte.
        offset: u64,
        /// Bytes.
        length: u32,
        /// Answer only when durable.
        fua: bool,
    },
    /// Make all answered writes durable.
    Flush,
    /// The range will be read soon.
    Cache {
        /// First byte.
        offset: u64,
        /// Bytes.
        length: u32,
    },
    /// Tell which parts of the range are allocated.
    BlockStatus {
        /// First byte.
        offset: u64,
        /// Bytes.
        length: u32,
        /// One extent only.
        one: bool,
    },
}

/// What to do with a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Hand it to the export.
    Run(Operation),
    /// It asks for nothing: answer success.
    Nothing,
    /// Answer this error. The payload of a write is still to be consumed.
    Refuse(ErrorCode, &'static str),
    /// The client said goodbye: answer what is in flight, then close.
    Disconnect,
}

impl RequestHeader {
    /// Decodes the header at the start of `input`; `None` if it is not whole yet.
    ///
    /// # Errors
    /// [`RequestMagic`] when this is no request.
    pub fn decode(input: &[u8]) -> Result<Option<Self>, RequestMagic> {
        let Some(header) = input.first_chunk::<REQUEST_HEADER_BYTES>() else {
            return Ok(None);
        };
        let mut fields = Fields::new(header);
        let mut decode = || {
            let magic = fields.take_u32()?;
            let header = Self {
                flags: fields.take_u16()?,
                command: fields.take_u16()?,
                cookie: fields.take_u64()?,
                offset: fields.take_u64()?,
                length: fields.take_u32()?,
            };
            Some((magic, header))
        };
        match decode() {
            Some((REQUEST_MAGIC, header)) => Ok(Some(header)),
            Some((magic, _)) => Err(RequestMagic(magic)),
            None => Ok(None),
        }
    }

    /// Appends the header to `out`.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.put_u32(REQUEST_MAGIC);
        out.put_u16(self.flags);
        out.put_u16(self.command);
        out.put_u64(self.cookie);
        out.put_u64(self.offset);
        out.put_u32(self.length);
    }

    /// How many bytes of payload follow the header.
    #[must_use]
    pub fn payload(&self) -> u32 {
        if self.command == command::WRITE { self.length } else { 0 }
    }

    /// Decides what to do with the request.
    #[must_use]
    pub fn judge(&self, session: &Session) -> Verdict {
        if self.command == command::DISC {
            return Verdict::Disconnect;
        }
        let export = &session.export;
        let writes = matches!(self.command, command::WRITE | command::WRITE_ZEROES | command::TRIM);
        if writes && export.read_only {
            return Verdict::Refuse(ErrorCode::NotPermitted, "export is read-only");
        }
        let Some(permitted) = permitted_flags(self.command, session) else {
            return Verdict::Refuse(ErrorCode::Invalid, "command is not offered");
        };
        if self.flags & !permitted != 0 {
            return Verdict::Refuse(ErrorCode::Invalid, "command flags are not offered");
        }
        if self.command == command::FLUSH {
            return if self.offset == 0 && self.length == 0 {
                Verdict::Run(Operation::Flush)
            } else {
                Verdict::Refuse(ErrorCode::Invalid, "flush with a range")
            };
        }
        if let Err((code, message)) = self.check_range(session) {
            return Verdict::Refuse(code, message);
        }
        if self.length > 0 {
            return self.operation();
        }
        if self.command == command::BLOCK_STATUS {
            // A successful answer must hold an extent of at least one byte.
            return Verdict::Refuse(ErrorCode::Invalid, "block status of nothing");
        }
        Verdict::Nothing
    }

    fn check_range(&self, session: &Session) -> Result<(), (ErrorCode, &'static str)> {
        let export = &session.export;
        let carries_payload = matches!(self.command, command::READ | command::WRITE);
        if carries_payload && self.length > export.block_sizes.maximum {
            return Err((ErrorCode::Invalid, "longer than the maximum payload"));
        }
        let end = self.offset.checked_add(u64::from(self.length));
        if end.is_none_or(|end| end > export.size) {
            let code = match self.command {
                command::WRITE | command::WRITE_ZEROES => ErrorCode::NoSpace,
                _ => ErrorCode::Invalid,
            };
            return Err((code, "range is past the end of the export"));
        }
        let minimum = export.block_sizes.minimum;
        let aligned =
            self.offset.is_multiple_of(u64::from(minimum)) && self.length.is_multiple_of(minimum);
        if aligned { Ok(()) } else { Err((ErrorCode::Invalid, "range is not on block boundaries")) }
    }

    fn operation(&self) -> Verdict {
        let (offset, length) = (self.offset, self.length);
        let has = |bit| self.flags & bit != 0;
        let fua = has(command_flag::FUA);
        Verdict::Run(match self.command {
            command::READ => {
                Operation::Read { offset, length, unfragmented: has(command_flag::DF) }
            }
            command::WRITE => Operation::Write { offset, length, fua },
            command::WRITE_ZEROES => Operation::WriteZeroes {
                offset,
                length,
                no_hole: has(command_flag::NO_HOLE),
                fast: has(command_flag::FAST_ZERO),
                fua,
            },
            command::TRIM => Operation::Trim { offset, length, fua },
            command::CACHE => Operation::Cache { offset, length },
            command::BLOCK_STATUS => {
                Operation::BlockStatus { offset, length, one: has(command_flag::REQ_ONE) }
            }
            _ => return Verdict::Refuse(ErrorCode::Invalid, "command is not known"),
        })
    }
}

/// The flags a command may carry in this session; `None` if the command itself was not offered.
fn permitted_flags(command: u16, session: &Session) -> Option<u16> {
    let export = &session.export;
    let when = |condition: bool, flags: u16| if condition { flags } else { 0 };
    // Known clients set FUA on commands that write nothing; the document has us accept that.
    let fua = when(export.can_fua, command_flag::FUA);
    match command {
        command::READ => Some(fua | when(session.structured, command_flag::DF)),
        command::WRITE => Some(fua),
        command::FLUSH if export.can_flush => Some(fua),
        command::TRIM if export.can_trim => Some(fua),
        command::CACHE if export.can_cache => Some(fua),
        command::WRITE_ZEROES if export.can_write_zeroes => {
            let fast = when(export.can_fast_zero, command_flag::FAST_ZERO);
            Some(fua | command_flag::NO_HOLE | fast)
        }
        command::BLOCK_STATUS if session.allocation => Some(fua | command_flag::REQ_ONE),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::super::export::{BlockSizes, ExportInfo};
    use super::*;

    const HEADER: [u8; 28] = [
        0x25, 0x60, 0x95, 0x13, // magic
        0x00, 0x01, // FUA
        0x00, 0x01, // WRITE
        0x01, 0x02, 0x03, 0x04, 0x05, 0x06, 0x07, 0x08, // cookie
        0x00, 0x00, 0x00, 0x01, 0x00, 0x00, 0x10, 0x00, // offset
        0x00, 0x00, 0x20, 0x00, // length
    ];

    #[test]
    fn header_bytes_are_pinned() {
        let header = RequestHeader {
            flags: command_flag::FUA,
            command: command::WRITE,
            cookie: 0x0102_0304_0506_0708,
            offset: 0x1_0000_1000,
            length: 0x2000,
        };
        let mut bytes = Vec::new();
        header.encode(&mut bytes);
        assert_eq!(bytes, HEADER);
        assert_eq!(RequestHeader::decode(&HEADER), Ok(Some(header)));
        assert_eq!(RequestHeader::decode(&HEADER[..27]), Ok(None));
        let mut wrong = HEADER;
        wrong[3] = 0x14;
        assert_eq!(RequestHeader::decode(&wrong), Err(RequestMagic(0x2560_9514)));
    }

    fn session() -> Session {
        let export = ExportInfo {
            block_sizes: BlockSizes { minimum: 512, preferred: 4096, maximum: 1 << 20 },
            ..ExportInfo::writable(1 << 30)
        };
        Session { export, structured: true, allocation: true }
    }

    fn judge_in(session: &Session, command: u16, flags: u16, offset: u64, length: u32) -> Verdict {
        RequestHeader { flags, command, cookie: 7, offset, length }.judge(session)
    }

    fn refusal(session: &Session, command: u16, flags: u16, offset: u64, length: u32) -> ErrorCode {
        match judge_in(session, command, flags, offset, length) {
            Verdict::Refuse(code, _) => code,
            other => panic!("expected a refusal, got {other:?}"),
        }
    }

    #[test]
    fn permitted_requests() {
        let judge =
            |command, flags, offset, length| judge_in(&session(), command, flags, offset, length);
        let (offset, length) = (512, 1024);
        let cases = [
            (command::READ, 4, Operation::Read { offset, length, unfragmented: true }),
            (command::READ, 1, Operation::Read { offset, length, unfragmented: false }),
            (command::WRITE, 1, Operation::Write { offset, length, fua: true }),
            (command::TRIM, 0, Operation::Trim { offset, length, fua: false }),
            (
                command::WRITE_ZEROES,
                3,
                Operation::WriteZeroes { offset, length, no_hole: true, fast: false, fua: true },
            ),
            (command::BLOCK_STATUS, 8, Operation::BlockStatus { offset, length, one: true }),
        ];
        for (command, flags, expected) in cases {
            assert_eq!(judge(command, flags, offset, length), Verdict::Run(expected));
        }
        assert_eq!(judge(command::FLUSH, 0, 0, 0), Verdict::Run(Operation::Flush));
        assert_eq!(judge(command::DISC, 0xffff, 1, 1), Verdict::Disconnect);
        // Zeroing and trimming carry no payload, so the maximum payload does not bind them.
        let whole = judge(command::WRITE_ZEROES, 0, 0, 1 << 30);
        assert!(matches!(whole, Verdict::Run(Operation::WriteZeroes { .. })), "{whole:?}");
    }

    #[test]
    fn ranges() {
        let session = session();
        let (read, write, zeroes) = (command::READ, command::WRITE, command::WRITE_ZEROES);
        let size = 1u64 << 30;
        for (command, code) in [
            (read, ErrorCode::Invalid),
            (write, ErrorCode::NoSpace),
            (zeroes, ErrorCode::NoSpace),
            (command::TRIM, ErrorCode::Invalid),
            (command::BLOCK_STATUS, ErrorCode::Invalid),
        ] {
            assert_eq!(refusal(&session, command, 0, size, 512), code);
            assert_eq!(refusal(&session, command, 0, size - 512, 1024), code);
            assert_eq!(refusal(&session, command, 0, u64::MAX - 511, 512), code);
            assert_eq!(refusal(&session, command, 0, u64::MAX - 511, 1024), code);
            assert_eq!(refusal(&session, command, 0, 511, 512), ErrorCode::Invalid);
            assert_eq!(refusal(&session, command, 0, 512, 513), ErrorCode::Invalid);
        }
        assert_eq!(refusal(&session, read, 0, 0, (1 << 20) + 512), ErrorCode::Invalid);
        assert_eq!(refusal(&session, write, 0, 0, u32::MAX), ErrorCode::Invalid);
        let last = judge_in(&session, write, 0, size - 512, 512);
        assert!(matches!(last, Verdict::Run(_)), "{last:?}");
    }

    #[test]
    fn nothing_is_asked() {
        let session = session();
        for command in [command::READ, command::WRITE, command::TRIM, command::WRITE_ZEROES] {
            assert_eq!(judge_in(&session, command, 0, 512, 0), Verdict::Nothing);
        }
        assert_eq!(refusal(&session, command::BLOCK_STATUS, 0, 0, 0), ErrorCode::Invalid);
        assert_eq!(refusal(&session, command::READ, 0, 1 << 31, 0), ErrorCode::Invalid);
    }

    #[test]
    fn flags_and_commands_nobody_offered() {
        let full = session();
        for (command, flags) in [
            (command::READ, command_flag::REQ_ONE),
            (command::WRITE, command_flag::DF),
            (command::WRITE, command_flag::NO_HOLE),
            (command::TRIM, command_flag::NO_HOLE),
            (command::WRITE_ZEROES, command_flag::FAST_ZERO),
            (command::BLOCK_STATUS, command_flag::DF),
            (command::READ, 1 << 5),
            (command::FLUSH, 1 << 15),
            (command::CACHE, 0),
            (8, 0),
            (0xffff, 0),
        ] {
            assert_eq!(refusal(&full, command, flags, 0, 512), ErrorCode::Invalid, "{command}");
        }
        assert_eq!(refusal(&full, command::FLUSH, 0, 0, 512), ErrorCode::Invalid);
        assert_eq!(refusal(&full, command::FLUSH, 0, 512, 0), ErrorCode::Invalid);

        let mut bare = Session { structured: false, allocation: false, ..full };
        bare.export.can_flush = false;
        bare.export.can_fua = false;
        bare.export.can_trim = false;
        bare.export.can_write_zeroes = false;
        for command in [command::FLUSH, command::TRIM, command::WRITE_ZEROES, command::BLOCK_STATUS]
        {
            assert_eq!(refusal(&bare, command, 0, 0, 0), ErrorCode::Invalid);
        }
        assert_eq!(refusal(&bare, command::WRITE, 1, 0, 512), ErrorCode::Invalid);
        assert_eq!(refusal(&bare, command::READ, 4, 0, 512), ErrorCode::Invalid);
    }

    #[test]
    fn a_read_only_export_refuses_writes_before_anything_else() {
        let mut session = session();
        session.export.read_only = true;
        for command in [command::WRITE, command::WRITE_ZEROES, command::TRIM] {
            let code = refusal(&session, command, 0xffff, u64::MAX, u32::MAX);
            assert_eq!(code, ErrorCode::NotPermitted);
        }
        let read = judge_in(&session, command::READ, 0, 0, 512);
        assert!(matches!(read, Verdict::Run(_)), "{read:?}");
    }
}
