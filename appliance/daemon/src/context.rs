//! What every part of a running node shares.

use std::path::PathBuf;
use std::sync::Arc;

use crate::clock;
use crate::config::Config;
use crate::fleet::{EventRecord, Fleet, Level};

/// The node's shared things.
#[derive(Debug, Clone)]
pub struct Context {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    config: Config,
    fleet: Arc<dyn Fleet>,
    store: srn_store::group::Shared,
    link: tokio::runtime::Handle,
}

impl Context {
    /// Puts it together. `link` is the runtime in which the link's work is done, which yields to
    /// everything that a server waits for.
    #[must_use]
    pub fn new(
        config: Config,
        fleet: Arc<dyn Fleet>,
        store: srn_store::group::Shared,
        link: tokio::runtime::Handle,
    ) -> Self {
        Self { inner: Arc::new(Inner { config, fleet, store, link }) }
    }

    /// The configuration.
    #[must_use]
    pub fn config(&self) -> &Config {
        &self.inner.config
    }

    /// The node's memory.
    #[must_use]
    pub fn fleet(&self) -> &dyn Fleet {
        &*self.inner.fleet
    }

    /// What the groups' stores share.
    #[must_use]
    pub fn store(&self) -> &srn_store::group::Shared {
        &self.inner.store
    }

    /// The runtime of the link.
    #[must_use]
    pub fn link(&self) -> &tokio::runtime::Handle {
        &self.inner.link
    }

    /// Where a group's history lies.
    #[must_use]
    pub fn group_dir(&self, id: &str) -> PathBuf {
        self.inner.config.state_dir.join("groups").join(id)
    }

    /// Records that something happened, in the log and in the node's memory.
    pub fn event(&self, level: Level, group: Option<&str>, text: &str) {
        let about = group.map(|group| format!("group {group}: ")).unwrap_or_default();
        match level {
            Level::Info => log::info!("{about}{text}"),
            Level::Warning | Level::Alert => log::warn!("{about}{text}"),
        }
        let event = EventRecord {
            at: clock::wall().0,
            level,
            group: group.map(str::to_owned),
            text: text.to_owned(),
        };
        if let Err(error) = self.fleet().add_event(&event) {
            log::error!("recording an event: {error}");
        }
    }
}
