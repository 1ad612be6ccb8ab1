//! The node's exports, by name:
//!
//! * `GROUP/DISK`: a disk of a group of which this node is primary, for its server or its mirror;
//! * `recovery/ID/DISK`: a disk of a recovered server, for the machine that runs it;
//! * `export/ID`: a disk at one point in time, read-only, for as long as somebody asked for it.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use srn_core::limits::SECTOR;
use srn_core::state::Content;
use srn_nbd::proto::{ExportInfo, ExportSummary, OpenError};
use srn_nbd::server::{Backend, ClientInfo, Export};
use srn_store::group::View;
use srn_store::manifest::Keep;

use super::Node;
use crate::error::{Failure, Kind};
use crate::fleet::Source;
use crate::group::engine::Engine;
use crate::group::{DiskExport, Group, ReadOnlyExport};

/// Finds exports.
#[derive(Debug, Default)]
pub struct Exports {
    node: OnceLock<Weak<Node>>,
    extra: Mutex<BTreeMap<String, Extra>>,
}

/// An export that is there for a while.
#[derive(Debug, Clone)]
pub enum Extra {
    /// A disk of a recovered server.
    Recovery {
        /// The group.
        group: Arc<Group>,
        /// The engine of the line that the server writes to.
        engine: Arc<Engine>,
        /// What it reads.
        view: Arc<View>,
        /// The disk.
        disk: srn_core::ids::DiskNo,
        /// Its size in bytes.
        size: u64,
        /// For people.
        description: String,
    },
    /// A disk at one point in time.
    Point {
        /// The point.
        view: Arc<View>,
        /// The disk.
        disk: srn_core::ids::DiskNo,
        /// Its size in bytes.
        size: u64,
        /// For people.
        description: String,
    },
}

impl Extra {
    const fn size(&self) -> u64 {
        match self {
            Self::Recovery { size, .. } | Self::Point { size, .. } => *size,
        }
    }

    fn info(&self) -> ExportInfo {
        match self {
            Self::Recovery { size, description, .. } => {
                DiskExport::describe(*size, true, description.clone())
            }
            Self::Point { size, description, .. } => {
                ExportInfo { description: description.clone(), ..ExportInfo::read_only(*size) }
            }
        }
    }
}

impl Exports {
    pub(super) fn set_node(&self, node: &Arc<Node>) {
        // Set once, at the start.
        let _ = self.node.set(Arc::downgrade(node));
    }

    fn node(&self) -> Option<Arc<Node>> {
        self.node.get().and_then(Weak::upgrade)
    }

    fn extras(&self) -> MutexGuard<'_, BTreeMap<String, Extra>> {
        self.extra.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Serves something under `name` until it is withdrawn.
    pub fn publish(&self, name: String, extra: Extra) {
        self.extras().insert(name, extra);
    }

    /// Serves it no more; connections that have it open keep it. Returns whether it was there.
    pub fn withdraw(&self, name: &str) -> bool {
        self.extras().remove(name).is_some()
    }

    /// The names of exports that begin with `prefix`.
    #[must_use]
    pub fn names(&self, prefix: &str) -> Vec<(String, u64)> {
        let extras = self.extras();
        extras
            .iter()
            .filter(|(name, _)| name.starts_with(prefix))
            .map(|(name, extra)| (name.clone(), extra.size()))
            .collect()
    }

    /// The disk of a group that `name` means.
    fn group_disk(&self, name: &str) -> Option<(Arc<Group>, srn_core::ids::DiskNo, u64, Source)> {
        let node = self.node()?;
        let (group, disk) = name.split_once('/')?;
        let group = node.groups().into_iter().find(|found| found.name() == group)?;
        let (no, found) = group.disk(disk).ok()?;
        let sources = group.settings().sources;
        let source = sources.into_iter().find(|source| source.disk == no.0)?.source;
        Some((group, no, found.sectors * SECTOR, source))
    }
}

