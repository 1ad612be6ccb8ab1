//! Frames and envelopes: bytes are pinned, everything built decodes, nothing hostile panics.

extern crate std;
use std::string::{String, ToString};
use std::vec;
use std::vec::Vec;

use proptest::prelude::*;

use super::envelope::{Codec, Envelope, EnvelopeError, LEN, Stored, encode_table};
use super::*;
use crate::bytes::Reader;
use crate::epoch::{Epoch, Position};
use crate::extent::Extent;
use crate::ids::{CheckpointId, DiskId, DiskNo};

fn fields(seq: u64) -> HeaderFields {
    HeaderFields {
        group: GroupId([0x11; 16]),
        epoch: EpochId([0x22; 16]),
        seq: Seq(seq),
        prev: FrameHash([0x33; 16]),
        durable: Seq(seq - 1),
        log_time: LogTime(0x0102_0304),
        wall_time: WallTime(-2),
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| std::format!("{byte:02x}")).collect()
}

#[test]
fn head_bytes_are_pinned() {
    let mut builder = Builder::new();
    assert!(builder.write(DiskNo(1), Extent::new(8, 8), &[0xAABB]));
    assert!(builder.record(&Record::Zero { disk: DiskNo(1), extent: Extent::new(64, 128) }));
    assert!(builder.record(&Record::Mark {
        id: CheckpointId([0x44; 16]),
        kind: MarkKind::Manual,
        application: false
    }));
    let (head, hash) = builder.finish(&fields(5));
    let expected = [
        "53524e66",         // magic "SRNf"
        "0100",             // version
        "8000",             // header length
        "cc000000",         // head length
        "03000000",         // records
        "01000000",         // blocks
        "00100000",         // content length
        "0500000000000000", // sequence
        "11111111111111111111111111111111",
        "22222222222222222222222222222222",
        "33333333333333333333333333333333",
        "0400000000000000",                                 // durable
        "0403020100000000",                                 // log time
        "feffffffffffffff",                                 // wall time
        "000000000000000000000000000000000000000000000000", // reserved
        "01001000",                                         // write, 16 bytes
        "01000000",                                         // disk
        "08000000",                                         // sectors
        "0800000000000000",                                 // start
        "02001400",                                         // zero, 20 bytes
        "01000000",
        "4000000000000000", // start
        "8000000000000000", // sectors
        "04001400",         // mark, 20 bytes
        "44444444444444444444444444444444",
        "02000000",         // manual
        "bbaa000000000000", // checksum of the one block
    ]
    .concat();
    assert_eq!(hex(&head), expected);
    assert_eq!(hash, hash_head(&head));
    assert_eq!(hash.to_string(), PINNED_HASH);
}

/// BLAKE3 of the head above, first 16 bytes.
const PINNED_HASH: &str = "b13e099bae7551dca4b3fd8b591d0580";

#[test]
fn envelope_bytes_are_pinned() {
    let envelope = Envelope {
        segment: 7,
        head_len: 0xd4,
        encoded_blocks: 1,
        stored_len: 0x123,
        hash: FrameHash([0x55; 16]),
        durable: Seq(9),
    };
    let table = encode_table(&[Stored { codec: Codec::Zstd, len: 0x123 }]);
    assert_eq!(hex(&table), "23010002");
    let bytes = envelope.encode(&table);
    let expected = [
        "53524e65",
        "0100",
        "0100",
        "0700000000000000",
        "d4000000",
        "01000000",
        "23010000",
        "00000000",
        "55555555555555555555555555555555",
        "0900000000000000",
    ]
    .concat();
    assert_eq!(hex(&bytes[..LEN - 8]), expected);
    // XXH3 of the 56 bytes above and the four of the table.
    assert_eq!(hex(&bytes[LEN - 8..]), "7dd556b60b7596a6");
    assert_eq!(Envelope::decode(&bytes), Ok(envelope));
    assert_eq!(envelope.check_sum(&bytes, &table), Ok(()));
    for at in 0..LEN {
        let mut bad = bytes;
        bad[at] ^= 0x10;
        let verdict = Envelope::decode(&bad).and_then(|e| e.check_sum(&bad, &table));
        assert!(verdict.is_err(), "byte {at}");
    }
    assert_eq!(envelope.check_sum(&bytes, &[0; 4]), Err(EnvelopeError::Sum));
    assert_eq!(envelope.disk_len(), 8192);
    assert_eq!(envelope.wire_len(), 64 + 0xd4 + 4 + 0x123);
}

