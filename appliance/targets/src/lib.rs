//! Where a point in time becomes a machine: local QEMU, disk exports.
