//! Frames: envelopes, heads with their records, content.

use bytes::Bytes;
use srn_core::bytes::content_sum;
use srn_core::epoch::{Epoch, Position};
use srn_core::extent::Extent;
use srn_core::frame::envelope::{self, Envelope};
use srn_core::frame::{
    Builder, HEADER_LEN, Head, HeaderFields, MarkKind, Record, ResyncReason, hash_head,
};
use srn_core::ids::{CheckpointId, DiskId, DiskNo, EpochId, FrameHash, GroupId, Seq};
use srn_core::time::{LogTime, WallTime};
use srn_store::codec::{Codecs, Effort};
use srn_store::frame::Frame;
use srn_store::io::BufPool;
use srn_testkit::fuzz::{Target, run, unsealed};
use std::sync::Arc;

fn fields() -> HeaderFields {
    HeaderFields {
        group: GroupId([1; 16]),
        epoch: EpochId([2; 16]),
        seq: Seq(9),
        prev: FrameHash([3; 16]),
        durable: Seq(8),
        log_time: LogTime(4),
        wall_time: WallTime(5),
    }
}

fn position() -> Position {
    Position { epoch: EpochId([7; 16]), seq: Seq(6), hash: FrameHash([8; 16]) }
}

/// Frames with every kind of record, with raw and encoded content.
fn frames() -> Vec<Arc<Frame>> {
    let (disk, extent) = (DiskNo(1), Extent::new(64, 8));
    let without_content = [
        vec![
            Record::Epoch(Epoch { id: EpochId([9; 16]), forked_from: position() }),
            Record::DiskAdd { disk, id: DiskId([4; 16]), sectors: 4096, name: "root" },
            Record::Zero { disk, extent },
            Record::Trim { disk, extent },
            Record::Resize { disk, sectors: 8192 },
        ],
        vec![
            Record::ResyncBegin { disk, reason: ResyncReason::Seeding },
            Record::ResyncEnd { disk },
            Record::ClockStep { step_us: -5_000_000 },
            Record::DiskRemove { disk },
            Record::Mark { id: CheckpointId([5; 16]), kind: MarkKind::Manual, application: true },
        ],
        Vec::new(),
    ];
    let mut frames = Vec::new();
    for records in without_content {
        let mut builder = Builder::new();
        assert!(records.iter().all(|record| builder.record(record)));
        let (head, hash) = builder.finish(&fields());
        frames.push(Arc::new(Frame::from_parts(head, hash, Vec::new()).expect("a frame")));
    }
    for sectors in [1usize, 9, 64, 130] {
        let plain: Vec<u8> = (0..sectors * 512).map(|at| (at / 700) as u8).collect();
        let mut builder = Builder::new();
        let sums: Vec<u64> = plain.chunks(32_768).map(content_sum).collect();
        assert!(builder.write(disk, Extent::new(8, sectors as u64), &sums));
        assert!(builder.record(&Record::Zero { disk, extent }));
        let (head, hash) = builder.finish(&fields());
        let mut content = srn_store::io::AlignedBuf::zeroed(plain.len());
        content[..plain.len()].copy_from_slice(&plain);
        let content = Bytes::from_owner(content).slice(..plain.len());
        let raw = Arc::new(Frame::from_parts(head, hash, vec![content]).expect("a frame"));
        let (mut codecs, pool) = (Codecs::new(), BufPool::new(0));
        frames.push(raw.encoded(Effort::Lz4, &mut codecs, &pool));
        frames.push(raw.encoded(Effort::Zstd(3), &mut codecs, &pool));
        frames.push(raw);
    }
    frames
}

/// A frame as it is on the wire.
fn wire(frame: &Frame) -> Vec<u8> {
    let mut bytes = frame.envelope().encode(frame.table()).to_vec();
    bytes.extend_from_slice(frame.front());
    frame.content().iter().for_each(|piece| bytes.extend_from_slice(piece));
    bytes
}

