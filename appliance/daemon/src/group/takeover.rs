//! The end of a reign: this node takes the group over, or is told that its peer did.

use std::sync::{Arc, PoisonError};

use srn_core::epoch::Position;
use srn_core::ids::Seq;
use srn_core::state::Cause;
use srn_core::wire::RefuseCode;
use srn_store::StoreError;
use srn_store::group::Appender;
use srn_store::manifest::{Fence, Role};
use tokio::sync::OwnedMutexGuard;

use super::Group;
use super::engine::Engine;
use super::lag::Lag;
use super::watch::Watch;
use crate::clock;
use crate::error::{Failure, Kind, Result};
use crate::fleet::Level;

/// No offer of the peer is judged while this is there.
#[derive(Debug)]
pub struct NoOffers(OwnedMutexGuard<()>);

/// What clients of a fenced group are told.
pub(super) const FENCED: &str = "fenced: the recovery node has taken over this group";

impl Group {
    /// Replaces the engine: the main line goes on in another appender.
    pub(super) fn replace_engine(self: &Arc<Self>, appender: Appender) -> Result<()> {
        let watcher = Box::new(Watch { group: Arc::new(Arc::downgrade(self).into()) });
        let engine = Engine::start(&self.name(), appender, watcher)
            .map_err(|error| Failure::internal(format!("starting a thread: {error}")))?;
        *self.engine.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(engine);
        // The new one has met no full log yet.
        let mut facts = self.facts();
        facts.full = None;
        facts.stalled = None;
        Ok(())
    }

    /// From here on the old primary hears no more that it may go on, until what is returned is
    /// dropped: its offers wait.
    pub async fn hold_offers(&self) -> NoOffers {
        NoOffers(self.offers.clone().lock_owned().await)
    }

    /// Ends the reign of the old primary: this node goes on from frame `seq` in a new epoch.
    ///
    /// # Errors
    /// When the position is not kept, or the store fails.
    pub async fn take_over(self: &Arc<Self>, held: &NoOffers, seq: Seq) -> Result<Position> {
        debug_assert!(Arc::ptr_eq(&self.offers, OwnedMutexGuard::mutex(&held.0)));
        let head = self.take_over_from(seq).await?;
        self.forget_synchronous();
        *self.lag() = Lag::default();
        self.forget_sources();
        let name = self.name();
        self.context.event(
            Level::Warning,
            Some(&name),
            &format!("failed over: this node is primary from frame {} on", head.seq),
        );
        // The old primary hears of it at once if it is there, else when it comes back.
        if let Some(session) = self.session() {
            let text = format!("{} is primary of group {name} now", self.context.config().name);
            let _ = session.send(&self.refuse(RefuseCode::Fenced, text)).await;
        }
        self.review();
        Ok(head)
    }

    pub(super) async fn take_over_from(self: &Arc<Self>, seq: Seq) -> Result<Position> {
        self.end_stream();
        let this = self.clone();
        let epoch = self.store.next_epoch(clock::random());
        let work = move || -> Result<Position> {
            let _ = this.engine().stop("the group is failing over");
            let result = this.store.fail_over(epoch, seq, clock::now());
            match result {
                Ok(appender) => {
                    let head = appender.head();
                    this.replace_engine(appender)?;
                    Ok(head)
                }
                Err(error) if this.role() == Role::Primary => {
                    // The fork is there, and only its first frame is not.
                    let text = format!(
                        "this node has taken over, but cannot write: {error}; mend that and \
                         restart the daemon"
                    );
                    this.facts().failure = Some((Cause::DiskFailed, text.clone()));
                    Err(Failure::new(Kind::Storage, text))
                }
                Err(error @ (StoreError::Io { .. } | StoreError::Stopped(_))) => {
                    // What the medium holds now is known at the next start, and not before.
                    let text = format!(
                        "the failover broke in the middle: {error}; mend that and restart the \
                         daemon, which then knows whether this node is primary"
                    );
                    let mut facts = this.facts();
                    facts.failure = Some((Cause::DiskFailed, text.clone()));
                    facts.fork_uncertain = true;
                    Err(Failure::new(Kind::Storage, text))
                }
                Err(error) => {
                    // Go on as before: the main line is what it was.
                    this.reopen_engine()?;
                    Err(error.into())
                }
            }
        };
        tokio::task::spawn_blocking(work)
            .await
            .map_err(|error| Failure::internal(format!("a task ended: {error}")))?
    }

    pub(super) fn reopen_engine(self: &Arc<Self>) -> Result<()> {
        let appender = self.store.appender(clock::now())?;
        self.replace_engine(appender)
    }

    /// Fences this primary, durably.
    pub(super) async fn fence_off(self: &Arc<Self>, fence: Fence) -> Result<()> {
        let why = match fence.cause {
            Cause::Handover => "drained for a planned failover",
            _ => FENCED,
        };
        let _held = self.fencing.lock().await;
        self.engine().close(why);
        let store = self.store.clone();
        let written = self.blocking(move || store.set_fence(Some(fence))).await;
        if self.store.is_closed() {
            // Deleted meanwhile: nothing is left that a fence could be for.
            return Ok(());
        }
        written?;
        self.changed.notify_waiters();
        self.review();
        Ok(())
    }
}
