//! Damage at rest: found by a scrub or a read, written down, repaired from the peer, told at both
//! nodes; and what cannot be repaired is given to nobody who has not accepted that.

use std::os::unix::fs::FileExt;
use std::path::Path;

use srn_e2e::{Chance, Lab, Node, PATIENCE, wait_for};

use crate::common::{
    GROUP, MIB, PAGE, STORAGE, files, group_dir, in_base, replicated, told, write_chance,
};

/// Damage is told loudly: in these tests that is what is expected.
fn expect_damage(nodes: &mut [&mut Node]) {
    for node in nodes {
        for text in ["damage", "is repaired", "does not have its checksum", "do not have their"] {
            node.expect_in_log(text);
        }
    }
}

async fn exported(lab: &Lab, node: &Node) -> Vec<u8> {
    let file = lab.path(&format!("{}.raw", node.name()));
    let path = file.to_str().expect("a path in UTF-8");
    let _ = node.srn(&["export", GROUP, "root", "--raw", path, "--force"]).await.done();
    std::fs::read(&file).expect("it was exported")
}

fn flip(path: &Path, offset: u64) {
    let file = std::fs::File::options().read(true).write(true).open(path).expect("a file");
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).expect("a byte");
    file.write_all_at(&[byte[0] ^ 0x40], offset).expect("it is written");
}

#[tokio::test]
async fn a_damaged_base_is_repaired_from_production() {
    let lab = Lab::new();
    let (mut production, mut recovery) = replicated(&lab, "16M").await;
    expect_damage(&mut [&mut production, &mut recovery]);
    let mut chance = Chance::from_env("SRN_SEED");
    write_chance(&production, &mut chance, 8 * MIB, MIB).await;
    write_chance(&production, &mut chance, 0, 4 * MIB).await;
    let first = 8 * MIB / PAGE;
    let base = in_base(&recovery, &[first, first + 200]).await;
    production.in_step(GROUP).await;
    let whole = exported(&lab, &production).await;
    [first, first + 1, first + 200].iter().for_each(|page| base.flip(*page));
    let found = recovery.json(&["scrub", GROUP]).await;
    assert_eq!(found["damaged"], serde_json::json!([]), "{found:#}");
    assert_eq!(found["repaired"].as_array().map(Vec::len), Some(2), "{found:#}");
    assert!(exported(&lab, &recovery).await == whole, "the content differs");
    told(&recovery, &["8192 bytes of disk root at 8388608", "repaired from production"]).await;
    told(&production, &["recovery says", "8192 bytes of disk root", "repaired"]).await;
    // Nobody has to ask: who reads it sees to it that it is looked at.
    base.flip(first + 7);
    let file = lab.path("never");
    let path = file.to_str().expect("a path in UTF-8");
    let ran = recovery.srn(&["export", GROUP, "root", "--raw", path]).await;
    assert!(ran.code != 0 && !file.exists(), "damage was exported: {ran:#?}");
    wait_for("the damage is repaired", 3 * PATIENCE, async || {
        let ran = recovery.srn(&["export", GROUP, "root", "--raw", path, "--force"]).await;
        (ran.code == 0).then_some(())
    })
    .await;
    assert!(std::fs::read(&file).expect("it was exported") == whole, "the content differs");
    assert_eq!(production.json(&["verify", GROUP]).await["equal"], true);
}

