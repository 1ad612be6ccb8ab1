//! Recovering to a time, a position, a span before now; what history shows; what is refused.

use jiff::Timestamp;
use srn_e2e::{Chance, Lab, PATIENCE, wait_for};

use crate::common::{INVALID, NOT_FOUND, REFUSED, content, protect, tick, write};

/// Blocks that are written to, on each of two disks.
const BLOCKS: usize = 12;

/// Two disks as arrays of what fills each block.
type Disks = [[u8; BLOCKS]; 2];

/// Whether this is what the disks hold.
fn holds(content: &[u8], blocks: &[u8; BLOCKS]) -> bool {
    blocks.iter().zip(content.chunks(4096)).all(|(value, block)| block.iter().all(|b| b == value))
}

#[tokio::test]
async fn a_time_is_recovered_across_two_disks_as_they_were_then() {
    let lab = Lab::new();
    let mut chance = Chance::from_env("POINTS_SEED");
    let (mut production, mut recovery) = (lab.node("production"), lab.node("recovery"));
    // Half an hour off from everybody else, so that no time is taken for one in UTC.
    recovery.run_through(vec!["env".into(), "TZ=XYZ-5:30".into()]);
    recovery.start().await;
    production.start().await;
    production.pair_with(&recovery).await;
    protect(&production, "web", Some("recovery"), &["one", "two"]).await;
    let disks = [production.open("web/one").await, production.open("web/two").await];

    // One write after the other, now on this disk and now on that, and between any two a time.
    let begun = Timestamp::now();
    let mut model: Disks = [[0; BLOCKS]; 2];
    let mut moments: Vec<(Timestamp, Disks)> = vec![(tick().await, model)];
    for value in 1..=60_u8 {
        let disk = chance.below(2) as usize;
        let block = chance.below(BLOCKS as u64);
        write(&disks[disk], block, value).await;
        model[disk][block as usize] = value;
        moments.push((tick().await, model));
    }
    production.in_step("web").await;
    for disk in disks {
        disk.disconnect().await.expect("a goodbye");
    }
    // What is recovered needs nobody else.
    recovery.expect_in_log("group web: disconnected");
    production.stop().await;

    let zone = jiff::tz::TimeZone::posix("XYZ-5:30").expect("a zone");
    for round in 0..6 {
        let (time, model) = &moments[chance.below(moments.len() as u64) as usize];
        let at = match round % 3 {
            0 => time.to_string(),
            1 => time.to_zoned(zone.clone()).strftime("%F %T%.6f").to_string(),
            _ => format!("{} UTC", time.strftime("%F %T%.6f")),
        };
        let mut words = Vec::new();
        for (disk, blocks) in ["one", "two"].iter().zip(model) {
            let (held, point) = content(&lab, &recovery, "web", disk, &at).await;
            assert!(holds(&held, blocks), "{disk} at {at}: {point}");
            words.push(point);
        }
        assert_eq!(words[0], words[1]);
        // The same by the frame that it turned out to be, and by nothing else.
        let chosen = recovery.json(&["history", "web", "--at", &at]).await["chosen"].clone();
        let frame = chosen["frame"].as_u64().expect("a frame");
        assert!(words[0].contains(&format!("frame {frame} of ")), "{words:?}");
        let (held, _) = content(&lab, &recovery, "web", "one", &format!("frame:{frame}")).await;
        assert!(holds(&held, &model[0]), "frame {frame}");
    }

    // Before there was a disk, before there was anything, and what is to come.
    let refused = async |at: &str, code, words: &[&str]| {
        recovery.srn(&["history", "web", "--at", at]).await.refused(code, words);
        let file = lab.path("never.raw");
        let path = file.to_str().expect("a path");
        let export = ["export", "web", "one", "--at", at, "--raw", path];
        recovery.srn(&export).await.refused(code, words);
        assert!(!file.exists());
    };
    refused("-1h", NOT_FOUND, &["is kept", "begins with frame"]).await;
    let to_come = (begun + jiff::SignedDuration::from_hours(2)).to_string();
    refused(&to_come, NOT_FOUND, &["is still to come"]).await;
    refused("frame:99999", NOT_FOUND, &["there is no frame 99999"]).await;
    refused("2026-02-30 12:00", INVALID, &["no such day"]).await;
    refused("-90", INVALID, &["-90s"]).await;
    refused("nightly", NOT_FOUND, &["no checkpoint \"nightly\"", "srn history web"]).await;
    // A span that ends behind the last write means the newest one.
    let (held, _) = content(&lab, &recovery, "web", "two", "-0s").await;
    assert!(holds(&held, &moments[moments.len() - 1].1[1]));
    // A time of day is one of today, there.
    let today = moments[30].0.to_zoned(zone.clone());
    if today.date() == Timestamp::now().to_zoned(zone).date() {
        let at = today.strftime("%T%.6f").to_string();
        let (held, _) = content(&lab, &recovery, "web", "two", &at).await;
        assert!(holds(&held, &moments[30].1[1]), "{at}");
    }
    // A test failover takes the same words; without a machine to be started, too.
    let at = moments[20].0.to_string();
    let test = recovery.srn(&["failover", "run", "web", "--at", "-1h", "--yes-production-is-off"]);
    test.await.refused(NOT_FOUND, &["is kept"]);
    let history = recovery.json(&["history", "web"]).await;
    assert!(history["from"]["local"].as_str().is_some_and(|local| local.ends_with("+05:30")));
    assert!(history["from"]["time"].as_str() < Some(at.as_str()));
    assert!(history["to"]["time"].as_str() > Some(at.as_str()), "{history}");
    assert_eq!(history["gaps"], serde_json::json!([]));
}

