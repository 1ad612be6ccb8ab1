#!/bin/bash
# Proves that the demo server can be believed: it boots from BIOS and UEFI, announces what it has
# synced, finds all of it again after QEMU was killed in the middle, and notices damage.
#
#   tests/server/selftest.sh [--all]
#
# --all also boots it from every disk bus. Everything runs under emulation (TCG). Ends with 0 when
# every check held; each failed one is printed.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
top=$(cd "$here/../.." && pwd)
export LC_ALL=C
"$top/tests/setup/packages.sh" qemu server

work=$(mktemp -d)
qemu_pid=
clean_up() {
    [[ -z $qemu_pid ]] || kill -9 "$qemu_pid" 2>/dev/null || true
    rm -rf "$work"
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

failures=0
check() {
    local what=$1
    shift
    if "$@"; then
        echo "ok      $what"
    else
        echo "FAILED  $what"
        failures=$((failures + 1))
        tail -n 5 "$work/serial" | sed 's/^/        | /'
    fi
}

# start DISK FIRMWARE BUS [QEMU ARGUMENTS...]
start() {
    local disk=$1 firmware=$2 bus=$3 machine=q35 devices=()
    shift 3
    case $bus in
    virtio) devices=(-device "virtio-blk-pci,drive=disk") ;;
    nvme) devices=(-device "nvme,drive=disk,serial=demo") ;;
    scsi) devices=(-device "virtio-scsi-pci,id=bus" -device "scsi-hd,bus=bus.0,drive=disk") ;;
    pvscsi) devices=(-device "pvscsi,id=bus" -device "scsi-hd,bus=bus.0,drive=disk") ;;
    sata) devices=(-device "ide-hd,bus=ide.0,drive=disk") ;;
    ide) machine=pc devices=(-device "ide-hd,bus=ide.0,drive=disk") ;;
    esac
    if [[ $firmware == uefi ]]; then
        # Always fresh variables: a boot that failed leaves the firmware's shell first in the order.
        cp /usr/share/OVMF/OVMF_VARS_4M.fd "$work/variables"
        devices+=(-drive "if=pflash,format=raw,readonly=on,file=/usr/share/OVMF/OVMF_CODE_4M.fd"
            -drive "if=pflash,format=raw,file=$work/variables")
    fi
    rm -f "$work/serial" "$work/monitor"
    qemu-system-x86_64 -accel tcg,thread=multi -cpu max -smp 2 -m 512 -machine "$machine" \
        -no-user-config -nodefaults -display none -serial "file:$work/serial" \
        -monitor "unix:$work/monitor,server=on,wait=off" \
        -blockdev "driver=file,node-name=disk,filename=$disk" "${devices[@]}" "$@" &
    qemu_pid=$!
    started=$EPOCHREALTIME
}

# Waits until the console shows a line with PATTERN; fails at the deadline or when QEMU ends.
await() {
    local pattern=$1 deadline=$((SECONDS + ${2:-120}))
    until grep -qE "$pattern" "$work/serial" 2>/dev/null; do
        if ((SECONDS > deadline)) || ! kill -0 "$qemu_pid" 2>/dev/null; then
            grep -qE "$pattern" "$work/serial" 2>/dev/null
            return
        fi
        read -rt 0.1 <>"$work/never" || true
    done
}
mkfifo "$work/never"

seconds_since_start() {
    awk -v a="$started" -v b="$EPOCHREALTIME" 'BEGIN {printf "%.1f", b - a}'
}

kill_qemu() {
    [[ -n $qemu_pid ]] || return 0
    kill -9 "$qemu_pid" 2>/dev/null || true
    wait "$qemu_pid" 2>/dev/null || true
    qemu_pid=
}

# Waits until QEMU has ended by itself, at most so many seconds.
await_end() {
    local deadline=$((SECONDS + ${1:-120}))
    while kill -0 "$qemu_pid" 2>/dev/null; do
        ((SECONDS < deadline)) || return 1
        read -rt 0.1 <>"$work/never" || true
    done
    wait "$qemu_pid" || return 1
    qemu_pid=
}

# The value of a field in the line "found", or the number last synced.
found() {
    sed -nE "s/.*SRN-SERVER found .*\b$1=([^ \r]*).*/\1/p" "$work/serial" | tail -n 1
}
last_synced() {
    sed -nE 's/.*SRN-SERVER synced ([0-9]+) .*/\1/p' "$work/serial" | tail -n 1
}
found_all_of() {
    [[ $(found intact) == yes && $(found last) -ge $1 && $(found last) == $(found records) ]]
}

power_button() {
    python3 -c '
import socket, sys
monitor = socket.socket(socket.AF_UNIX)
monitor.connect(sys.argv[1])
monitor.recv(4096)
monitor.sendall(b"system_powerdown\n")
monitor.recv(4096)' "$work/monitor"
}

# Presses the power button until the machine ends: a server still booting does not notice it.
power_down() {
    for _ in {1..12}; do
        power_button
        if await_end 10; then
            return
        fi
    done
    return 1
}

# Flips a byte of the record with this number, where the file system has it.
damage_record() {
    local disk=$1 at=$((($2 - 1) * 200 + 100)) block
    block=$(debugfs -R "bmap /srv/journal/records $((at / 4096))" "$disk?offset=$((2048 * 512))" \
        2>/dev/null)
    printf '#' | dd of="$disk" bs=1 seek=$((2048 * 512 + block * 4096 + at % 4096)) \
        conv=notrunc status=none
}

laps() {
    local firmware=$1 disk=$work/$1.raw lap known=0
    "$here/build.sh" --firmware "$firmware" "$disk"
    for lap in 1 2 3; do
        start "$disk" "$firmware" virtio
        check "$firmware lap $lap: boots and writes" await "SRN-SERVER ready"
        echo "        ready after $(seconds_since_start) s, found $(found records) records"
        check "$firmware lap $lap: nothing announced before is missing" found_all_of "$known"
        check "$firmware lap $lap: syncs records" await "SRN-SERVER synced $((known + 40 * lap)) "
        kill_qemu
        known=$(last_synced)
    done
    start "$disk" "$firmware" virtio -smbios "type=11,path=$work/readonly"
    check "$firmware: reports and powers off when told to" await_end
    check "$firmware: nothing announced before is missing" found_all_of "$known"
    check "$firmware: and writes nothing" test -z "$(last_synced)"
}

printf 'io.systemd.credential:srn.readonly=1' >"$work/readonly"
for firmware in bios uefi; do
    laps "$firmware"
done

disk=$work/bios.raw
start "$disk" bios virtio
await "SRN-SERVER synced .* "
check "the power button shuts it down" power_down
stopped=$(sed -nE 's/.*SRN-SERVER stopped ([0-9]+).*/\1/p' "$work/serial")
check "it says where it stopped" test -n "$stopped"
kill_qemu
damage_record "$disk" 7
start "$disk" bios virtio
check "it halts on a damaged journal" await "SRN-SERVER halted"
check "damage in the middle is told" \
    test "$(found intact)" = "no:record_7_of_${stopped:-0}_is_damaged"
kill_qemu

if [[ ${1:-} == --all ]]; then
    "$here/build.sh" "$work/bios.raw"
    for bus in nvme scsi pvscsi sata ide; do
        start "$work/bios.raw" bios "$bus"
        check "boots from $bus" await "SRN-SERVER ready"
        echo "        ready after $(seconds_since_start) s"
        kill_qemu
    done
fi

if ((failures > 0)); then
    echo "$failures checks failed"
    exit 1
fi
echo "all checks held"
