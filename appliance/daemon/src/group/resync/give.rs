//! The primary's side: sends what the secondary lacks, as the secondary grants.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use srn_core::bytes::{content_sum, is_zero};
use srn_core::epoch::Position;
use srn_core::extent::Extent;
use srn_core::frame::MarkKind;
use srn_core::ids::{CheckpointId, DiskNo, Seq};
use srn_core::limits::{BLOCK_MAX, SECTOR};
use srn_core::sender::{Carry, Sender};
use srn_core::wire::{Accept, ChangesHeader, Item, Place, Wanted, Way};
use srn_link::{FrameWriter, LinkError, Session};
use srn_store::StoreError;
use srn_store::catalog::Catalog;
use srn_store::codec::{Codecs, Effort};
use srn_store::group::{Changed, Delta, Group as Store, OwnedRecord, SpanKind, View};
use tokio::sync::{Notify, mpsc};

use super::{Running, compare};
use crate::clock;
use crate::error::Failure;
use crate::group::Group;
use crate::group::effort::EffortControl;
use crate::group::outgoing::lock;

/// Content read and encoded in one go, in bytes.
const BATCH_BYTES: usize = 1 << 20;

/// Disk whose spans are asked for at once, in sectors: 64 MiB.
const SPAN_SECTORS: u64 = (64 << 20) / SECTOR;

/// What is given: from where to where, and what it is read from. It holds on to both.
#[derive(Debug)]
pub(in crate::group) struct Given {
    pub(super) from: Position,
    pub(super) to: Position,
    pub(super) way: Way,
    /// Bytes that are gone through.
    pub(super) total: u64,
    pub(super) catalog: Catalog,
    source: Source,
}

#[derive(Debug)]
enum Source {
    Delta(Box<Mutex<Delta>>),
    View(Arc<View>),
}

/// Sends it.
pub(in crate::group) struct Giver {
    pub(in crate::group) group: Arc<Group>,
    pub(in crate::group) session: Session,
    pub(in crate::group) sender: Arc<Mutex<Sender>>,
    pub(in crate::group) wake: Arc<Notify>,
    pub(in crate::group) wanted: mpsc::Receiver<Wanted>,
}

