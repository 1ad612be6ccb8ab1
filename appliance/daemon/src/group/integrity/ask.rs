//! Asking the peer about what it holds.

use std::sync::Arc;
use std::time::Duration;

use srn_core::wire::{CannotCode, Integrity as Said, Message, Words};
use srn_link::Session;
use tokio::sync::oneshot;

use super::{Group, next_number};
use crate::error::{Failure, Kind, Result};

/// How long the peer may take for one answer. It may have to read a log segment first.
const PATIENCE: Duration = Duration::from_secs(120);

/// Times that a question is asked again which the peer has no time for.
const TRIES: u32 = 20;

/// How long it is waited before that.
const PAUSE: Duration = Duration::from_millis(500);

/// Why there is no answer.
#[derive(Debug)]
pub(super) enum Unanswered {
    /// The position is not in the peer's history.
    NotInHistory(String),
    /// The peer keeps no copy.
    NoCopy,
    /// Anything else.
    Failed(Failure),
}

impl From<Failure> for Unanswered {
    fn from(failure: Failure) -> Self {
        Self::Failed(failure)
    }
}

/// Forgets a question when who asked is gone.
struct Waiting<'a> {
    group: &'a Group,
    number: u64,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.group.integrity.waiting().remove(&self.number);
    }
}

impl Group {
    /// The session in which the peer can be asked.
    ///
    /// # Errors
    /// When there is none, with the way out.
    pub(super) fn session_to_ask(&self) -> Result<Session> {
        let name = self.name();
        if !self.record_has_peer() {
            return Err(Failure::refused(format!("group {name} has no peer to compare with")));
        }
        self.session().filter(|session| !session.is_over()).ok_or_else(|| {
            Failure::unreachable(format!(
                "the peer of group {name} is not connected, or the group is paused; srn status \
                 says why"
            ))
        })
    }

    /// Asks the peer something and waits for the answer.
    pub(super) async fn ask_peer(&self, words: &Words) -> std::result::Result<Words, Unanswered> {
        for _ in 1..TRIES {
            match self.ask_once(words).await? {
                Words::Cannot { code: CannotCode::Busy, .. } => tokio::time::sleep(PAUSE).await,
                answer => return judged(answer),
            }
        }
        match self.ask_once(words).await? {
            Words::Cannot { code: CannotCode::Busy, text } => {
                Err(Failure::refused(format!("the peer has no time for it: {text}")).into())
            }
            answer => judged(answer),
        }
    }

    async fn ask_once(&self, words: &Words) -> Result<Words> {
        let session = self.session_to_ask()?;
        let number = next_number();
        let (answer, told) = oneshot::channel();
        self.integrity.waiting().insert(number, answer);
        let _waiting = Waiting { group: self, number };
        let said = Said { group: self.id, number, words: words.clone() };
        session.send(&Message::Integrity(said)).await?;
        let gone = async {
            while !session.is_over() {
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
        };
        let lost = || {
            Failure::unreachable(format!(
                "the connection with {} was lost; try it again",
                session.hello().name
            ))
        };
        tokio::select! {
            answer = told => answer.map_err(|_| lost()),
            () = gone => Err(lost()),
            () = tokio::time::sleep(PATIENCE) => Err(Failure::unreachable(format!(
                "{} does not answer", session.hello().name
            ))),
        }
    }

    /// Tells the people at the other node something, if it is connected.
    pub(super) fn tell_peer(self: &Arc<Self>, alert: bool, text: String) {
        let Some(session) = self.session() else { return };
        let said = Said { group: self.id, number: 0, words: Words::Report { alert, text } };
        tokio::spawn(async move { session.send(&Message::Integrity(said)).await });
    }
}

fn judged(answer: Words) -> std::result::Result<Words, Unanswered> {
    match answer {
        Words::Cannot { code: CannotCode::NotInHistory, text } => {
            Err(Unanswered::NotInHistory(text))
        }
        Words::Cannot { code: CannotCode::NoCopy, .. } => Err(Unanswered::NoCopy),
        Words::Cannot { text, .. } => {
            let text = format!("the peer cannot answer: {text}");
            Err(Failure::new(Kind::Storage, text).into())
        }
        answer => Ok(answer),
    }
}
