//! One pass: what a server tells is to be read, is read, over several connections where it allows that,
//! and lands in the log. It refuses to know who froze the content, and what becomes of the pass.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use srn_core::ids::DiskNo;
use srn_nbd::client::{Client, ConnectOptions, Uri, dirty_bitmap};
use srn_nbd::proto::constants::BASE_ALLOCATION;
use tokio::task::JoinSet;

use super::Ended;
use super::plan::{Plan, REQUEST_MAX};
use crate::group::{CopyProgress, Group, Landing};

/// Connections to a server that says that all of them see the same.
const CONNECTIONS: usize = 4;

/// Requests under way at once, of which each is compared and appended before the next takes its place.
const REQUESTS: u64 = 16;

/// Bytes of status asked for at once: what fits a request and ends where a grain does.
const STATUS_BYTES: u64 = 1 << 30;

/// Bytes of zeros that are compared at once.
const ZERO_BYTES: u64 = 1 << 30;

/// How often a pass that waits for room looks again without a word.
const LOOK: Duration = Duration::from_millis(200);

/// A pass that waits longer for room is given up: what its server overwrites meanwhile takes room there,
/// and what changed waits as well in the bitmap, or on the server's disk.
const ROOM_PATIENCE: Duration = Duration::from_secs(30);

/// What a pass waits for, in words.
pub(super) const FOR_ROOM: &str = "room in the log, which the peer empties";

/// How often progress is told.
const TELL: Duration = Duration::from_millis(200);

/// What a pass reads, and how.
#[derive(Debug)]
pub(super) struct Reader {
    group: Arc<Group>,
    disk: DiskNo,
    size: u64,
    clients: Vec<Client>,
    began: Instant,
    told: Instant,
    /// Bytes read, and to be read.
    done: u64,
    total: u64,
    read: Arc<AtomicU64>,
}

/// Connects to the export of a disk, and makes sure that it is one of `size` bytes. `bitmap` must be
/// there, if one is named.
pub(super) async fn connect(
    uri: &Uri,
    size: u64,
    bitmap: Option<&str>,
) -> Result<Vec<Client>, Ended> {
    let mut contexts = vec![BASE_ALLOCATION.to_owned()];
    contexts.extend(bitmap.map(dirty_bitmap));
    let options = ConnectOptions { contexts, ..ConnectOptions::default() };
    let failed = |error| Ended::Failed(format!("connecting to the server: {error}"));
    let first = Client::connect(uri, &options).await.map_err(failed)?;
    let connections = if first.export().multi_conn { CONNECTIONS } else { 1 };
    let mut clients = vec![first];
    while clients.len() < connections {
        clients.push(Client::connect(uri, &options).await.map_err(failed)?);
    }
    for client in &clients {
        let found = client.export().size;
        if found != size {
            return Err(Ended::Failed(format!(
                "the disk has {found} bytes at the server and {size} bytes here; remove it and add it \
                 again"
            )));
        }
        let has = |name: &str| client.contexts().iter().any(|context| context.name == name);
        if let Some(bitmap) = bitmap.filter(|bitmap| !has(&dirty_bitmap(bitmap))) {
            return Err(Ended::Failed(format!(
                "what listens there is not the NBD server of that QEMU: it tells nothing of the bitmap \
                 {bitmap}"
            )));
        }
    }
    Ok(clients)
}

impl Reader {
    /// A reader of a disk over these connections.
    pub(super) fn new(
        group: &Arc<Group>,
        disk: DiskNo,
        size: u64,
        clients: Vec<Client>,
        read: Arc<AtomicU64>,
    ) -> Self {
        let now = Instant::now();
        let (group, told) = (group.clone(), now.checked_sub(TELL).unwrap_or(now));
        Self { group, disk, size, clients, began: now, told, done: 0, total: 0, read }
    }

    /// Reads what a bitmap marks.
    pub(super) async fn changes(
        &mut self,
        bitmap: &str,
        landing: &Arc<Landing>,
    ) -> Result<(), Ended> {
        let context = dirty_bitmap(bitmap);
        let client = self.client()?;
        let mut plan = Plan::nothing(self.size);
        let mut at = 0;
        while at < self.size {
            let told = client.dirty(&context, at, self.status_length(at)).await;
            for (length, marked) in told.map_err(asking)? {
                let end = at.saturating_add(length);
                if marked {
                    plan.mark(at..end);
                }
                at = end;
            }
        }
        self.read(&plan, landing).await
    }

