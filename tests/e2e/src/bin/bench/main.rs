//! The product beside others, on one machine, in one run.
//!
//! Each measurement alternates: ours, theirs, ours, theirs, ... so that a busy neighbour meets both.
//! What is compared is the ratio of each pair; its median and its middle half are printed. Nothing
//! is asserted.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "tables are what it makes")]

mod cost;
mod flow;
mod front;
mod groups;
mod history;
mod incremental;
mod link;
mod memory;
mod peers;
mod table;
mod whole;

use std::path::Path;
use std::process::ExitCode;

use srn_e2e::{Lab, Node};

use table::Table;

/// What was asked for.
struct Plan {
    pairs: usize,
    only: Option<String>,
    records: u64,
}

/// A pair of nodes, and room for everything.
struct Site {
    production: Node,
    recovery: Node,
    // Goes last.
    lab: Lab,
}

const USAGE: &str = "usage: bench [--pairs N] [--records N] \
    [--only link|front|copy|whole|incremental|lag|history|memory|groups]";

fn plan() -> Result<Plan, String> {
    let mut plan = Plan { pairs: 9, only: None, records: 50_000_000 };
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let value = arguments.next().ok_or(USAGE)?;
        match argument.as_str() {
            "--pairs" => plan.pairs = value.parse().map_err(|_| USAGE)?,
            "--records" => plan.records = value.parse().map_err(|_| USAGE)?,
            "--only" => plan.only = Some(value),
            _ => return Err(USAGE.into()),
        }
    }
    Ok(plan)
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let Some(code) = link::role(&arguments).await {
        return code;
    }
    let plan = match plan() {
        Ok(plan) => plan,
        Err(usage) => {
            eprintln!("{usage}");
            return ExitCode::from(2);
        }
    };
    // Not /tmp, which is memory on some machines.
    let lab = Lab::within(Path::new("/var/tmp"));
    let mut table = Table::default();
    let wanted = |name: &str| plan.only.as_deref().is_none_or(|only| only == name);
    if wanted("link") {
        link::measure(lab.dir(), plan.pairs, &mut table).await;
    }
    if plan.only.as_deref() == Some("link") {
        println!("\n{table}");
        return ExitCode::SUCCESS;
    }
    let (mut production, mut recovery) = lab.pair().await;
    for node in [&mut production, &mut recovery] {
        // Each measurement has its own group, and takes it away.
        node.expect_in_log("was deleted here");
        node.expect_in_log("no connection to the peer");
        node.expect_in_log("agreeing with the peer");
    }
    let mut site = Site { production, recovery, lab };
    if wanted("front") {
        front::measure(&site, plan.pairs, &mut table).await;
    }
    if wanted("copy") {
        whole::measure_front_copy(&site, plan.pairs, &mut table).await;
    }
    if wanted("whole") {
        whole::measure(&site, plan.pairs, &mut table).await;
    }
    if wanted("incremental") {
        incremental::measure(&site, plan.pairs, &mut table).await;
    }
    if wanted("history") {
        history::measure(&site, plan.pairs, &mut table).await;
    }
    if wanted("lag") {
        front::measure_lag(&site, &mut table).await;
    }
    if wanted("memory") {
        memory::measure(&mut site, plan.records, &mut table).await;
    }
    if wanted("groups") {
        groups::measure(&mut site, &mut table).await;
    }
    println!("\n{table}");
    ExitCode::SUCCESS
}

/// A group with one served disk of `size`, as `srn` writes sizes, replicated to the peer.
async fn served(site: &Site, group: &str, size: &str) {
    let create = ["group", "create", group, "--peer", "recovery", "--keep", "replica"];
    let _ = site.production.srn(&create).await.done();
    let _ = site.production.srn(&["disk", "add", group, "disk", "--size", size]).await.done();
    site.production.in_step(group).await;
}

/// Takes a group away at both nodes.
async fn remove(site: &Site, group: &str) {
    for node in [&site.production, &site.recovery] {
        let _ = node.srn(&["group", "delete", group, "--yes"]).await.done();
    }
}
