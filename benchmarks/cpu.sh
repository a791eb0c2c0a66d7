#!/usr/bin/env bash
# The CPU table of results/speed.md in one run of about 20 minutes, with the machine otherwise idle: the network of
# DiMR-XL/2R, the digits' network, and the first run in a clone of this commit. Needs 24 GB of memory.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh
setup_environment requirements.txt
grep -m 1 'model name' /proc/cpuinfo || true

XL=configs/DiMR-XL-2R_imagenet256.py
DIGITS=configs/digits_released.py
python benchmarks/speed.py gradient --config=$XL --batch=2 --rounds=4 --variants=released-no,eager-no,blocks-bf16
python benchmarks/speed.py sample --config=$XL --batch=2 --steps=3 --rounds=4 --variants=released-no,eager-bf16,blocks-bf16
WAYS=released-no,eager-no,eager-bf16,compiled-no,compiled-bf16
python benchmarks/speed.py train --config=$DIGITS --batch=64 --rounds=15 --variants=$WAYS
python benchmarks/speed.py sample --config=$DIGITS --batch=50 --steps=6 --rounds=15 --variants=$WAYS

CLONE=$(mktemp -d)
trap 'rm -rf "$CLONE"' EXIT
git clone -q . "$CLONE"
(cd "$CLONE" && bash scripts/quickstart.sh > log 2>&1 || tail -n 20 log)
echo "scripts/quickstart.sh:"
cat "$CLONE/workdir/quickstart/report.json"
