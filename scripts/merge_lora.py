"""Bakes LoRAs into a pipeline: scripts/merge_lora.py BASE OUTPUT --lora FILE[:WEIGHT] [--lora FILE[:WEIGHT] ...]

BASE is a folder or hub name of Stable Diffusion or SDXL, FILE a LoRA of any program that docs/lora.md names. OUTPUT
is an ordinary pipeline: each weight W becomes W + the sum of WEIGHT * alpha / rank * B @ A, computed in float32. Its
files are the base's, byte for byte, but for the networks that a LoRA changes: these have the base's names of tensors,
and its precision. With --dtype all networks are written in that one.
"""

from __future__ import annotations

import argparse
import secrets
import shutil

from datasets_lib.errors import FileError, UserError
from datasets_lib.foreign import shown
from trainers.inference.arguments import DTYPES
from trainers.inference.command import check_new, command, path_argument
from trainers.inference.lora_pipeline import add_loras, check_weights, load_pipeline, parse_loras
from trainers.inference.merged_pipeline import write_merged


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="a folder, .safetensors file or hub name")
    parser.add_argument("output", type=path_argument, help="a new folder")
    parser.add_argument("--lora", action="append", required=True, metavar="FILE[:WEIGHT]", help="default weight: 1")
    parser.add_argument("--dtype", choices=DTYPES, help="of all files' weights; default: the base's own")
    options = parser.parse_args()
    check_new(options.output)
    loras = [(path, weight) for path, weight in parse_loras(options.lora) if weight != 0]  # a DoRA would act at 0
    pipeline = load_pipeline(options.base)
    scheduler = pipeline.scheduler
    pipeline.fuse_lora(adapter_names=list(add_loras(pipeline, loras)))
    changed = set(pipeline.get_list_adapters())  # networks that have one
    changed |= {"scheduler"} if pipeline.scheduler is not scheduler else set()  # one that the LoRA needs
    pipeline.unload_lora_weights()
    check_weights(pipeline)
    staging = options.output.with_name(f".tmp-{options.output.name}-{secrets.token_hex(4)}")
    try:
        write_merged(pipeline, changed, staging, DTYPES[options.dtype] if options.dtype else None)
        staging.rename(options.output)
    except OSError as error:
        if isinstance(error, UserError):
            raise
        raise FileError(f"{options.output}: cannot be written ({shown(error)}); choose another place") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    print(f"merged: {options.output}")


if __name__ == "__main__":
    main()
