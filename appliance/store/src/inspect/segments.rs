//! The files of a log, one by one: what each is, and which frames it holds.

use srn_core::epoch::Position;
use srn_core::ids::Seq;

use super::{Files, HeaderState, LogFile};
use crate::error::{Doing, Result};
use crate::segment::{HEADER_LEN, SegmentHeader, scan};

/// What a log file is there for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SegmentUse {
    /// Sealed, and listed in the manifest under this ordinal.
    Sealed(u32),
    /// Not sealed: frames that follow a line's last sealed one.
    Open,
    /// Left over from an earlier life of the file.
    Stale,
    /// No segment was begun in it, or its header was torn when one was.
    Free,
    /// It was written by a newer version of this program.
    Unreadable,
}

/// One file of a log.
#[derive(Debug, Clone)]
pub struct SegmentInfo {
    /// The number in its name.
    pub slot: u32,
    /// Length of the file in bytes.
    pub bytes: u64,
    /// What it is there for.
    pub purpose: SegmentUse,
    /// What its header says.
    pub header: HeaderState,
    /// The last frame that counts, if there is one.
    pub last: Option<Position>,
    /// Offset behind that, in bytes.
    pub end: u64,
    /// Where frames end that were durable when something in this file was written: above `last` it
    /// proves damage. Known of files that are not sealed.
    pub watermark: Option<Seq>,
}

impl Files {
    /// Every file of the log. Those that are not sealed are read to find where their frames end.
    ///
    /// # Errors
    /// As the volume says.
    pub fn segments(&self) -> Result<Vec<SegmentInfo>> {
        self.log()?.values().map(|file| self.segment(file)).collect()
    }

    fn segment(&self, file: &LogFile) -> Result<SegmentInfo> {
        let bytes =
            file.file.size().doing(|| format!("asking for the length of {}", file.name()))?;
        let mut info = SegmentInfo {
            slot: file.slot,
            bytes,
            purpose: SegmentUse::Free,
            header: file.header,
            last: None,
            end: 0,
            watermark: None,
        };
        let listed = self.manifest.segments.iter().find(|(_, meta)| meta.slot == file.slot);
        if let Some((ordinal, meta)) = listed {
            info.purpose = SegmentUse::Sealed(*ordinal);
            info.last = Some(meta.last);
            info.end = u64::from(meta.end);
            return Ok(info);
        }
        let Some(target) = file.target() else {
            if matches!(file.header, HeaderState::Newer(_)) {
                info.purpose = SegmentUse::Unreadable;
            }
            return Ok(info);
        };
        let mut frames = scan(&target, &self.pool)?;
        while let Some((_, frame)) = frames.next(true)? {
            info.last = Some(frame.position());
        }
        let tail = frames.tail()?;
        info.end = tail.offset.max(HEADER_LEN);
        info.watermark = Some(tail.watermark);
        info.purpose =
            if self.is_current(&target.header) { SegmentUse::Open } else { SegmentUse::Stale };
        Ok(info)
    }

    /// Whether frames of such a segment could go on behind what is sealed.
    pub(super) fn is_current(&self, header: &SegmentHeader) -> bool {
        let Some(line) = self.manifest.timelines.get(&header.epoch) else { return false };
        let base = self.manifest.base.as_ref().map(|base| base.catalog.at.seq);
        let fork = line.epochs.list().last().map(|epoch| epoch.forked_from.seq);
        let sealed = line.pieces.last().map(|piece| piece.last.seq);
        let end = sealed.or(base).max(fork).unwrap_or(Seq::ZERO);
        header.group == self.manifest.group && header.first > end
    }
}
