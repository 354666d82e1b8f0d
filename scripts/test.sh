#!/usr/bin/env bash
# Lints and tests: scripts/test.sh [--slow] [pytest arguments]
# On two workers, unless an argument selects tests or sets an option of pytest's own: what does not begin with --.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh

workers=(-n 2 --dist loadgroup)
for argument; do
    [[ $argument == --* ]] || workers=()
done

.venv/bin/ruff check .
.venv/bin/ruff format --check .
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE
exec .venv/bin/python -m pytest -q ${workers[@]+"${workers[@]}"} "$@"
