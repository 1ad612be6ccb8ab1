//! A person asks for it: the whole content is compared, from what is there already if they say so.

use std::sync::Arc;

use srn_core::wire::{Message, RefuseCode};
use srn_store::manifest::Role;

use super::seed;
use crate::clock;
use crate::error::{Failure, Result};
use crate::fleet::{Level, ResyncRecord, SeedRecord};
use crate::group::Group;

impl Group {
    /// Has the replica compared with the production node's copy, as soon as that offers the group.
    /// What the seeds hold does not cross the link.
    ///
    /// # Errors
    /// At the primary; when a seed cannot be opened; when that cannot be written down.
    pub async fn ask_resync(self: &Arc<Self>, seeds: Vec<SeedRecord>) -> Result<()> {
        let name = self.name();
        if self.role() == Role::Primary {
            return Err(Failure::refused(format!(
                "this node is primary of group {name}; the replica is compared with it from the \
                 recovery node: there, srn group resync {name}"
            )));
        }
        seed::check(&seeds, self.context.link()).await?;
        let catalog = self.catalog();
        if !catalog.disks.is_empty() {
            // Said now rather than in an hour.
            super::Seeds::open(&seeds, &catalog, self.context.link()).await?;
        }
        let since = clock::wall().0;
        self.change_settings(|record| record.resync = Some(ResyncRecord { since, seeds }))?;
        self.tell(Level::Info, "an administrator asks for the replica to be compared");
        self.offer_me_again("the recovery node compares its replica").await;
        Ok(())
    }

    /// It is not to be compared after all.
    ///
    /// # Errors
    /// When nobody has asked for it; when that cannot be written down.
    pub async fn cancel_resync(self: &Arc<Self>) -> Result<()> {
        if self.settings().resync.is_none() {
            return Err(Failure::conflict(format!(
                "nobody has asked for group {} to be compared",
                self.name()
            )));
        }
        self.change_settings(|record| record.resync = None)?;
        self.end_stream();
        self.resync_at_rest().await;
        self.forget_resync();
        self.tell(Level::Info, "the comparison of the replica was cancelled by an administrator");
        self.offer_me_again("the comparison was cancelled").await;
        Ok(())
    }

    /// What was asked for is done.
    pub(in crate::group) fn resync_done(&self) {
        if self.settings().resync.is_some()
            && let Err(error) = self.change_settings(|record| record.resync = None)
        {
            log::error!("group {}: {}", self.name(), error.message);
        }
    }

    /// Ends what flows, and has the primary offer the group anew.
    async fn offer_me_again(&self, why: &str) {
        self.end_stream();
        let Some(session) = self.session() else { return };
        if self.settings().paused {
            return;
        }
        let _ = session.send(&self.refuse(RefuseCode::Storage, why.into())).await;
        let text = String::new();
        let _ = session.send(&Message::Hindrance { group: self.id, text }).await;
    }
}
