//! Offers and answers that are out of order: late, or of a history that does not continue.

use quinn::{Connection, RecvStream, SendStream};
use srn_core::epoch::{Epoch, EpochTable, Position};
use srn_core::frame::envelope::Envelope;
use srn_core::frame::{Builder, HeaderFields};
use srn_core::ids::{EpochId, Seq};
use srn_core::time::{LogTime, WallTime};
use srn_core::wire::{Accept, Message, Offer, StreamHeader};
use srn_e2e::{Lab, Node, PATIENCE, wait_for};

use crate::common::{content, facts, protect, write_blocks};
use crate::rogue::{DATA, Key, MISBEHAVED, closed, dial, hello};

/// The next message that `wanted` takes.
async fn hear<T>(from: &mut RecvStream, wanted: impl Fn(Message) -> Option<T>) -> T {
    let hearing = async {
        loop {
            let mut prefix = [0; 4];
            from.read_exact(&mut prefix).await.expect("a message's length");
            let mut body = vec![0; Message::len_from_prefix(prefix).expect("a length")];
            from.read_exact(&mut body).await.expect("a message");
            if let Some(found) = wanted(Message::decode(&body).expect("a known message")) {
                return found;
            }
        }
    };
    tokio::time::timeout(PATIENCE, hearing).await.expect("the node says it")
}

async fn hear_offer(from: &mut RecvStream) -> Offer {
    hear(from, |message| match message {
        Message::Offer(offer) => Some(offer),
        _ => None,
    })
    .await
}

/// A session with a node, with the key of its peer.
async fn session(node: &Node, key: &Key) -> (Connection, SendStream, RecvStream) {
    let connection = dial(node, Some(key), DATA).await.expect("the key is known");
    let (mut say, listen) = connection.open_bi().await.expect("a stream");
    say.write_all(&hello()).await.expect("said");
    (connection, say, listen)
}

/// An empty frame of this epoch behind that position, as it is sent.
fn empty_frame(offer: &Offer, epoch: EpochId, behind: Position) -> Vec<u8> {
    let (head, hash) = Builder::new().finish(&HeaderFields {
        group: offer.group,
        epoch,
        seq: behind.seq.next(),
        prev: behind.hash,
        durable: behind.seq,
        log_time: LogTime(u64::MAX / 2),
        wall_time: WallTime(0),
    });
    let envelope = Envelope {
        segment: 0,
        head_len: u32::try_from(head.len()).expect("a head's length"),
        encoded_blocks: 0,
        stored_len: 0,
        hash,
        durable: Seq::ZERO,
    };
    [envelope.encode(&[]).as_slice(), &head].concat()
}

/// The node begins to send frames, which is the end of what an acceptance does.
async fn stream_begins(connection: &Connection) {
    let begins = tokio::time::timeout(PATIENCE, connection.accept_uni());
    begins.await.expect("frames come").expect("a stream");
}

#[tokio::test]
async fn an_acceptance_from_before_the_drain_does_not_lift_its_fence() {
    let lab = Lab::new();
    let (mut production, mut recovery) = lab.pair().await;
    protect(&production, "web", Some("recovery"), "1M").await;
    production.in_step("web").await;
    let key = Key::of(&recovery);
    recovery.stop().await;
    production.expect_in_log("group web: disconnected");
    production.expect_in_log("no connection to the peer");
    production.expect_in_log("draining for a planned failover");
    production.expect_in_log("fenced");

    let (connection, mut say, mut listen) = session(&production, &key).await;
    let offer = hear_offer(&mut listen).await;
    // It is drained first, and the answer to its offer comes after that.
    say.write_all(&Message::Drain { group: offer.group }.encode()).await.expect("said");
    let last = hear(&mut listen, |message| match message {
        Message::Drained { last, .. } => Some(last),
        _ => None,
    })
    .await;
    assert!(last.seq >= offer.head.seq);
    let accept =
        Accept { group: offer.group, nonce: offer.nonce, position: offer.head, credit: 1 << 20 };
    say.write_all(&Message::Accept(accept).encode()).await.expect("said");
    stream_begins(&connection).await;
    let group = production.group("web").await;
    assert_eq!(group["state"], "fenced", "{group:#}");
    connection.close(0u32.into(), b"enough");

    // The answer to an offer made behind the fence lifts it.
    recovery.start().await;
    production.in_step("web").await;
    write_blocks(&production, "web/root", 0, 1, 1).await;
    let head = production.group("web").await["head"].as_u64();
    wait_for("recovery has what was written", PATIENCE, async || {
        (recovery.group("web").await["head"].as_u64() >= head).then_some(())
    })
    .await;
}

#[tokio::test]
async fn frames_of_an_epoch_that_the_replica_does_not_have_are_not_taken_in() {
    let lab = Lab::new();
    let (mut production, mut recovery) = lab.pair().await;
    protect(&production, "web", Some("recovery"), "1M").await;
    write_blocks(&production, "web/root", 0, 8, 7).await;
    production.in_step("web").await;
    let (key, key_of_recovery) = (Key::of(&production), Key::of(&recovery));
    for node in [&mut production, &mut recovery] {
        node.expect_in_log("group web: disconnected");
        node.expect_in_log("no connection to the peer");
        node.expect_in_log("no session with peer");
    }
    // What the real one would offer.
    recovery.stop().await;
    let (connection, _say, mut listen) = session(&production, &key_of_recovery).await;
    let mut offer = hear_offer(&mut listen).await;
    connection.close(0u32.into(), b"enough");
    production.stop().await;
    recovery.start().await;
    let before = content(&lab, &recovery, "web", "root").await;
    let facts_before = facts(&recovery).await;

    recovery.expect_in_log("does not continue the replica");
    let epoch = Epoch { id: EpochId([7; 16]), forked_from: offer.head };
    let line = [offer.epochs.list(), &[epoch]].concat();
    offer.epochs = EpochTable::from_list(line).expect("one line");
    offer.nonce += 1;
    let behind = offer.head;
    offer.head.epoch = epoch.id;
    let (connection, mut say, mut listen) = session(&recovery, &key).await;
    say.write_all(&Message::Offer(offer.clone()).encode()).await.expect("said");
    let accept = hear(&mut listen, |message| match message {
        Message::Accept(accept) => Some(accept),
        _ => None,
    })
    .await;
    assert_eq!(accept.position, behind);
    let mut frames = connection.open_uni().await.expect("a stream");
    let first = behind.seq.next();
    let header = StreamHeader { group: offer.group, nonce: offer.nonce, first };
    frames.write_all(&header.encode()).await.expect("sent");
    frames.write_all(&empty_frame(&offer, epoch.id, behind)).await.expect("sent");
    let (code, why, _) = closed(&connection).await;
    assert_eq!(code, MISBEHAVED, "{why}");
    assert!(why.contains("does not continue the replica"), "{why}");
    assert_eq!(facts(&recovery).await, facts_before);
    assert_eq!(content(&lab, &recovery, "web", "root").await, before);
    production.start().await;
    production.in_step("web").await;
}
