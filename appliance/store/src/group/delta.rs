//! What changed between two positions: for each sector that was written behind the first one, its
//! content at the second.
//!
//! It is read from the index, never by looking at the disks: its cost grows with what changed. This is
//! what a peer needs that is too far behind for frames; see [`super::Leap`] for its other end.

use std::sync::Arc;

use srn_core::epoch::{EpochTable, Position};
use srn_core::extent::Extent;
use srn_core::ids::{DiskNo, Seq};

use super::compact::Source;
use super::view::{Sources, decode_catalog, read_block};
use super::{Group, LeapTo, State};
use crate::error::{Result, StoreError};
use crate::index::{Merge, Place, Run};
use crate::manifest::{Keep, PieceMeta};

/// One thing that changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Changed {
    /// The extent reads as zero; `trim`: because it was discarded.
    Zero {
        /// Discarded rather than zeroed.
        trim: bool,
    },
    /// Content: at most 32 KiB, verified.
    Content(Vec<u8>),
}

/// A reader of what changed, in order of disk and sector, without overlaps.
#[derive(Debug)]
pub struct Delta {
    group: Arc<Group>,
    /// Holds everything that is read.
    sources: Arc<Sources>,
    merge: Merge<Source>,
    /// Nothing before this place is told.
    begin: (DiskNo, u64),
    to: LeapTo,
}

impl Group {
    /// What changed on the main line behind frame `from`, up to its newest sealed frame. More than
    /// that may be among it, with its content there: whatever was merged into one layer with it.
    ///
    /// # Errors
    /// [`StoreError::NotInHistory`] when the base is beyond `from`: then nobody knows what changed;
    /// [`StoreError::Invalid`] for a cache. As the volume says.
    pub fn delta(self: &Arc<Self>, from: Seq) -> Result<Delta> {
        if self.keep != Keep::Replica {
            return Err(StoreError::Invalid(
                "a local cache holds no copy of the disks that could be sent".into(),
            ));
        }
        while self.seal_oldest()? {}
        let (sources, epochs, last, behind) = self.lock().changed_behind(from)?;
        let catalog = decode_catalog(&behind.catalog()?)?;
        if catalog.at != last {
            return Err(StoreError::Corrupt(format!("the catalog behind frame {}", last.seq)));
        }
        let merge = merge_of(&sources)?;
        Ok(Delta {
            group: self.clone(),
            sources: Arc::new(sources),
            merge,
            begin: (DiskNo(0), 0),
            to: LeapTo { epochs, catalog },
        })
    }
}

fn merge_of(sources: &Sources) -> Result<Merge<Source>> {
    Merge::new(sources.runs().iter().map(|run| Source::Run(Run::into_iter(run.clone()))))
}

impl State {
    /// The sealed pieces behind frame `from`: what they hold, and where they end.
    fn changed_behind(&self, from: Seq) -> Result<(Sources, EpochTable, Position, Arc<Run>)> {
        let base = self.manifest.base.as_ref().map_or(Seq::ZERO, |base| base.catalog.at.seq);
        if from < base {
            return Err(StoreError::NotInHistory(format!(
                "what changed between frames {from} and {base} is not known any more"
            )));
        }
        let line = self.manifest.timelines.get(&self.manifest.main);
        let line = line.ok_or_else(|| StoreError::NotInHistory("there is no main line".into()))?;
        let is_behind = |piece: &PieceMeta| piece.last.seq > from;
        let at = line.pieces.partition_point(|piece| !is_behind(piece));
        let pieces = line.pieces.get(at..).unwrap_or_default();
        let last = pieces.last().ok_or_else(|| {
            StoreError::NotInHistory(format!("nothing is sealed behind frame {from}"))
        })?;
        let behind = self.run_of(last)?;
        Ok((self.sources(pieces, &[])?, line.epochs.clone(), last.last, behind))
    }
}

impl Delta {
    /// Where it leads.
    #[must_use]
    pub const fn to(&self) -> &LeapTo {
        &self.to
    }

    /// A reader of the same, from a place on: what begins before it was told before.
    ///
    /// # Errors
    /// When an index file cannot be read.
    pub fn again_from(&self, disk: DiskNo, sector: u64) -> Result<Self> {
        Ok(Self {
            group: self.group.clone(),
            sources: self.sources.clone(),
            merge: merge_of(&self.sources)?,
            begin: (disk, sector),
            to: self.to.clone(),
        })
    }

    /// Bytes of content that are to be read in all.
    ///
    /// # Errors
    /// When an index file cannot be read.
    pub fn content_bytes(&self) -> Result<u64> {
        let mut bytes = 0;
        for item in merge_of(&self.sources)? {
            let (_, extent, place) = item?;
            bytes += if matches!(place, Place::Zero { .. }) { 0 } else { extent.bytes() };
        }
        Ok(bytes)
    }

    /// The next thing that changed; none when all was told.
    ///
    /// # Errors
    /// [`StoreError::Corrupt`] when content is damaged; as the volume says.
    #[expect(clippy::should_implement_trait, reason = "an error may be followed by more")]
    pub fn next(&mut self) -> Result<Option<(DiskNo, Extent, Changed)>> {
        let (disk, extent, place) = loop {
            match self.merge.next().transpose()? {
                None => return Ok(None),
                Some((disk, extent, _)) if (disk, extent.start) < self.begin => {}
                Some(item) => break item,
            }
        };
        let changed = match place {
            Place::Zero { trim } => Changed::Zero { trim },
            Place::Block { segment, .. } => {
                let len = usize::try_from(extent.bytes()).unwrap_or(usize::MAX);
                let mut content = vec![0; len];
                let file = self.sources.content(segment)?;
                read_block(&self.group.shared.pool, file, &place, &mut content)?;
                Changed::Content(content)
            }
        };
        Ok(Some((disk, extent, changed)))
    }
}
