//! Which runs together index a stretch of history, and which ones to merge next. Pure.
//!
//! Lines share pieces of history, and two lines may have different pieces of the same frames. So a
//! run belongs to the pieces that it was made of, not to frames: a line can use it if it has these
//! pieces, from the first to the last.
//!
//! Runs of the same level that follow each other are merged eight at a time into one of the next
//! level; the smaller ones are kept, for they are what makes an older point readable. A stretch is
//! covered from its start, each time by the longest run that begins there and does not reach
//! beyond the stretch.

use std::ops::Range;

use super::run::RunMeta;
use crate::manifest::PieceMeta;

/// How many runs of one level are merged into one of the next.
pub const FAN_IN: usize = 8;

/// The level of an index of a segment up to a fork in its middle. It is never merged.
pub const PREFIX_LEVEL: u8 = 0xff;

/// The pieces that a run is the index of, if a line has them: places in `pieces`.
#[must_use]
pub fn span(run: &RunMeta, pieces: &[PieceMeta]) -> Option<Range<usize>> {
    let (from, to) = run.pieces;
    let begin = pieces.partition_point(|piece| piece.first < run.first);
    let end = pieces.partition_point(|piece| piece.last.seq < run.last);
    let starts = pieces.get(begin).is_some_and(|piece| {
        piece.ordinal == from && piece.first == run.first && piece.last.epoch == run.epoch
    });
    let ends = pieces.get(end).is_some_and(|piece| {
        piece.ordinal == to && piece.last.seq == run.last && piece.last.epoch == run.epoch
    });
    (starts && ends && begin <= end).then_some(begin..end + 1)
}

/// The runs, in order, that cover `pieces`, the first ones of a line; `None` when there is a gap.
#[must_use]
pub fn cover(runs: &[RunMeta], pieces: &[PieceMeta]) -> Option<Vec<RunMeta>> {
    // For each piece the longest run that begins with it.
    let mut longest: Vec<Option<(usize, RunMeta)>> = vec![None; pieces.len()];
    for run in runs {
        let Some(span) = span(run, pieces) else { continue };
        if let Some(best) = longest.get_mut(span.start)
            && best.is_none_or(|(end, _)| end < span.end)
        {
            *best = Some((span.end, *run));
        }
    }
    let mut chosen = Vec::new();
    let mut at = 0;
    while at < pieces.len() {
        let (end, run) = (*longest.get(at)?)?;
        chosen.push(run);
        at = end;
    }
    Some(chosen)
}

