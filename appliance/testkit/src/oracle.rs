//! The oracle: every write in order, and what disks hold after any number of them.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use srn_core::extent::Extent;
use srn_core::frame::{Record, ResyncReason};
use srn_core::ids::{DiskId, DiskNo};
use srn_core::limits::SECTOR;
use srn_core::state::Content;
use srn_store::codec::Codecs;
use srn_store::frame::Frame;
use srn_store::group::{Change, OwnedRecord, RecentBudget, Shared, Sums, View};
use srn_store::index::BlockCache;
use srn_store::io::{BufPool, Volume};

use crate::{Chance, SimDisk};

/// One change, with content made from its stamp.
#[derive(Clone, PartialEq, Eq)]
pub enum Write {
    /// Content.
    Data {
        /// The disk's number.
        disk: u32,
        /// First sector.
        start: u64,
        /// Whole sectors.
        content: Bytes,
    },
    /// The range reads as zero.
    Zero {
        /// The disk's number.
        disk: u32,
        /// First sector.
        start: u64,
        /// How many.
        sectors: u64,
        /// Whether it is discarded, and not written with zeros.
        trim: bool,
    },
    /// A disk joins.
    AddDisk {
        /// Its number.
        disk: u32,
        /// Its size.
        sectors: u64,
    },
    /// A disk's content begins to be sent anew, or is one point in time again.
    Content {
        /// The disk's number.
        disk: u32,
        /// How its content stands from here on.
        content: Content,
    },
}

impl fmt::Debug for Write {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Data { disk, start, content } => {
                let sectors = content.len() as u64 / SECTOR;
                let first = content.first_chunk().map_or(0, |first| u64::from_le_bytes(*first));
                write!(f, "write {first:x} to {disk}:{start}+{sectors}")
            }
            Self::Zero { disk, start, sectors, trim } => {
                let what = if *trim { "trim" } else { "zero" };
                write!(f, "{what} {disk}:{start}+{sectors}")
            }
            Self::AddDisk { disk, sectors } => write!(f, "add disk {disk} of {sectors} sectors"),
            Self::Content { disk, content } => write!(f, "disk {disk} is {content:?}"),
        }
    }
}

impl Write {
    /// A disk joins.
    #[must_use]
    pub const fn add_disk(disk: u32, sectors: u64) -> Self {
        Self::AddDisk { disk, sectors }
    }

    /// A few writes that go together in one commit, to `disks` disks of `size` sectors.
    pub fn some(chance: &mut Chance, disks: u32, size: u64) -> Vec<Self> {
        let count = if chance.percent(10) { chance.between(20, 80) } else { chance.between(1, 8) };
        (0..count).map(|_| Self::any(chance, disks, size)).collect()
    }

    fn any(chance: &mut Chance, disks: u32, size: u64) -> Self {
        let disk = chance.below(u64::from(disks)) as u32;
        let start = match chance.below(3) {
            0 => chance.below(size),
            // Hot places, so that things are overwritten; and whole pages.
            1 => chance.below(24),
            _ => chance.below(size / 8) * 8,
        };
        let most = size - start;
        let sectors = match chance.below(10) {
            0..5 => chance.between(1, 8).min(most),
            5..8 => (8 * chance.between(1, 4)).min(most),
            _ => chance.between(1, 120).min(most),
        };
        if chance.percent(15) {
            return Self::Zero { disk, start, sectors, trim: chance.percent(50) };
        }
        // Compressible now and then, so that the codecs have something to do.
        let stamp = chance.any();
        let plain = chance.percent(30);
        let mut stream = Chance::new(stamp);
        let mut content = vec![0; (sectors * SECTOR) as usize];
        for word in content.as_chunks_mut().0 {
            *word = if plain { stamp } else { stream.any() }.to_le_bytes();
        }
        Self::Data { disk, start, content: content.into() }
    }

    /// As the store takes it.
    #[must_use]
    pub fn change(&self) -> Change {
        match self {
            Self::Data { disk, start, content } => Change::Write {
                disk: DiskNo(*disk),
                start: *start,
                data: content.clone(),
                sums: Sums::of(content),
            },
            Self::Zero { disk, start, sectors, trim } => {
                let extent = Extent::new(*start, *sectors);
                Change::Record(if *trim {
                    OwnedRecord::Trim(DiskNo(*disk), extent)
                } else {
                    OwnedRecord::Zero(DiskNo(*disk), extent)
                })
            }
            Self::AddDisk { disk, sectors } => {
                let id = DiskId([*disk as u8; 16]);
                let name = format!("d{disk}").parse().expect("name");
                Change::Record(OwnedRecord::DiskAdd(DiskNo(*disk), id, *sectors, name))
            }
            Self::Content { disk, content } => {
                let disk = DiskNo(*disk);
                Change::Record(match content {
                    Content::Seeding => OwnedRecord::ResyncBegin(disk, ResyncReason::Seeding),
                    Content::Clean => OwnedRecord::ResyncEnd(disk),
                    _ => OwnedRecord::ResyncBegin(disk, ResyncReason::MirrorRestarted),
                })
            }
        }
    }

