//! Looking at a group's files without changing them: for people, without a daemon.
//!
//! [`open`] opens a group as the daemon would, but on a [`ShadowFs`]: whatever opening repairs stays
//! in memory, so it finds the same ends of the same lines. [`Files`] looks at the files one by one,
//! also when the group cannot be opened; [`verify`] reads every byte of them and names what is
//! damaged.
//!
//! What it refuses to know: who else has the directory open. The caller makes sure that no daemon
//! writes to it meanwhile.

mod frames;
mod segments;
mod verify;

pub use frames::FrameDump;
pub use segments::{SegmentInfo, SegmentUse};
pub use verify::{Counts, Damage, Progress, Report, verify};

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use srn_core::ids::GroupId;
use srn_core::limits::PAGE;
use srn_core::time::Now;

use crate::error::{Doing, Result, StoreError};
use crate::group::{Group, LOG_DIR, Opened, Options, RecentBudget, Shared};
use crate::index::BlockCache;
use crate::io::{Access, AlignedBuf, BufPool, File, Fs, ShadowFs, Volume};
use crate::manifest::Manifest;
use crate::segment::{self, SegmentHeader, Target};

/// Most bytes that opening may write, to memory: the end of a log that is written again, the pages
/// of a retirement that is done again, and their index.
const SHADOW_MAX: u64 = 4 << 30;

/// Memory for idle buffers and for blocks of index files.
const POOL_BYTES: usize = 8 << 20;
const CACHE_BYTES: usize = 64 << 20;

/// A group that was opened without changing it.
#[derive(Debug)]
pub struct Looked {
    /// The group. What is done to it is done in memory.
    pub group: Arc<Group>,
    /// Frames behind the last one that is proven to be durable.
    pub unproven: usize,
}

/// Opens the group in `dir` of `fs` as a daemon would, and changes nothing there. `seed` makes the
/// ids of what is written in memory.
///
/// # Errors
/// As [`Group::open`].
pub fn open(fs: Arc<dyn Fs>, dir: &Path, now: Now, seed: u64) -> Result<Looked> {
    let shared = shared(Arc::new(ShadowFs::new(fs, SHADOW_MAX)), seed);
    let opened = Group::open(&shared, Options { fill: false, ..Options::default() }, dir, now)?;
    let Opened { group, rewritten, .. } = opened;
    Ok(Looked { group, unproven: rewritten })
}

fn shared(fs: Arc<dyn Fs>, seed: u64) -> Shared {
    let next = std::sync::atomic::AtomicU64::new(seed);
    Shared {
        volume: Volume::new(fs),
        pool: BufPool::new(POOL_BYTES),
        cache: Arc::new(BlockCache::new(CACHE_BYTES)),
        recent: Arc::new(RecentBudget::new(0)),
        entropy: Arc::new(move || {
            // Ids that differ from each other and from those on disk; nobody else sees them.
            let count = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            srn_core::bytes::content_sum(&count.to_le_bytes())
        }),
    }
}

/// The files of one group.
#[derive(Debug)]
pub struct Files {
    volume: Volume,
    dir: PathBuf,
    pool: BufPool,
    /// What the newest manifest says.
    pub manifest: Manifest,
}

/// One file of a log.
#[derive(Debug, Clone)]
pub(crate) struct LogFile {
    pub(crate) slot: u32,
    pub(crate) file: Arc<dyn File>,
    pub(crate) header: HeaderState,
}

/// What the header's page of a log file says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HeaderState {
    /// Zeros: no segment was begun in it, or it was cleared.
    Blank,
    /// It is whole.
    Sound(SegmentHeader),
    /// It is damaged; made anew from the first frame.
    Damaged(SegmentHeader),
    /// It is damaged, and no frame follows that would tell what it said.
    Lost,
    /// It was written by a newer version of this program.
    Newer(u16),
}

impl HeaderState {
    /// What the header says, or must have said.
    #[must_use]
    pub const fn header(&self) -> Option<SegmentHeader> {
        match self {
            Self::Sound(header) | Self::Damaged(header) => Some(*header),
            Self::Blank | Self::Lost | Self::Newer(_) => None,
        }
    }
}

impl LogFile {
    pub(crate) fn target(&self) -> Option<Target> {
        let header = self.header.header()?;
        Some(Target { slot: self.slot, header, file: self.file.clone() })
    }

    pub(crate) fn name(&self) -> String {
        format!("{LOG_DIR}/{}", segment::file_name(self.slot).display())
    }
}

impl Files {
    /// The files in `dir` of `fs`, which must have a sound manifest.
    ///
    /// # Errors
    /// As [`Manifest::load`].
    pub fn open(fs: Arc<dyn Fs>, dir: &Path) -> Result<Self> {
        let volume = Volume::new(fs);
        let manifest = Manifest::load(&volume, dir)?;
        Ok(Self { volume, dir: dir.into(), pool: BufPool::new(POOL_BYTES), manifest })
    }

    /// Every file of the log by its slot.
    pub(crate) fn log(&self) -> Result<BTreeMap<u32, LogFile>> {
        let dir = self.dir.join(LOG_DIR);
        let mut files = BTreeMap::new();
        for name in self.volume.list(&dir).doing(|| format!("listing {}", dir.display()))? {
            let Some(slot) = segment::slot_of(&name) else { continue };
            let doing = || format!("opening log segment {name}");
            let file = self.volume.open(&dir.join(&name), Access::Direct).doing(doing)?;
            let mut page = AlignedBuf::zeroed(PAGE);
            file.read_at(&mut page, 0).doing(doing)?;
            let header = self.header(slot, &file, &page)?;
            files.insert(slot, LogFile { slot, file, header });
        }
        Ok(files)
    }

    fn header(&self, slot: u32, file: &Arc<dyn File>, page: &[u8]) -> Result<HeaderState> {
        Ok(match SegmentHeader::decode(page) {
            Ok(Some(header)) => HeaderState::Sound(header),
            Ok(None) if page.iter().all(|byte| *byte == 0) => HeaderState::Blank,
            Ok(None) => {
                let group: GroupId = self.manifest.group;
                let found = segment::header_from_frame(slot, group, file, &self.pool)?;
                found.map_or(HeaderState::Lost, HeaderState::Damaged)
            }
            Err(StoreError::NewerVersion { found, .. }) => HeaderState::Newer(found),
            Err(error) => return Err(error),
        })
    }
}
