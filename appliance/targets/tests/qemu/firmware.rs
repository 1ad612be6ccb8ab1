//! Both firmwares, from the verdict over a disk to a guest that speaks.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::time::Duration;

use srn_targets::qemu::firmware::{self, Firmware, Verdict};
use srn_targets::qemu::run::{Status, Stopped};

use crate::support::{FROM_UEFI, Lab, NbdServer, READY, run, spec};

pub(crate) fn decide(disk: &Path) -> Verdict {
    let file = File::open(disk).unwrap();
    let size = file.metadata().unwrap().len();
    firmware::decide(size, |at, buffer| file.read_exact_at(buffer, at)).unwrap()
}

#[tokio::test]
async fn a_bios_disk_is_known_and_boots() {
    let lab = Lab::new();
    let disk = lab.guest_disk("disk.raw", false);
    let verdict = decide(&disk);
    assert_eq!((verdict.firmware, verdict.reason.as_str()), (Firmware::Bios, "MBR boot code"));
    let server = NbdServer::start(&disk, lab.path("disk.sock"), "disk");
    let machine = lab.start(&spec(verdict.firmware, vec![server.disk()])).await;
    assert_eq!(machine.says(READY).await.matched, READY);
}

#[tokio::test]
async fn a_uefi_disk_is_known_and_boots_with_variables_of_its_own() {
    let lab = Lab::new();
    let disk = uefi_disk(&lab);
    let verdict = decide(&disk);
    assert_eq!(verdict.firmware, Firmware::Uefi, "{}", verdict.reason);
    let server = NbdServer::start(&disk, lab.path("disk.sock"), "disk");
    let machine = lab.start(&spec(verdict.firmware, vec![server.disk()])).await;
    machine.says(FROM_UEFI).await;
    assert!(lab.path("machine/uefi-variables.fd").is_file());
    // This guest ignores its power button.
    assert_eq!(machine.stop(Duration::from_millis(500)).await.unwrap(), Stopped::Quit);
    assert!(matches!(machine.status().await.unwrap(), Status::Exited { .. }));
}

/// A GPT with one EFI system partition, FAT, and the application as the loader every firmware
/// looks for.
fn uefi_disk(lab: &Lab) -> std::path::PathBuf {
    let disk = lab.path("uefi.raw");
    File::create(&disk).unwrap().set_len(40 << 20).unwrap();
    let table = lab.path("table");
    fs::write(&table, "label: gpt\nstart=2048, size=65536, type=U\n").unwrap();
    let sfdisk = format!("sfdisk --quiet {} < {}", disk.display(), table.display());
    run("fdisk", "sh", &["-c", &sfdisk]);
    let application = lab.path("loader.efi");
    fs::write(&application, application_image(&lab.assemble("efi.S", "--64"))).unwrap();
    let partition = format!("{}@@1M", disk.display());
    run("mtools", "mformat", &["-i", &partition, "-T", "65536", "::"]);
    run("mtools", "mmd", &["-i", &partition, "::/EFI", "::/EFI/BOOT"]);
    let loader = application.to_str().unwrap();
    run("mtools", "mcopy", &["-i", &partition, loader, "::/EFI/BOOT/BOOTX64.EFI"]);
    disk
}

/// The smallest PE32+ image that UEFI takes: one section of code, no relocations needed.
/// Layout: Microsoft PE/COFF specification, "PE Format".
fn application_image(code: &[u8]) -> Vec<u8> {
    assert!(code.len() <= 512);
    let mut image = vec![0_u8; 1024];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"MZ");
    put(0x3c, &0x40_u32.to_le_bytes()); // where the PE header is
    put(0x40, b"PE\0\0");
    put(0x44, &0x8664_u16.to_le_bytes()); // x86-64
    put(0x46, &1_u16.to_le_bytes()); // one section
    put(0x54, &0xf0_u16.to_le_bytes()); // size of the optional header
    put(0x56, &0x0022_u16.to_le_bytes()); // executable, large addresses
    let optional = 0x58;
    put(optional, &0x20b_u16.to_le_bytes()); // PE32+
    put(optional + 4, &512_u32.to_le_bytes()); // size of code
    put(optional + 16, &0x1000_u32.to_le_bytes()); // entry point
    put(optional + 20, &0x1000_u32.to_le_bytes()); // base of code
    put(optional + 32, &0x1000_u32.to_le_bytes()); // section alignment
    put(optional + 36, &0x200_u32.to_le_bytes()); // file alignment
    put(optional + 56, &0x2000_u32.to_le_bytes()); // size of image
    put(optional + 60, &0x200_u32.to_le_bytes()); // size of headers
    put(optional + 68, &10_u16.to_le_bytes()); // subsystem: EFI application
    put(optional + 108, &16_u32.to_le_bytes()); // data directories, all empty
    let section = optional + 0xf0;
    put(section, b".text");
    put(section + 8, &512_u32.to_le_bytes()); // virtual size
    put(section + 12, &0x1000_u32.to_le_bytes()); // virtual address
    put(section + 16, &512_u32.to_le_bytes()); // size in the file
    put(section + 20, &512_u32.to_le_bytes()); // place in the file
    put(section + 36, &0x6000_0020_u32.to_le_bytes()); // code, execute, read
    put(512, code);
    image
}
