//! What is promised about data, tried on real daemons by real clients: what was answered is kept,
//! what is recovered is a prefix, nobody's dead requests come to life, and after a failover only one
//! node writes.
//!
//! Random tests print their seed; `SRN_SEED` has a run again, `SRN_LAPS` makes it longer.

mod clients;
mod common;
mod cuts;
mod fencing;
mod ghosts;
mod kill;
mod lines;
mod oracle;
mod pipe;
mod resync;
mod reversal;
mod synchronous;
