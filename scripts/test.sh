#!/usr/bin/env bash
# Lint and test. Sets itself up as quickstart.sh does. --slow also runs the tests with the mark `slow`; all other
# arguments go to pytest (for example: -k network).
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh
setup_environment requirements.txt tests/requirements.txt

ruff check .
ruff format --check .
WHICH=()
if [ "${1:-}" = --slow ]; then
    WHICH=(-m "")  # in the place of pyproject.toml's "not slow"
    shift
fi
# A worker per core, up to 8, of one thread each; the tests of a file stay together and share what they make.
CORES=$(getconf _NPROCESSORS_ONLN)
export OMP_NUM_THREADS=1
python -m pytest -n $((CORES < 8 ? CORES : 8)) --dist loadfile "${WHICH[@]}" "$@"
