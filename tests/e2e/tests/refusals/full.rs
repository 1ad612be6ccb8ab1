//! No room left, at either node: what was answered is kept, everybody is told, and it goes on when
//! there is room again.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use serde_json::json;
use srn_e2e::{Chance, Lab, Node, PATIENCE, Volume, wait_for};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::process::{Child, Command};
use tokio::task::JoinHandle;
use tokio::time::MissedTickBehavior;

use crate::common::{
    INVALID, MIB, NOT_FOUND, REFUSED, STORAGE, content, facts, protect, refused, refuses, verdict,
};

/// Small segments, so that few megabytes make a log.
const SMALL: &str = "[store]\nsegment_size = \"1M\"\nrecent_frames = \"1M\"";

/// Room of a small state volume.
const VOLUME: u64 = 96 * MIB;

/// A server writes no more often than this: about 6 MB/s.
const PACE: Duration = Duration::from_millis(5);

/// Blocks of the disk that is written to.
const BLOCKS: u64 = 4096;

/// A node whose state is on a small volume.
async fn cramped(lab: &Lab, name: &str, bytes: u64) -> (Node, Volume) {
    let mut node = lab.node(name);
    let volume = Volume::small(node.state_dir(), bytes).await;
    node.run_through(volume.enter());
    node.configure(SMALL);
    (node, volume)
}

/// A server that writes blocks of chance, one after the other, and remembers which were answered.
struct Writer {
    answered: Arc<AtomicU64>,
    stop: Arc<AtomicU64>,
    task: JoinHandle<u64>,
    seed: u64,
}

/// What the write with this number holds, and where it goes.
fn write_of(seed: u64, number: u64) -> (u64, Vec<u8>) {
    let mut chance = Chance::new(seed ^ number.wrapping_mul(0x9e37_79b9));
    // Sectors, not pages: what is kept in pages has to be put together.
    let sectors = 1 + chance.below(128);
    let mut data = vec![0; sectors as usize * 512];
    chance.fill(&mut data);
    (chance.below(BLOCKS * 8 - sectors) * 512, data)
}

impl Writer {
    /// Writes until it is told to stop, or the connection ends.
    async fn start(node: &Node, export: &str) -> Self {
        let client = node.open(export).await;
        let seed = Chance::from_env("SRN_SEED").next();
        let (answered, stop): (Arc<AtomicU64>, Arc<AtomicU64>) = Default::default();
        stop.store(u64::MAX, Ordering::SeqCst);
        let task = tokio::spawn({
            let (answered, stop) = (answered.clone(), stop.clone());
            async move {
                let mut number = 0;
                let mut pace = tokio::time::interval(PACE);
                pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
                while number < stop.load(Ordering::SeqCst) {
                    pace.tick().await;
                    let (offset, data) = write_of(seed, number);
                    if client.write(offset, Bytes::from(data), false).await.is_err() {
                        return number;
                    }
                    number += 1;
                    answered.store(number, Ordering::SeqCst);
                }
                number
            }
        });
        Self { answered, stop, task, seed }
    }

    fn answered(&self) -> u64 {
        self.answered.load(Ordering::SeqCst)
    }

    /// Waits until one more write is answered.
    async fn goes_on(&self) {
        let before = self.answered();
        wait_for("a write is answered", PATIENCE, async || {
            (self.answered() > before).then_some(())
        })
        .await;
    }

    /// Waits until no write is answered any more.
    async fn waits(&self) -> u64 {
        let mut seen = (self.answered(), tokio::time::Instant::now());
        wait_for("writes wait", PATIENCE, async || {
            if self.answered() != seen.0 {
                seen = (self.answered(), tokio::time::Instant::now());
            }
            (seen.1.elapsed() > Duration::from_secs(1)).then_some(seen.0)
        })
        .await
    }

    /// Ends after the write under way; gives how many were answered.
    async fn stop(self) -> u64 {
        self.stop.store(0, Ordering::SeqCst);
        tokio::time::timeout(PATIENCE, self.task).await.expect("it ends").expect("it ends")
    }
}

