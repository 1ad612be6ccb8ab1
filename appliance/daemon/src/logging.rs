//! Where log lines go: to the journal under systemd, else to stderr. Secrets are never among them.

use std::io::Write;

use log::{Level, LevelFilter, Log, Metadata, Record};

/// Libraries whose chatter nobody asked for.
const QUIET: [&str; 4] = ["quinn", "rustls", "hyper", "tracing"];

/// Starts logging at `level`.
pub fn start(level: LevelFilter) {
    let journal = systemd_journal_logger::connected_to_journal()
        .then(|| systemd_journal_logger::JournalLog::new().ok())
        .flatten();
    let logger = Filtered {
        inner: match journal {
            Some(journal) => Box::new(journal),
            None => Box::new(Stderr),
        },
        level,
    };
    // Fails only when logging was started before: then it goes on as it is.
    if log::set_boxed_logger(Box::new(logger)).is_ok() {
        log::set_max_level(level);
    }
}

struct Filtered {
    inner: Box<dyn Log>,
    level: LevelFilter,
}

impl Log for Filtered {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        let quiet = QUIET.iter().any(|name| metadata.target().starts_with(name));
        metadata.level() <= if quiet { LevelFilter::Warn.min(self.level) } else { self.level }
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            self.inner.log(record);
        }
    }

    fn flush(&self) {
        self.inner.flush();
    }
}

struct Stderr;

impl Log for Stderr {
    fn enabled(&self, _metadata: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        let level = match record.level() {
            Level::Error => "ERROR",
            Level::Warn => "WARN ",
            Level::Info => "INFO ",
            Level::Debug => "DEBUG",
            Level::Trace => "TRACE",
        };
        let time = crate::clock::rfc3339(crate::clock::wall());
        // One write, so that lines of threads do not mix; nobody to tell when it fails.
        let line = format!("{time} {level} {}: {}\n", record.target(), record.args());
        let _ = std::io::stderr().write_all(line.as_bytes());
    }

    fn flush(&self) {}
}
