//! A machine from its start to its end.
//!
//! A [`Machine`] is a QEMU process with a run directory, made to outlive the daemon: it is a
//! process group of its own, holds none of our descriptors, and everything needed to find it again
//! is in the directory. After a restart the daemon calls [`Machine::adopt`] on each run directory
//! and has its machines back. (The daemon's systemd unit must say `KillMode=process`, or systemd
//! ends the machines with it.)
//!
//! ```text
//! run directory   machine.json       what was started: spec, process, how it ended ([`record`])
//!                 qmp.sock           QEMU's control socket
//!                 serial.log         what the guest wrote on its first serial port
//!                 qemu.log           what QEMU itself said
//!                 uefi-variables.fd  UEFI only: this machine's variables
//!                 smbios-N           strings for the guest
//!
//!                    +-> running <-> paused --+
//! start / adopt -----+                        +--> exited(code) | gone --> removed
//!                    +-> silent --------------+
//! ```
//!
//! `gone` is an end nobody saw: it was not our child any more, or the host was rebooted. It
//! refuses to restart anything by itself, and to know who serves the disks.

mod folder;
mod record;

use std::ffi::OsString;
use std::fs::{self, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use rustix::fs::{FallocateFlags, fallocate};
use serde_json::Value;
use tokio::time::{Instant, timeout};

pub(super) use self::folder::last_words;
use self::folder::{find_unrecorded, forget, make_folder, prepare, spawn};
pub use self::record::{Ended, Record};
use super::firmware::Firmware;
use super::host::{Host, Missing, Ovmf};
use super::machine::{MachineSpec, QMP_SOCKET, SERIAL_LOG, SpecError};
use super::process::{Exit, Process};
use super::qmp::{Qmp, QmpError};

/// What QEMU itself says, in the run directory.
pub const QEMU_LOG: &str = "qemu.log";

/// How long QEMU may take from its start to its monitor's greeting. It opens all disks meanwhile.
pub const START_DEADLINE: Duration = Duration::from_secs(60);

/// How long the monitor may take to greet, and to answer about the machine's state.
const MONITOR_PATIENCE: Duration = Duration::from_secs(5);
/// How often the power button is pressed: a guest that is still booting does not notice the first.
const PRESS_AGAIN: Duration = Duration::from_secs(10);
/// How long QEMU may take to write back and end after `quit`.
const QUIT_PATIENCE: Duration = Duration::from_secs(10);
/// How long the kernel may take to end a killed QEMU.
const KILL_PATIENCE: Duration = Duration::from_secs(10);
/// How often a monitor that is not there yet is tried.
const MONITOR_RETRY: Duration = Duration::from_millis(20);

/// A machine that was started, by this daemon or the one before.
#[derive(Debug)]
pub struct Machine {
    folder: PathBuf,
    /// None: it was gone before we came.
    process: Option<Process>,
    record: Mutex<Record>,
    monitor: tokio::sync::Mutex<Option<Qmp>>,
}

/// How a machine is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Status {
    /// It runs.
    Running,
    /// It stands still.
    Paused {
        /// QEMU's word for why: `paused`, `io-error`, `guest-panicked`, ...
        reason: String,
    },
    /// Its process lives but the monitor does not answer.
    Silent {
        /// What was tried and failed.
        reason: String,
    },
    /// It ended.
    Exited {
        /// How.
        exit: Exit,
        /// What QEMU said last, line by line.
        last_words: Vec<String>,
    },
    /// It ended and nobody saw how.
    Gone {
        /// What QEMU said last, line by line.
        last_words: Vec<String>,
    },
}

/// What it took to stop a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stopped {
    /// It had ended before.
    Already,
    /// The guest shut down when its power button was pressed.
    PoweredDown,
    /// QEMU was told to quit: for the guest a power cut, but what it had written is written.
    Quit,
    /// QEMU was killed.
    Killed,
}

