//! The protocol without a socket: bytes in, bytes and decisions out.
//!
//! Nothing here performs I/O, reads a clock or knows an async runtime, and everything here may be
//! fed by an enemy: lengths are checked before they are used, and input is never indexed. The
//! machines [`Handshake`] and [`ClientHandshake`], and the decoders [`RequestHeader::decode`] and
//! [`ReplyHeader::decode`], take arbitrary bytes and are fit to be fuzzed as they are.

#![cfg_attr(not(test), deny(clippy::indexing_slicing, clippy::panic, clippy::expect_used))]

pub mod constants;

mod client_handshake;
mod client_reply;
mod error_code;
mod export;
mod handshake;
mod option;
mod reply;
mod request;
mod wire;

#[cfg(test)]
mod handshake_tests;
#[cfg(test)]
mod hostile_tests;

pub use client_handshake::{
    ClientEvent, ClientHandshake, ClientHandshakeError, HandshakeViolation, MetaContext,
    Negotiated, Wish,
};
pub use client_reply::{
    ChunkKind, Coverage, RawExtent, ReplyHeader, ReplyViolation, decode_error, decode_hole,
    decode_status,
};
pub use error_code::ErrorCode;
pub use export::{BlockSizes, ExportInfo, ExportSummary, OpenError, UnlawfulExport};
pub use handshake::{
    ALLOCATION_CONTEXT_ID, Answer, Event, Handshake, HandshakeError, HandshakeLimits, Session,
};
pub use option::MalformedOption;
pub use reply::{
    StatusExtent, put_data_header, put_done, put_error, put_hole, put_simple, put_status,
    tidy_extents,
};
pub use request::{Operation, RequestHeader, RequestMagic, Verdict};
