//! The simulations: real code of the other rooms in a world where everything is drawn from one seed.
//!
//! They refuse to know how many seeds are run, or by whom: see [`crate::seeds`].

pub mod leap;
pub mod pair;
pub mod reversal;
pub mod store;

use crate::seeds::Simulation;

/// All of them.
pub const ALL: [&Simulation; 5] = [
    &store::SIMULATION,
    &pair::SIMULATION,
    &reversal::SIMULATION,
    &leap::SIMULATION,
    &store::EVERY_OPERATION,
];
