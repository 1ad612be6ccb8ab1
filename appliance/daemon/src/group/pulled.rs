//! What a pass over a pulled disk means for its history: it begins and ends, and in between there is no
//! point. It does not know what is read, and from where.
//!
//! Invariants:
//! * *nothing of a pass is appended before the record that says that the content is a mixture from
//!   here, and that is taken back only by the pass's end*, in one frame with its mark;
//! * *nothing of a pass that is over is appended later*: its changes belong to a client that has left,
//!   and the next pass begins when the engine has settled;
//! * what equals what is held here is not appended, and a pass that finds nothing new leaves every
//!   position before it as good as it was.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use srn_core::epoch::Position;
use srn_core::extent::Extent;
use srn_core::frame::{MarkKind, ResyncReason};
use srn_core::ids::{CheckpointId, DiskNo};
use srn_core::limits::SECTOR;
use srn_core::state::Content;
use srn_core::time::WallTime;
use srn_store::catalog::CatalogDisk;
use srn_store::group::{Change, OwnedRecord};
use srn_store::manifest::Keep;
use tokio::sync::{OnceCell, oneshot};

use super::Group;
use super::engine::{Client, Done, Engine, Op};
use super::equal::Held;
use super::export::changes_of;
use crate::clock;
use crate::error::{Failure, Result};
use crate::fleet::{LastPass, Source};

/// A pass as people see it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PassStatus {
    /// `first`, `changes` (what a bitmap marks), or `everything` (read, and compared where a replica
    /// is kept).
    pub kind: String,
    /// Why everything is read, where it is.
    pub reason: Option<String>,
    /// The moment whose content it reads, in RFC 3339.
    pub time: String,
    /// Bytes read from the server.
    pub read: u64,
    /// Bytes of content that were new, and are in the log.
    pub new: u64,
}

/// The passes over a disk as people see them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PullStatus {
    /// Where it is read.
    pub uri: String,
    /// Seconds from the beginning of a pass to that of the next.
    pub every_s: u64,
    /// The pass that is under way.
    pub pass: Option<PassStatus>,
    /// What it, or the next one, waits for, while it does.
    pub waits: Option<String>,
    /// The last one that came to its end since the daemon was started.
    pub last: Option<PassStatus>,
    /// The moment of the newest point, in RFC 3339.
    pub newest: Option<String>,
    /// When the next one begins, in RFC 3339.
    pub next: Option<String>,
    /// Why the last one failed.
    pub failed: Option<String>,
}

/// Where a pass puts what it reads.
#[derive(Debug)]
pub struct Landing {
    group: Arc<Group>,
    disk: DiskNo,
    engine: Arc<Engine>,
    client: Arc<Client>,
    /// What is compared with, where a replica is kept.
    held: Option<Held>,
    /// Filled once the content is a mixture by the log.
    begun: OnceCell<()>,
    new: AtomicU64,
}

/// A pass: whatever it has not appended when this is dropped never will be.
#[derive(Debug)]
pub struct PassGuard(Arc<Client>);

impl Drop for PassGuard {
    fn drop(&mut self) {
        self.0.leave();
    }
}

/// Whether a disk has points although its content is a mixture now: a pass is under way, and the newest
/// point is the end of the one before, as always between two passes.
pub(super) fn stands(disk: &CatalogDisk) -> Content {
    match disk.reason {
        Some(ResyncReason::Pass) if disk.content == Content::Resync => Content::Clean,
        _ => disk.content,
    }
}

impl Group {
    /// Begins a pass over a disk. There is no other one.
    ///
    /// # Errors
    /// When nothing can be appended here now.
    pub async fn begin_pass(self: &Arc<Self>, disk: DiskNo) -> Result<(Arc<Landing>, PassGuard)> {
        self.check_writable()?;
        let engine = self.engine();
        // What an earlier pass has left is in the log or gone.
        engine.settled().await;
        let held = match self.store.keep() {
            Keep::Cache => None,
            Keep::Replica => {
                let store = self.store.clone();
                let view = Arc::new(self.blocking(move || store.view_head()).await?);
                Some(Held::new(view, disk, Arc::default()))
            }
        };
        let content = self.catalog().disks.get(&disk).map(|disk| disk.content);
        let content = content.ok_or_else(|| Failure::not_found("the disk was removed"))?;
        let begun = OnceCell::new();
        if content != Content::Clean {
            // By an earlier one, or when the disk was added.
            let _ = begun.set(());
        }
        let client = Arc::new(Client::default());
        let guard = PassGuard(client.clone());
        let (group, new) = (self.clone(), AtomicU64::new(0));
        let landing = Landing { group, disk, engine, client, held, begun, new };
        Ok((Arc::new(landing), guard))
    }

    /// Whether the log takes more of a pass: it is never filled by one, as what is not read yet waits
    /// at the server.
    #[must_use]
    pub fn has_room_for_pass(&self) -> bool {
        self.log_fill() <= 0.5 && self.facts().full.is_none()
    }

