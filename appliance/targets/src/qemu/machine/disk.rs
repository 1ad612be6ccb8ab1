//! The disks of a machine: where each is served, and how the guest sees it.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{Chipset, SpecError, text};

/// How long, in seconds, requests to a disk wait for a lost NBD server before they fail: longer
/// than a restart of the daemon with a large log to read.
pub const RECONNECT_DELAY_SECONDS: u32 = 600;

/// The longest path of a unix socket in bytes: `sockaddr_un` has 108, one is for the final NUL.
pub const SOCKET_PATH_BYTES_MAX: usize = 107;

/// The longest serial number in bytes that every bus can show.
const SERIAL_BYTES_MAX: usize = 20;

/// One disk, served over NBD on a unix socket.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Disk {
    /// The socket.
    pub socket: PathBuf,
    /// The name of the export.
    pub export: String,
    /// How the guest sees it.
    #[serde(default)]
    pub bus: Bus,
    /// Whether the guest may only read it.
    #[serde(default)]
    pub read_only: bool,
    /// The serial number the guest sees, at most 20 printable ASCII characters.
    #[serde(default)]
    pub serial: Option<String>,
    /// The sector size in bytes the guest sees: 512, or 4096 for a disk partitioned so.
    #[serde(default = "sector_bytes")]
    pub sector_bytes: u32,
    /// How long, in seconds, requests wait for a lost server before they fail.
    #[serde(default = "reconnect_delay_seconds")]
    pub reconnect_delay_seconds: u32,
}

fn sector_bytes() -> u32 {
    512
}

fn reconnect_delay_seconds() -> u32 {
    RECONNECT_DELAY_SECONDS
}

/// How the guest sees a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Bus {
    /// virtio-blk.
    #[default]
    Virtio,
    /// NVMe, as on AWS Nitro. QEMU cannot pause on its errors.
    Nvme,
    /// virtio-scsi.
    Scsi,
    /// VMware's paravirtual SCSI.
    Pvscsi,
    /// AHCI.
    Sata,
    /// IDE, as on Hyper-V's generation 1 and Azure; needs [`Chipset::Pc`].
    Ide,
}

impl Disk {
    /// The disk at this address, all else as usual: virtio, writable, sectors of 512 bytes.
    #[must_use]
    pub fn new(socket: impl Into<PathBuf>, export: impl Into<String>) -> Self {
        Self {
            socket: socket.into(),
            export: export.into(),
            bus: Bus::Virtio,
            read_only: false,
            serial: None,
            sector_bytes: sector_bytes(),
            reconnect_delay_seconds: RECONNECT_DELAY_SECONDS,
        }
    }

    /// Refuses what QEMU or the kernel would refuse or cut.
    pub(super) fn check(&self, index: usize, chipset: Chipset) -> Result<(), SpecError> {
        if self.socket.as_os_str().len() > SOCKET_PATH_BYTES_MAX {
            return Err(SpecError::SocketPathTooLong(self.socket.clone()));
        }
        if let Some(serial) = &self.serial {
            let printable = serial.chars().all(|c| c.is_ascii_graphic());
            if !(1..=SERIAL_BYTES_MAX).contains(&serial.len()) || !printable {
                return Err(SpecError::DiskSerial(serial.clone()));
            }
        }
        // QEMU's ATA disks have sectors of 512 bytes and cannot be write-protected.
        let ata = matches!(self.bus, Bus::Sata | Bus::Ide);
        if self.sector_bytes != 512 && (self.sector_bytes != 4096 || ata) {
            return Err(SpecError::SectorBytes { disk: index, sector_bytes: self.sector_bytes });
        }
        if self.read_only && ata {
            return Err(SpecError::ReadOnly(index));
        }
        if self.bus == Bus::Ide && chipset != Chipset::Pc {
            return Err(SpecError::IdeNeedsPc);
        }
        Ok(())
    }

    /// The node name of the disk at `index`, by which QMP knows it.
    #[must_use]
    pub fn node_name(index: usize) -> String {
        format!("disk{index}")
    }

    /// The block node of the disk at `index`.
    pub(super) fn node(&self, index: usize) -> Result<Value, SpecError> {
        Ok(json!({
            "driver": "nbd", "node-name": Self::node_name(index),
            "server": {"type": "unix", "path": text(&self.socket)?},
            "export": self.export,
            "reconnect-delay": self.reconnect_delay_seconds,
            "read-only": self.read_only,
            "discard": "unmap",
        }))
    }

    /// The device on place number `place` of its bus.
    pub(super) fn device(&self, index: usize, place: usize, chipset: Chipset) -> Value {
        let driver = match self.bus {
            Bus::Virtio => "virtio-blk-pci",
            Bus::Nvme => "nvme",
            Bus::Scsi | Bus::Pvscsi => "scsi-hd",
            Bus::Sata | Bus::Ide => "ide-hd",
        };
        let mut device = json!({
            "driver": driver, "id": format!("dev{index}"), "drive": Self::node_name(index),
            "bootindex": index,
            "logical_block_size": self.sector_bytes, "physical_block_size": self.sector_bytes,
        });
        match self.bus {
            Bus::Virtio | Bus::Nvme => {}
            Bus::Scsi => device["bus"] = "virtio-scsi-pci.0".into(),
            Bus::Pvscsi => device["bus"] = "pvscsi.0".into(),
            Bus::Sata if chipset == Chipset::Q35 => device["bus"] = format!("ide.{place}").into(),
            Bus::Sata => device["bus"] = format!("ich9-ahci.{place}").into(),
            Bus::Ide => {
                device["bus"] = format!("ide.{}", place / 2).into();
                device["unit"] = (place % 2).into();
            }
        }
        if matches!(self.bus, Bus::Scsi | Bus::Pvscsi) {
            device["scsi-id"] = place.into();
        }
        if self.bus != Bus::Nvme {
            // A write that fails pauses the machine: what it holds in memory is not lost, and it
            // goes on once the node has room again. A read that fails is the guest's to know, as
            // of a real disk: one bad sector must not stop a server.
            device["werror"] = "stop".into();
            device["rerror"] = "report".into();
        }
        // NVMe insists on a serial number.
        let serial = self
            .serial
            .clone()
            .or_else(|| (self.bus == Bus::Nvme).then(|| format!("srn-{}", Self::node_name(index))));
        if let Some(serial) = serial {
            device["serial"] = serial.into();
        }
        device
    }
}
