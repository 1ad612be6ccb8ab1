//! Which runs together index a stretch of history, and which ones to merge next. Pure.
//!
//! Runs of the same level that follow each other are merged eight at a time into one of the next
//! level; the smaller ones are kept, for they are what makes an older point readable. A stretch is
//! covered from its start, each time by the longest run that begins there and does not reach
//! beyond the stretch.

use srn_core::ids::{EpochId, Seq};

use super::run::RunMeta;

/// How many runs of one level are merged into one of the next.
pub const FAN_IN: usize = 8;

/// The level of an index of a segment up to a fork in its middle. It is never merged.
pub const PREFIX_LEVEL: u8 = 0xff;

/// The runs, in order, that cover the frames `first..=last` of `epoch`; `None` when there is a gap.
#[must_use]
pub fn cover(runs: &[RunMeta], epoch: EpochId, first: Seq, last: Seq) -> Option<Vec<RunMeta>> {
    let mut chosen = Vec::new();
    let mut at = first;
    while at <= last {
        let best = runs
            .iter()
            .filter(|run| run.epoch == epoch && run.first == at && run.last <= last)
            .max_by_key(|run| run.last)?;
        chosen.push(*best);
        at = best.last.next();
    }
    Some(chosen)
}

/// The next runs of `epoch` to merge, oldest first: [`FAN_IN`] of one level that follow each other
/// and are not part of a run of the next level yet.
#[must_use]
pub fn next_merge(runs: &[RunMeta], epoch: EpochId) -> Option<Vec<RunMeta>> {
    let mut own: Vec<&RunMeta> =
        runs.iter().filter(|run| run.epoch == epoch && run.level != PREFIX_LEVEL).collect();
    own.sort_by_key(|run| (run.level, run.first));
    let top = own.last()?.level;
    (0..=top).find_map(|level| {
        let loose = own.iter().filter(|run| {
            run.level == level
                && !own.iter().any(|above| {
                    above.level > level && above.first <= run.first && run.last <= above.last
                })
        });
        let mut chain: Vec<RunMeta> = Vec::new();
        for run in loose {
            if chain.last().is_some_and(|last| last.last.next() != run.first) {
                chain.clear();
            }
            chain.push(**run);
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

    const E: EpochId = EpochId([1; 16]);

    fn run(level: u8, first: u64, last: u64) -> RunMeta {
        RunMeta { file: 0, level, epoch: E, first: Seq(first), last: Seq(last), entries: 0 }
    }

    /// As many segments of ten frames as given, merged as long as there is something to merge.
    fn merged(segments: u64) -> Vec<RunMeta> {
        let mut runs = Vec::new();
        for at in 0..segments {
            runs.push(run(0, at * 10 + 1, at * 10 + 10));
            while let Some(inputs) = next_merge(&runs, E) {
                let (first, last) = (inputs[0].first, inputs[7].last);
                runs.push(run(inputs[0].level + 1, first.0, last.0));
            }
        }
        runs
    }

    #[test]
    fn levels_grow_like_digits() {
        let runs = merged(8 * 8 + 8 + 3);
        let levels: Vec<u8> =
            cover(&runs, E, Seq(1), Seq(750)).unwrap().iter().map(|r| r.level).collect();
        assert_eq!(levels, [2, 1, 0, 0, 0]);
        assert_eq!(runs.iter().filter(|run| run.level == 1).count(), 9);
    }

    #[test]
    fn a_stretch_that_ends_earlier_uses_smaller_runs() {
        let runs = merged(64);
        let lens = |last| cover(&runs, E, Seq(1), Seq(last)).map(|runs| runs.len());
        assert_eq!(lens(640), Some(1));
        assert_eq!(lens(630), Some(7 + 7));
        assert_eq!(lens(635), None, "no run ends there");
        assert_eq!(cover(&runs, E, Seq(5), Seq(640)), None);
        assert_eq!(cover(&runs, EpochId([2; 16]), Seq(1), Seq(640)), None);
    }

    #[test]
    fn a_fork_in_the_middle_has_its_own_end() {
        let mut runs = merged(3);
        runs.push(run(PREFIX_LEVEL, 21, 25));
        let ends = |last| {
            cover(&runs, E, Seq(1), Seq(last))
                .map(|runs| runs.iter().map(|run| run.last.0).collect::<Vec<_>>())
        };
        assert_eq!(ends(25), Some(vec![10, 20, 25]));
        assert_eq!(ends(30), Some(vec![10, 20, 30]));
        assert_eq!(next_merge(&runs, E), None);
    }

    #[test]
    fn holes_are_not_merged_over() {
        let mut runs = merged(7);
        runs.push(run(0, 81, 90));
        assert_eq!(next_merge(&runs, E), None);
    }
}
