//! Passes over a disk of QEMU's, which tells what changed.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use serde_json::{Value, json};
use srn_e2e::{Lab, Node, PATIENCE, wait_for};
use srn_nbd::client::Client;

use crate::server::{GROUP, SIZE, Server, passed, protect, pull, recovered, same};

const BLOCK: usize = 4096;
const BLOCKS: u64 = SIZE / BLOCK as u64;

/// The place and the content of the write with this number, the first of which is 1.
fn write(number: u64) -> (u64, Vec<u8>) {
    let place = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40;
    (place % BLOCKS * BLOCK as u64, number.to_le_bytes().repeat(BLOCK / 8))
}

/// Writes one block after the other, each when the one before was answered, until told to stop.
/// Returns how many there were.
async fn keep_writing(writer: Client, from: u64, stop: Arc<AtomicBool>) -> u64 {
    let mut number = from;
    while !stop.load(Ordering::Relaxed) {
        number += 1;
        let (offset, data) = write(number);
        writer.write(offset, Bytes::from(data), false).await.expect("a write");
        tokio::time::sleep(std::time::Duration::from_micros(300)).await;
    }
    number
}

/// Checks that `found` is the disk as it was after one of these writes and before the next. Returns its number.
fn is_a_moment(found: &[u8], before: &[u8], writes: u64) -> u64 {
    let mut disk = before.to_vec();
    let mut moment = 0;
    // The newest of them that is there.
    for number in 1..=writes {
        let (offset, data) = write(number);
        if found[offset as usize..][..BLOCK] == data {
            moment = number;
        }
    }
    for number in 1..=moment {
        let (offset, data) = write(number);
        disk[offset as usize..][..BLOCK].copy_from_slice(&data);
    }
    same(found, &disk);
    moment
}

#[tokio::test]
async fn each_pass_ends_with_a_point_and_reads_only_what_has_changed() {
    let lab = Lab::new();
    let server = Server::new(&lab).await;
    let (production, recovery) = lab.pair().await;
    protect(&production, "cache", &[]).await;
    let before = server.content().await;
    server.add(&production, "1s").await;
    same(&recovered(&lab, &recovery).await, &before);
    let first = production.group(GROUP).await;
    assert_eq!(first["disks"][0]["source"], "pull");
    // Holes were not read.
    assert!(first["link"]["content_written"].as_u64().expect("a counter") <= SIZE / 2, "{first}");

    // Under a writer: what can be recovered is what the disk was at one moment.
    let stop = Arc::new(AtomicBool::new(false));
    let writer = tokio::spawn(keep_writing(server.writer().await, 0, stop.clone()));
    let mut points = Vec::new();
    for _ in 0..3 {
        let last = passed(&production).await;
        assert_eq!(last["kind"], "changes", "{last}");
        production.in_step(GROUP).await;
        points.push(recovered(&lab, &recovery).await);
    }
    stop.store(true, Ordering::Relaxed);
    let writes = writer.await.expect("it ends");
    let moments: Vec<u64> =
        points.iter().map(|point| is_a_moment(point, &before, writes)).collect();
    assert!(moments.is_sorted_by(|a, b| a < b) && moments[0] > 0, "{moments:?}");

    // Quiet again: everything, and then nothing more.
    passed(&production).await;
    let last = passed(&production).await;
    assert_eq!((last["read"].as_u64(), last["new"].as_u64()), (Some(0), Some(0)), "{last}");
    server.write(0, 1 << 20, 2 << 20).await;
    server.write(7, 15 << 20, 4096).await;
    let last = passed(&production).await;
    let read = last["read"].as_u64().expect("a counter");
    assert!(read <= (2 << 20) + (128 << 10), "{last}");
    production.in_step(GROUP).await;
    same(&recovered(&lab, &recovery).await, &server.content().await);
    let (things, bitmaps) = server.ours().await;
    assert!(bitmaps.len() <= 2, "{things:?} {bitmaps:?}");

    // Nobody writes it here; and taken out, nothing of it is left in the server's QEMU.
    let uri = production.nbd_unix_uri("web/root");
    let refused = srn_e2e::tool::run("nbdinfo", &["--size", &uri]).await;
    assert!(refused.code != 0 && refused.err.contains("policy"), "{refused:?}");
    let _ = production.srn(&["disk", "remove", GROUP, "root"]).await.done();
    assert_eq!(server.ours().await, (vec![], vec![]));
    server.write(8, 0, 4096).await;
}

