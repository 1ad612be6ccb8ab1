//! What specs become, and which are refused.

use std::os::unix::ffi::OsStringExt as _;

use super::*;
use crate::qemu::network::NicModel;

fn spec() -> MachineSpec {
    MachineSpec {
        name: "web-1".to_owned(),
        vcpus: 2,
        memory_mib: 1024,
        firmware: Firmware::Bios,
        accelerator: Accelerator::Tcg,
        chipset: Chipset::Q35,
        cpu: None,
        disks: vec![Disk::new("/run/srn/web-1.sock", "web-1/0")],
        nics: Vec::new(),
        clock: GuestClock::Utc,
        uuid: None,
        smbios_strings: Vec::new(),
        video: true,
        sandbox: true,
    }
}

fn with_bus(bus: Bus, disks: usize) -> MachineSpec {
    let chipset = if bus == Bus::Ide { Chipset::Pc } else { Chipset::Q35 };
    let disk = Disk { bus, ..Disk::new("/run/d.sock", "d") };
    MachineSpec { chipset, disks: vec![disk; disks], ..spec() }
}

fn line(spec: &MachineSpec) -> Vec<String> {
    let arguments = spec.arguments(Some(Path::new("/usr/share/code.fd"))).unwrap();
    arguments.into_iter().map(|argument| argument.into_string().unwrap()).collect()
}

/// Every value given to an option.
fn values(spec: &MachineSpec, option: &str) -> Vec<String> {
    let line = line(spec);
    line.windows(2).filter(|pair| pair[0] == option).map(|pair| pair[1].clone()).collect()
}

/// The JSON devices made by one driver.
fn devices(spec: &MachineSpec, driver: &str) -> Vec<Value> {
    let all = values(spec, "-device").into_iter().map(|text| serde_json::from_str(&text).unwrap());
    all.filter(|device: &Value| device["driver"] == driver).collect()
}

#[track_caller]
fn refused(spec: &MachineSpec, expected: &str) {
    let error = spec.arguments(None).unwrap_err().to_string();
    assert!(error.contains(expected), "{expected:?} in {error:?}");
}

#[test]
fn the_whole_line_of_a_plain_machine() {
    let expected = "-name guest=web-1 -no-user-config -nodefaults -display none \
        -msg timestamp=on \
        -sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny \
        -accel tcg,thread=multi -cpu max -smp cpus=2 -m size=1024M \
        -machine q35,dump-guest-core=off -boot strict=on,menu=off \
        -rtc base=utc,clock=host,driftfix=slew \
        -chardev socket,id=qmp,path=qmp.sock,server=on,wait=off -mon chardev=qmp,mode=control \
        -chardev file,id=serial,path=serial.log,append=on -serial chardev:serial \
        -object {\"id\":\"entropy\",\"qom-type\":\"rng-builtin\"} \
        -device {\"driver\":\"virtio-rng-pci\",\"rng\":\"entropy\"} -device {\"driver\":\"VGA\"} \
        -blockdev {\"discard\":\"unmap\",\"driver\":\"nbd\",\"export\":\"web-1/0\",\
\"node-name\":\"disk0\",\"read-only\":false,\"reconnect-delay\":600,\
\"server\":{\"path\":\"/run/srn/web-1.sock\",\"type\":\"unix\"}} \
        -device {\"bootindex\":0,\"drive\":\"disk0\",\"driver\":\"virtio-blk-pci\",\"id\":\"dev0\",\
\"logical_block_size\":512,\"physical_block_size\":512,\"rerror\":\"report\",\
\"werror\":\"stop\"}";
    assert_eq!(line(&spec()).join(" "), expected);
}

#[test]
fn no_network_unless_one_is_named() {
    assert!(values(&spec(), "-netdev").is_empty());
    let nic = Nic { network: "tap:t0".parse().unwrap(), model: NicModel::E1000e, mac: None };
    let spec = MachineSpec { nics: vec![nic.clone(), nic], ..spec() };
    let netdevs = values(&spec, "-netdev");
    assert_eq!(netdevs[1], "tap,id=net1,ifname=t0,script=no,downscript=no");
    assert_eq!(devices(&spec, "e1000e")[1]["netdev"], "net1");
}

#[test]
fn only_a_bridge_loosens_the_sandbox() {
    let nic = Nic { network: "bridge:br0".parse().unwrap(), model: NicModel::Virtio, mac: None };
    let bridged = MachineSpec { nics: vec![nic], ..spec() };
    let allowed = "on,obsolete=deny,elevateprivileges=allow,spawn=allow,resourcecontrol=deny";
    assert_eq!(values(&bridged, "-sandbox"), [allowed]);
    assert!(values(&MachineSpec { sandbox: false, ..spec() }, "-sandbox").is_empty());
}

