"""Bakes LoRAs into a pipeline: scripts/merge_lora.py BASE OUTPUT --lora FILE[:WEIGHT] [--lora FILE[:WEIGHT] ...]

BASE is a folder or hub name of Stable Diffusion or SDXL, FILE a LoRA in diffusers' format or a folder with one. OUTPUT
is an ordinary pipeline: each weight W becomes W + the sum of WEIGHT * alpha / rank * B @ A, computed in float32.
"""

from __future__ import annotations

import argparse
import math
import secrets
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from trainers.common.lora_files import LoraFile, find_lora, make_readable, read_lora

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def parse_lora(text: str) -> tuple[Path, float]:
    """File and weight of FILE[:WEIGHT]; what follows the last colon belongs to the path unless it is a number."""
    path, colon, number = text.rpartition(":")
    try:
        weight = float(number) if colon else None
    except ValueError:
        if Path(path).exists():
            raise ValueError(f"--lora {text}: {number} is no weight; give a number, such as {path}:0.8") from None
        weight = None
    if weight is None:
        return Path(text), 1.0
    if not math.isfinite(weight):
        raise ValueError(f"--lora {text}: the weight must be finite")
    return Path(path), weight


def check_fit(file: Path, lora: LoraFile, pipeline: Any) -> None:
    """ValueError where the pipeline has not what the LoRA changes, which diffusers only warns about."""
    for network, state in lora.tensors.items():
        owner = getattr(pipeline, network, None)
        if owner is None:
            raise ValueError(f"{file}: changes {network}, and the base has none; take the base that it was trained on")
        layers = dict(owner.named_modules())
        for module in lora.ranks(network):
            layer = layers.get(module, layers.get(module.removeprefix("text_model.")))
            shape = [len(state[f"{module}.lora_B.weight"]), *state[f"{module}.lora_A.weight"].shape[1:]]
            found = list(layer.weight.shape) if hasattr(layer, "weight") else "missing"
            if found != shape:
                advice = "take the base that it was trained on"
                raise ValueError(f"{file}: changes {network}.{module} {shape}, which in the base is {found}; {advice}")


def merge(base: str, loras: list[tuple[Path, float]]) -> Any:
    """The pipeline with all LoRAs in its weights, float32."""
    from diffusers import DiffusionPipeline

    files = [(find_lora(path), read_lora(path)) for path, _ in loras]  # before a base is loaded, or downloaded
    options = {"safety_checker": None, "requires_safety_checker": False, "use_safetensors": True}
    pipeline = DiffusionPipeline.from_pretrained(base, torch_dtype=torch.float32, **options)
    if not hasattr(pipeline, "fuse_lora"):
        raise ValueError(f"{base}: is a {type(pipeline).__name__}; give Stable Diffusion or SDXL")
    names = [f"lora_{number}" for number in range(len(files))]
    for name, (file, lora) in zip(names, files, strict=True):
        check_fit(file, lora, pipeline)
        pipeline.load_lora_weights(file.parent, weight_name=file.name, adapter_name=name)
    pipeline.set_adapters(names, [weight for _, weight in loras])  # only the last one is active after loading
    pipeline.fuse_lora(adapter_names=names)
    pipeline.unload_lora_weights()
    return pipeline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="a folder or hub name")
    parser.add_argument("output", type=Path, help="a new folder")
    parser.add_argument(
        "--lora", action="append", required=True, metavar="FILE[:WEIGHT]", help="weight: 1 if not given"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the files")
    options = parser.parse_args()
    staging = options.output.with_name(f".tmp-{options.output.name}-{secrets.token_hex(4)}")
    try:
        if options.output.exists():
            raise ValueError(f"{options.output}: exists; choose a new folder")
        pipeline = merge(options.base, [parse_lora(text) for text in options.lora])
        pipeline.to(DTYPES[options.dtype]).save_pretrained(staging)
        for file in staging.rglob("*.safetensors"):
            make_readable(file)
        staging.rename(options.output)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    print(f"merged: {options.output}")


if __name__ == "__main__":
    main()
