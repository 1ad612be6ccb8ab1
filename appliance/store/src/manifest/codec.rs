//! The manifest's bytes.

use srn_core::bytes::{Reader, Truncated, Writer};
use srn_core::epoch::{Epoch, EpochTable};
use srn_core::ids::{CheckpointId, EpochId, FrameHash, GroupId, Seq};
use srn_core::limits::{EPOCHS_MAX, TEXT_MAX};
use srn_core::state::Cause;
use srn_core::time::{LogTime, WallTime};

use super::{
    BaseMeta, Fence, Keep, LayerFileMeta, LayerMeta, Manifest, Note, PieceMeta, Purpose, Role,
    SegmentMeta, TimelineMeta,
};
use crate::catalog::{Catalog, position, put_position};
use crate::index::RunMeta;

const MAGIC: [u8; 4] = *b"SRNm";

/// Version of the layout.
pub(super) const VERSION: u16 = 1;

/// Bytes of the hash at the end.
const HASH_LEN: usize = 32;

/// Why bytes are not a manifest.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum BadManifest {
    Version(u16),
    Damaged(&'static str),
}

impl From<Truncated> for BadManifest {
    fn from(_: Truncated) -> Self {
        Self::Damaged("it ends early")
    }
}

pub(super) fn encode(manifest: &Manifest) -> Vec<u8> {
    let mut out = Vec::new();
    out.put(&MAGIC);
    out.put_u16(VERSION);
    out.put_u16(0);
    out.put_u64(manifest.generation);
    out.put(&manifest.group.0);
    put_text(&mut out, &manifest.name);
    out.put_u8(u8::from(manifest.role == Role::Secondary));
    out.put_u8(u8::from(manifest.keep == Keep::Replica));
    put_fence(&mut out, manifest.fence.as_ref());
    out.put_u64(manifest.acked.0);
    out.put_u32(manifest.next_ordinal);
    out.put_u32(manifest.next_slot);
    out.put_u32(manifest.next_run);
    out.put(&manifest.main.0);
    put_count(&mut out, manifest.timelines.len());
    for timeline in manifest.timelines.values() {
        put_epochs(&mut out, &timeline.epochs);
        out.put_u8(match timeline.purpose {
            Purpose::Main => 0,
            Purpose::Clone => 1,
            Purpose::Branch => 2,
        });
        out.put_i64(timeline.since.0);
        put_count(&mut out, timeline.pieces.len());
        for piece in &timeline.pieces {
            out.put_u32(piece.ordinal);
            out.put_u64(piece.first.0);
            put_position(&mut out, &piece.last);
            out.put_u64(piece.last_log_time.0);
            out.put_u8(u8::from(piece.is_prefix));
        }
    }
    put_count(&mut out, manifest.segments.len());
    for (ordinal, segment) in &manifest.segments {
        out.put_u32(*ordinal);
        out.put_u32(segment.slot);
        out.put_u64(segment.id);
        out.put(&segment.epoch.0);
        out.put_u64(segment.first.0);
        out.put(&segment.prev.0);
        put_position(&mut out, &segment.last);
        out.put_u32(segment.end);
    }
    put_count(&mut out, manifest.layers.len());
    for (ordinal, layer) in &manifest.layers {
        out.put_u32(*ordinal);
        out.put_u64(layer.first.0);
        put_position(&mut out, &layer.last);
        put_count(&mut out, layer.files.len());
        for file in &layer.files {
            out.put_u32(file.ordinal);
            out.put_u64(file.bytes);
        }
    }
    put_count(&mut out, manifest.runs.len());
    for run in manifest.runs.values() {
        out.put_u32(run.file);
        out.put_u8(run.level);
        out.put(&run.epoch.0);
        out.put_u64(run.first.0);
        out.put_u64(run.last.0);
        out.put_u32(run.pieces.0);
        out.put_u32(run.pieces.1);
        out.put_u64(run.entries);
    }
    out.put_u8(u8::from(manifest.base.is_some()));
    if let Some(base) = &manifest.base {
        out.put(&base.catalog.encode());
    }
    put_count(&mut out, manifest.notes.len());
    for (id, note) in &manifest.notes {
        out.put(&id.0);
        out.put_u8(note_flags(note));
        put_text(&mut out, &note.label);
    }
    let hash = blake3::hash(&out);
    out.put(hash.as_bytes());
    out
}

