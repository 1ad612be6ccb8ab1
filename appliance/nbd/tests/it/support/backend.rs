//! Backends to test and to measure with: a sparse memory, and nothing at all.
//!
//! Either answers within `submit`, or from an operating system thread of its own, many at a time,
//! or when the test says so.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use bytes::{Bytes, BytesMut};
use srn_nbd::proto::{ErrorCode, ExportInfo, ExportSummary, OpenError, StatusExtent};
use srn_nbd::server::{
    Backend, ClientInfo, Export, ReadChunk, ReadData, Reply, ReplyBatch, Request,
};

/// A medium: carries out requests, knows nothing of connections.
pub(crate) trait Medium: Send + Sync + 'static {
    /// Carries out one request.
    fn run(&self, request: Request) -> Answer;
}

/// What came of a request.
#[derive(Debug)]
pub(crate) enum Answer {
    /// Done.
    Done,
    /// What was read.
    Data(ReadData),
    /// The status of a range.
    Extents(Vec<StatusExtent>),
}

impl Answer {
    /// Completes `reply` and sends it.
    pub(crate) fn send(self, reply: Reply) {
        match self {
            Self::Done => reply.ok(),
            Self::Data(data) => reply.data(data),
            Self::Extents(extents) => reply.extents(&extents),
        }
    }

    /// Completes `reply` as part of a batch.
    pub(crate) fn add(self, reply: Reply, batch: &mut ReplyBatch) {
        match self {
            Self::Done => batch.ok(reply),
            Self::Data(data) => batch.data(reply, data),
            Self::Extents(extents) => batch.extents(reply, &extents),
        }
    }
}

/// Forgets what is written, reads zeroes.
#[derive(Debug, Default)]
pub(crate) struct Null;

impl Medium for Null {
    fn run(&self, request: Request) -> Answer {
        match request {
            Request::Read { length, .. } => {
                // Spelled out, as if it had been read from somewhere.
                static ZEROES: [u8; 32 << 20] = [0; 32 << 20];
                Answer::Data(Bytes::from_static(&ZEROES[..length as usize]).into())
            }
            Request::BlockStatus { length, .. } => {
                Answer::Extents(vec![StatusExtent::data(u64::from(length))])
            }
            _ => Answer::Done,
        }
    }
}

/// Bytes of one cell of a sparse memory.
const CELL: usize = 64 << 10;

/// A sparse memory.
#[derive(Debug)]
pub(crate) struct Memory {
    cells: Vec<Mutex<Option<Box<[u8]>>>>,
    flushes: AtomicUsize,
}

impl Memory {
    /// A memory of `size` bytes, all hole.
    pub(crate) fn new(size: u64) -> Self {
        let cells = usize::try_from(size).unwrap().div_ceil(CELL);
        Self { cells: (0..cells).map(|_| Mutex::new(None)).collect(), flushes: AtomicUsize::new(0) }
    }

    /// How many flushes there were.
    pub(crate) fn flushes(&self) -> usize {
        self.flushes.load(Ordering::SeqCst)
    }

    /// All content of a range.
    pub(crate) fn contents(&self, offset: u64, length: usize) -> Vec<u8> {
        let mut all = vec![0; length];
        self.each_cell(offset, length, |position, start, end, cell| {
            if let Some(cell) = cell {
                all[position..position + end - start].copy_from_slice(&cell[start..end]);
            }
        });
        all
    }

    /// Fills a range from outside.
    pub(crate) fn fill(&self, offset: u64, data: &[u8]) {
        self.each_cell(offset, data.len(), |position, start, end, cell| {
            let cell = cell.get_or_insert_with(|| vec![0; CELL].into_boxed_slice());
            cell[start..end].copy_from_slice(&data[position..position + end - start]);
        });
    }

    /// Calls `act` with the position in the range, start and end in the cell, and the cell.
    fn each_cell(
        &self,
        offset: u64,
        length: usize,
        mut act: impl FnMut(usize, usize, usize, &mut Option<Box<[u8]>>),
    ) {
        let mut position = 0;
        let offset = usize::try_from(offset).unwrap();
        while position < length {
            let at = offset + position;
            let (index, start) = (at / CELL, at % CELL);
            let end = CELL.min(start + length - position);
            let mut cell = self.cells[index].lock().unwrap_or_else(PoisonError::into_inner);
            act(position, start, end, &mut cell);
            position += end - start;
        }
    }