/// As it is on the wire, with raw content: no flag, no table, no segment, no watermark.
#[test]
fn raw_envelope_bytes_are_pinned() {
    let envelope = Envelope {
        segment: 0,
        head_len: 0x9c,
        encoded_blocks: 0,
        stored_len: 0x1000,
        hash: FrameHash([0x55; 16]),
        durable: Seq::ZERO,
    };
    let bytes = envelope.encode(&[]);
    let expected = "53524e65 0100 0000 0000000000000000 9c000000 00000000 00100000 00000000 \
                    55555555555555555555555555555555 0000000000000000 c5cdc1b111e5d445";
    assert_eq!(hex(&bytes), expected.replace(' ', ""));
    assert_eq!(Envelope::decode(&bytes), Ok(envelope));
}

#[test]
fn encoding_table_bytes_are_pinned() {
    let table = [(Codec::Raw, 0x8000), (Codec::Lz4, 0x123), (Codec::Zstd, 1)];
    let table = table.map(|(codec, len)| Stored { codec, len });
    assert_eq!(hex(&encode_table(&table)), "008000002301000101000002");
}

/// One of each kind, and each code once, with its bytes: kind, flags, body length, body.
fn records() -> Vec<(Record<'static>, &'static str)> {
    let (disk, extent) = (DiskNo(0x102), Extent::new(0x0304, 0x05));
    let position =
        Position { epoch: EpochId([0x66; 16]), seq: Seq(0x0708), hash: FrameHash([0x77; 16]) };
    let mark = |kind, application| Record::Mark { id: CheckpointId([0x44; 16]), kind, application };
    let resync = |reason| Record::ResyncBegin { disk, reason };
    vec![
        (Record::Write { disk, extent }, "01001000 02010000 05000000 0403000000000000"),
        (Record::Zero { disk, extent }, "02001400 02010000 0403000000000000 0500000000000000"),
        (Record::Trim { disk, extent }, "03001400 02010000 0403000000000000 0500000000000000"),
        (mark(MarkKind::Periodic, false), "04001400 44444444444444444444444444444444 01000000"),
        (mark(MarkKind::Manual, true), "04001400 44444444444444444444444444444444 02010000"),
        (mark(MarkKind::Final, false), "04001400 44444444444444444444444444444444 03000000"),
        (mark(MarkKind::Scheduled, true), "04001400 44444444444444444444444444444444 04010000"),
        (
            Record::DiskAdd { disk, id: DiskId([0x55; 16]), sectors: 8, name: "root" },
            "05002400 02010000 55555555555555555555555555555555 0800000000000000 04 726f6f74 000000",
        ),
        (Record::DiskRemove { disk }, "06000400 02010000"),
        (Record::Resize { disk, sectors: 16 }, "07000c00 02010000 1000000000000000"),
        (
            Record::Epoch(Epoch { id: EpochId([0x88; 16]), forked_from: position }),
            "08003800 88888888888888888888888888888888 66666666666666666666666666666666 \
             0807000000000000 77777777777777777777777777777777",
        ),
        (resync(ResyncReason::Seeding), "09000800 02010000 01000000"),
        (resync(ResyncReason::MirrorRestarted), "09000800 02010000 02000000"),
        (resync(ResyncReason::MirrorReconnected), "09000800 02010000 03000000"),
        (resync(ResyncReason::Pass), "09000800 02010000 04000000"),
        (Record::ResyncEnd { disk }, "0a000400 02010000"),
        (Record::ClockStep { step_us: -2 }, "0b000800 feffffffffffffff"),
    ]
}

