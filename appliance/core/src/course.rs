//! What a node does with its own line of history to go on with that of its peer.
//!
//! Invariant (P4): two histories that differ are never merged, and neither is written over. Where
//! the peer's line left ours, ours is cut: what lies behind stays as it is, as a branch, and the
//! line goes on from the last frame that both have. A line that does not say where it left ours is
//! not followed at all.
//!
//! It refuses to know whether the node wants to follow, and whether frames are the same: the tables
//! say where the lines parted, the hash of the frame there is compared by whoever holds it.

use alloc::vec::Vec;

use crate::epoch::{EpochTable, Position};

/// How a node goes on with a peer's line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Course {
    /// Our line lies on theirs as far as it goes: their frames follow behind our newest.
    Straight,
    /// Our line has left theirs behind `at`. What we have behind it becomes a branch, and we go on
    /// from there.
    Leave {
        /// The last frame that is in both lines.
        at: Position,
        /// The line to go on with: theirs, up to the first epoch that we do not have, or up to the
        /// one that we left.
        line: EpochTable,
    },
    /// Our line goes on in a newer epoch than theirs: it is the peer that was left behind.
    Newer,
    /// The two lines have nothing in common.
    Foreign,
}

impl Course {
    /// The course of a node whose line is `ours` and whose newest frame is `head`, to go on with
    /// `theirs`.
    #[must_use]
    pub fn of(ours: &EpochTable, head: &Position, theirs: &EpochTable) -> Self {
        let (own, other) = (ours.list(), theirs.list());
        let same = own.iter().zip(other).take_while(|(one, two)| one == two).count();
        if same == 0 {
            return Self::Foreign;
        }
        let Some(next) = other.get(same) else {
            return if own.len() == same { Self::Straight } else { Self::Newer };
        };
        if theirs.is_superseded_by(ours) {
            return Self::Newer;
        }
        let fork = next.forked_from;
        let leave = |at: Position, epochs: usize| {
            let line: Vec<_> = other.iter().take(epochs).copied().collect();
            // The beginning of a line is a line.
            EpochTable::from_list(line).map_or(Self::Foreign, |line| Self::Leave { at, line })
        };
        match own.get(same) {
            None if head.seq <= fork.seq => Self::Straight,
            // We left first: the epoch that they left later is followed up to there.
            Some(left) if left.forked_from.seq < fork.seq => leave(left.forked_from, same),
            _ => leave(fork, same + 1),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{EpochId, FrameHash, Seq};

    fn id(n: u8) -> EpochId {
        EpochId([n; 16])
    }
    fn at(epoch: u8, seq: u64) -> Position {
        Position { epoch: id(epoch), seq: Seq(seq), hash: FrameHash([9; 16]) }
    }
    fn line(forks: &[(u8, Position)]) -> EpochTable {
        forks.iter().fold(EpochTable::new(id(1)), |line, (epoch, fork)| {
            line.fork(id(*epoch), *fork).unwrap()
        })
    }

    #[test]
    fn a_line_that_lies_on_theirs_goes_straight_on() {
        let one = line(&[]);
        let two = line(&[(2, at(1, 10))]);
        for (ours, head, theirs) in [
            (&one, at(1, 50), &one),
            (&one, at(1, 9), &two),
            (&one, at(1, 10), &two),
            (&two, at(1, 10), &two),
            (&two, at(2, 12), &two),
        ] {
            assert_eq!(Course::of(ours, &head, theirs), Course::Straight, "{head}");
        }
    }

    #[test]
    fn a_line_that_went_on_behind_the_fork_is_left_there() {
        let theirs = line(&[(2, at(1, 10)), (4, at(2, 20))]);
        let first = line(&[(2, at(1, 10))]);
        let leave = |at, line: &EpochTable| Course::Leave { at, line: line.clone() };
        assert_eq!(Course::of(&line(&[]), &at(1, 11), &theirs), leave(at(1, 10), &first));
        // Both left the first epoch: they at 10, we later, at the same frame, or before.
        let later = line(&[(3, at(1, 12))]);
        assert_eq!(Course::of(&later, &at(3, 15), &theirs), leave(at(1, 10), &first));
        let same = line(&[(3, at(1, 10))]);
        assert_eq!(Course::of(&same, &at(3, 15), &theirs), leave(at(1, 10), &first));
        let before = line(&[(3, at(1, 8))]);
        assert_eq!(Course::of(&before, &at(3, 15), &theirs), leave(at(1, 8), &line(&[])));
        // Only the newest fork parts them.
        let whole = line(&[(2, at(1, 10)), (4, at(2, 20))]);
        assert_eq!(Course::of(&first, &at(2, 21), &theirs), leave(at(2, 20), &whole));
    }

    #[test]
    fn nobody_follows_an_older_or_a_foreign_line() {
        let (one, two) = (line(&[]), line(&[(2, at(1, 10))]));
        assert_eq!(Course::of(&two, &at(2, 11), &one), Course::Newer);
        let later = line(&[(3, at(1, 5))]);
        assert_eq!(Course::of(&later, &at(3, 11), &two), Course::Newer, "of a later reign");
        let foreign = EpochTable::new(id(7));
        assert_eq!(Course::of(&one, &at(1, 3), &foreign), Course::Foreign);
    }
}
