//! The next job after the first: one block of a hundred has changed. The log knows which; the others
//! read both copies.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use srn_e2e::{Chance, Node, tool};
use srn_nbd::client::Client;
use tokio::time::Instant;

use super::table::{Comparison, Table, quantile};
use super::whole::{Far, image, in_step, nbdcopy};
use super::{Site, remove, served};

const BLOCK: u64 = 4096;
const BLOCKS: u64 = (2 << 30) / BLOCK;
const CHANGED: usize = BLOCKS as usize / 100;

/// Writes under way at the same time.
const DEPTH: usize = 32;

/// Blocks to change, and what they become: content of the same disk from another place, so that it
/// is like what servers write.
fn changes(image: &Path, chance: &mut Chance) -> Vec<(u64, Vec<u8>)> {
    let file = File::open(image).expect("the image is there");
    let mut found = Vec::with_capacity(CHANGED);
    while found.len() < CHANGED {
        let mut content = vec![0; BLOCK as usize];
        file.read_exact_at(&mut content, chance.below(BLOCKS) * BLOCK).expect("a block");
        if content.iter().any(|byte| *byte != 0) {
            // No block of the disk is the same as another.
            content[..8].copy_from_slice(&chance.next().to_le_bytes());
            found.push((chance.below(BLOCKS) * BLOCK, content));
        }
    }
    found
}

/// Bytes of the changed blocks as `zstd -1` makes them: each by itself.
async fn compressed(site: &Site, changes: &[(u64, Vec<u8>)]) -> f64 {
    let dir = site.lab.path("blocks");
    std::fs::create_dir_all(&dir).expect("a directory");
    for (number, (_, content)) in changes.iter().enumerate() {
        std::fs::write(dir.join(number.to_string()), content).expect("a file");
    }
    let script = format!("cd {} && zstd -1 -q --no-check -r . && cat *.zst | wc -c", dir.display());
    let said = tool::run("bash", &["-o", "pipefail", "-c", &script]).await.done();
    std::fs::remove_dir_all(&dir).expect("it can be removed");
    said.out.trim().parse().expect("a number")
}

async fn write(client: &Client, changes: &[(u64, Vec<u8>)]) {
    let mut writing = tokio::task::JoinSet::new();
    for (at, content) in changes {
        if writing.len() >= DEPTH {
            writing.join_next().await.expect("one ends").expect("no panic");
        }
        let (client, at, content) = (client.clone(), *at, bytes::Bytes::from(content.clone()));
        writing.spawn(async move { client.write(at, content, false).await.expect("a write") });
    }
    while let Some(written) = writing.join_next().await {
        written.expect("no panic");
    }
    client.flush().await.expect("a flush");
}

async fn wire_bytes(node: &Node) -> f64 {
    let group = node.group("increment").await;
    group["link"]["wire_sent"].as_f64().expect("a number")
}

pub(crate) async fn measure(site: &Site, pairs: usize, table: &mut Table) {
    let original = image(site).await;
    let mut chance = Chance::from_env("SRN_SEED");
    served(site, "increment", "2G").await;
    nbdcopy(&original, &site.production.nbd_uri("increment/disk")).await;
    in_step(&site.production, "increment").await;
    let client = site.production.open("increment/disk").await;
    // The others' source changes in the same way.
    let source = site.lab.path("increment.raw");
    std::fs::copy(&original, &source).expect("a copy");
    let far = Far::new(site.lab.dir(), &source).await;
    far.keep_target(&original);
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    let (mut wire, mut wire_of_rsync, mut goal) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..pairs {
        let changes = changes(&original, &mut chance);
        let before = wire_bytes(&site.production).await;
        let began = Instant::now();
        write(&client, &changes).await;
        in_step(&site.production, "increment").await;
        ours.push(began.elapsed().as_secs_f64());
        wire.push(wire_bytes(&site.production).await - before);
        goal.push(compressed(site, &changes).await);
        let file = File::options().write(true).open(&source).expect("the source");
        for (at, content) in &changes {
            file.write_all_at(content, *at).expect("a write");
        }
        file.sync_all().expect("a sync");
        let (seconds, bytes) = far.rsync_in_place().await;
        theirs.push(seconds);
        wire_of_rsync.push(bytes);
    }
    table.compare(&Comparison {
        what: "1 % of 2 GiB changed, written and durable at the far end",
        peer: "rsync --inplace over ssh, from when it is written",
        unit: "s",
        ours: &ours,
        theirs: &theirs,
        target: "",
    });
    let mib = |bytes: &[f64]| bytes.iter().map(|bytes| bytes / 1_048_576.0).collect::<Vec<_>>();
    table.compare(&Comparison {
        what: "bytes on the wire for that",
        peer: "rsync",
        unit: "MiB",
        ours: &mib(&wire),
        theirs: &mib(&wire_of_rsync),
        target: "",
    });
    table.compare(&Comparison {
        what: "the same beside each changed block through zstd -1",
        peer: "zstd",
        unit: "MiB",
        ours: &mib(&wire),
        theirs: &mib(&goal),
        target: "≤ 1.05 on a slow link",
    });
    eprintln!("median: {:.2} s", quantile(&ours, 0.5));
    drop(client);
    remove(site, "increment").await;
}
