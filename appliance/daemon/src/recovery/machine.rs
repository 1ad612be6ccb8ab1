//! From a group's disks to the machine that QEMU runs.

use std::sync::Arc;
use std::time::Duration;

use srn_core::extent::Extent;
use srn_core::ids::{DiskNo, EpochId};
use srn_core::limits::SECTOR;
use srn_store::group::View;
use srn_targets::qemu::accel;
use srn_targets::qemu::firmware::{self, Firmware};
use srn_targets::qemu::host::Host;
use srn_targets::qemu::machine::{Accelerator, Bus, Disk, MachineSpec};
use srn_targets::qemu::network::{Network, Nic};

use super::start::RecoveryRequest;
use super::{Recoveries, Recovery};
use crate::config::Acceleration;
use crate::error::{Failure, Kind, Result};
use crate::group::Group;
use crate::group::engine::Engine;
use crate::node::Node;
use crate::node::backend::Extra;

/// How long KVM is given to prove itself.
const KVM_PATIENCE: Duration = Duration::from_secs(5);

impl Recoveries {
    /// Serves the disks of a recovery; returns their exports' names, in order of disk number.
    pub(super) fn publish(
        &self,
        node: &Arc<Node>,
        group: &Arc<Group>,
        id: &str,
        clone: Option<&Arc<Engine>>,
    ) -> Result<Vec<String>> {
        let (engine, view) = match clone {
            None => (group.engine(), group.store().view_head()?),
            Some(engine) => {
                let epoch: EpochId = engine.head().borrow().epoch;
                (engine.clone(), group.store().view_head_of(epoch)?)
            }
        };
        let view = Arc::new(view);
        let mut names = Vec::new();
        for (no, disk) in &view.catalog().disks {
            let name = format!("recovery/{id}/{}", disk.name);
            node.exports().publish(
                name.clone(),
                Extra::Recovery {
                    group: group.clone(),
                    engine: engine.clone(),
                    view: view.clone(),
                    disk: *no,
                    size: disk.sectors * SECTOR,
                    description: format!("disk {} of recovered server {id}", disk.name),
                },
            );
            names.push(name);
        }
        Ok(names)
    }

    /// The accelerator to use: KVM only if it has proven itself here.
    pub(super) async fn accelerator(&self, host: &Host) -> Accelerator {
        match self.context.config().acceleration {
            Acceleration::Tcg => return Accelerator::Tcg,
            Acceleration::Kvm => return Accelerator::Kvm,
            Acceleration::Auto => {}
        }
        let probe = || async {
            accel::probe(&host.qemu, KVM_PATIENCE)
                .await
                .unwrap_or_else(|error| accel::Verdict::Tcg { reason: error.to_string() })
        };
        let verdict = self.accelerator.get_or_init(probe).await;
        if let accel::Verdict::Tcg { reason } = verdict {
            log::info!("recovered servers run by emulation, which is slow: {reason}");
        }
        verdict.accelerator()
    }

    /// The machine for a recovery, and why it has its firmware.
    pub(super) async fn spec(
        &self,
        node: &Arc<Node>,
        recovery: &Recovery,
        request: &RecoveryRequest,
        view: Arc<View>,
        host: &Host,
    ) -> Result<(MachineSpec, String)> {
        let (firmware, sector_bytes, reason) = match request.firmware.as_deref() {
            Some("bios") => (Firmware::Bios, 512, "asked for".to_owned()),
            Some("uefi") => (Firmware::Uefi, 512, "asked for".to_owned()),
            Some(other) => {
                return Err(Failure::invalid(format!("firmware {other:?} is none of bios, uefi")));
            }
            None => {
                let verdict =
                    tokio::task::spawn_blocking(move || decide_firmware(&view))
                        .await
                        .map_err(|error| Failure::internal(format!("a task ended: {error}")))??;
                (verdict.firmware, verdict.sector_bytes, verdict.reason)
            }
        };
        let bus = bus_of(request.bus.as_deref().unwrap_or("virtio"))?;
        let disks = recovery
            .exports
            .iter()
            .map(|export| Disk { bus, sector_bytes, ..Disk::new(node.nbd_socket(), export) })
            .collect();
        let nics = match &request.network {
            None => Vec::new(),
            Some(network) => {
                let network: Network =
                    network.parse().map_err(|error| Failure::invalid(format!("{error}")))?;
                vec![Nic { network, model: Default::default(), mac: None }]
            }
        };
        let config = self.context.config();
        let memory = request.memory_bytes.unwrap_or(config.recovery_memory);
        let spec = MachineSpec {
            name: recovery.record.id.clone(),
            vcpus: u16::try_from(request.cpus.unwrap_or(config.recovery_cpus))
                .map_err(|_| Failure::invalid("a machine has 1 to 255 virtual CPUs"))?,
            memory_mib: u32::try_from(memory >> 20)
                .map_err(|_| Failure::invalid("that is more memory than QEMU takes"))?,
            firmware,
            accelerator: self.accelerator(host).await,
            chipset: if bus == Bus::Ide {
                srn_targets::qemu::machine::Chipset::Pc
            } else {
                Default::default()
            },
            cpu: None,
            disks,
            nics,
            clock: Default::default(),
            uuid: None,
            smbios_strings: request.smbios_strings.clone(),
            video: true,
            sandbox: true,
        };
        Ok((spec, format!("{firmware}: {reason}")))
    }
}

fn bus_of(word: &str) -> Result<Bus> {
    Ok(match word {
        "virtio" => Bus::Virtio,
        "nvme" => Bus::Nvme,
        "scsi" => Bus::Scsi,
        "pvscsi" => Bus::Pvscsi,
        "sata" => Bus::Sata,
        "ide" => Bus::Ide,
        other => {
            return Err(Failure::invalid(format!(
                "bus {other:?} is none of virtio, nvme, scsi, pvscsi, sata, ide"
            )));
        }
    })
}

/// Looks at the partition tables of the disks in order: the first that can boot decides.
fn decide_firmware(view: &View) -> Result<firmware::Verdict> {
    let catalog = view.catalog();
    let mut why = Vec::new();
    for (no, disk) in &catalog.disks {
        let size = disk.sectors * SECTOR;
        match firmware::decide(size, |offset, out| read_at(view, *no, disk.sectors, offset, out)) {
            Ok(verdict) => return Ok(verdict),
            Err(error) => why.push(format!("{}: {error}", disk.name)),
        }
    }
    Err(Failure::new(
        Kind::Refused,
        format!(
            "no disk can be booted ({}); name a firmware with --firmware bios or uefi to try \
             anyway",
            why.join("; ")
        ),
    ))
}

/// Reads bytes at any offset through a view, which reads sectors.
fn read_at(
    view: &View,
    no: DiskNo,
    sectors: u64,
    offset: u64,
    out: &mut [u8],
) -> std::io::Result<()> {
    let first = offset / SECTOR;
    let end = (offset + out.len() as u64).div_ceil(SECTOR).min(sectors);
    let extent = Extent::new(first, end.saturating_sub(first));
    let mut whole = vec![0; usize::try_from(extent.bytes()).unwrap_or(0)];
    view.read(no, extent, &mut whole).map_err(std::io::Error::other)?;
    let skip = usize::try_from(offset - first * SECTOR).unwrap_or(0);
    let wanted = whole
        .get(skip..skip + out.len())
        .ok_or_else(|| std::io::Error::from(std::io::ErrorKind::UnexpectedEof))?;
    out.copy_from_slice(wanted);
    Ok(())
}
