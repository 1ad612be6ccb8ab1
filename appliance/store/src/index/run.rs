//! An immutable index file: the entries of a range of frames, as a tree of 4 KiB blocks.
//!
//! ```text
//! leaf blocks (sorted entries) | inner blocks, level by level | points | marks | catalog | footer
//! ```
//!
//! Every block ends with a checksum of what is before it; the footer holds a BLAKE3 hash of the
//! whole file before it. It is written once, front to back, and never changed.

mod read;
mod write;

pub use read::{BadBlock, BlockCache, Entries, Run, RunCheck};
pub use write::{RunScope, RunWriter};

use srn_core::bytes::content_sum;
use srn_core::ids::{EpochId, Seq};
use srn_core::limits::PAGE;

/// First bytes of a footer.
const MAGIC: [u8; 4] = *b"SRNx";

/// Version of the file's layout.
const VERSION: u16 = 1;

/// Bytes of a block before its content: count, level.
const BLOCK_HEAD: usize = 8;

/// Bytes of content in a block; its checksum takes the last eight.
const BLOCK_ROOM: usize = PAGE - BLOCK_HEAD - 8;

/// Bytes of an entry of an inner block: first key of the child, its block number.
const INNER_LEN: usize = 12;

/// Bytes of a point and of a mark.
const POINT_LEN: usize = 56;
const MARK_LEN: usize = 64;

/// Block levels that are no part of the tree.
const LEVEL_POINTS: u8 = 0xf0;
const LEVEL_MARKS: u8 = 0xf1;
const LEVEL_CATALOG: u8 = 0xf2;
const LEVEL_FOOTER: u8 = 0xf3;

/// What the manifest knows of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RunMeta {
    /// The file's number; never reused.
    pub file: u32,
    /// 0 for the index of one segment, one more for each merging.
    pub level: u8,
    /// The epoch of its frames.
    pub epoch: EpochId,
    /// The first frame.
    pub first: Seq,
    /// The last frame.
    pub last: Seq,
    /// Ordinals of the first and the last piece of history that it is the index of.
    pub pieces: (u32, u32),
    /// Number of entries.
    pub entries: u64,
}

/// The file name of a run.
#[must_use]
pub fn file_name(file: u32) -> String {
    format!("{file:08x}.idx")
}

/// The number of a file name.
#[must_use]
pub fn number_of(name: &str) -> Option<u32> {
    let hex = name.strip_suffix(".idx").filter(|hex| hex.len() == 8)?;
    u32::from_str_radix(hex, 16).ok()
}

/// Makes a block of `content`, which holds `count` items.
fn seal_block(content: &[u8], count: u16, level: u8) -> [u8; PAGE] {
    let mut block = [0u8; PAGE];
    let [count_low, count_high] = count.to_le_bytes();
    let head = [count_low, count_high, level, 0, 0, 0, 0, 0];
    for (to, from) in block.iter_mut().zip(head.iter().chain(content)) {
        *to = *from;
    }
    if let Some((bytes, sum)) = block.split_last_chunk_mut::<8>() {
        *sum = content_sum(bytes).to_le_bytes();
    }
    block
}

