//! The primary's side of replicating one group to its peer, as a pure machine.
//!
//! Invariants, checked by the simulation for every seed:
//! * only frames that are durable at the primary are sent;
//! * frames are sent in order, without holes, from just behind the position which the secondary
//!   reported, and only if that position lies on our line of history *by hash*;
//! * nothing counts as acknowledged that was not sent or reported in this epoch's line;
//! * never more bytes are sent than the secondary granted, but for the one frame that crosses the
//!   limit.
//!
//! It refuses to know what is in a frame, where it is kept, or what time it is.

use crate::epoch::{EpochTable, Position, Relation};
use crate::ids::{FrameHash, Seq};
use crate::mutants::{self, Mutant};
use crate::wire::RefuseCode;

/// Where the conversation about the group stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Phase {
    /// No session with the peer.
    Offline,
    /// Our offer is out.
    Offered {
        /// The offer's nonce.
        nonce: u64,
    },
    /// Frames flow.
    Streaming(Stream),
    /// The peer refuses, or its history does not fit ours; nothing flows in this session.
    Stopped(Stop),
}

/// A running stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stream {
    /// The offer's nonce, which the stream's header repeats.
    pub nonce: u64,
    /// The next frame to send.
    pub next: Seq,
    /// Bytes sent in this stream.
    pub sent_bytes: u64,
    /// Bytes granted for this stream.
    pub credit: u64,
}

/// Why nothing flows although the peer is connected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// The peer refused with this code.
    Refused(RefuseCode),
    /// The peer has frames of our current epoch that we do not have: this node was set back, for
    /// instance by a VM snapshot.
    PeerIsAhead {
        /// The peer's newest frame.
        theirs: Seq,
        /// Ours.
        ours: Seq,
    },
    /// The peer's position is not on our line of history.
    NotOurHistory,
    /// The peer's position lies on our line, but we no longer have the frames behind it.
    TooFarBehind {
        /// The peer's newest frame.
        theirs: Seq,
        /// The oldest frame we can send.
        oldest: Seq,
    },
    /// The peer's newest frame has our sequence number but another hash.
    HashDiffers(Seq),
    /// The peer has gone on in a newer epoch. The caller must persist this before it says so.
    Fenced,
}

/// The peer did what the protocol does not allow; the session is to be closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PeerFault {
    /// An answer to an offer that was not made in this session.
    #[error("answer to an offer that was not made")]
    UnexpectedAccept,
    /// An acknowledgement of a frame that was never sent.
    #[error("acknowledged frame {acked}, but only frames before {next} were sent")]
    AckOfUnsent {
        /// The acknowledged frame.
        acked: Seq,
        /// The next frame to be sent.
        next: Seq,
    },
    /// The granted credit went down.
    #[error("took back granted credit")]
    CreditShrank,
}

/// The machine.
#[derive(Debug, Clone)]
pub struct Sender {
    epochs: EpochTable,
    durable: Seq,
    acked: Seq,
    phase: Phase,
}

impl Sender {
    /// A sender for a group whose newest durable frame is `durable` and of which the peer is known
    /// to have everything up to `acked`.
    #[must_use]
    pub const fn new(epochs: EpochTable, durable: Seq, acked: Seq) -> Self {
        Self { epochs, durable, acked, phase: Phase::Offline }
    }

    /// Where the conversation stands.
    #[must_use]
    pub const fn phase(&self) -> &Phase {
        &self.phase
    }

    /// The last frame that the peer is known to hold durably.
    #[must_use]
    pub const fn acked(&self) -> Seq {
        self.acked
    }

    /// The newest frame durable here.
    #[must_use]
    pub const fn durable(&self) -> Seq {
        self.durable
    }

    /// Frames up to `seq` are durable here now.
    pub fn on_durable(&mut self, seq: Seq) {
        self.durable = self.durable.max(seq);
    }

    /// A session with the peer is up: offer the group with `nonce`, which must be fresh.
    pub fn on_link_up(&mut self, nonce: u64) {
        self.phase = Phase::Offered { nonce };
    }

    /// The session is gone. Whatever was not acknowledged is sent again later.
    pub fn on_link_down(&mut self) {
        self.phase = Phase::Offline;
    }

