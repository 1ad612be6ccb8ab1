//! A disk at any point in time, as a raw image.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;

use serde::Serialize;
use srn_core::bytes::is_zero;
use srn_core::extent::Extent;
use srn_core::ids::DiskNo;
use srn_core::limits::SECTOR;
use srn_store::StoreError;
use srn_store::group::{SpanKind, View};

use super::answers::SectorsAnswer;
use super::args::ExportArgs;
use super::place::{GroupDir, line_of};
use super::stop::Stop;
use super::{point, show};
use crate::cli::copy::{Meter, Unfinished, failed};
use crate::cli::say_error;
use crate::config::Size;
use crate::error::{Failure, Kind, Result};

/// Sectors read at once.
const READ_SECTORS: u64 = (512 * 1024) / SECTOR;

#[derive(Debug, Serialize)]
struct ExportAnswer {
    group: String,
    disk: String,
    /// The frame behind which the disk is shown.
    frame: u64,
    /// What that is, in words.
    point: String,
    bytes: u64,
    /// Bytes of it that are not zeros.
    content_bytes: u64,
    /// Stretches that are damaged, and were filled with zeros.
    damaged: Vec<SectorsAnswer>,
}

pub(super) fn export(group: &GroupDir, args: &ExportArgs, json: bool) -> Result<()> {
    if let Some(path) = args.raw.as_ref().filter(|path| path.exists() && !args.force) {
        return Err(Failure::conflict(format!(
            "{} is there already; choose another file or use --force",
            path.display()
        )));
    }
    let stop = Stop::listen()?;
    let looked = group.look()?;
    let name = group.name()?;
    let line = line_of(&looked, args.line.as_deref())?;
    let point = point::choose(&looked.group, &name, &line, &args.point)?;
    let view = looked.group.view_at_of(line.epochs.current(), point.seq)?;
    let catalog = view.catalog();
    let Some((no, disk)) = catalog.by_name(&args.disk) else {
        let names: Vec<&str> = catalog.disks.values().map(|disk| disk.name.as_str()).collect();
        return Err(Failure::not_found(format!(
            "at {} group {name} has no disk {:?}, but {}",
            point.words,
            args.disk,
            if names.is_empty() { "none at all".into() } else { names.join(", ") }
        )));
    };
    if !catalog.is_clean() {
        return Err(Failure::refused(format!(
            "at {} the disks of group {name} are a mixture of times, as a resync was under way; \
             choose another point: srn inspect points",
            point.words
        )));
    }
    let source = Source { view: &view, disk: no, accept_damage: args.accept_damage };
    let work = Work { source, sectors: disk.sectors, stop };
    let done = match &args.raw {
        Some(path) => to_file(work, path)?,
        None => work.run(&mut Stream(std::io::stdout().lock()))?,
    };
    let answer = ExportAnswer {
        group: name,
        disk: args.disk.clone(),
        frame: point.seq.0,
        point: point.words,
        bytes: disk.sectors.saturating_mul(SECTOR),
        content_bytes: done.content,
        damaged: done.damaged.iter().map(SectorsAnswer::of).collect(),
    };
    match &args.raw {
        Some(path) => show(json, &answer, |answer| {
            let to = path.display();
            format!(
                "{} of content at {} were written to {to}",
                Size(answer.content_bytes),
                answer.point
            )
        }),
        // Standard output is the disk's.
        None if json => say_error(&serde_json::to_string_pretty(&answer).unwrap_or_default()),
        None => {}
    }
    if !json {
        for part in &answer.damaged {
            let SectorsAnswer { first, sectors } = part;
            say_error(&format!(
                "srn: sectors {first}+{sectors} are damaged; they were filled with zeros"
            ));
        }
    }
    Ok(())
}

/// Writes to a file that appears when it is whole.
fn to_file(work: Work<'_>, path: &Path) -> Result<Done> {
    let unfinished = Unfinished::of(path)?;
    let partial = unfinished.partial();
    let file = File::create(partial).map_err(|error| failed(partial, &error))?;
    let bytes = work.sectors.saturating_mul(SECTOR);
    file.set_len(bytes).map_err(|error| failed(partial, &error))?;
    let mut image = Image { file, path: partial };
    let done = work.run(&mut image)?;
    image.file.sync_all().map_err(|error| failed(partial, &error))?;
    unfinished.finish(path)?;
    Ok(done)
}

/// Where the content goes, front to back.
trait Target {
    /// Content at an offset; what lies between two calls is zeros.
    fn put(&mut self, offset: u64, content: &[u8]) -> Result<()>;

    /// So many bytes of zeros at an offset.
    fn zeros(&mut self, offset: u64, len: u64) -> Result<()>;
}

/// A sparse file.
struct Image<'a> {
    file: File,
    path: &'a Path,
}

impl Target for Image<'_> {
    fn put(&mut self, offset: u64, content: &[u8]) -> Result<()> {
        self.file.write_all_at(content, offset).map_err(|error| failed(self.path, &error))
    }

    fn zeros(&mut self, _offset: u64, _len: u64) -> Result<()> {
        Ok(())
    }
}

