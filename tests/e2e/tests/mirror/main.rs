//! The disk of a QEMU that belongs to somebody else, mirrored: its writes arrive in order, it never
//! waits for a node that is gone, and what was missed is sent again and not everything.
//!
//! The server has no operating system; its writes are made by the monitor, through the device, the
//! way a guest's would be.

mod quiesce;

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use serde_json::{Value, json};
use srn_e2e::{Lab, Node, PATIENCE, wait_for};
use srn_targets::qemu::qmp::Qmp;
use tokio::process::{Child, Command};

/// Bytes of the server's disk.
const SIZE: u64 = 48 << 20;

const GROUP: &str = "web";

/// What the server's guest writes through.
const DEVICE: &str = "/machine/peripheral/root/virtio-backend";

/// A server whose writes are made here.
struct Server {
    disk: PathBuf,
    qmp: PathBuf,
    monitor: Qmp,
    /// What its QEMU prints, and how many writes were made.
    output: PathBuf,
    written: AtomicUsize,
    child: Child,
}

impl Server {
    async fn start(lab: &Lab) -> Self {
        Self::named(lab, "server").await
    }

    async fn named(lab: &Lab, name: &str) -> Self {
        let disk = lab.path(&format!("{name}.raw"));
        // Content everywhere, no two blocks alike.
        let content: Vec<u8> =
            (0..SIZE / 8).flat_map(|at| (at * 2_654_435_761).to_le_bytes()).collect();
        std::fs::write(&disk, content).expect("room");
        Self::on(lab, name, disk).await
    }

    /// Its power is off, and on again after `change` has been made to its disk.
    async fn power_cycled(mut self, lab: &Lab, name: &str, change: impl FnOnce(&Path)) -> Self {
        self.child.start_kill().expect("it runs");
        self.child.wait().await.expect("it ends");
        change(&self.disk);
        Self::on(lab, name, self.disk.clone()).await
    }

    async fn on(lab: &Lab, name: &str, disk: PathBuf) -> Self {
        let file = |kind: &str| lab.path(&format!("{name}.{kind}"));
        let (qmp, own) = (file("qmp"), file("own"));
        let output = file("output");
        let file = std::fs::File::create(&output).expect("a file");
        // Line by line, or what it prints stays in its buffer.
        let mut command = Command::new("stdbuf");
        command
            .args(["-oL", "qemu-system-x86_64"])
            .args(["-accel", "tcg", "-machine", "q35", "-nodefaults", "-display", "none", "-S"])
            .args([
                "-blockdev",
                &format!(
                    "driver=raw,node-name=disk0,file.driver=file,file.filename={}",
                    disk.display()
                ),
            ])
            .args(["-device", "virtio-blk-pci,id=root,drive=disk0,share-rw=on"])
            .args(["-qmp", &format!("unix:{},server=on,wait=off", qmp.display())])
            .args(["-qmp", &format!("unix:{},server=on,wait=off", own.display())])
            .stdin(Stdio::null())
            .stdout(file)
            .kill_on_drop(true);
        let child = command.spawn().expect("QEMU: install it with tests/setup/packages.sh qemu");
        let monitor = wait_for("QEMU answers", PATIENCE, async || {
            Qmp::connect(&own, Duration::from_secs(5)).await.ok()
        });
        let written = AtomicUsize::new(0);
        Self { monitor: monitor.await, disk, qmp, output, written, child }
    }

    /// Writes through the device, as its guest would, and waits for the answer.
    async fn write(&self, pattern: u8, offset: u64, length: u64) {
        let line = format!("qemu-io -d {DEVICE} \"write -P {pattern} {offset} {length}\"");
        let ran = self.monitor.execute("human-monitor-command", json!({"command-line": line}));
        let said = ran.await.expect("it runs");
        // What is wrong with the line is said there; what became of the write, on its output.
        assert_eq!(said, "", "the server's write could not be tried");
        let expected = self.written.fetch_add(1, Ordering::Relaxed) + 1;
        wait_for("the write's result", PATIENCE, async || {
            let output = std::fs::read_to_string(&self.output).expect("its output");
            assert!(!output.contains("fail"), "the server's write failed: {output}");
            (output.matches("wrote ").count() == expected).then_some(())
        })
        .await;
    }

