//! State directories that cannot be used.

use std::path::{Path, PathBuf};

use srn_e2e::{Lab, Node, Volume};

use crate::common::{
    CONFLICT, MIB, REFUSED, STORAGE, content, ended, facts, protect, refused, refuses, running,
    verdict, write_blocks,
};

/// Every file under `dir` and its content, but what a start makes anew.
fn files(dir: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut found = Vec::new();
    let mut dirs = vec![dir.to_owned()];
    while let Some(dir) = dirs.pop() {
        for entry in std::fs::read_dir(dir).expect("it is readable") {
            let path = entry.expect("it is readable").path();
            if path.is_dir() {
                dirs.push(path);
            } else {
                let bytes = std::fs::read(&path).expect("it is readable");
                found.push((path, bytes));
            }
        }
    }
    found.sort();
    found
}

/// The newest manifest under `dir` and its content.
fn newest_manifest(dir: &Path) -> (PathBuf, Vec<u8>) {
    let is_manifest = |path: &Path| path.to_string_lossy().contains("/manifest-");
    files(dir).into_iter().rfind(|(path, _)| is_manifest(path)).expect("a manifest")
}

/// A node with a group that holds something, stopped.
async fn stopped(lab: &Lab) -> Node {
    let mut node = running(lab, "production").await;
    protect(&node, "web", None, "1M").await;
    write_blocks(&node, "web/root", 0, 256, 7).await;
    node.stop().await;
    node
}

/// Starts the node and finds everything as it was.
async fn all_is_there(lab: &Lab, node: &mut Node) {
    node.start().await;
    let root = content(lab, node, "web", "root").await;
    assert!(root.len() as u64 == MIB && root.iter().all(|byte| *byte == 7));
    node.stop().await;
}

#[tokio::test]
async fn a_newer_version_has_written_the_nodes_memory() {
    let lab = Lab::new();
    let mut node = stopped(&lab).await;
    let path = node.state_dir().join("fleet.db");
    let old = std::fs::read(&path).expect("it is there");
    let mut new = old.clone();
    // SQLite's user_version, big-endian.
    new[60..64].copy_from_slice(&2_u32.to_be_bytes());
    std::fs::write(&path, &new).expect("it is ours");
    let before = files(node.state_dir());
    let words = [path.to_str().expect("a path in UTF-8"), "newer version", "update srn"];
    refused("a newer fleet.db", &node.run_to_end().await, REFUSED, &words);
    assert!(files(node.state_dir()) == before, "something was changed");
    std::fs::write(&path, &old).expect("it is ours");
    all_is_there(&lab, &mut node).await;
}

#[tokio::test]
async fn a_newer_version_has_written_one_group() {
    let lab = Lab::new();
    let mut node = stopped(&lab).await;
    node.start().await;
    protect(&node, "db", None, "1M").await;
    write_blocks(&node, "db/root", 0, 256, 8).await;
    let web = node.group("web").await["id"].as_str().expect("an id").to_owned();
    node.stop().await;
    let dir = node.state_dir().join("groups").join(web);
    let (path, old) = newest_manifest(&dir);
    let mut new = old.clone();
    new[4..6].copy_from_slice(&9_u16.to_le_bytes());
    std::fs::write(&path, &new).expect("it is ours");
    let before = files(&dir);
    node.expect_in_log("group web: ");
    node.start().await;
    let file = path.to_str().expect("a path in UTF-8");
    let words = [file, "format version 9", "up to 1", "update srn"];
    let said = verdict(&node).await;
    assert!(said.starts_with("NOT SAFE"), "{said}");
    for word in words.iter().copied().chain(["group web cannot be opened"]) {
        assert!(said.contains(word), "{word}: {said}");
    }
    let commands: [&[&str]; 4] = [
        &["group", "show", "web"],
        &["group", "pause", "web"],
        &["checkpoint", "create", "web"],
        &["export", "web", "root", "--nbd"],
    ];
    for arguments in commands {
        let ran = node.srn(arguments).await;
        refused("a newer group", &ran, REFUSED, &[&words[..], &["group web"]].concat());
    }
    let create = ["group", "create", "web", "--keep", "replica"];
    refuses(&node, &create, CONFLICT, &["group web", "already"]).await;
    // The other group is served as ever.
    let root = content(&lab, &node, "db", "root").await;
    assert!(root.iter().all(|byte| *byte == 8));
    write_blocks(&node, "db/root", 0, 8, 9).await;
    node.stop().await;
    assert!(files(&dir) == before, "something was changed");
    std::fs::write(&path, &old).expect("it is ours");
    all_is_there(&lab, &mut node).await;
}

