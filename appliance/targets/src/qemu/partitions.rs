//! The partition tables of a disk, read as hostile input.
//!
//! A recovered disk was written by a server we know nothing of, so every length is checked before
//! it is used, a GPT counts only when both its checksums hold, and nothing larger than
//! [`TABLE_BYTES_MAX`] is ever read. This module says what the tables say; what that means for the
//! firmware is decided in [`super::firmware`]. It refuses to look into partitions.
//!
//! Sources: UEFI Specification 2.10, chapter 5 (GPT disk layout); the MBR layout of its section
//! 5.2.1.

use std::io;

/// The most bytes of one GPT entry array that are read: 8192 entries of 128 bytes. Every tool in
/// use writes 128 entries (16 KiB).
pub const TABLE_BYTES_MAX: u64 = 1 << 20;

/// The sector sizes a table is looked for with, in bytes: 512, and 4096 for "4K native" disks.
const SECTOR_SIZES: [u32; 2] = [512, 4096];

/// Type GUID of an EFI system partition, as the bytes on disk
/// (C12A7328-F81F-11D2-BA4B-00A0C93EC93B).
const GUID_EFI_SYSTEM: [u8; 16] = [
    0x28, 0x73, 0x2a, 0xc1, 0x1f, 0xf8, 0xd2, 0x11, 0xba, 0x4b, 0x00, 0xa0, 0xc9, 0x3e, 0xc9, 0x3b,
];

/// Type GUID of a BIOS boot partition (GRUB's), as the bytes on disk
/// (21686148-6449-6E6F-744E-656564454649).
const GUID_BIOS_BOOT: [u8; 16] = [
    0x48, 0x61, 0x68, 0x21, 0x49, 0x64, 0x6f, 0x6e, 0x74, 0x4e, 0x65, 0x65, 0x64, 0x45, 0x46, 0x49,
];

/// GPT attribute bit 2, "legacy BIOS bootable": how boot code such as syslinux finds its partition.
const ATTRIBUTE_LEGACY_BOOT: u64 = 1 << 2;

/// MBR partition types that matter here.
const MBR_TYPE_EMPTY: u8 = 0x00;
const MBR_TYPE_PROTECTIVE: u8 = 0xee;
const MBR_TYPE_EFI_SYSTEM: u8 = 0xef;

/// How many leading bytes of sector 0 are boot code; a disk signature and the partition entries
/// follow.
const BOOT_CODE_BYTES: usize = 440;

/// What the partition tables of a disk say about starting from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Tables {
    /// Sector 0 ends in 55 AA, so a BIOS would run it.
    pub boot_signature: bool,
    /// Sector 0 has that signature and its code area is not empty.
    pub boot_code: bool,
    /// An MBR partition is marked active.
    pub active_partition: bool,
    /// The MBR, which is not a protective one, names an EFI system partition.
    pub mbr_efi_system: bool,
    /// What the GPT says, where there is one behind a protective MBR.
    pub gpt: Gpt,
}

/// The GPT of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Gpt {
    /// No protective MBR, so no firmware would look for a GPT.
    #[default]
    None,
    /// A protective MBR, but neither copy of the table has valid checksums.
    Damaged,
    /// A valid table.
    Valid {
        /// There is an EFI system partition.
        efi_system: bool,
        /// There is a BIOS boot partition.
        bios_boot: bool,
        /// A partition carries the attribute "legacy BIOS bootable".
        legacy_bootable: bool,
        /// The primary copy was damaged or missing; this is the backup at the disk's end.
        from_backup: bool,
        /// The sector size, in bytes, that the table is laid out for: 512 or 4096.
        sector_bytes: u32,
    },
}

