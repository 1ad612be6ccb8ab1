//! Where disks' writes come from, beside clients that come by themselves.

mod copy;
mod mirror;
mod pull;

pub use copy::{connect as connect_nbd, copy_from};
pub use mirror::{Mirrors, find_disk};
pub use pull::{PullRequest, Pulls, add_pull, check_pull};

use std::sync::Arc;

use srn_core::state::Content;

use crate::fleet::Source;
use crate::node::Node;

impl Node {
    /// Starts the sources of every group of which this node is primary.
    pub(crate) fn start_sources(self: &Arc<Self>) {
        for group in self.groups() {
            for record in group.settings().sources {
                let disk = srn_core::ids::DiskNo(record.disk);
                let catalog = group.catalog();
                let found = catalog.disks.get(&disk);
                match record.source {
                    Source::Mirror { qmp, node, .. } => {
                        self.mirrors().start(self, &group, disk, qmp, node);
                    }
                    source @ Source::Pull { .. } => self.pulls().start(&group, disk, &source),
                    Source::Served if found.is_some_and(|disk| disk.content != Content::Clean) => {
                        let why = "filling it was cut off when the daemon ended; remove the disk \
                                   and add it again";
                        group.source_state(disk, Some(why.to_owned()));
                    }
                    Source::Served => {}
                }
            }
        }
    }
}
