//! The state of a protected disk and of its group: one function from facts to state, one table of
//! legal steps.
//!
//! ```text
//!   seeding --> streaming <--> disconnected --> tracking --> resync --> streaming
//!       ^           ^               ^
//!       v           v               v
//!       +------- paused ------------+        any --> fenced, diverged, failed
//! ```
//!
//! `tracking`: the log no longer holds all that the peer lacks, but what changed is known. From there
//! it takes a resync to stream again.

use core::fmt;

/// What a disk is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum State {
    /// Every write is in the log and flows to the peer.
    Streaming,
    /// The peer cannot take frames; every write is in the log here.
    Disconnected,
    /// A person paused replication; every write is in the log here.
    Paused,
    /// First replication: there is no point to recover to yet.
    Seeding,
    /// The content is sent anew; points from before stay recoverable.
    Resync,
    /// The log no longer holds all that the peer lacks; what changed is remembered.
    Tracking,
    /// The peer has gone on without this node; nothing is appended here.
    Fenced,
    /// Both nodes have history that the other does not have.
    Diverged,
    /// Protection has ended; the cause says why.
    Failed,
}

/// Why the state is what it is. Its text is what people read in status and alerts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Cause {
    /// All is well.
    None,
    /// The group has no peer.
    NoPeer,
    /// This node has taken over from its peer, and nothing replicates back.
    FailedOver,
    /// No session with the peer.
    LinkDown,
    /// The session is up and the two nodes are agreeing on where to go on.
    Negotiating,
    /// The log here is at its cap, or the state volume is full.
    NoRoom,
    /// The peer says that it cannot store frames now.
    PeerHindered,
    /// The peer refuses; the text that came with it says why.
    PeerRefuses,
    /// A person paused it here.
    PausedHere,
    /// Initial replication is under way.
    InitialReplication,
    /// The mirror of the source was interrupted, and sends what was written meanwhile.
    MirrorInterrupted,
    /// The source's mirror is not running: the server's writes do not come in.
    SourceGone,
    /// The last pass over a pulled disk failed: what its server writes does not come in.
    PassFailed,
    /// The log reached its cap and the policy is `stop`: the server goes on unprotected.
    LogFull,
    /// A failover at the peer has fenced this node.
    FailoverAtPeer,
    /// This node was drained for a planned failover and waits for the peer to take over.
    Handover,
    /// The peer holds frames of this epoch which this node has lost.
    PeerAhead,
    /// Neither history continues the other.
    HistoriesDiffer,
    /// The peer offers less than this node holds: it was set back.
    PeerSetBack,
    /// Both nodes are primary, and neither history continues the other.
    TwoPrimaries,
    /// Both nodes are secondary: nobody writes the group's log.
    NoPrimary,
    /// The peer needs frames that are no longer in the log.
    TooFarBehind,
    /// The peer needs more than the log holds: what changed is sent instead.
    BeyondLog,
    /// The peer has nothing: everything is sent.
    FullCopy,
    /// What the peer has cannot be told from its history: contents are compared.
    Comparing,
    /// The log gave up frames that the peer has not got; it gets what changed instead.
    LogGaveWay,
    /// The state volume failed.
    DiskFailed,
    /// The log is damaged below what was durable.
    Corrupt,
}

impl State {
    /// Every state.
    pub const ALL: [Self; 9] = [
        Self::Streaming,
        Self::Disconnected,
        Self::Paused,
        Self::Seeding,
        Self::Resync,
        Self::Tracking,
        Self::Fenced,
        Self::Diverged,
        Self::Failed,
    ];

