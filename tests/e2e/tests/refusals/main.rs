//! What the product refuses, and how: every case ends with the exit code of its kind and one line
//! that names the thing and the way out, changes nothing and loses nothing.

mod common;
mod config;
mod control;
mod disks;
mod full;
mod names;
mod nbd_tls;
mod order;
mod peers;
mod rogue;
mod state_dir;
mod tokens;
mod wire;
