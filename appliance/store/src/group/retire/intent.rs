//! The intent: what has to be known of a slice that is being written to the base, whatever a crash
//! leaves of it.

use srn_core::bytes::{Reader, Truncated, Writer};
use srn_core::epoch::Position;
use srn_core::ids::DiskNo;
use srn_core::limits::{DISK_SECTORS_MAX, PAGE, PAGE_SECTORS};

use super::PageAt;
use crate::catalog::{position, put_position};
use crate::io::AlignedBuf;

/// The file's name.
pub(super) const INTENT: &str = "retire.intent";

/// Its most bytes.
pub(super) const INTENT_MAX: u64 = 64 << 20;

const MAGIC: [u8; 4] = *b"SRNi";
const VERSION: u32 = 1;

/// A page of which only a part changes, put together whole.
#[derive(Debug, Clone, Copy)]
pub(super) struct WholePage<B> {
    pub(super) disk: DiskNo,
    pub(super) page: u64,
    /// The sectors of it that are lost, one bit for each.
    pub(super) lost: u8,
    pub(super) bytes: B,
}

/// What an intent says.
#[derive(Debug)]
pub(super) struct Intent {
    /// The last frame of the piece.
    pub(super) to: Position,
    /// Where the slice begins.
    pub(super) next: PageAt,
    pub(super) pages: Vec<WholePage<AlignedBuf>>,
}

pub(super) fn encode<'a>(
    to: &Position,
    next: PageAt,
    pages: impl ExactSizeIterator<Item = WholePage<&'a [u8]>>,
) -> Vec<u8> {
    let mut out = Vec::with_capacity(128 + pages.len() * (PAGE + 13));
    out.put(&MAGIC);
    out.put_u32(VERSION);
    put_position(&mut out, to);
    out.put_u32(next.disk.0);
    out.put_u64(next.page);
    out.put_u64(pages.len() as u64);
    for page in pages {
        out.put_u32(page.disk.0);
        out.put_u64(page.page);
        out.put_u8(page.lost);
        out.put(page.bytes);
    }
    let hash = blake3::hash(&out);
    out.put(hash.as_bytes());
    out
}

/// None when it is damaged.
pub(super) fn decode(bytes: &[u8]) -> Option<Intent> {
    let (body, hash) = bytes.split_last_chunk::<32>()?;
    if blake3::hash(body).as_bytes() != hash {
        return None;
    }
    let mut reader = Reader::new(body);
    let mut read = || {
        let known = reader.array()? == MAGIC && reader.u32()? == VERSION;
        let to = position(&mut reader)?;
        let next = PageAt { disk: DiskNo(reader.u32()?), page: reader.u64()? };
        let count = reader.u64()?;
        let mut pages = Vec::new();
        let mut in_range = true;
        for _ in 0..count {
            let disk = DiskNo(reader.u32()?);
            let page = reader.u64()?;
            in_range &= page < DISK_SECTORS_MAX / PAGE_SECTORS;
            let lost = reader.u8()?;
            let mut bytes = AlignedBuf::zeroed(PAGE);
            bytes.copy_from_slice(reader.take(PAGE)?);
            pages.push(WholePage { disk, page, lost, bytes });
        }
        let sound = known && in_range && reader.is_empty();
        Ok::<_, Truncated>(sound.then_some(Intent { to, next, pages }))
    };
    read().ok().flatten()
}

#[cfg(test)]
mod tests {
    use srn_core::ids::{EpochId, FrameHash, Seq};

    use super::*;

    const TO: Position =
        Position { epoch: EpochId([1; 16]), seq: Seq(9), hash: FrameHash([3; 16]) };

    fn intent(page: u64, lost: u8, bytes: &[u8]) -> Vec<u8> {
        let page = WholePage { disk: DiskNo(2), page, lost, bytes };
        encode(&TO, PageAt { disk: DiskNo(1), page: 0x201 }, [page].into_iter())
    }

    /// A page number whose place in bytes is beyond all numbers was multiplied as it was.
    #[test]
    fn an_intent_for_a_page_beyond_any_disk_is_refused() {
        let bytes = [0; PAGE];
        let last = DISK_SECTORS_MAX / PAGE_SECTORS - 1;
        assert!(decode(&intent(last, 0, &bytes)).is_some());
        for page in [last + 1, u64::MAX / PAGE as u64 + 1, u64::MAX] {
            assert!(decode(&intent(page, 0, &bytes)).is_none(), "page {page}");
        }
    }

    #[test]
    fn intent_bytes_are_pinned() {
        let hex = |bytes: &[u8]| -> String { bytes.iter().map(|b| format!("{b:02x}")).collect() };
        let intent = intent(0x102, 0x81, &[0x5a; PAGE]);
        let front = "53524e69 01000000 01010101010101010101010101010101 0900000000000000 \
                     03030303030303030303030303030303 01000000 0102000000000000 \
                     0100000000000000 02000000 0201000000000000 81";
        assert_eq!(hex(&intent[..81]), front.replace(' ', ""));
        assert!(intent[81..81 + PAGE].iter().all(|byte| *byte == 0x5a));
        assert_eq!(
            hex(&intent[81 + PAGE..]),
            "dc1ba897e0730a74519c927989393ba11c7aad56dc8ad7bd7e068eb828218c55"
        );
        let found = decode(&intent).unwrap();
        assert_eq!((found.to, found.pages.len()), (TO, 1));
        assert_eq!(found.next, PageAt { disk: DiskNo(1), page: 0x201 });
        let page = &found.pages[0];
        assert_eq!((page.disk, page.page, page.lost), (DiskNo(2), 0x102, 0x81));
    }
}