/// Reads the tables of a disk of `size_bytes` bytes.
///
/// `read_at(offset_bytes, buffer)` fills the whole buffer or fails; it is never asked for bytes
/// past `size_bytes`.
///
/// # Errors
/// Only those of `read_at`. Whatever nonsense the disk holds is an answer, not an error.
pub fn read(
    size_bytes: u64,
    read_at: &mut dyn FnMut(u64, &mut [u8]) -> io::Result<()>,
) -> io::Result<Tables> {
    let mut mbr = [0_u8; 512];
    if size_bytes < mbr.len() as u64 {
        return Ok(Tables::default());
    }
    read_at(0, &mut mbr)?;
    let mut tables = read_mbr(&mbr);
    if mbr_entries(&mbr).any(|entry| entry.kind == MBR_TYPE_PROTECTIVE) {
        tables.gpt = read_gpt(size_bytes, read_at)?;
        // What a hybrid MBR repeats beside the protective entry, the GPT says better.
        tables.mbr_efi_system = false;
    }
    Ok(tables)
}

struct MbrEntry {
    active: bool,
    kind: u8,
}

/// The four primary entries, none when the sector lacks the boot signature.
fn mbr_entries(mbr: &[u8; 512]) -> impl Iterator<Item = MbrEntry> + '_ {
    let signed = mbr.ends_with(&[0x55, 0xaa]);
    mbr.get(446..510).unwrap_or_default().chunks_exact(16).filter(move |_| signed).filter_map(|e| {
        let (active, kind) = (e.first()?, e.get(4)?);
        Some(MbrEntry { active: *active == 0x80, kind: *kind })
    })
}

fn read_mbr(mbr: &[u8; 512]) -> Tables {
    let boot_signature = mbr.ends_with(&[0x55, 0xaa]);
    let code = mbr.get(..BOOT_CODE_BYTES).unwrap_or_default();
    Tables {
        boot_signature,
        boot_code: boot_signature && code.iter().any(|byte| *byte != 0),
        active_partition: mbr_entries(mbr).any(|e| e.active && e.kind != MBR_TYPE_EMPTY),
        mbr_efi_system: mbr_entries(mbr).any(|e| e.kind == MBR_TYPE_EFI_SYSTEM),
        gpt: Gpt::None,
    }
}

/// The first valid copy: primary with either sector size, then backup with either.
fn read_gpt(
    size_bytes: u64,
    read_at: &mut dyn FnMut(u64, &mut [u8]) -> io::Result<()>,
) -> io::Result<Gpt> {
    for from_backup in [false, true] {
        for sector_bytes in SECTOR_SIZES {
            let sectors = size_bytes / u64::from(sector_bytes);
            if sectors < 3 {
                continue;
            }
            let lba = if from_backup { sectors - 1 } else { 1 };
            let mut sector = [0_u8; 512];
            read_at(lba * u64::from(sector_bytes), &mut sector)?;
            let Some(header) = GptHeader::parse(&sector, lba, sectors, sector_bytes) else {
                continue;
            };
            if let Some(found) = read_entries(&header, read_at)? {
                return Ok(Gpt::Valid {
                    efi_system: found.efi_system,
                    bios_boot: found.bios_boot,
                    legacy_bootable: found.legacy_bootable,
                    from_backup,
                    sector_bytes,
                });
            }
        }
    }
    Ok(Gpt::Damaged)
}

/// The part of a GPT header needed to read its entries, every field checked.
struct GptHeader {
    entries_offset_bytes: u64,
    entries_bytes: u64,
    entry_bytes: usize,
    entries_crc: u32,
}

impl GptHeader {
    fn parse(sector: &[u8; 512], lba: u64, sectors: u64, sector_bytes: u32) -> Option<Self> {
        let sector_bytes = u64::from(sector_bytes);
        if !sector.starts_with(b"EFI PART") {
            return None;
        }
        // The header's own length says how much its checksum covers.
        let header_bytes = u32_at(sector, 12)? as usize;
        if !(92..=512).contains(&header_bytes) {
            return None;
        }
        let mut covered = sector.get(..header_bytes)?.to_vec();
        covered.get_mut(16..20)?.fill(0);
        if crc32fast::hash(&covered) != u32_at(sector, 16)? {
            return None;
        }
        if u64_at(sector, 24)? != lba {
            return None;
        }
        let entries_lba = u64_at(sector, 72)?;
        let entry_count = u64::from(u32_at(sector, 80)?);
        let entry_bytes = u64::from(u32_at(sector, 84)?);
        // 128 times a power of two, says the specification; a table that is not so was not written
        // by a partitioning tool.
        if !(128..=4096).contains(&entry_bytes) || !entry_bytes.is_power_of_two() {
            return None;
        }
        let entries_bytes = entry_count.checked_mul(entry_bytes)?;
        if entry_count == 0 || entries_bytes > TABLE_BYTES_MAX {
            return None;
        }
        let entries_offset_bytes = entries_lba.checked_mul(sector_bytes)?;
        let end = entries_offset_bytes.checked_add(entries_bytes)?;
        if entries_lba == 0 || end > sectors.checked_mul(sector_bytes)? {
            return None;
        }
        Some(Self {
            entries_offset_bytes,
            entries_bytes,
            entry_bytes: usize::try_from(entry_bytes).ok()?,
            entries_crc: u32_at(sector, 88)?,
        })
    }
}

