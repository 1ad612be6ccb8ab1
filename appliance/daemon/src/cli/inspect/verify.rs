//! Reading everything and naming what is damaged.

use std::io::{IsTerminal, Write};
use std::ops::ControlFlow;
use std::time::Instant;

use serde::Serialize;
use srn_store::inspect::{Damage, Progress, Report};

use super::answers::SectorsAnswer;
use super::place::GroupDir;
use super::show;
use super::stop::Stop;
use crate::cli::{render, say_error};
use crate::config::Size;
use crate::error::{Failure, Kind, Result};

#[derive(Debug, Serialize)]
struct VerifyAnswer {
    group: String,
    bytes: u64,
    manifests: u64,
    segments: u64,
    frames: u64,
    blocks: u64,
    index_runs: u64,
    index_entries: u64,
    layer_files: u64,
    base_pages: u64,
    damage: Vec<DamageAnswer>,
}

#[derive(Debug, Serialize)]
struct DamageAnswer {
    file: String,
    offset: Option<u64>,
    first_frame: Option<u64>,
    last_frame: Option<u64>,
    sectors: Vec<DiskSectors>,
    what: String,
}

#[derive(Debug, Serialize)]
struct DiskSectors {
    disk: u32,
    name: Option<String>,
    #[serde(flatten)]
    sectors: SectorsAnswer,
}

pub(super) fn verify(groups: &[GroupDir], json: bool) -> Result<()> {
    let stop = Stop::listen()?;
    let mut answers = Vec::new();
    let mut damaged = 0;
    for group in groups {
        let words = group.words();
        let mut meter = Meter::new(words.clone());
        let report = group.verify(&mut |progress| {
            meter.at(progress);
            if stop.is_asked() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        meter.done();
        let report = report?;
        if report.cut_short {
            return Err(Failure::refused("interrupted; not everything was read"));
        }
        damaged += report.damage.len();
        answers.push(answer(words, &report));
    }
    show(json, &answers, |answers| answers.iter().map(text).collect::<Vec<_>>().join("\n\n"));
    match damaged {
        0 => Ok(()),
        1 => Err(Failure::new(Kind::Storage, "one thing is damaged")),
        many => Err(Failure::new(Kind::Storage, format!("{many} things are damaged"))),
    }
}

fn answer(group: String, report: &Report) -> VerifyAnswer {
    let counts = report.counts;
    let damage = |damage: &Damage| DamageAnswer {
        file: damage.file.clone(),
        offset: damage.offset,
        first_frame: damage.frames.map(|(first, _)| first.0),
        last_frame: damage.frames.map(|(_, last)| last.0),
        sectors: damage
            .sectors
            .iter()
            .map(|(disk, extent)| DiskSectors {
                disk: disk.0,
                name: report.disks.get(disk).cloned(),
                sectors: SectorsAnswer::of(extent),
            })
            .collect(),
        what: damage.text.clone(),
    };
    VerifyAnswer {
        group,
        bytes: counts.bytes,
        manifests: counts.manifests,
        segments: counts.segments,
        frames: counts.frames,
        blocks: counts.blocks,
        index_runs: counts.runs,
        index_entries: counts.entries,
        layer_files: counts.layer_files,
        base_pages: counts.pages,
        damage: report.damage.iter().map(damage).collect(),
    }
}

fn text(answer: &VerifyAnswer) -> String {
    let mut out = vec![format!(
        "{}: {} read: {} frames in {} log segments, {} layer files, {} blocks, {} entries in {} \
         index runs, {} pages of the base",
        answer.group,
        Size(answer.bytes),
        answer.frames,
        answer.segments,
        answer.layer_files,
        answer.blocks,
        answer.index_entries,
        answer.index_runs,
        answer.base_pages
    )];
    if answer.damage.is_empty() {
        out.push("all of it is sound".into());
    }
    for damage in &answer.damage {
        let at = damage.offset.map(|offset| format!(" at {offset}")).unwrap_or_default();
        let file =
            if damage.file.is_empty() { String::new() } else { format!("{}{at}: ", damage.file) };
        let frames = match (damage.first_frame, damage.last_frame) {
            (Some(first), Some(last)) if first == last => format!(" (frame {first})"),
            (Some(first), Some(last)) => format!(" (frames {first} to {last})"),
            _ => String::new(),
        };
        out.push(format!("DAMAGED {file}{}{frames}", damage.what));
        for part in &damage.sectors {
            let name = part.name.clone().unwrap_or_else(|| format!("number {}", part.disk));
            let SectorsAnswer { first, sectors } = part.sectors;
            out.push(format!("        disk {name}, sectors {first}+{sectors}"));
        }
    }
    out.join("\n")
}

/// Shows how far it is, a few times a second, on a terminal.
struct Meter {
    what: String,
    began: Instant,
    shown: Option<Instant>,
    terminal: bool,
}

impl Meter {
    fn new(what: String) -> Self {
        let terminal = std::io::stderr().is_terminal();
        Self { what, began: Instant::now(), shown: None, terminal }
    }

    fn at(&mut self, progress: Progress) {
        let due = self.shown.is_none_or(|shown| shown.elapsed().as_millis() >= 250);
        if !self.terminal || !due {
            return;
        }
        self.shown = Some(Instant::now());
        let Progress { done, total } = progress;
        let rate = (done as f64 / self.began.elapsed().as_secs_f64().max(0.001)) as u64;
        let bar = render::bar(done, total, 30);
        let words = render::progress(done, total, rate);
        let _ = write!(std::io::stderr(), "\r\x1b[K{} {bar} {words}", self.what);
    }

    fn done(&self) {
        if self.shown.is_some() {
            say_error("\r\x1b[K");
        }
    }
}
