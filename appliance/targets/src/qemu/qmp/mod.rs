//! A client for QMP, QEMU's control protocol, over a unix socket.
//!
//! QEMU serves one client at a time on a socket, so a [`Qmp`] is made to be shared: clones use one
//! connection, commands may be in flight together, and a command that times out or whose caller
//! goes away leaves the connection whole. Everything is bounded: a line, the commands in flight,
//! the events kept for a slow listener.
//!
//! [`block`] has the commands and answers for disks and jobs in typed form, [`mirror`] those for
//! protecting a disk, [`fleece`] those for reading one as it was, [`event`] the events. This module
//! refuses to know what a command means.
//!
//! Source: QEMU Machine Protocol Specification (`docs/interop/qmp-spec`), QEMU 7.2.

pub mod block;
pub mod event;
pub mod fleece;
pub mod mirror;

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::Deserialize;
use serde_json::{Value, json};
use tokio::io::{
    AsyncBufRead, AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader,
};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{broadcast, mpsc, oneshot};
use tokio::task::AbortHandle;
use tokio::time::timeout;

use self::event::{Event, Events};

/// How long a command may take unless the caller says otherwise. QEMU answers in milliseconds; a
/// machine with many disks under load may take seconds.
pub const COMMAND_TIMEOUT: Duration = Duration::from_secs(20);

/// The longest line accepted, in bytes. The largest answer in use, the schema, has 0.2 MB.
pub const LINE_BYTES_MAX: u64 = 4 << 20;

/// The most commands in flight on one connection.
pub const IN_FLIGHT_MAX: usize = 64;

/// How many events are kept for a listener that is slow to take them.
pub const EVENTS_KEPT: usize = 256;

/// A connection to one QEMU. Clones share it; it closes with the last one.
#[derive(Debug, Clone)]
pub struct Qmp {
    connection: Arc<Connection>,
}

/// What can go wrong with a command.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum QmpError {
    /// Nothing listens at the socket, or it cannot be reached.
    #[error("connect to the monitor {}: {reason}", .socket.display())]
    Connect {
        /// The socket.
        socket: PathBuf,
        /// What the system said.
        reason: String,
    },
    /// Connected, but no greeting within the time: another client holds the monitor, or QEMU hangs.
    #[error("no greeting from {}: another client holds the monitor, or qemu hangs", .socket.display())]
    NoGreeting {
        /// The socket.
        socket: PathBuf,
    },
    /// The connection ended; QEMU may be gone.
    #[error("monitor connection lost: {reason}")]
    Lost {
        /// Why.
        reason: String,
    },
    /// The command was sent (or waits to be), its answer did not come in time.
    #[error("qemu did not answer {command} within {seconds} s")]
    Timeout {
        /// The command.
        command: String,
        /// How long was waited.
        seconds: u64,
    },
    /// QEMU understood and refused.
    #[error("qemu refused {command}: {description} ({class})")]
    Refused {
        /// The command.
        command: String,
        /// QEMU's class of error: `GenericError`, `DeviceNotFound`, ...
        class: String,
        /// QEMU's words.
        description: String,
    },
    /// The answer is not what the command's answer should be.
    #[error("unexpected answer to {command}: {reason}")]
    Unexpected {
        /// The command.
        command: String,
        /// What did not fit.
        reason: String,
    },
    /// Too many commands in flight on this connection.
    #[error("more than {IN_FLIGHT_MAX} commands in flight")]
    Busy,
}

impl QmpError {
    /// Whether QEMU refused because it does not know the device, node or job.
    #[must_use]
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::Refused { class, .. } if class == "DeviceNotFound")
    }
}

impl Qmp {
    /// Connects to the monitor at `socket` and takes it out of its greeting, all within `patience`.
    ///
    /// # Errors
    /// [`QmpError::Connect`], [`QmpError::NoGreeting`], [`QmpError::Lost`].
    pub async fn connect(socket: &Path, patience: Duration) -> Result<Self, QmpError> {
        let opened = timeout(patience, Self::open(socket)).await;
        opened.unwrap_or_else(|_| Err(QmpError::NoGreeting { socket: socket.to_owned() }))
    }

