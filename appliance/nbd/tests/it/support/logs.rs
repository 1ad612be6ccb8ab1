//! What the server logged as an error, of all tests that run.

use std::sync::{Mutex, Once};

static ERRORS: Mutex<Vec<String>> = Mutex::new(Vec::new());

struct Collector;

impl log::Log for Collector {
    fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
        metadata.target() == "nbd"
    }

    fn log(&self, record: &log::Record<'_>) {
        if record.level() == log::Level::Error && self.enabled(record.metadata()) {
            ERRORS.lock().unwrap().push(record.args().to_string());
        }
    }

    fn flush(&self) {}
}

pub(crate) fn collect() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        log::set_logger(&Collector).unwrap();
        log::set_max_level(log::LevelFilter::Trace);
    });
}

/// The errors that name one of these connections.
pub(crate) fn errors_of(clients: &[String]) -> Vec<String> {
    let errors = ERRORS.lock().unwrap();
    let of_these = |error: &&String| clients.iter().any(|client| error.contains(client.as_str()));
    errors.iter().filter(of_these).cloned().collect()
}
