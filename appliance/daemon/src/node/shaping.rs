//! Holds the link to what it may use at this time of the day.

use super::Node;
use crate::bandwidth::BandwidthStatus;
use crate::clock;

impl Node {
    /// Looks what holds now. Called every second: so a clock that is set, and another time zone,
    /// are followed too.
    pub(super) fn shape_links(&self) {
        let plan = &self.context.config().bandwidth;
        if plan.is_empty() {
            return;
        }
        let limit = plan.limit_at(clock::local().0);
        for session in self.sessions() {
            if session.limit() != limit {
                session.set_limit(limit);
            }
        }
    }

    /// What holds now, as people see it; nothing when nothing is ever limited.
    pub(super) fn bandwidth(&self) -> Option<BandwidthStatus> {
        let plan = &self.context.config().bandwidth;
        let (now, time_zone) = clock::local();
        (!plan.is_empty()).then(|| plan.status(now, time_zone))
    }
}
