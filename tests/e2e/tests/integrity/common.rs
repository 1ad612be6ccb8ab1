//! What these tests share.

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use srn_core::bytes::content_sum;
use srn_e2e::{Chance, Lab, Node, PATIENCE, wait_for};

/// The group of every test.
pub(crate) const GROUP: &str = "web";

/// One MiB.
pub(crate) const MIB: u64 = 1 << 20;

/// A page of the base.
pub(crate) const PAGE: u64 = 4096;

/// The exit code when what is stored is not as it should be.
pub(crate) const STORAGE: i32 = 9;

/// A pair of nodes with small log segments, and a group whose replica holds history for no longer
/// than it has to: what is written goes to the base soon.
pub(crate) async fn replicated(lab: &Lab, size: &str) -> (Node, Node) {
    let (mut production, mut recovery) = (lab.node("production"), lab.node("recovery"));
    for node in [&mut production, &mut recovery] {
        node.configure("[store]\nsegment_size = \"1M\"");
        node.expect_in_log("disconnected");
    }
    recovery.start().await;
    production.start().await;
    production.pair_with(&recovery).await;
    let create = ["group", "create", GROUP, "--peer", "recovery", "--keep", "replica"];
    let _ = production.srn(&[&create[..], &["--checkpoint-every", "0s"]].concat()).await.done();
    let _ = production.srn(&["disk", "add", GROUP, "root", "--size", size]).await.done();
    production.in_step(GROUP).await;
    let _ = recovery.srn(&["group", "set", GROUP, "--history", "0s"]).await.done();
    (production, recovery)
}

/// Writes `length` bytes of chance from `start` on.
pub(crate) async fn write_chance(node: &Node, chance: &mut Chance, start: u64, length: u64) {
    let client = node.open("web/root").await;
    let mut at = start;
    while at < start + length {
        let mut data = vec![0; (64 * 1024).min(start + length - at) as usize];
        chance.fill(&mut data);
        let len = data.len() as u64;
        client.write(at, Bytes::from(data), false).await.expect("it is written");
        at += len;
    }
    client.disconnect().await.expect("a goodbye");
}

/// The group's only directory of a node.
pub(crate) fn group_dir(node: &Node) -> PathBuf {
    let mut dirs = std::fs::read_dir(node.state_dir().join("groups")).expect("it is readable");
    dirs.next().expect("a group").expect("it is readable").path()
}

/// The files of a directory with this ending.
pub(crate) fn files(dir: &Path, ending: &str) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = std::fs::read_dir(dir)
        .expect("it is readable")
        .map(|entry| entry.expect("it is readable").path())
        .filter(|path| path.extension().is_some_and(|found| found == ending))
        .collect();
    found.sort();
    found
}

/// The base of the only disk: its content and its checksums.
pub(crate) struct BaseFiles {
    pub(crate) raw: PathBuf,
    pub(crate) sum: PathBuf,
}

impl BaseFiles {
    pub(crate) fn of(node: &Node) -> Option<Self> {
        let base = group_dir(node).join("base");
        let raw = files(&base, "raw").pop()?;
        Some(Self { sum: raw.with_extension("sum"), raw })
    }

    /// The checksum of a page; none while it was never written.
    pub(crate) fn sum_of(&self, page: u64) -> Option<u64> {
        let mut sum = [0; 8];
        let file = std::fs::File::open(&self.sum).ok()?;
        file.read_exact_at(&mut sum, page * 8).ok()?;
        Some(u64::from_le_bytes(sum)).filter(|sum| *sum != 0)
    }

    pub(crate) fn page(&self, page: u64) -> Vec<u8> {
        let mut bytes = vec![0; PAGE as usize];
        let file = std::fs::File::open(&self.raw).expect("the base");
        file.read_exact_at(&mut bytes, page * PAGE).expect("a page");
        bytes
    }

    /// Flips a bit of a page.
    pub(crate) fn flip(&self, page: u64) {
        let mut bytes = self.page(page);
        bytes[77] ^= 0x10;
        self.write(page, &bytes);
    }

    /// Puts other content in the place of a page, with the checksum that it has.
    pub(crate) fn forge(&self, page: u64) {
        let mut bytes = self.page(page);
        bytes[99] ^= 0x01;
        self.write(page, &bytes);
        let file = std::fs::File::options().write(true).open(&self.sum).expect("the checksums");
        let sum = content_sum(&bytes).to_le_bytes();
        file.write_all_at(&sum, page * 8).expect("it is written");
    }

    fn write(&self, page: u64, bytes: &[u8]) {
        let file = std::fs::File::options().write(true).open(&self.raw).expect("the base");
        file.write_all_at(bytes, page * PAGE).expect("it is written");
    }
}

/// Waits until these pages are in a node's base.
pub(crate) async fn in_base(node: &Node, pages: &[u64]) -> BaseFiles {
    wait_for("the pages are in the base", PATIENCE, async || {
        let base = BaseFiles::of(node)?;
        pages.iter().all(|page| base.sum_of(*page).is_some()).then_some(base)
    })
    .await
}

/// Waits until one of a node's events contains all of these words.
pub(crate) async fn told(node: &Node, words: &[&str]) {
    wait_for(&format!("node {} tells of {words:?}", node.name()), PATIENCE, async || {
        let events = node.json(&["events"]).await;
        let mut all = events.as_array().into_iter().flatten();
        all.any(|event| {
            let text = event["text"].as_str().unwrap_or_default();
            words.iter().all(|word| text.contains(word))
        })
        .then_some(())
    })
    .await;
}
