//! Control messages and stream headers: pinned bytes, round trips, hostile bytes.

extern crate std;
use std::string::{String, ToString};
use std::vec::Vec;
use std::{format, vec};

use proptest::prelude::*;

use super::*;
use crate::epoch::{EpochTable, Position};
use crate::extent::Extent;
use crate::ids::{CheckpointId, DiskId, DiskNo, EpochId, FrameHash, GroupId, Seq};
use crate::time::{LogTime, WallTime};

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
fn position(n: u8) -> Position {
    Position { epoch: EpochId([n; 16]), seq: Seq(u64::from(n)), hash: FrameHash([n; 16]) }
}
fn table() -> EpochTable {
    EpochTable::new(EpochId([1; 16])).fork(EpochId([2; 16]), position(1)).unwrap()
}

/// One of each, with its bytes.
fn messages() -> Vec<(Message, String)> {
    let group = GroupId([0xaa; 16]);
    let g = "aa".repeat(16);
    let p = |n: u8| {
        format!(
            "{}{n:02x}00000000000000{}",
            format!("{n:02x}").repeat(16),
            format!("{n:02x}").repeat(16)
        )
    };
    let epochs = format!(
        "0200{}{}0000000000000000{}{}{}",
        "01".repeat(16),
        "01".repeat(16),
        "00".repeat(16),
        "02".repeat(16),
        p(1)
    );
    vec![
        (
            Message::Hello(Hello {
                name: "node-a".parse().unwrap(),
                software: "0.1".into(),
                wall_time: WallTime(5),
            }),
            "1c000000 01 53524e68 0100 0600 6e6f64652d61 0300 302e31 0500000000000000".replace(' ', ""),
        ),
        (
            Message::Offer(Offer {
                group,
                name: "web".parse().unwrap(),
                nonce: 7,
                epochs: table(),
                head: position(3),
                oldest: Seq(1),
                has_copy: true,
                disks: vec![OfferedDisk {
                    no: DiskNo(4),
                    id: DiskId([0xbb; 16]),
                    sectors: 8,
                    name: "d".parse().unwrap(),
                }],
            }),
            format!(
                "e2000000 02 {g} 0300 776562 0700000000000000 {epochs} {} 0100000000000000 01 0100 04000000 {} 0800000000000000 0100 64",
                p(3),
                "bb".repeat(16)
            )
            .replace(' ', ""),
        ),
        (
            Message::Accept(Accept {
                group,
                nonce: 7,
                position: position(3),
                credit: 9,
                compare: false,
                under: None,
            }),
            format!("4b000000 03 {g} 0700000000000000 {} 0900000000000000 00 00", p(3))
                .replace(' ', ""),
        ),
        (
            Message::Accept(Accept {
                group,
                nonce: 7,
                position: position(3),
                credit: 9,
                compare: true,
                under: Some(Under {
                    to: position(6),
                    next: Place { disk: DiskNo(2), sector: 0x80 },
                }),
            }),
            format!(
                "7f000000 03 {g} 0700000000000000 {} 0900000000000000 01 01 {} 02000000 8000000000000000",
                p(3),
                p(6)
            )
            .replace(' ', ""),
        ),
        (
            Message::Wanted(Wanted {
                group,
                nonce: 7,
                disk: DiskNo(2),
                first: 0x400,
                leaves: vec![(3, [[0x11; 16]; 16])],
            }),
            format!(
                "290100000e {g} 0700000000000000 02000000 0004000000000000 0100 0300 {}",
                "11".repeat(256)
            )
            .replace(' ', ""),
        ),
        (
            Message::Refuse(Refuse {
                group,
                code: RefuseCode::Fenced,
                text: "no".into(),
                epochs: Some(table()),
            }),
            format!("89000000 04 {g} 01 0200 6e6f 01 {epochs}").replace(' ', ""),
        ),
        (Message::Ack { group, seq: Seq(3) }, format!("1900000005{g}0300000000000000")),
        (Message::Credit { group, limit: 4 }, format!("1900000006{g}0400000000000000")),
        (
            Message::Progress(Progress {
                group,
                head: Seq(1),
                log_time: LogTime(2),
                wall_time: WallTime(3),
                behind_bytes: 4,
                behind_us: 5,
                state: "s".into(),
            }),
            format!("3c00000007{g}0100000000000000020000000000000003000000000000000400000000000000050000000000000001 0073").replace(' ', ""),
        ),
        (Message::Hindrance { group, text: "full".into() }, format!("1700000008{g}040066756c6c")),
        (Message::Drain { group }, format!("1100000009{g}")),
        (Message::Drained { group, last: position(6) }, format!("390000000a{g}{}", p(6))),
        (
            Message::MarkRequest { group, id: CheckpointId([0xcc; 16]) },
            format!("210000000b{g}{}", "cc".repeat(16)),
        ),
        (
            Message::Note(CheckpointNote {
                group,
                id: CheckpointId([0xcc; 16]),
                label: "ok".into(),
                pin: true,
                unquiet: false,
            }),
            format!("270000000d{g}{}010002006f6b", "cc".repeat(16)),
        ),
        (Message::Goodbye { unpaired: true, text: "bye".into() }, "070000000c010300627965".into()),
    ]
    .into_iter()
    .chain(integrity_messages())
    .collect()
}

