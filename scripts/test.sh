#!/usr/bin/env bash
# Lint and test. Sets itself up as quickstart.sh does; arguments go to pytest (for example: -k network).
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh
setup_environment requirements.txt tests/requirements.txt

ruff check .
ruff format --check .
python -m pytest "$@"
