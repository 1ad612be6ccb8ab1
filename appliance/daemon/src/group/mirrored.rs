//! What the mirror of a running server means for a disk's history: when its content is one point
//! in time and when not. It does not know how a mirror is driven.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use srn_core::extent::Extent;
use srn_core::frame::ResyncReason;
use srn_core::ids::DiskNo;
use srn_core::state::Content;
use srn_store::group::{OwnedRecord, SpanKind, View};

use super::Group;
use super::equal::Held;
use crate::error::Result;

/// For each disk, whether what its mirror sends is to be compared with what is held: while it is in a
/// resync. Shared with the exports that compare.
#[derive(Debug, Default)]
pub(super) struct Comparing {
    flags: Mutex<BTreeMap<DiskNo, Arc<AtomicBool>>>,
}

impl Comparing {
    fn flag(&self, disk: DiskNo) -> Arc<AtomicBool> {
        let mut flags = self.flags.lock().unwrap_or_else(PoisonError::into_inner);
        flags.entry(disk).or_default().clone()
    }
}

impl Group {
    /// From here the disk's content is sent anew.
    ///
    /// # Errors
    /// When nothing can be appended.
    pub async fn begin_resync(&self, disk: DiskNo, reason: ResyncReason) -> Result<()> {
        self.append(vec![OwnedRecord::ResyncBegin(disk, reason)]).await.map(|_| ())
    }

    /// A mirror has opened the disk. If an earlier connection had brought it in step, what its
    /// server wrote since comes in no order: a resync begins before the first of it.
    ///
    /// # Errors
    /// When nothing can be appended.
    pub async fn mirror_connected(&self, disk: DiskNo) -> Result<()> {
        let mut connections = self.mirror_connections.lock().await;
        *connections.entry(disk).or_default() += 1;
        let catalog = self.catalog();
        if catalog.disks.get(&disk).is_some_and(|disk| disk.content == Content::Clean) {
            self.begin_resync(disk, ResyncReason::MirrorReconnected).await?;
        }
        Ok(())
    }

    /// What is held of a mirrored disk that was just opened, to compare with what the mirror sends.
    /// Blocks.
    #[must_use]
    pub fn held(&self, disk: DiskNo, view: &Arc<View>) -> Held {
        let wanted = self.comparing.flag(disk);
        let clean = self.catalog().disks.get(&disk).is_none_or(|at| at.content == Content::Clean);
        wanted.store(!clean && holds_something(self, disk, view), Ordering::Release);
        Held::new(view.clone(), disk, wanted)
    }

    /// Whether this node keeps a copy of the disk with anything in it: then a mirror that begins anew
    /// can be compared with it. Blocks.
    #[must_use]
    pub fn keeps_content(&self, disk: DiskNo) -> bool {
        match self.store.view_head() {
            Ok(view) => holds_something(self, disk, &view),
            // A cache.
            Err(_) => false,
        }
    }

    /// How often a mirror has opened the disk since the daemon was started.
    pub async fn mirror_connections(&self, disk: DiskNo) -> u64 {
        self.mirror_connections.lock().await.get(&disk).copied().unwrap_or_default()
    }

    /// The mirror and its server's disk are equal, and were so over the connection with this
    /// number: the disk's content is one point in time again. Returns whether that is news; not so
    /// when the mirror has connected anew since.
    ///
    /// # Errors
    /// When nothing can be appended.
    pub async fn mirror_in_sync(&self, disk: DiskNo, connection: u64) -> Result<bool> {
        let connections = self.mirror_connections.lock().await;
        let catalog = self.catalog();
        let is_news = connections.get(&disk) == Some(&connection)
            && catalog.disks.get(&disk).is_some_and(|disk| disk.content != Content::Clean);
        if is_news {
            self.end_resync(disk).await?;
        }
        Ok(is_news)
    }

    /// The disk's content is one point in time again.
    ///
    /// # Errors
    /// When nothing can be appended.
    pub async fn end_resync(&self, disk: DiskNo) -> Result<()> {
        self.append(vec![OwnedRecord::ResyncEnd(disk)]).await?;
        self.comparing.flag(disk).store(false, Ordering::Release);
        self.changed.notify_waiters();
        Ok(())
    }
}

/// Of a disk that holds nothing yet everything is news, and there is nothing to compare with.
fn holds_something(group: &Group, disk: DiskNo, view: &View) -> bool {
    let Some(found) = group.catalog().disks.get(&disk).cloned() else { return false };
    let whole = Extent::new(0, found.sectors);
    match view.spans(disk, whole) {
        Ok(spans) => spans.first() != Some(&(whole, SpanKind::Hole)),
        Err(_) => true,
    }
}
