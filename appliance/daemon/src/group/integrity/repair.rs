//! Fetching from the peer what is damaged here.
//!
//! Invariant: nothing is put in place that is not proven to be what was there: a page by its own
//! checksum or by having been read at exactly a position at which the base answers for it here; a block of
//! a layer by its checksum in the layer's index; frames by the chain of hashes.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use srn_core::epoch::Position;
use srn_core::extent::Extent;
use srn_core::ids::{DiskNo, EpochId, Seq};
use srn_core::limits::PAGE_SECTORS;
use srn_core::wire::{CONTENT_SECTORS_MAX, Words};
use srn_store::frame::Frame;
use srn_store::group::damage::DamagedPart;
use srn_store::group::{LayerBlock, Missing, Repaired, content_hash, pages_of};
use srn_store::manifest::Role;

use super::ask::Unanswered;
use super::{Group, idle};
use crate::error::{Failure, Kind};

/// Content of frames that are fetched for one segment, in bytes.
const FETCHED_MAX: usize = 128 << 20;

/// How long it is waited that a segment is sealed.
const SEALED_WITHIN: Duration = Duration::from_secs(20);

/// Why something cannot be repaired, in words.
type Why = String;

impl Group {
    /// Repairs something. Gives in words where it came from.
    pub(super) async fn repair(self: &Arc<Self>, part: DamagedPart) -> Result<String, Why> {
        match part {
            DamagedPart::Base { disk, extent } => self.repair_pages(disk, extent).await?,
            DamagedPart::Frames { epoch, first, last } => {
                self.repair_frames(epoch, first, last).await?;
            }
            DamagedPart::Layer { file, disk, extent } => {
                self.repair_block(file, disk, extent).await?;
            }
            DamagedPart::Index { file } => {
                let store = self.store.clone();
                let done = idle::run(move || store.repair_index(file)).await.map_err(words)?;
                return match done {
                    Ok(Repaired::Yes | Repaired::NotNeeded) => Ok(" from the log".into()),
                    Ok(_) => Err("it cannot be made again from the log".into()),
                    Err(error) => Err(error.to_string()),
                };
            }
        }
        let peer = self.session().map(|session| format!(" from {}", session.hello().name));
        Ok(peer.unwrap_or_default())
    }

    async fn repair_pages(self: &Arc<Self>, disk: DiskNo, extent: Extent) -> Result<(), Why> {
        let sectors = {
            let store = self.store.clone();
            let Some(base) = store.base_position() else { return Ok(()) };
            let size = idle::run(move || {
                store
                    .view_at(base.seq)
                    .map(|view| view.catalog().disks.get(&disk).map(|disk| disk.sectors))
            });
            match size.await.map_err(words)? {
                Ok(Some(sectors)) => sectors,
                // It was removed meanwhile, or the base has moved on: looked at again next time.
                _ => self.catalog().disks.get(&disk).map_or(0, |disk| disk.sectors),
            }
        };
        let mut pages: Vec<u64> = pages_of(extent).collect();
        pages.retain(|page| page * PAGE_SECTORS < sectors);
        for some in pages.chunks((CONTENT_SECTORS_MAX / PAGE_SECTORS) as usize) {
            let (Some(first), Some(last)) = (some.first(), some.last()) else { continue };
            let start = first * PAGE_SECTORS;
            let end = ((last + 1) * PAGE_SECTORS).min(sectors);
            self.repair_some(disk, *first, Extent::new(start, end - start)).await?;
        }
        Ok(())
    }

    /// Repairs pages that one question can ask for.
    async fn repair_some(
        self: &Arc<Self>,
        disk: DiskNo,
        first: u64,
        extent: Extent,
    ) -> Result<(), Why> {
        let mut why = "the peer has not got it".to_owned();
        for at in self.places_to_ask_at() {
            let asked = self.ask_content(at, disk, extent).await;
            let Some(bytes) = had(asked, &mut why)? else { continue };
            let store = self.store.clone();
            let done = idle::run(move || store.repair_pages(disk, first, &bytes, at));
            let done = done.await.map_err(words)?.map_err(|error| error.to_string())?;
            if done.iter().all(|done| matches!(done, Repaired::Yes | Repaired::NotNeeded)) {
                return Ok(());
            }
            why = "what the peer has now is newer".into();
        }
        Err(why)
    }

    /// Repairs a block of a layer.
    async fn repair_block(
        self: &Arc<Self>,
        file: u32,
        disk: DiskNo,
        extent: Extent,
    ) -> Result<(), Why> {
        let store = self.store.clone();
        let block = idle::run(move || store.damaged_block(file, disk, extent)).await;
        let block = block.map_err(words)?.map_err(|error| error.to_string())?;
        let Some(LayerBlock { whole, places }) = block else { return Ok(()) };
        let mut why = "the peer has it at no position that it keeps".to_owned();
        for at in places.into_iter().chain(self.newest_of_both()) {
            let asked = self.ask_content(at, disk, whole).await;
            let Some(bytes) = had(asked, &mut why)? else { continue };
            let store = self.store.clone();
            let done = idle::run(move || store.repair_block(file, disk, extent, &bytes)).await;
            match done.map_err(words)?.map_err(|error| error.to_string())? {
                Repaired::Yes | Repaired::NotNeeded => return Ok(()),
                Repaired::NotTheSame => why = "what the peer has now is newer".into(),
                Repaired::Later => return Err("it is being moved; it is tried again".into()),
            }
        }
        Err(why)
    }