/// Why it ended early.
#[derive(Debug, thiserror::Error)]
pub(super) enum GiveError {
    #[error("{0}")]
    Link(#[from] LinkError),
    #[error("{0}")]
    Store(#[from] StoreError),
    #[error("{}", .0.message)]
    Other(Failure),
}

impl From<Failure> for GiveError {
    fn from(failure: Failure) -> Self {
        Self::Other(failure)
    }
}

impl From<tokio::task::JoinError> for GiveError {
    fn from(error: tokio::task::JoinError) -> Self {
        Self::Other(Failure::internal(format!("a task ended: {error}")))
    }
}

impl Given {
    /// Decides how, and takes hold of what is read.
    fn prepare(store: &Arc<Store>, carry: &Carry) -> srn_store::Result<Self> {
        let from = carry.from;
        if carry.is_proven {
            match store.delta(from.seq) {
                Ok(delta) => {
                    let catalog = delta.to().catalog.clone();
                    let total = delta.content_bytes()?;
                    let source = Source::Delta(Box::new(Mutex::new(delta)));
                    return Ok(Self {
                        from,
                        to: catalog.at,
                        way: Way::Changed,
                        total,
                        catalog,
                        source,
                    });
                }
                // Nobody knows any more what changed.
                Err(StoreError::NotInHistory(_)) => {}
                Err(error) => return Err(error),
            }
        }
        let view = store.view_at(store.head().seq)?;
        let catalog = view.catalog();
        let way = if from.seq == Seq::ZERO && carry.is_proven { Way::All } else { Way::Compared };
        let mut total = 0;
        for (no, disk) in &catalog.disks {
            let whole = Extent::new(0, disk.sectors);
            total += if way == Way::All { content_of(&view, *no, whole)? } else { whole.bytes() };
        }
        let source = Source::View(Arc::new(view));
        Ok(Self { from, to: catalog.at, way, total, catalog, source })
    }

    fn reader(&self, begin: Place) -> srn_store::Result<Reader> {
        Ok(match &self.source {
            Source::Delta(delta) => {
                let delta = delta.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                Reader::Delta(delta.again_from(begin.disk, begin.sector)?)
            }
            Source::View(view) => Reader::View {
                view: view.clone(),
                disks: self
                    .catalog
                    .disks
                    .iter()
                    .filter(|(no, _)| **no >= begin.disk)
                    .map(|(no, disk)| (*no, disk.sectors))
                    .collect(),
                at: begin,
                spans: VecDeque::new(),
            },
        })
    }
}

/// Bytes of an extent that are stored as content.
fn content_of(view: &View, disk: DiskNo, whole: Extent) -> srn_store::Result<u64> {
    let (mut at, mut bytes) = (whole.start, 0);
    while at < whole.end() {
        for (span, kind) in view.spans(disk, Extent::new(at, whole.end() - at))? {
            bytes += if kind == SpanKind::Data { span.bytes() } else { 0 };
            at = span.end();
        }
    }
    Ok(bytes)
}

/// Reads what is to be sent, in order.
enum Reader {
    Delta(Delta),
    View { view: Arc<View>, disks: VecDeque<(DiskNo, u64)>, at: Place, spans: VecDeque<Extent> },
}

impl Reader {
    fn next(&mut self) -> srn_store::Result<Option<(DiskNo, Extent, Changed)>> {
        match self {
            Self::Delta(delta) => delta.next(),
            Self::View { view, disks, at, spans } => loop {
                let Some((disk, sectors)) = disks.front().copied() else { return Ok(None) };
                if let Some(span) = spans.front_mut() {
                    let most = BLOCK_MAX as u64 / SECTOR;
                    let extent = Extent::new(span.start, span.sectors.min(most));
                    *span = Extent::new(extent.end(), span.end() - extent.end());
                    if span.sectors == 0 {
                        spans.pop_front();
                    }
                    let mut content = vec![0; usize::try_from(extent.bytes()).unwrap_or(0)];
                    view.read(disk, extent, &mut content)?;
                    if !is_zero(&content) {
                        return Ok(Some((disk, extent, Changed::Content(content))));
                    }
                    continue;
                }
                let from = if at.disk == disk { at.sector } else { 0 };
                if from >= sectors {
                    disks.pop_front();
                    continue;
                }
                let asked = Extent::new(from, SPAN_SECTORS.min(sectors - from));
                let found = view.spans(disk, asked)?;
                let end = found.last().map_or_else(|| asked.end(), |(span, _)| span.end());
                let is_data = |found: &(Extent, SpanKind)| found.1 == SpanKind::Data;
                spans.extend(found.into_iter().filter(is_data).map(|(span, _)| span));
                *at = Place { disk, sector: end };
            },
        }
    }

    /// The next items, encoded; none behind the last. With each its bytes of content.
    fn batch(&mut self, codecs: &mut Codecs, effort: Effort) -> srn_store::Result<Vec<Encoded>> {
        let mut batch = Vec::new();
        let mut bytes = 0;
        while bytes < BATCH_BYTES && batch.len() < 4096 {
            let Some((disk, extent, changed)) = self.next()? else { break };
            let (item, content) = match changed {
                Changed::Zero { trim } => (Item::Zero { disk, extent, trim }, 0),
                Changed::Content(content) => {
                    let len = content.len();
                    (encode(codecs, effort, disk, extent, &content), len)
                }
            };
            bytes += content;
            batch.push(Encoded { bytes: item.encode().into(), content: content as u64 });
        }
        Ok(batch)
    }
}

/// An item ready to be sent.
pub(super) struct Encoded {
    pub(super) bytes: Bytes,
    /// Its content in bytes.
    pub(super) content: u64,
}

/// Content as an item.
pub(super) fn encode(
    codecs: &mut Codecs,
    effort: Effort,
    disk: DiskNo,
    extent: Extent,
    content: &[u8],
) -> Item {
    let mut stored = Vec::with_capacity(content.len());
    let how = codecs.encode(effort, content, &mut stored);
    Item::Content { disk, extent, codec: how.codec, sum: content_sum(content), stored }
}

impl Giver {
    pub(in crate::group) async fn run(mut self, carry: Carry, accept: Accept) {
        let name = self.group.name();
        match self.give(&carry, &accept).await {
            // The answer is the acknowledgement of the frame to which it led.
            Ok(()) => return,
            // The session's end is told by the session; the peer may also have ended this stream.
            Err(GiveError::Link(error)) => log::debug!("group {name}: resync: {error}"),
            Err(GiveError::Store(
                error
                @ (StoreError::Full(_) | StoreError::NotInHistory(_) | StoreError::Corrupt(_)),
            )) => {
                let mend = if matches!(error, StoreError::Corrupt(_)) {
                    format!("; find and repair it: srn scrub {name}")
                } else {
                    String::new()
                };
                self.group.resync_failed(format!("resync: {error}{mend}"));
            }
            Err(GiveError::Store(error)) => self.group.cannot_send(&error.to_string()),
            Err(GiveError::Other(failure)) => {
                self.group.resync_failed(format!("resync: {}", failure.message));
            }
        }
        // It must not look as if it went on.
        lock(&self.sender).on_link_down();
        self.group.review();
    }

    async fn give(&mut self, carry: &Carry, accept: &Accept) -> Result<(), GiveError> {
        let (given, begin) = self.prepare(carry, accept).await?;
        lock(&self.sender).on_carry(given.to.seq);
        let before = if begin == Place::START { 0 } else { done_before(&given, begin) };
        let running = Running::begin(&self.group, given.way, given.total, before);
        log::info!(
            "group {}: {} from frame {} to {}, {} bytes to go through",
            self.group.name(),
            super::cause_of(given.way).words(),
            given.from.seq,
            given.to.seq,
            given.total - before
        );
        self.group.resync_goes_on();
        let catalog = given.catalog.encode();
        let header = ChangesHeader {
            group: self.group.id,
            nonce: carry.nonce,
            way: given.way,
            catalog_len: u32::try_from(catalog.len()).unwrap_or(u32::MAX),
            total: given.total,
            begin,
        };
        let mut writer = self.session.open_changes(&header, &catalog).await?;
        match (&given.source, given.way) {
            (Source::View(view), Way::Compared) => {
                compare::give(self, &mut writer, view, &given, begin, &running).await?;
            }
            _ => self.send_all(&mut writer, given.reader(begin)?, &running).await?,
        }
        self.send(&mut writer, &Encoded { bytes: Item::End.encode().into(), content: 0 }).await?;
        writer.finish();
        if let Some((held, used)) = &mut *self.group.resync.given()
            && Arc::ptr_eq(held, &given)
        {
            *used = clock::mono();
        }
        // Until it is acknowledged, or the session ends: to be seen meanwhile.
        std::future::pending::<()>().await;
        Ok(())
    }

    /// What is given: what was before, if the peer has the first part of it, else something new.
    async fn prepare(
        &self,
        carry: &Carry,
        accept: &Accept,
    ) -> Result<(Arc<Given>, Place), GiveError> {
        let held = self.group.resync.given().as_ref().map(|(given, _)| given.clone());
        if let Some((given, under)) = held.zip(accept.under)
            && given.to == under.to
            && given.from == carry.from
            && (given.way == Way::Compared || carry.is_proven)
        {
            return Ok((given, under.next));
        }
        drop(self.group.resync.given().take());
        if self.group.store.head().seq == carry.from.seq {
            // It leads forward.
            let mark = OwnedRecord::Mark(CheckpointId(clock::random()), MarkKind::Manual, false);
            self.group.append_now(vec![mark]).await?;
        }
        self.group.engine().close_segment().await;
        self.group.merge_log_first(carry.from.seq).await;
        let (store, carry) = (self.group.store.clone(), *carry);
        let given = tokio::task::spawn_blocking(move || Given::prepare(&store, &carry)).await??;
        let given = Arc::new(given);
        *self.group.resync.given() = Some((given.clone(), clock::mono()));
        // From here on only what lies behind that has to stay in the log.
        self.group.maintainer.wake();
        Ok((given, Place::START))
    }

    async fn send_all(
        &self,
        writer: &mut FrameWriter,
        reader: Reader,
        running: &Running,
    ) -> Result<(), GiveError> {
        let mut control = EffortControl::default();
        let mut reading = read(reader, Codecs::new(), control.effort());
        loop {
            let (batch, reader, codecs) = reading.await??;
            if batch.is_empty() {
                return Ok(());
            }
            // The following ones are read while these are sent.
            reading = read(reader, codecs, control.effort());
            let began = Instant::now();
            let mut content = 0;
            for encoded in &batch {
                self.send(writer, encoded).await?;
                content += encoded.content;
                running.done(encoded.content);
            }
            let us = u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX);
            control.sent(content, us);
        }
    }

    /// Sends an item once it is granted.
    pub(super) async fn send(
        &self,
        writer: &mut FrameWriter,
        item: &Encoded,
    ) -> Result<(), LinkError> {
        while !lock(&self.sender).may_carry() {
            self.wake.notified().await;
        }
        let (_, weight) = self.group.share();
        writer.set_share(srn_link::Traffic::Bulk, weight);
        let wire = item.bytes.len() as u64;
        lock(&self.sender).on_carried(wire);
        writer.write(&mut [item.bytes.clone()]).await?;
        let counters = &self.group.counters;
        counters.content_sent.fetch_add(item.content, Ordering::Relaxed);
        counters.wire_sent.fetch_add(wire, Ordering::Relaxed);
        Ok(())
    }
}

/// Bytes that were gone through before a place, as far as that can be told.
fn done_before(given: &Given, begin: Place) -> u64 {
    let disks = given.catalog.disks.iter();
    let before: u64 = disks.filter(|(no, _)| **no < begin.disk).map(|(_, d)| d.sectors).sum();
    match given.way {
        Way::Compared => ((before + begin.sector) * SECTOR).min(given.total),
        // Where the content lies is not told.
        Way::Changed | Way::All => 0,
    }
}

type Read = srn_store::Result<(Vec<Encoded>, Reader, Codecs)>;

fn read(mut reader: Reader, mut codecs: Codecs, effort: Effort) -> tokio::task::JoinHandle<Read> {
    tokio::task::spawn_blocking(move || {
        let batch = reader.batch(&mut codecs, effort)?;
        Ok((batch, reader, codecs))
    })
}

/// A flag that is raised until this is dropped: also when whoever waits is cut off.
struct Raised<'a>(&'a AtomicBool);

