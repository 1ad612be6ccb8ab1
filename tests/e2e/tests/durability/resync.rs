//! Out of streaming and back where frames alone do not do it: the log has given way, the replica is
//! lost or set back, contents have to be compared. What was there before stays as it was, and no more
//! is sent than has to be.

use serde_json::Value;
use srn_e2e::relay::line::Shape;
use srn_e2e::{Chance, Lab, Node, Relay};
use srn_nbd::client::Client;

use crate::common::{
    GROUP, expect_lost_link, expect_replica, expect_same, export_of, exported, pair_through_relay,
    protect, read_all, small_segments,
};

const DISK: &str = "root";
const SIZE: u64 = 32 << 20;
const MIB: u64 = 1 << 20;

/// What a primary is made with whose log is soon full.
const SMALL_LOG: [&str; 4] = ["--log-size", "8M", "--checkpoint-every", "0s"];

fn expect_resync(nodes: &mut [&mut Node]) {
    expect_lost_link(nodes);
    for node in nodes {
        for text in [
            "tracking: the log could not hold",
            "no session with peer",
            "it was deleted or set back",
            "writes wait until there is room",
            "the log here has no room",
            "the replica was deleted here",
            "the peer refuses",
        ] {
            node.expect_in_log(text);
        }
    }
}

/// Writes what cannot be compressed.
async fn write(client: &Client, content: &mut [u8], chance: &mut Chance, at: u64, length: u64) {
    let bytes: Vec<u8> = (0..length / 8).flat_map(|_| chance.next().to_le_bytes()).collect();
    client.write(at, bytes.clone().into(), false).await.expect("the write is taken");
    content[at as usize..(at + length) as usize].copy_from_slice(&bytes);
}

/// Writes the first `mib` MiB of the disk.
async fn fill(client: &Client, content: &mut [u8], chance: &mut Chance, mib: u64) {
    for at in 0..mib {
        write(client, content, chance, at * MIB, MIB).await;
    }
}

/// Writes scattered pages, and so often the same place that a small log is full of them.
async fn churn(client: &Client, content: &mut [u8], chance: &mut Chance, mib: u64) {
    for _ in 0..mib {
        write(client, content, chance, 5 * MIB, MIB).await;
    }
    for _ in 0..20 {
        let at = chance.below(SIZE / 4096) * 4096;
        write(client, content, chance, at, 4096).await;
    }
}

async fn wire_sent(node: &Node) -> u64 {
    node.group(GROUP).await["link"]["wire_sent"].as_u64().expect("a number")
}

async fn oldest(node: &Node) -> u64 {
    node.group(GROUP).await["log"]["oldest"].as_u64().expect("a number")
}

/// A pair with one disk, in step.
async fn protected(lab: &Lab, settings: &[&str]) -> (Node, Node) {
    let (mut production, mut recovery) =
        (small_segments(lab, "production"), small_segments(lab, "recovery"));
    expect_resync(&mut [&mut production, &mut recovery]);
    recovery.start().await;
    production.start().await;
    production.pair_with(&recovery).await;
    protect(&production, DISK, SIZE, settings).await;
    production.in_step(GROUP).await;
    (production, recovery)
}