/// What can go wrong with a machine.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The operator: the spec.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// The operator: QEMU or its firmware is not installed.
    #[error(transparent)]
    Missing(#[from] Missing),
    /// The operator: there is a machine in this directory already; adopt or remove it.
    #[error("run directory {} holds a machine already", .0.display())]
    Taken(PathBuf),
    /// The operator: no machine was ever started in this directory.
    #[error("run directory {} holds no machine", .0.display())]
    NoMachine(PathBuf),
    /// The operator: it has to be stopped first.
    #[error("machine in {} still runs as process {pid}", .folder.display())]
    StillRuns {
        /// Its run directory.
        folder: PathBuf,
        /// Its process.
        pid: i32,
    },
    /// QEMU ended instead of starting the machine.
    #[error("qemu ended at its start ({exit:?}): {}", .last_words.join(" / "))]
    DidNotStart {
        /// How it ended.
        exit: Exit,
        /// What it said.
        last_words: Vec<String>,
    },
    /// QEMU neither ended nor opened its monitor; it was killed.
    #[error("qemu did not open its monitor within {seconds} s: {}", .last_words.join(" / "))]
    StartTimeout {
        /// How long was waited.
        seconds: u64,
        /// What it said.
        last_words: Vec<String>,
    },
    /// The kernel does not end the process.
    #[error("process {pid} cannot be killed: it hangs in the kernel")]
    WontDie {
        /// The process.
        pid: i32,
    },
    /// The disk: a file of the run directory.
    #[error("{doing} {}: {source}", .path.display())]
    File {
        /// What was done.
        doing: &'static str,
        /// To which file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The disk: `machine.json` cannot be understood.
    #[error("{} cannot be understood: {reason}", .path.display())]
    Record {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// Us: the process could not be started, watched or killed.
    #[error("{doing} qemu: {source}")]
    Process {
        /// What was done.
        doing: &'static str,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

impl Machine {
    /// Starts a machine in a run directory, which is made if need be (its parent must exist), and
    /// returns once QEMU has opened the disks and its monitor answers.
    ///
    /// When it fails, nothing runs and nothing of it is left in the directory. When the caller
    /// goes away in the middle, what was started can be adopted.
    ///
    /// # Errors
    /// Any of [`RunError`] but `NoMachine` and `StillRuns`.
    pub async fn start(host: &Host, spec: &MachineSpec, folder: &Path) -> Result<Self, RunError> {
        let ovmf = match spec.firmware {
            Firmware::Bios => None,
            Firmware::Uefi => Some(host.ovmf()?),
        };
        let arguments = spec.arguments(ovmf.map(|ovmf| ovmf.code.as_path()))?;
        let folder = make_folder(folder)?;
        Record::new(spec.clone()).create(&folder)?;
        let started = Self::start_prepared(host, spec, ovmf, &arguments, &folder).await;
        if started.is_err() {
            forget(&folder);
        }
        started
    }

    async fn start_prepared(
        host: &Host,
        spec: &MachineSpec,
        ovmf: Option<&Ovmf>,
        arguments: &[OsString],
        folder: &Path,
    ) -> Result<Self, RunError> {
        prepare(spec, ovmf, folder)?;
        let process = spawn(&host.qemu, arguments, folder)?;
        let record = Record::new(spec.clone()).started_as(process.identity().clone());
        let kept = record.replace(folder);
        let machine = Self {
            folder: folder.to_owned(),
            process: Some(process),
            record: Mutex::new(record),
            monitor: tokio::sync::Mutex::new(None),
        };
        let answered = match kept {
            Ok(()) => machine.await_monitor().await,
            Err(error) => Err(error),
        };
        if answered.is_err() {
            machine.kill().await?;
        }
        answered.map(|()| machine)
    }

    /// Takes over the machine of a run directory, whether it still runs or not. To be called within
    /// a Tokio runtime.
    ///
    /// # Errors
    /// [`RunError::NoMachine`], [`RunError::Record`], [`RunError::File`], [`RunError::Process`].
    pub fn adopt(folder: &Path) -> Result<Self, RunError> {
        let folder = match folder.canonicalize() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(RunError::NoMachine(folder.to_owned()));
            }
            other => other.map_err(file_error("find", folder))?,
        };
        let mut record = Record::read(&folder)?;
        let watch = |source| RunError::Process { doing: "find", source };
        let process = match &record.process {
            _ if record.ended.is_some() => None,
            Some(identity) => Process::find(identity).map_err(watch)?,
            // The daemon died after it had started QEMU and before it could write down which.
            None => {
                let found = find_unrecorded(&folder).map_err(watch)?;
                if let Some(process) = &found {
                    record.process = Some(process.identity().clone());
                    record.replace(&folder)?;
                }
                found
            }
        };
        let (record, monitor) = (Mutex::new(record), tokio::sync::Mutex::new(None));
        Ok(Self { folder, process, record, monitor })
    }

    /// How it is now.
    ///
    /// # Errors
    /// [`RunError::Process`] when the process cannot be asked about.
    pub async fn status(&self) -> Result<Status, RunError> {
        if let Some(ended) = self.ended_now()? {
            return Ok(ended);
        }
        let asked = async { self.monitor().await?.query_status().await };
        let asked = timeout(MONITOR_PATIENCE, asked).await;
        // It may have ended while it was asked.
        if let Some(ended) = self.ended_now()? {
            return Ok(ended);
        }
        Ok(match asked {
            Ok(Ok(state)) if state.running => Status::Running,
            Ok(Ok(state)) => Status::Paused { reason: state.status },
            Ok(Err(error)) => Status::Silent { reason: error.to_string() },
            Err(_) => Status::Silent { reason: "the monitor does not answer".to_owned() },
        })
    }

    /// Waits until it has ended, and gives that status.
    ///
    /// # Errors
    /// [`RunError::Process`] when the process cannot be watched.
    pub async fn ended(&self) -> Result<Status, RunError> {
        if let Some(process) = &self.process {
            process
                .exit()
                .await
                .map_err(|source| RunError::Process { doing: "wait for", source })?;
        }
        let unseen = || Status::Gone { last_words: self.last_words() };
        Ok(self.ended_now()?.unwrap_or_else(unseen))
    }

    /// Stops it: presses the power button and waits for `graceful` at most, then tells QEMU to
    /// quit, then kills it. Returns when the process is gone. A `graceful` of zero begins with
    /// `quit`. Stopping a machine that has ended is no error.
    ///
    /// # Errors
    /// [`RunError::WontDie`], [`RunError::Process`].
    pub async fn stop(&self, graceful: Duration) -> Result<Stopped, RunError> {
        if self.ended_now()?.is_some() {
            return Ok(Stopped::Already);
        }
        if !graceful.is_zero() && self.power_down(graceful).await {
            self.ended().await?;
            return Ok(Stopped::PoweredDown);
        }
        if timeout(QUIT_PATIENCE, self.quit()).await.is_ok_and(|ended| ended) {
            return Ok(Stopped::Quit);
        }
        self.kill().await.map(|()| Stopped::Killed)
    }

    /// Lets a paused machine go on, for instance after the node has room again.
    ///
    /// # Errors
    /// Those of [`Qmp::execute`].
    pub async fn resume(&self) -> Result<(), QmpError> {
        self.monitor().await?.execute("cont", Value::Null).await.map(drop)
    }

    /// A connection to its monitor: the one connection all users of this value share.
    ///
    /// # Errors
    /// Those of [`Qmp::connect`].
    pub async fn monitor(&self) -> Result<Qmp, QmpError> {
        let mut held = self.monitor.lock().await;
        if let Some(qmp) = held.as_ref().filter(|qmp| !qmp.is_lost()) {
            return Ok(qmp.clone());
        }
        let qmp = Qmp::connect(&self.folder.join(QMP_SOCKET), MONITOR_PATIENCE).await?;
        *held = Some(qmp.clone());
        Ok(qmp)
    }

    /// Gives the space of all but the last `keep_bytes` of the serial log back. The file's length,
    /// and so every offset into it, stays. A guest can write without end: call this now and then.
    ///
    /// # Errors
    /// [`RunError::File`], also where the file system cannot make holes.
    pub fn trim_serial_log(&self, keep_bytes: u64) -> Result<(), RunError> {
        let path = self.serial_log();
        let trim = || {
            let log = OpenOptions::new().write(true).open(&path)?;
            let end = log.metadata()?.len().saturating_sub(keep_bytes);
            if end > 0 {
                let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                fallocate(&log, hole, 0, end)?;
            }
            Ok(())
        };
        trim().map_err(file_error("trim", &path))
    }

    /// Where the guest's first serial port is written to.
    #[must_use]
    pub fn serial_log(&self) -> PathBuf {
        self.folder.join(SERIAL_LOG)
    }

    /// Its run directory.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// What is written down about it.
    #[must_use]
    pub fn record(&self) -> Record {
        self.record.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The process id, for messages; None when it was gone before it was adopted.
    #[must_use]
    pub fn pid(&self) -> Option<i32> {
        self.process.as_ref().map(|process| process.identity().pid)
    }

    /// The status of a machine that has ended, None of one that lives. The end is written down the
    /// first time it is seen.
    fn ended_now(&self) -> Result<Option<Status>, RunError> {
        let seen = match &self.process {
            Some(process) => {
                let watch = |source| RunError::Process { doing: "watch", source };
                match process.try_exit().map_err(watch)? {
                    None => return Ok(None),
                    Some(exit) => exit,
                }
            }
            None => Exit::Unknown,
        };
        let exit = self.write_down_end(seen);
        let last_words = self.last_words();
        Ok(Some(match exit {
            Exit::Unknown => Status::Gone { last_words },
            exit => Status::Exited { exit, last_words },
        }))
    }

    /// Keeps the first end that was seen, and gives it back.
    fn write_down_end(&self, seen: Exit) -> Exit {
        let mut record = self.record.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(ended) = &record.ended {
            return ended.exit;
        }
        record.ended = Some(Ended { exit: seen, seen_at: SystemTime::now() });
        // Without the note the next adoption only knows less; the answer now is right.
        if let Err(error) = record.replace(&self.folder) {
            log::warn!("note the end of machine {}: {error}", self.folder.display());
        }
        seen
    }

    async fn await_monitor(&self) -> Result<(), RunError> {
        let opened = timeout(START_DEADLINE, async {
            while self.monitor().await.is_err() {
                tokio::time::sleep(MONITOR_RETRY).await;
            }
        });
        tokio::select! {
            opened = opened => opened.map_err(|_| RunError::StartTimeout {
                seconds: START_DEADLINE.as_secs(),
                last_words: self.last_words(),
            }),
            ended = self.ended() => Err(match ended? {
                Status::Exited { exit, last_words } => RunError::DidNotStart { exit, last_words },
                _ => {
                    let last_words = self.last_words();
                    RunError::DidNotStart { exit: Exit::Unknown, last_words }
                }
            }),
        }
    }

    /// Presses the power button until the machine has ended (true), or the time is up or it turns
    /// out to stand still, so that it cannot notice (false).
    async fn power_down(&self, graceful: Duration) -> bool {
        let deadline = Instant::now() + graceful;
        loop {
            let press = async {
                let monitor = self.monitor().await?;
                monitor.execute("system_powerdown", Value::Null).await?;
                monitor.query_status().await
            };
            match timeout(MONITOR_PATIENCE, press).await {
                Ok(Ok(state)) if !state.running => return false,
                Ok(Err(error)) => {
                    log::debug!("power button of machine {}: {error}", self.folder.display());
                }
                _ => {}
            }
            let next = deadline.min(Instant::now() + PRESS_AGAIN);
            if tokio::time::timeout_at(next, self.ended()).await.is_ok_and(|ended| ended.is_ok()) {
                return true;
            }
            if next == deadline {
                return false;
            }
        }
    }

    /// Tells QEMU to quit and waits until it has ended (true); false when it cannot be told.
    async fn quit(&self) -> bool {
        let quit = async { self.monitor().await?.execute("quit", Value::Null).await };
        match quit.await {
            // The answer may be lost as QEMU ends.
            Ok(_) | Err(QmpError::Lost { .. }) => self.ended().await.is_ok(),
            Err(error) => {
                log::debug!("quit of machine {}: {error}", self.folder.display());
                false
            }
        }
    }

    async fn kill(&self) -> Result<(), RunError> {
        let Some(process) = &self.process else { return Ok(()) };
        let killed = process.kill_and_wait(KILL_PATIENCE).await;
        let killed = killed.map_err(|source| RunError::Process { doing: "kill", source })?;
        let pid = process.identity().pid;
        killed.ok_or(RunError::WontDie { pid })?;
        self.ended_now().map(drop)
    }

    fn last_words(&self) -> Vec<String> {
        last_words(&self.folder.join(QEMU_LOG))
    }
}

/// Removes the run directory of a machine that has ended, with all that is in it. One that is not
/// there any more is no error. To be called within a Tokio runtime.
///
/// # Errors
/// [`RunError::StillRuns`]; [`RunError::NoMachine`] when the directory was never a run directory;
/// those of [`Machine::adopt`]; [`RunError::File`].
pub fn remove(folder: &Path) -> Result<(), RunError> {
    if !folder.try_exists().map_err(file_error("find", folder))? {
        return Ok(());
    }
    let machine = Machine::adopt(folder)?;
    if machine.ended_now()?.is_none() {
        let pid = machine.pid().unwrap_or_default();
        return Err(RunError::StillRuns { folder: folder.to_owned(), pid });
    }
    fs::remove_dir_all(&machine.folder).map_err(file_error("remove", folder))
}

fn file_error(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> RunError {
    let path = path.to_owned();
    move |source| RunError::File { doing, path, source }
}
