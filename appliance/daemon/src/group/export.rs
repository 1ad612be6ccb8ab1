//! A group's disks as NBD exports: writable ones that feed an engine, and read-only views.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use srn_core::bytes::is_zero;
use srn_core::extent::Extent;
use srn_core::ids::DiskNo;
use srn_core::limits::{BLOCK_MAX, FRAME_PAYLOAD_MAX, SECTOR};
use srn_nbd::proto::{ErrorCode, ExportInfo, OpenError, StatusExtent};
use srn_nbd::server::{ClientInfo, ConnectionId, Export, Reply, Request};
use srn_store::StoreError;
use srn_store::group::{Change, OwnedRecord, SpanKind, Sums, View};

use super::engine::{Client, Done, Engine, Op};
use super::equal::Held;

/// Who has which writable export open.
#[derive(Debug, Default, Clone)]
pub struct Slots {
    open: Arc<Mutex<BTreeMap<String, Holders>>>,
}

/// The connections that have one export open: all of one client.
type Holders = Vec<ClientInfo>;

/// A place in [`Slots`], given up when dropped.
#[derive(Debug)]
pub struct Slot {
    slots: Slots,
    name: String,
    connection: ConnectionId,
}

impl Slots {
    /// Takes a writable export for one connection. Several connections of one client may have it
    /// open together; another client may not.
    ///
    /// # Errors
    /// [`OpenError::Busy`], naming who has it.
    pub fn take(&self, name: &str, client: &ClientInfo) -> Result<Slot, OpenError> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let holders = open.entry(name.to_owned()).or_default();
        if let Some(other) = holders.iter().find(|holder| !holder.is_same_client(client)) {
            return Err(OpenError::Busy(format!(
                "export {name} is open for writing by {other}; it takes one client at a time"
            )));
        }
        holders.push(client.clone());
        Ok(Slot { slots: self.clone(), name: name.to_owned(), connection: client.connection })
    }

    /// The connections that have exports open whose names begin with `prefix`.
    #[must_use]
    pub fn connections(&self, prefix: &str) -> Vec<ConnectionId> {
        let open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.iter()
            .filter(|(name, _)| name.starts_with(prefix))
            .flat_map(|(_, holders)| holders.iter().map(|holder| holder.connection))
            .collect()
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut open = self.slots.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(holders) = open.get_mut(&self.name) {
            holders.retain(|holder| holder.connection != self.connection);
            if holders.is_empty() {
                open.remove(&self.name);
            }
        }
    }
}

/// A writable disk, as one connection has it open.
#[derive(Debug)]
pub struct DiskExport {
    engine: Arc<Engine>,
    /// None where no copy is kept that could be read.
    view: Option<Arc<View>>,
    /// What writes are compared with, where they may bring what is here already.
    held: Option<Held>,
    disk: DiskNo,
    size: u64,
    description: String,
    client: Arc<Client>,
    slot: Mutex<Option<Slot>>,
}

impl DiskExport {
    /// A disk of `size` bytes whose writes go to `engine`, read through `view`.
    #[must_use]
    pub fn new(
        engine: Arc<Engine>,
        view: Option<Arc<View>>,
        disk: DiskNo,
        size: u64,
        description: String,
        slot: Slot,
    ) -> Self {
        Self {
            engine,
            view,
            held: None,
            disk,
            size,
            description,
            client: Arc::default(),
            slot: Mutex::new(Some(slot)),
        }
    }

    /// Leaves out what `held` has already.
    #[must_use]
    pub fn comparing(mut self, held: Option<Held>) -> Self {
        self.held = held;
        self
    }

    /// What clients are told of such an export.
    #[must_use]
    pub fn describe(size: u64, readable: bool, description: String) -> ExportInfo {
        ExportInfo {
            can_fast_zero: true,
            can_cache: false,
            // Nothing is answered before it is durable, so a flush has nothing left to do.
            multi_conn: true,
            allocation: readable,
            description,
            ..ExportInfo::writable(size)
        }
    }