    /// The writes in a frame, decoded.
    ///
    /// # Panics
    /// When the frame is not sound.
    #[must_use]
    pub fn of_frame(frame: &Arc<Frame>, codecs: &mut Codecs) -> Vec<Self> {
        let head = frame.head().expect("head");
        let mut stored = Vec::new();
        frame.content().iter().for_each(|piece| stored.extend_from_slice(piece));
        let mut content = Vec::new();
        for (block, how, at) in frame.blocks().expect("blocks") {
            let from = content.len();
            content.resize(from + block.len(), 0);
            let bytes = &stored[at as usize..(at + how.len) as usize];
            assert!(codecs.decode(how.codec, bytes, &mut content[from..]));
        }
        let mut rest = Bytes::from(content);
        head.records()
            .filter_map(|record| match record {
                Record::Write { disk, extent } => {
                    let content = rest.split_to(extent.bytes() as usize);
                    Some(Self::Data { disk: disk.0, start: extent.start, content })
                }
                Record::Zero { disk, extent } => Some(Self::Zero {
                    disk: disk.0,
                    start: extent.start,
                    sectors: extent.sectors,
                    trim: false,
                }),
                Record::Trim { disk, extent } => Some(Self::Zero {
                    disk: disk.0,
                    start: extent.start,
                    sectors: extent.sectors,
                    trim: true,
                }),
                Record::DiskAdd { disk, sectors, .. } => {
                    Some(Self::AddDisk { disk: disk.0, sectors })
                }
                Record::ResyncBegin { disk, reason: ResyncReason::Seeding } => {
                    Some(Self::Content { disk: disk.0, content: Content::Seeding })
                }
                Record::ResyncBegin { disk, .. } => {
                    Some(Self::Content { disk: disk.0, content: Content::Resync })
                }
                Record::ResyncEnd { disk } => {
                    Some(Self::Content { disk: disk.0, content: Content::Clean })
                }
                _ => None,
            })
            .collect()
    }
}

/// The content of all disks.
#[derive(Clone, PartialEq, Eq)]
pub struct Model {
    disks: Vec<Vec<u8>>,
}

impl fmt::Debug for Model {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Model of {} disks", self.disks.len())
    }
}

impl Model {
    /// Zeros.
    #[must_use]
    pub fn blank(disks: u32, sectors: u64) -> Self {
        Self { disks: vec![vec![0; (sectors * SECTOR) as usize]; disks as usize] }
    }

    /// The result of `writes`.
    #[must_use]
    pub fn of(writes: &[Write], disks: u32, sectors: u64) -> Self {
        let mut model = Self::blank(disks, sectors);
        writes.iter().for_each(|write| model.apply(write));
        model
    }

    /// One write more.
    pub fn apply(&mut self, write: &Write) {
        match write {
            Write::Data { disk, start, content } => {
                let from = (start * SECTOR) as usize;
                self.disks[*disk as usize][from..from + content.len()].copy_from_slice(content);
            }
            Write::Zero { disk, start, sectors, .. } => {
                let from = (start * SECTOR) as usize;
                self.disks[*disk as usize][from..from + (sectors * SECTOR) as usize].fill(0);
            }
            Write::AddDisk { .. } | Write::Content { .. } => {}
        }
    }

    /// Puts content in place.
    pub fn put(&mut self, disk: u32, start: u64, content: &[u8]) {
        let from = (start * SECTOR) as usize;
        self.disks[disk as usize][from..from + content.len()].copy_from_slice(content);
    }

    /// Whether a range holds zeros only.
    #[must_use]
    pub fn is_zero(&self, disk: DiskNo, extent: Extent) -> bool {
        let from = (extent.start * SECTOR) as usize;
        let to = (extent.end() * SECTOR) as usize;
        self.disks[disk.0 as usize][from..to].iter().all(|byte| *byte == 0)
    }
}

/// Writes between two snapshots of a history.
const SNAPSHOT_EVERY: usize = 16;

