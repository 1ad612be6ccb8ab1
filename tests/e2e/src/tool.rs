//! Programs of others.

use std::ffi::OsStr;
use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;

use crate::node::{Ran, TOOL_PATIENCE};

/// Runs a program to its end.
///
/// # Panics
/// When it is not installed or goes on for longer than [`TOOL_PATIENCE`].
pub async fn run<S: AsRef<OsStr>>(program: &str, arguments: &[S]) -> Ran {
    run_for(program, arguments, TOOL_PATIENCE).await
}

/// Runs a program to its end, which may be far away.
///
/// # Panics
/// When it is not installed or goes on for longer than `patience`.
pub async fn run_for<S: AsRef<OsStr>>(program: &str, arguments: &[S], patience: Duration) -> Ran {
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null()).kill_on_drop(true);
    let output = tokio::time::timeout(patience, command.output()).await;
    let output = output.unwrap_or_else(|_| panic!("{program} goes on and on"));
    let output = output.unwrap_or_else(|error| {
        panic!("{program}: {error}; install what is needed with tests/setup/packages.sh nbd qemu")
    });
    Ran {
        code: output.status.code().unwrap_or(-1),
        out: String::from_utf8_lossy(&output.stdout).into_owned(),
        err: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}
