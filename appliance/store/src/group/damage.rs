//! What is known to be damaged at rest: a small file beside the manifest, so that it is still known
//! after a restart.
//!
//! It decides nothing. Every read verifies what it reads, whether it is in this list or not; the
//! list is what people are told, and what a repair has to fetch. One that cannot be read is as good
//! as none: the next scrub makes it anew.

use std::sync::atomic::Ordering;

use srn_core::bytes::{Reader, Truncated, Writer};
use srn_core::extent::Extent;
use srn_core::ids::{DiskNo, EpochId, Seq};
use srn_core::time::WallTime;

use super::Group;
use crate::durable;
use crate::error::{Result, StoreError};
use crate::io::Fs;

/// The file, in the group's directory.
const FILE: &str = "damage";

const MAGIC: [u8; 4] = *b"SRNq";
const VERSION: u16 = 1;

/// Most entries: what is more is found by the next scrub, once these are repaired.
pub const DAMAGE_MAX: usize = 10_000;

/// The largest file in bytes.
const FILE_MAX: u64 = 1 << 20;

/// Something that is damaged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Damage {
    /// What.
    pub part: DamagedPart,
    /// Since when it is known, by the wall clock.
    pub since: WallTime,
}

/// What is damaged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum DamagedPart {
    /// Pages of a disk's base.
    Base {
        /// The disk.
        disk: DiskNo,
        /// Its sectors, in whole pages.
        extent: Extent,
    },
    /// Frames of the log.
    Frames {
        /// Their epoch.
        epoch: EpochId,
        /// The first.
        first: Seq,
        /// The last.
        last: Seq,
    },
    /// Content of a layer.
    Layer {
        /// Its file's ordinal.
        file: u32,
        /// The disk.
        disk: DiskNo,
        /// The sectors whose content is there.
        extent: Extent,
    },
    /// An index file.
    Index {
        /// Its number.
        file: u32,
    },
}

impl DamagedPart {
    /// Whether `other` says nothing that this does not say.
    #[must_use]
    pub fn covers(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Base { disk, extent }, Self::Base { disk: other, extent: part }) => {
                disk == other && extent.start <= part.start && part.end() <= extent.end()
            }
            (
                Self::Frames { epoch, first, last },
                Self::Frames { epoch: other, first: from, last: to },
            ) => epoch == other && first <= from && to <= last,
            (part, other) => part == other,
        }
    }
}

impl Group {
    /// What is known to be damaged.
    ///
    /// # Errors
    /// As the volume says; [`StoreError::Corrupt`] when the list itself is damaged.
    pub fn damage(&self) -> Result<Vec<Damage>> {
        let volume = &self.shared.volume;
        let names = volume.list(&self.dir).unwrap_or_default();
        if !names.iter().any(|name| name == FILE) {
            return Ok(Vec::new());
        }
        let bytes = durable::read(volume, &self.dir.join(FILE), FILE_MAX)?;
        decode(&bytes).ok_or_else(|| StoreError::Corrupt(format!("{FILE} of group {}", self.id)))
    }

    /// Whether a read has found damage since this was last asked.
    #[must_use]
    pub fn take_damage_seen(&self) -> bool {
        self.damage_seen.swap(false, Ordering::Relaxed)
    }

    /// Writes down what is known to be damaged, in place of what was known before.
    ///
    /// # Errors
    /// As the volume says.
    pub fn set_damage(&self, damage: &[Damage]) -> Result<()> {
        let most = damage.get(..DAMAGE_MAX.min(damage.len())).unwrap_or_default();
        durable::replace(&self.shared.volume, &self.dir, FILE, &encode(most))
    }
}