#[tokio::test]
async fn where_there_is_no_point_history_says_so() {
    let lab = Lab::new();
    let mut node = lab.node("alone");
    node.start().await;
    protect(&node, "source", None, &["disk"]).await;
    let client = node.open("source/disk").await;
    write(&client, 3, 7).await;
    client.disconnect().await.expect("a goodbye");
    protect(&node, "web", None, &["old"]).await;
    let before = node.group("web").await["head"].as_u64().expect("a frame");
    let from = node.nbd_unix_uri("source/disk");
    let add = ["disk", "add", "web", "copy", "--copy-from", &from, "--wait"];
    let _ = node.srn(&add).await.done();
    let head = node.group("web").await["head"].as_u64().expect("a frame");

    let history = node.json(&["history", "web"]).await;
    let gap = &history["gaps"][0];
    assert_eq!(history["gaps"].as_array().map(Vec::len), Some(1), "{history}");
    assert_eq!(gap["reason"], "initial replication");
    assert_eq!(gap["open"], false);
    let (first, last) = (gap["from"]["frame"].as_u64(), gap["to"]["frame"].as_u64());
    assert!(first == Some(before + 1) && last.is_some_and(|last| last < head), "{history}");
    // One that says that the last was durable may have followed.
    assert!(history["to"]["frame"].as_u64() >= Some(head), "{history}");
    // Within it nothing is recovered, and both neighbours are named and can be.
    let inside = format!("frame:{}", before + 1);
    let (left, right) = (format!("frame {before} of"), format!("frame {} of", last.unwrap() + 1));
    let tried = node.srn(&["history", "web", "--at", &inside]).await;
    tried.refused(REFUSED, &["mixture of times", "initial replication", &left, &right]);
    let (_, point) = content(&lab, &node, "web", "old", &format!("frame:{before}")).await;
    assert!(point.starts_with(&left));
    let after = format!("frame:{}", last.unwrap() + 1);
    let (held, _) = content(&lab, &node, "web", "copy", &after).await;
    assert!(held[3 * 4096..4 * 4096].iter().all(|byte| *byte == 7));
}

#[tokio::test]
async fn checkpoints_are_labelled_pinned_and_deleted() {
    let lab = Lab::new();
    let (production, recovery) = lab.pair().await;
    protect(&production, "web", Some("recovery"), &["root"]).await;
    production.in_step("web").await;
    let create = ["checkpoint", "create", "web", "--label", "first", "--pin", "--wait"];
    let made = production.srn(&create).await.done();
    assert!(made.out.contains("at frame"), "{made:#?}");
    let one =
        async |node: &srn_e2e::Node| node.json(&["checkpoint", "list", "web"]).await[0].clone();
    // A pin that is given here is asked for there.
    wait_for("the note arrives", PATIENCE, async || {
        let there = one(&recovery).await;
        (there["label"] == "first" && there["pinned"] == true).then_some(())
    })
    .await;
    assert_eq!(one(&recovery).await["consistent"], "crash");
    assert_eq!(one(&recovery).await["proven"], false);
    // A pinned one is not deleted, and to unpin it there is no one else's business.
    let delete = ["checkpoint", "delete", "web", "first"];
    recovery.srn(&delete).await.refused(REFUSED, &["is pinned", "srn checkpoint unpin web"]);
    let _ = production.srn(&["checkpoint", "unpin", "web", "first"]).await.done();
    let _ = production.srn(&["checkpoint", "label", "web", "first", "renamed"]).await.done();
    let asked = production.srn(&["checkpoint", "create", "web", "--label", "second", "--wait"]);
    let _ = asked.await.done();
    assert_eq!(one(&production).await["label"], "renamed");
    assert_eq!(one(&production).await["pinned"], false);
    assert_eq!(one(&recovery).await["pinned"], true);
    assert_eq!(one(&recovery).await["label"], "first");
    // What the recovery node has unpinned stays so, whatever production says again and again.
    let _ = recovery.srn(&["checkpoint", "unpin", "web", "first"]).await.done();
    let _ = production.srn(&["checkpoint", "pin", "web", "renamed"]).await.done();
    let _ =
        production.srn(&["checkpoint", "create", "web", "--label", "third", "--wait"]).await.done();
    assert_eq!(one(&recovery).await["pinned"], false);
    let gone = recovery.srn(&delete).await.done();
    assert!(gone.out.contains("was deleted"), "{gone:#?}");
    assert_eq!(one(&recovery).await["label"], "second");
    assert_eq!(one(&production).await["label"], "renamed");
    // Asked of the recovery node it is made at production, and waited for.
    let made = recovery.srn(&["checkpoint", "create", "web", "--label", "asked", "--wait"]).await;
    assert!(made.done().out.contains("at frame"));
    let missing = recovery.srn(&["checkpoint", "pin", "web", "fourth"]).await;
    missing.refused(NOT_FOUND, &["no checkpoint \"fourth\""]);
}
