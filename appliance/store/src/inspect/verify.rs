//! Reading every byte of a group's files and naming what is damaged: each manifest, each segment's
//! header, each frame with its chain and the sum of each block, each block and entry of each index
//! run (made again from the frames and compared), each block of each layer, each page of the base.
//!
//! Nothing is repaired and nothing is written. What the daemon repairs by itself when it opens a
//! group (a damaged header page) is damage here too.

mod base;
mod index;
mod layers;
mod log;

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use srn_core::extent::Extent;
use srn_core::frame::Record;
use srn_core::ids::{DiskNo, Seq};
use srn_core::time::Now;

use super::Files;
use crate::error::{Doing, Result, StoreError};
use crate::frame::Frame;
use crate::group::Group;
use crate::io::{Fs, Volume};
use crate::manifest::{Manifest, manifest_names};

/// Something that is not what was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Damage {
    /// The file, seen from the group's directory.
    pub file: String,
    /// Where in it, in bytes, where that can be told.
    pub offset: Option<u64>,
    /// The frames it is about, first and last.
    pub frames: Option<(Seq, Seq)>,
    /// The sectors whose content it is about, as far as can be told.
    pub sectors: Vec<(DiskNo, Extent)>,
    /// What it is, in words.
    pub text: String,
}

impl Damage {
    fn of(file: impl Into<String>, text: impl Into<String>) -> Self {
        let (file, text) = (file.into(), text.into());
        Self { file, offset: None, frames: None, sectors: Vec::new(), text }
    }

    const fn at(mut self, offset: u64) -> Self {
        self.offset = Some(offset);
        self
    }
}

/// How far it is, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Progress {
    /// Read and verified.
    pub done: u64,
    /// What there is to read.
    pub total: u64,
}

/// What was looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counts {
    /// Manifests.
    pub manifests: u64,
    /// Log segments that hold frames.
    pub segments: u64,
    /// Frames.
    pub frames: u64,
    /// Blocks of content in them.
    pub blocks: u64,
    /// Index runs.
    pub runs: u64,
    /// Entries in them.
    pub entries: u64,
    /// Files of layers.
    pub layer_files: u64,
    /// Pages of the base that have content.
    pub pages: u64,
    /// Bytes read.
    pub bytes: u64,
}

/// What verifying a group has shown.
#[derive(Debug, Clone, Default)]
pub struct Report {
    /// What was looked at.
    pub counts: Counts,
    /// What is damaged; empty when all is sound.
    pub damage: Vec<Damage>,
    /// The names of the disks that damage is about.
    pub disks: BTreeMap<DiskNo, String>,
    /// Whether it was ended before everything was read.
    pub cut_short: bool,
}

/// Verifies the group in `dir` of `fs`. `tell` hears how far it is, and ends it with `Break`.
///
/// # Errors
/// [`StoreError::NewerVersion`] when nothing can be said about these files; as the volume says.
/// Damage is no error.
pub fn verify(
    fs: Arc<dyn Fs>,
    dir: &Path,
    now: Now,
    tell: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<Report> {
    let mut report = Report::default();
    check_manifests(&Volume::new(fs.clone()), dir, &mut report)?;
    let files = match Files::open(fs.clone(), dir) {
        Ok(files) => files,
        // Said above; without it nobody knows what the other files are.
        Err(StoreError::Corrupt(_)) => return Ok(report),
        Err(error) => return Err(error),
    };
    // What the daemon would say of it; and the base as it is when a retirement was finished.
    let opened = match super::open(fs, dir, now, 0) {
        Ok(looked) => Some(looked.group),
        Err(StoreError::Corrupt(text)) => {
            report.damage.push(Damage::of("", format!("the group does not open: {text}")));
            None
        }
        Err(error) => return Err(error),
    };
    let mut work = Work {
        files: &files,
        opened,
        report,
        progress: Progress::default(),
        tell,
        lost: Vec::new(),
    };
    let ended = work.run()?;
    let Work { mut report, progress, .. } = work;
    report.cut_short = ended.is_break();
    report.counts.bytes = progress.done;
    Ok(report)
}

/// Every manifest there is: one that is damaged and not the newest is no harm yet, but the volume
/// does not keep what it is given.
fn check_manifests(volume: &Volume, dir: &Path, report: &mut Report) -> Result<()> {
    let names = volume.list(dir).doing(|| format!("listing {}", dir.display()))?;
    for name in manifest_names(&names) {
        match Manifest::read(volume, dir, &name) {
            Ok(_) => report.counts.manifests += 1,
            Err(StoreError::Corrupt(text)) => report.damage.push(Damage::of(name, text)),
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Bytes after which progress is told.
const TELL_BYTES: u64 = 4 << 20;

struct Work<'a> {
    files: &'a Files,
    opened: Option<Arc<Group>>,
    report: Report,
    progress: Progress,
    tell: &'a mut dyn FnMut(Progress) -> ControlFlow<()>,
    /// Stretches of log segments, by ordinal, that hold frames which cannot be read; and the place
    /// of the damage in the report.
    lost: Vec<(u32, u64, u64, usize)>,
}

impl Work<'_> {
    fn run(&mut self) -> Result<ControlFlow<()>> {
        let base = self.base_disks()?;
        let log = self.files.log()?;
        self.progress.total = self
            .log_bytes(&log)?
            .saturating_add(self.index_bytes())
            .saturating_add(self.layer_bytes())
            .saturating_add(base.iter().map(|disk| disk.bytes).sum::<u64>());
        if self.check_log(&log)?.is_break() || self.check_index(&log)?.is_break() {
            return Ok(ControlFlow::Break(()));
        }
        self.check_base(&base)
    }

    fn damaged(&mut self, damage: Damage) {
        self.report.damage.push(damage);
    }

    /// So many bytes more are read.
    fn step(&mut self, bytes: u64) -> ControlFlow<()> {
        let before = self.progress.done / TELL_BYTES;
        self.progress.done += bytes;
        if self.progress.done / TELL_BYTES == before {
            return ControlFlow::Continue(());
        }
        // What is found on the way may be more than was expected.
        self.progress.total = self.progress.total.max(self.progress.done);
        (self.tell)(self.progress)
    }

    /// Remembers the names of disks, for the report.
    fn learn_names(&mut self, frame: &Frame) {
        let Ok(head) = frame.head() else { return };
        for record in head.records() {
            if let Record::DiskAdd { disk, name, .. } = record {
                self.report.disks.insert(disk, name.to_owned());
            }
        }
    }
}
