//! The secondary's side of replicating one group, as a pure machine.
//!
//! Invariants, checked by the simulation for every seed:
//! * frames are appended in order, each naming the hash of the one before it, and only on the line
//!   of history that was offered and that continues ours;
//! * a frame is acknowledged only after the store said that it is durable;
//! * credit granted is never more than the window beyond what is durable, so that what waits in
//!   memory is bounded;
//! * what changed, taken in without the frames between, leads to a later position of the offered
//!   line, and is acknowledged as that position only, once all of it is durable.
//!
//! It refuses to know what is in a frame or where it is kept.

use crate::epoch::{EpochTable, Position, Relation};
use crate::frame::Header;
use crate::ids::{FrameHash, GroupId, Seq};
use crate::mutants::{self, Mutant};
use crate::wire::{Offer, RefuseCode};

/// No log comes to have more frames. Frames come one by one, and what changed may lead anywhere.
const SEQ_MAX: u64 = 1 << 62;

/// What to answer to an offer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// Accept from this position with this credit.
    Accept {
        /// The last durable frame here.
        position: Position,
        /// Bytes granted at first.
        credit: u64,
    },
    /// Refuse.
    Refuse(RefuseCode),
}

/// The peer did what the protocol does not allow; the session is to be closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PeerFault {
    /// A stream that was not accepted, or of an older offer.
    #[error("frame stream that was not agreed on")]
    UnexpectedStream,
    /// A frame of another group.
    #[error("frame of another group")]
    OtherGroup,
    /// A frame of an epoch that is not on the offered line, or before its fork.
    #[error("frame {0} of an epoch that does not continue this history")]
    OtherEpoch(Seq),
    /// A hole, or a frame twice.
    #[error("frame {got} where {expected} was expected")]
    OutOfOrder {
        /// What came.
        got: Seq,
        /// What should have come.
        expected: Seq,
    },
    /// The frame does not name the hash of the one before it.
    #[error("frame {0} does not continue the history here")]
    BrokenChain(Seq),
    /// More bytes than granted.
    #[error("sent more than was granted")]
    OverCredit,
}

/// What became possible when frames got durable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Durable {
    /// Acknowledge up to here.
    pub ack: Option<Seq>,
    /// Grant so many bytes in all.
    pub credit: Option<u64>,
}

/// The machine.
#[derive(Debug, Clone)]
pub struct Receiver {
    group: GroupId,
    /// The line of epochs that is durable here.
    epochs: EpochTable,
    durable: Position,
    stream: Option<Incoming>,
}

#[derive(Debug, Clone)]
struct Incoming {
    nonce: u64,
    /// The line that the primary offered.
    offered: EpochTable,
    /// The newest frame taken in.
    last: Position,
    begun: bool,
    /// What changed comes, up to this position, and not frames.
    leads_to: Option<Position>,
    received: u64,
    settled: u64,
    credit: u64,
    window: u64,
}

impl Receiver {
    /// A receiver for a group that is durable here up to `durable`.
    #[must_use]
    pub const fn new(group: GroupId, epochs: EpochTable, durable: Position) -> Self {
        Self { group, epochs, durable, stream: None }
    }

    /// The newest durable frame.
    #[must_use]
    pub const fn durable(&self) -> Position {
        self.durable
    }

    /// Whether a stream was agreed on.
    #[must_use]
    pub const fn is_streaming(&self) -> bool {
        self.stream.is_some()
    }

    /// Whether its frames have begun to come: until then the primary may not agree.
    #[must_use]
    pub fn has_begun(&self) -> bool {
        self.stream.as_ref().is_some_and(|stream| stream.begun && stream.leads_to.is_none())
    }

