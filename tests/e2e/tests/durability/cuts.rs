//! The link is cut and comes back at any moment, by a relay between the nodes: production dials the
//! relay, which is all that either of them knows of the way.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde_json::Value;
use srn_e2e::{Chance, Lab, Node, PATIENCE, tool, wait_for};
use srn_nbd::client::Client;
use tokio::task::JoinHandle;

use crate::common::{
    GROUP, expect_same, export_of, exported, pair_through_relay, protect, read_all, small_segments,
};
use crate::oracle::{Moment, Oracle, SECTOR};

/// The disk of these tests.
const DISK: &str = "root";
const SIZE: u64 = 8 << 20;

/// Laps unless `SRN_LAPS` says otherwise: one of each kind. One of three needs the ten seconds after
/// which a silent peer is given up, and as many until it is dialled again.
const LAPS: usize = 3;

/// Writes one after the other, for as long as it is there.
struct Writer {
    oracle: Arc<Mutex<Oracle>>,
    stop: Arc<AtomicBool>,
    task: JoinHandle<()>,
}

impl Writer {
    fn start(client: Client, seed: u64) -> Self {
        let oracle = Oracle::new(seed, vec![SIZE as usize / SECTOR]);
        let (oracle, stop) = (Arc::new(Mutex::new(oracle)), Arc::new(AtomicBool::new(false)));
        let task = tokio::spawn(write(client, oracle.clone(), stop.clone(), Chance::new(seed)));
        Self { oracle, stop, task }
    }

