//! One copy of a frame, as it lies in the log, also when it is damaged.

use std::sync::Arc;

use srn_core::frame::Block;
use srn_core::frame::envelope::{self, Envelope, EnvelopeError, Stored};
use srn_core::ids::{EpochId, Seq};
use srn_core::limits::PAGE;

use super::{Files, LogFile};
use crate::codec::Codecs;
use crate::error::{Result, StoreError};
use crate::frame::{BadFrame, Frame, Scratch};
use crate::segment::{Scan, scan};

/// One copy of a frame.
#[derive(Debug)]
pub struct FrameDump {
    /// The log file that it lies in.
    pub slot: u32,
    /// Where it begins there, in bytes.
    pub offset: u64,
    /// The id of the segment that it was written to.
    pub segment: u64,
    /// The last frame that was durable in this log when this copy was written.
    pub watermark: Seq,
    /// The frame; or why it is none.
    pub frame: std::result::Result<Arc<Frame>, BadFrame>,
    /// Its blocks: where and how each is stored (the offset counts in the stored content), and its
    /// content if it has its checksum.
    pub blocks: Vec<(Block, Stored, u32, Option<Vec<u8>>)>,
}

impl Files {
    /// The copy of frame `seq` in `line`, or in the main line.
    ///
    /// # Errors
    /// [`StoreError::NotInHistory`] when no file of the log has it; as the volume says.
    pub fn frame(&self, line: Option<EpochId>, seq: Seq) -> Result<FrameDump> {
        let line = line.unwrap_or(self.manifest.main);
        let epochs = self.manifest.timelines.get(&line).map(|line| line.epochs.clone());
        let epochs = epochs
            .ok_or_else(|| StoreError::NotInHistory(format!("there is no line {line} here")))?;
        // The epoch that the frame was written in: the last one that began before it.
        let epoch = epochs.list().iter().rev().find(|epoch| epoch.forked_from.seq < seq);
        let epoch = epoch.map(|epoch| epoch.id);
        let mut inside: Vec<LogFile> = self.log()?.into_values().collect();
        inside.retain(|file| {
            file.header.header().is_some_and(|header| {
                Some(header.epoch) == epoch
                    && header.group == self.manifest.group
                    && header.first <= seq
            })
        });
        // The one that begins nearest before it.
        inside.sort_by_key(|file| std::cmp::Reverse(file.header.header().map(|head| head.first)));
        for file in &inside {
            if let Some(found) = self.frame_in(file, seq)? {
                return Ok(found);
            }
        }
        Err(StoreError::NotInHistory(format!("no log segment holds frame {seq} of line {line}")))
    }

    /// What lies at `offset` of the log file with this slot.
    ///
    /// # Errors
    /// [`StoreError::NotInHistory`] when there is no such file, or nothing like a frame there; as
    /// the volume says.
    pub fn frame_at(&self, slot: u32, offset: u64) -> Result<FrameDump> {
        let gone = |what: &str| StoreError::NotInHistory(format!("log segment {slot}: {what}"));
        let file = self.log()?.remove(&slot).ok_or_else(|| gone("there is no such file"))?;
        let target = file.target().ok_or_else(|| gone("its header cannot be read"))?;
        let mut frames = scan(&target, &self.pool)?;
        let found = dump(&mut frames, slot, offset)?;
        found.ok_or_else(|| gone(&format!("there is no frame at offset {offset}")))
    }

    fn frame_in(&self, file: &LogFile, seq: Seq) -> Result<Option<FrameDump>> {
        let Some(target) = file.target() else { return Ok(None) };
        let mut frames = scan(&target, &self.pool)?;
        while let Some((at, frame)) = frames.next(false)? {
            if frame.header().seq == seq {
                return dump(&mut frames, file.slot, at);
            }
        }
        // Behind damage the chain is broken, but the frames are still there.
        let (mut at, _) = frames.place();
        while at < frames.file_len() {
            let Some((frame, _)) = frames.frame_at(at, false)? else {
                at += PAGE as u64;
                continue;
            };
            if frame.header().seq == seq {
                return dump(&mut frames, file.slot, at);
            }
            at += frame.envelope().disk_len() as u64;
        }
        Ok(None)
    }
}

/// What lies at `offset`; `None` when it does not even begin like a frame.
fn dump(frames: &mut Scan, slot: u32, offset: u64) -> Result<Option<FrameDump>> {
    let Some(page) = frames.bytes(offset, PAGE)? else { return Ok(None) };
    let Some(fixed) = page.first_chunk::<{ envelope::LEN }>().copied() else { return Ok(None) };
    let envelope = match Envelope::decode(&fixed) {
        Ok(envelope) => envelope,
        Err(EnvelopeError::Magic | EnvelopeError::Truncated(_)) => return Ok(None),
        Err(error) => {
            return Ok(Some(FrameDump {
                slot,
                offset,
                segment: 0,
                watermark: Seq::ZERO,
                frame: Err(error.into()),
                blocks: Vec::new(),
            }));
        }
    };
    let short = || Err(BadFrame::Short);
    let frame = match frames.bytes(offset, envelope.disk_len())? {
        None => short(),
        Some(bytes) => {
            let front = bytes.slice(envelope::LEN..envelope.front_len());
            let start = envelope.disk_content_offset();
            let content = bytes.slice(start..start + envelope.stored_len as usize);
            Frame::from_copy(&fixed, front, content).map(Arc::new)
        }
    };
    let blocks = frame.as_ref().map(|frame| contents(frame)).unwrap_or_default();
    Ok(Some(FrameDump {
        slot,
        offset,
        segment: envelope.segment,
        watermark: envelope.durable,
        frame,
        blocks,
    }))
}

fn contents(frame: &Frame) -> Vec<(Block, Stored, u32, Option<Vec<u8>>)> {
    let (mut codecs, mut scratch) = (Codecs::new(), Scratch::new());
    let mut found = Vec::new();
    for block in frame.blocks().unwrap_or_default() {
        let content = frame.block_content(&block, &mut codecs, &mut scratch).map(<[u8]>::to_vec);
        let (block, stored, at) = block;
        found.push((block, stored, at, content));
    }
    found
}
