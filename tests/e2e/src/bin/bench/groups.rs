//! Memory of both nodes with many groups, and with many checkpoints.

use srn_e2e::Node;

use super::table::Table;
use super::{Site, remove};

/// Groups that are made, one after the other.
const GROUPS: usize = 100;

/// Checkpoints of one of them.
const CHECKPOINTS: usize = 1000;

/// The memory that a node has now, in KiB.
fn resident(node: &Node) -> f64 {
    let pid = node.pid().expect("it runs");
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("a process");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("a size");
    line.trim().trim_end_matches(" kB").parse().expect("a number")
}

fn both(site: &Site) -> [f64; 2] {
    [resident(&site.production), resident(&site.recovery)]
}

async fn group(site: &Site, name: &str) {
    let create = ["group", "create", name, "--peer", "recovery", "--keep", "replica"];
    let settings = ["--checkpoint-every", "0s"];
    let _ = site.production.srn(&[&create[..], &settings].concat()).await.done();
    let _ = site.production.srn(&["disk", "add", name, "disk", "--size", "1G"]).await.done();
    site.production.in_step(name).await;
}

pub(crate) async fn measure(site: &mut Site, table: &mut Table) {
    for node in [&mut site.production, &mut site.recovery] {
        node.stop().await;
        // A hundred groups shall not take a hundred times what one is given for speed.
        node.configure("[store]\nsegment_size = \"1M\"");
        node.start().await;
    }
    let names: Vec<String> = (0..GROUPS).map(|number| format!("many-{number}")).collect();
    let (first, rest) = names.split_first().expect("there are some");
    group(site, first).await;
    let one = both(site);
    for name in rest {
        group(site, name).await;
    }
    let many = both(site);
    for checkpoint in 0..CHECKPOINTS {
        let label = format!("point-{checkpoint}");
        let _ =
            site.production.srn(&["checkpoint", "create", first, "--label", &label]).await.done();
    }
    site.production.in_step(first).await;
    let marked = both(site);
    for (at, what) in ["production", "recovery"].iter().enumerate() {
        let [one, many, marked] = [one, many, marked].map(|both| both[at]);
        table.state(
            &format!("memory of a {what} node with {GROUPS} groups, {CHECKPOINTS} checkpoints"),
            format!(
                "{:.0} MiB ({:.0} with one group; {:.0} KiB for each more, {:.1} KiB for each \
                 checkpoint)",
                marked / 1024.0,
                one / 1024.0,
                (many - one) / (GROUPS - 1) as f64,
                (marked - many) / CHECKPOINTS as f64
            ),
            "",
        );
    }
    for name in &names {
        remove(site, name).await;
    }
}
