//! `srn verify`: no false alarm under writes, and no difference that is not found.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use bytes::Bytes;
use srn_e2e::{Chance, Lab};

use crate::common::{GROUP, MIB, PAGE, STORAGE, in_base, replicated, told, write_chance};

/// DRBD #68: a comparison that raises false alarms under writes teaches people to ignore it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn writes_during_a_comparison_are_no_difference() {
    let lab = Lab::new();
    let (production, recovery) = replicated(&lab, "16M").await;
    let mut chance = Chance::from_env("SRN_SEED");
    write_chance(&production, &mut chance, 0, 4 * MIB).await;
    production.in_step(GROUP).await;
    let (stop, written) = (AtomicBool::new(false), AtomicU64::new(0));
    let load = async {
        let client = production.open("web/root").await;
        while !stop.load(Ordering::Relaxed) {
            let mut data = vec![0; 4096];
            chance.fill(&mut data);
            let at = chance.below(2048) * 4096;
            if chance.below(8) == 0 {
                client.trim(at, 4096 * 4, false).await.expect("it is discarded");
            } else {
                client.write(at, Bytes::from(data), false).await.expect("it is written");
            }
            written.fetch_add(1, Ordering::Relaxed);
        }
    };
    let compare = async {
        for lap in 0..6 {
            let before = written.load(Ordering::Relaxed);
            let node = if lap % 2 == 0 { &production } else { &recovery };
            let found = node.json(&["verify", GROUP]).await;
            assert_eq!(found["equal"], true, "{found:#}");
            assert_eq!(found["disks"][0]["bytes"], 16 * MIB);
            assert!(written.load(Ordering::Relaxed) > before, "nothing was written meanwhile");
        }
        stop.store(true, Ordering::Relaxed);
    };
    tokio::join!(load, compare);
}

#[tokio::test]
async fn differences_and_damage_are_found_to_the_page() {
    let lab = Lab::new();
    let (production, mut recovery) = replicated(&lab, "16M").await;
    recovery.expect_in_log("is not equal");
    let mut production = production;
    production.expect_in_log("is not equal");
    // What a comparison meets is looked after.
    for text in ["damage", "is repaired", "does not have its checksum", "do not have their"] {
        recovery.expect_in_log(text);
        production.expect_in_log(text);
    }
    let mut chance = Chance::from_env("SRN_SEED");
    // What was written first is in the base when more has come.
    write_chance(&production, &mut chance, 8 * MIB, MIB).await;
    write_chance(&production, &mut chance, 0, 4 * MIB).await;
    let first = 8 * MIB / PAGE;
    let (forged, flipped) = ([first + 3, first + 40, first + 41], first + 99);
    let base = in_base(&recovery, &[forged[0], forged[1], forged[2], flipped]).await;
    production.in_step(GROUP).await;
    assert_eq!(production.json(&["verify", GROUP]).await["equal"], true);
    forged.iter().for_each(|page| base.forge(*page));
    base.flip(flipped);
    for (node, other) in [(&production, "at the peer"), (&recovery, "here")] {
        let ran = node.srn(&["verify", GROUP, "--disk", "root", "--json"]).await;
        assert_eq!(ran.code, STORAGE, "{ran:#?}");
        let found = ran.json();
        let disk = &found["disks"][0];
        assert_eq!(found["equal"], false);
        assert_eq!(disk["differing_bytes"], 3 * PAGE);
        let range = |page: u64, pages: u64, what: &str| serde_json::json!({"start": page * PAGE, "length": pages * PAGE, "what": what});
        let unreadable = format!("unreadable {other}");
        assert_eq!(
            disk["ranges"],
            serde_json::json!([
                range(forged[0], 1, "differs"),
                range(forged[1], 2, "differs"),
                range(flipped, 1, &unreadable)
            ])
        );
        if node.name() == "production" {
            // Met by that, it is repaired at once; and not looked for again so soon.
            told(&recovery, &["repaired from production"]).await;
            let at_rest = |group: &serde_json::Value| group["work"].is_null();
            recovery.group_until(GROUP, "the scrub has ended", at_rest).await;
            base.flip(flipped);
        }
    }
    // Whichever node asked, both tell.
    for (node, other) in [(&production, "recovery says"), (&recovery, "production says")] {
        told(node, &["disk root is not equal at both nodes", "12288 bytes differ"]).await;
        told(node, &[other, "disk root is not equal at both nodes"]).await;
    }
}

#[tokio::test]
async fn what_cannot_be_compared_is_refused_in_words() {
    let lab = Lab::new();
    let (production, mut recovery) = replicated(&lab, "1M").await;
    production.srn(&["verify", "nosuch"]).await.refused(4, &["nosuch"]);
    production.srn(&["verify", GROUP, "--disk", "nosuch"]).await.refused(4, &["nosuch", "root"]);
    let create = ["group", "create", "log", "--peer", "recovery", "--keep", "cache"];
    let _ = production.srn(&create).await.done();
    production.srn(&["verify", "log"]).await.refused(6, &["log", "local cache"]);
    let mut production = production;
    production.expect_in_log("disconnected");
    recovery.stop().await;
    production.srn(&["verify", GROUP]).await.refused(7, &[GROUP, "not connected"]);
}
