//! Peers that speak another version of the protocol, or none.

use srn_core::ids::GroupId;
use srn_core::wire::Message;
use srn_e2e::{Chance, Lab, PATIENCE, wait_for};

use crate::common::{facts, peer, protect, verdict, write_blocks};
use crate::rogue::{
    DATA, Key, MISBEHAVED, PAIR, VERSION, closed, converse, dial, hello, hello_of_version, listen,
};

#[tokio::test]
async fn a_peer_of_another_version_is_refused_by_the_one_it_dials() {
    let lab = Lab::new();
    let (mut production, mut recovery) = lab.pair().await;
    protect(&production, "web", Some("recovery"), "1M").await;
    production.in_step("web").await;
    let key = Key::of(&production);
    production.stop().await;
    recovery.expect_in_log("no session with peer production: the peer speaks wire version 2");
    recovery.expect_in_log("no connection to the peer");
    let before = facts(&recovery).await;
    let connection = dial(&recovery, Some(&key), DATA).await.expect("the key is known");
    let back = converse(&connection, &hello_of_version(2)).await;
    let (code, why, frames) = closed(&connection).await;
    assert_eq!((code, frames), (VERSION, 0), "{why}");
    assert!(why.contains("version 2") && why.contains("update the older one"), "{why}");
    // Its own hello is all it has said.
    let own = back.first_chunk().map_or(0, |length| 4 + u32::from_le_bytes(*length));
    assert_eq!(back.len(), own as usize, "{back:?}");
    let trouble = peer(&recovery).await["trouble"].as_str().unwrap_or_default().to_owned();
    assert!(trouble.contains("wire version 2, this node speaks 1"), "{trouble}");
    assert!(verdict(&recovery).await.contains("update the older one"));
    assert_eq!(facts(&recovery).await, before);
    // Another name of the protocol is not even answered by TLS.
    let refused = dial(&recovery, Some(&key), b"srn/2").await.expect_err("no such protocol");
    assert!(refused.to_string().contains("protocol"), "{refused}");
    // The real one is as welcome as ever.
    production.start().await;
    production.in_step("web").await;
}

#[tokio::test]
async fn a_peer_of_another_version_is_refused_by_the_one_that_dials() {
    let lab = Lab::new();
    let (mut production, mut recovery) = lab.pair().await;
    protect(&production, "web", Some("recovery"), "1M").await;
    production.in_step("web").await;
    let key = Key::of(&recovery);
    recovery.stop().await;
    production.expect_in_log("group web: disconnected");
    production.expect_in_log("no session with peer recovery: the peer speaks wire version 7");
    let newer = listen(&recovery, &key, DATA);
    let answering = tokio::spawn(async move {
        let mut received = Vec::new();
        while let Some(incoming) = newer.accept().await {
            let Ok(connection) = incoming.await else { continue };
            let Ok((mut send, mut receive)) = connection.accept_bi().await else { continue };
            let _ = send.write_all(&hello_of_version(7)).await;
            received.push(receive.read_to_end(1 << 20).await.unwrap_or_default().len());
            let (code, ..) = closed(&connection).await;
            assert_eq!(code, VERSION);
            if received.len() == 2 {
                break;
            }
        }
        newer.close(0u32.into(), b"enough");
        newer.wait_idle().await;
        received
    });
    wait_for("production says why", PATIENCE, async || {
        let trouble = peer(&production).await["trouble"].as_str().unwrap_or_default().to_owned();
        trouble.contains("wire version 7, this node speaks 1; update the older one").then_some(())
    })
    .await;
    assert!(verdict(&production).await.contains("update the older one"));
    // It goes on, and logs what is written.
    write_blocks(&production, "web/root", 0, 8, 1).await;
    assert!(production.group("web").await["lag_bytes"].as_u64() >= Some(8 * 4096));
    // It tries again, and says nothing but hello.
    for bytes in answering.await.expect("it was dialled twice") {
        assert!(bytes < 200, "{bytes} bytes were said");
    }
    wait_for("the port is free", PATIENCE, async || {
        std::net::UdpSocket::bind((recovery.address(), 7310)).ok()
    })
    .await;
    recovery.start().await;
    production.in_step("web").await;
}

#[tokio::test]
async fn a_peer_that_speaks_nonsense_is_hung_up_on() {
    let lab = Lab::new();
    let (mut production, mut recovery) = lab.pair().await;
    protect(&production, "web", Some("recovery"), "1M").await;
    production.in_step("web").await;
    let key = Key::of(&production);
    production.stop().await;
    recovery.expect_in_log("no connection to the peer");
    let before = facts(&recovery).await;
    recovery.expect_in_log("no session with peer production: peer broke the protocol");
    let drain = Message::Drain { group: GroupId([9; 16]) }.encode();
    let mut longer = [drain.as_slice(), &[0]].concat();
    longer[0] += 1;
    let with_hello = |bytes: &[u8]| [hello(), bytes.to_vec()].concat();
    let mut random = vec![0; 4096];
    Chance::from_env("SRN_SEED").fill(&mut random);
    // A length that no message has, whatever the chance says.
    random[3] = 0xff;
    for (what, bytes) in [
        ("noise", random),
        ("no hello", drain),
        ("a second hello", with_hello(&hello())),
        ("a length of 4 GiB", with_hello(&[0xff; 4])),
        ("an empty message", with_hello(&[0; 4])),
        ("an unknown message", with_hello(&[1, 0, 0, 0, 0xee])),
        ("a message with more behind it", with_hello(&longer)),
    ] {
        let connection = dial(&recovery, Some(&key), DATA).await.expect("the key is known");
        let talking = tokio::spawn({
            let connection = connection.clone();
            async move { converse(&connection, &bytes).await }
        });
        let (code, why, frames) = closed(&connection).await;
        assert_eq!((code, frames), (MISBEHAVED, 0), "{what}: {why}");
        talking.abort();
        assert_eq!(facts(&recovery).await, before, "{what}");
    }
    // Nor does a stranger get anywhere with noise where nodes are paired.
    let strange = Key::new();
    for bytes in [vec![0xff; 600], vec![1, 4, 0, 1, 0, 200, 0], vec![1, 0, 0]] {
        let connection = dial(&recovery, Some(&strange), PAIR).await.expect("anybody may ask");
        let back = converse(&connection, &bytes).await;
        assert!(back.is_empty(), "{back:?}");
        assert_eq!(closed(&connection).await.0, MISBEHAVED);
        assert_eq!(facts(&recovery).await, before);
    }
    production.start().await;
    production.in_step("web").await;
}
