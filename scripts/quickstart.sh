#!/usr/bin/env bash
# Trains a model that draws handwritten digits by class, in about 4 minutes: scripts/quickstart.sh [section.key=value ...]
# Run it again to continue after an interruption. Pictures: outputs/quickstart/samples
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh

# threads that wait must not spin: on a busy machine a step would take 20 times as long
export OMP_WAIT_POLICY=PASSIVE
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(.venv/bin/python scripts/benchmarks/probe_threads.py)}
exec .venv/bin/accelerate launch --quiet --num_processes 1 --num_machines 1 --dynamo_backend no --mixed_precision no \
    --num_cpu_threads_per_process "$OMP_NUM_THREADS" \
    train.py configs/digits.yaml base.resume_from_checkpoint=latest "$@"
