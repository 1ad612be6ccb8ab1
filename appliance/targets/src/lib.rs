//! Where a point in time becomes a machine.
//!
//! Today one target lives here: [`qemu`], a machine on a local QEMU/KVM. The crate takes disks as
//! addresses (an NBD export on a unix socket) and gives back a running machine. It refuses to know
//! how a disk is stored, replicated or served: it depends on no other room.

pub mod qemu;
