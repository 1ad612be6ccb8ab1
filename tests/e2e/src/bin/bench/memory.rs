//! Memory of both nodes with a very large disk and a very long log.

use srn_e2e::{Node, tool};

use super::table::Table;
use super::{Site, remove, served};

/// The most memory that a node has had, in MiB.
fn peak(node: &Node) -> u64 {
    let pid = node.pid().expect("it runs");
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("a process");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("a peak");
    line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") / 1024
}

pub(crate) async fn measure(site: &mut Site, records: u64, table: &mut Table) {
    // Begun anew: the peak is that of this measurement.
    for node in [&mut site.production, &mut site.recovery] {
        node.stop().await;
        node.start().await;
    }
    served(site, "memory", "1T").await;
    let uri = format!("--uri={}", site.production.nbd_uri("memory/disk"));
    // Blocks of zeros are records like any other, and their content needs no disk.
    let step = records.div_ceil(4);
    let mut peaks = Vec::new();
    for quarter in 0..4 {
        let (blocks, seed) =
            (format!("--number_ios={step}"), format!("--randseed={}", 7 + quarter));
        let arguments = [
            "--name=memory",
            "--ioengine=nbd",
            "--rw=randwrite",
            "--bs=4k",
            "--iodepth=64",
            "--size=1t",
            "--zero_buffers",
            "--random_generator=tausworthe64",
            "--norandommap",
            &blocks,
            &seed,
            &uri,
        ];
        let _ = tool::run_for("fio", &arguments, std::time::Duration::from_secs(3600)).await.done();
        peaks.push((peak(&site.production), peak(&site.recovery)));
        eprintln!("after {} records: {:?} MiB", step * (quarter + 1), peaks.last());
    }
    site.production.in_step("memory").await;
    for (index, what) in ["primary", "secondary"].iter().enumerate() {
        let of = |at: usize| peaks.get(at).map_or(0, |(a, b)| if index == 0 { *a } else { *b });
        table.state(
            &format!("peak memory, {what}, 1 TiB disk, {} M records", records / 1_000_000),
            format!("{} MiB (after a quarter: {})", of(3), of(0)),
            "< 256 MiB",
        );
    }
    remove(site, "memory").await;
}
