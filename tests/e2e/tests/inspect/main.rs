//! A state directory without a daemon: what `srn inspect` and a reader that was written after
//! `formats.md` alone (`tests/reader`) find in it is what the daemon showed, byte by byte.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use rustix::process::Signal;
use serde_json::Value;
use srn_e2e::relay::Relay;
use srn_e2e::relay::line::Shape;
use srn_e2e::{Chance, Lab, Node, PATIENCE, tool, wait_for};
use srn_nbd::client::{Client, ZeroOptions};

const GROUP: &str = "web";
const DISK: &str = "root";
const SIZE: u64 = 12 << 20;

/// The disk of the independent reader's point, as bytes.
async fn python(node: &Node, lab: &Lab, at: &str) -> Vec<u8> {
    let out = lab.path("python.raw");
    let script = reader();
    let state = node.state_dir().display().to_string();
    let words = [&*script, "export", &state, GROUP, DISK, at];
    let command = words.map(|word| format!("'{word}'")).join(" ");
    let shell = format!("exec /usr/bin/python3 {command} > '{}'", out.display());
    let ran = tool::run("/bin/sh", &["-c", &shell]).await;
    assert!(ran.code == 0, "{ran:#?}; install what it needs with tests/setup/packages.sh reader");
    std::fs::read(&out).expect("it was written")
}

fn reader() -> String {
    format!("{}/../reader/srnread.py", env!("CARGO_MANIFEST_DIR"))
}

/// The same by `srn inspect export`.
async fn inspected(node: &Node, lab: &Lab, at: &str) -> Vec<u8> {
    let out = lab.path("inspected.raw");
    let (state, raw) = (node.state_dir().display().to_string(), out.display().to_string());
    let words =
        ["inspect", "export", &state, GROUP, "--disk", DISK, "--at", at, "--raw", &raw, "--force"];
    let _ = node.srn(&words).await.done();
    std::fs::read(&out).expect("it was written")
}

/// The same by the daemon.
async fn exported(node: &Node, lab: &Lab, at: &str) -> Vec<u8> {
    let out = lab.path("exported.raw");
    let raw = out.display().to_string();
    let words = ["export", GROUP, DISK, "--at", at, "--raw", &raw, "--force"];
    let _ = node.srn(&words).await.done();
    std::fs::read(&out).expect("it was written")
}

#[track_caller]
fn same(one: &[u8], other: &[u8], what: &str) {
    assert_eq!(one.len(), other.len(), "{what}: lengths");
    let differs = one.iter().zip(other).position(|(one, other)| one != other);
    assert!(differs.is_none(), "{what}: they differ at {differs:?}");
}

async fn inspect(node: &Node, what: &str) -> Value {
    node.json(&["inspect", what, &node.state_dir().display().to_string()]).await
}

/// Every file with its length, its time and its content.
fn tree(dir: &Path) -> BTreeMap<PathBuf, (SystemTime, Vec<u8>)> {
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir(dir).expect("a directory") {
        let entry = entry.expect("an entry");
        if entry.path().is_dir() {
            found.extend(tree(&entry.path()));
        } else {
            let changed = entry.metadata().and_then(|meta| meta.modified()).expect("a time");
            found.insert(entry.path(), (changed, std::fs::read(entry.path()).expect("a file")));
        }
    }
    found
}

/// Random content, content that compresses, and zeros, in places that overlap.
async fn write_some(client: &Client, chance: &mut Chance, count: u64) {
    for _ in 0..count {
        let most = if chance.below(4) == 0 { 400 } else { 24 };
        let sectors = 1 + chance.below(most);
        let at = chance.below(SIZE / 512 - sectors) * 512;
        let mut content = vec![0; (sectors * 512) as usize];
        match chance.below(5) {
            0 => {
                let options = ZeroOptions::default();
                client.write_zeroes(at, content.len() as u32, options).await.expect("zeros");
                continue;
            }
            1 | 2 => chance.fill(&mut content),
            _ => content.fill(chance.below(250) as u8 + 1),
        }
        client.write(at, Bytes::from(content), false).await.expect("a write");
    }
}

async fn checkpoint(node: &Node, label: &str) {
    let _ = node.srn(&["checkpoint", "create", GROUP, "--label", label]).await.done();
}

