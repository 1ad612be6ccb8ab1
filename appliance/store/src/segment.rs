//! Log segments: preallocated files of fixed size that frames are appended to.
//!
//! Layout: one page of header, then frames, each beginning on a page boundary. What is behind the
//! last frame is stale: zeros, or frames of the file's earlier life, which carry another segment
//! id. A synced byte is never rewritten while the segment is in use.

mod scan;

pub use scan::{Found, Scan, Tail, Target, header_from_frame, scan};

use std::io::IoSlice;
use std::path::PathBuf;
use std::sync::Arc;

use srn_core::bytes::{Reader, Writer, content_sum};
use srn_core::frame::envelope::Envelope;
use srn_core::ids::{EpochId, FrameHash, GroupId, Seq};
use srn_core::limits::{FRAME_DISK_MAX, PAGE};
use srn_core::mutants::{self, Mutant};

use crate::error::{Doing, Result, StoreError};
use crate::frame::Frame;
use crate::io::{AlignedBuf, BufPool, File, PooledBuf};

/// First bytes of a segment.
const MAGIC: [u8; 4] = *b"SRNg";

/// Version of the header's layout.
const VERSION: u16 = 1;

/// Bytes before the first frame.
pub const HEADER_LEN: u64 = PAGE as u64;

/// The smallest useful segment: any frame fits.
pub const SEGMENT_BYTES_MIN: u64 = HEADER_LEN + FRAME_DISK_MAX as u64;

/// The largest segment: offsets of content fit 32 bits.
pub const SEGMENT_BYTES_MAX: u64 = 1 << 31;

/// A segment's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SegmentHeader {
    /// Random, new for each life of the file.
    pub id: u64,
    /// The group.
    pub group: GroupId,
    /// The epoch of its frames.
    pub epoch: EpochId,
    /// The first frame's sequence number.
    pub first: Seq,
    /// The hash of the frame before that.
    pub prev: FrameHash,
}

impl SegmentHeader {
    /// The header's page.
    #[must_use]
    pub fn encode(&self) -> AlignedBuf {
        let mut bytes = Vec::with_capacity(PAGE);
        bytes.put(&MAGIC);
        bytes.put_u16(VERSION);
        bytes.put_u16(0);
        bytes.put_u64(self.id);
        bytes.put(&self.group.0);
        bytes.put(&self.epoch.0);
        bytes.put_u64(self.first.0);
        bytes.put(&self.prev.0);
        // Reserved: the id of the key that content is encrypted with.
        bytes.put(&[0; 16]);
        bytes.resize(PAGE - 8, 0);
        let sum = content_sum(&bytes);
        bytes.put_u64(sum);
        let mut page = AlignedBuf::zeroed(PAGE);
        page.copy_from_slice(&bytes);
        page
    }

    /// Reads a header's page; `None` when it is none or is damaged.
    ///
    /// # Errors
    /// [`StoreError::NewerVersion`].
    pub fn decode(page: &[u8]) -> Result<Option<Self>> {
        let Some((bytes, sum)) = page.get(..PAGE).and_then(|page| page.split_last_chunk::<8>())
        else {
            return Ok(None);
        };
        if !bytes.starts_with(&MAGIC) || u64::from_le_bytes(*sum) != content_sum(bytes) {
            return Ok(None);
        }
        let mut reader = Reader::new(bytes);
        let read = |reader: &mut Reader<'_>| {
            reader.take(MAGIC.len())?;
            let version = reader.u16()?;
            reader.u16()?;
            let header = Self {
                id: reader.u64()?,
                group: GroupId(reader.array()?),
                epoch: EpochId(reader.array()?),
                first: Seq(reader.u64()?),
                prev: FrameHash(reader.array()?),
            };
            Ok::<_, srn_core::bytes::Truncated>((version, header))
        };
        match read(&mut reader) {
            Ok((VERSION, header)) => Ok(Some(header)),
            Ok((found, _)) => Err(StoreError::NewerVersion {
                what: "a log segment".into(),
                found,
                known: VERSION,
            }),
            Err(_) => Ok(None),
        }
    }
}

/// A segment in use. Its file goes back to the free ones when the last holder drops it, never
/// under a reader.
#[derive(Debug)]
pub struct Segment {
    /// Number of this life of the file; never reused. Index entries name segments by it.
    pub ordinal: u32,
    /// The file's number.
    pub slot: u32,
    /// The header.
    pub header: SegmentHeader,
    /// The open file.
    pub file: Arc<dyn File>,
    /// Where the slot goes in the end.
    pub(crate) free: Arc<FreeSlots>,
}

