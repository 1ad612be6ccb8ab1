//! Writing an export to a raw file: sparse, synced, whole or not at all.

use std::fs::File;
use std::io::{IsTerminal, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use srn_core::bytes::is_zero;
use srn_nbd::client::{Client, ConnectOptions, Uri};
use tokio::task::JoinSet;

use super::{render, say_error};
use crate::api::OpenExport;
use crate::error::{Failure, Kind, Result};

/// Reads under way at once.
const READS: usize = 16;

/// Bytes of one read.
const READ_BYTES: u64 = 512 * 1024;

/// Bytes of block status asked for at once.
const STATUS_BYTES: u64 = 1 << 30;

/// Pieces of a disk that have content, found as they are needed.
struct Pieces {
    client: Client,
    size: u64,
    at: u64,
    found: std::collections::VecDeque<(u64, u64)>,
}

impl Pieces {
    async fn next(&mut self) -> Result<Option<(u64, u64)>> {
        while self.found.is_empty() && self.at < self.size {
            let ask = STATUS_BYTES.min(self.size - self.at);
            let asked = u32::try_from(ask).unwrap_or(u32::MAX);
            let spans = self
                .client
                .allocation(self.at, asked)
                .await
                .map_err(|error| Failure::unreachable(format!("asking for holes: {error}")))?;
            let mut start = self.at;
            for span in spans {
                let end = (start + span.length).min(self.at + ask);
                while !span.zero && start < end {
                    let length = READ_BYTES.min(end - start);
                    self.found.push_back((start, length));
                    start += length;
                }
                start = end;
            }
            if start == self.at {
                return Err(Failure::internal("the daemon told nothing about holes"));
            }
            self.at = start;
        }
        Ok(self.found.pop_front())
    }
}

/// A file that gets its name when it is whole; dropped before, it is removed.
pub(super) struct Unfinished {
    partial: PathBuf,
    finished: bool,
}

impl Unfinished {
    /// For the file that shall be `path` in the end. Nothing is made yet.
    ///
    /// # Errors
    /// When `path` names no file.
    pub(super) fn of(path: &Path) -> Result<Self> {
        let name = path
            .file_name()
            .ok_or_else(|| Failure::invalid(format!("{} is no name for a file", path.display())))?;
        let mut partial = name.to_owned();
        partial.push(".part");
        Ok(Self { partial: path.with_file_name(partial), finished: false })
    }

    /// Where it is written until then.
    pub(super) fn partial(&self) -> &Path {
        &self.partial
    }

    /// It is whole and synced: it gets its name, durably.
    ///
    /// # Errors
    /// As the system says.
    pub(super) fn finish(mut self, path: &Path) -> Result<()> {
        rustix::fs::rename(&self.partial, path).map_err(|error| failed(path, &error.into()))?;
        self.finished = true;
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
        File::open(parent.unwrap_or_else(|| Path::new(".")))
            .and_then(|dir| dir.sync_all())
            .map_err(|error| failed(path, &error))
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        if !self.finished {
            let _ = std::fs::remove_file(&self.partial);
        }
    }
}

/// Writes the export to `path`; returns the bytes of content written.
///
/// # Errors
/// When something cannot be read or written, or at Ctrl-C: then there is no new file.
pub(super) async fn to_file(open: &OpenExport, path: &Path) -> Result<u64> {
    let unfinished = Unfinished::of(path)?;
    let work = copy(open, unfinished.partial());
    let bytes = tokio::select! {
        bytes = work => bytes?,
        _ = tokio::signal::ctrl_c() => {
            return Err(Failure::refused("interrupted; nothing was written"));
        }
    };
    unfinished.finish(path)?;
    Ok(bytes)
}

pub(super) fn failed(path: &Path, error: &std::io::Error) -> Failure {
    Failure::new(Kind::Storage, format!("writing {}: {error}", path.display()))
}

async fn copy(open: &OpenExport, partial: &Path) -> Result<u64> {
    let uri: Uri = open
        .uri
        .parse()
        .map_err(|error| Failure::internal(format!("the export's URI: {error}")))?;
    let client = Client::connect(&uri, &ConnectOptions::default())
        .await
        .map_err(|error| Failure::unreachable(format!("the export: {error}")))?;
    let file = Arc::new(File::create(partial).map_err(|error| failed(partial, &error))?);
    file.set_len(open.size).map_err(|error| failed(partial, &error))?;
    let mut pieces =
        Pieces { client: client.clone(), size: open.size, at: 0, found: Default::default() };
    let mut reads: JoinSet<Result<u64>> = JoinSet::new();
    let mut meter = Meter::new(open.size);
    let mut bytes = 0;
    loop {
        let piece = if reads.len() < READS { pieces.next().await? } else { None };
        match piece {
            Some((start, length)) => {
                meter.at(start);
                let (client, file) = (client.clone(), file.clone());
                let partial = partial.to_owned();
                reads.spawn(async move { one(&client, &file, &partial, start, length).await });
            }
            None => match reads.join_next().await {
                Some(done) => {
                    bytes +=
                        done.map_err(|error| Failure::internal(format!("a task ended: {error}")))??;
                }
                None => break,
            },
        }
    }
    meter.done();
    let synced = file.clone();
    tokio::task::spawn_blocking(move || synced.sync_all())
        .await
        .map_err(|error| Failure::internal(format!("a task ended: {error}")))?
        .map_err(|error| failed(partial, &error))?;
    Ok(bytes)
}

async fn one(
    client: &Client,
    file: &Arc<File>,
    path: &Path,
    start: u64,
    length: u64,
) -> Result<u64> {
    let wanted = u32::try_from(length).unwrap_or(u32::MAX);
    let data = client
        .read(start, wanted)
        .await
        .map_err(|error| Failure::unreachable(format!("reading the export: {error}")))?;
    if is_zero(&data) {
        return Ok(0);
    }
    let file = file.clone();
    let written = tokio::task::spawn_blocking(move || file.write_all_at(&data, start))
        .await
        .map_err(|error| Failure::internal(format!("a task ended: {error}")))?;
    written.map_err(|error| failed(path, &error))?;
    Ok(length)
}

/// Shows how far the copy is, a few times a second, on a terminal.
pub(super) struct Meter {
    total: u64,
    began: Instant,
    shown: Option<Instant>,
    terminal: bool,
}

impl Meter {
    pub(super) fn new(total: u64) -> Self {
        let terminal = std::io::stderr().is_terminal();
        Self { total, began: Instant::now(), shown: None, terminal }
    }

    pub(super) fn at(&mut self, done: u64) {
        let due = self.shown.is_none_or(|shown| shown.elapsed().as_millis() >= 250);
        if !self.terminal || !due {
            return;
        }
        self.shown = Some(Instant::now());
        let rate = (done as f64 / self.began.elapsed().as_secs_f64().max(0.001)) as u64;
        let bar = render::bar(done, self.total, 30);
        let words = render::progress(done, self.total, rate);
        let _ = write!(std::io::stderr(), "\r\x1b[K{bar} {words}");
    }

    pub(super) fn done(&self) {
        if self.shown.is_some() {
            say_error("\r\x1b[K");
        }
    }
}
