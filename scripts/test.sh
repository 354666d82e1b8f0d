#!/usr/bin/env bash
# Lints and tests: scripts/test.sh [--slow] [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh

.venv/bin/ruff check .
.venv/bin/ruff format --check .
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE
exec .venv/bin/python -m pytest -q "$@"