/// The writer of a sector that was never written, or last with zeros.
const NOBODY: u32 = u32::MAX;

/// Which write each sector of each disk is from.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Writers {
    disks: Vec<Vec<u32>>,
    contents: Vec<Content>,
    /// Whether any disk has joined.
    joined: bool,
}

impl Writers {
    fn apply(&mut self, number: usize, write: &Write) {
        let (disk, start, sectors, writer) = match write {
            Write::Data { disk, start, content } => {
                let number = u32::try_from(number).expect("fewer than four thousand million");
                (*disk, *start, content.len() as u64 / SECTOR, number)
            }
            Write::Zero { disk, start, sectors, .. } => (*disk, *start, *sectors, NOBODY),
            Write::AddDisk { .. } => {
                self.joined = true;
                return;
            }
            Write::Content { disk, content } => {
                let stands = &mut self.contents[*disk as usize];
                // A disk that had no point yet still has none.
                if (*stands, *content) != (Content::Seeding, Content::Resync) {
                    *stands = *content;
                }
                return;
            }
        };
        self.disks[disk as usize][start as usize..(start + sectors) as usize].fill(writer);
    }
}

/// Every write in order; it tells what the disks held after any number of them.
#[derive(Clone)]
pub struct History {
    writes: Vec<Write>,
    blank: Writers,
    /// By the number of writes that came before.
    snapshots: BTreeMap<usize, Writers>,
}

impl fmt::Debug for History {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "History of {} writes", self.writes.len())
    }
}

impl History {
    /// No writes, to `disks` disks of `sectors` each.
    #[must_use]
    pub fn new(disks: u32, sectors: u64) -> Self {
        let blank = Writers {
            disks: vec![vec![NOBODY; sectors as usize]; disks as usize],
            contents: vec![Content::Clean; disks as usize],
            joined: false,
        };
        Self { writes: Vec::new(), blank, snapshots: BTreeMap::new() }
    }

    /// How many writes there are.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.writes.len()
    }

    /// Whether there is none.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.writes.is_empty()
    }

    /// One of them.
    #[must_use]
    pub fn get(&self, number: usize) -> Option<&Write> {
        self.writes.get(number)
    }

    /// Adds writes at the end.
    pub fn extend(&mut self, writes: impl IntoIterator<Item = Write>) {
        self.writes.extend(writes);
    }

    /// Forgets all but the first `count`.
    pub fn truncate(&mut self, count: usize) {
        self.writes.truncate(count);
        let _ = self.snapshots.split_off(&(count + 1));
    }

    fn writers(&mut self, count: usize) -> Writers {
        let (mut at, mut writers) = match self.snapshots.range(..=count).next_back() {
            Some((at, writers)) => (*at, writers.clone()),
            None => (0, self.blank.clone()),
        };
        for (number, write) in self.writes.iter().enumerate().take(count).skip(at) {
            writers.apply(number, write);
            if (number + 1).is_multiple_of(SNAPSHOT_EVERY) {
                at = number + 1;
                self.snapshots.insert(at, writers.clone());
            }
        }
        writers
    }

    /// The first sector in which `found` is not the result of the first `count` writes.
    pub fn difference(&mut self, count: usize, found: &Model) -> Option<Difference> {
        let writers = self.writers(count);
        let zero = [0; SECTOR as usize];
        for (disk, (writers, found)) in (0..).zip(writers.disks.iter().zip(&found.disks)) {
            for run in runs(writers) {
                let from = run.start * SECTOR as usize;
                let content = &found[from..run.end * SECTOR as usize];
                let writer = writers[run.start];
                let wanted = match self.writes.get(writer as usize) {
                    Some(Write::Data { start, content: written, .. }) => {
                        let skip = from - (start * SECTOR) as usize;
                        &written[skip..skip + content.len()]
                    }
                    _ => &[],
                };
                let same = |at: usize, sector: &[u8]| {
                    sector == wanted.get(at..at + sector.len()).unwrap_or(&zero)
                };
                if content == wanted || wanted.is_empty() && content.iter().all(|byte| *byte == 0) {
                    continue;
                }
                let sectors = content.chunks(SECTOR as usize).enumerate();
                let bad = sectors.filter(|(at, sector)| !same(at * SECTOR as usize, sector));
                let sector = run.start + bad.map(|(at, _)| at).next().unwrap_or(0);
                let writer = (writer != NOBODY).then_some(writer as usize);
                return Some(Difference { disk, sector: sector as u64, writer });
            }
        }
        None
    }

    /// How the content of each disk stands after the first `count` writes.
    pub fn stands(&mut self, count: usize) -> Vec<Content> {
        self.writers(count).contents
    }

    /// Whether that is one point in time of all disks.
    pub fn is_clean(&mut self, count: usize) -> bool {
        let Writers { contents, joined, .. } = self.writers(count);
        joined && contents.iter().all(|content| *content == Content::Clean)
    }

    /// Whether `found` is the result of the first `count` writes.
    pub fn holds(&mut self, count: usize, found: &Model) -> bool {
        self.difference(count, found).is_none()
    }

    /// Insists that `found` is the result of the first `count` writes; `what` says what it is.
    ///
    /// # Panics
    /// When it is not.
    pub fn check(&mut self, count: usize, found: &Model, what: impl fmt::Display) {
        if let Some(difference) = self.difference(count, found) {
            panic!("{what} is not the result of the first {count} writes: {difference}");
        }
    }

    /// The result of the first `count` writes.
    pub fn model(&mut self, count: usize) -> Model {
        let writers = self.writers(count);
        let mut disks: Vec<Vec<u8>> = Vec::new();
        for writers in &writers.disks {
            let mut disk = vec![0; writers.len() * SECTOR as usize];
            for run in runs(writers) {
                if let Some(Write::Data { start, content, .. }) =
                    self.writes.get(writers[run.start] as usize)
                {
                    let (from, to) = (run.start * SECTOR as usize, run.end * SECTOR as usize);
                    let skip = (start * SECTOR) as usize;
                    disk[from..to].copy_from_slice(&content[from - skip..to - skip]);
                }
            }
            disks.push(disk);
        }
        Model { disks }
    }
}

