# The few commands that matter. Each installs what it needs from Debian, or says what is missing.
#
#   make demo        protect a real server, lose its site, recover it; on this machine
#   make test        everything that guards a merge
#   make test-full   everything that can be tested on one machine; writes tests/results/
#   make test-lab    what needs hardware or accounts; says what it lacks
#   make fuzz        every decoder, for FUZZ_SECONDS each (60), from a new FUZZ_SEED
#   make bench       measure against others; prints the README's table
#   make sim         simulations, for SEEDS=100000 seeds each; Ctrl-C says how far they got
#   make mutants     known bugs, each of which a simulation has to find

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:

.PHONY: demo test test-full test-lab fuzz bench sim mutants build help

help:
	@sed -n '3,10s/^# *//p' Makefile

build:
	tests/setup/packages.sh build
	cargo build --locked --release -p srn

demo:
	tests/setup/packages.sh build server qemu
	cargo build --locked --release -p srn -p srn-e2e
	target/release/demo

test:
	tests/run.sh merge

test-full:
	tests/run.sh full

test-lab:
	tests/run.sh lab

fuzz: export FUZZ_SECONDS ?= 60
fuzz: export FUZZ_SEED ?= $(shell date +%s)
fuzz:
	cargo test --locked -p srn-testkit --test fuzz -- --nocapture
	cargo test --locked -p srn-link fuzz -- --nocapture
	cargo test --locked -p srn --test fuzz -- --nocapture

bench:
	tests/setup/packages.sh build server qemu nbd bench
	cargo build --locked --release -p srn -p srn-e2e
	target/release/bench

SEEDS ?= 100000

sim:
	cargo build --locked -q -p srn-testkit --bin sim
	target/debug/sim --seeds $(SEEDS)

mutants:
	cargo run --locked -q -p srn-testkit --features mutants --bin mutants
