//! Words of a peer that come late: true when they were said, and no longer.

use quinn::{Connection, RecvStream};
use srn_core::wire::{Accept, Message, Offer};
use srn_e2e::{Lab, PATIENCE, wait_for};

use crate::common::{protect, write_blocks};
use crate::rogue::{DATA, Key, dial, hello};

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

    let connection = dial(&production, Some(&key), DATA).await.expect("the key is known");
    let (mut say, mut listen) = connection.open_bi().await.expect("a stream");
    say.write_all(&hello()).await.expect("said");
    let offer: Offer = hear(&mut listen, |message| match message {
        Message::Offer(offer) => Some(offer),
        _ => None,
    })
    .await;
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