/// The disk after the first `count` writes.
fn image(seed: u64, count: u64) -> Vec<u8> {
    let mut image = vec![0; (BLOCKS * 4096) as usize];
    for number in 0..count {
        let (offset, data) = write_of(seed, number);
        image[offset as usize..][..data.len()].copy_from_slice(&data);
    }
    image
}

/// The disk holds all that was answered, and nothing but, perhaps, the one write after that.
#[track_caller]
fn holds(disk: &[u8], seed: u64, answered: u64) {
    let at_least = image(seed, answered);
    assert!(
        *disk == at_least || *disk == image(seed, answered + 1),
        "the disk is neither as after {answered} writes nor as after one more"
    );
}

#[tokio::test]
async fn a_full_production_node_keeps_what_it_answered() {
    let lab = Lab::new();
    let (mut node, volume) = cramped(&lab, "production", VOLUME).await;
    node.start().await;
    protect(&node, "web", None, "16M").await;
    node.expect_in_log("writes wait until there is room");
    node.expect_in_log("the log here has no room");
    node.expect_in_log("disk is full");
    volume.fill_but(40 * MIB);
    let writer = Writer::start(&node, "web/root").await;
    let seed = writer.seed;
    let answered = writer.waits().await;
    assert!(answered > 0);
    says(&node, &["NOT SAFE", "the log here has no room"]).await;
    // Whoever asks for something is told, and it is not done later.
    let before = facts(&node).await;
    let commands: [&[&str]; 2] = [
        &["checkpoint", "create", "web", "--label", "now"],
        &["disk", "add", "web", "data", "--size", "1M"],
    ];
    for arguments in commands {
        refuses(&node, arguments, STORAGE, &["web", "free", "make room"]).await;
    }
    // What is there can be read.
    holds(&content(&lab, &node, "web", "root").await, seed, answered);
    volume.make_room();
    writer.goes_on().await;
    volume.fill_but(40 * MIB);
    let answered = writer.waits().await;
    assert_eq!(facts(&node).await, before, "what was refused was not done later");
    // kill -9 while the log is full. The client is told by the broken connection.
    node.kill().await;
    let answered = answered.max(writer.stop().await);
    node.start().await;
    holds(&content(&lab, &node, "web", "root").await, seed, answered);
    volume.make_room();
    let _ = node.srn(&["checkpoint", "create", "web", "--label", "now"]).await.done();
    let client = node.open("web/root").await;
    client.write(0, Bytes::from_static(&[9; 4096]), false).await.expect("there is room");
    node.stop().await;
}

#[tokio::test]
async fn not_a_byte_left_is_no_reason_to_forget() {
    let lab = Lab::new();
    let (mut node, volume) = cramped(&lab, "production", VOLUME).await;
    node.start().await;
    protect(&node, "web", None, "16M").await;
    node.expect_in_log("writes wait until there is room");
    node.expect_in_log("the log here has no room");
    node.expect_in_log("disk is full");
    // Old segments are put into the base all the time: that is interrupted too.
    let _ = node.srn(&["group", "set", "web", "--history", "0s"]).await.done();
    let writer = Writer::start(&node, "web/root").await;
    let seed = writer.seed;
    for _ in 0..2 {
        writer.goes_on().await;
        volume.fill_but(0);
        let answered = writer.waits().await;
        holds(&content(&lab, &node, "web", "root").await, seed, answered);
        volume.make_room();
    }
    writer.goes_on().await;
    volume.fill_but(0);
    let answered = writer.waits().await;
    let before = facts(&node).await;
    let create = ["group", "create", "new", "--keep", "replica"];
    refuses(&node, &create, STORAGE, &["make room"]).await;
    refuses(&node, &["group", "set", "web", "--history", "1h"], STORAGE, &["make room"]).await;
    refuses(&node, &["checkpoint", "create", "web"], STORAGE, &["make room"]).await;
    refuses(&node, &["group", "show", "nosuch"], NOT_FOUND, &["nosuch"]).await;
    assert_eq!(facts(&node).await, before);
    holds(&content(&lab, &node, "web", "root").await, seed, answered);
    // A daemon that is started without any room says so, or serves what there is.
    node.kill().await;
    let answered = answered.max(writer.stop().await);
    let ran = node.run_to_end().await;
    refused("no room at start", &ran, STORAGE, &["make room"]);
    volume.make_room();
    node.start().await;
    holds(&content(&lab, &node, "web", "root").await, seed, answered);
    let _ = node.srn(&create).await.done();
    let client = node.open("web/root").await;
    client.write(0, Bytes::from_static(&[9; 4096]), false).await.expect("there is room");
    node.stop().await;
}

