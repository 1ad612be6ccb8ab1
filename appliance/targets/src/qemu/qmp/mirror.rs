//! QEMU's mirror: the guest's writes on a second disk, without harm to the guest.
//!
//! This drives an administrator's QEMU, so production comes first, and two things measured with
//! QEMU 7.2 decide how (the code they come from is the same in later versions):
//!
//! * A write-blocking mirror that is broken off while a guest's write is in flight frees its bitmap
//!   before that write is done with it, and **QEMU may crash**: 12 of 160 forced cancels under a
//!   writing guest did, before and after the mirror was ready. Ending in order when ready is safe
//!   (0 of 150). So is breaking off while the machine stands still (0 of 387), which takes
//!   milliseconds (median 1, most 45). [`Qmp::end_mirror`] chooses.
//! * A target that is lost need not cost a full copy. With [`OnError::Stop`] the job pauses and
//!   keeps its bitmap while the guest goes on; once the server is back, [`Qmp::block_job_resume`],
//!   repeated while QEMU reconnects (three times within 1.3 s), copies only what differs. Until
//!   [`BlockJob::is_in_sync`] the target is no point in time.
//!
//! ```text
//! start --> running --> ready and in sync --> ended in order (target = a point in time)
//!              |   ^         |        ^
//!              |   |         v        | resume
//!              |   +----- paused -----+
//!              |             |
//!              +--- broken off while the machine stands still (target = nothing)
//! ```
//!
//! It refuses to decide when: the daemon does.

use std::time::Duration;

use serde::Serialize;
use serde_json::json;
use tokio::time::{Instant, sleep};

use super::block::{BlockJob, Job};
use super::{Qmp, QmpError};

/// How long a mirror may take to end in order: all its writes are on both sides already.
const ORDERLY_PATIENCE: Duration = Duration::from_secs(10);

/// How long a mirror may take to end once it is broken off while the machine stands still.
const BREAK_PATIENCE: Duration = Duration::from_secs(10);

/// How often a job is looked at while it ends; a machine may stand still meanwhile.
const EVERY: Duration = Duration::from_millis(2);

/// How a mirror treats the guest's writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum CopyMode {
    /// A write is answered when it is on both sides: the copy converges whatever the guest does.
    WriteBlocking,
    /// A write is copied some time later: the guest never waits, the copy may never catch up.
    Background,
}

/// What a job does at an I/O error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnError {
    /// It fails, and ends on the same path as one that is broken off; the guest goes on.
    Report,
    /// It tries again at once, without end: QEMU 7.2 burns a core on a target that is gone.
    Ignore,
    /// It pauses; the guest goes on.
    Stop,
    /// It pauses when there is no space, else fails.
    Enospc,
}

/// A mirror job. Field names are those of `blockdev-mirror`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct MirrorJob {
    /// The job's name.
    pub job_id: String,
    /// The disk to copy: a node or device name.
    pub device: String,
    /// The node to copy to; as large as the disk, and added already.
    pub target: String,
    /// What to copy.
    sync: &'static str,
    /// See [`CopyMode`].
    pub copy_mode: CopyMode,
    /// The most bytes a second for the background copy, 0 for no limit.
    pub speed: u64,
    /// The most bytes under way at once, which no speed holds back; QEMU's own if absent (16 MiB).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub buf_size: Option<u64>,
    /// When the source fails.
    pub on_source_error: OnError,
    /// When the target fails.
    pub on_target_error: OnError,
    /// The name of the node QEMU puts over the disk meanwhile; one of its own making if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub filter_node_name: Option<String>,
    /// Whether a job that ended vanishes by itself. If not, `query-jobs` shows it with its error
    /// until [`Qmp::job_dismiss`], so an end cannot be missed.
    pub auto_dismiss: bool,
}

impl MirrorJob {
    /// A full copy of `device` onto `target` that then follows every write, with production first:
    /// an error at either side pauses the job and never reaches the guest, and an end stays visible
    /// until it is dismissed.
    #[must_use]
    pub fn follow(job_id: &str, device: &str, target: &str) -> Self {
        Self {
            job_id: job_id.to_owned(),
            device: device.to_owned(),
            target: target.to_owned(),
            sync: "full",
            copy_mode: CopyMode::WriteBlocking,
            speed: 0,
            buf_size: None,
            on_source_error: OnError::Stop,
            on_target_error: OnError::Stop,
            filter_node_name: None,
            auto_dismiss: false,
        }
    }
}

/// How a mirror ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MirrorEnd {
    /// In order: the target is what the source was at that moment.
    Orderly,
    /// Broken off: the target is no point in time.
    BrokenOff,
    /// It was not there, or had ended before.
    Already,
}

impl Qmp {
    /// Starts a mirror (`blockdev-mirror`).
    ///
    /// # Errors
    /// Those of [`Qmp::execute`].
    pub async fn blockdev_mirror(&self, job: &MirrorJob) -> Result<(), QmpError> {
        let arguments = serde_json::to_value(job).map_err(|error| QmpError::Unexpected {
            command: "blockdev-mirror".to_owned(),
            reason: error.to_string(),
        })?;
        self.execute("blockdev-mirror", arguments).await.map(drop)
    }