/// Begins a pass that lasts, over something that has changed, and waits until it is in its middle.
async fn into_the_middle(production: &Node, server: &Server, pattern: u8) {
    server.limit_reads(2 << 20).await;
    let reads = |group: &Value| {
        let copied = group["disks"][0]["copy"]["done"].as_u64().unwrap_or(0);
        !pull(group)["pass"].is_null() && (1 << 20..6 << 20).contains(&copied)
    };
    server.write(pattern, 0, 8 << 20).await;
    production.group_until(GROUP, "the middle of a pass", reads).await;
}

#[tokio::test]
async fn a_daemon_that_dies_in_a_pass_goes_on_with_what_has_changed() {
    let lab = Lab::new();
    let server = Server::new(&lab).await;
    let (mut production, mut recovery) = lab.pair().await;
    protect(&production, "cache", &[]).await;
    server.add(&production, "1s").await;
    recovery.expect_in_log("disconnected: ");
    for pattern in [1, 2] {
        passed(&production).await;
        production.in_step(GROUP).await;
        let before = server.content().await;
        into_the_middle(&production, &server, pattern).await;
        production.kill().await;
        // The last point stays, though half of a pass came behind it.
        same(&recovered(&lab, &recovery).await, &before);
        server.write(pattern + 10, 20 << 20, 64 << 10).await;
        server.limit_reads(0).await;
        production.start().await;
        let last = passed(&production).await;
        assert_eq!(last["kind"], "changes", "{last}");
        production.in_step(GROUP).await;
        same(&recovered(&lab, &recovery).await, &server.content().await);
    }

    // Stopped in order, it leaves nothing but the bitmap.
    production.stop().await;
    let (things, bitmaps) = server.ours().await;
    assert!(things.is_empty() && bitmaps.len() == 1, "{things:?} {bitmaps:?}");
    server.write(30, 12 << 20, 4096).await;
    production.start().await;
    let last = passed(&production).await;
    assert_eq!(last["kind"], "changes", "{last}");
    production.in_step(GROUP).await;
    same(&recovered(&lab, &recovery).await, &server.content().await);
}

#[tokio::test]
async fn a_server_that_dies_in_a_pass_and_a_lost_bitmap_lead_to_a_comparison() {
    let lab = Lab::new();
    let server = Server::new(&lab).await;
    let (mut production, mut recovery) = lab.pair().await;
    protect(&production, "replica", &[]).await;
    server.add(&production, "1s").await;
    passed(&production).await;
    production.in_step(GROUP).await;
    let before = server.content().await;

    // It dies in the middle of a pass.
    production.expect_in_log("pulling disk root");
    production.expect_in_log("failed: ");
    production.expect_in_log("all of disk root is read and compared");
    recovery.expect_in_log("failed: ");
    into_the_middle(&production, &server, 1).await;
    server.kill().await;
    let failed = |group: &Value| group["state"] == "failed";
    let group = production.group_until(GROUP, "it is told", failed).await;
    assert!(pull(&group)["failed"].is_string() && group["safe"] == false, "{group}");
    same(&recovered(&lab, &recovery).await, &before);

    // It comes back, and knows nothing: everything is read, and only what differs is sent.
    let server = Server::on(&lab).await;
    server.write(2, 3 << 20, 64 << 10).await;
    let counted = |group: &Value| group["link"]["content_written"].as_u64().expect("a counter");
    let (written, last) = (counted(&group), passed(&production).await);
    assert_eq!(last["kind"], "everything", "{last}");
    assert!(last["reason"].as_str().expect("words").contains("no bitmap"), "{last}");
    production.in_step(GROUP).await;
    same(&recovered(&lab, &recovery).await, &server.content().await);
    let more = counted(&production.group(GROUP).await) - written;
    assert!(more <= 9 << 20, "{more} bytes were sent");
    let events = production.srn(&["events"]).await.done().out;
    assert!(events.contains("all of disk root is read and compared: the server's QEMU has no"));

    // Somebody removes the bitmap between two passes.
    assert_eq!(passed(&production).await["kind"], "changes");
    let lost = wait_for("the bitmap is removed", PATIENCE, async || {
        let (_, bitmaps) = server.ours().await;
        let bitmap = json!({"node": "drive0", "name": bitmaps.first()?});
        server.monitor.execute("block-dirty-bitmap-remove", bitmap).await.ok()
    });
    lost.await;
    server.write(3, 23 << 20, 64 << 10).await;
    let everything = |group: &Value| pull(group)["last"]["kind"] == "everything";
    let group = production.group_until(GROUP, "everything is compared", everything).await;
    assert!(pull(&group)["last"]["new"].as_u64().expect("a counter") <= 64 << 10, "{group}");
    production.in_step(GROUP).await;
    same(&recovered(&lab, &recovery).await, &server.content().await);
}