/// Production with room, and a recovery node that has little.
async fn uneven(lab: &Lab, bytes: u64) -> (Node, Node, Volume) {
    let (mut recovery, volume) = cramped(lab, "recovery", bytes).await;
    recovery.start().await;
    let mut production = lab.node("production");
    production.configure(SMALL);
    production.start().await;
    production.pair_with(&recovery).await;
    recovery.expect_in_log("frames of the production node wait there");
    recovery.expect_in_log("the log here has no room");
    recovery.expect_in_log("disk is full");
    production.expect_in_log("the peer cannot take frames");
    (production, recovery, volume)
}

/// Waits until production says that the recovery node is full.
async fn hindered(production: &Node) {
    let group = production
        .group_until("web", "the recovery node is full", |group| {
            group["state"] == "disconnected"
                && group["cause"] == "the peer cannot take frames"
                && group["detail"]
                    .as_str()
                    .is_some_and(|text| text.contains("recovery node is full"))
        })
        .await;
    assert_eq!(group["safe"], false);
    let said = verdict(production).await;
    assert!(said.contains("recovery node is full") && said.contains("at risk"), "{said}");
}

/// Waits until a node's status begins with a line that has all of `words`.
async fn says(node: &Node, words: &[&str]) {
    wait_for(&format!("node {} says {words:?}", node.name()), PATIENCE, async || {
        let said = verdict(node).await;
        words.iter().all(|word| said.contains(word)).then_some(())
    })
    .await;
}

/// Waits until production says that its log is at its cap, and that this is because the recovery
/// node is full.
async fn hindered_at_cap(production: &Node) {
    says(production, &["NOT SAFE", "the log here has no room", "cap", "recovery node is full"])
        .await;
}

#[tokio::test]
async fn a_full_recovery_node_does_not_stop_production() {
    let lab = Lab::new();
    let (production, recovery, volume) = uneven(&lab, VOLUME).await;
    protect(&production, "web", Some("recovery"), "16M").await;
    production.in_step("web").await;
    volume.fill_but(40 * MIB);
    let writer = Writer::start(&production, "web/root").await;
    let seed = writer.seed;
    hindered(&production).await;
    // It goes on being written to, and says how much is at risk.
    writer.goes_on().await;
    let said = verdict(&recovery).await;
    assert!(said.starts_with("NOT SAFE") && said.contains("no room"), "{said}");
    let behind = production.group("web").await["lag_bytes"].as_u64();
    writer.goes_on().await;
    assert!(production.group("web").await["lag_bytes"].as_u64() > behind);
    let answered = writer.stop().await;
    // A point at the recovery node is a point, however little room there is.
    let point = content(&lab, &recovery, "web", "root").await;
    assert!((0..=answered).any(|count| point == image(seed, count)), "no prefix of the writes");
    volume.make_room();
    production.in_step("web").await;
    let link = production.group("web").await["link"].clone();
    assert_eq!(link["frames_sent_again"], 0, "{link:#}");
    for node in [&production, &recovery] {
        holds(&content(&lab, node, "web", "root").await, seed, answered);
    }
}

