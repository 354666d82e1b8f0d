#!/usr/bin/env bash
# From nothing to a LoRA, all trained here: an autoencoder, a text-to-image model and a LoRA that teaches it a style,
# and what they are worth, in 8 to 10 minutes: scripts/zero_to_lora.sh [--fast] [OUTPUT [base.key=value ...]]
# Run it again to continue after an interruption. --fast: a few steps of everything, to see that it works.
# Numbers and pictures: outputs/zero/lora/evaluation
set -euo pipefail
fast=
if [ "${1-}" = --fast ]; then
    fast=yes
    shift
fi
out=${1:+$(realpath -m "$1")}
out=${out:-outputs/zero}
shift $(($# > 0))
cd "$(dirname "$0")/.."
. scripts/setup.sh

# threads that wait must not spin: on a busy machine a step would take 20 times as long
export OMP_WAIT_POLICY=PASSIVE
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(.venv/bin/python scripts/benchmarks/probe_threads.py)}
overrides=("$@")

train() { # STAGE SECTION.KEY=VALUE...: configs/zero_to_lora/STAGE.yaml in OUTPUT/STAGE
    local stage=$1 few=()
    local task=${stage/#base/text_to_image}
    shift
    [ -z "$fast" ] || few=(base.{max_train,valid,checkpointing}_steps=4 "$task".{lr_warmup_steps=1,valid_batch_size=2})
    echo "== $stage"
    .venv/bin/accelerate launch --quiet --num_processes 1 --num_machines 1 --dynamo_backend no --mixed_precision no \
        --num_cpu_threads_per_process "$OMP_NUM_THREADS" train.py "configs/zero_to_lora/$stage.yaml" \
        base.output_dir="$out/$stage" base.resume_from_checkpoint=latest "$@" "${few[@]}" "${overrides[@]}"
}

once() { # FOLDER COMMAND...: unless FOLDER is there; the command makes FOLDER.part
    [ ! -d "$1" ] || return 0
    rm -rf "$1.part"
    "${@:2}"
    mv "$1.part" "$1"
}

mkdir -p "$out"
once "$out/data" .venv/bin/python scripts/data/make_digits.py "$out/data.part"
train vae base.train_data_dir="$out/data/colors"
once "$out/blank" .venv/bin/python scripts/data/make_base.py "$out/vae" configs/zero_to_lora/base.yaml "$out/blank.part" \
    --max-length 8 base.train_data_dir="$out/data/plain"
train base base.train_data_dir="$out/data/plain" text_to_image.pretrained_model_name_or_path="$out/blank"
train lora base.train_data_dir="$out/data/paper" lora.pretrained_model_name_or_path="$out/base"
.venv/bin/python scripts/benchmarks/measure_style.py "$out/base" "$out/lora" ${fast:+--number 10}
