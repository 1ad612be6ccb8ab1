#!/bin/bash
# Installs what a purpose needs from Debian, or says what is missing.
#
#   tests/setup/packages.sh PURPOSE...
#
# When everything is there it says so and touches no network. As root it installs the rest with
# apt-get; as anybody else it prints the missing packages, one line, and exits 3.
set -euo pipefail

declare -A PURPOSES=(
    [server]="mmdebstrap mtools dosfstools e2fsprogs fdisk grub-common grub-pc-bin \
grub-efi-amd64-bin python3 uidmap"
    [qemu]="qemu-system-x86 qemu-system-common qemu-utils ovmf seabios mtools fdisk binutils procps"
    [nbd]="libnbd-bin python3-libnbd nbdkit fio"
    [power]="qemu-system-x86 busybox-static cpio binutils e2fsprogs util-linux"
    [build]="gcc libc6-dev make"
    [bench]="openssh-client openssh-server openssl rsync socat zstd"
    [lint]="shellcheck"
    [reader]="python3 python3-xxhash python3-lz4 python3-zstandard"
)

# These come from one source package and must be of one version: a qemu-utils from backports beside
# a qemu-system-x86 from the release cannot be installed.
ONE_VERSION=(qemu-system-x86 qemu-system-common qemu-utils)

usage() {
    echo "usage: $0 PURPOSE...   (purposes: ${!PURPOSES[*]})" >&2
    exit 2
}

is_installed() {
    [[ $(dpkg-query -W -f='${db:Status-Status}' "$1" 2>/dev/null) == installed ]]
}

installed_version() {
    if is_installed "$1"; then
        dpkg-query -W -f='${Version}' "$1"
    fi
}

# The version in which all of ONE_VERSION can be had: the installed one where apt still offers it
# for each, else the one apt would choose for the first.
shared_version() {
    local package version
    for package in "${ONE_VERSION[@]}"; do
        version=$(installed_version "$package")
        if [[ -n $version ]] && all_offered_in "$version"; then
            echo "$version"
            return
        fi
    done
    apt-cache policy "${ONE_VERSION[0]}" | awk '/Candidate:/ {print $2}'
}

all_offered_in() {
    local package
    for package in "${ONE_VERSION[@]}"; do
        if [[ $(installed_version "$package") != "$1" ]] &&
            ! apt-cache madison "$package" | awk '{print $3}' | grep -xF "$1" >/dev/null; then
            return 1
        fi
    done
}

# The arguments for apt-get: every missing package, with a version where that matters.
requests() {
    local package other version
    for package in "$@"; do
        if [[ " ${ONE_VERSION[*]} " == *" $package "* ]]; then
            version=$(shared_version)
            for other in "${ONE_VERSION[@]}"; do
                echo "$other=$version"
            done
        else
            echo "$package"
        fi
    done | sort -u
}

[[ $# -gt 0 ]] || usage
missing=()
for purpose in "$@"; do
    [[ -n ${PURPOSES[$purpose]:-} ]] || usage
    for package in ${PURPOSES[$purpose]}; do
        if ! is_installed "$package" && [[ " ${missing[*]-} " != *" $package "* ]]; then
            missing+=("$package")
        fi
    done
done

if [[ ${#missing[@]} -eq 0 ]]; then
    echo "packages for $*: all installed"
    exit 0
fi
if [[ $(id -u) -ne 0 ]]; then
    echo "packages for $*: missing, install as root: ${missing[*]}" >&2
    exit 3
fi
echo "packages for $*: installing ${missing[*]}"
export DEBIAN_FRONTEND=noninteractive
# Package lists that are older than the mirror's lead to files that are gone: always refresh.
apt-get update -qq
mapfile -t wanted < <(requests "${missing[@]}")
apt-get install -y -qq --no-install-recommends --allow-downgrades "${wanted[@]}" >/dev/null
echo "packages for $*: installed"
