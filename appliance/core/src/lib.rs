//! The pure brain of the product: what a group, a frame, a position and a peer *are*, and which
//! step is legal next.
//!
//! What this crate refuses to know: clocks, files, sockets, threads, randomness. It is
//! `no_std + alloc`, so none of these can be reached from here: time and entropy are arguments,
//! effects are returned as values, and the outer rooms carry them out. That is what lets a
//! simulation run the same code that runs in production, one seed at a time.
//!
//! The order of the modules is the order in which they may know each other:
//! ids, names, extents and time; then frames and the wire; then the machines.
#![no_std]
#![forbid(unsafe_code)]
#![cfg_attr(
    not(test),
    warn(clippy::indexing_slicing, clippy::cast_possible_truncation, clippy::cast_sign_loss)
)]

extern crate alloc;

pub mod bytes;
pub mod calendar;
pub mod civil;
pub mod course;
pub mod epoch;
pub mod extent;
pub mod frame;
pub mod ids;
pub mod limits;
pub mod mutants;
pub mod name;
pub mod pairing;
pub mod point;
pub mod receiver;
pub mod retention;
pub mod sender;
pub mod state;
pub mod time;
pub mod token;
pub mod wire;
