//! Positions in a group's history, and the table of epochs that says which position lies before
//! which.
//!
//! Sequence numbers alone cannot tell two histories apart: after a failover both sides may have a
//! frame 1,000. A position therefore names the epoch and the frame's chained hash too, and one
//! position is an ancestor of another only by this table *and* by hash.

use alloc::vec::Vec;
use core::fmt;

use crate::ids::{EpochId, FrameHash, Seq};
use crate::limits::EPOCHS_MAX;

/// A place in history: just behind the frame it names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Position {
    /// The epoch in which that frame was written.
    pub epoch: EpochId,
    /// Its sequence number; zero before the first frame.
    pub seq: Seq,
    /// Its hash.
    pub hash: FrameHash,
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}", self.epoch.short(), self.seq, self.hash.short())
    }
}

/// One epoch: its parent and where it forked from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Epoch {
    /// This epoch.
    pub id: EpochId,
    /// The last frame before its first: the fork point. For the first epoch of a group, the
    /// position `(its own id, 0, ORIGIN)`.
    pub forked_from: Position,
}

/// The epochs of one line of history, oldest first; the last one is the current one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EpochTable {
    epochs: Vec<Epoch>,
}

/// Why a list of epochs is not a history.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BadEpochTable {
    /// No epoch at all.
    #[error("the epoch table is empty")]
    Empty,
    /// More than [`EPOCHS_MAX`].
    #[error("the epoch table has more than {EPOCHS_MAX} entries")]
    TooLong,
    /// An epoch appears twice, or does not continue the one before it.
    #[error("the epoch table does not form one line at entry {0}")]
    Broken(usize),
}

/// How a peer's position lies to our line of history.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Relation {
    /// It lies on our line, at or before our head: everything after it can follow.
    Ancestor,
    /// It is on an epoch of our line, but behind the point where we left that epoch, or behind our
    /// head: the peer has frames which we do not have. Our line left theirs at this sequence
    /// number.
    PastFork(Seq),
    /// Its epoch is not on our line, or the position cannot exist in that epoch.
    UnknownEpoch,
}

impl EpochTable {
    /// The table of a new group.
    #[must_use]
    pub fn new(first: EpochId) -> Self {
        let origin = Position { epoch: first, seq: Seq::ZERO, hash: FrameHash::ORIGIN };
        Self { epochs: alloc::vec![Epoch { id: first, forked_from: origin }] }
    }

    /// Checks a list that came from a disk or a peer.
    ///
    /// # Errors
    /// [`BadEpochTable`] naming the entry that does not continue the line.
    pub fn from_list(epochs: Vec<Epoch>) -> Result<Self, BadEpochTable> {
        let first = epochs.first().ok_or(BadEpochTable::Empty)?;
        if epochs.len() > EPOCHS_MAX {
            return Err(BadEpochTable::TooLong);
        }
        if first.forked_from != Self::new(first.id).head_fork() {
            return Err(BadEpochTable::Broken(0));
        }
        for (at, pair) in epochs.windows(2).enumerate() {
            let [older, newer] = pair else { continue };
            let duplicate = epochs.iter().take(at + 1).any(|epoch| epoch.id == newer.id);
            if duplicate
                || newer.forked_from.epoch != older.id
                || newer.forked_from.seq <= older.forked_from.seq
                    && newer.forked_from != older.forked_from
            {
                return Err(BadEpochTable::Broken(at + 1));
            }
        }
        Ok(Self { epochs })
    }

    /// The epochs, oldest first.
    #[must_use]
    pub fn list(&self) -> &[Epoch] {
        &self.epochs
    }

    /// The current epoch.
    #[must_use]
    pub fn current(&self) -> EpochId {
        self.epochs.last().map_or(EpochId([0; 16]), |epoch| epoch.id)
    }

    fn head_fork(&self) -> Position {
        self.epochs.last().map_or(
            Position { epoch: EpochId([0; 16]), seq: Seq::ZERO, hash: FrameHash::ORIGIN },
            |epoch| epoch.forked_from,
        )
    }

    /// Whether `id` is on this line.
    #[must_use]
    pub fn contains(&self, id: EpochId) -> bool {
        self.epochs.iter().any(|epoch| epoch.id == id)
    }

    /// Starts a new epoch behind `at`, which must lie on this line; later epochs are dropped from
    /// the line (they live on only in whatever branch is kept of them).
    ///
    /// # Errors
    /// [`BadEpochTable`] when the result is no line (id used, position not on the line, too many).
    pub fn fork(&self, id: EpochId, at: Position) -> Result<Self, BadEpochTable> {
        let mut epochs: Vec<Epoch> = Vec::new();
        for epoch in &self.epochs {
            epochs.push(*epoch);
            if epoch.id == at.epoch {
                break;
            }
        }
        epochs.push(Epoch { id, forked_from: at });
        Self::from_list(epochs)
    }

    /// The last sequence number of `epoch` that lies on this line; `head` is our newest.
    fn end_of(&self, epoch: EpochId, head: Seq) -> Option<Seq> {
        let at = self.epochs.iter().position(|entry| entry.id == epoch)?;
        Some(self.epochs.get(at + 1).map_or(head, |next| next.forked_from.seq))
    }

    /// Whether `position` could name a frame of its epoch: behind that epoch's fork point, or the
    /// origin of the first epoch.
    fn is_plausible(&self, position: &Position) -> bool {
        self.epochs.iter().enumerate().any(|(at, epoch)| {
            epoch.id == position.epoch
                && (position.seq > epoch.forked_from.seq
                    || (at == 0 && *position == epoch.forked_from))
        })
    }

