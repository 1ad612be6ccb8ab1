//! Encoding and decoding of content blocks.
//!
//! Which codec a block is stored in is decided by whoever stores or sends it; decoding is driven
//! by the envelope's table and trusts nothing: the decoded length is known beforehand and is the
//! most that is ever allocated.

use srn_core::frame::envelope::{Codec, Stored};
use srn_core::limits::BLOCK_MAX;

/// How hard to try to make content smaller.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Effort {
    /// Not at all.
    None,
    /// LZ4: cheap.
    Lz4,
    /// zstd at this level.
    Zstd(i32),
}

/// Blocks below this size are not worth a codec's overhead, in bytes.
const ENCODE_MIN: usize = 1024;

/// Encoders and decoders with their work memory, for use by one thread.
pub struct Codecs {
    compressor: Option<(i32, zstd::bulk::Compressor<'static>)>,
    decompressor: Option<zstd::bulk::Decompressor<'static>>,
    scratch: Vec<u8>,
}

impl std::fmt::Debug for Codecs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Codecs")
    }
}

impl Default for Codecs {
    fn default() -> Self {
        Self::new()
    }
}

impl Codecs {
    /// With no work memory yet.
    #[must_use]
    pub const fn new() -> Self {
        Self { compressor: None, decompressor: None, scratch: Vec::new() }
    }

    /// Appends `content` to `out`, encoded if that saves at least an eighth; says how it is stored.
    pub fn encode(&mut self, effort: Effort, content: &[u8], out: &mut Vec<u8>) -> Stored {
        let goal = content.len() - content.len() / 8;
        if content.len() >= ENCODE_MIN && effort != Effort::None {
            let codec = match effort {
                Effort::Zstd(level) => self.zstd(level, content).map(|len| (Codec::Zstd, len)),
                _ => self.lz4(content).map(|len| (Codec::Lz4, len)),
            };
            if let Some((codec, len)) = codec.filter(|(_, len)| *len <= goal)
                && let Some(encoded) = self.scratch.get(..len)
            {
                out.extend_from_slice(encoded);
                return Stored { codec, len: u32::try_from(len).unwrap_or(u32::MAX) };
            }
        }
        out.extend_from_slice(content);
        Stored { codec: Codec::Raw, len: u32::try_from(content.len()).unwrap_or(u32::MAX) }
    }

    fn lz4(&mut self, content: &[u8]) -> Option<usize> {
        let room = lz4_flex::block::get_maximum_output_size(content.len());
        self.scratch.resize(room, 0);
        lz4_flex::block::compress_into(content, &mut self.scratch).ok()
    }

    fn zstd(&mut self, level: i32, content: &[u8]) -> Option<usize> {
        if self.compressor.as_ref().is_none_or(|(made_for, _)| *made_for != level) {
            self.compressor = Some((level, zstd::bulk::Compressor::new(level).ok()?));
        }
        let (_, compressor) = self.compressor.as_mut()?;
        self.scratch.resize(zstd::zstd_safe::compress_bound(content.len()), 0);
        compressor.compress_to_buffer(content, self.scratch.as_mut_slice()).ok()
    }

    /// Decodes one stored block into `out`, which has exactly its content's length. Returns whether
    /// it decoded to exactly that.
    #[must_use]
    pub fn decode(&mut self, codec: Codec, stored: &[u8], out: &mut [u8]) -> bool {
        if out.len() > BLOCK_MAX {
            return false;
        }
        match codec {
            Codec::Raw => {
                let fits = stored.len() == out.len();
                if fits {
                    out.copy_from_slice(stored);
                }
                fits
            }
            Codec::Lz4 => {
                lz4_flex::block::decompress_into(stored, out).is_ok_and(|len| len == out.len())
            }
            Codec::Zstd => {
                if self.decompressor.is_none() {
                    self.decompressor = zstd::bulk::Decompressor::new().ok();
                }
                self.decompressor.as_mut().is_some_and(|decompressor| {
                    decompressor.decompress_to_buffer(stored, out).is_ok_and(|len| len == out.len())
                })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const EFFORTS: [Effort; 4] = [Effort::None, Effort::Lz4, Effort::Zstd(1), Effort::Zstd(-5)];

    proptest! {
        #[test]
        fn content_survives(
            pattern in prop::collection::vec(any::<u8>(), 1..3000),
            sectors in 1usize..=64,
            effort in 0usize..4,
        ) {
            let content: Vec<u8> = pattern.iter().copied().cycle().take(sectors * 512).collect();
            let mut codecs = Codecs::new();
            let mut out = vec![9];
            let stored = codecs.encode(EFFORTS[effort], &content, &mut out);
            prop_assert_eq!(out.len(), 1 + stored.len as usize);
            prop_assert!(stored.codec == Codec::Raw || (stored.len as usize) < content.len());
            let mut back = vec![0; content.len()];
            prop_assert!(codecs.decode(stored.codec, &out[1..], &mut back));
            prop_assert_eq!(back, content);
        }

        #[test]
        fn hostile_blocks_never_panic(stored in prop::collection::vec(any::<u8>(), 0..500), sectors in 1usize..=64) {
            let mut codecs = Codecs::new();
            let mut out = vec![0; sectors * 512];
            for codec in [Codec::Raw, Codec::Lz4, Codec::Zstd] {
                let _ = codecs.decode(codec, &stored, &mut out);
            }
        }
    }

    #[test]
    fn a_bomb_does_not_outgrow_its_block() {
        let zeros = vec![0; 1 << 20];
        let bomb = zstd::bulk::compress(&zeros, 1).unwrap();
        assert!(!Codecs::new().decode(Codec::Zstd, &bomb, &mut vec![0; 32768]));
        let bomb = lz4_flex::block::compress(&zeros);
        assert!(!Codecs::new().decode(Codec::Lz4, &bomb, &mut vec![0; 32768]));
    }
}
