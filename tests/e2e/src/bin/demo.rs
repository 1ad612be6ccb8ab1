//! The main job, shown on one machine: a real server is protected, its site is lost, and it is
//! recovered. Every command is one that an administrator types; every figure is measured here.
//!
//! It fails, with exit code 1, when a record is missing that must not be.

#![expect(clippy::print_stdout, reason = "showing is what it is for")]

use std::path::{Path, PathBuf};
use std::process::{ExitCode, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::Value;
use srn_e2e::guest::{DISK_NODE, Firmware, Found, Synced, found, read_console, synced};
use srn_e2e::{Guest, Lab, Node, wait_for};
use tokio::process::Command;
use tokio::sync::Mutex;

/// How long a server may take to boot under emulation.
const BOOT_PATIENCE: Duration = Duration::from_secs(300);

/// How long the server is watched while it is protected.
const WATCHED: Duration = Duration::from_secs(12);

/// How long the server outlives the production node.
const OUTLIVES: Duration = Duration::from_secs(2);

/// What the recovered servers of this demonstration are told when they shall only look.
const READ_ONLY: &str = "io.systemd.credential:srn.readonly=1";

/// The server's first line of interest.
const FOUND: &str = "SRN-SERVER found";

/// Everything that runs.
struct Stage {
    // In this order: what uses the directory goes before it.
    guest: Option<Guest>,
    production: Node,
    recovery: Node,
    lab: Lab,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    tokio::task::LocalSet::new().run_until(perform()).await
}

async fn perform() -> ExitCode {
    let mut firmware = Firmware::Bios;
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match (argument.as_str(), arguments.next().as_deref()) {
            ("--firmware", Some("bios")) => firmware = Firmware::Bios,
            ("--firmware", Some("uefi")) => firmware = Firmware::Uefi,
            _ => {
                println!("usage: demo [--firmware bios|uefi]");
                return ExitCode::from(2);
            }
        }
    }
    // Images are large, and /tmp is memory on some machines.
    let lab = Lab::within(Path::new("/var/tmp"));
    let stage = Stage {
        guest: None,
        production: lab.node("production"),
        recovery: lab.node("recovery"),
        lab,
    };
    let stage = Arc::new(Mutex::new(stage));
    let shown = stage.clone();
    let mut play =
        tokio::task::spawn_local(async move { play(&mut *shown.lock().await, firmware).await });
    let code = tokio::select! {
        ended = &mut play => ended.unwrap_or(ExitCode::FAILURE),
        _ = tokio::signal::ctrl_c() => {
            play.abort();
            let _ = play.await;
            println!("\ninterrupted");
            ExitCode::from(130)
        }
    };
    clean_up(&mut *stage.lock().await).await;
    code
}

/// Ends whatever runs; the directory goes with the last of it.
async fn clean_up(stage: &mut Stage) {
    let listed = stage.recovery.srn(&["failover", "list", "--json"]).await;
    let recoveries: Value = serde_json::from_str(&listed.out).unwrap_or_default();
    for recovery in recoveries.as_array().into_iter().flatten() {
        if let Some(id) = recovery["id"].as_str() {
            stage.recovery.srn(&["failover", "stop", id, "--graceful", "0s"]).await;
        }
    }
    stage.guest = None;
}

/// What is measured on the way.
struct Figures {
    image_bytes: u64,
    copied: Duration,
    written: u64,
    wire: u64,
    checkpoint: (Synced, Synced),
    safe: Synced,
    node_lost: Synced,
    server_lost: Synced,
}