    /// Judges an offer; `window` is the most that may be on its way or waiting in memory, in
    /// bytes of frames. Everything received before must be durable or dropped.
    pub fn on_offer(&mut self, offer: &Offer, window: u64) -> Answer {
        self.stream = None;
        // Their newest frame is not needed to judge: what counts is whether *our* newest frame
        // lies on their line.
        match offer.epochs.relation(&self.durable, offer.head.seq) {
            Relation::Ancestor if offer.epochs.contains(self.epochs.current()) => {}
            // The primary lacks what it has sent, or knew once: it was set back.
            Relation::PastFork(_) if self.durable.epoch == offer.epochs.current() => {
                return Answer::Refuse(RefuseCode::Ahead);
            }
            _ if offer.epochs.is_superseded_by(&self.epochs) => {
                return Answer::Refuse(RefuseCode::Ahead);
            }
            _ => return Answer::Refuse(RefuseCode::Diverged),
        }
        if self.durable.seq.next() < offer.oldest && !offer.has_copy {
            return Answer::Refuse(RefuseCode::TooFarBehind);
        }
        self.stream = Some(Incoming {
            nonce: offer.nonce,
            offered: offer.epochs.clone(),
            last: self.durable,
            begun: false,
            leads_to: None,
            received: 0,
            settled: 0,
            credit: window,
            window,
        });
        Answer::Accept { position: self.durable, credit: window }
    }

    /// The session is gone; what was received but is not durable will come again.
    pub fn on_link_down(&mut self) {
        self.stream = None;
    }

    /// The frame stream begins.
    ///
    /// # Errors
    /// [`PeerFault::UnexpectedStream`] unless it is the one that was accepted, for the first time.
    pub fn on_stream(&mut self, nonce: u64, first: Seq) -> Result<(), PeerFault> {
        match &mut self.stream {
            Some(stream)
                if (stream.nonce == nonce || mutants::is(Mutant::StreamUnchecked))
                    && !stream.begun
                    && first == stream.last.seq.next() =>
            {
                stream.begun = true;
                Ok(())
            }
            _ => Err(PeerFault::UnexpectedStream),
        }
    }

    /// The stream of what changed begins, which leads to `to`.
    ///
    /// # Errors
    /// [`PeerFault::UnexpectedStream`] unless it is the one that was accepted, for the first time;
    /// [`PeerFault::OtherEpoch`] when it does not lead forward on the offered line.
    pub fn on_changes(&mut self, nonce: u64, to: Position) -> Result<(), PeerFault> {
        match &mut self.stream {
            Some(stream) if stream.nonce == nonce && !stream.begun => {
                let forward = to.seq > stream.last.seq && to.seq.0 <= SEQ_MAX;
                if to.epoch != stream.offered.current() || !forward {
                    return Err(PeerFault::OtherEpoch(to.seq));
                }
                stream.begun = true;
                stream.leads_to = Some(to);
                Ok(())
            }
            _ => Err(PeerFault::UnexpectedStream),
        }
    }

    /// Something that changed came in, as so many bytes: may it be taken?
    ///
    /// # Errors
    /// [`PeerFault`]; then nothing of it may be used.
    pub fn on_change(&mut self, bytes: u64) -> Result<(), PeerFault> {
        let stream = self.stream.as_mut().filter(|stream| stream.leads_to.is_some());
        let stream = stream.ok_or(PeerFault::UnexpectedStream)?;
        if stream.received >= stream.credit {
            return Err(PeerFault::OverCredit);
        }
        stream.received = stream.received.saturating_add(bytes);
        Ok(())
    }

    /// It is in memory no longer. What to grant, if anything.
    pub fn on_taken(&mut self, bytes: u64) -> Option<u64> {
        let stream = self.stream.as_mut().filter(|stream| stream.leads_to.is_some())?;
        stream.settle(bytes)
    }

    /// All that changed is durable: this node is at the position to which it led. What to
    /// acknowledge; nothing when nobody waits for it any more.
    pub fn on_leapt(&mut self) -> Option<Seq> {
        let stream = self.stream.take()?;
        let to = stream.leads_to?;
        self.durable = to;
        self.epochs = stream.offered;
        Some(to.seq)
    }