    /// Where `theirs` lies, as far as the table can tell; the caller compares the hash as well.
    #[must_use]
    pub fn relation(&self, theirs: &Position, head: Seq) -> Relation {
        if !self.is_plausible(theirs) {
            return Relation::UnknownEpoch;
        }
        match self.end_of(theirs.epoch, head) {
            None => Relation::UnknownEpoch,
            Some(end) if theirs.seq <= end => Relation::Ancestor,
            Some(end) => Relation::PastFork(end),
        }
    }

    /// The sequence number up to which two lines are the same history: where the first of them
    /// left the other. The largest number when they are one line; `None` when they have nothing in
    /// common.
    #[must_use]
    pub fn common_with(&self, other: &Self) -> Option<Seq> {
        let same = self.epochs.iter().zip(&other.epochs).take_while(|(a, b)| a == b).count();
        if same == 0 {
            return None;
        }
        let fork = |epochs: &[Epoch]| epochs.get(same).map(|epoch| epoch.forked_from.seq);
        let forks = [fork(&self.epochs), fork(&other.epochs)];
        Some(forks.into_iter().flatten().min().unwrap_or(Seq(u64::MAX)))
    }

    /// Whether `other`'s node went on after ours stopped, and ours is fenced: `other` is this line
    /// with more epochs behind it, or it has left this line for an epoch of a later reign.
    #[must_use]
    pub fn is_superseded_by(&self, other: &Self) -> bool {
        let (ours, theirs) = (self.current(), other.current());
        let later = self.common_with(other).is_some() && theirs.reign() > ours.reign();
        theirs != ours && (other.contains(ours) || (later && !self.contains(theirs)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(n: u8) -> EpochId {
        EpochId([n; 16])
    }
    fn at(epoch: u8, seq: u64) -> Position {
        Position { epoch: id(epoch), seq: Seq(seq), hash: FrameHash([9; 16]) }
    }

    #[test]
    fn ancestry_follows_forks() {
        let table = EpochTable::new(id(1)).fork(id(2), at(1, 10)).unwrap();
        let head = Seq(15);
        assert_eq!(table.relation(&at(1, 10), head), Relation::Ancestor);
        assert_eq!(table.relation(&at(1, 11), head), Relation::PastFork(Seq(10)));
        assert_eq!(table.relation(&at(2, 15), head), Relation::Ancestor);
        assert_eq!(table.relation(&at(2, 16), head), Relation::PastFork(Seq(15)));
        assert_eq!(table.relation(&at(3, 1), head), Relation::UnknownEpoch);
        assert_eq!(table.relation(&at(2, 10), head), Relation::UnknownEpoch);
        assert_eq!(table.relation(&at(1, 0), head), Relation::UnknownEpoch);
        let origin = table.list()[0].forked_from;
        assert_eq!(table.relation(&origin, head), Relation::Ancestor);
    }

    #[test]
    fn a_line_with_more_epochs_supersedes() {
        let one = EpochTable::new(id(1));
        let two = one.fork(id(2), at(1, 10)).unwrap();
        let other = one.fork(id(3), at(1, 7)).unwrap();
        assert!(one.is_superseded_by(&two));
        assert!(!two.is_superseded_by(&one));
        assert!(!two.is_superseded_by(&two));
        assert!(two.is_superseded_by(&other) && !other.is_superseded_by(&two));
        assert!(!EpochTable::new(id(4)).is_superseded_by(&other), "it has nothing in common");
        let mut same_reign = id(3);
        same_reign.0[0] = 0;
        let rival = one.fork(same_reign, at(1, 7)).unwrap();
        assert!(!rival.is_superseded_by(&other) && !other.is_superseded_by(&rival));
    }

    #[test]
    fn lines_share_history_up_to_the_first_fork() {
        let one = EpochTable::new(id(1));
        let at_ten = one.fork(id(2), at(1, 10)).unwrap();
        let at_seven = one.fork(id(3), at(1, 7)).unwrap();
        assert_eq!(at_ten.common_with(&at_seven), Some(Seq(7)));
        assert_eq!(one.common_with(&at_ten), Some(Seq(10)));
        assert_eq!(at_ten.common_with(&one), Some(Seq(10)));
        assert_eq!(one.common_with(&one), Some(Seq(u64::MAX)));
        assert_eq!(one.common_with(&EpochTable::new(id(9))), None);
    }

    #[test]
    fn a_fork_behind_an_older_epoch_leaves_the_newer_ones() {
        let table = EpochTable::new(id(1)).fork(id(2), at(1, 10)).unwrap();
        let back = table.fork(id(3), at(1, 4)).unwrap();
        assert_eq!(back.list().len(), 2);
        assert!(!back.contains(id(2)));
    }

    #[test]
    fn broken_tables_are_refused() {
        let first = EpochTable::new(id(1)).list()[0];
        let entry = |n, from| Epoch { id: id(n), forked_from: from };
        assert_eq!(EpochTable::from_list(Vec::new()), Err(BadEpochTable::Empty));
        for (bad, at) in [
            (alloc::vec![entry(1, at(1, 5))], 0),
            (alloc::vec![first, entry(1, at(1, 5))], 1),
            (alloc::vec![first, entry(2, at(3, 5))], 1),
            (alloc::vec![first, entry(2, at(1, 5)), entry(3, at(2, 4))], 2),
        ] {
            assert_eq!(EpochTable::from_list(bad), Err(BadEpochTable::Broken(at)));
        }
    }
}
