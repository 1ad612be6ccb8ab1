//! The command line: what a person or a script types, and what they get to see.
//!
//! Parsing knows no system calls; commands ask the daemon on its control socket; rendering turns
//! the daemon's JSON into text. With `--json` the daemon's answer is printed as it came. Failures
//! go to stderr as one line, and each kind of failure has its exit code.

mod args;
mod client;
mod commands;
mod copy;
mod render;

use std::io::Write;
use std::process::ExitCode;

use clap::Parser;

use crate::error::{Failure, Result};
use args::{Command, Line};

/// Runs the command line.
#[must_use]
pub fn main() -> ExitCode {
    let line = Line::parse();
    let result = match line.command {
        Command::Daemon { config } => crate::daemon::run(config.as_deref()),
        command => ask(line.socket, line.json, command),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            if line.json {
                let text = serde_json::to_string(&failure).unwrap_or_default();
                say_error(&text);
            } else {
                say_error(&format!("srn: {failure}"));
            }
            ExitCode::from(failure.kind.exit_code())
        }
    }
}

fn ask(socket: std::path::PathBuf, json: bool, command: Command) -> Result<()> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::internal(format!("starting: {error}")))?
        .block_on(commands::run(client::Client::new(socket), json, command))
}

/// Prints a line; a reader that went away is no failure.
fn say(text: &str) {
    let _ = writeln!(std::io::stdout(), "{text}");
}

fn say_error(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}
