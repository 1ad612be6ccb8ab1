//! The group's part in the session with its peer: that it is there, what is said in it, that it is
//! gone. What flows in it belongs to the side that this node is on.

use std::sync::Arc;

use srn_core::frame::MarkKind;
use srn_core::ids::{CheckpointId, NodeId};
use srn_core::state::Cause;
use srn_core::wire::{Message, RefuseCode};
use srn_link::Session;
use srn_store::group::OwnedRecord;
use srn_store::manifest::Role;

use super::{Group, Side};
use crate::error::Result;
use crate::fleet::Level;

impl Group {
    /// Pauses or resumes replication. Who resumes also says that there is a session with the peer,
    /// if there is one: a group that is paused may not know of it.
    ///
    /// # Errors
    /// When the setting cannot be written.
    pub async fn set_paused(self: &Arc<Self>, paused: bool) -> Result<()> {
        if paused {
            self.check_pausable()?;
        }
        self.change_settings(|record| record.paused = paused)?;
        if paused {
            if let Some(session) = self.session() {
                let text = "paused by an administrator".to_owned();
                let refuse = self.refuse(RefuseCode::Paused, text);
                let _ = session.send(&refuse).await;
            }
            self.end_stream();
        }
        let what = if paused { "paused" } else { "resumed" };
        self.context.event(Level::Info, Some(&self.name()), &format!("{what} by an administrator"));
        self.review();
        Ok(())
    }

    /// Replicates the group with another peer from now on: the one before is lost, or has a new key.
    ///
    /// # Errors
    /// While it is handed over; when the setting cannot be written.
    pub async fn set_peer(self: &Arc<Self>, peer: NodeId, name: &str) -> Result<()> {
        let _kept = self.keep()?;
        let _held = self.offers.clone().lock_owned().await;
        self.change_settings(|record| record.peer = Some(peer.to_string()))?;
        self.end_stream();
        self.forget_resync();
        *self.side() = Side::Apart;
        {
            let mut facts = self.facts();
            facts.offered = None;
            facts.no_primary = None;
        }
        let text = format!("replicated with peer {name} from now on");
        self.context.event(Level::Info, Some(&self.name()), &text);
        self.review();
        Ok(())
    }

    /// The session with the peer, if there is one.
    #[must_use]
    pub fn session(&self) -> Option<Session> {
        match &*self.side() {
            Side::Apart => None,
            Side::Outgoing(outgoing) => Some(outgoing.session().clone()),
            Side::Incoming(incoming) => Some(incoming.session().clone()),
        }
    }

    pub(super) fn refuse(&self, code: RefuseCode, text: String) -> Message {
        let epochs = (code == RefuseCode::Fenced).then(|| self.store.epochs());
        Message::Refuse(srn_core::wire::Refuse { group: self.id, code, text, epochs })
    }

    /// There is a session with the peer.
    pub async fn session_up(self: &Arc<Self>, session: &Session) {
        if self.settings().paused {
            return;
        }
        if self.role() == Role::Secondary {
            // It may have been refused before, and does not know that there is nothing in the way.
            let text = self.hindrance().unwrap_or_default();
            let _ = session.send(&Message::Hindrance { group: self.id, text }).await;
            return;
        }
        let for_good = self.fence().is_some_and(|fence| fence.cause == Cause::FailoverAtPeer);
        if for_good {
            return;
        }
        if let Err(error) = self.offer(session).await {
            log::debug!("group {}: offering: {error}", self.name());
        }
        self.review();
    }

    /// The peer said something about this group.
    pub async fn on_message(self: &Arc<Self>, session: &Session, message: Message) {
        match message {
            Message::Accept(accept) => {
                // Looking up a frame may take a while; acknowledgements must not wait for it.
                let (this, session) = (self.clone(), session.clone());
                tokio::spawn(async move { this.on_accept(&session, accept).await });
            }
            Message::Refuse(refuse) => self.on_refuse(session, refuse).await,
            Message::Ack { seq, .. } => self.on_ack(session, seq),
            Message::Credit { limit, .. } => self.on_credit(session, limit),
            Message::Progress(progress) => self.on_progress(session, progress),
            Message::Hindrance { text, .. } => self.on_hindrance(session, text).await,
            Message::Drain { .. } => {
                let (this, session) = (self.clone(), session.clone());
                tokio::spawn(async move { this.on_drain(&session).await });
            }
            Message::Drained { last, .. } => self.on_drained(session, last),
            Message::MarkRequest { id, .. } => {
                let this = self.clone();
                tokio::spawn(async move { this.on_mark_request(id).await });
            }
            Message::Note(note) => self.on_note(note).await,
            Message::Wanted(wanted) => self.on_wanted(session, wanted),
            Message::Integrity(said) => self.on_integrity(session, said),
            // The node deals with these.
            Message::Hello(_) | Message::Offer(_) | Message::Goodbye { .. } => {}
        }
    }

    async fn on_mark_request(&self, id: CheckpointId) {
        if self.check_writable().is_err() {
            return;
        }
        let mark = OwnedRecord::Mark(id, MarkKind::Manual, false);
        if let Err(error) = self.append_now(vec![mark]).await {
            log::warn!("group {}: a checkpoint asked for by the peer: {error}", self.name());
        }
    }

    /// The group is about to be deleted at this node. A primary hears of it, and does not make it
    /// anew in this session.
    pub async fn tell_deleted(&self) {
        if self.role() == Role::Secondary
            && let Some(session) = self.session()
        {
            let text = format!(
                "{} has deleted its replica of group {}; pause and resume the group here to \
                 replicate it anew",
                self.context.config().name,
                self.name()
            );
            let _ = session.send(&self.refuse(RefuseCode::Deleted, text)).await;
        }
    }

    /// The session with the peer is gone.
    pub fn session_down(&self, number: u64) {
        let same = self.session().is_some_and(|session| session.number() == number);
        if same {
            self.end_stream();
            *self.side() = Side::Apart;
            self.facts().no_primary = None;
            self.review();
        }
    }

    /// Ends whatever flows, keeping the session.
    pub(super) fn end_stream(&self) {
        match &mut *self.side() {
            Side::Apart => {}
            Side::Outgoing(outgoing) => outgoing.end(),
            Side::Incoming(incoming) => incoming.end(),
        }
    }
}
