//! Whether what is held is what should be held: comparing the two nodes, scrubbing and repairing.

mod common;
mod scrub;
mod verify;