/// Flags of a note.
const PINNED: u8 = 1;
const PROVEN: u8 = 2;
const DELETED: u8 = 4;
const UNQUIET: u8 = 8;
const UNPINNED: u8 = 16;
const DAMAGE_ACCEPTED: u8 = 32;
const NOTE_FLAGS: u8 = PINNED | PROVEN | DELETED | UNQUIET | UNPINNED | DAMAGE_ACCEPTED;

fn note_flags(note: &Note) -> u8 {
    let flag = |set: bool, flag: u8| if set { flag } else { 0 };
    flag(note.pinned, PINNED)
        | flag(note.proven, PROVEN)
        | flag(note.deleted, DELETED)
        | flag(note.unquiet, UNQUIET)
        | flag(note.unpinned, UNPINNED)
        | flag(note.damage_accepted, DAMAGE_ACCEPTED)
}

pub(super) fn decode(bytes: &[u8]) -> Result<Manifest, BadManifest> {
    let (body, hash) =
        bytes.split_last_chunk::<HASH_LEN>().ok_or(BadManifest::Damaged("it is too short"))?;
    let mut reader = Reader::new(body);
    if reader.array()? != MAGIC {
        return Err(BadManifest::Damaged("it is no manifest"));
    }
    let version = reader.u16()?;
    if version > VERSION {
        return Err(BadManifest::Version(version));
    }
    if blake3::hash(body).as_bytes() != hash {
        return Err(BadManifest::Damaged("it does not have its hash"));
    }
    reader.u16()?;
    let manifest = Manifest {
        generation: reader.u64()?,
        group: GroupId(reader.array()?),
        name: text(&mut reader)?,
        role: if reader.u8()? == 1 { Role::Secondary } else { Role::Primary },
        keep: if reader.u8()? == 1 { Keep::Replica } else { Keep::Cache },
        fence: fence(&mut reader)?,
        acked: Seq(reader.u64()?),
        next_ordinal: reader.u32()?,
        next_slot: reader.u32()?,
        next_run: reader.u32()?,
        main: EpochId(reader.array()?),
        timelines: list(&mut reader, |reader| {
            let epochs = epochs(reader)?;
            let purpose = match reader.u8()? {
                0 => Purpose::Main,
                1 => Purpose::Clone,
                2 => Purpose::Branch,
                _ => return Err(BadManifest::Damaged("purpose of a line")),
            };
            let since = WallTime(reader.i64()?);
            let pieces = list(reader, |reader| {
                Ok(PieceMeta {
                    ordinal: reader.u32()?,
                    first: Seq(reader.u64()?),
                    last: position(reader)?,
                    last_log_time: LogTime(reader.u64()?),
                    is_prefix: reader.u8()? == 1,
                })
            })?;
            Ok((epochs.current(), TimelineMeta { epochs, purpose, since, pieces }))
        })?,
        segments: list(&mut reader, |reader| {
            let ordinal = reader.u32()?;
            let segment = SegmentMeta {
                slot: reader.u32()?,
                id: reader.u64()?,
                epoch: EpochId(reader.array()?),
                first: Seq(reader.u64()?),
                prev: FrameHash(reader.array()?),
                last: position(reader)?,
                end: reader.u32()?,
            };
            Ok((ordinal, segment))
        })?,
        layers: list(&mut reader, |reader| {
            let ordinal = reader.u32()?;
            let first = Seq(reader.u64()?);
            let last = position(reader)?;
            let files = list(reader, |reader| {
                Ok(LayerFileMeta { ordinal: reader.u32()?, bytes: reader.u64()? })
            })?;
            Ok((ordinal, LayerMeta { first, last, files }))
        })?,
        runs: list(&mut reader, |reader| {
            let run = RunMeta {
                file: reader.u32()?,
                level: reader.u8()?,
                epoch: EpochId(reader.array()?),
                first: Seq(reader.u64()?),
                last: Seq(reader.u64()?),
                pieces: (reader.u32()?, reader.u32()?),
                entries: reader.u64()?,
            };
            Ok((run.file, run))
        })?,
        base: match reader.u8()? {
            0 => None,
            _ => {
                let catalog =
                    Catalog::decode(&mut reader)?.ok_or(BadManifest::Damaged("catalog"))?;
                Some(BaseMeta { catalog })
            }
        },
        notes: list(&mut reader, |reader| {
            let id = CheckpointId(reader.array()?);
            let flags = reader.u8()?;
            if flags & !NOTE_FLAGS != 0 {
                return Err(BadManifest::Damaged("a note's flags"));
            }
            let note = Note {
                label: text(reader)?,
                pinned: flags & PINNED != 0,
                proven: flags & PROVEN != 0,
                deleted: flags & DELETED != 0,
                unquiet: flags & UNQUIET != 0,
                unpinned: flags & UNPINNED != 0,
                damage_accepted: flags & DAMAGE_ACCEPTED != 0,
            };
            Ok((id, note))
        })?,
    };
    check(&manifest, &reader)?;
    Ok(manifest)
}

