//! Small structures of the store.

use srn_core::bytes::{Reader, content_sum};
use srn_core::ids::{EpochId, FrameHash, GroupId, Seq};
use srn_store::catalog::Catalog;
use srn_store::segment::SegmentHeader;
use srn_testkit::fuzz::{Target, run, unsealed};

use crate::group::Sample;

/// The last eight bytes are the XXH3 of what is before them.
pub(crate) fn seal_xxh3(bytes: &mut Vec<u8>) {
    if let Some((body, sum)) = bytes.split_last_chunk_mut::<8>() {
        *sum = content_sum(body).to_le_bytes();
    }
}

#[test]
fn segment_headers() {
    let header = SegmentHeader {
        id: 1,
        group: GroupId([1; 16]),
        epoch: EpochId([2; 16]),
        first: Seq(3),
        prev: FrameHash([4; 16]),
    };
    let target = Target {
        name: "segment headers",
        corpus: vec![header.encode().to_vec()],
        seal: seal_xxh3,
        cap: 1 << 16,
    };
    run(&target, |bytes, _| {
        let Ok(Some(header)) = SegmentHeader::decode(bytes) else { return };
        assert_eq!(SegmentHeader::decode(&header.encode()).ok().flatten(), Some(header));
    });
}

#[test]
fn catalogs() {
    let sample = Sample::get();
    let target =
        Target { name: "catalogs", corpus: sample.catalogs(), seal: unsealed, cap: 4 << 20 };
    run(&target, |bytes, _| {
        let Ok(Some(catalog)) = Catalog::decode(&mut Reader::new(bytes)) else { return };
        let again = Catalog::decode(&mut Reader::new(&catalog.encode()));
        assert_eq!(again, Ok(Some(catalog)));
    });
}