    fn read(&self, offset: u64, length: u32) -> ReadData {
        let mut chunks = Vec::new();
        self.each_cell(offset, length as usize, |_, start, end, cell| {
            chunks.push(match cell {
                Some(cell) => ReadChunk::Data(Bytes::copy_from_slice(&cell[start..end])),
                None => ReadChunk::Hole((end - start) as u32),
            });
        });
        if chunks.len() == 1 { chunks.remove(0).into() } else { chunks.into() }
    }

    fn zero(&self, offset: u64, length: u32, keep: bool) {
        self.each_cell(offset, length as usize, |_, start, end, cell| {
            if keep {
                cell.get_or_insert_with(|| vec![0; CELL].into_boxed_slice())[start..end].fill(0);
            } else if end - start == CELL {
                *cell = None;
            } else if let Some(cell) = cell {
                cell[start..end].fill(0);
            }
        });
    }

    fn status(&self, offset: u64, length: u32) -> Vec<StatusExtent> {
        let mut extents = Vec::new();
        self.each_cell(offset, length as usize, |_, start, end, cell| {
            let length = (end - start) as u64;
            extents.push(match cell {
                Some(_) => StatusExtent::data(length),
                None => StatusExtent::hole(length),
            });
        });
        extents
    }
}

impl Medium for Memory {
    fn run(&self, request: Request) -> Answer {
        match request {
            Request::Read { offset, length } => return Answer::Data(self.read(offset, length)),
            Request::Write { offset, data, .. } => self.fill(offset, &data),
            Request::WriteZeroes { offset, length, no_hole, .. } => {
                self.zero(offset, length, no_hole);
            }
            Request::Trim { offset, length, .. } => self.zero(offset, length, false),
            Request::Flush => {
                self.flushes.fetch_add(1, Ordering::SeqCst);
            }
            Request::Cache { .. } => {}
            Request::BlockStatus { offset, length, .. } => {
                return Answer::Extents(self.status(offset, length));
            }
        }
        Answer::Done
    }
}

/// Who answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Completion {
    /// The thread that submits, before it goes on.
    Inline,
    /// A thread of the export, many requests at a time.
    Thread,
}

/// A backend with some named exports.
#[derive(Default)]
pub(crate) struct Exports {
    exports: BTreeMap<String, Entry>,
    /// How many connections were opened.
    pub(crate) opened: AtomicUsize,
    /// How often an export was told that its connection is gone.
    pub(crate) closed: Arc<AtomicUsize>,
}

struct Entry {
    info: ExportInfo,
    service: Service,
}

#[derive(Clone)]
enum Service {
    Inline(Arc<dyn Medium>),
    Thread(Arc<Worker>),
    Held(Arc<Held>),
    Refused(OpenError),
}

impl Exports {
    /// Adds an export of a medium.
    #[must_use]
    pub(crate) fn with(
        self,
        name: &str,
        info: ExportInfo,
        medium: Arc<dyn Medium>,
        completion: Completion,
    ) -> Self {
        let service = match completion {
            Completion::Inline => Service::Inline(medium),
            Completion::Thread => Service::Thread(Worker::start(medium)),
        };
        self.insert(name, info, service)
    }

    /// Adds an export whose requests wait for the test.
    #[must_use]
    pub(crate) fn with_held(self, name: &str, info: ExportInfo, held: &Arc<Held>) -> Self {
        self.insert(name, info, Service::Held(Arc::clone(held)))
    }

    /// Adds an export nobody gets.
    #[must_use]
    pub(crate) fn with_refused(self, name: &str, error: OpenError) -> Self {
        self.insert(name, ExportInfo::writable(0), Service::Refused(error))
    }

    fn insert(mut self, name: &str, info: ExportInfo, service: Service) -> Self {
        self.exports.insert(name.to_owned(), Entry { info, service });
        self
    }

    fn find(&self, name: &str) -> Result<&Entry, OpenError> {
        let entry = self.exports.get(name).ok_or(OpenError::NotFound)?;
        match &entry.service {
            Service::Refused(error) => Err(error.clone()),
            _ => Ok(entry),
        }
    }
}