    /// The line of epochs that was offered, while its stream is agreed on.
    #[must_use]
    pub fn offered(&self) -> Option<&EpochTable> {
        self.stream.as_ref().map(|stream| &stream.offered)
    }

    /// A frame of `bytes` bytes came in, whose content was verified: may it be appended?
    ///
    /// # Errors
    /// [`PeerFault`]; then nothing of it may be used.
    pub fn on_frame(
        &mut self,
        header: &Header,
        hash: FrameHash,
        bytes: u64,
    ) -> Result<(), PeerFault> {
        let is_of_frames = |stream: &&mut Incoming| stream.begun && stream.leads_to.is_none();
        let Some(stream) = self.stream.as_mut().filter(is_of_frames) else {
            return Err(PeerFault::UnexpectedStream);
        };
        if header.group != self.group {
            return Err(PeerFault::OtherGroup);
        }
        let expected = stream.last.seq.next();
        if header.seq != expected && !mutants::is(Mutant::FrameOrderUnchecked) {
            return Err(PeerFault::OutOfOrder { got: header.seq, expected });
        }
        if header.prev != stream.last.hash && !mutants::is(Mutant::HashBeforeUnchecked) {
            return Err(PeerFault::BrokenChain(header.seq));
        }
        let position = Position { epoch: header.epoch, seq: header.seq, hash };
        if header.epoch != stream.last.epoch
            && !mutants::is(Mutant::EpochUnchecked)
            && !stream
                .offered
                .list()
                .iter()
                .any(|epoch| epoch.id == header.epoch && epoch.forked_from == stream.last)
        {
            return Err(PeerFault::OtherEpoch(header.seq));
        }
        if stream.received >= stream.credit {
            return Err(PeerFault::OverCredit);
        }
        stream.received = stream.received.saturating_add(bytes);
        stream.last = position;
        Ok(())
    }

    /// The store holds every frame up to `position` durably, which were `bytes` bytes more of the
    /// stream than the last time.
    pub fn on_durable(&mut self, position: Position, bytes: u64) -> Durable {
        if position.seq <= self.durable.seq {
            return Durable::default();
        }
        if position.epoch != self.durable.epoch
            && let Some(stream) = &self.stream
        {
            // The new line up to the epoch we are in now.
            let mut epochs = stream.offered.list().to_vec();
            while epochs.last().is_some_and(|epoch| epoch.id != position.epoch) {
                epochs.pop();
            }
            if let Ok(line) = EpochTable::from_list(epochs) {
                self.epochs = line;
            }
        }
        self.durable = position;
        let Some(stream) = &mut self.stream else { return Durable::default() };
        let credit = stream.settle(bytes);
        let acked = if mutants::is(Mutant::AckedBeforeDurable) { &stream.last } else { &position };
        Durable { ack: Some(acked.seq), credit }
    }
}

