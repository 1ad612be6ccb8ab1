//! Taking in what changed between our newest frame and a later one of the peer's, without the frames
//! between: what a node does that is too far behind for frames.
//!
//! What comes is written as a layer. Every point up to our newest frame stays as it is, the later one
//! is the next that can be recovered, and between them there is none.
//!
//! Invariants:
//! * the newest clean point is one that this node has;
//! * nothing of it is seen before all of it is durable: then the main line is at the later position,
//!   in one change of the manifest; a crash before that leaves the line where it was;
//! * our newest frame lies on the peer's line: a line that has left it is set back first
//!   ([`Group::follow`]).

use std::sync::{Arc, PoisonError};

use srn_core::bytes::content_sum;
use srn_core::course::Course;
use srn_core::epoch::{EpochTable, Position};
use srn_core::extent::Extent;
use srn_core::ids::DiskNo;
use srn_core::limits::{BLOCK_MAX, DISK_SECTORS_MAX, SECTOR};
use srn_core::mutants::{self, Mutant};
use srn_core::time::Now;

use super::append::Appender;
use super::layers::{Block, LayerOutput, RESERVE_BYTES, WrittenLayer};
use super::{Group, Line};
use crate::catalog::Catalog;
use crate::codec::{Codecs, Effort};
use crate::error::{Result, StoreError};
use crate::manifest::{Keep, Manifest, Role};

/// Where a leap leads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeapTo {
    /// The peer's line of epochs, up to that of the position.
    pub epochs: EpochTable,
    /// The group there; its position is where the leap ends.
    pub catalog: Catalog,
}

/// A leap under way. Dropped before [`Leap::finish`], it leaves nothing.
#[derive(Debug)]
pub struct Leap {
    group: Arc<Group>,
    from: Position,
    to: LeapTo,
    output: LayerOutput,
    codecs: Codecs,
    effort: Effort,
    /// The first place that may come next.
    next: (DiskNo, u64),
    /// Room that is left, in bytes.
    room: u64,
    /// Taken of it since it was looked at.
    since: u64,
}

/// After so many bytes it is looked at anew what room there is: others take of it too.
const LOOK_BYTES: u64 = 64 << 20;

/// What an entry of the index takes, in bytes.
const ENTRY_BYTES: u64 = 32;

impl Group {
    /// Begins a leap of the main line to a later position. The line's appender must have closed its
    /// segment, and append nothing until the leap has ended, or it is for nothing; before
    /// [`Leap::finish`] it must have been dropped. Content that comes is stored with `effort`.
    ///
    /// # Errors
    /// [`StoreError::Invalid`] for a cache or a primary, and for a position that is not behind ours;
    /// [`StoreError::NotInHistory`] when our newest frame does not lie on the peer's line. As the
    /// volume says.
    pub fn begin_leap(self: &Arc<Self>, to: LeapTo, effort: Effort) -> Result<Leap> {
        if self.keep != Keep::Replica || self.role() != (Role::Secondary, None) {
            return Err(StoreError::Invalid(
                "only a replica that takes a peer's frames leaps".into(),
            ));
        }
        while self.seal_oldest()? {}
        let (from, at) = (self.head(), to.catalog.at);
        if at.seq <= from.seq || to.epochs.current() != at.epoch {
            return Err(StoreError::Invalid(format!("{at} is not behind {from}")));
        }
        if Course::of(&self.epochs(), &from, &to.epochs) != Course::Straight {
            return Err(StoreError::NotInHistory(format!("{from} is not on the peer's line")));
        }
        let output = LayerOutput::begin(self, from.seq.next(), at)?;
        let room = self.room_for_layers()?;
        Ok(Leap {
            group: self.clone(),
            from,
            to,
            output,
            codecs: Codecs::new(),
            effort,
            next: (DiskNo(0), 0),
            room,
            since: 0,
        })
    }
}

impl Leap {
    /// The frame that it goes out from.
    #[must_use]
    pub const fn from(&self) -> Position {
        self.from
    }

    /// The group where it leads.
    #[must_use]
    pub const fn catalog(&self) -> &Catalog {
        &self.to.catalog
    }

    /// Where it leads.
    #[must_use]
    pub const fn to(&self) -> Position {
        self.to.catalog.at
    }

    /// Everything before this place has been taken in.
    #[must_use]
    pub const fn next(&self) -> (DiskNo, u64) {
        self.next
    }

    /// What may still be taken in, in bytes as stored.
    #[must_use]
    pub const fn room(&self) -> u64 {
        self.room
    }