#[tokio::test]
async fn writes_wait_for_a_full_recovery_node_where_that_was_chosen() {
    let lab = Lab::new();
    let (mut production, mut recovery, volume) = uneven(&lab, VOLUME).await;
    production.expect_in_log("no connection to the peer");
    production.expect_in_log("writes wait until there is room");
    production.expect_in_log("the log here has no room");
    let create = ["group", "create", "web", "--keep", "replica", "--peer", "recovery"];
    let settings = ["--checkpoint-every", "0s", "--log-size", "12M", "--on-full", "throttle"];
    let _ = production.srn(&[&create[..], &settings].concat()).await.done();
    let _ = production.srn(&["disk", "add", "web", "root", "--size", "16M"]).await.done();
    production.in_step("web").await;
    volume.fill_but(40 * MIB);
    let writer = Writer::start(&production, "web/root").await;
    let seed = writer.seed;
    let answered = writer.waits().await;
    hindered_at_cap(&production).await;
    holds(&content(&lab, &production, "web", "root").await, seed, answered);
    // Reading and looking are possible while writes wait; asking for more is refused.
    let arguments = ["checkpoint", "create", "web"];
    refuses(&production, &arguments, STORAGE, &["web", "cap", "make room"]).await;
    // The recovery node restarts, and is as full as before: nothing is let go of, and nothing that
    // was durable there comes again.
    let group = production.group("web").await;
    let waiting =
        group["head"].as_u64().expect("a frame") - group["acknowledged"].as_u64().expect("a frame");
    recovery.stop().await;
    recovery.start().await;
    hindered_at_cap(&production).await;
    assert_eq!(writer.waits().await, answered);
    volume.make_room();
    writer.goes_on().await;
    let answered = writer.stop().await;
    production.in_step("web").await;
    let link = production.group("web").await["link"].clone();
    assert!(link["frames_sent_again"].as_u64() <= Some(waiting), "{waiting} waited: {link:#}");
    for node in [&production, &recovery] {
        holds(&content(&lab, node, "web", "root").await, seed, answered);
    }
}

/// A boot sector that writes 16 KiB of a number, then of the next one, to 512 places in turn, as
/// fast as the disk answers. In 16-bit code; the number is at 0x7c40, the packet for INT 13h, which
/// names the place, at 0x7c50.
const BOOT_SECTOR: [u8; 60] = [
    0xfa, 0x31, 0xc0, 0x8e, 0xd8, 0x8e, 0xc0, 0x8e, 0xd0, 0xbc, 0x00, 0x7c, 0xfc,
    0xfb, // set up
    0x66, 0xff, 0x06, 0x40, 0x7c, // again: inc dword [number]
    0x66, 0xa1, 0x40, 0x7c, // mov eax, [number]
    0xbf, 0x00, 0x80, 0xb9, 0x00, 0x10, 0xf3, 0x66, 0xab, // 0x1000 times at 0x8000
    0x66, 0x25, 0xff, 0x01, 0x00, 0x00, 0x66, 0x40, // and eax, 511; inc eax
    0x66, 0xc1, 0xe0, 0x05, 0x66, 0xa3, 0x58, 0x7c, // shl eax, 5; mov [first sector], eax
    0xbe, 0x50, 0x7c, 0xb8, 0x00, 0x43, 0xb2, 0x80, 0xcd, 0x13, // write
    0xeb, 0xd2, // jmp again
];
const PACKET: [u8; 8] = [0x10, 0x00, 0x20, 0x00, 0x00, 0x80, 0x00, 0x00];

/// A server in a QEMU that does nothing but write.
struct Server {
    _qemu: Child,
    qmp: PathBuf,
    own: BufReader<UnixStream>,
    disk: PathBuf,
}