async fn play(stage: &mut Stage, firmware: Firmware) -> ExitCode {
    title("1. A real server: Debian 12, writing numbered records and syncing each");
    let disk = build(&stage.lab, firmware).await;
    let guest = Guest::start(&disk, firmware, &stage.lab.path("server"));
    wait_for("the server writes", BOOT_PATIENCE, async || guest.last_synced()).await;
    println!("the server is up; its console: {}", tail(&guest));
    stage.guest = Some(guest);

    title("2. Two nodes, paired by a token that works once");
    stage.recovery.start().await;
    stage.production.start().await;
    let host = stage.recovery.address().to_string();
    println!("recovery$ srn token new");
    let token = stage.recovery.token().await;
    println!("production$ srn pair {host}   (the token is asked for)");
    let paired = stage.production.srn_with_input(&["pair", &host], &token).await.done();
    println!("{}", paired.out.trim_end());

    title("3. Protect the running server's disk");
    let figures = protect(stage, &disk).await;

    title("5. Failover");
    let (failover, latest) = fail_over(stage).await;

    title("6. An older checkpoint, on a clone, while the recovered server runs");
    let arguments = ["failover", "test", "web", "--at", "before-the-update", "--smbios", READ_ONLY];
    let (_, older) = recover(&stage.recovery, &arguments).await;
    show(&stage.recovery, &["failover", "stop", "web-test", "--graceful", "0s"]).await;

    report(&figures, &failover, &latest, &older)
}

async fn protect(stage: &mut Stage, disk: &Path) -> Figures {
    let Stage { guest, production, recovery, .. } = stage;
    let server = guest.as_ref().expect("it runs");
    let create = ["group", "create", "web", "--peer", "recovery", "--keep", "cache"];
    show(production, &[create.as_slice(), &["--checkpoint-every", "5s"]].concat()).await;
    let qmp = server.qmp().display().to_string();
    let began = Instant::now();
    show(production, &["disk", "add", "web", "root", "--qmp", &qmp, "--node", DISK_NODE, "--wait"])
        .await;
    let copied = began.elapsed();

    println!("\nthe lag, live:");
    let until = Instant::now() + WATCHED;
    let mut checkpoint = None;
    let mut every = tokio::time::interval(Duration::from_secs(1));
    while Instant::now() < until {
        every.tick().await;
        let group = production.group("web").await;
        println!(
            "  {}  {:.2} s, {} bytes not yet at the recovery node; the server has synced record {}",
            group["state"].as_str().unwrap_or_default(),
            group["lag_seconds"].as_f64().unwrap_or_default(),
            group["lag_bytes"].as_u64().unwrap_or_default(),
            last(server).record,
        );
        if checkpoint.is_none() && until.duration_since(Instant::now()) < WATCHED / 2 {
            let before = last(server);
            let label = ["checkpoint", "create", "web", "--label", "before-the-update"];
            show(production, &label).await;
            checkpoint = Some((before, last(server)));
        }
    }
    show(recovery, &["checkpoint", "list", "web"]).await;
    show(recovery, &["status"]).await;

    title("4. The site is lost: first the production node (kill -9), then the server");
    let safe = last(server);
    production.in_step("web").await;
    recovery.expect_in_log("no connection to the peer");
    recovery.expect_in_log("failed over");
    let group = production.group("web").await;
    production.kill().await;
    let node_lost = last(server);
    println!("the production node is gone; the server goes on: record {}", node_lost.record);
    tokio::time::sleep(OUTLIVES).await;
    let server = guest.take().expect("it runs");
    let server_lost = last(&server);
    server.kill().await;
    println!("the server is gone, at record {}", server_lost.record);
    Figures {
        image_bytes: std::fs::metadata(disk).map_or(0, |found| found.len()),
        copied,
        written: group["link"]["content_written"].as_u64().unwrap_or_default(),
        wire: group["link"]["wire_sent"].as_u64().unwrap_or_default(),
        checkpoint: checkpoint.expect("it was made"),
        safe,
        node_lost,
        server_lost,
    }
}

async fn fail_over(stage: &mut Stage) -> (Value, Found) {
    let recovery = &stage.recovery;
    recovery.group_until("web", "the loss is noticed", |group| group["state"] != "streaming").await;
    show(recovery, &["status"]).await;
    recover(recovery, &["failover", "run", "web", "--yes-production-is-off"]).await
}

/// Recovers a server and waits for its first words.
async fn recover(node: &Node, arguments: &[&str]) -> (Value, Found) {
    let arguments = [arguments, &["--wait-serial", FOUND]].concat();
    println!("\n{}$ srn {}", node.name(), arguments.join(" "));
    let status = node.json(&arguments).await;
    let log = PathBuf::from(status["serial_log"].as_str().expect("a serial log"));
    let found = wait_for("the server's whole line", BOOT_PATIENCE, async || {
        let console = read_console(&log);
        let line = console.lines().find(|line| line.contains(FOUND))?.to_owned();
        let words = found(&line)?;
        println!("from {}:\n  {}", status["point"].as_str().unwrap_or_default(), line.trim());
        Some(words)
    })
    .await;
    (status, found)
}

