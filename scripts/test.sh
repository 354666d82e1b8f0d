#!/usr/bin/env bash
# Lints, checks types and tests: scripts/test.sh [--slow] [pytest arguments]
# On three workers, as tests also wait, unless an argument does not begin with --, as -k and files do: a few tests
# start sooner without.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh

workers=(-n 3 --dist loadfile)
for argument; do
    [[ $argument == --* ]] || workers=()
done

.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE
exec .venv/bin/python -m pytest -q ${workers[@]+"${workers[@]}"} "$@"
