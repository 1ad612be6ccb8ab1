//! Whole groups of which one file was changed: opened, verified and read. They may be refused; but
//! what is read is what was written (P3), unless the checksums were forged.

use std::collections::BTreeMap;
use std::io;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use srn_core::ids::{EpochId, GroupId, Seq};
use srn_core::time::{Mono, Now, WallTime};
use srn_store::group::{Group, NewGroup, Opened, Options, Retention, Worked};
use srn_store::inspect;
use srn_store::io::{Access, File, Fs};
use srn_store::manifest::{Keep, Role};
use srn_testkit::fuzz::{Target, run, unsealed};
use srn_testkit::oracle::{Model, Write, contents, shared};
use srn_testkit::{Chance, Fault, SimDisk};

use crate::files::seal_xxh3;

const DISKS: u32 = 2;
const SECTORS: u64 = 256;
const PAGE: usize = 4096;
const SUBS: [&str; 4] = ["log", "index", "layer", "base"];

fn dir() -> PathBuf {
    PathBuf::from("/g")
}

fn now(second: u64) -> Now {
    let wall = WallTime(1_000_000_000_000 + second as i64 * 1_000_000);
    Now { mono: Mono(second * 1_000_000), wall }
}

type Files = BTreeMap<PathBuf, Bytes>;

/// A group's files, and what is in it.
pub(crate) struct Sample {
    files: Files,
    /// Some positions and what they show.
    points: Vec<(Seq, Model)>,
}