#[derive(Default)]
struct Found {
    efi_system: bool,
    bios_boot: bool,
    legacy_bootable: bool,
}

/// Walks the entry array in pieces of 4 KiB (a multiple of every entry size); its findings count
/// only when the checksum over the whole array holds.
fn read_entries(
    header: &GptHeader,
    read_at: &mut dyn FnMut(u64, &mut [u8]) -> io::Result<()>,
) -> io::Result<Option<Found>> {
    let mut found = Found::default();
    let mut checksum = crc32fast::Hasher::new();
    let mut piece = [0_u8; 4096];
    let mut done = 0;
    while done < header.entries_bytes {
        let length = (header.entries_bytes - done).min(piece.len() as u64) as usize;
        let Some(bytes) = piece.get_mut(..length) else { break };
        read_at(header.entries_offset_bytes + done, bytes)?;
        checksum.update(bytes);
        for entry in bytes.chunks_exact(header.entry_bytes) {
            let kind = entry.get(..16).unwrap_or_default();
            if kind.iter().all(|byte| *byte == 0) {
                continue;
            }
            found.efi_system |= kind == GUID_EFI_SYSTEM;
            found.bios_boot |= kind == GUID_BIOS_BOOT;
            found.legacy_bootable |=
                u64_at(entry, 48).is_some_and(|bits| bits & ATTRIBUTE_LEGACY_BOOT != 0);
        }
        done += length as u64;
    }
    Ok((checksum.finalize() == header.entries_crc).then_some(found))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().map(|four| u32::from_le_bytes(*four))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..)?.first_chunk().map(|eight| u64::from_le_bytes(*eight))
}

#[cfg(test)]
pub(crate) mod tests {
    //! Tables built by hand, and random damage to them.

    use super::*;
    use proptest::prelude::*;

    pub(crate) const EFI_SYSTEM: [u8; 16] = GUID_EFI_SYSTEM;
    pub(crate) const BIOS_BOOT: [u8; 16] = GUID_BIOS_BOOT;
    pub(crate) const LINUX: [u8; 16] = [0xaf; 16];

    /// A disk image under construction, for this module's and the firmware's tests.
    pub(crate) struct Image {
        pub(crate) bytes: Vec<u8>,
        pub(crate) sector_bytes: usize,
    }

    impl Image {
        pub(crate) fn new(sector_bytes: usize) -> Self {
            Self { bytes: vec![0; 256 * 1024], sector_bytes }
        }

        pub(crate) fn boot_code(mut self) -> Self {
            self.bytes[..4].copy_from_slice(&[0xeb, 0x63, 0x90, 0x10]);
            self.sign()
        }

        pub(crate) fn sign(mut self) -> Self {
            self.bytes[510..512].copy_from_slice(&[0x55, 0xaa]);
            self
        }

        pub(crate) fn mbr_entry(mut self, index: usize, active: bool, kind: u8) -> Self {
            self.bytes[446 + 16 * index] = if active { 0x80 } else { 0 };
            self.bytes[446 + 16 * index + 4] = kind;
            self.sign()
        }

