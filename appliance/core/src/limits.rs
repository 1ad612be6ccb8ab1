//! Every cap of the formats and machines, with its arithmetic; the ones that depend on each other
//! are tied together at compile time.

/// Bytes in a sector, everywhere.
pub const SECTOR: u64 = 512;

/// Alignment of frames on disk, of O_DIRECT input and output, and of base checksums, in bytes.
pub const PAGE: usize = 4096;

/// Sectors in a page.
pub const PAGE_SECTORS: u64 = PAGE as u64 / SECTOR;

/// Payload content in one frame, in bytes. Larger writes span frames.
pub const FRAME_PAYLOAD_MAX: usize = 256 * 1024;

/// Content in one checksummed block, in bytes: what a read of one sector has to verify.
pub const BLOCK_MAX: usize = 32 * 1024;

/// Records in one frame.
pub const FRAME_RECORDS_MAX: usize = 1024;

/// Blocks in one frame: each record begins its own, so small writes reach the record cap first.
pub const FRAME_BLOCKS_MAX: usize = FRAME_RECORDS_MAX + FRAME_PAYLOAD_MAX / BLOCK_MAX;

/// Header and table of one frame, in bytes: 1,024 records of at most 96 bytes is the worst case
/// of names in every record, and 1,032 checksums of 8 bytes; rounded up.
pub const FRAME_HEAD_MAX: usize = 128 * 1024;

/// Bytes of one frame on disk: envelope, head, encoding table and payload, each padded.
pub const FRAME_DISK_MAX: usize = FRAME_HEAD_MAX + 2 * PAGE + FRAME_PAYLOAD_MAX + 2 * PAGE;

/// Longest name of a group, disk or node, in bytes.
pub const NAME_LEN_MAX: usize = 63;

/// Disks one group may ever have had (numbers are never reused).
pub const DISKS_MAX: usize = 4096;

/// Largest protected disk, in sectors: 1 PiB. Keeps every sector number within 41 bits.
pub const DISK_SECTORS_MAX: u64 = (1 << 50) / SECTOR;

/// Epochs one group may have: one per failover.
pub const EPOCHS_MAX: usize = 1024;

/// One control message on the wire, in bytes: the largest carries a full epoch table (64 bytes
/// an entry) and the disk list.
pub const MESSAGE_MAX: usize = 1024 * 1024;

/// Longest free text (a reason, a label) on the wire and in side-cars, in bytes.
pub const TEXT_MAX: usize = 512;

const _: () = assert!(FRAME_PAYLOAD_MAX.is_multiple_of(BLOCK_MAX));
const _: () = assert!(BLOCK_MAX.is_multiple_of(PAGE));
const _: () =
    assert!(FRAME_HEAD_MAX >= 128 + FRAME_RECORDS_MAX * (48 + NAME_LEN_MAX) + 8 * FRAME_BLOCKS_MAX);
const _: () = assert!(MESSAGE_MAX >= EPOCHS_MAX * 128 + DISKS_MAX * (64 + NAME_LEN_MAX));
