//! Disks, jobs and the state of a machine, as QMP commands in typed form.
//!
//! Nothing here waits for a job; listen to [`super::event`] before starting one. Mirrors are in
//! [`super::mirror`].
//!
//! Sources: QEMU QMP Reference Manual 7.2, and that version's behaviour.

use std::net::IpAddr;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

use super::{Qmp, QmpError};

/// A block node: one layer of a disk as QEMU sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockNode {
    /// Its name; QEMU makes one up (`#block123`) for disks given the old way.
    pub node_name: String,
    /// The size the guest sees, in bytes.
    pub size_bytes: u64,
    /// Whether it may only be read.
    pub read_only: bool,
    /// QEMU's driver for it: `raw`, `qcow2`, `nbd`, ...
    pub driver: String,
}

/// Whether a machine runs.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct RunState {
    /// Whether its processors run.
    pub running: bool,
    /// QEMU's word for it: `running`, `paused`, `io-error`, `guest-panicked`, ...
    pub status: String,
}

/// A job of any kind.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Job {
    /// Its name.
    pub id: String,
    /// `created`, `running`, `ready`, `paused`, `standby`, `aborting`, `concluded`, ...
    pub status: String,
    /// How far it is, in a unit of its own.
    pub current_progress: u64,
    /// How far there is to go; grows while the guest writes.
    pub total_progress: u64,
    /// Why it failed, if it has.
    pub error: Option<String>,
}

/// A block job, with what only block jobs have.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct BlockJob {
    /// Its name.
    #[serde(rename = "device")]
    pub id: String,
    /// As in [`Job`].
    pub status: String,
    /// Bytes done.
    pub offset: u64,
    /// Bytes to do; grows while the guest writes.
    pub len: u64,
    /// Whether a mirror follows its source.
    pub ready: bool,
    /// Whether it stands still.
    pub paused: bool,
    /// The most bytes a second, 0 for no limit.
    pub speed: u64,
    /// `ok`, `failed` or `nospace`.
    pub io_status: String,
    /// Of a write-blocking mirror: whether both sides are equal now. QEMU 8.2 and later say so.
    pub actively_synced: Option<bool>,
}

impl BlockJob {
    /// Whether this is a mirror whose target holds all that the source holds, and goes on doing so
    /// if it is write-blocking and meets no error.
    #[must_use]
    pub fn is_in_sync(&self) -> bool {
        let equal = self.actively_synced.unwrap_or(self.offset == self.len);
        self.ready && !self.paused && self.io_status == "ok" && equal
    }
}

/// Where an NBD export is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NbdAddress {
    /// A unix socket.
    Unix(PathBuf),
    /// A TCP port.
    Tcp(IpAddr, u16),
}

/// An NBD export as a block node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NbdNode {
    /// The name of the node to make.
    pub node_name: String,
    /// Where the server is.
    pub address: NbdAddress,
    /// The export's name.
    pub export: String,
    /// How long, in seconds, requests wait for a lost server; 0 fails them at once.
    pub reconnect_delay_seconds: u32,
    /// Pass on discards. A job that mirrors a whole disk first makes such a target zero.
    pub discards: bool,
    /// The name of a `tls-creds-x509` object that exists in that QEMU, for a server across a
    /// network.
    pub tls_credentials: Option<String>,
}

impl Qmp {
    /// Whether the machine runs (`query-status`).
    ///
    /// # Errors
    /// Those of [`Qmp::execute`].
    pub async fn query_status(&self) -> Result<RunState, QmpError> {
        self.ask("query-status", Value::Null).await
    }

    /// Has the machine stand still (`stop`). What its guest has asked its disks for before is done
    /// when this returns.
    ///
    /// # Errors
    /// Those of [`Qmp::execute`].
    pub async fn stop(&self) -> Result<(), QmpError> {
        self.execute("stop", Value::Null).await.map(drop)
    }

    /// Lets it go on (`cont`).
    ///
    /// # Errors
    /// Those of [`Qmp::execute`].
    pub async fn cont(&self) -> Result<(), QmpError> {
        self.execute("cont", Value::Null).await.map(drop)
    }

    /// All named nodes, without what lies below each (`query-named-block-nodes`).
    ///
    /// # Errors
    /// Those of [`Qmp::execute`].
    pub async fn block_nodes(&self) -> Result<Vec<BlockNode>, QmpError> {
        let nodes: Vec<Inserted> =
            self.ask("query-named-block-nodes", json!({"flat": true})).await?;
        Ok(nodes.into_iter().map(BlockNode::from).collect())
    }

