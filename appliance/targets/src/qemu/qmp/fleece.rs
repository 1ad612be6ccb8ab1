//! A frozen copy of a running disk to read over NBD, and what changed since the one before: QEMU's
//! incremental backup ("fleecing").
//!
//! A job copies what the guest is about to overwrite into a *scratch* file first; scratch over disk
//! reads as the disk was when the job began. Dirty bitmaps say where two such moments differ. A moment
//! has a *token*, and the bitmap of that token marks everything written since.
//!
//! Invariant: *a bitmap that [`Qmp::settle_bitmaps`] finds usable marks at least all that was written
//! since the moment of its token.* A new moment's bitmap is added before its job begins, and the old
//! moment's is stopped (only then can it be read) after that, so either marks rather too much. When
//! nothing comes of the new moment, the old bitmap records again and takes in the new one, in one
//! transaction. Names carry the token: a bitmap of somebody else, or of another disk, is never taken for
//! ours, and one that QEMU has forgotten is not there.
//!
//! What QEMU 7.2 cannot do: let the guest's write go on when the *scratch* cannot be written. Whoever
//! opens a moment watches the room for it, and closes the moment before that is gone.
//!
//! It refuses to decide when, where the scratch is, and which moment counts: the daemon does.
//!
//! Sources: QEMU's `docs/interop/bitmaps.rst` and `live-block-operations.rst`, and version 7.2's
//! behaviour.

use std::path::Path;
use std::time::Duration;

use serde::Deserialize;
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};

use super::block::path_text;
use super::{Qmp, QmpError};

/// How long a step that QEMU does in the background may take.
const PATIENCE: Duration = Duration::from_secs(20);

/// How often it is looked at.
const EVERY: Duration = Duration::from_millis(5);

/// Bytes that one bit of a bitmap stands for.
const GRANULARITY: u32 = 64 << 10;

/// What our things in a QEMU are called: all begin with the same words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FleeceNames {
    prefix: String,
}

/// A moment of a disk that is to be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Moment<'a> {
    /// The disk's node.
    pub node: &'a str,
    /// The new moment's token: letters and digits, never used before.
    pub token: &'a str,
    /// The token of an earlier one whose bitmap is usable; what changed since is told.
    pub since: Option<&'a str>,
}

/// Whether a bitmap can be trusted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BitmapState {
    /// It has recorded everything since its moment, and goes on.
    Usable,
    /// There is none of that name.
    Gone,
    /// It has not recorded everything.
    Inconsistent,
}

/// A dirty bitmap of a node.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Bitmap {
    /// Its name; those of jobs have none.
    #[serde(default)]
    pub name: String,
    /// Whether writes are marked in it.
    pub recording: bool,
    /// Whether it was not closed in order, and marks nothing that can be relied on.
    #[serde(default)]
    pub inconsistent: bool,
}

impl FleeceNames {
    /// Names for a disk of ours. `disk` is short: names of nodes have at most 31 characters.
    #[must_use]
    pub fn new(disk: &str) -> Self {
        Self { prefix: format!("srn-{disk}") }
    }

    /// The bitmap that marks what was written since a moment.
    #[must_use]
    pub fn bitmap(&self, token: &str) -> String {
        format!("{}-{token}", self.prefix)
    }

    /// The export in which a moment is read; its id too.
    #[must_use]
    pub fn export(&self, token: &str) -> String {
        self.bitmap(token)
    }

    /// The bitmap that an export tells of: what changed since an earlier moment, or one without any
    /// meaning, by which the export is still known to be of this QEMU.
    #[must_use]
    pub fn told(&self, moment: &Moment<'_>) -> String {
        match moment.since {
            Some(since) => self.bitmap(since),
            None => format!("{}-{}-none", self.prefix, moment.token),
        }
    }

    fn job(&self, token: &str) -> String {
        self.bitmap(token)
    }

    fn scratch(&self) -> String {
        format!("{}-scratch", self.prefix)
    }

    fn file(&self) -> String {
        format!("{}-file", self.prefix)
    }

    fn are_of(&self, name: &str) -> bool {
        name.strip_prefix(&self.prefix).is_some_and(|rest| rest.starts_with('-'))
    }
}

