//! The end of a reign: this node takes the group over, or is told that its peer did.

use std::sync::{Arc, PoisonError};

use srn_core::epoch::Position;
use srn_core::ids::{EpochId, Seq};
use srn_core::state::Cause;
use srn_core::wire::RefuseCode;
use srn_store::group::Appender;
use srn_store::manifest::Fence;

use super::Group;
use super::engine::Engine;
use super::lag::Lag;
use super::watch::Watch;
use crate::clock;
use crate::error::{Failure, Result};
use crate::fleet::Level;

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

    /// Ends the reign of the old primary: this node goes on from frame `seq` in a new epoch.
    ///
    /// # Errors
    /// When the position is not kept, or the store fails.
    pub async fn take_over(self: &Arc<Self>, seq: Seq) -> Result<Position> {
        // From here on the old primary hears no more that it may go on.
        self.facts().taking_over = true;
        let result = self.take_over_from(seq).await;
        self.facts().taking_over = false;
        let head = result?;
        *self.lag() = Lag::default();
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

    async fn take_over_from(self: &Arc<Self>, seq: Seq) -> Result<Position> {
        self.end_stream();
        let this = self.clone();
        let epoch = EpochId(clock::random());
        let work = move || -> Result<Position> {
            let _ = this.engine().stop("the group is failing over");
            let result = this.store.fail_over(epoch, seq, clock::now());
            match result {
                Ok(appender) => {
                    let head = appender.head();
                    this.replace_engine(appender)?;
                    Ok(head)
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
        self.blocking(move || store.set_fence(Some(fence))).await?;
        self.changed.notify_waiters();
        self.review();
        Ok(())
    }
}