    /// What is remembered of a disk's last pass that came to its end.
    #[must_use]
    pub fn last_pass(&self, disk: DiskNo) -> Option<LastPass> {
        let record = self.record();
        let source = record.sources.iter().find(|source| source.disk == disk.0)?;
        match &source.source {
            Source::Pull { last, .. } => last.clone(),
            _ => None,
        }
    }

    /// Remembers it, durably.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn remember_pass(&self, disk: DiskNo, pass: LastPass) -> Result<()> {
        self.change_settings(|record| {
            let source = record.sources.iter_mut().find(|source| source.disk == disk.0);
            if let Some(Source::Pull { last, .. }) = source.map(|found| &mut found.source) {
                *last = Some(pass);
            }
        })
    }

    /// What people are told of a disk's passes.
    pub fn pull_status(&self, disk: DiskNo, change: impl FnOnce(&mut PullStatus)) {
        change(self.facts().pulls.entry(disk.0).or_default());
    }

    /// The age of the oldest among the newest points of the pulled disks, in seconds: so much would be
    /// lost of them now.
    pub(super) fn pulled_seconds(&self) -> Option<f64> {
        let record = self.record();
        let moments = record.sources.iter().filter_map(|source| match &source.source {
            Source::Pull { last, .. } => last.as_ref().map(|last| last.moment),
            _ => None,
        });
        let now = clock::wall().0;
        moments.min().map(|oldest| now.saturating_sub(oldest).max(0) as f64 / 1e6)
    }
}

impl Landing {
    /// Appends what is new in content that was read at `offset`.
    ///
    /// # Errors
    /// When nothing is appended any more.
    pub async fn content(&self, offset: u64, data: Bytes) -> Result<()> {
        let disk = self.disk;
        let (changes, bytes) = match self.held.clone() {
            Some(held) => Self::blocking(move || held.new_content(offset, &data)).await?,
            None => (changes_of(disk, offset, &data), data.len()),
        };
        self.append(changes, bytes).await
    }

    /// The same for a range that reads as zero.
    ///
    /// # Errors
    /// When nothing is appended any more.
    pub async fn zero(&self, offset: u64, length: u64) -> Result<()> {
        let extent = Extent::new(offset / SECTOR, length / SECTOR);
        let changes = match self.held.clone() {
            Some(held) => Self::blocking(move || held.new_zero(extent)).await?,
            None => vec![Change::Record(OwnedRecord::Zero(self.disk, extent))],
        };
        self.append(changes, 0).await
    }

    /// Bytes of content that were new.
    #[must_use]
    pub fn new_bytes(&self) -> u64 {
        self.new.load(Ordering::Relaxed)
    }

    /// All of the pass is in the log: its end is a point.
    ///
    /// # Errors
    /// When nothing is appended any more.
    pub async fn end(&self) -> Result<Position> {
        let mark = OwnedRecord::Mark(CheckpointId(clock::random()), MarkKind::Periodic, false);
        let mut records = vec![mark];
        if self.begun.initialized() {
            records.insert(0, OwnedRecord::ResyncEnd(self.disk));
        }
        let changes = records.into_iter().map(Change::Record).collect();
        let position = self.submit(changes, 0).await?;
        self.group.facts().last_checkpoint = Some(clock::mono());
        self.group.changed.notify_waiters();
        self.group.review();
        Ok(position)
    }

    async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T> {
        let done = tokio::task::spawn_blocking(work).await;
        done.map_err(|error| Failure::internal(format!("a task ended: {error}")))
    }

    async fn append(&self, changes: Vec<Change>, bytes: usize) -> Result<()> {
        if changes.is_empty() {
            return Ok(());
        }
        let begin = || async {
            let begin = OwnedRecord::ResyncBegin(self.disk, ResyncReason::Pass);
            self.submit(vec![Change::Record(begin)], 0).await.map(drop)
        };
        self.begun.get_or_try_init(begin).await?;
        self.submit(changes, bytes).await?;
        self.new.fetch_add(bytes as u64, Ordering::Relaxed);
        Ok(())
    }

    async fn submit(&self, changes: Vec<Change>, bytes: usize) -> Result<Position> {
        let (done, told) = oneshot::channel();
        let client = Some(self.client.clone());
        self.engine.submit_one(Op { client, changes, bytes, done: Done::Task(done) });
        let closed = |why: &str| Failure::refused(format!("group {}: {why}", self.group.name()));
        match told.await {
            Ok(Ok(position)) => Ok(position),
            Ok(Err(error)) => Err(closed(&error.0)),
            Err(_) => Err(closed("the pass is over")),
        }
    }
}

/// A moment as it is remembered.
#[must_use]
pub fn in_words(pass: &LastPass) -> String {
    clock::rfc3339(WallTime(pass.moment))
}