impl Qmp {
    /// The dirty bitmaps of a node that have a name (`query-named-block-nodes`); none when there is no
    /// such node.
    ///
    /// # Errors
    /// Those of [`Qmp::execute`].
    pub async fn bitmaps(&self, node: &str) -> Result<Vec<Bitmap>, QmpError> {
        let nodes: Vec<Node> = self.ask("query-named-block-nodes", json!({"flat": true})).await?;
        let found = nodes.into_iter().find(|known| known.node_name == node);
        let all = found.map(|node| node.bitmaps).unwrap_or_default();
        Ok(all.into_iter().filter(|bitmap| !bitmap.name.is_empty()).collect())
    }

    /// Makes an empty scratch file at `path`, which must not be there, and a node over it that shows
    /// `node` where nothing was written. Once this has returned the file needs no name any more.
    ///
    /// # Errors
    /// Those of [`Qmp::execute`]; [`QmpError::Refused`] with QEMU's words when the file cannot be made.
    pub async fn add_scratch(
        &self,
        names: &FleeceNames,
        node: &str,
        size_bytes: u64,
        path: &Path,
    ) -> Result<(), QmpError> {
        let (scratch, file, path) = (names.scratch(), names.file(), path_text(path)?);
        let made = json!({"driver": "file", "filename": path, "size": 0});
        self.create(names, made).await?;
        let arguments = json!({"driver": "file", "node-name": file, "filename": path});
        self.execute("blockdev-add", arguments).await?;
        self.create(names, json!({"driver": "qcow2", "file": file, "size": size_bytes})).await?;
        let over = json!({"driver": "qcow2", "node-name": scratch, "file": file, "backing": node});
        self.execute("blockdev-add", over).await.map(drop)
    }

    /// Freezes a moment: from now on the scratch node reads as the disk did at one time between this
    /// call and its return. Nothing of this name may be there, a scratch must
    /// ([`Qmp::add_scratch`]).
    ///
    /// # Errors
    /// Those of [`Qmp::execute`]; whatever was done is undone by [`Qmp::end_fleece`] and
    /// [`Qmp::settle_bitmaps`].
    pub async fn freeze(&self, names: &FleeceNames, moment: &Moment<'_>) -> Result<(), QmpError> {
        let Moment { node, token, since } = moment;
        let add = |name: String, disabled: bool| json!({"node": node, "name": name, "granularity": GRANULARITY, "disabled": disabled});
        // Before the moment.
        self.execute("block-dirty-bitmap-add", add(names.bitmap(token), false)).await?;
        let job = json!({
            "job-id": names.job(token), "device": node, "target": names.scratch(), "sync": "none",
            "auto-dismiss": true,
        });
        self.execute("blockdev-backup", job).await?;
        // Behind it.
        match since {
            Some(since) => {
                let old = json!({"node": node, "name": names.bitmap(since)});
                self.execute("block-dirty-bitmap-disable", old).await.map(drop)
            }
            None => {
                let proof = add(names.told(moment), true);
                self.execute("block-dirty-bitmap-add", proof).await.map(drop)
            }
        }
    }

    /// Exports a moment read-only over NBD, with the bitmap [`FleeceNames::told`]. Where no NBD server
    /// runs in that QEMU one is started on `socket`, if that is given. Returns whether it was.
    ///
    /// # Errors
    /// Those of [`Qmp::execute`].
    pub async fn export_moment(
        &self,
        names: &FleeceNames,
        moment: &Moment<'_>,
        socket: Option<&Path>,
    ) -> Result<bool, QmpError> {
        let started = match socket {
            Some(socket) => self.start_nbd(socket).await?,
            None => false,
        };
        let name = names.export(moment.token);
        let export = json!({
            "type": "nbd", "id": name, "node-name": names.scratch(), "name": name,
            "writable": false, "bitmaps": [{"node": moment.node, "name": names.told(moment)}],
        });
        self.execute("block-export-add", export).await.map(|_| started)
    }

    /// Whether a moment is still frozen: it was, without a gap, if it is now, as its job is never
    /// begun twice.
    ///
    /// # Errors
    /// Those of [`Qmp::execute`].
    pub async fn is_frozen(&self, names: &FleeceNames, token: &str) -> Result<bool, QmpError> {
        let job = names.job(token);
        let jobs = self.block_jobs().await?;
        let runs = |status: &str| matches!(status, "running" | "paused" | "ready" | "standby");
        Ok(jobs.into_iter().any(|known| known.id == job && runs(&known.status)))
    }