impl<'a> Raised<'a> {
    fn new(flag: &'a AtomicBool) -> Self {
        flag.store(true, Ordering::SeqCst);
        Self(flag)
    }
}

impl Drop for Raised<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::SeqCst);
    }
}

/// How long the log may take to be merged before something is given.
const MERGE_PATIENCE: Duration = Duration::from_secs(60);

impl Group {
    /// What is given holds on to all that it is read from. Where the log is short of room its segments
    /// are merged first, or new writes would find none for as long as that takes.
    async fn merge_log_first(&self, from: Seq) {
        if !self.may_track() || self.log_fill() < 0.25 {
            return;
        }
        let _merging = Raised::new(&self.resync.merging);
        let began = Instant::now();
        let mut least = u64::MAX;
        let mut since = began;
        loop {
            let left = self.store.log_bytes_behind(from);
            if left < least {
                (least, since) = (left, Instant::now());
            }
            let done = left <= 2 * self.context.config().segment_bytes;
            let stuck = since.elapsed() > Duration::from_secs(5);
            if done || stuck || began.elapsed() > MERGE_PATIENCE {
                break;
            }
            self.maintainer.wake();
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// What is being given to the peer: the frame that it goes out from, if that is to be told apart,
    /// and the one to which it leads. Frames up to that one need not stay in the log.
    pub(in crate::group) fn giving(&self) -> Option<(Option<Seq>, Seq)> {
        self.resync.given().as_ref().map(|(given, _)| {
            let from = (given.way == Way::Changed).then_some(given.from.seq);
            (from, given.to.seq)
        })
    }

    /// Nothing is given any more.
    pub(in crate::group) fn gives_nothing(&self) {
        let gone = self.resync.given().take();
        drop(gone);
    }

    /// The peer has all of it.
    pub(in crate::group) fn has_given(&self, seq: Seq) {
        let mut given = self.resync.given();
        if given.as_ref().is_some_and(|(given, _)| given.to.seq <= seq) {
            let gone = given.take();
            drop(given);
            drop(gone);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The log would be merged for ever, under a stream that still needs its frames.
    #[tokio::test]
    async fn a_wait_that_is_cut_off_leaves_no_flag_raised() {
        let flag = AtomicBool::new(false);
        let waiting = async {
            let _raised = Raised::new(&flag);
            std::future::pending::<()>().await;
        };
        let cut = tokio::time::timeout(Duration::from_millis(1), waiting).await;
        assert!(cut.is_err() && !flag.load(Ordering::SeqCst));
    }
}