        /// A protective MBR and both copies of a GPT with these (type, attributes).
        pub(crate) fn gpt(self, entries: &[([u8; 16], u64)]) -> Self {
            let mut image = self.mbr_entry(0, false, 0xee);
            let sectors = image.bytes.len() / image.sector_bytes;
            let table_sectors = 16384_usize.div_ceil(image.sector_bytes);
            let mut table = vec![0_u8; 16384];
            for (entry, (kind, attributes)) in table.chunks_mut(128).zip(entries) {
                entry[..16].copy_from_slice(kind);
                entry[16..32].fill(0x11);
                entry[48..56].copy_from_slice(&attributes.to_le_bytes());
            }
            image.gpt_copy(1, sectors - 1, 2, &table);
            image.gpt_copy(sectors - 1, 1, sectors - 1 - table_sectors, &table);
            image
        }

        fn gpt_copy(&mut self, lba: usize, other: usize, entries_lba: usize, table: &[u8]) {
            let mut header = [0_u8; 92];
            header[..8].copy_from_slice(b"EFI PART");
            header[8..12].copy_from_slice(&0x1_0000_u32.to_le_bytes());
            header[12..16].copy_from_slice(&92_u32.to_le_bytes());
            for (at, value) in [(24, lba), (32, other), (40, 64), (48, 100), (72, entries_lba)] {
                header[at..at + 8].copy_from_slice(&(value as u64).to_le_bytes());
            }
            for (at, value) in [(80, 128), (84, 128), (88, crc32fast::hash(table))] {
                header[at..at + 4].copy_from_slice(&value.to_le_bytes());
            }
            let checksum = crc32fast::hash(&header);
            header[16..20].copy_from_slice(&checksum.to_le_bytes());
            let at = lba * self.sector_bytes;
            self.bytes[at..at + 92].copy_from_slice(&header);
            let at = entries_lba * self.sector_bytes;
            self.bytes[at..at + table.len()].copy_from_slice(table);
        }

        /// Seals the primary header again after a test changed its fields.
        fn reseal(mut self) -> Self {
            let at = self.sector_bytes;
            self.bytes[at + 16..at + 20].fill(0);
            let length = u32_at(&self.bytes, at + 12).unwrap().clamp(92, 512) as usize;
            let checksum = crc32fast::hash(&self.bytes[at..at + length]);
            self.bytes[at + 16..at + 20].copy_from_slice(&checksum.to_le_bytes());
            self
        }

        fn put(mut self, at: usize, bytes: &[u8]) -> Self {
            self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
            self
        }

        pub(crate) fn tables(&self) -> Tables {
            let mut largest = 0;
            let tables = read(self.bytes.len() as u64, &mut |at, buffer| {
                largest = largest.max(buffer.len());
                let at = usize::try_from(at).unwrap();
                buffer.copy_from_slice(&self.bytes[at..at + buffer.len()]);
                Ok(())
            });
            assert!(largest <= 4096, "reads are small whatever the table says");
            tables.unwrap()
        }
    }

    fn valid(efi_system: bool, bios_boot: bool, from_backup: bool) -> Gpt {
        Gpt::Valid { efi_system, bios_boot, legacy_bootable: false, from_backup, sector_bytes: 512 }
    }

    #[test]
    fn an_empty_disk_has_no_tables() {
        assert_eq!(Image::new(512).tables(), Tables::default());
        assert_eq!(read(0, &mut |_, _| panic!("nothing to read")).unwrap(), Tables::default());
    }

    #[test]
    fn boot_code_without_its_signature_is_none() {
        let image = Image::new(512).put(0, &[0xeb, 0x63]);
        assert_eq!(image.tables(), Tables::default());
    }

    #[test]
    fn the_mbr_is_read() {
        let tables = Image::new(512).boot_code().mbr_entry(1, true, 0x83).tables();
        assert!(tables.boot_code && tables.active_partition && !tables.mbr_efi_system);
        assert_eq!(tables.gpt, Gpt::None);
        assert!(Image::new(512).mbr_entry(2, false, 0xef).tables().mbr_efi_system);
    }

    #[test]
    fn a_gpt_is_found_with_both_sector_sizes() {
        for size in [512, 4096] {
            let image = Image::new(size).gpt(&[(LINUX, 0), (EFI_SYSTEM, 0)]);
            let Gpt::Valid { efi_system: true, from_backup: false, sector_bytes, .. } =
                image.tables().gpt
            else {
                panic!("{size}")
            };
            assert_eq!(sector_bytes as usize, size);
        }
    }