#[test]
fn envelopes() {
    let target = Target {
        name: "envelopes",
        corpus: frames()
            .iter()
            .map(|frame| frame.envelope().encode(frame.table()).to_vec())
            .collect(),
        seal: unsealed,
        cap: 1 << 16,
    };
    run(&target, |bytes, _| {
        let Ok(envelope) = Envelope::decode(bytes) else { return };
        assert!(envelope.front_len() < 1 << 18 && envelope.disk_len() < 1 << 20);
        assert!(envelope.disk_content_offset() <= envelope.disk_len());
        let table = vec![0; 4 * envelope.encoded_blocks as usize];
        assert_eq!(Envelope::decode(&envelope.encode(&table)), Ok(envelope));
    });
}

#[test]
fn heads_and_records() {
    let target = Target {
        name: "heads",
        corpus: frames().iter().map(|frame| frame.head_bytes().to_vec()).collect(),
        seal: |head| {
            // The length in the header is the head's.
            let len = u32::try_from(head.len()).unwrap_or(0).to_le_bytes();
            if let Some(field) = head.get_mut(8..12) {
                field.copy_from_slice(&len);
            }
        },
        cap: 1 << 19,
    };
    run(&target, |bytes, _| {
        let Ok(head) = Head::decode(bytes) else { return };
        let blocks: Vec<_> = head.blocks().collect();
        assert_eq!(blocks.len(), head.block_count());
        assert_eq!(blocks.iter().map(|block| block.len()).sum::<usize>(), head.content_len());
        build_again(bytes, &head);
    });
}

/// What decodes is what the builder would have written.
fn build_again(bytes: &[u8], head: &Head<'_>) {
    let header = head.header();
    let mut builder = Builder::new();
    let mut blocks = head.blocks();
    for record in head.records() {
        let added = match record {
            Record::Write { disk, extent } => {
                let count = record.content_len().div_ceil(32_768);
                let sums: Vec<u64> = blocks.by_ref().take(count).map(|block| block.sum).collect();
                builder.write(disk, extent, &sums)
            }
            other => builder.record(&other),
        };
        // The builder keeps room that a decoder does not ask for.
        if !added {
            return;
        }
    }
    let (again, hash) = builder.finish(&HeaderFields {
        group: header.group,
        epoch: header.epoch,
        seq: header.seq,
        prev: header.prev,
        durable: header.durable,
        log_time: header.log_time,
        wall_time: header.wall_time,
    });
    assert!(bytes.starts_with(&again), "what decodes is not encoded to the same");
    assert_eq!(hash, hash_head(&again));
}

/// Makes hash and checksum of a frame right, as far as its lengths lead.
pub(crate) fn seal(bytes: &mut Vec<u8>) {
    let Ok(mut envelope) = Envelope::decode(bytes) else { return };
    let head_len = envelope.head_len as usize;
    let front = envelope.front_len();
    let Some(head) = bytes.get(envelope::LEN..envelope::LEN + head_len) else { return };
    envelope.hash = hash_head(head);
    let Some(table) = bytes.get(envelope::LEN + head_len..front) else { return };
    let fixed = envelope.encode(table);
    if let Some(place) = bytes.get_mut(..envelope::LEN) {
        place.copy_from_slice(&fixed);
    }
}

#[test]
fn frames_with_content() {
    let target = Target {
        name: "frames",
        corpus: frames().iter().map(|frame| wire(frame)).collect(),
        seal,
        // A head of 128 KiB decodes to records and blocks; codecs have their work memory.
        cap: 8 << 20,
    };
    let mut verified = 0u64;
    run(&target, |bytes, _| {
        let Some(fixed) = bytes.first_chunk::<{ envelope::LEN }>() else { return };
        let Ok(envelope) = Envelope::decode(fixed) else { return };
        let whole = Bytes::copy_from_slice(bytes);
        if whole.len() < envelope.wire_len() {
            return;
        }
        let front = whole.slice(envelope::LEN..envelope.front_len());
        let content = whole.slice(envelope.front_len()..envelope.wire_len());
        let Ok(frame) = Frame::from_copy(fixed, front, content) else { return };
        assert!(frame.head_bytes().len() >= HEADER_LEN);
        if frame.verify(&mut Codecs::new()).is_ok() {
            verified += 1;
            // The copy's own fields are not the frame's.
            let again = Arc::new(frame);
            let sent = wire(&again);
            assert_eq!(&sent[envelope::LEN..], &bytes[envelope::LEN..envelope.wire_len()]);
        }
    });
    assert!(verified > 10, "nothing gets as far as its content");
}