/// What the rest of the store relies on.
fn check(manifest: &Manifest, rest: &Reader<'_>) -> Result<(), BadManifest> {
    if !rest.is_empty() {
        return Err(BadManifest::Damaged("it is too long"));
    }
    if !manifest.timelines.contains_key(&manifest.main) {
        return Err(BadManifest::Damaged("it has no main line"));
    }
    let pieces = manifest.timelines.values().flat_map(|timeline| &timeline.pieces);
    for piece in pieces {
        if !manifest.segments.contains_key(&piece.ordinal)
            && !manifest.layers.contains_key(&piece.ordinal)
        {
            return Err(BadManifest::Damaged("a line has a segment or layer that is not listed"));
        }
    }
    Ok(())
}

fn put_count(out: &mut Vec<u8>, count: usize) {
    out.put_u32(u32::try_from(count).unwrap_or(u32::MAX));
}

/// A counted list. Memory grows with the bytes that are really there, not with the count.
fn list<T, C: FromIterator<T>>(
    reader: &mut Reader<'_>,
    item: impl Fn(&mut Reader<'_>) -> Result<T, BadManifest>,
) -> Result<C, BadManifest> {
    let count = reader.u32()?;
    (0..count).map(|_| item(reader)).collect()
}

/// A text of at most [`TEXT_MAX`] bytes; a longer one is left out, not cut in the middle.
fn put_text(out: &mut Vec<u8>, text: &str) {
    let text = if text.len() <= TEXT_MAX { text } else { "" };
    out.put_u16(u16::try_from(text.len()).unwrap_or(0));
    out.put(text.as_bytes());
}

fn text(reader: &mut Reader<'_>) -> Result<String, BadManifest> {
    let len = usize::from(reader.u16()?);
    match str::from_utf8(reader.take(len)?) {
        Ok(text) if len <= TEXT_MAX => Ok(text.to_owned()),
        _ => Err(BadManifest::Damaged("text")),
    }
}

fn put_fence(out: &mut Vec<u8>, fence: Option<&Fence>) {
    let Some(fence) = fence else { return out.put_u8(0) };
    out.put_u8(if fence.cause == Cause::Handover { 2 } else { 1 });
    out.put_i64(fence.since.0);
    out.put_u8(u8::from(fence.epochs.is_some()));
    if let Some(epochs) = &fence.epochs {
        put_epochs(out, epochs);
    }
}

fn fence(reader: &mut Reader<'_>) -> Result<Option<Fence>, BadManifest> {
    let cause = match reader.u8()? {
        0 => return Ok(None),
        1 => Cause::FailoverAtPeer,
        2 => Cause::Handover,
        _ => return Err(BadManifest::Damaged("cause of a fence")),
    };
    let since = WallTime(reader.i64()?);
    let epochs = if reader.u8()? == 1 { Some(epochs(reader)?) } else { None };
    Ok(Some(Fence { cause, epochs, since }))
}

fn put_epochs(out: &mut Vec<u8>, table: &EpochTable) {
    out.put_u16(u16::try_from(table.list().len()).unwrap_or(u16::MAX));
    for epoch in table.list() {
        out.put(&epoch.id.0);
        put_position(out, &epoch.forked_from);
    }
}

fn epochs(reader: &mut Reader<'_>) -> Result<EpochTable, BadManifest> {
    let count = usize::from(reader.u16()?);
    if count > EPOCHS_MAX {
        return Err(BadManifest::Damaged("number of epochs"));
    }
    let mut epochs = Vec::new();
    for _ in 0..count {
        epochs.push(Epoch { id: EpochId(reader.array()?), forked_from: position(reader)? });
    }
    EpochTable::from_list(epochs).map_err(|_| BadManifest::Damaged("line of epochs"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use srn_core::epoch::Position;
    use std::collections::BTreeMap;

    fn sample() -> Manifest {
        let epochs = EpochTable::new(EpochId([1; 16]));
        let last = Position { epoch: EpochId([1; 16]), seq: Seq(9), hash: FrameHash([3; 16]) };
        let piece = PieceMeta {
            ordinal: 4,
            first: Seq(1),
            last,
            last_log_time: LogTime(5),
            is_prefix: false,
        };
        let layer = LayerMeta {
            first: Seq(2),
            last,
            files: vec![LayerFileMeta { ordinal: 11, bytes: 0x3000 }],
        };
        let timeline = TimelineMeta {
            epochs: epochs.clone(),
            purpose: Purpose::Main,
            since: WallTime(6),
            pieces: vec![piece],
        };
        let segment = SegmentMeta {
            slot: 7,
            id: 8,
            epoch: EpochId([1; 16]),
            first: Seq(1),
            prev: FrameHash::ORIGIN,
            last,
            end: 4096,
        };
        let run = RunMeta {
            file: 2,
            level: 0,
            epoch: EpochId([1; 16]),
            first: Seq(1),
            last: Seq(9),
            pieces: (4, 6),
            entries: 3,
        };
        Manifest {
            generation: 3,
            group: GroupId([2; 16]),
            name: "web".into(),
            role: Role::Secondary,
            keep: Keep::Replica,
            fence: Some(Fence {
                cause: Cause::Handover,
                epochs: Some(epochs),
                since: WallTime(-1),
            }),
            acked: Seq(8),
            main: EpochId([1; 16]),
            timelines: BTreeMap::from([(EpochId([1; 16]), timeline)]),
            segments: BTreeMap::from([(4, segment)]),
            layers: BTreeMap::from([(10, layer)]),
            runs: BTreeMap::from([(2, run)]),
            base: Some(BaseMeta { catalog: Catalog::new(last) }),
            notes: BTreeMap::from([(
                CheckpointId([9; 16]),
                Note {
                    label: "before the update".into(),
                    pinned: true,
                    unquiet: true,
                    ..Note::default()
                },
            )]),
            next_ordinal: 5,
            next_slot: 8,
            next_run: 3,
        }
    }

    #[test]
    fn round_trips() {
        assert_eq!(decode(&encode(&sample())), Ok(sample()));
        let mut other = sample();
        other.notes.values_mut().for_each(|note| note.damage_accepted = true);
        assert_eq!(decode(&encode(&other)), Ok(other));
    }

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    #[test]
    fn manifest_bytes_are_pinned() {
        let expected = "53524e6d 0100 0000 0300000000000000 02020202020202020202020202020202 \
                        0300 776562 01 01 02 ffffffffffffffff 01 0100 \
                        01010101010101010101010101010101 01010101010101010101010101010101 \
                        0000000000000000 00000000000000000000000000000000 0800000000000000 \
                        05000000 08000000 03000000 01010101010101010101010101010101 01000000 \
                        0100 01010101010101010101010101010101 01010101010101010101010101010101 \
                        0000000000000000 00000000000000000000000000000000 00 0600000000000000 \
                        01000000 04000000 0100000000000000 01010101010101010101010101010101 \
                        0900000000000000 03030303030303030303030303030303 0500000000000000 00 \
                        01000000 04000000 07000000 0800000000000000 \
                        01010101010101010101010101010101 0100000000000000 \
                        00000000000000000000000000000000 01010101010101010101010101010101 \
                        0900000000000000 03030303030303030303030303030303 00100000 01000000 \
                        0a000000 0200000000000000 01010101010101010101010101010101 \
                        0900000000000000 03030303030303030303030303030303 01000000 0b000000 \
                        0030000000000000 01000000 02000000 00 01010101010101010101010101010101 \
                        0100000000000000 0900000000000000 04000000 06000000 0300000000000000 01 \
                        01010101010101010101010101010101 0900000000000000 \
                        03030303030303030303030303030303 0000000000000000 0000000000000000 00 \
                        00000000 00000000 01000000 09090909090909090909090909090909 09 1100 \
                        6265666f72652074686520757064617465 \
                        93afba00e9d5a1e04db2661fa3761c7d33afba832407a7690d80b9d6bdbeff41";
        assert_eq!(hex(&encode(&sample())), expected.replace(' ', ""));
    }

    /// What a new cache has: no fence, nothing sealed, no base.
    #[test]
    fn smallest_manifest_bytes_are_pinned() {
        let timeline = TimelineMeta {
            epochs: EpochTable::new(EpochId([1; 16])),
            purpose: Purpose::Main,
            since: WallTime(6),
            pieces: Vec::new(),
        };
        let smallest = Manifest {
            generation: 1,
            name: "g".into(),
            role: Role::Primary,
            keep: Keep::Cache,
            fence: None,
            acked: Seq::ZERO,
            timelines: BTreeMap::from([(EpochId([1; 16]), timeline)]),
            segments: BTreeMap::new(),
            layers: BTreeMap::new(),
            runs: BTreeMap::new(),
            base: None,
            notes: BTreeMap::new(),
            next_ordinal: 0,
            next_slot: 0,
            next_run: 0,
            ..sample()
        };
        let expected = "53524e6d 0100 0000 0100000000000000 02020202020202020202020202020202 \
                        0100 67 00 00 00 0000000000000000 00000000 00000000 00000000 \
                        01010101010101010101010101010101 01000000 0100 \
                        01010101010101010101010101010101 01010101010101010101010101010101 \
                        0000000000000000 00000000000000000000000000000000 00 0600000000000000 \
                        00000000 00000000 00000000 00000000 00 00000000 \
                        8f490e8c0ca5917021977f986f73413ad07f1640d4e9229456e2c528aadd92d8";
        assert_eq!(hex(&encode(&smallest)), expected.replace(' ', ""));
        assert_eq!(decode(&encode(&smallest)), Ok(smallest));
    }

    #[test]
    fn any_damage_is_found() {
        let good = encode(&sample());
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 1;
            assert!(decode(&bad).is_err(), "byte {at}");
            assert!(decode(&good[..at]).is_err(), "cut at {at}");
        }
    }

    #[test]
    fn a_newer_version_is_named() {
        let mut newer = encode(&sample());
        newer[4] = 9;
        assert_eq!(decode(&newer), Err(BadManifest::Version(9)));
    }

    /// A hash that fits does not make the content sound: it may come from a buggy writer.
    #[test]
    fn hostile_content_never_panics() {
        let good = encode(&sample());
        let body = &good[..good.len() - HASH_LEN];
        for at in 0..body.len() {
            for value in [0u8, 1, 0x7f, 0xff] {
                let mut bad = body.to_vec();
                bad[at] = value;
                let hash = blake3::hash(&bad);
                bad.extend_from_slice(hash.as_bytes());
                let _ = decode(&bad);
            }
        }
    }
}
