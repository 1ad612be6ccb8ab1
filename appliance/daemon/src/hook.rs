//! Programs of the administrator that the daemon calls: who may have written one, how it is run, and
//! that nothing of it goes on when it should not.
//!
//! A hook runs with the rights of the daemon. So it is called only if nobody but root and the daemon's
//! user can have changed it; it gets no input, a clean environment and a process group of its own. All
//! that it starts inherits a word in its environment by which it is found again, even by the next
//! daemon. This module refuses to know what a hook is for.

use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::process::Command;
use tokio_util::task::AbortOnDropHandle;

use crate::error::{Failure, Result};

/// Where a hook finds programs.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The word that names a run, in the environment.
const RUN: &str = "SRN_HOOK_RUN";

/// What is remembered of what a hook says, in bytes: the end of it.
const SAID_MAX: usize = 1024;

/// What is told of it, in characters.
const TOLD_MAX: usize = 300;

/// How long the last words of a program that has ended are waited for: another one that it left behind
/// may hold on to its output.
const LAST_WORDS: Duration = Duration::from_millis(200);

/// How often it is looked whether it is.
const LOOK: Duration = Duration::from_millis(5);

/// How long a killed program may take to be gone.
const KILL_PATIENCE: Duration = Duration::from_secs(5);

/// A program that may be called.
#[derive(Debug, Clone)]
pub struct Hook {
    /// With no symbolic links in it.
    path: PathBuf,
}

/// What came of a run.
#[derive(Debug)]
pub struct Ran {
    /// Why it failed, if it did.
    pub failed: Option<String>,
    /// The end of what it printed, in one line; mostly empty.
    pub said: String,
}

impl Ran {
    /// What it printed, in words to be put behind others.
    #[must_use]
    pub fn words(&self) -> String {
        if self.said.is_empty() { String::new() } else { format!("; it said: {}", self.said) }
    }
}

impl Hook {
    /// The program at this path, if it can be trusted. Blocks.
    ///
    /// # Errors
    /// [`crate::error::Kind::Invalid`] when there is none, [`crate::error::Kind::Refused`] when others
    /// can change it; in words.
    pub fn trusted(path: &Path) -> Result<Self> {
        let shown = path.display();
        if !path.is_absolute() {
            return Err(Failure::invalid(format!(
                "a hook is given with its whole path, from /; {shown} is not"
            )));
        }
        let failed = |error: std::io::Error| Failure::invalid(format!("the hook {shown}: {error}"));
        let real = path.canonicalize().map_err(failed)?;
        let program = real.metadata().map_err(failed)?;
        if !program.is_file() || program.mode() & 0o111 == 0 {
            return Err(Failure::invalid(format!("{shown} is no program that can be run")));
        }
        // Who can write a directory can put another program there, and so on upwards.
        for part in real.ancestors() {
            let metadata = part.metadata().map_err(failed)?;
            if let Some(why) = distrust(&metadata) {
                return Err(Failure::refused(format!(
                    "the hook {shown} is not run, as {} {why}; it would run with the rights of this \
                     daemon",
                    part.display()
                )));
            }
        }
        Ok(Self { path: real })
    }

    /// Runs it to its end, or kills it when it takes longer. `run` names this run, for [`end_run`]:
    /// whoever drops this before its end calls that.
    pub async fn run(&self, arguments: &[&str], run: &str, within: Duration) -> Ran {
        let mut command = Command::new(&self.path);
        command.args(arguments).env_clear().env("PATH", PATH).env("LANG", "C.UTF-8").env(RUN, run);
        command.current_dir("/").process_group(0).kill_on_drop(true);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let failed = |why: String| Ran { failed: Some(why), said: String::new() };
        let mut child = match command.spawn() {
            Ok(child) => child,
            Err(error) => return failed(format!("cannot be run: {error}")),
        };
        let group = child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw);
        let tail = Arc::new(Tail::default());
        let readers = (listen(child.stdout.take(), &tail), listen(child.stderr.take(), &tail));
        let why = match tokio::time::timeout(within, child.wait()).await {
            Ok(Ok(status)) if status.success() => None,
            Ok(Ok(status)) => Some(format!("failed ({status})")),
            Ok(Err(error)) => Some(format!("was lost: {error}")),
            Err(_) => {
                // Not waited for yet, so the number is still its own.
                if let Some(group) = group {
                    let _ = kill_process_group(group, Signal::KILL);
                }
                end_run(run).await;
                let _ = tokio::time::timeout(KILL_PATIENCE, child.wait()).await;
                Some(format!("took longer than {} and was killed", span(within)))
            }
        };
        let last_words = async {
            let _ = readers.0.await;
            let _ = readers.1.await;
        };
        let _ = tokio::time::timeout(LAST_WORDS, last_words).await;
        Ran { failed: why, said: tail.said() }
    }
}

