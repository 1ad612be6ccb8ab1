//! The direction of a group turns: after a failover the old primary follows the new one, with what
//! changed since and no more; what only it had is kept; and every state that two nodes can be set into
//! has a name and a way out.

use std::path::Path;

use serde_json::Value;
use srn_e2e::{Chance, Lab, Node, PATIENCE, tool, wait_for};
use srn_nbd::client::Client;

use crate::common::{
    GROUP, connect, expect_lost_link, expect_same, export_of, exported, filled, protect, read_all,
    small_segments,
};

const DISK: &str = "root";
const SIZE: u64 = 16 << 20;
const MIB: u64 = 1 << 20;

/// The recovered server's export; it is called as its group.
const RECOVERED: &str = "recovery/web/root";

/// What is right to be logged by nodes whose roles change.
fn expect_turns(node: &mut Node) {
    for text in [
        "fenced: ",
        "failed over: this node is primary",
        "disconnected: failed over to this node",
        "draining for a planned failover",
        "this node follows the peer from frame",
        "are not in the history of the peer; they are kept as branch",
        "no session with peer",
    ] {
        node.expect_in_log(text);
    }
}

/// A pair of nodes with one disk, streaming, full of what cannot be compressed.
async fn protected(lab: &Lab, chance: &mut Chance) -> (Node, Node, Vec<u8>) {
    let (mut production, mut recovery) =
        (small_segments(lab, "production"), small_segments(lab, "recovery"));
    expect_lost_link(&mut [&mut production, &mut recovery]);
    expect_turns(&mut production);
    expect_turns(&mut recovery);
    recovery.start().await;
    production.start().await;
    production.pair_with(&recovery).await;
    protect(&production, DISK, SIZE, &["--checkpoint-every", "0s"]).await;
    let client = production.open(&export_of(DISK)).await;
    let mut content = vec![0; SIZE as usize];
    for at in 0..SIZE / MIB {
        write(&client, &mut content, chance, at * MIB, MIB as usize).await;
    }
    production.in_step(GROUP).await;
    (production, recovery, content)
}

/// Writes what cannot be compressed, here and there.
async fn write(client: &Client, content: &mut [u8], chance: &mut Chance, at: u64, length: usize) {
    let bytes: Vec<u8> = (0..length / 8).flat_map(|_| chance.next().to_le_bytes()).collect();
    client.write(at, bytes.clone().into(), false).await.expect("the write is taken");
    content[at as usize..at as usize + length].copy_from_slice(&bytes);
}

/// A server's writes that are scattered over the disk: so many of 4 KiB.
async fn write_some(client: &Client, content: &mut [u8], chance: &mut Chance, count: u64) {
    for _ in 0..count {
        let at = chance.below(SIZE / 4096) * 4096;
        write(client, content, chance, at, 4096).await;
    }
}

async fn fenced(node: &Node) {
    let is = |group: &Value| {
        group["state"] == "fenced" && group["cause"].as_str().unwrap_or("").contains("newer epoch")
    };
    let group = node.group_until(GROUP, "it is fenced", is).await;
    let detail = group["detail"].as_str().unwrap_or("");
    assert!(detail.contains("srn group reverse web"), "{group:#}");
}

async fn wire_sent(node: &Node) -> u64 {
    node.group(GROUP).await["link"]["wire_sent"].as_u64().expect("a number")
}

/// The group is written here now, and the disk is what it should be.
async fn taken_over(node: &Node, content: &[u8]) -> Client {
    let run = node.json(&["failover", "run", GROUP, "--no-start", "--yes"]).await;
    assert_eq!(run["phase"], "served", "{run:#}");
    let client = node.open(RECOVERED).await;
    expect_same(&read_all(&client).await.expect("it is read"), content, "the disk taken over");
    client
}