    async fn open(socket: &Path) -> Result<Self, QmpError> {
        let stream = UnixStream::connect(socket).await.map_err(|error| QmpError::Connect {
            socket: socket.to_owned(),
            reason: error.to_string(),
        })?;
        let (read, mut write) = stream.into_split();
        let mut lines = BufReader::new(read);
        let greeting = next(&mut lines).await.map_err(|reason| QmpError::Lost { reason })?;
        if !matches!(greeting, Message::Greeting { .. }) {
            let reason = "the other end does not speak qmp".to_owned();
            return Err(QmpError::Lost { reason });
        }
        let hello = "{\"execute\":\"qmp_capabilities\"}\n";
        let sent = write.write_all(hello.as_bytes()).await;
        sent.map_err(|error| QmpError::Lost { reason: error.to_string() })?;
        // No event comes before this is answered (qmp-spec, "Capabilities Negotiation").
        match next(&mut lines).await.map_err(|reason| QmpError::Lost { reason })? {
            Message::Return { .. } => Ok(Self { connection: Connection::start(lines, write) }),
            other => Err(QmpError::Lost { reason: format!("negotiation ended in {other:?}") }),
        }
    }

    /// Runs a command with [`COMMAND_TIMEOUT`] and gives its answer.
    ///
    /// # Errors
    /// All of [`QmpError`] but those of connecting.
    pub async fn execute(&self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        self.execute_within(command, arguments, COMMAND_TIMEOUT).await
    }

    /// Runs a command and gives its answer; `arguments` is an object, or null for none.
    ///
    /// After a time-out QEMU may still carry the command out; only its answer is dropped.
    ///
    /// # Errors
    /// All of [`QmpError`] but those of connecting.
    pub async fn execute_within(
        &self,
        command: &str,
        arguments: Value,
        patience: Duration,
    ) -> Result<Value, QmpError> {
        let (id, answer) = self.connection.expect_answer()?;
        let mut message = json!({"execute": command, "id": id.0});
        if !arguments.is_null() {
            message["arguments"] = arguments;
        }
        let line = format!("{message}\n").into_bytes();
        let answered = timeout(patience, async {
            let sent = self.connection.lines.send(line).await;
            sent.map_err(|_| self.connection.why_lost())?;
            answer.await.map_err(|_| self.connection.why_lost())
        })
        .await;
        drop(id);
        let seconds = patience.as_secs();
        match answered {
            Err(_) => Err(QmpError::Timeout { command: command.to_owned(), seconds }),
            Ok(Err(lost)) => Err(lost),
            Ok(Ok(Ok(value))) => Ok(value),
            Ok(Ok(Err(Refusal { class, desc }))) => {
                Err(QmpError::Refused { command: command.to_owned(), class, description: desc })
            }
        }
    }

    /// Listens to the events from now on: call this before the command whose events matter.
    #[must_use]
    pub fn events(&self) -> Events {
        Events::new(self.connection.clone())
    }

    /// Whether the connection has ended.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        matches!(*self.connection.state(), State::Lost(_))
    }
}

/// What the two tasks of a connection and its users share.
#[derive(Debug)]
pub(super) struct Connection {
    lines: mpsc::Sender<Vec<u8>>,
    state: Arc<Mutex<State>>,
    reader: AbortHandle,
}

#[derive(Debug)]
enum State {
    Open { next_id: u64, waiting: Waiting, events: broadcast::Sender<Event> },
    Lost(String),
}

type Waiting = HashMap<u64, oneshot::Sender<Answer>>;
type Answer = Result<Value, Refusal>;

/// A place among the commands in flight, given back when dropped.
struct Place<'a>(u64, &'a Connection);

impl Connection {
    fn start(lines: BufReader<OwnedReadHalf>, write: OwnedWriteHalf) -> Arc<Self> {
        let (sender, queue) = mpsc::channel(IN_FLIGHT_MAX);
        let (events, _) = broadcast::channel(EVENTS_KEPT);
        let open = State::Open { next_id: 0, waiting: HashMap::new(), events };
        let state = Arc::new(Mutex::new(open));
        // Writing has a task of its own, so that a caller who goes away in the middle of a line
        // does not leave half of it on the wire. It ends when the last `Qmp` does.
        tokio::spawn(write_lines(write, queue, state.clone()));
        let reader = tokio::spawn(read_messages(lines, state.clone())).abort_handle();
        Arc::new(Self { lines: sender, state, reader })
    }

