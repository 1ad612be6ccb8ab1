//! One frame, part by part.

use serde::Serialize;
use srn_core::frame::envelope::Codec;
use srn_core::frame::{Record, hash_head};
use srn_core::ids::Seq;
use srn_store::inspect::FrameDump;

use super::args::FrameArgs;
use super::place::{GroupDir, line_of};
use super::show;
use crate::clock;
use crate::error::{Failure, Result};

#[derive(Debug, Serialize)]
struct FrameAnswer {
    file: String,
    offset: u64,
    segment_id: String,
    /// The last frame durable in this log when this copy was written.
    watermark: u64,
    /// Why it is no sound frame.
    error: Option<String>,
    #[serde(flatten)]
    frame: Option<HeadAnswer>,
    blocks: Vec<BlockAnswer>,
}

#[derive(Debug, Serialize)]
struct HeadAnswer {
    frame: u64,
    group: String,
    epoch: String,
    hash: String,
    prev: String,
    durable: u64,
    log_time_us: u64,
    time: String,
    head_bytes: usize,
    stored_bytes: u32,
    content_bytes: u32,
    disk_bytes: usize,
    records: Vec<String>,
}

#[derive(Debug, Serialize)]
struct BlockAnswer {
    disk: u32,
    first_sector: u64,
    sectors: u64,
    codec: &'static str,
    stored_bytes: u32,
    /// In the log file.
    offset: u64,
    /// XXH3 of the content, in hexadecimal, as the head has it.
    sum: String,
    sound: bool,
    /// The content in hexadecimal, when it was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<String>,
}

pub(super) fn frame(group: &GroupDir, args: &FrameArgs, json: bool) -> Result<()> {
    let files = group.files()?;
    let dump = match (args.seq, &args.segment, args.offset) {
        (Some(seq), _, _) => {
            let line = match &args.line {
                Some(line) => Some(line_of(&group.look()?, Some(line))?.epochs.current()),
                None => None,
            };
            files.frame(line, Seq(seq))?
        }
        (None, Some(slot), Some(offset)) => {
            let hex = slot.trim_end_matches(".seg").trim_start_matches("log/");
            let number = u32::from_str_radix(hex, 16).map_err(|_| {
                Failure::invalid(format!("{slot:?} is no log file; write it as 0000001f"))
            })?;
            files.frame_at(number, offset)?
        }
        _ => return Err(Failure::invalid("say which frame: --seq, or --segment and --offset")),
    };
    let answer = answer(&dump, args.content && json);
    show(json, &answer, |answer| text(answer, args.content.then_some(&dump)));
    Ok(())
}

fn answer(dump: &FrameDump, with_content: bool) -> FrameAnswer {
    let content_at = dump.frame.as_ref().map_or(0, |frame| frame.envelope().disk_content_offset());
    let hex = |content: &Vec<u8>| content.iter().map(|byte| format!("{byte:02x}")).collect();
    FrameAnswer {
        file: format!("log/{:08x}.seg", dump.slot),
        offset: dump.offset,
        segment_id: format!("{:016x}", dump.segment),
        watermark: dump.watermark.0,
        error: dump.frame.as_ref().err().map(ToString::to_string),
        frame: dump.frame.as_ref().ok().map(|frame| head(frame)),
        blocks: dump
            .blocks
            .iter()
            .map(|(block, stored, at, content)| BlockAnswer {
                disk: block.disk.0,
                first_sector: block.extent.start,
                sectors: block.extent.sectors,
                codec: match stored.codec {
                    Codec::Raw => "raw",
                    Codec::Lz4 => "lz4",
                    Codec::Zstd => "zstd",
                },
                stored_bytes: stored.len,
                offset: dump.offset + content_at as u64 + u64::from(*at),
                sum: format!("{:016x}", block.sum),
                sound: content.is_some(),
                content: content.as_ref().filter(|_| with_content).map(hex),
            })
            .collect(),
    }
}

fn head(frame: &srn_store::frame::Frame) -> HeadAnswer {
    let header = frame.header();
    let records = frame.head().map(|head| head.records().map(|record| words(&record)).collect());
    HeadAnswer {
        frame: header.seq.0,
        group: header.group.to_string(),
        epoch: header.epoch.to_string(),
        hash: hash_head(frame.head_bytes()).to_string(),
        prev: header.prev.to_string(),
        durable: header.durable.0,
        log_time_us: header.log_time.0,
        time: clock::rfc3339(header.wall_time),
        head_bytes: frame.head_bytes().len(),
        stored_bytes: frame.envelope().stored_len,
        content_bytes: header.content_len,
        disk_bytes: frame.envelope().disk_len(),
        records: records.unwrap_or_default(),
    }
}

