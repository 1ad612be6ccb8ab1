//! The QEMU of a pulled disk: a moment is frozen for each pass, and everything of it is cleared away
//! behind it, or before the next one.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Duration;

use srn_nbd::client::{Address, Uri};
use srn_targets::qemu::qmp::fleece::{BitmapState, FleeceNames, Moment};
use srn_targets::qemu::qmp::{Qmp, QmpError};

use super::Ended;
use crate::fleet::PulledQemu;

/// Patience with a monitor.
const PATIENCE: Duration = Duration::from_secs(5);

/// How often a moment that is being read is looked at.
const LOOK: Duration = Duration::from_millis(500);

/// A pass is given up when less than this part of the scratch's file system is left: QEMU fails the
/// server's own writes when it cannot save there what they overwrite.
const SCRATCH_LEFT: u64 = 20;

/// A moment that is being read.
#[derive(Debug)]
pub(super) struct Frozen {
    monitor: Qmp,
    names: FleeceNames,
    node: String,
    token: String,
    /// Whether its bitmap tells what changed since the last pass.
    told: String,
    scratch: File,
    directory: PathBuf,
    started_nbd: bool,
    uri: Uri,
}

impl From<QmpError> for Ended {
    fn from(error: QmpError) -> Self {
        Self::Failed(error.to_string())
    }
}

/// A monitor, with what may be left of earlier passes cleared away. Gives also the disk's node, and
/// whether what changed since `keep` is known.
pub(super) async fn tidy(
    qemu: &PulledQemu,
    names: &FleeceNames,
    keep: Option<&str>,
    stop_nbd: bool,
) -> Result<(Qmp, String, u64, BitmapState), Ended> {
    let monitor = Qmp::connect(&qemu.qmp, PATIENCE).await?;
    // Before the disk is looked for: a job of ours would be found in its place.
    monitor.end_fleece(names, stop_nbd).await?;
    let found = monitor.find_disk(&qemu.node).await?;
    let found = found.ok_or_else(|| {
        Ended::Failed(format!("the server's QEMU has no disk {} any more", qemu.node))
    })?;
    let state = monitor.settle_bitmaps(names, &found.node_name, keep).await?;
    Ok((monitor, found.node_name, found.size_bytes, state))
}

impl Frozen {
    /// Freezes a moment and exports it.
    pub(super) async fn open(
        monitor: Qmp,
        names: FleeceNames,
        moment: &Moment<'_>,
        size: u64,
        qemu: &PulledQemu,
        uri: &Uri,
    ) -> Result<Self, Ended> {
        let directory = qemu.scratch.clone();
        let path = directory.join(format!("{}.scratch", names.bitmap(moment.token)));
        if has_little_room(&File::open(&directory).map_err(|error| scratch_error(&path, &error))?) {
            return Err(Ended::Failed(too_little_room(&directory)));
        }
        let added = monitor.add_scratch(&names, moment.node, size, &path).await;
        // QEMU has it open; without a name it goes with QEMU, whatever happens to us.
        let scratch = File::open(&path);
        if let Err(error) = std::fs::remove_file(&path) {
            log::debug!("removing the name {}: {error}", path.display());
        }
        added?;
        let scratch = scratch.map_err(|error| scratch_error(&path, &error))?;
        monitor.freeze(&names, moment).await?;
        let socket = match &uri.address {
            Address::Unix(path) => Some(path.as_path()),
            Address::Tcp { .. } => None,
        };
        let started_nbd = monitor.export_moment(&names, moment, socket).await?;
        let uri = Uri { export: names.export(moment.token), ..uri.clone() };
        Ok(Self {
            told: names.told(moment),
            node: moment.node.to_owned(),
            token: moment.token.to_owned(),
            monitor,
            names,
            scratch,
            directory,
            started_nbd,
            uri,
        })
    }

    /// Where it is read.
    pub(super) const fn uri(&self) -> &Uri {
        &self.uri
    }

    /// The bitmap that its export tells of.
    pub(super) fn told(&self) -> &str {
        &self.told
    }

    /// Its token.
    pub(super) fn token(&self) -> &str {
        &self.token
    }

    /// Whether an NBD server was started for it.
    pub(super) const fn started_nbd(&self) -> bool {
        self.started_nbd
    }

    /// Whether what was read until now was frozen.
    pub(super) async fn check(&self) -> Result<(), Ended> {
        if self.monitor.is_frozen(&self.names, &self.token).await? {
            return Ok(());
        }
        Err(Ended::Failed("the server's QEMU no longer keeps what the pass reads as it was".into()))
    }

    /// Returns why it cannot be read any longer, when that is so.
    pub(super) async fn fails(&self) -> Ended {
        loop {
            tokio::time::sleep(LOOK).await;
            if has_little_room(&self.scratch) {
                return Ended::Failed(too_little_room(&self.directory));
            }
            if let Err(ended) = self.check().await {
                return ended;
            }
        }
    }

    /// It is over: the server goes on as if it had not been, but for the bitmap of the moment `keep`.
    pub(super) async fn close(self, keep: Option<&str>) -> Result<(), Ended> {
        self.monitor.end_fleece(&self.names, self.started_nbd).await?;
        self.monitor.settle_bitmaps(&self.names, &self.node, keep).await?;
        Ok(())
    }
}

fn has_little_room(file: &File) -> bool {
    match rustix::fs::fstatvfs(file) {
        Ok(found) => found.f_bavail < found.f_blocks / SCRATCH_LEFT,
        Err(_) => false,
    }
}

fn too_little_room(directory: &Path) -> String {
    format!(
        "less than 5 % is left of the file system of {}, where the server's QEMU puts what is \
         overwritten during a pass; make room there",
        directory.display()
    )
}

fn scratch_error(path: &Path, error: &std::io::Error) -> Ended {
    Ended::Failed(format!(
        "{}: {error}; the scratch directory must be the same for this node and for the server's QEMU",
        path.display()
    ))
}