    fn expect_answer(&self) -> Result<(Place<'_>, oneshot::Receiver<Answer>), QmpError> {
        match &mut *self.state() {
            State::Open { waiting, .. } if waiting.len() >= IN_FLIGHT_MAX => Err(QmpError::Busy),
            State::Open { next_id, waiting, .. } => {
                let (sender, receiver) = oneshot::channel();
                let id = *next_id;
                *next_id += 1;
                waiting.insert(id, sender);
                Ok((Place(id, self), receiver))
            }
            State::Lost(reason) => Err(QmpError::Lost { reason: reason.clone() }),
        }
    }

    /// A receiver of the events to come; one that is closed already when the connection is lost.
    pub(super) fn listen(&self) -> broadcast::Receiver<Event> {
        match &*self.state() {
            State::Open { events, .. } => events.subscribe(),
            State::Lost(_) => broadcast::channel(1).1,
        }
    }

    pub(super) fn why_lost(&self) -> QmpError {
        let reason = match &*self.state() {
            State::Open { .. } => "closed".to_owned(),
            State::Lost(reason) => reason.clone(),
        };
        QmpError::Lost { reason }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        if let State::Open { waiting, .. } = &mut *self.1.state() {
            waiting.remove(&self.0);
        }
    }
}

async fn write_lines(
    mut write: OwnedWriteHalf,
    mut queue: mpsc::Receiver<Vec<u8>>,
    state: Arc<Mutex<State>>,
) {
    while let Some(line) = queue.recv().await {
        if let Err(error) = write.write_all(&line).await {
            return lose(&state, error.to_string());
        }
    }
}

async fn read_messages(mut lines: BufReader<OwnedReadHalf>, state: Arc<Mutex<State>>) {
    loop {
        let message = match next(&mut lines).await {
            Ok(message) => message,
            Err(reason) => return lose(&state, reason),
        };
        let mut state = lock(&state);
        let State::Open { waiting, events, .. } = &mut *state else { return };
        match message {
            Message::Event(event) => drop(events.send(event)),
            Message::Return { id: Some(id), value } => answer(waiting, id, Ok(value)),
            Message::Error { id: Some(id), error } => answer(waiting, id, Err(error)),
            Message::Error { id: None, error } => {
                // QEMU could not read what we sent; whose answer is missing cannot be told.
                log::warn!("qemu could not read a command: {} ({})", error.desc, error.class);
            }
            Message::Return { id: None, .. } | Message::Greeting { .. } => {}
        }
    }
}

/// Hands an answer to whoever still waits for it.
fn answer(waiting: &mut Waiting, id: u64, answer: Answer) {
    if let Some(caller) = waiting.remove(&id) {
        drop(caller.send(answer));
    }
}

/// Ends the connection for everybody: dropping the senders wakes callers and listeners.
fn lose(state: &Mutex<State>, reason: String) {
    let mut state = lock(state);
    if let State::Open { .. } = *state {
        *state = State::Lost(reason);
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A line from QEMU.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Message {
    Event(Event),
    Return {
        #[serde(rename = "return")]
        value: Value,
        id: Option<u64>,
    },
    Error {
        error: Refusal,
        id: Option<u64>,
    },
    Greeting {
        #[serde(rename = "QMP")]
        _greeting: Value,
    },
}

#[derive(Debug, Deserialize)]
struct Refusal {
    class: String,
    desc: String,
}

/// The next message; the error says why there is none.
async fn next(lines: &mut (impl AsyncBufRead + Unpin)) -> Result<Message, String> {
    let mut line = Vec::new();
    let read = lines.take(LINE_BYTES_MAX).read_until(b'\n', &mut line).await;
    match read {
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {
            Err("qemu ended".to_owned())
        }
        Err(error) => Err(error.to_string()),
        Ok(0) => Err("qemu ended".to_owned()),
        Ok(_) if !line.ends_with(b"\n") => Err("a line was cut off or too long".to_owned()),
        Ok(_) => serde_json::from_slice(&line).map_err(|error| format!("not a message: {error}")),
    }
}

#[cfg(test)]
mod tests;
