//! What the group does when its engine's thread has news: it may not wait there for anything.

use std::sync::atomic::Ordering;
use std::sync::{Arc, OnceLock, Weak};

use srn_core::epoch::Position;
use srn_core::state::Cause;
use srn_store::StoreError;

use super::Group;
use super::engine::Watcher;
use crate::clock;

/// The group, once it is there.
pub(super) type GroupSlot = Arc<OnceLock<Weak<Group>>>;

/// Hears from the engine's thread.
pub(super) struct Watch {
    pub(super) group: GroupSlot,
}

impl Watch {
    fn group(&self) -> Option<Arc<Group>> {
        self.group.get().and_then(Weak::upgrade)
    }
}

impl Watcher for Watch {
    fn committed(&self, head: Position, content_bytes: u64) {
        let Some(group) = self.group() else { return };
        group.counters.content_written.fetch_add(content_bytes, Ordering::Relaxed);
        if group.record_has_peer() {
            group.lag().committed(head.seq, content_bytes, clock::mono());
        }
        group.wake_outgoing(head.seq);
        group.maintainer.progress(content_bytes);
    }

    fn full(&self, why: Option<&str>) {
        if let Some(group) = self.group() {
            group.maintainer.wake();
            group.on_stall(why);
        }
    }

    fn received(&self, head: Position, wire_bytes: u64) {
        let Some(group) = self.group() else { return };
        group.frames_durable(head, wire_bytes);
        group.maintainer.progress(wire_bytes);
    }

    fn out_of_line(&self, error: &StoreError) {
        if let Some(group) = self.group() {
            group.on_frames_out_of_line(&error.to_string());
        }
    }

    fn failed(&self, error: &StoreError) {
        let Some(group) = self.group() else { return };
        let cause = match error {
            StoreError::Corrupt(_) => Cause::Corrupt,
            _ => Cause::DiskFailed,
        };
        group.facts().failure = Some((cause, error.to_string()));
        log::error!("group {}: {error}", group.name());
        group.on_store_failed(&error.to_string());
        group.changed.notify_waiters();
        group.review();
    }
}
