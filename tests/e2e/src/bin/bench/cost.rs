//! What the two nodes spent: processor time and bytes written to their volumes, as the kernel counts
//! them for the processes.

use srn_e2e::Node;

use super::Site;

/// What both nodes together have used since they were started.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Cost {
    /// Processor time in seconds.
    pub(crate) cpu_s: f64,
    /// Bytes that went to storage.
    pub(crate) written: f64,
}

impl Cost {
    /// Up to now.
    pub(crate) fn of(site: &Site) -> Self {
        let (a, b) = (node(&site.production), node(&site.recovery));
        Self { cpu_s: a.cpu_s + b.cpu_s, written: a.written + b.written }
    }

    /// What was used since `before`.
    pub(crate) fn since(self, before: Self) -> Self {
        Self { cpu_s: self.cpu_s - before.cpu_s, written: self.written - before.written }
    }
}

fn node(node: &Node) -> Cost {
    let pid = node.pid().expect("it runs");
    let read = |name: &str| {
        std::fs::read_to_string(format!("/proc/{pid}/{name}")).expect("a running process")
    };
    // The name in parentheses may hold anything; user and system time are the 14th and 15th field.
    let stat = read("stat");
    let fields = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    let ticks: u64 = fields
        .split_whitespace()
        .skip(11)
        .take(2)
        .filter_map(|tick| tick.parse::<u64>().ok())
        .sum();
    let io = read("io");
    let written = io.lines().find_map(|line| line.strip_prefix("write_bytes: "));
    let per_second = rustix::param::clock_ticks_per_second();
    Cost {
        cpu_s: ticks as f64 / per_second as f64,
        written: written.and_then(|bytes| bytes.parse().ok()).expect("a number"),
    }
}
