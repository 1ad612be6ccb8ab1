//! What a long history costs: opening a point in it, and reading from it.

use std::process::Stdio;

use serde_json::Value;
use srn_e2e::{Chance, tool};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::Child;
use tokio::time::Instant;

use super::table::{Comparison, Table, quantile};
use super::{Site, remove, served};

/// Checkpoints, with writes between them.
const CHECKPOINTS: usize = 200;

/// Content written between two checkpoints, in MiB: 10 GiB in all.
const STEP_MIB: usize = 52;

/// Where it is written: the first part of a disk of 100 GiB.
const SPAN: &str = "4g";

/// How often a point is opened.
const OPENINGS: usize = 9;

/// A read-only export of one point, for as long as it is there.
struct Opened {
    uri: String,
    _child: Child,
}

async fn open(site: &Site, at: &str) -> Opened {
    let mut command =
        site.recovery.srn_command(&["export", "history", "disk", "--at", at, "--nbd"]);
    let mut child =
        command.stdout(Stdio::piped()).kill_on_drop(true).spawn().expect("srn can be run");
    let mut lines = BufReader::new(child.stdout.take().expect("a pipe")).lines();
    while let Some(line) = lines.next_line().await.expect("a line") {
        if let Some(at) = line.find("nbd") {
            let uri = line[at..].split_whitespace().next().unwrap_or_default().to_owned();
            return Opened { uri, _child: child };
        }
    }
    panic!("srn export --nbd said no address");
}

async fn fio(uri: &str, options: &[&str]) -> Value {
    let uri = format!("--uri={uri}");
    let size = format!("--size={SPAN}");
    let mut arguments = vec![
        "--name=history",
        "--ioengine=nbd",
        "--bs=4k",
        "--iodepth=16",
        "--norandommap",
        "--output-format=json",
        &uri,
        &size,
    ];
    arguments.extend(options);
    let said = tool::run_for("fio", &arguments, std::time::Duration::from_secs(600)).await.done();
    let json = said.out.find('{').map_or("", |at| &said.out[at..]);
    let found: Value = serde_json::from_str(json).expect("fio speaks JSON");
    found["jobs"][0].clone()
}

pub(crate) async fn measure(site: &Site, pairs: usize, table: &mut Table) {
    served(site, "history", "100G").await;
    let mut chance = Chance::from_env("SRN_SEED");
    let uri = site.production.nbd_uri("history/disk");
    let mut points = Vec::new();
    for step in 0..CHECKPOINTS {
        let (size, seed) =
            (format!("--io_size={STEP_MIB}m"), format!("--randseed={}", chance.next() >> 1));
        let _ = fio(&uri, &["--rw=randwrite", &size, &seed]).await;
        let label = format!("point-{step}");
        let arguments = ["checkpoint", "create", "history", "--label", &label];
        let _ = site.production.srn(&arguments).await.done();
        points.push(label);
    }
    site.production.in_step("history").await;
    let mut seconds = Vec::new();
    for _ in 0..OPENINGS {
        let at = points[chance.below(points.len() as u64) as usize].clone();
        let began = Instant::now();
        let opened = open(site, &at).await;
        let _ = tool::run("nbdinfo", &["--size", &opened.uri]).await.done();
        seconds.push(began.elapsed().as_secs_f64());
    }
    table.state(
        "opening a point for reading: 100 GiB disk, 10 GiB of history, 200 checkpoints",
        format!(
            "{:.2} s ({:.2} to {:.2})",
            quantile(&seconds, 0.5),
            quantile(&seconds, 0.0),
            quantile(&seconds, 1.0)
        ),
        "< 1 s",
    );
    let (mut deep, mut newest) = (Vec::new(), Vec::new());
    for _ in 0..pairs {
        for (at, into) in [("point-0", &mut deep), ("latest", &mut newest)] {
            let opened = open(site, at).await;
            let options = ["--rw=randread", "--time_based", "--runtime=4"];
            let job = fio(&opened.uri, &options).await;
            into.push(job["read"]["iops"].as_f64().expect("a figure"));
        }
    }
    table.compare(&Comparison {
        what: "4 KiB random reads, QD16, from a point 200 checkpoints deep",
        peer: "from the newest",
        unit: "IOPS",
        ours: &deep,
        theirs: &newest,
        target: "≥ 0.5",
    });
    remove(site, "history").await;
}