/// One of each that is about content which both nodes hold, with its bytes.
fn integrity_messages() -> Vec<(Message, String)> {
    let g = format!("{}0500000000000000", "aa".repeat(16));
    let p = format!("{}0300000000000000{}", "03".repeat(16), "03".repeat(16));
    let range = |grain| HashRange { disk: DiskNo(2), grain, first: 0x102, count: 7 };
    let runs = vec![
        HashRun::Zero(3),
        HashRun::Known(vec![[0x11; 16], [0x22; 16]]),
        HashRun::Unreadable(1),
    ];
    let known = format!("{}{}", "11".repeat(16), "22".repeat(16));
    let all = [
        (
            Words::HashesWanted { at: position(3), range: range(Grain::Leaf) },
            format!("52000000 20 {g} {p} 02000000 00 0201000000000000 07000000"),
        ),
        (
            Words::HashesWanted { at: position(3), range: range(Grain::Page) },
            format!("52000000 20 {g} {p} 02000000 01 0201000000000000 07000000"),
        ),
        (
            Words::Hashes(runs),
            format!("4c000000 21 {g} 03000000 00 03000000 01 02000000 {known} 02 01000000"),
        ),
        (
            Words::Cannot { code: CannotCode::NoCopy, text: "no".into() },
            format!("1e000000 22 {g} 02 0200 6e6f"),
        ),
        (Words::Enough, format!("19000000 23 {g}")),
        (
            Words::ContentWanted { at: position(3), disk: DiskNo(2), extent: Extent::new(0x10, 8) },
            format!("51000000 25 {g} {p} 02000000 1000000000000000 08000000"),
        ),
        (
            Words::Content { hash: [0x33; 16], bytes: vec![1, 2, 3] },
            format!("30000000 26 {g} {} 03000000 010203", "33".repeat(16)),
        ),
        (
            Words::FrameWanted { epoch: EpochId([3; 16]), seq: Seq(9) },
            format!("31000000 27 {g} {} 0900000000000000", "03".repeat(16)),
        ),
        (Words::Frame(vec![4, 5]), format!("1f000000 28 {g} 02000000 0405")),
        (
            Words::Report { alert: true, text: "bad".into() },
            format!("1f000000 24 {g} 01 0300 626164"),
        ),
    ];
    let message =
        |words| Message::Integrity(Integrity { group: GroupId([0xaa; 16]), number: 5, words });
    all.into_iter().map(|(words, bytes)| (message(words), bytes.replace(' ', ""))).collect()
}

#[test]
fn reasons_for_no_answer_are_pinned() {
    for (code, number) in [
        (CannotCode::NotInHistory, "01"),
        (CannotCode::NoCopy, "02"),
        (CannotCode::Busy, "03"),
        (CannotCode::Failed, "04"),
    ] {
        let words = Words::Cannot { code, text: String::new() };
        let message =
            Message::Integrity(Integrity { group: GroupId([0xaa; 16]), number: 5, words });
        let encoded = message.encode();
        let expected = format!("1c000000 22 {} 0500000000000000 {number} 0000", "aa".repeat(16));
        assert_eq!(hex(&encoded), expected.replace(' ', ""), "{code:?}");
        assert_eq!(Message::decode(&encoded[PREFIX_LEN..]), Ok(message));
    }
}