#[test]
fn record_bytes_are_pinned() {
    for (record, bytes) in records() {
        let mut out = Vec::new();
        record.encode(&mut out);
        assert_eq!(hex(&out), bytes.replace(' ', ""), "{record:?}");
        assert_eq!(record::decode(&mut Reader::new(&out)), Ok(record));
    }
}

/// Owned form of the records that a strategy can make.
fn any_record() -> impl Strategy<Value = (u8, u32, u64, u64, [u8; 16])> {
    (0u8..11, 0u32..64, 0u64..1 << 41, 1u64..1 << 20, any::<[u8; 16]>())
}

fn make(
    builder: &mut Builder,
    (kind, disk, start, sectors, id): (u8, u32, u64, u64, [u8; 16]),
) -> bool {
    let disk = DiskNo(disk);
    let start = start.min(crate::limits::DISK_SECTORS_MAX - sectors);
    let extent = Extent::new(start, sectors);
    let position = Position { epoch: EpochId(id), seq: Seq(start), hash: FrameHash(id) };
    match kind {
        0 | 1 => {
            let sectors = 1 + sectors % 512;
            let sums: Vec<u64> =
                block_lens(sectors as usize * 512).map(|len| len as u64 ^ start).collect();
            builder.write(disk, Extent::new(start, sectors), &sums)
        }
        2 => builder.record(&Record::Zero { disk, extent }),
        3 => builder.record(&Record::Trim { disk, extent }),
        4 => builder.record(&Record::DiskAdd { disk, id: DiskId(id), sectors, name: "disk-a" }),
        5 => builder.record(&Record::DiskRemove { disk }),
        6 => builder.record(&Record::Resize { disk, sectors }),
        7 => builder.record(&Record::Epoch(Epoch { id: EpochId(id), forked_from: position })),
        8 => builder.record(&Record::ResyncBegin { disk, reason: ResyncReason::Seeding }),
        9 => builder.record(&Record::ResyncEnd { disk }),
        _ => builder.record(&Record::ClockStep { step_us: -(start as i64) }),
    }
}

proptest! {
    #[test]
    fn what_is_built_decodes(records in prop::collection::vec(any_record(), 0..40), mark in any::<bool>()) {
        let mut builder = Builder::new();
        let mut added = 0u32;
        for record in records {
            added += u32::from(make(&mut builder, record));
        }
        if mark {
            let kind = MarkKind::Periodic;
            added += u32::from(builder.record(&Record::Mark { id: CheckpointId([1; 16]), kind, application: true }));
            let more = builder.record(&Record::DiskRemove { disk: DiskNo(0) });
            prop_assert!(!more, "a mark ends its frame");
        }
        let content = builder.content_len();
        let (head, _) = builder.finish(&fields(9));
        prop_assert!(builder.is_empty());
        let decoded = Head::decode(&head).unwrap();
        prop_assert_eq!(decoded.header().records, added);
        prop_assert_eq!(decoded.records().count(), added as usize);
        prop_assert_eq!(decoded.content_len(), content);
        let blocks: Vec<Block> = decoded.blocks().collect();
        prop_assert_eq!(blocks.iter().map(Block::len).sum::<usize>(), content);
        prop_assert_eq!(blocks.len(), decoded.block_count());
        // Building again what was decoded gives the same bytes.
        let mut again = Builder::new();
        let mut sums = blocks.iter();
        for record in decoded.records() {
            let added = match record {
                Record::Write { disk, extent } => {
                    let n = block_lens(record.content_len()).count();
                    let sums: Vec<u64> = sums.by_ref().take(n).map(|block| block.sum).collect();
                    again.write(disk, extent, &sums)
                }
                other => again.record(&other),
            };
            prop_assert!(added);
        }
        prop_assert_eq!(again.finish(&fields(9)).0, head);
    }

    #[test]
    fn hostile_heads_never_panic(
        records in prop::collection::vec(any_record(), 0..10),
        flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        cut in any::<prop::sample::Index>(),
    ) {
        let mut builder = Builder::new();
        for record in records {
            let _ = make(&mut builder, record);
        }
        let (mut head, _) = builder.finish(&fields(9));
        for (at, value) in flips {
            let at = at.index(head.len());
            head[at] = value;
        }
        for bytes in [&head[..], &head[..cut.index(head.len())]] {
            if let Ok(decoded) = Head::decode(bytes) {
                prop_assert_eq!(decoded.blocks().map(|b| b.len()).sum::<usize>(), decoded.content_len());
            }
        }
    }

    #[test]
    fn hostile_envelopes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..100), table in prop::collection::vec(any::<u8>(), 0..40)) {
        let mut builder = Builder::new();
        prop_assert!(builder.write(DiskNo(1), Extent::new(8, 100), &[1, 2]));
        let (head, _) = builder.finish(&fields(5));
        let head = Head::decode(&head).unwrap();
        let mut framed = envelope::MAGIC.to_vec();
        framed.extend([1, 0]);
        framed.extend(&bytes);
        for bytes in [&bytes, &framed] {
            if let Ok(envelope) = Envelope::decode(bytes) {
                let _ = envelope.stored_blocks(&head, &table);
                prop_assert!(envelope.disk_len() <= crate::limits::FRAME_DISK_MAX);
            }
        }
    }
}