    fn append(&self, changes: Vec<Change>, bytes: usize, reply: Reply) {
        let client = Some(self.client.clone());
        self.engine.submit(Op { client, changes, bytes, done: Done::Reply(reply) });
    }

    fn extent(offset: u64, length: u64) -> Extent {
        Extent::new(offset / SECTOR, length / SECTOR)
    }
}

impl Export for DiskExport {
    fn info(&self) -> ExportInfo {
        Self::describe(self.size, self.view.is_some(), self.description.clone())
    }

    fn submit(&self, request: Request, reply: Reply) {
        let changes = matches!(
            request,
            Request::Write { .. } | Request::WriteZeroes { .. } | Request::Trim { .. }
        );
        if changes && let Some(held) = self.held.as_ref().filter(|held| held.is_wanted()) {
            return held.append(self.engine.clone(), self.client.clone(), request, reply);
        }
        match request {
            Request::Write { offset, data, .. } => {
                let bytes = data.len();
                self.append(changes_of(self.disk, offset, &data), bytes, reply);
            }
            Request::WriteZeroes { offset, length, .. } => {
                let extent = Self::extent(offset, length.into());
                let change = Change::Record(OwnedRecord::Zero(self.disk, extent));
                self.append(vec![change], 0, reply);
            }
            Request::Trim { offset, length, .. } => {
                let extent = Self::extent(offset, length.into());
                let change = Change::Record(OwnedRecord::Trim(self.disk, extent));
                self.append(vec![change], 0, reply);
            }
            // Whatever was answered is durable already.
            Request::Flush | Request::Cache { .. } => reply.ok(),
            Request::Read { offset, length } => match &self.view {
                Some(view) => read(view.clone(), self.disk, offset, length, reply),
                None => reply.error(
                    ErrorCode::NotPermitted,
                    "a local cache holds no copy of the disk; read it at the recovery node",
                ),
            },
            Request::BlockStatus { offset, length, .. } => match &self.view {
                Some(view) => status(view.clone(), self.disk, offset, length, reply),
                None => reply.error(ErrorCode::NotPermitted, "a local cache holds no copy"),
            },
        }
    }

    fn gathered(&self) {
        self.engine.gathered();
    }