    /// What our job says; null when there is none.
    async fn job(&self) -> Value {
        let jobs = self.monitor.execute("query-block-jobs", Value::Null).await.expect("jobs");
        jobs[0].clone()
    }

    async fn is_running(&self) -> bool {
        self.monitor.query_status().await.expect("its state").running
    }

    /// Freezes its QEMU, or lets it go on.
    fn freeze(&self, frozen: bool) {
        let signal = if frozen { "-STOP" } else { "-CONT" };
        let id = self.child.id().expect("it runs").to_string();
        let done = std::process::Command::new("kill").args([signal, &id]).status();
        assert!(done.expect("kill is there").success());
    }

    /// Everything that it has written, as it is on its disk.
    async fn content(&self) -> Vec<u8> {
        let flush = json!({"command-line": format!("qemu-io -d {DEVICE} flush")});
        self.monitor.execute("human-monitor-command", flush).await.expect("it flushes");
        std::fs::read(&self.disk).expect("its disk")
    }
}

async fn add(production: &Node, server: &Server) {
    add_as(production, server, "root").await;
}

async fn add_as(production: &Node, server: &Server, disk: &str) {
    let qmp = server.qmp.display().to_string();
    let arguments = ["disk", "add", GROUP, disk, "--qmp", &qmp, "--node", "disk0", "--wait"];
    let _ = production.srn(&arguments).await.done();
}

async fn protect(production: &Node, server: &Server, settings: &[&str]) {
    let create = ["group", "create", GROUP, "--peer", "recovery", "--keep", "cache"];
    let _ = production.srn(&[&create, settings].concat()).await.done();
    add(production, server).await;
}

/// The newest point at the recovery node is what the server has on its disk.
async fn same(lab: &Lab, recovery: &Node, server: &Server) {
    same_as(lab, recovery, server, "root").await;
}

async fn same_as(lab: &Lab, recovery: &Node, server: &Server, disk: &str) {
    let file = lab.path("exported.raw");
    let path = file.display().to_string();
    let _ = recovery.srn(&["export", GROUP, disk, "--raw", &path, "--force"]).await.done();
    differs_nowhere(&file, &server.content().await);
}

fn differs_nowhere(file: &Path, expected: &[u8]) {
    let found = std::fs::read(file).expect("an export");
    assert_eq!(found.len(), expected.len());
    let at = found.iter().zip(expected).position(|(found, expected)| found != expected);
    assert_eq!(at, None, "the disks differ");
}

fn expect_lost_peer(node: &mut Node) {
    node.expect_in_log("failed: the source's mirror is not running");
    node.expect_in_log("disconnected: no connection to the peer");
    node.expect_in_log("disconnected: agreeing with the peer");
}

#[tokio::test]
async fn writes_of_a_running_server_arrive_and_points_are_exact() {
    let lab = Lab::new();
    let server = Server::start(&lab).await;
    let (production, recovery) = lab.pair().await;
    protect(&production, &server, &[]).await;
    same(&lab, &recovery, &server).await;

    server.write(1, 0, 64 << 10).await;
    let _ = production.srn(&["checkpoint", "create", GROUP, "--label", "one"]).await.done();
    let then = server.content().await;
    server.write(2, 32 << 10, 64 << 10).await;
    server.write(0, 1 << 20, 1 << 20).await;
    production.in_step(GROUP).await;
    same(&lab, &recovery, &server).await;

    let file = lab.path("one.raw");
    let path = file.display().to_string();
    let _ = recovery.srn(&["export", GROUP, "root", "--at", "one", "--raw", &path]).await.done();
    differs_nowhere(&file, &then);

    // Taken out: the server goes on alone, and its QEMU is as it was.
    let _ = production.srn(&["disk", "remove", GROUP, "root"]).await.done();
    assert_eq!(server.job().await, Value::Null);
    server.write(3, 0, 4096).await;
}