impl Backend for Exports {
    fn list(&self, _client: &ClientInfo) -> Vec<ExportSummary> {
        let summary = |name: String, description: String| ExportSummary { name, description };
        let mut all = Vec::new();
        if let Some(node) = self.node() {
            for group in node.groups() {
                let name = group.name();
                for source in group.settings().sources {
                    if let Source::Pull { .. } = source.source {
                        continue;
                    }
                    let catalog = group.catalog();
                    let no = srn_core::ids::DiskNo(source.disk);
                    if let Some(disk) = catalog.disks.get(&no) {
                        all.push(summary(
                            format!("{name}/{}", disk.name),
                            format!("disk {} of group {name}", disk.name),
                        ));
                    }
                }
            }
        }
        let extras = self.extras();
        all.extend(
            extras.iter().map(|(name, extra)| summary(name.clone(), extra.info().description)),
        );
        all
    }

    fn describe(&self, name: &str, _client: &ClientInfo) -> Result<ExportInfo, OpenError> {
        if let Some(extra) = self.extras().get(name) {
            return Ok(extra.info());
        }
        let (group, _, size, _) = self.group_disk(name).ok_or(OpenError::NotFound)?;
        let readable = group.store().keep() == Keep::Replica;
        Ok(DiskExport::describe(size, readable, format!("disk {name}")))
    }

    async fn open(&self, name: &str, client: &ClientInfo) -> Result<Arc<dyn Export>, OpenError> {
        let extra = self.extras().get(name).cloned();
        match extra {
            Some(Extra::Point { view, disk, size, description }) => {
                Ok(Arc::new(ReadOnlyExport::new(view, disk, size, description)))
            }
            Some(Extra::Recovery { group, engine, view, disk, size, description }) => {
                let slot = group.slots.take(name, client)?;
                engine.settled().await;
                let view = Some(view);
                Ok(Arc::new(DiskExport::new(engine, view, disk, size, description, slot)))
            }
            None => self.open_disk(name, client).await,
        }
    }
}

impl Exports {
    async fn open_disk(
        &self,
        name: &str,
        client: &ClientInfo,
    ) -> Result<Arc<dyn Export>, OpenError> {
        let (group, disk, size, source) = self.group_disk(name).ok_or(OpenError::NotFound)?;
        let unavailable = |error: Failure| match error.kind {
            // Clients that show no text should at least not say that there is no such export.
            Kind::Refused => OpenError::Policy(error.message),
            _ => OpenError::Unavailable(error.message),
        };
        group.check_writable().map_err(unavailable)?;
        if let Source::Pull { uri, .. } = &source {
            return Err(OpenError::Policy(format!(
                "disk {name} is pulled from {uri}: nobody writes it here; to read it, export a point \
                 of it (srn export)"
            )));
        }
        let filling = matches!(source, Source::Served)
            && group.catalog().disks.get(&disk).is_some_and(|disk| disk.content != Content::Clean);
        if filling {
            return Err(OpenError::Policy(format!(
                "disk {name} is still being filled: what is written now would be lost; see \
                 srn group show {}",
                group.name()
            )));
        }
        let slot = group.slots.take(name, client)?;
        let engine = group.engine();
        // Writes of a client that vanished are in the log or gone before a new one is answered.
        engine.settled().await;
        if let Source::Mirror { .. } = source {
            group.mirror_connected(disk).await.map_err(unavailable)?;
        }
        let view = match group.store().keep() {
            Keep::Cache => None,
            Keep::Replica => {
                let view = group.store().view_head();
                Some(Arc::new(view.map_err(|error| OpenError::Unavailable(error.to_string()))?))
            }
        };
        let held = match (&source, &view) {
            (Source::Mirror { .. }, Some(view)) => {
                let (group, view) = (group.clone(), view.clone());
                let held = tokio::task::spawn_blocking(move || group.held(disk, &view)).await;
                Some(held.map_err(|error| OpenError::Unavailable(error.to_string()))?)
            }
            _ => None,
        };
        let description = format!("disk {name}");
        let export = DiskExport::new(engine, view, disk, size, description, slot);
        Ok(Arc::new(export.comparing(held)))
    }
}
