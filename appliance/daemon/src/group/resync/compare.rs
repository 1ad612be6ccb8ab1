//! Comparing contents, the primary's side: hashes of leaves go ahead, then those pages of the leaves
//! that the secondary lacks, of which it has something else.

use std::collections::VecDeque;
use std::sync::Arc;

use srn_core::bytes::is_zero;
use srn_core::extent::Extent;
use srn_core::ids::DiskNo;
use srn_core::limits::{BLOCK_MAX, PAGE_SECTORS, SECTOR};
use srn_core::wire::{Grain, Item, LEAVES_MAX, LeafPages, Place, Wanted};
use srn_link::{FrameWriter, LinkError};
use srn_store::codec::{Codecs, Effort};
use srn_store::group::{GrainHash, View, content_hash};

use super::Running;
use super::give::{Encoded, GiveError, Given, Giver, encode};
use crate::error::{Failure, Kind};
use crate::group::integrity::to_runs;

/// Batches of leaves whose hashes are sent ahead of what is wanted of them.
const AHEAD: usize = 4;

/// Content read for the hashes of one batch, in bytes.
const READ_MAX: u64 = 16 << 20;

/// Leaves whose pages are read in one go.
const LEAVES_AT_ONCE: usize = 16;

/// Leaves whose hashes were sent.
struct Batch {
    disk: DiskNo,
    first: u64,
    count: u64,
}

pub(super) async fn give(
    giver: &mut Giver,
    writer: &mut FrameWriter,
    view: &Arc<View>,
    given: &Given,
    begin: Place,
    running: &Running,
) -> Result<(), GiveError> {
    let leaf = Grain::Leaf.sectors();
    let mut disks: VecDeque<(DiskNo, u64)> = given
        .catalog
        .disks
        .iter()
        .filter(|(no, _)| **no >= begin.disk)
        .map(|(no, disk)| (*no, disk.sectors))
        .collect();
    let mut next = begin.sector.div_ceil(leaf);
    if disks.front().is_some_and(|(no, _)| *no != begin.disk) {
        next = 0;
    }
    let mut ahead: VecDeque<Batch> = VecDeque::new();
    let mut codecs = Codecs::new();
    loop {
        if ahead.len() < AHEAD
            && let Some((disk, sectors)) = disks.front().copied()
        {
            let rest = sectors.div_ceil(leaf).saturating_sub(next);
            if rest == 0 {
                disks.pop_front();
                next = 0;
                continue;
            }
            let (view, count) = (view.clone(), rest.min(LEAVES_MAX as u64));
            let hashing = move || view.hashes(disk, leaf, next, count, READ_MAX);
            let hashes = tokio::task::spawn_blocking(hashing).await??;
            if let Some(at) = hashes.iter().position(|hash| *hash == GrainHash::Unreadable) {
                let text = format!(
                    "disk {} is damaged here in the 64 KiB at byte {}; find and repair it first: \
                     srn scrub",
                    given.catalog.disks.get(&disk).map_or("", |disk| disk.name.as_str()),
                    (next + at as u64) * leaf * SECTOR
                );
                return Err(Failure::new(Kind::Storage, text).into());
            }
            let item = Item::Hashes { disk, first: next, runs: to_runs(&hashes) };
            giver.send(writer, &Encoded { bytes: item.encode().into(), content: 0 }).await?;
            let count = hashes.len() as u64;
            ahead.push_back(Batch { disk, first: next, count });
            next += count;
            continue;
        }
        let Some(batch) = ahead.pop_front() else { return Ok(()) };
        let wanted = giver.wanted.recv().await;
        let wanted = wanted.ok_or_else(|| Failure::internal("a task ended"))?;
        let fits = wanted.leaves.last().is_none_or(|(last, _)| u64::from(*last) < batch.count);
        if (wanted.disk, wanted.first) != (batch.disk, batch.first) || !fits {
            let text = "wants leaves whose hashes it was not told";
            giver.session.misbehaved(text);
            return Err(LinkError::Misbehaved(text.into()).into());
        }
        let sectors = given.catalog.disks.get(&batch.disk).map_or(0, |disk| disk.sectors);
        for leaves in wanted.leaves.chunks(LEAVES_AT_ONCE) {
            let wanted = Wanted { leaves: leaves.to_vec(), ..wanted };
            let (view, mut own) = (view.clone(), std::mem::take(&mut codecs));
            let work = move || {
                let items = pages(&view, &mut own, &wanted, sectors)?;
                Ok::<_, srn_store::StoreError>((items, own))
            };
            let (items, back) = tokio::task::spawn_blocking(work).await??;
            codecs = back;
            for item in &items {
                giver.send(writer, item).await?;
            }
        }
        let item = Item::Settled { disk: batch.disk, first: batch.first };
        giver.send(writer, &Encoded { bytes: item.encode().into(), content: 0 }).await?;
        let done = (batch.first + batch.count) * leaf;
        running.done((done.min(sectors) - batch.first * leaf) * SECTOR);
    }
}

