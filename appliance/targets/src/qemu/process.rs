//! A process named beyond doubt, whether it is our child or not.
//!
//! A machine outlives the daemon that started it, so the daemon that comes back knows it only by
//! what was written down: process id, start time and boot. The kernel may have given that id to
//! somebody else since; [`Process::find`] takes a pidfd first and compares afterwards, so that
//! nothing can slip in between, and from then on only the pidfd is used.
//!
//! It refuses to know what the process is for, and it never starts one.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::process::Child;
use std::sync::OnceLock;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, pidfd_open, pidfd_send_signal, waitid,
};
use serde::{Deserialize, Serialize};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// What must agree for a process to be the one that was written down.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Identity {
    /// The process id.
    pub pid: i32,
    /// When it started, in clock ticks since the host booted (`/proc/PID/stat`, field 22).
    pub start_ticks: u64,
    /// The boot in which that was (`/proc/sys/kernel/random/boot_id`).
    pub boot_id: String,
}

/// How a process of ours ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Exit {
    /// It ended itself with this code.
    Code(i32),
    /// This signal ended it.
    Signal(i32),
    /// It ended, but it was not our child (the daemon was restarted since), so nobody told us how.
    Unknown,
}

/// A process, held by a pidfd.
#[derive(Debug)]
pub struct Process {
    identity: Identity,
    pidfd: AsyncFd<OwnedFd>,
    exit: OnceLock<Exit>,
}

impl Process {
    /// The living or unreaped process with this id, as it is now. To be called within a Tokio
    /// runtime (as [`Process::find`]).
    ///
    /// # Errors
    /// Those of `pidfd_open` and of reading `/proc`; `NotFound` when there is no such process.
    pub fn open(pid: i32) -> io::Result<Self> {
        let id = Some(pid).filter(|pid| *pid > 0).and_then(Pid::from_raw);
        let id = id.ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?;
        let pidfd = match pidfd_open(id, PidfdFlags::empty()) {
            // EINVAL: the id is that of a thread now.
            Err(rustix::io::Errno::SRCH | rustix::io::Errno::INVAL) => {
                return Err(io::ErrorKind::NotFound.into());
            }
            other => other?,
        };
        let identity = Identity { pid, start_ticks: start_ticks(pid)?, boot_id: boot_id()? };
        Ok(Self { identity, pidfd: register(pidfd)?, exit: OnceLock::new() })
    }

    /// A child just started. Give no other handle to it a chance to reap it.
    ///
    /// # Errors
    /// Those of [`Process::open`]. A child that has ended already is no error: it is not reaped
    /// yet.
    pub fn of_child(child: Child) -> io::Result<Self> {
        // Dropping a `Child` neither ends nor reaps it, so until we reap it the id stays its own.
        Self::open(i32::try_from(child.id()).unwrap_or_default())
    }

    /// The process that was written down, or `None` when it is gone for good.
    ///
    /// # Errors
    /// Those of [`Process::open`] other than `NotFound`.
    pub fn find(identity: &Identity) -> io::Result<Option<Self>> {
        if identity.boot_id != boot_id()? {
            return Ok(None);
        }
        match Self::open(identity.pid) {
            Ok(process) if process.identity == *identity => Ok(Some(process)),
            Ok(_) => Ok(None),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// What to write down about it.
    #[must_use]
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// How it ended, or `None` while it lives. A child is reaped by this.
    ///
    /// # Errors
    /// Those of `poll` and `waitid`.
    pub fn try_exit(&self) -> io::Result<Option<Exit>> {
        if let Some(exit) = self.exit.get() {
            return Ok(Some(*exit));
        }
        if !self.has_ended()? {
            return Ok(None);
        }
        let exit = self.reap()?;
        Ok(Some(*self.exit.get_or_init(|| exit)))
    }

    /// Waits until it has ended, and says how. A child is reaped by this.
    ///
    /// # Errors
    /// Those of [`Process::try_exit`].
    pub async fn exit(&self) -> io::Result<Exit> {
        loop {
            let mut ready = self.pidfd.readable().await?;
            if let Some(exit) = self.try_exit()? {
                return Ok(exit);
            }
            ready.clear_ready();
        }
    }

    /// Sends SIGKILL, to this process and no other. One that has ended already is no error.
    ///
    /// # Errors
    /// Those of `pidfd_send_signal`, such as lacking the right to.
    pub fn kill(&self) -> io::Result<()> {
        match pidfd_send_signal(self.pidfd.get_ref(), Signal::KILL) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Sends SIGKILL and waits until the process is gone, at most for `patience`; `None` when it
    /// is still there then (it hangs in the kernel).
    ///
    /// # Errors
    /// Those of [`Process::kill`] and [`Process::try_exit`].
    pub async fn kill_and_wait(&self, patience: Duration) -> io::Result<Option<Exit>> {
        self.kill()?;
        tokio::time::timeout(patience, self.exit()).await.ok().transpose()
    }

    fn has_ended(&self) -> io::Result<bool> {
        let mut fds = [PollFd::new(self.pidfd.get_ref(), PollFlags::IN)];
        Ok(poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }))? > 0)
    }

    fn reap(&self) -> io::Result<Exit> {
        use std::os::fd::AsFd as _;
        let id = WaitId::PidFd(self.pidfd.get_ref().as_fd());
        match waitid(id, WaitIdOptions::EXITED | WaitIdOptions::NOHANG) {
            Ok(Some(status)) => Ok(status
                .exit_status()
                .map(Exit::Code)
                .or_else(|| status.terminating_signal().map(Exit::Signal))
                .unwrap_or(Exit::Unknown)),
            // Not our child, or reaped by another handle to it.
            Ok(None) | Err(rustix::io::Errno::CHILD) => Ok(Exit::Unknown),
            Err(error) => Err(error.into()),
        }
    }
}

