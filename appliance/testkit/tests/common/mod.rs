//! The oracle: writes, and disks as arrays of sectors.

#![allow(dead_code, unreachable_pub, missing_docs, reason = "each test uses its part of it")]

use std::sync::Arc;

use bytes::Bytes;
use srn_core::extent::Extent;
use srn_core::frame::Record;
use srn_core::ids::{DiskId, DiskNo};
use srn_core::limits::SECTOR;
use srn_store::codec::Codecs;
use srn_store::frame::Frame;
use srn_store::group::{Change, OwnedRecord, RecentBudget, Shared, Sums, View};
use srn_store::index::BlockCache;
use srn_store::io::{BufPool, Volume};
use srn_testkit::{Chance, SimDisk};

/// One change, with content made from its stamp.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Write {
    Data { disk: u32, start: u64, content: Vec<u8> },
    Zero { disk: u32, start: u64, sectors: u64, trim: bool },
    AddDisk { disk: u32, sectors: u64 },
}

impl Write {
    pub fn add_disk(disk: u32, sectors: u64) -> Self {
        Self::AddDisk { disk, sectors }
    }

    /// A few writes that go together in one commit.
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
            _ => chance.between(1, 200).min(most),
        };
        if chance.percent(15) {
            return Self::Zero { disk, start, sectors, trim: chance.percent(50) };
        }
        // Compressible now and then, so that the codecs have something to do.
        let stamp = chance.any();
        let plain = chance.percent(30);
        let mut stream = Chance::new(stamp);
        let content = (0..sectors * SECTOR / 8)
            .flat_map(|_| if plain { stamp.to_le_bytes() } else { stream.any().to_le_bytes() })
            .collect();
        Self::Data { disk, start, content }
    }

    pub fn change(&self) -> Change {
        match self {
            Self::Data { disk, start, content } => Change::Write {
                disk: DiskNo(*disk),
                start: *start,
                data: Bytes::copy_from_slice(content),
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
        }
    }

    /// The writes in a frame, decoded and verified.
    pub fn of_frame(frame: &Arc<Frame>) -> Vec<Self> {
        frame.verify(&mut Codecs::new()).expect("verify");
        let head = frame.head().expect("head");
        let stored: Vec<u8> = frame.content().iter().flat_map(|piece| piece.to_vec()).collect();
        let mut content = Vec::new();
        for (block, how, at) in frame.blocks().expect("blocks") {
            let mut out = vec![0; block.len()];
            let bytes = &stored[at as usize..(at + how.len) as usize];
            assert!(Codecs::new().decode(how.codec, bytes, &mut out));
            content.extend(out);
        }
        let mut rest = &content[..];
        head.records()
            .filter_map(|record| match record {
                Record::Write { disk, extent } => {
                    let (these, behind) = rest.split_at(extent.bytes() as usize);
                    rest = behind;
                    Some(Self::Data { disk: disk.0, start: extent.start, content: these.to_vec() })
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
                _ => None,
            })
            .collect()
    }
}

/// The content of all disks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Model {
    disks: Vec<Vec<u8>>,
}

impl Model {
    pub fn blank(disks: u32, sectors: u64) -> Self {
        Self { disks: vec![vec![0; (sectors * SECTOR) as usize]; disks as usize] }
    }

    pub fn of(writes: &[Write], disks: u32, sectors: u64) -> Self {
        let mut model = Self::blank(disks, sectors);
        writes.iter().for_each(|write| model.apply(write));
        model
    }

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
            Write::AddDisk { .. } => {}
        }
    }

    pub fn is_zero(&self, disk: DiskNo, extent: Extent) -> bool {
        let from = (extent.start * SECTOR) as usize;
        let to = (extent.end() * SECTOR) as usize;
        self.disks[disk.0 as usize][from..to].iter().all(|byte| *byte == 0)
    }
}

/// Everything that a view shows.
pub fn contents(view: &View, disks: u32, sectors: u64) -> srn_store::Result<Model> {
    let mut model = Model::blank(disks, sectors);
    for (no, disk) in (0..).zip(&mut model.disks) {
        view.read(DiskNo(no), Extent::new(0, sectors), disk)?;
    }
    Ok(model)
}

/// What groups on a simulated disk share.
pub fn shared(disk: &SimDisk, seed: u64) -> Shared {
    let chance = std::sync::Mutex::new(Chance::new(seed));
    Shared {
        volume: Volume::new(Arc::new(disk.clone())),
        pool: BufPool::new(1 << 20),
        cache: Arc::new(BlockCache::new(1 << 20)),
        recent: Arc::new(RecentBudget::new(64 * 1024)),
        entropy: Arc::new(move || chance.lock().expect("chance").any()),
    }
}