    #[test]
    fn the_legacy_boot_attribute_is_seen() {
        let image = Image::new(512).gpt(&[(LINUX, ATTRIBUTE_LEGACY_BOOT)]);
        let Gpt::Valid { legacy_bootable, .. } = image.tables().gpt else { panic!() };
        assert!(legacy_bootable);
    }

    #[test]
    fn the_backup_serves_when_the_primary_is_damaged() {
        for damaged_at in [512, 512 + 40, 1024 + 3] {
            let image = Image::new(512).gpt(&[(BIOS_BOOT, 0)]).put(damaged_at, b"\xee");
            assert_eq!(image.tables().gpt, valid(false, true, true), "{damaged_at}");
        }
    }

    #[test]
    fn two_damaged_copies_are_said_to_be_damaged() {
        let image = Image::new(512).gpt(&[(EFI_SYSTEM, 0)]).put(512, b"!");
        let last = image.bytes.len() - 512;
        assert_eq!(image.put(last, b"!").tables().gpt, Gpt::Damaged);
    }

    #[test]
    fn absurd_fields_under_a_good_checksum_are_refused() {
        let cases: [(usize, &[u8]); 7] = [
            (12, &u32::MAX.to_le_bytes()),         // header length
            (72, &u64::MAX.to_le_bytes()),         // where the entries are
            (72, &(u64::MAX / 512).to_le_bytes()), // the same, product fits
            (80, &u32::MAX.to_le_bytes()),         // how many
            (84, &u32::MAX.to_le_bytes()),         // how large
            (84, &0_u32.to_le_bytes()),            // of no size
            (80, &0_u32.to_le_bytes()),            // none
        ];
        for (at, bytes) in cases {
            let image = Image::new(512).gpt(&[(EFI_SYSTEM, 0)]).put(512 + at, bytes).reseal();
            assert_eq!(image.tables().gpt, valid(true, false, true), "field {at}: backup serves");
        }
    }

    #[test]
    fn a_read_error_is_passed_on() {
        let error = read(1 << 20, &mut |_, _| Err(io::Error::other("gone"))).unwrap_err();
        assert_eq!(error.to_string(), "gone");
    }

    proptest! {
        /// Random bytes after a valid signature: an answer, no panic, no large read.
        #[test]
        fn random_sectors_are_survived(
            seed in prop::collection::vec(any::<u8>(), 2048),
            size in 0_usize..200_000,
            kind in prop::sample::select(vec![0_u8, 0x83, 0xee, 0xef]),
        ) {
            let mut image = Image::new(512).mbr_entry(0, true, kind);
            image.bytes.truncate(size);
            for at in [512, size.saturating_sub(512)] {
                if let Some(place) = image.bytes.get_mut(at..at + 512) {
                    place.copy_from_slice(&seed[..512]);
                    place[..8].copy_from_slice(b"EFI PART");
                }
            }
            image.tables();
        }

        /// A valid header with any fields and a recomputed checksum, so the checks behind the
        /// checksum are reached.
        #[test]
        fn sealed_nonsense_is_survived(
            changes in prop::collection::vec((8_usize..92, any::<u8>()), 1..40),
            sector_bytes in prop::sample::select(vec![512_usize, 4096]),
        ) {
            let mut image = Image::new(sector_bytes).gpt(&[(EFI_SYSTEM, 0)]);
            for (at, byte) in changes {
                image.bytes[sector_bytes + at] = byte;
            }
            image.reseal().tables();
        }

        /// Any damage to one copy leaves the answer of the other.
        #[test]
        fn one_damaged_copy_never_changes_the_answer(
            damage in prop::collection::vec((512_usize..1024 + 16384, any::<u8>()), 1..20),
        ) {
            let mut image = Image::new(512).gpt(&[(EFI_SYSTEM, 0), (BIOS_BOOT, 0)]);
            for (at, byte) in damage {
                image.bytes[at] = byte;
            }
            let Gpt::Valid { efi_system, bios_boot, .. } = image.tables().gpt else {
                panic!("the backup is untouched")
            };
            prop_assert!(efi_system && bios_boot);
        }
    }
}
