//! What is there already: a file or an NBD export that holds much of what a disk of the primary holds,
//! so that only the difference has to cross the link.
//!
//! A seed is never believed: what is taken from it has the hash that the primary named, looked at
//! again when it is taken.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use srn_core::extent::Extent;
use srn_core::ids::DiskNo;
use srn_core::limits::{PAGE, SECTOR};
use srn_core::wire::LeafPages;
use srn_nbd::client::Client;
use srn_store::catalog::Catalog;
use srn_store::group::content_hash;
use tokio::runtime::Handle;

use crate::error::{Failure, Kind, Result};
use crate::fleet::SeedRecord;

/// How long an export may take for one leaf.
const READ_PATIENCE: Duration = Duration::from_secs(10);

/// The hash of nothing but zeros.
pub(super) fn zero_hash(bytes: u64) -> [u8; 16] {
    const ZEROS: [u8; PAGE] = [0; PAGE];
    content_hash(ZEROS.get(..usize::try_from(bytes).unwrap_or(PAGE)).unwrap_or(&ZEROS))
}

/// The seeds of a group's disks.
#[derive(Debug, Default)]
pub(in crate::group) struct Seeds {
    disks: BTreeMap<DiskNo, Seed>,
}

#[derive(Debug)]
struct Seed {
    name: String,
    bytes: u64,
    from: From,
}

#[derive(Debug)]
enum From {
    File(File),
    Export(Client, Handle),
}

/// What a seed has in the place of a leaf.
pub(super) struct SeedLeaf {
    pub(super) hash: [u8; 16],
    pub(super) pages: LeafPages,
}

impl Seeds {
    /// Opens them.
    ///
    /// # Errors
    /// When one cannot be opened, or it is not said for which disk it is.
    pub(super) async fn open(
        asked: &[SeedRecord],
        catalog: &Catalog,
        handle: &Handle,
    ) -> Result<Self> {
        let mut disks = BTreeMap::new();
        for record in asked {
            let disk = match &record.disk {
                Some(name) => catalog.by_name(name).map(|(no, _)| no),
                None if catalog.disks.len() == 1 => catalog.disks.keys().next().copied(),
                None => {
                    return Err(Failure::invalid(format!(
                        "the group has {} disks: say for which one {} is: --seed-from DISK={}",
                        catalog.disks.len(),
                        record.from,
                        record.from
                    )));
                }
            };
            let name = record.disk.as_deref().unwrap_or_default();
            let disk = disk.ok_or_else(|| {
                Failure::new(Kind::NotFound, format!("the group has no disk {name}"))
            })?;
            disks.insert(disk, Seed::open(&record.from, handle).await?);
        }
        Ok(Self { disks })
    }

    /// What the seed of a disk has in the place of a leaf; none where it has nothing, or cannot be
    /// read.
    pub(super) fn leaf(&self, disk: DiskNo, extent: Extent) -> Result<Option<SeedLeaf>> {
        let Some(seed) = self.disks.get(&disk) else { return Ok(None) };
        if extent.end() * SECTOR > seed.bytes {
            return Ok(None);
        }
        let content = match seed.read(extent) {
            Ok(content) => content,
            Err(error) => {
                // It comes over the link then.
                log::warn!("{}", error.message);
                return Ok(None);
            }
        };
        let mut pages = LeafPages::default();
        for (page, content) in pages.iter_mut().zip(content.chunks(PAGE)) {
            *page = content_hash(content);
        }
        Ok(Some(SeedLeaf { hash: content_hash(&content), pages }))
    }

    /// What a seed has in a place, which is known to have this hash.
    ///
    /// # Errors
    /// When it cannot be read, or has changed.
    pub(super) fn read(&self, disk: DiskNo, extent: Extent, hash: &[u8; 16]) -> Result<Vec<u8>> {
        let seed = self.disks.get(&disk);
        let seed = seed.ok_or_else(|| Failure::internal("a seed is gone"))?;
        let content = seed.read(extent)?;
        if content_hash(&content) == *hash {
            return Ok(content);
        }
        Err(Failure::refused(format!(
            "{} is being written to: what it has at byte {} has changed while it was compared; \
             nothing may write to a seed",
            seed.name,
            extent.start * SECTOR
        )))
    }
}

impl Seed {
    async fn open(from: &str, handle: &Handle) -> Result<Self> {
        if from.contains("://") {
            let (client, bytes) = crate::source::connect_nbd(from).await?;
            let from = From::Export(client, handle.clone()).named(from);
            return Ok(Self { bytes, ..from });
        }
        let cannot = |error: std::io::Error| Failure::invalid(format!("{from}: {error}"));
        let mut file = File::open(Path::new(from)).map_err(cannot)?;
        // The end of a block device is found so, too.
        let bytes = std::io::Seek::seek(&mut file, std::io::SeekFrom::End(0)).map_err(cannot)?;
        Ok(Self { bytes, ..From::File(file).named(from) })
    }

    fn read(&self, extent: Extent) -> Result<Vec<u8>> {
        let cannot = |error: &dyn std::fmt::Display| {
            let at = extent.start * SECTOR;
            Failure::new(Kind::Storage, format!("{}: reading at byte {at}: {error}", self.name))
        };
        let mut content = vec![0; usize::try_from(extent.bytes()).unwrap_or(0)];
        match &self.from {
            From::File(file) => {
                let read = file.read_exact_at(&mut content, extent.start * SECTOR);
                read.map_err(|error| cannot(&error))?;
            }
            From::Export(client, handle) => {
                let len = u32::try_from(content.len()).unwrap_or(0);
                let read = handle.block_on(async {
                    tokio::time::timeout(READ_PATIENCE, client.read(extent.start * SECTOR, len))
                        .await
                });
                let read = read.map_err(|_| cannot(&"no answer"))?;
                content.copy_from_slice(&read.map_err(|error| cannot(&error))?);
            }
        }
        Ok(content)
    }
}

impl From {
    fn named(self, name: &str) -> Seed {
        Seed { name: name.to_owned(), bytes: 0, from: self }
    }
}

/// Whether these can be opened at all; for whoever asks.
///
/// # Errors
/// Why not.
pub(super) async fn check(asked: &[SeedRecord], handle: &Handle) -> Result<()> {
    for record in asked {
        Seed::open(&record.from, handle).await?;
    }
    Ok(())
}
