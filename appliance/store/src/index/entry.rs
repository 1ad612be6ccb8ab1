//! One entry: 32 bytes on disk.

use srn_core::bytes::{Reader, Truncated, Writer};
use srn_core::extent::{Extent, Slice};
use srn_core::frame::envelope::Codec;
use srn_core::ids::DiskNo;
use srn_core::limits::{BLOCK_MAX, DISK_SECTORS_MAX, DISKS_MAX, SECTOR};

/// Bytes of an entry.
pub const ENTRY_LEN: usize = 32;

/// Sectors of the largest block.
const BLOCK_SECTORS_MAX: u64 = BLOCK_MAX as u64 / SECTOR;

/// Where the content of an extent is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// It reads as zero; `trim` when its content does not matter in comparisons.
    Zero {
        /// Discarded rather than zeroed.
        trim: bool,
    },
    /// In a block of a frame.
    Block {
        /// The segment's ordinal.
        segment: u32,
        /// Offset of the stored block in the segment, in bytes.
        offset: u32,
        /// Stored bytes.
        stored_len: u32,
        /// How it is stored.
        codec: Codec,
        /// Checksum of the whole block's content.
        sum: u64,
        /// Sectors of the whole block: 1 to 64.
        sectors: u8,
        /// Sectors of the block before the part that is meant.
        skip: u8,
    },
}

impl Slice for Place {
    fn slice(&self, skip: u64, _sectors: u64) -> Self {
        let mut part = *self;
        if let Self::Block { skip: before, .. } = &mut part {
            // A block has at most 64 sectors.
            *before = before.saturating_add(u8::try_from(skip).unwrap_or(u8::MAX));
        }
        part
    }
}

const KIND_ZERO: u8 = 0xfe;
const KIND_TRIM: u8 = 0xff;

/// Disk and first sector in one number, so that entries sort by it: disk in the top 16 bits.
pub(super) fn key(disk: DiskNo, start: u64) -> u64 {
    (u64::from(disk.0) << 48) | start
}

const _: () = assert!(DISKS_MAX <= 1 << 16 && DISK_SECTORS_MAX < 1 << 48);

/// Appends an entry.
pub(super) fn encode(disk: DiskNo, extent: Extent, place: &Place, out: &mut Vec<u8>) {
    out.put_u64(key(disk, extent.start));
    match place {
        Place::Zero { trim } => {
            out.put_u8(if *trim { KIND_TRIM } else { KIND_ZERO });
            out.put(&[0; 15]);
            out.put_u64(extent.sectors);
        }
        Place::Block { segment, offset, stored_len, codec, sum, sectors, skip } => {
            out.put_u8(codec.code());
            out.put_u8(u8::try_from(extent.sectors).unwrap_or(u8::MAX));
            out.put_u8(*skip);
            out.put_u8(*sectors);
            out.put_u32(*segment);
            out.put_u32(*offset);
            out.put_u32(*stored_len);
            out.put_u64(*sum);
        }
    }
}

/// From a key to the end of its disk, wherever that is.
pub(super) fn from_key(key: u64) -> (DiskNo, Extent) {
    let start = key & ((1 << 48) - 1);
    let disk = DiskNo(u32::try_from(key >> 48).unwrap_or(u32::MAX));
    (disk, Extent::new(start, DISK_SECTORS_MAX.saturating_sub(start)))
}

/// Reads an entry; `None` when a field is out of range.
pub(super) fn decode(bytes: &[u8]) -> Result<Option<(DiskNo, Extent, Place)>, Truncated> {
    let mut reader = Reader::new(bytes);
    let key = reader.u64()?;
    let disk = DiskNo(u32::try_from(key >> 48).unwrap_or(u32::MAX));
    let start = key & ((1 << 48) - 1);
    let kind = reader.u8()?;
    let (extent, place) = if kind == KIND_ZERO || kind == KIND_TRIM {
        reader.take(15)?;
        (Extent::new(start, reader.u64()?), Place::Zero { trim: kind == KIND_TRIM })
    } else {
        let Some(codec) = Codec::from_code(kind) else { return Ok(None) };
        let (len, skip, sectors) = (reader.u8()?, reader.u8()?, reader.u8()?);
        let segment = reader.u32()?;
        let offset = reader.u32()?;
        let stored_len = reader.u32()?;
        let sum = reader.u64()?;
        if u64::from(sectors) > BLOCK_SECTORS_MAX
            || u16::from(skip) + u16::from(len) > u16::from(sectors)
            || stored_len as usize > BLOCK_MAX
        {
            return Ok(None);
        }
        let place = Place::Block { segment, offset, stored_len, codec, sum, sectors, skip };
        (Extent::new(start, u64::from(len)), place)
    };
    let sound = extent.sectors > 0 && extent.fits(DISK_SECTORS_MAX);
    Ok(sound.then_some((disk, extent, place)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entry_bytes_are_pinned() {
        let block = Place::Block {
            segment: 5,
            offset: 0x1000,
            stored_len: 0x200,
            codec: Codec::Zstd,
            sum: 0x0102_0304_0506_0708,
            sectors: 8,
            skip: 3,
        };
        for (extent, place, bytes) in [
            (
                Extent::new(0x10, 4),
                block,
                "10000000000002000204030805000000001000000002000008070605040302 01"
                    .replace(' ', ""),
            ),
            (
                Extent::new(0x10, 1 << 40),
                Place::Zero { trim: false },
                "1000000000000200fe0000000000000000000000000000000000000000010000".into(),
            ),
        ] {
            let mut out = Vec::new();
            encode(DiskNo(2), extent, &place, &mut out);
            let hex: String = out.iter().map(|byte| format!("{byte:02x}")).collect();
            assert_eq!(hex, bytes);
            assert_eq!(out.len(), ENTRY_LEN);
            assert_eq!(decode(&out), Ok(Some((DiskNo(2), extent, place))));
        }
    }

    #[test]
    fn entries_out_of_range_are_refused() {
        let good = {
            let mut out = Vec::new();
            let place = Place::Block {
                segment: 0,
                offset: 0,
                stored_len: 4096,
                codec: Codec::Raw,
                sum: 0,
                sectors: 8,
                skip: 0,
            };
            encode(DiskNo(1), Extent::new(0, 8), &place, &mut out);
            out
        };
        for (at, value) in [(8, 9u8), (9, 9), (9, 0), (10, 1), (11, 65), (22, 0x80)] {
            let mut bad = good.clone();
            bad[at] = value;
            assert_eq!(decode(&bad), Ok(None), "byte {at} = {value}");
        }
        assert!(decode(&good[..31]).is_err());
    }
}
