//! Synchronous groups: an answer means that the write is at the recovery node, and what happens
//! without it is what was declared.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde_json::Value;
use srn_e2e::{Chance, Lab, PATIENCE, wait_for};

use crate::common::{
    GROUP, expect_same, export_of, exported, filled, pair_through_relay, protect, small_segments,
};

const DISK: &str = "root";
const SIZE: u64 = 1 << 20;
const BLOCK: usize = 4096;

/// Writes blocks one after the other, each with its number, for as long as it is answered; counts
/// the answers.
fn write_on(client: srn_nbd::client::Client) -> (Arc<AtomicU64>, tokio::task::JoinHandle<()>) {
    let answered = Arc::new(AtomicU64::new(0));
    let count = answered.clone();
    let task = tokio::spawn(async move {
        for number in 0.. {
            let at = number % (SIZE / BLOCK as u64) * BLOCK as u64;
            let content = bytes::Bytes::from(number.to_le_bytes().repeat(BLOCK / 8));
            if client.write(at, content, false).await.is_err() {
                return;
            }
            count.store(number + 1, Ordering::SeqCst);
        }
    });
    (answered, task)
}

/// What the disk holds after so many of these writes.
fn after(writes: u64) -> Vec<u8> {
    let blocks = SIZE / BLOCK as u64;
    (0..blocks)
        .flat_map(|block| {
            let last = (0..writes).rev().find(|number| number % blocks == block);
            last.map_or_else(|| vec![0; BLOCK], |last| last.to_le_bytes().repeat(BLOCK / 8))
        })
        .collect()
}

fn waits(group: &Value, waits: bool) -> bool {
    group["synchronous"]["waits"] == waits
}

/// Whatever was answered when production vanished, in the middle of writing, can be recovered.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_that_was_answered_is_lost_with_a_synchronous_node() {
    let lab = Lab::new();
    let (mut production, mut recovery) =
        (small_segments(&lab, "production"), small_segments(&lab, "recovery"));
    let relay =
        pair_through_relay(&mut production, &mut recovery, &mut Chance::from_env("SRN_SEED")).await;
    production.expect_in_log("writes wait: the group is synchronous and its peer is away");
    protect(&production, DISK, SIZE, &["--sync", "wait"]).await;
    production.group_until(GROUP, "writes wait for the peer", |group| waits(group, true)).await;
    let (answered, task) = write_on(production.open(&export_of(DISK)).await);
    wait_for("some writes are answered", PATIENCE, async || {
        (answered.load(Ordering::SeqCst) >= 100).then_some(())
    })
    .await;
    // In the middle of it nothing passes any more, and then production is gone.
    relay.cut(true, true);
    production.group_until(GROUP, "a write waits", |group| group["synchronous"]["held"] != 0).await;
    production.kill().await;
    let _ = task.await;
    let answered = answered.load(Ordering::SeqCst);
    let found = exported(&recovery, DISK, "latest").await;
    // The one that waited may be there too: it was never answered.
    let all = [answered, answered + 1].map(after);
    assert!(all.contains(&found), "the {answered} answered writes are not at the recovery node");
}

/// Writes wait while the peer is away, and go on when it is back; nobody can pause the group.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn writes_wait_for_a_peer_that_is_away_where_that_was_declared() {
    let lab = Lab::new();
    let (mut production, mut recovery) =
        (small_segments(&lab, "production"), small_segments(&lab, "recovery"));
    production.expect_in_log("writes wait: the group is synchronous and its peer is away");
    let relay =
        pair_through_relay(&mut production, &mut recovery, &mut Chance::from_env("SRN_SEED")).await;
    protect(&production, DISK, SIZE, &[]).await;
    production.in_step(GROUP).await;
    let _ = production.srn(&["group", "set", GROUP, "--sync", "wait"]).await.done();
    production.srn(&["group", "pause", GROUP]).await.refused(6, &["--sync degrade"]);
    recovery.srn(&["group", "set", GROUP, "--sync", "wait"]).await.refused(6, &["production"]);
    production.group_until(GROUP, "writes wait for the peer", |group| waits(group, true)).await;
    let client = production.open(&export_of(DISK)).await;
    client.write(0, filled(1, BLOCK), false).await.expect("the peer is there");
    recovery
        .group_until(GROUP, "the recovery node says so too", |group| {
            group["said_by_primary"].as_str().is_some_and(|text| text.contains("synchronous"))
        })
        .await;
    let _ = recovery.stop().await;
    let writing = client.clone();
    let write = tokio::spawn(async move { writing.write(0, filled(2, BLOCK), false).await });
    production
        .group_until(GROUP, "the write waits", |group| group["synchronous"]["held"] == 1)
        .await;
    let away = |group: &Value| group["state"] == "disconnected";
    production.group_until(GROUP, "the peer is away", away).await;
    assert!(!write.is_finished(), "the write was answered without the peer");
    recovery.start().await;
    write.await.expect("the task ends").expect("the write is answered when the peer is back");
    expect_same(
        &exported(&recovery, DISK, "latest").await[..BLOCK],
        &filled(2, BLOCK),
        "the replica",
    );
    drop(relay);
}

/// Without the peer writes go on, which is said at once, and are synchronous again by themselves.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_group_that_may_degrade_goes_on_and_says_so() {
    let lab = Lab::new();
    let (mut production, mut recovery) =
        (small_segments(&lab, "production"), small_segments(&lab, "recovery"));
    production.expect_in_log("not synchronous any more");
    let relay =
        pair_through_relay(&mut production, &mut recovery, &mut Chance::from_env("SRN_SEED")).await;
    protect(&production, DISK, SIZE, &["--sync", "degrade"]).await;
    production.group_until(GROUP, "writes wait for the peer", |group| waits(group, true)).await;
    let client = production.open(&export_of(DISK)).await;
    client.write(0, filled(1, BLOCK), false).await.expect("the peer is there");
    // Nothing passes: the write is answered when the node has seen that.
    relay.cut(true, true);
    client.write(0, filled(2, BLOCK), false).await.expect("production goes on");
    production.group_until(GROUP, "writes do not wait", |group| waits(group, false)).await;
    let events = production.srn(&["events"]).await.done().out;
    assert!(events.contains("not synchronous any more"), "nobody is told: {events}");
    relay.restore();
    production.group_until(GROUP, "writes wait again", |group| waits(group, true)).await;
    client.write(0, filled(3, BLOCK), false).await.expect("the peer is back");
    expect_same(
        &exported(&recovery, DISK, "latest").await[..BLOCK],
        &filled(3, BLOCK),
        "the replica",
    );
    let _ = production.srn(&["group", "set", GROUP, "--sync", "off"]).await.done();
    production.group_until(GROUP, "it is off", |group| group["synchronous"].is_null()).await;
}