#[tokio::test]
async fn a_damaged_log_is_repaired_from_production() {
    let lab = Lab::new();
    let (mut production, mut recovery) = replicated(&lab, "16M").await;
    expect_damage(&mut [&mut production, &mut recovery]);
    let _ = recovery.srn(&["group", "set", GROUP, "--history", "1d"]).await.done();
    let mut chance = Chance::from_env("SRN_SEED");
    write_chance(&production, &mut chance, 0, 4 * MIB).await;
    production.in_step(GROUP).await;
    let whole = exported(&lab, &production).await;
    // Something of each: an envelope, and content further on. In segments that are full, and in
    // the one that is written to.
    let mut damaged = 0;
    for path in files(&group_dir(&recovery).join("log"), "seg") {
        let bytes = std::fs::read(&path).expect("it is readable");
        if bytes.len() > 300_000 && bytes[4096..4100] == *b"SRNe" {
            flip(&path, 4096 + 20);
            damaged += 1;
        }
        if bytes.len() > 600_000 && bytes[500_000..500_100].iter().any(|byte| *byte != 0) {
            flip(&path, 500_000);
        }
    }
    assert!(damaged > 2, "there is little to damage");
    let found = recovery.json(&["scrub", GROUP]).await;
    assert_eq!(found["damaged"], serde_json::json!([]), "{found:#}");
    assert!(found["repaired"].as_array().is_some_and(|all| all.len() >= damaged), "{found:#}");
    assert!(exported(&lab, &recovery).await == whole, "the content differs");
    let again = recovery.json(&["scrub", GROUP]).await;
    assert_eq!(again["repaired"], serde_json::json!([]), "{again:#}");
    // What was repaired is opened like everything else, and goes on.
    recovery.stop().await;
    recovery.start().await;
    write_chance(&production, &mut chance, 12 * MIB, MIB).await;
    production.in_step(GROUP).await;
    assert!(exported(&lab, &recovery).await == exported(&lab, &production).await);
}

#[tokio::test]
async fn what_nobody_has_stays_known_and_is_given_only_to_who_accepts_it() {
    let lab = Lab::new();
    let (mut production, mut recovery) = replicated(&lab, "16M").await;
    expect_damage(&mut [&mut production, &mut recovery]);
    let mut chance = Chance::from_env("SRN_SEED");
    write_chance(&production, &mut chance, 8 * MIB, MIB).await;
    write_chance(&production, &mut chance, 0, 4 * MIB).await;
    let page = 8 * MIB / PAGE + 5;
    let base = in_base(&recovery, &[page]).await;
    production.in_step(GROUP).await;
    let mut whole = exported(&lab, &production).await;
    production.stop().await;
    base.flip(page);
    let ran = recovery.srn(&["scrub", GROUP]).await;
    assert_eq!(ran.code, STORAGE, "{ran:#?}");
    let what = format!("4096 bytes of disk root at {}", page * PAGE);
    assert!(ran.err.contains(&what), "{ran:#?}");
    // It is known after a restart too, and status is not silent about it.
    recovery.stop().await;
    recovery.start().await;
    let group = recovery.group(GROUP).await;
    assert_eq!(group["damaged"][0]["what"], what, "{group:#}");
    assert_eq!(group["safe"], false);
    let status = recovery.srn(&["status"]).await.done();
    assert!(status.out.contains(&what), "{status:#?}");
    let file = lab.path("accepted.raw");
    let path = file.to_str().expect("a path in UTF-8");
    let export = ["export", GROUP, "root", "--raw", path];
    let ran = recovery.srn(&export).await;
    assert!(ran.code != 0 && !file.exists(), "damage was exported: {ran:#?}");
    let _ = recovery.srn(&[&export[..], &["--accept-damage"]].concat()).await.done();
    let lost = (page * PAGE) as usize..((page + 1) * PAGE) as usize;
    whole[lost].fill(0);
    assert!(std::fs::read(&file).expect("it was exported") == whole, "more than that differs");
    let sectors = format!("{}+8", page * PAGE / 512);
    told(&recovery, &["accepted damage", &sectors]).await;
}

