"""Bakes LoRAs into a pipeline: scripts/merge_lora.py BASE OUTPUT --lora FILE[:WEIGHT] [--lora FILE[:WEIGHT] ...]

BASE is a folder or hub name of Stable Diffusion or SDXL, FILE a LoRA of any program that docs/lora.md names. OUTPUT
is an ordinary pipeline: each weight W becomes W + the sum of WEIGHT * alpha / rank * B @ A, computed in float32.
"""

from __future__ import annotations

import argparse
import secrets
import shutil

from trainers.common.lora.tensors import make_readable
from trainers.inference.arguments import DTYPES
from trainers.inference.command import check_new, command, path_argument
from trainers.inference.lora_pipeline import add_loras, cast, check_weights, load_pipeline, parse_loras


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="a folder or hub name")
    parser.add_argument("output", type=path_argument, help="a new folder")
    parser.add_argument("--lora", action="append", required=True, metavar="FILE[:WEIGHT]", help="default weight: 1")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the files")
    options = parser.parse_args()
    check_new(options.output)
    loras = [(path, weight) for path, weight in parse_loras(options.lora) if weight != 0]  # a DoRA would act at 0
    pipeline = load_pipeline(options.base)
    pipeline.fuse_lora(adapter_names=list(add_loras(pipeline, loras)))
    pipeline.unload_lora_weights()
    check_weights(cast(pipeline, DTYPES[options.dtype]))
    staging = options.output.with_name(f".tmp-{options.output.name}-{secrets.token_hex(4)}")
    try:
        pipeline.save_pretrained(staging)
        for file in staging.rglob("*.safetensors"):
            make_readable(file)
        staging.rename(options.output)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    print(f"merged: {options.output}")


if __name__ == "__main__":
    main()