#[test]
fn every_bus_has_its_device_and_place() {
    let place = |bus, driver: &str, key: &str| {
        let places: Vec<_> =
            devices(&with_bus(bus, 3), driver).iter().map(|d| d[key].to_string()).collect();
        places.join(" ")
    };
    assert_eq!(place(Bus::Virtio, "virtio-blk-pci", "bootindex"), "0 1 2");
    assert_eq!(place(Bus::Nvme, "nvme", "serial"), r#""srn-disk0" "srn-disk1" "srn-disk2""#);
    assert_eq!(place(Bus::Scsi, "scsi-hd", "scsi-id"), "0 1 2");
    assert_eq!(place(Bus::Sata, "ide-hd", "bus"), r#""ide.0" "ide.1" "ide.2""#);
    assert_eq!(place(Bus::Ide, "ide-hd", "bus"), r#""ide.0" "ide.0" "ide.1""#);
    assert_eq!(place(Bus::Ide, "ide-hd", "unit"), "0 1 0");
    assert_eq!(devices(&with_bus(Bus::Pvscsi, 2), "pvscsi").len(), 1);
    let sata_on_pc = MachineSpec { chipset: Chipset::Pc, ..with_bus(Bus::Sata, 1) };
    assert_eq!(devices(&sata_on_pc, "ide-hd")[0]["bus"], "ich9-ahci.0");
    assert_eq!(devices(&sata_on_pc, "ich9-ahci").len(), 1);
}

#[test]
fn places_are_counted_per_bus() {
    let mut spec = with_bus(Bus::Virtio, 1);
    spec.disks.extend(with_bus(Bus::Scsi, 2).disks);
    let ids: Vec<_> = devices(&spec, "scsi-hd").iter().map(|d| d["scsi-id"].clone()).collect();
    assert_eq!(ids, [0, 1]);
}

#[test]
fn uefi_takes_shared_code_and_its_own_variables() {
    let spec = MachineSpec { firmware: Firmware::Uefi, ..spec() };
    let machine = "q35,dump-guest-core=off,pflash0=uefi-code,pflash1=uefi-variables";
    assert_eq!(values(&spec, "-machine"), [machine]);
    let nodes = values(&spec, "-blockdev");
    assert!(nodes[0].contains(r#""filename":"/usr/share/code.fd""#) && nodes[0].contains("true"));
    assert!(nodes[1].contains(r#""filename":"uefi-variables.fd""#) && nodes[1].contains("false"));
    assert_eq!(spec.arguments(None), Err(SpecError::NoFirmwareCode));
}

#[test]
fn smbios_strings_never_become_arguments() {
    let spec = MachineSpec { smbios_strings: vec!["a=secret".to_owned()], ..spec() };
    assert_eq!(values(&spec, "-smbios"), ["type=11,path=smbios-0"]);
    assert!(!line(&spec).join(" ").contains("secret"));
}

#[test]
fn awkward_paths_and_names_stay_one_value() {
    let disk = Disk::new("/run/a,b=c \"q\".sock", "name,with=commas");
    let spec = MachineSpec { disks: vec![disk], ..spec() };
    let node: Value = serde_json::from_str(&values(&spec, "-blockdev")[0]).unwrap();
    assert_eq!(node["server"]["path"], "/run/a,b=c \"q\".sock");
    assert_eq!(node["export"], "name,with=commas");
}

#[test]
fn specs_that_cannot_start_are_refused_in_words() {
    refused(&MachineSpec { name: "a,b".to_owned(), ..spec() }, "machine name");
    refused(&MachineSpec { name: String::new(), ..spec() }, "machine name");
    refused(&MachineSpec { vcpus: 0, ..spec() }, "number of processors is 0");
    refused(&MachineSpec { memory_mib: 8, ..spec() }, "memory in MiB is 8");
    refused(&MachineSpec { cpu: Some("max -S".to_owned()), ..spec() }, "processor model");
    refused(&MachineSpec { uuid: Some("12".to_owned()), ..spec() }, "uuid");
    refused(&MachineSpec { smbios_strings: vec![String::new()], ..spec() }, "smbios string 0");
    refused(&with_bus(Bus::Virtio, 25), "number of disks is 25");
    refused(&with_bus(Bus::Ide, 5), "places for 4 disks");
    refused(&with_bus(Bus::Sata, 7), "places for 6 disks");
    refused(
        &MachineSpec { chipset: Chipset::Q35, ..with_bus(Bus::Ide, 1) },
        "needs the chipset pc",
    );
    refused(&MachineSpec { firmware: Firmware::Uefi, ..with_bus(Bus::Pvscsi, 1) }, "pvscsi");
}

#[test]
fn disks_that_cannot_be_shown_are_refused_in_words() {
    let disk = |change: fn(&mut Disk)| {
        let mut spec = with_bus(Bus::Sata, 1);
        change(&mut spec.disks[0]);
        spec
    };
    refused(&disk(|d| d.socket = "/".repeat(108).into()), "longer than 107 bytes");
    refused(&disk(|d| d.socket = OsString::from_vec(vec![b'/', 0xff]).into()), "not text");
    refused(&disk(|d| d.serial = Some("twenty-one-characters".to_owned())), "disk serial");
    refused(&disk(|d| d.sector_bytes = 4096), "sectors of 4096 bytes");
    refused(&disk(|d| d.read_only = true), "read-only");
}

#[test]
fn a_spec_survives_its_file_and_rejects_unknown_fields() {
    let spec =
        MachineSpec { uuid: Some("12345678-1234-1234-1234-1234567890ab".to_owned()), ..spec() };
    let text = serde_json::to_string(&spec).unwrap();
    assert_eq!(serde_json::from_str::<MachineSpec>(&text).unwrap(), spec);
    let more = text.replacen('{', r#"{"extra":1,"#, 1);
    assert!(serde_json::from_str::<MachineSpec>(&more).is_err());
}