fn small_segments(lab: &Lab, name: &str) -> Node {
    let mut node = lab.node(name);
    node.configure("[store]\nsegment_size = \"1M\"");
    node.expect_in_log("disconnected");
    node
}

/// A pair whose link is slow enough to compress; a base that has taken in some of the history.
async fn protected(lab: &Lab, chance: &mut Chance) -> (Node, Node, Relay, Client) {
    let (mut production, mut recovery) =
        (small_segments(lab, "production"), small_segments(lab, "recovery"));
    recovery.start().await;
    production.start().await;
    let relay = Relay::start(SocketAddr::from((recovery.address(), 7310)), chance.next());
    let token = recovery.token().await;
    let address = relay.address().to_string();
    let _ = production.srn_with_input(&["pair", &address], &token).await.done();
    let create = ["group", "create", GROUP, "--peer", "recovery", "--keep", "replica"];
    let settings = ["--checkpoint-every", "0s", "--history", "1s"];
    let _ = production.srn(&[&create[..], &settings].concat()).await.done();
    for (disk, size) in [(DISK, SIZE), ("data", 1 << 20)] {
        let size = size.to_string();
        let _ = production.srn(&["disk", "add", GROUP, disk, "--size", &size]).await.done();
    }
    production.in_step(GROUP).await;
    let _ = recovery.srn(&["group", "set", GROUP, "--history", "1s"]).await.done();
    let client = production.open(&format!("{GROUP}/{DISK}")).await;
    // Compression is tried while the link is busy.
    relay.shape(Shape::of(24, Duration::from_millis(4)));
    for round in 0..5u64 {
        for at in (0..SIZE).step_by(256 << 10) {
            let content = (at + round + 1).to_le_bytes().repeat(32 << 10);
            client.write(at, Bytes::from(content), false).await.expect("a write");
        }
    }
    production.in_step(GROUP).await;
    relay.shape(Shape::CLEAR);
    let base = wait_for("the recovery node has retired some of it", PATIENCE, async || {
        // Retirement goes by the age of what came later.
        client.write(0, Bytes::from(vec![1; 512]), false).await.expect("a write");
        let files = std::fs::read_dir(recovery.state_dir().join("groups")).ok()?;
        let group = files.flatten().next()?.path();
        let mut files = std::fs::read_dir(group.join("base")).ok()?.flatten();
        files.any(|file| file.path().extension().is_some_and(|end| end == "sum")).then_some(())
    });
    base.await;
    for node in [&production, &recovery] {
        let _ = node.srn(&["group", "set", GROUP, "--history", "1h"]).await.done();
    }
    (production, recovery, relay, client)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn any_point_is_the_same_in_three_ways() {
    let mut chance = Chance::from_env("INSPECT_SEED");
    let lab = Lab::new();
    let (mut production, mut recovery, relay, client) = protected(&lab, &mut chance).await;

    // Points with labels, and frames between them.
    let mut points: BTreeMap<String, Vec<u8>> = BTreeMap::new();
    for label in ["one", "two", "three"] {
        write_some(&client, &mut chance, 60).await;
        checkpoint(&production, label).await;
        write_some(&client, &mut chance, 10).await;
        let frame = production.in_step(GROUP).await.to_string();
        points.insert(frame.clone(), exported(&recovery, &lab, &frame).await);
        points.insert(label.into(), exported(&recovery, &lab, label).await);
    }
    let state = recovery.state_dir().display().to_string();
    let busy = recovery.srn(&["inspect", "points", &state]).await;
    busy.refused(5, &["a daemon is using", "srn status"]);

    // Production is killed in the middle of its writes, and looked at.
    let writer = tokio::spawn(async move {
        while client.write(4096, Bytes::from(vec![7; 69_632]), false).await.is_ok() {}
    });
    tokio::time::timeout(PATIENCE, async {
        let head = production.group(GROUP).await["head"].as_u64();
        production.group_until(GROUP, "it writes", |group| group["head"].as_u64() > head).await
    })
    .await
    .expect("it writes");
    production.kill().await;
    writer.await.expect("it ends");
    for (at, content) in &points {
        same(&inspected(&production, &lab, at).await, content, &format!("{at} at production"));
    }
    let newest = inspected(&production, &lab, "latest").await;
    same(&python(&production, &lab, "latest").await, &newest, "production's unsealed end");

    // A failover, and more writes in the new epoch; then the recovery node is killed too.
    recovery.expect_in_log("failed over");
    recovery.expect_in_log("forced");
    let run = ["failover", "run", GROUP, "--no-start", "--force", "--yes-production-is-off"];
    let _ = recovery.json(&run).await;
    let recovered = recovery.open(&format!("recovery/{GROUP}/{DISK}")).await;
    write_some(&recovered, &mut chance, 60).await;
    checkpoint(&recovery, "four").await;
    points.insert("four".into(), exported(&recovery, &lab, "four").await);
    write_some(&recovered, &mut chance, 20).await;
    recovery.kill().await;
    drop(relay);

    let before = tree(recovery.state_dir());
    for (at, content) in &points {
        same(&inspected(&recovery, &lab, at).await, content, &format!("{at} by srn inspect"));
        same(&python(&recovery, &lab, at).await, content, &format!("{at} by the reader"));
    }
    let newest = inspected(&recovery, &lab, "latest").await;
    same(&python(&recovery, &lab, "latest").await, &newest, "the unsealed end");
    check_lists(&recovery).await;
    assert!(before == tree(recovery.state_dir()), "looking has changed something");

    // The daemon comes back and says the same.
    let shown = inspect(&recovery, "points").await;
    let head = shown["lines"][0]["to"]["frame"].as_u64().expect("a frame").to_string();
    recovery.start().await;
    same(&exported(&recovery, &lab, &head).await, &newest, "the newest frame by the daemon");
}

/// Lists, counts and checks are the same by both readers.
async fn check_lists(node: &Node) {
    let state = node.state_dir().display().to_string();
    let verified = &inspect(node, "verify").await[0];
    assert_eq!(verified["damage"], Value::Array(Vec::new()));
    let script = reader();
    let ran = tool::run("/usr/bin/python3", &[&script, "verify", &state]).await;
    assert!(ran.code == 0, "{ran:#?}");
    let counts = ran.json();
    assert_eq!(counts["frames"], verified["frames"]);
    assert_eq!(counts["entries"], verified["index_entries"]);
    for what in ["frames", "entries", "pages", "encoded"] {
        assert!(counts[what].as_u64() > Some(10), "too few {what}: {counts}");
    }

    let ran = tool::run("/usr/bin/python3", &[&script, "points", &state]).await;
    let (theirs, ours) = (ran.json(), inspect(node, "points").await);
    assert_eq!(theirs["id"], ours["id"]);
    let (theirs, ours) = (theirs["lines"].as_array(), ours["lines"].as_array());
    let (theirs, ours) = (theirs.expect("lines"), ours.expect("lines"));
    assert_eq!(theirs.len(), ours.len());
    assert!(ours[0]["from"]["frame"].as_u64() > Some(0), "nothing was retired: {:#}", ours[0]);
    assert!(ours[0]["forked_from"]["frame"].is_u64(), "no failover: {:#}", ours[0]);
    for (line, ours) in theirs.iter().zip(ours) {
        assert_eq!(line["epoch"], ours["epoch"]);
        assert_eq!(line["to"], ours["to"]["frame"]);
        assert_eq!(line["hash"], ours["to"]["hash"]);
        assert_eq!(line["from"], ours["from"]["frame"]);
        let names = |list: &Value, keys: [&str; 2]| -> Vec<(Value, Value)> {
            let list = list.as_array().expect("a list");
            list.iter().map(|item| (item[keys[0]].clone(), item[keys[1]].clone())).collect()
        };
        assert_eq!(
            names(&line["checkpoints"], ["id", "label"]),
            names(&ours["checkpoints"], ["id", "label"])
        );
    }
}

/// A byte is changed in each kind of file: it is named, nothing is exported over it in silence, and
/// what is accepted is listed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn damage_is_named_and_only_exported_when_it_is_accepted() {
    let lab = Lab::new();
    let mut node = small_segments(&lab, "solo");
    node.start().await;
    let _ = node.srn(&["group", "create", GROUP, "--keep", "replica"]).await.done();
    let size = SIZE.to_string();
    let _ = node.srn(&["disk", "add", GROUP, DISK, "--size", &size]).await.done();
    let client = node.open(&format!("{GROUP}/{DISK}")).await;
    let content = Bytes::from(vec![0xaa; 32 << 10]);
    client.write(1 << 20, content.clone(), false).await.expect("a write");
    client.write(2 << 20, content, false).await.expect("a write");
    checkpoint(&node, "here").await;
    drop(client);
    // Opening seals what it finds.
    node.stop().await;
    node.start().await;
    node.stop().await;

    let state = node.state_dir().display().to_string();
    let frame = ["inspect", "frame", &state, "--seq"];
    let mut found = None;
    let points = inspect(&node, "points").await;
    let head = points["lines"][0]["to"]["frame"].as_u64().expect("a frame");
    for seq in 1..=head {
        let seq = seq.to_string();
        let shown = node.json(&[&frame[..], &[&seq]].concat()).await;
        if shown["blocks"][0]["first_sector"] == 2048 {
            found = Some((seq, shown));
        }
    }
    let (seq, shown) = found.expect("the frame of the first write");
    let sound = node.srn(&[&frame[..], &[&seq, "--content"]].concat()).await.done();
    assert!(sound.out.contains("aa aa aa"), "{sound:#?}");
    let group = std::fs::read_dir(node.state_dir().join("groups")).expect("groups");
    let group = group.flatten().next().expect("a group").path();
    let file = group.join(shown["file"].as_str().expect("a file"));
    let at = shown["blocks"][0]["offset"].as_u64().expect("an offset") as usize;
    let mut bytes = std::fs::read(&file).expect("a segment");
    bytes[at + 700] ^= 1;
    std::fs::write(&file, bytes).expect("it is damaged");

    let verify = node.srn(&["inspect", "verify", &state]).await;
    assert_eq!(verify.code, 9, "{verify:#?}");
    assert!(verify.out.contains("disk root, sectors 2048+64"), "{verify:#?}");
    let dump = node.srn(&[&frame[..], &[&seq]].concat()).await.done();
    assert!(dump.out.contains("DAMAGED"), "{dump:#?}");
    let raw = lab.path("raw").display().to_string();
    let export = ["inspect", "export", &state, "--disk", DISK, "--at", "here", "--raw", &raw];
    let refused = node.srn(&export).await;
    refused.refused(9, &["--accept-damage"]);
    assert!(!lab.path("raw").exists() && !lab.path("raw.part").exists());
    let accepted = node.json(&[&export[..], &["--accept-damage"]].concat()).await;
    assert_eq!(accepted["damaged"], serde_json::json!([{ "first": 2048, "sectors": 64 }]));
    let raw = std::fs::read(lab.path("raw")).expect("it was written");
    assert!(raw[1 << 20..(1 << 20) + (32 << 10)].iter().all(|byte| *byte == 0));
    assert!(raw[2 << 20..(2 << 20) + (32 << 10)].iter().all(|byte| *byte == 0xaa));
    let script = reader();
    let theirs = tool::run("/usr/bin/python3", &[&script, "verify", &state]).await;
    assert!(theirs.code != 0 && theirs.err.contains("srnread:"), "{theirs:#?}");
}

