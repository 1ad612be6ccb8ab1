//! Known bugs, to prove that the simulation would find them.
//!
//! Each is one deviation at the place where the bug would be, asked for by [`is`]. Without the
//! feature `mutants`, which nothing but the test kit turns on, that is a constant and the deviation
//! is not compiled; with it a build without debug assertions is refused.

#[cfg(all(feature = "mutants", not(debug_assertions)))]
compile_error!("known bugs are for the simulation only, never for a release");

macro_rules! mutants {
    ($($(#[$doc:meta])* $name:ident = $words:literal,)*) => {
        /// A known bug.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        #[repr(u8)]
        pub enum Mutant {
            $($(#[$doc])* $name,)*
        }

        impl Mutant {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$name,)*];

            /// What people call it.
            #[must_use]
            pub const fn words(self) -> &'static str {
                match self {
                    $(Self::$name => $words,)*
                }
            }
        }
    };
}

mutants! {
    /// A commit's write is not durable when it is answered.
    AckBeforeFsync = "ack before fsync",
    /// The end of the log moves although the write failed.
    CursorPastFailedFlush = "cursor past a failed flush",
    /// All changes of a commit are answered although the log was full in the middle.
    ShortCommitAnswered = "answered although it did not fit",
    /// An index file is listed before it is synced.
    IndexNotSynced = "index not fsynced",
    /// The directory of an index file is not synced.
    IndexDirectoryNotSynced = "index directory not fsynced",
    /// A manifest or intent gets its name before it is synced.
    ManifestNotSynced = "manifest not fsynced",
    /// The directory of a manifest or intent is not synced.
    ManifestDirectoryNotSynced = "manifest directory not fsynced",
    /// The directory of a new segment file is not synced.
    SegmentDirectoryNotSynced = "segment directory not fsynced",
    /// The base is changed without an intent.
    RetireWithoutIntent = "retirement without intent",
    /// The place where the next slice of a retirement begins is durable before the slice.
    SliceCursorEarly = "place of a slice moved before its data is synced",
    /// The base is published before it is synced.
    BaseNotSynced = "base not fsynced",
    /// What a failed sync may have left in a cache only is taken for durable.
    TailNotRewritten = "tail not rewritten after a crash",
    /// Frames of a segment file's earlier life count.
    StaleFramesAccepted = "stale frames of a recycled segment accepted",
    /// A sync that failed is taken for one that did not.
    FailedSyncIgnored = "failed sync ignored",
    /// Work goes on after a failed write or sync.
    GoesOnAfterError = "goes on after EIO",
    /// Damage below what was durable is cut off like the end of a crash.
    DamageCutAsCrash = "damage cut off as if by a crash",
    /// A cache gives up what the peer has not acknowledged.
    TrimmedUnacknowledged = "acknowledged cursor trimmed early",
    /// The base passes a position that a clone was made from.
    RetiredUnderClone = "retired under a clone",
    /// The base passes a position that is to be kept.
    RetiredTooMuch = "retention not heeded",
    /// A layer is listed before it is synced.
    LayerNotSynced = "layer not fsynced",
    /// The directory of a layer is not synced.
    LayerDirectoryNotSynced = "layer directory not fsynced",
    /// A point that is kept goes when a layer is made.
    PointDropped = "kept point dropped from a layer",
    /// Of two entries of merged indexes the older one wins.
    MergeOldestWins = "older entry wins a merge",
    /// Content read from the log is not verified.
    BlockSumUnchecked = "checksum of a block unchecked",
    /// Content read from the base is not verified.
    PageSumUnchecked = "checksum of a page unchecked",
    /// A position in the middle of a resync counts as clean.
    ResyncTreatedAsClean = "resync treated as clean",
    /// The fence is in memory only.
    FenceNotDurable = "fence not durable",
    /// What was received is acknowledged, whether or not it is durable.
    AckedBeforeDurable = "acknowledged before durable",
    /// Frames are sent before they are durable.
    SentBeforeDurable = "sent before durable",
    /// The sender heeds no credit.
    CreditUnheeded = "credit not heeded",
    /// The sender takes the peer's position without comparing hashes.
    PeerHashUnchecked = "hash of the peer's position unchecked",
    /// The receiver takes a stream of another offer.
    StreamUnchecked = "stream of an old session taken",
    /// The receiver takes frames in any order.
    FrameOrderUnchecked = "frame order unchecked",
    /// The receiver does not compare the hash of the frame before.
    HashBeforeUnchecked = "hash before unchecked",
    /// The receiver takes frames of any epoch.
    EpochUnchecked = "epoch unchecked",
    /// What changed since a frame is taken to be enough for a peer of whose frame the hash is not known.
    CarriedUnproven = "changes sent to a history that is not proven",
    /// What the primary takes for the newest clean point is taken over with its changes.
    CleanPointOfPeer = "clean point of the primary taken over",
}

#[cfg(feature = "mutants")]
mod active {
    use core::sync::atomic::{AtomicU8, Ordering};

    use super::Mutant;

    /// One more than the number of the mutant that lives, or zero.
    static ACTIVE: AtomicU8 = AtomicU8::new(0);

    /// Whether this bug is there.
    #[must_use]
    pub fn is(mutant: Mutant) -> bool {
        ACTIVE.load(Ordering::Relaxed) == mutant as u8 + 1
    }

    /// Brings a bug to life, in the whole process, or with `None` ends it.
    pub fn set(mutant: Option<Mutant>) {
        ACTIVE.store(mutant.map_or(0, |mutant| mutant as u8 + 1), Ordering::Relaxed);
    }
}

#[cfg(feature = "mutants")]
pub use active::{is, set};

/// Whether this bug is there: never, in this build.
#[cfg(not(feature = "mutants"))]
#[must_use]
pub const fn is(_: Mutant) -> bool {
    false
}
