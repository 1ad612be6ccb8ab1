//! The secondary's side: takes in what comes in place of frames, and is at the later frame when all of
//! it is durable.

use std::collections::VecDeque;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use srn_core::bytes::{Reader, content_sum};
use srn_core::epoch::EpochTable;
use srn_core::extent::Extent;
use srn_core::ids::DiskNo;
use srn_core::limits::{BLOCK_MAX, PAGE_SECTORS, SECTOR};
use srn_core::name::Name;
use srn_core::receiver::{PeerFault, Receiver};
use srn_core::state::Cause;
use srn_core::wire::{
    Grain, HashRun, Item, LeafPages, Message, Place, RefuseCode, Under, Wanted, Way,
};
use srn_link::{Changes, LinkError, Session};
use srn_store::StoreError;
use srn_store::catalog::Catalog;
use srn_store::codec::{Codecs, Effort};
use srn_store::group::{GrainHash, Leap, LeapTo, View};
use srn_store::manifest::Role;
use tokio::sync::mpsc;

use super::{Running, Seeds};
use crate::clock;
use crate::error::{Failure, Result};
use crate::fleet::Level;
use crate::group::Group;
use crate::group::integrity::from_runs;

/// Content read for hashes here in one go, in bytes.
const READ_MAX: u64 = 16 << 20;

/// What has been taken in and is not whole.
#[derive(Debug)]
pub(in crate::group) struct Taken {
    leap: Leap,
    way: Way,
    done: u64,
    /// Everything before has been compared.
    settled: Place,
}

impl Taken {
    /// Where it can go on.
    fn next(&self) -> Place {
        let (disk, sector) = self.leap.next();
        match self.way {
            Way::Changed | Way::All => Place { disk, sector },
            Way::Compared => self.settled,
        }
    }
}

/// Why it ended early.
#[derive(Debug)]
enum TakeError {
    /// The peer's fault.
    Peer(String),
    Store(StoreError),
    /// Ours, or a person's.
    Other(Failure),
    /// The session is gone.
    Gone,
}

impl From<StoreError> for TakeError {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Invalid(why) => Self::Peer(why),
            other => Self::Store(other),
        }
    }
}

impl From<Failure> for TakeError {
    fn from(failure: Failure) -> Self {
        Self::Other(failure)
    }
}

/// Takes in one stream of changes.
pub(in crate::group) struct Taker {
    pub(in crate::group) group: Arc<Group>,
    pub(in crate::group) session: Session,
    pub(in crate::group) receiver: Arc<Mutex<Receiver>>,
    pub(in crate::group) epochs: EpochTable,
    pub(in crate::group) catalog: Catalog,
}

/// The catalog in a stream's header, if it can be believed.
pub(in crate::group) fn catalog_of(bytes: &[u8]) -> std::result::Result<Catalog, String> {
    let mut reader = Reader::new(bytes);
    let catalog = match Catalog::decode(&mut reader) {
        Ok(Some(catalog)) if reader.is_empty() => catalog,
        _ => return Err("a catalog that is none".into()),
    };
    for (no, disk) in &catalog.disks {
        // What a peer says is shown on terminals and in logs.
        if *no >= DiskNo(catalog.next_disk) || disk.name.parse::<Name>().is_err() {
            return Err(format!("a catalog with disk {no} out of range"));
        }
    }
    Ok(catalog)
}

impl Taker {
    pub(in crate::group) async fn run(self, changes: Changes) {
        let name = self.group.name();
        let receiver = self.receiver.clone();
        let group = self.group.clone();
        let session = self.session.clone();
        match self.take(changes).await {
            Ok(()) => {}
            Err(TakeError::Gone) => log::debug!("group {name}: resync: the session is gone"),
            Err(TakeError::Peer(why)) => {
                let text = format!("what the production node sends is not sound: {why}");
                group.tell(Level::Alert, &text);
                session.misbehaved(&why);
            }
            Err(TakeError::Store(error)) => {
                let text = if matches!(error, StoreError::Full(_)) {
                    format!("resync: {error}; {}", make_room(&name))
                } else {
                    format!("resync: {error}")
                };
                group.resync_failed(text.clone());
                if matches!(error, StoreError::Io { .. } | StoreError::Stopped(_)) {
                    group.facts().failure = Some((Cause::DiskFailed, text.clone()));
                }
                let _ = session.send(&group.refuse(RefuseCode::Storage, text)).await;
            }
            Err(TakeError::Other(failure)) => {
                let text = format!("resync: {}", failure.message);
                group.resync_failed(text.clone());
                let _ = session.send(&group.refuse(RefuseCode::Storage, text)).await;
            }
        }
        // It must not look as if it went on.
        receiver.lock().unwrap_or_else(PoisonError::into_inner).on_link_down();
        group.review();
    }