    /// The disk a person means by `name`: a node name, a device's or drive's id, or a QOM path.
    ///
    /// While a mirror runs, a device leads to the filter node over its disk.
    ///
    /// # Errors
    /// Those of [`Qmp::execute`].
    pub async fn find_disk(&self, name: &str) -> Result<Option<BlockNode>, QmpError> {
        if name.is_empty() {
            return Ok(None);
        }
        let devices: Vec<BlockDevice> = self.ask("query-block", Value::Null).await?;
        let by_device = devices.into_iter().find(|device| device.is_called(name));
        if let Some(inserted) = by_device.and_then(|device| device.inserted) {
            return Ok(Some(inserted.into()));
        }
        Ok(self.block_nodes().await?.into_iter().find(|node| node.node_name == name))
    }

    /// Adds an NBD export as a node (`blockdev-add`). QEMU connects before it answers.
    ///
    /// # Errors
    /// Those of [`Qmp::execute`]; [`QmpError::Refused`] when the server cannot be reached.
    pub async fn blockdev_add_nbd(&self, node: &NbdNode) -> Result<(), QmpError> {
        let arguments = node.arguments()?;
        self.execute("blockdev-add", arguments).await.map(drop)
    }

    /// Removes a node that nothing uses (`blockdev-del`).
    ///
    /// # Errors
    /// Those of [`Qmp::execute`].
    pub async fn blockdev_del(&self, node_name: &str) -> Result<(), QmpError> {
        self.execute("blockdev-del", json!({"node-name": node_name})).await.map(drop)
    }

    /// Limits a job's background copy, in bytes a second; 0 for no limit (`block-job-set-speed`).
    ///
    /// # Errors
    /// Those of [`Qmp::execute`].
    pub async fn block_job_set_speed(
        &self,
        job: &str,
        bytes_per_second: u64,
    ) -> Result<(), QmpError> {
        let arguments = json!({"device": job, "speed": bytes_per_second});
        self.execute("block-job-set-speed", arguments).await.map(drop)
    }

    /// Ends a job (`block-job-cancel`). A mirror that is ready ends in order: what is in flight is
    /// finished, the target is a point in time, and `BLOCK_JOB_COMPLETED` is reported; with
    /// `force`, or before it is ready, it is broken off with `BLOCK_JOB_CANCELLED`.
    ///
    /// Never break off a write-blocking mirror like this while the guest runs: it can crash that
    /// QEMU. [`Qmp::end_mirror`] knows how.
    ///
    /// # Errors
    /// Those of [`Qmp::execute`].
    pub async fn block_job_cancel(&self, job: &str, force: bool) -> Result<(), QmpError> {
        let arguments = json!({"device": job, "force": force});
        self.execute("block-job-cancel", arguments).await.map(drop)
    }

    /// Lets a job go on that paused at an error (`block-job-resume`).
    ///
    /// # Errors
    /// Those of [`Qmp::execute`].
    pub async fn block_job_resume(&self, job: &str) -> Result<(), QmpError> {
        self.execute("block-job-resume", json!({"device": job})).await.map(drop)
    }

    /// All jobs, with those that ended and were not dismissed (`query-jobs`).
    ///
    /// # Errors
    /// Those of [`Qmp::execute`].
    pub async fn jobs(&self) -> Result<Vec<Job>, QmpError> {
        self.ask("query-jobs", Value::Null).await
    }

    /// The block jobs that have not ended (`query-block-jobs`).
    ///
    /// # Errors
    /// Those of [`Qmp::execute`].
    pub async fn block_jobs(&self) -> Result<Vec<BlockJob>, QmpError> {
        self.ask("query-block-jobs", Value::Null).await
    }

    /// Lets go of a job that ended (`job-dismiss`).
    ///
    /// # Errors
    /// Those of [`Qmp::execute`].
    pub async fn job_dismiss(&self, job: &str) -> Result<(), QmpError> {
        self.execute("job-dismiss", json!({"id": job})).await.map(drop)
    }

    pub(super) async fn ask<T: DeserializeOwned>(
        &self,
        command: &str,
        arguments: Value,
    ) -> Result<T, QmpError> {
        let answer = self.execute(command, arguments).await?;
        serde_json::from_value(answer).map_err(|error| QmpError::Unexpected {
            command: command.to_owned(),
            reason: error.to_string(),
        })
    }
}