impl Server {
    async fn start(lab: &Lab) -> Self {
        let (disk, qmp, own) = (lab.path("disk"), lab.path("qmp"), lab.path("own"));
        let mut image = vec![0; (BLOCKS * 4096) as usize];
        image[..BOOT_SECTOR.len()].copy_from_slice(&BOOT_SECTOR);
        image[0x50..0x58].copy_from_slice(&PACKET);
        image[510..512].copy_from_slice(&[0x55, 0xaa]);
        std::fs::write(&disk, image).expect("it is written");
        let mut qemu = Command::new("qemu-system-x86_64");
        qemu.args(["-M", "pc", "-accel", "tcg", "-m", "32", "-nodefaults", "-display", "none"]);
        let file = format!("file.driver=file,file.filename={}", disk.display());
        qemu.arg("-blockdev").arg(format!("driver=raw,node-name=drive0,{file}"));
        qemu.args(["-device", "virtio-blk-pci,drive=drive0,bootindex=0"]);
        for socket in [&qmp, &own] {
            qemu.arg("-qmp").arg(format!("unix:{},server=on,wait=off", socket.display()));
        }
        let qemu = qemu.kill_on_drop(true).spawn().expect("QEMU");
        let connect = async || UnixStream::connect(&own).await.ok();
        let own = BufReader::new(wait_for("QEMU answers", PATIENCE, connect).await);
        let mut server = Self { _qemu: qemu, qmp, own, disk };
        server.ask("qmp_capabilities").await;
        server.goes_on().await;
        server
    }

    async fn ask(&mut self, command: &str) {
        let line = json!({ "execute": command }).to_string();
        self.own.write_all(line.as_bytes()).await.expect("it listens");
        let mut line = String::new();
        while !line.contains("\"return\"") {
            assert!(!line.contains("\"error\""), "{command}: {line}");
            line.clear();
            let read = tokio::time::timeout(PATIENCE, self.own.read_line(&mut line)).await;
            assert!(read.expect("an answer").expect("an answer") > 0, "QEMU is gone");
        }
    }

    fn image(&self) -> Vec<u8> {
        std::fs::read(&self.disk).expect("it is there")
    }

    /// The newest number on its disk.
    fn newest(&self) -> u32 {
        let image = self.image();
        let places = image.chunks_exact(16 * 1024).skip(1);
        let numbers = places.filter_map(|place| place.first_chunk().copied());
        numbers.map(u32::from_le_bytes).max().unwrap_or_default()
    }

    /// Waits until it has written everywhere once more.
    async fn goes_on(&self) {
        let before = self.newest();
        wait_for("the server writes", PATIENCE, async || {
            (self.newest() > before + 512).then_some(())
        })
        .await;
    }
}

#[tokio::test]
async fn a_mirrored_server_goes_on_unprotected_and_is_caught_up_with() {
    let lab = Lab::new();
    let (mut production, recovery, volume) = uneven(&lab, 2 * VOLUME).await;
    production.expect_in_log("the mirror ends, the server goes on unprotected");
    production.expect_in_log("the log is full and the policy is stop");
    production.expect_in_log("the source's mirror is not running");
    let mut server = Server::start(&lab).await;
    server.ask("stop").await;
    let create = ["group", "create", "web", "--keep", "cache", "--peer", "recovery"];
    let settings = ["--checkpoint-every", "0s", "--log-size", "24M"];
    let _ = production.srn(&[&create[..], &settings].concat()).await.done();
    let socket = server.qmp.to_str().expect("a path in UTF-8").to_owned();
    let add = ["disk", "add", "web", "root", "--qmp", &socket, "--node", "drive0"];
    let _ = production.srn(&add).await.done();
    production.in_step("web").await;
    volume.fill_but(40 * MIB);
    server.ask("cont").await;
    let words = "the log is full and the policy is stop";
    let group = production
        .group_until("web", "protection has ended", |group| {
            group["state"] == "failed" && group["cause"] == words
        })
        .await;
    assert!(group["safe"] == false && group["unsafe_since"].is_string(), "{group:#}");
    says(&production, &["NOT SAFE", words]).await;
    // The server writes as before.
    for _ in 0..5 {
        server.goes_on().await;
    }
    server.ask("stop").await;
    volume.make_room();
    // The mirror is made again by itself, and sends what is different.
    production.in_step("web").await;
    assert!(content(&lab, &recovery, "web", "root").await == server.image());
}

