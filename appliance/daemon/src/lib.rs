//! The node: the one place where core, store, nbd, link and targets meet.
//!
//! The binary is both the daemon and its command line. Nothing outside this crate knows all the
//! rooms; in here each module knows what it needs: `group` runs one protection group, `node` holds
//! groups, peers and exports together, `recovery` makes servers of points in time, `source` drives
//! what brings writes in, `api` answers on the control socket, `cli` asks there.

pub mod access;
pub mod api;
pub mod bandwidth;
pub mod cli;
pub mod clock;
pub mod config;
pub mod context;
pub mod daemon;
pub mod error;
pub mod fleet;
pub mod group;
pub mod hook;
pub mod logging;
pub mod nbd_cert;
pub mod node;
pub mod point;
pub mod recovery;
pub mod source;
pub mod supervise;
pub mod timetable;

/// The software's version.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