    /// Reads everything that is not zero.
    ///
    /// What is told to be zero is asked a second time behind the reading. QEMU answers that question
    /// without waiting for what its guest discards at the same moment; whatever was overwritten since
    /// the moment that is read is told from the scratch by then.
    pub(super) async fn everything(&mut self, landing: &Arc<Landing>) -> Result<(), Ended> {
        let mut plan = self.allocated().await?;
        self.read(&plan, landing).await?;
        let second = self.allocated().await?.without(&plan);
        self.read(&second, landing).await?;
        plan.add(&second);
        for gap in plan.gaps(ZERO_BYTES) {
            self.room().await?;
            landing.zero(gap.start, gap.end - gap.start).await.map_err(closed)?;
        }
        Ok(())
    }

    /// Says goodbye.
    pub(super) async fn close(self) {
        for client in self.clients {
            let _ = client.disconnect().await;
        }
    }

    fn client(&self) -> Result<Client, Ended> {
        self.clients.first().cloned().ok_or_else(|| Ended::Failed("not connected".into()))
    }

    fn status_length(&self, at: u64) -> u32 {
        u32::try_from(STATUS_BYTES.min(self.size - at)).unwrap_or(u32::MAX)
    }

    /// What does not read as zero by `base:allocation`; all, where that is not told.
    async fn allocated(&self) -> Result<Plan, Ended> {
        let client = self.client()?;
        let mut plan = Plan::nothing(self.size);
        if !client.contexts().iter().any(|context| context.name == BASE_ALLOCATION) {
            plan.mark(0..self.size);
            return Ok(plan);
        }
        let mut at = 0;
        while at < self.size {
            let told = client.allocation(at, self.status_length(at)).await.map_err(asking)?;
            for extent in told {
                let end = at.saturating_add(extent.length);
                if !extent.zero {
                    plan.mark(at..end);
                }
                at = end;
            }
        }
        Ok(plan)
    }

    async fn read(&mut self, plan: &Plan, landing: &Arc<Landing>) -> Result<(), Ended> {
        self.total += plan.bytes();
        self.tell();
        let mut under_way: JoinSet<Result<u64, Ended>> = JoinSet::new();
        let taken = self.client()?.export().block_sizes.maximum;
        // A small log is not filled by what is under way.
        let most = (self.group.log_room() / 8 / REQUEST_MAX).clamp(1, REQUESTS);
        let mut clients = self.clients.clone().into_iter().cycle();
        for request in plan.requests(u64::from(taken)) {
            while under_way.len() as u64 >= most {
                self.landed(under_way.join_next().await)?;
            }
            self.room().await?;
            let Some(client) = clients.next() else { break };
            let landing = landing.clone();
            under_way.spawn(async move { one(&client, request, &landing).await });
        }
        while !under_way.is_empty() {
            self.landed(under_way.join_next().await)?;
        }
        Ok(())
    }

    fn landed(
        &mut self,
        done: Option<Result<Result<u64, Ended>, tokio::task::JoinError>>,
    ) -> Result<(), Ended> {
        let Some(done) = done else { return Ok(()) };
        let bytes = done.map_err(|error| Ended::Failed(format!("a task ended: {error}")))??;
        self.done += bytes;
        self.read.fetch_add(bytes, Ordering::Relaxed);
        if self.told.elapsed() >= TELL {
            self.tell();
        }
        Ok(())
    }

    fn tell(&mut self) {
        self.told = Instant::now();
        let rate = (self.done as f64 / self.began.elapsed().as_secs_f64().max(0.001)) as u64;
        let (done, total) = (self.done, self.total);
        self.group.copy_progress(self.disk, Some(CopyProgress { done, total, rate }));
    }

    /// Waits until the log takes more. The server does not wait.
    async fn room(&self) -> Result<(), Ended> {
        if self.group.has_room_for_pass() {
            return Ok(());
        }
        self.group.pull_status(self.disk, |status| status.waits = Some(FOR_ROOM.to_owned()));
        let began = Instant::now();
        while !self.group.has_room_for_pass() {
            self.group.check_writable().map_err(closed)?;
            if began.elapsed() > ROOM_PATIENCE {
                return Err(Ended::Closed("the log has no room for the pass".into()));
            }
            let _ = tokio::time::timeout(LOOK, self.group.changed()).await;
        }
        self.group.pull_status(self.disk, |status| status.waits = None);
        Ok(())
    }
}

/// Reads a range and appends what is new in it. Returns its length.
async fn one(client: &Client, range: Range<u64>, landing: &Landing) -> Result<u64, Ended> {
    let length = u32::try_from(range.end - range.start).unwrap_or(u32::MAX);
    let data = client.read(range.start, length).await;
    let data = data.map_err(|error| Ended::Failed(format!("reading the server: {error}")))?;
    landing.content(range.start, data).await.map_err(closed)?;
    Ok(u64::from(length))
}

fn asking(error: srn_nbd::client::ClientError) -> Ended {
    Ended::Failed(format!("asking the server what to read: {error}"))
}

fn closed(error: crate::error::Failure) -> Ended {
    Ended::Closed(error.message)
}
