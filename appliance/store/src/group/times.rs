//! Which positions there are at which times: the line as blocks of frames, and the newest frame of
//! a block that is not later than a time.

use std::sync::{Arc, PoisonError};

use srn_core::ids::Seq;
use srn_core::point::{Block, Candidate, Timeline};
use srn_core::time::WallTime;

use super::Group;
use super::view::decode_catalog;
use crate::catalog::Catalog;
use crate::error::Result;
use crate::index::SeqPoint;
use crate::manifest::Purpose;

const fn block(point: &SeqPoint) -> Block {
    Block {
        first: point.seq,
        log_time: point.log_time,
        wall_time: point.wall_time,
        before: point.before,
        standing: point.standing,
        alone: false,
    }
}

/// A position without any before or behind it.
fn alone(catalog: &Catalog) -> Block {
    Block {
        first: catalog.at.seq,
        log_time: catalog.log_time,
        wall_time: catalog.wall_time,
        before: catalog.wall_time,
        standing: catalog.standing(),
        alone: true,
    }
}

impl Group {
    /// The main line in blocks, from the oldest position that can be read to the head.
    ///
    /// # Errors
    /// When an index file cannot be read.
    pub fn timeline(&self) -> Result<Timeline> {
        let (runs, layers, tables, base, head, head_time) = {
            let state = self.lock();
            let main = state.manifest.main;
            let runs = state.piece_runs(main)?;
            let pieces = state.manifest.timelines.get(&main).map_or(&[][..], |line| &line.pieces);
            let layers: Vec<bool> = pieces
                .iter()
                .map(|piece| state.manifest.layers.contains_key(&piece.ordinal))
                .collect();
            let line = state.lines.get(&main);
            let tables: Vec<_> = line
                .map(|line| line.unsealed.iter().map(|open| open.table.clone()).collect())
                .unwrap_or_default();
            let base = state.oldest_point().cloned();
            let head = line.map_or(Seq::ZERO, |line| line.head.seq);
            (
                runs,
                layers,
                tables,
                base,
                head,
                line.map_or(WallTime(0), |line| line.catalog.wall_time),
            )
        };
        let oldest = base.as_ref().map_or(Seq::ZERO, |base| base.at.seq);
        let mut blocks: Vec<Block> = base.iter().map(alone).collect();
        // What was appended since is not looked at.
        let kept = |point: &&SeqPoint| point.seq > oldest && point.seq <= head;
        for (run, is_layer) in runs.iter().zip(layers) {
            if is_layer {
                blocks.push(alone(&decode_catalog(&run.catalog()?)?));
                continue;
            }
            blocks.extend(run.points()?.iter().filter(kept).map(block));
        }
        for table in &tables {
            let table = table.read().unwrap_or_else(PoisonError::into_inner);
            blocks.extend(table.points().iter().filter(kept).map(block));
        }
        blocks.sort_by_key(|block| block.first);
        blocks.dedup_by_key(|block| block.first);
        Ok(Timeline { blocks, head, head_time })
    }

    /// Positions from which other lines go on: branches, and clones that somebody runs on.
    #[must_use]
    pub fn forks(&self) -> Vec<Seq> {
        let state = self.lock();
        let Some(main) = state.manifest.timelines.get(&state.manifest.main) else {
            return Vec::new();
        };
        let others = state.manifest.timelines.values();
        others
            .filter(|line| line.purpose != Purpose::Main)
            .filter_map(|line| main.epochs.common_with(&line.epochs))
            .collect()
    }

    /// The newest frame of a candidate that is not later than `time`, by reading the frames of its
    /// block.
    ///
    /// # Errors
    /// As [`super::Cursor::next`].
    pub fn newest_at(self: &Arc<Self>, candidate: Candidate, time: WallTime) -> Result<Seq> {
        let mut newest = candidate.first;
        let mut cursor = self.cursor(newest.next());
        while newest < candidate.last {
            match cursor.next()? {
                Some(frame) if frame.header().wall_time <= time => newest = frame.header().seq,
                _ => break,
            }
        }
        Ok(newest)
    }
}
