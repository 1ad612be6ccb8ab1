//! The QEMU target against real QEMU processes, all under emulation.
//!
//! Needs the Debian packages qemu-system-x86, qemu-system-common, qemu-utils, libnbd-bin, ovmf, fdisk,
//! mtools and binutils; a test that misses one fails with its name.
#![expect(clippy::unwrap_used, reason = "a test's vocabulary fails like the test it serves")]

mod disks;
mod firmware;
mod fleece;
mod machine;
mod mirror;
mod server;
mod stranger;
mod support;
