//! A group's history on disk.
//!
//! What this crate refuses to know: sockets, async runtimes, policies, who the peer is. It is
//! synchronous and owns no threads of its own but those that the caller lends it; time and entropy
//! are handed in. It is the only crate that syncs, and all its input and output goes through
//! [`io::Fs`].
//!
//! How it hangs together, and the bytes of every file, are in `docs/formats.md`.

mod base;
pub mod catalog;
pub mod codec;
pub mod durable;
pub mod error;
pub mod frame;
pub mod group;
pub mod index;
pub mod inspect;
pub mod io;
pub mod layer;
pub mod manifest;
pub mod segment;

pub use error::{Result, StoreError};