/// A time in words, to the millisecond.
pub fn span(time: Duration) -> String {
    let whole = Duration::from_millis(u64::try_from(time.as_millis()).unwrap_or(u64::MAX));
    humantime::format_duration(whole).to_string()
}

/// Why a file, or a directory above it, is not trusted.
fn distrust(metadata: &Metadata) -> Option<String> {
    let own = rustix::process::geteuid().as_raw();
    let owner = metadata.uid();
    if owner != 0 && owner != own {
        return Some(format!("belongs to user {owner}, who is neither root nor this daemon's"));
    }
    // In a sticky directory nobody replaces what is another's.
    let sticky = metadata.is_dir() && metadata.mode() & 0o1000 != 0;
    let writable = metadata.mode() & 0o022 != 0 && !sticky;
    writable.then(|| {
        format!("can be written by others (chmod go-w, mode {:o})", metadata.mode() & 0o7777)
    })
}

/// Kills what is left of a run, whoever started it, and waits until it is gone.
pub async fn end_run(run: &str) {
    let since = Instant::now();
    // What is killed may have started more just before.
    loop {
        let word = format!("{RUN}={run}");
        let found = tokio::task::spawn_blocking(move || kill_all(word.as_bytes())).await;
        if !found.unwrap_or_default() {
            return;
        }
        if since.elapsed() > KILL_PATIENCE {
            log::warn!("a program that was called as a hook cannot be killed ({RUN}={run})");
            return;
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// Kills every process with this word in its environment. Whether there was one.
fn kill_all(word: &[u8]) -> bool {
    let Ok(processes) = std::fs::read_dir("/proc") else { return false };
    let own = std::process::id();
    let mut found = false;
    for entry in processes.flatten() {
        let name = entry.file_name();
        let id = name.to_str().and_then(|name| name.parse::<i32>().ok());
        let Some(id) = id.filter(|id| u32::try_from(*id) != Ok(own)) else { continue };
        // One that has ended shows nothing; those of others cannot be ours.
        let Ok(environment) = std::fs::read(entry.path().join("environ")) else { continue };
        if environment.split(|byte| *byte == 0).any(|entry| entry == word) {
            found = true;
            if let Some(id) = Pid::from_raw(id) {
                let _ = kill_process(id, Signal::KILL);
            }
        }
    }
    found
}

/// The end of what was printed.
#[derive(Debug, Default)]
struct Tail(Mutex<Vec<u8>>);

impl Tail {
    fn add(&self, bytes: &[u8]) {
        let mut tail = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        tail.extend_from_slice(bytes);
        let over = tail.len().saturating_sub(SAID_MAX);
        tail.drain(..over);
    }

    fn said(&self) -> String {
        let tail = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let text = String::from_utf8_lossy(&tail).replace(|c: char| c.is_control(), " ");
        let text = text.split_whitespace().collect::<Vec<&str>>().join(" ");
        let over = text.chars().count().saturating_sub(TOLD_MAX);
        text.chars().skip(over).collect()
    }
}

/// Reads all that is printed, so that nobody waits for it, and keeps the end.
fn listen(
    output: Option<impl AsyncRead + Unpin + Send + 'static>,
    tail: &Arc<Tail>,
) -> AbortOnDropHandle<()> {
    let tail = tail.clone();
    AbortOnDropHandle::new(tokio::spawn(async move {
        let Some(mut output) = output else { return };
        let mut buffer = [0; SAID_MAX];
        while let Ok(len @ 1..) = output.read(&mut buffer).await {
            tail.add(buffer.get(..len).unwrap_or_default());
        }
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;
    use std::fs::{Permissions, set_permissions};
    use std::os::unix::fs::PermissionsExt;

    fn script(dir: &Path, text: &str) -> PathBuf {
        let path = dir.join("hook");
        std::fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
        set_permissions(&path, Permissions::from_mode(0o755)).unwrap();
        path
    }

    async fn run(text: &str, within: Duration) -> Ran {
        let dir = tempfile::tempdir().unwrap();
        let hook = Hook::trusted(&script(dir.path(), text)).unwrap();
        hook.run(&["freeze", "web"], "a-test", within).await
    }

    const LONG: Duration = Duration::from_secs(60);

    #[tokio::test]
    async fn it_gets_its_arguments_and_nothing_else() {
        let ran =
            run("echo \"$#\" \"$1\" \"$2\"; pwd; env | cut -d= -f1 | sort | tr '\\n' ,", LONG)
                .await;
        assert_eq!(ran.failed, None);
        assert_eq!(ran.said, "2 freeze web / LANG,PATH,PWD,SRN_HOOK_RUN,");
    }

    #[tokio::test]
    async fn what_it_says_is_bounded_and_plain() {
        let ran =
            run("yes one | head -c 5000000; printf '\\033[2Jthe \\t end\\n' >&2; exit 3", LONG)
                .await;
        assert!(ran.failed.as_deref().is_some_and(|why| why.contains("exit status: 3")), "{ran:?}");
        assert!(ran.said.chars().count() <= TOLD_MAX && ran.said.contains("the end"), "{ran:?}");
        assert!(!ran.said.contains(char::is_control), "{ran:?}");
    }

    #[tokio::test]
    async fn one_that_hangs_is_killed_with_all_that_it_has_started() {
        let dir = tempfile::tempdir().unwrap();
        let text = "setsid sh -c 'echo $$ >>$1; exec sleep 1000' x \"$2\" & sleep 1000 & wait";
        let hook = Hook::trusted(&script(dir.path(), text)).unwrap();
        let list = dir.path().join("list");
        let arguments = ["freeze", list.to_str().unwrap()];
        let running = hook.run(&arguments, "a-hanging-test", Duration::from_secs(2));
        let ran = running.await;
        assert!(ran.failed.as_deref().is_some_and(|why| why.contains("longer than 2s")), "{ran:?}");
        // It had left its process group.
        let id = std::fs::read_to_string(&list).unwrap();
        let gone = !Path::new("/proc").join(id.trim()).join("exe").exists();
        assert!(gone, "process {id} goes on");
        assert!(!kill_all(b"SRN_HOOK_RUN=a-hanging-test"));
    }

    #[tokio::test]
    async fn what_it_leaves_running_is_not_waited_for_and_not_killed() {
        let ran = run("sleep 1000 & echo $!", LONG).await;
        assert_eq!(ran.failed, None);
        let exe = Path::new("/proc").join(&ran.said).join("exe");
        assert!(exe.exists(), "{ran:?}");
        end_run("a-test-of-others").await;
        assert!(exe.exists());
        end_run("a-test").await;
        assert!(!exe.exists());
    }

    #[test]
    fn what_others_can_change_is_not_run() {
        let dir = tempfile::tempdir().unwrap();
        let path = script(dir.path(), "exit 0");
        assert!(Hook::trusted(&path).is_ok());
        let refused = |path: &Path, kind: Kind, words: &str| {
            let error = Hook::trusted(path).unwrap_err();
            assert!(error.kind == kind && error.message.contains(words), "{error:?}");
        };
        refused(Path::new("hook"), Kind::Invalid, "whole path");
        refused(&dir.path().join("none"), Kind::Invalid, "No such file");
        refused(dir.path(), Kind::Invalid, "no program");
        let mode = |path: &Path, mode| set_permissions(path, Permissions::from_mode(mode)).unwrap();
        mode(&path, 0o644);
        refused(&path, Kind::Invalid, "no program");
        mode(&path, 0o775);
        refused(&path, Kind::Refused, "written by others");
        mode(&path, 0o755);
        mode(dir.path(), 0o777);
        refused(&path, Kind::Refused, "written by others");
        // As /tmp is.
        mode(dir.path(), 0o1777);
        assert!(Hook::trusted(&path).is_ok());
        mode(dir.path(), 0o755);
        // By a link the program counts, where it is.
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert!(Hook::trusted(&link).is_ok());
        if rustix::process::geteuid().is_root() {
            std::os::unix::fs::chown(&path, Some(4711), None).unwrap();
            refused(&link, Kind::Refused, "user 4711");
        }
    }
}