/// Lengths that are claimed and impossible ranges are refused before anything is set aside.
#[test]
fn ranges_and_runs_of_hashes_are_bounded() {
    let group = "aa".repeat(16);
    let bytes = |text: String| -> Vec<u8> {
        let text = text.replace(' ', "");
        (0..text.len() / 2)
            .map(|at| u8::from_str_radix(&text[2 * at..][..2], 16).unwrap())
            .collect()
    };
    let p = "03".repeat(40);
    let asked =
        |rest: &str| Message::decode(&bytes(format!("20 {group} 0500000000000000 {p} {rest}")));
    let told = |rest: &str| Message::decode(&bytes(format!("21 {group} 0500000000000000 {rest}")));
    assert!(asked("02000000 00 0000000000000000 00400000").is_ok());
    for wrong in [
        "00100000 00 0000000000000000 01000000",
        "02000000 02 0000000000000000 01000000",
        "02000000 00 0000000000000040 01000000",
        "02000000 00 0000000000000000 00000000",
        "02000000 00 0000000000000000 01400000",
    ] {
        assert!(matches!(asked(wrong), Err(WireError::OutOfRange(_))), "{wrong}");
    }
    let content =
        |rest: &str| Message::decode(&bytes(format!("25 {group} 0500000000000000 {p} {rest}")));
    assert!(content("02000000 0000000000000000 80000000").is_ok());
    for wrong in [
        "02000000 0000000000000000 00000000",
        "02000000 0000000000000000 81000000",
        "02000000 ffffffffffffffff 01000000",
        "00100000 0000000000000000 01000000",
    ] {
        assert!(matches!(content(wrong), Err(WireError::OutOfRange(_))), "{wrong}");
    }
    let frame = |rest: &str| Message::decode(&bytes(format!("28 {group} 0500000000000000 {rest}")));
    for wrong in ["00000000", "ffffffff"] {
        assert!(matches!(frame(wrong), Err(WireError::OutOfRange(_))), "{wrong}");
    }
    assert!(told("01000000 00 00400000").is_ok());
    for wrong in [
        "00000000",
        "01000000 00 00000000",
        "01000000 03 01000000",
        "02000000 00 00400000 00 01000000",
        "01000000 01 ffffffff",
    ] {
        assert!(matches!(told(wrong), Err(WireError::OutOfRange(_))), "{wrong}");
    }
}

#[test]
fn message_bytes_are_pinned_and_round_trip() {
    for (message, bytes) in messages() {
        let encoded = message.encode();
        assert_eq!(hex(&encoded), bytes, "{message:?}");
        let (prefix, body) = encoded.split_first_chunk().unwrap();
        assert_eq!(Message::len_from_prefix(*prefix), Ok(body.len()));
        assert_eq!(Message::decode(body), Ok(message));
    }
}

#[test]
fn refusal_bytes_are_pinned() {
    let group = GroupId([0xaa; 16]);
    for (code, number) in [
        (RefuseCode::Fenced, "01"),
        (RefuseCode::Diverged, "02"),
        (RefuseCode::Paused, "03"),
        (RefuseCode::Storage, "04"),
        (RefuseCode::NameTaken, "05"),
        (RefuseCode::Deleted, "06"),
        (RefuseCode::TooFarBehind, "07"),
        (RefuseCode::NotDrained, "08"),
        (RefuseCode::Ahead, "09"),
    ] {
        let message = Message::Refuse(Refuse { group, code, text: "no".into(), epochs: None });
        let encoded = message.encode();
        let bytes = format!("17000000 04 {} {number} 0200 6e6f 00", "aa".repeat(16));
        assert_eq!(hex(&encoded), bytes.replace(' ', ""), "{code:?}");
        assert_eq!(Message::decode(&encoded[PREFIX_LEN..]), Ok(message));
    }
}

/// One of each item of a stream of changes, with its bytes.
fn items() -> Vec<(Item, String)> {
    let extent = Extent::new(0x10, 8);
    let known = format!("{}{}", "11".repeat(16), "22".repeat(16));
    let all = [
        (
            Item::Zero { disk: DiskNo(2), extent, trim: true },
            "01000000 02000000 1000000000000000 09000000 0800000000000000 01".into(),
        ),
        (
            Item::Content {
                disk: DiskNo(2),
                extent,
                codec: crate::frame::envelope::Codec::Lz4,
                sum: 5,
                stored: vec![0xee; 3],
            },
            "02000000 02000000 1000000000000000 10000000 0500000000000000 0800 01 0000 eeeeee"
                .into(),
        ),
        (
            Item::Hashes {
                disk: DiskNo(2),
                first: 0x400,
                runs: vec![HashRun::Zero(3), HashRun::Known(vec![[0x11; 16], [0x22; 16]])],
            },
            format!(
                "03000000 02000000 0004000000000000 2e000000 02000000 00 03000000 01 02000000 {known}"
            ),
        ),
        (
            Item::Settled { disk: DiskNo(2), first: 0x400 },
            "04000000 02000000 0004000000000000 00000000".into(),
        ),
        (Item::End, "05000000 00000000 0000000000000000 00000000".into()),
    ];
    all.into_iter().map(|(item, bytes): (Item, String)| (item, bytes.replace(' ', ""))).collect()
}

