//! What the tests of refusals share.

use bytes::Bytes;
use serde_json::{Value, json};
use srn_e2e::{Lab, Node, Ran};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

/// Exit codes of the command line.
pub(crate) const USAGE: i32 = 2;
pub(crate) const INVALID: i32 = 3;
pub(crate) const NOT_FOUND: i32 = 4;
pub(crate) const CONFLICT: i32 = 5;
pub(crate) const REFUSED: i32 = 6;
pub(crate) const UNREACHABLE: i32 = 7;
pub(crate) const UNTRUSTED: i32 = 8;
pub(crate) const STORAGE: i32 = 9;
pub(crate) const MISSING: i32 = 10;

/// One MiB.
pub(crate) const MIB: u64 = 1 << 20;

/// A node that runs and protects nothing yet.
pub(crate) async fn running(lab: &Lab, name: &str) -> Node {
    let mut node = lab.node(name);
    node.start().await;
    node
}

/// Makes a group with a served disk `root` of this size. It makes no checkpoints by itself.
pub(crate) async fn protect(node: &Node, group: &str, peer: Option<&str>, size: &str) {
    let mut create = vec!["group", "create", group, "--keep", "replica"];
    create.extend(["--checkpoint-every", "0s"]);
    if let Some(peer) = peer {
        create.extend(["--peer", peer]);
    }
    let _ = node.srn(&create).await.done();
    let _ = node.srn(&["disk", "add", group, "root", "--size", size]).await.done();
}

fn pick(of: &Value, fields: &[&str]) -> Value {
    fields.iter().map(|field| ((*field).to_owned(), of[field].clone())).collect()
}

fn picks(of: &Value, fields: &[&str]) -> Vec<Value> {
    of.as_array().into_iter().flatten().map(|one| pick(one, fields)).collect()
}

/// Everything about a node that a refusal must leave as it is: peers, groups with their settings,
/// disks and checkpoints, tokens, and what is in its state directory.
pub(crate) async fn facts(node: &Node) -> Value {
    let status = node.json(&["status"]).await;
    let mut groups = picks(
        &status["groups"],
        &[
            "name",
            "id",
            "role",
            "keep",
            "peer",
            "epoch",
            "full_policy",
            "checkpoint_every_s",
            "history_s",
            "paused",
        ],
    );
    for (shown, group) in status["groups"].as_array().into_iter().flatten().zip(&mut groups) {
        let disks = ["name", "number", "id", "size", "source", "export"];
        group["disks"] = picks(&shown["disks"], &disks).into();
        let name = shown["name"].as_str().expect("a name");
        group["checkpoints"] = node.json(&["checkpoint", "list", name]).await;
    }
    let dirs = std::fs::read_dir(node.state_dir_inside().join("groups")).expect("it is readable");
    let mut dirs: Vec<String> = dirs
        .map(|entry| entry.expect("it is readable").file_name().to_string_lossy().into_owned())
        .collect();
    dirs.sort();
    json!({
        "peers": picks(&status["peers"], &["name", "id", "address"]),
        "groups": groups,
        "recoveries": status["recoveries"],
        "tokens": status["node"]["tokens_outstanding"],
        "dirs": dirs,
    })
}

/// Runs `srn` with these arguments, which must be refused and change nothing.
pub(crate) async fn refuses(node: &Node, arguments: &[&str], code: i32, words: &[&str]) {
    let before = facts(node).await;
    let ran = node.srn(arguments).await;
    assert!(ran.out.is_empty(), "srn {arguments:?}: {ran:#?}");
    refused(&format!("srn {arguments:?}"), &ran, code, words);
    assert_eq!(facts(node).await, before, "srn {arguments:?} has changed something");
}

/// As [`Ran::refused`], naming what was tried.
pub(crate) fn refused(what: &str, ran: &Ran, code: i32, words: &[&str]) {
    let lines = ran.err.trim_end().lines().count();
    let all = words.iter().all(|word| ran.err.contains(word));
    assert!(
        ran.code == code && lines == 1 && all,
        "{what}: expected exit code {code} and one line with all of {words:?}: {ran:#?}"
    );
}

/// The program has ended with this code, and its last line holds all of `words`. Lines of its log
/// may come before.
pub(crate) fn ended(what: &str, ran: &Ran, code: i32, words: &[&str]) {
    let last = ran.err.trim_end().lines().last().unwrap_or_default();
    let all = last.starts_with("srn: ") && words.iter().all(|word| last.contains(word));
    assert!(
        ran.code == code && all,
        "{what}: expected exit code {code} and a last line with all of {words:?}: {ran:#?}"
    );
    let complaints = ran.err.lines().filter(|line| {
        line.contains(" WARN ") || line.contains(" ERROR ") || line.contains("panicked")
    });
    assert_eq!(complaints.count(), 0, "{what}: more is said than once: {ran:#?}");
}

/// Asks a node's control socket without the command line's help: status and body.
pub(crate) async fn api(node: &Node, method: &str, path: &str, body: &str) -> (u16, String) {
    let mut stream = UnixStream::connect(node.socket()).await.expect("the socket");
    let request = format!(
        "{method} {path} HTTP/1.1\r\nhost: srn\r\nconnection: close\r\n\
         content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(request.as_bytes()).await.expect("it is sent");
    let mut answer = String::new();
    let _ = stream.read_to_string(&mut answer).await.expect("an answer");
    let status = answer.get(9..12).and_then(|status| status.parse().ok()).expect("a status");
    let body = answer.split_once("\r\n\r\n").map_or("", |(_, body)| body);
    (status, body.to_owned())
}

/// Writes `count` blocks of 4 KiB from `first` on, each full of `value`.
pub(crate) async fn write_blocks(node: &Node, export: &str, first: u64, count: u64, value: u8) {
    let client = node.open(export).await;
    for block in first..first + count {
        let data = Bytes::from(vec![value; 4096]);
        client.write(block * 4096, data, false).await.expect("it is written");
    }
    client.disconnect().await.expect("a goodbye");
}

/// The whole content of a disk at a node's newest point.
pub(crate) async fn content(lab: &Lab, node: &Node, group: &str, disk: &str) -> Vec<u8> {
    let file = lab.path(&format!("{}-{group}-{disk}.raw", node.name()));
    let path = file.to_str().expect("a path in UTF-8");
    let _ = node.srn(&["export", group, disk, "--raw", path, "--force"]).await.done();
    std::fs::read(&file).expect("it was exported")
}

/// The only peer of a node, as its status shows it.
pub(crate) async fn peer(node: &Node) -> Value {
    node.json(&["peer", "list"]).await[0].clone()
}

/// The first line of what `srn status` says to people.
pub(crate) async fn verdict(node: &Node) -> String {
    let said = node.srn(&["status"]).await.done().out;
    said.lines().next().unwrap_or_default().to_owned()
}