/// Has the runtime watch a pidfd for its process's end.
#[expect(unsafe_code, reason = "tokio cannot see that an OwnedFd stays open and the same")]
fn register(pidfd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` is a valid descriptor that only it closes, its `as_raw_fd` always gives
    // the same one, and the `AsyncFd` owns it from here on.
    let registered = unsafe { AsyncFd::register_with_interest(pidfd, Interest::READABLE) };
    Ok(registered?)
}

/// The ids of all processes whose working directory is `folder` (which must be absolute and free
/// of symbolic links): how a machine is found again when the daemon died before it could write the
/// id down.
pub(super) fn working_in(folder: &std::path::Path) -> io::Result<Vec<i32>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let entry = entry?;
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        // Processes end while we look, and others are not ours to look into.
        if fs::read_link(entry.path().join("cwd")).is_ok_and(|cwd| cwd == folder) {
            found.push(pid);
        }
    }
    Ok(found)
}

fn start_ticks(pid: i32) -> io::Result<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).map_err(|error| {
        // ESRCH comes when the process goes between open and read.
        match error.raw_os_error() {
            Some(code) if code == rustix::io::Errno::SRCH.raw_os_error() => {
                io::ErrorKind::NotFound.into()
            }
            _ => error,
        }
    })?;
    parse_start_ticks(&stat).ok_or_else(|| io::Error::other("unexpected form of /proc/PID/stat"))
}

/// Field 22; the second field is the program's name in parentheses and may hold anything, so
/// counting begins after the last one.
fn parse_start_ticks(stat: &str) -> Option<u64> {
    let (_, after_name) = stat.rsplit_once(')')?;
    after_name.split_ascii_whitespace().nth(19)?.parse().ok()
}

fn boot_id() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim_end().to_owned())
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(20);

    /// A process that does not outlive its test.
    struct Guarded(Process);

    impl Drop for Guarded {
        fn drop(&mut self) {
            self.0.kill().unwrap();
        }
    }

    impl std::ops::Deref for Guarded {
        type Target = Process;

        fn deref(&self) -> &Process {
            &self.0
        }
    }

    fn child(script: &str) -> Guarded {
        child_in("/".as_ref(), script)
    }

    fn child_in(folder: &std::path::Path, script: &str) -> Guarded {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", script]).current_dir(folder);
        let child =
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        Guarded(Process::of_child(child.unwrap()).unwrap())
    }

    #[test]
    fn the_start_time_is_found_behind_any_name() {
        let rest = "S 1 2 3 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 4711 9 9";
        assert_eq!(parse_start_ticks(&format!("12 (a) b ( c)) {rest}")), Some(4711));
        assert_eq!(parse_start_ticks("12 (a"), None);
        assert_eq!(parse_start_ticks("12 (a) S 1"), None);
    }

    #[tokio::test]
    async fn a_child_is_reaped_with_its_code() {
        let process = child("exit 7");
        let exit = tokio::time::timeout(PATIENCE, process.exit()).await.unwrap().unwrap();
        assert_eq!(exit, Exit::Code(7));
        assert_eq!(process.try_exit().unwrap(), Some(Exit::Code(7)), "said again when asked again");
        assert!(Process::find(process.identity()).unwrap().is_none(), "no zombie is left");
    }

    #[tokio::test]
    async fn a_killed_child_says_so() {
        let process = child("exec sleep 1000");
        assert_eq!(process.try_exit().unwrap(), None);
        let again = Process::find(process.identity()).unwrap().unwrap();
        assert_eq!(process.kill_and_wait(PATIENCE).await.unwrap(), Some(Exit::Signal(9)));
        assert_eq!(again.try_exit().unwrap(), Some(Exit::Unknown), "the other handle reaped it");
        process.kill().unwrap();
    }

    #[tokio::test]
    async fn a_stranger_is_watched_too() {
        // The shell ends at once and leaves its own child to init.
        let file = tempfile::NamedTempFile::new().unwrap();
        let script = format!("sleep 1000 >/dev/null 2>&1 & echo $! > {}", file.path().display());
        let exit = child(&script).exit().await.unwrap();
        assert_eq!(exit, Exit::Code(0));
        let pid = fs::read_to_string(file.path()).unwrap().trim().parse().unwrap();
        let stranger = Guarded(Process::open(pid).unwrap());
        assert_eq!(stranger.try_exit().unwrap(), None);
        assert_eq!(stranger.kill_and_wait(PATIENCE).await.unwrap(), Some(Exit::Unknown));
    }

    #[tokio::test]
    async fn another_process_under_the_same_id_is_not_taken() {
        let process = child("exec sleep 1000");
        let truth = process.identity().clone();
        for other in [
            Identity { start_ticks: truth.start_ticks + 1, ..truth.clone() },
            Identity { boot_id: "another boot".to_owned(), ..truth.clone() },
            Identity { pid: i32::MAX, ..truth.clone() },
            Identity { pid: -1, ..truth.clone() },
        ] {
            assert!(Process::find(&other).unwrap().is_none(), "{other:?}");
        }
        process.kill_and_wait(PATIENCE).await.unwrap();
    }

    #[tokio::test]
    async fn a_process_is_found_by_where_it_works() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path().canonicalize().unwrap();
        assert!(working_in(&folder).unwrap().is_empty());
        let process = child_in(&folder, "exec sleep 1000");
        assert_eq!(working_in(&folder).unwrap(), [process.identity().pid]);
        process.kill_and_wait(PATIENCE).await.unwrap();
    }
}
