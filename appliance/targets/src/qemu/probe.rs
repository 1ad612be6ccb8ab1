//! Whether a machine answers.
//!
//! A recovered server counts as back when it shows a sign of life that the operator named: a text
//! on its serial console, or a TCP service. [`wait`] returns at the first sign, at the deadline, or
//! as soon as the machine is dead, whichever comes first.
//!
//! It refuses to judge what the sign is worth. Mind that a port forwarded by QEMU's user network
//! accepts connections before the guest does: there, expect something the service says.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep, timeout};

use super::run::{Machine, RunError, Status};

mod tail;

pub use self::tail::SerialTail;

/// The longest text looked for, in bytes.
pub const TEXT_BYTES_MAX: usize = 1024;

/// The most a service may say before what is expected, in bytes.
const TCP_BYTES_MAX: usize = 16 << 10;

/// How often the serial log is looked at and a service is tried: a fraction of what a person
/// notices, and no load on a machine that boots for half a minute.
const EVERY: Duration = Duration::from_millis(100);

/// How long one try of a service may take. Before the guest is up nothing answers at all.
const TRY_PATIENCE: Duration = Duration::from_secs(3);

/// A sign of life.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Sign {
    /// This text appears on the serial console.
    Serial(String),
    /// A TCP service answers.
    Tcp {
        /// `host:port`.
        address: String,
        /// What to send once connected.
        #[serde(default)]
        send: Option<String>,
        /// What has to be in the answer; without it, that the connection opens is enough.
        #[serde(default)]
        expect: Option<String>,
    },
}

/// A sign that was seen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// Which of the signs, counted from 0.
    pub sign: usize,
    /// How long it took from the call.
    pub after: Duration,
    /// What matched: the line of the console as far as it was written then, or the service's
    /// address and words.
    pub matched: String,
}

/// Why no sign was seen.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// The operator: there is nothing to look for.
    #[error("no sign of life was named, or one that is empty or too long")]
    NoSign,
    /// The machine ended first.
    #[error("the machine ended before it answered: {0:?}")]
    Ended(Status),
    /// The time was up.
    #[error("no answer within {waited:?}; last on the console: {last_line:?}")]
    Deadline {
        /// How long was waited.
        waited: Duration,
        /// The last line on the serial console, for the operator.
        last_line: String,
    },
    /// The disk: the serial log cannot be read.
    #[error("read the serial log {}", .path.display())]
    Serial {
        /// The log.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Us: the machine cannot be watched.
    #[error(transparent)]
    Run(#[from] RunError),
}

impl fmt::Display for Sign {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Serial(text) => write!(formatter, "{text:?} on the serial console"),
            Self::Tcp { address, expect: None, .. } => write!(formatter, "connection to {address}"),
            Self::Tcp { address, expect: Some(text), .. } => {
                write!(formatter, "{text:?} from {address}")
            }
        }
    }
}

/// Waits for the first of `signs`, looking at the serial console from its beginning.
///
/// # Errors
/// [`ProbeError`].
pub async fn wait(
    machine: &Machine,
    signs: &[Sign],
    deadline: Duration,
) -> Result<Answer, ProbeError> {
    let begun = Instant::now();
    if signs.is_empty() || !signs.iter().all(Sign::is_sound) {
        return Err(ProbeError::NoSign);
    }
    let texts: Vec<_> = signs.iter().enumerate().filter_map(Sign::serial_text).collect();
    let mut tail = SerialTail::new(machine.serial_log());
    let seen = tokio::select! {
        biased;
        seen = watch_serial(&mut tail, &texts) => seen.map(Some)?,
        seen = try_services(signs) => Some(seen),
        ended = machine.ended() => {
            let ended = ended?;
            // What it said in its last moments counts.
            let last = tail.find(&texts).map_err(serial_error(tail.path()))?;
            Some(last.ok_or(ProbeError::Ended(ended))?)
        }
        () = sleep(deadline) => None,
    };
    let (sign, matched) = seen.ok_or_else(|| ProbeError::Deadline {
        waited: deadline,
        last_line: tail.last_line().to_owned(),
    })?;
    Ok(Answer { sign, after: begun.elapsed(), matched })
}

impl Sign {
    fn is_sound(&self) -> bool {
        let sound = |text: &str| (1..=TEXT_BYTES_MAX).contains(&text.len());
        match self {
            Self::Serial(text) => sound(text),
            Self::Tcp { address, send, expect } => {
                sound(address)
                    && send.as_deref().is_none_or(sound)
                    && expect.as_deref().is_none_or(sound)
            }
        }
    }