/// A pipe.
struct Stream<W>(W);

impl<W: Write> Target for Stream<W> {
    fn put(&mut self, _offset: u64, content: &[u8]) -> Result<()> {
        self.0.write_all(content).map_err(|error| {
            Failure::new(Kind::Storage, format!("writing to standard output: {error}"))
        })
    }

    fn zeros(&mut self, offset: u64, mut len: u64) -> Result<()> {
        let nothing = [0u8; 64 * 1024];
        while len > 0 {
            let part = usize::try_from(len).unwrap_or(usize::MAX).min(nothing.len());
            self.put(offset, nothing.get(..part).unwrap_or_default())?;
            len -= part as u64;
        }
        Ok(())
    }
}

/// What was written.
#[derive(Default)]
struct Done {
    content: u64,
    damaged: Vec<Extent>,
}

impl Done {
    fn is_damaged(&mut self, extent: Extent) {
        match self.damaged.last_mut() {
            Some(last) if last.end() == extent.start => last.sectors += extent.sectors,
            _ => self.damaged.push(extent),
        }
    }
}

struct Source<'a> {
    view: &'a View,
    disk: DiskNo,
    accept_damage: bool,
}

struct Work<'a> {
    source: Source<'a>,
    sectors: u64,
    stop: Stop,
}

impl Work<'_> {
    fn run(&self, target: &mut dyn Target) -> Result<Done> {
        let mut done = Done::default();
        let mut meter = Meter::new(self.sectors.saturating_mul(SECTOR));
        let mut buf = vec![0; usize::try_from(READ_SECTORS * SECTOR).unwrap_or(1 << 19)];
        let mut at = 0;
        while at < self.sectors {
            for (span, is_data) in self.source.spans(Extent::new(at, self.sectors - at))? {
                at = span.end();
                if !is_data {
                    target.zeros(span.start * SECTOR, span.bytes())?;
                    continue;
                }
                let mut from = span.start;
                while from < span.end() {
                    if self.stop.is_asked() {
                        return Err(Failure::refused("interrupted; nothing was written"));
                    }
                    let part = Extent::new(from, READ_SECTORS.min(span.end() - from));
                    from = part.end();
                    let len = usize::try_from(part.bytes()).unwrap_or(usize::MAX);
                    let Some(out) = buf.get_mut(..len) else { continue };
                    self.source.read(part, out, &mut done)?;
                    if is_zero(out) {
                        target.zeros(part.start * SECTOR, part.bytes())?;
                    } else {
                        target.put(part.start * SECTOR, out)?;
                        done.content += part.bytes();
                    }
                    meter.at(part.end() * SECTOR);
                }
            }
        }
        meter.done();
        Ok(done)
    }
}

impl Source<'_> {
    /// What has content. Where the index cannot tell, everything might.
    fn spans(&self, extent: Extent) -> Result<Vec<(Extent, bool)>> {
        match self.view.spans(self.disk, extent) {
            Ok(spans) => {
                Ok(spans.iter().map(|(part, kind)| (*part, *kind == SpanKind::Data)).collect())
            }
            Err(StoreError::Corrupt(_)) if self.accept_damage => {
                let part = Extent::new(extent.start, READ_SECTORS.min(extent.sectors));
                Ok(vec![(part, true)])
            }
            Err(error) => Err(self.refused(extent, error)),
        }
    }

    /// Reads a part. Where damage is accepted, the sectors that cannot be read are zeros.
    fn read(&self, extent: Extent, out: &mut [u8], done: &mut Done) -> Result<()> {
        match self.view.read(self.disk, extent, out) {
            Ok(()) => Ok(()),
            Err(StoreError::Corrupt(_)) if self.accept_damage && extent.sectors == 1 => {
                out.fill(0);
                done.is_damaged(extent);
                Ok(())
            }
            Err(StoreError::Corrupt(_)) if self.accept_damage => {
                // Each half by itself, until it is known which sectors it is.
                let half = (extent.sectors / 2).next_multiple_of(8).min(extent.sectors - 1);
                let split = usize::try_from(half * SECTOR).unwrap_or(0).min(out.len());
                let (left, right) = out.split_at_mut(split);
                self.read(Extent::new(extent.start, half), left, done)?;
                self.read(Extent::new(extent.start + half, extent.sectors - half), right, done)
            }
            Err(error) => Err(self.refused(extent, error)),
        }
    }

    fn refused(&self, extent: Extent, error: StoreError) -> Failure {
        let damaged = matches!(error, StoreError::Corrupt(_));
        let failure = Failure::from(error);
        let way_out = if damaged {
            "; srn inspect verify names what is damaged, --accept-damage fills it with zeros"
        } else {
            ""
        };
        let message = format!("sectors {extent}: {failure}{way_out}");
        Failure::new(failure.kind, message)
    }
}
