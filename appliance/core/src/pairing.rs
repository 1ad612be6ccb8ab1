//! Pairing by a one-time token: who proves what, in which order, and when a token is spent.
//!
//! Both sides are inside one TLS 1.3 session with self-signed certificates that prove nothing yet.
//! Each shows that it knows the token by an HMAC over that session's exporter and both public
//! keys, so a man in the middle, who has another session on either side, can show nothing. The
//! initiator proves first; the responder, the node which made the token, answers with its own
//! proof; only then does either pin the other's key.
//!
//! Outstanding tokens live in memory only: a restart voids them.

use alloc::vec::Vec;
use core::fmt;

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

use crate::ids::NodeId;
use crate::time::Mono;
use crate::token::Token;

/// Label of the TLS exporter (RFC 8446 section 7.5) that binds a proof to its session.
pub const EXPORTER_LABEL: &[u8] = b"EXPORTER-srn-pair-1";

/// Wrong proofs after which every outstanding token is void.
pub const TRIES_MAX: u32 = 5;

/// Tokens outstanding or remembered at a node.
pub const TOKENS_MAX: usize = 32;

/// How long a spent or expired token is remembered, so that its holder is told what happened.
const REMEMBER_US: u64 = 24 * 3600 * 1_000_000;

/// Which side speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// The node that was given the token by its administrator.
    Initiator,
    /// The node that made it.
    Responder,
}

/// What a proof is bound to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Transcript {
    /// The session's exporter.
    pub exporter: [u8; 32],
    /// The initiator's key.
    pub initiator: NodeId,
    /// The responder's key.
    pub responder: NodeId,
}

/// An HMAC-SHA-256 over the transcript.
pub type Proof = [u8; 32];

fn mac(token: &Token, side: Side, transcript: &Transcript) -> Option<Hmac<Sha256>> {
    let mut mac = <Hmac<Sha256> as KeyInit>::new_from_slice(token.secret()).ok()?;
    mac.update(match side {
        Side::Initiator => b"srn-pair/1 initiator",
        Side::Responder => b"srn-pair/1 responder",
    });
    mac.update(&transcript.exporter);
    mac.update(&transcript.initiator.0);
    mac.update(&transcript.responder.0);
    Some(mac)
}

/// The proof that `side` knows the token in this session.
#[must_use]
pub fn prove(token: &Token, side: Side, transcript: &Transcript) -> Proof {
    // HMAC takes keys of any length, so there is always one; a zero proof would verify nowhere.
    mac(token, side, transcript).map_or([0; 32], |mac| mac.finalize().into_bytes().into())
}

/// Whether `proof` is that of `side`; takes the same time for every wrong one.
#[must_use]
pub fn verify(token: &Token, side: Side, transcript: &Transcript, proof: &Proof) -> bool {
    mac(token, side, transcript).is_some_and(|mac| mac.verify_slice(proof).is_ok())
}

/// Why the responder refuses. The codes are part of the wire format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// No outstanding token fits the proof.
    #[error(
        "wrong token: that node did not make it, or it was restarted since; make a new one there \
         with `srn token new`"
    )]
    Wrong,
    /// The token was right, but its time is over.
    #[error("expired token: make a new one there with `srn token new`")]
    Expired,
    /// The token was right, but it has paired a node already.
    #[error("used token: it has paired a node already; make a new one there with `srn token new`")]
    Used,
    /// Too many wrong proofs have voided it.
    #[error("void token: too many wrong tries; make a new one there with `srn token new`")]
    Void,
    /// Another node is just pairing with this token.
    #[error("token in use: another node is pairing with it at this moment")]
    Busy,
}

impl Refusal {
    /// The number on the wire.
    #[must_use]
    pub const fn code(self) -> u8 {
        match self {
            Self::Wrong => 1,
            Self::Expired => 2,
            Self::Used => 3,
            Self::Void => 4,
            Self::Busy => 5,
        }
    }

