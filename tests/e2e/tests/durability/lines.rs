//! Lines as they are in the world: lossy, long, out of order, narrow, blocked, limited.

use std::time::{Duration, Instant};

use bytes::Bytes;
use serde_json::Value;
use srn_e2e::relay::line::Shape;
use srn_e2e::{Chance, Lab, Node, PATIENCE, wait_for};

use crate::common::{
    GROUP, expect_same, export_of, exported, pair_over, pair_through_relay, protect, relay_to,
};

const DISK: &str = "root";
const SIZE: usize = 6 << 20;

/// Writes all of the disk anew, with what cannot be compressed, and returns it.
async fn write_all(production: &Node, chance: &mut Chance) -> Vec<u8> {
    let mut content = vec![0; SIZE];
    chance.fill(&mut content);
    let client = production.open(&export_of(DISK)).await;
    for (number, part) in content.chunks(1 << 20).enumerate() {
        let written =
            client.write((number << 20) as u64, Bytes::copy_from_slice(part), false).await;
        written.expect("production answers, whatever the line is like");
    }
    content
}

async fn peer(node: &Node) -> Value {
    node.json(&["peer", "list"]).await[0].take()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replication_goes_on_over_bad_lines() {
    let mut chance = Chance::from_env("SRN_SEED");
    let ms = Duration::from_millis;
    let lines = [
        ("one of a hundred is lost", Shape { loss: 100, ..Shape::of(200, ms(50)) }),
        ("far and lossy", Shape { loss: 20, ..Shape::of(200, ms(250)) }),
        ("out of order", Shape { reordered: 300, late: ms(8), ..Shape::of(200, ms(20)) }),
        ("small packets", Shape { mtu: 1280, ..Shape::of(200, ms(20)) }),
    ];
    for (what, shape) in lines {
        let lab = Lab::new();
        let (mut production, mut recovery) = (lab.node("production"), lab.node("recovery"));
        let relay = pair_over(&mut production, &mut recovery, shape, &mut chance).await;
        protect(&production, DISK, SIZE as u64, &["--checkpoint-every", "0s"]).await;
        let content = write_all(&production, &mut chance).await;
        production.in_step(GROUP).await;
        expect_same(&exported(&recovery, DISK, "latest").await, &content, what);
        let peer = peer(&production).await;
        let number = |key: &str| peer[key].as_f64().unwrap_or_else(|| panic!("{key}: {peer:#}"));
        let packet = number("packet_bytes") as usize;
        assert!(packet >= 1200 && packet + 28 <= shape.mtu, "{what}: {peer:#}");
        assert!(number("rtt_ms") >= shape.delay.as_secs_f64() * 2e3, "{what}: {peer:#}");
        assert!(number("rate") > 0.0 && peer["limit"].is_null(), "{what}: {peer:#}");
        // The line has done what it should.
        let (there, _) = relay.counts();
        assert!(shape.loss == 0 || there.lost > 0, "{what}: {there:?}");
    }
}

/// Packets of 6,500 have passed, and from one moment to the next no longer do.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_path_that_becomes_narrow_is_followed() {
    let mut chance = Chance::from_env("SRN_SEED");
    let lab = Lab::new();
    let (mut production, mut recovery) = (lab.node("production"), lab.node("recovery"));
    let relay = pair_through_relay(&mut production, &mut recovery, &mut chance).await;
    protect(&production, DISK, SIZE as u64, &["--checkpoint-every", "0s"]).await;
    let _ = write_all(&production, &mut chance).await;
    production.in_step(GROUP).await;
    wait_for("packets grow", PATIENCE, async || {
        (peer(&production).await["packet_bytes"].as_u64() > Some(1472)).then_some(())
    })
    .await;
    relay.shape(Shape { mtu: 1280, delay: Duration::from_millis(5), ..Shape::CLEAR });
    let content = write_all(&production, &mut chance).await;
    production.in_step(GROUP).await;
    expect_same(&exported(&recovery, DISK, "latest").await, &content, "the replica");
    let peer = peer(&production).await;
    assert!(peer["packet_bytes"].as_u64().is_some_and(|bytes| bytes <= 1252), "{peer:#}");
    assert!(relay.counts().0.oversized > 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_more_than_the_limit_of_the_hour_is_sent() {
    const LIMIT: f64 = 4e6;
    let mut chance = Chance::from_env("SRN_SEED");
    let lab = Lab::new();
    let (mut production, mut recovery) = (lab.node("production"), lab.node("recovery"));
    production.configure(
        "[[link.schedule]]\nfrom = \"00:00\"\nto = \"12:00\"\nlimit = \"4 MB/s\"\n\
         [[link.schedule]]\nfrom = \"12:00\"\nto = \"24:00\"\nlimit = \"32 Mbit/s\"",
    );
    let relay = pair_through_relay(&mut production, &mut recovery, &mut chance).await;
    protect(&production, DISK, SIZE as u64, &["--checkpoint-every", "0s"]).await;
    production.in_step(GROUP).await;
    let priority = ["group", "set", GROUP, "--priority", "high"];
    let _ = production.srn(&priority).await.done();
    assert_eq!(production.group(GROUP).await["priority"], "high");
    let (began, before) = (Instant::now(), relay.counts().0.bytes);
    let content = write_all(&production, &mut chance).await;
    production.in_step(GROUP).await;
    let passed = (relay.counts().0.bytes - before) as f64;
    // Everything that the node sends is counted here, headers too.
    let most = LIMIT * began.elapsed().as_secs_f64() * 1.1 + 256.0 * 1024.0;
    assert!(passed >= SIZE as f64 && passed <= most, "{passed} bytes, {most} at most");
    expect_same(&exported(&recovery, DISK, "latest").await, &content, "the replica");
    assert_eq!(peer(&production).await["limit"], 4_000_000);
    assert_eq!(peer(&recovery).await["limit"], Value::Null);
    let status = production.srn(&["status"]).await;
    assert!(status.out.contains("link limited to 32 Mbit/s"), "{}", status.out);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_blocks_the_way_is_said_in_words() {
    let mut chance = Chance::from_env("SRN_SEED");
    let lab = Lab::new();
    let (mut production, mut recovery) = (lab.node("production"), lab.node("recovery"));
    recovery.start().await;
    production.start().await;
    let relay = relay_to(&recovery, chance.next());
    relay.cut(true, true);
    let token = recovery.token().await;
    let pair = |address: String, token: String| {
        let production = &production;
        async move { production.srn_with_input(&["pair", &address], &token).await }
    };
    let address = relay.address();
    let blocked = pair(address.to_string(), token.clone()).await;
    assert!(blocked.code != 0, "{blocked:#?}");
    for word in [format!("UDP {address}"), "firewall".into(), address.port().to_string()] {
        assert!(blocked.err.contains(&word), "nothing is said of {word:?}: {blocked:#?}");
    }
    // Nobody listens on the next port.
    let nobody = format!("{}:7311", recovery.address());
    let refused = pair(nobody, token.clone()).await;
    assert!(refused.err.contains("nothing listens on UDP port 7311"), "{refused:#?}");
    // The token was not spent by that.
    relay.restore();
    let _ = pair(address.to_string(), token).await.done();
}