impl Sample {
    /// A replica with a base, a layer, sealed segments, merged runs, an open end; and cut off in the
    /// middle of a retirement.
    pub(crate) fn get() -> &'static Self {
        static SAMPLE: OnceLock<Sample> = OnceLock::new();
        SAMPLE.get_or_init(|| {
            (0..500).find_map(Self::try_make).expect("one that is cut off in a retirement")
        })
    }

    fn try_make(seed: u64) -> Option<Self> {
        let disk = SimDisk::new(seed, 256 << 20);
        let options = Options {
            segment_bytes: 416 * 1024,
            fill: false,
            table_entries_max: 30,
            unsealed_max: 2,
            ..Options::default()
        };
        let new = NewGroup {
            group: GroupId([1; 16]),
            name: "web".into(),
            role: Role::Primary,
            keep: Keep::Replica,
            epoch: EpochId([2; 16]),
            now: now(0),
        };
        let made = Group::create(&shared(&disk, seed), options, &dir(), &new).expect("create");
        let Opened { group, mut main, .. } = made;
        let mut chance = Chance::new(seed);
        let disks: Vec<_> = (0..DISKS).map(|no| Write::add_disk(no, SECTORS).change()).collect();
        main.commit(&disks, now(0)).expect("room");
        for second in 1..60 {
            let writes = Write::some(&mut chance, DISKS, SECTORS);
            let changes: Vec<_> = writes.iter().map(Write::change).collect();
            main.commit(&changes, now(second)).expect("room");
        }
        main.close_segment();
        let head = group.head().seq.0;
        // First a layer, then a base; the last retirement is cut off.
        let layers = Retention { keep_from: Seq(head / 2), points: vec![Seq(head / 6)] };
        while group.maintain(&layers).expect("work") == Worked::Something {}
        let write = Write::Data { disk: 0, start: 3, content: vec![0x5a; 1024].into() };
        main.commit(&[write.change()], now(61)).expect("room");
        drop(main);
        disk.fault_in(chance.between(1, 40), Fault::PowerCut);
        let retire = Retention::from(Seq(head * 2 / 3));
        while !disk.is_off() && matches!(group.maintain(&retire), Ok(Worked::Something)) {}
        drop(group);
        let disk = disk.power_cycle();
        let mut files = BTreeMap::new();
        for dir in SUBS.map(|sub| dir().join(sub)).into_iter().chain([dir()]) {
            for name in disk.list(&dir).unwrap_or_default() {
                let path = dir.join(name);
                let Ok(file) = disk.open(&path, Access::Buffered) else { continue };
                let mut bytes = vec![0; file.size().expect("a size") as usize];
                file.read_at(&mut bytes, 0).expect("it reads");
                files.insert(path, bytes.into());
            }
        }
        let has = |what: &str| files.keys().any(|path| path.to_string_lossy().contains(what));
        if !has("retire.intent") || !has(".lay") || !has(".sum") {
            return None;
        }
        let mut sample = Self { files, points: Vec::new() };
        let looked = inspect::open(sample.fs(), &dir(), now(100), 1).expect("it opens");
        let line = looked.group.lines().remove(0);
        let base = line.base.expect("a base").at.seq.0;
        for seq in base..=line.catalog.at.seq.0 {
            let view = looked.group.view_at(Seq(seq));
            let shown = view.and_then(|view| contents(&view, DISKS, SECTORS));
            if let Ok(model) = shown {
                sample.points.push((Seq(seq), model));
            }
        }
        assert!(sample.points.len() > 3);
        Some(sample)
    }

    fn fs(&self) -> Arc<dyn Fs> {
        Arc::new(Memory { files: self.files.clone() })
    }

    /// The files whose path contains `what`.
    fn paths(&self, what: &str) -> Vec<PathBuf> {
        let fits = |path: &&PathBuf| path.to_string_lossy().contains(what);
        let found: Vec<PathBuf> = self.files.keys().filter(fits).cloned().collect();
        assert!(!found.is_empty(), "no file {what}");
        found
    }

    /// The catalogs of the base and of the head.
    pub(crate) fn catalogs(&self) -> Vec<Vec<u8>> {
        let looked = inspect::open(self.fs(), &dir(), now(100), 1).expect("it opens");
        let line = looked.group.lines().remove(0);
        vec![line.base.expect("a base").encode(), line.catalog.encode()]
    }

    /// Changes the files whose path contains `what`, one at a time.
    fn fuzz(&self, name: &str, what: &str, seal: fn(&mut Vec<u8>), reads_true: bool) {
        for path in self.paths(what).into_iter().take(3) {
            let corpus = vec![self.files[&path].to_vec()];
            let target = Target { name, corpus, seal, cap: 256 << 20 };
            run(&target, |bytes, sealed| {
                let mut files = self.files.clone();
                files.insert(path.clone(), Bytes::copy_from_slice(bytes));
                self.look(Arc::new(Memory { files }), reads_true && !sealed);
            });
        }
    }

    fn look(&self, fs: Arc<dyn Fs>, reads_true: bool) {
        let go_on = &mut |_| ControlFlow::Continue(());
        let _ = inspect::verify(fs.clone(), &dir(), now(100), go_on);
        if let Ok(files) = inspect::Files::open(fs.clone(), &dir()) {
            let _ = files.segments();
            for (seq, _) in self.points.iter().take(2) {
                let _ = files.frame(None, *seq);
            }
        }
        let Ok(looked) = inspect::open(fs, &dir(), now(100), 1) else { return };
        let main = looked.group.epochs().current();
        let _ = looked.group.checkpoints_of(main);
        for (seq, model) in self.points.iter().rev().step_by(7) {
            let shown = looked.group.view_at(*seq);
            let shown = shown.and_then(|view| contents(&view, DISKS, SECTORS));
            if let Ok(shown) = shown
                && reads_true
            {
                assert!(shown == *model, "frame {seq} is silently not what was written");
            }
        }
    }
}

/// Each page ends in its XXH3.
fn seal_blocks(bytes: &mut Vec<u8>) {
    for page in bytes.chunks_exact_mut(PAGE) {
        if let Some((body, sum)) = page.split_last_chunk_mut::<8>() {
            *sum = srn_core::bytes::content_sum(body).to_le_bytes();
        }
    }
}