/// Lets `from` follow `to`, and checks that it holds the same in the end and that only so much went
/// over the wire.
async fn turned(from: &Node, to: &Node, content: &[u8], most: u64) {
    fenced(from).await;
    let before = wire_sent(to).await;
    let _ = from.srn(&["group", "reverse", GROUP, "--yes"]).await.done();
    to.in_step(GROUP).await;
    let sent = wire_sent(to).await - before;
    assert!(sent <= most, "{sent} bytes were sent for a delta of at most {most}");
    expect_same(&exported(from, DISK, "latest").await, content, "the disk that follows");
    let group = from.group(GROUP).await;
    assert_eq!(group["role"], "secondary", "{group:#}");
    from.group_until(GROUP, "it says so", |group| group["state"] == "streaming").await;
    // It serves nothing any more.
    assert!(connect(&from.nbd_uri(&export_of(DISK))).await.is_err(), "a secondary serves its disk");
    assert!(connect(&from.nbd_uri(RECOVERED)).await.is_err(), "a secondary serves its disk");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_direction_turns_in_a_full_circle_and_only_what_changed_is_sent() {
    let lab = Lab::new();
    let mut chance = Chance::from_env("SRN_SEED");
    let (mut production, mut recovery, mut content) = protected(&lab, &mut chance).await;
    recovery.stop().await;
    // What the recovery node never gets: the branch.
    let mut lost = content.clone();
    let client = production.open(&export_of(DISK)).await;
    write_some(&client, &mut lost, &mut chance, 50).await;
    let tail = production.group(GROUP).await["head"].as_u64().expect("a number");
    production.kill().await;
    recovery.start().await;
    let word = "--yes-production-is-off";
    let _ = recovery.srn(&["failover", "run", GROUP, "--no-start", word]).await.done();
    let server = recovery.open(RECOVERED).await;
    write_some(&server, &mut content, &mut chance, 100).await;

    // Where it is done, and that nothing is left behind without a word.
    let reverse = ["group", "reverse", GROUP];
    recovery.srn(&reverse).await.refused(7, &["not connected"]);
    production.start().await;
    fenced(&production).await;
    recovery.srn(&reverse).await.refused(6, &["before", "srn group reverse web at production"]);
    let asked = production.srn(&reverse).await;
    assert!(asked.code == 6 && asked.err.contains("50 changes"), "{asked:#?}");
    assert!(asked.err.contains("--yes") && asked.err.contains("branch"), "{asked:#?}");
    assert_eq!(production.group(GROUP).await["head"].as_u64(), Some(tail));
    turned(&production, &recovery, &content, 600 << 10).await;

    // What only production had is still there, and can be had.
    let branches = production.json(&["group", "branches", GROUP]).await;
    let branch = &branches[0];
    assert_eq!(branches.as_array().map(Vec::len), Some(1), "{branches:#}");
    assert_eq!(branch["end"].as_u64(), Some(tail), "{branches:#}");
    assert!(branch["frames"].as_u64() >= Some(1) && branch["bytes"].as_u64() > Some(50 * 4096));
    let id = branch["id"].as_str().expect("a name").to_owned();
    let export_branch = async |node: &Node| {
        let file = node.dir().join("branch.raw");
        let path = file.display().to_string();
        let export = ["export", GROUP, DISK, "--branch", &id, "--raw", &path, "--force"];
        let _ = node.srn(&export).await.done();
        std::fs::read(file).expect("the file is there")
    };
    expect_same(&export_branch(&production).await, &lost, "the branch");
    let show = production.srn(&["group", "show", GROUP]).await.done();
    assert!(show.out.contains("forked behind frame") && show.out.contains("branches kept here: 1"));

    // The recovery node goes on; what it writes is protected again.
    write_some(&server, &mut content, &mut chance, 20).await;
    recovery.in_step(GROUP).await;
    expect_same(&exported(&production, DISK, "latest").await, &content, "the replica");

    // And back to production, and once more round.
    let home = taken_over(&production, &content).await;
    assert!(server.write(0, filled(1, 4096), false).await.is_err(), "the fenced node takes writes");
    write_some(&home, &mut content, &mut chance, 30).await;
    turned(&recovery, &production, &content, 200 << 10).await;
    let away = taken_over(&recovery, &content).await;
    write_some(&away, &mut content, &mut chance, 30).await;
    turned(&production, &recovery, &content, 200 << 10).await;

    // It outlives both.
    production.kill().await;
    production.start().await;
    recovery.in_step(GROUP).await;
    expect_same(&exported(&production, DISK, "latest").await, &content, "the replica, again");
    expect_same(&export_branch(&production).await, &lost, "the branch, again");
    let delete = ["group", "branch", "delete", GROUP, &id];
    production.srn(&delete).await.refused(6, &["no terminal", "--yes"]);
    let _ = production.srn(&[&delete[..], &["--yes"]].concat()).await.done();
    assert_eq!(production.json(&["group", "branches", GROUP]).await, serde_json::json!([]));
    production.srn(&delete).await.refused(6, &["no terminal"]);
    let again = [&delete[..], &["--yes"]].concat();
    production.srn(&again).await.refused(4, &["no branch", "none"]);
    expect_same(&exported(&production, DISK, "latest").await, &content, "the replica without it");
    production.stop().await;
    production.start().await;
    recovery.in_step(GROUP).await;
    expect_same(&exported(&production, DISK, "latest").await, &content, "the replica without it");
}

/// Keeps what the state directory of a stopped node holds, as a snapshot of its machine would.
async fn keep(node: &Node, name: &str) {
    copy_dir(node.state_dir(), &node.dir().join(name)).await;
}

/// Sets a stopped node back to that.
async fn set_back(node: &Node, name: &str) {
    std::fs::remove_dir_all(node.state_dir()).expect("it is removed");
    copy_dir(&node.dir().join(name), node.state_dir()).await;
}

async fn copy_dir(from: &Path, to: &Path) {
    let (from, to) = (from.display().to_string(), to.display().to_string());
    let copied = tool::run("cp", &["-a", &from, &to]).await;
    assert!(copied.code == 0, "{copied:#?}");
}

/// The group is in this state, and says what can be done about it.
async fn stuck(node: &Node, state: &str, cause: &str, way_out: &str) {
    let is = |group: &Value| {
        group["state"] == state && group["cause"].as_str().unwrap_or("").contains(cause)
    };
    let group = node.group_until(GROUP, &format!("it is {state}: {cause}"), is).await;
    let detail = group["detail"].as_str().unwrap_or("");
    assert!(detail.contains(way_out), "nothing is said of {way_out:?}: {group:#}");
    let status = node.srn(&["status"]).await.done();
    assert!(status.out.starts_with("NOT SAFE"), "{status:#?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_primary_that_was_set_back_says_so_and_follows_whoever_has_more() {
    let lab = Lab::new();
    let mut chance = Chance::from_env("SRN_SEED");
    let (mut production, mut recovery, mut content) = protected(&lab, &mut chance).await;
    production.expect_in_log("diverged: the peer holds newer frames");
    recovery.expect_in_log("diverged: the peer was set back");
    recovery.expect_in_log("that was set back");
    production.stop().await;
    keep(&production, "snapshot").await;
    production.start().await;
    let client = production.open(&export_of(DISK)).await;
    write_some(&client, &mut content, &mut chance, 20).await;
    let head = production.in_step(GROUP).await;
    drop(client);
    production.stop().await;
    set_back(&production, "snapshot").await;
    production.start().await;
    stuck(&production, "diverged", "which was set back", "srn failover run web --force").await;
    stuck(&recovery, "diverged", "the peer was set back", "srn group reverse web there").await;
    let there = recovery.group(GROUP).await["head"].as_u64();
    assert!(there >= Some(head - 1), "the recovery node has lost frames: {there:?} of {head}");

    let forced = ["failover", "run", GROUP, "--no-start", "--force", "--yes-production-is-off"];
    let _ = recovery.srn(&forced).await.done();
    let server = recovery.open(RECOVERED).await;
    expect_same(&read_all(&server).await.expect("it is read"), &content, "what it has taken over");
    turned(&production, &recovery, &content, 400 << 10).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_secondaries_say_so_and_one_of_them_is_made_primary() {
    let lab = Lab::new();
    let mut chance = Chance::from_env("SRN_SEED");
    let (mut production, mut recovery, mut content) = protected(&lab, &mut chance).await;
    for node in [&mut production, &mut recovery] {
        node.expect_in_log("diverged: both nodes are secondary");
    }
    recovery.stop().await;
    keep(&recovery, "snapshot").await;
    recovery.start().await;
    production.in_step(GROUP).await;
    let server = taken_over(&recovery, &content).await;
    write_some(&server, &mut content, &mut chance, 20).await;
    turned(&production, &recovery, &content, 200 << 10).await;
    drop(server);
    recovery.stop().await;
    set_back(&recovery, "snapshot").await;
    recovery.start().await;
    for node in [&production, &recovery] {
        stuck(node, "diverged", "both nodes are secondary", "the newer one").await;
    }
    let forced = ["failover", "run", GROUP, "--no-start", "--force", "--yes-production-is-off"];
    let _ = production.srn(&forced).await.done();
    let home = production.open(RECOVERED).await;
    expect_same(&read_all(&home).await.expect("it is read"), &content, "what it has taken over");
    write_some(&home, &mut content, &mut chance, 10).await;
    production.in_step(GROUP).await;
    expect_same(&exported(&recovery, DISK, "latest").await, &content, "the node that was set back");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fenced_node_whose_peer_is_lost_goes_on_and_the_peer_follows_if_it_comes_back() {
    let lab = Lab::new();
    let mut chance = Chance::from_env("SRN_SEED");
    let (mut production, mut recovery, mut content) = protected(&lab, &mut chance).await;
    for node in [&mut production, &mut recovery] {
        node.expect_in_log("an administrator says that the peer which had taken over is lost");
    }
    let server = taken_over(&recovery, &content).await;
    let mut theirs = content.clone();
    write_some(&server, &mut theirs, &mut chance, 20).await;
    fenced(&production).await;
    let resume = ["group", "resume", GROUP, "--yes-not-taken-over"];
    production.srn(&resume).await.refused(6, &["has taken over", "srn group reverse web"]);
    recovery.kill().await;
    // As soon as it is noticed that the peer is gone.
    wait_for("production is taken back", PATIENCE, async || {
        (production.srn(&resume).await.code == 0).then_some(())
    })
    .await;
    let client = production.open(&export_of(DISK)).await;
    write_some(&client, &mut content, &mut chance, 20).await;

    // Two primaries, until they meet: the later reign stays.
    recovery.start().await;
    fenced(&recovery).await;
    turned(&recovery, &production, &content, 300 << 10).await;
    let branches = recovery.json(&["group", "branches", GROUP]).await;
    let id = branches[0]["id"].as_str().expect("a branch").to_owned();
    let file = recovery.dir().join("branch.raw").display().to_string();
    let export = ["export", GROUP, DISK, "--branch", &id, "--raw", &file];
    let _ = recovery.srn(&export).await.done();
    expect_same(&std::fs::read(file).expect("a file"), &theirs, "the branch");
}
