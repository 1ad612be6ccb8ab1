//! The numbers of the NBD protocol, named as its document names them.
//!
//! Source: `doc/proto.md` of the NetworkBlockDevice/nbd repository. This module holds values only;
//! what they mean together is decided by its siblings.

/// First eight bytes a server sends, ASCII `NBDMAGIC`.
pub const NBD_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// Second eight bytes of a newstyle server and the start of every option, ASCII `IHAVEOPT`.
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// Second eight bytes of an oldstyle server, whose dialect nobody should speak any more.
pub const OLDSTYLE_MAGIC: u64 = 0x0000_4202_8186_1253;
/// Start of every reply to an option.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Start of every request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// Start of a simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// Start of a structured reply chunk.
pub const CHUNK_MAGIC: u32 = 0x668e_33ef;

/// The port IANA assigned to NBD.
pub const DEFAULT_PORT: u16 = 10809;
/// The longest string (export name, message, context name) the protocol permits, in bytes.
pub const STRING_MAX: usize = 4096;
/// The payload every client may send when no constraint was negotiated, in bytes.
pub const DEFAULT_MAXIMUM_PAYLOAD: u32 = 32 << 20;
/// The largest minimum block size that may be advertised, in bytes.
pub const MINIMUM_BLOCK_CAP: u32 = 65_536;
/// Length of a request header, in bytes.
pub const REQUEST_HEADER_BYTES: usize = 28;
/// Length of a simple reply header, in bytes.
pub const SIMPLE_REPLY_BYTES: usize = 16;
/// Length of a structured reply chunk header, in bytes.
pub const CHUNK_HEADER_BYTES: usize = 20;
/// The reserved zeroes after the answer to `NBD_OPT_EXPORT_NAME`, in bytes.
pub const EXPORT_NAME_PADDING: usize = 124;
/// The most extents one block status chunk should carry.
pub const STATUS_EXTENTS_MAX: usize = 1 << 20;
/// Name of the one metadata context the protocol itself defines.
pub const BASE_ALLOCATION: &str = "base:allocation";

/// Handshake flags (server) and client flags share these bits.
pub mod handshake_flag {
    /// Fixed newstyle negotiation is spoken.
    pub const FIXED_NEWSTYLE: u16 = 1 << 0;
    /// The padding after `NBD_OPT_EXPORT_NAME` may be left out.
    pub const NO_ZEROES: u16 = 1 << 1;
}

/// Transmission flags: what an export can do.
pub mod transmission_flag {
    /// Always set.
    pub const HAS_FLAGS: u16 = 1 << 0;
    /// Writes are refused.
    pub const READ_ONLY: u16 = 1 << 1;
    /// `NBD_CMD_FLUSH` is understood.
    pub const SEND_FLUSH: u16 = 1 << 2;
    /// `NBD_CMD_FLAG_FUA` is understood.
    pub const SEND_FUA: u16 = 1 << 3;
    /// The medium rotates.
    pub const ROTATIONAL: u16 = 1 << 4;
    /// `NBD_CMD_TRIM` is understood.
    pub const SEND_TRIM: u16 = 1 << 5;
    /// `NBD_CMD_WRITE_ZEROES` and `NBD_CMD_FLAG_NO_HOLE` are understood.
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    /// `NBD_CMD_FLAG_DF` is understood.
    pub const SEND_DF: u16 = 1 << 7;
    /// A flush on one connection covers what was answered on all of them.
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
    /// `NBD_CMD_CACHE` is understood.
    pub const SEND_CACHE: u16 = 1 << 10;
    /// `NBD_CMD_FLAG_FAST_ZERO` is understood.
    pub const SEND_FAST_ZERO: u16 = 1 << 11;
}

/// Option types.
pub mod option {
    /// Choose an export and enter transmission; cannot report errors.
    pub const EXPORT_NAME: u32 = 1;
    /// End the negotiation.
    pub const ABORT: u32 = 2;
    /// List the exports.
    pub const LIST: u32 = 3;
    /// Upgrade to TLS.
    pub const STARTTLS: u32 = 5;
    /// Describe an export.
    pub const INFO: u32 = 6;
    /// Choose an export and enter transmission.
    pub const GO: u32 = 7;
    /// Ask for structured replies.
    pub const STRUCTURED_REPLY: u32 = 8;
    /// List metadata contexts.
    pub const LIST_META_CONTEXT: u32 = 9;
    /// Select metadata contexts.
    pub const SET_META_CONTEXT: u32 = 10;
    /// Experimental 64-bit headers; not spoken here.
    pub const EXTENDED_HEADERS: u32 = 11;
}

