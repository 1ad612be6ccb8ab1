//! What a disk must hold after a power cut.
//!
//! All writes to one disk go over one connection, whose requests the node appends in the order in
//! which they were sent. So the disk must hold exactly the result of the first k writes, for one k
//! that is at least the newest answered write: that is P1 and P2 in one. Each sector carries the
//! number of the write that it comes from, so that the oracle can tell.

use bytes::{Bytes, BytesMut};
use srn_testkit::Chance;

pub(crate) const SECTOR: u64 = 512;

/// The bytes at the start of a sector that say what it is: run, disk, sector, write.
const LABEL: usize = 32;

/// What a sector holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Content {
    /// Zeros.
    Zero,
    /// The sector as the write of this number made it.
    Of(u64),
    /// Nothing that anybody wrote there.
    Garbage,
}

/// A write that was sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Write {
    /// Its number, counted from 1 for each disk.
    pub(crate) number: u64,
    /// The first sector.
    pub(crate) start: u64,
    pub(crate) sectors: u64,
    /// Zeros instead of content.
    pub(crate) zero: bool,
}

impl Write {
    fn covers(&self, sector: u64) -> bool {
        (self.start..self.start + self.sectors).contains(&sector)
    }

    const fn content(&self) -> Content {
        if self.zero { Content::Zero } else { Content::Of(self.number) }
    }
}

/// A promise was broken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Broken {
    /// P1: an answered write is not there.
    Lost { sector: u64, found: Content, must: Content, answered: u64 },
    /// Something is there that no write has put there, or that was overwritten long ago.
    Foreign { sector: u64, found: Content },
    /// P2: every sector could be, but not all at the same time.
    Mixture { answered: u64, sent: u64, misfits: Vec<(u64, u64)> },
}

impl std::fmt::Display for Broken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Lost { sector, found, must, answered } => write!(
                f,
                "P1 is broken: sector {sector} holds {found:?}, not {must:?}; all writes up to \
                 {answered} were answered"
            ),
            Self::Foreign { sector, found } => {
                write!(f, "sector {sector} holds {found:?}, which nobody can have written there")
            }
            Self::Mixture { answered, sent, misfits } => write!(
                f,
                "P2 is broken: no prefix of writes {answered} to {sent} fits; for each, a sector \
                 that does not: {misfits:?}"
            ),
        }
    }
}

/// The history of one disk.
#[derive(Debug)]
pub(crate) struct History {
    run: u64,
    disk: u64,
    /// Each sector after the newest write that must be there.
    certain: Vec<Content>,
    /// The number of that write.
    answered: u64,
    /// All writes after it, in order.
    open: Vec<Write>,
    sent: u64,
}

impl History {
    /// A new disk, all zeros.
    pub(crate) fn new(run: u64, disk: u64, sectors: u64) -> Self {
        let certain = vec![Content::Zero; usize::try_from(sectors).unwrap()];
        Self { run, disk, certain, answered: 0, open: Vec::new(), sent: 0 }
    }

    pub(crate) fn sectors(&self) -> u64 {
        self.certain.len() as u64
    }

    /// The newest write that must be there.
    pub(crate) const fn answered(&self) -> u64 {
        self.answered
    }

    /// A write leaves now. Must be called in the order of sending.
    pub(crate) fn send(&mut self, start: u64, sectors: u64, zero: bool) -> Write {
        self.sent += 1;
        let write = Write { number: self.sent, start, sectors, zero };
        self.open.push(write);
        write
    }

    /// A write was answered.
    pub(crate) fn answer(&mut self, number: u64) {
        // Those before it are in the log before it.
        if number > self.answered {
            self.settle(number);
        }
    }

    /// Everything up to this write has happened.
    fn settle(&mut self, number: u64) {
        let later = self.open.partition_point(|write| write.number <= number);
        for write in self.open.drain(..later) {
            for sector in write.start..write.start + write.sectors {
                self.certain[sector as usize] = write.content();
            }
        }
        self.answered = number;
    }

    /// Checks the disk as it was found, all of it. Returns how many unanswered writes are there;
    /// from then on they must be, and the others never will.
    pub(crate) fn check(&mut self, found: &[Content]) -> Result<usize, Broken> {
        assert_eq!(found.len(), self.certain.len(), "all of the disk is checked");
        let mut touched = Vec::new();
        for (sector, (found, must)) in (0..).zip(found.iter().zip(&self.certain)) {
            let covering = self.open.iter().filter(|write| write.covers(sector));
            let contents: Vec<Content> = covering.map(Write::content).collect();
            if !contents.is_empty() {
                touched.push(sector);
            }
            if found != must && !contents.contains(found) {
                return Err(self.misfit(sector, *found, *must));
            }
        }
        let mut now = self.certain.clone();
        let mut misfits = Vec::new();
        for survived in 0..=self.open.len() {
            if let Some(write) = survived.checked_sub(1).and_then(|last| self.open.get(last)) {
                for sector in write.start..write.start + write.sectors {
                    now[sector as usize] = write.content();
                }
            }
            let misfit =
                touched.iter().find(|sector| now[**sector as usize] != found[**sector as usize]);
            match misfit {
                Some(sector) => misfits.push((self.answered + survived as u64, *sector)),
                None => {
                    let last = survived.checked_sub(1).and_then(|last| self.open.get(last));
                    self.settle(last.map_or(self.answered, |write| write.number));
                    self.open.clear();
                    // What never happened leaves no gap in the numbers that must be there.
                    self.answered = self.sent;
                    return Ok(survived);
                }
            }
        }
        Err(Broken::Mixture { answered: self.answered, sent: self.sent, misfits })
    }

