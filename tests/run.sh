#!/bin/bash
# Runs a tier of the tests and ends with one line for each step, and one for all.
#
#   tests/run.sh merge    what guards a merge: fast tests first, then end to end, then boots
#   tests/run.sh full     all that one machine can do; leaves tests/results/DATE.md
#   tests/run.sh lab      what needs more than that; names what is missing
#
# Everything that a step prints is kept in target/test-logs. The first step that fails ends `merge`;
# `full` goes on and fails in the end.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
tier=${1:-}
logs=target/test-logs
export CARGO_TERM_COLOR=never RUST_BACKTRACE=${RUST_BACKTRACE:-1}

results=()
failed=0
began=$SECONDS

# step NAME COMMAND...
step() {
    local name=$1 from=$SECONDS code=0 took words
    shift
    printf '%-44s' "$name"
    local log="$logs/${name//[^a-z0-9]/-}.log"
    "$@" >"$log" 2>&1 </dev/null || code=$?
    took=$((SECONDS - from))
    words=$(grep -hoE '^test result: [a-zA-Z]+\. [0-9]+ passed; [0-9]+ failed; [0-9]+ ignored' "$log" |
        awk '{p += $4; f += $6; i += $8} END {if (NR) print p " passed, " f " failed, " i " ignored"}')
    if [[ $code -eq 0 ]]; then
        printf 'ok %5d s  %s\n' "$took" "$words"
        results+=("| $name | ok | $took s | $words |")
        return 0
    fi
    printf 'FAILED %d s (exit code %d), the end of %s:\n' "$took" "$code" "$log"
    tail -n 60 "$log"
    results+=("| $name | FAILED ($code) | $took s | $words |")
    failed=$((failed + 1))
    [[ $tier == full ]] || finish
}

finish() {
    local all="${#results[@]} steps, $failed failed, $((SECONDS - began)) s"
    if [[ $tier == full ]]; then
        write_results "$all"
    fi
    echo
    printf '%s\n' "${results[@]}"
    if [[ $failed -eq 0 ]]; then
        echo "tests ($tier): passed: $all"
        exit 0
    fi
    echo "tests ($tier): FAILED: $all"
    exit 1
}

write_results() {
    local file
    file=tests/results/$(date -u +%Y-%m-%d).md
    mkdir -p tests/results
    {
        echo "# Test results of $(date -u +%Y-%m-%d)"
        echo
        echo "Commit $(git rev-parse --short HEAD 2>/dev/null || echo unknown)," \
            "$(nproc) cores, Linux $(uname -r), $(rustc --version)."
        echo
        echo "SIM_SEEDS=$SIM_SEEDS SRN_LAPS=$SRN_LAPS POWER_LAPS=$POWER_LAPS."
        echo
        echo "| step | result | time | tests |"
        echo "|---|---|---|---|"
        printf '%s\n' "${results[@]}"
        echo
        echo "$1."
    } >"$file"
    echo "written: $file"
}

packages() {
    local purpose
    for purpose in "$@"; do
        tests/setup/packages.sh "$purpose" || return
    done
}

scripts() {
    git ls-files '*.sh' .ci/run | xargs shellcheck -x
}

# Rooms by themselves: units, properties, simulation; foreign programs against the NBD and QEMU rooms.
rooms() {
    cargo test --locked --workspace --exclude srn-e2e --exclude srn-power-test --no-fail-fast "$@"
}

# Bugs that are put in on purpose, each of which a simulation has to find.
mutants() {
    cargo run --locked -p srn-testkit --features mutants --bin mutants
}

server_disk() {
    mkdir -p target/test-logs
    tests/server/build.sh "$@"
}

common() {
    mkdir -p "$logs"
    step "packages" packages build lint nbd qemu server power reader
    step "formatting" cargo fmt --all --check
    step "lints" cargo clippy --locked --workspace --all-targets -- -D warnings
    step "scripts" scripts
}

merge() {
    common
    step "rooms: units, properties, simulation" rooms
    step "known bugs are found" mutants
    step "the daemon is built" cargo build --locked -p srn -p srn-e2e
    step "end to end" cargo test --locked -p srn-e2e --no-fail-fast
    step "power cuts" env POWER_LAPS="${POWER_LAPS:-1}" cargo test --locked -p srn-power-test
    step "demonstration, BIOS" target/debug/demo
    finish
}

full() {
    common
    export SIM_SEEDS="${SIM_SEEDS:-3000}" SRN_LAPS="${SRN_LAPS:-40}" POWER_LAPS="${POWER_LAPS:-12}"
    step "rooms: units, properties, simulation" rooms
    step "known bugs are found" mutants
    step "the daemon is built" cargo build --locked -p srn -p srn-e2e
    step "end to end, more laps" cargo test --locked -p srn-e2e --no-fail-fast
    step "power cuts, more laps" cargo test --locked -p srn-power-test
    step "demonstration, BIOS" target/debug/demo
    step "demonstration, UEFI" target/debug/demo --firmware uefi
    step "the demonstration's server can be believed" tests/server/selftest.sh
    step "a server's disk" server_disk target/test-logs/server.raw
    step "boots on every bus" env SRN_DEMO_DISK="$PWD/target/test-logs/server.raw" \
        cargo test --locked -p srn-targets -- --ignored
    rm -f target/test-logs/server.raw
    finish
}

lab() {
    mkdir -p "$logs"
    cat <<'TEXT'
Needs more than one machine without hardware acceleration; not proven until somebody runs it:
  recovery with KVM                 a host whose /dev/kvm works
  two sites over a real network     two hosts
TEXT
    if [[ -z ${SRN_LAB_KVM:-} ]]; then
        echo "KVM: not tried; set SRN_LAB_KVM=1 on a host where it works"
        echo "tests (lab): nothing was run"
        exit 0
    fi
    step "the daemon is built" cargo build --locked -p srn -p srn-e2e
    step "demonstration with KVM" env SRN_DEMO_ACCELERATOR=kvm target/debug/demo
    finish
}

case $tier in
merge | full | lab) "$tier" ;;
*)
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0" >&2
    exit 2
    ;;
esac
