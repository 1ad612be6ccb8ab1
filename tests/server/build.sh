#!/bin/bash
# Builds the demo server: a real Debian 12 on a raw disk, with a workload that can tell after any
# crash what it has lost (see README.md).
#
#   tests/server/build.sh [--firmware bios|uefi] [--size 2G] [--fill BYTES] OUT.raw
#
# --firmware  bios: MBR, GRUB in the gap before the first partition. uefi: GPT, an EFI system
#             partition, GRUB as \EFI\BOOT\BOOTX64.EFI. Default bios.
# --size      of the disk, with K, M or G. Default 2G.
# --fill      adds real files (of Debian packages) of that many bytes, with K, M or G, in /srv/fill.
#
# Packages and the finished file system are cached under $SRN_CACHE (default: cache/ at the
# repository's top). Needs no loop device and no kernel module. As root it installs what is missing;
# as another user it needs subordinate ids (/etc/subuid) and prints what is missing.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
top=$(cd "$here/../.." && pwd)
cache=$(realpath -m "${SRN_CACHE:-$top/cache}/server")
export LC_ALL=C

usage() {
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0" >&2
    exit 2
}

fail() {
    echo "$0: $*" >&2
    exit 1
}

bytes() {
    numfmt --from=iec "$1" 2>/dev/null || fail "not a size: $1"
}

firmware=bios size=2G fill=0 out=
while [[ $# -gt 0 ]]; do
    case $1 in
    --firmware) firmware=${2:-} && shift ;;
    --size) size=${2:-} && shift ;;
    --fill) fill=${2:-} && shift ;;
    -*) usage ;;
    *)
        [[ -z $out ]] || usage
        out=$1
        ;;
    esac
    shift
done
[[ -n $out && ($firmware == bios || $firmware == uefi) ]] || usage
size=$(bytes "$size") fill=$(bytes "$fill")
sectors=$((size / 512))
out_folder=$(cd "$(dirname "$out")" && pwd) || fail "no folder for $out"
out=$out_folder/$(basename "$out")

# The first sector of the root partition, behind GRUB's gap or the EFI system partition.
esp_sectors=131072 # 64 MiB: FAT32 needs that many clusters
root_at=2048
[[ $firmware == bios ]] || root_at=$((2048 + esp_sectors))
# The last MiB stays free: the backup GPT is there.
root_sectors=$((sectors - root_at - 2048))
((root_sectors * 512 > fill + (512 << 20))) || fail "too small for the system and its fill: $size"

# Chown and chroot need root, or a namespace in which we are it.
in_namespace=()
if [[ $(id -u) -ne 0 ]]; then
    in_namespace=(unshare --user --map-auto --map-root-user --mount --pid --fork --mount-proc)
fi
as_root() {
    "${in_namespace[@]}" "$@"
}

"$top/tests/setup/packages.sh" server
mkdir -p "$cache"
exec 9>"$cache/lock"
flock -n 9 || { echo "waiting for another build" >&2 && flock 9; }

