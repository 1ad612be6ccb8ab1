//! The primary's side of replicating one group to its peer, as a pure machine.
//!
//! Invariants, checked by the simulation for every seed:
//! * only frames that are durable at the primary are sent;
//! * frames are sent in order, without holes, from just behind the position which the secondary
//!   reported, and only if that position lies on our line of history *by hash*;
//! * what changed is sent instead of frames only where the log does not hold these any more, or a
//!   person asks for it; it leads to a position of ours, and what the secondary holds before it had
//!   better lie on our line by hash: where that cannot be told its content is compared;
//! * nothing counts as acknowledged that was not sent or reported in this epoch's line;
//! * never more bytes are sent than the secondary granted, but for the one frame that crosses the
//!   limit.
//!
//! It refuses to know what is in a frame, where it is kept, or what time it is.

use crate::epoch::{EpochTable, Position, Relation};
use crate::ids::{FrameHash, Seq};
use crate::mutants::{self, Mutant};
use crate::wire::{Accept, RefuseCode};

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
    /// What changed flows.
    Carrying(Carry),
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

/// What changed is being sent, in place of frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Carry {
    /// The offer's nonce, which the stream's header repeats.
    pub nonce: u64,
    /// Where the secondary is.
    pub from: Position,
    /// That this lies on our line is proven by its hash. Else its content has to be compared.
    pub is_proven: bool,
    /// Where it leads, once that is decided.
    pub to: Option<Seq>,
    /// Bytes sent in this stream.
    pub sent_bytes: u64,
    /// Bytes granted for this stream.
    pub credit: u64,
}