/// The first page ends in its XXH3; every frame behind it has its sums.
fn seal_segment(bytes: &mut Vec<u8>) {
    if let Some(page) = bytes.get_mut(..PAGE) {
        let mut header = page.to_vec();
        seal_xxh3(&mut header);
        page.copy_from_slice(&header);
    }
    for page in bytes.chunks_exact_mut(PAGE).skip(1) {
        let mut frame = page.to_vec();
        crate::frames::seal(&mut frame);
        page.copy_from_slice(&frame);
    }
}

/// The last 32 bytes are the BLAKE3 of what is before them.
fn seal_blake3(bytes: &mut Vec<u8>) {
    if let Some((body, sum)) = bytes.split_last_chunk_mut::<32>() {
        *sum = *blake3::hash(body).as_bytes();
    }
}

#[test]
fn manifests() {
    Sample::get().fuzz("manifests", "manifest-", seal_blake3, true);
}

#[test]
fn segment_files() {
    Sample::get().fuzz("segment files", "/log/", seal_segment, true);
}

#[test]
fn index_runs() {
    Sample::get().fuzz("index runs", "/index/", seal_blocks, true);
}

#[test]
fn layer_files() {
    Sample::get().fuzz("layer files", "/layer/", seal_blocks, true);
}

/// A checksum file has no checksum of its own: zeroed it reads as zeros, which is documented.
#[test]
fn base_checksums() {
    Sample::get().fuzz("base checksums", ".sum", unsealed, false);
}

#[test]
fn base_content() {
    Sample::get().fuzz("base content", ".raw", unsealed, true);
}

#[test]
fn retirement_intents() {
    Sample::get().fuzz("retirement intents", "retire.intent", seal_blake3, true);
}

/// Files in memory, for reading.
#[derive(Debug)]
struct Memory {
    files: Files,
}

#[derive(Debug)]
struct MemoryFile {
    bytes: Bytes,
}

fn no<T>() -> io::Result<T> {
    Err(io::ErrorKind::ReadOnlyFilesystem.into())
}

impl Fs for Memory {
    fn create(&self, _path: &Path, _access: Access) -> io::Result<Arc<dyn File>> {
        no()
    }

    fn open(&self, path: &Path, _access: Access) -> io::Result<Arc<dyn File>> {
        let bytes = self.files.get(path).ok_or(io::ErrorKind::NotFound)?.clone();
        Ok(Arc::new(MemoryFile { bytes }))
    }

    fn rename(&self, _from: &Path, _to: &Path) -> io::Result<()> {
        no()
    }

    fn remove(&self, _path: &Path) -> io::Result<()> {
        no()
    }

    fn create_dir(&self, _path: &Path) -> io::Result<()> {
        no()
    }

    fn remove_dir(&self, _path: &Path) -> io::Result<()> {
        no()
    }

    fn list(&self, path: &Path) -> io::Result<Vec<String>> {
        let inside = self.files.keys().filter(|file| file.parent() == Some(path));
        let names = inside.filter_map(|file| file.file_name()?.to_str());
        Ok(names.map(str::to_owned).collect())
    }

    fn sync_dir(&self, _path: &Path) -> io::Result<()> {
        no()
    }

    fn free_bytes(&self, _path: &Path) -> io::Result<u64> {
        Ok(0)
    }
}

impl File for MemoryFile {
    fn size(&self) -> io::Result<u64> {
        Ok(self.bytes.len() as u64)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let from = usize::try_from(offset).unwrap_or(usize::MAX).min(self.bytes.len());
        let rest = &self.bytes[from..];
        let len = rest.len().min(buf.len());
        buf[..len].copy_from_slice(&rest[..len]);
        Ok(len)
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
        Ok((offset < self.bytes.len() as u64).then_some(offset))
    }

    fn write_at(&self, _: &[io::IoSlice<'_>], _offset: u64, _durable: bool) -> io::Result<()> {
        no()
    }

    fn sync(&self) -> io::Result<()> {
        no()
    }

    fn allocate(&self, _len: u64) -> io::Result<()> {
        no()
    }

    fn set_len(&self, _len: u64) -> io::Result<()> {
        no()
    }

    fn punch(&self, _offset: u64, _len: u64) -> io::Result<()> {
        no()
    }
}
