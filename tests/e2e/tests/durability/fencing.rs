//! After a failover one node writes and the other says so, whatever comes back and when; and what
//! an administrator does to a group between failovers takes nothing from it.

use std::process::Stdio;
use std::sync::Arc;

use bytes::Bytes;
use rustix::process::Signal;
use srn_e2e::{Chance, Lab, Node, PATIENCE, tool, wait_for};
use srn_nbd::client::Client;
use tokio::io::{AsyncBufReadExt, BufReader};

use crate::common::{
    GROUP, connect, expect_lost_link, expect_replica, expect_same, export_of, exported, filled,
    protect, read_all, small_segments,
};
use crate::oracle::{Moment, Oracle, SECTOR};

/// The disk of these tests.
const DISK: &str = "root";
const SIZE: u64 = 8 << 20;

/// The recovered server's export; it is called as its group.
const RECOVERED: &str = "recovery/web/root";

/// A pair of nodes with one small disk, streaming.
async fn protected(lab: &Lab) -> (Node, Node) {
    let (mut production, mut recovery) =
        (small_segments(lab, "production"), small_segments(lab, "recovery"));
    expect_lost_link(&mut [&mut production, &mut recovery]);
    recovery.start().await;
    production.start().await;
    production.pair_with(&recovery).await;
    protect(&production, DISK, SIZE, &["--checkpoint-every", "0s"]).await;
    production.in_step(GROUP).await;
    (production, recovery)
}

/// What is right to be logged by a node that takes over, and by one that is fenced.
fn expect_failover(production: &mut Node, recovery: &mut Node) {
    production.expect_in_log("fenced: the peer has failed over");
    recovery.expect_in_log("failed over: this node is primary");
    recovery.expect_in_log("disconnected: failed over to this node");
}

/// The production node says that it is fenced, first of all, and takes nothing.
async fn expect_fenced(production: &Node, head: u64) {
    let fenced = |group: &serde_json::Value| {
        group["state"] == "fenced" && group["cause"].as_str().unwrap_or("").contains("newer epoch")
    };
    production.group_until(GROUP, "production is fenced", fenced).await;
    let status = production.srn(&["status"]).await.done();
    let first = status.out.lines().next().unwrap_or_default();
    assert!(first.starts_with("NOT SAFE because group web is fenced"), "{first}");

    let uri = production.nbd_uri(&export_of(DISK));
    let nbdinfo = tool::run("nbdinfo", &[&uri]).await;
    // It shows the kind of error only, which is that of a policy.
    assert!(nbdinfo.code != 0 && nbdinfo.err.contains("not supported"), "{nbdinfo:#?}");
    let qemu = tool::run("qemu-io", &["-f", "raw", "-c", "write -P 9 0 4k", &uri]).await;
    assert!(qemu.code != 0 && qemu.err.contains("fenced"), "{qemu:#?}");
    let add = production.srn(&["disk", "add", GROUP, "more", "--size", "1M"]).await;
    add.refused(6, &["fenced"]);
    let checkpoint = production.srn(&["checkpoint", "create", GROUP]).await;
    assert!(checkpoint.code == 6, "{checkpoint:#?}");
    let after = production.group(GROUP).await["head"].as_u64();
    assert_eq!(after, Some(head), "a fenced node has appended something");
}

/// Writes pieces of 4 KiB, each of its own value, to the beginning of a disk.
async fn write_pieces(client: &Client, values: std::ops::Range<u8>) {
    for value in values {
        let at = u64::from(value) * 4096;
        client.write(at, filled(value, 4096), false).await.expect("the write is taken");
    }
}

