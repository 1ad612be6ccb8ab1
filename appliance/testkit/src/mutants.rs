//! Hunting known bugs: each of `srn_core::mutants` has to be found by a simulation.

use srn_core::mutants::{Mutant, set};

use crate::seeds::{self, Failure, Simulation};
use crate::sim::{pair, store};

/// The simulation that is to find it.
#[must_use]
pub const fn hunter(mutant: Mutant) -> &'static Simulation {
    match mutant {
        Mutant::FenceNotDurable
        | Mutant::AckedBeforeDurable
        | Mutant::SentBeforeDurable
        | Mutant::CreditUnheeded
        | Mutant::PeerHashUnchecked
        | Mutant::StreamUnchecked
        | Mutant::FrameOrderUnchecked
        | Mutant::HashBeforeUnchecked
        | Mutant::EpochUnchecked
        | Mutant::CarriedUnproven
        | Mutant::CleanPointOfPeer => &pair::SIMULATION,
        _ => &store::SIMULATION,
    }
}

/// Brings the bug to life and runs seeds until one fails, at most `limit`. The bug lives in the
/// whole process meanwhile.
#[must_use]
pub fn hunt(mutant: Mutant, limit: u64) -> Option<Failure> {
    set(Some(mutant));
    let outcome = seeds::run_all(hunter(mutant), &(0..limit), |_| true);
    set(None);
    outcome.failure
}