/// Damage in what was to be given up kept history from being given up for ever. It is looked at, it cannot
/// be fetched while the peer is away, and then history goes on around it; nothing becomes zero, and when
/// the peer is back it is repaired.
#[tokio::test]
async fn history_is_given_up_around_what_is_damaged() {
    let lab = Lab::new();
    let (mut production, mut recovery) = replicated(&lab, "16M").await;
    expect_damage(&mut [&mut production, &mut recovery]);
    for text in ["looking for damage", "history", "not connected"] {
        recovery.expect_in_log(text);
    }
    let _ = recovery.srn(&["group", "set", GROUP, "--history", "1d"]).await.done();
    let mut chance = Chance::from_env("SRN_SEED");
    write_chance(&production, &mut chance, 0, 4 * MIB).await;
    production.in_step(GROUP).await;
    let whole = exported(&lab, &production).await;
    production.stop().await;
    // Content in the middle of a segment.
    let log = files(&group_dir(&recovery).join("log"), "seg").into_iter();
    let written = |path: &std::path::PathBuf| {
        let bytes = std::fs::read(path).expect("it is readable");
        bytes.len() > 600_000
            && bytes[4096..4100] == *b"SRNe"
            && bytes[500_000..500_100].iter().any(|byte| *byte != 0)
    };
    let path = log.into_iter().find(written).expect("a segment with content");
    flip(&path, 500_000);
    let _ = recovery.srn(&["group", "set", GROUP, "--history", "0s"]).await.done();
    told(&recovery, &["history was moved together with", "stay damaged", "of disk root at"]).await;
    let file = lab.path("never");
    let export = ["export", GROUP, "root", "--raw", file.to_str().expect("a path in UTF-8")];
    let ran = recovery.srn(&export).await;
    assert!(ran.code != 0 && !file.exists(), "damage was exported: {ran:#?}");
    let ran = recovery.srn(&["scrub", GROUP]).await;
    assert!(ran.code == STORAGE && ran.err.contains("of disk root at"), "{ran:#?}");
    production.start().await;
    production.in_step(GROUP).await;
    let found = recovery.json(&["scrub", GROUP]).await;
    assert_eq!(found["damaged"], serde_json::json!([]), "{found:#}");
    assert!(exported(&lab, &recovery).await == whole, "the content differs");
}

/// What is known to be damaged in a point stops a failover to it, until a person accepts that.
#[tokio::test]
async fn a_failover_with_known_damage_has_to_be_accepted() {
    let lab = Lab::new();
    let (mut production, mut recovery) = replicated(&lab, "16M").await;
    expect_damage(&mut [&mut production, &mut recovery]);
    recovery.expect_in_log("failed over");
    let mut chance = Chance::from_env("SRN_SEED");
    write_chance(&production, &mut chance, 8 * MIB, MIB).await;
    write_chance(&production, &mut chance, 0, 4 * MIB).await;
    let page = 8 * MIB / PAGE + 5;
    let base = in_base(&recovery, &[page]).await;
    let create = ["checkpoint", "create", GROUP, "--label", "good", "--pin", "--wait"];
    let _ = production.srn(&create).await.done();
    production.in_step(GROUP).await;
    production.stop().await;
    base.flip(page);
    let ran = recovery.srn(&["scrub", GROUP]).await;
    assert_eq!(ran.code, STORAGE, "{ran:#?}");
    let what = format!("4096 bytes of disk root at {}", page * PAGE);
    let run = ["failover", "run", GROUP, "--no-start", "--at", "good", "--yes-production-is-off"];
    recovery.srn(&run).await.refused(STORAGE, &[&what, "--accept-damage"]);
    assert_eq!(recovery.group(GROUP).await["role"], "secondary", "something was done");
    let _ = recovery.srn(&[&run[..], &["--accept-damage"]].concat()).await.done();
    assert_eq!(recovery.group(GROUP).await["role"], "primary");
    told(&recovery, &["failover from", "with accepted damage", &what]).await;
    let all = recovery.json(&["checkpoint", "list", GROUP]).await;
    assert_eq!(all[0]["label"], "good", "{all:#}");
    assert_eq!(all[0]["damage_accepted"], true, "{all:#}");
    // What is damaged is served to nobody, as before.
    let client = recovery.open("recovery/web/root").await;
    assert!(client.read(page * PAGE, 4096).await.is_err(), "damage is served");
    assert!(client.read((page + 1) * PAGE, 4096).await.is_ok());
}
