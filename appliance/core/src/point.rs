//! Points in time: what people call them, and which position of a line a time means.
//!
//! A line's wall times come from a clock that may step. So the line is looked at in stretches, in
//! each of which the wall time does not go back. A time lies in one stretch, in several (then it
//! means several positions, and only a person can say which), or behind all.
//!
//! It refuses to know the clock, time zones and where the frames are kept: a local time becomes a
//! time since 1970 outside, and the newest frame of the block that is found is looked up outside.

mod text;

pub use text::{BadPoint, Clock, Wanted};

use alloc::vec::Vec;

use crate::frame::ResyncReason;
use crate::ids::Seq;
use crate::time::{LogTime, WallTime};

/// Whether positions can be recovered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// Every disk is of one point in time.
    Whole,
    /// There is no disk.
    NoDisk,
    /// A disk is a mixture of times, for this reason.
    Mixture(ResyncReason),
}

impl Standing {
    /// Its two bytes on disk: what, and why.
    #[must_use]
    pub const fn code(self) -> [u8; 2] {
        match self {
            Self::Whole => [0, 0],
            Self::NoDisk => [1, 0],
            Self::Mixture(reason) => [2, reason.code()],
        }
    }

    /// What these bytes mean.
    #[must_use]
    pub fn from_code(code: [u8; 2]) -> Option<Self> {
        match code {
            [0, 0] => Some(Self::Whole),
            [1, 0] => Some(Self::NoDisk),
            [2, reason] => ResyncReason::from_code(reason).map(Self::Mixture),
            _ => None,
        }
    }
}

/// A position and its wall time.
pub type Place = (Seq, WallTime);

/// Where a block of frames begins: up to the next block their wall times do not go back, and all of
/// them stand alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Block {
    /// The first frame.
    pub first: Seq,
    /// Its log time.
    pub log_time: LogTime,
    /// Its wall time.
    pub wall_time: WallTime,
    /// The wall time of the frame before it.
    pub before: WallTime,
    /// How positions in it stand.
    pub standing: Standing,
    /// Only its first position is kept, and none up to the next block.
    pub alone: bool,
}

/// A line in blocks, oldest first. Behind a block that is alone there may be a hole.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Timeline {
    /// The blocks. The first one begins at the oldest position that can be read.
    pub blocks: Vec<Block>,
    /// The newest frame.
    pub head: Seq,
    /// Its wall time.
    pub head_time: WallTime,
}

/// Where to look for a frame: the newest one of `first..=last` that is not later than the time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Candidate {
    /// A frame that is not later.
    pub first: Seq,
    /// No frame behind this one is meant.
    pub last: Seq,
}

/// A part of a line in which nothing can be recovered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gap {
    /// Its first frame.
    pub first: Seq,
    /// Its last frame.
    pub last: Seq,
    /// Wall time of the first frame.
    pub from: WallTime,
    /// Wall time of the last frame.
    pub to: WallTime,
    /// Why.
    pub reason: ResyncReason,
    /// Whether it goes on.
    pub open: bool,
}

impl Timeline {
    /// The last frame of a block, and its wall time.
    fn end(&self, index: usize) -> (Seq, WallTime) {
        if let Some(block) = self.blocks.get(index).filter(|block| block.alone) {
            return (block.first, block.wall_time);
        }
        self.blocks
            .get(index + 1)
            .map_or((self.head, self.head_time), |next| (next.first.prev(), next.before))
    }