# Whoever holds the lock is alone here: what lies about was left by a build that was killed.
# shellcheck disable=SC2016  # for the inner shell
as_root bash -c 'rm -rf --one-file-system "$0"/work.*' "$cache"
work='' partial=''
clean_up() {
    # What the namespace's root made belongs to ids that only it may remove.
    [[ -z $work ]] || as_root rm -rf --one-file-system "$work"
    [[ -z $partial ]] || rm -f "$partial"
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP
work=$(mktemp -d "$cache/work.XXXXXX")
partial=$(mktemp "$out.XXXXXX")

hash_of() {
    cat "$@" | sha256sum | cut -c1-16
}

# The tree of the server, from the cache or made now. Sets $tree.
make_tree() {
    local base_key base tree_key
    base_key=$(sed -n '/^base()/,/^}/p' "$here/tree.sh" |
        hash_of - "$here/packages.txt" "$here/exclude.txt" "$here/include.txt")
    base=$cache/base-$base_key.tar
    if [[ ! -e $base ]]; then
        echo "making the base system (once for this recipe)"
        "$here/tree.sh" base "$work/base.tar" "$cache/debs"
        mv "$work/base.tar" "$base"
    fi
    tree_key=$({
        echo "$base_key"
        cat "$here/tree.sh"
        cd "$here/overlay" && find . -type f -printf '%m %p\n' -exec cat {} + | sort
    } | hash_of -)
    tree=$cache/tree-$tree_key.tar
    if [[ ! -e $tree ]]; then
        echo "making the server's tree"
        mkdir "$work/tree"
        as_root "$here/tree.sh" tree "$base" "$work/tree/tree.tar"
        mv "$work/tree/tree.tar" "$tree"
        # Trees of older recipes are of no use any more.
        find "$cache" -maxdepth 1 \( -name 'base-*.tar' -o -name 'tree-*.tar' \) \
            ! -path "$base" ! -path "$tree" -delete
    fi
}

# Unpacks packages into the given folder until the fill is reached; they are fetched one by one.
make_fill() {
    local folder=$1 left=$fill package written debs=$cache/fill
    local apt=(apt-get -qq -o "Dir::State=$debs/state" -o "Dir::Cache=$debs/cache"
        -o "Dir::Etc::SourceList=$debs/sources.list" -o Dir::Etc::SourceParts=-
        -o "Dir::State::status=$debs/status" -o APT::Architecture=amd64 -o APT::Sandbox::User=)
    mkdir -p "$folder" "$debs/state/lists/partial" "$debs/cache/archives/partial"
    while read -r package && ((left > 0)); do
        if ! compgen -G "$debs/${package}_*.deb" >/dev/null; then
            echo "fetching $package"
            if [[ ! -s $debs/sources.list ]]; then
                : >"$debs/status"
                echo 'deb http://deb.debian.org/debian bookworm main' >"$debs/sources.list.new"
                mv "$debs/sources.list.new" "$debs/sources.list"
            fi
            [[ -n ${lists_are_fresh:-} ]] || "${apt[@]}" update
            lists_are_fresh=yes
            (cd "$work" && "${apt[@]}" download "$package" && mv "${package}"_*.deb "$debs/")
        fi
        written=$(dpkg-deb --fsys-tarfile "$debs/${package}"_*.deb |
            "$here/fill.py" "$folder" "$left" "$package")
        left=$((left - written))
    done <"$here/fill.txt"
    ((left == 0)) || fail "the packages in fill.txt are $left bytes too small"
}

# A partition table, and a loader that finds the root file system by its UUID.
partition_bios() {
    local id=0x${root_uuid:0:8}
    sfdisk --quiet --no-reread "$partial" <<-TABLE
		label: dos
		label-id: $id
		start=$root_at, size=$root_sectors, type=83, bootable
	TABLE
    grub-mkimage -O i386-pc -p /boot/grub -c "$work/early.cfg" -o "$work/core.img" \
        biosdisk part_msdos ext2 linux normal configfile search search_fs_uuid serial terminal echo
    "$here/grubbios.py" "$partial" "$work/core.img" 1
}

partition_uefi() {
    sfdisk --quiet --no-reread "$partial" <<-TABLE
		label: gpt
		label-id: ${root_uuid/%????/0000}
		start=2048, size=$esp_sectors, type=U, uuid=${root_uuid/%????/0001}
		start=$root_at, size=$root_sectors, type=L, uuid=${root_uuid/%????/0002}
	TABLE
    mkdir -p "$work/EFI/BOOT"
    grub-mkimage -O x86_64-efi -p /EFI/BOOT -c "$work/early.cfg" -o "$work/EFI/BOOT/BOOTX64.EFI" \
        part_gpt fat ext2 linux normal configfile search search_fs_uuid serial terminal echo
    mkfs.vfat --invariant -i "${root_uuid:0:8}" -F 32 -s 1 -C "$work/esp.img" \
        $((esp_sectors / 2)) >/dev/null
    mcopy -s -m -i "$work/esp.img" "$work/EFI" ::/
    dd if="$work/esp.img" of="$partial" bs=1M seek=1 conv=notrunc,sparse status=none
}

make_tree

# Equal options give an equal id, different images different ones: a boot loader that sees two disks
# must not take the other's.
root_uuid=$(echo "$tree $firmware $size $fill" | sha256sum |
    sed -E 's/^(.{8})(.{4}).(.{3}).(.{3})(.{12}).*/\1-\2-4\3-8\4-\5/')
cat >"$work/early.cfg" <<GRUB
serial --unit=0 --speed=115200
terminal_output serial
search --no-floppy --fs-uuid --set=root $root_uuid
set prefix=(\$root)/boot/grub
configfile /boot/grub/grub.cfg
GRUB
kernel_options="console=tty0 console=ttyS0,115200 quiet loglevel=3 systemd.show_status=false panic=10"
cat >"$work/grub.cfg" <<GRUB
set timeout=0
linux /boot/vmlinuz root=UUID=$root_uuid ro $kernel_options
initrd /boot/initrd.img
boot
GRUB

echo "making the disk"
truncate -s "$size" "$partial"
"partition_$firmware"
if ((fill > 0)); then
    make_fill "$work/fill"
fi
# shellcheck disable=SC2016  # for the inner shell
as_root bash -euc '
    work=$1 tree=$2 disk=$3 uuid=$4 offset=$5 kibibytes=$6
    mkdir "$work/root"
    tar -xf "$tree" -C "$work/root" --numeric-owner
    mkdir -p "$work/root/boot/grub"
    cp "$work/grub.cfg" "$work/root/boot/grub/grub.cfg"
    echo "UUID=$uuid / ext4 defaults 0 1" >"$work/root/etc/fstab"
    if [[ -d $work/fill ]]; then
        mv "$work/fill" "$work/root/srv/fill"
        chown -R 0:0 "$work/root/srv/fill"
    fi
    # GRUB 2.06 cannot read metadata_csum_seed.
    mkfs.ext4 -q -F -L demo-root -U "$uuid" -m 1 -O ^metadata_csum_seed -d "$work/root" \
        -E "offset=$offset,hash_seed=$uuid,root_owner=0:0,lazy_itable_init=0,lazy_journal_init=0" \
        "$disk" "${kibibytes}k"
' - "$work" "$tree" "$partial" "$root_uuid" $((root_at * 512)) $((root_sectors / 2))

chmod 644 "$partial"
mv "$partial" "$out"
in_use=$(du -h "$out" | cut -f1)
echo "made $out ($firmware, $(numfmt --to=iec "$size"), $in_use in use)"
