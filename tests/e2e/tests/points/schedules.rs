//! Checkpoints by the calendar: made on time, once when they were missed, said when they cannot be.

use jiff::{SignedDuration, Timestamp};
use serde_json::Value;
use srn_e2e::{Lab, Node, PATIENCE, wait_for};

use crate::common::{INVALID, NOT_FOUND, content, protect, write};

async fn add(node: &Node, group: &str, calendar: &str, label: &str) -> Value {
    node.json(&["checkpoint", "schedule", "add", group, calendar, "--label", label]).await
}

async fn schedules(node: &Node, group: &str) -> Value {
    node.json(&["checkpoint", "schedule", "list", group]).await
}

/// The checkpoints of a schedule with this label.
async fn made(node: &Node, group: &str, label: &str) -> Vec<Value> {
    let listed = node.json(&["checkpoint", "list", group]).await;
    let named = |one: &&Value| one["label"].as_str().is_some_and(|text| text.starts_with(label));
    listed.as_array().expect("a list").iter().filter(named).cloned().collect()
}

/// An expression that comes once, in so many seconds.
fn once(seconds: i64) -> (Timestamp, String) {
    let time = Timestamp::now() + SignedDuration::from_secs(seconds);
    (time, time.strftime("%F %T UTC").to_string())
}

#[tokio::test]
async fn checkpoints_are_made_by_the_calendar() {
    let lab = Lab::new();
    let (production, recovery) = lab.pair().await;
    protect(&production, "web", Some("recovery"), &["root"]).await;
    production.in_step("web").await;
    let client = production.open("web/root").await;
    write(&client, 1, 7).await;
    client.disconnect().await.expect("a goodbye");

    let nightly = add(&production, "web", "Mon..Fri 02:00 UTC", "nightly").await;
    assert_eq!(nightly["number"], 1);
    assert_eq!(nightly["normal"], "Mon..Fri *-*-* 02:00:00 UTC");
    assert_eq!(nightly["next"].as_array().map(Vec::len), Some(3), "{nightly}");
    let next = nightly["next"][0]["time"].as_str().expect("a time");
    assert!(next.ends_with("T02:00:00.000Z"), "{nightly}");
    let _ = add(&production, "web", "*:*:* UTC", "often").await;
    let often = wait_for("some are made", PATIENCE, async || {
        let often = made(&recovery, "web", "often 20").await;
        (often.len() >= 3).then_some(often)
    })
    .await;
    assert!(
        often.iter().all(|one| one["kind"] == "scheduled" && one["clean"] == true),
        "{often:?}"
    );
    let label = often[0]["label"].as_str().expect("a label");
    let (held, _) = content(&lab, &recovery, "web", "root", label).await;
    assert!(held[4096..8192].iter().all(|byte| *byte == 7));
    let removed = production.srn(&["checkpoint", "schedule", "remove", "web", "2"]).await.done();
    assert!(removed.out.contains("*:*:* UTC"), "{removed:#?}");
    let listed = production.srn(&["checkpoint", "schedule", "list", "web"]).await.done();
    assert!(
        listed.out.contains("Mon..Fri 02:00 UTC") && !listed.out.contains("*:*:*"),
        "{listed:#?}"
    );
    let gone = production.srn(&["checkpoint", "schedule", "remove", "web", "2"]).await;
    gone.refused(NOT_FOUND, &["no schedule 2", "srn checkpoint schedule list web"]);

    // At the other node it rests.
    let rests = add(&recovery, "web", "daily UTC", "there").await;
    assert!(rests["rests"].as_str().is_some_and(|why| why.contains("not the group's production")));

    let refused = async |calendar: &str, words: &[&str]| {
        let add = ["checkpoint", "schedule", "add", "web", calendar];
        production.srn(&add).await.refused(INVALID, words);
    };
    refused("Mon..Fry 02:00", &["at character 6", "day of the week", "Mon..Fri *-*-* 02:00"]).await;
    refused("*:*/15", &["at character 4", "0/5"]).await;
    refused("25:00", &["at character 1", "the hour goes from 0 to 23"]).await;
    refused("02:00 Europe/Nowhere", &["Europe/Nowhere", "UTC"]).await;
    refused("2020-01-01", &["comes no more"]).await;
    refused("*-02-30", &["comes no more"]).await;
}

#[tokio::test]
async fn what_was_missed_is_made_once() {
    let lab = Lab::new();
    let mut node = lab.node("alone");
    node.start().await;
    protect(&node, "web", None, &["root"]).await;
    let (time, calendar) = once(2);
    let _ = add(&node, "web", &calendar, "missed").await;
    // Daily ones were not due.
    let _ = add(&node, "web", "*-*-01 00:00 UTC", "later").await;
    if Timestamp::now() < time {
        node.stop().await;
        wait_for("its time passes", PATIENCE, async || (Timestamp::now() > time).then_some(()))
            .await;
        node.start().await;
    }
    let missed = wait_for("it is made", PATIENCE, async || {
        let missed = made(&node, "web", "missed").await;
        (!missed.is_empty()).then_some(missed)
    })
    .await;
    assert_eq!(missed[0]["label"], format!("missed {}", time.strftime("%F %T")));
    // Not again, also not by the next daemon.
    node.stop().await;
    node.start().await;
    let _ = add(&node, "web", "*:*:* UTC", "often").await;
    wait_for("others are made", PATIENCE, async || {
        (made(&node, "web", "often").await.len() >= 2).then_some(())
    })
    .await;
    assert_eq!(made(&node, "web", "missed").await.len(), 1);
    assert_eq!(made(&node, "web", "later").await.len(), 0);
    assert_eq!(schedules(&node, "web").await[0]["next"], serde_json::json!([]));
}

#[tokio::test]
async fn what_cannot_be_made_now_says_so_and_is_made_then() {
    let lab = Lab::new();
    let mut node = lab.node("alone");
    node.expect_in_log("cannot be made now: there is no disk");
    node.start().await;
    protect(&node, "web", None, &[]).await;
    let _ = add(&node, "web", &once(1).1, "first").await;
    wait_for("it says so", PATIENCE, async || {
        let why = schedules(&node, "web").await[0]["waiting"].clone();
        (why == "there is no disk").then_some(())
    })
    .await;
    let told = node.srn(&["events"]).await.done();
    assert!(told.out.contains("warning group web: the checkpoint of schedule 1"), "{told:#?}");
    let _ = node.srn(&["disk", "add", "web", "root", "--size", "1M"]).await.done();
    wait_for("it is made", PATIENCE, async || {
        (made(&node, "web", "first").await.len() == 1).then_some(())
    })
    .await;
    wait_for("that it was late is told", PATIENCE, async || {
        let told = node.srn(&["events"]).await.done();
        told.out.contains("was made late: there is no disk").then_some(())
    })
    .await;
    assert_eq!(schedules(&node, "web").await[0]["waiting"], Value::Null);
}
