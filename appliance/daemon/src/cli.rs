//! The command line: what a person or a script types, and what they get to see.
//!
//! Parsing knows no system calls; commands ask the daemon on its control socket; rendering turns
//! the daemon's JSON into text. With `--json` the daemon's answer is printed as it came. Failures
//! go to stderr as one line, and each kind of failure has its exit code.

mod args;
mod client;
mod commands;
mod copy;
mod inspect;
mod integrity;
mod nbd_cert;
mod points;
mod render;
mod resync;
mod retention;
mod reversal;
mod schedules;

use std::io::Write;
use std::process::ExitCode;

use clap::Parser;
use clap::error::ErrorKind;

use crate::error::{Failure, Kind, Result};
use args::{Command, Line};

/// Runs the command line.
#[must_use]
pub fn main() -> ExitCode {
    let line = match Line::try_parse() {
        Ok(line) => line,
        Err(error) => return not_understood(&error),
    };
    let result = match line.command {
        Command::Daemon { config } => crate::daemon::run(config.as_deref()),
        Command::Inspect(command) => inspect::run(command, line.json),
        command => ask(line.socket, line.json, command),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => fail(line.json, &failure),
    }
}

fn fail(json: bool, failure: &Failure) -> ExitCode {
    if json {
        say_error(&serde_json::to_string(failure).unwrap_or_default());
    } else {
        say_error(&format!("srn: {failure}"));
    }
    ExitCode::from(failure.kind.exit_code())
}

/// Prints the help that was asked for, or one line of what is wrong with the command line.
fn not_understood(error: &clap::Error) -> ExitCode {
    if !error.use_stderr() {
        // A reader that went away is no failure.
        let _ = error.print();
        return ExitCode::SUCCESS;
    }
    // Whether JSON is wanted was not understood either; it is guessed.
    let json = std::env::args_os().any(|argument| argument == "--json");
    if error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand && !json {
        // Who says nothing is told what can be said.
        let _ = error.print();
        return ExitCode::from(Kind::Usage.exit_code());
    }
    let text = usage_line(&error.render().to_string());
    fail(json, &Failure::new(Kind::Usage, text))
}

/// What the parser says in paragraphs, in one line that ends with where to read more.
fn usage_line(paragraphs: &str) -> String {
    let mut said = String::new();
    let mut command = "srn".to_owned();
    for line in paragraphs.lines().map(str::trim).filter(|line| !line.is_empty()) {
        if let Some(usage) = line.strip_prefix("Usage: ") {
            let words = usage.split(' ').take_while(|word| word.starts_with(char::is_lowercase));
            command = words.collect::<Vec<_>>().join(" ");
        } else if let Some(tip) = line.strip_prefix("tip: ") {
            said = format!("{said}; {tip}");
        } else if !line.starts_with("For more information") {
            let line = line.strip_prefix("error: ").unwrap_or(line);
            said = if said.is_empty() { line.to_owned() } else { format!("{said} {line}") };
        }
    }
    format!("{said}; see {command} --help")
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn usage_errors_take_one_line() {
        for (arguments, expected) in [
            (
                &["srn", "statsu"][..],
                "unrecognized subcommand 'statsu'; a similar subcommand exists: 'status'; see srn \
                 --help",
            ),
            (
                &["srn", "disk", "list"],
                "the following required arguments were not provided: <GROUP>; see srn disk list \
                 --help",
            ),
            (
                &["srn", "token", "new", "--ttl", "x"],
                "invalid value 'x' for '--ttl <DURATION>': \"x\" is no duration (expected number \
                 at 0); write for example 90s or 1h; see srn --help",
            ),
        ] {
            let error = Line::try_parse_from(arguments).unwrap_err();
            assert_eq!(usage_line(&error.render().to_string()), expected);
        }
    }
}