    /// The word that people read.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Streaming => "streaming",
            Self::Disconnected => "disconnected",
            Self::Paused => "paused",
            Self::Seeding => "seeding",
            Self::Resync => "resync",
            Self::Tracking => "tracking",
            Self::Fenced => "fenced",
            Self::Diverged => "diverged",
            Self::Failed => "failed",
        }
    }

    /// Whether the step from `self` to `to` can happen in one go.
    #[must_use]
    pub const fn may_become(self, to: Self) -> bool {
        use State::{
            Disconnected, Diverged, Failed, Fenced, Paused, Resync, Seeding, Streaming, Tracking,
        };
        match (self, to) {
            // Trouble comes from anywhere.
            (_, Fenced | Diverged | Failed) => true,
            // A disk with points never goes back to having none.
            (Streaming | Disconnected | Resync | Tracking, Seeding) => false,
            // Also from tracking to streaming: after a restart the peer may hold more than is known.
            (
                Streaming | Disconnected | Paused | Seeding | Resync | Tracking | Fenced | Diverged
                | Failed,
                Streaming | Disconnected | Paused | Seeding | Resync | Tracking,
            ) => true,
        }
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.word())
    }
}

impl Cause {
    /// The words that people read.
    #[must_use]
    pub const fn words(self) -> &'static str {
        match self {
            Self::None => "",
            Self::NoPeer => "no peer",
            Self::FailedOver => "failed over to this node, which nothing protects yet",
            Self::LinkDown => "no connection to the peer",
            Self::Negotiating => "agreeing with the peer on where to go on",
            Self::NoRoom => "the log here has no room",
            Self::PeerHindered => "the peer cannot take frames",
            Self::PeerRefuses => "the peer refuses",
            Self::PausedHere => "paused by an administrator",
            Self::InitialReplication => "initial replication",
            Self::MirrorInterrupted => "the mirror was interrupted and sends what it missed",
            Self::SourceGone => "the source's mirror is not running",
            Self::PassFailed => "the last pass over a pulled disk failed",
            Self::LogFull => "the log is full and the policy is stop",
            Self::FailoverAtPeer => "the peer has failed over and goes on in a newer epoch",
            Self::Handover => "drained for a planned failover",
            Self::PeerAhead => "the peer holds newer frames than this node, which was set back",
            Self::HistoriesDiffer => "the histories of the two nodes differ",
            Self::PeerSetBack => "the peer was set back and offers less than this node holds",
            Self::TwoPrimaries => "both nodes are primary, and neither history continues the other",
            Self::NoPrimary => "both nodes are secondary, nobody is primary",
            Self::TooFarBehind => "the peer needs frames that are no longer in the log here",
            Self::BeyondLog => "the log does not reach back to the peer: what changed is sent",
            Self::FullCopy => "the peer has nothing: a full copy is sent",
            Self::Comparing => "the contents of the two nodes are compared, what differs is sent",
            Self::LogGaveWay => {
                "the log could not hold all that the peer lacks: it gets what changed instead"
            }
            Self::DiskFailed => "the state volume failed",
            Self::Corrupt => "the log is damaged",
        }
    }
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.words())
    }
}

/// How the content of one disk stands, by the records of the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// No point of this disk can be recovered yet.
    Seeding,
    /// Points can be recovered, but not the newest state.
    Resync,
    /// Every prefix of the log is a state that the disk had.
    Clean,
}

/// How the link stands for the group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Link {
    /// There is no peer.
    NoPeer,
    /// No session.
    Down,
    /// A session, no stream yet.
    Negotiating,
    /// Frames flow, or could.
    Streaming,
    /// Whatever the link does, there is no room for more frames here.
    NoRoom,
    /// The peer lacks more than the log holds, and gets nothing now.
    Tracking,
    /// Content flows in place of frames.
    Resync(Cause),
    /// Frames would flow, but the peer cannot store them.
    Hindered,
    /// The peer refuses without naming a history.
    Refused,
    /// This node has taken over from its peer, and nothing replicates back.
    FailedOver,
    /// The two histories differ.
    Diverged(Cause),
}

/// Everything that the state of a disk at its primary depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Facts {
    /// By the log.
    pub content: Content,
    /// By the link.
    pub link: Link,
    /// A person paused the group.
    pub paused: bool,
    /// Set when the group is fenced: [`Cause::FailoverAtPeer`] or [`Cause::Handover`].
    pub fence: Option<Cause>,
    /// Set when the store or the source ended protection.
    pub failure: Option<Cause>,
}