/// The count and content of a block; `None` when it is damaged or of another level.
fn open_block(block: &[u8; PAGE], level: u8) -> Option<(usize, &[u8])> {
    let (bytes, sum) = block.split_last_chunk::<8>()?;
    let (head, content) = bytes.split_first_chunk::<BLOCK_HEAD>()?;
    let [count_low, count_high, found, ..] = *head;
    let sound = content_sum(bytes) == u64::from_le_bytes(*sum) && found == level;
    sound.then(|| (usize::from(u16::from_le_bytes([count_low, count_high])), content))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::index::{MarkPoint, Place, SeqPoint};
    use crate::io::{OsFs, Volume};
    use srn_core::epoch::Position;
    use srn_core::extent::Extent;
    use srn_core::frame::{MarkKind, ResyncReason};
    use srn_core::ids::{CheckpointId, DiskNo, FrameHash, GroupId};
    use srn_core::point::Standing;
    use srn_core::time::{LogTime, WallTime};
    use std::sync::Arc;

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// Checks a block: what it holds (zeros follow), then its checksum.
    fn check(file: &[u8], number: usize, content: &str, sum: &str) {
        let block = &file[number * PAGE..][..PAGE];
        let content = content.replace(' ', "");
        let used = content.len() / 2;
        assert_eq!(hex(&block[..used]), content, "block {number}");
        assert!(block[used..PAGE - 8].iter().all(|byte| *byte == 0), "block {number}");
        assert_eq!(hex(&block[PAGE - 8..]), sum, "block {number}");
    }

    /// One entry more than a leaf holds, so that there is one block of each sort.
    #[test]
    fn run_file_bytes_are_pinned() {
        let dir = tempfile::tempdir().unwrap();
        let volume = Volume::new(Arc::new(OsFs));
        let mut writer = RunWriter::create(&volume, dir.path(), 0xab).unwrap();
        for at in 0..128 {
            let place = Place::Zero { trim: at == 127 };
            writer.push(DiskNo(1), Extent::new(2 * at, 1), &place).unwrap();
        }
        let group = GroupId([0x66; 16]);
        let hash = FrameHash([0x33; 16]);
        let point = SeqPoint {
            seq: Seq(5),
            prev: FrameHash([0x22; 16]),
            offset: 4096,
            log_time: LogTime(6),
            wall_time: WallTime(-2),
            before: WallTime(-1),
            standing: Standing::Mixture(ResyncReason::MirrorReconnected),
        };
        let mark = MarkPoint {
            id: CheckpointId([0x44; 16]),
            kind: MarkKind::Manual,
            seq: Seq(7),
            hash,
            log_time: LogTime(8),
            wall_time: WallTime(-9),
            clean: true,
            application: true,
        };
        let meta = writer
            .finish(&RunScope {
                group,
                level: 2,
                first: Seq(5),
                last: Position { epoch: EpochId([0x11; 16]), seq: Seq(7), hash },
                pieces: (3, 4),
                points: &[point],
                marks: &[mark],
                catalog: &[0xca, 0x7a, 0x10],
            })
            .unwrap();

        let file = std::fs::read(dir.path().join("000000ab.idx")).unwrap();
        assert_eq!(file.len(), 7 * PAGE);
        // A full leaf: 127 entries, the first and the last of them.
        assert_eq!(hex(&file[..8]), "7f00000000000000");
        assert_eq!(
            hex(&file[8..40]),
            "0000000000000100fe0000000000000000000000000000000100000000000000"
        );
        assert_eq!(
            hex(&file[8 + 126 * 32..8 + 127 * 32]),
            "fc00000000000100fe0000000000000000000000000000000100000000000000"
        );
        assert_eq!(
            hex(&file[8 + 127 * 32..PAGE]),
            "00000000000000000000000000000000918d619d910ca82a"
        );
        let leaf = "0100 00 0000000000 fe00000000000100 ff 000000000000000000000000000000 \
                    0100000000000000";
        check(&file, 1, leaf, "1c7eb70856a72d80");
        let inner = "0200 01 0000000000 0000000000000100 00000000 fe00000000000100 01000000";
        check(&file, 2, inner, "fecfcb0ff9e644f7");
        let points = "0100 f0 0000000000 0500000000000000 22222222222222222222222222222222 00100000 \
                    0600000000000000 feffffffffffffff ffffffffffffffff 02030000";
        check(&file, 3, points, "90aa923eb4763a8e");
        let marks = "0100 f1 0000000000 44444444444444444444444444444444 02 01 01 0000000000 \
                    0700000000000000 33333333333333333333333333333333 0800000000000000 \
                    f7ffffffffffffff";
        check(&file, 4, marks, "e602f1105042f52c");
        check(&file, 5, "0300 f2 0000000000 ca7a10", "d786cece68fb9e21");
        let footer = "0000 f3 0000000000 53524e78 0100 02 00 66666666666666666666666666666666 \
                    0500000000000000 11111111111111111111111111111111 0700000000000000 \
                    33333333333333333333333333333333 8000000000000000 02000000 02000000 01000000 \
                    03000000 01000000 04000000 01000000 05000000 03000000 00000000 \
                    53d23b547bdbc52203027dc8fd89f399b9b24816a380dcf2905dfd9bba8b2ce2";
        check(&file, 6, footer, "8a81b0b31188207f");

        let cache = Arc::new(BlockCache::new(1 << 20));
        let run = Run::open(&volume, dir.path(), group, &meta, &cache).unwrap();
        assert_eq!(run.iter().count(), 128);
        assert_eq!(run.points().unwrap(), [point]);
        assert_eq!(run.marks().unwrap(), [mark]);
        assert_eq!(run.catalog().unwrap(), [0xca, 0x7a, 0x10]);
    }
}