    fn oracle(&self) -> MutexGuard<'_, Oracle> {
        lock(&self.oracle)
    }

    /// Waits until so many more writes are answered: nothing at the link may hinder that.
    async fn progress(&self, more: usize) {
        let target = self.oracle().answered() + more;
        wait_for(&format!("{target} writes are answered"), PATIENCE, async || {
            assert!(!self.task.is_finished(), "the client has ended, see above");
            (self.oracle().answered() >= target).then_some(())
        })
        .await;
    }

    async fn finish(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        (&mut self.task).await.expect("the client ends well");
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn lock(oracle: &Mutex<Oracle>) -> MutexGuard<'_, Oracle> {
    oracle.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn write(
    client: Client,
    oracle: Arc<Mutex<Oracle>>,
    stop: Arc<AtomicBool>,
    mut chance: Chance,
) {
    // Not as fast as the disk can: the link shall be what matters.
    let mut pace = tokio::time::interval(Duration::from_millis(2));
    while !stop.load(Ordering::SeqCst) {
        pace.tick().await;
        let sectors = 1 + chance.below(128) as usize;
        let start = chance.below(SIZE / SECTOR as u64 - sectors as u64) as usize;
        let (number, content) = lock(&oracle).send(0, start, sectors);
        let written = client.write((start * SECTOR) as u64, content, false).await;
        written.expect("production answers, whatever the link does");
        lock(&oracle).answer(number);
    }
}

/// What the recovery node has must be a prefix, at any moment.
async fn judge_replica(recovery: &Node, writer: &Writer, holds: Moment, what: &str) {
    let head = recovery.group(GROUP).await["head"].as_u64().expect("a number").to_string();
    let replica = exported(recovery, DISK, &head).await;
    let oracle = writer.oracle();
    let state = oracle.read(&[replica]).unwrap_or_else(|error| panic!("{what}: {error}"));
    let judged = oracle.judge(&state, holds, Moment::MAX);
    judged.unwrap_or_else(|error| panic!("{what}: {error}"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_link_comes_and_goes() {
    let mut chance = Chance::from_env("SRN_SEED");
    let laps = std::env::var("SRN_LAPS").map_or(LAPS, |laps| laps.parse().expect("a number"));
    let lab = Lab::new();
    let (mut production, mut recovery) =
        (small_segments(&lab, "production"), small_segments(&lab, "recovery"));
    let relay = pair_through_relay(&mut production, &mut recovery, &mut chance).await;
    protect(&production, DISK, SIZE, &["--checkpoint-every", "1s"]).await;
    production.in_step(GROUP).await;
    let mut writer = Writer::start(production.open(&export_of(DISK)).await, chance.next());
    let first = chance.below(3) as usize;
    for lap in first..first + laps {
        writer.progress(20 + chance.below(200) as usize).await;
        let what = match lap % 3 {
            0 => {
                // Bad weather, and another port in the middle of it.
                relay.disturb(chance.below(150), Duration::from_millis(1 + chance.below(40)));
                writer.progress(100 + chance.below(200) as usize).await;
                relay.rebind();
                writer.progress(100).await;
                "bad weather"
            }
            1 => {
                // Cut for less time than a node waits, in one direction or both.
                match chance.below(3) {
                    0 => relay.cut(true, false),
                    1 => relay.cut(false, true),
                    _ => relay.cut(true, true),
                }
                writer.progress(50 + chance.below(500) as usize).await;
                "a short cut"
            }
            _ => {
                // Cut until both have noticed.
                relay.cut(chance.below(2) == 0, true);
                let gone = |group: &Value| group["cause"] == "no connection to the peer";
                production.group_until(GROUP, "production notices", gone).await;
                recovery.group_until(GROUP, "recovery notices", gone).await;
                writer.progress(50).await;
                "a long cut"
            }
        };
        judge_replica(&recovery, &writer, 0, what).await;
        let held = writer.oracle().now();
        let frame = production.group(GROUP).await["head"].as_u64().expect("a number");
        relay.restore();
        // What was written before the link came back arrives, while writing goes on.
        let caught_up =
            |group: &Value| group["acknowledged"].as_u64().is_some_and(|acked| acked >= frame);
        let group = production.group_until(GROUP, "the peer catches up", caught_up).await;
        assert_eq!(group["state"], "streaming", "after {what}: {group:#}");
        judge_replica(&recovery, &writer, held, &format!("after {what}")).await;
    }
    writer.finish().await;
    let now = writer.oracle().now();
    production.in_step(GROUP).await;
    judge_replica(&recovery, &writer, now, "in the end").await;
    let client = production.open(&export_of(DISK)).await;
    let content = read_all(&client).await.expect("the disk is read");
    expect_same(&exported(&recovery, DISK, "latest").await, &content, "the replica");
}

/// Content of the large copy: more than twenty times what may be in flight.
const COPY: u64 = 300 << 20;

/// The most that the recovery node grants beyond what it has made durable.
const IN_FLIGHT: u64 = 16 << 20;

/// The largest frame, with everything around its content.
const FRAME: u64 = (256 << 10) + (16 << 10);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cut_at_nine_tenths_costs_what_was_in_flight() {
    let mut chance = Chance::from_env("SRN_SEED");
    // Large images do not belong where temporary files may be memory.
    let lab = Lab::within(std::path::Path::new("/var/tmp"));
    let (mut production, mut recovery) = (lab.node("production"), lab.node("recovery"));
    let relay = pair_through_relay(&mut production, &mut recovery, &mut chance).await;
    protect(&production, DISK, COPY, &["--checkpoint-every", "0s"]).await;
    production.in_step(GROUP).await;
    let source = lab.path("source");
    // Nothing that could be compressed: every byte has to travel.
    let mut content = vec![0; COPY as usize];
    chance.fill(&mut content);
    std::fs::write(&source, &content).expect("the source is written");

    relay.cut_after(COPY / 10 * 9);
    let (from, to) = (source.display().to_string(), production.nbd_uri(&export_of(DISK)));
    let _ = tool::run("nbdcopy", &["--flush", &from, &to]).await.done();
    let gone = |group: &Value| group["cause"] == "no connection to the peer";
    let group = production.group_until(GROUP, "the link is lost", gone).await;
    assert!(relay.is_cut());
    let number = |group: &Value, key: &str| group["link"][key].as_u64().expect("a number");
    let sent = number(&group, "wire_sent");
    assert!(sent > COPY / 4 * 3, "{sent} bytes sent at the cut");
    relay.restore();
    production.in_step(GROUP).await;

    let group = production.group(GROUP).await;
    let frames = number(&group, "frames_sent_again");
    // Incompressible content crosses the wire as it is; what is more was sent twice or wraps it.
    let again = number(&group, "wire_sent").saturating_sub(COPY);
    let wrapping = COPY / 100;
    assert!(frames > 0, "nothing was in flight: the test has not tried what it should");
    assert!(
        again <= IN_FLIGHT + 2 * FRAME + wrapping,
        "{again} bytes sent again in {frames} frames, more than what can have been in flight"
    );
    let kept = 100 - again * 100 / sent;
    println!("sent {sent} bytes before the cut; {again} again in {frames} frames: {kept} % kept");
    assert!(kept >= 85, "only {kept} % of what was sent before the cut was not sent again");
    expect_same(&exported(&recovery, DISK, "latest").await, &content, "the replica");
}
