//! Offers and answers that are out of order: late, or of a history that does not continue.

use quinn::{Connection, RecvStream, SendStream};
use srn_core::epoch::{EpochTable, Position};
use srn_core::frame::envelope::Envelope;
use srn_core::frame::{Builder, HeaderFields};
use srn_core::ids::{EpochId, GroupId, Seq};
use srn_core::time::{LogTime, WallTime};
use srn_core::wire::{Accept, Message, Offer, Refuse, RefuseCode, StreamHeader};
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

/// The acceptance of an offer, by one who has everything.
fn accepted(offer: &Offer) -> Message {
    let (group, nonce, position) = (offer.group, offer.nonce, offer.head);
    Message::Accept(Accept { group, nonce, position, credit: 1 << 20, compare: false, under: None })
}

/// The node is asked to drain, and says that it does not.
async fn is_not_drained(say: &mut SendStream, listen: &mut RecvStream, group: GroupId) {
    say.write_all(&Message::Drain { group }.encode()).await.expect("said");
    let code = hear(listen, |message| match message {
        Message::Refuse(refuse) => Some(refuse.code),
        _ => None,
    });
    assert_eq!(code.await, RefuseCode::NotDrained);
}

/// The node is asked to drain, and says that it has.
async fn drain(say: &mut SendStream, listen: &mut RecvStream, group: GroupId) -> Position {
    say.write_all(&Message::Drain { group }.encode()).await.expect("said");
    hear(listen, |message| match message {
        Message::Drained { last, .. } => Some(last),
        _ => None,
    })
    .await
}

#[tokio::test]
async fn only_an_answer_to_an_offer_from_behind_it_lifts_the_fence_of_a_drain() {
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
    production.expect_in_log("an administrator says that the peer has not taken over");
    // Which is what the positions said below look like.
    production.expect_in_log("it was deleted or set back");
    let state = async || production.group("web").await["state"].clone();

    // Not before frames flow.
    let (connection, mut say, mut listen) = session(&production, &key).await;
    let offer = hear_offer(&mut listen).await;
    is_not_drained(&mut say, &mut listen, offer.group).await;
    assert_ne!(state().await, "fenced");
    let accept = accepted(&offer);
    say.write_all(&accept.encode()).await.expect("said");
    stream_begins(&connection).await;
    let last = drain(&mut say, &mut listen, offer.group).await;
    assert!(last.seq >= offer.head.seq);
    assert_eq!(state().await, "fenced");
    connection.close(0u32.into(), b"enough");

    // The answer to that offer again, and a refusal that says nothing of epochs.
    let (connection, mut say, mut listen) = session(&production, &key).await;
    let behind = hear_offer(&mut listen).await;
    assert_ne!(behind.nonce, offer.nonce);
    let refuse = |epochs| {
        let (group, code, text) = (offer.group, RefuseCode::Storage, "no room".to_owned());
        Message::Refuse(Refuse { group, code, text, epochs }).encode()
    };
    for word in [accept.encode(), refuse(None)] {
        say.write_all(&word).await.expect("said");
        // It has heard that when it answers the next word.
        is_not_drained(&mut say, &mut listen, offer.group).await;
        assert_eq!(state().await, "fenced");
    }
    // One that proves that nobody has taken over, although the group cannot be replicated.
    say.write_all(&refuse(Some(behind.epochs.clone()))).await.expect("said");
    wait_for("production goes on", PATIENCE, async || (state().await != "fenced").then_some(()))
        .await;
    write_blocks(&production, "web/root", 0, 1, 1).await;
    connection.close(0u32.into(), b"enough");

    // Nor is production lost with a recovery node that never comes back.
    let resume = ["group", "resume", "web", "--yes-not-taken-over"];
    production.srn(&resume).await.refused(5, &["nothing to take back"]);
    let (connection, mut say, mut listen) = session(&production, &key).await;
    let offer = hear_offer(&mut listen).await;
    say.write_all(&accepted(&offer).encode()).await.expect("said");
    stream_begins(&connection).await;
    let _ = drain(&mut say, &mut listen, offer.group).await;
    connection.close(0u32.into(), b"enough");
    let add = ["disk", "add", "web", "data", "--size", "1M"];
    production.srn(&add).await.refused(6, &["fenced", "--yes-not-taken-over"]);
    let _ = production.srn(&resume).await.done();
    assert_ne!(state().await, "fenced");
    write_blocks(&production, "web/root", 1, 1, 2).await;

    recovery.start().await;
    production.in_step("web").await;
    let head = production.group("web").await["head"].as_u64();
    wait_for("recovery has what was written", PATIENCE, async || {
        (recovery.group("web").await["head"].as_u64() >= head).then_some(())
    })
    .await;
}

#[tokio::test]
async fn frames_of_an_epoch_that_was_not_offered_are_not_taken_in() {
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

    let epoch = EpochId([7; 16]);
    let foreign = EpochTable::new(epoch);
    let (connection, mut say, mut listen) = session(&recovery, &key).await;
    recovery.expect_in_log("is not part of the history of the production node");
    recovery.expect_in_log("the histories of the two nodes differ");
    let head = Position { epoch, ..offer.head };
    let refused = Offer { epochs: foreign, head, nonce: offer.nonce + 1, ..offer.clone() };
    say.write_all(&Message::Offer(refused).encode()).await.expect("said");
    let refused = hear(&mut listen, |message| match message {
        Message::Refuse(refuse) => Some(refuse),
        _ => None,
    })
    .await;
    assert_eq!(refused.code, RefuseCode::Diverged, "{}", refused.text);
    // One that offers what is there, and then sends something else.
    recovery.expect_in_log("what the production node sends is not sound");
    recovery.expect_in_log("broke the protocol");
    offer.nonce += 2;
    say.write_all(&Message::Offer(offer.clone()).encode()).await.expect("said");
    let accept = hear(&mut listen, |message| match message {
        Message::Accept(accept) => Some(accept),
        _ => None,
    })
    .await;
    // An empty frame that follows the last write may not have been sent.
    let behind = accept.position;
    assert!(behind.seq <= offer.head.seq && behind.epoch == offer.head.epoch, "{behind}");
    let mut frames = connection.open_uni().await.expect("a stream");
    let first = behind.seq.next();
    let header = StreamHeader { group: offer.group, nonce: offer.nonce, first };
    frames.write_all(&header.encode()).await.expect("sent");
    frames.write_all(&empty_frame(&offer, epoch, behind)).await.expect("sent");
    let (code, why, _) = closed(&connection).await;
    assert_eq!(code, MISBEHAVED, "{why}");
    assert!(why.contains("does not continue this history"), "{why}");
    assert_eq!(facts(&recovery).await, facts_before);
    assert_eq!(content(&lab, &recovery, "web", "root").await, before);
    production.start().await;
    production.in_step("web").await;
}
