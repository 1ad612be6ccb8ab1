//! A simulated world for tests. Nothing of it is shipped.
//!
//! Everything is drawn from one seed, so that a failure can be replayed by naming it.

pub mod chance;
pub mod disk;
pub mod fuzz;
#[cfg(feature = "mutants")]
pub mod mutants;
pub mod oracle;
pub mod seeds;
pub mod sim;

pub use chance::Chance;
pub use disk::{BlockDisk, Fault, SimDisk};
