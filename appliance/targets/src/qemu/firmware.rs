//! BIOS or UEFI: which firmware a recovered disk wants.
//!
//! The verdict is drawn from the partition tables alone. It refuses to look into the EFI system
//! partition: whether a loader is there at `\EFI\BOOT\BOOTX64.EFI` (a fresh firmware knows no other
//! path) is for the boot fix-ups to say, which read guest file systems in a throw-away machine.

use std::fmt;
use std::io;

use serde::{Deserialize, Serialize};

use super::partitions::{self, Gpt, Tables};

/// The firmware a machine starts with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Firmware {
    /// A PC BIOS (QEMU's SeaBIOS).
    Bios,
    /// UEFI (OVMF).
    Uefi,
}

impl fmt::Display for Firmware {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Bios => "BIOS",
            Self::Uefi => "UEFI",
        })
    }
}

/// A firmware and why it was chosen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    /// The firmware to start with.
    pub firmware: Firmware,
    /// The sector size, in bytes, the disk was partitioned for (512, or 4096 for a "4K native"
    /// disk): the machine must show the disk with the same one.
    pub sector_bytes: u32,
    /// Why, in words for an operator.
    pub reason: String,
}

/// Why no firmware could be chosen.
#[derive(Debug, thiserror::Error)]
pub enum FirmwareError {
    /// The disk: it could not be read.
    #[error("read the partition tables")]
    Read(#[source] io::Error),
    /// The disk: nothing on it can be started. An operator who knows better may name a firmware.
    #[error("no boot code and no EFI system partition found{hint}")]
    NothingToBoot {
        /// What was seen instead, as a continuation of the sentence; may be empty.
        hint: &'static str,
    },
}

/// Decides from a disk of `size_bytes` bytes; `read_at(offset_bytes, buffer)` fills the whole
/// buffer or fails, and is never asked for bytes past `size_bytes`.
///
/// # Errors
/// [`FirmwareError::Read`] when `read_at` fails, [`FirmwareError::NothingToBoot`] when the disk has
/// neither a way to boot from BIOS nor an EFI system partition.
pub fn decide(
    size_bytes: u64,
    mut read_at: impl FnMut(u64, &mut [u8]) -> io::Result<()>,
) -> Result<Verdict, FirmwareError> {
    let tables = partitions::read(size_bytes, &mut read_at).map_err(FirmwareError::Read)?;
    judge(&tables)
}

fn judge(tables: &Tables) -> Result<Verdict, FirmwareError> {
    let (bios, uefi) = (bios_path(tables), uefi_path(tables));
    let (firmware, mut reason) = match (bios, uefi) {
        // Installers that write both (cloud images do) keep the BIOS path complete, while the UEFI
        // path may hang on boot variables that stayed behind in the lost machine.
        (Some(bios), Some(uefi)) => {
            (Firmware::Bios, format!("{bios}; there is {uefi} too, but BIOS needs no variables"))
        }
        (Some(bios), None) => (Firmware::Bios, bios.to_owned()),
        (None, Some(uefi)) if tables.boot_code => {
            let stray = "the boot code in sector 0 has no BIOS boot partition to go on from";
            (Firmware::Uefi, format!("{uefi}; {stray}"))
        }
        (None, Some(uefi)) => (Firmware::Uefi, uefi.to_owned()),
        (None, None) => return Err(FirmwareError::NothingToBoot { hint: hint(tables) }),
    };
    let mut sector_bytes = 512;
    if let Gpt::Valid { from_backup, sector_bytes: found, .. } = tables.gpt {
        sector_bytes = found;
        if from_backup {
            reason.push_str("; the primary GPT is damaged, its backup was read");
        }
    }
    Ok(Verdict { firmware, sector_bytes, reason })
}

/// How a BIOS would get from this disk into a system, in words.
fn bios_path(tables: &Tables) -> Option<&'static str> {
    if !tables.boot_code {
        return None;
    }
    match tables.gpt {
        Gpt::Valid { bios_boot: true, .. } => Some("boot code and a BIOS boot partition"),
        Gpt::Valid { legacy_bootable: true, .. } => {
            Some("boot code and a legacy-bootable partition")
        }
        // Without an EFI system partition the code is the only way in (it may know its blocks by
        // number); beside one it is a left-over.
        Gpt::Valid { efi_system: false, .. } | Gpt::Damaged => Some("boot code in sector 0"),
        Gpt::Valid { .. } => None,
        Gpt::None if tables.active_partition => Some("MBR boot code and an active partition"),
        Gpt::None => Some("MBR boot code"),
    }
}