    async fn take(self, changes: Changes) -> std::result::Result<(), TakeError> {
        let Changes { header, mut reader, .. } = changes;
        let busy = self.group.resync.busy.clone().lock_owned().await;
        self.group.resync.stop.store(false, Ordering::SeqCst);
        let taken = self.begin(header.way, header.total, header.begin).await?;
        let seeds = match header.way {
            Way::Compared => self.group.open_seeds(&self.catalog).await?,
            Way::Changed | Way::All => Seeds::default(),
        };
        let running = Running::begin(&self.group, header.way, header.total, taken.done);
        let (items, queue) = mpsc::channel(QUEUED_MAX);
        let work = Work {
            group: self.group.clone(),
            session: self.session.clone(),
            receiver: self.receiver.clone(),
            nonce: header.nonce,
            codecs: Codecs::new(),
            seeds,
            here: None,
            told: taken.settled,
            batches: VecDeque::new(),
            running,
            taken: Some(taken),
            _busy: busy,
        };
        let worker = tokio::task::spawn_blocking(move || work.run(queue));
        let receiving = async {
            loop {
                // Bounded by credit too.
                let (item, wire) = reader.next().await?;
                let taken = self.lock().on_change(wire);
                match taken {
                    Ok(()) => {}
                    // The stream was ended here.
                    Err(PeerFault::UnexpectedStream) => return Ok(()),
                    Err(fault) => return Err(LinkError::Misbehaved(fault.to_string())),
                }
                self.group.counters.wire_received.fetch_add(wire, Ordering::Relaxed);
                let last = item == Item::End;
                if items.send((item, wire)).await.is_err() || last {
                    return Ok(());
                }
            }
        };
        let received: std::result::Result<(), LinkError> = receiving.await;
        drop(items);
        let worked = worker.await.map_err(|_| TakeError::Gone)?;
        let taken = worked?;
        match received {
            Ok(()) => {}
            Err(LinkError::Misbehaved(why)) => return Err(TakeError::Peer(why)),
            Err(_) => return Err(TakeError::Gone),
        }
        let Some(taken) = taken else { return Err(TakeError::Gone) };
        // Whatever becomes of this task, it is not left halfway.
        let finishing = tokio::spawn(self.finish(taken));
        finishing.await.map_err(|_| TakeError::Gone)?
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Receiver> {
        self.receiver.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What was taken in before, if this goes on with it, or something new.
    async fn begin(
        &self,
        way: Way,
        total: u64,
        begin: Place,
    ) -> std::result::Result<Taken, TakeError> {
        let held = self.group.resync.taken().take().map(|(taken, _)| taken);
        let goes_on = |taken: &Taken| {
            begin != Place::START
                && taken.leap.to() == self.catalog.at
                && taken.way == way
                && taken.next() == begin
        };
        if let Some(taken) = held.filter(goes_on) {
            return Ok(taken);
        }
        if begin != Place::START {
            return Err(TakeError::Peer("goes on with what was not begun".into()));
        }
        let name = self.group.name();
        self.group.engine().close_segment().await;
        let store = self.group.store.clone();
        let to = LeapTo { epochs: self.epochs.clone(), catalog: self.catalog.clone() };
        let leap = tokio::task::spawn_blocking(move || store.begin_leap(to, Effort::Lz4)).await;
        let leap = leap.map_err(|_| TakeError::Gone)??;
        let room = leap.room();
        if way != Way::Compared && total > room {
            return Err(Failure::refused(format!(
                "what changed at the production node is {} MiB, and {} MiB are free for it here; {}",
                total >> 20,
                room >> 20,
                make_room(&name)
            ))
            .into());
        }
        Ok(Taken { leap, way, done: 0, settled: Place::START })
    }

    /// Everything has come: this node is at the later frame, durably.
    async fn finish(self, taken: Taken) -> std::result::Result<(), TakeError> {
        // No offer is judged meanwhile, and nobody takes over.
        let _held = self.group.offers.clone().lock_owned().await;
        if self.group.role() != Role::Secondary || !self.group.takes_in(&self.receiver) {
            // Another offer has come: it goes on from here.
            *self.group.resync.taken() = Some((taken, clock::mono()));
            return Err(TakeError::Gone);
        }
        let (group, done, way) = (self.group.clone(), taken.done, taken.way);
        let work = move || -> std::result::Result<(), TakeError> {
            let _ = group.engine().stop("the group goes on at a later frame");
            match taken.leap.finish(clock::now()) {
                Ok(appender) => Ok(group.replace_engine(appender)?),
                Err(error @ (StoreError::Io { .. } | StoreError::Stopped(_))) => Err(error.into()),
                Err(error) => {
                    // Go on as before: the main line is what it was.
                    group.reopen_engine()?;
                    Err(error.into())
                }
            }
        };
        tokio::task::spawn_blocking(work).await.map_err(|_| TakeError::Gone)??;
        let head = self.group.store.head().seq;
        if way == Way::Compared && self.group.settings().resync.is_none() {
            let text = "resync: it could not be proven that what this replica held before is of \
                        production's history; its older points stay what they were";
            self.group.tell(Level::Info, text);
        }
        if way == Way::Compared {
            self.group.resync_done();
        }
        self.group.resync_goes_on();
        self.group.decide_anew();
        self.group.maintainer.wake();
        let ack = self.lock().on_leapt();
        let text = format!(
            "resync: this replica is at frame {head} now; {} MiB were {}",
            done >> 20,
            if way == Way::Compared { "compared" } else { "taken in" }
        );
        self.group.tell(Level::Info, &text);
        if let Some(seq) = ack {
            let _ = self.session.send(&Message::Ack { group: self.group.id, seq }).await;
        }
        self.group.changed.notify_waiters();
        Ok(())
    }
}

/// What becomes of a part of a leaf without anything coming for it.
#[derive(Debug, Clone, Copy)]
struct Local {
    extent: Extent,
    what: LocalKind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum LocalKind {
    /// It reads as zero there.
    Zero,
    /// It is what the seed has, with this hash.
    Seed([u8; 16]),
}

/// Leaves whose hashes came, and what of them is done here.
#[derive(Debug)]
struct Batch {
    disk: DiskNo,
    first: u64,
    /// Where the last leaf ends, in sectors.
    end: u64,
    /// The leaves that were wanted, counted from the first.
    wanted: Vec<u16>,
    locals: VecDeque<Local>,
}

/// Takes in items, in a thread of its own.
struct Work {
    group: Arc<Group>,
    session: Session,
    receiver: Arc<Mutex<Receiver>>,
    nonce: u64,
    codecs: Codecs,
    seeds: Seeds,
    /// What is here, to be compared.
    here: Option<View>,
    /// Hashes of everything before this place came.
    told: Place,
    batches: VecDeque<Batch>,
    running: Running,
    taken: Option<Taken>,
    _busy: tokio::sync::OwnedMutexGuard<()>,
}

/// Batches of hashes that may come before the first is settled; a primary sends fewer ahead.
const AHEAD_MAX: usize = 8;

/// A primary that does not hear what is wanted for so long is given up.
const SEND_PATIENCE: Duration = Duration::from_secs(30);

/// Things that have come and wait to be taken in.
const QUEUED_MAX: usize = 256;

type Queue = mpsc::Receiver<(Item, u64)>;

impl Work {
    /// Gives what was taken in once it is whole. What is not stays with the group, for a while.
    fn run(mut self, mut queue: Queue) -> std::result::Result<Option<Taken>, TakeError> {
        let mut ended = Ok(false);
        while let Some((item, wire)) = queue.blocking_recv() {
            let last = item == Item::End;
            ended = self.item(item).map(|()| last);
            if ended.is_err() {
                break;
            }
            self.settle(wire);
        }
        let settled =
            self.batches.is_empty() && (!self.is_comparing() || self.expected().is_none());
        match ended {
            Ok(true) if settled => return Ok(self.taken.take()),
            Ok(true) => {
                return Err(TakeError::Peer("ended before everything was settled".into()));
            }
            // What came of it cannot be trusted, or takes room that is needed.
            Err(error @ (TakeError::Peer(_) | TakeError::Store(_))) => return Err(error),
            Ok(false) | Err(_) => {}
        }
        if self.group.role() == Role::Secondary
            && let Some(taken) = self.taken.take()
        {
            *self.group.resync.taken() = Some((taken, clock::mono()));
        }
        ended.map(|_| None)
    }

    /// The next leaf whose hash is to come; none behind the last one.
    fn expected(&self) -> Option<(DiskNo, u64)> {
        let disks = &self.taken.as_ref()?.leap.catalog().disks;
        let mut from_here = disks.range(self.told.disk..);
        from_here.find_map(|(no, disk)| match *no == self.told.disk {
            true if self.told.sector >= disk.sectors => None,
            true => Some((*no, self.told.sector / Grain::Leaf.sectors())),
            false => Some((*no, 0)),
        })
    }

    /// Whether it was taken in before the stream was cut.
    fn was_taken(&self, disk: DiskNo, extent: Extent) -> bool {
        let taken = self.taken.as_ref();
        self.is_comparing() && taken.is_some_and(|taken| (disk, extent.end()) <= taken.leap.next())
    }

    /// It is in memory no longer: grants more.
    fn settle(&self, wire: u64) {
        let credit = self.receiver.lock().unwrap_or_else(PoisonError::into_inner).on_taken(wire);
        if let Some(limit) = credit {
            self.group.grant(&self.session, limit);
        }
    }

    fn item(&mut self, item: Item) -> std::result::Result<(), TakeError> {
        match item {
            Item::Zero { disk, extent, trim } => {
                self.locals_before(disk, extent)?;
                if !self.was_taken(disk, extent) {
                    self.leap()?.zero(disk, extent, trim)?;
                }
            }
            Item::Content { disk, extent, codec, sum, stored } => {
                let mut content = vec![0; usize::try_from(extent.bytes()).unwrap_or(0)];
                let sound = self.codecs.decode(codec, &stored, &mut content)
                    && content_sum(&content) == sum;
                if !sound || content.len() > BLOCK_MAX {
                    return Err(TakeError::Peer(format!("damaged content at {extent}")));
                }
                self.locals_before(disk, extent)?;
                if self.was_taken(disk, extent) {
                    return Ok(());
                }
                self.leap()?.content(disk, extent.start, &content)?;
                if !self.is_comparing() {
                    self.done(extent.bytes());
                }
            }
            Item::Hashes { disk, first, runs } => self.compare(disk, first, &runs)?,
            Item::Settled { disk, first } => self.settled(disk, first)?,
            Item::End => {}
        }
        Ok(())
    }

    fn is_comparing(&self) -> bool {
        self.taken.as_ref().is_some_and(|taken| taken.way == Way::Compared)
    }

    fn leap(&mut self) -> std::result::Result<&mut Leap, TakeError> {
        self.taken.as_mut().map(|taken| &mut taken.leap).ok_or(TakeError::Gone)
    }

    fn done(&mut self, bytes: u64) {
        self.running.done(bytes);
        if let Some(taken) = &mut self.taken {
            taken.done += bytes;
        }
    }

    /// Before something that came goes what is known without it; what came stands in for the rest.
    fn locals_before(
        &mut self,
        disk: DiskNo,
        extent: Extent,
    ) -> std::result::Result<(), TakeError> {
        if !self.is_comparing() {
            return Ok(());
        }
        let Some(batch) = self.batches.front_mut() else {
            return Err(TakeError::Peer("content that nobody wanted".into()));
        };
        let leaf = Grain::Leaf.sectors();
        let number = (extent.start / leaf).checked_sub(batch.first);
        let wanted = number.and_then(|number| u16::try_from(number).ok());
        let inside = batch.disk == disk
            && wanted.is_some_and(|number| batch.wanted.binary_search(&number).is_ok())
            && extent.end() <= batch.end
            && extent.end().div_ceil(leaf) == extent.start / leaf + 1;
        if !inside {
            return Err(TakeError::Peer(format!("content at {extent}, which nobody wanted")));
        }
        let mut due = Vec::new();
        while let Some(local) = batch.locals.front().copied()
            && local.extent.start < extent.end()
        {
            batch.locals.pop_front();
            if local.extent.end() <= extent.start {
                due.push(local);
            }
        }
        due.into_iter().try_for_each(|local| self.local(disk, local))
    }

    fn local(&mut self, disk: DiskNo, local: Local) -> std::result::Result<(), TakeError> {
        if self.was_taken(disk, local.extent) {
            return Ok(());
        }
        match local.what {
            LocalKind::Zero => self.leap()?.zero(disk, local.extent, false)?,
            LocalKind::Seed(hash) => {
                let content = self.seeds.read(disk, local.extent, &hash)?;
                if content.iter().all(|byte| *byte == 0) {
                    self.leap()?.zero(disk, local.extent, false)?;
                } else {
                    for (part, number) in content.chunks(BLOCK_MAX).zip(0..) {
                        let start = local.extent.start + number * (BLOCK_MAX as u64 / SECTOR);
                        self.leap()?.content(disk, start, part)?;
                    }
                }
            }
        }
        Ok(())
    }

    fn settled(&mut self, disk: DiskNo, first: u64) -> std::result::Result<(), TakeError> {
        let batch = self.batches.pop_front();
        let batch = batch.filter(|batch| (batch.disk, batch.first) == (disk, first));
        let Some(batch) = batch else {
            return Err(TakeError::Peer("settles leaves out of turn".into()));
        };
        for local in batch.locals {
            self.local(disk, local)?;
        }
        if let Some(taken) = &mut self.taken {
            taken.settled = Place { disk, sector: batch.end };
        }
        self.done((batch.end - first * Grain::Leaf.sectors()) * SECTOR);
        Ok(())
    }

    /// Says what is lacking of leaves whose hashes came.
    fn compare(
        &mut self,
        disk: DiskNo,
        first: u64,
        runs: &[HashRun],
    ) -> std::result::Result<(), TakeError> {
        let leaf = Grain::Leaf.sectors();
        let to = self.group_disk(disk)?;
        let theirs = from_runs(runs);
        let count = theirs.len() as u64;
        if first.checked_add(count).is_none_or(|last| last > to.div_ceil(leaf)) {
            return Err(TakeError::Peer("hashes behind the end of a disk".into()));
        }
        if self.expected() != Some((disk, first)) || self.batches.len() >= AHEAD_MAX {
            return Err(TakeError::Peer("hashes out of turn".into()));
        }
        let mine = self.hashes(disk, leaf, first, count)?;
        let mut wanted =
            Wanted { group: self.group.id, nonce: self.nonce, disk, first, leaves: Vec::new() };
        let mut locals = VecDeque::new();
        for ((number, mine), theirs) in (0..).zip(&mine).zip(&theirs) {
            let start = (first + u64::from(number)) * leaf;
            let extent = Extent::new(start, leaf.min(to - start));
            if self.group.resync.stop.load(Ordering::SeqCst) {
                return Err(TakeError::Gone);
            }
            match theirs {
                GrainHash::Unreadable => {
                    return Err(TakeError::Peer("hashes of what it cannot read".into()));
                }
                theirs if theirs == mine => {}
                GrainHash::Zero => locals.push_back(Local { extent, what: LocalKind::Zero }),
                GrainHash::Known(hash) => {
                    let seed = self.seeds.leaf(disk, extent)?;
                    if seed.as_ref().is_some_and(|seed| seed.hash == *hash) {
                        locals.push_back(Local { extent, what: LocalKind::Seed(*hash) });
                        continue;
                    }
                    let pages = match seed {
                        Some(seed) => {
                            let pages = pages_of(extent).zip(seed.pages);
                            locals.extend(pages.map(|(extent, hash)| Local {
                                extent,
                                what: LocalKind::Seed(hash),
                            }));
                            seed.pages
                        }
                        None => self.pages(disk, extent)?,
                    };
                    wanted.leaves.push((number, pages));
                }
            }
        }
        let end = ((first + count) * leaf).min(to);
        self.told = Place { disk, sector: end };
        let numbers = wanted.leaves.iter().map(|(number, _)| *number).collect();
        self.batches.push_back(Batch { disk, first, end, wanted: numbers, locals });
        let handle = self.group.context.link().clone();
        let session = self.session.clone();
        let sent = handle.block_on(async move {
            let message = Message::Wanted(wanted);
            tokio::time::timeout(SEND_PATIENCE, session.send(&message)).await
        });
        match sent {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) | Err(_) => Err(TakeError::Gone),
        }
    }

    /// Sectors of a disk at the later frame.
    fn group_disk(&self, disk: DiskNo) -> std::result::Result<u64, TakeError> {
        let taken = self.taken.as_ref().ok_or(TakeError::Gone)?;
        let disks = &taken.leap.catalog().disks;
        let found = disks.get(&disk).map(|disk| disk.sectors);
        found.ok_or_else(|| TakeError::Peer(format!("hashes of disk {disk}, which is not there")))
    }

    fn here(&mut self) -> std::result::Result<&View, TakeError> {
        if self.here.is_none() {
            let from = self.taken.as_ref().ok_or(TakeError::Gone)?.leap.from();
            self.here = Some(self.group.store.view_at(from.seq)?);
        }
        self.here.as_ref().ok_or(TakeError::Gone)
    }

    /// Hashes of what is here; what is behind the disk's end is zero.
    fn hashes(
        &mut self,
        disk: DiskNo,
        grain: u64,
        first: u64,
        count: u64,
    ) -> std::result::Result<Vec<GrainHash>, TakeError> {
        let here = self.here()?;
        let sectors = here.catalog().disks.get(&disk).map_or(0, |disk| disk.sectors);
        let there = sectors.div_ceil(grain).saturating_sub(first).min(count);
        let mut hashes = Vec::new();
        while (hashes.len() as u64) < there {
            let done = hashes.len() as u64;
            hashes.extend(here.hashes(disk, grain, first + done, there - done, READ_MAX)?);
        }
        hashes.resize(usize::try_from(count).unwrap_or(0), GrainHash::Zero);
        Ok(hashes)
    }

    /// The hashes of a leaf's pages here.
    fn pages(&mut self, disk: DiskNo, extent: Extent) -> std::result::Result<LeafPages, TakeError> {
        let count = extent.sectors.div_ceil(PAGE_SECTORS);
        let first = extent.start / PAGE_SECTORS;
        let hashes = self.hashes(disk, PAGE_SECTORS, first, count)?;
        let mut pages = LeafPages::default();
        for ((page, hash), at) in pages.iter_mut().zip(hashes).zip(pages_of(extent)) {
            *page = match hash {
                GrainHash::Known(hash) => hash,
                GrainHash::Zero => super::seed::zero_hash(at.bytes()),
                // Nothing has this one: it comes.
                GrainHash::Unreadable => [0; 16],
            };
        }
        Ok(pages)
    }
}

/// What a person can do about a volume that has no room for it.
fn make_room(group: &str) -> String {
    format!(
        "make room: delete branches (srn group branches {group}) or checkpoints (srn checkpoint delete), \
         keep less (srn retention set {group}), or give the state volume more space"
    )
}

/// The pages of a leaf.
fn pages_of(leaf: Extent) -> impl Iterator<Item = Extent> {
    (leaf.start..leaf.end())
        .step_by(PAGE_SECTORS as usize)
        .map(move |start| Extent::new(start, PAGE_SECTORS.min(leaf.end() - start)))
}

impl Group {
    /// What has been taken in and can go on, for the answer to an offer.
    pub(in crate::group) fn under(&self) -> Option<Under> {
        let taken = self.resync.taken();
        let (taken, _) = taken.as_ref()?;
        (taken.leap.from() == self.store.head())
            .then(|| Under { to: taken.leap.to(), next: taken.next() })
    }

    async fn open_seeds(&self, catalog: &Catalog) -> Result<Seeds> {
        let Some(asked) = self.settings().resync else { return Ok(Seeds::default()) };
        Seeds::open(&asked.seeds, catalog, self.context.link()).await
    }
}
