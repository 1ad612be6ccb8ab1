//! Every bus boots, and every disk is found by its names.

use srn_targets::qemu::firmware::Firmware;
use srn_targets::qemu::machine::{Bus, Chipset, Disk, MachineSpec};

use crate::support::{Lab, NbdServer, READY, spec};

async fn boots_from(bus: Bus, chipset: Chipset) {
    let lab = Lab::new();
    let (server, spec) = lab.guest(false);
    let disk = Disk { bus, serial: Some("srn-0001".to_owned()), ..server.disk() };
    let machine = lab.start(&MachineSpec { chipset, disks: vec![disk], ..spec }).await;
    machine.says(READY).await;
    let monitor = machine.monitor().await.unwrap();
    for name in ["disk0", "dev0"] {
        let node = monitor.find_disk(name).await.unwrap().unwrap();
        assert_eq!((node.node_name.as_str(), node.size_bytes), ("disk0", 4 << 20), "{name}");
        assert!(!node.read_only && node.driver == "nbd");
    }
    for name in ["", "disk", "dev1", "/machine/peripheral"] {
        assert_eq!(monitor.find_disk(name).await.unwrap(), None, "{name}");
    }
}

macro_rules! boots_from {
    ($($test:ident: $bus:ident on $chipset:ident,)*) => {
        $(
            #[tokio::test]
            async fn $test() {
                boots_from(Bus::$bus, Chipset::$chipset).await;
            }
        )*
    };
}

boots_from! {
    virtio_boots: Virtio on Q35,
    virtio_boots_on_pc: Virtio on Pc,
    nvme_boots: Nvme on Q35,
    scsi_boots: Scsi on Q35,
    pvscsi_boots: Pvscsi on Q35,
    sata_boots: Sata on Q35,
    sata_boots_on_pc: Sata on Pc,
    ide_boots: Ide on Pc,
}

#[tokio::test]
async fn as_many_disks_as_allowed_fit_with_all_else() {
    let lab = Lab::new();
    let image = lab.guest_disk("disk.raw", false);
    let first = NbdServer::start(&image, lab.path("disk.sock"), "disk");
    std::fs::write(lab.path("data.raw"), vec![0; 1 << 20]).unwrap();
    let mut disks = vec![first.disk()];
    let mut servers = Vec::new();
    for index in 1..srn_targets::qemu::machine::DISKS_MAX {
        let socket = lab.path(&format!("data{index}.sock"));
        servers.push(NbdServer::start(&lab.path("data.raw"), socket, "data"));
        let disk = servers.last().unwrap().disk();
        disks.push(Disk { read_only: true, sector_bytes: 4096, ..disk });
    }
    let nic = |_| srn_targets::qemu::network::Nic {
        network: "user,restrict".parse().unwrap(),
        model: srn_targets::qemu::network::NicModel::Virtio,
        mac: None,
    };
    let nics = (0..srn_targets::qemu::machine::NICS_MAX).map(nic).collect();
    let machine = lab.start(&MachineSpec { nics, ..spec(Firmware::Bios, disks) }).await;
    machine.says(READY).await;
    let monitor = machine.monitor().await.unwrap();
    let last = monitor.find_disk("disk23").await.unwrap().unwrap();
    assert!(last.read_only && last.size_bytes == 1 << 20);
}