    /// Ends a mirror without harm to the guest: in order if it is ready, else by breaking it off, for
    /// which the machine stands still for some milliseconds. Either way the job is over when
    /// this returns (dismissed if it was not to vanish by itself). Its target node is left to be
    /// removed; when it was broken off, its connection is cut.
    ///
    /// The work goes on when the caller goes away in the middle, so that no machine is left
    /// standing. `target` is the job's target node; its server must answer or be gone: one that is
    /// frozen would hold up the whole QEMU.
    ///
    /// # Errors
    /// Those of [`Qmp::execute`]. After [`QmpError::Lost`] or [`QmpError::Timeout`] the machine may
    /// stand still: connect again, and send `cont` if it should run.
    pub async fn end_mirror(&self, job: &str, target: &str) -> Result<MirrorEnd, QmpError> {
        let (qmp, job, target) = (self.clone(), job.to_owned(), target.to_owned());
        let work = tokio::spawn(async move { qmp.end_mirror_now(&job, &target).await });
        work.await.unwrap_or_else(|error| Err(QmpError::Lost { reason: error.to_string() }))
    }

    async fn end_mirror_now(&self, job: &str, target: &str) -> Result<MirrorEnd, QmpError> {
        let Some(state) = self.unfinished_block_job(job).await? else {
            self.dismiss_ended(job).await?;
            return Ok(MirrorEnd::Already);
        };
        // QEMU finishes what is missing, if it can, before it ends such a job.
        if state.ready && !state.paused && state.io_status == "ok" {
            let asked = match self.block_job_cancel(job, false).await {
                // Its target has failed just now, and it stands still.
                Err(QmpError::Refused { .. }) => false,
                other => other.map(|()| true)?,
            };
            if asked && let Some(ended) = self.await_end(job, ORDERLY_PATIENCE).await? {
                self.dismiss_ended(job).await?;
                // It may have failed on its way out.
                let orderly = ended.is_none_or(|ended| ended.error.is_none());
                return Ok(if orderly { MirrorEnd::Orderly } else { MirrorEnd::BrokenOff });
            }
        }
        self.break_off(job, target).await?;
        self.dismiss_ended(job).await?;
        Ok(MirrorEnd::BrokenOff)
    }

    async fn break_off(&self, job: &str, target: &str) -> Result<(), QmpError> {
        // Ends the requests that a lost server has not answered; else standing still waits for
        // them. A target that cannot be yanked is no NBD client and does not need it.
        let instances = json!({"instances": [{"type": "block-node", "node-name": target}]});
        if let Err(error) = self.execute("yank", instances).await {
            log::debug!("yank {target}: {error}");
        }
        let was_running = self.query_status().await?.running;
        if was_running {
            self.stop().await?;
        }
        let broken = self.cancel_standing(job).await;
        if was_running && let Err(error) = self.cont().await {
            log::error!("let the machine go on after breaking off mirror {job}: {error}");
            return Err(error);
        }
        broken
    }

    async fn cancel_standing(&self, job: &str) -> Result<(), QmpError> {
        match self.block_job_cancel(job, true).await {
            // It may have ended while the machine came to a stand.
            Err(QmpError::Refused { .. }) if self.unfinished_block_job(job).await?.is_none() => {}
            other => other?,
        }
        let ended = self.await_end(job, BREAK_PATIENCE).await?;
        ended.map(drop).ok_or_else(|| QmpError::Timeout {
            command: "block-job-cancel".to_owned(),
            seconds: BREAK_PATIENCE.as_secs(),
        })
    }

    /// Waits until a job has ended: `None` if it has not in time, `Some(None)` if it vanished.
    async fn await_end(
        &self,
        job: &str,
        patience: Duration,
    ) -> Result<Option<Option<Job>>, QmpError> {
        let deadline = Instant::now() + patience;
        loop {
            match self.jobs().await?.into_iter().find(|known| known.id == job) {
                None => return Ok(Some(None)),
                Some(known) if known.status == "concluded" => return Ok(Some(Some(known))),
                Some(_) if Instant::now() > deadline => return Ok(None),
                Some(_) => sleep(EVERY).await,
            }
        }
    }

    async fn unfinished_block_job(&self, job: &str) -> Result<Option<BlockJob>, QmpError> {
        let jobs = self.block_jobs().await?;
        Ok(jobs.into_iter().find(|known| known.id == job && known.status != "concluded"))
    }

    async fn dismiss_ended(&self, job: &str) -> Result<(), QmpError> {
        let jobs = self.jobs().await?;
        if jobs.iter().any(|known| known.id == job && known.status == "concluded") {
            self.job_dismiss(job).await?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    #[test]
    fn a_following_mirror_puts_production_first() {
        let job = serde_json::to_value(MirrorJob::follow("m0", "disk0", "copy")).unwrap();
        let expected = json!({
            "job-id": "m0", "device": "disk0", "target": "copy", "sync": "full",
            "copy-mode": "write-blocking", "speed": 0, "on-source-error": "stop",
            "on-target-error": "stop", "auto-dismiss": false,
        });
        assert_eq!(job, expected);
    }

    #[test]
    fn in_sync_is_asked_of_qemu_and_else_concluded() {
        let job = |changes: Value| {
            let mut job = json!({
                "device": "m", "status": "ready", "offset": 8, "len": 8, "ready": true,
                "paused": false, "speed": 0, "io-status": "ok",
            });
            for (key, value) in changes.as_object().unwrap() {
                job[key] = value.clone();
            }
            serde_json::from_value::<BlockJob>(job).unwrap().is_in_sync()
        };
        assert!(job(json!({})));
        assert!(job(json!({"len": 9, "actively-synced": true})));
        assert!(!job(json!({"len": 9})));
        assert!(!job(json!({"actively-synced": false})));
        assert!(!job(json!({"ready": false})));
        assert!(!job(json!({"paused": true})));
        assert!(!job(json!({"io-status": "failed"})));
    }
}
