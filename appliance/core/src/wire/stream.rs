//! The stream that carries one group's frames.

use super::{VERSION, WireError};
use crate::bytes::{Reader, Writer};
use crate::frame::envelope::{self, Envelope, EnvelopeError};
use crate::ids::{GroupId, Seq};
use alloc::vec::Vec;

const MAGIC: [u8; 4] = *b"SRNs";

/// Whether a stream that begins so carries changes rather than frames.
#[must_use]
pub fn carries_changes(bytes: &[u8]) -> bool {
    bytes.starts_with(&super::changes::MAGIC)
}

/// The first bytes of a frame stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StreamHeader {
    /// The group whose frames follow.
    pub group: GroupId,
    /// The nonce of the offer that was accepted.
    pub nonce: u64,
    /// The first frame's sequence number.
    pub first: Seq,
}

impl StreamHeader {
    /// Length in bytes.
    pub const LEN: usize = 4 + 2 + 2 + 16 + 8 + 8;

    /// The header's bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(Self::LEN);
        out.put(&MAGIC);
        out.put_u16(VERSION);
        out.put_u16(0);
        out.put(&self.group.0);
        out.put_u64(self.nonce);
        out.put_u64(self.first.0);
        out
    }

    /// Reads the header.
    ///
    /// # Errors
    /// [`WireError`] when it is none, or of another version.
    pub fn decode(bytes: &[u8; Self::LEN]) -> Result<Self, WireError> {
        let mut reader = Reader::new(bytes);
        let (group, nonce) = opening(&mut reader, MAGIC)?;
        Ok(Self { group, nonce, first: Seq(reader.u64()?) })
    }
}

/// What every stream begins with: its magic number, the version; the group and the nonce of the offer
/// that was accepted, which it gives.
pub(super) fn opening(
    reader: &mut Reader<'_>,
    magic: [u8; 4],
) -> Result<(GroupId, u64), WireError> {
    if reader.array()? != magic {
        return Err(WireError::OutOfRange("magic number of the stream"));
    }
    match reader.u16()? {
        VERSION => {}
        theirs => return Err(WireError::Version { theirs }),
    }
    if reader.u16()? != 0 {
        return Err(WireError::OutOfRange("reserved bytes"));
    }
    Ok((GroupId(reader.array()?), reader.u64()?))
}

/// The lengths of the frame that follows in a stream, from its envelope.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WireFrame {
    /// The envelope; its segment id and watermark are zero.
    pub envelope: Envelope,
}

impl WireFrame {
    /// Bytes to read before the lengths are known.
    pub const FIXED_LEN: usize = envelope::LEN;

    /// Reads and checks the fixed part.
    ///
    /// # Errors
    /// [`EnvelopeError`]; a peer that sends a segment id or a watermark misbehaves.
    pub fn decode(fixed: &[u8; envelope::LEN]) -> Result<Self, EnvelopeError> {
        let envelope = Envelope::decode(fixed)?;
        if envelope.segment != 0 || envelope.durable != Seq::ZERO {
            return Err(EnvelopeError::OutOfRange("fields of a copy on disk"));
        }
        Ok(Self { envelope })
    }
}