/// How UEFI would get into a system, in words.
fn uefi_path(tables: &Tables) -> Option<&'static str> {
    match tables.gpt {
        Gpt::Valid { efi_system: true, .. } => Some("an EFI system partition"),
        Gpt::None if tables.mbr_efi_system => Some("an EFI system partition in an MBR"),
        _ => None,
    }
}

fn hint(tables: &Tables) -> &'static str {
    match tables.gpt {
        Gpt::Damaged => " (both copies of the GPT are damaged)",
        Gpt::Valid { bios_boot: true, .. } => " (a BIOS boot partition, but sector 0 has no code)",
        Gpt::None if !tables.boot_signature => " (sector 0 has no boot signature)",
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::super::partitions::tests::{BIOS_BOOT, EFI_SYSTEM, Image, LINUX};
    use super::*;

    fn verdict(image: &Image) -> Result<Verdict, String> {
        judge(&image.tables()).map_err(|error| error.to_string())
    }

    #[track_caller]
    fn check(image: Image, firmware: Firmware, said: &str) {
        let verdict = verdict(&image).unwrap();
        assert_eq!(verdict.firmware, firmware, "{}", verdict.reason);
        assert!(verdict.reason.contains(said), "{:?} in {:?}", said, verdict.reason);
    }

    #[track_caller]
    fn refused(image: Image, said: &str) {
        let error = verdict(&image).unwrap_err();
        assert!(error.starts_with("no boot code and no EFI system partition found"), "{error}");
        assert!(error.contains(said), "{said:?} in {error:?}");
    }

    fn image() -> Image {
        Image::new(512)
    }

    #[test]
    fn bios_disks() {
        check(image().boot_code(), Firmware::Bios, "MBR boot code");
        check(image().boot_code().mbr_entry(0, true, 0x07), Firmware::Bios, "active partition");
        check(image().boot_code().gpt(&[(BIOS_BOOT, 0), (LINUX, 0)]), Firmware::Bios, "BIOS boot");
        check(image().boot_code().gpt(&[(LINUX, 4)]), Firmware::Bios, "legacy-bootable");
        check(image().boot_code().gpt(&[(LINUX, 0)]), Firmware::Bios, "boot code in sector 0");
    }

    #[test]
    fn uefi_disks() {
        check(image().gpt(&[(EFI_SYSTEM, 0)]), Firmware::Uefi, "an EFI system partition");
        check(image().mbr_entry(0, false, 0xef), Firmware::Uefi, "in an MBR");
        check(image().boot_code().gpt(&[(EFI_SYSTEM, 0)]), Firmware::Uefi, "the boot code in");
        check(Image::new(4096).gpt(&[(EFI_SYSTEM, 0)]), Firmware::Uefi, "an EFI system partition");
        check(image().gpt(&[(EFI_SYSTEM, 0), (BIOS_BOOT, 0)]), Firmware::Uefi, "EFI");
    }

    #[test]
    fn both_is_bios_and_says_so() {
        let both = image().boot_code().gpt(&[(BIOS_BOOT, 0), (EFI_SYSTEM, 0)]);
        check(both, Firmware::Bios, "there is an EFI system partition too");
        let both = image().boot_code().mbr_entry(0, true, 0x83).mbr_entry(1, false, 0xef);
        check(both, Firmware::Bios, "there is an EFI system partition in an MBR too");
    }

    #[test]
    fn a_damaged_primary_is_mentioned() {
        let mut image = image().gpt(&[(EFI_SYSTEM, 0)]);
        image.bytes[512] = 0;
        check(image, Firmware::Uefi, "its backup was read");
    }

    #[test]
    fn nothing_to_boot_is_said_in_words() {
        refused(image(), "no boot signature");
        refused(image().sign(), "");
        refused(image().gpt(&[(LINUX, 0)]), "");
        refused(image().gpt(&[(BIOS_BOOT, 0)]), "sector 0 has no code");
        refused(image().mbr_entry(0, false, 0xee), "both copies of the GPT are damaged");
    }

    #[test]
    fn the_disk_is_read_through_the_closure() {
        let disk = image().gpt(&[(EFI_SYSTEM, 0)]).bytes;
        let verdict = decide(disk.len() as u64, |at, buffer| {
            let at = usize::try_from(at).unwrap();
            buffer.copy_from_slice(&disk[at..at + buffer.len()]);
            Ok(())
        });
        assert_eq!(verdict.unwrap().firmware, Firmware::Uefi);
        let error = decide(1024, |_, _| Err(io::Error::other("lost"))).unwrap_err();
        assert!(matches!(error, FirmwareError::Read(_)));
    }
}