fn words(record: &Record<'_>) -> String {
    match record {
        Record::Write { disk, extent } => format!("write disk {disk} sectors {extent}"),
        Record::Zero { disk, extent } => format!("zero disk {disk} sectors {extent}"),
        Record::Trim { disk, extent } => format!("trim disk {disk} sectors {extent}"),
        Record::DiskAdd { disk, id, sectors, name } => {
            format!("disk-add {disk} id {id} name {name:?} sectors {sectors}")
        }
        Record::DiskRemove { disk } => format!("disk-remove {disk}"),
        Record::Resize { disk, sectors } => format!("resize disk {disk} sectors {sectors}"),
        Record::Epoch(epoch) => format!("epoch {} forked from {}", epoch.id, epoch.forked_from),
        Record::ResyncBegin { disk, reason } => {
            format!("resync-begin disk {disk}: {}", reason.words())
        }
        Record::ResyncEnd { disk } => format!("resync-end disk {disk}"),
        Record::ClockStep { step_us } => format!("clock-step {step_us} us"),
        // Of a mark everything counts, whatever is added to it.
        mark => format!("{mark:?}"),
    }
}

fn text(answer: &FrameAnswer, content: Option<&FrameDump>) -> String {
    let mut out = vec![format!("{} at offset {}", answer.file, answer.offset)];
    out.push(format!("segment id  {}", answer.segment_id));
    out.push(format!("watermark   {}", answer.watermark));
    if let Some(error) = &answer.error {
        out.push(format!("DAMAGED     {error}"));
    }
    if let Some(frame) = &answer.frame {
        out.push(format!("frame       {}", frame.frame));
        out.push(format!("hash        {}", frame.hash));
        out.push(format!("behind      {}", frame.prev));
        out.push(format!("group       {}", frame.group));
        out.push(format!("epoch       {}", frame.epoch));
        out.push(format!("durable     {} at the writer", frame.durable));
        out.push(format!("time        {}, log time {} us", frame.time, frame.log_time_us));
        out.push(format!(
            "bytes       head {}, content {}, stored {}, on disk {}",
            frame.head_bytes, frame.content_bytes, frame.stored_bytes, frame.disk_bytes
        ));
        out.push(format!("records     {}", frame.records.len()));
        out.extend(frame.records.iter().map(|record| format!("  {record}")));
    }
    out.push(format!("blocks      {}", answer.blocks.len()));
    for (at, block) in answer.blocks.iter().enumerate() {
        out.push(format!(
            "  disk {} sectors {}+{}: {} {} bytes at {}, sum {}{}",
            block.disk,
            block.first_sector,
            block.sectors,
            block.codec,
            block.stored_bytes,
            block.offset,
            block.sum,
            if block.sound { "" } else { "  DAMAGED: the content has another sum" }
        ));
        let bytes = content.and_then(|dump| dump.blocks.get(at)).and_then(|block| block.3.as_ref());
        if let Some(bytes) = bytes {
            hex_dump(block.first_sector * srn_core::limits::SECTOR, bytes, &mut out);
        }
    }
    out.join("\n")
}

/// Sixteen bytes to a line, as `hexdump -C` writes them; equal lines are told once.
fn hex_dump(start: u64, bytes: &[u8], out: &mut Vec<String>) {
    let mut last: Option<&[u8]> = None;
    let mut starred = false;
    for (at, line) in bytes.chunks(16).enumerate() {
        if last == Some(line) {
            if !starred {
                out.push("    *".into());
                starred = true;
            }
            continue;
        }
        (last, starred) = (Some(line), false);
        let hex: Vec<String> = line.iter().map(|byte| format!("{byte:02x}")).collect();
        let plain = |byte: &u8| if (32..127).contains(byte) { char::from(*byte) } else { '.' };
        let text: String = line.iter().map(plain).collect();
        out.push(format!("    {:012x}  {:<47}  |{text}|", start + at as u64 * 16, hex.join(" ")));
    }
}
