//! The log: headers, frames, their chain, the sum of each block.

use std::collections::BTreeMap;
use std::ops::ControlFlow;

use srn_core::ids::Seq;
use srn_core::limits::PAGE;

use super::super::{HeaderState, LogFile};
use super::{Damage, Work};
use crate::codec::Codecs;
use crate::error::{Doing, Result};
use crate::frame::{Frame, Scratch};
use crate::manifest::SegmentMeta;
use crate::segment::{self, HEADER_LEN, Scan, scan};

impl Work<'_> {
    /// About how many bytes of the log will be read.
    pub(super) fn log_bytes(&self, log: &BTreeMap<u32, LogFile>) -> Result<u64> {
        let listed = &self.files.manifest.segments;
        let mut bytes: u64 = listed.values().map(|meta| u64::from(meta.end)).sum();
        for file in log.values().filter(|file| self.is_open(file)) {
            bytes +=
                file.file.size().doing(|| format!("asking for the length of {}", file.name()))?;
        }
        Ok(bytes)
    }

    pub(super) fn check_log(&mut self, log: &BTreeMap<u32, LogFile>) -> Result<ControlFlow<()>> {
        self.check_lines();
        let listed = self.files.manifest.segments.clone();
        for (ordinal, meta) in &listed {
            let Some(file) = log.get(&meta.slot) else {
                let name = segment::file_name(meta.slot);
                let mut damage =
                    Damage::of(format!("log/{}", name.display()), "the file is missing");
                damage.frames = Some((meta.first, meta.last.seq));
                self.damaged(damage);
                continue;
            };
            self.check_header(file, Some(meta));
            if self.check_segment(file, Some((*ordinal, meta)))?.is_break() {
                return Ok(ControlFlow::Break(()));
            }
        }
        for file in log.values() {
            if listed.values().any(|meta| meta.slot == file.slot) {
                continue;
            }
            self.check_header(file, None);
            // What an earlier life has left is of no use to anyone, and may be damaged.
            if self.is_open(file) && self.check_segment(file, None)?.is_break() {
                return Ok(ControlFlow::Break(()));
            }
        }
        Ok(ControlFlow::Continue(()))
    }

    /// Whether it may hold frames that are not sealed yet.
    fn is_open(&self, file: &LogFile) -> bool {
        let listed = self.files.manifest.segments.values().any(|meta| meta.slot == file.slot);
        !listed && file.header.header().is_some_and(|header| self.files.is_current(&header))
    }

    /// Each sealed piece of a line has to follow the one before it.
    fn check_lines(&mut self) {
        let manifest = &self.files.manifest;
        let mut broken = Vec::new();
        for line in manifest.timelines.values() {
            for pair in line.pieces.windows(2) {
                let [before, piece] = pair else { continue };
                let segment = manifest.segments.get(&piece.ordinal);
                let follows = segment.is_none_or(|segment| {
                    segment.first == piece.first && segment.prev == before.last.hash
                });
                if piece.first != before.last.seq.next() || !follows {
                    broken.push((segment.map(|segment| segment.slot), piece.first, piece.last.seq));
                }
            }
        }
        for (slot, first, last) in broken {
            let name = slot.map(|slot| format!("log/{}", segment::file_name(slot).display()));
            let text = "it does not follow what comes before it in its line";
            let mut damage = Damage::of(name.unwrap_or_default(), text);
            damage.frames = Some((first, last));
            self.damaged(damage);
        }
    }

    fn check_header(&mut self, file: &LogFile, meta: Option<&SegmentMeta>) {
        let text = match file.header {
            // A crash may have kept a frame and torn the header before it.
            HeaderState::Damaged(_) if meta.is_none() && !self.is_proven(file) => return,
            HeaderState::Damaged(_) => "the header is damaged; its first frame says what it was",
            // Of a file that is not listed it is what a crash leaves of a segment being begun.
            HeaderState::Lost if meta.is_some() => "the header is damaged, and no frame follows it",
            HeaderState::Newer(_) => "it was written by a newer version of this program",
            HeaderState::Blank if meta.is_some() => "the header is gone",
            HeaderState::Sound(header)
                if meta.is_some_and(|meta| {
                    header.id != meta.id || header.first != meta.first || header.prev != meta.prev
                }) =>
            {
                "the header is that of another segment"
            }
            HeaderState::Blank | HeaderState::Lost | HeaderState::Sound(_) => return,
        };
        let mut damage = Damage::of(file.name(), text).at(0);
        damage.frames = meta.map(|meta| (meta.first, meta.last.seq));
        self.damaged(damage);
    }

    /// Whether something in a file that is not listed tells that its beginning was durable.
    fn is_proven(&self, file: &LogFile) -> bool {
        let first = file.header.header().map_or(Seq::ZERO, |header| header.first);
        self.watermark(file).is_ok_and(|watermark| watermark >= first)
    }

    /// The newest frame that something in a file knows to be durable.
    fn watermark(&self, file: &LogFile) -> Result<Seq> {
        let Some(target) = file.target() else { return Ok(Seq::ZERO) };
        let mut frames = scan(&target, &self.files.pool)?;
        while frames.next(true)?.is_some() {}
        Ok(frames.tail()?.watermark)
    }

    /// Follows a segment's frames, also behind damage. Of a sealed one every frame has to be there;
    /// of another one those that something written later knew to be durable.
    fn check_segment(
        &mut self,
        file: &LogFile,
        sealed: Option<(u32, &SegmentMeta)>,
    ) -> Result<ControlFlow<()>> {
        let Some(target) = file.target() else { return Ok(ControlFlow::Continue(())) };
        let durable = match sealed {
            Some((_, meta)) => meta.last.seq,
            None => self.watermark(file)?,
        };
        self.report.counts.segments += 1;
        let mut frames = scan(&target, &self.files.pool)?;
        let (mut codecs, mut scratch) = (Codecs::new(), Scratch::new());
        loop {
            let (at, last) = frames.place();
            if sealed.is_some() && last >= durable {
                break;
            }
            if let Some((at, frame)) = frames.next(false)? {
                self.check_frame(file, at, &frame, durable, &mut codecs, &mut scratch);
                if self.step(frame.envelope().disk_len() as u64).is_break() {
                    return Ok(ControlFlow::Break(()));
                }
                continue;
            }
            if last >= durable {
                break;
            }
            let Some((found, next)) = skip(&mut frames, at, last)? else {
                self.lost(file, sealed, at, frames.file_len(), (last.next(), durable));
                break;
            };
            self.lost(file, sealed, at, found, (last.next(), next.prev().max(last.next())));
            if self.step(found - at).is_break() {
                return Ok(ControlFlow::Break(()));
            }
        }
        let (end, last) = frames.place();
        if let Some((_, meta)) = sealed
            && last == meta.last.seq
            && end != u64::from(meta.end)
        {
            let text = format!("its frames end at {end}, not at {}", meta.end);
            self.damaged(Damage::of(file.name(), text));
        }
        Ok(self.step(HEADER_LEN))
    }

    fn check_frame(
        &mut self,
        file: &LogFile,
        at: u64,
        frame: &Frame,
        durable: Seq,
        codecs: &mut Codecs,
        scratch: &mut Scratch,
    ) {
        self.learn_names(frame);
        self.report.counts.frames += 1;
        let seq = frame.header().seq;
        for block in frame.blocks().unwrap_or_default() {
            self.report.counts.blocks += 1;
            // What was not known to be durable may be torn by a crash: that is no damage.
            if frame.block_content(&block, codecs, scratch).is_some() || seq > durable {
                continue;
            }
            let (block, _, offset) = block;
            let offset = at + frame.envelope().disk_content_offset() as u64 + u64::from(offset);
            let text = format!("content of frame {seq} does not have its checksum");
            let mut damage = Damage::of(file.name(), text).at(offset);
            damage.frames = Some((seq, seq));
            damage.sectors.push((block.disk, block.extent));
            self.damaged(damage);
        }
    }

    /// Frames between two offsets of a segment cannot be read.
    fn lost(
        &mut self,
        file: &LogFile,
        sealed: Option<(u32, &SegmentMeta)>,
        from: u64,
        to: u64,
        frames: (Seq, Seq),
    ) {
        let (first, last) = frames;
        let text = if first == last {
            format!("frame {first} cannot be read, or does not follow the one before it")
        } else {
            format!("frames {first} to {last} cannot be read")
        };
        let mut damage = Damage::of(file.name(), text).at(from);
        damage.frames = Some(frames);
        // Which sectors they are about is told by the index, which is read later.
        if let Some((ordinal, _)) = sealed {
            self.lost.push((ordinal, from, to, self.report.damage.len()));
        }
        self.damaged(damage);
    }
}

/// Looks for the next sound frame behind damage at `at`, and lets the chain go on there. Returns
/// where it begins and its number.
fn skip(frames: &mut Scan, mut at: u64, last: Seq) -> Result<Option<(u64, Seq)>> {
    while at < frames.file_len() {
        if let Some((frame, _)) = frames.frame_at(at, false)? {
            let header = *frame.header();
            if header.seq > last {
                frames.seek(at, header.seq.prev(), header.prev);
                return Ok(Some((at, header.seq)));
            }
            at += frame.envelope().disk_len() as u64;
        } else {
            at += PAGE as u64;
        }
    }
    Ok(None)
}