#[test]
fn encoding_tables_must_fit_the_frame() {
    let mut builder = Builder::new();
    assert!(builder.write(DiskNo(1), Extent::new(0, 72), &[1, 2])); // 32 KiB and 4 KiB
    let (bytes, hash) = builder.finish(&fields(5));
    let head = Head::decode(&bytes).unwrap();
    let check = |blocks: &[(Codec, u32)], stored_len: u32| {
        let blocks: Vec<Stored> =
            blocks.iter().map(|(codec, len)| Stored { codec: *codec, len: *len }).collect();
        let envelope = Envelope {
            segment: 0,
            head_len: 0,
            encoded_blocks: blocks.len() as u32,
            stored_len,
            hash,
            durable: Seq(0),
        };
        envelope.stored_blocks(&head, &encode_table(&blocks)).map(|blocks| blocks.len())
    };
    assert_eq!(check(&[], 36864), Ok(2));
    assert!(check(&[], 36863).is_err());
    assert_eq!(check(&[(Codec::Lz4, 100), (Codec::Raw, 4096)], 4196), Ok(2));
    for (blocks, len) in [
        (vec![(Codec::Lz4, 100)], 100),
        (vec![(Codec::Lz4, 100), (Codec::Raw, 4095)], 4195),
        (vec![(Codec::Lz4, 32768), (Codec::Raw, 4096)], 36864),
        (vec![(Codec::Zstd, 0), (Codec::Raw, 4096)], 4096),
        (vec![(Codec::Lz4, 100), (Codec::Raw, 4096), (Codec::Raw, 1)], 4197),
        (vec![(Codec::Lz4, 100), (Codec::Raw, 4096)], 4197),
    ] {
        assert!(check(&blocks, len).is_err(), "{blocks:?}");
    }
}

#[test]
fn frames_are_capped() {
    let mut builder = Builder::new();
    let mut writes = 0;
    while builder.write(DiskNo(0), Extent::new(writes, 1), &[0]) {
        writes += 1;
    }
    assert_eq!(writes, 512, "256 KiB of payload in sectors");
    let mut builder = Builder::new();
    let name = "n".repeat(63);
    let mut adds = 0;
    while builder.record(&Record::DiskAdd {
        disk: DiskNo(0),
        id: DiskId([0; 16]),
        sectors: 1,
        name: &name,
    }) {
        adds += 1;
    }
    assert_eq!(adds, 1024, "the record cap comes first");
    let (head, _) = builder.finish(&fields(2));
    assert!(Head::decode(&head).is_ok());
    assert!(
        !Builder::new().write(DiskNo(0), Extent::new(0, 513), &[0; 9]),
        "one write over the cap"
    );
    assert!(!Builder::new().write(DiskNo(0), Extent::new(0, 8), &[0; 2]), "a checksum too many");
    assert!(!Builder::new().write(DiskNo(0), Extent::new(0, 0), &[]), "an empty write");
}