    /// Ends whatever is there of moments of this disk: exports, jobs, scratch. Bitmaps stay. Where
    /// `stop_nbd` is set the NBD server is stopped too, unless it has other exports.
    ///
    /// # Errors
    /// Those of [`Qmp::execute`]; [`QmpError::Timeout`] when QEMU does not let go of something.
    pub async fn end_fleece(&self, names: &FleeceNames, stop_nbd: bool) -> Result<(), QmpError> {
        let deadline = Instant::now() + PATIENCE;
        for export in self.exports().await?.into_iter().filter(|id| names.are_of(id)) {
            let gone = self.execute("block-export-del", json!({"id": export, "mode": "hard"}));
            forgive(gone.await)?;
        }
        while self.exports().await?.iter().any(|id| names.are_of(id)) {
            wait("block-export-del", deadline).await?;
        }
        for job in self.block_jobs().await?.into_iter().filter(|job| names.are_of(&job.id)) {
            forgive(self.block_job_cancel(&job.id, true).await)?;
        }
        loop {
            let jobs = self.jobs().await?;
            let ours: Vec<_> = jobs.into_iter().filter(|job| names.are_of(&job.id)).collect();
            for job in ours.iter().filter(|job| job.status == "concluded") {
                forgive(self.job_dismiss(&job.id).await)?;
            }
            if ours.is_empty() {
                break;
            }
            wait("block-job-cancel", deadline).await?;
        }
        for node in [names.scratch(), names.file()] {
            while self.block_nodes().await?.iter().any(|known| known.node_name == node) {
                // Perhaps still in use for a moment.
                if forgive(self.blockdev_del(&node).await)? {
                    break;
                }
                wait("blockdev-del", deadline).await?;
            }
        }
        if stop_nbd && self.exports().await?.is_empty() {
            forgive(self.execute("nbd-server-stop", Value::Null).await)?;
        }
        Ok(())
    }

    /// Leaves of our bitmaps the one of the moment `keep`, recording, if it can be trusted; all others
    /// go. No moment of this disk may be open ([`Qmp::end_fleece`]).
    ///
    /// # Errors
    /// Those of [`Qmp::execute`]; then nothing is known of any bitmap.
    pub async fn settle_bitmaps(
        &self,
        names: &FleeceNames,
        node: &str,
        keep: Option<&str>,
    ) -> Result<BitmapState, QmpError> {
        let all = self.bitmaps(node).await?;
        let keep = keep.map(|token| names.bitmap(token));
        let is_kept = |bitmap: &Bitmap| keep.as_ref() == Some(&bitmap.name);
        let kept = all.iter().find(|bitmap| is_kept(bitmap));
        let others: Vec<&Bitmap> =
            all.iter().filter(|other| names.are_of(&other.name) && !is_kept(other)).collect();
        let state = self.judge(node, kept, &others).await?;
        // The rest, and what was merged is not there any more.
        for bitmap in self.bitmaps(node).await? {
            let stays = state == BitmapState::Usable && is_kept(&bitmap);
            if names.are_of(&bitmap.name) && !stays {
                let gone = json!({"node": node, "name": bitmap.name});
                self.execute("block-dirty-bitmap-remove", gone).await?;
            }
        }
        Ok(state)
    }

    /// Whether the kept bitmap can be trusted; it records again when it can.
    async fn judge(
        &self,
        node: &str,
        kept: Option<&Bitmap>,
        others: &[&Bitmap],
    ) -> Result<BitmapState, QmpError> {
        let Some(kept) = kept else { return Ok(BitmapState::Gone) };
        if kept.inconsistent || others.iter().any(|other| other.recording && other.inconsistent) {
            return Ok(BitmapState::Inconsistent);
        }
        if kept.recording {
            return Ok(BitmapState::Usable);
        }
        // It was stopped for a moment of which nothing came, and that moment's bitmap has recorded
        // from before that.
        let newer: Vec<&str> = others
            .iter()
            .filter(|other| other.recording)
            .map(|other| other.name.as_str())
            .collect();
        if newer.is_empty() {
            return Ok(BitmapState::Inconsistent);
        }
        // All of it or nothing: one that records again and lacks what was written meanwhile would be
        // taken for whole.
        let action = |kind: &str, data: Value| json!({"type": kind, "data": data});
        let this = json!({"node": node, "name": kept.name});
        let merge = json!({"node": node, "target": kept.name, "bitmaps": newer});
        let mut actions = vec![
            action("block-dirty-bitmap-enable", this),
            action("block-dirty-bitmap-merge", merge),
        ];
        actions.extend(
            newer.iter().map(|name| {
                action("block-dirty-bitmap-remove", json!({"node": node, "name": name}))
            }),
        );
        self.execute("transaction", json!({"actions": actions})).await?;
        Ok(BitmapState::Usable)
    }