    fn closed(&self) {
        self.client.leave();
        *self.slot.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

/// Cuts a write into changes: pieces that fit a frame, and runs of zeros.
pub(super) fn changes_of(disk: DiskNo, offset: u64, data: &Bytes) -> Vec<Change> {
    if data.len() <= BLOCK_MAX && !is_zero(data) {
        // By far the most frequent case.
        return vec![write(disk, offset, data.clone())];
    }
    let mut changes = Vec::new();
    let mut at = 0;
    while at < data.len() {
        let block = |at: usize| data.get(at..data.len().min(at + BLOCK_MAX)).unwrap_or_default();
        let zero = is_zero(block(at));
        let mut end = at;
        // A run of blocks of the same kind; content in pieces that fit a frame.
        while end < data.len()
            && is_zero(block(end)) == zero
            && (zero || end - at < FRAME_PAYLOAD_MAX)
        {
            end += block(end).len();
        }
        let start = offset + at as u64;
        if zero {
            let extent = Extent::new(start / SECTOR, (end - at) as u64 / SECTOR);
            changes.push(Change::Record(OwnedRecord::Zero(disk, extent)));
        } else {
            changes.push(write(disk, start, data.slice(at..end)));
        }
        at = end;
    }
    changes
}

fn write(disk: DiskNo, offset: u64, data: Bytes) -> Change {
    let sums = Sums::of(&data);
    Change::Write { disk, start: offset / SECTOR, data, sums }
}

/// A disk at one position, read-only.
#[derive(Debug)]
pub struct ReadOnlyExport {
    view: Arc<View>,
    disk: DiskNo,
    size: u64,
    description: String,
}

impl ReadOnlyExport {
    /// A disk of `size` bytes as `view` shows it.
    #[must_use]
    pub const fn new(view: Arc<View>, disk: DiskNo, size: u64, description: String) -> Self {
        Self { view, disk, size, description }
    }
}

impl Export for ReadOnlyExport {
    fn info(&self) -> ExportInfo {
        ExportInfo { description: self.description.clone(), ..ExportInfo::read_only(self.size) }
    }

    fn submit(&self, request: Request, reply: Reply) {
        match request {
            Request::Read { offset, length } => {
                read(self.view.clone(), self.disk, offset, length, reply);
            }
            Request::BlockStatus { offset, length, .. } => {
                status(self.view.clone(), self.disk, offset, length, reply);
            }
            Request::Flush | Request::Cache { .. } => reply.ok(),
            Request::Write { .. } | Request::WriteZeroes { .. } | Request::Trim { .. } => {
                reply.error(ErrorCode::NotPermitted, "the export is read-only");
            }
        }
    }

    fn closed(&self) {}
}

/// Reads where waiting for the disk disturbs nobody.
fn read(view: Arc<View>, disk: DiskNo, offset: u64, length: u32, reply: Reply) {
    tokio::task::spawn_blocking(move || {
        let extent = DiskExport::extent(offset, length.into());
        let mut data = vec![0; length as usize];
        match view.read(disk, extent, &mut data) {
            Ok(()) => reply.data(data),
            Err(error) => failed(reply, &error),
        }
    });
}

fn status(view: Arc<View>, disk: DiskNo, offset: u64, length: u32, reply: Reply) {
    tokio::task::spawn_blocking(move || {
        let extent = DiskExport::extent(offset, length.into());
        match view.spans(disk, extent) {
            Ok(spans) => {
                let extents: Vec<StatusExtent> = spans
                    .into_iter()
                    .map(|(part, kind)| {
                        let (hole, zero) = match kind {
                            SpanKind::Data => (false, false),
                            SpanKind::Zero => (false, true),
                            SpanKind::Hole => (true, true),
                        };
                        StatusExtent { length: part.bytes(), hole, zero }
                    })
                    .collect();
                reply.extents(&extents);
            }
            Err(error) => failed(reply, &error),
        }
    });
}

fn failed(reply: Reply, error: &StoreError) {
    log::error!("reading for an NBD client: {error}");
    reply.error(ErrorCode::Io, &error.to_string());
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kinds(data: &[u8]) -> Vec<(u64, u64, bool)> {
        changes_of(DiskNo(0), 4096, &Bytes::copy_from_slice(data))
            .into_iter()
            .map(|change| match change {
                Change::Write { start, data, .. } => (start, data.len() as u64 / SECTOR, false),
                Change::Record(OwnedRecord::Zero(_, extent)) => {
                    (extent.start, extent.sectors, true)
                }
                other => panic!("{other:?}"),
            })
            .collect()
    }

    #[test]
    fn writes_are_cut_into_frames_and_zeros() {
        let block = |value: u8| vec![value; BLOCK_MAX];
        assert_eq!(kinds(&[1; 4096]), [(8, 8, false)]);
        assert_eq!(kinds(&[0; 4096]), [(8, 8, true)]);
        let mixed = [block(1), block(0), block(0), block(2), vec![0; 512]].concat();
        assert_eq!(
            kinds(&mixed),
            [(8, 64, false), (72, 128, true), (200, 64, false), (264, 1, true)]
        );
        let large = vec![3; FRAME_PAYLOAD_MAX * 2 + 512];
        assert_eq!(kinds(&large), [(8, 512, false), (520, 512, false), (1032, 1, false)]);
        let zeros = vec![0; FRAME_PAYLOAD_MAX * 3];
        assert_eq!(kinds(&zeros), [(8, 1536, true)]);
    }
}