#[tokio::test]
async fn a_node_that_dies_and_comes_back_gets_what_it_missed_and_no_more() {
    let lab = Lab::new();
    let server = Server::start(&lab).await;
    let (mut production, mut recovery) = lab.pair().await;
    protect(&production, &server, &[]).await;
    expect_lost_peer(&mut production);
    expect_lost_peer(&mut recovery);
    for lap in 0..3u8 {
        server.write(10 + lap, 0, 256 << 10).await;
        production.in_step(GROUP).await;
        production.kill().await;
        // It does not wait for a node that is gone.
        server.write(20 + lap, 128 << 10, 256 << 10).await;
        server.write(30 + lap, 20 << 20, 64 << 10).await;
        production.start().await;
        production.in_step(GROUP).await;
        server.write(40 + lap, 40 << 20, 4096).await;
        production.in_step(GROUP).await;
        same(&lab, &recovery, &server).await;
        let group = production.group(GROUP).await;
        let written = group["link"]["content_written"].as_u64().expect("a counter");
        assert!(written < SIZE / 4, "{written} bytes were sent to make up for 320 KiB");
    }
}

#[tokio::test]
async fn while_the_missed_is_being_sent_the_newest_point_is_the_last_one_before() {
    let lab = Lab::new();
    let server = Server::start(&lab).await;
    let (mut production, mut recovery) = (lab.node("production"), lab.node("recovery"));
    production.configure("[store]\nsegment_size = \"1M\"");
    recovery.start().await;
    production.start().await;
    production.pair_with(&recovery).await;
    // The background copy is as slow as the log is small, so that the middle of it lasts.
    protect(&production, &server, &["--log-size", "16M", "--on-full", "throttle"]).await;
    production.expect_in_log("writes wait until there is room");
    expect_lost_peer(&mut production);
    expect_lost_peer(&mut recovery);
    let file = lab.path("middle.raw");
    let path = file.display().to_string();
    // On a busy machine the middle may be over before it is looked at.
    for round in 10..15 {
        server.write(5, 0, 64 << 10).await;
        production.in_step(GROUP).await;
        let before = server.content().await;
        production.kill().await;
        for block in 8..32 {
            server.write(round, block << 20, 1 << 20).await;
        }
        production.start().await;
        let resync = |group: &Value| group["state"] == "resync";
        production.group_until(GROUP, "the resync has begun", resync).await;
        // A write that arrives in the middle, long before what was missed.
        server.write(7, 0, 4096).await;
        recovery.group_until(GROUP, "it is known there", resync).await;
        let export = ["export", GROUP, "root", "--raw", &path, "--force"];
        let said = recovery.srn(&export).await.done();
        let middle = format!("{}{}", said.out, said.err).contains("before a resync began");
        if middle {
            differs_nowhere(&file, &before);
        }
        production.in_step(GROUP).await;
        same(&lab, &recovery, &server).await;
        if middle {
            return;
        }
    }
    panic!("no resync was seen in its middle");
}

#[tokio::test]
async fn a_full_cache_ends_the_mirror_and_never_the_server() {
    let lab = Lab::new();
    let server = Server::start(&lab).await;
    let (mut production, mut recovery) = (lab.node("production"), lab.node("recovery"));
    production.configure("[store]\nsegment_size = \"1M\"");
    recovery.start().await;
    production.start().await;
    production.pair_with(&recovery).await;
    protect(&production, &server, &["--log-size", "8M", "--on-full", "stop"]).await;
    expect_lost_peer(&mut production);
    expect_lost_peer(&mut recovery);
    production.expect_in_log("the server goes on unprotected (stop)");
    production.expect_in_log("the log is full and the policy is stop");

    recovery.stop().await;
    for block in 0..24u64 {
        // Never refused, whatever becomes of the mirror.
        server.write(50 + block as u8, block << 20, 1 << 20).await;
    }
    let group = production
        .group_until(GROUP, "protection has ended", |group| group["state"] == "failed")
        .await;
    assert_eq!(group["safe"], false);
    let said = production.srn(&["status"]).await.done();
    assert!(said.out.starts_with("NOT SAFE because"), "{}", said.out);
    wait_for("the mirror has ended", PATIENCE, async || server.job().await.is_null().then_some(()))
        .await;
    server.write(99, 0, 4096).await;

    // Back, and room again: by itself, and without anything lost.
    recovery.start().await;
    production.in_step(GROUP).await;
    same(&lab, &recovery, &server).await;
}

