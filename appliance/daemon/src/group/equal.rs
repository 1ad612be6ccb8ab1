//! What a disk's content equals already is neither logged nor sent.
//!
//! A mirror that begins anew pushes the whole disk, though most of it is what this node holds. While
//! the disk is in a resync its writes are compared with that, in blocks of 4 KiB, and what is equal is
//! left out. Comparing waits for the disk, so it is done where that disturbs nobody; writes of a mirror
//! arrive in no order then, and there is no point in the middle.
//!
//! Invariant: *what is left out reads the same at the head of the log as if it had been appended.* A
//! write that was answered before this one came is in the log, and is read here; one that is under way
//! together with this one may take effect before or after it, as for every disk. When the connection is
//! gone, what was still being compared is dropped by the engine, as everything else of that client is.
//! What cannot be read counts as different.
//!
//! The comparison is with what is *held here*. A local cache holds nothing: what it knows of its peer
//! (hashes, for instance) would be asked in [`Held::differing`], the one place that decides.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use srn_core::extent::Extent;
use srn_core::ids::DiskNo;
use srn_core::limits::{PAGE, SECTOR};
use srn_nbd::server::{Reply, Request};
use srn_store::group::{Change, OwnedRecord, SpanKind, View};

use super::engine::{Client, Done, Engine, Op};
use super::export::changes_of;

/// Bytes that are read at once to be compared.
const READ_BYTES: usize = 256 << 10;

/// What this node holds of a disk, to compare with while that is worth while.
#[derive(Debug, Clone)]
pub struct Held {
    view: Arc<View>,
    disk: DiskNo,
    wanted: Arc<AtomicBool>,
}

impl Held {
    /// The content of `disk` at the head that `view` shows; compared with while `wanted`.
    #[must_use]
    pub const fn new(view: Arc<View>, disk: DiskNo, wanted: Arc<AtomicBool>) -> Self {
        Self { view, disk, wanted }
    }

    /// Whether writes are to be compared now.
    pub(super) fn is_wanted(&self) -> bool {
        self.wanted.load(Ordering::Acquire)
    }

    /// Appends what of a write differs from what is held, and answers it. Returns at once.
    pub(super) fn append(
        &self,
        engine: Arc<Engine>,
        client: Arc<Client>,
        request: Request,
        reply: Reply,
    ) {
        let held = self.clone();
        tokio::task::spawn_blocking(move || {
            let (changes, bytes) = held.changes(&request);
            // Without a change it is answered all the same, when that is its turn.
            engine.submit_one(Op {
                client: Some(client),
                changes,
                bytes,
                done: Done::Reply(reply),
            });
        });
    }

    /// The changes that a request still makes, and the bytes of content in them.
    fn changes(&self, request: &Request) -> (Vec<Change>, usize) {
        match request {
            Request::Write { offset, data, .. } => self.written(*offset, data),
            Request::WriteZeroes { offset, length, .. } => {
                let extent = extent(*offset, u64::from(*length));
                (self.not_zero(extent, |part| OwnedRecord::Zero(self.disk, part)), 0)
            }
            Request::Trim { offset, length, .. } => {
                let extent = extent(*offset, u64::from(*length));
                (self.not_zero(extent, |part| OwnedRecord::Trim(self.disk, part)), 0)
            }
            _ => (Vec::new(), 0),
        }
    }

    fn written(&self, offset: u64, data: &Bytes) -> (Vec<Change>, usize) {
        let (mut changes, mut bytes) = (Vec::new(), 0);
        for part in self.differing(offset, data) {
            bytes += part.len();
            let start = offset + part.start as u64;
            changes.extend(changes_of(self.disk, start, &data.slice(part)));
        }
        (changes, bytes)
    }

    /// The changes that content which was read at `offset` still makes, and the bytes of it in them.
    /// Blocks.
    pub(super) fn new_content(&self, offset: u64, data: &Bytes) -> (Vec<Change>, usize) {
        self.written(offset, data)
    }

    /// The same for an extent that reads as zero. Blocks.
    pub(super) fn new_zero(&self, extent: Extent) -> Vec<Change> {
        self.not_zero(extent, |part| OwnedRecord::Zero(self.disk, part))
    }

    /// The parts of `data`, which is to be written at `offset`, that differ from what is held.
    fn differing(&self, offset: u64, data: &[u8]) -> Vec<Range<usize>> {
        let mut parts: Vec<Range<usize>> = Vec::new();
        let mut held = vec![0; READ_BYTES.min(data.len())];
        let mut at = 0;
        for piece in data.chunks(READ_BYTES) {
            let Some(place) = held.get_mut(..piece.len()) else { break };
            let start = offset + at as u64;
            let read = self.view.read(self.disk, extent(start, piece.len() as u64), place);
            if let Err(error) = &read {
                log::error!("comparing what a source sends with what is held: {error}");
            }
            for block in blocks(start, piece.len()) {
                if read.is_ok() && place.get(block.clone()) == piece.get(block.clone()) {
                    continue;
                }
                let block = at + block.start..at + block.end;
                match parts.last_mut() {
                    Some(last) if last.end == block.start => last.end = block.end,
                    _ => parts.push(block),
                }
            }
            at += piece.len();
        }
        parts
    }

    /// Records for the parts of an extent in which there is content.
    fn not_zero(&self, extent: Extent, record: impl Fn(Extent) -> OwnedRecord) -> Vec<Change> {
        let mut parts = Vec::new();
        let mut at = extent.start;
        while at < extent.end() {
            let rest = Extent::new(at, extent.end() - at);
            let spans = match self.view.spans(self.disk, rest) {
                Ok(spans) => spans,
                Err(error) => {
                    log::error!("comparing what a source sends with what is held: {error}");
                    vec![(rest, SpanKind::Data)]
                }
            };
            for (part, kind) in spans {
                at = part.end();
                if kind == SpanKind::Data {
                    parts.push(Change::Record(record(part)));
                }
            }
        }
        parts
    }
}

/// The blocks of 4 KiB, by the disk's count, that a range of bytes consists of: the first and the last
/// may be parts.
fn blocks(start: u64, length: usize) -> impl Iterator<Item = Range<usize>> {
    let page = PAGE;
    let lead = (page - start as usize % page) % page;
    let mut at = 0;
    std::iter::from_fn(move || {
        let next = if at == 0 && lead > 0 { lead } else { page };
        let block = at..length.min(at + next);
        at = block.end;
        (!block.is_empty()).then_some(block)
    })
}

const fn extent(offset: u64, length: u64) -> Extent {
    Extent::new(offset / SECTOR, length / SECTOR)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_those_of_the_disk() {
        let all = |start, length| blocks(start, length).collect::<Vec<_>>();
        assert_eq!(all(0, 8192), [0..4096, 4096..8192]);
        assert_eq!(all(512, 8192), [0..3584, 3584..7680, 7680..8192]);
        assert_eq!(all(4096 + 3584, 1024), [0..512, 512..1024]);
        assert_eq!(all(1 << 40, 8192), [0..4096, 4096..8192]);
        assert_eq!(all(7, 0), [] as [Range<usize>; 0]);
    }
}