    /// Positions at which the peer may still have what the base has: the base's own, then the newest
    /// that both hold.
    fn places_to_ask_at(self: &Arc<Self>) -> Vec<Position> {
        self.store.base_position().into_iter().chain(self.newest_of_both()).collect()
    }

    /// The newest position that both nodes hold.
    fn newest_of_both(self: &Arc<Self>) -> Option<Position> {
        match self.role() {
            Role::Secondary => Some(self.store.head()),
            Role::Primary => {
                let acked = self.store.acked();
                self.store.view_at(acked).ok().map(|view| view.catalog().at)
            }
        }
    }

    async fn ask_content(
        &self,
        at: Position,
        disk: DiskNo,
        extent: Extent,
    ) -> Result<Vec<u8>, Unanswered> {
        match self.ask_peer(&Words::ContentWanted { at, disk, extent }).await? {
            Words::Content { hash, bytes }
                if bytes.len() as u64 == extent.bytes() && content_hash(&bytes) == hash =>
            {
                Ok(bytes)
            }
            _ => Err(untrusted()),
        }
    }

    async fn repair_frames(
        self: &Arc<Self>,
        epoch: EpochId,
        first: Seq,
        last: Seq,
    ) -> Result<(), Why> {
        let missing = match self.missing(epoch, first, last).await? {
            Missing::Nothing => return Ok(()),
            Missing::Frames(missing) => missing,
            Missing::Later => {
                // It is being written to. What is closed is sealed, and then it can be replaced.
                self.engine().close_segment().await;
                self.maintainer.wake();
                self.until_sealed(epoch, first, last).await?
            }
        };
        let mut fetched = BTreeMap::new();
        let mut bytes = 0;
        for seq in missing {
            let frame = match self.ask_peer(&Words::FrameWanted { epoch, seq }).await {
                Ok(Words::Frame(frame)) => Bytes::from(frame),
                Ok(_) => return Err(told(untrusted())),
                Err(why) => return Err(told(why)),
            };
            bytes += frame.len();
            if bytes > FETCHED_MAX {
                return Err("too much of one log segment is damaged".into());
            }
            let frame = Frame::from_wire(&frame)
                .map_err(|error| format!("what the peer sends is not sound: {error}"))?;
            fetched.insert(seq, Arc::new(frame));
        }
        let store = self.store.clone();
        let done = idle::run(move || store.repair_segment(epoch, first, &fetched)).await;
        match done.map_err(words)? {
            Ok(Repaired::Yes | Repaired::NotNeeded) => Ok(()),
            Ok(Repaired::NotTheSame) => Err("the peer has other frames there".into()),
            Ok(Repaired::Later) => Err("it is being moved; it is tried again".into()),
            Err(error) => Err(error.to_string()),
        }
    }

    async fn until_sealed(
        self: &Arc<Self>,
        epoch: EpochId,
        first: Seq,
        last: Seq,
    ) -> Result<Vec<Seq>, Why> {
        let waited = tokio::time::timeout(SEALED_WITHIN, async {
            loop {
                match self.missing(epoch, first, last).await? {
                    Missing::Nothing => return Ok(Vec::new()),
                    Missing::Frames(missing) => return Ok(missing),
                    Missing::Later => tokio::time::sleep(Duration::from_millis(100)).await,
                }
            }
        });
        waited.await.unwrap_or_else(|_| Err("its log segment is still written to".into()))
    }

    async fn missing(
        self: &Arc<Self>,
        epoch: EpochId,
        first: Seq,
        last: Seq,
    ) -> Result<Missing, Why> {
        let store = self.store.clone();
        let missing = idle::run(move || store.missing_frames(epoch, first, last)).await;
        missing.map_err(words)?.map_err(|error| error.to_string())
    }
}

/// What the peer has, if it is worth looking at; nothing when another place may do, and why not.
///
/// # Errors
/// When no place will.
fn had(asked: Result<Vec<u8>, Unanswered>, why: &mut Why) -> Result<Option<Vec<u8>>, Why> {
    match asked {
        Ok(bytes) => return Ok(Some(bytes)),
        Err(Unanswered::NotInHistory(_)) => {}
        Err(Unanswered::NoCopy) => {
            return Err("the peer keeps a local cache, which has no copy of it".into());
        }
        Err(Unanswered::Failed(failure)) => *why = failure.message,
    }
    Ok(None)
}

fn words(failure: Failure) -> Why {
    failure.message
}

fn untrusted() -> Unanswered {
    Failure::new(Kind::Untrusted, "the peer answers something else").into()
}

fn told(why: Unanswered) -> Why {
    match why {
        Unanswered::NotInHistory(_) => "the peer does not have it in its log any more".into(),
        Unanswered::NoCopy => "the peer has no copy of it".into(),
        Unanswered::Failed(failure) => failure.message,
    }
}