fn encode(damage: &[Damage]) -> Vec<u8> {
    let mut out = Vec::with_capacity(64 + damage.len() * 48);
    out.put(&MAGIC);
    out.put_u16(VERSION);
    out.put_u16(0);
    out.put_u32(u32::try_from(damage.len()).unwrap_or(u32::MAX));
    for damage in damage {
        match damage.part {
            DamagedPart::Base { disk, extent } => {
                out.put_u8(1);
                out.put_i64(damage.since.0);
                out.put_u32(disk.0);
                out.put_u64(extent.start);
                out.put_u64(extent.sectors);
            }
            DamagedPart::Frames { epoch, first, last } => {
                out.put_u8(2);
                out.put_i64(damage.since.0);
                out.put(&epoch.0);
                out.put_u64(first.0);
                out.put_u64(last.0);
            }
            DamagedPart::Layer { file, disk, extent } => {
                out.put_u8(4);
                out.put_i64(damage.since.0);
                out.put_u32(file);
                out.put_u32(disk.0);
                out.put_u64(extent.start);
                out.put_u64(extent.sectors);
            }
            DamagedPart::Index { file } => {
                out.put_u8(3);
                out.put_i64(damage.since.0);
                out.put_u32(file);
            }
        }
    }
    let hash = blake3::hash(&out);
    out.put(hash.as_bytes());
    out
}

fn decode(bytes: &[u8]) -> Option<Vec<Damage>> {
    let (body, hash) = bytes.split_last_chunk::<32>()?;
    if blake3::hash(body).as_bytes() != hash {
        return None;
    }
    let mut reader = Reader::new(body);
    let mut read = || {
        let known = reader.array()? == MAGIC && reader.u16()? == VERSION;
        reader.u16()?;
        let count = reader.u32()?;
        let mut all = Vec::new();
        for _ in 0..count {
            let kind = reader.u8()?;
            let since = WallTime(reader.i64()?);
            let part = match kind {
                1 => DamagedPart::Base {
                    disk: DiskNo(reader.u32()?),
                    extent: Extent::new(reader.u64()?, reader.u64()?),
                },
                2 => DamagedPart::Frames {
                    epoch: EpochId(reader.array()?),
                    first: Seq(reader.u64()?),
                    last: Seq(reader.u64()?),
                },
                3 => DamagedPart::Index { file: reader.u32()? },
                4 => DamagedPart::Layer {
                    file: reader.u32()?,
                    disk: DiskNo(reader.u32()?),
                    extent: Extent::new(reader.u64()?, reader.u64()?),
                },
                _ => return Ok(None),
            };
            all.push(Damage { part, since });
        }
        Ok::<_, Truncated>((known && reader.is_empty()).then_some(all))
    };
    read().ok().flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn damage_bytes_are_pinned() {
        let since = WallTime(5);
        let all = [
            Damage {
                part: DamagedPart::Base { disk: DiskNo(2), extent: Extent::new(0x10, 8) },
                since,
            },
            Damage {
                part: DamagedPart::Frames {
                    epoch: EpochId([0x11; 16]),
                    first: Seq(3),
                    last: Seq(4),
                },
                since,
            },
            Damage { part: DamagedPart::Index { file: 7 }, since },
            Damage {
                part: DamagedPart::Layer { file: 9, disk: DiskNo(2), extent: Extent::new(8, 8) },
                since,
            },
        ];
        let bytes = encode(&all);
        let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        let expected = "53524e71 0100 0000 04000000 01 0500000000000000 02000000 1000000000000000 \
                        0800000000000000 02 0500000000000000 11111111111111111111111111111111 \
                        0300000000000000 0400000000000000 03 0500000000000000 07000000 \
                        04 0500000000000000 09000000 02000000 0800000000000000 0800000000000000";
        let body = expected.replace(' ', "");
        assert_eq!(hex[..body.len()], body);
        assert_eq!(hex.len(), body.len() + 64);
        assert_eq!(decode(&bytes), Some(all.to_vec()));
        for at in 0..bytes.len() {
            let mut bad = bytes.clone();
            bad[at] ^= 1;
            assert_eq!(decode(&bad), None, "byte {at}");
        }
    }
}
