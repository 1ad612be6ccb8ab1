//! Disks that are read in passes: from a QEMU that freezes a moment for each and knows what changed,
//! and from a server that tells nothing but its content. Whatever happens in the middle of a pass, what
//! can be recovered is what the disk was at one moment.

mod device;
mod qemu;
mod server;
mod uri;