    fn misfit(&self, sector: u64, found: Content, must: Content) -> Broken {
        let older = match (found, must) {
            (Content::Of(found), Content::Of(must)) => found < must,
            (Content::Zero, Content::Of(_)) => true,
            // A write of zeros was answered, or none ever happened.
            (Content::Of(found), Content::Zero) => found <= self.answered,
            _ => false,
        };
        if older {
            Broken::Lost { sector, found, must, answered: self.answered }
        } else {
            Broken::Foreign { sector, found }
        }
    }

    /// The bytes of a write.
    pub(crate) fn bytes(&self, write: &Write) -> Bytes {
        let mut bytes = BytesMut::new();
        for sector in write.start..write.start + write.sectors {
            bytes.extend_from_slice(&self.sector(sector, write.number));
        }
        bytes.freeze()
    }

    fn sector(&self, sector: u64, number: u64) -> [u8; SECTOR as usize] {
        let label = [self.run, self.disk, sector, number];
        let mut stream = Chance::new(label.iter().fold(0, |seed, word| {
            // Any mixing does that tells the four apart.
            Chance::new(seed ^ word).any()
        }));
        let mut bytes = [0; SECTOR as usize];
        for (index, word) in bytes.chunks_exact_mut(8).enumerate() {
            let value = label.get(index).copied().unwrap_or_else(|| stream.any());
            word.copy_from_slice(&value.to_le_bytes());
        }
        bytes
    }

    /// What bytes that were read from `start` on are.
    pub(crate) fn identify(&self, start: u64, bytes: &[u8]) -> Vec<Content> {
        let sectors = bytes.chunks_exact(SECTOR as usize);
        (start..).zip(sectors).map(|(sector, bytes)| self.identify_one(sector, bytes)).collect()
    }

    fn identify_one(&self, sector: u64, bytes: &[u8]) -> Content {
        if bytes.iter().all(|byte| *byte == 0) {
            return Content::Zero;
        }
        let mut number = [0; 8];
        number.copy_from_slice(&bytes[LABEL - 8..LABEL]);
        let number = u64::from_le_bytes(number);
        if bytes == self.sector(sector, number) { Content::Of(number) } else { Content::Garbage }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Ten sectors: write 1 on all, answered; then 2, 3 and 4, of which `answered` are.
    fn history(answered: u64) -> History {
        let mut history = History::new(7, 0, 10);
        history.send(0, 10, false);
        history.send(0, 4, false);
        history.send(2, 4, false);
        history.send(4, 2, true);
        history.answer(1);
        history.answer(answered);
        history
    }

    fn found(text: &str) -> Vec<Content> {
        let content = |digit: char| match digit.to_digit(10) {
            Some(0) => Content::Zero,
            Some(number) => Content::Of(number.into()),
            None => Content::Garbage,
        };
        text.chars().map(content).collect()
    }

    #[test]
    fn every_prefix_is_right_and_lasts() {
        for (text, survived) in
            [("1111111111", 0), ("2222111111", 1), ("2233331111", 2), ("2233001111", 3)]
        {
            let mut history = history(1);
            assert_eq!(history.check(&found(text)), Ok(survived), "{text}");
            assert_eq!(history.check(&found(text)), Ok(0), "{text}");
            let other = if survived == 0 { "2222111111" } else { "1111111111" };
            assert!(history.check(&found(other)).is_err(), "{text} was there, then it was not");
            let next = history.send(9, 1, false);
            assert_eq!(next.number, 5);
        }
    }

    #[test]
    fn an_answered_write_that_is_lost_is_noticed() {
        for text in ["1111111111", "2222111111"] {
            let broken = history(3).check(&found(text)).unwrap_err();
            assert!(matches!(broken, Broken::Lost { answered: 3, .. }), "{broken}");
        }
        let broken = history(4).check(&found("2233331111")).unwrap_err();
        assert!(matches!(broken, Broken::Lost { sector: 4, .. }), "{broken}");
    }

    #[test]
    fn a_mixture_is_noticed() {
        // A later write without the one before it, half a write.
        for text in ["1133331111", "2233111111", "2211111111", "2222001111"] {
            let broken = history(1).check(&found(text)).unwrap_err();
            assert!(matches!(broken, Broken::Mixture { .. }), "{text}: {broken}");
        }
    }

    #[test]
    fn what_nobody_wrote_is_noticed() {
        for text in ["111111111x", "1111111113", "9111111111"] {
            let broken = history(1).check(&found(text)).unwrap_err();
            assert!(matches!(broken, Broken::Foreign { .. }), "{text}: {broken}");
        }
    }

    #[test]
    fn sectors_say_where_they_come_from() {
        let mut history = History::new(7, 1, 10);
        let write = history.send(3, 2, false);
        let bytes = history.bytes(&write);
        assert_eq!(history.identify(3, &bytes), [Content::Of(1), Content::Of(1)]);
        assert_eq!(history.identify(2, &bytes), [Content::Garbage; 2], "at another place");
        assert_eq!(History::new(7, 0, 10).identify(3, &bytes), [Content::Garbage; 2]);
        assert_eq!(History::new(8, 1, 10).identify(3, &bytes), [Content::Garbage; 2]);
        let mut torn = bytes.to_vec();
        torn[700] ^= 1;
        assert_eq!(history.identify(3, &torn), [Content::Of(1), Content::Garbage]);
        assert_eq!(history.identify(0, &[0; 512]), [Content::Zero]);
    }
}