    fn serial_text((index, sign): (usize, &Self)) -> Option<(usize, &str)> {
        match sign {
            Self::Serial(text) => Some((index, text)),
            Self::Tcp { .. } => None,
        }
    }
}

async fn watch_serial(
    tail: &mut SerialTail,
    texts: &[(usize, &str)],
) -> Result<(usize, String), ProbeError> {
    loop {
        if let Some(found) = tail.find(texts).map_err(serial_error(tail.path()))? {
            return Ok(found);
        }
        sleep(EVERY).await;
    }
}

fn serial_error(path: &Path) -> impl FnOnce(io::Error) -> ProbeError {
    let path = path.to_owned();
    move |source| ProbeError::Serial { path, source }
}

/// Tries the services in turn until one answers; never returns when there is none.
async fn try_services(signs: &[Sign]) -> (usize, String) {
    loop {
        for (index, sign) in signs.iter().enumerate() {
            let Sign::Tcp { address, send, expect } = sign else { continue };
            let tried = try_service(address, send.as_deref(), expect.as_deref());
            if let Ok(Ok(words)) = timeout(TRY_PATIENCE, tried).await {
                return (index, words);
            }
        }
        sleep(EVERY).await;
    }
}

/// What the service said, up to and with what was expected.
async fn try_service(
    address: &str,
    send: Option<&str>,
    expect: Option<&str>,
) -> io::Result<String> {
    let mut stream = TcpStream::connect(address).await?;
    if let Some(text) = send {
        stream.write_all(text.as_bytes()).await?;
    }
    let Some(expect) = expect else { return Ok(format!("{address} accepts connections")) };
    let mut heard = Vec::new();
    let mut piece = [0; 1024];
    while heard.len() < TCP_BYTES_MAX {
        let count = stream.read(&mut piece).await?;
        if count == 0 {
            break;
        }
        heard.extend_from_slice(piece.get(..count).unwrap_or_default());
        let text = String::from_utf8_lossy(&heard);
        if let Some(line) = text.lines().find(|line| line.contains(expect)) {
            return Ok(format!("{address} says {line:?}"));
        }
    }
    Err(io::Error::other("said something else"))
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    /// A service that takes one connection, waits for a line if told to, says these pieces and
    /// hangs up.
    async fn service(hear_first: bool, pieces: &'static [&'static str]) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            if hear_first {
                stream.read_u8().await.unwrap();
            }
            for piece in pieces {
                stream.write_all(piece.as_bytes()).await.unwrap();
                stream.flush().await.unwrap();
                tokio::task::yield_now().await;
            }
        });
        address
    }

    #[tokio::test]
    async fn an_open_port_is_enough_when_nothing_is_expected() {
        let address = service(false, &[]).await;
        assert!(try_service(&address, None, None).await.unwrap().contains("accepts"));
    }

    #[tokio::test]
    async fn what_is_expected_may_come_in_pieces() {
        let address = service(true, &["HTTP/1.1 2", "00 OK\r\n"]).await;
        let heard = try_service(&address, Some("GET / HTTP/1.0\r\n\r\n"), Some("200 OK")).await;
        assert!(heard.unwrap().ends_with(r#"says "HTTP/1.1 200 OK""#));
    }

    #[tokio::test]
    async fn something_else_is_no_answer() {
        let address = service(false, &["go away\n"]).await;
        assert!(try_service(&address, None, Some("SSH-2.0")).await.is_err());
        assert!(try_service("127.0.0.1:1", None, None).await.is_err());
    }

    #[tokio::test]
    async fn a_service_that_never_stops_talking_is_no_answer() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            while stream.write_all(&[b'x'; 1024]).await.is_ok() {}
        });
        assert!(try_service(&address, None, Some("SSH")).await.is_err());
    }

    #[test]
    fn signs_without_a_text_are_unsound() {
        assert!(!Sign::Serial(String::new()).is_sound());
        assert!(!Sign::Serial("x".repeat(TEXT_BYTES_MAX + 1)).is_sound());
        let tcp = |expect: Option<&str>| Sign::Tcp {
            address: "h:1".to_owned(),
            send: None,
            expect: expect.map(str::to_owned),
        };
        assert!(tcp(None).is_sound() && !tcp(Some("")).is_sound());
    }
}
