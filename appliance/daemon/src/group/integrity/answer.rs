//! Answering the peer's questions about what is held here.
//!
//! A peer asks about its own groups only, a few questions at a time, and each answer reads a
//! bounded number of bytes. Between questions the position asked about is held, for a while.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use srn_core::epoch::Position;
use srn_core::extent::Extent;
use srn_core::ids::{DiskNo, EpochId, Seq};
use srn_core::time::Mono;
use srn_core::wire::{CannotCode, HashRange, Integrity as Said, Message, Words};
use srn_link::Session;
use srn_store::StoreError;
use srn_store::group::{Group as Store, View, content_hash};
use srn_store::manifest::Keep;

use super::{Group, idle, to_runs};
use crate::clock;
use crate::error::Result;
use crate::fleet::Level;

/// A position that nobody has asked about for this long is let go of, in microseconds.
const STALE_US: u64 = 60_000_000;

/// Questions that are answered or wait for it at once.
const ANSWERING_MAX: u64 = 4;

/// Content read for one answer, in bytes.
pub(super) const READ_MAX: u64 = 16 << 20;

/// Reports of the peer that are written down in a minute.
const REPORTS_MAX: u32 = 20;

/// A position that the peer asks about.
#[derive(Debug)]
pub(super) struct Held {
    view: Arc<View>,
    used: Mono,
}

impl Held {
    pub(super) fn is_stale(&self, now: Mono) -> bool {
        now.since(self.used) > STALE_US
    }
}

/// Counts a question while it is answered.
struct Answering<'a>(&'a Group);

impl Drop for Answering<'_> {
    fn drop(&mut self) {
        self.0.integrity.answering.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Group {
    /// The peer asks, answers or tells something about the content of this group.
    pub(in crate::group) fn on_integrity(self: &Arc<Self>, session: &Session, said: Said) {
        match said.words {
            question @ (Words::HashesWanted { .. }
            | Words::ContentWanted { .. }
            | Words::FrameWanted { .. }) => {
                let (this, session) = (self.clone(), session.clone());
                tokio::spawn(async move {
                    let words = this.answer_question(question).await;
                    let answer = Said { group: this.id, number: said.number, words };
                    let _ = session.send(&Message::Integrity(answer)).await;
                });
            }
            Words::Enough => drop(self.integrity.held().take()),
            Words::Report { alert, text } => self.on_report(session, alert, &text),
            answer @ (Words::Hashes(_)
            | Words::Content { .. }
            | Words::Frame(_)
            | Words::Cannot { .. }) => {
                // Whoever asked may have given up.
                if let Some(waiting) = self.integrity.waiting().remove(&said.number) {
                    let _ = waiting.send(answer);
                }
            }
        }
    }

    fn on_report(&self, session: &Session, alert: bool, text: &str) {
        let now = clock::mono();
        {
            let mut reports =
                self.integrity.reports.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            if now.since(reports.1) > 60_000_000 {
                *reports = (0, now);
            }
            reports.0 += 1;
            if reports.0 > REPORTS_MAX {
                return;
            }
        }
        let level = if alert { Level::Alert } else { Level::Info };
        self.tell(level, &format!("{} says: {text}", session.hello().name));
    }

    async fn answer_question(self: &Arc<Self>, question: Words) -> Words {
        if self.integrity.answering.fetch_add(1, Ordering::Relaxed) >= ANSWERING_MAX {
            self.integrity.answering.fetch_sub(1, Ordering::Relaxed);
            return cannot(CannotCode::Busy, "too many questions at once");
        }
        let _answering = Answering(self);
        let about_log = matches!(question, Words::FrameWanted { .. });
        if self.store.keep() == Keep::Cache && !about_log {
            return cannot(CannotCode::NoCopy, "a local cache holds no copy of the disks");
        }
        if self.log_needs_room() {
            return cannot(CannotCode::Busy, "the log needs its room; ask again later");
        }
        let answered = match question {
            Words::HashesWanted { at, range } => self.hashes(at, range).await,
            Words::ContentWanted { at, disk, extent } => self.content(at, disk, extent).await,
            Words::FrameWanted { epoch, seq } => self.frame(epoch, seq).await,
            _ => return cannot(CannotCode::Failed, "that is no question"),
        };
        match answered {
            Ok(Ok(words)) => words,
            Ok(Err(error)) => {
                let code = match error {
                    StoreError::NotInHistory(_) => CannotCode::NotInHistory,
                    _ => CannotCode::Failed,
                };
                cannot(code, &error.to_string())
            }
            Err(failure) => cannot(CannotCode::Busy, &failure.message),
        }
    }

    async fn hashes(
        self: &Arc<Self>,
        at: Position,
        range: HashRange,
    ) -> Result<srn_store::Result<Words>> {
        let held = self.held_view(at);
        let (store, this) = (self.store.clone(), self.clone());
        idle::run(move || {
            let view = open(held, &store, at)?;
            this.hold(&view);
            let count = u64::from(range.count);
            let grain = range.grain.sectors();
            let hashes = view.hashes(range.disk, grain, range.first, count, READ_MAX)?;
            Ok(Words::Hashes(to_runs(&hashes)))
        })
        .await
    }

    async fn content(
        self: &Arc<Self>,
        at: Position,
        disk: DiskNo,
        extent: Extent,
    ) -> Result<srn_store::Result<Words>> {
        let held = self.held_view(at);
        let (store, this) = (self.store.clone(), self.clone());
        idle::run(move || {
            let view = open(held, &store, at)?;
            this.hold(&view);
            if view.catalog().disks.get(&disk).is_none_or(|disk| !extent.fits(disk.sectors)) {
                return Err(StoreError::Invalid(format!("disk {disk} ends before that")));
            }
            let mut bytes = vec![0; usize::try_from(extent.bytes()).unwrap_or(0)];
            view.read(disk, extent, &mut bytes)?;
            Ok(Words::Content { hash: content_hash(&bytes), bytes })
        })
        .await
    }

    async fn frame(self: &Arc<Self>, epoch: EpochId, seq: Seq) -> Result<srn_store::Result<Words>> {
        let store = self.store.clone();
        idle::run(move || {
            let gone = || StoreError::NotInHistory(format!("frame {seq} is not in the log"));
            let frame = store.cursor(seq).next()?.ok_or_else(gone)?;
            if frame.header().epoch != epoch {
                return Err(gone());
            }
            Ok(Words::Frame(frame.to_wire()))
        })
        .await
    }

    /// What is held, if it is this position.
    fn held_view(&self, at: Position) -> Option<Arc<View>> {
        let held = self.integrity.held();
        held.as_ref().map(|held| held.view.clone()).filter(|view| view.catalog().at == at)
    }

    fn hold(&self, view: &Arc<View>) {
        *self.integrity.held() = Some(Held { view: view.clone(), used: clock::mono() });
    }
}

/// The view at exactly this position: of this frame, with this hash.
fn open(held: Option<Arc<View>>, store: &Arc<Store>, at: Position) -> srn_store::Result<Arc<View>> {
    if let Some(held) = held {
        return Ok(held);
    }
    let view = store.view_at(at.seq)?;
    if view.catalog().at != at {
        return Err(StoreError::NotInHistory(format!(
            "frame {} is another one here: the two histories differ",
            at.seq
        )));
    }
    Ok(Arc::new(view))
}

fn cannot(code: CannotCode, text: &str) -> Words {
    Words::Cannot { code, text: text.into() }
}