fn decode_item(bytes: &[u8]) -> Result<Item, WireError> {
    let (head, body) = bytes.split_first_chunk().ok_or(WireError::OutOfRange("head"))?;
    let head = ItemHead::decode(head)?;
    let body = body.get(..head.body_len()).ok_or(WireError::OutOfRange("body"))?;
    Item::decode(&head, body)
}

#[test]
fn bytes_of_changes_are_pinned_and_round_trip() {
    for (item, bytes) in items() {
        let encoded = item.encode();
        assert_eq!(hex(&encoded), bytes, "{item:?}");
        for cut in 0..encoded.len() {
            assert!(decode_item(&encoded[..cut]).is_err(), "{item:?} cut at {cut}");
        }
        assert_eq!(decode_item(&encoded), Ok(item));
    }
    let header = ChangesHeader {
        group: GroupId([0xaa; 16]),
        nonce: 7,
        way: Way::Compared,
        catalog_len: 0x30,
        total: 0x1000,
        begin: Place { disk: DiskNo(2), sector: 0x80 },
    };
    let bytes = format!(
        "53524e63 0100 0000 {} 0700000000000000 02000000 30000000 0010000000000000 8000000000000000 02000000 00000000",
        "aa".repeat(16)
    );
    let encoded = header.encode();
    assert_eq!(hex(&encoded), bytes.replace(' ', ""));
    assert!(carries_changes(&encoded));
    assert_eq!(ChangesHeader::decode(&encoded.try_into().unwrap()), Ok(header));
}

#[test]
fn lengths_of_changes_are_bounded() {
    let head = |kind: u32, len: u32| {
        let mut bytes = [0; ItemHead::LEN];
        bytes[..4].copy_from_slice(&kind.to_le_bytes());
        bytes[16..].copy_from_slice(&len.to_le_bytes());
        ItemHead::decode(&bytes)
    };
    assert!(head(2, 13 + 32_768).is_ok());
    for (kind, len) in [(2, 13 + 32_769), (2, 13), (1, 10), (3, u32::MAX), (5, 1)] {
        assert!(matches!(head(kind, len), Err(WireError::OutOfRange(_))), "{kind} {len}");
    }
    assert_eq!(head(6, 0), Err(WireError::UnknownType(6)));
    // More leaves than go together, in few bytes.
    let runs = vec![HashRun::Zero(1025)];
    let many = Item::Hashes { disk: DiskNo(0), first: 0, runs }.encode();
    assert_eq!(decode_item(&many), Err(WireError::OutOfRange("number of hashes")));
    let behind = Extent::new(crate::limits::DISK_SECTORS_MAX - 1, 2);
    let zero = Item::Zero { disk: DiskNo(0), extent: behind, trim: false }.encode();
    assert_eq!(decode_item(&zero), Err(WireError::OutOfRange("extent")));
}

#[test]
fn messages_must_be_exact() {
    for (message, _) in messages() {
        let body = message.encode().split_off(PREFIX_LEN);
        for cut in 0..body.len() {
            assert!(Message::decode(&body[..cut]).is_err(), "{message:?} cut at {cut}");
        }
        let mut long = body.clone();
        long.push(0);
        assert_eq!(Message::decode(&long), Err(WireError::Trailing(1)), "{message:?}");
    }
    assert_eq!(Message::decode(&[99]), Err(WireError::UnknownType(99)));
    assert_eq!(Message::len_from_prefix([0; 4]), Err(WireError::OutOfRange("message length")));
    assert_eq!(Message::len_from_prefix([0, 0, 0, 1]), Err(WireError::TooLong(1 << 24)));
}