/// Clients write on while production is drained: nothing is answered there that is not here.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_answered_during_a_planned_failover_is_there_after_it() {
    let lab = Lab::new();
    let (mut production, mut recovery) = protected(&lab).await;
    expect_failover(&mut production, &mut recovery);
    production.expect_in_log("draining for a planned failover");
    production.expect_in_log("fenced: drained for a planned failover");
    let client = Arc::new(production.open(&export_of(DISK)).await);
    let writers: Vec<_> = (0..8_u64)
        .map(|slot| {
            let client = client.clone();
            tokio::spawn(async move {
                let mut answered = 0_u64;
                loop {
                    let data = Bytes::from((answered + 1).to_be_bytes().repeat(512));
                    if client.write(slot * 4096, data, false).await.is_err() {
                        return answered;
                    }
                    answered += 1;
                }
            })
        })
        .collect();
    let busy = |group: &serde_json::Value| group["head"].as_u64() > Some(200);
    production.group_until(GROUP, "they write", busy).await;
    let run = recovery.json(&["failover", "run", GROUP, "--no-start", "--yes"]).await;
    assert_eq!(run["phase"], "served", "{run:#}");
    let recovered = recovery.open(RECOVERED).await;
    let found = read_all(&recovered).await.expect("the recovered disk is read");
    for (slot, writer) in writers.into_iter().enumerate() {
        let answered = writer.await.expect("it ends");
        let bytes = found[slot * 4096..].first_chunk().expect("a number");
        let there = u64::from_be_bytes(*bytes);
        // The one under way at the end was answered with an error, and may be there.
        let whole = there == answered || there == answered + 1;
        assert!(whole, "slot {slot}: write {answered} was answered, {there} is there");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_planned_failover_loses_nothing_and_fences() {
    let lab = Lab::new();
    let (mut production, mut recovery) = protected(&lab).await;
    expect_failover(&mut production, &mut recovery);
    production.expect_in_log("draining for a planned failover");
    production.expect_in_log("fenced: drained for a planned failover");

    let client = production.open(&export_of(DISK)).await;
    write_pieces(&client, 1..100).await;
    let expected = read_all(&client).await.expect("the disk is read");
    let run = recovery.json(&["failover", "run", GROUP, "--no-start", "--yes"]).await;
    assert_eq!(run["phase"], "served", "{run:#}");
    assert_eq!(run["exports"], serde_json::json!([RECOVERED]), "{run:#}");
    let head = production.group(GROUP).await["head"].as_u64().expect("a number");

    // The client that has the disk open is told too.
    let late = client.write(0, filled(0xee, 4096), false).await;
    assert!(late.is_err(), "a fenced node has answered a write");
    expect_fenced(&production, head).await;

    // Nothing is lost, and the recovered disk can be written.
    let recovered = recovery.open(RECOVERED).await;
    let found = read_all(&recovered).await.expect("the recovered disk is read");
    expect_same(&found, &expected, "the recovered disk");
    let mut expected = expected;
    recovered.write(1 << 20, filled(0x77, 65536), true).await.expect("the write is taken");
    expected[1 << 20..(1 << 20) + 65536].fill(0x77);
    recovered.trim(4096, 4096, false).await.expect("the trim is taken");
    expected[4096..8192].fill(0);

    // It outlives the recovery node.
    recovery.kill().await;
    recovery.start().await;
    let list = recovery.json(&["failover", "list"]).await;
    assert_eq!(list[0]["phase"], "served", "{list:#}");
    let recovered = recovery.open(RECOVERED).await;
    let found = read_all(&recovered).await.expect("the recovered disk is read");
    expect_same(&found, &expected, "the recovered disk after the recovery node's death");
    recovered.write(2 << 20, filled(0x78, 4096), false).await.expect("the write is taken");
    expected[2 << 20..(2 << 20) + 4096].fill(0x78);

    // And so does the fence the production node, without and with a word from the peer.
    production.kill().await;
    production.start().await;
    expect_fenced(&production, head).await;

    let _ = recovery.srn(&["failover", "stop", GROUP, "--graceful", "0s"]).await.done();
    assert!(recovered.write(0, filled(1, 512), false).await.is_err(), "it was stopped");
    assert!(connect(&recovery.nbd_uri(RECOVERED)).await.is_err(), "it was stopped");
    // Not from anywhere else; it goes on from where it stopped.
    let elsewhere = ["failover", "run", GROUP, "--no-start", "--at", "1"];
    recovery.srn(&elsewhere).await.refused(6, &["failed over already", "failover test"]);
    let again = recovery.json(&["failover", "run", GROUP, "--no-start"]).await;
    assert_eq!(again["phase"], "served", "{again:#}");
    let recovered = recovery.open(RECOVERED).await;
    let found = read_all(&recovered).await.expect("the recovered disk is read");
    expect_same(&found, &expected, "the recovered disk, served again");
    expect_fenced(&production, head).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_forced_failover_needs_a_word_and_fences_who_comes_back() {
    let lab = Lab::new();
    let (mut production, mut recovery) = protected(&lab).await;
    expect_failover(&mut production, &mut recovery);
    let mut chance = Chance::from_env("SRN_SEED");

    // Frames that the recovery node never sees: it stands still while they are written, and what
    // fits into its socket meanwhile is less than this.
    let mut oracle = Oracle::new(chance.next(), vec![SIZE as usize / SECTOR]);
    let client = production.open(&export_of(DISK)).await;
    let mut write = async |oracle: &mut Oracle| {
        let start = chance.below(SIZE / SECTOR as u64 - 512) as usize;
        let (number, content) = oracle.send(0, start, 512);
        let at = (start * SECTOR) as u64;
        client.write(at, content, false).await.expect("the write is taken");
        oracle.answer(number);
    };
    for _ in 0..20 {
        write(&mut oracle).await;
    }
    production.in_step(GROUP).await;
    let held = oracle.now();
    recovery.signal(Signal::STOP);
    for _ in 0..128 {
        write(&mut oracle).await;
    }
    let before = read_all(&client).await.expect("the disk is read");
    let head = production.group(GROUP).await["head"].as_u64().expect("a number");
    production.kill().await;
    recovery.signal(Signal::CONT);

    // Without a person's word nothing happens, be the production node known to be gone or not.
    let forced = ["failover", "run", GROUP, "--no-start", "--force"];
    let epoch = recovery.group(GROUP).await["epoch"].clone();
    let expect_unchanged = async || {
        let group = recovery.group(GROUP).await;
        assert_eq!((&group["role"], &group["epoch"]), (&"secondary".into(), &epoch));
        let list = recovery.json(&["failover", "list"]).await;
        assert_eq!(list, serde_json::json!([]));
    };
    let refused = recovery.srn(&forced).await;
    assert!(refused.code == 6 && refused.err.contains("production"), "{refused:#?}");
    expect_unchanged().await;
    let gone = |group: &serde_json::Value| group["state"] == "disconnected";
    recovery.group_until(GROUP, "production is gone", gone).await;
    let planned = &forced[..4];
    let refused = recovery.srn(planned).await;
    assert!(refused.code == 6 && refused.err.contains("production"), "{refused:#?}");
    expect_unchanged().await;

    let confirmed = [planned, &["--yes-production-is-off"]].concat();
    let run = recovery.json(&confirmed).await;
    assert_eq!(run["phase"], "served", "{run:#}");
    let recovered = recovery.open(RECOVERED).await;
    let found = read_all(&recovered).await.expect("the recovered disk is read");
    let state = oracle.read(std::slice::from_ref(&found)).expect("what was written");
    let judged = oracle.judge(&state, held, Moment::MAX);
    judged.unwrap_or_else(|error| panic!("the recovered disk: {error}"));
    assert!(found != before, "there is no tail: the test has not tried what it should");
    recovered.write(0, filled(0x55, 4096), false).await.expect("the write is taken");

    // Production comes back: fenced, nothing of its tail is gone, and it takes nothing.
    production.start().await;
    let tail = production.group(GROUP).await["head"].as_u64().expect("a number");
    assert!(tail >= head, "the tail was cut from {head} to {tail}");
    expect_fenced(&production, tail).await;
    expect_same(&exported(&production, DISK, "latest").await, &before, "the kept tail");
    // Also without a word from the peer, after its next death.
    recovery.stop().await;
    production.kill().await;
    production.start().await;
    expect_fenced(&production, tail).await;
    expect_same(&exported(&production, DISK, "latest").await, &before, "the kept tail");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_paused_production_node_learns_of_a_failover_too() {
    let lab = Lab::new();
    let (mut production, mut recovery) = protected(&lab).await;
    expect_failover(&mut production, &mut recovery);
    let client = production.open(&export_of(DISK)).await;
    write_pieces(&client, 1..10).await;
    production.in_step(GROUP).await;
    let _ = production.srn(&["group", "pause", GROUP]).await.done();
    write_pieces(&client, 10..20).await;
    let before = read_all(&client).await.expect("the disk is read");
    production.stop().await;
    let word = "--yes-production-is-off";
    let _ = recovery.srn(&["failover", "run", GROUP, "--no-start", word]).await.done();
    production.start().await;
    let tail = production.group(GROUP).await["head"].as_u64().expect("a number");
    expect_fenced(&production, tail).await;
    expect_same(&exported(&production, DISK, "latest").await, &before, "the kept tail");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_checkpoint_over_nbd_is_what_the_raw_export_is() {
    let lab = Lab::new();
    let (production, recovery) = protected(&lab).await;
    let client = production.open(&export_of(DISK)).await;
    write_pieces(&client, 1..50).await;
    let expected = read_all(&client).await.expect("the disk is read");
    let _ = production.srn(&["checkpoint", "create", GROUP, "--label", "good"]).await.done();
    write_pieces(&client, 40..120).await;
    client.trim(0, 1 << 20, false).await.expect("the trim is taken");
    production.in_step(GROUP).await;

    for node in [&recovery, &production] {
        expect_same(&exported(node, DISK, "good").await, &expected, "the raw export");
        let served = ["export", GROUP, DISK, "--at", "good", "--nbd"];
        let mut command = node.srn_command(&served);
        let mut child =
            command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().expect("srn starts");
        let mut lines = BufReader::new(child.stdout.take().expect("its output")).lines();
        let uri = lines.next_line().await.expect("a line").expect("the export's address");

        let reader = connect(&uri).await.expect("it is served");
        assert!(reader.export().read_only);
        let found = read_all(&reader).await.expect("it is read");
        expect_same(&found, &expected, "the checkpoint over NBD");
        write_pieces(&client, 120..125).await;
        let found = read_all(&reader).await.expect("it is read");
        expect_same(&found, &expected, "the checkpoint over NBD while the group goes on");
        // Two readers at a time, and no writer.
        let nbdinfo = tool::run("nbdinfo", &["--json", &uri]).await.done().json();
        assert_eq!(nbdinfo["exports"][0]["is_read_only"], true, "{nbdinfo:#}");
        let qemu = tool::run("qemu-io", &["-f", "raw", "-c", "write -P 9 0 4k", &uri]).await;
        assert!(qemu.code != 0, "{qemu:#?}");
        let refused = reader.write(0, filled(9, 4096), false).await;
        assert!(refused.is_err(), "a checkpoint was written");
        let found = read_all(&reader).await.expect("it is read");
        expect_same(&found, &expected, "the checkpoint after refused writes");
        drop(reader);

        let pid = rustix::process::Pid::from_raw(child.id().expect("it runs") as i32);
        rustix::process::kill_process(pid.expect("a process"), Signal::INT).expect("a signal");
        let ended = tokio::time::timeout(PATIENCE, child.wait()).await;
        assert!(ended.expect("it ends in time").expect("it ends").success());
        wait_for("the export is withdrawn", PATIENCE, async || {
            connect(&uri).await.is_err().then_some(())
        })
        .await;
    }
}

/// What the peer had acknowledged and does not hold any more is at risk again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_was_deleted_is_missed_and_made_again() {
    let lab = Lab::new();
    let (mut production, mut recovery) = protected(&lab).await;
    recovery.expect_in_log("the replica was deleted here");
    production.expect_in_log("it was deleted or set back");
    production.expect_in_log("disconnected: the peer refuses");
    let client = production.open(&export_of(DISK)).await;
    write_pieces(&client, 1..60).await;
    production.in_step(GROUP).await;
    let _ = recovery.srn(&["group", "delete", GROUP, "--yes"]).await.done();
    write_pieces(&client, 60..80).await;
    let told = |group: &serde_json::Value| {
        group["detail"].as_str().unwrap_or("").contains("has deleted its replica")
    };
    let group = production.group_until(GROUP, "it hears of the deletion", told).await;
    assert_eq!(group["safe"], false, "{group:#}");
    assert_eq!(recovery.json(&["group", "list"]).await, serde_json::json!([]));
    // What that says to do makes it again, from the first frame on.
    let _ = production.srn(&["group", "pause", GROUP]).await.done();
    let _ = production.srn(&["group", "resume", GROUP]).await.done();
    let expected = read_all(&client).await.expect("the disk is read");
    expect_replica(&production, &recovery, DISK, &expected, "the deletion of the replica").await;
    let events = production.srn(&["events"]).await.done().out;
    assert!(events.contains("is sent again"), "{events}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pausing_and_deleting_take_nothing() {
    let lab = Lab::new();
    let (mut production, mut recovery) = protected(&lab).await;
    production.expect_in_log("the group was deleted here");
    recovery.expect_in_log("the group was deleted here");
    recovery.expect_in_log("failed over: this node is primary");
    recovery.expect_in_log("disconnected: failed over to this node");
    let client = production.open(&export_of(DISK)).await;
    write_pieces(&client, 1..20).await;
    let paused_at = production.in_step(GROUP).await;

    let _ = production.srn(&["group", "pause", GROUP]).await.done();
    write_pieces(&client, 20..40).await;
    drop(client);
    // It stays paused over a restart, and nothing has gone to the peer.
    production.kill().await;
    production.start().await;
    let group = production.group(GROUP).await;
    assert_eq!(group["state"], "paused", "{group:#}");
    let client = production.open(&export_of(DISK)).await;
    write_pieces(&client, 40..60).await;
    let there = recovery.group(GROUP).await["head"].as_u64().expect("a number");
    // An empty frame that follows the last write may have been on its way.
    assert!(there <= paused_at + 2, "the peer went from {paused_at} to {there} while paused");
    let _ = production.srn(&["group", "resume", GROUP]).await.done();
    production.in_step(GROUP).await;
    let expected = read_all(&client).await.expect("the disk is read");
    expect_same(&exported(&recovery, DISK, "latest").await, &expected, "the replica");

    // Deleted at production: its client is cut off, and the recovery node keeps everything.
    let _ = production.srn(&["group", "delete", GROUP, "--yes"]).await.done();
    let cut = client.write(0, filled(9, 4096), false).await;
    assert!(cut.is_err(), "a deleted group has answered a write");
    let gone = connect(&production.nbd_uri(&export_of(DISK))).await;
    assert!(gone.is_err(), "a deleted group is served");
    expect_same(&exported(&recovery, DISK, "latest").await, &expected, "the kept replica");
    // And can be recovered from it; while it is, it is not deleted.
    let word = "--yes-production-is-off";
    let run = ["failover", "run", GROUP, "--no-start", "--force", word];
    let _ = recovery.srn(&run).await.done();
    let recovered = recovery.open(RECOVERED).await;
    let found = read_all(&recovered).await.expect("the recovered disk is read");
    expect_same(&found, &expected, "the recovered disk");
    let busy = recovery.srn(&["group", "delete", GROUP, "--yes"]).await;
    busy.refused(5, &["failover stop", GROUP]);
    drop(recovered);
    let _ = recovery.srn(&["failover", "stop", GROUP, "--graceful", "0s"]).await.done();
    let _ = recovery.srn(&["group", "delete", GROUP, "--yes"]).await.done();
    let groups = recovery.json(&["group", "list"]).await;
    assert_eq!(groups, serde_json::json!([]));
}

/// Production is not stopped for a failover that cannot be done.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_group_that_does_not_flow_is_not_handed_over() {
    let lab = Lab::new();
    let (mut production, mut recovery) = protected(&lab).await;
    expect_failover(&mut production, &mut recovery);
    production.expect_in_log("draining for a planned failover");
    production.expect_in_log("fenced: drained for a planned failover");
    let client = production.open(&export_of(DISK)).await;
    production.expect_in_log("disconnected: the peer refuses");
    let run = ["failover", "run", GROUP, "--no-start", "--yes"];

    let _ = recovery.srn(&["group", "pause", GROUP]).await.done();
    recovery.srn(&run).await.refused(6, &["is paused", "--force"]);
    write_pieces(&client, 1..10).await;
    let _ = recovery.srn(&["group", "resume", GROUP]).await.done();
    production.in_step(GROUP).await;

    let _ = production.srn(&["group", "pause", GROUP]).await.done();
    recovery.srn(&run).await.refused(6, &["production node", "--force"]);
    write_pieces(&client, 10..20).await;
    let _ = production.srn(&["group", "resume", GROUP]).await.done();
    production.in_step(GROUP).await;
    let group = production.group(GROUP).await;
    assert_eq!(group["state"], "streaming", "{group:#}");
    let expected = read_all(&client).await.expect("the disk is read");

    // Two who want it at once: one gets it.
    let (one, other) = tokio::join!(recovery.srn(&run), recovery.srn(&run));
    let (won, lost) = if one.code == 0 { (one, other) } else { (other, one) };
    let _ = won.done();
    lost.refused(5, &["was failed over and runs as"]);
    let recovered = recovery.open(RECOVERED).await;
    let found = read_all(&recovered).await.expect("the recovered disk is read");
    expect_same(&found, &expected, "the recovered disk");
}

/// Where the fenced group was deleted the new primary makes a full copy.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fenced_group_that_was_deleted_is_replicated_anew() {
    let lab = Lab::new();
    let (mut production, mut recovery) = protected(&lab).await;
    expect_failover(&mut production, &mut recovery);
    production.expect_in_log("draining for a planned failover");
    production.expect_in_log("fenced: drained for a planned failover");
    production.expect_in_log("the group was deleted here");
    let client = production.open(&export_of(DISK)).await;
    write_pieces(&client, 1..10).await;
    let _ = recovery.srn(&["failover", "run", GROUP, "--no-start", "--yes"]).await.done();
    let recovered = recovery.open(RECOVERED).await;
    write_pieces(&recovered, 20..30).await;
    let expected = read_all(&recovered).await.expect("the recovered disk is read");
    let _ = production.srn(&["group", "delete", GROUP, "--yes"]).await.done();
    production.stop().await;
    production.start().await;
    recovery.in_step(GROUP).await;
    let group = production.group(GROUP).await;
    assert_eq!(group["role"], "secondary", "{group:#}");
    expect_same(&exported(&production, DISK, "latest").await, &expected, "the full copy");
}