    /// What `time` may mean, in the order of the line: none when it is before everything that is
    /// kept, several when the clock went back. `now` is the wall time to which the newest frame
    /// stands for what is there.
    #[must_use]
    pub fn at(&self, time: WallTime, now: WallTime) -> Vec<Candidate> {
        let mut found = Vec::new();
        let mut behind_all = None;
        let mut index = 0;
        while index < self.blocks.len() {
            let stretch = self.stretch(index);
            let last = index + stretch - 1;
            let (end, mut until) = self.end(last);
            if last + 1 == self.blocks.len() {
                until = until.max(now);
            }
            let blocks = self.blocks.get(index..=last).unwrap_or_default();
            let before = blocks.partition_point(|block| block.wall_time <= time);
            if let Some(block) = before.checked_sub(1).and_then(|at| blocks.get(at)) {
                let behind = if time >= until { end } else { self.end(index + before - 1).0 };
                let candidate = Candidate { first: block.first, last: behind };
                if time <= until {
                    found.push(candidate);
                } else {
                    behind_all = Some(Candidate { first: end, last: end });
                }
            }
            index = last + 1;
        }
        if found.is_empty() {
            found.extend(behind_all);
        }
        found
    }

    /// How many blocks from this one on are of one stretch.
    fn stretch(&self, index: usize) -> usize {
        let rest = self.blocks.get(index + 1..).unwrap_or_default();
        1 + rest.iter().take_while(|block| block.wall_time >= block.before).count()
    }

    /// The block that `seq` lies in.
    fn block_of(&self, seq: Seq) -> Option<usize> {
        let behind = self.blocks.partition_point(|block| block.first <= seq);
        let index = behind.checked_sub(1).filter(|_| seq <= self.head)?;
        let block = self.blocks.get(index)?;
        (!block.alone || block.first == seq).then_some(index)
    }

    /// The position behind a hole that begins with this one, if one does.
    #[must_use]
    pub fn behind_hole(&self, seq: Seq) -> Option<Seq> {
        let index = self.block_of(seq)?;
        self.blocks.get(index).filter(|block| block.alone)?;
        let next = self.blocks.get(index + 1).map(|next| next.first);
        next.filter(|next| *next > seq.next())
    }

    /// The oldest position from which on every one is kept.
    #[must_use]
    pub fn full_from(&self) -> Option<(Seq, WallTime)> {
        let lone = self.blocks.iter().rposition(|block| block.alone);
        let index = match lone {
            // Without a hole it belongs to what follows.
            Some(index) => {
                let hole = self.blocks.get(index).and_then(|b| self.behind_hole(b.first));
                index + usize::from(hole.is_some())
            }
            None => 0,
        };
        self.blocks.get(index).map(|block| (block.first, block.wall_time))
    }

    /// How a position stands; none when it is not kept.
    #[must_use]
    pub fn standing(&self, seq: Seq) -> Option<Standing> {
        self.block_of(seq).and_then(|index| self.blocks.get(index)).map(|block| block.standing)
    }

    /// The newest position before `seq`, and the oldest behind it, that can be recovered, with
    /// their wall times.
    #[must_use]
    pub fn nearest(&self, seq: Seq) -> (Option<Place>, Option<Place>) {
        let whole = |block: &Block| block.standing == Standing::Whole;
        let Some(at) = self.block_of(seq) else { return (None, None) };
        let before = self
            .blocks
            .iter()
            .take(at)
            .rposition(|block| block.standing == Standing::Whole)
            .map(|index| self.end(index));
        let after = self.blocks.iter().skip(at + 1).find(|block| whole(block));
        (before, after.map(|block| (block.first, block.wall_time)))
    }

    /// Where a disk is a mixture of times.
    #[must_use]
    pub fn gaps(&self) -> Vec<Gap> {
        let mut gaps: Vec<Gap> = Vec::new();
        for (index, block) in self.blocks.iter().enumerate() {
            let Standing::Mixture(reason) = block.standing else { continue };
            let (last, to) = self.end(index);
            let open = index + 1 == self.blocks.len();
            match gaps.last_mut() {
                Some(gap) if gap.last.next() == block.first && gap.reason == reason => {
                    gap.last = last;
                    gap.to = to;
                    gap.open = open;
                }
                _ => gaps.push(Gap {
                    first: block.first,
                    last,
                    from: block.wall_time,
                    to,
                    reason,
                    open,
                }),
            }
        }
        gaps
    }
}

#[cfg(test)]
mod tests;