#[tokio::test]
async fn a_group_that_finds_no_room_at_first_is_replicated_later() {
    let lab = Lab::new();
    let (mut production, mut recovery, volume) = uneven(&lab, VOLUME).await;
    production.expect_in_log("the peer refuses");
    recovery.expect_in_log("the recovery node cannot store group web: no space");
    volume.fill_but(0);
    protect(&production, "web", Some("recovery"), "16M").await;
    production
        .group_until("web", "the refusal is shown", |group| {
            group["cause"] == "the peer refuses"
                && group["detail"]
                    .as_str()
                    .is_some_and(|text| text.contains("cannot store group web"))
        })
        .await;
    let writer = Writer::start(&production, "web/root").await;
    let seed = writer.seed;
    writer.goes_on().await;
    let answered = writer.stop().await;
    assert_eq!(facts(&recovery).await["dirs"], serde_json::json!([]), "nothing is left of it");
    volume.make_room();
    production.in_step("web").await;
    holds(&content(&lab, &recovery, "web", "root").await, seed, answered);
}

#[tokio::test]
async fn a_failover_that_cannot_be_leaves_production_in_charge() {
    let lab = Lab::new();
    let (mut production, mut recovery, volume) = uneven(&lab, VOLUME).await;
    protect(&production, "web", Some("recovery"), "16M").await;
    let writer = Writer::start(&production, "web/root").await;
    writer.goes_on().await;
    let seed = writer.seed;
    let answered = writer.stop().await;
    production.in_step("web").await;
    // No such point: nobody is asked to stop.
    let run = ["failover", "run", "web", "--no-start", "--yes"];
    let nowhere = [&run[..], &["--at", "99999"]].concat();
    refuses(&recovery, &nowhere, NOT_FOUND, &["web", "99999", "srn history web"]).await;
    // Nor when no server can be started from it, or not as asked for, or nobody says yes.
    let run_one = ["failover", "run", "web", "--yes"];
    refuses(&recovery, &run_one, REFUSED, &["no disk can be booted", "--firmware"]).await;
    refuses(&recovery, &run_one[..3], REFUSED, &["web", "will be stopped", "--yes"]).await;
    let cases: [(&[&str], &[&str]); 4] = [
        (&["--network", "bridge"], &["bridge"]),
        (&["--bus", "floppy"], &["floppy", "virtio", "ide"]),
        (&["--cpus", "999"], &["processors", "255"]),
        (&["--memory", "1M"], &["memory", "16"]),
    ];
    for (wrong, words) in cases {
        let arguments = [&run_one[..], &["--firmware", "bios"], wrong].concat();
        refuses(&recovery, &arguments, INVALID, words).await;
    }
    assert_eq!(production.group("web").await["state"], "streaming");
    // No room to write down who is in charge: production was asked to stop, and goes on.
    volume.fill_but(0);
    production.expect_in_log("draining for a planned failover");
    production.expect_in_log("drained for a planned failover");
    production.expect_in_log("group web: disconnected");
    recovery.expect_in_log("group web: disconnected");
    let before = production.group("web").await["epoch"].clone();
    refused("srn failover run", &recovery.srn(&run).await, STORAGE, &["make room"]);
    production.in_step("web").await;
    for (node, role) in [(&production, "primary"), (&recovery, "secondary")] {
        let group = node.group("web").await;
        assert_eq!((&group["role"], &group["epoch"]), (&role.into(), &before));
        assert_eq!(node.json(&["failover", "list"]).await, serde_json::json!([]));
    }
    let client = production.open("web/root").await;
    let (offset, data) = write_of(seed, answered);
    client.write(offset, Bytes::from(data), false).await.expect("production is in charge");
    volume.make_room();
    production.in_step("web").await;
    assert!(content(&lab, &recovery, "web", "root").await == image(seed, answered + 1));
}