/// The pages of leaves that are not what the peer has there.
fn pages(
    view: &View,
    codecs: &mut Codecs,
    wanted: &Wanted,
    sectors: u64,
) -> srn_store::Result<Vec<Encoded>> {
    let leaf = Grain::Leaf.sectors();
    let mut items = Vec::new();
    for (number, theirs) in &wanted.leaves {
        let start = (wanted.first + u64::from(*number)) * leaf;
        let extent = Extent::new(start, leaf.min(sectors.saturating_sub(start)));
        let mut content = vec![0; usize::try_from(extent.bytes()).unwrap_or(0)];
        view.read(wanted.disk, extent, &mut content)?;
        differing(&content, theirs, |at, len| {
            let part = content.get(at..at + len).unwrap_or_default();
            let extent = Extent::new(start + at as u64 / SECTOR, len as u64 / SECTOR);
            let disk = wanted.disk;
            let (item, content) = if is_zero(part) {
                (Item::Zero { disk, extent, trim: false }, 0)
            } else {
                (encode(codecs, Effort::Lz4, disk, extent, part), len as u64)
            };
            items.push(Encoded { bytes: item.encode().into(), content });
        });
    }
    Ok(items)
}

/// The runs of pages whose hashes differ, at most a block each and either zero or not: where in
/// `content`, and how long, in bytes.
fn differing(content: &[u8], theirs: &LeafPages, mut found: impl FnMut(usize, usize)) {
    let page = (PAGE_SECTORS * SECTOR) as usize;
    let mut run: Option<(usize, usize, bool)> = None;
    for (number, part) in content.chunks(page).enumerate() {
        let differs = theirs.get(number).is_none_or(|hash| *hash != content_hash(part));
        let zero = is_zero(part);
        run = match run {
            Some((at, len, same)) if differs && same == zero && len + part.len() <= BLOCK_MAX => {
                Some((at, len + part.len(), same))
            }
            before => {
                if let Some((at, len, _)) = before {
                    found(at, len);
                }
                differs.then_some((number * page, part.len(), zero))
            }
        };
    }
    if let Some((at, len, _)) = run {
        found(at, len);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_pages_that_differ_are_found_in_runs_of_a_kind() {
        let mut content = vec![0u8; 15 * 4096 + 512];
        for (number, page) in content.chunks_mut(4096).enumerate() {
            page.fill(u8::try_from(number).unwrap());
        }
        let mut theirs = LeafPages::default();
        for (number, page) in content.chunks(4096).enumerate() {
            theirs[number] = content_hash(page);
        }
        let runs = |content: &[u8], theirs: &LeafPages| {
            let mut runs = Vec::new();
            differing(content, theirs, |at, len| runs.push((at / 4096, len)));
            runs
        };
        assert_eq!(runs(&content, &theirs), []);
        content[3 * 4096] = 9;
        content[15 * 4096] = 9;
        assert_eq!(runs(&content, &theirs), [(3, 4096), (15, 512)]);
        // The first page is zero, and a run has at most 32 KiB.
        let nothing = LeafPages::default();
        let all = [(0, 4096), (1, 32_768), (9, 7 * 4096 - 4096 + 512)];
        assert_eq!(runs(&content, &nothing), all);
    }
}
