//! Where disks' writes come from, beside clients that come by themselves.

mod copy;
mod mirror;

pub use copy::{connect as connect_nbd, copy_from};
pub use mirror::{Mirrors, find_disk};

use std::sync::Arc;

use crate::fleet::Source;
use crate::node::Node;

impl Node {
    /// Starts the sources of every group of which this node is primary.
    pub(crate) fn start_sources(self: &Arc<Self>) {
        for group in self.groups() {
            for record in group.settings().sources {
                if let Source::Mirror { qmp, node } = record.source {
                    let disk = srn_core::ids::DiskNo(record.disk);
                    self.mirrors().start(self, &group, disk, qmp, node);
                }
            }
        }
    }
}
