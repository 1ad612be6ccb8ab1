//! A recovered server on a local QEMU/KVM.
//!
//! The daemon serves each recovered disk over NBD on a unix socket; this room starts the machine
//! over those sockets, watches it, stops it, and says whether it answers:
//!
//! * [`firmware`] decides BIOS or UEFI from the disk itself ([`partitions`] reads its tables);
//! * [`accel`] proves that KVM works before a recovery depends on it;
//! * [`host`] finds QEMU and the UEFI firmware on this host, or names the missing package;
//! * [`machine`] turns a [`machine::MachineSpec`] into QEMU's arguments ([`network`] is its part
//!   for network cards);
//! * [`run`] starts, adopts, stops and removes the machine ([`process`] names a process beyond
//!   doubt);
//! * [`probe`] waits until the machine answers;
//! * [`qmp`] speaks QEMU's control protocol, to our machines and to an administrator's own.
//!
//! It refuses to know what is inside a disk past its partition tables: guest file systems are
//! hostile and are never read on the node.

pub mod accel;
pub mod firmware;
pub mod host;
pub mod machine;
pub mod network;
pub mod partitions;
pub mod probe;
pub mod process;
pub mod qmp;
pub mod run;
