#!/bin/bash
# Makes the file system of the demo server as a tar.
#
#   tree.sh base OUT.tar DEBS     Debian's packages, unpacked and configured; those in the folder
#                                 DEBS are not fetched again
#   tree.sh tree BASE.tar OUT.tar our files on top, the initramfs, the units switched
#
# build.sh calls this and names the results by a hash over this file and all it reads.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
export LC_ALL=C
# Everything that takes a date takes this one, so that equal recipes make nearly equal trees.
export SOURCE_DATE_EPOCH=1750000000

# Units that cost seconds of emulated boot and give a server without network or people nothing.
masked=(
    apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer fstrim.timer
    e2scrub_reap.service getty@tty1.service serial-getty@ttyS0.service
    systemd-binfmt.service systemd-pstore.service systemd-rfkill.socket
    kmod-static-nodes.service modprobe@drm.service modprobe@fuse.service
    dev-hugepages.mount dev-mqueue.mount sys-kernel-debug.mount sys-kernel-tracing.mount
    sys-fs-fuse-connections.mount
)

base() {
    local out=$1 debs=$2 mode=root suite=bookworm
    [[ $(id -u) -eq 0 ]] || mode=unshare
    local options=()
    while read -r path; do options+=("--dpkgopt=path-exclude=$path"); done <"$here/exclude.txt"
    while read -r path; do options+=("--dpkgopt=path-include=$path"); done <"$here/include.txt"
    mkdir -p "$debs"
    # INITRD=No and the conffile: the initramfs is made once, later, not by every package's trigger.
    # shellcheck disable=SC2016  # "$1" is for mmdebstrap's hooks
    INITRD=No mmdebstrap --quiet --mode=$mode --variant=minbase \
        --include="$(paste -sd, "$here/packages.txt")" \
        "${options[@]}" --dpkgopt=force-confold --skip=download/empty,essential/unlink \
        --setup-hook='mkdir -p "$1/var/cache/apt/archives"' \
        --setup-hook="sync-in '$debs' /var/cache/apt/archives" \
        --essential-hook='mkdir -p "$1/etc/initramfs-tools"' \
        --essential-hook='cd "$1/etc/initramfs-tools"; echo update_initramfs=no >update-initramfs.conf' \
        --customize-hook="sync-out /var/cache/apt/archives '$debs'" \
        --customize-hook='rm -f "$1"/var/cache/apt/archives/*.deb' \
        "$suite" "$out" \
        "deb http://deb.debian.org/debian $suite main" \
        "deb http://deb.debian.org/debian $suite-updates main" \
        "deb http://deb.debian.org/debian-security $suite-security main"
}

tree() {
    local from=$1 out=$2 root unit kernel
    # Device nodes cannot be made by everybody, and udev makes them all anyway.
    root=$(mktemp -d "${out%/*}/tree.XXXXXX")
    # shellcheck disable=SC2064  # the path as it is now
    trap "rm -rf --one-file-system '$root'" EXIT
    tar -xf "$from" -C "$root" --exclude='./dev/*' --numeric-owner
    cp -rT --no-preserve=ownership "$here/overlay" "$root"
    chmod 755 "$root"
    mkdir -p "$root/srv/journal"
    # A fixed identity: without one, the first boot would go through every unit's presets.
    echo d0d0d0d0d0d0d0d0d0d0d0d0d0d0d0d0 >"$root/etc/machine-id"
    rm -f "$root/etc/resolv.conf" "$root"/var/lib/apt/lists/*_*
    for unit in "${masked[@]}"; do
        ln -sf /dev/null "$root/etc/systemd/system/$unit"
    done
    ln -sf /lib/systemd/system/multi-user.target "$root/etc/systemd/system/default.target"
    systemctl --quiet --root="$root" enable srn-server.service
    kernel=$(basename "$root"/lib/modules/*)
    # The mounts end with the namespace.
    # shellcheck disable=SC2016
    unshare --mount --propagation private bash -euc '
        mount --rbind /dev "$1/dev"
        mount --rbind /proc "$1/proc"
        chroot "$1" env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin SOURCE_DATE_EPOCH="$2" \
            mkinitramfs -o /boot/initrd.img "$3"
    ' - "$root" "$SOURCE_DATE_EPOCH" "$kernel"
    mv "$root/boot/vmlinuz-$kernel" "$root/boot/vmlinuz"
    tar -cf "$out" -C "$root" --numeric-owner --sort=name .
}

case ${1:-} in
base) base "$2" "$3" ;;
tree) tree "$2" "$3" ;;
*)
    echo "usage: $0 base OUT.tar DEBS | tree BASE.tar OUT.tar" >&2
    exit 2
    ;;
esac
