#!/usr/bin/env python3
"""Puts GRUB for BIOS into a disk image, as grub-bios-setup would, but into a plain file.

usage: grubbios.py DISK CORE SECTOR

CORE is an i386-pc image by grub-mkimage; it goes to SECTOR and on, which must be free (the gap
before the first partition, or a BIOS boot partition). The boot sector gets GRUB's boot.img and
keeps its partition table. Offsets: GRUB 2.06, include/grub/i386/pc/boot.h and
grub-core/boot/i386/pc/{boot,diskboot}.S.
"""

import struct
import sys

BOOT_IMG = "/usr/lib/grub/i386-pc/boot.img"
SECTOR_BYTES = 512
MBR_CODE_BYTES = 440  # disk signature and partition table follow
KERNEL_SECTOR_AT = 0x5C  # boot.img: where core.img begins, u64
DRIVE_CHECK_AT = 0x66  # boot.img: a jump over a workaround that is needed for floppies only
BLOCKLIST_AT = 0x1F4  # core.img, sector 0: where its next sector is, u64, how many follow, u16


def main(disk_path, core_path, sector):
    with open(BOOT_IMG, "rb") as file:
        boot = bytearray(file.read(SECTOR_BYTES))
    with open(core_path, "rb") as file:
        core = bytearray(file.read())
    core.extend(bytes(-len(core) % SECTOR_BYTES))
    following = len(core) // SECTOR_BYTES - 1
    (first,) = struct.unpack_from("<Q", core, BLOCKLIST_AT)
    if first != 2:
        sys.exit(f"{core_path} is no core image as this script knows it")
    struct.pack_into("<Q", boot, KERNEL_SECTOR_AT, sector)
    boot[DRIVE_CHECK_AT : DRIVE_CHECK_AT + 2] = b"\x90\x90"
    struct.pack_into("<QH", core, BLOCKLIST_AT, sector + 1, following)
    with open(disk_path, "r+b") as disk:
        disk.seek(sector * SECTOR_BYTES)
        if any(disk.read(len(core))):
            sys.exit(f"sectors {sector} to {sector + following} are not free")
        disk.seek(sector * SECTOR_BYTES)
        disk.write(core)
        disk.seek(0)
        disk.write(boot[:MBR_CODE_BYTES])


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