/// Option reply types.
pub mod option_reply {
    /// Accepted, or end of a list.
    pub const ACK: u32 = 1;
    /// One export of a list.
    pub const SERVER: u32 = 2;
    /// One item of information about an export.
    pub const INFO: u32 = 3;
    /// One metadata context.
    pub const META_CONTEXT: u32 = 4;
    /// The bit all error replies have.
    pub const ERROR_BIT: u32 = 1 << 31;
    /// The option is not known.
    pub const ERR_UNSUP: u32 = ERROR_BIT + 1;
    /// The option is known and forbidden.
    pub const ERR_POLICY: u32 = ERROR_BIT + 2;
    /// The option is malformed.
    pub const ERR_INVALID: u32 = ERROR_BIT + 3;
    /// The platform cannot do it.
    pub const ERR_PLATFORM: u32 = ERROR_BIT + 4;
    /// TLS must come first.
    pub const ERR_TLS_REQD: u32 = ERROR_BIT + 5;
    /// The export is not available.
    pub const ERR_UNKNOWN: u32 = ERROR_BIT + 6;
    /// The server is shutting down.
    pub const ERR_SHUTDOWN: u32 = ERROR_BIT + 7;
    /// Block sizes must be negotiated first.
    pub const ERR_BLOCK_SIZE_REQD: u32 = ERROR_BIT + 8;
    /// The request or its reply is too large.
    pub const ERR_TOO_BIG: u32 = ERROR_BIT + 9;
}

/// Information types of `NBD_REP_INFO`.
pub mod info {
    /// Size and transmission flags.
    pub const EXPORT: u16 = 0;
    /// Canonical name.
    pub const NAME: u16 = 1;
    /// Description for people.
    pub const DESCRIPTION: u16 = 2;
    /// Block size constraints.
    pub const BLOCK_SIZE: u16 = 3;
}

/// Request types.
pub mod command {
    /// Read.
    pub const READ: u16 = 0;
    /// Write.
    pub const WRITE: u16 = 1;
    /// Soft disconnect.
    pub const DISC: u16 = 2;
    /// Make answered writes durable.
    pub const FLUSH: u16 = 3;
    /// The range is no longer needed.
    pub const TRIM: u16 = 4;
    /// The range will be read soon.
    pub const CACHE: u16 = 5;
    /// Write zeroes without payload.
    pub const WRITE_ZEROES: u16 = 6;
    /// Query metadata.
    pub const BLOCK_STATUS: u16 = 7;
}

/// Request flags.
pub mod command_flag {
    /// Answer only when the data is durable.
    pub const FUA: u16 = 1 << 0;
    /// Do not make a hole.
    pub const NO_HOLE: u16 = 1 << 1;
    /// Do not fragment the reply.
    pub const DF: u16 = 1 << 2;
    /// One extent only.
    pub const REQ_ONE: u16 = 1 << 3;
    /// Fail rather than be as slow as a write.
    pub const FAST_ZERO: u16 = 1 << 4;
}

/// Structured reply chunk flags and types.
pub mod chunk {
    /// The last chunk of a reply.
    pub const FLAG_DONE: u16 = 1 << 0;
    /// Nothing but the end of a reply.
    pub const NONE: u16 = 0;
    /// Data at an offset.
    pub const OFFSET_DATA: u16 = 1;
    /// Zeroes at an offset.
    pub const OFFSET_HOLE: u16 = 2;
    /// Extents of one metadata context.
    pub const BLOCK_STATUS: u16 = 5;
    /// The bit all error chunks have.
    pub const ERROR_BIT: u16 = 1 << 15;
    /// The request failed.
    pub const ERROR: u16 = ERROR_BIT + 1;
    /// The request failed at an offset.
    pub const ERROR_OFFSET: u16 = ERROR_BIT + 2;
}

/// Status flags of `base:allocation`.
pub mod allocation_flag {
    /// Not allocated.
    pub const HOLE: u32 = 1 << 0;
    /// Reads as zeroes.
    pub const ZERO: u32 = 1 << 1;
}