/// The state of a disk, and why.
#[must_use]
pub const fn decide(facts: &Facts) -> (State, Cause) {
    // Worst first: what is named is what a person has to act on.
    if let Some(cause) = facts.fence {
        return (State::Fenced, cause);
    }
    if let Some(cause) = facts.failure {
        return (State::Failed, cause);
    }
    if let Link::Diverged(cause) = facts.link {
        return (State::Diverged, cause);
    }
    if facts.paused {
        return (State::Paused, Cause::PausedHere);
    }
    match (facts.content, facts.link) {
        (Content::Seeding, _) => (State::Seeding, Cause::InitialReplication),
        (Content::Resync, _) => (State::Resync, Cause::MirrorInterrupted),
        (Content::Clean, Link::Streaming) => (State::Streaming, Cause::None),
        (Content::Clean, Link::NoPeer) => (State::Disconnected, Cause::NoPeer),
        (Content::Clean, Link::FailedOver) => (State::Disconnected, Cause::FailedOver),
        (Content::Clean, Link::Down) => (State::Disconnected, Cause::LinkDown),
        (Content::Clean, Link::Negotiating) => (State::Disconnected, Cause::Negotiating),
        (Content::Clean, Link::NoRoom) => (State::Disconnected, Cause::NoRoom),
        (Content::Clean, Link::Tracking) => (State::Tracking, Cause::LogGaveWay),
        (Content::Clean, Link::Resync(cause)) => (State::Resync, cause),
        (Content::Clean, Link::Hindered) => (State::Disconnected, Cause::PeerHindered),
        (Content::Clean, Link::Refused) => (State::Disconnected, Cause::PeerRefuses),
        // Returned above.
        (Content::Clean, Link::Diverged(cause)) => (State::Diverged, cause),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec::Vec;

    fn all_facts() -> Vec<Facts> {
        let mut all = Vec::new();
        for content in [Content::Seeding, Content::Resync, Content::Clean] {
            for link in [
                Link::NoPeer,
                Link::Down,
                Link::Negotiating,
                Link::Streaming,
                Link::NoRoom,
                Link::Tracking,
                Link::Resync(Cause::BeyondLog),
                Link::Hindered,
                Link::Refused,
                Link::FailedOver,
                Link::Diverged(Cause::HistoriesDiffer),
            ] {
                for paused in [false, true] {
                    for fence in [None, Some(Cause::Handover)] {
                        for failure in [None, Some(Cause::LogFull)] {
                            all.push(Facts { content, link, paused, fence, failure });
                        }
                    }
                }
            }
        }
        all
    }

    /// How many of the five facts differ.
    fn distance(a: &Facts, b: &Facts) -> usize {
        usize::from(a.content != b.content)
            + usize::from(a.link != b.link)
            + usize::from(a.paused != b.paused)
            + usize::from(a.fence != b.fence)
            + usize::from(a.failure != b.failure)
    }

    #[test]
    fn every_single_change_of_facts_is_a_legal_step() {
        let all = all_facts();
        for before in &all {
            for after in all.iter().filter(|after| distance(before, after) == 1) {
                // The log never takes back that a disk has points.
                if before.content != Content::Seeding && after.content == Content::Seeding {
                    continue;
                }
                let (from, to) = (decide(before).0, decide(after).0);
                assert!(
                    from == to || from.may_become(to),
                    "{from} -> {to} by {before:?} -> {after:?}"
                );
            }
        }
    }

    #[test]
    fn what_must_not_happen_is_illegal() {
        for (from, to) in [(State::Streaming, State::Seeding), (State::Tracking, State::Seeding)] {
            assert!(!from.may_become(to), "{from} -> {to}");
        }
    }

    #[test]
    fn only_one_state_is_safe() {
        for facts in all_facts() {
            let (state, cause) = decide(&facts);
            assert_eq!(state == State::Streaming, cause == Cause::None, "{facts:?}");
        }
    }
}