#[tokio::test]
async fn a_server_that_is_gone_is_waited_for() {
    let lab = Lab::new();
    let server = Server::start(&lab).await;
    let (mut production, recovery) = lab.pair().await;
    protect(&production, &server, &[]).await;
    production.expect_in_log("failed: the source's mirror is not running");
    drop(server);
    let gone = production
        .group_until(GROUP, "the source is gone", |group| group["state"] == "failed")
        .await;
    assert!(gone.to_string().contains("QEMU"), "{gone}");
    let server = Server::start(&lab).await;
    production.in_step(GROUP).await;
    same(&lab, &recovery, &server).await;
}

/// A server that was off and on again: its mirror is pushed whole, and what is here already is neither
/// logged nor sent.
#[tokio::test]
async fn a_power_cycle_sends_what_has_changed_and_no_more() {
    let lab = Lab::new();
    let server = Server::start(&lab).await;
    let (mut production, recovery) = lab.pair().await;
    production.expect_in_log("failed: the source's mirror is not running");
    let create = ["group", "create", GROUP, "--peer", "recovery", "--keep", "replica"];
    let _ = production.srn(&create).await.done();
    add(&production, &server).await;
    server.write(1, 3 << 20, 64 << 10).await;
    production.in_step(GROUP).await;
    same(&lab, &recovery, &server).await;
    let counters = async |node: &Node| {
        let link = node.group(GROUP).await["link"].clone();
        let of = |name: &str| link[name].as_u64().expect("a counter");
        (of("content_written"), of("wire_sent"))
    };
    let before = counters(&production).await;
    let connected = |group: &Value| group["state"] == "failed";

    // 128 blocks of 4 KiB here and there that do not compress, and 1 MiB of zeros.
    let changed = 128 * 4096;
    let change = |disk: &Path| {
        let mut content = std::fs::read(disk).expect("its disk");
        for block in 0..128usize {
            let at = (block * 89 + 7) * 4096;
            for (index, byte) in content[at..at + 4096].iter_mut().enumerate() {
                let mixed = (block * 4096 + index).wrapping_mul(0x9e37_79b9_7f4a_7c15);
                *byte = (mixed >> 56) as u8;
            }
        }
        content[46 << 20..47 << 20].fill(0);
        std::fs::write(disk, content).expect("room");
    };
    let qmp = server.qmp.clone();
    let mut server = server;
    server.child.start_kill().expect("it runs");
    production.group_until(GROUP, "the server is off", connected).await;
    let server = server.power_cycled(&lab, "server", change).await;
    assert_eq!(server.qmp, qmp);
    production.in_step(GROUP).await;
    same(&lab, &recovery, &server).await;
    let after = counters(&production).await;
    let (written, sent) = (after.0 - before.0, after.1 - before.1);
    println!("{changed} bytes have changed: {written} were logged, {sent} were sent");
    assert!(written <= changed + (1 << 20) + 65_536, "{written} bytes were logged");
    assert!(sent * 10 <= changed * 12, "{sent} bytes were sent for {changed} that have changed");
    // And from then on every write is a point again, compared with nothing.
    server.write(9, 0, 4096).await;
    server.write(9, 0, 4096).await;
    production.in_step(GROUP).await;
    assert_eq!(counters(&production).await.0 - after.0, 2 * 4096, "in step nothing is left out");
    same(&lab, &recovery, &server).await;
}