/// Somebody ends the job that keeps a moment as it was: what is read behind that is of another one.
#[tokio::test]
async fn a_moment_that_is_lost_in_a_pass_is_no_point() {
    let lab = Lab::new();
    let server = Server::new(&lab).await;
    let (mut production, mut recovery) = lab.pair().await;
    protect(&production, "cache", &[]).await;
    server.add(&production, "1s").await;
    passed(&production).await;
    production.in_step(GROUP).await;
    let before = server.content().await;
    production.expect_in_log("pulling disk root");
    production.expect_in_log("failed: ");
    recovery.expect_in_log("failed: ");
    into_the_middle(&production, &server, 1).await;
    let (things, _) = server.ours().await;
    let job = json!({"device": things.first().expect("an export"), "force": true});
    server.monitor.execute("block-job-cancel", job).await.expect("it ends");
    // Behind what was read, and before it.
    server.write(2, 0, 64 << 10).await;
    server.write(3, 7 << 20, 64 << 10).await;
    let failed = |group: &Value| pull(group)["failed"].is_string();
    let group = production.group_until(GROUP, "it is told", failed).await;
    assert!(pull(&group)["failed"].as_str().expect("words").contains("no longer keeps"), "{group}");
    same(&recovered(&lab, &recovery).await, &before);
    server.limit_reads(0).await;
    let last = passed(&production).await;
    assert_eq!(last["kind"], "changes", "{last}");
    production.in_step(GROUP).await;
    same(&recovered(&lab, &recovery).await, &server.content().await);
}

/// A pass is larger than the log: it waits for the peer, and the server writes on.
#[tokio::test]
async fn a_pass_never_fills_the_log() {
    let lab = Lab::new();
    let server = Server::new(&lab).await;
    let (mut production, mut recovery) = (lab.node("production"), lab.node("recovery"));
    production.configure("[store]\nsegment_size = \"1M\"");
    recovery.start().await;
    production.start().await;
    production.pair_with(&recovery).await;
    protect(&production, "cache", &["--log-size", "8M", "--on-full", "stop"]).await;
    server.add(&production, "1s").await;
    same(&recovered(&lab, &recovery).await, &server.content().await);

    production.expect_in_log("disconnected: no connection to the peer");
    production.expect_in_log("disconnected: agreeing with the peer");
    passed(&production).await;
    recovery.stop().await;
    for block in 0..16u8 {
        server.write(block + 1, u64::from(block) << 20, 1 << 20).await;
    }
    let waits = |group: &Value| pull(group)["waits"].is_string();
    let group = production.group_until(GROUP, "the pass waits for room", waits).await;
    assert_ne!(group["state"], "failed", "{group}");
    server.write(99, 23 << 20, 4096).await;
    recovery.start().await;
    passed(&production).await;
    production.in_step(GROUP).await;
    same(&recovered(&lab, &recovery).await, &server.content().await);
}

/// A planned failover has a last pass made, whenever the next one would have come.
#[tokio::test]
async fn a_planned_failover_takes_what_the_server_wrote_last() {
    let lab = Lab::new();
    let server = Server::new(&lab).await;
    let (mut production, mut recovery) = lab.pair().await;
    protect(&production, "cache", &[]).await;
    server.add(&production, "1h").await;
    server.write(5, 1 << 20, 1 << 20).await;
    let before = production.group(GROUP).await;
    assert!(pull(&before)["next"].is_string(), "{before}");
    production.expect_in_log("draining for a planned failover");
    production.expect_in_log("fenced: ");
    recovery.expect_in_log("failed over");
    let run = ["failover", "run", GROUP, "--no-start", "--yes"];
    let _ = recovery.srn(&run).await.done();
    same(&recovered(&lab, &recovery).await, &server.content().await);
    let fenced = |group: &Value| group["state"] == "fenced";
    production.group_until(GROUP, "production is fenced", fenced).await;
}