    /// The peer accepts and is at `theirs`. `hash_here` is our own hash of that frame, `None` when
    /// we no longer know it; `oldest` is the oldest frame we can still send.
    ///
    /// # Errors
    /// [`PeerFault`] when no such offer is open.
    pub fn on_accept(
        &mut self,
        nonce: u64,
        theirs: &Position,
        credit: u64,
        hash_here: Option<FrameHash>,
        oldest: Seq,
    ) -> Result<(), PeerFault> {
        if self.phase != (Phase::Offered { nonce }) {
            return Err(PeerFault::UnexpectedAccept);
        }
        self.phase = match self.judge(theirs, hash_here, oldest) {
            Some(stop) => Phase::Stopped(stop),
            None => {
                // Also where that is less than it had acknowledged: what it holds now is what counts.
                self.acked = theirs.seq;
                let next = theirs.seq.next();
                Phase::Streaming(Stream { nonce, next, sent_bytes: 0, credit })
            }
        };
        Ok(())
    }

    fn judge(&self, theirs: &Position, hash_here: Option<FrameHash>, oldest: Seq) -> Option<Stop> {
        match self.epochs.relation(theirs, self.durable) {
            Relation::UnknownEpoch => Some(Stop::NotOurHistory),
            Relation::PastFork(_) if theirs.epoch == self.epochs.current() => {
                Some(Stop::PeerIsAhead { theirs: theirs.seq, ours: self.durable })
            }
            Relation::PastFork(_) => Some(Stop::NotOurHistory),
            Relation::Ancestor => match hash_here {
                Some(hash) if hash != theirs.hash && !mutants::is(Mutant::PeerHashUnchecked) => {
                    Some(Stop::HashDiffers(theirs.seq))
                }
                Some(_) if theirs.seq.next() >= oldest => None,
                _ => Some(Stop::TooFarBehind { theirs: theirs.seq, oldest }),
            },
        }
    }

    /// The peer refuses. Returns whether that means that this primary is fenced: the caller then
    /// persists the fence before anything else.
    pub fn on_refuse(&mut self, code: RefuseCode, epochs: Option<&EpochTable>) -> bool {
        let fenced = code == RefuseCode::Fenced
            && epochs.is_some_and(|theirs| self.epochs.is_superseded_by(theirs));
        self.phase = Phase::Stopped(if fenced { Stop::Fenced } else { Stop::Refused(code) });
        fenced
    }

    /// The next frame to send, if one is durable and credit is left.
    #[must_use]
    pub fn next_to_send(&self) -> Option<Seq> {
        match &self.phase {
            Phase::Streaming(stream)
                if (stream.next <= self.durable || mutants::is(Mutant::SentBeforeDurable))
                    && (stream.sent_bytes < stream.credit
                        || mutants::is(Mutant::CreditUnheeded)) =>
            {
                Some(stream.next)
            }
            _ => None,
        }
    }

    /// Frame `seq` was handed to the stream as `bytes` bytes. Ignored unless it is the one which
    /// [`Self::next_to_send`] named: the session may have gone meanwhile.
    pub fn on_sent(&mut self, seq: Seq, bytes: u64) {
        if let Phase::Streaming(stream) = &mut self.phase
            && stream.next == seq
        {
            stream.next = seq.next();
            stream.sent_bytes = stream.sent_bytes.saturating_add(bytes);
        }
    }

    /// The peer holds every frame up to `seq` durably. Returns whether that is news.
    ///
    /// # Errors
    /// [`PeerFault::AckOfUnsent`].
    pub fn on_ack(&mut self, seq: Seq) -> Result<bool, PeerFault> {
        let Phase::Streaming(stream) = &self.phase else {
            // An acknowledgement that crossed our own end of the stream.
            return Ok(false);
        };
        if seq >= stream.next {
            return Err(PeerFault::AckOfUnsent { acked: seq, next: stream.next });
        }
        let news = seq > self.acked;
        self.acked = self.acked.max(seq);
        Ok(news)
    }

