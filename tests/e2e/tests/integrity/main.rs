//! Whether what is held is what should be held: comparing the two nodes.

mod common;
mod verify;