    async fn start_nbd(&self, socket: &Path) -> Result<bool, QmpError> {
        let address = json!({"type": "unix", "data": {"path": path_text(socket)?}});
        match self.execute("nbd-server-start", json!({"addr": address})).await {
            Ok(_) => Ok(true),
            // There is one: of the administrator, or of an earlier moment.
            Err(QmpError::Refused { description, .. }) if description.contains("already") => {
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }

    /// The ids of all block exports.
    async fn exports(&self) -> Result<Vec<String>, QmpError> {
        let exports: Vec<Export> = self.ask("query-block-exports", Value::Null).await?;
        Ok(exports.into_iter().map(|export| export.id).collect())
    }

    /// Runs `blockdev-create` to its end.
    async fn create(&self, names: &FleeceNames, options: Value) -> Result<(), QmpError> {
        let job = format!("{}-create", names.prefix);
        let command = "blockdev-create";
        self.execute(command, json!({"job-id": job, "options": options})).await?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            let jobs = self.jobs().await?;
            match jobs.into_iter().find(|known| known.id == job) {
                Some(ended) if ended.status == "concluded" => {
                    self.job_dismiss(&job).await?;
                    let Some(description) = ended.error else { return Ok(()) };
                    let (command, class) = (command.to_owned(), "GenericError".to_owned());
                    return Err(QmpError::Refused { command, class, description });
                }
                Some(_) if Instant::now() < deadline => sleep(EVERY).await,
                Some(_) => return Err(late(command)),
                None => {
                    let reason = "its job has vanished".to_owned();
                    return Err(QmpError::Unexpected { command: command.to_owned(), reason });
                }
            }
        }
    }
}

/// Waits for the next look, if there shall be one.
async fn wait(command: &str, deadline: Instant) -> Result<(), QmpError> {
    if Instant::now() > deadline {
        return Err(late(command));
    }
    sleep(EVERY).await;
    Ok(())
}

fn late(command: &str) -> QmpError {
    QmpError::Timeout { command: command.to_owned(), seconds: PATIENCE.as_secs() }
}

/// A refusal means that it is gone, or goes: that is looked at afterwards. Whether there was none.
fn forgive(done: Result<impl Sized, QmpError>) -> Result<bool, QmpError> {
    match done {
        Ok(_) => Ok(true),
        Err(QmpError::Refused { .. }) => Ok(false),
        Err(error) => Err(error),
    }
}

#[derive(Deserialize)]
struct Export {
    id: String,
}

#[derive(Deserialize)]
struct Node {
    #[serde(rename = "node-name", default)]
    node_name: String,
    #[serde(rename = "dirty-bitmaps", default)]
    bitmaps: Vec<Bitmap>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_told_apart() {
        let names = FleeceNames::new("1a2b3c4d");
        assert!(names.are_of(&names.bitmap("t")) && names.are_of(&names.scratch()));
        assert!(names.scratch().len() <= 31 && names.file().len() <= 31);
        for other in ["srn-1a2b3c4d", "srn-1a2b3c4de-t", "srn-1a2b", "bitmap0", ""] {
            assert!(!names.are_of(other), "{other}");
        }
        let moment = |since| Moment { node: "n", token: "new", since };
        assert_eq!(names.told(&moment(Some("old"))), names.bitmap("old"));
        assert_ne!(names.told(&moment(None)), names.bitmap("new"));
    }

    #[test]
    fn bitmaps_are_read_as_qemu_tells_them() {
        let node: Node = serde_json::from_str(
            r#"{"node-name": "drive0", "drv": "raw", "dirty-bitmaps": [
                {"recording": false, "persistent": false, "busy": false, "granularity": 65536,
                 "count": 0},
                {"name": "b", "recording": true, "persistent": true, "inconsistent": true,
                 "busy": false, "granularity": 65536, "count": 65536}]}"#,
        )
        .unwrap();
        let [unnamed, named] = &*node.bitmaps else { panic!("{}", node.bitmaps.len()) };
        assert!(unnamed.name.is_empty() && !unnamed.recording && !unnamed.inconsistent);
        assert!(named.name == "b" && named.recording && named.inconsistent);
    }
}
