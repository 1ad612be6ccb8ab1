//! Nodes that are not let in.

use serde_json::json;
use srn_core::ids::{GroupId, Seq};
use srn_core::wire::Message;
use srn_e2e::{Lab, Node, PATIENCE, wait_for};

use crate::common::{CONFLICT, content, facts, peer, protect, refuses, verdict, write_blocks};
use crate::rogue::{DATA, Key, NOT_PAIRED, closed, converse, dial, hello};

async fn trouble_with(node: &Node, words: &str) {
    wait_for(&format!("node {} says {words:?}", node.name()), PATIENCE, async || {
        let peer = peer(node).await;
        let trouble = peer["trouble"].as_str().unwrap_or_default();
        (peer["connected"] == false && trouble.contains(words)).then_some(())
    })
    .await;
}

/// Everything that a stranger can say first gets nothing back.
async fn gets_nothing(node: &Node, key: Option<&Key>, group: &str) {
    let before = facts(node).await;
    let mut id = [0; 16];
    for (byte, digits) in id.iter_mut().zip(group.as_bytes().chunks(2)) {
        let digits = std::str::from_utf8(digits).expect("hexadecimal");
        *byte = u8::from_str_radix(digits, 16).expect("hexadecimal");
    }
    let group = GroupId(id);
    let asks = [
        Vec::new(),
        hello(),
        [hello(), Message::Drain { group }.encode()].concat(),
        [hello(), Message::Ack { group, seq: Seq(1) }.encode()].concat(),
    ];
    for bytes in asks {
        match dial(node, key, DATA).await {
            Ok(connection) => {
                let back = converse(&connection, &bytes).await;
                assert!(back.is_empty(), "{back:?}");
                match (key, connection.closed().await) {
                    (Some(_), quinn::ConnectionError::ApplicationClosed(_)) => {
                        let (code, why, frames) = closed(&connection).await;
                        assert_eq!((code, frames), (NOT_PAIRED, 0), "{why}");
                    }
                    // Without a key TLS itself says no; the dialling side may hear of it late.
                    (None, quinn::ConnectionError::ConnectionClosed(_)) => {}
                    (_, other) => panic!("{other}"),
                }
            }
            Err(error) => assert!(key.is_none(), "{error}"),
        }
        assert_eq!(facts(node).await, before);
    }
}

#[tokio::test]
async fn a_peer_with_another_key_is_refused_and_production_goes_on() {
    let lab = Lab::new();
    let (mut production, mut recovery) = lab.pair().await;
    protect(&production, "web", Some("recovery"), "1M").await;
    write_blocks(&production, "web/root", 0, 32, 1).await;
    production.in_step("web").await;
    let wanted = peer(&production).await["id"].as_str().expect("a key").to_owned();
    // Somebody else answers at the recovery node's address: with its memory, but without its key.
    recovery.stop().await;
    let key = recovery.state_dir().join("node.key");
    let kept = std::fs::read(&key).expect("its key");
    std::fs::remove_file(&key).expect("it is ours");
    production.expect_in_log("group web: disconnected");
    production.expect_in_log("no session with peer recovery: the node at");
    recovery.start().await;
    trouble_with(&production, "remove the peer and pair again").await;
    let found = recovery.json(&["status"]).await["node"]["id"].as_str().expect("a key").to_owned();
    let trouble = peer(&production).await["trouble"].as_str().expect("words").to_owned();
    assert!(trouble.contains(&wanted) && trouble.contains(&found), "{trouble}");
    let said = verdict(&production).await;
    assert!(said.starts_with("NOT SAFE") && said.contains(&found), "{said}");
    // Production is written to as before, and keeps all of it for the real one.
    let head = recovery.group("web").await["head"].clone();
    write_blocks(&production, "web/root", 16, 64, 2).await;
    let group = production.group("web").await;
    assert_eq!(group["state"], "disconnected");
    assert!(group["lag_bytes"].as_u64() >= Some(64 * 4096), "{group:#}");
    assert_eq!(recovery.group("web").await["head"], head, "not a frame went there");
    assert_eq!(peer(&recovery).await["connected"], false);
    // It is told of once, however often it is dialled.
    let told = production.log().matches("no session with peer recovery").count();
    assert_eq!(told, 1);
    recovery.stop().await;
    std::fs::write(&key, kept).expect("it is ours");
    recovery.start().await;
    production.in_step("web").await;
    assert_eq!(production.group("web").await["link"]["frames_sent_again"], 0);
    let at_home = content(&lab, &production, "web", "root").await;
    assert!(at_home[..16 * 4096].iter().all(|byte| *byte == 1));
    assert!(at_home[16 * 4096..80 * 4096].iter().all(|byte| *byte == 2));
    assert!(content(&lab, &recovery, "web", "root").await == at_home, "the replica differs");
}

#[tokio::test]
async fn a_stranger_gets_nothing() {
    let lab = Lab::new();
    let (production, recovery) = lab.pair().await;
    protect(&production, "web", Some("recovery"), "1M").await;
    production.in_step("web").await;
    let group = production.group("web").await["id"].as_str().expect("an id").to_owned();
    for node in [&production, &recovery] {
        gets_nothing(node, Some(&Key::new()), &group).await;
        gets_nothing(node, None, &group).await;
    }
    production.in_step("web").await;
}

#[tokio::test]
async fn a_removed_peer_is_a_stranger() {
    let lab = Lab::new();
    let (mut production, recovery) = lab.pair().await;
    protect(&production, "web", Some("recovery"), "1M").await;
    production.in_step("web").await;
    // Not while groups are replicated between the two.
    for node in [&production, &recovery] {
        let other = if node.name() == "recovery" { "production" } else { "recovery" };
        refuses(node, &["peer", "remove", other], CONFLICT, &[other, "web", "delete"]).await;
    }
    let group = production.group("web").await["id"].as_str().expect("an id").to_owned();
    production.expect_in_log("the group was deleted here");
    let _ = production.srn(&["group", "delete", "web", "--yes"]).await.done();
    let mut recovery = recovery;
    recovery.expect_in_log("the replica was deleted here");
    recovery.expect_in_log("no connection to the peer");
    let _ = recovery.srn(&["group", "delete", "web", "--yes"]).await.done();
    let key = Key::of(&production);
    production.expect_in_log("peer recovery has removed this pairing");
    production.expect_in_log("no session with peer recovery");
    let _ = recovery.srn(&["peer", "remove", "production"]).await.done();
    trouble_with(&production, "does not know this node; pair them first").await;
    assert_eq!(facts(&recovery).await["peers"], json!([]));
    gets_nothing(&recovery, Some(&key), &group).await;
    // Nor does it get in the other way: who has removed a peer does not take it back by itself.
    let _ = production.srn(&["peer", "remove", "recovery"]).await.done();
    gets_nothing(&production, Some(&Key::of(&recovery)), &group).await;
    // A new token is a new beginning.
    production.pair_with(&recovery).await;
    assert_eq!(peer(&production).await["connected"], true);
}