#[test]
fn another_version_is_named() {
    let hello =
        Hello { name: "a".parse().unwrap(), software: String::new(), wall_time: WallTime(0) };
    let mut body = Message::Hello(hello).encode().split_off(PREFIX_LEN);
    body[5] = 9;
    // Whatever follows the version may have changed too: it is not looked at.
    body.truncate(7);
    let error = Message::decode(&body).unwrap_err();
    assert_eq!(error, WireError::Version { theirs: 9 });
    assert!(error.to_string().contains("version 9"));
}

#[test]
fn text_from_a_peer_cannot_move_the_cursor() {
    let message = Message::Goodbye { unpaired: false, text: "\u{1b}[2J".into() };
    let error = Message::decode(&message.encode()[PREFIX_LEN..]).unwrap_err();
    assert_eq!(error, WireError::OutOfRange("text has control characters"));
}

#[test]
fn long_texts_are_cut_at_a_character() {
    let message = Message::Goodbye { unpaired: false, text: "\u{e4}".repeat(400) };
    let Message::Goodbye { text, .. } = Message::decode(&message.encode()[PREFIX_LEN..]).unwrap()
    else {
        panic!("another message");
    };
    assert_eq!(text.len(), 512);
}

#[test]
fn stream_header_bytes_are_pinned() {
    let header = StreamHeader { group: GroupId([0xaa; 16]), nonce: 2, first: Seq(3) };
    let bytes = header.encode();
    assert_eq!(
        hex(&bytes),
        format!("53524e7301000000{}02000000000000000300000000000000", "aa".repeat(16))
    );
    let mut bytes: [u8; StreamHeader::LEN] = bytes.try_into().unwrap();
    assert_eq!(StreamHeader::decode(&bytes), Ok(header));
    bytes[4] = 2;
    assert_eq!(StreamHeader::decode(&bytes), Err(WireError::Version { theirs: 2 }));
}

/// A stream's frame: the head has one write of one block, the content 4 KiB, which follow raw.
#[test]
fn frame_bytes_on_the_wire_are_pinned() {
    use crate::bytes::content_sum;
    use crate::extent::Extent;
    use crate::frame::{Builder, HeaderFields, envelope::Envelope};
    let content = [0x5a; 4096];
    let mut builder = Builder::new();
    assert!(builder.write(DiskNo(1), Extent::new(8, 8), &[content_sum(&content)]));
    let (head, hash) = builder.finish(&HeaderFields {
        group: GroupId([0xaa; 16]),
        epoch: EpochId([1; 16]),
        seq: Seq(3),
        prev: FrameHash([3; 16]),
        durable: Seq(2),
        log_time: LogTime(4),
        wall_time: WallTime(5),
    });
    let envelope = Envelope {
        segment: 0,
        head_len: u32::try_from(head.len()).unwrap(),
        encoded_blocks: 0,
        stored_len: 4096,
        hash,
        durable: Seq::ZERO,
    };
    let fixed = envelope.encode(&[]);
    let expected = "53524e65 0100 0000 0000000000000000 9c000000 00000000 00100000 00000000 \
                    017b32b5b97a1b8a5f4428bcc2fcbbd1 0000000000000000 11307c73cd8fca3f 53524e66 \
                    0100 8000 9c000000 01000000 01000000 00100000 0300000000000000 \
                    aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa 01010101010101010101010101010101 \
                    03030303030303030303030303030303 0200000000000000 0400000000000000 \
                    0500000000000000 000000000000000000000000000000000000000000000000 01001000 \
                    01000000 08000000 0800000000000000 4eda9dd95f6b88b7";
    assert_eq!([hex(&fixed), hex(&head)].concat(), expected.replace(' ', ""));
    assert_eq!(WireFrame::decode(&fixed), Ok(WireFrame { envelope }));
    assert_eq!(envelope.wire_len(), 64 + 156 + 4096);
    let on_disk = Envelope { segment: 1, ..envelope };
    assert!(WireFrame::decode(&on_disk.encode(&[])).is_err());
}

proptest! {
    #[test]
    fn hostile_messages_never_panic(
        at in any::<prop::sample::Index>(),
        flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
        noise in prop::collection::vec(any::<u8>(), 0..200),
    ) {
        let all = messages();
        let mut bytes = all[at.index(all.len())].0.encode().split_off(PREFIX_LEN);
        for (at, value) in flips {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        for bytes in [&bytes, &noise] {
            if let Ok(message) = Message::decode(bytes) {
                // What decodes is canonical.
                prop_assert_eq!(&message.encode()[PREFIX_LEN..], &bytes[..]);
            }
        }
    }
}