/// What the sender has to be told of its own log when it judges an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Here {
    /// Our own hash of the frame at which the peer is, `None` when we no longer know it.
    pub hash: Option<FrameHash>,
    /// The oldest frame that we can still send.
    pub oldest: Seq,
    /// Whether we hold a copy of the disks.
    pub has_copy: bool,
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

    /// The peer accepts.
    ///
    /// # Errors
    /// [`PeerFault`] when no such offer is open.
    pub fn on_accept(&mut self, accept: &Accept, here: Here) -> Result<(), PeerFault> {
        let Accept { nonce, position: theirs, credit, .. } = accept;
        if self.phase != (Phase::Offered { nonce: *nonce }) {
            return Err(PeerFault::UnexpectedAccept);
        }
        self.phase = match self.judge(accept, here) {
            Ok(()) => {
                // Also where that is less than it had acknowledged: what it holds now is what counts.
                self.acked = theirs.seq;
                let next = theirs.seq.next();
                Phase::Streaming(Stream { nonce: *nonce, next, sent_bytes: 0, credit: *credit })
            }
            Err(Cannot::Frames { is_proven }) => {
                self.acked = theirs.seq;
                Phase::Carrying(Carry {
                    nonce: *nonce,
                    from: *theirs,
                    is_proven,
                    to: None,
                    sent_bytes: 0,
                    credit: *credit,
                })
            }
            Err(Cannot::Anything(stop)) => Phase::Stopped(stop),
        };
        Ok(())
    }

    fn judge(&self, accept: &Accept, here: Here) -> Result<(), Cannot> {
        let theirs = &accept.position;
        let stop = |stop| Err(Cannot::Anything(stop));
        match self.epochs.relation(theirs, self.durable) {
            Relation::UnknownEpoch => stop(Stop::NotOurHistory),
            Relation::PastFork(_) if theirs.epoch == self.epochs.current() => {
                stop(Stop::PeerIsAhead { theirs: theirs.seq, ours: self.durable })
            }
            Relation::PastFork(_) => stop(Stop::NotOurHistory),
            Relation::Ancestor => match here.hash {
                Some(hash) if hash != theirs.hash && !mutants::is(Mutant::PeerHashUnchecked) => {
                    stop(Stop::HashDiffers(theirs.seq))
                }
                Some(_) if theirs.seq.next() >= here.oldest && !accept.compare => Ok(()),
                known if here.has_copy => {
                    let is_known = known.is_some() || mutants::is(Mutant::CarriedUnproven);
                    Err(Cannot::Frames { is_proven: is_known && !accept.compare })
                }
                _ => stop(Stop::TooFarBehind { theirs: theirs.seq, oldest: here.oldest }),
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

    /// What changed up to our frame `to` is sent from now on.
    pub fn on_carry(&mut self, to: Seq) {
        if let Phase::Carrying(carry) = &mut self.phase {
            carry.to = Some(to);
        }
    }

    /// Whether more of what changed may be sent.
    #[must_use]
    pub fn may_carry(&self) -> bool {
        matches!(&self.phase, Phase::Carrying(carry) if carry.sent_bytes < carry.credit)
    }

    /// So many bytes more of what changed were handed to the stream.
    pub fn on_carried(&mut self, bytes: u64) {
        if let Phase::Carrying(carry) = &mut self.phase {
            carry.sent_bytes = carry.sent_bytes.saturating_add(bytes);
        }
    }

    /// The peer holds every frame up to `seq` durably. Returns whether that is news.
    ///
    /// Behind what changed that is the frame to which it led: then the group is to be offered again.
    ///
    /// # Errors
    /// [`PeerFault::AckOfUnsent`].
    pub fn on_ack(&mut self, seq: Seq) -> Result<bool, PeerFault> {
        let stream = match &self.phase {
            Phase::Streaming(stream) => stream,
            Phase::Carrying(carry) if carry.to == Some(seq) => {
                self.acked = seq;
                self.phase = Phase::Offline;
                return Ok(true);
            }
            Phase::Carrying(carry) if seq > carry.from.seq => {
                return Err(PeerFault::AckOfUnsent { acked: seq, next: carry.from.seq.next() });
            }
            // An acknowledgement that crossed our own end of the stream.
            _ => return Ok(false),
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
        let credit = match &mut self.phase {
            Phase::Streaming(stream) => &mut stream.credit,
            Phase::Carrying(carry) => &mut carry.credit,
            _ => return Ok(()),
        };
        if limit < *credit {
            return Err(PeerFault::CreditShrank);
        }
        *credit = limit;
        Ok(())
    }
}

/// Why the peer cannot simply be sent frames.
enum Cannot {
    Frames { is_proven: bool },
    Anything(Stop),
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{EpochId, GroupId};

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
    fn answer(nonce: u64, position: Position) -> Accept {
        let group = GroupId([0; 16]);
        Accept { group, nonce, position, credit: 100, compare: false, under: None }
    }
    fn here(known: Option<u64>) -> Here {
        Here { hash: known.map(hash), oldest: Seq(5), has_copy: false }
    }
    fn accept(theirs: Position) -> Phase {
        let mut sender = offered();
        let known = (theirs.seq.0 >= 4).then_some(theirs.seq.0);
        sender.on_accept(&answer(7, theirs), here(known)).unwrap();
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
        sender.on_accept(&answer(7, at(2, 18)), here(Some(18))).unwrap();
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
        sender.on_accept(&answer(7, at(2, 18)), here(Some(18))).unwrap();
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
    fn what_the_log_no_longer_holds_is_carried_where_there_is_a_copy() {
        let copy = |known| Here { has_copy: true, ..here(known) };
        let carried = |accept: &Accept, here| {
            let mut sender = offered();
            sender.on_accept(accept, here).unwrap();
            sender
        };
        let is_proven = |sender: &Sender| match sender.phase() {
            Phase::Carrying(carry) => Some(carry.is_proven),
            _ => None,
        };
        // The hash of its frame decides whether what changed since is enough.
        assert_eq!(is_proven(&carried(&answer(7, at(1, 3)), copy(Some(3)))), Some(true));
        assert_eq!(is_proven(&carried(&answer(7, at(1, 3)), copy(None))), Some(false));
        let stopped = carried(&answer(7, at(1, 3)), copy(Some(9)));
        assert_eq!(*stopped.phase(), Phase::Stopped(Stop::HashDiffers(Seq(3))));
        // Who asks for it gets everything compared, though the log would do.
        let asks = Accept { compare: true, ..answer(7, at(2, 18)) };
        assert_eq!(is_proven(&carried(&asks, copy(Some(18)))), Some(false));

        let mut sender = carried(&answer(7, at(1, 3)), copy(Some(3)));
        assert_eq!(sender.next_to_send(), None, "no frames meanwhile");
        let fault = PeerFault::AckOfUnsent { acked: Seq(20), next: Seq(4) };
        assert_eq!(sender.on_ack(Seq(20)), Err(fault));
        sender.on_carry(Seq(19));
        sender.on_carried(100);
        assert!(!sender.may_carry(), "credit is used up");
        sender.on_credit(101).unwrap();
        assert!(sender.may_carry());
        assert_eq!(sender.on_ack(Seq(3)), Ok(false));
        assert_eq!(sender.on_ack(Seq(19)), Ok(true));
        assert_eq!((sender.acked(), sender.phase()), (Seq(19), &Phase::Offline));
    }

    #[test]
    fn answers_to_other_offers_are_faults() {
        let mut sender = offered();
        let fault = sender.on_accept(&answer(8, at(2, 18)), here(None));
        assert_eq!(fault, Err(PeerFault::UnexpectedAccept));
        sender.on_link_down();
        let fault = sender.on_accept(&answer(7, at(2, 18)), here(None));
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
