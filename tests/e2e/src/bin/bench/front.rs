//! The NBD front of a primary with a connected peer, every answer durable, beside qemu-nbd.

use std::time::Duration;

use serde_json::Value;
use srn_e2e::tool;
use tokio::time::Instant;

use super::table::{Comparison, Table, quantile};
use super::{Site, peers, remove, served};

/// Seconds of each run.
const SECONDS: u32 = 4;

/// What fio overwrites, in MiB.
const SPAN_MIB: usize = 1024;

struct Load {
    what: &'static str,
    options: &'static [&'static str],
    target: &'static str,
}

const LOADS: [Load; 4] = [
    Load {
        what: "4 KiB random write, QD32; the peer without flush",
        options: &["--iodepth=32"],
        target: "≥ 1.0",
    },
    Load {
        what: "4 KiB random write, QD32, flush every 32",
        options: &["--iodepth=32", "--fsync=32"],
        target: "≥ 1.5",
    },
    Load {
        what: "4 KiB write + flush, QD1",
        options: &["--iodepth=1", "--fsync=1"],
        target: "≥ 1.3",
    },
    Load {
        what: "4 KiB write, QD1; the peer without flush",
        options: &["--iodepth=1"],
        target: "",
    },
];

/// Operations per second, and how many there were.
async fn fio(uri: &str, options: &[&str]) -> (f64, f64) {
    let (uri, size) = (format!("--uri={uri}"), format!("--size={SPAN_MIB}m"));
    let seconds = format!("--runtime={SECONDS}");
    let mut arguments = vec![
        "--name=write",
        "--ioengine=nbd",
        "--rw=randwrite",
        "--bs=4k",
        "--time_based",
        "--refill_buffers",
        "--norandommap",
        "--output-format=json",
        &uri,
        &size,
        &seconds,
    ];
    arguments.extend(options);
    let said = tool::run("fio", &arguments).await.done();
    // Its NBD engine says something first.
    let json = said.out.find('{').map_or("", |at| &said.out[at..]);
    let found: Value = serde_json::from_str(json).expect("fio speaks JSON");
    let write = &found["jobs"][0]["write"];
    let figure = |name: &str| write[name].as_f64().expect("a figure");
    (figure("iops"), figure("total_ios"))
}

pub(crate) async fn measure(site: &Site, pairs: usize, table: &mut Table) {
    let file = peers::written_file(site.lab.dir(), "peer.raw", SPAN_MIB);
    for load in &LOADS {
        let (mut ours, mut theirs, mut appends) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..pairs {
            served(site, "front", "1G").await;
            let (rate, writes) = fio(&site.production.nbd_uri("front/disk"), load.options).await;
            ours.push(rate);
            let frames = site.production.group("front").await["head"].as_f64();
            appends.push(frames.expect("a number") / writes);
            remove(site, "front").await;
            let peer = peers::qemu_nbd(&file, &[]).await;
            theirs.push(fio(&peer.uri(), load.options).await.0);
        }
        table.compare(&Comparison {
            what: load.what,
            peer: "qemu-nbd",
            unit: "IOPS",
            ours: &ours,
            theirs: &theirs,
            target: load.target,
        });
        // A frame is made durable by one synchronous write, alone or with others.
        let frames = format!("at most {:.2}", quantile(&appends, 0.5));
        table.state("synchronous writes to the log per write, for that", frames, "");
    }
}

/// The lag while a server writes 20 MB/s.
pub(crate) async fn measure_lag(site: &Site, table: &mut Table) {
    served(site, "lag", "4G").await;
    let uri = format!("--uri={}", site.production.nbd_uri("lag/disk"));
    let arguments = [
        "--name=lag",
        "--ioengine=nbd",
        "--rw=randwrite",
        "--bs=4k",
        "--iodepth=16",
        "--size=4g",
        "--rate=20m",
        "--time_based",
        "--runtime=30",
        "--refill_buffers",
        &uri,
    ];
    let writing = tool::run("fio", &arguments);
    let mut lags = Vec::new();
    let sampling = async {
        let until = Instant::now() + Duration::from_secs(28);
        let mut every = tokio::time::interval(Duration::from_millis(50));
        while Instant::now() < until {
            every.tick().await;
            let group = site.production.group("lag").await;
            lags.push(group["lag_seconds"].as_f64().expect("a known lag"));
        }
    };
    let (wrote, ()) = tokio::join!(writing, sampling);
    let _ = wrote.done();
    remove(site, "lag").await;
    let figure = |part: f64| format!("{:.3} s", quantile(&lags, part));
    table.state("lag under 20 MB/s of 4 KiB writes, median", figure(0.5), "< 0.2 s");
    table.state("the same, 99th percentile", figure(0.99), "< 1 s");
}
