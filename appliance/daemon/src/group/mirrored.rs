//! What the mirror of a running server means for a disk's history: when its content is one point
//! in time and when not. It does not know how a mirror is driven.

use srn_core::frame::ResyncReason;
use srn_core::ids::DiskNo;
use srn_core::state::Content;
use srn_store::group::OwnedRecord;

use super::Group;
use crate::error::Result;

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
        self.changed.notify_waiters();
        Ok(())
    }
}