impl NbdNode {
    fn arguments(&self) -> Result<Value, QmpError> {
        let server = match &self.address {
            NbdAddress::Unix(path) => json!({"type": "unix", "path": path_text(path)?}),
            // QEMU takes host and port as text.
            NbdAddress::Tcp(host, port) => {
                json!({"type": "inet", "host": host.to_string(), "port": port.to_string()})
            }
        };
        let mut arguments = Map::new();
        arguments.insert("driver".to_owned(), "nbd".into());
        arguments.insert("node-name".to_owned(), self.node_name.clone().into());
        arguments.insert("server".to_owned(), server);
        arguments.insert("export".to_owned(), self.export.clone().into());
        arguments.insert("reconnect-delay".to_owned(), self.reconnect_delay_seconds.into());
        let discard = if self.discards { "unmap" } else { "ignore" };
        arguments.insert("discard".to_owned(), discard.into());
        if let Some(credentials) = &self.tls_credentials {
            arguments.insert("tls-creds".to_owned(), credentials.clone().into());
        }
        Ok(arguments.into())
    }
}

pub(super) fn path_text(path: &Path) -> Result<&str, QmpError> {
    path.to_str().ok_or_else(|| QmpError::Unexpected {
        command: "blockdev-add".to_owned(),
        reason: format!("path {} is not text", path.display()),
    })
}

/// One entry of `query-block`.
#[derive(Deserialize)]
struct BlockDevice {
    #[serde(default)]
    device: String,
    qdev: Option<String>,
    inserted: Option<Inserted>,
}

impl BlockDevice {
    /// A device with an id has the QOM path `/machine/peripheral/ID`, and virtio ones a part
    /// `virtio-backend` below it.
    fn is_called(&self, name: &str) -> bool {
        let qdev = self.qdev.as_deref().unwrap_or_default();
        let id = qdev.strip_prefix("/machine/peripheral/").unwrap_or(qdev);
        let plain = id.strip_suffix("/virtio-backend").unwrap_or(id);
        [self.device.as_str(), qdev, id, plain].contains(&name)
    }
}

/// The part of QEMU's `BlockDeviceInfo` in use.
#[derive(Deserialize)]
struct Inserted {
    #[serde(rename = "node-name", default)]
    node_name: String,
    ro: bool,
    drv: String,
    image: Image,
}

#[derive(Deserialize)]
struct Image {
    #[serde(rename = "virtual-size")]
    virtual_size: u64,
}

impl From<Inserted> for BlockNode {
    fn from(inserted: Inserted) -> Self {
        Self {
            node_name: inserted.node_name,
            size_bytes: inserted.image.virtual_size,
            read_only: inserted.ro,
            driver: inserted.drv,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nbd_nodes_by_socket_and_by_port() {
        let node = |address| NbdNode {
            discards: true,
            node_name: "copy".to_owned(),
            address,
            export: "e".to_owned(),
            reconnect_delay_seconds: 0,
            tls_credentials: Some("tls0".to_owned()),
        };
        let unix = node(NbdAddress::Unix("/run/x.sock".into())).arguments().unwrap();
        assert_eq!(unix["server"], json!({"type": "unix", "path": "/run/x.sock"}));
        assert_eq!(unix["tls-creds"], "tls0");
        let tcp = node(NbdAddress::Tcp("::1".parse().unwrap(), 10809)).arguments().unwrap();
        assert_eq!(tcp["server"], json!({"type": "inet", "host": "::1", "port": "10809"}));
    }

    #[test]
    fn a_device_answers_to_all_its_names() {
        let device = |device: &str, qdev: &str| BlockDevice {
            device: device.to_owned(),
            qdev: Some(qdev.to_owned()),
            inserted: None,
        };
        let virtio = device("", "/machine/peripheral/dev0/virtio-backend");
        for name in ["dev0", "dev0/virtio-backend", "/machine/peripheral/dev0/virtio-backend"] {
            assert!(virtio.is_called(name), "{name}");
        }
        assert!(!virtio.is_called("dev"));
        assert!(device("drive-virtio0", "/machine/peripheral/x").is_called("drive-virtio0"));
        assert!(device("a", "/machine/peripheral/x").is_called("x"));
    }
}