#[tokio::test]
async fn what_cannot_be_mirrored_is_named() {
    let lab = Lab::new();
    let server = Server::start(&lab).await;
    let (production, _recovery) = lab.pair().await;
    let create = ["group", "create", GROUP, "--peer", "recovery", "--keep", "cache"];
    let _ = production.srn(&create).await.done();
    let qmp = server.qmp.display().to_string();
    let add = async |qmp: &str, node: &str| {
        production.srn(&["disk", "add", GROUP, "root", "--qmp", qmp, "--node", node]).await
    };
    add(&qmp, "disk7").await.refused(4, &["disk7", "disk0"]);
    let nowhere = lab.path("nowhere").display().to_string();
    add(&nowhere, "disk0").await.refused(7, &["nowhere"]);
    let group = production.group(GROUP).await;
    assert_eq!(group["disks"], json!([]), "something was added");
}

#[tokio::test]
async fn for_a_planned_failover_the_servers_stand_still() {
    let lab = Lab::new();
    let (first, second) = (Server::named(&lab, "first").await, Server::named(&lab, "second").await);
    for server in [&first, &second] {
        server.monitor.cont().await.expect("it runs");
    }
    let (mut production, mut recovery) = lab.pair().await;
    protect(&production, &first, &[]).await;
    add_as(&production, &second, "data").await;
    production.in_step(GROUP).await;
    production.expect_in_log("draining for a planned failover");
    production.expect_in_log("draining failed, production goes on");
    production.expect_in_log("failed: the source's mirror is not running");
    production.expect_in_log("fenced: drained for a planned failover");
    production.expect_in_log("fenced: the peer has failed over");
    recovery.expect_in_log("failed over: this node is primary");
    recovery.expect_in_log("disconnected: failed over to this node");

    // One of them cannot be halted: all go on, and are followed.
    second.freeze(true);
    let run = ["failover", "run", GROUP, "--no-start", "--yes"];
    recovery.srn(&run).await.refused(6, &["stand still", "--force"]);
    second.freeze(false);
    wait_for("both servers run", PATIENCE, async || {
        (first.is_running().await && second.is_running().await).then_some(())
    })
    .await;
    first.write(1, 0, 64 << 10).await;
    second.write(2, 4096, 64 << 10).await;
    production.in_step(GROUP).await;

    let _ = recovery.srn(&run).await.done();
    assert!(!first.is_running().await && !second.is_running().await, "one of them runs on");
    same_as(&lab, &recovery, &first, "root").await;
    same_as(&lab, &recovery, &second, "data").await;
    // Nor does the fenced node let them go on when it comes back.
    production.stop().await;
    production.start().await;
    let fenced = |group: &Value| group["cause"].as_str().unwrap_or("").contains("newer epoch");
    production.group_until(GROUP, "production is fenced", fenced).await;
    assert!(!first.is_running().await && !second.is_running().await, "one of them goes on");
    wait_for("the mirrors have ended", PATIENCE, async || {
        (first.job().await == Value::Null && second.job().await == Value::Null).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_server_that_was_shut_down_is_handed_over() {
    let lab = Lab::new();
    let server = Server::start(&lab).await;
    server.monitor.cont().await.expect("it runs");
    let (mut production, mut recovery) = lab.pair().await;
    protect(&production, &server, &[]).await;
    server.write(1, 0, 64 << 10).await;
    production.expect_in_log("failed: the source's mirror is not running");
    production.expect_in_log("draining for a planned failover");
    production.expect_in_log("fenced: drained for a planned failover");
    production.expect_in_log("fenced: the peer has failed over");
    recovery.expect_in_log("failed over: this node is primary");
    recovery.expect_in_log("disconnected: failed over to this node");
    let expected = server.content().await;
    // Its answer may or may not come before its end.
    let _ = server.monitor.execute("quit", Value::Null).await;
    let off = |group: &Value| group["state"] == "failed";
    production.group_until(GROUP, "the server is off", off).await;
    let _ = recovery.srn(&["failover", "run", GROUP, "--no-start", "--yes"]).await.done();
    let file = lab.path("after.raw");
    let path = file.display().to_string();
    let _ = recovery.srn(&["export", GROUP, "root", "--raw", &path]).await.done();
    differs_nowhere(&file, &expected);
}