/// Ctrl-C leaves no half-written file behind, whenever it comes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broken_off_export_leaves_nothing() {
    let lab = Lab::new();
    let mut node = small_segments(&lab, "solo");
    node.start().await;
    let _ = node.srn(&["group", "create", GROUP, "--keep", "replica"]).await.done();
    let size = (64 << 20).to_string();
    let _ = node.srn(&["disk", "add", GROUP, DISK, "--size", &size]).await.done();
    let client = node.open(&format!("{GROUP}/{DISK}")).await;
    for at in (0..64 << 20).step_by(1 << 20) {
        let content = Bytes::from(vec![5; 1 << 20]);
        client.write(at, content, false).await.expect("a write");
    }
    node.stop().await;
    let state = node.state_dir().display().to_string();
    let (raw, part) = (lab.path("raw"), lab.path("raw.part"));
    let path = raw.display().to_string();
    let words = ["inspect", "export", &state, "--disk", DISK, "--raw", &path];
    let mut child = node.srn_command(&words).spawn().expect("srn starts");
    let pid = child.id().and_then(|pid| rustix::process::Pid::from_raw(pid as i32)).expect("a pid");
    wait_for("it writes", PATIENCE, async || (part.exists() || raw.exists()).then_some(())).await;
    let _ = rustix::process::kill_process(pid, Signal::INT);
    let status = child.wait().await.expect("it ends");
    assert!(!part.exists(), "a half-written file is left");
    // It may have been done before.
    assert_eq!(status.code(), Some(if raw.exists() { 0 } else { 6 }));
}
