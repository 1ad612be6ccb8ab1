//! What is kept of a history and what is given up: previewed, confirmed, done; and that what is kept
//! is what it was.

use serde_json::Value;
use srn_e2e::{Lab, Node, PATIENCE, wait_for};

use crate::common::{NOT_FOUND, REFUSED, content, protect, write};

/// Keeps no more than it must.
const LITTLE: [&str; 14] = [
    "--window",
    "0s",
    "--ten-minutes",
    "0",
    "--hours",
    "0",
    "--days",
    "0",
    "--weeks",
    "0",
    "--months",
    "0",
    "--min-points",
    "2",
];

async fn labels(node: &Node) -> Vec<String> {
    let listed = node.json(&["checkpoint", "list", "web"]).await;
    let label = |one: &Value| one["label"].as_str().unwrap_or("-").to_owned();
    listed.as_array().expect("a list").iter().map(label).collect()
}

/// What is said to become of each checkpoint.
fn fates(status: &Value) -> Vec<(String, bool, String)> {
    let text = |value: &Value| value.as_str().unwrap_or("-").to_owned();
    let points = status["points"].as_array().expect("points");
    points
        .iter()
        .map(|one| {
            let keep = one["keep"].as_bool().expect("a fate");
            (text(&one["checkpoint"]["label"]), keep, text(&one["why"]))
        })
        .collect()
}

#[tokio::test]
async fn what_the_policy_drops_is_previewed_confirmed_and_given_up_and_the_rest_is_whole() {
    let lab = Lab::new();
    let (mut production, mut recovery) = (lab.node("production"), lab.node("recovery"));
    recovery.configure("[store]\nsegment_size = \"1M\"\n");
    recovery.start().await;
    production.start().await;
    production.pair_with(&recovery).await;
    protect(&production, "web", Some("recovery"), &["root"]).await;
    let client = production.open("web/root").await;
    for value in 1..=6_u8 {
        // More than a segment for each, so that there is something to give up.
        for block in 0..200 {
            write(&client, block, value).await;
        }
        let label = format!("c{value}");
        let create = ["checkpoint", "create", "web", "--label", &label, "--wait"];
        let _ = production.srn(&create).await.done();
    }
    for block in 0..200 {
        write(&client, block, 77).await;
    }
    client.disconnect().await.expect("a goodbye");
    production.in_step("web").await;
    wait_for("the labels arrive", PATIENCE, async || {
        (labels(&recovery).await == ["c1", "c2", "c3", "c4", "c5", "c6"]).then_some(())
    })
    .await;
    let _ = recovery.srn(&["checkpoint", "pin", "web", "c2"]).await.done();

    // By default all of this is within the window.
    let shown = recovery.json(&["retention", "show", "web"]).await;
    assert!(
        fates(&shown)
            .iter()
            .all(|(_, keep, why)| *keep && (why.contains("1day") || why == "pinned"))
    );
    let preview = [&["retention", "preview", "web"], &LITTLE[..]].concat();
    let would = recovery.json(&preview).await;
    let expected = [
        ("c1", false, "a newer one stands"),
        ("c2", true, "pinned"),
        ("c3", false, "a newer one stands"),
        ("c4", false, "a newer one stands"),
        ("c5", true, "one of 2 at least"),
        ("c6", true, "the newest that is clean"),
    ];
    for ((label, keep, why), (wanted, kept, words)) in fates(&would).iter().zip(expected) {
        assert_eq!((label.as_str(), *keep), (wanted, kept), "{would}");
        assert!(why.contains(words), "{label}: {why}");
    }
    assert_eq!(would["drops"], 3);
    // A preview changes nothing, and nobody is asked without a terminal.
    assert_eq!(recovery.json(&["retention", "show", "web"]).await["drops"], 0);
    let set = [&["retention", "set", "web"], &LITTLE[..]].concat();
    recovery.srn(&set).await.refused(REFUSED, &["3 checkpoints", "--yes"]);
    assert_eq!(recovery.group("web").await["history_s"], 24 * 3600);
    let _ = recovery.srn(&[&set[..], &["--yes"]].concat()).await.done();

    wait_for("what is dropped is given up", PATIENCE, async || {
        (labels(&recovery).await == ["c2", "c5", "c6"]).then_some(())
    })
    .await;
    for (label, value) in [("c2", 2_u8), ("c5", 5), ("c6", 6)] {
        let (held, point) = content(&lab, &recovery, "web", "root", label).await;
        assert!(held[..200 * 4096].iter().all(|byte| *byte == value), "{label}: {point}");
    }
    let (held, _) = content(&lab, &recovery, "web", "root", "latest").await;
    assert!(held[..200 * 4096].iter().all(|byte| *byte == 77));
    recovery.srn(&["history", "web", "--at", "c4"]).await.refused(NOT_FOUND, &["no checkpoint"]);

    // The other node is not asked, and has no say: its own copy is all that it decides for.
    assert_eq!(labels(&production).await.len(), 6);
    assert_eq!(production.group("web").await["history_s"], 24 * 3600);
    recovery
        .srn(&["retention", "resume", "web"])
        .await
        .refused(crate::common::CONFLICT, &["is not paused"]);
}

#[tokio::test]
async fn over_its_cap_history_goes_oldest_first_and_loudly() {
    let lab = Lab::new();
    let mut node = lab.node("alone");
    node.configure("[store]\nsegment_size = \"1M\"\n");
    node.start().await;
    protect(&node, "web", None, &["root"]).await;
    let fill = async |value: u8| {
        let client = node.open("web/root").await;
        for block in 0..250 {
            write(&client, block, value).await;
        }
        client.disconnect().await.expect("a goodbye");
        let label = format!("c{value}");
        let _ = node.srn(&["checkpoint", "create", "web", "--label", &label]).await.done();
    };
    for value in 1..=12 {
        fill(value).await;
    }
    let _ = node.srn(&["checkpoint", "pin", "web", "c3"]).await.done();
    let keep = ["retention", "set", "web", "--window", "0s", "--min-points", "60", "--yes"];
    let _ = node.srn(&keep).await.done();
    assert_eq!(labels(&node).await.len(), 12);
    node.expect_in_log("is given up: history takes");
    let cap = ["retention", "set", "web", "--replica-cap", "10M"];
    let _ = node.srn(&cap).await.done();
    let left = wait_for("history is within its cap", PATIENCE, async || {
        let shown = node.json(&["retention", "show", "web"]).await;
        let used = shown["used_bytes"].as_u64().expect("bytes");
        (used <= 10 << 20).then_some(labels(&node).await)
    })
    .await;
    // The pinned one is there, and of the others the newest.
    assert!(left.len() < 12 && left.len() >= 2, "{left:?}");
    assert_eq!(left[0], "c3");
    assert_eq!(left[left.len() - 1], "c12");
    let from = 14 - left.len();
    let newest: Vec<String> = (from..=12).map(|value| format!("c{value}")).collect();
    assert_eq!(left[1..], newest);
    let events = node.json(&["events"]).await;
    let said = events.as_array().expect("events").iter().filter(|event| {
        event["text"].as_str().is_some_and(|text| text.contains("is given up: history takes"))
    });
    assert!(said.count() >= 12 - left.len());
    for label in &left {
        let value: u8 = label[1..].parse().expect("a number");
        let (held, _) = content(&lab, &node, "web", "root", label).await;
        assert!(held[..250 * 4096].iter().all(|byte| *byte == value), "{label}");
    }
}
