//! What a group consists of at one position: its disks, and how the content of each stands. Made
//! by applying the records of frames in order, so it is the same at both nodes.

use std::collections::BTreeMap;

use srn_core::bytes::{Reader, Truncated, Writer};
use srn_core::epoch::Position;
use srn_core::frame::{Record, ResyncReason};
use srn_core::ids::{DiskId, DiskNo, EpochId, FrameHash, Seq};
use srn_core::limits::{DISK_SECTORS_MAX, DISKS_MAX, NAME_LEN_MAX};
use srn_core::mutants::{self, Mutant};
use srn_core::point::Standing;
use srn_core::state::Content;
use srn_core::time::{LogTime, WallTime};

use crate::frame::{BadFrame, Frame};

/// A disk at one position.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CatalogDisk {
    /// Its identity.
    pub id: DiskId,
    /// Its name when it joined.
    pub name: String,
    /// Its size in sectors.
    pub sectors: u64,
    /// How its content stands.
    pub content: Content,
    /// Why, when it is not clean.
    pub reason: Option<ResyncReason>,
    /// The frame in which it joined.
    pub added: Seq,
    /// Log time since which its content stands so.
    pub since: LogTime,
}

/// A group at one position.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Catalog {
    /// The disks that have not been removed.
    pub disks: BTreeMap<DiskNo, CatalogDisk>,
    /// The number that the next disk gets; numbers are never reused.
    pub next_disk: u32,
    /// The position.
    pub at: Position,
    /// Log time of its frame.
    pub log_time: LogTime,
    /// Wall time of its frame.
    pub wall_time: WallTime,
    /// The newest position, not behind `at`, where every disk was clean and there was one.
    pub last_clean: Option<Position>,
}

impl Catalog {
    /// The catalog of a group without history.
    #[must_use]
    pub const fn new(origin: Position) -> Self {
        Self {
            disks: BTreeMap::new(),
            next_disk: 0,
            at: origin,
            log_time: LogTime(0),
            wall_time: WallTime(0),
            last_clean: None,
        }
    }

    /// Whether this position can be recovered: there is a disk, and none is in the middle of
    /// something.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        let clean = |disk: &CatalogDisk| {
            disk.content == Content::Clean || mutants::is(Mutant::ResyncTreatedAsClean)
        };
        !self.disks.is_empty() && self.disks.values().all(clean)
    }

    /// How this position stands. Of several disks that are a mixture of times, the first gives the
    /// reason.
    #[must_use]
    pub fn standing(&self) -> Standing {
        let mixed = self.disks.values().find(|disk| disk.content != Content::Clean);
        match mixed {
            Some(disk) => Standing::Mixture(disk.reason.unwrap_or(ResyncReason::Seeding)),
            None if self.disks.is_empty() => Standing::NoDisk,
            None => Standing::Whole,
        }
    }

    /// The disk with this name.
    #[must_use]
    pub fn by_name(&self, name: &str) -> Option<(DiskNo, &CatalogDisk)> {
        self.disks.iter().find(|(_, disk)| disk.name == name).map(|(no, disk)| (*no, disk))
    }

    /// Takes in the frame that follows.
    ///
    /// # Errors
    /// Never for a frame that was made or read: the same was checked then.
    pub fn apply(&mut self, frame: &Frame) -> Result<(), BadFrame> {
        let head = frame.head()?;
        let header = frame.header();
        for record in head.records() {
            self.record(&record, header.seq, header.log_time);
        }
        self.at = frame.position();
        self.log_time = header.log_time;
        self.wall_time = header.wall_time;
        if self.is_clean() {
            self.last_clean = Some(self.at);
        }
        Ok(())
    }

    fn record(&mut self, record: &Record<'_>, seq: Seq, now: LogTime) {
        match record {
            Record::DiskAdd { disk, id, sectors, name } => {
                let added = CatalogDisk {
                    id: *id,
                    name: (*name).to_owned(),
                    sectors: *sectors,
                    content: Content::Clean,
                    reason: None,
                    added: seq,
                    since: now,
                };
                self.disks.insert(*disk, added);
                self.next_disk = self.next_disk.max(disk.0.saturating_add(1));
            }
            Record::DiskRemove { disk } => {
                self.disks.remove(disk);
            }
            Record::Resize { disk, sectors } => {
                if let Some(disk) = self.disks.get_mut(disk) {
                    disk.sectors = *sectors;
                }
            }
            Record::ResyncBegin { disk, reason } => {
                if let Some(disk) = self.disks.get_mut(disk) {
                    // A disk that had no point yet still has none.
                    let seeding =
                        *reason == ResyncReason::Seeding || disk.content == Content::Seeding;
                    disk.content = if seeding { Content::Seeding } else { Content::Resync };
                    disk.reason = Some(*reason);
                    disk.since = now;
                }
            }
            Record::ResyncEnd { disk } => {
                if let Some(disk) = self.disks.get_mut(disk) {
                    disk.content = Content::Clean;
                    disk.reason = None;
                    disk.since = now;
                }
            }
            _ => {}
        }
    }

    /// The catalog's bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        put_position(&mut out, &self.at);
        out.put_u64(self.log_time.0);
        out.put_i64(self.wall_time.0);
        out.put_u8(u8::from(self.last_clean.is_some()));
        if let Some(position) = &self.last_clean {
            put_position(&mut out, position);
        }
        out.put_u32(self.next_disk);
        out.put_u32(u32::try_from(self.disks.len()).unwrap_or(u32::MAX));
        for (no, disk) in &self.disks {
            out.put_u32(no.0);
            out.put(&disk.id.0);
            out.put_u64(disk.sectors);
            out.put_u8(match disk.content {
                Content::Clean => 0,
                Content::Seeding => 1,
                Content::Resync => 2,
            });
            out.put_u8(disk.reason.map_or(0, ResyncReason::code));
            out.put_u64(disk.added.0);
            out.put_u64(disk.since.0);
            out.put_u8(u8::try_from(disk.name.len()).unwrap_or(u8::MAX));
            out.put(disk.name.as_bytes());
        }
        out
    }

    /// Reads a catalog from the front of `reader`; `None` when a field is out of range.
    ///
    /// # Errors
    /// [`Truncated`] when the bytes end early.
    pub fn decode(reader: &mut Reader<'_>) -> Result<Option<Self>, Truncated> {
        let mut catalog = Self::new(position(reader)?);
        catalog.log_time = LogTime(reader.u64()?);
        catalog.wall_time = WallTime(reader.i64()?);
        if reader.u8()? == 1 {
            catalog.last_clean = Some(position(reader)?);
        }
        catalog.next_disk = reader.u32()?;
        let count = reader.u32()?;
        if count as usize > DISKS_MAX {
            return Ok(None);
        }
        for _ in 0..count {
            let no = DiskNo(reader.u32()?);
            let id = DiskId(reader.array()?);
            let sectors = reader.u64()?;
            let content = match reader.u8()? {
                0 => Content::Clean,
                1 => Content::Seeding,
                2 => Content::Resync,
                _ => return Ok(None),
            };
            let reason = ResyncReason::from_code(reader.u8()?);
            let added = Seq(reader.u64()?);
            let since = LogTime(reader.u64()?);
            let len = usize::from(reader.u8()?);
            let Ok(name) = str::from_utf8(reader.take(len)?) else { return Ok(None) };
            if len > NAME_LEN_MAX || sectors == 0 || sectors > DISK_SECTORS_MAX {
                return Ok(None);
            }
            let name = name.to_owned();
            let disk = CatalogDisk { id, name, sectors, content, reason, added, since };
            catalog.disks.insert(no, disk);
        }
        Ok(Some(catalog))
    }
}