/// The next runs of a line to merge, oldest first: [`FAN_IN`] of one level and epoch that follow
/// each other and are not part of a run of a higher level yet.
#[must_use]
pub fn next_merge(runs: &[RunMeta], pieces: &[PieceMeta]) -> Option<Vec<RunMeta>> {
    let mut own: Vec<(u8, Range<usize>, RunMeta)> = runs
        .iter()
        .filter(|run| run.level != PREFIX_LEVEL)
        .filter_map(|run| Some((run.level, span(run, pieces)?, *run)))
        .collect();
    own.sort_by_key(|(level, span, _)| (*level, span.start));
    let top = own.last()?.0;
    // For each piece the highest level that it is in.
    let mut highest = vec![0; pieces.len()];
    for (level, span, _) in &own {
        if let Some(of_span) = highest.get_mut(span.clone()) {
            of_span.iter_mut().for_each(|highest| *highest = (*highest).max(*level));
        }
    }
    (0..=top).find_map(|level| {
        let mut chain: Vec<RunMeta> = Vec::new();
        let mut next = 0;
        for (_, span, run) in own.iter().filter(|(of, ..)| *of == level) {
            if highest.get(span.clone()).is_none_or(|of| of.iter().any(|above| *above > level)) {
                continue;
            }
            if span.start != next || chain.last().is_some_and(|last| last.epoch != run.epoch) {
                chain.clear();
            }
            chain.push(*run);
            next = span.end;
            if chain.len() == FAN_IN {
                return Some(chain);
            }
        }
        None
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use srn_core::epoch::Position;
    use srn_core::ids::{EpochId, FrameHash, Seq};
    use srn_core::time::LogTime;

    const E: EpochId = EpochId([1; 16]);

    fn run(level: u8, first: u64, last: u64, pieces: (u32, u32)) -> RunMeta {
        RunMeta { file: 0, level, epoch: E, first: Seq(first), last: Seq(last), pieces, entries: 0 }
    }

    fn piece(ordinal: u32, first: u64, last: u64) -> PieceMeta {
        PieceMeta {
            ordinal,
            first: Seq(first),
            last: Position { epoch: E, seq: Seq(last), hash: FrameHash::ORIGIN },
            last_log_time: LogTime(0),
            is_prefix: false,
        }
    }

    /// As many segments of ten frames as given, merged as long as there is something to merge.
    fn merged(segments: u64) -> (Vec<RunMeta>, Vec<PieceMeta>) {
        let (mut runs, mut pieces) = (Vec::new(), Vec::new());
        for at in 0..segments {
            let ordinal = u32::try_from(at).unwrap();
            runs.push(run(0, at * 10 + 1, at * 10 + 10, (ordinal, ordinal)));
            pieces.push(piece(ordinal, at * 10 + 1, at * 10 + 10));
            while let Some(inputs) = next_merge(&runs, &pieces) {
                let (first, last) = (inputs[0], inputs[7]);
                let pieces = (first.pieces.0, last.pieces.1);
                runs.push(run(first.level + 1, first.first.0, last.last.0, pieces));
            }
        }
        (runs, pieces)
    }

    fn ends(runs: &[RunMeta], pieces: &[PieceMeta]) -> Option<Vec<u64>> {
        cover(runs, pieces).map(|runs| runs.iter().map(|run| run.last.0).collect())
    }

    #[test]
    fn levels_grow_like_digits() {
        let (runs, pieces) = merged(8 * 8 + 8 + 3);
        let levels: Vec<u8> = cover(&runs, &pieces).unwrap().iter().map(|r| r.level).collect();
        assert_eq!(levels, [2, 1, 0, 0, 0]);
        assert_eq!(runs.iter().filter(|run| run.level == 1).count(), 9);
    }

    #[test]
    fn a_stretch_that_ends_earlier_uses_smaller_runs() {
        let (runs, pieces) = merged(64);
        let count = |some: usize| cover(&runs, &pieces[..some]).map(|runs| runs.len());
        assert_eq!(count(64), Some(1));
        assert_eq!(count(63), Some(7 + 7));
        assert_eq!(count(0), Some(0));
        assert_eq!(cover(&runs, &[piece(64, 641, 650)]), None, "nothing indexes it");
    }

    #[test]
    fn a_fork_in_the_middle_has_its_own_end() {
        let (mut runs, pieces) = merged(3);
        runs.push(run(PREFIX_LEVEL, 21, 25, (2, 2)));
        let forked = [pieces[0], pieces[1], piece(2, 21, 25)];
        assert_eq!(ends(&runs, &forked), Some(vec![10, 20, 25]));
        assert_eq!(ends(&runs, &pieces), Some(vec![10, 20, 30]));
        assert_eq!(next_merge(&runs, &pieces), None);
    }

    /// One line was merged into a layer up to where the other one was forked in a segment: the same
    /// frames, other files.
    #[test]
    fn lines_with_other_pieces_of_the_same_frames_use_their_own_runs() {
        let (mut runs, pieces) = merged(3);
        runs.push(run(PREFIX_LEVEL, 21, 25, (2, 2)));
        runs.push(run(0, 21, 25, (7, 7)));
        runs.push(run(0, 26, 30, (8, 8)));
        let forked = [pieces[0], pieces[1], piece(2, 21, 25)];
        let layered = [pieces[0], pieces[1], piece(7, 21, 25), piece(8, 26, 30)];
        let of = |pieces: &[PieceMeta]| -> Vec<(u32, u32)> {
            cover(&runs, pieces).unwrap().iter().map(|run| run.pieces).collect()
        };
        assert_eq!(of(&forked), [(0, 0), (1, 1), (2, 2)]);
        assert_eq!(of(&layered), [(0, 0), (1, 1), (7, 7), (8, 8)]);
        assert_eq!(of(&pieces), [(0, 0), (1, 1), (2, 2)]);
    }

    #[test]
    fn holes_are_not_merged_over() {
        let (mut runs, mut pieces) = merged(7);
        runs.push(run(0, 81, 90, (8, 8)));
        pieces.push(piece(8, 81, 90));
        assert!(next_merge(&runs, &pieces).is_some(), "places in the line follow each other");
        pieces.insert(7, piece(7, 71, 80));
        assert_eq!(next_merge(&runs, &pieces), None);
    }
}