    /// The refusal with this number.
    #[must_use]
    pub const fn from_code(code: u8) -> Option<Self> {
        match code {
            1 => Some(Self::Wrong),
            2 => Some(Self::Expired),
            3 => Some(Self::Used),
            4 => Some(Self::Void),
            5 => Some(Self::Busy),
            _ => None,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum TokenState {
    Fresh,
    /// A right proof came in; the initiator has yet to confirm.
    Reserved,
    Used,
    Void,
}

struct Entry {
    token: Token,
    expires: Mono,
    state: TokenState,
}

/// The tokens which a node has made.
///
/// Life of one: fresh, reserved by the first right proof, used once the initiator confirms; fresh
/// again if it goes away before that, so that a cut link does not cost a token.
#[derive(Default)]
pub struct TokenBook {
    entries: Vec<Entry>,
    wrong_tries: u32,
}

/// A right proof: what to answer, and the handle to confirm or release with.
#[derive(Debug, PartialEq, Eq)]
pub struct Reservation {
    /// The responder's proof.
    pub proof: Proof,
    entry_expires: Mono,
    slot: Token,
}

impl TokenBook {
    /// Adds a token that is valid until `now + ttl_us`.
    ///
    /// The oldest entry goes when there are [`TOKENS_MAX`].
    pub fn add(&mut self, token: Token, now: Mono, ttl_us: u64) {
        self.forget(now);
        if self.entries.len() >= TOKENS_MAX {
            self.entries.remove(0);
        }
        let expires = Mono(now.0.saturating_add(ttl_us));
        self.entries.push(Entry { token, expires, state: TokenState::Fresh });
        self.wrong_tries = 0;
    }

    /// Tokens that could still pair a node.
    #[must_use]
    pub fn outstanding(&self, now: Mono) -> usize {
        let live = |e: &&Entry| {
            matches!(e.state, TokenState::Fresh | TokenState::Reserved) && e.expires > now
        };
        self.entries.iter().filter(live).count()
    }

    /// Checks an initiator's proof and reserves its token.
    ///
    /// # Errors
    /// [`Refusal`]; a wrong proof counts as a try against every outstanding token, since it cannot
    /// be known which one was meant.
    pub fn check(
        &mut self,
        transcript: &Transcript,
        proof: &Proof,
        now: Mono,
    ) -> Result<Reservation, Refusal> {
        self.forget(now);
        // Every entry is tried, so the time taken does not tell which one fits.
        let mut found = None;
        for (at, entry) in self.entries.iter().enumerate() {
            if verify(&entry.token, Side::Initiator, transcript, proof) {
                found = Some(at);
            }
        }
        let Some(entry) = found.and_then(|at| self.entries.get_mut(at)) else {
            self.wrong_tries = self.wrong_tries.saturating_add(1);
            if self.wrong_tries >= TRIES_MAX {
                let fresh = self.entries.iter_mut().filter(|e| e.state == TokenState::Fresh);
                fresh.for_each(|entry| entry.state = TokenState::Void);
            }
            return Err(Refusal::Wrong);
        };
        match entry.state {
            TokenState::Used => Err(Refusal::Used),
            TokenState::Void => Err(Refusal::Void),
            TokenState::Reserved => Err(Refusal::Busy),
            TokenState::Fresh if entry.expires <= now => Err(Refusal::Expired),
            TokenState::Fresh => {
                entry.state = TokenState::Reserved;
                Ok(Reservation {
                    proof: prove(&entry.token, Side::Responder, transcript),
                    entry_expires: entry.expires,
                    slot: entry.token.clone(),
                })
            }
        }
    }

    /// The initiator has accepted our proof: the token is spent.
    pub fn confirm(&mut self, reservation: Reservation) {
        self.set(&reservation, TokenState::Used);
    }

    /// The initiator went away before it confirmed: the token can be used again.
    pub fn release(&mut self, reservation: Reservation) {
        self.set(&reservation, TokenState::Fresh);
    }

    fn set(&mut self, reservation: &Reservation, state: TokenState) {
        for entry in &mut self.entries {
            if entry.expires == reservation.entry_expires && entry.token == reservation.slot {
                entry.state = state;
            }
        }
    }

    fn forget(&mut self, now: Mono) {
        self.entries.retain(|entry| now.since(entry.expires) < REMEMBER_US);
    }
}

impl fmt::Debug for TokenBook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TokenBook")
            .field("entries", &self.entries.len())
            .field("wrong_tries", &self.wrong_tries)
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: u64 = 3600 * 1_000_000;

    fn token(n: u8) -> Token {
        Token::new([n; 15])
    }
    fn session(n: u8) -> Transcript {
        Transcript { exporter: [n; 32], initiator: NodeId([1; 32]), responder: NodeId([2; 32]) }
    }
    fn book() -> TokenBook {
        let mut book = TokenBook::default();
        book.add(token(1), Mono(0), HOUR);
        book
    }
    fn proof(n: u8, at: &Transcript) -> Proof {
        prove(&token(n), Side::Initiator, at)
    }

    fn hex(bytes: &[u8]) -> alloc::string::String {
        bytes.iter().map(|byte| alloc::format!("{byte:02x}")).collect()
    }

    /// The same comes out of any HMAC-SHA-256 with the key `01 * 15` over the label, `09 * 32`,
    /// `01 * 32` and `02 * 32`.
    #[test]
    fn proof_bytes_are_pinned() {
        for (side, bytes) in [
            (Side::Initiator, "82c37bb613044653e62314bcbd355a993c1ad941abfc4f05507cc8c526321db6"),
            (Side::Responder, "a5e998cb04d0308411826678f0291645c11e60ac89be3451e9008cd1af65497e"),
        ] {
            assert_eq!(hex(&prove(&token(1), side, &session(9))), bytes);
        }
        assert_eq!(EXPORTER_LABEL, b"EXPORTER-srn-pair-1");
    }

    #[test]
    fn refusal_numbers_are_pinned() {
        let numbers = [
            (Refusal::Wrong, 1),
            (Refusal::Expired, 2),
            (Refusal::Used, 3),
            (Refusal::Void, 4),
            (Refusal::Busy, 5),
        ];
        for (refusal, number) in numbers {
            assert_eq!((refusal.code(), Refusal::from_code(number)), (number, Some(refusal)));
        }
        assert_eq!((Refusal::from_code(0), Refusal::from_code(6)), (None, None));
    }

    #[test]
    fn both_sides_prove_and_the_token_is_spent() {
        let (mut book, session) = (book(), session(9));
        let reservation = book.check(&session, &proof(1, &session), Mono(1)).unwrap();
        assert!(verify(&token(1), Side::Responder, &session, &reservation.proof));
        assert_eq!(book.check(&session, &proof(1, &session), Mono(1)), Err(Refusal::Busy));
        book.confirm(reservation);
        assert_eq!(book.check(&session, &proof(1, &session), Mono(2)), Err(Refusal::Used));
        assert_eq!(book.outstanding(Mono(2)), 0);
    }

    #[test]
    fn a_cut_before_the_confirmation_costs_nothing() {
        let (mut book, session) = (book(), session(9));
        let reservation = book.check(&session, &proof(1, &session), Mono(1)).unwrap();
        book.release(reservation);
        assert!(book.check(&session, &proof(1, &session), Mono(2)).is_ok());
    }

    #[test]
    fn a_proof_is_bound_to_its_session_its_side_and_both_keys() {
        let here = session(9);
        let good = proof(1, &here);
        assert!(verify(&token(1), Side::Initiator, &here, &good));
        assert!(!verify(&token(1), Side::Responder, &here, &good));
        assert!(!verify(&token(2), Side::Initiator, &here, &good));
        for other in [
            session(8),
            Transcript { initiator: NodeId([3; 32]), ..here.clone() },
            Transcript { responder: NodeId([3; 32]), ..here },
        ] {
            assert!(!verify(&token(1), Side::Initiator, &other, &good));
        }
    }

    #[test]
    fn five_wrong_tries_void_it() {
        let (mut book, session) = (book(), session(9));
        for _ in 0..TRIES_MAX {
            assert_eq!(book.check(&session, &proof(2, &session), Mono(1)), Err(Refusal::Wrong));
        }
        assert_eq!(book.check(&session, &proof(1, &session), Mono(1)), Err(Refusal::Void));
        book.add(token(3), Mono(2), HOUR);
        assert!(book.check(&session, &proof(3, &session), Mono(3)).is_ok());
    }

    #[test]
    fn time_ends_it_and_its_holder_is_told() {
        let (mut book, session) = (book(), session(9));
        assert_eq!(book.check(&session, &proof(1, &session), Mono(HOUR)), Err(Refusal::Expired));
        let later = Mono(HOUR + REMEMBER_US);
        assert_eq!(book.check(&session, &proof(1, &session), later), Err(Refusal::Wrong));
    }

    #[test]
    fn the_book_is_bounded() {
        let mut book = TokenBook::default();
        for n in 0..100 {
            book.add(token(n), Mono(0), HOUR);
        }
        assert_eq!(book.outstanding(Mono(1)), TOKENS_MAX);
    }
}