impl Backend for Exports {
    fn list(&self, _: &ClientInfo) -> Vec<ExportSummary> {
        let summary = |(name, entry): (&String, &Entry)| ExportSummary {
            name: name.clone(),
            description: entry.info.description.clone(),
        };
        let known = |(_, entry): &(&String, &Entry)| !matches!(entry.service, Service::Refused(_));
        self.exports.iter().filter(known).map(summary).collect()
    }

    fn describe(&self, name: &str, _: &ClientInfo) -> Result<ExportInfo, OpenError> {
        Ok(self.find(name)?.info.clone())
    }

    async fn open(&self, name: &str, _: &ClientInfo) -> Result<Arc<dyn Export>, OpenError> {
        let entry = self.find(name)?;
        self.opened.fetch_add(1, Ordering::SeqCst);
        Ok(Arc::new(Opened {
            info: entry.info.clone(),
            service: entry.service.clone(),
            closed: Arc::clone(&self.closed),
        }))
    }
}

struct Opened {
    info: ExportInfo,
    service: Service,
    closed: Arc<AtomicUsize>,
}

impl Export for Opened {
    fn info(&self) -> ExportInfo {
        self.info.clone()
    }

    fn submit(&self, request: Request, reply: Reply) {
        match &self.service {
            Service::Inline(medium) => medium.run(request).send(reply),
            Service::Thread(worker) => worker.push(request, reply),
            Service::Held(held) => held.push(request, reply),
            Service::Refused(error) => reply.error(ErrorCode::Io, &error.to_string()),
        }
    }

    fn closed(&self) {
        self.closed.fetch_add(1, Ordering::SeqCst);
    }
}

/// Requests that wait until a test takes them.
#[derive(Default)]
pub(crate) struct Held {
    queue: Mutex<Vec<(Request, Reply)>>,
}

impl Held {
    fn push(&self, request: Request, reply: Reply) {
        self.queue.lock().unwrap().push((request, reply));
    }

    /// How many wait.
    pub(crate) fn waiting(&self) -> usize {
        self.queue.lock().unwrap().len()
    }

    /// Takes all that wait, in order of arrival.
    pub(crate) fn take(&self) -> Vec<(Request, Reply)> {
        std::mem::take(&mut *self.queue.lock().unwrap())
    }
}

/// A thread that carries out requests. Bounded by what the server lets be in flight.
struct Worker {
    queue: Mutex<Vec<(Request, Reply)>>,
    filled: Condvar,
}

impl Worker {
    fn start(medium: Arc<dyn Medium>) -> Arc<Self> {
        let worker = Arc::new(Self { queue: Mutex::default(), filled: Condvar::new() });
        let weak = Arc::downgrade(&worker);
        std::thread::spawn(move || {
            let mut batch = ReplyBatch::new();
            let mut taken = Vec::new();
            while let Some(worker) = weak.upgrade() {
                worker.take(&mut taken);
                for (request, reply) in taken.drain(..) {
                    medium.run(request).add(reply, &mut batch);
                }
                batch.send();
            }
        });
        worker
    }

    fn push(&self, request: Request, reply: Reply) {
        let mut queue = self.queue.lock().unwrap();
        queue.push((request, reply));
        if queue.len() == 1 {
            self.filled.notify_one();
        }
    }

    fn take(&self, taken: &mut Vec<(Request, Reply)>) {
        let queue = self.queue.lock().unwrap();
        let patience = std::time::Duration::from_millis(100);
        let (mut queue, _) =
            self.filled.wait_timeout_while(queue, patience, |queue| queue.is_empty()).unwrap();
        std::mem::swap(&mut *queue, taken);
    }
}

/// Pattern bytes that tell their place and who wrote them.
pub(crate) fn pattern(seed: u64, offset: u64, length: usize) -> Bytes {
    let mut bytes = BytesMut::with_capacity(length + 8);
    let mut word = offset / 8;
    while bytes.len() < length {
        let mixed = (word ^ seed).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(31);
        bytes.extend_from_slice(&mixed.to_le_bytes());
        word += 1;
    }
    bytes.truncate(length);
    bytes.freeze()
}