fn report(figures: &Figures, failover: &Value, latest: &Found, older: &Found) -> ExitCode {
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    let lost = |then: Synced| {
        let records = then.record.saturating_sub(latest.last.record);
        let seconds = (then.at - latest.last.at).max(0.0);
        format!("{records} records, {seconds:.2} s")
    };
    let (before, after) = figures.checkpoint;
    let seconds = |key: &str| failover[key].as_f64().unwrap_or_default();
    println!("\n== Report");
    let rows = [
        (
            "initial replication",
            format!(
                "{:.1} s for a disk of {:.0} MiB: {:.0} MB/s, while the server ran",
                figures.copied.as_secs_f64(),
                mib(figures.image_bytes),
                figures.image_bytes as f64 / 1e6 / figures.copied.as_secs_f64()
            ),
        ),
        (
            "bytes on the wire",
            format!(
                "{:.0} MiB for {:.0} MiB of content ({:.2})",
                mib(figures.wire),
                mib(figures.written),
                figures.wire as f64 / figures.written.max(1) as f64
            ),
        ),
        ("RPO, at the loss of the node", format!("lost: {}", lost(figures.node_lost))),
        ("RPO, at the loss of the server", format!("lost: {}", lost(figures.server_lost))),
        (
            "RTO",
            format!(
                "{:.1} s from the command to the server's first answer ({:.1} s to its start)",
                seconds("answered_after_s"),
                seconds("started_after_s")
            ),
        ),
        (
            "recovered",
            format!("record {}, journal intact: {}", latest.last.record, yes(latest.intact)),
        ),
        (
            "older checkpoint",
            format!(
                "record {}, journal intact: {}; it was made between records {} and {}",
                older.last.record,
                yes(older.intact),
                before.record,
                after.record
            ),
        ),
    ];
    for (what, value) in rows {
        println!("  {what:<32}{value}");
    }
    // A record is announced a moment after it is on disk.
    let wrong = [
        (!latest.intact || !older.intact, "a recovered journal is damaged"),
        (latest.last.record < figures.safe.record, "a record is missing that was replicated"),
        (older.last.record < before.record, "the checkpoint misses records of its time"),
        (older.last.record > after.record + 1, "the checkpoint holds records of a later time"),
    ];
    let mut code = ExitCode::SUCCESS;
    for (_, what) in wrong.iter().filter(|(is_so, _)| *is_so) {
        println!("FAILED: {what}");
        code = ExitCode::FAILURE;
    }
    if code == ExitCode::SUCCESS {
        println!("\nThe server was recovered, with everything that was replicated.");
    }
    code
}

const fn yes(is_so: bool) -> &'static str {
    if is_so { "yes" } else { "NO" }
}

fn last(guest: &Guest) -> Synced {
    guest.last_synced().unwrap_or(Synced { record: 0, at: 0.0 })
}

fn tail(guest: &Guest) -> String {
    let console = guest.console();
    synced(&console).last().map_or_else(String::new, |at| format!("synced {}", at.record))
}

fn title(text: &str) {
    println!("\n== {text}");
}

/// Runs a command as an administrator sees it: with its progress, if this is a terminal.
async fn show(node: &Node, arguments: &[&str]) {
    println!("\n{}$ srn {}", node.name(), arguments.join(" "));
    let mut command = node.srn_command(arguments);
    let status = command.stdin(Stdio::null()).status().await.expect("srn runs");
    assert!(status.success(), "srn {arguments:?}: {status}\n{}", node.log());
}

/// Builds the server's disk, from the cache after the first time.
async fn build(lab: &Lab, firmware: Firmware) -> PathBuf {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../server/build.sh");
    let disk = lab.path("server.raw");
    let built =
        Command::new(&script).args(["--firmware", firmware.word()]).arg(&disk).status().await;
    let built = built.unwrap_or_else(|error| panic!("{}: {error}", script.display()));
    assert!(built.success(), "the server's disk could not be built");
    disk
}
