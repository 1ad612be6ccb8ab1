//! What QEMU reports by itself.
//!
//! Events are hints, not history: a listener that falls behind is told how many it missed and must
//! ask for the state of things (`query-jobs`, `query-status`) instead.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;
use serde_json::Value;
use tokio::sync::broadcast;

use super::{Connection, QmpError};

/// One event.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct Event {
    /// QEMU's name of it, in capitals.
    #[serde(rename = "event")]
    pub name: String,
    /// What it says.
    #[serde(default)]
    pub data: Value,
    /// When, by the clock of QEMU's host.
    pub timestamp: Timestamp,
}

/// A time since 1970. QEMU gives -1 for both parts when it could not read its clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub struct Timestamp {
    /// Whole seconds.
    pub seconds: i64,
    /// And microseconds.
    pub microseconds: i64,
}

/// The events that matter to this product, typed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// A mirror job has copied everything and follows the source from now on.
    JobReady {
        /// The job.
        job: String,
    },
    /// A block job has ended by itself; with an error if it failed.
    JobCompleted {
        /// The job.
        job: String,
        /// Why it failed, if it did.
        error: Option<String>,
    },
    /// A block job has ended because it was told to.
    JobCancelled {
        /// The job.
        job: String,
    },
    /// A block job met an I/O error.
    JobError {
        /// The job.
        job: String,
        /// `read` (of the source) or `write` (to the target).
        operation: String,
        /// What QEMU did: `ignore`, `report` (the job fails) or `stop` (it pauses).
        action: String,
    },
    /// A job entered this status.
    JobStatus {
        /// The job.
        job: String,
        /// The status.
        status: String,
    },
    /// A request of the guest's failed, and the machine paused if `action` is `stop`.
    IoError {
        /// The node it concerned, where QEMU names it.
        node: Option<String>,
        /// `read` or `write`.
        operation: String,
        /// `ignore`, `report` or `stop`.
        action: String,
        /// QEMU's words, for people.
        reason: String,
    },
    /// QEMU is about to end.
    Shutdown {
        /// Whether the guest did it.
        guest: bool,
        /// `guest-shutdown`, `host-qmp-quit`, `host-signal`, ...
        reason: String,
    },
    /// The guest was reset.
    Reset {
        /// Whether the guest did it.
        guest: bool,
    },
    /// The machine stands still.
    Stop,
    /// The machine goes on.
    Resume,
    /// Something else, or one of the above without the data it should have.
    Other,
}

impl Event {
    /// The event in typed form.
    #[must_use]
    pub fn kind(&self) -> Kind {
        self.known().unwrap_or(Kind::Other)
    }

    fn known(&self) -> Option<Kind> {
        let text = |key: &str| Some(self.data.get(key)?.as_str()?.to_owned());
        let flag = |key: &str| self.data.get(key)?.as_bool();
        Some(match self.name.as_str() {
            "BLOCK_JOB_READY" => Kind::JobReady { job: text("device")? },
            "BLOCK_JOB_COMPLETED" => {
                Kind::JobCompleted { job: text("device")?, error: text("error") }
            }
            "BLOCK_JOB_CANCELLED" => Kind::JobCancelled { job: text("device")? },
            "BLOCK_JOB_ERROR" => Kind::JobError {
                job: text("device")?,
                operation: text("operation")?,
                action: text("action")?,
            },
            "JOB_STATUS_CHANGE" => Kind::JobStatus { job: text("id")?, status: text("status")? },
            "BLOCK_IO_ERROR" => Kind::IoError {
                node: text("node-name"),
                operation: text("operation")?,
                action: text("action")?,
                reason: text("reason").unwrap_or_default(),
            },
            "SHUTDOWN" => Kind::Shutdown { guest: flag("guest")?, reason: text("reason")? },
            "RESET" => Kind::Reset { guest: flag("guest")? },
            "STOP" => Kind::Stop,
            "RESUME" => Kind::Resume,
            _ => return None,
        })
    }
}

/// The events from one moment on.
pub struct Events {
    // Held so that listening alone keeps the connection open.
    connection: Arc<Connection>,
    receiver: broadcast::Receiver<Event>,
}

/// Why there is no event.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EventError {
    /// The listener was slow; the events after the gap follow. Ask for the state of things.
    #[error("{0} events were missed")]
    Missed(u64),
    /// The connection ended.
    #[error(transparent)]
    Lost(QmpError),
    /// None came in time ([`Events::wait_for`] only).
    #[error("no such event within {0:?}")]
    Timeout(Duration),
}

impl Events {
    pub(super) fn new(connection: Arc<Connection>) -> Self {
        let receiver = connection.listen();
        Self { connection, receiver }
    }

    /// The next event.
    ///
    /// # Errors
    /// [`EventError::Missed`] once after a gap; [`EventError::Lost`] at the end.
    pub async fn next(&mut self) -> Result<Event, EventError> {
        self.receiver.recv().await.map_err(|error| match error {
            broadcast::error::RecvError::Lagged(count) => EventError::Missed(count),
            broadcast::error::RecvError::Closed => EventError::Lost(self.connection.why_lost()),
        })
    }

    /// The next event that `wanted` accepts; others are passed over.
    ///
    /// # Errors
    /// Those of [`Events::next`], and [`EventError::Timeout`].
    pub async fn wait_for(
        &mut self,
        patience: Duration,
        mut wanted: impl FnMut(&Kind) -> bool,
    ) -> Result<Event, EventError> {
        let search = async {
            loop {
                let event = self.next().await?;
                if wanted(&event.kind()) {
                    return Ok(event);
                }
            }
        };
        let found = tokio::time::timeout(patience, search).await;
        found.unwrap_or(Err(EventError::Timeout(patience)))
    }
}

impl fmt::Debug for Events {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Events").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(line: &str, expected: Kind) {
        let event: Event = serde_json::from_str(line).unwrap();
        assert_eq!(event.kind(), expected);
    }

    #[test]
    fn events_are_read() {
        check(
            r#"{"timestamp":{"seconds":1,"microseconds":2},"event":"BLOCK_JOB_COMPLETED","data":
               {"device":"m0","len":8,"offset":4,"speed":0,"type":"mirror","error":"No space"}}"#,
            Kind::JobCompleted { job: "m0".to_owned(), error: Some("No space".to_owned()) },
        );
        check(
            r#"{"timestamp":{"seconds":1,"microseconds":2},"event":"JOB_STATUS_CHANGE",
               "data":{"status":"ready","id":"m0"}}"#,
            Kind::JobStatus { job: "m0".to_owned(), status: "ready".to_owned() },
        );
        check(r#"{"timestamp":{"seconds":1,"microseconds":2},"event":"STOP"}"#, Kind::Stop);
        check(
            r#"{"timestamp":{"seconds":-1,"microseconds":-1},"event":"SHUTDOWN",
               "data":{"guest":true,"reason":"guest-shutdown"}}"#,
            Kind::Shutdown { guest: true, reason: "guest-shutdown".to_owned() },
        );
    }

    #[test]
    fn events_without_their_data_are_others() {
        let stamp = r#""timestamp":{"seconds":1,"microseconds":2}"#;
        for line in [
            format!(r#"{{{stamp},"event":"BLOCK_JOB_READY"}}"#),
            format!(r#"{{{stamp},"event":"SHUTDOWN","data":{{"guest":"yes"}}}}"#),
            format!(r#"{{{stamp},"event":"VSERPORT_CHANGE","data":{{"id":"x"}}}}"#),
        ] {
            check(&line, Kind::Other);
        }
    }
}