impl Incoming {
    /// So many bytes less wait here. What to grant, if that is worth saying.
    fn settle(&mut self, bytes: u64) -> Option<u64> {
        self.settled = self.settled.saturating_add(bytes).min(self.received);
        let credit = self.settled.saturating_add(self.window);
        // Small steps are not worth a message each.
        (credit >= self.credit.saturating_add(self.window / 8)).then(|| {
            self.credit = credit;
            credit
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::EpochId;
    use crate::time::{LogTime, WallTime};
    use alloc::vec::Vec;

    const GROUP: GroupId = GroupId([5; 16]);

    fn epoch(n: u8) -> EpochId {
        EpochId([n; 16])
    }
    fn hash(n: u64) -> FrameHash {
        FrameHash([u8::try_from(n).unwrap(); 16])
    }
    fn at(e: u8, seq: u64) -> Position {
        Position { epoch: epoch(e), seq: Seq(seq), hash: hash(seq) }
    }
    fn header(e: u8, seq: u64) -> Header {
        Header {
            group: GROUP,
            epoch: epoch(e),
            seq: Seq(seq),
            prev: hash(seq - 1),
            durable: Seq(0),
            log_time: LogTime(0),
            wall_time: WallTime(0),
            records: 0,
            blocks: 0,
            content_len: 0,
        }
    }
    fn offer(epochs: EpochTable, head: Position, oldest: u64) -> Offer {
        Offer {
            group: GROUP,
            name: "g".parse().unwrap(),
            nonce: 7,
            epochs,
            head,
            oldest: Seq(oldest),
            has_copy: false,
            disks: Vec::new(),
        }
    }
    fn line() -> EpochTable {
        EpochTable::new(epoch(1))
    }
    /// Durable up to 10 of epoch 1, offered up to 20, window of 100 bytes.
    fn streaming() -> Receiver {
        let mut receiver = Receiver::new(GROUP, line(), at(1, 10));
        let answer = receiver.on_offer(&offer(line(), at(1, 20), 1), 100);
        assert_eq!(answer, Answer::Accept { position: at(1, 10), credit: 100 });
        receiver.on_stream(7, Seq(11)).unwrap();
        receiver
    }

    #[test]
    fn offers_must_continue_our_history() {
        let refuse = |durable: Position, ours: EpochTable, offer: Offer| {
            Receiver::new(GROUP, ours, durable).on_offer(&offer, 100)
        };
        let forked = line().fork(epoch(2), at(1, 8)).unwrap();
        for (durable, ours, offer, code) in [
            (at(1, 10), line(), offer(line(), at(1, 9), 1), RefuseCode::Ahead),
            (
                at(1, 10),
                line(),
                offer(EpochTable::new(epoch(3)), at(3, 90), 1),
                RefuseCode::Diverged,
            ),
            (at(1, 10), line(), offer(forked.clone(), at(2, 90), 1), RefuseCode::Diverged),
            (at(2, 10), forked, offer(line(), at(1, 90), 1), RefuseCode::Ahead),
            (at(1, 10), line(), offer(line(), at(1, 90), 12), RefuseCode::TooFarBehind),
        ] {
            assert_eq!(refuse(durable, ours, offer), Answer::Refuse(code));
        }
        let forked_later = line().fork(epoch(2), at(1, 10)).unwrap();
        let offer = offer(forked_later, at(2, 90), 11);
        assert!(matches!(refuse(at(1, 10), line(), offer), Answer::Accept { .. }));
    }

    #[test]
    fn frames_come_in_order_and_chained() {
        let mut receiver = streaming();
        receiver.on_frame(&header(1, 11), hash(11), 10).unwrap();
        for (bad, fault) in [
            (header(1, 11), PeerFault::OutOfOrder { got: Seq(11), expected: Seq(12) }),
            (header(1, 13), PeerFault::OutOfOrder { got: Seq(13), expected: Seq(12) }),
            (Header { prev: hash(9), ..header(1, 12) }, PeerFault::BrokenChain(Seq(12))),
            (header(2, 12), PeerFault::OtherEpoch(Seq(12))),
            (Header { group: GroupId([6; 16]), ..header(1, 12) }, PeerFault::OtherGroup),
        ] {
            assert_eq!(receiver.on_frame(&bad, hash(12), 10), Err(fault));
        }
        receiver.on_frame(&header(1, 12), hash(12), 10).unwrap();
    }

    #[test]
    fn a_stream_must_have_been_agreed_on() {
        let mut receiver = streaming();
        assert_eq!(receiver.on_stream(7, Seq(11)), Err(PeerFault::UnexpectedStream), "twice");
        let mut fresh = Receiver::new(GROUP, line(), at(1, 10));
        assert_eq!(fresh.on_stream(7, Seq(11)), Err(PeerFault::UnexpectedStream));
        fresh.on_offer(&offer(line(), at(1, 20), 1), 100);
        assert_eq!(fresh.on_frame(&header(1, 11), hash(11), 1), Err(PeerFault::UnexpectedStream));
        assert_eq!(fresh.on_stream(6, Seq(11)), Err(PeerFault::UnexpectedStream));
        assert_eq!(fresh.on_stream(7, Seq(12)), Err(PeerFault::UnexpectedStream));
        fresh.on_stream(7, Seq(11)).unwrap();
    }

    #[test]
    fn only_durable_frames_are_acknowledged_and_credit_follows_them() {
        let mut receiver = streaming();
        receiver.on_frame(&header(1, 11), hash(11), 60).unwrap();
        receiver.on_frame(&header(1, 12), hash(12), 60).unwrap();
        assert_eq!(receiver.on_frame(&header(1, 13), hash(13), 1), Err(PeerFault::OverCredit));
        let durable = receiver.on_durable(at(1, 11), 60);
        assert_eq!(durable, Durable { ack: Some(Seq(11)), credit: Some(160) });
        receiver.on_frame(&header(1, 13), hash(13), 1).unwrap();
        assert_eq!(receiver.on_durable(at(1, 11), 0), Durable::default(), "no news");
        receiver.on_link_down();
        assert_eq!(receiver.on_durable(at(1, 12), 60), Durable::default(), "nobody to tell");
        assert_eq!(receiver.durable(), at(1, 12));
    }

    #[test]
    fn what_changed_leads_forward_and_is_acknowledged_as_a_whole() {
        let mut behind = Receiver::new(GROUP, line(), at(1, 10));
        let far = |has_copy| Offer { has_copy, ..offer(line(), at(1, 30), 20) };
        assert_eq!(behind.on_offer(&far(false), 100), Answer::Refuse(RefuseCode::TooFarBehind));
        assert!(matches!(behind.on_offer(&far(true), 100), Answer::Accept { .. }));
        assert_eq!(behind.on_changes(8, at(1, 25)), Err(PeerFault::UnexpectedStream));
        assert_eq!(behind.on_changes(7, at(2, 25)), Err(PeerFault::OtherEpoch(Seq(25))));
        assert_eq!(behind.on_changes(7, at(1, 10)), Err(PeerFault::OtherEpoch(Seq(10))));
        let nowhere = Position { seq: Seq(u64::MAX), ..at(1, 11) };
        assert_eq!(behind.on_changes(7, nowhere), Err(PeerFault::OtherEpoch(Seq(u64::MAX))));
        assert_eq!(behind.on_change(1), Err(PeerFault::UnexpectedStream));
        behind.on_changes(7, at(1, 25)).unwrap();
        assert_eq!(behind.on_stream(7, Seq(11)), Err(PeerFault::UnexpectedStream));
        let frame = behind.on_frame(&header(1, 11), hash(11), 1);
        assert_eq!(frame, Err(PeerFault::UnexpectedStream), "never both");
        behind.on_change(100).unwrap();
        assert_eq!(behind.on_change(1), Err(PeerFault::OverCredit));
        assert_eq!(behind.on_taken(50), Some(150));
        behind.on_change(1).unwrap();
        assert_eq!(behind.durable(), at(1, 10), "not before it is whole");
        assert_eq!(behind.on_leapt(), Some(Seq(25)));
        assert_eq!((behind.durable(), behind.is_streaming()), (at(1, 25), false));
        assert_eq!(behind.on_leapt(), None);
    }

    #[test]
    fn a_new_epoch_begins_where_the_offered_line_says() {
        let mut receiver = Receiver::new(GROUP, line(), at(1, 10));
        let forked = line().fork(epoch(2), at(1, 11)).unwrap();
        receiver.on_offer(&offer(forked.clone(), at(2, 20), 1), 100);
        receiver.on_stream(7, Seq(11)).unwrap();
        let early = receiver.on_frame(&header(2, 11), hash(11), 1);
        assert_eq!(early, Err(PeerFault::OtherEpoch(Seq(11))));
        receiver.on_frame(&header(1, 11), hash(11), 1).unwrap();
        receiver.on_frame(&header(2, 12), hash(12), 1).unwrap();
        receiver.on_durable(at(2, 12), 2);
        assert_eq!(receiver.epochs, forked);
    }
}
