#!/bin/bash
# Makes the guest of the power test: Debian's kernel, and an initramfs with busybox, e2fsprogs,
# our init and the srn binary with the libraries it needs.
#
#   guest.sh SRN OUT     writes OUT/vmlinuz and OUT/initrd
#
# The kernel is the one in the cache of tests/server where that is filled, else it is fetched; what
# the guest needs of it is kept under $SRN_CACHE/power (default: cache/ at the repository's top).
# As root it installs missing packages; as another user it prints what is missing.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
top=$(cd "$here/../.." && pwd)
cache=$(realpath -m "${SRN_CACHE:-$top/cache}")
export LC_ALL=C

# Disk, network and file system, with what they depend on.
modules=(
    drivers/virtio/{virtio,virtio_ring,virtio_pci,virtio_pci_legacy_dev,virtio_pci_modern_dev}
    drivers/block/virtio_blk net/core/failover drivers/net/{net_failover,virtio_net}
    crypto/crc32c_generic lib/crc16 fs/mbcache fs/jbd2/jbd2 fs/ext4/ext4
)

fail() {
    echo "$0: $*" >&2
    exit 1
}

[[ $# -eq 2 ]] || fail "usage: $0 SRN OUT"
srn=$1 out=$2
[[ -x $srn ]] || fail "no srn binary at $srn: build it with cargo build -p srn"

"$top/tests/setup/packages.sh" power
mkdir -p "$cache/power" "$out"
exec 9>"$cache/power/lock"
flock 9
work=$(mktemp -d "$cache/power/work.XXXXXX")
trap 'rm -rf --one-file-system "$work"' EXIT

# The package of the newest kernel that is at hand, or one that is fetched now. Sets $package.
find_kernel() {
    local name debs=()
    mapfile -t debs < <(find "$cache" -maxdepth 3 -path "$cache/server/debs/*" -o \
        -path "$cache/power/*" | grep -E '/linux-image-[0-9][^/]*-amd64_[^/]*\.deb$')
    if [[ ${#debs[@]} -eq 0 ]]; then
        name=$(apt-cache depends linux-image-amd64 | awk '/Depends: linux-image-/ {print $2; exit}')
        [[ -n $name ]] || fail "apt does not know linux-image-amd64: run apt-get update"
        echo "fetching $name"
        (cd "$work" && apt-get -qq -o APT::Sandbox::User= download "$name")
        mv "$work/$name"_*.deb "$cache/power/"
        debs=("$cache/power/$name"_*.deb)
    fi
    package=$(printf '%s\n' "${debs[@]}" | sort -V | tail -n 1)
}

# What the guest needs of the kernel, unpacked once per kernel and list. Sets $kernel.
unpack_kernel() {
    local key files=()
    key=$( (basename "$package" && echo "${modules[@]}") | sha256sum | cut -c1-16)
    kernel=$cache/power/kernel-$key
    if [[ ! -d $kernel ]]; then
        echo "unpacking $(basename "$package")"
        files=("${modules[@]/#/./lib/modules/*/kernel/}")
        mkdir "$work/kernel"
        dpkg-deb --fsys-tarfile "$package" |
            tar -x -C "$work/kernel" --wildcards './boot/vmlinuz-*' "${files[@]/%/.ko}"
        busybox depmod -b "$work/kernel" "$(basename "$work"/kernel/lib/modules/*)"
        mv "$work/kernel" "$kernel"
    fi
}

# Puts a program into the tree, with the libraries it is linked to.
add_program() {
    local from=$1 to=$2 library
    install -D -s "$from" "$work/root/$to"
    while read -r library; do
        [[ -e $work/root$library ]] || install -D "$(realpath "$library")" "$work/root$library"
    done < <(ldd "$from" | grep -oE '/[^ ]+')
}

find_kernel
unpack_kernel
mkdir -p "$work/root"/{bin,dev,proc,sys,run,state,tmp,etc/srn}
cp "$(command -v busybox)" "$work/root/bin/busybox"
for program in mke2fs e2fsck; do
    add_program "$(PATH=/usr/sbin:/sbin command -v $program)" sbin/$program
done
add_program "$srn" bin/srn
cp /etc/mke2fs.conf "$work/root/etc/"
cp "$here/srn.toml" "$work/root/etc/srn/config.toml"
install -m 755 "$here/init" "$work/root/init"
cp -r "$kernel/lib/modules" "$work/root/lib/"
(cd "$work/root" && find . | cpio --quiet -o -H newc -R 0:0) >"$work/initrd"
cp "$kernel"/boot/vmlinuz-* "$work/vmlinuz"
mv "$work/initrd" "$work/vmlinuz" "$out/"
echo "made the guest: $(basename "$package"), initrd of $(stat -c %s "$out/initrd") bytes"