/// Neighbours with the same writer.
fn runs(writers: &[u32]) -> impl Iterator<Item = Range<usize>> {
    let mut at = 0;
    writers.chunk_by(|a, b| a == b).map(move |run| {
        at += run.len();
        at - run.len()..at
    })
}

/// A sector that is not what it should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Difference {
    /// The disk's number.
    pub disk: u32,
    /// The sector.
    pub sector: u64,
    /// The write that it should be from; none for zeros.
    pub writer: Option<usize>,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { disk, sector, writer } = self;
        match writer {
            Some(writer) => write!(f, "disk {disk}, sector {sector} should be from write {writer}"),
            None => write!(f, "disk {disk}, sector {sector} should be zeros"),
        }
    }
}

/// Everything that a view shows.
///
/// # Errors
/// As the view says.
pub fn contents(view: &View, disks: u32, sectors: u64) -> srn_store::Result<Model> {
    let mut model = Model::blank(disks, sectors);
    for (no, disk) in (0..).zip(&mut model.disks) {
        view.read(DiskNo(no), Extent::new(0, sectors), disk)?;
    }
    Ok(model)
}

/// What groups on a simulated disk share.
#[must_use]
pub fn shared(disk: &SimDisk, seed: u64) -> Shared {
    shared_with(disk, seed, &BufPool::new(1 << 20))
}

/// The same, with memory that outlives a restart.
#[must_use]
pub fn shared_with(disk: &SimDisk, seed: u64, pool: &BufPool) -> Shared {
    let chance = std::sync::Mutex::new(Chance::new(seed));
    Shared {
        volume: Volume::new(Arc::new(disk.clone())),
        pool: pool.clone(),
        cache: Arc::new(BlockCache::new(1 << 20)),
        recent: Arc::new(RecentBudget::new(64 * 1024)),
        entropy: Arc::new(move || chance.lock().expect("chance").any()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_history_knows_every_moment() {
        let mut chance = Chance::new(7);
        let mut history = History::new(2, 600);
        let mut models = vec![Model::blank(2, 600)];
        for _ in 0..150 {
            for write in Write::some(&mut chance, 2, 600).into_iter().take(2) {
                let mut model = models.last().expect("one").clone();
                model.apply(&write);
                history.extend([write]);
                models.push(model);
            }
        }
        for _ in 0..200 {
            let count = chance.below(models.len() as u64) as usize;
            assert!(history.holds(count, &models[count]));
            assert!(history.model(count) == models[count]);
            let mut bad = models[count].clone();
            let (disk, sector) = (chance.below(2) as usize, chance.below(600));
            bad.disks[disk][(sector * SECTOR) as usize + 77] ^= 1;
            let found = history.difference(count, &bad).expect("a difference");
            assert_eq!((found.disk as usize, found.sector), (disk, sector));
        }
        history.truncate(40);
        assert!(history.holds(40, &models[40]) && !history.is_empty());
    }
}
