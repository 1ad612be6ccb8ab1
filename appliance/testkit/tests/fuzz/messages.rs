//! What a peer sends: control messages and the headers of frame streams.

use srn_core::ids::{GroupId, Seq};
use srn_core::time::WallTime;
use srn_core::wire::{Hello, Message, PREFIX_LEN, StreamHeader};
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