#[tokio::test]
async fn a_peer_that_cannot_open_its_replica_does_not_stop_production() {
    let lab = Lab::new();
    let (production, mut recovery) = lab.pair().await;
    let mut production = production;
    protect(&production, "web", Some("recovery"), "1M").await;
    write_blocks(&production, "web/root", 0, 256, 1).await;
    production.in_step("web").await;
    production.expect_in_log("group web: disconnected");
    recovery.stop().await;
    let dir = recovery.state_dir().join("groups");
    let (path, old) = newest_manifest(&dir);
    let mut damaged = old.clone();
    let middle = damaged.len() / 2;
    damaged[middle] ^= 1;
    std::fs::write(&path, &damaged).expect("it is ours");
    let words = "the recovery node cannot open group web";
    recovery.expect_in_log("group web: damaged");
    recovery.expect_in_log(words);
    recovery.start().await;
    production
        .group_until("web", "the refusal is shown", |group| {
            group["state"] == "disconnected"
                && group["detail"].as_str().is_some_and(|text| text.contains(words))
        })
        .await;
    let said = verdict(&production).await;
    assert!(said.contains("the peer refuses") && said.contains("damaged"), "{said}");
    refused(
        "srn group show",
        &recovery.srn(&["group", "show", "web"]).await,
        STORAGE,
        &["damaged"],
    );
    write_blocks(&production, "web/root", 0, 128, 2).await;
    recovery.stop().await;
    std::fs::write(&path, &old).expect("it is ours");
    recovery.start().await;
    production.in_step("web").await;
    let home = content(&lab, &production, "web", "root").await;
    assert!(home == content(&lab, &recovery, "web", "root").await, "the replica differs");
    assert!(home.iter().zip(0..).all(|(byte, at)| *byte == if at < 128 * 4096 { 2 } else { 1 }));
}

#[tokio::test]
async fn two_daemons_do_not_share_a_state_directory() {
    let lab = Lab::new();
    let mut node = stopped(&lab).await;
    node.start().await;
    let before = facts(&node).await;
    let mut second = lab.node("second");
    second.set_state_dir(node.state_dir().to_owned());
    let state = node.state_dir().to_str().expect("a path in UTF-8").to_owned();
    let words = [state.as_str(), "in use by another daemon", "node.state_dir"];
    refused("a second daemon", &second.run_to_end().await, CONFLICT, &words);
    assert_eq!(facts(&node).await, before);
    // Neither does the same daemon once more take the first one's sockets away.
    refused("the same daemon", &node.run_to_end().await, CONFLICT, &words);
    assert_eq!(facts(&node).await, before);
    write_blocks(&node, "web/root", 0, 256, 7).await;
    node.stop().await;
    all_is_there(&lab, &mut node).await;
}

#[tokio::test]
async fn nothing_is_begun_where_nothing_can_be_written() {
    let lab = Lab::new();
    let mut node = stopped(&lab).await;
    let before = files(node.state_dir());
    let volume = Volume::read_only(node.state_dir()).await;
    node.run_through(volume.enter());
    let state = node.state_dir().to_str().expect("a path in UTF-8").to_owned();
    let words = [state.as_str(), "ead-only file system", "mount it writable"];
    refused("a used directory", &node.run_to_end().await, STORAGE, &words);
    // A new one cannot even be made.
    let mut fresh = lab.node("fresh");
    let new = node.state_dir().join("new");
    fresh.set_state_dir(new.clone());
    fresh.run_through(volume.enter());
    let new = new.to_str().expect("a path in UTF-8");
    refused("a new directory", &fresh.run_to_end().await, STORAGE, &[new, words[1], words[2]]);
    drop(volume);
    assert!(files(node.state_dir()) == before, "something was changed");
    node.run_through(Vec::new());
    all_is_there(&lab, &mut node).await;
}

#[tokio::test]
async fn what_is_no_state_directory_is_named() {
    let lab = Lab::new();
    let mut node = stopped(&lab).await;
    let state = node.state_dir().to_owned();
    let file = lab.path("file");
    std::fs::write(&file, "mine").expect("it is written");
    node.set_state_dir(file.clone());
    let words = [file.to_str().expect("a path in UTF-8"), "state directory"];
    refused("a file", &node.run_to_end().await, STORAGE, &words);
    assert_eq!(std::fs::read(&file).expect("it is there"), b"mine");
    node.set_state_dir(state.clone());
    // Files in it that are not what they should be: said, and left alone.
    for (name, words) in [
        ("node.key", &["node.key", "restore it from a backup"]),
        ("fleet.db", &["fleet.db", "restore it from a backup"]),
    ] {
        let path = state.join(name);
        let old = std::fs::read(&path).expect("it is there");
        let garbage = vec![0x55; 5000];
        std::fs::write(&path, &garbage).expect("it is ours");
        ended(name, &node.run_to_end().await, STORAGE, words);
        assert!(std::fs::read(&path).expect("it is there") == garbage, "{name} was changed");
        std::fs::write(&path, &old).expect("it is ours");
    }
    all_is_there(&lab, &mut node).await;
}
