//! What every part of a running node shares.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Sender, SyncSender, channel, sync_channel};

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
    events: Sender<Told>,
}

/// What the thread that writes events down is told.
#[derive(Debug)]
enum Told {
    Event(EventRecord),
    /// Whoever sent it waits until everything before is written.
    Asked(SyncSender<()>),
}

impl Context {
    /// Puts it together, and starts the thread that writes events down. `link` is the runtime in which the link's work is done, which yields to
    /// everything that a server waits for.
    ///
    /// # Errors
    /// When the system gives no thread.
    pub fn new(
        config: Config,
        fleet: Arc<dyn Fleet>,
        store: srn_store::group::Shared,
        link: tokio::runtime::Handle,
    ) -> std::io::Result<Self> {
        let (events, told) = channel();
        // Not kept open by this thread: who ends the node closes it.
        let memory = Arc::downgrade(&fleet);
        // Writing one down waits for the disk, which whoever has news may not.
        std::thread::Builder::new().name("events".into()).spawn(move || {
            for told in told {
                match told {
                    Told::Event(event) => {
                        let Some(memory) = memory.upgrade() else { return };
                        if let Err(error) = memory.add_event(&event) {
                            log::error!("recording an event: {error}");
                        }
                    }
                    Told::Asked(done) => {
                        let _ = done.send(());
                    }
                }
            }
        })?;
        Ok(Self { inner: Arc::new(Inner { config, fleet, store, link, events }) })
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
        // It ends with the last of these.
        let _ = self.inner.events.send(Told::Event(event));
    }

    /// Returns when every event until now is written down. Blocks.
    pub fn write_events(&self) {
        let (done, written) = sync_channel(1);
        if self.inner.events.send(Told::Asked(done)).is_ok() {
            let _ = written.recv();
        }
    }
}
