//! What a peer sends: control messages, the headers of streams, and what changed.

use srn_core::extent::Extent;
use srn_core::frame::envelope::Codec;
use srn_core::ids::{DiskNo, GroupId, Seq};
use srn_core::time::WallTime;
use srn_core::wire::{
    ChangesHeader, HashRun, Hello, Item, ItemHead, Message, PREFIX_LEN, Place, StreamHeader,
    Wanted, Way,
};
use srn_testkit::fuzz::{Target, run, unsealed};

/// Messages from the encoder; and of every kind one made of small fields, which leads as far as
/// the decoder of that kind lets it.
fn corpus() -> Vec<Vec<u8>> {
    let mut corpus = vec![
        Message::Hello(Hello {
            name: "node-a".parse().expect("a name"),
            software: "0.1".into(),
            wall_time: WallTime(5),
        })
        .encode(),
        Message::Goodbye { unpaired: true, text: "gone".into() }.encode(),
        Message::Wanted(Wanted {
            group: GroupId([1; 16]),
            nonce: 2,
            disk: DiskNo(3),
            first: 4,
            leaves: vec![(0, [[5; 16]; 16]), (7, [[6; 16]; 16])],
        })
        .encode(),
    ];
    for kind in 0..=40u8 {
        for fill in [0u8, 1] {
            let mut message = vec![0; PREFIX_LEN];
            message.push(kind);
            message.extend([fill; 300]);
            seal(&mut message);
            corpus.push(message);
        }
    }
    corpus
}

/// The length before a message is that of what follows.
fn seal(message: &mut Vec<u8>) {
    let len = u32::try_from(message.len().saturating_sub(PREFIX_LEN)).unwrap_or(0).to_le_bytes();
    if let Some(prefix) = message.get_mut(..PREFIX_LEN) {
        prefix.copy_from_slice(&len[..PREFIX_LEN]);
    }
}

#[test]
fn control_messages() {
    let target = Target { name: "messages", corpus: corpus(), seal, cap: 1 << 20 };
    run(&target, |bytes, _| {
        let Some((prefix, body)) = bytes.split_first_chunk::<PREFIX_LEN>() else { return };
        let Ok(len) = Message::len_from_prefix(*prefix) else { return };
        let Some(body) = body.get(..len) else { return };
        let Ok(message) = Message::decode(body) else { return };
        let again = message.encode();
        assert_eq!(Message::decode(&again[PREFIX_LEN..]), Ok(message));
    });
}

#[test]
fn stream_headers() {
    let header = StreamHeader { group: GroupId([1; 16]), nonce: 2, first: Seq(3) };
    let target = Target {
        name: "stream headers",
        corpus: vec![header.encode()],
        seal: unsealed,
        cap: 1 << 12,
    };
    run(&target, |bytes, _| {
        let Some(bytes) = bytes.first_chunk::<{ StreamHeader::LEN }>() else { return };
        let Ok(header) = StreamHeader::decode(bytes) else { return };
        assert_eq!(header.encode(), bytes);
    });
}

#[test]
fn headers_of_changes() {
    let header = ChangesHeader {
        group: GroupId([1; 16]),
        nonce: 2,
        way: Way::Compared,
        catalog_len: 3,
        total: 4,
        begin: Place { disk: DiskNo(5), sector: 6 },
    };
    let corpus = vec![header.encode()];
    let target = Target { name: "headers of changes", corpus, seal: unsealed, cap: 1 << 12 };
    run(&target, |bytes, _| {
        let Some(bytes) = bytes.first_chunk::<{ ChangesHeader::LEN }>() else { return };
        let Ok(header) = ChangesHeader::decode(bytes) else { return };
        assert_eq!(header.encode(), bytes);
    });
}

#[test]
fn changes() {
    let (disk, extent) = (DiskNo(1), Extent::new(8, 8));
    let known = HashRun::Known(vec![[1; 16]; 3]);
    let corpus = [
        Item::Zero { disk, extent, trim: true },
        Item::Content { disk, extent, codec: Codec::Zstd, sum: 1, stored: vec![2; 40] },
        Item::Hashes { disk, first: 5, runs: vec![HashRun::Zero(4), known] },
        Item::Settled { disk, first: 5 },
        Item::End,
    ];
    let corpus = corpus.iter().map(Item::encode).collect();
    let target = Target { name: "changes", corpus, seal: unsealed, cap: 1 << 20 };
    run(&target, |bytes, _| {
        let Some((head, body)) = bytes.split_first_chunk::<{ ItemHead::LEN }>() else { return };
        let Ok(head) = ItemHead::decode(head) else { return };
        let Some(body) = body.get(..head.body_len()) else { return };
        let Ok(item) = Item::decode(&head, body) else { return };
        let again = item.encode();
        let (head, body) = again.split_first_chunk().expect("an item has a head");
        assert_eq!(Item::decode(&ItemHead::decode(head).expect("its own"), body), Ok(item));
    });
}
