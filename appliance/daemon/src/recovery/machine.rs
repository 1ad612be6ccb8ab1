//! From a group's disks to the machine that QEMU runs.

use std::sync::Arc;
use std::time::Duration;

use srn_core::extent::Extent;
use srn_core::ids::{DiskNo, EpochId};
use srn_core::limits::SECTOR;
use srn_store::group::View;
use srn_targets::qemu::accel;
use srn_targets::qemu::firmware::{self, Firmware};
use srn_targets::qemu::host::{Host, Missing};
use srn_targets::qemu::machine::{Accelerator, Bus, Disk, MachineSpec};
use srn_targets::qemu::network::{Mac, Network, Nic};

use super::Recoveries;
use super::start::RecoveryRequest;
use crate::config::Acceleration;
use crate::error::{Failure, Kind, Result};
use crate::group::Group;
use crate::group::engine::Engine;
use crate::node::Node;
use crate::node::backend::Extra;

/// How long KVM is given to prove itself.
const KVM_PATIENCE: Duration = Duration::from_secs(5);

/// A machine that can be started, but for its name and those of its disks.
pub(super) struct Plan {
    spec: MachineSpec,
    bus: Bus,
    sector_bytes: u32,
    /// Its firmware, and why.
    pub(super) firmware: String,
}

impl Plan {
    /// The machine as recovery `id` of a group, with these exports of the node as its disks.
    pub(super) fn with_disks(
        &self,
        node: &Node,
        group: &Group,
        id: &str,
        exports: &[String],
    ) -> MachineSpec {
        let disk = |export: &String| Disk {
            bus: self.bus,
            sector_bytes: self.sector_bytes,
            ..Disk::new(node.nbd_socket(), export)
        };
        let mut nics = self.spec.nics.clone();
        nics.iter_mut().for_each(|nic| nic.mac = mac_of(group, id));
        let disks = exports.iter().map(disk).collect();
        MachineSpec { name: id.to_owned(), disks, nics, ..self.spec.clone() }
    }
}

/// The name of a recovered disk's export.
fn export_of(recovery: &str, disk: &str) -> String {
    format!("recovery/{recovery}/{disk}")
}

/// The hardware address of recovered server `id` of a group: the same whenever it is started, and
/// another for each, so that they can share a bridge.
fn mac_of(group: &Group, id: &str) -> Option<Mac> {
    let [a, b, c, ..] = group.id().0;
    let fold = id.bytes().fold(0_u8, |sum, byte| sum.wrapping_mul(31).wrapping_add(byte));
    format!("52:54:00:{a:02x}:{b:02x}:{:02x}", c ^ fold).parse().ok()
}

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
            let name = export_of(id, &disk.name);
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

    /// The machine for recovery `id` of a group whose disks are as in `view`. It is made before
    /// anything is done: what is wrong with the request, the host or the disks is said while
    /// production still runs.
    ///
    /// # Errors
    /// All of that.
    pub(super) async fn plan(
        &self,
        node: &Arc<Node>,
        group: &Group,
        id: &str,
        request: &RecoveryRequest,
        view: View,
        host: &Host,
    ) -> Result<Plan> {
        let catalog = view.catalog();
        let names = catalog.disks.values().map(|disk| export_of(id, &disk.name));
        let exports: Vec<String> = names.collect();
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
            name: id.to_owned(),
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
            disks: Vec::new(),
            nics,
            clock: Default::default(),
            uuid: None,
            smbios_strings: request.smbios_strings.clone(),
            video: true,
            sandbox: true,
        };
        let plan = Plan { spec, bus, sector_bytes, firmware: format!("{firmware}: {reason}") };
        let missing = |error: Missing| Failure::new(Kind::Missing, error.to_string());
        let code = match firmware {
            Firmware::Bios => None,
            Firmware::Uefi => Some(host.ovmf().map_err(missing)?.code.as_path()),
        };
        let arguments = plan.with_disks(node, group, id, &exports).arguments(code);
        arguments.map_err(|error| Failure::invalid(error.to_string()))?;
        Ok(plan)
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