    /// Takes in zeros; everything comes in order of disk and sector.
    ///
    /// # Errors
    /// [`StoreError::Invalid`] out of order; as the volume says.
    pub fn zero(&mut self, disk: DiskNo, extent: Extent, trim: bool) -> Result<()> {
        self.check(disk, extent)?;
        self.take_room(0)?;
        self.output.zero(disk, extent, trim)
    }

    /// Takes in content: whole sectors, at most 32 KiB, which the caller has verified.
    ///
    /// # Errors
    /// As [`Leap::zero`]; [`StoreError::Full`] when there is no room for it.
    pub fn content(&mut self, disk: DiskNo, start: u64, content: &[u8]) -> Result<()> {
        let sectors = content.len() as u64 / SECTOR;
        let extent = Extent::new(start, sectors);
        if content.len() > BLOCK_MAX || extent.bytes() != content.len() as u64 {
            return Err(StoreError::Invalid(format!("a block of {} bytes", content.len())));
        }
        self.check(disk, extent)?;
        let mut stored = Vec::with_capacity(content.len());
        let how = self.codecs.encode(self.effort, content, &mut stored);
        self.take_room(stored.len() as u64)?;
        let block = Block {
            stored: &stored,
            codec: how.codec,
            sum: content_sum(content),
            sectors: u8::try_from(sectors).unwrap_or(u8::MAX),
        };
        self.output.block(disk, start, block)
    }

    /// An entry, and so many bytes of content.
    fn take_room(&mut self, stored: u64) -> Result<()> {
        let bytes = stored + ENTRY_BYTES;
        self.since += bytes;
        if self.since >= LOOK_BYTES {
            self.since = 0;
            self.room = self.room.min(self.group.room_for_layers()?);
        }
        self.room = self.room.checked_sub(bytes).ok_or_else(|| {
            StoreError::Full(format!(
                "what changed at the peer does not fit; {} MiB are kept free",
                RESERVE_BYTES >> 20
            ))
        })?;
        Ok(())
    }

    fn check(&mut self, disk: DiskNo, extent: Extent) -> Result<()> {
        // A disk that was removed or made smaller may have been written before.
        let fits = disk.0 < self.to.catalog.next_disk && extent.fits(DISK_SECTORS_MAX);
        if extent.sectors == 0 || (disk, extent.start) < self.next || !fits {
            return Err(StoreError::Invalid(format!(
                "{extent} of disk {} is out of place",
                disk.0
            )));
        }
        self.next = (disk, extent.end());
        Ok(())
    }

    /// All has come: the main line is at the later position, durably. Gives its end.
    ///
    /// # Errors
    /// [`StoreError::NotInHistory`] when the line has moved meanwhile; as the volume says.
    pub fn finish(self, now: Now) -> Result<Appender> {
        let Self { group, from, to, output, .. } = self;
        let mut catalog = to.catalog;
        if !catalog.is_clean() && !mutants::is(Mutant::CleanPointOfPeer) {
            // Between the two frames there is no point: the newest clean one is that of this node.
            let here = group.catalog();
            catalog.last_clean = if here.is_clean() { Some(from) } else { here.last_clean };
        }
        let layer = output.finish(catalog.log_time, &[], &catalog.encode())?;
        group.sync_layers()?;
        {
            let _still = group.maintaining.lock().unwrap_or_else(PoisonError::into_inner);
            group.forget_recent_of_main();
            let at = catalog.at;
            let published = group.publish_if(
                |manifest| lengthen(manifest, from, &to.epochs, &layer),
                |state| {
                    layer.install(state);
                    let kept = &state.manifest.timelines;
                    state.lines.retain(|line, _| kept.contains_key(line));
                    state.lines.insert(at.epoch, Line::at(at, catalog));
                },
            )?;
            if !published {
                return Err(StoreError::NotInHistory(format!(
                    "the line is not at {from} any more"
                )));
            }
            layer.keep();
        }
        group.appender(now)
    }
}

/// The main line goes on behind `from` with a layer, in the last of `epochs`; unless it is not there.
fn lengthen(
    manifest: &mut Manifest,
    from: Position,
    epochs: &EpochTable,
    layer: &WrittenLayer,
) -> bool {
    let base = manifest.base.as_ref().map(|base| base.catalog.at);
    let Some(mut line) = manifest.timelines.remove(&manifest.main) else { return false };
    if line.pieces.last().map(|piece| piece.last).or(base) != Some(from) {
        return false;
    }
    line.pieces.push(layer.piece);
    line.epochs = epochs.clone();
    manifest.main = epochs.current();
    manifest.timelines.insert(manifest.main, line);
    layer.list(manifest);
    true
}
