//! What the tests of points share.

use bytes::Bytes;
use jiff::Timestamp;
use srn_e2e::{Lab, Node, PATIENCE, wait_for};
use srn_nbd::client::Client;

/// Exit codes of the command line.
pub(crate) const INVALID: i32 = 3;
pub(crate) const NOT_FOUND: i32 = 4;
pub(crate) const CONFLICT: i32 = 5;
pub(crate) const REFUSED: i32 = 6;

/// Makes a group that makes no checkpoints by itself, with served disks of these names, 1 MiB each.
pub(crate) async fn protect(node: &Node, group: &str, peer: Option<&str>, disks: &[&str]) {
    let mut create = vec!["group", "create", group, "--keep", "replica"];
    create.extend(["--checkpoint-every", "0s"]);
    if let Some(peer) = peer {
        create.extend(["--peer", peer]);
    }
    let _ = node.srn(&create).await.done();
    for disk in disks {
        let _ = node.srn(&["disk", "add", group, disk, "--size", "1M"]).await.done();
    }
}

/// Writes one block of 4 KiB full of `value`, durably.
pub(crate) async fn write(client: &Client, block: u64, value: u8) {
    let data = Bytes::from(vec![value; 4096]);
    client.write(block * 4096, data, false).await.expect("it is written");
}

/// The wall clock, once it shows a later microsecond than at the call.
pub(crate) async fn tick() -> Timestamp {
    let before = Timestamp::now();
    wait_for("the clock goes on", PATIENCE, async || {
        let now = Timestamp::now();
        (now.as_microsecond() > before.as_microsecond()).then_some(now)
    })
    .await
}

/// The content of a disk at a point, and what the point was said to be.
pub(crate) async fn content(
    lab: &Lab,
    node: &Node,
    group: &str,
    disk: &str,
    at: &str,
) -> (Vec<u8>, String) {
    let file = lab.path(&format!("{}-{group}-{disk}.raw", node.name()));
    let path = file.to_str().expect("a path in UTF-8");
    let export = ["--json", "export", group, disk, "--at", at, "--raw", path, "--force"];
    let open = node.srn(&export).await.done().json();
    let point = open["point"].as_str().expect("a point").to_owned();
    (std::fs::read(&file).expect("it was exported"), point)
}