pub(crate) fn put_position(out: &mut Vec<u8>, position: &Position) {
    out.put(&position.epoch.0);
    out.put_u64(position.seq.0);
    out.put(&position.hash.0);
}

pub(crate) fn position(reader: &mut Reader<'_>) -> Result<Position, Truncated> {
    let epoch = EpochId(reader.array()?);
    let seq = Seq(reader.u64()?);
    Ok(Position { epoch, seq, hash: FrameHash(reader.array()?) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn catalog_bytes_are_pinned() {
        let disk = |id: u8, name: &str, sectors, content, reason, added, since| CatalogDisk {
            id: DiskId([id; 16]),
            name: name.into(),
            sectors,
            content,
            reason,
            added: Seq(added),
            since: LogTime(since),
        };
        let position = |seq, hash| Position {
            epoch: EpochId([1; 16]),
            seq: Seq(seq),
            hash: FrameHash([hash; 16]),
        };
        let seeding = Some(ResyncReason::Seeding);
        let again = Some(ResyncReason::MirrorReconnected);
        let catalog = Catalog {
            disks: BTreeMap::from([
                (DiskNo(1), disk(0x44, "root", 64, Content::Clean, None, 2, 4)),
                (DiskNo(3), disk(0x55, "d", 8, Content::Seeding, seeding, 6, 7)),
                (DiskNo(4), disk(0x66, "e", 16, Content::Resync, again, 6, 7)),
            ]),
            next_disk: 5,
            at: position(9, 2),
            log_time: LogTime(3),
            wall_time: WallTime(-1),
            last_clean: Some(position(8, 3)),
        };
        let bytes = catalog.encode();
        let expected = "01010101010101010101010101010101 0900000000000000 \
                        02020202020202020202020202020202 0300000000000000 ffffffffffffffff 01 \
                        01010101010101010101010101010101 0800000000000000 \
                        03030303030303030303030303030303 05000000 03000000 01000000 \
                        44444444444444444444444444444444 4000000000000000 00 00 0200000000000000 \
                        0400000000000000 04 726f6f74 03000000 55555555555555555555555555555555 \
                        0800000000000000 01 01 0600000000000000 0700000000000000 01 64 04000000 \
                        66666666666666666666666666666666 1000000000000000 02 03 0600000000000000 \
                        0700000000000000 01 65";
        let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hex, expected.replace(' ', ""));
        assert_eq!(Catalog::decode(&mut Reader::new(&bytes)), Ok(Some(catalog)));
    }
}