/// A pair with a line between them that can be cut.
async fn over_a_relay(lab: &Lab, chance: &mut Chance) -> (Node, Node, Relay) {
    let (mut production, mut recovery) =
        (small_segments(lab, "production"), small_segments(lab, "recovery"));
    expect_resync(&mut [&mut production, &mut recovery]);
    let relay = pair_through_relay(&mut production, &mut recovery, chance).await;
    (production, recovery, relay)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_log_gives_way_and_only_what_changed_is_sent() {
    let lab = Lab::new();
    let mut chance = Chance::from_env("SRN_SEED");
    let (production, mut recovery) = protected(&lab, &SMALL_LOG).await;
    let client = production.open(&export_of(DISK)).await;
    let mut content = vec![0; SIZE as usize];
    fill(&client, &mut content, &mut chance, 6).await;
    production.in_step(GROUP).await;
    let before = production.json(&["checkpoint", "create", GROUP, "--label", "before"]).await;
    assert!(before["frame"].as_u64().is_some(), "{before:#}");
    production.in_step(GROUP).await;
    let then = content.clone();
    recovery.stop().await;

    // Far more than the log holds; nobody waits for the peer.
    churn(&client, &mut content, &mut chance, 40).await;
    let is_tracking = |group: &Value| group["state"] == "tracking";
    let group = production.group_until(GROUP, "it tracks", is_tracking).await;
    let (log, acknowledged) = (&group["log"], &group["acknowledged"]);
    assert!(log["oldest"].as_u64() > acknowledged.as_u64().map(|at| at + 1), "{group:#}");
    let sent = wire_sent(&production).await;

    recovery.start().await;
    expect_replica(&production, &recovery, DISK, &content, "a long absence").await;
    let sent = wire_sent(&production).await - sent;
    assert!(sent <= 3 * MIB, "{sent} bytes were sent for 1 MiB and 20 pages that changed");
    expect_same(&exported(&recovery, DISK, "before").await, &then, "the checkpoint before");
    let told = recovery.srn(&["events"]).await.done();
    assert!(told.out.contains("resync: this replica is at frame"), "{}", told.out);

    // Frames flow again, and it outlives both.
    churn(&client, &mut content, &mut chance, 2).await;
    expect_replica(&production, &recovery, DISK, &content, "a resync").await;
    recovery.kill().await;
    recovery.start().await;
    expect_replica(&production, &recovery, DISK, &content, "a restart").await;
    expect_same(&exported(&recovery, DISK, "before").await, &then, "the checkpoint, again");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_replica_is_copied_anew_though_the_log_begins_later() {
    let lab = Lab::new();
    let mut chance = Chance::from_env("SRN_SEED");
    let (production, recovery) = protected(&lab, &SMALL_LOG).await;
    let client = production.open(&export_of(DISK)).await;
    let mut content = vec![0; SIZE as usize];
    fill(&client, &mut content, &mut chance, 12).await;
    for _ in 0..3 {
        churn(&client, &mut content, &mut chance, 10).await;
        production.in_step(GROUP).await;
    }
    assert!(oldest(&production).await > 1, "the log still begins at the first frame");
    let sent = wire_sent(&production).await;
    let _ = recovery.srn(&["group", "delete", GROUP, "--yes"]).await.done();
    let _ = production.srn(&["group", "pause", GROUP]).await.done();
    let _ = production.srn(&["group", "resume", GROUP]).await.done();
    expect_replica(&production, &recovery, DISK, &content, "a full copy").await;
    let sent = wire_sent(&production).await - sent;
    assert!(sent <= 34 * MIB, "{sent} bytes were sent for a disk of 32 MiB");
    churn(&client, &mut content, &mut chance, 2).await;
    expect_replica(&production, &recovery, DISK, &content, "frames behind a full copy").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_is_compared_and_seeded_from_what_is_there() {
    let lab = Lab::new();
    let mut chance = Chance::from_env("SRN_SEED");
    let (production, recovery) = protected(&lab, &["--checkpoint-every", "0s"]).await;
    let client = production.open(&export_of(DISK)).await;
    let mut content = vec![0; SIZE as usize];
    fill(&client, &mut content, &mut chance, 16).await;
    production.in_step(GROUP).await;

    // Nothing differs: next to nothing is sent.
    production.srn(&["group", "resync", GROUP]).await.refused(6, &["recovery node"]);
    let compared = async |seeds: &[&str]| {
        let before = wire_sent(&production).await;
        let asked = [&["group", "resync", GROUP], seeds].concat();
        let _ = recovery.srn(&asked).await.done();
        let is_done = |group: &Value| group["resync_asked"] == false;
        recovery.group_until(GROUP, "it is compared", is_done).await;
        production.in_step(GROUP).await;
        wire_sent(&production).await - before
    };
    let sent = compared(&[]).await;
    assert!(sent < 64 << 10, "{sent} bytes were sent where nothing differs");

    // A replica that is lost: an old copy of the disk holds most of it.
    let seed = recovery.dir().join("old.raw");
    std::fs::write(&seed, &content).expect("the seed is written");
    let _ = production.srn(&["group", "pause", GROUP]).await.done();
    churn(&client, &mut content, &mut chance, 1).await;
    let _ = recovery.srn(&["group", "delete", GROUP, "--yes"]).await.done();
    let _ = production.srn(&["group", "resume", GROUP]).await.done();
    let _ = production.srn(&["group", "pause", GROUP]).await.done();
    let seed = seed.display().to_string();
    let nothing = ["group", "resync", GROUP, "--seed-from", "/nowhere"];
    recovery.group_until(GROUP, "there is a replica", |group| !group.is_null()).await;
    recovery.srn(&nothing).await.refused(3, &["/nowhere"]);
    let _ = recovery.srn(&["group", "resync", GROUP, "--seed-from", &seed]).await.done();
    let sent = wire_sent(&production).await;
    let _ = production.srn(&["group", "resume", GROUP]).await.done();
    recovery.group_until(GROUP, "it is compared", |group| group["resync_asked"] == false).await;
    expect_replica(&production, &recovery, DISK, &content, "seeding").await;
    let sent = wire_sent(&production).await - sent;
    assert!(sent <= 2 * MIB, "{sent} bytes were sent for 1 MiB and 20 pages that changed");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_resync_that_is_cut_goes_on_where_it_was() {
    let lab = Lab::new();
    let mut chance = Chance::from_env("SRN_SEED");
    let (production, recovery, relay) = over_a_relay(&lab, &mut chance).await;
    protect(&production, DISK, SIZE, &SMALL_LOG).await;
    production.in_step(GROUP).await;
    let client = production.open(&export_of(DISK)).await;
    let mut content = vec![0; SIZE as usize];
    // The recovery node holds more than production knows: its last words are lost.
    relay.cut(false, true);
    write(&client, &mut content, &mut chance, 0, 64 << 10).await;
    let acknowledged = production.group(GROUP).await["acknowledged"].as_u64();
    let is_ahead = |group: &Value| group["head"].as_u64() > acknowledged;
    recovery.group_until(GROUP, "it holds more than it could say", is_ahead).await;
    relay.shape(Shape { cut: true, ..Shape::CLEAR });
    let is_down = |group: &Value| group["state"] != "streaming";
    production.group_until(GROUP, "the link is down", is_down).await;
    fill(&client, &mut content, &mut chance, 32).await;
    production.group_until(GROUP, "it tracks", |group| group["state"] == "tracking").await;
    let sent = wire_sent(&production).await;
    // So slow that it can be caught in the middle.
    let slow = Shape { rate: 4 << 20, queue: 256 << 10, ..Shape::CLEAR };
    relay.shape(slow);
    let done = |group: &Value| group["resync"]["done"].as_u64();
    let mut before = 0;
    for _ in 0..2 {
        let begun = recovery.group_until(GROUP, "it begins", |group| done(group).is_some()).await;
        assert!(done(&begun) >= Some(before), "it had come to {before}: {begun:#}");
        let cause = begun["cause"].as_str().unwrap_or("");
        assert!(cause.contains("what changed is sent"), "{begun:#}");
        let is_on_its_way = |group: &Value| done(group).is_some_and(|done| done > before + 4 * MIB);
        let group = recovery.group_until(GROUP, "it is under way", is_on_its_way).await;
        before = done(&group).unwrap_or(0);
        relay.shape(Shape { cut: true, ..Shape::CLEAR });
        production.group_until(GROUP, "the link is down", |group| group["resync"].is_null()).await;
        relay.shape(slow);
    }
    expect_replica(&production, &recovery, DISK, &content, "two cuts").await;
    let sent = wire_sent(&production).await - sent;
    assert!(sent <= 44 * MIB, "{sent} bytes were sent for 32 MiB in three parts");
    let client = read_all(&client).await.expect("it is read");
    expect_same(&client, &content, "the disk at production");
}

/// A comparison is settled in parts, and a cut comes in the middle of one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_comparison_that_is_cut_goes_on_where_it_was() {
    let lab = Lab::new();
    let mut chance = Chance::from_env("SRN_SEED");
    let (production, recovery, relay) = over_a_relay(&lab, &mut chance).await;
    let large = 192 << 20;
    protect(&production, DISK, large, &["--checkpoint-every", "0s"]).await;
    production.in_step(GROUP).await;
    // The replica does not get what is written now, and has to find it out by itself.
    let _ = production.srn(&["group", "pause", GROUP]).await.done();
    let client = production.open(&export_of(DISK)).await;
    let mut content = vec![0; large as usize];
    for at in (0..192).step_by(4) {
        write(&client, &mut content, &mut chance, at * MIB, MIB).await;
    }
    let slow = Shape { rate: 4 << 20, queue: 256 << 10, ..Shape::CLEAR };
    relay.shape(slow);
    let _ = recovery.srn(&["group", "resync", GROUP]).await.done();
    let sent = wire_sent(&production).await;
    let _ = production.srn(&["group", "resume", GROUP]).await.done();
    let done = |group: &Value| group["resync"]["done"].as_u64();
    let is_settled = |group: &Value| done(group).is_some_and(|done| done >= 64 * MIB);
    let group = recovery.group_until(GROUP, "a part is settled", is_settled).await;
    let before = done(&group);
    relay.shape(Shape { cut: true, ..Shape::CLEAR });
    production.group_until(GROUP, "the link is down", |group| group["resync"].is_null()).await;
    relay.shape(slow);
    let begun = recovery.group_until(GROUP, "it begins", |group| done(group).is_some()).await;
    assert!(done(&begun) >= before, "it had come to {before:?}: {begun:#}");
    expect_replica(&production, &recovery, DISK, &content, "a cut").await;
    let sent = wire_sent(&production).await - sent;
    assert!(sent <= 68 * MIB, "{sent} bytes were sent for 48 MiB in two parts");
}