impl Segment {
    /// The segment as a file to read. Hold on to the segment while reading it.
    #[must_use]
    pub fn target(&self) -> Target {
        Target { slot: self.slot, header: self.header, file: self.file.clone() }
    }
}

impl Drop for Segment {
    fn drop(&mut self) {
        self.free.give_back(self.slot, self.file.clone());
    }
}

/// Files of dropped segments, to be used again once the manifest no longer lists them.
#[derive(Debug, Default)]
pub struct FreeSlots {
    slots: std::sync::Mutex<Vec<(u32, Arc<dyn File>)>>,
}

impl FreeSlots {
    fn give_back(&self, slot: u32, file: Arc<dyn File>) {
        self.slots.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push((slot, file));
    }

    /// Adds a file that no segment uses.
    pub(crate) fn add(&self, slot: u32, file: Arc<dyn File>) {
        self.give_back(slot, file);
    }

    /// A free file, if there is one.
    pub(crate) fn take(&self) -> Option<(u32, Arc<dyn File>)> {
        self.slots.lock().unwrap_or_else(std::sync::PoisonError::into_inner).pop()
    }

    /// Number of free files.
    #[must_use]
    pub fn len(&self) -> usize {
        self.slots.lock().unwrap_or_else(std::sync::PoisonError::into_inner).len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// The file name of a slot.
#[must_use]
pub fn file_name(slot: u32) -> PathBuf {
    format!("{slot:08x}.seg").into()
}

/// The slot of a file name.
#[must_use]
pub fn slot_of(name: &str) -> Option<u32> {
    let hex = name.strip_suffix(".seg").filter(|hex| hex.len() == 8)?;
    u32::from_str_radix(hex, 16).ok()
}

/// Appends frames to one segment.
#[derive(Debug)]
pub struct SegmentWriter {
    segment: Arc<Segment>,
    offset: u64,
    appends: u64,
    len: u64,
    pool: BufPool,
}

impl SegmentWriter {
    /// Begins a segment: writes its header durably. `len` is the file's length in bytes.
    ///
    /// # Errors
    /// As the volume says.
    pub fn begin(segment: Arc<Segment>, len: u64, pool: BufPool) -> Result<Self> {
        let page = segment.header.encode();
        segment
            .file
            .write_at(&[IoSlice::new(&page)], 0, true)
            .doing(|| format!("writing the header of log segment {}", segment.slot))?;
        Ok(Self { segment, offset: HEADER_LEN, appends: 0, len, pool })
    }

    /// The segment.
    #[must_use]
    pub const fn segment(&self) -> &Arc<Segment> {
        &self.segment
    }

    /// Where the next frame goes.
    #[must_use]
    pub const fn offset(&self) -> u64 {
        self.offset
    }

    /// Bytes of an append so far, on average; 0 before the first.
    #[must_use]
    pub fn mean_append(&self) -> u64 {
        (self.offset - HEADER_LEN).checked_div(self.appends).unwrap_or(0)
    }

    /// How many of `frames` fit, from the first.
    #[must_use]
    pub fn room_for(&self, frames: &[Arc<Frame>]) -> usize {
        let mut at = self.offset;
        frames
            .iter()
            .take_while(|frame| {
                at += frame.envelope().disk_len() as u64;
                at <= self.len
            })
            .count()
    }

    /// Writes frames, which must fit, in one durable write; returns each one's offset. `durable` is
    /// the last frame durable in this log before.
    ///
    /// # Errors
    /// As the volume says; then the segment must not be written to again.
    pub fn append(&mut self, frames: &[Arc<Frame>], durable: Seq) -> Result<Vec<u32>> {
        let mut offsets = Vec::with_capacity(frames.len());
        let mut staged: Vec<Staged> = Vec::with_capacity(frames.len());
        let mut end = self.offset;
        for frame in frames {
            offsets.push(u32::try_from(end).map_err(|_| {
                StoreError::Invalid("a log segment is longer than its offsets reach".into())
            })?);
            staged.push(stage(frame, self.segment.header.id, durable, &self.pool));
            end += frame.envelope().disk_len() as u64;
        }
        if end > self.len {
            return Err(StoreError::Invalid("a frame does not fit its log segment".into()));
        }
        let parts: Vec<IoSlice<'_>> = staged.iter().flat_map(Staged::parts).collect();
        let durably = !mutants::is(Mutant::AckBeforeFsync);
        let written = self
            .segment
            .file
            .write_at(&parts, self.offset, durably)
            .doing(|| format!("appending to log segment {}", self.segment.slot));
        if !mutants::is(Mutant::CursorPastFailedFlush) {
            written?;
        }
        self.offset = end;
        self.appends += 1;
        Ok(offsets)
    }
}

/// A frame laid out as it goes to disk.
struct Staged {
    front: PooledBuf,
    whole: Vec<bytes::Bytes>,
    tail: Option<PooledBuf>,
}

impl Staged {
    fn parts(&self) -> impl Iterator<Item = IoSlice<'_>> {
        std::iter::once(self.front.padded())
            .chain(self.whole.iter().map(|piece| &piece[..]))
            .chain(self.tail.as_ref().map(PooledBuf::padded))
            .map(IoSlice::new)
    }
}

fn stage(frame: &Frame, segment: u64, durable: Seq, pool: &BufPool) -> Staged {
    let envelope = Envelope { segment, durable, ..*frame.envelope() };
    let fixed = envelope.encode(frame.table());
    let mut front = pool.take(envelope.front_len());
    fill_padded(&mut front, &[&fixed, frame.front()]);
    let pieces = frame.content();
    if !frame.is_aligned() {
        let mut all = pool.take(envelope.stored_len as usize);
        let parts: Vec<&[u8]> = pieces.iter().map(|piece| &piece[..]).collect();
        fill_padded(&mut all, &parts);
        return Staged { front, whole: Vec::new(), tail: Some(all) };
    }
    let mut whole = pieces.to_vec();
    let mut tail = None;
    if let Some(last) = whole.last_mut()
        && !last.len().is_multiple_of(PAGE)
    {
        let rest = last.split_off(last.len() - last.len() % PAGE);
        let mut page = pool.take(rest.len());
        fill_padded(&mut page, &[&rest]);
        tail = Some(page);
        if last.is_empty() {
            whole.pop();
        }
    }
    Staged { front, whole, tail }
}

/// Fills a buffer with `parts` and zeros up to the page boundary.
fn fill_padded(buf: &mut PooledBuf, parts: &[&[u8]]) {
    let mut rest = buf.padded_mut();
    for part in parts {
        let Some((to, behind)) = rest.split_at_mut_checked(part.len()) else { return };
        to.copy_from_slice(part);
        rest = behind;
    }
    rest.fill(0);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::{Access, Fs, OsFs, Volume};
    use srn_core::extent::Extent;
    use srn_core::frame::{Builder, HeaderFields};
    use srn_core::ids::DiskNo;
    use srn_core::time::{LogTime, WallTime};

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    fn header() -> SegmentHeader {
        SegmentHeader {
            id: 0x0102_0304_0506_0708,
            group: GroupId([0x11; 16]),
            epoch: EpochId([0x22; 16]),
            first: Seq(5),
            prev: FrameHash([0x33; 16]),
        }
    }

    #[test]
    fn segment_header_bytes_are_pinned() {
        let page = header().encode();
        let fields = "53524e67 0100 0000 0807060504030201 11111111111111111111111111111111 \
                      22222222222222222222222222222222 0500000000000000 \
                      33333333333333333333333333333333 00000000000000000000000000000000";
        assert_eq!(hex(&page[..88]), fields.replace(' ', ""));
        assert!(page[88..PAGE - 8].iter().all(|byte| *byte == 0));
        assert_eq!(hex(&page[PAGE - 8..]), "952a5eaad2dd0633");
        assert_eq!(SegmentHeader::decode(&page).unwrap(), Some(header()));
        for at in 0..PAGE {
            let mut bad = page.to_vec();
            bad[at] ^= 1;
            assert_eq!(SegmentHeader::decode(&bad).unwrap(), None, "byte {at}");
        }
        assert_eq!(file_name(0xab), PathBuf::from("000000ab.seg"));
    }

    /// Header, then one frame: its front in one page, its 512 bytes of raw content in the next.
    #[test]
    fn segment_file_bytes_are_pinned() {
        let dir = tempfile::tempdir().unwrap();
        let volume = Volume::new(Arc::new(OsFs));
        let path = dir.path().join(file_name(0));
        let file = volume.create(&path, Access::Direct).unwrap();
        file.allocate(SEGMENT_BYTES_MIN).unwrap();
        let segment = Segment { ordinal: 0, slot: 0, header: header(), file, free: Arc::default() };
        let pool = BufPool::new(1 << 20);
        let mut writer =
            SegmentWriter::begin(Arc::new(segment), SEGMENT_BYTES_MIN, pool.clone()).unwrap();
        let content = vec![0x5a; 512];
        let mut builder = Builder::new();
        assert!(builder.write(DiskNo(1), Extent::new(8, 1), &[content_sum(&content)]));
        let (head, hash) = builder.finish(&HeaderFields {
            group: header().group,
            epoch: header().epoch,
            seq: Seq(5),
            prev: header().prev,
            durable: Seq(4),
            log_time: LogTime(6),
            wall_time: WallTime(7),
        });
        let frame = Arc::new(Frame::from_parts(head, hash, vec![content.clone().into()]).unwrap());
        assert_eq!(writer.append(&[frame], Seq(4)).unwrap(), [4096]);
        assert_eq!(writer.offset(), 3 * 4096);

        let bytes = std::fs::read(&path).unwrap();
        assert_eq!(bytes[..4096], header().encode()[..]);
        let front = "53524e65 0100 0000 0807060504030201 9c000000 00000000 00020000 00000000 \
                     eb8535b74f6f57a2bb946111e7989225 0400000000000000 afae4b4e9ddf04a3 53524e66 \
                     0100 8000 9c000000 01000000 01000000 00020000 0500000000000000 \
                     11111111111111111111111111111111 22222222222222222222222222222222 \
                     33333333333333333333333333333333 0400000000000000 0600000000000000 \
                     0700000000000000 000000000000000000000000000000000000000000000000 01001000 \
                     01000000 01000000 0800000000000000 bbed1c36adee019c";
        assert_eq!(hex(&bytes[4096..4096 + 220]), front.replace(' ', ""));
        assert!(bytes[4096 + 220..8192].iter().all(|byte| *byte == 0));
        assert_eq!(bytes[8192..8192 + 512], content);
        assert!(bytes[8192 + 512..].iter().all(|byte| *byte == 0));

        let mut frames = scan(&writer.segment().target(), &pool).unwrap();
        assert_eq!(frames.next(true).unwrap().map(|(at, _)| at), Some(4096));
        assert!(frames.next(true).unwrap().is_none());
        let tail = frames.tail().unwrap();
        assert_eq!((tail.offset, tail.last, tail.watermark), (3 * 4096, Seq(5), Seq(4)));
    }

    /// More than is read at once, in frames of many sizes: those that a read cuts in two are whole.
    #[test]
    fn frames_across_reads_are_whole() {
        let dir = tempfile::tempdir().unwrap();
        let file = Volume::new(Arc::new(OsFs)).create(&dir.path().join("s"), Access::Direct);
        let file = file.unwrap();
        file.allocate(8 << 20).unwrap();
        let segment = Segment { ordinal: 0, slot: 0, header: header(), file, free: Arc::default() };
        let pool = BufPool::new(4 << 20);
        let mut writer = SegmentWriter::begin(Arc::new(segment), 8 << 20, pool.clone()).unwrap();
        let (mut prev, mut written) = (header().prev, Vec::new());
        for seq in 5..45 {
            let blocks = (seq * 29) % 64 + 1;
            let mut builder = Builder::new();
            let mut content = Vec::new();
            for block in 0..blocks {
                let bytes = vec![(seq ^ block) as u8; 4096];
                let extent = Extent::new(8 * block, 8);
                assert!(builder.write(DiskNo(1), extent, &[content_sum(&bytes)]));
                content.extend(bytes);
            }
            let (head, hash) = builder.finish(&HeaderFields {
                group: header().group,
                epoch: header().epoch,
                seq: Seq(seq),
                prev,
                durable: Seq(seq - 1),
                log_time: LogTime(6),
                wall_time: WallTime(7),
            });
            prev = hash;
            let frame = Frame::from_parts(head, hash, vec![content.clone().into()]).unwrap();
            writer.append(&[Arc::new(frame)], Seq(seq - 1)).unwrap();
            written.push(content);
        }
        assert!(writer.offset() > 4 << 20, "{} bytes do not take many reads", writer.offset());
        let mut frames = scan(&writer.segment().target(), &pool).unwrap();
        for content in written {
            let (_, frame) = frames.next(true).unwrap().expect("a sound frame");
            assert!(frame.content().concat() == content, "frame {}", frame.header().seq);
        }
        assert!(frames.next(true).unwrap().is_none());
    }
}