    /// The peer grants `limit` bytes in all for this stream.
    ///
    /// # Errors
    /// [`PeerFault::CreditShrank`].
    pub fn on_credit(&mut self, limit: u64) -> Result<(), PeerFault> {
        if let Phase::Streaming(stream) = &mut self.phase {
            if limit < stream.credit {
                return Err(PeerFault::CreditShrank);
            }
            stream.credit = limit;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::EpochId;

    fn epoch(n: u8) -> EpochId {
        EpochId([n; 16])
    }
    fn hash(n: u64) -> FrameHash {
        FrameHash([u8::try_from(n).unwrap(); 16])
    }
    fn at(e: u8, seq: u64) -> Position {
        Position { epoch: epoch(e), seq: Seq(seq), hash: hash(seq) }
    }
    /// Epoch 2 forked from epoch 1 at 10; frames up to 20 are durable, from 5 on still here.
    fn offered() -> Sender {
        let epochs = EpochTable::new(epoch(1)).fork(epoch(2), at(1, 10)).unwrap();
        let mut sender = Sender::new(epochs, Seq(20), Seq(3));
        sender.on_link_up(7);
        sender
    }
    fn accept(theirs: Position) -> Phase {
        let mut sender = offered();
        let known = (theirs.seq.0 >= 4).then(|| hash(theirs.seq.0));
        sender.on_accept(7, &theirs, 100, known, Seq(5)).unwrap();
        sender.phase().clone()
    }

    #[test]
    fn resumes_only_from_an_ancestor_by_table_and_hash() {
        let from = |next| {
            Phase::Streaming(Stream { nonce: 7, next: Seq(next), sent_bytes: 0, credit: 100 })
        };
        assert_eq!(accept(at(2, 15)), from(16));
        assert_eq!(accept(at(1, 10)), from(11));
        assert_eq!(accept(at(1, 4)), from(5));
        assert_eq!(
            accept(at(1, 3)),
            Phase::Stopped(Stop::TooFarBehind { theirs: Seq(3), oldest: Seq(5) })
        );
        assert_eq!(accept(at(1, 11)), Phase::Stopped(Stop::NotOurHistory));
        assert_eq!(accept(at(9, 11)), Phase::Stopped(Stop::NotOurHistory));
        assert_eq!(
            accept(at(2, 21)),
            Phase::Stopped(Stop::PeerIsAhead { theirs: Seq(21), ours: Seq(20) })
        );
        let other = Position { hash: hash(99), ..at(2, 15) };
        assert_eq!(accept(other), Phase::Stopped(Stop::HashDiffers(Seq(15))));
    }

    #[test]
    fn sends_what_is_durable_and_granted_in_order() {
        let mut sender = offered();
        sender.on_accept(7, &at(2, 18), 100, Some(hash(18)), Seq(5)).unwrap();
        assert_eq!(sender.next_to_send(), Some(Seq(19)));
        sender.on_sent(Seq(19), 60);
        assert_eq!(sender.next_to_send(), Some(Seq(20)));
        sender.on_sent(Seq(20), 60);
        sender.on_durable(Seq(21));
        assert_eq!(sender.next_to_send(), None, "credit is used up");
        sender.on_credit(121).unwrap();
        assert_eq!(sender.next_to_send(), Some(Seq(21)));
        sender.on_sent(Seq(21), 1);
        sender.on_credit(1000).unwrap();
        assert_eq!(sender.next_to_send(), None, "nothing more is durable");
        assert_eq!(sender.on_credit(999), Err(PeerFault::CreditShrank));
    }

    #[test]
    fn acknowledges_only_what_was_sent_and_never_goes_back() {
        let mut sender = offered();
        sender.on_accept(7, &at(2, 18), 100, Some(hash(18)), Seq(5)).unwrap();
        assert_eq!(sender.acked(), Seq(18));
        sender.on_sent(Seq(19), 1);
        assert_eq!(
            sender.on_ack(Seq(20)),
            Err(PeerFault::AckOfUnsent { acked: Seq(20), next: Seq(20) })
        );
        assert_eq!(sender.on_ack(Seq(19)), Ok(true));
        assert_eq!(sender.on_ack(Seq(18)), Ok(false));
        assert_eq!(sender.acked(), Seq(19));
        sender.on_link_down();
        assert_eq!(sender.on_ack(Seq(19)), Ok(false));
        assert_eq!(sender.next_to_send(), None);
    }

    #[test]
    fn answers_to_other_offers_are_faults() {
        let mut sender = offered();
        let fault = sender.on_accept(8, &at(2, 18), 100, None, Seq(5));
        assert_eq!(fault, Err(PeerFault::UnexpectedAccept));
        sender.on_link_down();
        let fault = sender.on_accept(7, &at(2, 18), 100, None, Seq(5));
        assert_eq!(fault, Err(PeerFault::UnexpectedAccept));
    }

    #[test]
    fn is_fenced_only_by_a_line_that_continues_ours() {
        let mut sender = offered();
        let newer = sender.epochs.fork(epoch(3), at(2, 18)).unwrap();
        assert!(sender.on_refuse(RefuseCode::Fenced, Some(&newer)));
        assert_eq!(*sender.phase(), Phase::Stopped(Stop::Fenced));
        let foreign = EpochTable::new(epoch(9));
        let mut sender = offered();
        assert!(!sender.on_refuse(RefuseCode::Fenced, Some(&foreign)));
        assert!(!sender.on_refuse(RefuseCode::Fenced, None));
        assert!(!sender.on_refuse(RefuseCode::Paused, Some(&newer)));
        assert_eq!(*sender.phase(), Phase::Stopped(Stop::Refused(RefuseCode::Paused)));
    }
}
