//! Checkpoints of a group: made on time or on request, and what people note of them.
//!
//! The mark is in the log, the same at both nodes. Labels and pins lie beside it at each node: the
//! primary tells the secondary of its own, and the secondary alone decides what it deletes.

use std::time::Duration;

use srn_core::epoch::Position;
use srn_core::frame::MarkKind;
use srn_core::ids::CheckpointId;
use srn_core::limits::TEXT_MAX;
use srn_core::wire::{CheckpointNote, Message};
use srn_store::group::OwnedRecord;
use srn_store::manifest::{Note, Role};

use super::{Group, Side};
use crate::clock;
use crate::error::{Failure, Result};

impl Group {
    /// Makes a checkpoint, or asks the primary for one.
    ///
    /// # Errors
    /// When nothing can be appended, or the primary cannot be asked.
    pub async fn checkpoint(
        &self,
        kind: MarkKind,
        label: Option<String>,
        pin: bool,
    ) -> Result<(CheckpointId, Option<Position>)> {
        let id = CheckpointId(clock::random());
        let note = move |note: &mut Note| {
            note.label = label.unwrap_or_default();
            note.pinned = pin;
        };
        if self.role() == Role::Secondary {
            let session = match &*self.side() {
                Side::Incoming(incoming) => Some(incoming.session().clone()),
                _ => None,
            };
            let session = session.ok_or_else(|| {
                Failure::unreachable(format!(
                    "the production node of group {} is not connected, and only it can make a \
                     checkpoint",
                    self.name()
                ))
            })?;
            session.send(&Message::MarkRequest { group: self.id, id }).await?;
            self.change_note(id, note).await?;
            return Ok((id, None));
        }
        let position = self.append_mark(id, kind, false).await?;
        self.change_note(id, note).await?;
        self.facts().last_checkpoint = Some(clock::mono());
        Ok((id, Some(position)))
    }

    /// Appends a mark; durable when this returns.
    pub(super) async fn append_mark(
        &self,
        id: CheckpointId,
        kind: MarkKind,
        application: bool,
    ) -> Result<Position> {
        self.check_writable()?;
        if self.catalog().disks.is_empty() {
            return Err(Failure::refused(format!(
                "group {} has no disk; a checkpoint would hold nothing",
                self.name()
            )));
        }
        self.append_now(vec![OwnedRecord::Mark(id, kind, application)]).await
    }

    /// Changes what is noted of a checkpoint here; a primary tells its peer what that may know.
    ///
    /// # Errors
    /// When it cannot be written.
    pub async fn change_note(
        &self,
        id: CheckpointId,
        change: impl FnOnce(&mut Note) + Send + 'static,
    ) -> Result<()> {
        let store = self.store.clone();
        self.blocking(move || store.change_note(id, change)).await?;
        self.decide_anew();
        // If it is lost on the way, it is told again with the next session.
        let session = match &*self.side() {
            Side::Outgoing(outgoing) => Some(outgoing.session().clone()),
            _ => None,
        };
        if let (Some(session), Some(message)) =
            (session, self.note_message(id, &self.store.note(id)))
        {
            let _ = session.try_send(&message);
        }
        Ok(())
    }

    /// What a primary says to its peer of a note, if there is anything to say. That it was deleted
    /// here is nobody else's concern.
    pub(super) fn note_message(&self, id: CheckpointId, note: &Note) -> Option<Message> {
        let told = !note.label.is_empty() || note.pinned || note.unquiet;
        let label = if note.label.len() <= TEXT_MAX { note.label.clone() } else { String::new() };
        let (pin, unquiet) = (note.pinned, note.unquiet);
        told.then_some(Message::Note(CheckpointNote { group: self.id, id, label, pin, unquiet }))
    }

    /// The primary notes something of a checkpoint. It can add to what is kept here, and take nothing
    /// away: not a pin, not a label that was given here, and what was deleted here stays so.
    pub(super) async fn on_note(&self, note: CheckpointNote) {
        if self.role() != Role::Secondary {
            return;
        }
        let id = note.id;
        // It reaches terminals.
        let label = Some(note.label).filter(|label| !label.chars().any(char::is_control));
        let store = self.store.clone();
        let merge = move |mine: &mut Note| {
            if mine.label.is_empty() {
                mine.label = label.unwrap_or_default();
            }
            // A pin that was taken away here stays away.
            if !mine.deleted {
                mine.pinned |= note.pin && !mine.unpinned;
            }
            mine.unquiet |= note.unquiet;
        };
        if let Err(error) = self.blocking(move || store.change_note(id, merge)).await {
            log::warn!("group {}: keeping a checkpoint's note: {error}", self.name());
        }
    }

    pub(super) async fn periodic_checkpoint(&self) {
        let every = self.record().checkpoint_every_s;
        let due = {
            let facts = self.facts();
            every > 0
                && facts.last_checkpoint.is_none_or(|last| {
                    // A look comes once a second: rather half a second early than late.
                    let due = Duration::from_secs(every).saturating_sub(Duration::from_millis(500));
                    u128::from(clock::mono().since(last)) >= due.as_micros()
                })
        };
        if !due || self.check_writable().is_err() || !self.catalog().is_clean() {
            return;
        }
        if let Err(error) = self.checkpoint(MarkKind::Periodic, None, false).await {
            log::warn!("group {}: a periodic checkpoint failed: {error}", self.name());
            // The next one comes when it is due, not at once.
            self.facts().last_checkpoint = Some(clock::mono());
        }
    }
}
